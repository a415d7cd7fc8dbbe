"""Roboflow, CVAT, YOLO and Pascal VOC say the same of the same images; what is wrong in them is named with its line."""

from pathlib import Path

import exports
import numpy as np
import pytest

from detr_jax.categories import Categories
from detr_jax.config import DataConfig
from detr_jax.data.splits import load_split
from detr_jax.data.summary import summarize
from detr_jax.errors import DataError


def boxes_by_name(root: Path, split) -> dict[str, list]:
    """For each image, its boxes with the names of their classes, in order."""
    index = load_split(DataConfig(root=str(root)), split)
    return {
        Path(name).name: sorted(
            (*box, index.category_names[i]) for box, i in zip(boxes.round(2).tolist(), labels.tolist(), strict=True)
        )
        for name, boxes, labels in zip(index.names, index.boxes_xyxy, index.labels, strict=True)
    }


@pytest.fixture(scope="module")
def roots(tmp_path_factory):
    root = tmp_path_factory.mktemp("exports")
    for name, write in exports.FORMATS.items():
        write(root / name, 8)
    return root


def test_all_formats_say_the_same(roots):
    for split, count in (("train", 6), ("val", 2)):
        expected = boxes_by_name(roots / "roboflow", split)
        assert len(expected) == count and sum(map(len, expected.values())) > 20
        for name in ("yolo", "voc"):
            found = boxes_by_name(roots / name, split)
            assert found.keys() == expected.keys()
            for image, rows in expected.items():
                # 8 decimals of relative coordinates, and rounding to 0.01 on either side.
                np.testing.assert_allclose(
                    [row[:4] for row in found[image]], [row[:4] for row in rows], atol=0.011, err_msg=image
                )
                assert [row[4] for row in found[image]] == [row[4] for row in rows]
    both = boxes_by_name(roots / "cvat", "train")
    assert both == boxes_by_name(roots / "roboflow", "train") | boxes_by_name(roots / "roboflow", "val")
    assert "the same images" in load_split(DataConfig(root=str(roots / "cvat")), "val").report[-1]


def test_classes_of_another_format_are_found_by_name(roots):
    model = Categories((1, 2, 3), ("RBC", "WBC", "Platelets"))
    indexes = [load_split(DataConfig(root=str(roots / name)), "val", model) for name in ("roboflow", "yolo", "voc")]
    for index in indexes:
        assert index.category_names == model.names
        assert (
            np.bincount(np.concatenate(index.labels)).tolist()
            == np.bincount(np.concatenate(indexes[0].labels)).tolist()
        )


def test_the_summary_counts_and_names_classes_without_boxes(roots):
    text = summarize({"train": load_split(DataConfig(root=str(roots / "roboflow")), "train")})
    assert "6 images" in text and "classes without boxes" in text and "cells" in text
    index = load_split(DataConfig(root=str(roots / "roboflow")), "train")
    (row,) = [line.split() for line in text.splitlines() if " RBC " in line]
    label = index.category_names.index("RBC")
    assert int(row[3]) == sum((labels == label).sum() for labels in index.labels) == sum(map(int, row[4:]))


def write_yolo(root: Path, lines: str) -> DataConfig:
    exports.yolo(root, 4)
    (file,) = sorted((root / "valid/labels").glob("*.txt"))
    file.write_text(lines)
    return DataConfig(root=str(root))


def test_lines_of_yolo(tmp_path):
    data = write_yolo(tmp_path / "polygon", "0 0.1 0.1 0.3 0.1 0.2 0.5\n\n1 0.5 0.5 0.2 0.2\n")
    index = load_split(data, "val")
    relative = index.boxes_xyxy[0] / np.tile(index.sizes[0][::-1], 2)
    np.testing.assert_allclose(relative, [[0.1, 0.1, 0.3, 0.5], [0.4, 0.4, 0.6, 0.6]], atol=1e-6)
    assert "1 polygons taken as the boxes around them" in index.report
    (tmp_path / "polygon/valid/labels" / Path(index.names[0]).with_suffix(".txt").name).unlink()
    assert "1 images have no label file: taken as images without objects" in load_split(data, "val").report
    data = write_yolo(tmp_path / "bad", "0 0.1 0.1 0.2\n7 0.5 0.5 0.2 0.2\nx\n0 320 240 20 20\n")
    with pytest.raises(DataError) as error:
        load_split(data, "val")
    for line, problem in enumerate(("a polygon", "class: got 7", "expected numbers", "relative to the image"), 1):
        assert f".txt:{line}: " in str(error.value) and problem in str(error.value)


def test_objects_of_voc(tmp_path):
    exports.voc(tmp_path / "voc", 4)
    (tmp_path / "voc/Annotations").rename(tmp_path / "voc/kept")
    (tmp_path / "voc/Annotations").mkdir()
    for file in (tmp_path / "voc/kept").iterdir():
        text = file.read_text().replace("<difficult>0", "<difficult>1", 1).replace("<object>", "<object>", 1)
        (tmp_path / "voc/Annotations" / file.name).write_text(text)
    index = load_split(DataConfig(root=str(tmp_path / "voc")), "train")
    assert sum(a["iscrowd"] for a in index.ground_truth()["annotations"]) == 3
    first = next((tmp_path / "voc/Annotations").iterdir())
    first.write_text(first.read_text().replace("<xmin>", "<xmin>x", 1))
    with pytest.raises(DataError, match=r"\.xml: object\[0\]: got name '\w+' and corners \['x"):
        for split in ("train", "val"):
            load_split(DataConfig(root=str(tmp_path / "voc")), split)


def test_other_folders_say_what_they_look_like(tmp_path):
    for name, content, message in (
        ("obj.data", "", "CVAT"),
        ("x.json", '{"shapes": []}', "LabelMe"),
        ("y.json", '[{"annotations": []}]', "Label Studio"),
    ):
        folder = tmp_path / name.replace(".", "_")
        folder.mkdir()
        (folder / name).write_text(content)
        with pytest.raises(DataError, match=message):
            load_split(DataConfig(root=str(folder)), "train")
    (tmp_path / "deep/inner/images").mkdir(parents=True)
    (tmp_path / "deep/inner/annotations.json").write_text("{}")
    with pytest.raises(DataError, match=r"--data\.root .*deep/inner"):
        load_split(DataConfig(root=str(tmp_path / "deep")), "train")
