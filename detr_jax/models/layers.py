"""Small building blocks with PyTorch's default initialization, which the published configs rely on."""

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import TypeVar

import jax
import jax.numpy as jnp
from flax import nnx

from pallas_kernels.dropout import keep

Output = TypeVar("Output")


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

    def weights(self) -> tuple[jax.Array, jax.Array]:
        """Kernel `[n_in, n_out]` and bias `[n_out]`."""
        assert self.bias is not None
        return self.kernel[...], self.bias[...]

    def interleaved(self, inputs: jax.Array, n: int) -> list[jax.Array]:
        """Every `n`-th output, from the first, second, ... on: slices of the output without their cost on TPUs."""
        kernel, bias = self.weights()
        dtype = self.dtype or jnp.result_type(inputs, kernel)
        return [
            jnp.dot(inputs.astype(dtype), kernel[:, i::n].astype(dtype)) + bias[i::n].astype(dtype) for i in range(n)
        ]


def linear(in_features: int, out_features: int, *, kernel_init=None, bias_init=None, dtype=None, rngs: nnx.Rngs):
    """A linear layer, initialized as `torch.nn.Linear` where nothing else is given."""
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
    """Dropout that is active exactly when it is given `rngs`.

    Whether a number is dropped is a hash of the key and of its place. So the bits are computed where they are used, in
    the layout of what they mask, and they are the same on any number of devices. (On TPUs `jax.random.bits` costs more
    than the feed-forward block itself: its bits are drawn in another layout and moved.)
    """

    def __init__(self, rate: float):
        self.rate = rate

    def __call__(self, x: jax.Array, rngs: nnx.Rngs | None) -> jax.Array:
        key = self.draw_key(rngs)
        return x if key is None else dropout(x, key, self.rate)

    def draw_key(self, rngs: nnx.Rngs | None) -> jax.Array | None:
        """Two words for `dropout`; `None` where nothing is to be dropped."""
        if rngs is None or self.rate == 0:
            return None
        return jax.random.key_data(rngs.dropout()).astype(jnp.uint32)


def dropout(x: jax.Array, key: jax.Array, rate: float) -> jax.Array:
    """0 in a share `rate` of the places, picked by a hash of `key` (two words); the others are scaled up."""
    return jnp.where(keep(places(x.shape), key, rate), x / (1 - rate), 0)


@functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
def relu(x: jax.Array, key: jax.Array | None = None, rate: float = 0.0) -> jax.Array:
    """`max(x, 0)`, and dropout if there is a key.

    The derivative is 0 where the result is, and elsewhere 1, or with dropout 1 / (1 - rate). So nothing is kept for it
    but the result, which the next layer keeps anyway: no mask, no input, no random bits.
    """
    x = jnp.maximum(x, 0)
    return x if key is None else dropout(x, key, rate)


@relu.defjvp
def _relu_jvp(rate, primals, tangents):
    output = relu(*primals, rate)
    scale = 1 if primals[1] is None else 1 - rate
    return output, jnp.where(output != 0, tangents[0] / scale, 0)


def places(shape: Sequence[int]) -> jax.Array:
    """The index of each place of an array, modulo 2^32, as uint32 of its shape."""
    place, stride = jnp.zeros(shape, jnp.uint32), 1
    for axis in reversed(range(len(shape))):
        place += jax.lax.broadcasted_iota(jnp.uint32, shape, axis) * jnp.uint32(stride % 2**32)
        stride *= shape[axis]
    return place


