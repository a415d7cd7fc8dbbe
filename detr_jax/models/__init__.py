"""The detectors, as Flax NNX modules."""

from flax import nnx

from detr_jax.config import DeformableDETRConfig, DETRConfig
from detr_jax.models.deformable_detr import DeformableDETR
from detr_jax.models.detr import DETR
from detr_jax.models.feature_extractor import DeformableEncoder, DETREncoder
from detr_jax.models.layers import Buffer
from detr_jax.models.lora import add_adapters
from detr_jax.models.resnet import ResNet
from detr_jax.models.trainable import split

__all__ = ["DETR", "Buffer", "DETREncoder", "DeformableDETR", "DeformableEncoder", "ResNet", "build", "split"]


def build(config: DETRConfig | DeformableDETRConfig, *, rngs: nnx.Rngs) -> DETR | DeformableDETR:
    """The detector that a model configuration describes, newly initialized."""
    model = DETR(config, rngs=rngs) if isinstance(config, DETRConfig) else DeformableDETR(config, rngs=rngs)
    if config.tune.lora_rank:
        add_adapters(model, config.tune, rngs=rngs)
    return model
