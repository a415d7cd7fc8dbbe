"""Test-time augmentation: the merging rule by hand and beside the library's, and detectors with views."""

import json

import numpy as np
import pytest
import tiny
import transformers_weights
from PIL import Image, ImageOps

from detr_jax import detector
from detr_jax.categories import Categories
from detr_jax.config import BackboneConfig, DataConfig, DeformableDETRConfig, TTAConfig
from detr_jax.data.splits import load_split
from detr_jax.errors import DataError
from detr_jax.evaluation import evaluate_checkpoint
from detr_jax.tta import Boxes, flip_boxes, merge


def boxes(*rows):
    """Of (score, label, x0, y0, x1, y1)."""
    table = np.array(rows, float).reshape(-1, 6)
    return Boxes(table[:, 0], table[:, 1].astype(int), table[:, 2:])


def test_overlapping_boxes_of_views_become_their_weighted_mean():
    found = merge([boxes((0.9, 1, 0, 0, 10, 10)), boxes((0.3, 1, 2, 0, 10, 10)), boxes()], iou=0.55)
    np.testing.assert_allclose(found.scores, [1.2 / 3])
    np.testing.assert_allclose(found.boxes_xyxy, [[0.9 * 0 / 1.2 + 0.3 * 2 / 1.2, 0, 10, 10]])
    assert found.labels.tolist() == [1]


def test_other_classes_and_places_stay_apart_best_first():
    views = [boxes((0.5, 1, 0, 0, 10, 10), (0.8, 2, 0, 0, 10, 10)), boxes((0.6, 1, 8, 0, 18, 10))]
    found = merge(views, iou=0.55)
    assert found.labels.tolist() == [2, 1, 1]
    np.testing.assert_allclose(found.scores, [0.4, 0.3, 0.25])
    assert len(merge(views, iou=0.55, top_k=2).scores) == 2


def test_two_boxes_of_one_view_are_two_objects():
    """A crowd: each of them finds its like in the other view."""
    crowd = boxes((0.9, 0, 0, 0, 10, 10), (0.8, 0, 2, 0, 12, 10))
    found = merge([crowd, crowd], iou=0.55)
    np.testing.assert_allclose(found.scores, [0.9, 0.8], rtol=1e-6)
    np.testing.assert_allclose(found.boxes_xyxy, crowd.boxes_xyxy)


def test_nothing_found():
    found = merge([boxes(), boxes()], iou=0.55)
    assert found.boxes_xyxy.shape == (0, 4) and len(found.scores) == 0


@pytest.mark.parity
def test_merging_is_the_librarys():
    """Where no view has two overlapping boxes of a class: one box in each cell of a grid."""
    library = pytest.importorskip("ensemble_boxes", reason="compared where ensemble-boxes is installed")
    rng = np.random.default_rng(0)
    cells = np.stack(np.meshgrid(np.arange(5), np.arange(4)), -1).reshape(-1, 2) * 0.2
    views = []
    for _ in range(4):
        seen = rng.random(len(cells)) < 0.8
        start = (cells + rng.uniform(0, 0.04, cells.shape))[seen]
        size = rng.uniform(0.1, 0.15, start.shape)
        rows = [rng.uniform(0.1, 1, len(start)), rng.integers(0, 3, len(start)), *start.T, *(start + size).T]
        views.append(boxes(*np.stack(rows, -1)))
    expected = library.weighted_boxes_fusion(
        *([getattr(view, name).tolist() for view in views] for name in ("boxes_xyxy", "scores", "labels")),
        iou_thr=0.55,
    )
    found = merge(views, iou=0.55)
    for got, other in zip((found.boxes_xyxy, found.scores, found.labels), expected, strict=True):
        np.testing.assert_allclose(got, other, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("fields", "message"),
    [({"scales": ()}, "expected at least one size"), ({"iou": 1.0}, r"tta\.iou=1\.0: expected at least 0 and less")],
)
def test_impossible_views(fields, message):
    with pytest.raises(ValueError, match=message):
        TTAConfig(**fields)


