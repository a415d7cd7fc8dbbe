"""Annotations are judged once: the same for training and scoring, said in the report, or refused in one message."""

import json

import numpy as np
import pytest
from PIL import Image

from detr_jax import scoring
from detr_jax.data.coco import load_coco
from detr_jax.errors import DataError

ANNOTATION = {"id": 1, "image_id": 1, "category_id": 1, "bbox": [4, 5, 20, 10]}
IMAGE = {"id": 1, "file_name": "1.png", "height": 40, "width": 60}
OTHER = {"id": 2, "image_id": 1, "category_id": 1, "bbox": [30, 20, 20, 10]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two images of 40 x 60 (h, w)."""
    folder = tmp_path_factory.mktemp("images")
    for i in (1, 2):
        Image.new("RGB", (60, 40)).save(folder / f"{i}.png")
    return folder


def content(annotations=(ANNOTATION,), images=None, categories=None) -> dict:
    records = [{"id": i, "file_name": f"{i}.png", "height": 40, "width": 60} for i in (1, 2)]
    return {
        "images": records if images is None else images,
        "annotations": list(annotations),
        "categories": [{"id": 1, "name": "cup"}] if categories is None else categories,
    }


def write(tmp_path, what, encoding="utf-8"):
    path = tmp_path / "a.json"
    path.write_text(what if isinstance(what, str) else json.dumps(what), encoding=encoding)
    return path


RESULT = {"image_id": 1, "category_id": 1, "bbox": [4, 5, 20, 10], "score": 0.9}


@pytest.mark.parametrize(
    ("crowd", "is_crowd", "text"),
    [(0, 0, 0), (1, 1, 0), (False, 0, 0), (True, 1, 0), (None, 0, 0), ("0", 0, 1), ("1", 1, 1), (1.0, 1, 0)],
)
def test_a_crowd_is_one_in_training_and_in_scoring(crowd, is_crowd, text, folder, tmp_path):
    path = write(tmp_path, content([ANNOTATION | {"iscrowd": crowd}, OTHER]))
    index = load_coco(path, folder)
    assert len(index.labels[0]) == 2 - is_crowd
    truth = index.ground_truth()
    assert [a["iscrowd"] for a in truth["annotations"]] == [is_crowd, 0]
    assert any("1 annotations with iscrowd or area as text" in line for line in index.report) == bool(text)
    # A detection on a crowd is ignored, so that the object that is left has not been found; else one of two has.
    for ground_truth in (truth, path):
        assert (0 if is_crowd else 0.5) == scoring.score(ground_truth, [RESULT]).AR100


@pytest.mark.parametrize(("area", "expected"), [(150, 150.0), (None, 200.0), ("150.5", 150.5), (0, 0.0)])
def test_the_area_is_the_same_in_both(area, expected, folder, tmp_path):
    path = write(tmp_path, content([ANNOTATION | {"area": area}]))
    index = load_coco(path, folder)
    assert [a["area"] for a in index.ground_truth()["annotations"]] == [expected]
    assert scoring.score(path, [RESULT]).AR100 == 1
    assert scoring.score(index.ground_truth(), [RESULT]).AR100 == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"iscrowd": "yes"}, r"annotations\[0\]\.iscrowd: got 'yes', expected 0 or 1"),
        ({"iscrowd": 2}, r"iscrowd: got 2, expected 0 or 1"),
        ({"iscrowd": [0]}, r"iscrowd: got \[0\]"),
        ({"area": "large"}, r"annotations\[0\]\.area: got 'large', expected a number of pixels"),
        ({"area": -1}, r"area: got -1"),
        ({"area": float("nan")}, r"area: got nan"),
        ({"area": 10**400}, r"area: got 1000.*\(401 characters\)"),
        ({"bbox": [1, 2, 10**400, 3]}, r"bbox: got \[1, 2, 1000.*expected 4 finite numbers"),
        ({"bbox": [1, 2, 1e300, 3]}, r"expected 4 finite numbers"),
        ({"bbox": [True, 2, 3, 4]}, r"expected 4 finite numbers"),
        ({"bbox": [1, 2, float("inf"), 4]}, r"expected 4 finite numbers"),
        ({"bbox": {"x": 1}}, r"expected 4 finite numbers"),
        ({"image_id": [1]}, r"image_id: got \[1\], expected the id of one of the 2 images"),
        ({"image_id": True}, r"image_id: got True"),
        ({"category_id": "1"}, r"category_id: got '1', expected one of the 1 categories 1"),
    ],
)
def test_what_means_nothing_is_refused_by_both(changes, message, folder, tmp_path):
    path = write(tmp_path, content([ANNOTATION | changes, OTHER]))
    with pytest.raises(DataError, match=message) as error:
        load_coco(path, folder)
    assert "a.json" in str(error.value) and "--data.on-bad-annotation skip" in str(error.value)
    with pytest.raises(DataError, match=message):
        scoring.score(path, [RESULT])
    index = load_coco(path, folder, on_bad_annotation="skip")
    assert len(index.labels[0]) == len(index.ground_truth()["annotations"]) == 1
    assert any("1 bad annotations skipped" in line for line in index.report)


@pytest.mark.parametrize("box", [[4, 5, 0, 10], [4, 5, -2, 10], [4, 5, 20, 0], [4, 5, 1e-9, 10], [60, 5, 0, 10]])
def test_a_box_without_area_is_neither_trained_nor_scored(box, folder, tmp_path):
    path = write(tmp_path, content([ANNOTATION | {"bbox": box}, OTHER]))
    index = load_coco(path, folder)
    assert len(index.labels[0]) == len(index.ground_truth()["annotations"]) == 1
    assert "1 boxes without area dropped, from training and scoring" in index.report
    found = RESULT | {"bbox": OTHER["bbox"]}
    assert scoring.score(path, [found]).AR100 == scoring.score(index.ground_truth(), [found]).AR100 == 1


def test_a_byte_order_mark_is_read_by_both(folder, tmp_path):
    path = write(tmp_path, content(), encoding="utf-8-sig")
    assert len(load_coco(path, folder)) == 2
    assert scoring.score(path, [RESULT]).AR100 == 1


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("[" * 100_000, r"a\.json: not JSON"),
        ('{"images": ' + "[" * 100_000, r"a\.json: not JSON"),
        ("\0\1", r"a\.json: not JSON"),
        ("9" * 5000, r"a\.json: not JSON"),
        (
            content(images=[IMAGE | {"file_name": 3}]),
            r"images\[0\]\.file_name: got 3, expe",
        ),
        (
            content(images=[IMAGE | {"file_name": "a\0b"}]),
            r"images\[0\]\.file_name: got 'a",
        ),
        (
            content(images=[IMAGE | {"id": 2**63}]),
            r"images\[0\]\.id: got 92.*",
        ),
        (
            content(images=[IMAGE | {"id": -1}]),
            r"id: got -1, expected an integ",
        ),
        (content(images=[IMAGE | {"height": 10**400}]), r"\(height, width\): got"),
        (content(images=[IMAGE | {"height": True}]), r"\(height, width\): got"),
        (content(categories=[{"id": -3, "name": "a"}]), r"categories\[0\]\.id: got -3"),
        (content(categories=[{"id": 2**64, "name": "a"}]), r"categories\[0\]\.id: got 18446744073709551616"),
        (content(categories=[{"id": 1, "name": None}]), r"categories\[0\]\.name: got None, expected text"),
        (content(categories=[{"id": 1, "name": " \n"}]), r"categories\[0\]\.name: got ' .n', expected text"),
        (content(categories=[3]), r"categories\[0\]: no id, name"),
        (content(images=[None]), r"images\[0\]: no id, file_name"),
    ],
)
def test_what_cannot_be_an_annotations_file_is_one_message(what, message, folder, tmp_path):
    path = write(tmp_path, what)
    for read in (lambda: load_coco(path, folder), lambda: scoring.score(path, [])):
        with pytest.raises(DataError, match=message):
            read()


def test_a_file_without_annotations_cannot_be_scored(folder, tmp_path):
    path = write(tmp_path, {name: values for name, values in content().items() if name != "annotations"})
    with pytest.raises(DataError, match=r"a\.json: annotations: missing"):
        scoring.score(path, [])


def test_the_largest_ids_survive(folder, tmp_path):
    largest = 2**63 - 1
    images = [{"id": largest, "file_name": "1.png", "height": 40, "width": 60}]
    annotation = ANNOTATION | {"image_id": largest, "category_id": largest}
    index = load_coco(write(tmp_path, content([annotation], images, [{"id": largest, "name": "a"}])), folder)
    assert index.image_ids.tolist() == [largest] == list(index.category_ids)
    assert scoring.score(index.ground_truth(), [RESULT | {"image_id": largest, "category_id": largest}]).AR100 == 1


def test_a_name_is_one_line(folder, tmp_path):
    index = load_coco(write(tmp_path, content(categories=[{"id": 1, "name": "tea\r\n cup\t"}])), folder)
    assert index.category_names == ("tea cup",)
    assert any("1 category names read with single spaces, such as 'tea" in line for line in index.report)


def test_a_file_name_with_line_breaks_is_read(folder, tmp_path):
    Image.new("RGB", (60, 40)).save(folder / "a\nb.png")
    images = [{"id": 1, "file_name": "a\nb.png", "height": 40, "width": 60}]
    index = load_coco(write(tmp_path, content(images=images)), folder)
    assert np.asarray(index.image(0)).shape == (40, 60, 3)
