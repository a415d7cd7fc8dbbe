"""Figures of a detector's inside: what is drawn is what was inspected, where it was. No model is needed for that."""

import dataclasses

import numpy as np
import pytest
from matplotlib import pyplot
from matplotlib.collections import PathCollection
from matplotlib.patches import Rectangle
from PIL import Image
from scipy.optimize import linear_sum_assignment

from detr_jax import visualize
from detr_jax.categories import Categories
from detr_jax.config import DeformableDETRConfig, DETRConfig
from detr_jax.visualize.attention_figures import LEVEL_MARKERS, POINTS
from detr_jax.visualize.inspection import Inspection, Maps, Proposals, Saliency, Sampling
from detr_jax.visualize.panels import color_of
from detr_jax.visualize.prediction_figures import matched

IMAGE = Image.fromarray(np.random.default_rng(5).integers(0, 256, (120, 160, 3), np.uint8))
CATEGORIES = Categories((1, 2), ("cat", "dog"))
LAYERS, QUERIES, HEADS, LEVELS, POINTS_EACH = 2, 5, 3, 2, 4


def weights_of(rng, *shape, axes):
    weights = rng.uniform(0.1, 1, shape)
    return (weights / weights.sum(axes, keepdims=True)).astype(np.float32)


def sampling(rng, layers, rows, size):
    references = rng.uniform([40, 30, 20, 10], [120, 90, 60, 40], (layers, rows, size if size == 4 else 4))[..., :size]
    locations = references[:, :, None, None, None, :2] + rng.normal(
        0, 12, (layers, rows, HEADS, LEVELS, POINTS_EACH, 2)
    )
    weights = weights_of(rng, layers, rows, HEADS, LEVELS, POINTS_EACH, axes=(-1, -2))
    return Sampling(references.astype(np.float32), locations.astype(np.float32), weights)


def inspection(seed=0, *, boxes=4, points=2, two_stage=True) -> Inspection:
    """A Deformable DETR's, made up."""
    rng = np.random.default_rng(seed)
    centers = rng.uniform(0.3, 0.7, (QUERIES, 2))
    boxes_cxcywh = np.concatenate([centers, rng.uniform(0.1, 0.3, (QUERIES, 2))], -1) + np.zeros((LAYERS, 1, 1))
    boxes_cxcywh[0] += 0.02
    # Level 0 of 6 x 8 cells of 20 pixels, level 1 of 3 x 4.
    proposals = Proposals(
        rng.uniform(0, 60, (60, 4)).cumsum(-1).astype(np.float32),
        rng.uniform(0, 1, 60).astype(np.float32),
        np.array([0, 9, 47, 48, 59]),
        ((6, 8), (3, 4)),
        np.array([(20, 20), (40, 40)], np.float32),
    )
    return Inspection(
        image=IMAGE,
        categories=CATEGORIES,
        classification="focal",
        config=DeformableDETRConfig(
            num_heads=HEADS, hidden_dim=96, num_levels=LEVELS, encoder_layers=1, decoder_layers=LAYERS
        ),
        logits=rng.normal(0, 2, (LAYERS, QUERIES, 2)).astype(np.float32),
        boxes_cxcywh=boxes_cxcywh.astype(np.float32),
        decoder=sampling(rng, LAYERS, QUERIES, boxes),
        points=rng.uniform(20, 100, (points, 2)).astype(np.float32),
        encoder=sampling(rng, 1, points * LEVELS, 2) if points else None,
        proposals=proposals if two_stage else None,
    )


def detr_inspection(points=2) -> Inspection:
    rng = np.random.default_rng(7)
    maps = [
        Maps(weights_of(rng, n, q, HEADS, 3, 4, axes=(-1, -2)), (42.0, 42.0)) for n, q in ((LAYERS, 5), (1, points))
    ]
    config = DETRConfig(num_heads=HEADS, hidden_dim=96, encoder_layers=1, decoder_layers=LAYERS)
    return dataclasses.replace(
        inspection(3, points=points, two_stage=False),
        config=config,
        classification="softmax",
        logits=rng.normal(size=(LAYERS, QUERIES, 3)).astype(np.float32),
        decoder=maps[0],
        encoder=maps[1] if points else None,
    )


def panels(figure):
    return [axes for axes in figure.axes if axes.get_title()]


def scatters(axes):
    return [artist for artist in axes.collections if isinstance(artist, PathCollection)]


def boxes(axes, *, dashed=False):
    """x0, y0, x1, y1 and color of each box that is not only an edge."""
    lines = [p for p in axes.patches if isinstance(p, Rectangle)]
    found = [p for p in lines if (p.get_linestyle() not in ("-", "solid")) == dashed and any(p.get_edgecolor()[:3])]
    return [((*p.get_xy(), p.get_x() + p.get_width(), p.get_y() + p.get_height()), p.get_edgecolor()) for p in found]


