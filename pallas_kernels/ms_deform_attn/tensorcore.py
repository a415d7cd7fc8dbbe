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
tokens for them. `docs/kernels.md` explains the steps and says what has been seen.
"""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.ms_deform_attn.order import TILE, UNIT, BlockOrder, block_order

PIXELS = UNIT * UNIT
UNROLL = 4
"""Units in a loop iteration: two matrix products, which hide each other's latency."""
TILES = 8
"""Tiles in a grid step."""
OUTSIDE = -4.0
"""Coordinate of points outside the map: no pixel is near it."""
NOWHERE = 2047
"""Band of the unit that fills up the last iteration: no point is near it."""

Unit = tuple[jax.Array, jax.Array]
"""Number and place (`_places`) of a unit: scalars."""


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
    if not in_blocks:
        value = order.to_blocks(value)
    if permute:
        sampling_locations, attention_weights = map(order.to_blocks, (sampling_locations, attention_weights))
    value = jnp.pad(value, ((0, 0), (0, 0), (0, 0), (0, -d % 16))).transpose(0, 2, 3, 1)
    is_query = order.is_token if permute or (in_blocks and q == order.length) else np.ones(q, bool)
    x, y, weight = in_tiles(sampling_locations, attention_weights, is_query, order)
    output = jnp.asarray(_attend(value, x, y, weight, order, interpret))  # [b, h, d, queries]
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
    x = rows(sampling_locations[..., 0]) * width - 0.5
    y = rows(sampling_locations[..., 1]) * height - 0.5
    inside = (x >= -1) & (x < width) & (y >= -1) & (y < height)
    inside &= np.pad(is_query, (0, -q % TILE))
    weight = jnp.where(inside, rows(attention_weights), 0)
    return jnp.where(inside, x, OUTSIDE), jnp.where(inside, y, OUTSIDE), weight


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
        functools.partial(_touched_kernel, groups=groups, points=points, total=n),
        grid=(b, h, pl.cdiv(n, TILE)),
        in_specs=[pl.BlockSpec((1, 1, samples, min(n, TILE) * TILE), lambda b, h, t: (b, h, 0, t))] * 2,
        out_specs=[pl.BlockSpec((1, 1, extent.shape[2], min(n, TILE)), lambda b, h, t: (b, h, 0, t))] * 2,
        out_shape=[extent, extent],
        interpret=interpret,
        name="ms_deform_attn_touched",
    )(x, y)
    rows = np.concatenate([UNIT * sum(groups[:i]) + np.arange(bands) for i, (bands, _) in enumerate(order.grids)])
    width = np.repeat([width for _, width in order.spatial_shapes], [bands for bands, _ in order.grids])
    leftmost, rightmost = (z[:, :, rows].swapaxes(2, 3) for z in (leftmost, rightmost))  # [b, h, n, bands]
    first = jnp.maximum(jnp.floor(leftmost), 0) // UNIT
    end = jnp.minimum(jnp.floor(rightmost) + 1, width - 1) // UNIT + 1
    first, end = (jnp.where(leftmost <= rightmost, z, 0).astype(jnp.int32) for z in (first, end))
    return first, end


def _walks(first: jax.Array, end: jax.Array, order: BlockOrder, part: "_Part") -> jax.Array:
    """`touched`'s in the form that the kernels' scalar core walks along, with units numbered within the part.

    Returns:
        int32 `[b, h, n, 2 * bands + 4]`: of each band the first unit and the end (16 bits each), then the same of a
        band with the unit that fills up; of all these, the next band that is touched; the first such band; the number
        of units.
    """
    bands = np.arange(part.end_band - part.first_band, dtype=np.int32)
    total = len(bands)
    columns = np.repeat([columns for _, columns in order.grids], [bands for bands, _ in order.grids])
    columns = columns[part.first_band : part.end_band]
    base = (np.cumsum(columns) - columns).astype(np.int32)
    first, end = (z[..., part.first_band : part.end_band] for z in (first, end))
    count = end - first
    # [..., band, later band] -> the next one that is touched.
    later = bands > np.concatenate([bands, [total, -1]])[:, None]
    following = jnp.min(jnp.where(later & (count > 0)[..., None, :], bands, total), -1)
    words = base + first | base + end << 16
    fill = jnp.full_like(words[..., :1], part.units)
    return jnp.concatenate([words, fill, following, jnp.sum(count, -1, keepdims=True)], -1)


