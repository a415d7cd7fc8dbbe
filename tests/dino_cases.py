"""Small DINO models, weights and batches that its tests share."""

import numpy as np
import transformers_weights

from detr_jax import dialects, pretrained
from detr_jax.config import BackboneConfig, DINOConfig

SMALL = DINOConfig(
    backbone=BackboneConfig(depth=18),
    num_classes=5,
    hidden_dim=64,
    num_heads=4,
    encoder_layers=1,
    decoder_layers=3,
    ffn_dim=96,
    num_queries=12,
    denoising_queries=7,
)
SMALL_5SCALE = DINOConfig(**{**vars(SMALL), "num_levels": 5, "backbone_maps": 4})


def targets(num_boxes=(3, 2), t: int = 4, seed: int = 0) -> dict[str, np.ndarray]:
    """A batch's targets, as the model takes them."""
    rng = np.random.default_rng(seed)
    b = len(num_boxes)
    boxes = np.concatenate([rng.uniform(0.3, 0.7, (b, t, 2)), rng.uniform(0.1, 0.5, (b, t, 2))], -1)
    return {
        "boxes_cxcywh": boxes.astype(np.float32),
        "labels": rng.integers(0, 5, (b, t)).astype(np.int32),
        "num_boxes": np.array(num_boxes, np.int32),
    }


def noise(slots: int, b: int = 2, seed: int = 1) -> dict[str, np.ndarray]:
    """Random numbers of the denoising slots."""
    rng = np.random.default_rng(seed)
    return {
        "relabel": rng.uniform(size=(b, slots)).astype(np.float32),
        "labels": rng.integers(0, 5, (b, slots)).astype(np.int32),
        "signs": rng.choice([-1, 1], (b, slots, 4)).astype(np.float32),
        "amounts": rng.uniform(size=(b, slots, 4)).astype(np.float32),
    }


def official(config: DINOConfig, weights: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Our tensors under the official names that are not aliases, in PyTorch's layout."""
    rows = dialects.compiled(tuple((ours, theirs) for theirs, ours in dialects.OFFICIAL_DINO.rows))
    result = {}
    for path, tensor in weights.items():
        name = pretrained.canonical(path.split("."))
        theirs = dialects.renamed(name.replace("_embed.1.", "_embed.proposals."), rows)[0]
        result[theirs] = pretrained.to_theirs(tensor, name, path.endswith(".kernel"))
    return pretrained.fused(result)


def small_weights(config: DINOConfig) -> dict[str, np.ndarray]:
    """Random ones; the heads' like any other, so that boxes move."""
    return transformers_weights.random_weights(config)
