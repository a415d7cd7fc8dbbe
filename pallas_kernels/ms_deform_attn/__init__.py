"""Multi-scale deformable attention (Zhu et al., ICLR 2021, equation 3)."""

from pallas_kernels.ms_deform_attn.api import IMPLEMENTATIONS, ms_deform_attn

__all__ = ["IMPLEMENTATIONS", "ms_deform_attn"]
