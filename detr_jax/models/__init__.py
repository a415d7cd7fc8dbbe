"""The detectors, as Flax NNX modules."""

import functools

import jax
from flax import nnx

from detr_jax.config import DETRConfig, DINOConfig, ModelConfig
from detr_jax.models.deformable_detr import DeformableDETR
from detr_jax.models.detr import DETR
from detr_jax.models.dino import DINO
from detr_jax.models.feature_extractor import DeformableEncoder, DETREncoder
from detr_jax.models.layers import Buffer
from detr_jax.models.lora import add_adapters
from detr_jax.models.resnet import ResNet
from detr_jax.models.trainable import split

__all__ = [
    "DETR",
    "DINO",
    "Buffer",
    "DETREncoder",
    "DeformableDETR",
    "DeformableEncoder",
    "ResNet",
    "build",
    "build_abstract",
    "split",
]


def build(config: ModelConfig, *, rngs: nnx.Rngs) -> DETR | DeformableDETR | DINO:
    """The detector that a model configuration describes, newly initialized."""
    if isinstance(config, DETRConfig):
        model = DETR(config, rngs=rngs)
    elif isinstance(config, DINOConfig):
        model = DINO(config, rngs=rngs)
    else:
        model = DeformableDETR(config, rngs=rngs)
    if config.tune.lora_rank:
        add_adapters(model, config.tune, rngs=rngs)
    return model


def build_abstract(config: ModelConfig) -> DETR | DeformableDETR | DINO:
    """`build`, with shapes and types in place of values.

    That takes seconds of tracing, so it is done once per configuration.
    """
    graphdef, state = _abstract(config)
    return nnx.merge(graphdef, jax.tree.map(lambda leaf: leaf, state))


@functools.lru_cache(maxsize=16)
def _abstract(config: ModelConfig) -> tuple[nnx.GraphDef, nnx.State]:
    return nnx.split(nnx.eval_shape(lambda: build(config, rngs=nnx.Rngs(0))))
