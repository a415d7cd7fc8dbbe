"""What went wrong on a data set: the most expensive errors, confused classes, AP by size and by class."""

from collections import Counter
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from detr_jax.data.index import DatasetIndex
from detr_jax.errors import UserError
from detr_jax.scoring import Scores
from detr_jax.visualize.mistakes import Error, read_image
from detr_jax.visualize.panels import INK, Page, Sheet, add_box, color_of, line, show_image
from detr_jax.visualize.prediction_figures import square


def mistakes_figure(errors: Sequence[Error], index: DatasetIndex, *, number: int = 12) -> Figure:
    """Misses and false positives of each kind in turn, the most expensive of each first, with their surroundings.

    Args:
        errors: as `errors.find_mistakes` returns them.
        index: the data set.
        number: how many to show, half of each sort.

    Raises:
        ValueError: there is no error to show.
    """
    if not errors:
        raise UserError("errors: nothing went wrong at this threshold, there is nothing to show")
    missed = [error.kind == "miss" for error in errors]
    sorts = {
        "misses": [error for error, miss in zip(errors, missed, strict=True) if miss],
        "false positives": [error for error, miss in zip(errors, missed, strict=True) if not miss],
    }
    sorts = {name: some for name, some in sorts.items() if some}
    headings = []
    for name, some in sorts.items():
        kinds = ", ".join(f"{count} {kind}" for kind, count in Counter(map(_kind, some)).most_common())
        headings.append(f"{len(some)} {name}: {kinds}")
    sorts = {name: _kinds_in_turn(some) for name, some in sorts.items()}
    columns = max(1, min(number // 2, max(map(len, sorts.values()))))
    sheet = Sheet(headings, [(0, 0, 1, 1)] * columns, min(columns, 6), bar=False, below=0.16)
    for block, some in enumerate(sorts.values()):
        for axes in sheet.panels[block][len(some) :]:
            axes.set_axis_off()
        for axes, error in zip(sheet.panels[block], some, strict=False):
            _show(axes, error, index)
        sheet.legend(block, [line("detection, in its class's color", "0.5"), line("object", "0.4", dashed=True)])
    return sheet.figure


def confusion_figure(counts: np.ndarray, names: Sequence[str], scores: Scores, *, number: int = 12) -> Figure:
    """Which classes were taken for which, beside AP by size and by class.

    Args:
        counts: int [k + 1, k + 1], as `errors.confusion` returns it.
        names: of the k classes.
        scores: of the evaluation.
        number: classes to show; of more, those with the most errors.
    """
    wrong = (counts.sum(0) + counts.sum(1) - 2 * np.diag(counts))[:-1]
    kept: list[int] = np.sort(np.argsort(-wrong, kind="stable")[:number]).tolist()
    matrix = counts[np.ix_([*kept, len(names)], [*kept, len(names)])]
    shares = matrix / np.maximum(counts[[*kept, len(names)]].sum(1, keepdims=True), 1)
    labels = [names[i] for i in kept]
    side = 2.6 + 0.45 * len(labels)
    figure = Page(figsize=(1.6 * side + 2.6, side + 0.4), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    table, by_size, by_class = figure.subplot_mosaic([["m", "s"], ["m", "c"]], width_ratios=[1.4, 1]).values()
    table.imshow(shares, cmap="cividis", vmin=0, vmax=1)
    for row, column in np.ndindex(matrix.shape):
        color = "black" if shares[row, column] > 0.55 else "white"
        text = "" if (row, column) == (len(labels), len(labels)) else str(matrix[row, column])
        table.text(column, row, text, ha="center", va="center", color=color, fontsize=9)
    ticks = range(len(labels) + 1)
    table.set_xticks(ticks, [*labels, "missed"], rotation=40, ha="right", fontsize=9)
    table.set_yticks(ticks, [*labels, "nothing"], fontsize=9)
    table.set_xlabel("detected as", fontsize=9.5, color=INK)
    table.set_ylabel("object", fontsize=9.5, color=INK)
    of = "" if len(labels) == len(names) else f", the {len(labels)} of {len(names)} classes with the most errors"
    table.set_title(f"objects, and what they were taken for{of}", fontsize=10, color=INK)
    sizes = {"all": scores.AP, "small": scores.APs, "medium": scores.APm, "large": scores.APl}
    classes = {name: scores.per_class.get(name, -1.0) for name in labels}
    for axes, values, title in ((by_size, sizes, "AP by size"), (by_class, classes, "AP by class")):
        positions = range(len(values))[::-1]
        axes.barh(positions, [max(value, 0) for value in values.values()], color="0.55", height=0.7)
        for position, value in zip(positions, values.values(), strict=True):
            axes.text(
                max(value, 0) + 0.015, position, f"{value:.3f}" if value >= 0 else "none", va="center", fontsize=8.5
            )
        axes.set_yticks(positions, list(values), fontsize=9)
        axes.set_xlim(0, 1)
        axes.tick_params(labelsize=8.5)
        axes.set_title(title, fontsize=10, color=INK)
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def _kinds_in_turn(errors: Sequence[Error]) -> list[Error]:
    """The most expensive error of each kind and class, then the second of each, and so on."""
    places: Counter[tuple[str, int]] = Counter()
    turns = []
    for error in errors:
        turns.append(places[_kind(error), error.label])
        places[_kind(error), error.label] += 1
    return [error for _, error in sorted(zip(turns, errors, strict=True), key=lambda pair: pair[0])]


def _kind(error: Error) -> str:
    """Of a miss, whether a box is there."""
    if error.kind != "miss":
        return error.kind
    return "scored too low" if error.score else "no box fits"


def _show(axes: Axes, error: Error, index: DatasetIndex) -> None:
    """An error and its surroundings."""
    names, shown = index.category_names, read_image(index, error.image)
    what = names[error.label]
    if error.kind == "miss":
        title = f"{what}: " + (f"at most {error.score:.2f}" if error.score else "no box fits")
    else:
        title = f"{what} {error.score:.2f}: {error.kind}"
        if error.kind == "wrong class" and error.other_label is not None:
            title = f"{what} {error.score:.2f}: is {names[error.other_label]}"
    file = index.name(error.image).rsplit("/", 1)[-1]
    show_image(axes, shown, square(_around(error), shown.size, 1.8), title)
    axes.set_xlabel(f"{file}, cost {error.cost:.1f}", fontsize=7, color=INK, labelpad=2)
    detection, truth = error.box_xyxy, error.other_xyxy
    if error.kind == "miss":
        detection, truth = truth, detection
    if detection is not None:
        add_box(axes, detection, color_of(error.label))
    if truth is not None:
        add_box(axes, truth, "white", dashed=True, width=1.6)


def _around(error: Error) -> np.ndarray:
    """The box around both boxes of an error."""
    if error.other_xyxy is None:
        return error.box_xyxy
    low, high = np.minimum(error.box_xyxy, error.other_xyxy), np.maximum(error.box_xyxy, error.other_xyxy)
    return np.array([*low[:2], *high[2:]])
