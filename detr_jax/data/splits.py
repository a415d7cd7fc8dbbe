"""Which files are the training and the validation set of a data set, in which format, and how they are read.

| format       | what tells it                                                                                         |
|--------------|-------------------------------------------------------------------------------------------------------|
| COCO         | `annotations/instances_train2017.json`, `annotations/instances_train.json` or `annotations.json`      |
| Roboflow     | `train/_annotations.coco.json` and `valid/_annotations.coco.json`                                     |
| CVAT         | `annotations/instances_default.json` (COCO 1.0)                                                       |
| Label Studio | `result.json` and `images/` (COCO)                                                                    |
| YOLO         | `data.yaml`, or `classes.txt` with `images/` and `labels/`                                            |
| Pascal VOC   | `ImageSets/Main/train.txt`, or XML in `train/` and `valid/`, in `Annotations/`, or beside the images  |

A data set without splits is both: training and validation are the same images, and the report says it.
"""

import dataclasses
from typing import Any

from etils.epath import Path

from detr_jax.categories import Categories
from detr_jax.config import DataConfig
from detr_jax.data.classes import relabel
from detr_jax.data.coco import load_coco
from detr_jax.data.index import DatasetIndex, Split
from detr_jax.data.voc import load_voc
from detr_jax.data.yolo import load_yolo
from detr_jax.errors import DataError

_NAMES = {"train": ("train", "Train"), "val": ("val", "valid", "validation", "Validation")}
_XML_FOLDERS = ("Annotations", "annotations", "")


def load_split(
    data: DataConfig,
    split: Split,
    categories: Categories | None = None,
    *,
    annotated: bool = True,
    cache: Path | None = None,
) -> DatasetIndex:
    """Reads the training or validation set that `data` describes.

    Args:
        data: which files, and what to do with bad ones.
        split: `train` or `val`.
        categories: of a model, which then gives the labels; `None` takes the categories of the annotations.
        annotated: the set must have annotations.
        cache: see `load_coco`.

    Raises:
        DataError: not found, or bad content: see the table in `coco`.
    """
    index = _load(data, split, categories, cache)
    if annotated and not index.annotated:
        where = index.report[0].partition(": ")[0]
        raise DataError(
            f"{where}: annotations: missing, expected a list. A set without annotations can only be detected on: "
            "python eval.py --checkpoint DIR --results FILE"
        )
    return index if categories is None else relabel(index, categories, data.on_bad_annotation)


def _load(data: DataConfig, split: Split, categories: Categories | None, cache: Path | None) -> DatasetIndex:
    bad: dict[str, Any] = {"on_bad_image": data.on_bad_image, "on_bad_annotation": data.on_bad_annotation}
    if data.tfds is not None:
        from detr_jax.data.tfds import load_tfds

        return load_tfds(data.tfds, split, data.tfds_dir, **bad)
    explicit = (data.train_annotations, data.val_annotations, data.train_images, data.val_images)
    if not any(explicit):
        if yolo := find_yolo(Path(data.root)):
            index = load_yolo(yolo, split, **bad)
            return _same_images(index) if yolo.suffix == ".txt" else index
        if voc := find_voc(Path(data.root), split):
            files, images, both = voc
            other = find_voc(Path(data.root), "val" if split == "train" else "train")
            index = load_voc(files, images, other[0] if other else [], categories, **bad)
            return _same_images(index) if both else index
    annotations, images = find_split(data, split)
    index = load_coco(annotations, images, cache=cache, **bad)
    if (data.val_annotations, data.train_annotations)[split == "val"] is not None:
        return index
    return _same_images(index) if annotations in _unsplit(Path(data.root)) else index


def _same_images(index: DatasetIndex) -> DatasetIndex:
    return dataclasses.replace(index, report=(*index.report, "training and validation are the same images"))


def _unsplit(root: Path) -> tuple[Path, ...]:
    """COCO files that are of no split."""
    return tuple(root / name for name in ("annotations.json", "annotations/instances_default.json", "result.json"))


