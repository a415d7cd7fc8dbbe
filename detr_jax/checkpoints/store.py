"""Checkpoints: written in the background while training goes on, read whole or in part, onto any number of devices.

A checkpoint is a folder `<directory>/<step>` in orbax's format. Each entry of the saved state is stored on its own and
flat, under the paths of its leaves, so that a reader needs neither the optimizer to get at the parameters nor the
containers that held them. The metadata, plain JSON, lies beside the arrays and is committed with them.

Orbax writes to `<step>.orbax-checkpoint-tmp` and renames it when every byte of every host is there; then the checksums
of its files are written, which finish it. A run that is killed at any moment leaves its finished checkpoints as they
were, and the next `CheckpointWriter` removes the half-written one. The scores of a checkpoint are a file of their own,
`scores.json`, since a checkpoint is saved before it is scored.
"""

import contextlib
import errno
import json
import logging
import math
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from types import TracebackType
from typing import Any, Literal

import jax
import numpy as np
from etils import epath
from orbax.checkpoint import v1 as ocp

from detr_jax import stall
from detr_jax.checkpoints import checksums
from detr_jax.errors import NotFoundError, UserError
from detr_jax.stall import StalledError, wait_for

PyTree = Any
_SCORES = "scores.json"
Step = int | Literal["latest", "best"]


class _NotOrbax(logging.Filter):
    """Drops what orbax logs about a failed save, traceback and all: it is raised as an error."""

    def filter(self, record: logging.LogRecord) -> bool:
        return record.levelno < logging.ERROR or "/orbax/" not in record.pathname


logging.getLogger("absl").addFilter(_NotOrbax())


