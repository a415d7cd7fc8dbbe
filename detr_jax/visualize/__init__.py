"""Everything that draws, in one place: functions that return figures (matplotlib) or pictures (Pillow).

`command` is the command line's choice of them: `detr-jax visualize sampling IMAGE --checkpoint X`.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from detr_jax.curves import plot_curves
    from detr_jax.drawing import class_color, compare, contact_sheet, draw_detections
    from detr_jax.visualize.attention_figures import attention_figure, encoder_figure, saliency_figure, sampling_figure
    from detr_jax.visualize.convolution_figures import convolution_figure
    from detr_jax.visualize.denoising_figures import (
        denoising_figure,
        instability,
        match_objects,
        reconstruct,
        stability_figure,
    )
    from detr_jax.visualize.inspection import Inspection, Inspector, Saliency
    from detr_jax.visualize.mistake_figures import confusion_figure, mistakes_figure
    from detr_jax.visualize.mistakes import confusion, detect_all, find_mistakes
    from detr_jax.visualize.prediction_figures import matching_figure, proposals_figure, refinement_figure

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
    "convolution_figure",
    "denoising_figure",
    "detect_all",
    "draw_detections",
    "encoder_figure",
    "find_mistakes",
    "instability",
    "match_objects",
    "matching_figure",
    "mistakes_figure",
    "plot_curves",
    "proposals_figure",
    "reconstruct",
    "refinement_figure",
    "saliency_figure",
    "sampling_figure",
    "stability_figure",
]

_MODULES = (
    "drawing",
    "curves",
    "visualize.inspection",
    "visualize.attention_figures",
    "visualize.convolution_figures",
    "visualize.prediction_figures",
    "visualize.denoising_figures",
    "visualize.mistakes",
    "visualize.mistake_figures",
)


def __getattr__(name: str) -> Any:
    """Imports a figure when it is asked for, so that the command line's `--help` needs neither jax nor matplotlib."""
    if name in __all__:
        for module in _MODULES:
            found = getattr(importlib.import_module(f"detr_jax.{module}"), name, None)
            if found is not None:
                return found
    raise AttributeError(f"module 'detr_jax.visualize' has no attribute {name!r}")
