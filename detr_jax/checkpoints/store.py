"""Checkpoints: written in the background while training goes on, read whole or in part, onto any number of devices.

A checkpoint is a folder `<directory>/<step>` in orbax's format. Each entry of the saved state is stored on its own and
flat, under the paths of its leaves, so that a reader needs neither the optimizer to get at the parameters nor the
containers that held them. The metadata, plain JSON, lies beside the arrays and is committed with them.

Orbax writes to `<step>.orbax-checkpoint-tmp` and renames it when every byte of every host is there: a run that is
killed at any moment leaves its finished checkpoints as they were, and the next `CheckpointWriter` removes the
half-written one.
"""

import json
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Literal

import jax
import numpy as np
from etils import epath
from orbax.checkpoint import v1 as ocp

from detr_jax.errors import NotFoundError, UserError

PyTree = Any
Step = int | Literal["latest", "best"]


class CheckpointWriter:
    """Saves a sequence of checkpoints in `directory`, asynchronously, and removes those that need not be kept.

    Every process calls every method. Use it as a context manager, or call `close`: it waits for the last save.

    Args:
        directory: where the checkpoints are; created if need be. What an interrupted save left there is removed, so a
            directory has one writer at a time.
        keep_last: newest checkpoints to keep, at least 1.
        keep_best: best checkpoints to keep too, by the AP they were saved with; equal ones: the newest.
    """

    def __init__(self, directory: str, *, keep_last: int = 2, keep_best: int = 1):
        if keep_last < 1 or keep_best < 0:
            raise UserError(f"keep_last must be at least 1 and keep_best at least 0, got {keep_last} and {keep_best}")
        policies = ocp.training.preservation_policies
        best = policies.BestN(get_metric_fn=lambda m: m["AP"], n=keep_best, keep_checkpoints_without_metrics=False)
        keep: Any = policies.AnyPreservationPolicy([policies.LatestN(keep_last), best])
        self._checkpointer = ocp.training.Checkpointer(
            epath.Path(directory).absolute(),
            preservation_policy=keep,
            cleanup_tmp_directories=True,
        )

    def save(
        self, step: int, state: Mapping[str, PyTree], metadata: Mapping[str, Any], *, ap: float | None = None
    ) -> bool:
        """Copies `state` off the devices and returns; the copy is written in the background.

        A save that is still running is waited for first, so none is lost. The caller may donate `state` right away.

        Args:
            step: finished training steps.
            state: entries of any pytree type, of arrays and Python numbers, such as `{"params": ..., "opt_state":
                ...}`. Entries without leaves are left out.
            metadata: JSON-serializable; comes back from `read_metadata`.
            ap: validation AP, for keep-best.

        Returns:
            False if `step` was saved before; that checkpoint is left as it is, so evaluate first and save once.

        Raises:
            TypeError: metadata that JSON cannot hold.
            OSError: this or the previous save could not be written (disk full, say).
        """
        if step in (checkpoint.step for checkpoint in self._checkpointer.checkpoints):
            return False
        entries = {name: leaves for name, tree in state.items() if (leaves := _flatten(tree))}
        ap = None if ap is None else float(ap)
        plain = json.loads(json.dumps({**metadata, "step": step, "AP": ap}))  # fails here, not in the background
        # `force`: without it orbax silently skips a save that is issued while another one runs; with it, it waits.
        self._checkpointer.save_checkpointables_async(
            step, entries, force=True, metrics=None if ap is None else {"AP": ap}, custom_metadata=plain
        )
        return True

    def wait(self) -> None:
        """Returns when the last save is safely on disk; raises what went wrong with it."""
        self._checkpointer.wait()

    def close(self) -> None:
        """Waits for the last save and ends the background threads."""
        self._checkpointer.close()

    def __enter__(self) -> "CheckpointWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def steps(directory: str) -> list[int]:
    """Steps of the finished checkpoints in `directory`, ascending; empty if there is no such directory."""
    return sorted(found.step for found in ocp.path.step.standard_name_format().find_all(_root(directory)))


def latest_step(directory: str) -> int | None:
    """The newest finished checkpoint's step, or None if there is none: the run starts from the beginning."""
    return max(steps(directory), default=None)


def best_or_latest(directory: str) -> Step:
    """`best`, or `latest` where no checkpoint was saved with an AP."""
    scored = any(_metadata(_root(directory) / str(step))["AP"] is not None for step in steps(directory))
    return "best" if scored else "latest"


def read_metadata(directory: str, step: Step = "latest") -> dict[str, Any]:
    """What was saved as `metadata`, and `"step"` (int), `"AP"` (float or None) and `"entries"` (names in the state).

    Args:
        directory: of the checkpoints, of the run that holds them in `checkpoints/`, or of one checkpoint.
        step: a step, "latest", or "best" by AP (the newest of equal ones).

    Raises:
        FileNotFoundError: no such checkpoint; says what is there.
    """
    path = _find(directory, step)
    saved = ocp.checkpointables_metadata(path)
    entries = sorted(set(saved.metadata) - {"metrics"})
    return {**_metadata(path), "entries": entries}


