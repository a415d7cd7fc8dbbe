"""What all surgery comes down to: the model of a changed configuration, with every tensor that fits moved over."""

import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from detr_jax.categories import Categories
from detr_jax.checkpoints.load import Loaded
from detr_jax.config import DeformableDETRConfig, ModelConfig
from detr_jax.errors import UserError
from detr_jax.models import build, build_abstract, split

Path = tuple[Any, ...]


@dataclasses.dataclass(frozen=True)
class Origin:
    """Where a tensor of the new model comes from."""

    path: Path | None
    """Path of the old model's tensor; `None` for a constant, `fill`."""
    index: np.ndarray | None = None
    """Int `[n]`, for each slice of the new tensor along `axis` the old one's; -1 is a new slice. `None`: as a whole."""
    axis: int = -1
    """Axis of the slices."""
    scale: float = 1.0
    """Old values are multiplied by this."""
    fill: float | None = None
    """Value of new slices; `None` leaves them as initialized."""


Rule = Callable[[Path], Origin | None]
"""`rule(path)` of a tensor of the new model; `None` leaves it as initialized."""


@dataclasses.dataclass(frozen=True)
class Changes:
    """What an operation did to a model; `print` it."""

    operation: str
    """What was done, in a line."""
    kept: tuple[str, ...]
    """Tensors that are the old ones, value for value, whatever their place."""
    changed: tuple[str, ...]
    """Tensors that are the old ones in part."""
    new: tuple[str, ...]
    """Tensors that are initialized anew."""
    dropped: tuple[str, ...]
    """Tensors of the old model that have no place in the new one."""
    parameters: tuple[int, int]
    """Numbers in all tensors, before and after."""
    trained: tuple[int, int]
    """... that are trained."""
    notes: tuple[str, ...] = ()
    """What else there is to know."""

    def __str__(self) -> str:
        lines = [self.operation, *(f"  {note}" for note in self.notes), f"  kept      {len(self.kept)} tensors"]
        for title in ("changed", "new", "dropped"):
            names: Sequence[str] = getattr(self, title)
            if names:
                lines.append(f"  {title:<9} {len(names)} tensors: {', '.join(_grouped(names))}")
        for title, (before, after) in (("numbers", self.parameters), ("trained", self.trained)):
            lines.append(f"  {title:<9} {before:,} -> {after:,}")
        return "\n".join(lines)


@dataclasses.dataclass
class Operated(Loaded):
    """A detector after an operation: detect with it, save it, operate on it again, and see its changes."""

    changes: Changes
    """What the last operation did."""


def whole(path: Path) -> Origin:
    """The rule that moves every tensor to its own place."""
    return Origin(path)


def transplant(
    loaded: Loaded,
    config: ModelConfig,
    rule: Rule,
    operation: str,
    *,
    categories: Categories | None = None,
    values: Mapping[Path, np.ndarray] | None = None,
    notes: Iterable[str] = (),
    seed: int = 0,
) -> Operated:
    """The model of `config` with the tensors of `loaded` that `rule` gives it; `loaded` stays as it is.

    A tensor whose origin is missing, or does not fit and has no `index`, is initialized anew.

    Args:
        loaded: the old detector.
        config: of the new one.
        rule: where each tensor comes from.
        operation: what is done, in a line.
        categories: of the new detector; `None` keeps the old ones.
        values: tensors instead of, or besides, those of the old detector.
        notes: for the report.
        seed: of what is initialized.
    """
    old = tensors(loaded.model)
    donors = {**old, **(values or {})}
    graphdef, abstract = nnx.split(build_abstract(config))

    origins = {tuple(path): rule(tuple(path)) or Origin(None) for path, _ in nnx.to_flat_state(abstract)}
    places = {
        path: origin.path if origin.path is not None and _fits(donors.get(origin.path), leaf.shape, origin) else None
        for (path, leaf), origin in zip(nnx.to_flat_state(abstract), origins.values(), strict=True)
    }
    fresh = _initialized(config, seed, [path for path in origins if _needs(origins[path], places[path])])
    leaves, kept, changed, new, used = [], [], [], [], set()
    for path, leaf in nnx.to_flat_state(abstract):
        origin, place = origins[path], places[path]
        filling: Any = fresh.get(path) if origin.fill is None else np.full(leaf.shape, origin.fill, leaf.dtype)
        if place is None:
            value, names = filling, new
        else:
            donor, source = donors[place], old.get(place)
            value = donor if origin.index is None else np.take(donor, np.maximum(origin.index, 0), origin.axis)
            value = value * np.asarray(origin.scale, donor.dtype)
            if origin.index is not None and (origin.index < 0).any():
                missing = np.expand_dims(
                    origin.index < 0, [i for i in range(donor.ndim) if i != origin.axis % donor.ndim]
                )
                value = np.where(missing, filling, value)
            names = kept if source is not None and np.array_equal(value, source) else changed
            used.add(place)
        names.append(".".join(map(str, path)))
        leaves.append((path, leaf.replace(jnp.asarray(value, leaf.dtype))))
    model = nnx.merge(graphdef, nnx.from_flat_state(leaves))
    changes = Changes(
        operation,
        tuple(kept),
        tuple(changed),
        tuple(new),
        tuple(".".join(map(str, path)) for path in old if path not in used),
        (count(loaded.model), count(model)),
        (trained(loaded.config, loaded.model), trained(config, model)),
        tuple(notes),
    )
    fields: dict[str, Any] = {field.name: getattr(loaded, field.name) for field in dataclasses.fields(Loaded)}
    fields |= {"config": config, "model": model, "categories": categories or loaded.categories}
    fields |= {"report": f"{loaded.report}\n{operation}", "changes": changes}
    return Operated(**fields)


