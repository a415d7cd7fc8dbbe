"""The index of a YOLO data set: `data.yaml` or `classes.txt`, images, and a text file of boxes for each of them.

A line is `class x_center y_center width height`, relative to the upright image, or `class x1 y1 x2 y2 ...`, a polygon,
of which the box around it is taken. Labels lie beside the images, or in `labels/` where those are in `images/`. An
image without a label file has no objects, as in Ultralytics' code. Category ids are the class numbers.

(Read here and not by a library such as supervision, datumaro or globox: everything that is wrong with a data set is to
be said at once, with its file and line, and a reader of five numbers per line is short.)
"""

import math
from collections.abc import Iterable
from typing import Any

from etils.epath import Path

from detr_jax.data.coco import index_content
from detr_jax.data.image import read_header
from detr_jax.data.index import DatasetIndex, OnBad, Split
from detr_jax.errors import DataError, UserError

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")
_KEYS = {"train": ("train",), "val": ("val", "valid", "validation")}


def load_yolo(path: Path, split: Split, *, on_bad_image: OnBad, on_bad_annotation: OnBad) -> DatasetIndex:
    """Reads the labels of a split, and the header of each of its images.

    Args:
        path: `data.yaml`, or `classes.txt` beside `images/` and `labels/` (the same for both splits).
        split: `train` or `val`.
        on_bad_image: `error`, or `skip` and report.
        on_bad_annotation: `error`, or `skip` and report.

    Raises:
        DataError: names the file, and the line of a label file.
    """
    if path.suffix == ".txt":
        names = dict(enumerate(line.strip() for line in _lines(path) if line.strip()))
        images, pose = _images(path, ["images"], path.parent), False
    else:
        content = _read_yaml(path)
        names, pose = _names(path, content), "kpt_shape" in content
        found = [key for key in _KEYS[split] if content.get(key)]
        if not found:
            raise DataError(
                f"{path}: {split}: got nothing, expected the images' folder or list of images: images/{split}"
            )
        entries = content[found[0]]
        root = path.parent / str(content.get("path") or "")
        images = _images(path, entries if isinstance(entries, list) else [entries], root)
    records, annotations, problems, unlabeled, polygons = [], [], [], 0, 0
    for number, image in enumerate(images, 1):
        size = upright_size(image)
        records.append({"id": number, "file_name": str(image), "height": size[0], "width": size[1]})
        labels = _labels_of(image)
        unlabeled += not labels.is_file()
        for line, text in enumerate(_lines(labels) if labels.is_file() else [], 1):
            if not text.strip():
                continue
            box, polygon, problem = _read_line(text, pose, names)
            polygons += polygon
            if box is None:
                problems.append(f"{labels}:{line}: {problem}")
                continue
            (h, w), (x, y, bw, bh) = size, box
            bbox = [(x - bw / 2) * w, (y - bh / 2) * h, bw * w, bh * h]
            category = int(float(text.split()[0]))
            annotations.append({"image_id": number, "category_id": category, "bbox": bbox})
    notes = [f"{unlabeled} images have no label file: taken as images without objects"] * (unlabeled > 0)
    notes += [f"{polygons} polygons taken as the boxes around them"] * (polygons > 0)
    content = {
        "images": records,
        "annotations": annotations,
        "categories": [{"id": i, "name": name} for i, name in names.items()],
    }
    return index_content(
        content,
        path,
        Path(),
        on_bad_image=on_bad_image,
        on_bad_annotation=on_bad_annotation,
        problems=problems,
        notes=notes,
    )


def _read_yaml(path: Path) -> dict[str, Any]:
    import yaml

    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8-sig"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise DataError(f"{path}: got a {type(content).__name__}, expected names: and train: of a YOLO data set")
    return content


def _names(path: Path, content: dict[str, Any]) -> dict[int, str]:
    names = content.get("names")
    if isinstance(names, dict) and names and all(isinstance(i, int) for i in names):
        return {i: str(name) for i, name in sorted(names.items())}
    if isinstance(names, list) and names:
        return dict(enumerate(map(str, names)))
    raise DataError(f"{path}: names: got {names!r}, expected a list of class names, or a number for each")


def _images(path: Path, entries: Iterable[Any], root: Path) -> list[Path]:
    """The images in folders, and in text files that list them."""
    images = []
    for entry in entries:
        # Roboflow writes ../train/images where train/images beside the file is meant.
        places = [root / str(entry), path.parent / str(entry), path.parent / str(entry).removeprefix("../")]
        found = next((place for place in places if place.exists()), None)
        if found is None:
            tried = ", ".join(dict.fromkeys(map(str, places)))
            raise DataError(f"{path}: {entry}: no such folder or file; looked for {tried}. Set path: in it, or move it")
        if found.is_dir():
            images += _images_in(found)
        else:
            listed = [line.strip() for line in _lines(found) if line.strip()]
            images += [p if (p := found.parent / line).exists() else root / line for line in listed]
    if not images:
        raise DataError(f"{path}: no image in {', '.join(map(str, entries))}; expected {', '.join(SUFFIXES)}")
    return images


def _images_in(folder: Path) -> list[Path]:
    """The images in a folder and in the folders in it."""
    images = []
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() in SUFFIXES:
            images.append(path)
        elif not path.suffix and path.is_dir():
            images += _images_in(path)
    return images


def _labels_of(image: Path) -> Path:
    """`.../images/x.jpg` -> `.../labels/x.txt`, the last folder of that name; else beside the image."""
    parts = list(image.with_suffix(".txt").parts)
    if "images" in parts[:-1]:
        parts[len(parts) - 2 - parts[-2::-1].index("images")] = "labels"
    return Path(*parts)


def upright_size(image: Path) -> tuple[int, int]:
    """(h, w) of a file; (1, 1) for what is no image, which the check of images reports."""
    try:
        with image.open("rb") as file:
            return read_header(file, str(image)).size
    except (OSError, UserError):
        return 1, 1


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read as text: {error}") from error


def _read_line(text: str, pose: bool, names: dict[int, str]) -> tuple[list[float] | None, bool, str]:
    """(x, y, w, h) of a line, relative, or None; whether it was a polygon; and the problem."""
    try:
        category, *values = map(float, text.split())
    except ValueError:
        return None, False, f"got {text!r}, expected numbers: class x_center y_center width height"
    polygon = len(values) > 4 and not pose
    if not all(map(math.isfinite, [category, *values])) or len(values) < 4 or (polygon and len(values) % 2):
        return None, False, f"got {text!r}, expected class x_center y_center width height, or a polygon"
    if category not in names:
        return None, False, f"class: got {category:g}, expected one of the {len(names)} classes 0 to {max(names)}"
    if max(map(abs, values)) > 2:
        return None, False, f"got {text!r}, expected coordinates relative to the image, 0 to 1"
    if polygon:
        xs, ys = values[::2], values[1::2]
        box = [(min(xs) + max(xs)) / 2, (min(ys) + max(ys)) / 2, max(xs) - min(xs), max(ys) - min(ys)]
        return box, True, ""
    return values[:4], False, ""
