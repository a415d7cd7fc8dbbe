"""Writes the stored outputs and gradients of torchvision's `deform_conv2d` that `test_deform_conv.py` compares with.

Run `python tests/data/deform_conv/make.py` in an environment with torchvision (these: 0.29.1, torch 2.14.1).
"""

import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2] / "pallas_kernels" / "deform_conv"))

from deform_conv_cases import CASES, run_torchvision

for name, case in CASES.items():
    inputs, cotangent = case.inputs(), case.cotangent()
    arrays = {k: z for k, z in zip(("x", "offsets", "modulation", "kernel"), inputs, strict=True) if z is not None}
    outputs = run_torchvision(case, inputs, cotangent)
    np.savez_compressed(Path(__file__).parent / f"{name}.npz", cotangent=cotangent, **arrays, **outputs)
    print(name, {key: value.shape for key, value in outputs.items()})
