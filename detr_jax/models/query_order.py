"""The order of a decoder's queries: on TPUs, those that look at the same part of the image side by side.

The kernel of deformable attention works on tiles of 128 queries, and visits every part of the maps that one of them
samples. A decoder computes the same for its queries in any order, so it takes them along a curve through the image,
and gives its outputs back in theirs.
"""

import jax
import jax.numpy as jnp

from detr_jax.models.attention import Tokens
from detr_jax.models.layers import is_captured
from pallas_kernels.ms_deform_attn.order import z_order


def nearby_first(model, memory: Tokens, reference: jax.Array) -> jax.Array | None:
    """Which query comes where: float32 `[b, place, query]`, 1 where it does, else 0; `None`: they stay as they are.

    They do for other implementations than the TPU's, and where `nnx.capture` looks at the decoder.

    Args:
        model: whose decoder it is.
        memory: what the decoder attends to.
        reference: `[b, q, 2 or 4]`, the queries' points or boxes, (x, y) first, in 0-1.
    """
    if memory.order is None or is_captured(model):
        return None
    key, number = z_order(jax.lax.stop_gradient(reference)), jnp.arange(reference.shape[1])
    before = (key[:, None] < key[:, :, None]) | ((key[:, None] == key[:, :, None]) & (number < number[:, None]))
    place = before.sum(-1)  # the rank of each query
    return (place[:, None] == number[:, None]).astype(jnp.float32)


def arrange(order: jax.Array | None, x: jax.Array) -> jax.Array:
    """Queries `[b, q, c]` in that order. A product with ones and zeros is exact, and on a TPU quicker than a gather."""
    if order is None:
        return x
    return jnp.einsum("bpq,bqc->bpc", order.astype(x.dtype), x, precision=jax.lax.Precision.HIGHEST)


def arrange_visible(order: jax.Array | None, visible: jax.Array | None) -> jax.Array | None:
    """Which query sees which, bool `[q, q]`, in that order: `[b, 1, q, q]`, the same for all heads."""
    if order is None or visible is None:
        return visible
    there, seen = (z.astype(jnp.bfloat16) for z in (order, visible))  # ones and zeros
    return (jnp.einsum("bpq,qr,bsr->bps", there, seen, there) > 0.5)[:, None]


def restore(order: jax.Array | None, x: jax.Array) -> jax.Array:
    """Undoes `arrange`, of `[..., b, q, c]`."""
    if order is None:
        return x
    return jnp.einsum("bpq,...bpc->...bqc", order.astype(x.dtype), x, precision=jax.lax.Precision.HIGHEST)
