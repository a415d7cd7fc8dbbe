"""ResNet and ResNeXt with torchvision's semantics (v1.5: the stride is in the 3x3), as a detector's backbone."""

import jax
from flax import nnx

from detr_jax.config import BackboneConfig
from detr_jax.models.deform_conv import DeformConv
from detr_jax.models.layers import Conv, FrozenBatchNorm, GroupNorm, max_pool, recompute, relu
from detr_jax.models.padding import valid_cells, zero_padding

BLOCKS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3)}


def norm(config: BackboneConfig, features: int) -> FrozenBatchNorm | GroupNorm:
    """The backbone's normalization layer."""
    return FrozenBatchNorm(features) if config.norm == "frozen_batch" else GroupNorm(features)


class Block(nnx.Module):
    """Residual block: two 3x3 convolutions, or the 1x1, 3x3, 1x1 bottleneck.

    The bottleneck's 3x3 may have groups, as in ResNeXt. It, or the second 3x3, may be deformable.
    """

    def __init__(
        self,
        config: BackboneConfig,
        n_in: int,
        planes: int,
        *,
        stride: int,
        dilation: int,
        deformable: bool,
        dtype,
        rngs: nnx.Rngs,
    ):
        bottleneck = config.depth >= 50
        n_out = planes * (4 if bottleneck else 1)
        width = planes * config.group_width // 64 * config.groups if bottleneck else planes

        def conv(n_in, n_out, size, stride=1, dilation=1):
            return Conv(n_in, n_out, size, stride=stride, dilation=dilation, dtype=dtype, rngs=rngs)

        def middle(stride):
            place = {"stride": stride, "dilation": dilation, "groups": config.groups, "dtype": dtype, "rngs": rngs}
            if not deformable:
                return Conv(width, width, 3, **place)
            return DeformConv(width, width, version=config.deform_version, offset_groups=config.deform_groups, **place)

        if bottleneck:
            convs = [conv(n_in, width, 1), middle(stride), conv(width, n_out, 1)]
        else:
            convs = [conv(n_in, width, 3, stride, dilation), middle(1)]
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
        for i, (conv, normalize) in enumerate(zip(self.convs, self.norms, strict=True)):
            valid = valid_in if i < self.stride_at else valid_out
            x = normalize(conv(x), valid)
            if i < last:
                x = zero_padding(relu(x), valid)
        return zero_padding(relu(x + shortcut), valid_out)


class ResNet(nnx.Module):
    """Stem and four stages; returns the maps of the stages (strides 4, 8, 16, 32; the last 16 with DC5).

    With `remat`, the inside of each block is computed again in the backward pass.
    """

    def __init__(self, config: BackboneConfig, *, remat: bool = False, dtype=None, rngs: nnx.Rngs):
        self.config, self.remat = config, remat
        self.stem_conv = Conv(3, 64, 7, stride=2, dtype=dtype, rngs=rngs)
        self.stem_norm = norm(config, 64)
        stages, channels, n_in = [], [], 64
        for i, blocks in enumerate(BLOCKS[config.depth]):
            planes = 64 * 2**i
            deformable = config.deform_version > 0 and i > 0
            dilate = config.dilation and i == 3
            stage = []
            for j in range(blocks):
                stride = 2 if i > 0 and j == 0 and not dilate else 1
                # torchvision dilates from the second block on: the first keeps the dilation of the stage before.
                dilation = 2 if dilate and j > 0 else 1
                place = {"stride": stride, "dilation": dilation, "deformable": deformable}
                stage.append(Block(config, n_in, planes, **place, dtype=dtype, rngs=rngs))
                n_in = planes * (4 if config.depth >= 50 else 1)
            stages.append(nnx.List(stage))
            channels.append(n_in)
        self.stages = nnx.List(stages)
        self.channels = tuple(channels)

    @jax.named_scope("backbone")
    def __call__(self, images: jax.Array, sizes: jax.Array) -> list[jax.Array]:
        """Feature maps of the four stages.

        Args:
            images: `[b, H, W, 3]`, normalized with the ImageNet mean and standard deviation, zero in the padding.
            sizes: int `[b, 2]`, valid (height, width) of each image.
        """

        stride = 1

        def valid_at(x):
            return valid_cells(sizes, x.shape[1:3], stride) if self.config.mask_padding else None

        with jax.named_scope("stem"):
            x = self.stem_conv(zero_padding(images, valid_at(images)))
            stride = 2
            x = relu(self.stem_norm(x, valid_at(x)))
            x = zero_padding(x, valid_at(x))
            x = max_pool(x)
            stride = 4
            x = zero_padding(x, valid_at(x))
        maps = []
        for i, stage in enumerate(self.stages):
            with jax.named_scope(f"stage_{i + 1}"):
                for block in stage:
                    valid_in = valid_at(x)
                    stride *= block.stride
                    valid_out = valid_at(x[:, :: block.stride, :: block.stride])
                    x = recompute(self.remat, block, x, valid_in, valid_out)
            maps.append(x)
        return maps
