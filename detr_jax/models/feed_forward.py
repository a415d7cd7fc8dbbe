"""The feed-forward block of a transformer layer."""

import jax
from flax import nnx

from detr_jax.models.layers import Dropout, linear, relu


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
