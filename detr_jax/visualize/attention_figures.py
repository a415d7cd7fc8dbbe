"""Where a detector looks: sampling points, attention maps, and the pixels that move a detection."""

import math
from collections.abc import Iterable, Sequence
from typing import Literal

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Colormap, Normalize
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from detr_jax.boxes import box_iou
from detr_jax.errors import UserError
from detr_jax.visualize.inspection import Inspection, Maps, Saliency, Sampling
from detr_jax.visualize.panels import (
    HEAT,
    Sheet,
    Window,
    add_box,
    add_cross,
    color_of,
    cross,
    line,
    show_heat,
    show_image,
    whole,
)

By = Literal["layer", "head", "level"]

LEVEL_MARKERS = ("o", "s", "^", "D", "P", "X", "*", "v")
"""Shape of the sampling points of each level, finest first."""
_SIZES = (16, 22, 30, 34, 40, 40, 50, 50)  # of the markers, in points^2
# Readable with every kind of color blindness, and both ends stand out of an image.
POINTS: Colormap = matplotlib.colormaps["plasma"]


def sampling_figure(
    seen: Inspection,
    query: int | None = None,
    *,
    by: By | None = None,
    layer: int = -1,
    head: int | None = None,
    level: int | None = None,
) -> Figure:
    """Where a query of Deformable DETR sampled the image (the paper's sampling-point figure, for the decoder).

    A point's color is its attention weight, its shape the feature level. The box is that which the layer predicted,
    the cross the reference point, the dashed box the reference box with refinement.

    Args:
        seen: of a Deformable DETR.
        query: which; `None` takes the best detection.
        by: a panel for each layer, head or level; `None` merges heads and levels, on the whole image and enlarged.
        layer: decoder layer, negative from the end; not used with `by="layer"`.
        head: this head alone.
        level: this level alone.

    Raises:
        ValueError: a DETR, which samples no points; a query, layer, head or level that the model does not have.
    """
    sampling = _sampling(seen.decoder)
    query = seen.best()[0] if query is None else seen.check_query(query)
    panels, layers = _panels(sampling, by, layer, head, level)
    window = _window(seen, sampling, query, layers)
    windows, titles, choices = [window] * len(panels), [title for title, _ in panels], [c for _, c in panels]
    if by is None:  # the whole image first
        windows, titles, choices = [whole(seen.image), window], ["image", "enlarged"], choices * 2
    heading = seen.caption(query) + _what(sampling, by, layer, head, level)
    sheet = Sheet([heading], windows, len(windows) if len(windows) <= 3 else -(-len(windows) // 2))
    top = _top(sampling.weights[c.layer, query, c.heads, c.levels] for c in choices)
    color = color_of(int(seen.labels[query]))
    for axes, window, title, choice in zip(sheet.panels[0], windows, titles, choices, strict=True):
        show_image(axes, seen.image, window, title)
        _reference(axes, sampling.references[choice.layer, query])
        add_box(axes, seen.boxes_xyxy[choice.layer, query], color)
        _scatter(axes, sampling, query, choice, top, small=title == "image")
    _explain(sheet, 0, sampling, choices, top, box_color=color)
    return sheet.figure


def encoder_figure(
    seen: Inspection | Sequence[Inspection],
    *,
    layer: int = -1,
    head: int | None = None,
    level: int = 0,
) -> Figure:
    """What the chosen points attend to in the encoder: a panel for each point, a row for each detector.

    Deformable DETR: the sampling points, in all levels, of the point's cell in one level; DETR: the map of its
    self-attention, the mean over the heads. With one of each, both papers' figures are side by side.

    Args:
        seen: of a detector, or of several on one image; inspected with `points`.
        layer: encoder layer, negative from the end.
        head: this head alone.
        level: of the point's cell, 0 is the finest; DETR has one only.

    Raises:
        ValueError: inspected without points, or a layer, head or level that a model does not have.
    """
    rows = [seen] if isinstance(seen, Inspection) else list(seen)
    for one in rows:
        if one.encoder is None:
            raise UserError(
                "no points, or no encoder to inspect: call Inspector(detector)(image, points=[(x, y), ...])"
            )
    points = rows[0].points
    headings = []
    for one in rows:
        layers, levels = one.config.encoder_layers, getattr(one.config, "num_levels", 1)
        of = f", of the cells of level {_check('level', level, levels)}" if levels > 1 else ""
        headings.append(f"{_name(one)}: encoder self-attention, layer {layer % layers + 1} of {layers}{of}")
    sheet = Sheet(headings, [whole(rows[0].image)] * len(points), min(len(points), 4))
    for block, one in enumerate(rows):
        attention = one.encoder
        assert attention is not None
        choice = _Choice(attention, layer, head)
        levels = getattr(one.config, "num_levels", 1)
        tokens = [i * levels + (level if levels > 1 else 0) for i in range(len(points))]
        top = _top(attention.weights[choice.layer, token, choice.heads] for token in tokens)
        for i, (axes, token, (x, y)) in enumerate(zip(sheet.panels[block], tokens, points, strict=True), 1):
            heat = isinstance(attention, Maps)
            show_image(axes, one.image, whole(one.image), f"point {i}: ({x:.0f}, {y:.0f})", gray=heat)
            if isinstance(attention, Maps):
                _heat(axes, attention, token, choice)
                add_cross(axes, x, y)
            else:
                _scatter(axes, attention, token, choice, top, small=True)
                add_cross(axes, *attention.references[choice.layer, token])
        if isinstance(attention, Maps):
            _explain_map(sheet, block, head, [cross("chosen point")])
        else:
            _explain(sheet, block, attention, [choice], top)
    return sheet.figure


def attention_figure(
    seen: Inspection | Sequence[Inspection],
    queries: Sequence[int] | None = None,
    *,
    layer: int = -1,
    head: int | None = None,
    number: int = 4,
) -> Figure:
    """What each object's query attends to in the decoder: a panel for each object, a row for each detector.

    DETR: the map of its cross-attention, the mean over the heads; Deformable DETR: its sampling points. With one of
    each, objects are side by side: below each of the first detector's is the other's query of the most similar box.

    Args:
        seen: of a detector, or of several on one image.
        queries: of the first detector; `None` takes its best ones.
        layer: decoder layer, negative from the end.
        head: this head alone.
        number: objects, where `queries` is None.

    Raises:
        ValueError: a query, layer or head that a model does not have.
    """
    rows = [seen] if isinstance(seen, Inspection) else list(seen)
    first = rows[0]
    chosen = _distinct(first, number) if queries is None else [first.check_query(query) for query in queries]
    if not chosen:
        raise UserError("queries is empty: give at least one, or None for the best")
    headings = []
    for one in rows:
        layers = one.config.decoder_layers
        headings.append(f"{_name(one)}: decoder cross-attention, layer {layer % layers + 1} of {layers}")
    # Sampling points are enlarged; a map, or one beside them, is shown on the whole image.
    enlarged = all(isinstance(one.decoder, Sampling) for one in rows)
    panels = [(0.0, 0.0, 1.0, 1.0) if enlarged else whole(first.image)] * len(chosen)
    sheet = Sheet(headings, panels, min(len(chosen), 4))
    for block, one in enumerate(rows):
        attention = one.decoder
        mine = chosen if block == 0 else [_nearest(one, first.boxes_xyxy[-1, query]) for query in chosen]
        choice = _Choice(attention, layer, head)
        top = _top(attention.weights[choice.layer, query, choice.heads] for query in mine)
        for axes, query in zip(sheet.panels[block], mine, strict=True):
            heat = isinstance(attention, Maps)
            window = whole(one.image)
            if enlarged and isinstance(attention, Sampling):
                window = _squared(_window(one, attention, query, [choice.layer]))
            show_image(axes, one.image, window, one.caption(query), gray=heat)
            if isinstance(attention, Maps):
                _heat(axes, attention, query, choice)
            add_box(axes, one.boxes_xyxy[choice.layer, query], color_of(int(one.labels[query])))
            if isinstance(attention, Sampling):
                _scatter(axes, attention, query, choice, top, small=not enlarged)
                add_cross(axes, *attention.references[choice.layer, query, :2])
        if isinstance(attention, Maps):
            _explain_map(sheet, block, head, [line("predicted box, in its class's color", "0.5")])
        else:
            _explain(sheet, block, attention, [choice], top, box_color="0.5")
    return sheet.figure


def saliency_figure(saliency: Saliency) -> Figure:
    """Which pixels move a detection (the paper's figure of what Deformable DETR looks at).

    A panel for each of the box's center x and y, its width and height, and the score: the norm of its gradient by the
    pixel, relative to the panel's largest, both averaged over squares of 1/100 of the image's longer side.
    """
    window = whole(saliency.image)
    sheet = Sheet([f"{saliency.caption} - the pixels that move it"], [window] * 6, 3)
    show_image(sheet.panels[0][0], saliency.image, window, "image")
    add_box(sheet.panels[0][0], saliency.box_xyxy, "white", width=1.2)
    names = ("center x", "center y", "width", "height", "score")
    for axes, name, norms in zip(sheet.panels[0][1:], names, saliency.norms, strict=True):
        show_image(axes, saliency.image, window, name, gray=True)
        smooth = _smooth(norms, max(1, round(max(norms.shape) / 200)))
        show_heat(axes, smooth / max(smooth.max(), 1e-30), window)
        add_box(axes, saliency.box_xyxy, "white", width=1.2)
    sheet.colorbar(0, Normalize(0, 1), HEAT, "gradient norm, of the panel's largest")
    sheet.legend(0, [line("predicted box", "0.75")])
    return sheet.figure


class _Choice:
    """A layer, and which heads and levels of it: indices, checked."""

    def __init__(self, attention: Sampling | Maps, layer: int, head: int | None, level: int | None = None):
        weights = attention.weights
        layers, heads = weights.shape[0], weights.shape[2]
        if not -layers <= layer < layers:
            raise UserError(f"layer {layer}: expected 0 to {layers - 1}, or -1 to -{layers} from the end")
        self.layer = layer % layers
        self.heads = slice(None) if head is None else slice(_check("head", head, heads), head + 1)
        self.levels = slice(None)
        if level is not None:
            self.levels = slice(_check("level", level, weights.shape[3]), level + 1)


def _check(what: str, index: int, number: int) -> int:
    if not 0 <= index < number:
        raise UserError(f"{what} {index}: expected 0 to {number - 1}")
    return index


def _sampling(attention: Sampling | Maps | None) -> Sampling:
    if not isinstance(attention, Sampling):
        raise UserError("DETR attends to every cell and samples no points: ask for attention instead of sampling")
    return attention


def _panels(
    sampling: Sampling, by: By | None, layer: int, head: int | None, level: int | None
) -> tuple[list[tuple[str, _Choice]], list[int]]:
    """Title and choice of each panel, and the layers in them."""
    layers, _, heads, levels = sampling.weights.shape[:4]
    if by == "layer":
        panels = [(f"decoder layer {i + 1} of {layers}", _Choice(sampling, i, head, level)) for i in range(layers)]
    elif by == "head":
        panels = [(f"head {i}", _Choice(sampling, layer, i, level)) for i in range(heads)]
    elif by == "level":
        panels = [(_level(i, levels), _Choice(sampling, layer, head, i)) for i in range(levels)]
    else:
        panels = [("", _Choice(sampling, layer, head, level))]
    return panels, sorted({choice.layer for _, choice in panels})


def _what(sampling: Sampling, by: By | None, layer: int, head: int | None, level: int | None) -> str:
    """Which points a figure shows."""
    layers, _, heads, levels, points = sampling.weights.shape
    which = [] if by == "layer" else [f"decoder layer {layer % layers + 1} of {layers}"]
    if by != "head":
        which.append(f"all {heads} heads" if head is None else f"head {head}")
    if by != "level":
        which.append(f"all {levels} levels" if level is None else f"level {level}")
    return f" - {', '.join(which)}; {points} points per head and level"


def _window(seen: Inspection, sampling: Sampling, query: int, layers: Iterable[int]) -> Window:
    """The part of the image around some layers' boxes, references and nine tenths of the attention."""
    rows = list(layers)
    locations = sampling.locations[rows, query].reshape(-1, 2)
    weights = sampling.weights[rows, query].reshape(-1)
    order = np.argsort(-weights)
    kept = locations[order][: np.searchsorted(np.cumsum(weights[order]), 0.9 * weights.sum()) + 1]
    references = sampling.references[rows, query]
    half = references[:, 2:] / 2 if references.shape[-1] == 4 else 0
    boxes = seen.boxes_xyxy[rows, query].reshape(-1, 2)
    corners = np.concatenate([kept, boxes, references[:, :2] - half, references[:, :2] + half])
    low, high = corners.min(0), corners.max(0)
    size = np.array(seen.image.size, float)
    margin = 0.02 * size.max()  # boxes at the image's edge stay visible
    side = np.minimum(1.12 * max(*(high - low), 16), size + 2 * margin)  # square, or as the image allows
    low = np.clip((low + high - side) / 2, -margin, size + margin - side)
    return float(low[0]), float(low[1]), float(low[0] + side[0]), float(low[1] + side[1])


def _squared(window: Window) -> Window:
    """The square around a window, with the same center."""
    x0, y0, x1, y1 = window
    half = max(x1 - x0, y1 - y0) / 2
    x, y = (x0 + x1) / 2, (y0 + y1) / 2
    return x - half, y - half, x + half, y + half


def _top(weights: Iterable[np.ndarray]) -> float:
    """Upper end of the colors: one weight in fifty is above it."""
    return float(np.quantile(np.concatenate([w.ravel() for w in weights]), 0.98))


def _scatter(axes: Axes, sampling: Sampling, row: int, choice: _Choice, top: float, *, small: bool = False) -> None:
    """Sampling points, the heaviest on top."""
    locations = sampling.locations[choice.layer, row, choice.heads, choice.levels]  # [h, l, p, 2]
    weights = sampling.weights[choice.layer, row, choice.heads, choice.levels]
    inches = axes.get_window_extent().width / axes.figure.dpi
    scale = 0.14 * inches if small else 1.4
    first = choice.levels.start or 0
    for i in range(weights.shape[1]):
        x, y = locations[:, i].reshape(-1, 2).T
        w = weights[:, i].reshape(-1)
        order = np.argsort(w)
        axes.scatter(
            x[order],
            y[order],
            c=w[order],
            cmap=POINTS,
            vmin=0,
            vmax=top,
            marker=LEVEL_MARKERS[(first + i) % len(LEVEL_MARKERS)],
            s=_SIZES[(first + i) % len(_SIZES)] * scale,
            linewidths=0.3 if small else 0.6,
            edgecolors="black",
            zorder=4,
        )


def _reference(axes: Axes, reference: np.ndarray) -> None:
    """Reference point, and reference box where there is one."""
    if len(reference) == 4:
        x, y, w, h = reference
        add_box(axes, np.array([x - w / 2, y - h / 2, x + w / 2, y + h / 2]), "white", dashed=True, width=1.4)
    add_cross(axes, *reference[:2])


def _heat(axes: Axes, maps: Maps, row: int, choice: _Choice) -> None:
    """An attention map, mean over the heads, each cell where its pixels are."""
    weights = maps.weights[choice.layer, row, choice.heads].mean(0)
    (w, h), (rows, columns) = maps.cell, weights.shape
    show_heat(axes, weights / weights.max(), (0, 0, columns * w, rows * h))


def _explain(
    sheet: Sheet, block: int, sampling: Sampling, choices: Sequence[_Choice], top: float, *, box_color=None
) -> None:
    """Color bar, and a legend of markers."""
    sheet.colorbar(block, Normalize(0, top), POINTS, "attention weight\n(a head's sum to 1)", extend="max")
    levels = sampling.weights.shape[3]
    style = {"linestyle": "none", "markersize": 7, "markeredgecolor": "black", "markerfacecolor": "0.8"}
    handles = [
        Line2D([], [], marker=LEVEL_MARKERS[i % len(LEVEL_MARKERS)], label=_level(i, levels), **style)
        for i in sorted({i for choice in choices for i in range(levels)[choice.levels]})
    ]
    handles.append(cross("reference point"))
    if box_color is not None:
        if sampling.references.shape[-1] == 4 and box_color != "0.5":
            handles.append(line("reference box", "0.4", dashed=True))
        handles.append(line("predicted box", box_color))
    sheet.legend(block, handles)


def _level(level: int, levels: int) -> str:
    """Name of a level; says which are the finest and the coarsest."""
    which = {0: " (finest)", levels - 1: " (coarsest)"} if levels > 1 else {}
    return f"level {level}{which.get(level, '')}"


def _explain_map(sheet: Sheet, block: int, head: int | None, handles: Sequence[Line2D]) -> None:
    which = "mean of the heads" if head is None else f"head {head}"
    sheet.colorbar(block, Normalize(0, 1), HEAT, f"attention, {which},\nof the map's largest")
    sheet.legend(block, handles)


def _smooth(values: np.ndarray, side: int) -> np.ndarray:
    """Means over squares of `2 * side + 1` pixels, edges repeated."""
    for axis in (0, 1):
        padded = np.pad(values, [(side + 1, side) if i == axis else (0, 0) for i in (0, 1)], mode="edge")
        sums = np.cumsum(padded, axis, dtype=np.float64)
        width = 2 * side + 1
        lower = np.take(sums, range(sums.shape[axis] - width), axis)
        values = (np.take(sums, range(width, sums.shape[axis]), axis) - lower) / width
    return values


def _name(seen: Inspection) -> str:
    return type(seen.config).__name__.removesuffix("Config").replace("DeformableDETR", "Deformable DETR")


def _distinct(seen: Inspection, number: int) -> list[int]:
    """The best queries, without those whose box is nearly that of a better one."""
    chosen: list[int] = []
    for query in seen.best(len(seen.scores)):
        if all(box_iou(seen.boxes_xyxy[-1, [query]], seen.boxes_xyxy[-1, [other]])[0, 0] < 0.5 for other in chosen):
            chosen.append(query)
        if len(chosen) == number:
            break
    return chosen


def _nearest(seen: Inspection, box_xyxy: np.ndarray) -> int:
    """The query whose box overlaps most with a box; of those that do not at all, the nearest."""
    boxes = seen.boxes_xyxy[-1]
    distance = np.abs(boxes - box_xyxy).sum(-1) / math.hypot(*seen.image.size)
    return int(np.argmax(box_iou(box_xyxy[None], boxes)[0] - 1e-3 * distance))
