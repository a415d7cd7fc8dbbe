"""Training curves of one run, or of several, from their `metrics.jsonl`."""

import math
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
from etils import epath
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from detr_jax.errors import UserError
from detr_jax.metric_writer import read_metrics

_TITLES = {
    "train/loss": "loss",
    "train/loss_ce": "classification loss",
    "train/loss_bbox": "box loss, L1",
    "train/loss_giou": "box loss, GIoU",
    "train/lr": "learning rate",
    "val/AP": "AP",
    "val/AP50": "AP at IoU 0.50",
    "val/APs": "AP of small objects",
    "val/APm": "AP of medium objects",
    "val/APl": "AP of large objects",
}
_CURVES = tuple(_TITLES)


def plot_curves(
    runs: epath.PathLike | Mapping[str, epath.PathLike],
    *,
    x: Literal["step", "epoch", "hours"] = "step",
    curves: Sequence[str] = _CURVES,
) -> Figure:
    """Loss terms, learning rate, AP and AP by size of a run, or of several, one panel each.

    Args:
        runs: a `metrics.jsonl`, or several by the names that the legend shows.
        x: the horizontal axis.
        curves: names in `metrics.jsonl`; what no run reported gets no panel.

    Returns:
        A figure; `figure.savefig(path)` writes it.

    Raises:
        ValueError: no run reported any of the curves.
    """
    files = dict(runs) if isinstance(runs, Mapping) else {"": runs}
    records = {name: read_metrics(path) for name, path in files.items()}
    present = [curve for curve in curves if any(curve in record for run in records.values() for record in run)]
    if not present:
        raise UserError(f"{', '.join(map(str, files.values()))}: none of {', '.join(curves)} was reported")
    end = max(record[x] for run in records.values() for record in run if x in record)
    columns = min(len(present), 3)
    rows = -(-len(present) // columns)
    figure = Figure(figsize=(4.2 * columns, 3.1 * rows), layout="constrained", dpi=120)
    FigureCanvasAgg(figure)
    for panel, curve in enumerate(present, 1):
        axes = figure.add_subplot(rows, columns, panel)
        for name, run in records.items():
            points = [(record[x], _number(record[curve])) for record in run if curve in record]
            few = len(points) < 40
            axes.plot(*np.array(points, float).reshape(-1, 2).T, marker="." if few else None, linewidth=1.5, label=name)
        scores = curve.startswith("val/")
        title = _TITLES.get(curve, curve.removeprefix("train/").removeprefix("val/").replace("_", " "))
        axes.set_title(title, fontsize=10.5, loc="left")
        if scores:
            reported = [_number(r[curve]) for run in records.values() for r in run if curve in r]
            best = max((value for value in reported if not math.isnan(value)), default=None)
            text = "best -" if best is None else f"best {best:.3f}"
            axes.set_title(text, fontsize=9, loc="right", color="0.35")
        axes.set_ylim(bottom=0, top=axes.dataLim.y1 * 1.08 if 0 < axes.dataLim.y1 < math.inf else None)
        axes.set_xlim(-0.02 * end, 1.02 * end)  # the same in all panels, though some are reported rarely
        axes.set_xlabel({"step": "training step", "epoch": "epoch", "hours": "hours"}[x], fontsize=9)
        axes.tick_params(labelsize=8)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        if len(records) > 1 and panel == 1:
            axes.legend(fontsize=8, frameon=False)
    return figure


def _number(value: float | None) -> float:
    """A reported value; NaN for one that was not finite, and for the AP of a size which no object has (-1)."""
    return math.nan if value is None or value < 0 else value
