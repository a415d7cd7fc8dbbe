"""Multi-scale deformable attention (Zhu et al., ICLR 2021, equation 3)."""

from pallas_kernels.ms_deform_attn.api import IMPLEMENTATIONS, best_implementation, ms_deform_attn
from pallas_kernels.ms_deform_attn.order import BlockOrder, block_order

__all__ = ["IMPLEMENTATIONS", "BlockOrder", "best_implementation", "block_order", "ms_deform_attn"]
