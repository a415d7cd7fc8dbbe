"""The TensorCore's kernels: bodies that `tensorcore.py` calls over (image, head, tiles).

Arrays have features on sublanes and tokens on lanes. `docs/kernels.md` explains the steps.
"""

import functools

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.dot import dot
from pallas_kernels.ms_deform_attn.order import TILE, UNIT
from pallas_kernels.ms_deform_attn.tensorcore_walk import PIXELS, PLACE, Unit, Walk


def touched_kernel(x_ref, y_ref, leftmost_ref, rightmost_ref, *, groups, points, total):
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


def _iota():
    return lax.broadcasted_iota(jnp.int32, (UNIT, TILE), 0).astype(jnp.float32)


def _pixels(unit: Unit):
    """The eight columns of a unit's pixels, `[8, 128]`, and its first row, a scalar."""
    column, row = (PLACE.unpack(unit.place, name) * UNIT for name in ("column", "band"))
    return column.astype(jnp.float32) + _iota(), row.astype(jnp.float32)


def _spread(sample_ref, kind, sample):
    """A row of a matrix on all eight sublanes: a load that broadcasts."""
    return jnp.broadcast_to(sample_ref[kind, pl.ds(sample, 1), :], (UNIT, TILE))


def _build(matrix_ref, hat_ref, sample_ref, k, unit, points):
    """Puts W of the `k`-th unit of an iteration, `[64, 128]`, into its half of a matrix.

    `sample_ref` holds x, y and the weight of each sample, `[3 or more, l * p, 128]`.
    """
    (columns, row), sample = _pixels(unit), PLACE.unpack(unit.place, "sample")
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


def forward_kernel(
    place_ref,
    walk_ref,
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

    def tile(t, _):
        walk = Walk(place_ref, walk_ref, t, bands=bands, units=unit_ref.shape[0], unroll=hat_ref.shape[0])
        lanes = _lanes(t)

        def multiply():
            for pair in range(matrix_ref.shape[0]):
                sum_ref[...] += dot(pltpu.bitcast(pair_ref[pair], matrix_ref.dtype), matrix_ref[pair], (1, 0))

        def iteration(_, carry):
            # The matrix unit multiplies the weights of the iteration before while the vector unit builds the next.
            units, state = carry
            multiply()
            for k, unit in enumerate(units):
                _build(matrix_ref, hat_ref, sample_ref, k, unit, points)
            for pair in range(matrix_ref.shape[0]):
                left, right = (unit_ref[unit.number] for unit in units[2 * pair : 2 * pair + 2])
                pair_ref[pair] = pltpu.bitcast(_half(left, right), jnp.float32)
            return walk.take(state)

        for i, ref in enumerate((x_ref, y_ref, weight_ref)):
            sample_ref[i] = ref[0, 0, :, lanes]
        # The first iteration multiplies these two. Zeros, as 0 times a NaN of the tile before would be a NaN.
        matrix_ref[...], pair_ref[...] = jnp.zeros_like(matrix_ref), jnp.zeros_like(pair_ref)
        sum_ref[...] = jnp.zeros_like(sum_ref)
        lax.fori_loop(0, walk.iterations, iteration, walk.take(walk.start()))
        multiply()
        output_ref[0, 0, :, lanes] = sum_ref[...].astype(output_ref.dtype)
        return 0

    lax.fori_loop(0, jnp.minimum(tiles, total - lax.rem(pl.program_id(2), pl.cdiv(total, tiles)) * tiles), tile, 0)


def backward_kernel(
    place_ref,
    walk_ref,
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
        unroll = hat_ref.shape[0]
        half = unroll // 4 * 2  # pairs of units
        walk = Walk(place_ref, walk_ref, t, bands=bands, units=unit_ref.shape[0], unroll=unroll, rest=half)
        lanes = _lanes(t)
        gradient = gradient_ref[0, 0, :, lanes].astype(value_ref.dtype)
        x, y, weight = x_ref[0, 0, :, lanes], y_ref[0, 0, :, lanes], weight_ref[0, 0, :, lanes]
        column, row = jnp.floor(x).astype(jnp.int32), jnp.floor(y).astype(jnp.int32)  # of the upper left pixel
        bits = [(row >> bit & 1).astype(jnp.float32) for bit in range(3)]
        for i, z in enumerate((x, y, weight, *bits)):
            sample_ref[i] = z
        corner_ref[...] = jnp.zeros_like(corner_ref)
        # In which unit (`PLACE`) of its level column `j` of eight has a pixel of a point's: upper row, lower row.
        for lower in range(2):
            band = (row + lower) >> 3
            left, right = (PLACE.pack(band=band, column=(column + side) >> 3) for side in range(2))
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

        def visit(units):
            for pair in range(len(units) // 2):
                numbers = [unit.number for unit in units[2 * pair : 2 * pair + 2]]
                pixels = [pixel_ref[pl.ds(pl.multiple_of(unit * PIXELS, PIXELS), PIXELS), :] for unit in numbers]
                products = dot(jnp.concatenate(pixels, 0), gradient, (1, 0))  # G, [128 pixels, 128 queries]
                for side in range(2):
                    unit = units[2 * pair + side]
                    _build(matrix_ref, hat_ref, sample_ref, 2 * pair + side, unit, points)
                    sample, place = PLACE.unpack(unit.place, "sample"), PLACE.keep(unit.place, "column", "band")
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
                grad_pixels = dot(gradient, matrix_ref[pair], (1, 1))  # [d, 128 pixels]
                unit_ref[numbers[0]] += _half(grad_pixels, jnp.zeros_like(grad_pixels))
                unit_ref[numbers[1]] += _half(jnp.zeros_like(grad_pixels), grad_pixels)

        def iteration(_, carry):
            units, state = carry
            visit(units)
            return walk.take(state)

        def rest(_, units):
            visit(units[:half])
            return units

        units, _ = lax.fori_loop(0, walk.iterations, iteration, walk.take(walk.start()))
        lax.fori_loop(0, walk.rest, rest, units)
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

    lax.fori_loop(0, jnp.minimum(tiles, total - lax.rem(pl.program_id(2), pl.cdiv(total, tiles)) * tiles), tile, 0)

    @pl.when(pl.program_id(2) == pl.num_programs(2) - 1)
    def _():
        def finish(pair, _):
            left, right = unit_ref[2 * pair], unit_ref[2 * pair + 1]
            left, right = left + _swapped(left), right + _swapped(right)
            grad_value_ref[0, 0, :, _lanes(pair)] = _half(left, right).astype(grad_value_ref.dtype)
            return 0

        lax.fori_loop(0, grad_value_ref.shape[3] // TILE, finish, 0)
