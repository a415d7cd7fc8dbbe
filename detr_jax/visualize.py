"""Everything that draws, in one place: functions that return figures (matplotlib) or pictures (Pillow)."""

from detr_jax.attention_figures import attention_figure, encoder_figure, saliency_figure, sampling_figure
from detr_jax.curves import plot_curves
from detr_jax.inspection import Inspection, Inspector, Saliency
from detr_jax.pictures import class_color, compare, contact_sheet, draw_detections

__all__ = [
    "Inspection",
    "Inspector",
    "Saliency",
    "attention_figure",
    "class_color",
    "compare",
    "contact_sheet",
    "draw_detections",
    "encoder_figure",
    "plot_curves",
    "saliency_figure",
    "sampling_figure",
]
