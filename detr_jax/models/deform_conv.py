"""Deformable convolution as a layer: a plain convolution predicts where the taps sample."""

import jax
import jax.numpy as jnp
from flax import nnx

from detr_jax.models.layers import KAIMING, Conv, capture
from detr_jax.sharding import BATCH_AXES
from pallas_kernels.deform_conv import deform_conv, offsets_from_channels, sampling_positions

SIZE = 3
"""Of the kernel."""


class DeformConv(nnx.Module):
    """3x3 deformable convolution, NHWC, padded as `Conv`; version 1 (Dai et al., 2017) or 2 (Zhu et al., 2019).

    The predicted offsets start at zero. In version 2 the samples' factors are sigmoids, which start at 1/2: the kernel
    starts at twice a convolution's. So a new layer of either version computes exactly a convolution.
    """

    def __init__(
        self,
        n_in: int,
        n_out: int,
        *,
        version: int,
        offset_groups: int = 1,
        stride: int = 1,
        dilation: int = 1,
        groups: int = 1,
        dtype=None,
        rngs: nnx.Rngs,
    ):
        kernel = KAIMING(rngs.params(), (SIZE, SIZE, n_in // groups, n_out), jnp.float32)
        self.kernel = nnx.Param(kernel * plain_kernel_factor(version))
        self.offset = Conv(
            n_in,
            offset_groups * SIZE**2 * (3 if version == 2 else 2),
            SIZE,
            stride=stride,
            dilation=dilation,
            bias=True,
            kernel_init=nnx.initializers.zeros,
            dtype=dtype,
            rngs=rngs,
        )
        self.version, self.offset_groups, self.stride, self.dilation = version, offset_groups, stride, dilation
        self.groups, self.dtype = groups, dtype

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x.astype(self.dtype)
        # The order of torchvision's and mmdetection's channels: all offsets, then all factors.
        channels = self.offset(x).astype(jnp.float32)
        count = self.offset_groups * SIZE**2
        offsets = offsets_from_channels(channels[..., : 2 * count], self.offset_groups)
        modulation = None
        if self.version == 2:
            modulation = nnx.sigmoid(channels[..., 2 * count :]).reshape(offsets.shape[:-1])
        stride, padding, dilation = self.stride, self.dilation, self.dilation
        capture(self, "sampling_positions", sampling_positions(offsets, stride, padding, dilation))
        capture(self, "modulation", modulation)
        return deform_conv(
            x,
            offsets,
            modulation,
            self.kernel[...],
            stride=stride,
            padding=padding,
            dilation=dilation,
            groups=self.groups,
            batch_axis=BATCH_AXES,
        )


def plain_kernel_factor(version: int) -> int:
    """By what to multiply a convolution's kernel, so that a new deformable one with it computes the same."""
    return 2 if version == 2 else 1
