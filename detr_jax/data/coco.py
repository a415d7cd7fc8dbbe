"""The index of a COCO-format data set: everything but the pixels.

Labels are contiguous: label `i` is category id `category_ids[i]`, sorted by id. What happens to what is out of order
(errors are gathered, and raised as one `DataError` before training starts):

| found                                                           | outcome                                          |
|-----------------------------------------------------------------|--------------------------------------------------|
| annotations or images not found, malformed JSON, missing key    | error                                            |
| no `annotations` at all, as in COCO's test sets                 | error, but for `eval.py`: results without scores |
| no image, no category, an id twice, a size that is not positive | error                                            |
| image file missing, unreadable or truncated                     | `on_bad_image`: error, or skipped and reported   |
| stored size is the annotated size                               | pixels as stored, as in the official code        |
| stored size is the annotated size only after EXIF rotation      | rotated                                          |
| any other size                                                  | `on_bad_image`                                   |
| annotation of an unknown image or category                      | `on_bad_annotation`: the same                    |
| annotation without a key, or a box that is not 4 finite numbers | `on_bad_annotation`                              |
| box entirely outside its image                                  | `on_bad_annotation`                              |
| box partly outside its image                                    | clipped, as in the official code                 |
| box without area                                                | dropped and reported                             |
| crowd                                                           | out of training, reported; ignored in evaluation |
| image without boxes                                             | kept and reported                                |
| every image skipped                                             | error                                            |
| grayscale, palette, CMYK, alpha                                 | decoded to RGB                                   |
| 16-bit grayscale                                                | scaled to 8 bits (1/257), not clipped            |
| file damaged beyond its header                                  | error that names it, when it is read             |
"""

import json
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from detr_jax.data.image import read_header
from detr_jax.data.index import _SHOWN, DatasetIndex, OnBad, box_problem, index_boxes, raise_or_skip, skip_report
from detr_jax.errors import DataError

_HEADER_THREADS = 16


def load_coco(
    annotations: str | Path,
    images: str | Path,
    *,
    on_bad_image: OnBad = "error",
    on_bad_annotation: OnBad = "error",
    category_ids: Sequence[int] | None = None,
) -> DatasetIndex:
    """Reads a COCO annotations file and the header of each of its images.

    Args:
        annotations: JSON file with `images`, `annotations` and `categories`.
        images: folder that `file_name` is relative to.
        on_bad_image: `error`, or `skip` and report.
        on_bad_annotation: `error`, or `skip` and report.
        category_ids: label -> category id of a checkpoint; `None` takes all the categories of the file, sorted by id.

    Raises:
        DataError: see the table above.
    """
    path = Path(annotations)
    content = _read_json(path)
    annotated = "annotations" in content
    records = {record["id"]: record for record in content["images"]}
    names_of = {category["id"]: str(category["name"]) for category in content["categories"]}
    ids = tuple(sorted(names_of) if category_ids is None else (int(i) for i in category_ids))
    names = tuple(names_of.get(i, f"category {i}") for i in ids)

    good_images, plain, image_problems = _check_images(records, Path(images))
    good_annotations, annotation_problems = _check_annotations(content.get("annotations", []), records, ids, path)
    raise_or_skip(path, on_bad_image, image_problems, on_bad_annotation, annotation_problems)
    if not good_images:
        raise DataError(f"{path}: images: all {len(records)} were skipped; the first: {image_problems[0]}")

    sizes = np.array([_size(records[i]) for i in good_images], np.int32)
    label_of = {category_id: label for label, category_id in enumerate(ids)}
    boxes, labels, report = index_boxes(
        good_images,
        sizes,
        ((a["image_id"], a["bbox"], label_of[a["category_id"]], bool(a.get("iscrowd", 0))) for a in good_annotations),
    )
    index = DatasetIndex(
        image_ids=np.array(good_images, np.int64),
        sizes=sizes,
        boxes_xyxy=boxes,
        labels=labels,
        category_ids=ids,
        category_names=names,
        annotated=annotated,
        report=(
            f"{path}: {len(good_images)} images, {sum(map(len, labels))} boxes, {len(ids)} categories",
            *(report if annotated else ["no annotations: for detecting alone"]),
            *skip_report("images", image_problems),
            *skip_report("annotations", annotation_problems),
        ),
        names=tuple(str(Path(images) / records[i]["file_name"]) for i in good_images),
        plain=np.array(plain, bool),
        read=lambda i: Path(index.names[i]).read_bytes(),
        read_ground_truth=lambda: _ground_truth(path, index),
    )
    return index