def crosses(axes):
    return np.array([line.get_xydata()[0] for line in axes.lines if line.get_marker() == "+"])


def heat(axes):
    """Values and extent of the topmost image."""
    return np.asarray(axes.images[-1].get_array()), axes.images[-1].get_extent()


def check_layout(figure):
    """No text, legend or panel covers another or leaves the figure."""
    renderer = figure.canvas.get_renderer()
    figure.canvas.draw()
    parts = [*figure.texts, *figure.legends, *figure.axes]
    places = [part.get_tightbbox(renderer) for part in parts]
    for place in places:
        assert place.x0 >= -1 and place.y0 >= -1
        assert place.x1 <= figure.bbox.width + 1 and place.y1 <= figure.bbox.height + 1
    for i, place in enumerate(places):
        for other in places[:i]:
            width = min(place.x1, other.x1) - max(place.x0, other.x0)
            height = min(place.y1, other.y1) - max(place.y0, other.y0)
            assert width <= 1 or height <= 1
    assert not pyplot.get_fignums()  # nothing is left in pyplot's global state


def test_sampling_points():
    seen = inspection()
    figure = visualize.sampling_figure(seen, 3)
    check_layout(figure)
    image, enlarged = panels(figure)
    for axes in (image, enlarged):
        assert len(scatters(axes)) == LEVELS
        for level, points in enumerate(scatters(axes)):
            order = np.argsort(points.get_array())
            assert (order == np.arange(len(order))).all()  # the heaviest is drawn last, on top
            weights = seen.decoder.weights[1, 3, :, level].ravel()
            np.testing.assert_array_equal(points.get_array(), np.sort(weights))
            expected = seen.decoder.locations[1, 3, :, level].reshape(-1, 2)[np.argsort(weights)]
            np.testing.assert_array_equal(points.get_offsets(), expected)
            assert points.get_cmap() == POINTS
        np.testing.assert_allclose(crosses(axes), [seen.decoder.references[1, 3, :2]])
        x, y, w, h = seen.decoder.references[1, 3]
        (reference,) = {place for place, _ in boxes(axes, dashed=True)}
        np.testing.assert_allclose(reference, (x - w / 2, y - h / 2, x + w / 2, y + h / 2), rtol=1e-5)
        predicted, color = boxes(axes)[-1]
        np.testing.assert_allclose(predicted, seen.boxes_xyxy[1, 3], rtol=1e-5)
        assert color[:3] == color_of(seen.labels[3])
    assert image.get_xlim() == (0, 160) and image.get_ylim() == (120, 0)
    x0, x1, y1, y0 = *enlarged.get_xlim(), *enlarged.get_ylim()
    assert x0 <= predicted[0] and predicted[2] <= x1 and y0 <= predicted[1] and predicted[3] <= y1
    assert x1 - x0 < 160 and abs((x1 - x0) - (y1 - y0)) < 20
    heading = figure.texts[0].get_text()
    assert heading.startswith(f"query 3: {seen.caption(3).split(': ')[1]} - decoder layer 2 of 2, all 3 heads")
    names = [text.get_text() for text in figure.legends[0].get_texts()]
    assert names == ["level 0 (finest)", "level 1 (coarsest)", "reference point", "reference box", "predicted box"]
    shapes = [handle.get_marker() for handle in figure.legends[0].legend_handles[:2]]
    assert shapes == list(LEVEL_MARKERS[:2])


@pytest.mark.parametrize(
    ("options", "titles", "number"),
    [
        ({"by": "layer"}, ["decoder layer 1 of 2", "decoder layer 2 of 2"], 24),
        ({"by": "head", "layer": 0}, ["head 0", "head 1", "head 2"], 8),
        ({"by": "level"}, ["level 0 (finest)", "level 1 (coarsest)"], 12),
        ({"head": 1}, ["image", "enlarged"], 8),
        ({"level": 1, "head": 0}, ["image", "enlarged"], 4),
    ],
)
def test_sampling_points_in_parts(options, titles, number):
    seen = inspection(boxes=2)
    figure = visualize.sampling_figure(seen, 0, **options)
    check_layout(figure)
    assert [axes.get_title() for axes in panels(figure)] == titles
    for i, axes in enumerate(panels(figure)):
        assert sum(len(points.get_offsets()) for points in scatters(axes)) == number
        layer = i if options.get("by") == "layer" else options.get("layer", 1)
        drawn = np.concatenate([points.get_offsets() for points in scatters(axes)])
        every = seen.decoder.locations[layer, 0].reshape(-1, 2)
        assert all((point == every).all(-1).any() for point in drawn)
        assert not boxes(axes, dashed=True)  # a reference point alone
    if "head" in options:
        heads = seen.decoder.locations[1, 0, options["head"]]
        wanted = heads[slice(None) if "level" not in options else options["level"]].reshape(-1, 2)
        np.testing.assert_array_equal(np.sort(drawn, 0), np.sort(wanted, 0))


