"""Block order: tokens grouped by squares of the map, so that neighbors on the map are neighbors in memory.

The TensorCore kernel works on units of 8 x 8 pixels and on tiles of two units side by side, 128 queries. A level's map
is padded to whole tiles; its units follow one another row by row, and the 64 tokens of a unit too. A model permutes its
tokens once, works on them in this order (the padding counts as invalid) and permutes the result back.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

UNIT = 8
"""Rows and columns of a unit."""
TILE = 2 * UNIT * UNIT
"""Queries of a tile."""


@dataclasses.dataclass(frozen=True)
class BlockOrder:
    """The permutation of the tokens of some maps into block order, and back."""

    spatial_shapes: tuple[tuple[int, int], ...]
    """(height, width) of each level."""

    @property
    def grids(self) -> list[tuple[int, int]]:
        """(rows, columns) of units of each level; the columns are even."""
        return [(-(-height // UNIT), 2 * -(-width // (2 * UNIT))) for height, width in self.spatial_shapes]

    @property
    def level_lengths(self) -> list[int]:
        """Tokens of each level in block order, padding included."""
        return [rows * columns * UNIT * UNIT for rows, columns in self.grids]

    @property
    def length(self) -> int:
        """Of all levels."""
        return sum(self.level_lengths)

    @property
    def is_token(self) -> np.ndarray:
        """bool `[length]`: False in the padding."""
        grids = []
        for (height, width), (rows, columns) in zip(self.spatial_shapes, self.grids, strict=True):
            row, column = np.arange(rows * UNIT) < height, np.arange(columns * UNIT) < width
            grid = (row[:, None] & column).reshape(rows, UNIT, columns, UNIT)
            grids.append(grid.swapaxes(1, 2).ravel())
        return np.concatenate(grids)

    def to_blocks(self, x: jax.Array) -> jax.Array:
        """`[b, s, ...]`, levels one after another, row by row -> `[b, length, ...]`, zero in the padding."""
        b, _, *rest = x.shape
        blocks = []
        levels = _split(x, [height * width for height, width in self.spatial_shapes])
        for level, (height, width), (rows, columns) in zip(levels, self.spatial_shapes, self.grids, strict=True):
            level = level.reshape(b, height, width, *rest)
            padding = ((0, rows * UNIT - height), (0, columns * UNIT - width))
            level = jnp.pad(level, ((0, 0), *padding, *((0, 0) for _ in rest)))
            level = level.reshape(b, rows, UNIT, columns, UNIT, *rest).swapaxes(2, 3)
            blocks.append(level.reshape(b, -1, *rest))
        return jnp.concatenate(blocks, 1)

    def from_blocks(self, x: jax.Array) -> jax.Array:
        """Undoes `to_blocks`: `[b, length, ...]` -> `[b, s, ...]`."""
        b, _, *rest = x.shape
        levels = []
        blocks = _split(x, self.level_lengths)
        for level, (height, width), (rows, columns) in zip(blocks, self.spatial_shapes, self.grids, strict=True):
            level = level.reshape(b, rows, columns, UNIT, UNIT, *rest).swapaxes(2, 3)
            level = level.reshape(b, rows * UNIT, columns * UNIT, *rest)[:, :height, :width]
            levels.append(level.reshape(b, height * width, *rest))
        return jnp.concatenate(levels, 1)


def z_order(points: Any) -> Any:
    """Numbers of points along Morton's Z-shaped curve through 32 x 32 cells: near on it is mostly near on the map.

    Queries in its order make tiles that visit few units. `[..., 2]`, or more after (x, y), in 0-1 -> int32 `[...]`.
    """
    x, y = ((32 * points[..., i]).clip(0, 31).astype(np.int32) for i in range(2))
    return sum((x >> bit & 1 | (y >> bit & 1) << 1) << 2 * bit for bit in range(5))


def _split(x: jax.Array, lengths: Sequence[int]) -> Sequence[jax.Array]:
    """Levels of tokens. The gradient of a split is a concatenation; that of slices would be a sum of padded arrays."""
    return jax.lax.split(x, lengths, axis=1)


def block_order(spatial_shapes: Sequence[tuple[int, int]]) -> BlockOrder:
    """The block order of maps of these (height, width)."""
    return BlockOrder(tuple((int(height), int(width)) for height, width in spatial_shapes))
