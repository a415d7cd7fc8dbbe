"""Which cells of a feature map see the image, and which see padding only."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp


def zero_padding(x: jax.Array, valid: jax.Array | None) -> jax.Array:
    """`x` with zeros where it is not `valid`; `None` leaves it alone."""
    return x if valid is None else jnp.where(valid[..., None], x, 0)


def valid_cells(sizes: jax.Array, shape: Sequence[int], stride: int) -> jax.Array:
    """Which cells of a map of that stride see the image: the first `ceil(size / stride)`, bool `[b, h, w]`."""
    rows, columns = (jnp.arange(n) * stride < sizes[:, axis, None] for axis, n in enumerate(shape))
    return rows[:, :, None] & columns[:, None, :]


def valid_nearest(sizes: jax.Array, bucket: Sequence[int], shape: Sequence[int]) -> jax.Array:
    """The pixel mask of a bucket resized to a map as the official code does, nearest at `floor`: bool `[b, h, w]`.

    Equal to `valid_cells` where the bucket is a multiple of the stride.
    """
    rows, columns = (
        jnp.arange(n) * total // n < sizes[:, axis, None]
        for axis, (n, total) in enumerate(zip(shape, bucket, strict=True))
    )
    return rows[:, :, None] & columns[:, None, :]