def _read_json(path: Path) -> dict[str, Any]:
    """Reads an annotations file and checks all but its annotations and image files."""
    try:
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error}") from error
    except ValueError as error:
        raise DataError(f"{path}: not JSON (cut off, or not an annotations file?): {error}") from error
    for key in ("images", "annotations", "categories"):
        got = content.get(key) if isinstance(content, dict) else None
        if key == "annotations" and isinstance(content, dict) and key not in content:
            continue  # COCO's test sets: `load_split` says where that will not do
        if not isinstance(got, list):
            raise DataError(f"{path}: {key}: got {type(got).__name__}, expected a list; is this a COCO instances file?")
    problems: list[str] = []
    for key, fields in {"images": ("id", "file_name", "width", "height"), "categories": ("id", "name")}.items():
        if not content[key]:
            problems.append(f"{path}: {key}: got an empty list, expected at least one")
        seen = set()
        for position, record in enumerate(content[key]):
            missing = [field for field in fields if not isinstance(record, dict) or field not in record]
            place = f"{path}: {key}[{position}]"
            if missing:
                problems.append(f"{place}: no {', '.join(missing)}; expected {', '.join(fields)}")
                continue
            if type(record["id"]) is not int:
                problems.append(f"{place}.id: got {record['id']!r}, expected an integer")
            elif record["id"] in seen:
                problems.append(f"{place}.id: got {record['id']} a second time, expected different ids")
            else:
                seen.add(record["id"])
            if key == "images" and not all(isinstance(v, int) and v > 0 for v in _size(record)):
                problems.append(f"{place}: (height, width): got {_size(record)}, expected positive integers")
    if problems:
        more = [f"and {len(problems) - _SHOWN} more"] * (len(problems) > _SHOWN)
        raise DataError("\n".join(problems[:_SHOWN] + more))
    return content


def _size(record: dict[str, Any]) -> tuple[int, int]:
    return record["height"], record["width"]


def _check_images(records: dict[int, dict[str, Any]], folder: Path) -> tuple[list[int], list[bool], list[str]]:
    """Reads every header; returns ids of the good images, whether each is a plain JPEG, and the problems."""

    def check(record: dict[str, Any]) -> tuple[bool, str | None]:
        path, size = os.path.join(folder, record["file_name"]), _size(record)
        try:
            with open(path, "rb") as file:
                header = read_header(file)
        except FileNotFoundError:
            return False, f"{path}: missing; expected as file_name of image {record['id']}"
        except (OSError, ValueError, SyntaxError) as error:
            return False, f"{path}: unreadable: {error}; expected a complete image file: fetch it again"
        if header.size == size:
            return header.plain, None
        if header.rotated and header.size[::-1] == size:
            return False, None
        return False, f"{path}: size (h, w): got {header.size}, expected the annotated {size} of image {record['id']}"

    with ThreadPoolExecutor(_HEADER_THREADS) as pool:
        checks = tqdm(pool.map(check, records.values()), "reading image headers", len(records), delay=2, unit=" images")
        checked = list(checks)
    good = [(i, plain) for i, (plain, problem) in zip(records, checked, strict=True) if problem is None]
    problems = [problem for _, problem in checked if problem is not None]
    return [i for i, _ in good], [plain for _, plain in good], problems


def _check_annotations(
    annotations: list[Any], records: dict[int, dict[str, Any]], category_ids: Sequence[int], path: Path
) -> tuple[list[dict[str, Any]], list[str]]:
    """Returns the good annotations, and the problems of the others."""
    known, good, problems = set(category_ids), [], []
    for position, annotation in enumerate(annotations):
        problem = _annotation_problem(annotation, records, known)
        if problem is None:
            good.append(annotation)
        else:
            problems.append(f"{path}: annotations[{position}]{problem}")
    return good, problems


def _annotation_problem(annotation: Any, records: dict[int, dict[str, Any]], known: set[int]) -> str | None:
    fields = ("image_id", "category_id", "bbox")
    missing = [field for field in fields if not isinstance(annotation, dict) or field not in annotation]
    if missing:
        return f": no {', '.join(missing)}; expected {', '.join(fields)}"
    image, category = annotation["image_id"], annotation["category_id"]
    if type(image) is not int or image not in records:
        return f".image_id: got {image!r}, expected the id of one of the {len(records)} images"
    if type(category) is not int or category not in known:
        some = ", ".join(map(str, sorted(known)[:10])) + ", ..." * (len(known) > 10)
        return f".category_id: got {category!r}, expected one of the {len(known)} categories {some}"
    problem = box_problem(annotation["bbox"], _size(records[image]))
    return f".{problem}" if problem else None


def _ground_truth(path: Path, index: DatasetIndex) -> dict[str, Any]:
    """Reads the annotations file a second time, rather than keep gigabytes of it through the training."""
    content = _read_json(path)
    records = {record["id"]: record for record in content["images"]}
    used = set(index.image_ids.tolist())
    good, _ = _check_annotations(content.get("annotations", []), records, index.category_ids, path)
    return {
        "images": [records[i] for i in index.image_ids.tolist()],
        "annotations": [
            {
                "id": number,
                "image_id": annotation["image_id"],
                "category_id": annotation["category_id"],
                "bbox": annotation["bbox"],
                "area": annotation.get("area", annotation["bbox"][2] * annotation["bbox"][3]),
                "iscrowd": int(annotation.get("iscrowd", 0)),
            }
            for number, annotation in enumerate((a for a in good if a["image_id"] in used), 1)
        ],
        "categories": [{"id": i, "name": n} for i, n in zip(index.category_ids, index.category_names, strict=True)],
    }
