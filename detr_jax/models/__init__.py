"""The detectors, as Flax NNX modules."""

from flax import nnx

from detr_jax.config import DeformableDETRConfig, DETRConfig
from detr_jax.models.deformable_detr import DeformableDETR
from detr_jax.models.detr import DETR
from detr_jax.models.resnet import Buffer, ResNet, frozen

__all__ = ["DETR", "Buffer", "DeformableDETR", "ResNet", "build", "frozen", "split"]


def build(config: DETRConfig | DeformableDETRConfig, *, rngs: nnx.Rngs) -> DETR | DeformableDETR:
    """The detector that a model configuration describes, newly initialised."""
    return DETR(config, rngs=rngs) if isinstance(config, DETRConfig) else DeformableDETR(config, rngs=rngs)


def split(config: DETRConfig | DeformableDETRConfig, model: nnx.Module) -> tuple[nnx.GraphDef, dict, dict]:
    """A detector -> its graph, the parameters that are trained, and all the rest, the latter two as nested dicts.

    `nnx.merge(graphdef, params, buffers)` puts it together again.
    """

    def trained(path, value):
        return isinstance(value, nnx.Param) and not frozen(path, config.backbone)

    graphdef, params, buffers = nnx.split(model, trained, ...)
    return graphdef, nnx.to_pure_dict(params), nnx.to_pure_dict(buffers)
