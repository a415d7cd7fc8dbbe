"""Surgery on detectors: other classes, queries, layers, backbones; upgrades; frozen parts; pruning.

Each function takes a detector, as `detr_jax.load` gives it, and returns a new one with a report of what changed:

    loaded = detr_jax.load("runs/bccd")
    smaller = surgery.change_queries(surgery.change_layers(loaded, decoder=[0, 1]), 20)
    print(smaller.changes)
    smaller.save("runs/smaller")  # python train.py --config CONFIG --init-from runs/smaller

Nothing is changed in place. What can be proven of the outputs is in each docstring, and tested in
`tests/detr_jax/surgery/test_surgery.py`.
"""

from detr_jax.surgery.architecture import (
    add_deform_conv,
    change_classes,
    change_layers,
    change_queries,
    extract_encoder,
    swap_backbone,
    upgrade,
)
from detr_jax.surgery.averaging import moving_average, soup
from detr_jax.surgery.pruning import Difference, attention, difference, prune_levels, prune_points
from detr_jax.surgery.transplant import Changes, Operated
from detr_jax.surgery.tuning import add_lora, freeze, merge_lora

__all__ = [
    "Changes",
    "Difference",
    "Operated",
    "add_deform_conv",
    "add_lora",
    "attention",
    "change_classes",
    "change_layers",
    "change_queries",
    "difference",
    "extract_encoder",
    "freeze",
    "merge_lora",
    "moving_average",
    "prune_levels",
    "prune_points",
    "soup",
    "swap_backbone",
    "upgrade",
]
