"""Multi-scale deformable attention on the TensorCore of a TPU, in Pallas, without a gather or a scatter.

A TensorCore has no fast gather, so the bilinear weights become a matrix. Queries are tiled by 128 and pixels by units
of 8 x 8 (`order.py`). With hat(u) = max(0, 1 - |u|), pixel (row i, column j) has in query q the weight

    W[ij, q] = sum_p attention_weights[q, p] * hat(x[q, p] - j) * hat(y[q, p] - i)

which the vector unit builds two units at a time, as a [128 pixels, 128 queries] matrix, and out^T += V^T W, which the
matrix unit does. Only units that some point of the tile may touch are visited: for each band (a row of units of a
level) `touched` finds the first and the last one. So the result is exact for any offsets, and the cost follows their
spread.

Backward, dV^T += g^T W^T, and with G = V g the product of pixel ij and the gradient of query q, each point needs G at
the four pixels around it: selected, not gathered, as each of them is in just one unit. The gradients of locations and
weights follow from these four numbers. At a kink they are those of the cell on the right and below.

In the kernels, arrays have features on sublanes and tokens on lanes, which is how XLA lays out projections of the
tokens for them. `docs/kernels.md` explains the steps and says what has been verified.
"""

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.by_platform import vmem_bytes
from pallas_kernels.derivatives import first_order
from pallas_kernels.ms_deform_attn.order import TILE, UNIT, BlockOrder, block_order
from pallas_kernels.ms_deform_attn.tensorcore_kernels import backward_kernel, forward_kernel, touched_kernel
from pallas_kernels.ms_deform_attn.tensorcore_walk import PIXELS, Part, parts, tile_walks, too_large, unit_places

UNROLL = {"forward": 4, "backward": 8}
"""Units in a loop iteration, of each pass: the products of two units each hide each other's latency."""
TILES = 8
"""Tiles in a grid step."""
OUTSIDE = -4.0
"""Coordinate of points outside the map: no pixel is near it."""


def ms_deform_attn_tensorcore(
    value: jax.Array,
    spatial_shapes: Sequence[tuple[int, int]],
    sampling_locations: jax.Array,
    attention_weights: jax.Array,
    *,
    in_blocks: bool = False,
    interpret: bool = False,
) -> jax.Array:
    """Shapes and semantics of `ms_deform_attn`.

    float32 values are multiplied in float32 (six bfloat16 passes); bfloat16 values in bfloat16, with the weights
    rounded to it, accumulated in float32.

    Args:
        value: `[b, s, h, d]`; with `in_blocks`, `[b, BlockOrder.length, h, d]`, anything in the padding.
        spatial_shapes: (height, width) of each level.
        sampling_locations: `[b, q, h, l, p, 2]`.
        attention_weights: `[b, q, h, l, p]`.
        in_blocks: the values are in block order, and the queries too if there are as many.
        interpret: run on the CPU, slowly.

    Returns:
        `[b, q, h, d]`, in the order of the queries.

    Raises:
        ValueError: maps of more than 8184 columns, 16368 rows in all levels, or 2047 points in all levels.
    """
    order = block_order(spatial_shapes)
    if reason := too_large(order, sampling_locations.shape[4]):
        raise ValueError(reason)
    q, d = sampling_locations.shape[1], value.shape[-1]
    # A grid of queries is tiled like the map; otherwise 128 queries in a row are a tile.
    permute = not in_blocks and q == value.shape[1] == sum(height * width for height, width in spatial_shapes)
    # The padding must be finite: kernels multiply it by zeros.
    value = jnp.where(order.is_token[:, None, None], value, 0) if in_blocks else order.to_blocks(value)
    if permute:
        sampling_locations, attention_weights = map(order.to_blocks, (sampling_locations, attention_weights))
    value = jnp.pad(value, ((0, 0), (0, 0), (0, 0), (0, -d % 16))).transpose(0, 2, 3, 1)
    is_query = order.is_token if permute or (in_blocks and q == order.length) else np.ones(q, bool)
    x, y, weight = in_tiles(sampling_locations, attention_weights, is_query, order)
    output = jnp.asarray(attend_tiles(value, x, y, weight, order, interpret))  # [b, h, d, queries]
    output = output.transpose(0, 3, 1, 2)[..., :d]
    return order.from_blocks(output) if permute else output[:, :q]


