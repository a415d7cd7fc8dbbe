"""Exports of some BCCD images as the common tools write them: `python tests/exports.py FOLDER` makes all of them."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

BCCD = Path(__file__).parent / "data/bccd"


def contents(number: int) -> dict[str, dict[str, Any]]:
    """The annotations of the first images of each split: three quarters are of training."""
    counts = {"train": number * 3 // 4, "val": number - number * 3 // 4}
    result = {}
    for split, count in counts.items():
        content = json.loads((BCCD / f"annotations/instances_{split}.json").read_text())
        images = content["images"][:count]
        ids = {image["id"] for image in images}
        boxes = [a for a in content["annotations"] if a["image_id"] in ids]
        result[split] = content | {"images": images, "annotations": boxes}
    return result


def copy(images: list[dict[str, Any]], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for image in images:
        shutil.copy(BCCD / "images" / image["file_name"], folder)


def roboflow(root: Path, number: int = 20) -> None:
    """COCO with a supercategory as class 0, and classes from 1."""
    for split, content in contents(number).items():
        folder = root / {"train": "train", "val": "valid"}[split]
        copy(content["images"], folder)
        content["categories"] = [{"id": 0, "name": "cells", "supercategory": "none"}, *content["categories"]]
        (folder / "_annotations.coco.json").write_text(json.dumps(content))


def cvat(root: Path, number: int = 20) -> None:
    """COCO 1.0 of one task: no splits."""
    both = contents(number)
    images = [image for content in both.values() for image in content["images"]]
    boxes = [a for content in both.values() for a in content["annotations"]]
    copy(images, root / "images")
    (root / "annotations").mkdir(parents=True)
    content = both["train"] | {"images": images, "annotations": [a | {"id": i} for i, a in enumerate(boxes, 1)]}
    (root / "annotations/instances_default.json").write_text(json.dumps(content))


def yolo(root: Path, number: int = 20) -> None:
    """Roboflow's and Ultralytics' layout: `data.yaml`, `train/images`, `train/labels`, `valid/...`."""
    names = []
    for split, content in contents(number).items():
        folder = root / {"train": "train", "val": "valid"}[split]
        copy(content["images"], folder / "images")
        (folder / "labels").mkdir()
        ids = [c["id"] for c in content["categories"]]
        names = [c["name"] for c in content["categories"]]
        for image in content["images"]:
            w, h, lines = image["width"], image["height"], []
            for x, y, bw, bh, label in [
                (*a["bbox"], ids.index(a["category_id"]))
                for a in content["annotations"]
                if a["image_id"] == image["id"]
            ]:
                lines.append(f"{label} {(x + bw / 2) / w:.8f} {(y + bh / 2) / h:.8f} {bw / w:.8f} {bh / h:.8f}")
            (folder / "labels" / image["file_name"]).with_suffix(".txt").write_text("\n".join(lines))
    lines = ["train: ../train/images", "val: ../valid/images", f"nc: {len(names)}", f"names: {json.dumps(names)}"]
    (root / "data.yaml").write_text("\n".join(lines))


def voc(root: Path, number: int = 20) -> None:
    """Pascal's own layout: `Annotations`, `ImageSets/Main`, `JPEGImages`."""
    (root / "Annotations").mkdir(parents=True)
    (root / "ImageSets/Main").mkdir(parents=True)
    for split, content in contents(number).items():
        copy(content["images"], root / "JPEGImages")
        name_of = {c["id"]: c["name"] for c in content["categories"]}
        for image in content["images"]:
            objects = ""
            for a in (a for a in content["annotations"] if a["image_id"] == image["id"]):
                x, y, w, h = a["bbox"]
                corners = {"xmin": x, "ymin": y, "xmax": x + w, "ymax": y + h}
                box = "".join(f"<{tag}>{value}</{tag}>" for tag, value in corners.items())
                name = name_of[a["category_id"]]
                objects += f"<object><name>{name}</name><difficult>0</difficult><bndbox>{box}</bndbox></object>"
            size = f"<size><width>{image['width']}</width><height>{image['height']}</height><depth>3</depth></size>"
            text = f"<annotation><filename>{image['file_name']}</filename>{size}{objects}</annotation>"
            (root / "Annotations" / image["file_name"]).with_suffix(".xml").write_text(text)
        stems = [Path(image["file_name"]).stem for image in content["images"]]
        (root / "ImageSets/Main" / f"{split}.txt").write_text("\n".join(stems))


FORMATS: dict[str, Callable[..., None]] = {"roboflow": roboflow, "cvat": cvat, "yolo": yolo, "voc": voc}

if __name__ == "__main__":
    for name, write in FORMATS.items():
        write(Path(sys.argv[1]) / name)