def _touched_kernel(x_ref, y_ref, leftmost_ref, rightmost_ref, *, groups, points, total):
    """Smallest and largest column of the points whose samples touch each band: bands down, tiles across."""
    far = 1e9
    band = lax.broadcasted_iota(jnp.int32, (UNIT, TILE), 0)
    column = lax.broadcasted_iota(jnp.int32, (UNIT, leftmost_ref.shape[3]), 1)

    def tile(t, _):
        group = 0
        for level, count in enumerate(groups):
            for i in range(count):
                top = ((band + i * UNIT) * UNIT).astype(jnp.float32)
                left, right = jnp.full((UNIT, TILE), far), jnp.full((UNIT, TILE), -far)
                for sample in range(level * points, (level + 1) * points):
                    x, y = (ref[0, 0, pl.ds(sample, 1), _lanes(t)] for ref in (x_ref, y_ref))
                    hit = (y >= top - 1) & (y < top + UNIT)
                    left = jnp.minimum(left, jnp.where(hit, x, far))
                    right = jnp.maximum(right, jnp.where(hit, x, -far))
                rows = pl.ds(group * UNIT, UNIT)
                for ref, z in (
                    (leftmost_ref, left.min(1, keepdims=True)),
                    (rightmost_ref, right.max(1, keepdims=True)),
                ):
                    ref[0, 0, rows, :] = jnp.where(column == t, z, ref[0, 0, rows, :])
                group += 1
        return 0

    lax.fori_loop(0, jnp.minimum(TILE, total - pl.program_id(2) * TILE), tile, 0)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _attend(value, x, y, weight, order, interpret) -> jax.Array:
    """`[b, h, d, length]` and three times `[b, h, l * p, n * 128]` -> `[b, h, d, n * 128]`."""
    return _attend_forward(value, x, y, weight, order, interpret)[0]


