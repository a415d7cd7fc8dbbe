"""The data set's index: layouts, category ids, and the documented outcome of each bad input."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO

from detr_jax.categories import Categories
from detr_jax.config import DataConfig
from detr_jax.data.classes import relabel
from detr_jax.data.coco import load_coco
from detr_jax.data.splits import find_split, load_split
from detr_jax.errors import DataError

GRADIENT = np.arange(40 * 60, dtype=np.uint8).reshape(40, 60)
RGB = np.stack([GRADIENT, GRADIENT.T.reshape(40, 60), 255 - GRADIENT], -1)


def write(root: Path, *, images=None, annotations=None, categories=None, text=None) -> tuple[Path, Path]:
    """A folder of 40x60 (h, w) images with two boxes, changed as asked."""
    (root / "images").mkdir(parents=True, exist_ok=True)
    content = {
        "images": [{"id": i, "file_name": f"{i}.jpg", "height": 40, "width": 60} for i in (5, 3)],
        "annotations": [
            {"id": 0, "image_id": 3, "category_id": 70, "bbox": [10, 5, 20, 10], "area": 200, "iscrowd": 0},
            {"id": 1, "image_id": 5, "category_id": 7, "bbox": [50, 30, 30, 20], "area": 600, "iscrowd": 0},
        ],
        "categories": [{"id": 70, "name": "cup"}, {"id": 7, "name": "boat"}],
    }
    for key, value in {"images": images, "annotations": annotations, "categories": categories}.items():
        if value is not None:
            content[key] = value
    for record in content["images"]:
        if "file_name" in record:
            Image.fromarray(RGB).save(root / "images" / record["file_name"])
    (root / "annotations.json").write_text(json.dumps(content) if text is None else text)
    return root / "annotations.json", root / "images"


def annotation(**changes):
    return {"id": 9, "image_id": 3, "category_id": 7, "bbox": [1, 2, 3, 4], "iscrowd": 0, **changes}


def test_index_of_real_images(data_dir):
    index = load_split(DataConfig(root=str(data_dir / "coco_open")), "train")
    content = json.loads((data_dir / "coco_open/annotations/instances_train2017.json").read_text())
    assert len(index) == 8 and index.num_classes == 80 and index.category_ids[-1] == 90
    assert index.category_names[0] == "person"
    assert "1 crowd annotations left out of training" in index.report
    assert index.max_boxes == max(map(len, index.labels)) == 33
    row = index.image_ids.tolist().index(30)
    expected = [a for a in content["annotations"] if a["image_id"] == 30 and not a["iscrowd"]]
    np.testing.assert_array_equal(
        [index.category_ids[label] for label in index.labels[row]], [a["category_id"] for a in expected]
    )
    corners = np.array([a["bbox"] for a in expected], np.float32)
    corners[:, 2:] += corners[:, :2]
    np.testing.assert_array_equal(index.boxes_xyxy[row], np.clip(corners, 0, [640, 428, 640, 428]))


def test_labels_are_sorted_category_ids_and_boxes_are_clipped(tmp_path):
    index = load_coco(*write(tmp_path))
    assert index.category_ids == (7, 70) and index.category_names == ("boat", "cup")
    assert index.image_ids.tolist() == [5, 3]
    assert [labels.tolist() for labels in index.labels] == [[0], [1]]
    np.testing.assert_array_equal(index.boxes_xyxy[0], [[50, 30, 60, 40]])
    assert Path(index.name(0)).name == "5.jpg" and index.encoded(0)[:2] == b"\xff\xd8"


def test_categories_of_a_checkpoint(tmp_path):
    paths = write(tmp_path)
    index = relabel(load_coco(*paths), Categories((70, 7, 99), ("cup", "boat", "kite")))
    assert index.category_ids == (70, 7, 99) and index.category_names == ("cup", "boat", "kite")
    assert [labels.tolist() for labels in index.labels] == [[1], [0]]
    with pytest.raises(DataError, match=r"1 boxes of category 'boat' \(id 7\), which the model does not have.* 70 cup"):
        relabel(load_coco(*paths), Categories((70,), ("cup",)))
    index = relabel(load_coco(*paths), Categories((70,), ("cup",)), "skip")
    assert [labels.tolist() for labels in index.labels] == [[], [0]]
    assert [a["category_id"] for a in index.ground_truth()["annotations"]] == [70]
    assert "1 bad classes skipped" in index.report[-1]


def test_classes_are_those_of_the_model_by_name_whatever_their_ids(tmp_path):
    index = load_coco(*write(tmp_path))  # 7 boat, 70 cup
    shifted = relabel(index, Categories((1, 2, 7), ("Cup", "boat", "kite")))
    assert shifted.category_ids == (70, 7, 71) and [x.tolist() for x in shifted.labels] == [[1], [0]]
    assert "2 mapped by name: boat (2 -> 7), cup (1 -> 70)" in shifted.report[-1]
    assert [c["id"] for c in shifted.ground_truth()["categories"]] == [70, 7, 71]
    by_id = relabel(index, Categories((7, 70), ("class 7", "class 70")))
    assert [x.tolist() for x in by_id.labels] == [[0], [1]] and "2 taken by id" in by_id.report[-1]
    for names in (("cup", "boat"), ("boat", "plate")):
        with pytest.raises(DataError, match=r"id 70 is 'cup' in the data and '(boat|plate)' in the model"):
            relabel(index, Categories((7, 70), names), "skip")


def test_ground_truth_for_pycocotools(tmp_path, data_dir):
    index = load_split(DataConfig(root=str(data_dir / "coco_open")), "val")
    coco = COCO()
    coco.dataset = index.ground_truth()  # pyright: ignore[reportAttributeAccessIssue]
    coco.createIndex()
    assert sorted(coco.getImgIds()) == sorted(index.image_ids.tolist())
    assert len(coco.anns) == 47 and min(coco.anns) == 1 and sum(a["iscrowd"] for a in coco.anns.values()) == 1
    flat = annotation(bbox=[1, 2, 0, 4])
    paths = write(tmp_path, annotations=[annotation(), flat, annotation(iscrowd=1), annotation(image_id=77)])
    truth = load_coco(*paths, on_bad_annotation="skip").ground_truth()
    assert [a["id"] for a in truth["annotations"]] == [1, 2]
    assert [a["area"] for a in truth["annotations"]] == [12, 12]


@pytest.mark.parametrize(
    ("annotations", "images"),
    [
        ("annotations/instances_train2017.json", "train2017"),
        ("annotations/instances_train.json", "images"),
        ("annotations/instances_train.json", "train"),
        ("annotations.json", "images"),
    ],
)
def test_layouts(tmp_path, annotations, images):
    (tmp_path / annotations).parent.mkdir(exist_ok=True)
    (tmp_path / annotations).touch()
    (tmp_path / images).mkdir()
    assert find_split(DataConfig(root=str(tmp_path)), "train") == (tmp_path / annotations, tmp_path / images)


def test_explicit_paths_win(tmp_path):
    write(tmp_path)
    (tmp_path / "mine.json").touch()
    (tmp_path / "mine").mkdir()
    data = DataConfig(root=str(tmp_path), val_annotations="mine.json", val_images=str(tmp_path / "mine"))
    assert find_split(data, "val") == (tmp_path / "mine.json", tmp_path / "mine")
    assert find_split(data, "train") == (tmp_path / "annotations.json", tmp_path / "images")


def test_nothing_found_lists_what_was_looked_for(tmp_path):
    with pytest.raises(DataError) as error:
        find_split(DataConfig(root=str(tmp_path)), "val")
    for part in ("instances_val2017.json (no such file)", "val2017/ (no such folder)", "--", "data.val_annotations"):
        assert part == "--" or part in str(error.value)


def test_one_set_for_both_splits_is_reported(tmp_path):
    write(tmp_path)
    report = load_split(DataConfig(root=str(tmp_path)), "val").report
    assert "training and validation are the same images" in report


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"text": '{"images": [{"id": 1'}, r"annotations\.json: not JSON"),
        ({"text": "[]"}, r"images: got NoneType, expected a list"),
        ({"text": '{"images": [], "annotations": {}, "categories": []}'}, r"annotations: got dict, expected a list"),
        ({"images": []}, r"images: got an empty list, expected at least one"),
        ({"categories": []}, r"categories: got an empty list"),
        ({"categories": [{"id": 7}]}, r"categories\[0\]: no name; expected id, name"),
        ({"categories": [{"id": 7, "name": "a"}] * 2}, r"categories\[1\]\.id: got 7 a second time"),
        ({"images": [{"id": 3, "file_name": "3.jpg"}]}, r"images\[0\]: no width, height"),
        (
            {"images": [{"id": 3, "file_name": "3.jpg", "height": 40, "width": 60}] * 2},
            r"images\[1\]\.id: got 3 a second time",
        ),
        (
            {"images": [{"id": "3", "file_name": "3.jpg", "height": 40, "width": 60}]},
            r"images\[0\]\.id: got '3', expected an integer",
        ),
        (
            {"images": [{"id": 3, "file_name": "3.jpg", "height": 0, "width": 60}]},
            r"\(height, width\): got \(0, 60\), expected positive",
        ),
    ],
)
def test_malformed_file_is_an_error_even_when_skipping(tmp_path, changes, message):
    with pytest.raises(DataError, match=message):
        load_coco(*write(tmp_path, **changes), on_bad_image="skip", on_bad_annotation="skip")


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (annotation(image_id=77), r"\.image_id: got 77, expected the id of one of the 2 images"),
        (annotation(category_id=1), r"\.category_id: got 1, expected one of the 2 categories 7, 70"),
        (annotation(bbox=[60, 0, 5, 5]), r"\.bbox: .*\[60, 0, 5, 5\], entirely outside its image of 40x60"),
        (annotation(bbox=[0, -9, 5, 9]), r"entirely outside"),
        (annotation(bbox=[0, float("nan"), 5, 9]), r"\.bbox: got .* expected 4 finite numbers"),
        (annotation(bbox=[0, 1, 5]), r"expected 4 finite numbers"),
        (annotation(bbox=None), r"expected 4 finite numbers"),
        ({"id": 4, "image_id": 3, "bbox": [1, 2, 3, 4]}, r": no category_id; expected"),
    ],
)
def test_bad_annotation(tmp_path, bad, message):
    paths = write(tmp_path, annotations=[annotation(), bad])
    with pytest.raises(DataError, match=rf"annotations\[1\].*{message}") as error:
        load_coco(*paths)
    assert "--data.on-bad-annotation skip" in str(error.value) and "annotations.json" in str(error.value)
    index = load_coco(*paths, on_bad_annotation="skip")
    assert sum(map(len, index.labels)) == 1
    assert any("1 bad annotations skipped" in line for line in index.report)
    assert len(index.ground_truth()["annotations"]) == 1


def test_dropped_and_kept_are_reported(tmp_path):
    boxes = [annotation(), annotation(iscrowd=1), annotation(bbox=[1, 1, 0, 5]), annotation(bbox=[1, 1, -2, 5])]
    index = load_coco(*write(tmp_path, annotations=boxes))
    assert sum(map(len, index.labels)) == 1 and index.boxes_xyxy[0].shape == (0, 4)
    assert index.report[1:] == (
        "1 crowd annotations left out of training",
        "2 boxes without area dropped, from training and scoring",
        "1 images without boxes kept",
    )


def cut_off(path: Path):
    path.write_bytes(path.read_bytes()[:-200])


def rotate_90(path: Path, size=(40, 60)):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", size).save(path, exif=exif)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (Path.unlink, r"3\.jpg: missing; expected as file_name of image 3"),
        (cut_off, r"3\.jpg: not an image, or a damaged one: .*[Pp]remature end"),
        (lambda path: path.write_bytes(b""), r"3\.jpg: not an image"),
        (lambda path: path.write_text("<html>"), r"3\.jpg: not an image.*cannot identify"),
        (lambda path: Image.new("RGB", (30, 40)).save(path), r"size \(h, w\): got \(40, 30\), expected .* \(40, 60\)"),
        (lambda path: Image.new("RGB", (40, 60)).save(path), r"got \(60, 40\), expected the annotated \(40, 60\)"),
        (lambda path: Image.new("F", (60, 40)).save(path, "TIFF"), r"3\.jpg: not an image.*mode F"),
    ],
)
def test_bad_image(tmp_path, damage, message):
    paths = write(tmp_path)
    damage(tmp_path / "images/3.jpg")
    with pytest.raises(DataError, match=message) as error:
        load_coco(*paths)
    assert "--data.on-bad-image skip" in str(error.value)
    index = load_coco(*paths, on_bad_image="skip")
    assert index.image_ids.tolist() == [5] and len(index.ground_truth()["annotations"]) == 1
    assert any("1 bad images skipped" in line for line in index.report)
    damage(tmp_path / "images/5.jpg")
    with pytest.raises(DataError, match="all 2 were skipped"):
        load_coco(*paths, on_bad_image="skip")


def test_many_problems_make_one_error(tmp_path):
    paths = write(tmp_path, annotations=[annotation(image_id=i) for i in range(100, 125)])
    (tmp_path / "images/3.jpg").unlink()
    with pytest.raises(DataError) as error:
        load_coco(*paths)
    assert str(error.value).count("image_id") == 10 and "and 15 more" in str(error.value)
    assert "3.jpg: missing" in str(error.value)


def test_complete_files_without_an_end_marker_are_decoded_to_tell(tmp_path):
    paths = write(tmp_path)
    with (tmp_path / "images/3.jpg").open("ab") as file:
        file.write(b"trailing bytes of a camera")
    index = load_coco(*paths)
    assert len(index) == 2


def decoded(index, i=0):
    return np.asarray(index.image(i))


def one_file(tmp_path, image: Image.Image, name: str, height=40, width=60, **save):
    paths = write(tmp_path, images=[{"id": 3, "file_name": name, "height": height, "width": width}], annotations=[])
    image.save(tmp_path / "images" / name, **save)
    return load_coco(*paths)


def test_exif_rotation_must_fit_the_annotated_size(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # shown after a quarter turn clockwise
    rotated = one_file(tmp_path, Image.fromarray(RGB), "a.png", height=60, width=40, exif=exif)
    np.testing.assert_array_equal(decoded(rotated), np.rot90(RGB, -1))
    assert "1 images turned upright, by EXIF's orientation" in rotated.report
    with pytest.raises(DataError, match=r"b\.png: size .*: EXIF's orientation turns it.*exiftool -Orientation="):
        one_file(tmp_path, Image.fromarray(RGB), "b.png", exif=exif)


@pytest.mark.parametrize("mode", ["L", "P", "CMYK", "RGBA", "LA", "1"])
def test_modes_become_rgb(tmp_path, mode):
    image = Image.fromarray(RGB).convert("L").convert("LA") if mode == "LA" else Image.fromarray(RGB).convert(mode)
    index = one_file(tmp_path, image, "a.tiff" if mode == "CMYK" else "a.png")
    np.testing.assert_array_equal(decoded(index), np.asarray(image.convert("RGB")))


def test_cmyk_jpeg_becomes_rgb(tmp_path):
    index = one_file(tmp_path, Image.fromarray(RGB).convert("CMYK"), "a.jpg")
    assert decoded(index).shape == (40, 60, 3)


def test_sixteen_bits_are_scaled(tmp_path):
    index = one_file(tmp_path, Image.fromarray(GRADIENT.astype(np.uint16) * 257), "a.png")
    np.testing.assert_array_equal(decoded(index), np.repeat(GRADIENT[..., None], 3, -1))


def test_file_damaged_later_is_named(tmp_path):
    index = load_coco(*write(tmp_path))
    cut_off(tmp_path / "images/5.jpg")
    with pytest.raises(DataError, match=r"5\.jpg: .*[Pp]remature end"):
        decoded(index)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")  # inside tensorflow_datasets
def test_tfds(tmp_path, data_dir):
    tfds = pytest.importorskip("tensorflow_datasets")
    pytest.importorskip("array_record")
    folder = data_dir / "coco_open/val2017"
    content = json.loads((data_dir / "coco_open/annotations/instances_val2017.json").read_text())
    names = ["boat", "cup", "other"]

    class TinyDetection(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            objects = {
                "bbox": tfds.features.BBoxFeature(),
                "label": tfds.features.ClassLabel(names=names),
                "is_crowd": np.bool_,
            }
            features = {
                "image": tfds.features.Image(encoding_format="jpeg"),
                "image/id": np.int64,
                "objects": tfds.features.Sequence(objects),
            }
            return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

        def _split_generators(self, dl_manager):
            return {"validation": self._generate_examples()}

        def _generate_examples(self):
            for image in content["images"]:
                h, w = image["height"], image["width"]
                objects = []
                for a in (a for a in content["annotations"] if a["image_id"] == image["id"]):
                    x, y, bw, bh = a["bbox"]
                    box = tfds.features.BBox(y / h, x / w, min((y + bh) / h, 1.0), min((x + bw) / w, 1.0))
                    objects.append({"bbox": box, "label": a["category_id"] % 3, "is_crowd": bool(a["iscrowd"])})
                yield (
                    image["file_name"],
                    {"image": folder / image["file_name"], "image/id": image["id"], "objects": objects},
                )

    TinyDetection(data_dir=tmp_path, file_format="array_record").download_and_prepare()
    data = DataConfig(tfds="tiny_detection", tfds_dir=str(tmp_path))
    index = load_split(data, "val")
    reference = load_split(DataConfig(root=str(data_dir / "coco_open")), "val")
    assert sorted(index.image_ids.tolist()) == sorted(reference.image_ids.tolist())
    assert index.category_ids == (0, 1, 2) and index.category_names == tuple(names)
    for i, image_id in enumerate(index.image_ids.tolist()):
        j = reference.image_ids.tolist().index(image_id)
        assert index.encoded(i) == reference.encoded(j)
        assert index.sizes[i].tolist() == reference.sizes[j].tolist()
        # float32 of relative coordinates times 640: 2^-24 * 640 = 4e-5, twice for the sum of corner and extent
        np.testing.assert_allclose(index.boxes_xyxy[i], reference.boxes_xyxy[j], atol=1e-4)
        assert (index.labels[i] == np.array(reference.category_ids)[reference.labels[j]] % 3).all()
    truth = index.ground_truth()
    assert len(truth["annotations"]) == 47 and sum(a["iscrowd"] for a in truth["annotations"]) == 1
    with pytest.raises(DataError, match="splits: got validation, expected train"):
        load_split(data, "train")
    assert load_split(data, "val", Categories((1, 2, 3), tuple(names))).category_ids == (0, 1, 2)
    with pytest.raises(DataError, match="not_there"):
        load_split(DataConfig(tfds="not_there", tfds_dir=str(tmp_path)), "val")
    info = tmp_path / "tiny_detection/1.0.0/dataset_info.json"
    info.write_text(info.read_text().replace("array_record", "tfrecord"))
    shutil.copytree(tmp_path / "tiny_detection", tmp_path / "other/tiny_detection")
    with pytest.raises(DataError, match=r"(?s)file format: got tfrecord, expected array_record.*convert_format"):
        load_split(DataConfig(tfds="tiny_detection", tfds_dir=str(tmp_path / "other")), "val")
