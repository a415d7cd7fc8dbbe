"""ResNet-18/34/50/101 with torchvision's semantics (v1.5: the stride is in the 3x3), as a detector's backbone."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from detr_jax.config import BackboneConfig

BLOCKS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3)}

KAIMING = nnx.initializers.variance_scaling(2.0, "fan_out", "normal")


class Buffer(nnx.Variable):
    """A constant of the model: saved with it, never trained."""


class Conv(nnx.Module):
    """Square convolution, NHWC, padded as torchvision's; a 1x1 runs as a matrix product on `[n, c]`."""

    def __init__(
        self,
        n_in: int,
        n_out: int,
        size: int,
        *,
        stride: int = 1,
        dilation: int = 1,
        bias: bool = False,
        kernel_init: jax.nn.initializers.Initializer = KAIMING,
        dtype=None,
        rngs: nnx.Rngs,
    ):
        self.kernel = nnx.Param(kernel_init(rngs.params(), (size, size, n_in, n_out), jnp.float32))
        self.bias = nnx.Param(nnx.initializers.zeros(rngs.params(), (n_out,), jnp.float32)) if bias else None
        self.stride, self.dilation, self.dtype = stride, dilation, dtype

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

        centred = x.astype(jnp.float32)
        centred -= group_mean(centred)
        scale = jax.lax.rsqrt(group_mean(jnp.square(centred)) + 1e-5) * self.scale[...]
        return (centred * scale + self.bias[...]).astype(x.dtype)


def norm(config: BackboneConfig, features: int) -> FrozenBatchNorm | GroupNorm:
    """The backbone's normalisation layer."""
    return FrozenBatchNorm(features) if config.norm == "frozen_batch" else GroupNorm(features)


def masked(x: jax.Array, valid: jax.Array | None) -> jax.Array:
    """`x` with zeros where it is not `valid`; `None` leaves it alone."""
    return x if valid is None else jnp.where(valid[..., None], x, 0)


class Block(nnx.Module):
    """Residual block: two 3x3 convolutions, or the 1x1, 3x3, 1x1 bottleneck."""

    def __init__(self, config: BackboneConfig, n_in: int, width: int, *, stride: int, dilation: int, dtype, rngs):
        bottleneck = config.depth >= 50
        n_out = width * (4 if bottleneck else 1)

        def conv(n_in, n_out, size, stride=1, dilation=1):
            return Conv(n_in, n_out, size, stride=stride, dilation=dilation, dtype=dtype, rngs=rngs)

        if bottleneck:
            convs = [conv(n_in, width, 1), conv(width, width, 3, stride, dilation), conv(width, n_out, 1)]
        else:
            convs = [conv(n_in, width, 3, stride, dilation), conv(width, n_out, 3, 1, dilation)]
        self.convs = nnx.List(convs)
        self.norms = nnx.List(norm(config, c.kernel.shape[-1]) for c in convs)
        if stride > 1 or n_in != n_out:
            self.downsample_conv, self.downsample_norm = conv(n_in, n_out, 1, stride), norm(config, n_out)
        else:
            self.downsample_conv = self.downsample_norm = None
        self.stride, self.stride_at = stride, 1 if bottleneck else 0

    def __call__(self, x: jax.Array, valid_in: jax.Array | None, valid_out: jax.Array | None) -> jax.Array:
        shortcut = x
        if self.downsample_conv is not None and self.downsample_norm is not None:
            shortcut = self.downsample_norm(self.downsample_conv(x), valid_out)
        last = len(self.convs) - 1
        for i, (conv, normalise) in enumerate(zip(self.convs, self.norms, strict=True)):
            valid = valid_in if i < self.stride_at else valid_out
            x = normalise(conv(x), valid)
            if i < last:
                x = masked(nnx.relu(x), valid)
        return masked(nnx.relu(x + shortcut), valid_out)


