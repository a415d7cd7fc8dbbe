"""What of a model is trained: frozen parts, and low-rank adapters (LoRA, Hu et al., ICLR 2022) on linear layers."""

from collections.abc import Sequence
from typing import Any

import jax
from flax import nnx

from detr_jax.config import TuneConfig
from detr_jax.models.layers import Linear

Path = Sequence[Any]


class LoRALinear(Linear):
    """A linear layer plus `(x @ lora_a) @ lora_b`; kernel and bias keep their paths, the adapter is below `lora`."""

    def __init__(self, base: nnx.Linear, rank: int, *, rngs: nnx.Rngs):
        n_in, n_out, zeros = base.in_features, base.out_features, nnx.initializers.zeros
        super().__init__(n_in, n_out, kernel_init=zeros, dtype=base.dtype, precision=base.precision, rngs=rngs)
        self.kernel, self.bias = base.kernel, base.bias
        self.lora = nnx.LoRA(n_in, rank, n_out, dtype=base.dtype, rngs=rngs)

    def __call__(self, inputs: jax.Array, out_sharding=None) -> jax.Array:
        return super().__call__(inputs, out_sharding) + self.lora(inputs)

    def interleaved(self, inputs: jax.Array, n: int) -> list[jax.Array]:
        adapted = self.lora(inputs)
        return [x + adapted[..., i::n] for i, x in enumerate(super().interleaved(inputs, n))]


def on_path(path: Path, name: str) -> bool:
    """Whether a name, such as `encoder` or `decoder.0.self_attn`, is on a path: whole parts, one after another."""
    parts, names = name.split("."), [str(part) for part in path]
    return any(names[i : i + len(parts)] == parts for i in range(len(names) - len(parts) + 1))


def held(path: Path, tune: TuneConfig) -> bool:
    """Whether `tune.freeze` keeps the parameter at `path` from being trained; adapters are always trained."""
    return "lora" not in path and any(on_path(path, name) for name in tune.freeze)


def check_names(field: str, names: Sequence[str], paths: Sequence[Path]) -> None:
    """Raises `ValueError` if one of `names` is on none of the paths."""
    for name in names:
        if not any(on_path(path, name) for path in paths):
            parts = sorted({str(part) for path in paths for part in path if not isinstance(part, int)})
            raise ValueError(f"{field}: {name!r} is on no path of this model; the names there are {', '.join(parts)}")


def add_adapters(model: nnx.Module, tune: TuneConfig, *, rngs: nnx.Rngs) -> None:
    """Puts adapters on the linear layers that `tune.lora_on` names, in place; the outputs stay, since `lora_b` is zero.

    Raises:
        ValueError: a name is on no linear layer's path.
    """
    layers = {path: module for path, module in nnx.iter_modules(model) if isinstance(module, Linear)}
    # Of the default names a model has some: DETR has no `value_proj`.
    chosen = [name for name in tune.lora_on if name not in TuneConfig().lora_on]
    check_names("model.tune.lora_on", chosen, list(layers))
    for path, layer in layers.items():
        if any(on_path(path, name) for name in tune.lora_on):
            parent: Any = model
            for part in path[:-1]:
                parent = parent[part] if isinstance(part, int) else getattr(parent, str(part))
            adapted = LoRALinear(layer, tune.lora_rank, rngs=rngs)
            if isinstance(path[-1], int):
                parent[path[-1]] = adapted
            else:
                setattr(parent, str(path[-1]), adapted)
