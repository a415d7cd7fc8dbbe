"""Accelerator kernels, usable without detr_jax: `pallas_kernels.ms_deform_attn`."""

from pallas_kernels.ms_deform_attn.api import ms_deform_attn
from pallas_kernels.ms_deform_attn.order import BlockOrder, block_order

__all__ = ["BlockOrder", "block_order", "ms_deform_attn"]
