"""The feed-forward block of a transformer layer, and all that a post-norm layer does after its attention."""

import jax
import jax.numpy as jnp
from flax import nnx

from detr_jax.models.layers import Dropout, Linear, linear, relu
from detr_jax.sharding import BATCH_AXES
from pallas_kernels.feed_forward import Weights, feed_forward, is_faster
from pallas_kernels.over_mesh import other_axes


class FeedForward(nnx.Module):
    """Linear -> ReLU -> dropout -> linear, Xavier weights."""

    def __init__(self, features: int, hidden: int, dropout: float, *, dtype=None, rngs: nnx.Rngs):
        xavier = nnx.initializers.xavier_uniform()
        self.linear1 = linear(features, hidden, kernel_init=xavier, dtype=dtype, rngs=rngs)
        self.linear2 = linear(hidden, features, kernel_init=xavier, dtype=dtype, rngs=rngs)
        self.dropout = Dropout(dropout)

    def __call__(self, x: jax.Array, rngs: nnx.Rngs | None) -> jax.Array:
        x = relu(self.linear1(x), self.dropout.draw_key(rngs), self.dropout.rate)
        return self.linear2(x)


def add_and_norm(
    x: jax.Array,
    attended: jax.Array,
    rngs: nnx.Rngs | None,
    *,
    norm1: nnx.LayerNorm,
    ffn: FeedForward,
    norm2: nnx.LayerNorm,
    dropout: Dropout,
    in_one_kernel: bool,
) -> jax.Array:
    """`norm2(v + dropout(ffn(v)))` with `v = norm1(x + dropout(attended))`.

    Args:
        x: `[b, s, c]`, the residual stream.
        attended: `[b, s, c]`, the attention's output.
        rngs: of dropout, or `None`.
        norm1: after the attention.
        ffn: the feed-forward block.
        norm2: after it.
        dropout: of the same rate as that of `ffn`.
        in_one_kernel: by the Pallas kernel for TPUs, wherever it can and pays: with a batch that is split over the
            mesh's usual axes, without adapters on the linear layers. It drops the same numbers.
    """
    plain = type(ffn.linear1) is type(ffn.linear2) is Linear
    rate = 0.0 if rngs is None else dropout.rate
    if not in_one_kernel or not plain or other_axes(BATCH_AXES) or not is_faster(rate):
        x = norm1(x + dropout(attended, rngs))
        return norm2(x + dropout(ffn(x, rngs), rngs))
    drawn = [drop.draw_key(rngs) for drop in (dropout, ffn.dropout, dropout)]
    keys = jnp.stack([key for key in drawn if key is not None]) if rate else None
    weights = Weights(*_affine(norm1), *ffn.linear1.weights(), *ffn.linear2.weights(), *_affine(norm2))
    return feed_forward(x, attended, weights, keys, rate=rate, batch_axis=BATCH_AXES)


def _affine(norm: nnx.LayerNorm) -> tuple[jax.Array, jax.Array]:
    """Scale and shift."""
    assert norm.scale is not None and norm.bias is not None
    return norm.scale[...], norm.bias[...]
