"""Deformable convolution (Dai et al., ICCV 2017) and its modulated form (Zhu et al., CVPR 2019)."""

from pallas_kernels.deform_conv.api import IMPLEMENTATIONS, best_implementation, deform_conv, offsets_from_channels
from pallas_kernels.deform_conv.reference import sampling_positions

__all__ = ["IMPLEMENTATIONS", "best_implementation", "deform_conv", "offsets_from_channels", "sampling_positions"]