def restore(directory: str, abstract_state: Mapping[str, PyTree], step: Step = "latest") -> dict[str, PyTree]:
    """Reads the entries of `abstract_state` onto the devices that it names; the checkpoint's others stay unread.

    Args:
        directory: as in `read_metadata`.
        abstract_state: for each entry a pytree of the saved structure, with leaves `jax.ShapeDtypeStruct` (with a
            sharding: a `jax.Array` laid out so, whatever devices saved it; without: a NumPy array), or arrays, which
            stand for their shape, type and sharding, or Python numbers.
        step: as in `read_metadata`.

    Returns:
        The same structure with the saved values.

    Raises:
        FileNotFoundError: no such checkpoint; says what is there.
        ValueError: the checkpoint does not fit; names the first tensors that differ, with both shapes.
    """
    path = _find(directory, step)
    wanted = {name: _flatten(tree) for name, tree in abstract_state.items()}
    saved = ocp.checkpointables_metadata(path).metadata
    for name, leaves in wanted.items():
        _check_fits(leaves, saved.get(name, {}), f"{path}, entry {name!r}")
    targets = {name: {key: _target(leaf) for key, leaf in leaves.items()} for name, leaves in wanted.items() if leaves}
    restored = ocp.load_checkpointables(path, targets) if targets else {}
    return {
        name: jax.tree.unflatten(jax.tree.structure(tree), [restored[name][key] for key in wanted[name]])
        for name, tree in abstract_state.items()
    }


def _flatten(tree: PyTree) -> dict[str, Any]:
    """Leaves by path, such as `backbone/conv1/kernel`."""
    leaves = jax.tree.leaves_with_path(tree)
    flat = {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}
    if len(flat) != len(leaves):
        raise ValueError(f"{len(leaves)} leaves share {len(flat)} paths: a key of the tree holds a '/'")
    return flat


def _target(leaf: Any) -> Any:
    """What orbax is to make of a leaf."""
    if isinstance(leaf, int | float):
        return leaf
    sharding = getattr(leaf, "sharding", None)
    if sharding is None:
        return np.broadcast_to(np.zeros((), leaf.dtype), leaf.shape)  # stands for a NumPy array, without its memory
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _describe(leaf: Any) -> str:
    if leaf is None:
        return "nothing"
    return type(leaf).__name__ if isinstance(leaf, int | float) else f"{np.dtype(leaf.dtype)} {list(leaf.shape)}"


def _check_fits(wanted: Mapping[str, Any], saved: Mapping[str, Any], what: str) -> None:
    keys = [*wanted, *(key for key in saved if key not in wanted)]
    pairs = [(key, _describe(saved.get(key)), _describe(wanted.get(key))) for key in keys]
    wrong = [f"  {key}: {got} in the checkpoint, {want} expected" for key, got, want in pairs if got != want]
    if wrong:
        more = [f"  ... and {len(wrong) - 8} more"] if len(wrong) > 8 else []
        raise UserError(
            f"{what}: {len(wrong)} of {len(keys)} tensors do not fit:\n"
            + "\n".join(wrong[:8] + more)
            + "\nUse the config that the checkpoint was trained with, or another directory."
        )


def _root(directory: str) -> epath.Path:
    """The folder of the step folders."""
    path = epath.Path(directory).absolute()
    return path / "checkpoints" if (path / "checkpoints").is_dir() else path


def _find(directory: str, step: Step) -> epath.Path:
    """The folder of one finished checkpoint."""
    root = _root(directory)
    if (root / "_CHECKPOINT_METADATA").exists() and root.name.isdigit():
        return root
    available = steps(directory)
    if step == "best":
        scores = {step: ap for step in available if (ap := _metadata(root / str(step))["AP"]) is not None}
        found = max(scores, key=lambda step: (scores[step], step), default=None)
    else:
        found = max(available, default=None) if step == "latest" else step
    if found in available:
        return root / str(found)
    if not root.is_dir():
        there = "it does not exist"
    elif available:
        there = f"it holds steps {', '.join(map(str, available))}" + (", saved without AP" if step == "best" else "")
    else:
        names = sorted(path.name for path in root.iterdir())
        there = f"it holds {', '.join(names[:10])}{' ...' if len(names) > 10 else ''}" if names else "it is empty"
    wanted = f"of step {step} " if isinstance(step, int) else f"({step}) "
    raise NotFoundError(f"no checkpoint {wanted}in {root}: {there}")


def _metadata(path: epath.Path) -> dict[str, Any]:
    metadata = ocp.checkpointables_metadata(path).custom_metadata
    if not isinstance(metadata, dict) or "AP" not in metadata:
        raise UserError(f"{path} holds no metadata of detr_jax: it is damaged, or another program saved it")
    return metadata
