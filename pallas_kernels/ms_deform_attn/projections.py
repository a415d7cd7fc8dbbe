"""Multi-scale deformable attention with the projections of its tokens, on the TensorCore of a TPU.

The paper's module (Deformable DETR, section 4.1) up to its output projection, for tokens in block order. What is
projected from all tokens is made by a kernel, which writes it as the kernel of `tensorcore.py` reads it, features on
sublanes and tokens on lanes: the values (`project_values`), and for self-attention the sampling offsets and attention
weights too, with softmax and locations (`project`). By XLA each is a pass over the tokens in main memory. Backward, the
kernels compute again from the tokens what they need, so that nothing else is kept, and gradients of the weights are
added up over the tiles of an image, in float32.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.by_platform import vmem_bytes
from pallas_kernels.derivatives import first_order
from pallas_kernels.ms_deform_attn.order import TILE, UNIT, BlockOrder, block_order
from pallas_kernels.ms_deform_attn.projections_kernels import (
    backward_kernel,
    forward_kernel,
    values_backward_kernel,
    values_forward_kernel,
)
from pallas_kernels.ms_deform_attn.tensorcore import attend_tiles, in_tiles
from pallas_kernels.ms_deform_attn.tensorcore_walk import too_large
from pallas_kernels.over_mesh import Axes, over_mesh

TILES = 4
"""At most so many tiles of 128 tokens in a step."""


class Projections(NamedTuple):
    """Kernel `[c, n]` and bias `[n]` of each linear layer; rows of samples are ordered by head, level and point."""

    value: tuple[jax.Array, jax.Array]
    """`n = h * d`."""
    x: tuple[jax.Array, jax.Array]
    """Of the sampling offsets in pixels, `n = h * l * p`."""
    y: tuple[jax.Array, jax.Array]
    logits: tuple[jax.Array, jax.Array]
    """Of the attention weights before their softmax."""


def ms_deform_self_attn(
    features: jax.Array,
    position: jax.Array,
    reference_points: jax.Array,
    valid: jax.Array,
    spatial_shapes: Sequence[tuple[int, int]],
    projections: Projections,
    *,
    num_heads: int,
    batch_axis: Axes = "data",
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """What each head of each token samples from all of them: `ms_deform_attn` and the projections before it.

    Differentiable once, in reverse, in `features`, `position` and the projections. The products are of `features`'
    type, float32 in six bfloat16 passes; their results, softmax and locations are float32. Under a mesh
    (`jax.set_mesh`), images are split over `batch_axis`.

    Args:
        features: `[b, s, c]` in `block_order(spatial_shapes)`, float32 or bfloat16: what values are projected from.
        position: `[b, s, c]` in the same type, which is added for offsets and weights.
        reference_points: `[b, s, l, 2]`, (x, y) in 0-1 of each level's map; constants.
        valid: bool `[b, s]`; other tokens, and the padding of the order, have the value zero.
        spatial_shapes: (height, width) of each of the `l` levels; static.
        projections: weights in float32; they are rounded to `features`' type.
        num_heads: `h`.
        batch_axis: mesh axis, or several, over which the batch is split.
        interpret: run on the CPU, slowly: for tests.

    Returns:
        What is sampled, `[b, h * d, s]` in `features`' type: tokens last. And `features` themselves, for the residual
        connection around the attention: gradients of these are added in the kernel, not by a pass over the tokens.

    Raises:
        ValueError: shapes that do not fit together or are not supported, or a mesh with other axes
            (`pallas_kernels.over_mesh`).
    """
    order = block_order(spatial_shapes)
    points = _check(features, position, reference_points, valid, order, projections, num_heads)
    if len(features) == 0:
        return jnp.zeros((0, projections.value[1].size, order.length), features.dtype), features
    d = projections.value[1].size // num_heads

    def of_images(features, position, places, valid, *weights):
        arrays = features, position, places, valid
        projected: Any = project(*arrays, Weights(*weights), order, points, interpret)
        value, x, y, weight, features = projected
        output = jnp.asarray(attend_tiles(value, x, y, weight, order, interpret))[:, :, :d]
        return output.reshape(len(output), -1, order.length), features

    return over_mesh(
        of_images,
        features,
        position,
        places(reference_points, order),
        _as_row(valid, order),
        shared=in_rows(projections, num_heads),
        op="ms_deform_self_attn",
        batch_axis=batch_axis,
        partitions=False,
    )


def ms_deform_cross_attn(
    features: jax.Array,
    valid: jax.Array,
    spatial_shapes: Sequence[tuple[int, int]],
    value: tuple[jax.Array, jax.Array],
    sampling_locations: jax.Array,
    attention_weights: jax.Array,
    *,
    batch_axis: Axes = "data",
    interpret: bool = False,
) -> jax.Array:
    """What other queries sample from the tokens: `ms_deform_attn` and the projection of its values.

    Differentiable, and computed, as `ms_deform_self_attn`; in the locations and weights, too.

    Args:
        features: `[b, s, c]` in `block_order(spatial_shapes)`, float32 or bfloat16.
        valid: bool `[b, s]`; other tokens, and the padding of the order, have the value zero.
        spatial_shapes: (height, width) of each of the `l` levels; static.
        value: kernel `[c, h * d]` and bias `[h * d]` of the projection, float32.
        sampling_locations: `[b, q, h, l, p, 2]`, as for `ms_deform_attn`.
        attention_weights: `[b, q, h, l, p]`.
        batch_axis: mesh axis, or several, over which the batch is split.
        interpret: run on the CPU, slowly: for tests.

    Returns:
        `[b, q, h, d]` in `features`' type.

    Raises:
        ValueError: as `ms_deform_self_attn`.
    """
    order = block_order(spatial_shapes)
    _check_tokens(features, valid, order)
    b, q, heads, levels, points = attention_weights.shape
    kernel, bias = value
    if sampling_locations.shape != (*attention_weights.shape, 2) or (b, levels) != (len(features), len(spatial_shapes)):
        raise ValueError(
            f"attention_weights {attention_weights.shape} and sampling_locations {sampling_locations.shape} must be "
            f"[b, q, h, l, p] and [b, q, h, l, p, 2] with b = {len(features)} and l = {len(spatial_shapes)}"
        )
    if bias.size % heads or kernel.shape != (features.shape[2], bias.size):
        raise ValueError(
            f"the kernel of value must be [{features.shape[2]}, h * d] with h = {heads}, got {kernel.shape}, and its "
            f"bias [h * d], got {bias.shape}"
        )
    if reason := too_large(order, points):
        raise ValueError(reason)
    d = bias.size // heads
    if 0 in (b, q):
        return jnp.zeros((b, q, heads, d), features.dtype)

    def of_images(features, valid, locations, weights, *layer):
        projected: Any = project_values(features, valid, layer, heads, interpret)
        samples = in_tiles(locations, weights, np.ones(q, bool), order)
        output = jnp.asarray(attend_tiles(projected, *samples, order, interpret))
        return output.transpose(0, 3, 1, 2)[:, :q, :, :d]

    return over_mesh(
        of_images,
        features,
        _as_row(valid, order),
        sampling_locations,
        attention_weights,
        shared=_rows(value, heads, 16),
        op="ms_deform_cross_attn",
        batch_axis=batch_axis,
        partitions=False,
    )


def _check_tokens(features, valid, order: BlockOrder) -> None:
    if features.ndim != 3 or features.dtype not in (jnp.float32, jnp.bfloat16):
        raise ValueError(f"features must be [b, s, c] in float32 or bfloat16, got {features.shape} in {features.dtype}")
    if features.shape[1] != order.length:
        raise ValueError(
            f"features have {features.shape[1]} tokens, but spatial_shapes {order.spatial_shapes} in block order make "
            f"{order.length}"
        )
    if valid.shape != features.shape[:2]:
        raise ValueError(f"valid must be {features.shape[:2]} for features {features.shape}, got {valid.shape}")


def _as_row(valid: jax.Array, order: BlockOrder) -> jax.Array:
    """1 or, where values are zero, 0: `[b, 1, s]`."""
    return (valid & order.is_token).astype(jnp.float32)[:, None]


def _check(features, position, reference_points, valid, order: BlockOrder, projections: Projections, heads) -> int:
    """The points of a level."""
    _check_tokens(features, valid, order)
    b, s, c = features.shape
    levels = len(order.spatial_shapes)
    (_, value_bias), *samples = projections
    count = samples[0][1].size
    if value_bias.size % heads or count % (heads * levels):
        raise ValueError(
            f"{value_bias.size} values and {count} samples do not divide over {heads} heads and {levels} levels"
        )
    points = count // (heads * levels)
    expected = {
        "position": (position, features.shape),
        "reference_points": (reference_points, (b, s, levels, 2)),
    }
    for name, (kernel, bias), n in zip(Projections._fields, projections, (value_bias.size, *[count] * 3), strict=True):
        expected |= {f"the kernel of {name}": (kernel, (c, n)), f"the bias of {name}": (bias, (n,))}
    for name, (array, shape) in expected.items():
        if array.shape != shape:
            raise ValueError(f"{name} must be {shape} for features {features.shape}, got {array.shape}")
    if position.dtype != features.dtype:
        raise ValueError(f"position must be {features.dtype} like features, got {position.dtype}")
    if reason := too_large(order, points):
        raise ValueError(reason)
    return points


def places(reference_points: jax.Array, order: BlockOrder) -> jax.Array:
    """Reference points `[b, s, l, 2]` in pixels, as `project` reads them: `[b, 2 * l, s]`, columns first."""
    sizes = np.array([(width, height) for height, width in order.spatial_shapes], np.float32)
    points = lax.stop_gradient(reference_points).astype(jnp.float32) * sizes - 0.5
    # What is no token but padding samples nothing: its points are outside of every map.
    points = jnp.where(order.is_token[:, None, None], points, -jnp.inf)
    return points.transpose(0, 3, 2, 1).reshape(len(points), -1, order.length)


class Weights(NamedTuple):
    """`Projections` as `project` reads them: features down. A head's rows are filled up to whole registers."""

    value: jax.Array
    """`[h * d, c]`; `d` is a multiple of 16."""
    value_bias: jax.Array
    """`[h * d, 1]`."""
    sample: jax.Array
    """`[3 * h * r, c]`: x of all heads, y, logits; `r`, at least `l * p`, is a multiple of 8."""
    sample_bias: jax.Array
    """`[3 * h * r, 1]`."""


