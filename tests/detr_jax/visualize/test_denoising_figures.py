"""Figures of denoising queries, and of the matching's stability."""

import dataclasses
import types

import dino_cases
import numpy as np
import pytest
import tiny
import transformers_weights

from detr_jax.categories import Categories
from detr_jax.checkpoints.load import Loaded
from detr_jax.data.splits import load_split
from detr_jax.detector import Detector
from detr_jax.visualize import (
    Inspector,
    denoising_figure,
    instability,
    match_objects,
    proposals_figure,
    reconstruct,
    stability_figure,
)
from detr_jax.visualize.mistakes import read_image
from detr_jax.visualize.prediction_figures import matched

pytestmark = pytest.mark.usefixtures("short_resnet")

CELLS = Categories.contiguous({1: "RBC", 2: "WBC", 3: "Platelets"})


@pytest.fixture(scope="module")
def index():
    return load_split(tiny.config().data, "val")


@pytest.fixture(scope="module")
def detector():
    config = dataclasses.replace(
        dino_cases.SMALL, num_classes=3, hidden_dim=32, decoder_layers=1, num_queries=40, num_levels=3
    )
    model = transformers_weights.load(config, transformers_weights.random_weights(config))
    return Detector(Loaded(config, model, CELLS, "focal", 64, 96, "random weights"))


def test_reconstruction_is_of_the_images_objects(detector, index):
    image, boxes, labels = read_image(index, 0), index.boxes_xyxy[0], index.labels[0]
    found = reconstruct(detector, image, boxes, labels)
    # One group for an image of more objects than denoising queries: a positive and a negative of each.
    assert len(labels) > 7 and len(found.target) == 2 * len(labels)
    assert sorted(found.target[found.positive]) == sorted(found.target[~found.positive]) == list(range(len(labels)))
    centers = (found.noisy_boxes_xyxy[:, :2] + found.noisy_boxes_xyxy[:, 2:]) / 2
    truth = boxes[found.target]
    sizes = truth[:, 2:] - truth[:, :2]
    offset = np.abs(centers - (truth[:, :2] + truth[:, 2:]) / 2) / sizes
    # Sides move by up to half of the size, those of negatives by up to all of it; the center by the mean of two sides.
    assert offset[found.positive].max() <= 0.501 and offset[~found.positive].max() > 0.5
    before, after = found.mean_iou()
    assert 0.2 < before < 0.8 and 0 <= after <= 1
    assert ((found.scores > 0) & (found.scores < 1)).all()
    figure = denoising_figure(found, number=3)
    assert [axes.get_title() for axes in figure.axes] == [
        "positives: to be put right",
        "negatives: to be called background",
    ]
    assert f"mean IoU {before:.2f} -> {after:.2f}" in figure.texts[0].get_text()


def test_objects_without_queries_and_other_models_are_refused(detector, index):
    with pytest.raises(ValueError, match="the image has no objects in the annotations"):
        reconstruct(detector, read_image(index, 0), np.zeros((0, 4)), np.zeros(0, int))
    plain = dataclasses.replace(detector.config, denoising_queries=0)
    with pytest.raises(ValueError, match="this model has no denoising queries"):
        reconstruct(types.SimpleNamespace(config=plain), read_image(index, 0), index.boxes_xyxy[0], index.labels[0])


def test_what_the_inspector_sees_of_dino(detector, index):
    seen = Inspector(detector)(read_image(index, 0), [(100, 100)])
    assert seen.proposals is not None and len(seen.proposals.chosen) == 40
    chosen = seen.proposals.scores[seen.proposals.chosen]
    assert (np.diff(chosen[chosen > 0]) <= 1e-6).all()  # best first; those that may not propose have none
    np.testing.assert_allclose(seen.proposals.scores.max(), chosen.max(), rtol=1e-6)
    assert len(proposals_figure(seen).axes) == 5
    # The same matching by another way.
    boxes, labels = index.boxes_xyxy[0], index.labels[0]
    queries, _ = matched(seen, boxes, labels)
    (objects,) = match_objects(detector, index, [0])
    assert (objects >= 0).sum() == len(labels)
    np.testing.assert_array_equal(np.flatnonzero(objects >= 0), np.sort(queries[-1]))
    np.testing.assert_array_equal(objects[queries[-1]], np.arange(len(labels)))


def test_instability_counts_queries_whose_object_changed():
    before = [np.array([0, -1, 1, -1]), np.array([-1, 0, -1, -1])]
    after = [np.array([1, -1, 0, -1]), np.array([-1, -1, 0, -1])]
    assert instability(before, before) == 0 and instability(before, after) == 2
    figure = stability_figure({"with": {1: before, 2: after, 3: after}, "without": {1: before, 3: before}})
    lines = {line.get_label(): line.get_xydata().tolist() for line in figure.axes[0].lines}
    assert lines == {"with": [[2, 2], [3, 0]], "without": [[3, 0]]}
    with pytest.raises(ValueError, match="run: 1 checkpoint; expected two or more"):
        stability_figure({"run": {1: before}})
