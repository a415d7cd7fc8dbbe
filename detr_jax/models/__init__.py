"""The detectors, as Flax NNX modules."""

from flax import nnx

from detr_jax.config import DeformableDETRConfig, DETRConfig
from detr_jax.models.adapters import add_adapters, check_names, held
from detr_jax.models.deformable_detr import DeformableDETR
from detr_jax.models.detr import DETR
from detr_jax.models.encoder import DeformableEncoder, DETREncoder
from detr_jax.models.resnet import Buffer, ResNet, frozen

__all__ = ["DETR", "Buffer", "DETREncoder", "DeformableDETR", "DeformableEncoder", "ResNet", "build", "frozen", "split"]


def build(config: DETRConfig | DeformableDETRConfig, *, rngs: nnx.Rngs) -> DETR | DeformableDETR:
    """The detector that a model configuration describes, newly initialised."""
    model = DETR(config, rngs=rngs) if isinstance(config, DETRConfig) else DeformableDETR(config, rngs=rngs)
    if config.tune.lora_rank:
        add_adapters(model, config.tune, rngs=rngs)
    return model


def split(config: DETRConfig | DeformableDETRConfig, model: nnx.Module) -> tuple[nnx.GraphDef, dict, dict]:
    """A detector -> its graph, the parameters that are trained, and all the rest, the latter two as nested dicts.

    `nnx.merge(graphdef, params, buffers)` puts it together again.

    Raises:
        ValueError: `config.tune.freeze` names a part that the model does not have.
    """
    if config.tune.freeze:
        check_names("model.tune.freeze", config.tune.freeze, [path for path, _ in nnx.to_flat_state(nnx.state(model))])

    def trained(path, value):
        return isinstance(value, nnx.Param) and not frozen(path, config.backbone) and not held(path, config.tune)

    graphdef, params, buffers = nnx.split(model, trained, ...)
    return graphdef, nnx.to_pure_dict(params), nnx.to_pure_dict(buffers)
