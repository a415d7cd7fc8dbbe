"""Small building blocks with PyTorch's default initialisation, which the published recipes rely on."""

import itertools

import jax
import jax.numpy as jnp
from flax import nnx


def torch_uniform(fan_in: int) -> jax.nn.initializers.Initializer:
    """PyTorch's default for weights and biases of linear and convolution layers: U(-1/sqrt(fan_in), 1/sqrt(fan_in))."""
    bound = fan_in**-0.5

    def init(key, shape, dtype=jnp.float32, out_sharding=None):
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init


class Linear(nnx.Linear):
    """`nnx.Linear` that sees `[b, s, c]` as `[b * s, c]`.

    With two leading axes, XLA's CPU compiler transposes a copy of the output's gradient for that of the kernel, which
    takes a quarter of a feed-forward block's time. Other shapes, such as `[layers, b, q, c]`, are left alone: merging
    axes across a sharded one needs communication.
    """

    def __call__(self, inputs: jax.Array, out_sharding=None) -> jax.Array:
        if inputs.ndim != 3:
            return super().__call__(inputs, out_sharding)
        b, s, c = inputs.shape
        return super().__call__(inputs.reshape(b * s, c), out_sharding).reshape(b, s, -1)

    def interleaved(self, inputs: jax.Array, n: int) -> list[jax.Array]:
        """Every `n`-th output, from the first, second, ... on: slices of the output without their cost on TPUs."""
        kernel, bias = self.kernel[...], self.bias[...]
        dtype = self.dtype or jnp.result_type(inputs, kernel)
        return [
            jnp.dot(inputs.astype(dtype), kernel[:, i::n].astype(dtype)) + bias[i::n].astype(dtype) for i in range(n)
        ]


def linear(in_features: int, out_features: int, *, kernel_init=None, bias_init=None, dtype=None, rngs: nnx.Rngs):
    """A linear layer, initialised as `torch.nn.Linear` where nothing else is given."""
    default = torch_uniform(in_features)
    return Linear(
        in_features,
        out_features,
        kernel_init=kernel_init or default,
        bias_init=bias_init or default,
        dtype=dtype,
        rngs=rngs,
    )


def layer_norm(features: int, *, dtype=None, rngs: nnx.Rngs) -> nnx.LayerNorm:
    """LayerNorm with PyTorch's epsilon, statistics in two passes."""
    return nnx.LayerNorm(features, epsilon=1e-5, use_fast_variance=False, dtype=dtype, rngs=rngs)


class Dropout(nnx.Module):
    """Dropout that is active exactly when it is given `rngs`; 16 random bits a number, half of `nnx.Dropout`'s cost."""

    def __init__(self, rate: float):
        self.rate = rate

    def __call__(self, x: jax.Array, rngs: nnx.Rngs | None) -> jax.Array:
        if rngs is None or self.rate == 0:
            return x
        *lead, n = x.shape
        bits = jax.random.bits(rngs.dropout(), (*lead, -(-n // 2)), jnp.uint32)
        bits = jax.lax.bitcast_convert_type(bits, jnp.uint16).reshape(*lead, -1)[..., :n]
        return jnp.where(bits >= round(self.rate * 2**16), x / (1 - self.rate), 0)


class MLP(nnx.Module):
    """Linear layers with ReLU between them: the box head."""

    def __init__(self, in_features: int, hidden: int, out_features: int, num_layers: int, *, dtype=None, rngs):
        widths = [in_features, *[hidden] * (num_layers - 1), out_features]
        self.layers = nnx.List(
            linear(n_in, n_out, dtype=dtype, rngs=rngs) for n_in, n_out in itertools.pairwise(widths)
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        for layer in self.layers[:-1]:
            x = nnx.relu(layer(x))
        return self.layers[-1](x)


class FeedForward(nnx.Module):
    """Linear -> ReLU -> dropout -> linear, Xavier weights."""

    def __init__(self, features: int, hidden: int, dropout: float, *, dtype=None, rngs: nnx.Rngs):
        xavier = nnx.initializers.xavier_uniform()
        self.linear1 = linear(features, hidden, kernel_init=xavier, dtype=dtype, rngs=rngs)
        self.linear2 = linear(hidden, features, kernel_init=xavier, dtype=dtype, rngs=rngs)
        self.dropout = Dropout(dropout)

    def __call__(self, x: jax.Array, rngs: nnx.Rngs | None) -> jax.Array:
        return self.linear2(self.dropout(nnx.relu(self.linear1(x)), rngs))


def inverse_sigmoid(x: jax.Array, eps: float = 1e-5) -> jax.Array:
    """Logit of `x`, numerator and denominator kept above `eps` as in the official code."""
    x = jnp.clip(x, 0, 1)
    return jnp.log(jnp.maximum(x, eps) / jnp.maximum(1 - x, eps))


def capture(module: nnx.Module, name: str, value) -> None:
    """Hands an intermediate value to `nnx.capture(model, nnx.Intermediate)`, where that is what runs the model.

    Otherwise it does nothing, under `jax.jit` not even an operation: nothing is stored on the module.
    """
    if hasattr(module, "__captures__"):
        module.sow(nnx.Intermediate, name, value, reduce_fn=lambda _, new: new, init_fn=lambda: None)
