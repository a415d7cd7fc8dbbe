"""Accelerator kernels, usable without detr_jax: `pallas_kernels.ms_deform_attn`."""

from pallas_kernels.ms_deform_attn.api import ms_deform_attn

__all__ = ["ms_deform_attn"]