def test_best_query_is_the_default():
    seen = inspection()
    best = int(np.argmax(seen.scores))
    assert visualize.sampling_figure(seen).texts[0].get_text().startswith(f"query {best}: ")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"query": 5}, "query 5: expected 0 to 4"),
        ({"layer": 2}, "layer 2: expected 0 to 1, or -1 to -2 from the end"),
        ({"head": 3}, "head 3: expected 0 to 2"),
        ({"level": -1}, "level -1: expected 0 to 1"),
    ],
)
def test_what_the_model_does_not_have(options, message):
    with pytest.raises(ValueError, match=message):
        visualize.sampling_figure(inspection(), **options)


def test_wrong_models():
    with pytest.raises(ValueError, match="DETR attends to every cell and samples no points"):
        visualize.sampling_figure(detr_inspection())
    with pytest.raises(ValueError, match="not two-stage"):
        visualize.proposals_figure(inspection(two_stage=False))
    with pytest.raises(ValueError, match="no points, or no encoder to inspect"):
        visualize.encoder_figure(inspection(points=0))
    with pytest.raises(ValueError, match="no objects in the annotations"):
        visualize.matching_figure(inspection(), np.zeros((0, 4)), np.zeros(0, int))


def test_encoder_side_by_side():
    models = detr_inspection(), inspection()
    models = models[0], dataclasses.replace(models[1], points=models[0].points)
    figure = visualize.encoder_figure(models, level=1)
    check_layout(figure)
    first, second, third, fourth = panels(figure)
    for i, axes in enumerate((first, second)):
        values, extent = heat(axes)
        weights = models[0].encoder.weights[0, i].mean(0)
        np.testing.assert_allclose(values, weights / weights.max(), rtol=1e-6)
        assert extent == [0, 4 * 42, 3 * 42, 0]
        np.testing.assert_allclose(crosses(axes), [models[0].points[i]])
        assert axes.get_xlim() == (0, 160)
    for i, axes in enumerate((third, fourth)):
        token = LEVELS * i + 1
        np.testing.assert_allclose(crosses(axes), [models[1].encoder.references[0, token]])
        drawn = np.concatenate([points.get_offsets() for points in scatters(axes)])
        expected = models[1].encoder.locations[0, token].reshape(-1, 2)
        np.testing.assert_array_equal(np.sort(drawn, 0), np.sort(expected, 0))
    headings = [text.get_text() for text in figure.texts]
    assert headings == [
        "DETR: encoder self-attention, layer 1 of 1",
        "Deformable DETR: encoder self-attention, layer 1 of 1, of the cells of level 1",
    ]


def test_attention_side_by_side():
    models = inspection(), detr_inspection()
    # DETR's query 4 - i has the box of Deformable DETR's query i.
    models = models[0], dataclasses.replace(models[1], boxes_cxcywh=models[0].boxes_cxcywh[:, ::-1])
    figure = visualize.attention_figure(models, [1, 2])
    check_layout(figure)
    titles = [axes.get_title() for axes in panels(figure)]
    assert titles == [*map(models[0].caption, (1, 2)), *map(models[1].caption, (3, 2))]
    values, _ = heat(panels(figure)[2])
    weights = models[1].decoder.weights[-1, 3].mean(0)
    np.testing.assert_allclose(values, weights / weights.max(), rtol=1e-6)
    one_head, _ = heat(panels(visualize.attention_figure(models[1], [3], head=2))[0])
    np.testing.assert_allclose(
        one_head, models[1].decoder.weights[-1, 3, 2] / models[1].decoder.weights[-1, 3, 2].max()
    )
    with pytest.raises(ValueError, match="queries is empty"):
        visualize.attention_figure(models, [])


def test_saliency():
    norms = np.zeros((5, 60, 80), np.float32)
    for i in range(5):
        norms[i, 10 * i + 5, 20] = 1
    figure = visualize.saliency_figure(Saliency(IMAGE, "query 1: cat 0.50", np.array([10, 20, 60, 80.0]), norms))
    check_layout(figure)
    first, *rest = panels(figure)
    assert first.get_title() == "image"
    assert [axes.get_title() for axes in rest] == ["center x", "center y", "width", "height", "score"]
    for i, axes in enumerate(rest):
        values, extent = heat(axes)
        assert extent == [0, 160, 120, 0] and values.max() == 1
        # The mean over 3 x 3 pixels of one that has it all.
        assert (values > 0.5).sum() == 9 and (values[10 * i + 4 : 10 * i + 7, 19:22] > 0.5).all()
        np.testing.assert_allclose(boxes(axes)[0][0], (10, 20, 60, 80))