class MLP(nnx.Module):
    """Linear layers with ReLU between them: the box head."""

    def __init__(
        self, in_features: int, hidden: int, out_features: int, num_layers: int, *, kernel_init=None, dtype=None, rngs
    ):
        widths = [in_features, *[hidden] * (num_layers - 1), out_features]
        self.layers = nnx.List(
            linear(n_in, n_out, kernel_init=kernel_init, dtype=dtype, rngs=rngs)
            for n_in, n_out in itertools.pairwise(widths)
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        for layer in self.layers[:-1]:
            x = relu(layer(x))
        return self.layers[-1](x)


def inverse_sigmoid(x: jax.Array, eps: float = 1e-5) -> jax.Array:
    """Logit of `x`, numerator and denominator kept above `eps` as in the official code."""
    x = jnp.clip(x, 0, 1)
    return jnp.log(jnp.maximum(x, eps) / jnp.maximum(1 - x, eps))


def capture(module: nnx.Module, name: str, value) -> None:
    """Hands an intermediate value to `nnx.capture(model, nnx.Intermediate)`, where that is what runs the model.

    Otherwise it does nothing, under `jax.jit` not even an operation: nothing is stored on the module.
    """
    if is_captured(module):
        module.sow(nnx.Intermediate, name, value, reduce_fn=lambda _, new: new, init_fn=lambda: None)


def is_captured(module: nnx.Module) -> bool:
    """Whether `nnx.capture` runs the model."""
    return hasattr(module, "__captures__")


def recompute(active: bool, layer: Callable[..., Output], *args) -> Output:
    """`layer(*args)`; where `active`, its intermediate values are computed again in the backward pass, not kept."""
    if not active:
        return layer(*args)
    return nnx.remat(lambda layer, *args: layer(*args))(layer, *args)


KAIMING = nnx.initializers.variance_scaling(2.0, "fan_out", "normal")


class Buffer(nnx.Variable):
    """A constant of the model: saved with it, never trained."""


class Conv(nnx.Module):
    """Square convolution, NHWC, padded as torchvision's; a 1x1 runs as a matrix product on `[n, c]`.

    With `groups`, which a 1x1 has not, each group of outputs sees its group of inputs alone.
    """

    def __init__(
        self,
        n_in: int,
        n_out: int,
        size: int,
        *,
        stride: int = 1,
        dilation: int = 1,
        groups: int = 1,
        bias: bool = False,
        kernel_init: jax.nn.initializers.Initializer = KAIMING,
        dtype=None,
        rngs: nnx.Rngs,
    ):
        self.kernel = nnx.Param(kernel_init(rngs.params(), (size, size, n_in // groups, n_out), jnp.float32))
        self.bias = nnx.Param(nnx.initializers.zeros(rngs.params(), (n_out,), jnp.float32)) if bias else None
        self.stride, self.dilation, self.groups, self.dtype = stride, dilation, groups, dtype

    def __call__(self, x: jax.Array) -> jax.Array:
        kernel = self.kernel[...].astype(self.dtype)
        x = x.astype(self.dtype)
        size = kernel.shape[0]
        if size == 1:
            x = x[:, :: self.stride, :: self.stride]
            x = (x.reshape(-1, x.shape[-1]) @ kernel[0, 0]).reshape(*x.shape[:3], -1)
        else:
            pad = size // 2 * self.dilation
            x = jax.lax.conv_general_dilated(
                x,
                kernel,
                (self.stride, self.stride),
                [(pad, pad), (pad, pad)],
                rhs_dilation=(self.dilation, self.dilation),
                dimension_numbers=("NHWC", "HWIO", "NHWC"),
                feature_group_count=self.groups,
            )
        return x if self.bias is None else x + self.bias[...].astype(x.dtype)


class FrozenBatchNorm(nnx.Module):
    """BatchNorm whose statistics and affine are constants."""

    def __init__(self, features: int):
        self.weight = Buffer(jnp.ones(features))
        self.bias = Buffer(jnp.zeros(features))
        self.mean = Buffer(jnp.zeros(features))
        self.var = Buffer(jnp.ones(features))

    def __call__(self, x: jax.Array, valid: jax.Array | None = None) -> jax.Array:
        scale = self.weight[...] * jax.lax.rsqrt(self.var[...] + 1e-5)
        shift = self.bias[...] - self.mean[...] * scale
        return x * scale.astype(x.dtype) + shift.astype(x.dtype)


class GroupNorm(nnx.Module):
    """GroupNorm over channels-last maps; with `valid [b, h, w]`, statistics of the valid pixels alone."""

    def __init__(self, features: int, num_groups: int = 32):
        self.scale = nnx.Param(jnp.ones(features))
        self.bias = nnx.Param(jnp.zeros(features))
        self.num_groups = num_groups

    def __call__(self, x: jax.Array, valid: jax.Array | None = None) -> jax.Array:
        b, h, w, c = x.shape
        where = jnp.ones((b, h, w, 1), bool) if valid is None else valid[..., None]
        count = where.sum((1, 2)) * (c // self.num_groups)

        def group_mean(x):
            # Pixels first, channels of a group after: reducing both at once is several times slower on a CPU.
            pixels = x.sum((1, 2), where=None if valid is None else where)
            groups = pixels.reshape(b, self.num_groups, -1).sum(-1) / count
            return jnp.repeat(groups, c // self.num_groups, axis=1)[:, None, None]

        centered = x.astype(jnp.float32)
        centered -= group_mean(centered)
        scale = jax.lax.rsqrt(group_mean(jnp.square(centered)) + 1e-5) * self.scale[...]
        return (centered * scale + self.bias[...]).astype(x.dtype)


def max_pool(x: jax.Array) -> jax.Array:
    """3x3 maximum with stride 2 and padding 1; a maximum of slices, whose gradient is fast on a CPU."""
    for axis in (1, 2):
        n = x.shape[axis]
        x = jnp.pad(x, [(1, 1) if i == axis else (0, 0) for i in range(4)], constant_values=-jnp.inf)
        taps = [jax.lax.slice_in_dim(x, tap, tap + n, 2, axis) for tap in range(3)]
        x = jnp.maximum(jnp.maximum(taps[0], taps[1]), taps[2])
    return x
