"""Which checkpoint a run goes on from, and whether it may."""

from collections.abc import Mapping
from typing import Any

from etils import epath

from detr_jax.checkpoints import store
from detr_jax.errors import UserError


def choose_checkpoint(output_dir: epath.Path, resume_from: int | None) -> int:
    """The step to go on from, 0 for a new run. Damaged checkpoints, and those after `resume_from`, are renamed.

    Raises:
        UserError: no checkpoint of step `resume_from`, or none that is intact.
    """
    folder = str(output_dir)
    newest, damaged = store.newest_intact(folder)
    lost = [step for step, problem in damaged.items() if not problem.startswith(store.NOT_FINISHED)]
    if newest is None and lost:
        raise UserError(
            f"{output_dir}: no checkpoint is intact: step {lost[0]}: {damaged[lost[0]]}. "
            "Restore its files from a copy, or choose another train.output_dir"
        )
    for step, problem in damaged.items():
        where = store.set_aside(folder, step, "damaged")
        following = f"going on from step {newest}" if newest else "starting anew"
        print(f"the checkpoint of step {step} cannot be used: {problem}. It is {where} now; {following}", flush=True)
    if resume_from is None:
        return newest or 0
    if newest is not None and newest > resume_from:
        saved = store.read_metadata(folder, newest)
        if saved["config"]["train"].get("resume_from") == resume_from:
            return newest  # an interrupted run that went back to that step before
    if resume_from not in store.steps(folder):
        there = ", ".join(map(str, store.steps(folder))) or "none"
        raise UserError(f"train.resume_from: got {resume_from}, but {output_dir} has checkpoints of steps: {there}")
    if problem := store.damage(folder, resume_from):
        raise UserError(f"train.resume_from: the checkpoint of step {resume_from} is damaged: {problem}")
    for step in store.steps(folder):
        if step > resume_from:
            print(f"the checkpoint of step {step} is {store.set_aside(folder, step, 'discarded')} now", flush=True)
    return resume_from


def check(output_dir: epath.Path, saved: Mapping[str, Any], metadata: Mapping[str, Any]) -> list[str]:
    """Compares a checkpoint's metadata with the run's; returns lines about what may differ, and does.

    Raises:
        UserError: other classes or other training data: it would be another run.
    """
    old_classes, new_classes = (
        list(zip(side["category_ids"], side.get("category_names", side["category_ids"]), strict=True))
        for side in (saved, metadata)
    )
    another = "Use another train.output_dir (with --init-from to start from these parameters)"
    if old_classes != new_classes:
        differ = [f"{old} -> {new}" for old, new in zip(old_classes, new_classes, strict=False) if old != new]
        what = differ[0] if differ else f"{len(old_classes)} -> {len(new_classes)} classes"
        raise UserError(f"{output_dir}: the classes (id, name) changed since its checkpoints: {what}. {another}")
    lines = []
    old_data, new_data = saved.get("data", {}), metadata["data"]
    if old_data and old_data["train"] != new_data["train"]:
        raise UserError(f"{output_dir}: the training images or annotations changed since its checkpoints. {another}")
    if old_data and old_data["val"] != new_data["val"]:
        lines.append("the validation images or annotations changed: AP before and after this step do not compare")
    old, new = flat(saved["config"]), flat(metadata["config"])
    changed = [f"  {name}: {old.get(name)} -> {new.get(name)}" for name in new if old.get(name) != new.get(name)]
    return lines + (["resuming with a changed configuration:", *changed] if changed else [])


def flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested configuration -> `{"train.seed": 0, ...}`, tuples as lists, as JSON gives them back."""
    result = {}
    for name, value in config.items():
        if isinstance(value, Mapping):
            result |= flat(value, f"{prefix}{name}.")
        else:
            result[prefix + name] = as_list(value)
    return result


def as_list(value: Any) -> Any:
    """Tuples, nested ones too, as lists."""
    return [as_list(item) for item in value] if isinstance(value, tuple | list) else value
