"""Which units of the map a tile's kernel visits, in the form that a TPU's scalar core reads: packed words.

The bands of a map (rows of units) are numbered through all levels, its units too, band by band. A tile visits, of each
band, the units from the first to the last one that its points touch. Maps that do not fit into the vector memory are
cut into parts of whole bands.
"""

import dataclasses
import functools
import operator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels.ms_deform_attn.order import UNIT, BlockOrder

PIXELS = UNIT * UNIT
"""Pixels of a unit."""


class Fields:
    """The layout of a 32-bit word: named unsigned integers, from the lowest bits up."""

    def __init__(self, **bits: int):
        assert sum(bits.values()) <= 32
        self.bits = bits
        self.shift = dict(zip(bits, np.cumsum([0, *bits.values()])[:-1].tolist(), strict=True))

    def limit(self, name: str) -> int:
        """The first number that a field cannot hold."""
        return 1 << self.bits[name]

    def pack(self, **values: Any) -> Any:
        """int32 arrays, of NumPy or JAX, -> words. Fields that are not given are 0."""
        return functools.reduce(operator.or_, (z << self.shift[name] for name, z in values.items()))

    def unpack(self, word: jax.Array, name: str) -> jax.Array:
        """One field of a word."""
        shift, bits = self.shift[name], self.bits[name]
        value = lax.shift_right_logical(word, shift) if shift else word
        return value if shift + bits == 32 else value & self.limit(name) - 1

    def keep(self, word: jax.Array, *names: str) -> jax.Array:
        """A word with its other fields set to 0."""
        return word & int(self.pack(**{name: np.int32(self.limit(name) - 1) for name in names}))


PLACE = Fields(band=11, column=10, sample=11)
"""Where a unit is: its band and column, both counted in units within its level, and its level's first sample."""
SPAN = Fields(first=16, end=16)
"""The units of a band that a tile visits."""
NOWHERE = PLACE.limit("band") - 1
"""The band of the unit that fills up the last iteration: no point is near it."""


def too_large(order: BlockOrder, points: int) -> str | None:
    """Why the kernels do not support these maps, `None` if they do: the fields of `PLACE` have only so many bits."""
    bands, columns = sum(rows for rows, _ in order.grids), max(columns for _, columns in order.grids)
    samples = len(order.grids) * points
    limits = [PLACE.limit(name) - 1 for name in ("column", "band", "sample")]
    if columns <= limits[0] and bands < NOWHERE and samples <= limits[2]:
        return None
    return (
        f"spatial_shapes {order.spatial_shapes} with {points} points are too large for the TensorCore kernel: "
        f"{columns} columns of 8 pixels (at most {limits[0]}), {bands} rows of them in all levels (at most "
        f"{NOWHERE - 1}), {samples} samples (at most {limits[2]}). Use implementation='xla'"
    )


@dataclasses.dataclass(frozen=True)
class Part:
    """Bands whose values fit into the vector memory at once."""

    first_band: int
    end_band: int
    first_unit: int
    units: int

    @property
    def bands(self) -> int:
        """How many."""
        return self.end_band - self.first_band

    @property
    def tokens(self) -> slice:
        """In block order."""
        return slice(self.first_unit * PIXELS, (self.first_unit + self.units) * PIXELS)


def parts(order: BlockOrder, units: int) -> list[Part]:
    """The map in as few parts of at most so many units as possible; a band is never cut."""
    widths = [columns for bands, columns in order.grids for _ in range(bands)]
    most = max(*widths, units)
    found = [Part(0, 0, 0, 0)]
    for band, columns in enumerate(widths):
        last = found[-1]
        if last.units + columns > most:
            last = Part(band, band, last.first_unit + last.units, 0)
            found.append(last)
        found[-1] = dataclasses.replace(last, end_band=band + 1, units=last.units + columns)
    return found


def unit_places(order: BlockOrder, points: int, part: Part) -> np.ndarray:
    """`PLACE` of each unit of a part, and of one `NOWHERE`: int32 `[units + 1]`."""
    bands = [
        PLACE.pack(band=np.int32(band), column=np.arange(columns, dtype=np.int32), sample=np.int32(level * points))
        for level, (rows, columns) in enumerate(order.grids)
        for band in range(rows)
    ]
    return np.concatenate([*bands[part.first_band : part.end_band], [PLACE.pack(band=np.int32(NOWHERE))]])


def tile_walks(first: jax.Array, end: jax.Array, order: BlockOrder, part: Part) -> jax.Array:
    """What `touched` returns, in the form that `Walk` reads, with units numbered within the part.

    Returns:
        int32 `[b, h, n, 2 * bands + 4]`: `SPAN` of each band, and of one that has only the unit `NOWHERE`; for all of
        these, the next band that is touched; the first band that is touched; the number of units.
    """
    bands = np.arange(part.bands, dtype=np.int32)
    total = len(bands)
    columns = np.repeat([columns for _, columns in order.grids], [rows for rows, _ in order.grids])
    columns = columns[part.first_band : part.end_band]
    base = (np.cumsum(columns) - columns).astype(np.int32)
    first, end = (z[..., part.first_band : part.end_band] for z in (first, end))
    count = end - first
    # [..., band, later band] -> the next one that is touched.
    later = bands > np.concatenate([bands, [total, -1]])[:, None]
    following = jnp.min(jnp.where(later & (count > 0)[..., None, :], bands, total), -1)
    spans = SPAN.pack(first=base + first, end=base + end)
    fill = jnp.full_like(spans[..., :1], part.units)
    return jnp.concatenate([spans, fill, following, jnp.sum(count, -1, keepdims=True)], -1)


class Unit(NamedTuple):
    """A unit that is visited: scalars."""

    number: jax.Array
    """In its part."""
    place: jax.Array
    """`PLACE`."""


class Walk:
    """In a kernel, along the units of a tile: scalar arithmetic that runs beside the vector unit's.

    Args:
        place_ref: `unit_places`.
        walk_ref: `tile_walks` of the grid step's tiles, one after another, `[1, 1, 1, 1, tiles * (2 * bands + 4)]`.
        tile: which of them.
        bands: of the part.
        units: of the part.
        unroll: units of an iteration.
        rest: where so many or fewer are left for the last one, `self.rest` is 1 and not in `self.iterations`.
    """

    def __init__(self, place_ref, walk_ref, tile, *, bands, units, unroll, rest=0):
        self.place_ref, self.bands, self.last, self.unroll = place_ref, bands, units - 1, unroll
        self.walk_ref, self.offset = walk_ref, tile * (2 * bands + 4)
        count = self._word(2 * bands + 3)
        self.iterations = lax.div(count + unroll - 1 - rest, unroll)
        self.rest = (count > self.iterations * unroll).astype(jnp.int32)

    def _word(self, index):
        return self.walk_ref[0, 0, 0, 0, self.offset + index]

    def start(self):
        """The state before the first unit: it, the end of its band's, the next band."""
        return self._enter(self._word(2 * self.bands + 2))

    def _enter(self, band):
        span = self._word(band)
        return SPAN.unpack(span, "first"), SPAN.unpack(span, "end"), self._word(self.bands + 1 + band)

    def take(self, state) -> tuple[tuple[Unit, ...], tuple]:
        """The next units of an iteration, and the state after them."""
        units = []
        for _ in range(self.unroll):
            unit, end, band = state
            units.append(Unit(jnp.minimum(unit, self.last), self.place_ref[unit]))
            on = unit + 1, end, band
            state = tuple(jnp.where(unit + 1 < end, *z) for z in zip(on, self._enter(band), strict=True))
        return tuple(units), state