def by_level(old: DeformableDETRConfig, places: Sequence[int], new_logit: float = 0.0) -> Rule:
    """The rule for a model whose level `i` is the old one's level `places[i]`; -1 is a new one."""

    def rule(path: Path) -> Origin | None:
        if path == ("level_embed",):
            return Origin(path, np.array(places), axis=0)
        if path[0] == "input_proj":
            return None if places[path[1]] < 0 else Origin((path[0], places[path[1]], *path[2:]))
        if {"sampling_offsets", "attention_weights"} & set(path):
            points = old.encoder_points if path[0] == "encoder" else old.decoder_points
            grid = np.arange(old.num_heads * old.num_levels * points).reshape(old.num_heads, old.num_levels, points)
            kept = np.where(np.array(places)[:, None] < 0, -1, grid[:, np.maximum(places, 0)])
            fill = new_logit if path[-2:] == ("attention_weights", "bias") else None
            return by_sample(path, kept, fill=fill)
        return Origin(path)

    return rule


def by_sample(path: Path, kept: np.ndarray, *, scale: float = 1.0, fill: float | None = None) -> Origin:
    """Origin of `sampling_offsets` or `attention_weights`: `kept [h, l, p]` are the old ones' numbers, -1 for new."""
    index = kept.reshape(-1)
    if path[-2] == "sampling_offsets":
        index = np.where(index[:, None] < 0, -1, index[:, None] * 2 + np.arange(2)).reshape(-1)
    return Origin(path, index, scale=scale, fill=fill)


def deformable(loaded: Loaded, operation: str) -> DeformableDETRConfig:
    """The configuration of a Deformable DETR without adapters; a `ValueError` for others."""
    if not isinstance(loaded.config, DeformableDETRConfig):
        raise UserError(f"{operation} is for Deformable DETR: DETR has no levels, sampling points or refinement")
    if loaded.config.tune.lora_rank:
        raise UserError(f"{operation}: the model has adapters; expected none, so merge_lora first")
    return loaded.config


def tensors(model: nnx.Module) -> dict[Path, np.ndarray]:
    """A model's tensors by path, on the host."""
    flat = nnx.to_flat_state(nnx.state(model))
    return {
        tuple(path): value for (path, _), value in zip(flat, jax.device_get([x[...] for _, x in flat]), strict=True)
    }


def count(model: nnx.Module) -> int:
    """Numbers in all tensors of a model."""
    return sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model)))


def trained(config: ModelConfig, model: nnx.Module) -> int:
    """Numbers in those that are trained."""
    return sum(leaf.size for leaf in jax.tree.leaves(split(config, model)[1]))


def _needs(origin: Origin, place: Path | None) -> bool:
    """Whether something of a tensor is as initialized."""
    return origin.fill is None and (place is None or (origin.index is not None and bool((origin.index < 0).any())))


def _initialized(config: ModelConfig, seed: int, paths: Sequence[Path]) -> dict[Path, np.ndarray]:
    """These tensors of a new model; the others are not computed."""
    if not paths:
        return {}

    def init():
        flat = {
            tuple(path): leaf[...] for path, leaf in nnx.to_flat_state(nnx.state(build(config, rngs=nnx.Rngs(seed))))
        }
        return [flat[path] for path in paths]

    return dict(zip(paths, jax.device_get(jax.jit(init)()), strict=True))


def _fits(donor: np.ndarray | None, shape: tuple[int, ...], origin: Origin) -> bool:
    """Whether a tensor can be moved: equal shapes, but for the axis that is indexed."""
    if donor is None:
        return False
    got, expected = list(donor.shape), list(shape)
    if origin.index is not None and len(got) == len(expected):
        got[origin.axis] = len(origin.index)
    return got == expected


def _grouped(names: Sequence[str]) -> list[str]:
    """Names, for people: from nine on their modules, layers together, at a depth where there are at most eight."""
    groups = list(names)
    for depth in (5, 4, 3, 2, 1):
        if len(groups) <= 8:
            break
        modules = [re.sub(r"\.\d+", "[...]", ".".join(name.split(".")[:-1][:depth])) or name for name in names]
        groups = [f"{module} ({modules.count(module)})" for module in dict.fromkeys(modules)]
    return groups
