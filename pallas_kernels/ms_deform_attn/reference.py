"""The definition of multi-scale deformable attention (Deformable DETR, equation 3): bilinear samples, gathered.

Bilinear sampling is a sparse matrix: each output is a weighted sum of `4 x levels x points` rows of the value table.
`bilinear` makes that matrix with plain operations, whose gradients with respect to locations and weights are JAX's own.
`sparse_matmul` multiplies by it, block by block, forward and backward. The gathered rows, 64 times as large as the
output in the published models, never exist as a whole, and on a CPU a block of them stays in the cache.

Complexity (the paper's appendix A.1): `4 x levels x points` multiplications per query and channel, linear in queries
and independent of the size of the maps.
"""

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

# Gathered rows in a block, by platform: some megabytes on a CPU, some hundred on an accelerator.
BLOCK_ROWS = {"cpu": 2**15, "default": 2**22}


def ms_deform_attn_reference(
    value: jax.Array,
    spatial_shapes: Sequence[tuple[int, int]],
    sampling_locations: jax.Array,
    attention_weights: jax.Array,
    *,
    interpret: bool = False,
) -> jax.Array:
    """Shapes and semantics of `ms_deform_attn`; `interpret` changes nothing.

    Pixel centers lie at half-integers (`align_corners=False`); pixels outside the map are zero. The output is not
    differentiable where a point crosses a pixel center: the gradient there is that of the cell on its right and below.
    """
    b, s, h, d = value.shape
    token, weight = bilinear(
        spatial_shapes, sampling_locations.astype(jnp.float32), attention_weights.astype(jnp.float32)
    )
    batch, head = jnp.arange(b)[:, None, None, None, None, None], jnp.arange(h)[:, None, None, None]
    row = (batch * s + token) * h + head
    samples = 4 * attention_weights.shape[3] * attention_weights.shape[4]
    output = sparse_matmul(value.reshape(b * s * h, d), row.reshape(-1, samples), weight.reshape(-1, samples))
    return output.reshape(b, -1, h, d).astype(value.dtype)


def bilinear(
    spatial_shapes: Sequence[tuple[int, int]], locations: jax.Array, weights: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The four pixels around each point and their bilinear weights times the point's, zero outside the map.

    Args:
        spatial_shapes: (height, width) of each of the `l` levels.
        locations: `[b, q, h, l, p, 2]`, (x, y) in 0-1.
        weights: `[b, q, h, l, p]`, of the points.

    Returns:
        Tokens (int32) and weights, both `[b, q, h, l, p, 4]`.
    """
    sizes = np.array([(width, height) for height, width in spatial_shapes], np.int32)[:, None]  # [l, 1, 2]
    level_start = np.cumsum([0, *(height * width for height, width in spatial_shapes[:-1])], dtype=np.int32)[:, None]
    token, share = corners(locations * sizes - 0.5, sizes)
    return token + level_start[..., None], weights[..., None] * share


def corners(position: jax.Array, sizes: np.ndarray) -> tuple[jax.Array, jax.Array]:
    """The four pixels around each point and their bilinear weights, zero outside the map.

    Args:
        position: float32 `[..., 2]`, (column, row) in pixels; 0 is the center of the first one.
        sizes: int32, (width, height), of a shape that broadcasts with `position`.

    Returns:
        Pixels (int32, row by row) and weights, both `[..., 4]`.
    """
    low = jnp.floor(position)
    neighbors = []
    for pixel, share in ((low, low + 1 - position), (low + 1, position - low)):
        inside = (pixel >= 0) & (pixel < sizes)
        neighbors.append((jnp.clip(pixel, 0, sizes - 1).astype(jnp.int32), jnp.where(inside, share, 0)))
    pixels, shares = [], []
    for (row, share_y), (column, share_x) in itertools.product(neighbors, neighbors):
        pixels.append(row[..., 1] * sizes[..., 0] + column[..., 0])
        shares.append(share_y[..., 1] * share_x[..., 0])
    return jnp.stack(pixels, -1), jnp.stack(shares, -1)


@jax.custom_vjp
def sparse_matmul(table: jax.Array, index: jax.Array, weight: jax.Array) -> jax.Array:
    """`output[n] = sum_k weight[n, k] * table[index[n, k]]`.

    Args:
        table: `[r, d]`, float32 or bfloat16.
        index: int `[n, k]`, within the table.
        weight: float32 `[n, k]`.

    Returns:
        float32 `[n, d]`.
    """
    return by_platform(_forward, table, index, weight)


def _forward(block_rows, table, index, weight):
    def multiply(block):
        index, weight = block
        return jnp.einsum("nkd,nk->nd", gather(table, index), weight, precision="highest")

    return unblocked(jax.lax.map(multiply, blocked((index, weight), block_rows)), index.shape[0])


def _backward(block_rows, table, index, weight, gradient):
    def multiply(grad_table, block):
        index, weight, gradient = block
        grad_weight = jnp.einsum("nkd,nd->nk", gather(table, index), gradient, precision="highest")
        grad_rows = weight[..., None] * gradient[:, None]
        return grad_table.at[index].add(grad_rows, mode="promise_in_bounds"), grad_weight

    zeros = jnp.zeros_like(table, jnp.float32)
    grad_table, grad_weight = jax.lax.scan(multiply, zeros, blocked((index, weight, gradient), block_rows))
    return grad_table.astype(table.dtype), None, unblocked(grad_weight, index.shape[0])


sparse_matmul.defvjp(
    lambda *inputs: (sparse_matmul(*inputs), inputs),
    lambda inputs, gradient: by_platform(_backward, *inputs, gradient),
)


def by_platform(function: Callable, *arrays: jax.Array) -> Any:
    """`function(block_rows, *arrays)` with the block size of the platform that it is compiled for."""
    return jax.lax.platform_dependent(*arrays, **{k: functools.partial(function, n) for k, n in BLOCK_ROWS.items()})


def gather(table: jax.Array, index: jax.Array) -> jax.Array:
    """Rows of a table in float32: `[r, d]`, `[n, k]` -> `[n, k, d]`."""
    return table.at[index].get(mode="promise_in_bounds").astype(jnp.float32)


def blocked(arrays: Sequence[jax.Array], block_rows: int) -> list[jax.Array]:
    """Each `[n, ...]` as `[blocks, n / blocks, ...]`, filled up with zeros; the first one is the index."""
    n, samples = arrays[0].shape
    if isinstance(n, int):
        blocks = max(1, round(n * samples / block_rows))
        size = -(-n // blocks)
    else:  # a symbolic size of `jax.export`
        size = max(1, block_rows // samples)
        blocks = -(-n // size)
    return [
        jnp.pad(x, ((0, blocks * size - n), *((0, 0) for _ in x.shape[1:]))).reshape(blocks, size, *x.shape[1:])
        for x in arrays
    ]


def unblocked(x: jax.Array, n: int) -> jax.Array:
    """Undoes `blocked`."""
    return x.reshape(-1, *x.shape[2:])[:n]
