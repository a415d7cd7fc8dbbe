"""Multi-scale deformable attention in plain XLA, arranged for a TPU: the baseline of the Pallas kernels.

A TPU gathers whole rows of 128 lanes, or wastes what a row does not fill. So the table has one row for each *cell*
between four pixels (of the map with a border of zeros): its four corners side by side, 4 x 32 channels in the published
models. A sample is one gathered row instead of four, and backward one scattered row. Images and heads, and for each of
them levels and points, are taken one after another: table, rows and sums stay in the chip's vector memory (about 12
MB each at 800x1333), and the gathered rows, 64 times the output, are never in HBM. Forward and backward gather anew.
Queries are the last axis of all that has no channels, so that no lane is empty.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np


def ms_deform_attn_xla(
    value: jax.Array,
    spatial_shapes: Sequence[tuple[int, int]],
    sampling_locations: jax.Array,
    attention_weights: jax.Array,
    *,
    interpret: bool = False,
) -> jax.Array:
    """Shapes, semantics and gradients of `ms_deform_attn_reference`; `interpret` changes nothing."""
    del interpret
    b, _, h, d = value.shape
    queries = sampling_locations.shape[1]
    spatial_shapes = tuple((height, width) for height, width in spatial_shapes)
    index, share = corners(
        spatial_shapes, sampling_locations.astype(jnp.float32), attention_weights.astype(jnp.float32)
    )
    index, share = index.reshape(b * h, -1, queries), share.reshape(b * h, -1, 4, queries)
    output: jax.Array = weighted_cells(spatial_shapes, value.swapaxes(1, 2).reshape(b * h, -1, d), index, share)
    return output.reshape(b, h, queries, d).swapaxes(1, 2).astype(value.dtype)


def cells(spatial_shapes: Sequence[tuple[int, int]], value: jax.Array) -> jax.Array:
    """The four pixels around each cell, zero outside the map: `[s, d]` -> `[cells, 4 d]`.

    A level has (height + 1) x (width + 1) cells, the first one having the first pixel at its right lower corner.
    """
    tables, start = [], 0
    for height, width in spatial_shapes:
        level = value[start : start + height * width].reshape(height, width, -1)
        level = jnp.pad(level, ((1, 1), (1, 1), (0, 0)))
        pixels = [level[y : y + height + 1, x : x + width + 1] for y in (0, 1) for x in (0, 1)]
        tables.append(jnp.concatenate(pixels, -1).reshape(-1, 4 * value.shape[-1]))
        start += height * width
    return jnp.concatenate(tables)


def corners(
    spatial_shapes: Sequence[tuple[int, int]], locations: jax.Array, weights: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The cell of each point and the weights of its corners, zero for points outside.

    Args:
        spatial_shapes: (height, width) of each of the `l` levels.
        locations: `[b, q, h, l, p, 2]`, (x, y) in 0-1.
        weights: `[b, q, h, l, p]`, of the points.

    Returns:
        Cells (int32) `[b, h, l, p, q]` and weights `[b, h, l, p, 4, q]`.
    """
    sizes = np.array([(width, height) for height, width in spatial_shapes], np.int32)
    starts = np.cumsum([0, *((height + 1) * (width + 1) for height, width in spatial_shapes[:-1])], dtype=np.int32)
    sizes, starts = sizes.T[:, :, None, None], starts[:, None, None]  # [2, l, 1, 1], [l, 1, 1]
    axes, inside = [], True
    for axis in (0, 1):
        position = locations[..., axis].transpose(0, 2, 3, 4, 1) * sizes[axis] - 0.5
        near = (position >= -1) & (position < sizes[axis])
        position = jnp.where(near, position, 0)  # finite, of no weight
        low = jnp.floor(position)
        inside &= near
        axes.append((low, low + 1 - position, position - low))
    (column, left, right), (row, above, below) = axes
    cell = starts + (row + 1) * (sizes[0] + 1) + column + 1
    weights = jnp.where(inside, weights.transpose(0, 2, 3, 4, 1), 0)
    shares = [weights * y * x for y in (above, below) for x in (left, right)]
    return jnp.where(inside, cell, 0).astype(jnp.int32), jnp.stack(shares, 4)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def weighted_cells(
    spatial_shapes: Sequence[tuple[int, int]], value: jax.Array, index: jax.Array, share: jax.Array
) -> jax.Array:
    """`output[m, q] = sum over k and c of share[m, k, c, q] * (corner c of cell index[m, k, q] of value[m])`.

    Args:
        spatial_shapes: (height, width) of each level.
        value: `[m, s, d]`, float32 or bfloat16.
        index: int32 `[m, k, q]`, cells.
        share: float32 `[m, k, 4, q]`.

    Returns:
        float32 `[m, q, d]`.
    """

    def attend(block):
        value, index, share = block
        table = cells(spatial_shapes, value)

        def sample(output, point):
            index, share = point
            return output + gather(table, index) * spread(share, table.shape[-1]), None

        zeros = jnp.zeros_like(table, jnp.float32, shape=(index.shape[1], table.shape[-1]))
        output, _ = jax.lax.scan(sample, zeros, (index, share))
        return sum(jnp.split(output, 4, -1))

    return jax.lax.map(attend, (value, index, share))