def in_tiles(
    sampling_locations: jax.Array, attention_weights: jax.Array, is_query: np.ndarray, order: BlockOrder
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The kernels' view of the samples: columns, rows (in pixels) and weights, of whole tiles of queries.

    Returns:
        float32 `[b, h, l * p, n * 128]`, three times; `OUTSIDE` with weight 0 for points outside the map, and for all
        points of what is not a query (`is_query [q]`) but padding, which would touch units for nothing.
    """
    b, q, h, levels, points = attention_weights.shape

    def rows(x):
        x = jnp.pad(x.astype(jnp.float32), ((0, 0), (0, -q % TILE), *((0, 0),) * 3))
        return x.reshape(b, -1, h, levels * points).transpose(0, 2, 3, 1)

    sizes = np.repeat([(width, height) for height, width in order.spatial_shapes], points, 0)[:, :, None]
    width, height = sizes[:, 0], sizes[:, 1]
    # Split, not indexed: the derivative is a concatenation, not a sum of padded arrays, which XLA would copy.
    x, y = (rows(z[..., 0]) for z in lax.split(sampling_locations, (1, 1), axis=-1))
    x, y = x * width - 0.5, y * height - 0.5
    return drop_outside(x, y, rows(attention_weights), np.pad(is_query, (0, -q % TILE)), width, height)


def drop_outside(x, y, weight, is_query, width, height) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Columns, rows and weights with `OUTSIDE` and weight 0 where a point is outside the map or of no query."""
    inside = is_query & (x >= -1) & (x < width) & (y >= -1) & (y < height)
    return jnp.where(inside, x, OUTSIDE), jnp.where(inside, y, OUTSIDE), jnp.where(inside, weight, 0)


def touched(x: jax.Array, y: jax.Array, order: BlockOrder, points: int, interpret: bool) -> tuple[jax.Array, jax.Array]:
    """Which units of each band the points of each tile touch: from the leftmost to the rightmost one.

    Args:
        x: columns in pixels, `[b, h, l * p, n * 128]`, `OUTSIDE` for points outside the map.
        y: rows in pixels.
        order: of the values.
        points: `p`.
        interpret: run on the CPU.

    Returns:
        int32 `[b, h, n, bands]`: the first unit, counted from the band's left end, and the end; equal if there is none.
    """
    b, h, samples, queries = x.shape
    n = queries // TILE
    groups = [-(-bands // UNIT) for bands, _ in order.grids]  # of eight bands, beside each other in a register
    extent = jax.ShapeDtypeStruct((b, h, sum(groups) * UNIT, n), jnp.float32)
    leftmost, rightmost = pl.pallas_call(
        functools.partial(touched_kernel, groups=groups, points=points, total=n),
        grid=(b, h, pl.cdiv(n, TILE)),
        in_specs=[pl.BlockSpec((1, 1, samples, min(n, TILE) * TILE), lambda b, h, t: (b, h, 0, t))] * 2,
        out_specs=[pl.BlockSpec((1, 1, extent.shape[2], min(n, TILE)), lambda b, h, t: (b, h, 0, t))] * 2,
        out_shape=[extent, extent],
        interpret=interpret,
        name="ms_deform_attn_touched",
    )(x, y)
    starts = UNIT * (np.cumsum(groups) - groups)
    rows = [slice(start, start + bands) for start, (bands, _) in zip(starts, order.grids, strict=True)]
    width = np.repeat([width for _, width in order.spatial_shapes], [bands for bands, _ in order.grids])
    leftmost, rightmost = (
        jnp.concatenate([z[:, :, span] for span in rows], 2).swapaxes(2, 3) for z in (leftmost, rightmost)
    )  # [b, h, n, bands]
    first = jnp.maximum(jnp.floor(leftmost), 0) // UNIT
    end = jnp.minimum(jnp.floor(rightmost) + 1, width - 1) // UNIT + 1
    first, end = (jnp.where(leftmost <= rightmost, z, 0).astype(jnp.int32) for z in (first, end))
    return first, end


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def attend_tiles(value, x, y, weight, order, interpret) -> jax.Array:
    """`[b, h, d, length]` and three times `[b, h * m, l * p, n * 128]` -> `[b, h * m, d, n * 128]`.

    Each head of the values has `m` consecutive heads of samples; in attention `m` is 1.
    """
    return _attend_forward(value, x, y, weight, order, interpret)[0]


def _attend_forward(value, x, y, weight, order, interpret):
    value, x, y, weight = first_order("ms_deform_attn", (value, x, y, weight))
    extents = touched(x, y, order, x.shape[2] // len(order.spatial_shapes), interpret)
    d, dtype = value.shape[2], value.dtype
    # A unit's values are there twice (the next head's are fetched meanwhile), and a copy in both halves of the lanes.
    pieces = parts(order, _units(2 * PIXELS * d * dtype.itemsize + TILE * d * dtype.itemsize))
    shape = (*x.shape[:2], d, x.shape[3])
    output = jax.ShapeDtypeStruct(shape, dtype if len(pieces) == 1 else jnp.float32)
    outputs = []
    for part in pieces:
        scratch = [
            pltpu.VMEM((3, x.shape[2], TILE), jnp.float32),
            pltpu.VMEM((UNROLL["forward"] // 2, d * dtype.itemsize // 4, TILE), jnp.float32),
            pltpu.VMEM((d, TILE), jnp.float32),
            pltpu.VMEM((part.units, d, TILE), dtype),
        ]
        arrays = (value[..., part.tokens], x, y, weight)
        outputs += _call(forward_kernel, "forward", arrays, extents, order, part, [output], scratch, interpret)
    return sum(outputs[1:], outputs[0]).astype(dtype), (value, x, y, weight, extents)


def _attend_backward(order, interpret, residuals, gradient):
    *inputs, extents = residuals
    value, *samples, gradient = first_order("ms_deform_attn", (*inputs, gradient))
    d, dtype = value.shape[2], value.dtype
    rows = samples[0].shape[2]
    # Besides the values and their gradient, each twice, a transposed copy and the gradient in both halves of the lanes.
    unit_bytes = 4 * PIXELS * d * dtype.itemsize + PIXELS * TILE * dtype.itemsize + TILE * d * 4
    grad_values, grad_samples = [], []
    for part in parts(order, _units(unit_bytes)):
        values = value[..., part.tokens]
        scratch = [
            pltpu.VMEM((6, rows, TILE), jnp.float32),
            pltpu.VMEM((2, rows * UNIT, TILE), jnp.float32),
            pltpu.VMEM((2, rows * UNIT, TILE), jnp.int32),
            pltpu.VMEM((values.shape[3], d), dtype),
            pltpu.VMEM((part.units, d, TILE), jnp.float32),
        ]
        outputs = [jax.ShapeDtypeStruct(values.shape, dtype)]
        outputs += [jax.ShapeDtypeStruct(z.shape, jnp.float32) for z in samples]
        arrays = (values, *samples, gradient)
        grad_value, *grads = _call(
            backward_kernel, "backward", arrays, extents, order, part, outputs, scratch, interpret
        )
        grad_values.append(grad_value)
        grad_samples.append(grads)
    return jnp.concatenate(grad_values, 3), *(sum(z[1:], z[0]) for z in zip(*grad_samples, strict=True))


attend_tiles.defvjp(_attend_forward, _attend_backward)


def _call(kernel: Callable, name: str, arrays, extents, order: BlockOrder, part: Part, outputs, scratch, interpret):
    """Runs a kernel over (image, head, some tiles). The first array, and the backward's first output, are values."""
    value, x = arrays[:2]
    first, end = extents
    walks = tile_walks(first, end, order, part)
    b, h, n = walks.shape[:3]
    points = x.shape[2] // len(order.spatial_shapes)
    tiles = min(TILES, n)
    steps = pl.cdiv(n, tiles)
    shared = h // value.shape[1]  # heads of samples to one of the values
    # A kernel's SMEM block must be whole in its last two axes.
    walks = jnp.pad(walks, ((0, 0), (0, 0), (0, -n % tiles), (0, 0))).reshape(b, h, -1, 1, tiles * walks.shape[3])

    def whole(z):
        return pl.BlockSpec((1, 1, *z.shape[2:]), lambda b, h, t, *_: (b, h, 0, 0))

    def place(h, t):
        return h * shared + lax.div(t, steps), lax.rem(t, steps)

    def tiled(z):
        def index(b, h, t, *_):
            head, step = place(h, t)
            return b, head, 0, step

        return pl.BlockSpec((1, 1, z.shape[2], tiles * TILE), index)

    smem = pl.BlockSpec(
        (1, 1, 1, *walks.shape[3:]), lambda b, h, t, *_: (b, *place(h, t), 0, 0), memory_space=pltpu.SMEM
    )
    return pl.pallas_call(
        functools.partial(kernel, bands=part.bands, points=points, tiles=tiles, total=n),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(b, value.shape[1], shared * steps),
            in_specs=[smem, whole(value), *map(tiled, arrays[1:])],
            out_specs=[whole(z) if name == "backward" and i == 0 else tiled(z) for i, z in enumerate(outputs)],
            scratch_shapes=[
                pltpu.VMEM((UNROLL[name] // 2, TILE, TILE), value.dtype),
                pltpu.VMEM((UNROLL[name], points, UNIT, TILE), jnp.float32),
                *scratch,
            ],
        ),
        out_shape=outputs,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=vmem_bytes()
        ),
        interpret=interpret,
        name=f"ms_deform_attn_{name}",
    )(unit_places(order, points, part), walks, *arrays)


def _units(unit_bytes: int) -> int:
    """How many units fit into the vector memory; a quarter of it is left for the tiles."""
    return 3 * vmem_bytes() // 4 // unit_bytes
