"""From decoded images to normalized pixels, on the device: flip, crop, antialiased resize, ImageNet normalization.

Resizing is Pillow's `Image.resize(..., BILINEAR)`: a triangle filter, as wide as the downscaling factor, renormalized
at the border. It is linear and separable, so an image is `rows @ pixels @ columns`, with one banded matrix per axis
and image that is built here from a few integers. The crop branch (resize, crop, resize) composes its two matrices
first. One resize agrees with Pillow within one gray level, two within two: Pillow rounds after each of its passes.
"""

from collections.abc import Mapping
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from detr_jax.config import MEAN, STD, DataConfig

IMAGENET_MEAN, IMAGENET_STD = np.array(MEAN, np.float32), np.array(STD, np.float32)

# Three bfloat16 passes on a TPU, TF32 on a GPU: pixels are exact in either, weights to better than 1/8 gray level.
_PRECISION = lax.Precision.HIGH


def resample(
    pixels: jax.Array,
    source_size: jax.Array,
    flip: jax.Array,
    resized_size: jax.Array,
    crop: jax.Array,
    size: jax.Array,
    *,
    bucket: tuple[int, int],
    two_resizes: bool,
    max_crop: int = 600,
    only_flip: bool = False,
) -> jax.Array:
    """Makes the model's input from a batch of the pipeline.

    Args:
        pixels: uint8 [b, Hs, Ws, 3]; images at the top left.
        source_size: int32 [b, 2] (h, w) of the images.
        flip: bool [b]; horizontally, before all else.
        resized_size: int32 [b, 2] (h, w) of the first resize; `source_size` where there is none.
        crop: int32 [b, 4] (top, left, height, width) in the resized image.
        size: int32 [b, 2] final (h, w).
        bucket: (H, W) of the result.
        two_resizes: some images are cropped after a first resize; static. If not, `resized_size` and `crop` are not
            looked at.
        max_crop: the largest height or width of a crop of an image that is resized twice; static.
        only_flip: images, buckets and sizes are all the same, so that there is nothing to resize; static.

    Returns:
        float32 [b, H, W, 3], normalized; zero outside of `size`.
    """
    if only_flip:
        if pixels.shape[1:3] != bucket:
            raise ValueError(f"only_flip: got pixels {pixels.shape[1:3]} (height, width), expected the bucket {bucket}")
        return normalize(jnp.where(flip[:, None, None, None], pixels[:, :, ::-1], pixels), size)

    def matrix(axis: int) -> jax.Array:
        args = source_size[:, axis], resized_size[:, axis], crop[:, axis], crop[:, axis + 2], size[:, axis]
        mirrored = flip if axis == 1 else jnp.zeros_like(flip)
        build = _composed_matrix if two_resizes else _single_matrix
        bounds = (pixels.shape[1 + axis], max_crop, bucket[axis])
        return jax.vmap(lambda *a: build(*a, bounds=bounds))(mirrored, *args)

    rows, columns = matrix(0), matrix(1)  # [b, H, Hs], [b, W, Ws]
    image = pixels.astype(jnp.float32)
    (Hs, Ws), (H, W) = pixels.shape[1:3], bucket
    if H * Ws * (Hs + W) <= Hs * W * (Ws + H):  # the cheaper order
        image = jnp.einsum("bos,bswc->bowc", rows, image, precision=_PRECISION)
        image = jnp.einsum("bos,bhsc->bhoc", columns, image, precision=_PRECISION)
    else:
        image = jnp.einsum("bos,bhsc->bhoc", columns, image, precision=_PRECISION)
        image = jnp.einsum("bos,bswc->bowc", rows, image, precision=_PRECISION)
    return normalize(image, size)


class Resampling(Protocol):
    """What `resample` needs to know of a sampler."""

    two_resizes: bool
    only_flip: bool


@jax.named_scope("resampling")
def resample_batch(
    batch: Mapping[str, jax.Array], bucket: tuple[int, int], sampler: Resampling, data: DataConfig
) -> jax.Array:
    """`resample` of a batch that the sampler planned: float32 [b, H, W, 3]."""
    return resample(
        batch["pixels"],
        batch["source_size"],
        batch["flip"],
        batch["resized_size"],
        batch["crop"],
        batch["size"],
        bucket=bucket,
        two_resizes=sampler.two_resizes,
        max_crop=data.crop_size[1],
        only_flip=sampler.only_flip,
    )


def normalize(pixels: jax.Array, sizes: jax.Array) -> jax.Array:
    """What models take: 0-255 `[b, H, W, 3]` and int `[b, 2]` (h, w) -> float32 `[b, H, W, 3]`, zero in the padding."""
    inside = (jnp.arange(pixels.shape[1]) < sizes[:, :1])[:, :, None, None]
    inside &= (jnp.arange(pixels.shape[2]) < sizes[:, 1:])[:, None, :, None]
    return jnp.where(inside, (pixels.astype(jnp.float32) - 255 * IMAGENET_MEAN) / (255 * IMAGENET_STD), 0)


def _single_matrix(mirrored, source, resized, start, length, final, *, bounds):
    """[out, in]: one resize from `source` to `final` pixels."""
    del resized, start, length
    bound_in, _, bound_out = bounds
    return _triangle(source, final, 0, bound_out, _positions(mirrored, source, bound_in))


def _composed_matrix(mirrored, source, resized, start, length, final, *, bounds):
    """[out, in]: a resize to `resized`, a crop and a resize to `final`; or one resize where the crop is everything."""
    bound_in, bound_crop, bound_out = bounds
    positions = _positions(mirrored, source, bound_in)
    first = _triangle(source, resized, start, bound_crop, positions)
    second = _triangle(length, final, 0, bound_out, jnp.arange(bound_crop))
    second = jnp.where(jnp.arange(bound_crop) < length, second, 0)
    twice = jnp.matmul(second, first, precision=_PRECISION)
    once = _triangle(source, final, 0, bound_out, positions)
    return jnp.where((resized == source) & (length == source), once, twice)


def _positions(mirrored: jax.Array, source: jax.Array, bound: int) -> jax.Array:
    """[in]: where each stored pixel is in the image after the flip; negative or >= source in the padding."""
    stored = jnp.arange(bound)
    return jnp.where(mirrored, source - 1 - stored, stored)


def _triangle(source, final, start, bound_out: int, positions) -> jax.Array:
    """[out, in]: weights of input pixels at `positions` for the output pixels `start`, `start + 1`, ...

    As `precompute_coeffs` of Pillow: out pixel o is centered at (o + 0.5) * source / final.
    """
    scale = source.astype(jnp.float32) / final
    center = (start + jnp.arange(bound_out) + 0.5) * scale
    distance = (positions + 0.5 - center[:, None]) / jnp.maximum(scale, 1)
    inside = (positions >= 0) & (positions < source)
    weights = jnp.where(inside, jnp.maximum(1 - jnp.abs(distance), 0), 0)
    return weights / jnp.maximum(weights.sum(1, keepdims=True), 1e-6)
