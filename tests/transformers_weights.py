"""Random weights for any model, each drawn by a generator that its path seeds."""

import functools
import re
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from flax import nnx

from detr_jax import models
from detr_jax.config import DeformableDETRConfig, DETRConfig


def random_weights(config: DETRConfig | DeformableDETRConfig) -> dict[str, np.ndarray]:
    """A value for each tensor of our model, drawn by a generator that its path seeds; activations stay of order 1."""
    abstract = nnx.state(models.build_abstract(config))
    shapes = {".".join(map(str, path)): leaf.shape for path, leaf in nnx.to_flat_state(abstract)}
    return {path: _random(path, shape) for path, shape in shapes.items()}


@functools.cache
def _random(path: str, shape: tuple[int, ...]) -> np.ndarray:
    rng = np.random.default_rng(zlib.crc32(path.encode()))
    kind = path.rsplit(".", 1)[-1]
    if kind == "kernel":
        gain = 2 if "backbone" in path or "ffn" in path else 1
        x = rng.standard_normal(shape) * np.sqrt(gain / np.prod(shape[:-1]))
    elif kind in ("scale", "weight", "var"):
        # A residual branch adds little, or the sum over all blocks would grow.
        last = re.search(r"norms\.2\.(scale|weight)", path)
        x = rng.uniform(0.1, 0.3, shape) if last else rng.uniform(0.5, 1.5, shape)
    elif kind == "bias" and "sampling_offsets" in path:
        x = 2 * rng.standard_normal(shape)  # pixels: far enough to leave the map
    elif kind in ("bias", "mean"):
        x = 0.1 * rng.standard_normal(shape)
    else:  # embeddings
        x = rng.standard_normal(shape)
    return x.astype(np.float32)


def load(config: DETRConfig | DeformableDETRConfig, weights: Mapping[str, np.ndarray]) -> Any:
    """Our model with these weights."""
    model = models.build_abstract(config)
    graphdef, state = nnx.split(model)
    flat = [(path, leaf.replace(weights[".".join(map(str, path))])) for path, leaf in nnx.to_flat_state(state)]
    return nnx.merge(graphdef, nnx.from_flat_state(flat))
