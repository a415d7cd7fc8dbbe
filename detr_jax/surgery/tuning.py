"""What of a detector is trained: frozen parts and low-rank adapters (LoRA, Hu et al., ICLR 2022)."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from flax import nnx

from detr_jax.checkpoints.load import Loaded
from detr_jax.config import ModelConfig
from detr_jax.errors import UserError
from detr_jax.surgery.transplant import Operated, tensors, trained, transplant, whole


def freeze(loaded: Loaded, *parts: str) -> Operated:
    """Trains all but these parts, by their paths: `freeze(loaded, "backbone", "encoder.0")`; no part: trains all again.

    It is `model.tune.freeze` of the configuration, which training, `--init-from` configs and checkpoints follow.

    Raises:
        ValueError: a part that the model does not have, or nothing would be left to train.
    """
    config = _tuned(loaded.config, freeze=tuple(parts))
    if not trained(config, loaded.model):
        raise UserError(f"freeze: nothing is left to train without {', '.join(parts)}")
    return transplant(loaded, config, whole, f"freeze: {', '.join(parts) or 'nothing'}")


def add_lora(
    loaded: Loaded,
    rank: int = 8,
    *,
    on: Sequence[str] = ("value_proj", "output_proj", "query", "value"),
    train: Sequence[str] = ("class_embed", "bbox_embed"),
    seed: int = 0,
) -> Operated:
    """Low-rank adapters on linear layers, all the rest frozen but `train`: `add_lora(loaded, rank=8)`.

    Outputs are exactly the same until the adapters are trained. It is `model.tune` of the configuration.

    Args:
        loaded: the detector.
        rank: of the adapters.
        on: linear layers, by their paths.
        train: top-level modules that are trained as a whole.
        seed: of the adapters.

    Raises:
        ValueError: names that the model does not have, a rank below 1, or adapters that are there already.
    """
    if rank < 1 or loaded.config.tune.lora_rank:
        there = loaded.config.tune.lora_rank
        raise UserError(
            f"add_lora: rank={rank}, and the model has adapters of rank {there}; expected rank >= 1, and none"
        )
    tops = list(dict.fromkeys(str(path[0]) for path, _ in nnx.to_flat_state(nnx.state(loaded.model))))
    unknown = [name for name in train if name not in tops]
    if unknown:
        raise UserError(f"add_lora: train={unknown} is not there; expected some of {', '.join(tops)}")
    frozen = tuple(name for name in tops if name not in train)
    config = _tuned(loaded.config, freeze=frozen, lora_rank=rank, lora_on=tuple(on))
    return transplant(loaded, config, whole, f"add_lora: rank {rank} on {', '.join(on)}", seed=seed)


def merge_lora(loaded: Loaded) -> Operated:
    """Adapters added to the kernels, `kernel + lora_a @ lora_b`, and everything trained again: `merge_lora(tuned)`.

    Outputs stay but for rounding.

    Raises:
        ValueError: there are no adapters.
    """
    if not loaded.config.tune.lora_rank:
        raise UserError("merge_lora: the model has no adapters; expected one of add_lora, or model.tune.lora_rank > 0")
    default = type(loaded.config.tune)()
    config = _tuned(loaded.config, **dataclasses.asdict(default))
    values = tensors(loaded.model)
    for path in [path for path in values if path[-1] == "lora_a"]:
        kernel = (*path[:-2], "kernel")
        values[kernel] = values[kernel] + values[path] @ values[*path[:-1], "lora_b"]
    return transplant(loaded, config, whole, "merge_lora: kernel + lora_a @ lora_b", values=values)


def _tuned(config: ModelConfig, **fields: Any) -> ModelConfig:
    """The configuration with these fields of `tune`."""
    return dataclasses.replace(config, tune=dataclasses.replace(config.tune, **fields))