def test_scales_follow_the_detector():
    assert dict(TTAConfig().views(800)).keys() == {600, 800, 1000, 1200}
    assert TTAConfig().views(240) == [(size, flip) for size in (180, 240, 300, 360) for flip in (False, True)]
    assert TTAConfig(scales=(64,), flip=False).views(240) == [(64, False)]


CONFIG = DeformableDETRConfig(
    backbone=BackboneConfig(depth=18),
    num_classes=3,
    hidden_dim=32,
    num_heads=4,
    encoder_layers=1,
    decoder_layers=1,
    ffn_dim=32,
    num_queries=9,
    num_levels=1,
)


@pytest.fixture(scope="module")
def loaded():
    model = transformers_weights.load(CONFIG, transformers_weights.random_weights(CONFIG))
    cells = Categories((4, 5, 9), ("RBC", "WBC", "platelet"))
    return detector.Loaded(CONFIG, model, cells, "focal", 64, 96, "random weights")


def test_a_detector_merges_its_views(loaded):
    """An image as it is, and mirrored, by hand; one compilation for both."""
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 80, 3), np.uint8))
    plain = detector.Detector(loaded)
    found = [plain(z, threshold=0) for z in (image, ImageOps.mirror(image))]
    views = [
        Boxes(z.scores, z.labels, flip_boxes(z.boxes_xyxy, 80) if i else z.boxes_xyxy) for i, z in enumerate(found)
    ]
    expected = merge(views, 0.55)
    augmented = detector.Detector(loaded, tta=TTAConfig(scales=(64,)))
    got = augmented([image], threshold=0)[0]
    for name in Boxes._fields:
        np.testing.assert_allclose(getattr(got, name), getattr(expected, name), rtol=0, atol=1e-3)
    assert got.image.tobytes() == image.tobytes()


@pytest.fixture(scope="module")
def checkpoint(loaded, tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    loaded.save(folder)
    return folder


@pytest.fixture
def unannotated(tmp_path):
    """Three images of a data set, as COCO gives those of test-dev: without `annotations`."""
    content = json.loads((tiny.DATA / "bccd/annotations/instances_val.json").read_text())
    del content["annotations"]
    content["images"] = content["images"][:3]
    content["categories"] = [{"id": i, "name": n} for i, n in ((4, "RBC"), (5, "WBC"), (9, "platelet"))]
    (tmp_path / "image_info.json").write_text(json.dumps(content))
    return DataConfig(
        root=str(tiny.DATA / "bccd"),
        val_annotations=str(tmp_path / "image_info.json"),
        val_images="images",
        eval_scale=64,
        max_size=96,
        max_source_side=160,
        engine="pillow",
    )


def test_a_set_without_annotations_gives_results_and_no_scores(checkpoint, unannotated, tmp_path, capsys):
    with pytest.raises(ValueError, match=r"no annotations to score with: pass --results FILE"):
        evaluate_checkpoint(str(checkpoint), unannotated)
    plain, augmented = tmp_path / "plain.json", tmp_path / "augmented.json"
    assert evaluate_checkpoint(str(checkpoint), unannotated, results=str(plain)) is None
    printed = capsys.readouterr().out
    assert "no annotations: for detecting alone" in printed and "Average Precision" not in printed
    # One view that is the usual one changes nothing.
    one = TTAConfig(scales=(64,), flip=False, iou=0.99)
    evaluate_checkpoint(str(checkpoint), unannotated, results=str(augmented), tta=one)
    rows = [json.loads(path.read_text()) for path in (plain, augmented)]
    assert len(rows[0]) == 3 * 9 * 3
    for row, other in zip(*rows, strict=True):
        assert row["image_id"] == other["image_id"]
        assert row["score"] == pytest.approx(other["score"], abs=1e-6)


def test_a_set_without_annotations_is_not_trained_on(unannotated):
    with pytest.raises(DataError, match=r"annotations: missing, expected a list\. A set without annotations can only"):
        load_split(unannotated, "val")
