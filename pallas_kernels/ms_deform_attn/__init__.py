"""Multi-scale deformable attention (Zhu et al., ICLR 2021, equation 3)."""

from pallas_kernels.ms_deform_attn.api import IMPLEMENTATIONS, best_implementation, ms_deform_attn
from pallas_kernels.ms_deform_attn.order import BlockOrder, block_order
from pallas_kernels.ms_deform_attn.projections import Projections, ms_deform_cross_attn, ms_deform_self_attn

__all__ = [
    "IMPLEMENTATIONS",
    "BlockOrder",
    "Projections",
    "best_implementation",
    "block_order",
    "ms_deform_attn",
    "ms_deform_cross_attn",
    "ms_deform_self_attn",
]
