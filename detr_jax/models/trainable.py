"""Which parameters are trained: all but those that `backbone.freeze_at` and `tune.freeze` freeze."""

from collections.abc import Sequence
from typing import Any

from flax import nnx

from detr_jax.config import ModelConfig
from detr_jax.errors import UserError

Path = Sequence[Any]
"""Names and numbers from the detector down to a parameter: `("encoder", 0, "norm1", "scale")`."""


def split(config: ModelConfig, model: nnx.Module) -> tuple[nnx.GraphDef, dict, dict]:
    """A detector -> its graph, the parameters that are trained, and all the rest, the latter two as nested dicts.

    `nnx.merge(graphdef, params, buffers)` puts it together again.

    Raises:
        ValueError: `config.tune.freeze` names a part that the model does not have.
    """
    if config.tune.freeze:
        check_names("model.tune.freeze", config.tune.freeze, [path for path, _ in nnx.to_flat_state(nnx.state(model))])

    def trained(path, value):
        return isinstance(value, nnx.Param) and not is_frozen(path, config)

    graphdef, params, buffers = nnx.split(model, trained, ...)
    return graphdef, nnx.to_pure_dict(params), nnx.to_pure_dict(buffers)


def is_frozen(path: Path, config: ModelConfig) -> bool:
    """Whether the parameter at `path` is frozen, by `backbone.freeze_at` or `tune.freeze`. Adapters never are."""
    if "lora" in path:
        return False
    if any(on_path(path, name) for name in config.tune.freeze):
        return True
    names = [str(part) for part in path]
    if "backbone" not in names:
        return False
    inside, freeze_at = names[names.index("backbone") + 1 :], config.backbone.freeze_at
    return (inside[0].startswith("stem") and freeze_at >= 1) or (inside[:2] == ["stages", "0"] and freeze_at >= 2)


def on_path(path: Path, name: str) -> bool:
    """Whether a name, such as `encoder` or `decoder.0.self_attn`, is on a path: whole parts, one after another."""
    parts, names = name.split("."), [str(part) for part in path]
    return any(names[i : i + len(parts)] == parts for i in range(len(names) - len(parts) + 1))


def check_names(field: str, names: Sequence[str], paths: Sequence[Path]) -> None:
    """Raises `ValueError` if one of `names` is on none of the paths."""
    for name in names:
        if not any(on_path(path, name) for path in paths):
            parts = sorted({str(part) for path in paths for part in path if not isinstance(part, int)})
            raise UserError(f"{field}: {name!r} is on no path of this model; the names there are {', '.join(parts)}")