def _attend_forward(value, x, y, weight, order, interpret):
    extents = touched(x, y, order, x.shape[2] // len(order.spatial_shapes), interpret)
    d, dtype = value.shape[2], value.dtype
    # A unit's values are there twice (the next head's are fetched meanwhile), and a copy in both halves of the lanes.
    parts = _parts(order, 2 * PIXELS * d * dtype.itemsize + TILE * d * dtype.itemsize)
    output = jax.ShapeDtypeStruct((*value.shape[:3], x.shape[3]), dtype if len(parts) == 1 else jnp.float32)
    outputs = []
    for part in parts:
        scratch = [
            pltpu.VMEM((3, x.shape[2], TILE), jnp.float32),
            pltpu.VMEM((UNROLL // 2, d * dtype.itemsize // 4, TILE), jnp.float32),
            pltpu.VMEM((d, TILE), jnp.float32),
            pltpu.VMEM((part.units, d, TILE), dtype),
        ]
        arrays = (value[..., part.lanes], x, y, weight)
        outputs += _call(_forward_kernel, arrays, extents, order, part, [output], scratch, interpret)
    return sum(outputs[1:], outputs[0]).astype(dtype), (value, x, y, weight, extents)


def _attend_backward(order, interpret, residuals, gradient):
    value, *samples, extents = residuals
    d, dtype = value.shape[2], value.dtype
    rows = samples[0].shape[2]
    # Besides the values and their gradient, each twice, a transposed copy and the gradient in both halves of the lanes.
    parts = _parts(order, 2 * PIXELS * d * (dtype.itemsize + 4) + PIXELS * TILE * dtype.itemsize + TILE * d * 4)
    grad_values, grad_samples = [], []
    for part in parts:
        values = value[..., part.lanes]
        scratch = [
            pltpu.VMEM((6, rows, TILE), jnp.float32),
            pltpu.VMEM((2, rows * UNIT, TILE), jnp.float32),
            pltpu.VMEM((2, rows * UNIT, TILE), jnp.int32),
            pltpu.VMEM((values.shape[3], d), dtype),
            pltpu.VMEM((part.units, d, TILE), jnp.float32),
        ]
        outputs = [jax.ShapeDtypeStruct(z.shape, jnp.float32) for z in (values, *samples)]
        arrays = (values, *samples, gradient)
        grad_value, *grads = _call(_backward_kernel, arrays, extents, order, part, outputs, scratch, interpret)
        grad_values.append(grad_value.astype(dtype))
        grad_samples.append(grads)
    return jnp.concatenate(grad_values, 3), *(sum(z[1:], z[0]) for z in zip(*grad_samples, strict=True))


_attend.defvjp(_attend_forward, _attend_backward)


def _call(kernel, arrays, extents, order, part, outputs, scratch, interpret):
    """Runs a kernel over (image, head, some tiles); the first array and output but for the forward's are values."""
    value, x = arrays[:2]
    first, end = extents
    runs = _walks(first, end, order, part)
    b, h, n = runs.shape[:3]
    points = x.shape[2] // len(order.spatial_shapes)
    tiles = min(TILES, n)
    bands = part.end_band - part.first_band
    # A kernel's SMEM block must be whole in its last two axes.
    runs = jnp.pad(runs, ((0, 0), (0, 0), (0, -n % tiles), (0, 0))).reshape(b, h, -1, 1, tiles * runs.shape[3])

    def whole(z):
        return pl.BlockSpec((1, 1, *z.shape[2:]), lambda b, h, t, *_: (b, h, 0, 0))

    def tiled(z):
        return pl.BlockSpec((1, 1, z.shape[2], tiles * TILE), lambda b, h, t, *_: (b, h, 0, t))

    smem = pl.BlockSpec((1, 1, 1, *runs.shape[3:]), lambda b, h, t, *_: (b, h, t, 0, 0), memory_space=pltpu.SMEM)
    backward = len(outputs) > 1
    return pl.pallas_call(
        functools.partial(kernel, bands=bands, points=points, tiles=tiles, total=n),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(b, h, pl.cdiv(n, tiles)),
            in_specs=[smem, whole(value), *map(tiled, arrays[1:])],
            out_specs=[whole(z) if backward and i == 0 else tiled(z) for i, z in enumerate(outputs)],
            scratch_shapes=[
                pltpu.VMEM((UNROLL // 2, TILE, TILE), value.dtype),
                pltpu.VMEM((UNROLL, points, UNIT, TILE), jnp.float32),
                *scratch,
            ],
        ),
        out_shape=outputs,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=_vmem()
        ),
        interpret=interpret,
        name=f"ms_deform_attn{kernel.__name__.removesuffix('_kernel')}",
    )(_places(order, points, part), runs, *arrays)


@dataclasses.dataclass(frozen=True)
class _Part:
    """Bands whose values fit into the vector memory at once."""

    first_band: int
    end_band: int
    first_unit: int
    units: int

    @property
    def lanes(self) -> slice:
        """Its tokens."""
        return slice(self.first_unit * PIXELS, (self.first_unit + self.units) * PIXELS)


def _parts(order: BlockOrder, unit_bytes: int) -> list[_Part]:
    """The map in as few parts as the vector memory allows; a quarter of it is left for the tiles."""
    widths = [columns for bands, columns in order.grids for _ in range(bands)]
    most = max(max(widths), 3 * _vmem() // 4 // unit_bytes)
    parts = [_Part(0, 0, 0, 0)]
    for band, columns in enumerate(widths):
        last = parts[-1]
        if last.units + columns > most:
            last = _Part(band, band, last.first_unit + last.units, 0)
            parts.append(last)
        parts[-1] = dataclasses.replace(last, end_band=band + 1, units=last.units + columns)
    return parts


def _vmem() -> int:
    """Bytes of vector memory of the TPU compiled for, as far as it is known: the mesh's, or the default device."""
    try:
        return pltpu.get_tpu_info().vmem_capacity_bytes
    except ValueError:  # traced on another platform: all but v4 have this much
        return 64 * 2**20


def _places(order: BlockOrder, points: int, part: _Part) -> np.ndarray:
    """Of each unit of a part: its level's first sample (11 bits), column (10 bits) and band in its level (11 bits)."""
    places = [
        np.int64(level * points) << 21 | np.arange(columns) << 11 | band
        for level, (bands, columns) in enumerate(order.grids)
        for band in range(bands)
    ]
    places = [*places[part.first_band : part.end_band], [NOWHERE]]  # the last one fills up iterations
    return np.concatenate(places).astype(np.uint32).view(np.int32)


class _Walk:
    """Along the units of a tile: scalar arithmetic that runs beside the vector unit's."""

    def __init__(self, place_ref, runs_ref, tile, bands, units):
        self.place_ref, self.bands, self.last = place_ref, bands, units - 1
        self.runs_ref, self.offset = runs_ref, tile * (2 * bands + 4)
        self.iterations = lax.div(self._word(2 * bands + 3) + UNROLL - 1, UNROLL)

    def _word(self, index):
        return self.runs_ref[0, 0, 0, 0, self.offset + index]

    def start(self):
        """The state before the first unit: it, the end of its band's, the next band."""
        return self._enter(self._word(2 * self.bands + 2))

    def _enter(self, band):
        word = self._word(band)
        return word & 0xFFFF, word >> 16, self._word(self.bands + 1 + band)

    def take(self, state) -> tuple[tuple[Unit, ...], tuple]:
        """The next `UNROLL` units, and the state after them."""
        units = []
        for _ in range(UNROLL):
            unit, end, band = state
            units.append((jnp.minimum(unit, self.last), self.place_ref[unit]))
            on = unit + 1, end, band
            state = tuple(jnp.where(unit + 1 < end, *z) for z in zip(on, self._enter(band), strict=True))
        return tuple(units), state


def too_large(order: BlockOrder, points: int) -> str | None:
    """Why the kernel does not take these maps: numbers of units and samples have so many bits (`_places`)."""
    bands, columns = sum(rows for rows, _ in order.grids), max(columns for _, columns in order.grids)
    samples = len(order.grids) * points
    if bands < NOWHERE and columns < 2**10 and samples < 2**11:
        return None
    return (
        f"spatial_shapes {order.spatial_shapes} with {points} points are too large for the TensorCore kernel: "
        f"{columns} columns of 8 pixels (at most 1023), {bands} rows of them in all levels (at most {NOWHERE - 1}), "
        f"{samples} samples (at most 2047). Use implementation='xla'"
    )


def _iota():
    return lax.broadcasted_iota(jnp.int32, (UNIT, TILE), 0).astype(jnp.float32)


def _place(unit: Unit):
    """The column of each lane's pixels in a unit, its first row and its level's first sample."""
    place = unit[1]
    column, row = (place >> 11 & 1023) * UNIT, (place & 2047) * UNIT
    return column.astype(jnp.float32) + _iota(), row.astype(jnp.float32), lax.shift_right_logical(place, 21)


def _spread(sample_ref, kind, sample):
    """A row of a matrix on all eight sublanes: a load that broadcasts."""
    return jnp.broadcast_to(sample_ref[kind, pl.ds(sample, 1), :], (UNIT, TILE))


def _build(matrix_ref, hat_ref, sample_ref, k, unit, points):
    """Puts W of the `k`-th unit of an iteration, `[64, 128]`, into its half of a matrix.

    `sample_ref` holds x, y and the weight of each sample, `[3 or more, l * p, 128]`.
    """
    columns, row, sample = _place(unit)
    x, y, weight = ([_spread(sample_ref, kind, sample + p) for p in range(points)] for kind in range(3))
    hats_x = [jnp.maximum(1 - jnp.abs(x_p - columns), 0) for x_p in x]
    hat_ref = hat_ref.at[k]
    for p, (y_p, weight_p) in enumerate(zip(y, weight, strict=True)):
        hat_ref[p] = jnp.maximum(1 - jnp.abs(y_p - (row + _iota())), 0) * weight_p
    rows = []
    for i in range(UNIT):
        products = [hat_x * hat_ref[p, i : i + 1, :] for p, hat_x in enumerate(hats_x)]
        rows.append(functools.reduce(jnp.add, products))
    weights = jnp.concatenate(rows, 0).astype(matrix_ref.dtype)
    matrix_ref[k // 2, pl.ds(k % 2 * PIXELS, PIXELS), :] = weights


def _dot(a, b, contract: tuple[int, int]):
    dimensions = (((contract[0],), (contract[1],)), ((), ()))
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return lax.dot_general(a, b, dimensions, precision=precision, preferred_element_type=jnp.float32)


def _half(left, right):
    """The left 64 lanes of one matrix and the right 64 of another."""
    if left.dtype == jnp.bfloat16:  # selected as pairs: v5e has no 16-bit select
        pair = _half(pltpu.bitcast(left, jnp.float32), pltpu.bitcast(right, jnp.float32))
        return pltpu.bitcast(pair, jnp.bfloat16)
    return jnp.where(lax.broadcasted_iota(jnp.int32, left.shape, 1) < PIXELS, left, right)


def _swapped(x):
    """The left and the right 64 lanes, exchanged."""
    if x.dtype == jnp.bfloat16:
        return pltpu.bitcast(_swapped(pltpu.bitcast(x, jnp.float32)), jnp.bfloat16)
    return pltpu.roll(x, PIXELS, 1)


def _lanes(index):
    """The `index`-th 128 lanes."""
    return pl.ds(pl.multiple_of(index * TILE, TILE), TILE)


def _forward_kernel(
    place_ref,
    runs_ref,
    value_ref,
    x_ref,
    y_ref,
    weight_ref,
    output_ref,
    matrix_ref,
    hat_ref,
    sample_ref,
    pair_ref,
    sum_ref,
    unit_ref,
    *,
    bands,
    points,
    tiles,
    total,
):
    @pl.when(pl.program_id(2) == 0)
    def _():
        def duplicate(pair, _):
            """Each unit in both halves of the lanes, to be multiplied in either."""
            units = value_ref[0, 0, :, _lanes(pair)]
            swapped = _swapped(units)
            unit_ref[2 * pair], unit_ref[2 * pair + 1] = _half(units, swapped), _half(swapped, units)
            return 0

        lax.fori_loop(0, value_ref.shape[3] // TILE, duplicate, 0)
        matrix_ref[...] = jnp.zeros_like(matrix_ref)

    def tile(t, _):
        walk = _Walk(place_ref, runs_ref, t, bands, unit_ref.shape[0])
        lanes = _lanes(t)

        def multiply():
            for pair in range(UNROLL // 2):
                sum_ref[...] += _dot(pltpu.bitcast(pair_ref[pair], matrix_ref.dtype), matrix_ref[pair], (1, 0))

        def iteration(_, carry):
            # The matrix unit multiplies the weights of the iteration before while the vector unit builds the next.
            units, state = carry
            multiply()
            for k, unit in enumerate(units):
                _build(matrix_ref, hat_ref, sample_ref, k, unit, points)
            for pair in range(UNROLL // 2):
                left, right = (unit_ref[unit] for unit, _ in units[2 * pair : 2 * pair + 2])
                pair_ref[pair] = pltpu.bitcast(_half(left, right), jnp.float32)
            return walk.take(state)

        for i, ref in enumerate((x_ref, y_ref, weight_ref)):
            sample_ref[i] = ref[0, 0, :, lanes]
        pair_ref[...] = jnp.zeros_like(pair_ref)  # the first iteration multiplies the matrix of another tile by it
        sum_ref[...] = jnp.zeros_like(sum_ref)
        lax.fori_loop(0, walk.iterations, iteration, walk.take(walk.start()))
        multiply()
        output_ref[0, 0, :, lanes] = sum_ref[...].astype(output_ref.dtype)
        return 0

    lax.fori_loop(0, jnp.minimum(tiles, total - pl.program_id(2) * tiles), tile, 0)


def _backward_kernel(
    place_ref,
    runs_ref,
    value_ref,
    x_ref,
    y_ref,
    weight_ref,
    gradient_ref,
    grad_value_ref,
    grad_x_ref,
    grad_y_ref,
    grad_weight_ref,
    matrix_ref,
    hat_ref,
    sample_ref,
    corner_ref,
    holder_ref,
    pixel_ref,
    unit_ref,
    *,
    bands,
    points,
    tiles,
    total,
):
    samples = x_ref.shape[2]

    @pl.when(pl.program_id(2) == 0)
    def _():
        def start(pair, _):
            lanes = _lanes(pair)
            pixel_ref[lanes, :] = value_ref[0, 0, :, lanes].T
            for unit in (2 * pair, 2 * pair + 1):
                unit_ref[unit] = jnp.zeros(unit_ref.shape[1:], jnp.float32)
            return 0

        lax.fori_loop(0, grad_value_ref.shape[3] // TILE, start, 0)

    def tile(t, _):
        walk = _Walk(place_ref, runs_ref, t, bands, unit_ref.shape[0])
        lanes = _lanes(t)
        gradient = gradient_ref[0, 0, :, lanes].astype(value_ref.dtype)
        x, y, weight = x_ref[0, 0, :, lanes], y_ref[0, 0, :, lanes], weight_ref[0, 0, :, lanes]
        column, row = jnp.floor(x).astype(jnp.int32), jnp.floor(y).astype(jnp.int32)  # of the upper left pixel
        bits = [(row >> bit & 1).astype(jnp.float32) for bit in range(3)]
        for i, z in enumerate((x, y, weight, *bits)):
            sample_ref[i] = z
        corner_ref[...] = jnp.zeros_like(corner_ref)
        # In which unit (`_places`) of its level column `j` of eight has a pixel of a point's: upper row, lower row.
        for lower in range(2):
            left, right = (((column + side) >> 3) << 11 | (row + lower) >> 3 for side in range(2))
            for j in range(UNIT):
                holder = jnp.where(column & 7 == j, left, jnp.where(column + 1 & 7 == j, right, -1))
                holder_ref.at[lower][pl.ds(j, samples, stride=UNIT), :] = holder

        def corners(products, bits, holders, unit):
            """`products` in the rows `row` and `row + 1` (mod 8) of a point, where the unit holds them."""
            ones, twos, fours = bits

            def pick(rows):
                return jnp.where(fours, jnp.where(twos, rows[3], rows[2]), jnp.where(twos, rows[1], rows[0]))

            even, odd, after = pick(products[0::2]), pick(products[1::2]), pick([*products[2::2], products[0]])
            upper, lower = jnp.where(ones, odd, even), jnp.where(ones, after, odd)
            return [jnp.where(holder == unit, z, 0) for holder, z in zip(holders, (upper, lower), strict=True)]

        def iteration(_, carry):
            units, state = carry
            for pair in range(UNROLL // 2):
                indices = [unit[0] for unit in units[2 * pair : 2 * pair + 2]]
                pixels = [pixel_ref[pl.ds(pl.multiple_of(unit * PIXELS, PIXELS), PIXELS), :] for unit in indices]
                products = _dot(jnp.concatenate(pixels, 0), gradient, (1, 0))  # [128 pixels, 128 queries]
                for side in range(2):
                    unit = units[2 * pair + side]
                    _build(matrix_ref, hat_ref, sample_ref, 2 * pair + side, unit, points)
                    sample, place = _place(unit)[2], unit[1] & 0x1FFFFF  # without the level
                    rows = [products[(side * UNIT + i) * UNIT :][:UNIT] for i in range(UNIT)]
                    # All loads before all stores: the compiler cannot know that the samples differ.
                    span = pl.ds(pl.multiple_of(sample * UNIT, UNIT), points * UNIT)
                    sums, holders = ([ref[lower, span, :] for lower in range(2)] for ref in (corner_ref, holder_ref))
                    found = []
                    for p in range(points):
                        bits = [_spread(sample_ref, 3 + bit, sample + p) > 0 for bit in range(3)]
                        found.append(corners(rows, bits, [z[p * UNIT :][:UNIT] for z in holders], place))
                    for lower in range(2):
                        corner_ref[lower, span, :] = sums[lower] + jnp.concatenate([z[lower] for z in found], 0)
                grad_pixels = _dot(gradient, matrix_ref[pair], (1, 1))  # [d, 128 pixels]
                unit_ref[indices[0]] += _half(grad_pixels, jnp.zeros_like(grad_pixels))
                unit_ref[indices[1]] += _half(jnp.zeros_like(grad_pixels), grad_pixels)
            return walk.take(state)

        lax.fori_loop(0, walk.iterations, iteration, walk.take(walk.start()))
        # The left pixel is in column `column % 8`, the right one in another: strided loads, of all samples at once.
        pixels = [[jnp.zeros_like(x)] * 2 for _ in range(2)]
        for lower, sides in enumerate(pixels):
            for j in range(UNIT):
                pixel, on_left = corner_ref.at[lower][pl.ds(j, samples, stride=UNIT), :], column & 7 == j
                sides[:] = sides[0] + jnp.where(on_left, pixel, 0), sides[1] + jnp.where(on_left, 0, pixel)
        (upper_left, upper_right), (lower_left, lower_right) = pixels
        share_x, share_y = x - jnp.floor(x), y - jnp.floor(y)
        upper = upper_left + share_x * (upper_right - upper_left)
        lower = lower_left + share_x * (lower_right - lower_left)
        left = upper_left + share_y * (lower_left - upper_left)
        right = upper_right + share_y * (lower_right - upper_right)
        grad_weight_ref[0, 0, :, lanes] = upper + share_y * (lower - upper)
        grad_x_ref[0, 0, :, lanes] = weight * (right - left)
        grad_y_ref[0, 0, :, lanes] = weight * (lower - upper)
        return 0

    lax.fori_loop(0, jnp.minimum(tiles, total - pl.program_id(2) * tiles), tile, 0)

    @pl.when(pl.program_id(2) == pl.num_programs(2) - 1)
    def _():
        def finish(pair, _):
            left, right = unit_ref[2 * pair], unit_ref[2 * pair + 1]
            left, right = left + _swapped(left), right + _swapped(right)
            grad_value_ref[0, 0, :, _lanes(pair)] = _half(left, right)
            return 0

        lax.fori_loop(0, grad_value_ref.shape[3] // TILE, finish, 0)
