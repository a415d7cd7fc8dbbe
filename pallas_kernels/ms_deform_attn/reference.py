"""The definition of multi-scale deformable attention: bilinear samples, gathered.

Bilinear sampling is a sparse matrix: each output row is a weighted sum of `4 x levels x points` rows of the value table.
`bilinear` makes that matrix with plain operations, whose gradients with respect to locations and weights are JAX's own;
`sparse_matmul` multiplies it, a block of outputs at a time, forward and backward: the gathered rows, 64 times as large
as the output, are never there as a whole, and on a CPU a block stays in the cache.
"""

import functools
import itertools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

# Outputs in a block: some megabytes of gathered rows on a CPU, some hundred on an accelerator.
BLOCK = {"cpu": 512, "default": 65536}


def ms_deform_attn_reference(
    value: jax.Array,
    spatial_shapes: Sequence[tuple[int, int]],
    sampling_locations: jax.Array,
    attention_weights: jax.Array,
) -> jax.Array:
    """Shapes and semantics of `ms_deform_attn`.

    Pixel centres lie at half-integers (`align_corners=False`); pixels outside the map are zero. The output is not
    differentiable where a point crosses a pixel centre: the gradient there is that of the cell on its right and below.
    """
    b, s, h, d = value.shape
    token, weight = bilinear(
        spatial_shapes, sampling_locations.astype(jnp.float32), attention_weights.astype(jnp.float32)
    )
    batch, head = jnp.arange(b)[:, None, None, None, None, None], jnp.arange(h)[:, None, None, None]
    row = (batch * s + token) * h + head
    table = value.reshape(b * s * h, d)
    samples = weight[0, 0, 0].size
    output = sparse_matmul(table, row.reshape(-1, samples), weight.reshape(-1, samples))
    return output.reshape(b, -1, h, d).astype(value.dtype)


def bilinear(spatial_shapes: Sequence[tuple[int, int]], locations: jax.Array, weights: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The four pixels around each point: `[b, q, h, l, p, 2]` -> tokens and weights, both `[b, q, h, l, p, 4]`."""
    size = jnp.array([(width, height) for height, width in spatial_shapes])[:, None, :]  # [l, 1, 2], x before y
    first_token = np.cumsum([0, *(height * width for height, width in spatial_shapes[:-1])])[:, None]
    position = locations * size - 0.5
    low = jnp.floor(position)
    corners = [
        (low, low + 1 - position),
        (low + 1, position - low),
    ]
    corners = [
        (jnp.clip(corner, 0, size - 1).astype(jnp.int32), jnp.where((corner >= 0) & (corner < size), share, 0))
        for corner, share in corners
    ]
    tokens, products = [], []
    for (row, share_y), (column, share_x) in itertools.product(corners, corners):
        tokens.append(first_token + row[..., 1] * size[..., 0] + column[..., 0])
        products.append(weights * share_y[..., 1] * share_x[..., 0])
    return jnp.stack(tokens, -1), jnp.stack(products, -1)


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
    return jax.lax.platform_dependent(
        table, index, weight, **{platform: functools.partial(_forward, block) for platform, block in BLOCK.items()}
    )


def _sparse_matmul_fwd(table, index, weight):
    return sparse_matmul(table, index, weight), (table, index, weight)


def _sparse_matmul_bwd(residuals, gradient):
    grad_table, grad_weight = jax.lax.platform_dependent(
        *residuals, gradient, **{platform: functools.partial(_backward, block) for platform, block in BLOCK.items()}
    )
    return grad_table, None, grad_weight


sparse_matmul.defvjp(_sparse_matmul_fwd, _sparse_matmul_bwd)


def _forward(block, table, index, weight):
    def multiply(block):
        index, weight = block
        return jnp.einsum("nkd,nk->nd", gather(table, index), weight)

    return unblocked(jax.lax.map(multiply, blocked((index, weight), block)), len(index))


def _backward(block, table, index, weight, gradient):
    def multiply(grad_table, block):
        index, weight, gradient = block
        grad_weight = jnp.einsum("nkd,nd->nk", gather(table, index), gradient)
        update = weight[..., None] * gradient[:, None]
        return grad_table.at[index].add(update, mode="promise_in_bounds"), grad_weight

    zeros = jnp.zeros_like(table, jnp.float32)
    grad_table, grad_weight = jax.lax.scan(multiply, zeros, blocked((index, weight, gradient), block))
    return grad_table.astype(table.dtype), unblocked(grad_weight, len(index))


def gather(table, index):
    return table.at[index].get(mode="promise_in_bounds").astype(jnp.float32)


def blocked(arrays, block):
    """Each `[n, ...]` as `[blocks, block, ...]`, filled up with zeros."""
    n = len(arrays[0])
    blocks = -(-n // block)
    block = -(-n // blocks)
    return [
        jnp.pad(x, ((0, blocks * block - n), *((0, 0) for _ in x.shape[1:]))).reshape(blocks, block, *x.shape[1:])
        for x in arrays
    ]


def unblocked(x, n):
    return x.reshape(-1, *x.shape[2:])[:n]
