"""How boxes come about: refinement layer by layer, two-stage proposals, and which query got which object."""

import jax.numpy as jnp
import matplotlib
import numpy as np
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from detr_jax.config import DINOConfig, LossConfig
from detr_jax.errors import UserError
from detr_jax.matching import match, match_cost
from detr_jax.visualize.inspection import Inspection, Sampling
from detr_jax.visualize.panels import (
    HEAT,
    INK,
    Sheet,
    Window,
    add_box,
    add_cross,
    add_text,
    color_of,
    cross,
    line,
    show_heat,
    show_image,
    whole,
)

_COSTS = matplotlib.colormaps["cividis"]


def refinement_figure(seen: Inspection, query: int | None = None) -> Figure:
    """A query's box after each decoder layer, beside that of the layer before.

    The first panel is where it starts: the encoder's proposal of a two-stage model, else the reference point of
    Deformable DETR; DETR has neither, and starts with the first layer.

    Args:
        seen: what a detector did.
        query: which; `None` takes the best detection.

    Raises:
        ValueError: no such query.
    """
    query = seen.best()[0] if query is None else seen.check_query(query)
    boxes = list(seen.boxes_xyxy[:, query])
    start = seen.decoder.references[0, query] if isinstance(seen.decoder, Sampling) else None
    low, high = np.min(boxes, 0)[:2], np.max(boxes, 0)[2:]
    if start is not None:
        half = start[2:] / 2 if len(start) == 4 else 0
        low, high = np.minimum(low, start[:2] - half), np.maximum(high, start[:2] + half)
    window = square((*low, *high), seen.image.size, 1.25)
    titles = [
        f"layer {i}: {seen.categories.names[p.argmax()]} {p.max():.2f}"
        for i, p in enumerate(seen.probabilities[:, query], 1)
    ]
    shown = [None, *boxes] if start is not None else boxes
    titles = ["start: " + ("proposal" if seen.proposals else "reference point")] * (start is not None) + titles
    columns = len(shown) if len(shown) <= 4 else -(-len(shown) // 2)
    sheet = Sheet(
        [f"{seen.caption(query)} - its box, decoder layer by layer"], [window] * len(shown), columns, bar=False
    )
    before = None
    color = color_of(int(seen.labels[query]))
    for axes, box, title in zip(sheet.panels[0], shown, titles, strict=True):
        show_image(axes, seen.image, window, title)
        if box is None and start is not None:
            add_cross(axes, *start[:2])
            if len(start) == 4:
                box = np.concatenate([start[:2] - start[2:] / 2, start[:2] + start[2:] / 2])
        if before is not None:
            add_box(axes, before, "white", dashed=True, width=1.4)
        if box is not None:
            add_box(axes, box, color)
        before = box
    sheet.legend(0, [line("box", color), line("box before", "0.4", dashed=True)])
    return sheet.figure


def proposals_figure(seen: Inspection, *, number: int = 30) -> Figure:
    """What the encoder of a two-stage model proposed: the score of every cell of each level, and the best boxes.

    Crosses are the cells whose proposals became queries. A cell's score says how much it looks like any object.

    Args:
        seen: of a two-stage Deformable DETR.
        number: boxes to draw, best first.

    Raises:
        ValueError: not a two-stage model.
    """
    proposals = seen.proposals
    if proposals is None:
        raise UserError("this model is not two-stage: its queries are learned, its encoder proposes nothing")
    window = whole(seen.image)
    panels = 1 + len(proposals.shapes)
    heading = f"encoder proposals: {len(proposals.chosen)} queries of {len(proposals.scores)} tokens"
    sheet = Sheet([heading], [window] * panels, panels if panels <= 3 else -(-panels // 2))
    best = proposals.chosen[np.argsort(-proposals.scores[proposals.chosen], kind="stable")][:number]
    top = float(proposals.scores.max())
    axes = sheet.panels[0][0]
    show_image(axes, seen.image, window, f"the best {len(best)} proposals", gray=True)
    for token in best[::-1]:
        add_box(axes, proposals.boxes_xyxy[token], HEAT(0.25 + 0.75 * proposals.scores[token] / top), width=1.3)
    starts = np.cumsum([0, *(h * w for h, w in proposals.shapes)])
    for level, (axes, (h, w)) in enumerate(zip(sheet.panels[0][1:], proposals.shapes, strict=True)):
        show_image(
            axes, seen.image, window, f"level {level}: cells of {proposals.cells[level, 0]:.0f} pixels", gray=True
        )
        scores = proposals.scores[starts[level] : starts[level + 1]].reshape(h, w)
        width, height = proposals.cells[level]
        show_heat(axes, scores / top, (0, 0, w * width, h * height))
        inside = proposals.chosen[(proposals.chosen >= starts[level]) & (proposals.chosen < starts[level + 1])]
        for token in inside - starts[level]:
            add_cross(axes, (token % w + 0.5) * width, (token // w + 0.5) * height, size=5)
    sheet.colorbar(0, Normalize(0, top), HEAT, "score of a proposal")
    sheet.legend(0, [cross("became a query")])
    return sheet.figure


def matching_figure(
    seen: Inspection,
    true_boxes_xyxy: np.ndarray,
    true_labels: np.ndarray,
    config: LossConfig | None = None,
    *,
    number: int = 30,
) -> Figure:
    """Which query got which object: boxes joined on the image, and a table of the query and cost after each layer.

    The matching is that of training, exact, each layer on its own. Queries in bold are those that the object has after
    the last layer too.

    Args:
        seen: what a detector did.
        true_boxes_xyxy: [t, 4], pixels of the image.
        true_labels: int [t].
        config: weights of the costs; `None` takes those of the paper.
        number: objects in the table, the most expensive first.

    Raises:
        ValueError: there is no object.
    """
    if not len(true_labels):
        raise UserError("matching: the image has no objects in the annotations, there is nothing to match")
    queries, costs = matched(seen, true_boxes_xyxy, true_labels, config)
    order = np.argsort(-costs[-1], kind="stable")[:number]
    window, layers = whole(seen.image), len(queries)
    names = [f"{rank} {seen.categories.names[true_labels[target]]}" for rank, target in enumerate(order, 1)]
    size = float(np.clip(230 / len(order), 4.5, 9))
    margin = 0.0085 * size * max(map(len, names)) / 0.55 + 0.2  # for the names, in columns of 0.55 inches
    width = 0.55 * (margin + layers) * seen.image.height / 4.4
    heading = f"matching of {len(true_labels)} objects with {seen.logits.shape[1]} queries"
    sheet = Sheet([heading], [window, (0, 0, width, seen.image.height)], 2)
    image, table = sheet.panels[0]
    show_image(image, seen.image, window, f"after the last layer: {len(order)} objects, the most expensive first")
    for rank, target in enumerate(order, 1):
        box, truth = seen.boxes_xyxy[-1, queries[-1, target]], np.asarray(true_boxes_xyxy[target])
        if queries[-1, target] < 0:
            continue
        add_box(image, truth, "white", dashed=True, width=1.2)
        add_box(image, box, color_of(int(true_labels[target])), width=1.5)
        centers = [(truth[:2] + truth[2:]) / 2, (box[:2] + box[2:]) / 2]
        image.plot(*np.transpose(centers), color="white", linewidth=1.2, zorder=4)
        add_text(image, float(centers[0][0]), float(centers[0][1]), str(rank))
    shown = costs[:, order].T
    table.imshow(shown, cmap=_COSTS, aspect="auto", norm=(norm := Normalize(float(shown.min()), float(shown.max()))))
    size *= table.get_position().height * sheet.figure.get_figheight() / 4.4
    for row, target in enumerate(order):
        for layer in range(layers):
            query = queries[layer, target]
            color = "black" if norm(shown[row, layer]) > 0.55 else "white"
            weight = "bold" if query == queries[-1, target] else "normal"
            style = {"ha": "center", "va": "center", "fontsize": size, "color": color, "weight": weight}
            table.text(layer, row, str(query) if query >= 0 else "-", **style)
    table.set_yticks(range(len(order)), names, fontsize=size)
    table.tick_params(axis="y", direction="in", pad=-4, length=0)
    for text in table.get_yticklabels():
        text.set_horizontalalignment("left")
    # The names have a column of their own, left of the layers.
    table.set_xlim(-0.5 - margin, layers - 0.5)
    table.set_xticks(range(layers), [f"{i + 1}" for i in range(layers)], fontsize=9)
    table.set_xlabel("decoder layer", fontsize=9, color=INK, labelpad=1)
    table.set_title("query (bold: also in the end)", fontsize=8.5, color=INK, pad=4)
    sheet.colorbar(0, norm, _COSTS, "matching cost")
    sheet.legend(0, [line("object", "0.4", dashed=True), line("its query's box", color_of(int(true_labels[order[0]])))])
    return sheet.figure


def matched(
    seen: Inspection, true_boxes_xyxy: np.ndarray, true_labels: np.ndarray, config: LossConfig | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Each object's query after each layer, int [layers, t] (-1: none), and what the pair costs, float [layers, t]."""
    if config is None:
        config = LossConfig.detr() if seen.classification == "softmax" else LossConfig()
        config = LossConfig.dino() if isinstance(seen.config, DINOConfig) else config
    boxes = np.asarray(true_boxes_xyxy, np.float32) / np.tile(np.array(seen.image.size, np.float32), 2)
    boxes = np.concatenate([(boxes[:, :2] + boxes[:, 2:]) / 2, boxes[:, 2:] - boxes[:, :2]], 1)
    labels = np.asarray(true_labels, np.int32)
    logits, predicted = seen.logits[:, None], seen.boxes_cxcywh[:, None]
    outputs = {
        "pred_logits": logits[-1],
        "pred_boxes": predicted[-1],
        "aux_outputs": {"pred_logits": logits[:-1], "pred_boxes": predicted[:-1]},
    }
    targets = {"boxes_cxcywh": boxes[None], "labels": labels[None], "num_boxes": np.array([len(labels)])}
    queries = np.asarray(match(outputs, targets, config)[0])[:, 0]
    each = jnp.asarray(logits[:, 0]), jnp.asarray(predicted[:, 0])
    costs = np.asarray(match_cost(*each, jnp.asarray(labels), jnp.asarray(boxes), config))
    picked = np.take_along_axis(costs, np.maximum(queries, 0)[..., None], -1)[..., 0]
    return queries, np.where(queries >= 0, picked, 0.0)


def square(box_xyxy, size: tuple[int, int], factor: float) -> Window:
    """A square around a box, `factor` times its longer side, moved into the image as far as it fits."""
    x0, y0, x1, y1 = map(float, box_xyxy)
    side = factor * max(x1 - x0, y1 - y0, 16)
    low = [(x0 + x1 - side) / 2, (y0 + y1 - side) / 2]
    margin = 0.02 * max(size)
    for i in (0, 1):
        if side <= size[i] + 2 * margin:
            low[i] = min(max(low[i], -margin), size[i] + margin - side)
    return low[0], low[1], low[0] + side, low[1] + side
