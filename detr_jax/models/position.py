"""Position encodings of feature maps and boxes."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from detr_jax.errors import UserError


def sine(x: jax.Array, features: int, temperature: float = 10000.0) -> jax.Array:
    """Sine and cosine pairs of `x` (radians), `[..., n * features]`: the frequencies repeat after `features`."""
    pair, odd = np.divmod(np.arange(x.shape[-1]) % features, 2)
    frequency = (temperature ** (-2 * pair / features)).astype(np.float32)
    # A cosine is a sine a quarter turn later. Stacked pairs would have to be interleaved, which a TPU does slowly.
    return jnp.sin(x * frequency + (math.pi / 2 * odd).astype(np.float32))


def map_angles(valid: jax.Array, *, half_pixel: bool) -> jax.Array:
    """Where cells are in the valid part of a map: `valid [b, h, w]` -> (y, x) `[b, h, w, 2]`, 0 to 2 pi.

    `half_pixel` takes pixel centers before normalizing, as Deformable DETR does, and DETR and DINO do not.
    """

    def axis(dim):
        position = jnp.cumsum(valid, dim, dtype=jnp.float32)
        last = jax.lax.slice_in_dim(position, -1, None, axis=dim)
        return (position - 0.5 * half_pixel) / (last + 1e-6) * 2 * math.pi

    return jnp.stack([axis(1), axis(2)], -1)


def sine_2d(angles: jax.Array, features: int, temperature: float = 10000.0) -> jax.Array:
    """2-d sine encoding of `map_angles`: `[..., 2]` -> `[..., features]`, y first. DINO's `temperature` is 20."""
    half = features // 2
    y, x = angles[..., :1], angles[..., 1:]
    return sine(jnp.where(np.arange(features) < half, y, x), half, temperature)


def sine_boxes(boxes: jax.Array, features: int) -> jax.Array:
    """Sine encoding of normalized coordinates: `[..., 4]` -> `[..., 4 * features]` (two-stage queries)."""
    return sine(jnp.repeat(boxes * 2 * math.pi, features, -1), features)


class LearnedMap(nnx.Module):
    """Learned row and column embeddings (DETR's option), for maps up to 50 x 50."""

    def __init__(self, features: int, *, rngs: nnx.Rngs, size: int = 50):
        uniform = nnx.initializers.uniform(1.0)
        self.row_embed = nnx.Param(uniform(rngs.params(), (size, features // 2), jnp.float32))
        self.col_embed = nnx.Param(uniform(rngs.params(), (size, features // 2), jnp.float32))

    def __call__(self, valid: jax.Array) -> jax.Array:
        """`valid [b, h, w]` -> `[b, h, w, features]`, column first as in the official code."""
        b, h, w = valid.shape
        row_embed, col_embed = self.row_embed[...], self.col_embed[...]
        if max(h, w) > len(row_embed):
            raise UserError(
                f"model.position='learned' covers maps up to {len(row_embed)} x {len(row_embed)}, got {h} x {w}: "
                "use smaller images or model.position='sine'"
            )
        features = row_embed.shape[1]
        columns = jnp.broadcast_to(col_embed[None, None, :w], (b, h, w, features))
        rows = jnp.broadcast_to(row_embed[None, :h, None], (b, h, w, features))
        return jnp.concatenate([columns, rows], -1)
