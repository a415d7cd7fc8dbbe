"""Named problem sizes and random inputs: the one list that tests, benchmarks and tuning read."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike


@dataclasses.dataclass(frozen=True)
class Shape:
    """The size of one call of `ms_deform_attn`."""

    batch: int
    """Images."""
    spatial_shapes: tuple[tuple[int, int], ...]
    """(height, width) of each level."""
    queries: int | None = 300
    """Queries; `None` is one for each token (the encoder)."""
    heads: int = 8
    """Attention heads."""
    head_dim: int = 32
    """Channels of a head."""
    points: int = 4
    """Sampling points per head and level."""

    @property
    def tokens(self) -> int:
        """Tokens of all levels."""
        return sum(height * width for height, width in self.spatial_shapes)


COCO = ((100, 134), (50, 67), (25, 34), (13, 17))  # 800 x 1066
COCO_WIDE = ((100, 167), (50, 84), (25, 42), (13, 21))  # 800 x 1333
COCO_SMALL = ((60, 80), (30, 40), (15, 20), (8, 10))  # 480 x 640

SHAPES = {
    "encoder_480x640": Shape(1, COCO_SMALL, None),
    "encoder_800x1066": Shape(1, COCO, None),
    "encoder_800x1333": Shape(2, COCO_WIDE, None),
    "encoder_800x1333_single_scale": Shape(2, COCO_WIDE[2:3], None),
    "encoder_800x1333_dc5": Shape(2, COCO_WIDE[1:2], None),
    "decoder_800x1333": Shape(2, COCO_WIDE),
    "decoder_dino_800x1333": Shape(2, COCO_WIDE, 900 + 200),  # queries and denoising queries
    "encoder_bccd_demo": Shape(4, ((30, 40), (15, 20), (8, 10)), None, head_dim=16),
}

SMALL = {
    "one_of_each": Shape(1, ((1, 1),), 1, heads=1, head_dim=16, points=1),
    "odd_encoder": Shape(2, ((11, 19), (6, 10), (3, 5)), None, heads=2, head_dim=16, points=3),
    "odd_decoder": Shape(1, ((4, 16), (1, 1)), 131, heads=3, head_dim=24, points=2),
    "wide_heads": Shape(1, ((9, 33),), 20, heads=1, head_dim=128, points=4),
}
"""Sizes that a test can run in interpret mode, each with what may go wrong: uneven maps, a level of one pixel, one
query, a last tile that is not full, a head dim that is not a power of two."""


class Problem(NamedTuple):
    """The arrays that `ms_deform_attn` is called with, and a gradient of its output."""

    value: jax.Array
    """`[b, s, h, d]`."""
    sampling_locations: jax.Array
    """float32 `[b, q, h, l, p, 2]`."""
    attention_weights: jax.Array
    """float32 `[b, q, h, l, p]`, of sum 1 for each query and head."""
    gradient: jax.Array
    """`[b, q, h, d]`, in `value`'s type."""


def problem(shape: Shape, dtype: DTypeLike = jnp.float32, *, spread: float = 2.0, seed: int = 0) -> Problem:
    """Random inputs: every query samples around its own place, as in a model that starts to train.

    Args:
        shape: its size.
        dtype: of `value`.
        spread: standard deviation, in pixels of each level, of the offsets around `initial_offsets`.
        seed: of the random numbers.

    Positions keep 0.01 pixels away from pixel centers, where gradients jump.
    """
    rng = np.random.default_rng(seed)
    centers = query_centers(shape, rng)
    grid = (shape.batch, len(centers), shape.heads, len(shape.spatial_shapes), shape.points)
    sizes = np.array([(width, height) for height, width in shape.spatial_shapes])[:, None]  # [l, 1, 2]
    offsets = initial_offsets(shape)[:, None] + spread * rng.standard_normal((*grid, 2), np.float32)
    position = centers[:, None, None, None] * sizes - 0.5 + offsets
    cell = np.floor(position)
    locations = (cell + np.clip(position - cell, 0.01, 0.99) + 0.5) / sizes
    weights = rng.uniform(0.1, 1, grid)
    weights /= weights.sum((-1, -2), keepdims=True)
    value = rng.standard_normal((shape.batch, shape.tokens, shape.heads, shape.head_dim), np.float32)
    gradient = rng.standard_normal((*grid[:3], shape.head_dim), np.float32)
    return Problem(
        jnp.asarray(value, dtype),
        jnp.asarray(locations, jnp.float32),
        jnp.asarray(weights, jnp.float32),
        jnp.asarray(gradient, dtype),
    )


def query_centers(shape: Shape, rng: np.random.Generator) -> np.ndarray:
    """The queries' own places, `[q, 2]` (x, y) in 0-1: the tokens' centers in an encoder, random ones in a decoder."""
    if shape.queries is not None:
        return rng.uniform(0, 1, (shape.queries, 2))
    maps = [
        np.stack(np.meshgrid((np.arange(width) + 0.5) / width, (np.arange(height) + 0.5) / height), -1)
        for height, width in shape.spatial_shapes
    ]
    return np.concatenate([z.reshape(-1, 2) for z in maps])


def initial_offsets(shape: Shape) -> np.ndarray:
    """`[h, p, 2]` in pixels: each head looks in its own direction, point `i` at distance `i + 1` (appendix A.4)."""
    angle = 2 * np.pi * np.arange(shape.heads) / shape.heads
    direction = np.stack([np.cos(angle), np.sin(angle)], -1)
    direction /= np.abs(direction).max(-1, keepdims=True)
    return direction[:, None] * np.arange(1, shape.points + 1)[:, None]
