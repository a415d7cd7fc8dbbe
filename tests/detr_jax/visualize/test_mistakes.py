"""What a detector gets wrong: found, named, priced and drawn, on made-up detections of real images."""

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest

from detr_jax import visualize
from detr_jax.config import DataConfig
from detr_jax.data.splits import load_split
from detr_jax.scoring import Scores
from detr_jax.visualize.mistakes import Found, image_mistakes

TRUTH = np.array([[0, 0, 10, 10], [20, 0, 30, 10], [40, 0, 50, 10], [60, 0, 70, 10]], np.float32)
LABELS = np.array([0, 0, 1, 1])
# On the first object; again; the second's box, 6 pixels off; of another class on the third; on nothing; below the
# threshold, on the fourth.
BOXES = np.array(
    [[0, 0, 10, 10], [1, 0, 11, 10], [26, 0, 36, 10], [40, 0, 50, 9], [80, 0, 90, 10], [60, 0, 70, 8]], np.float32
)
FOUND = Found(BOXES, np.array([0, 0, 0, 0, 1, 1]), np.array([0.9, 0.8, 0.75, 0.7, 0.6, 0.3]))


@pytest.fixture(scope="module")
def index(data_dir):
    """Two images of the validation set, the objects above in the first, none in the second."""
    every = load_split(DataConfig(root=str(data_dir / "bccd")), "val")
    none = np.zeros((0, 4), np.float32), np.zeros(0, int)
    return dataclasses.replace(
        every,
        image_ids=every.image_ids[:2],
        sizes=every.sizes[:2],
        names=every.names[:2],
        boxes_xyxy=(TRUTH, none[0]),
        labels=(LABELS, none[1]),
    )


def test_errors_have_names_and_prices():
    errors = {(error.kind, tuple(error.box_xyxy)): error for error in image_mistakes(7, TRUTH, LABELS, FOUND)}
    expected = {
        ("duplicate", 1): (0.8, -math.log(0.2), TRUTH[0], 0),
        ("badly placed", 2): (0.75, -math.log(0.25), TRUTH[1], 0),  # an overlap of 4 of 16
        ("wrong class", 3): (0.7, -math.log(0.3), TRUTH[2], 1),
        ("nothing there", 4): (0.6, -math.log(0.4), None, None),
    }
    for (kind, i), (score, cost, other, label) in expected.items():
        error = errors.pop((kind, tuple(BOXES[i])))
        assert (error.image, error.score) == (7, score)
        assert error.cost == pytest.approx(cost) and error.other_label == label
        np.testing.assert_array_equal(error.other_xyxy, other)
    # Missed: the second, next to which a box is; the third, that no box of its class is near; the fourth, at 0.3.
    second, third, fourth = (errors.pop(("miss", tuple(TRUTH[i]))) for i in (1, 2, 3))
    assert not errors
    assert (second.score, third.score, fourth.score) == (0, 0, 0.3)
    assert second.cost == third.cost == pytest.approx(-math.log(1e-3))
    assert fourth.cost == pytest.approx(-math.log(0.3))
    np.testing.assert_array_equal(second.other_xyxy, BOXES[2])
    assert third.other_xyxy is None
    np.testing.assert_array_equal(fourth.other_xyxy, BOXES[5])


def test_nothing_to_find_and_nothing_found():
    none = Found(np.zeros((0, 4), np.float32), np.zeros(0, int), np.zeros(0))
    assert image_mistakes(0, TRUTH[:0], LABELS[:0], none) == []
    assert [error.kind for error in image_mistakes(0, TRUTH, LABELS, none)] == ["miss"] * 4
    kinds = [error.kind for error in image_mistakes(0, TRUTH[:0], LABELS[:0], FOUND)]
    assert kinds == ["nothing there"] * 5
    assert image_mistakes(0, TRUTH, LABELS, Found(TRUTH, LABELS, np.ones(4))) == []


def test_figure_of_errors(index):
    errors = visualize.find_mistakes(index, [FOUND, FOUND])
    assert [error.cost for error in errors] == sorted((error.cost for error in errors), reverse=True)
    figure = visualize.mistakes_figure(errors, index, number=6)
    headings = [text.get_text() for text in figure.texts]
    assert headings == [
        "3 misses: 2 no box fits, 1 scored too low",
        "9 false positives: 6 nothing there, 1 duplicate, 1 badly placed, 1 wrong class",
    ]
    shown = [axes for axes in figure.axes if axes.get_title()]
    names = index.category_names
    missed = [f"{names[0]}: no box fits", f"{names[1]}: no box fits", f"{names[1]}: at most 0.30"]
    assert [axes.get_title() for axes in shown[:3]] == missed
    assert shown[3].get_title() == f"{names[0]} 0.90: nothing there"  # the most expensive of the second image
    assert shown[3].get_xlabel() == f"{Path(index.name(1)).name}, cost 2.3"
    with pytest.raises(ValueError, match="nothing went wrong"):
        visualize.mistakes_figure([], index)


def test_confused_classes(index):
    counts = visualize.confusion(index, [FOUND, FOUND])
    k = len(index.category_names)
    expected = np.zeros((k + 1, k + 1), int)
    expected[0, 0] = 1
    expected[1, 0] = 1  # the third object
    expected[0, k], expected[1, k] = 1, 1  # the second and the fourth are missed
    expected[k, :2] = 2 + 4, 1 + 1  # the rest of the first image and all of the second
    np.testing.assert_array_equal(counts, expected)
    scores = Scores(*[0.5, 0.6, 0.4, -1.0, 0.3, 0.7], *[0.0] * 6, per_class=dict.fromkeys(index.category_names, 0.25))
    figure = visualize.confusion_figure(counts, index.category_names, scores)
    table, by_size, by_class = figure.axes
    cells = np.array([text.get_text() for text in table.texts]).reshape(k + 1, k + 1)
    assert cells[-1, -1] == "" and (cells.ravel()[:-1] == expected.astype(str).ravel()[:-1]).all()
    shares = np.asarray(table.images[0].get_array())
    np.testing.assert_allclose(shares[0], [1 / 2, 0, 0, 1 / 2])
    assert [text.get_text() for text in by_size.texts] == ["0.500", "none", "0.300", "0.700"]
    assert [text.get_text() for text in by_class.texts] == ["0.250"] * k
    fewer = visualize.confusion_figure(counts, index.category_names, scores, number=2).axes[0]
    assert [label.get_text() for label in fewer.get_yticklabels()] == [*index.category_names[:2], "nothing"]
