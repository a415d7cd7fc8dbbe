"""The index of a Pascal VOC data set: an XML file for each image.

Categories are the names in all files of the data set, sorted, so that training and validation number them alike; their
ids count from 1, or are those of a model with classes of these names. Corners are pixels as written, from 0, except in
Pascal's own data, which counts from 1. `difficult` objects are treated as crowds: left out of training, ignored in
scoring, as in the challenge.

(Read here and not by a library for the reason given in `yolo`.)
"""

import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from typing import Any

from etils.epath import Path

from detr_jax.categories import Categories
from detr_jax.data.coco import index_content
from detr_jax.data.index import DatasetIndex, OnBad
from detr_jax.data.yolo import SUFFIXES, upright_size
from detr_jax.errors import DataError

_CORNERS = ("xmin", "ymin", "xmax", "ymax")


def load_voc(
    files: Sequence[Path],
    images: Path,
    every_file: Sequence[Path],
    categories: Categories | None = None,
    *,
    on_bad_image: OnBad,
    on_bad_annotation: OnBad,
) -> DatasetIndex:
    """Reads the XML files of a split, and the header of each image.

    Args:
        files: of the split.
        images: folder of their images.
        every_file: of all splits, for the names of the classes.
        categories: of a model: the ids of classes with its names.
        on_bad_image: `error`, or `skip` and report.
        on_bad_annotation: `error`, or `skip` and report.

    Raises:
        DataError: names the file and the object.
    """
    roots = {path: _parse(path) for path in dict.fromkeys([*files, *every_file])}
    names = sorted({name for root in roots.values() for item in root.iter("object") if (name := _text(item, "name"))})
    if not names:
        raise DataError(f"{files[0].parent}: no object with a name in {len(roots)} XML files; expected Pascal VOC's")
    own = Categories(tuple(range(1, len(names) + 1)), tuple(names))
    if categories is not None:
        found, unused = own.match(categories).named().labels, max(categories.ids, default=0) + 1
        own = Categories(tuple(categories.ids[x] if x >= 0 else unused + i for i, x in enumerate(found)), own.names)
    ids = dict(zip(own.names, own.ids, strict=True))
    records, annotations, problems = [], [], []
    for number, path in enumerate(files, 1):
        root = roots[path]
        image = _image_of(path, root, images)
        size = _size(root) or upright_size(image)
        records.append({"id": number, "file_name": str(image), "height": size[0], "width": size[1]})
        first = 1.0 if _text(root, "source/database").startswith("The VOC") else 0.0
        for position, item in enumerate(root.iter("object")):
            corners = [_text(item, f"bndbox/{corner}") for corner in _CORNERS]
            try:
                x0, y0, x1, y1 = map(float, corners)
                category = ids[_text(item, "name")]
            except (ValueError, KeyError):
                got = f"name {_text(item, 'name')!r} and corners {corners}"
                expected = f"a name and numbers {', '.join(_CORNERS)}"
                problems.append(f"{path}: object[{position}]: got {got}, expected {expected}")
                continue
            bbox = [x0 - first, y0 - first, x1 - x0 + first, y1 - y0 + first]
            difficult = int(_text(item, "difficult") == "1")
            annotations.append({"image_id": number, "category_id": category, "bbox": bbox, "iscrowd": difficult})
    content: dict[str, Any] = {
        "images": records,
        "annotations": annotations,
        "categories": [{"id": i, "name": name} for name, i in ids.items()],
    }
    return index_content(
        content,
        files[0].parent,
        Path(),
        on_bad_image=on_bad_image,
        on_bad_annotation=on_bad_annotation,
        problems=problems,
    )


def _parse(path: Path) -> ElementTree.Element:
    try:
        root = ElementTree.parse(path).getroot()
    except (OSError, ElementTree.ParseError) as error:
        raise DataError(f"{path}: not XML: {error}") from error
    if root.tag != "annotation":
        raise DataError(f"{path}: got <{root.tag}>, expected <annotation> of Pascal VOC")
    return root


def _text(element: ElementTree.Element, tag: str) -> str:
    return (element.findtext(tag) or "").strip()


def _size(root: ElementTree.Element) -> tuple[int, int] | None:
    """(h, w) as annotated, if it is: some tools write 0."""
    height, width = _text(root, "size/height"), _text(root, "size/width")
    return (int(height), int(width)) if height.isdigit() and width.isdigit() and int(height) * int(width) else None


def _image_of(path: Path, root: ElementTree.Element, images: Path) -> Path:
    """`filename`, or what has the XML file's own name."""
    given = images / (_text(root, "filename") or path.stem)
    stems = [images / f"{path.stem}{suffix}" for suffix in (*SUFFIXES, *map(str.upper, SUFFIXES))]
    return next((place for place in [given, *stems] if place.is_file()), given)