def in_rows(projections: Projections, heads: int) -> Weights:
    """`Weights` of `Projections`."""
    value, *samples = projections
    samples = zip(*[_rows(layer, heads, UNIT) for layer in samples], strict=True)
    return Weights(*_rows(value, heads, 16), *map(jnp.concatenate, samples))


def _rows(layer: tuple[jax.Array, jax.Array], heads: int, multiple: int) -> list[jax.Array]:
    """Kernel and bias of a layer, `[c, h * n]` and `[h * n]` -> `[h * r, c]` and `[h * r, 1]`."""
    kernel, bias = (z.T.reshape(heads, -1, *z.shape[:-1]) for z in layer)
    padding = (0, 0), (0, -bias.shape[1] % multiple)
    kernel, bias = jnp.pad(kernel, (*padding, (0, 0))), jnp.pad(bias, padding)
    return [kernel.reshape(bias.size, -1), bias.reshape(-1, 1)]


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6, 7))
def project(features, position, places, valid, weights: Weights, order: BlockOrder, points: int, interpret):
    """Values `[b, h, d, s]`; columns, rows and weights of samples, float32 `[b, h, l * p, s]`; and `features` again.

    The gradients of points that are `OUTSIDE` must be zero, as those of `attend_tiles` are.

    Args:
        features: `[b, s, c]`.
        position: `[b, s, c]`.
        places: reference points in pixels, `[b, 2 * l, s]`: columns, then rows.
        valid: 1 or, where values are zero, 0: `[b, 1, s]`.
        weights: in rows.
        order: of the tokens.
        points: `p`.
        interpret: run on the CPU.
    """
    b, s, _ = features.shape
    samples = points * len(order.spatial_shapes)
    heads = weights.sample.shape[0] // (3 * -(-samples // UNIT) * UNIT)
    value = jax.ShapeDtypeStruct((b, heads, weights.value.shape[0] // heads, s), features.dtype)
    sample = jax.ShapeDtypeStruct((b, heads, samples, s), jnp.float32)
    arrays = features, position, places, valid
    kernel = functools.partial(forward_kernel, shapes=order.spatial_shapes, points=points)
    return *_call(kernel, "forward", arrays, weights, [value, sample, sample, sample], [], interpret), features


def _forward(features, position, places, valid, weights, order, points, interpret):
    features, position, weights = first_order("ms_deform_self_attn", (features, position, weights))
    outputs = project(features, position, places, valid, weights, order, points, interpret)
    return outputs, (features, position, valid, weights)


def _backward(order, points, interpret, residuals, gradients):
    features, position, valid, weights = residuals
    features, position, weights, gradients = first_order(
        "ms_deform_self_attn", (features, position, weights, gradients)
    )
    sums = [jax.ShapeDtypeStruct((len(features), *z.shape), jnp.float32) for z in weights]
    outputs = [jax.ShapeDtypeStruct(features.shape, features.dtype)] * 2
    arrays = features, position, valid, *gradients
    dfeatures, dposition, *sums = _call(backward_kernel, "backward", arrays, weights, outputs, sums, interpret)
    dweights = Weights(*(z.sum(0).astype(weight.dtype) for z, weight in zip(sums, weights, strict=True)))
    return dfeatures, dposition, None, None, dweights


project.defvjp(_forward, _backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def project_values(features, valid, layer: Sequence[jax.Array], heads: int, interpret):
    """Values `[b, h, d, s]`; `layer` is the first two of `Weights`, the rest as for `project`."""
    b, s, _ = features.shape
    value = jax.ShapeDtypeStruct((b, heads, len(layer[0]) // heads, s), features.dtype)
    (output,) = _call(values_forward_kernel, "values_forward", (features, valid), layer, [value], [], interpret)
    return output


def _values_forward(features, valid, layer, heads, interpret):
    features, layer = first_order("ms_deform_cross_attn", (features, layer))
    return project_values(features, valid, layer, heads, interpret), (features, valid, layer)


def _values_backward(heads, interpret, residuals, gradient):
    features, valid, layer = residuals
    features, layer, gradient = first_order("ms_deform_cross_attn", (features, layer, gradient))
    sums = [jax.ShapeDtypeStruct((len(features), *z.shape), jnp.float32) for z in layer]
    output = jax.ShapeDtypeStruct(features.shape, features.dtype)
    arrays = features, valid, gradient
    dfeatures, *sums = _call(values_backward_kernel, "values_backward", arrays, layer, [output], sums, interpret)
    return dfeatures, None, tuple(z.sum(0).astype(weight.dtype) for z, weight in zip(sums, layer, strict=True))


project_values.defvjp(_values_forward, _values_backward)


def _call(kernel, name: str, arrays, weights: Sequence[jax.Array], outputs, sums, interpret):
    """Runs a kernel over (image, some tiles of tokens). `sums` are outputs `[b, ...]` of an image's tiles together."""
    b, s, _ = arrays[0].shape
    dtype = arrays[0].dtype
    tiles = next(count for count in range(TILES, 0, -1) if s // TILE % count == 0)
    operands = [z.astype(jnp.float32 if i % 2 else dtype) for i, z in enumerate(weights)]  # kernels and biases

    def tiled(z):
        tokens_last = z.ndim == 4 or z.shape[1] != s
        shape = (1, *z.shape[1:-1], tiles * TILE) if tokens_last else (1, tiles * TILE, z.shape[2])
        zeros = (0,) * (z.ndim - 2)
        return pl.BlockSpec(shape, lambda b, i: (b, *zeros, i) if tokens_last else (b, i, 0))

    whole = [pl.BlockSpec(z.shape, lambda b, i: (0, 0)) for z in operands]
    return pl.pallas_call(
        kernel,
        grid=(b, s // (tiles * TILE)),
        in_specs=[*map(tiled, arrays), *whole],
        out_specs=[*map(tiled, outputs), *(pl.BlockSpec((1, *z.shape[1:]), lambda b, i: (b, 0, 0)) for z in sums)],
        out_shape=[*outputs, *sums],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=vmem_bytes()
        ),
        interpret=interpret,
        name=f"ms_deform_attn_project_{name}",
    )(*arrays, *operands)
