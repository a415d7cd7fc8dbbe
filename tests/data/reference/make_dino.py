"""Writes the numbers of the PyTorch DINO that `tests/detr_jax/models/test_dino.py` compares a small model with.

Run in an environment with PyTorch: `python tests/data/reference/make_dino.py`.
"""

import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2]))

import dino_cases

from detr_jax.denoising import num_slots

stored = {}
for name, num_boxes in dino_cases.BATCHES.items():
    noise = dino_cases.noise(num_slots(dino_cases.SMALL, 4))
    step = dino_cases.torch_step(dino_cases.SMALL, (100, 135), dino_cases.targets(num_boxes), noise)
    for kind, values in zip(("outputs", "terms", "norms"), step, strict=True):
        stored |= {f"{name}/{kind}/{key}": np.float32(value) for key, value in values.items() if key != "scores"}
np.savez_compressed(Path(__file__).parent / "dino.npz", **stored)
print(len(stored), "arrays")