def test_refinement():
    seen = inspection()
    figure = visualize.refinement_figure(seen, 2)
    check_layout(figure)
    titles = [axes.get_title() for axes in panels(figure)]
    p = seen.probabilities[:, 2]
    name = CATEGORIES.names
    assert titles == ["start: proposal", *(f"layer {i + 1}: {name[p[i].argmax()]} {p[i].max():.2f}" for i in (0, 1))]
    x, y, w, h = seen.decoder.references[0, 2]
    stages = [(x - w / 2, y - h / 2, x + w / 2, y + h / 2), *seen.boxes_xyxy[:, 2]]
    for i, axes in enumerate(panels(figure)):
        np.testing.assert_allclose(boxes(axes)[-1][0], stages[i], rtol=1e-5)
        if i:
            np.testing.assert_allclose(boxes(axes, dashed=True)[0][0], stages[i - 1], rtol=1e-5)
    assert len(panels(visualize.refinement_figure(detr_inspection()))) == LAYERS  # no start


def test_proposals():
    seen = inspection()
    figure = visualize.proposals_figure(seen, number=3)
    check_layout(figure)
    best, *levels = panels(figure)
    order = sorted(seen.proposals.chosen, key=lambda token: -seen.proposals.scores[token])[:3]
    drawn = [place for place, _ in boxes(best)]
    np.testing.assert_allclose(drawn, seen.proposals.boxes_xyxy[order[::-1]], rtol=1e-5)
    # Tokens 0, 9 and 47 are the cells (0, 0), (1, 1) and (7, 5) of level 0; 48 and 59 (0, 0) and (3, 2) of level 1.
    np.testing.assert_allclose(crosses(levels[0]), [(10, 10), (30, 30), (150, 110)])
    np.testing.assert_allclose(crosses(levels[1]), [(20, 20), (140, 100)])
    values, extent = heat(levels[1])
    np.testing.assert_allclose(values, seen.proposals.scores[48:].reshape(3, 4) / seen.proposals.scores.max())
    assert extent == [0, 160, 120, 0]


def test_matching():
    seen = inspection()
    truth = seen.boxes_xyxy[1, [4, 1, 3]] + 2.0
    labels = np.array([0, 1, 1])
    queries, costs = matched(seen, truth, labels)
    size = np.array([160, 120] * 2)
    for layer in range(LAYERS):
        # Deformable DETR, appendix A.4: 2 * focal + 5 * L1 - 2 * GIoU.
        p = 1 / (1 + np.exp(-seen.logits[layer].astype(float)))
        focal = -0.25 * (1 - p) ** 2 * np.log(p) + 0.75 * p**2 * np.log(1 - p)
        cost = np.zeros((3, QUERIES))
        for t, q in np.ndindex(cost.shape):
            a, b = truth[t] / size, seen.boxes_xyxy[layer, q] / size
            low, high = np.maximum(a[:2], b[:2]), np.minimum(a[2:], b[2:])
            both = np.prod(np.maximum(high - low, 0))
            union = np.prod(a[2:] - a[:2]) + np.prod(b[2:] - b[:2]) - both
            hull = np.prod(np.maximum(a[2:], b[2:]) - np.minimum(a[:2], b[:2]))
            centered = [np.concatenate([(c[:2] + c[2:]) / 2, c[2:] - c[:2]]) for c in (a, b)]
            l1 = np.abs(centered[0] - centered[1]).sum()
            cost[t, q] = 2 * focal[q, labels[t]] + 5 * l1 - 2 * (both / union - (hull - union) / hull)
        rows, columns = linear_sum_assignment(cost)
        np.testing.assert_array_equal(queries[layer], columns)
        np.testing.assert_allclose(costs[layer], cost[rows, columns], atol=1e-4)  # float32 against float64
    figure = visualize.matching_figure(seen, truth, labels)
    check_layout(figure)
    table = next(axes for axes in figure.axes if axes.get_title().startswith("query"))
    order = np.argsort(-costs[1])
    assert [text.get_text() for text in table.texts] == [str(q) for t in order for q in queries[:, t]]
    names = [label.get_text() for label in table.get_yticklabels()]
    assert names == [f"{i} {CATEGORIES.names[labels[t]]}" for i, t in enumerate(order, 1)]
