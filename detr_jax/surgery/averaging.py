"""Averages of checkpoints: model soups (Wortsman et al., ICML 2022) and the moving average of a run."""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from detr_jax.checkpoints import store
from detr_jax.checkpoints.load import Loaded, load
from detr_jax.errors import NotFoundError, UserError
from detr_jax.surgery.transplant import Operated, tensors, transplant, whole

Source = Loaded | str | os.PathLike[str]


def soup(sources: Sequence[Source], weights: Sequence[float] | None = None) -> Operated:
    """The average of detectors of one architecture: `soup(["runs/a", "runs/b"])`; one at a time is in memory.

    Args:
        sources: detectors, or paths as `detr_jax.load` takes them.
        weights: of each; scaled to sum to 1. `None` weighs them equally.

    Raises:
        ValueError: none given, weights that do not fit, other classes, or other tensors: names the first that differs.
    """
    weights = [1.0] * len(sources) if weights is None else list(weights)
    if not sources or len(weights) != len(sources) or sum(weights) <= 0:
        raise UserError(
            f"soup: expected as many weights as sources, of a sum above 0, got {weights} and {len(sources)}"
        )
    total = sum(weights)
    return _mixed(sources, [weight / total for weight in weights], "soup")


def moving_average(run: str | os.PathLike[str], decay: float = 0.9) -> Operated:
    """The exponential moving average of a run's checkpoints, oldest first: `moving_average("runs/bccd", decay=0.5)`.

    Training keeps `keep_last` checkpoints; raise it to have some to average. (`optim.ema_decay` averages every step.)

    Args:
        run: a run's folder.
        decay: what is left of the average at each further checkpoint.

    Raises:
        FileNotFoundError: there is no checkpoint.
        ValueError: a decay outside of [0, 1).
    """
    steps = store.steps(str(run))
    if not steps:
        raise NotFoundError(f"{run}: no checkpoint in it; expected the folder of a run")
    if not 0 <= decay < 1:
        raise UserError(f"moving_average: decay={decay}, expected 0 <= decay < 1")
    root = Path(run) / "checkpoints" if (Path(run) / "checkpoints").is_dir() else Path(run)
    shares = [(1 - decay if i else 1.0) * decay ** (len(steps) - 1 - i) for i in range(len(steps))]
    return _mixed([root / str(step) for step in steps], shares, f"moving_average: decay {decay}")


def _mixed(sources: Sequence[Source], shares: Sequence[float], what: str) -> Operated:
    """The weighted sum of detectors."""
    first, total, names = None, {}, []
    for i, (source, share) in enumerate(zip(sources, shares, strict=True)):
        loaded = source if isinstance(source, Loaded) else load(source)
        found = tensors(loaded.model)
        names.append(f"{share:.3f} of {i if isinstance(source, Loaded) else source}")
        if first is None:
            first, total = loaded, {path: np.zeros(x.shape, np.float64) for path, x in found.items()}
        if loaded.categories != first.categories:
            ours, theirs = first.categories.names, loaded.categories.names
            raise UserError(f"{what}: source {i} has the classes {theirs}, the first one has {ours}")
        _check_same(total, found, f"{what}: source {i}")
        for path, value in found.items():
            total[path] += share * value.astype(np.float64)
    assert first is not None
    values = {path: value.astype(np.float32) for path, value in total.items()}
    return transplant(first, first.config, whole, f"{what}: {len(sources)} detectors", values=values, notes=names)


def _check_same(expected: dict, found: dict, what: str) -> None:
    """Raises `ValueError` with the first tensor that is not in both, in one shape."""
    for path in [*expected, *found]:
        shapes = [list(x[path].shape) if path in x else "missing" for x in (found, expected)]
        if shapes[0] != shapes[1]:
            raise UserError(
                f"{what} is of another architecture: {'.'.join(map(str, path))} {shapes[0]}, not {shapes[1]}"
            )