class CheckpointWriter:
    """Saves a sequence of checkpoints in `directory`, asynchronously, and removes those that need not be kept.

    Every process calls every method. Use it as a context manager, or call `close`: it waits for the last save.

    Args:
        directory: where the checkpoints are; created if need be. What an interrupted save left there is removed, so a
            directory has one writer at a time.
        keep_last: newest checkpoints to keep, at least 1.
        keep_best: best checkpoints to keep too, by the AP that `score` gave them; equal ones: the newest.
        timeout: seconds that a save may take.
    """

    def __init__(self, directory: str, *, keep_last: int = 2, keep_best: int = 1, timeout: float = math.inf):
        if keep_last < 1 or keep_best < 0:
            raise UserError(f"keep_last must be at least 1 and keep_best at least 0, got {keep_last} and {keep_best}")
        self._directory = _absolute(directory)
        self._aps = {step: ap for step in steps(directory) if (ap := _ap(self._directory / str(step))) is not None}
        self._checkpointer = ocp.training.Checkpointer(
            self._directory,
            preservation_policy=_LastAndBest(keep_last, keep_best, self._aps),
            cleanup_tmp_directories=True,
        )
        self._timeout, self._stalled, self._failed = timeout, False, False
        self._pending: tuple[int, Future[None]] | None = None

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
            ap: validation AP, if it is known already; see `score`.

        Returns:
            False if `step` was saved before; that checkpoint is left as it is.

        Raises:
            TypeError: metadata that JSON cannot hold.
            OSError: this or the previous save could not be written (disk full, say).
            StalledError: this or the previous save took longer than `timeout`; later ones fail at once.
        """
        self.wait()
        if self._stalled:
            raise StalledError(errno.ETIMEDOUT, "an earlier save has not ended", str(self._directory / str(step)))
        if step in (checkpoint.step for checkpoint in self._checkpointer.checkpoints):
            return False
        entries = {name: leaves for name, tree in state.items() if (leaves := _flatten(tree))}
        plain = json.loads(json.dumps({**metadata, "step": step}))  # fails here, not in the background
        try:
            # `force`: without it orbax skips a save now and then, by a policy of its own.
            response = stall.call(
                lambda: self._checkpointer.save_checkpointables_async(step, entries, force=True, custom_metadata=plain),
                lambda: f"{self._directory / str(step)} (its writing is to begin)",
                self._timeout,
            )
        except StalledError:
            self._stalled = True
            raise
        except Exception as error:
            raise self._failure(step, error) from error
        assert response is not None
        future: Future[None] = Future()
        threading.Thread(target=self._finish, args=(step, response, future), name="checkpoint", daemon=True).start()
        self._pending = step, future
        if ap is not None:
            self.score(step, {"AP": ap})
        return True

    def score(self, step: int, scores: Mapping[str, float]) -> None:
        """Notes the scores of a checkpoint that was saved; its `AP` decides whether it is kept as one of the best."""
        self.wait()
        self._aps[step] = float(scores["AP"])
        if jax.process_index() == 0:
            checksums.write_whole(self._directory / str(step) / _SCORES, json.dumps(dict(scores)))

    def wait(self) -> None:
        """Returns when the last save is safely on disk; raises what went wrong with it, once."""
        pending, self._pending = self._pending, None
        if pending is not None:
            step, future = pending
            try:
                wait_for(future.result, lambda: f"{self._directory / str(step)} (it is being written)", self._timeout)
            except StalledError:
                self._stalled = True
                raise

    def close(self) -> None:
        """Waits for the last save and ends the background threads."""
        try:
            self.wait()
        finally:
            if not self._stalled:
                # orbax raises the error of a failed save again, which has been reported.
                with contextlib.suppress(Exception) if self._failed else contextlib.nullcontext():
                    self._checkpointer.close()

    def __enter__(self) -> "CheckpointWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _finish(self, step: int, response: Any, future: Future[None]) -> None:
        try:
            response.result()  # also ends the response's thread, which would stay otherwise
            if jax.process_index() == 0:
                checksums.write(self._directory / str(step))
            future.set_result(None)
        except Exception as error:
            future.set_exception(self._failure(step, error))

    def _failure(self, step: int, error: Exception) -> OSError:
        self._failed = True
        full = "No space left on device" in str(error) or getattr(error, "errno", None) == errno.ENOSPC
        reason = "no space left on device" if full else str(error).splitlines()[0] if str(error) else repr(error)
        finished = (
            other for other in steps(self._directory) if (self._directory / str(other) / checksums.FILE).exists()
        )
        left = max(finished, default=None)
        return OSError(
            errno.ENOSPC if full else errno.EIO,
            f"the checkpoint of step {step} could not be written: {reason}; the newest one is "
            f"{'missing' if left is None else f'of step {left}'}",
            str(self._directory),
        )


class _LastAndBest:
    """Which checkpoints orbax keeps. (Its own `BestN` wants a score when a checkpoint is saved.)"""

    def __init__(self, last: int, best: int, aps: Mapping[int, float]):
        self._last, self._best, self._aps = last, best, aps

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        there = [checkpoint.step for checkpoint in checkpoints]
        scored = sorted((step for step in there if step in self._aps), key=lambda step: (self._aps[step], step))
        keep = {*there[-self._last :], *(scored[-self._best :] if self._best else ())}
        return [step in keep for step in there]


NOT_FINISHED = checksums.NOT_FINISHED


def newest_intact(directory: str) -> tuple[int | None, dict[int, str]]:
    """The newest checkpoint whose files are as they were written, and what is wrong with each of the newer ones."""
    problems: dict[int, str] = {}
    root = _root(directory)
    numbered = [int(path.name) for path in root.iterdir() if path.name.isdigit()] if root.is_dir() else []
    for step in sorted(numbered, reverse=True):
        problem = damage(directory, step)
        if problem is None:
            return step, problems
        problems[step] = problem
    return None, problems


def damage(directory: str, step: int) -> str | None:
    """What is wrong with the files of a checkpoint, if anything."""
    root = _root(directory)
    problem = checksums.damage(root / str(step))
    if problem is not None and problem.startswith(NOT_FINISHED):
        finished = steps(directory)
        if step in finished and not any((root / str(other) / checksums.FILE).exists() for other in finished):
            return None  # written before there were checksums
    return problem


def set_aside(directory: str, step: int, why: Literal["damaged", "discarded"]) -> epath.Path:
    """Renames a checkpoint, so that neither readers nor writers see it; returns where it is now."""
    root, number = _root(directory), 0
    while (target := root / f"{step}.{why}{f'-{number}' if number else ''}").exists():
        number += 1
    return (root / str(step)).rename(target)


def steps(directory: epath.PathLike) -> list[int]:
    """Steps of the finished checkpoints in `directory`, ascending; empty if there is no such directory."""
    return sorted(found.step for found in ocp.path.step.standard_name_format().find_all(_root(directory)))


def latest_step(directory: str) -> int | None:
    """The newest finished checkpoint's step, or None if there is none: the run starts from the beginning."""
    return max(steps(directory), default=None)


