"""Low-rank adapters (LoRA, Hu et al., ICLR 2022) on linear layers."""

from typing import Any

import jax
from flax import nnx

from detr_jax.config import TuneConfig
from detr_jax.models.layers import Linear
from detr_jax.models.trainable import check_names, on_path


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
