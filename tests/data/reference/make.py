"""Writes the stored outputs of HF `transformers`, for `tests/detr_jax/models/test_parity.py`.

Run in an environment with PyTorch and transformers: `python tests/data/reference/make.py`.
"""

import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2]))

import small_models
import transformers_oracle
import transformers_weights

for name, config in small_models.SMALL_MODELS.items():
    model = transformers_oracle.build(config)
    transformers_oracle.load(model, config, transformers_weights.random_weights(config))
    outputs = transformers_oracle.run(model, *small_models.padded_batch(100, 135))
    np.savez_compressed(Path(__file__).parent / f"{name}.npz", **outputs)
    print(name, {key: value.shape for key, value in outputs.items()})