def best_or_latest(directory: str) -> Step:
    """`best`, or `latest` where no checkpoint was saved with an AP."""
    scored = any(_ap(_root(directory) / str(step)) is not None for step in steps(directory))
    return "best" if scored else "latest"


def read_metadata(directory: str, step: Step = "latest") -> dict[str, Any]:
    """What was saved as `metadata`, and `"step"`, `"entries"` (names in the state), `"AP"` and `"scores"` (or None).

    Args:
        directory: of the checkpoints, of the run that holds them in `checkpoints/`, or of one checkpoint.
        step: a step, "latest", or "best" by AP (the newest of equal ones).

    Raises:
        FileNotFoundError: no such checkpoint; says what is there.
    """
    path = _find(directory, step)
    saved = ocp.checkpointables_metadata(path)
    ours = saved.custom_metadata
    if not isinstance(ours, dict) or "step" not in ours:
        raise UserError(f"{path} holds no metadata of detr_jax: it is damaged, or another program saved it")
    entries = sorted(set(saved.metadata) - {"metrics"})
    return {**ours, "entries": entries, "AP": _ap(path), "scores": read_scores(path)}


def restore(
    directory: str, abstract_state: Mapping[str, PyTree], step: Step = "latest", *, verify: bool = True
) -> dict[str, PyTree]:
    """Reads the entries of `abstract_state` onto the devices that it names; the checkpoint's others stay unread.

    Args:
        directory: as in `read_metadata`.
        abstract_state: for each entry a pytree of the saved structure, with leaves `jax.ShapeDtypeStruct` (with a
            sharding: a `jax.Array` laid out so, whatever devices saved it; without: a NumPy array), or arrays, which
            stand for their shape, type and sharding, or Python numbers.
        step: as in `read_metadata`.
        verify: compare the files with their checksums first.

    Returns:
        The same structure with the saved values.

    Raises:
        FileNotFoundError: no such checkpoint; says what is there.
        ValueError: the checkpoint does not fit; names the first tensors that differ, with both shapes. Or it is
            damaged; names the first file that is not as it was written.
    """
    path = _find(directory, step)
    if verify and (path / checksums.FILE).exists() and (problem := checksums.damage(path, tuple(abstract_state))):
        raise UserError(f"{path} is damaged: {problem}. Use another checkpoint: {_others(path)}")
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


def _absolute(directory: epath.PathLike) -> epath.Path:
    """An absolute path; `absolute` itself takes `gs://bucket` for a local folder."""
    path = epath.Path(directory)
    return path if "://" in str(path) else path.absolute()


def _root(directory: epath.PathLike) -> epath.Path:
    """The folder of the step folders."""
    path = _absolute(directory)
    return path / "checkpoints" if (path / "checkpoints").is_dir() else path


def _find(directory: str, step: Step) -> epath.Path:
    """The folder of one finished checkpoint."""
    root = _root(directory)
    if (root / "_CHECKPOINT_METADATA").exists() and root.name.isdigit():
        return root
    available = steps(directory)
    if step == "best":
        scores = {step: ap for step in available if (ap := _ap(root / str(step))) is not None}
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


def read_scores(step_folder: epath.Path) -> dict[str, float] | None:
    """What `CheckpointWriter.score` noted for a checkpoint."""
    try:
        return json.loads((step_folder / _SCORES).read_text())
    except FileNotFoundError:
        return None


def _ap(step_folder: epath.Path) -> float | None:
    scores = read_scores(step_folder)
    return None if scores is None else scores["AP"]


def _others(path: epath.Path) -> str:
    others = [str(step) for step in steps(str(path.parent)) if str(step) != path.name]
    return f"{path.parent} has steps {', '.join(others)}" if others else f"{path.parent} has no other"
