"""Everything that draws, in one place: functions that return figures (matplotlib) or pictures (Pillow)."""

from detr_jax.attention_figures import attention_figure, encoder_figure, saliency_figure, sampling_figure
from detr_jax.curves import plot_curves
from detr_jax.error_figures import confusion_figure, errors_figure
from detr_jax.errors import confusion, detect_all, find_errors
from detr_jax.inspection import Inspection, Inspector, Saliency
from detr_jax.pictures import class_color, compare, contact_sheet, draw_detections
from detr_jax.prediction_figures import matching_figure, proposals_figure, refinement_figure

__all__ = [
    "Inspection",
    "Inspector",
    "Saliency",
    "attention_figure",
    "class_color",
    "compare",
    "confusion",
    "confusion_figure",
    "contact_sheet",
    "detect_all",
    "draw_detections",
    "encoder_figure",
    "errors_figure",
    "find_errors",
    "matching_figure",
    "plot_curves",
    "proposals_figure",
    "refinement_figure",
    "saliency_figure",
    "sampling_figure",
]