def _forward(spatial_shapes, *inputs):
    return weighted_cells(spatial_shapes, *inputs), inputs


def _backward(spatial_shapes, inputs, gradient):
    def differentiate(block):
        value, index, share, gradient = block
        table, to_value = jax.vjp(functools.partial(cells, spatial_shapes), value.astype(jnp.float32))
        gradient = jnp.tile(gradient, 4)

        def sample(grad_table, point):
            index, share = point
            grad_rows = spread(share, table.shape[-1]) * gradient
            return grad_table.at[index].add(grad_rows, mode="promise_in_bounds"), collect(
                gather(table, index) * gradient
            )

        grad_table, grad_share = jax.lax.scan(sample, jnp.zeros_like(table), (index, share))
        return to_value(grad_table)[0].astype(value.dtype), grad_share

    grad_value, grad_share = jax.lax.map(differentiate, (*inputs, gradient))
    return grad_value, None, grad_share


weighted_cells.defvjp(_forward, _backward)


def gather(table: jax.Array, index: jax.Array) -> jax.Array:
    """Rows of a table in float32: `[cells, 4 d]`, `[q]` -> `[q, 4 d]`."""
    return table.at[index].get(mode="promise_in_bounds").astype(jnp.float32)


def spread(share: jax.Array, lanes: int) -> jax.Array:
    """Each corner's share for all of its channels, by the matrix unit: `[4, q]` -> `[q, 4 d]`.

    A float32 is the sum of three bfloat16, which the matrix unit multiplies by 0 and 1 exactly, in one pass.
    """
    thirds = []
    for _ in range(3):
        third = jax.lax.reduce_precision(share, exponent_bits=8, mantissa_bits=7)
        thirds.append(third.astype(jnp.bfloat16))
        share = share - third
    groups = jnp.tile(corner_lanes(lanes).astype(jnp.bfloat16), (3, 1, 1))
    return jnp.einsum("xcq,xce->qe", jnp.stack(thirds), groups, preferred_element_type=jnp.float32)


def collect(products: jax.Array) -> jax.Array:
    """Sums over the channels of each corner, by the matrix unit: `[q, 4 d]` -> `[4, q]`."""
    return jnp.einsum("qe,ce->cq", products, corner_lanes(products.shape[-1]), precision="highest")


def corner_lanes(lanes: int) -> jax.Array:
    """1 where a lane is a channel of a corner: `[4, 4 d]`."""
    return jnp.repeat(jnp.eye(4), lanes // 4, axis=1)