class ResNet(nnx.Module):
    """Stem and four stages; returns the maps of the stages (strides 4, 8, 16, 32; the last 16 with DC5)."""

    def __init__(self, config: BackboneConfig, *, dtype=None, rngs: nnx.Rngs):
        self.config = config
        self.stem_conv = Conv(3, 64, 7, stride=2, dtype=dtype, rngs=rngs)
        self.stem_norm = norm(config, 64)
        stages, channels, n_in = [], [], 64
        for i, blocks in enumerate(BLOCKS[config.depth]):
            width = 64 * 2**i
            dilate = config.dilation and i == 3
            stage = []
            for j in range(blocks):
                stride = 2 if i > 0 and j == 0 and not dilate else 1
                # torchvision dilates from the second block on: the first keeps the dilation of the stage before.
                dilation = 2 if dilate and j > 0 else 1
                stage.append(Block(config, n_in, width, stride=stride, dilation=dilation, dtype=dtype, rngs=rngs))
                n_in = width * (4 if config.depth >= 50 else 1)
            stages.append(nnx.List(stage))
            channels.append(n_in)
        self.stages = nnx.List(stages)
        self.channels = tuple(channels)

    def __call__(self, images: jax.Array, sizes: jax.Array) -> list[jax.Array]:
        """Feature maps of the four stages.

        Args:
            images: `[b, H, W, 3]`, normalised with the ImageNet mean and standard deviation, zero in the padding.
            sizes: int `[b, 2]`, valid (height, width) of each image.
        """

        stride = 1

        def valid_at(x):
            return valid_cells(sizes, x.shape[1:3], stride) if self.config.mask_padding else None

        x = self.stem_conv(masked(images, valid_at(images)))
        stride = 2
        x = nnx.relu(self.stem_norm(x, valid_at(x)))
        x = masked(x, valid_at(x))
        x = max_pool(x)
        stride = 4
        x = masked(x, valid_at(x))
        maps = []
        for stage in self.stages:
            for block in stage:
                valid_in = valid_at(x)
                stride *= block.stride
                valid_out = valid_at(x[:, :: block.stride, :: block.stride])
                x = block(x, valid_in, valid_out)
            maps.append(x)
        return maps


def max_pool(x: jax.Array) -> jax.Array:
    """3x3 maximum with stride 2 and padding 1; a maximum of slices, whose gradient is fast on a CPU."""
    for axis in (1, 2):
        n = x.shape[axis]
        x = jnp.pad(x, [(1, 1) if i == axis else (0, 0) for i in range(4)], constant_values=-jnp.inf)
        taps = [jax.lax.slice_in_dim(x, tap, tap + n, 2, axis) for tap in range(3)]
        x = jnp.maximum(jnp.maximum(taps[0], taps[1]), taps[2])
    return x


def valid_cells(sizes: jax.Array, shape: Sequence[int], stride: int) -> jax.Array:
    """Which cells of a map of that stride see the image: the first `ceil(size / stride)`, bool `[b, h, w]`."""
    rows, columns = (jnp.arange(n) * stride < sizes[:, axis, None] for axis, n in enumerate(shape))
    return rows[:, :, None] & columns[:, None, :]


def valid_nearest(sizes: jax.Array, canvas: Sequence[int], shape: Sequence[int]) -> jax.Array:
    """The pixel mask of a canvas resized to a map as the official code does, nearest at `floor`: bool `[b, h, w]`.

    Equal to `valid_cells` where the canvas is a multiple of the stride.
    """
    rows, columns = (
        jnp.arange(n) * total // n < sizes[:, axis, None]
        for axis, (n, total) in enumerate(zip(shape, canvas, strict=True))
    )
    return rows[:, :, None] & columns[:, None, :]


def frozen(path: tuple, config: BackboneConfig) -> bool:
    """Whether `config.freeze_at` keeps the parameter at `path` (of the detector) from being trained."""
    names = [str(part) for part in path]
    if "backbone" not in names:
        return False
    inside = names[names.index("backbone") + 1 :]
    stem = inside[0].startswith("stem")
    return (stem and config.freeze_at >= 1) or (inside[:2] == ["stages", "0"] and config.freeze_at >= 2)
