"""The detectors, as Flax NNX modules."""

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

__all__ = ["DETR", "DINO", "Buffer", "DETREncoder", "DeformableDETR", "DeformableEncoder", "ResNet", "build", "split"]


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