def find_split(data: DataConfig, split: Split) -> tuple[Path, Path]:
    """Finds the annotations file and the images folder of a split of a data set in COCO's format below `data.root`.

    Explicit paths (`data.train_annotations` and so on) win. Else, the layouts in the table above, in that order.

    Raises:
        DataError: not found; lists what was looked for, and says what the folder looks like.
    """
    root = Path(data.root)
    given_annotations, given_images = (
        (data.train_annotations, data.train_images) if split == "train" else (data.val_annotations, data.val_images)
    )
    layouts: list[tuple[str, tuple[str, ...]]] = [(f"annotations/instances_{split}2017.json", (f"{split}2017",))]
    for name in _NAMES[split]:
        layouts.append((f"annotations/instances_{name}.json", (f"images/{name}", "images", name)))
    layouts += [(f"{name}/_annotations.coco.json", (name,)) for name in _NAMES[split]]
    layouts += [
        ("annotations.json", ("images",)),
        ("annotations/instances_default.json", ("images/default", "images")),
        ("result.json", (".",)),
    ]
    if given_annotations is not None:
        layouts = [(given_annotations, (f"{split}2017", "images", split))]
    if given_images is not None:
        layouts = [(annotations, (given_images,)) for annotations, _ in layouts]
    for annotations, folders in layouts:
        for folder in folders:
            if (root / annotations).is_file() and (root / folder).is_dir():
                return root / annotations, root / folder
    looked = "\n".join(
        f"  {root / annotations}{'' if (root / annotations).is_file() else ' (no such file)'} with "
        + " or ".join(f"{root / f}/{'' if (root / f).is_dir() else ' (no such folder)'}" for f in folders)
        for annotations, folders in layouts
    )
    advice = "" if given_annotations or given_images else _looks_like(root)
    raise DataError(
        f"data.root {data.root!r}: no {split} set found. Looked for\n{looked}\n{advice}"
        f"Set data.root, or data.{split}_annotations and data.{split}_images"
    )


def find_yolo(root: Path) -> Path | None:
    """The `data.yaml` of a YOLO data set, or its `classes.txt`."""
    for name in ("data.yaml", "data.yml", "dataset.yaml"):
        if (root / name).is_file():
            return root / name
    whole = (root / "classes.txt").is_file() and all((root / name).is_dir() for name in ("images", "labels"))
    return root / "classes.txt" if whole else None


def find_voc(root: Path, split: Split) -> tuple[list[Path], Path, bool] | None:
    """The XML files of a split, the folder of their images, and whether the other split is the same."""
    for folder in (root, *sorted(root.glob("VOC*/")), *sorted(root.glob("VOCdevkit/*/"))):
        for name in (*_NAMES[split], "default"):
            listed = folder / "ImageSets/Main" / f"{name}.txt"
            if listed.is_file():
                stems = [
                    line.split()[0] for line in listed.read_text(encoding="utf-8-sig").splitlines() if line.strip()
                ]
                files = [folder / "Annotations" / f"{stem}.xml" for stem in stems]
                return (files, folder / "JPEGImages", name == "default") if files else None
    for name in _NAMES[split]:
        if files := sorted((root / name).glob("*.xml")):
            return files, root / name, False
    for name in _XML_FOLDERS:
        if files := sorted(f for f in (root / name).glob("*.xml") if _is_voc(f)):
            places = [root / images for images in ("JPEGImages", "images", name)]
            return files, next(place for place in places if place.is_dir()), True
    return None


def _is_voc(path: Path) -> bool:
    with path.open("rb") as file:
        return b"<annotation>" in file.read(400)


def _looks_like(root: Path) -> str:
    """What a folder seems to be, and what to do with it; empty if it is nothing known."""
    if root.is_file():
        return f"{root} is a file{': unpack it' if root.suffix in ('.zip', '.gz', '.tar') else ', expected a folder'}. "
    if not root.is_dir():
        return f"There is no folder {root}. "
    converted = "export it from there as COCO, YOLO or Pascal VOC"
    formats = {
        "obj.data": f"YOLO 1.1 of CVAT (obj.data): {converted}, best 'COCO 1.0'",
        "annotations.xml": f"CVAT's own XML: {converted}, best 'COCO 1.0'",
        "meta.json": f"Supervisely's format: {converted}",
        "*/_annotations.createml.json": f"CreateML: {converted}, or convert it with datumaro",
        "*/_annotations.csv": f"Roboflow's CSV: {converted}",
        "*/*.tfrecord": "TFRecord: prepare it with TFDS and pass --data.tfds",
        "train-annotations-bbox.csv": "Open Images: globox convert FILE annotations.json -f openimage -F coco",
    }
    for pattern, what in formats.items():
        if next(root.glob(pattern), None) is not None:
            return f"It looks like {what}. "
    for path in sorted(root.glob("*.json"))[:3]:
        with path.open("rb") as file:
            start = file.read(4000)
        if b'"shapes"' in start:
            return f"It looks like LabelMe ({path.name}): globox convert {root} annotations.json -f labelme -F coco. "
        if start.lstrip().startswith(b"[") and b'"annotations"' in start:
            return f"It looks like Label Studio's own JSON ({path.name}): {converted}. "
    for folder in sorted(p for p in root.iterdir() if p.is_dir())[:20]:
        coco = any((folder / name).is_file() for name in ("annotations.json", "train/_annotations.coco.json"))
        if coco or find_yolo(folder) or (folder / "annotations").is_dir():
            return f"{folder} looks like one: --data.root {folder}. "
    return ""
