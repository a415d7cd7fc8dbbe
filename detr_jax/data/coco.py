"""The index of a COCO-format data set: everything but the pixels.

Labels are contiguous: label `i` is category id `category_ids[i]`, sorted by id. Everything is judged once, when it is
read, and means the same in training and in scoring. What happens to what is out of order (errors are gathered, and
raised as one `DataError` before training starts):

| found                                                           | outcome                                          |
|-----------------------------------------------------------------|--------------------------------------------------|
| annotations or images not found, malformed JSON, missing key    | error                                            |
| no `annotations` at all, as in COCO's test sets                 | error, but for `eval.py`: results without scores |
| no image, no category, an id twice, a size that is not positive | error                                            |
| an id that is no integer, negative, or beyond 63 bits           | error                                            |
| a category name with line breaks, tabs or outer spaces          | read with single spaces, reported                |
| image file missing, unreadable or truncated                     | `on_bad_image`: error, or skipped and reported   |
| EXIF orientation                                                | turned upright, reported                         |
| any other size, upright, than annotated                         | `on_bad_image`                                   |
| annotation of an unknown image or category                      | `on_bad_annotation`: the same                    |
| annotation without a key, or a box that is not 4 finite numbers | `on_bad_annotation`                              |
| `iscrowd` that is not 0 or 1, `area` that is no number from 0 on| `on_bad_annotation`                              |
| `iscrowd`, `area` missing or null                               | not a crowd, the box's area                      |
| `iscrowd`, `area` as text, such as "0"                          | read as a number, reported                       |
| box entirely outside its image                                  | `on_bad_annotation`                              |
| box partly outside its image                                    | clipped in training, as in the official code     |
| box without area                                                | dropped from training and scoring, reported      |
| crowd                                                           | out of training, reported; ignored in evaluation |
| image without boxes                                             | kept and reported                                |
| every image skipped                                             | error                                            |
| grayscale, palette, CMYK, alpha                                 | decoded to RGB                                   |
| 16-bit grayscale                                                | scaled to 8 bits (1/257), not clipped            |
| file damaged beyond its header                                  | error that names it, when it is read             |
"""

import hashlib
import json
import math
import uuid
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from etils.epath import Path, PathLike
from tqdm import tqdm

from detr_jax.data.image import read_header
from detr_jax.data.index import (
    _SHOWN,
    Annotation,
    DatasetIndex,
    OnBad,
    box_problem,
    id_problem,
    index_boxes,
    raise_or_skip,
    shown,
    skip_report,
)
from detr_jax.errors import DataError, UserError

_HEADER_THREADS = 16


def load_coco(
    annotations: PathLike,
    images: PathLike,
    *,
    on_bad_image: OnBad = "error",
    on_bad_annotation: OnBad = "error",
    cache: Path | None = None,
) -> DatasetIndex:
    """Reads a COCO annotations file and the header of each of its images.

    Args:
        annotations: JSON file with `images`, `annotations` and `categories`.
        images: folder that `file_name` is relative to.
        on_bad_image: `error`, or `skip` and report.
        on_bad_annotation: `error`, or `skip` and report.
        cache: folder that notes whose images were found intact, so that the next start opens none of them.

    Raises:
        DataError: see the table above.
    """
    path = Path(annotations)
    return index_content(
        read_annotations(path),
        path,
        Path(images),
        on_bad_image=on_bad_image,
        on_bad_annotation=on_bad_annotation,
        cache=cache,
    )


def index_content(
    content: Mapping[str, Any],
    path: Path,
    images: Path,
    *,
    on_bad_image: OnBad,
    on_bad_annotation: OnBad,
    problems: Sequence[str] = (),
    notes: Sequence[str] = (),
    cache: Path | None = None,
) -> DatasetIndex:
    """The index of what a reader found, checked: `images`, `annotations` and `categories` as in a COCO file.

    Args:
        content: what was found.
        path: where, for messages.
        images: folder that `file_name` is relative to.
        on_bad_image: `error`, or `skip` and report.
        on_bad_annotation: `error`, or `skip` and report.
        problems: of annotations that the reader could not read.
        notes: of the reader, for the report.
        cache: see `load_coco`.

    Raises:
        DataError: see the table above.
    """
    annotated = "annotations" in content
    records = {record["id"]: record for record in content["images"]}
    # A name is one line: it becomes a caption, a row of a table, a name of a metric.
    names_of = {category["id"]: " ".join(str(category["name"]).split()) for category in content["categories"]}
    ids = tuple(sorted(names_of))
    names = tuple(names_of[i] for i in ids)

    good_images, turned, image_problems = _check_images_once(records, images, cache)
    sizes_of = {i: _size(record) for i, record in records.items()}
    found, unfit = judge(content.get("annotations", []), sizes_of, ids, path)
    problems = [*problems, *unfit]
    raise_or_skip(path, on_bad_image, image_problems, on_bad_annotation, problems)
    if not good_images:
        raise DataError(f"{path}: images: all {len(records)} were skipped; the first: {image_problems[0]}")

    sizes = np.array([sizes_of[i] for i in good_images], np.int32)
    boxes, labels, kept, report = index_boxes(good_images, sizes, found)
    renamed = [c["name"] for c in content["categories"] if str(c["name"]) != names_of[c["id"]]]
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
            *notes,
            *(report if annotated else ["no annotations: for detecting alone"]),
            *[f"{turned} images turned upright, by EXIF's orientation"] * (turned > 0),
            *[f"{len(renamed)} category names read with single spaces, such as {name!r}" for name in renamed[:1]],
            *skip_report("images", image_problems),
            *skip_report("annotations", problems),
        ),
        names=tuple(str(images / records[i]["file_name"]) for i in good_images),
        read=lambda i: Path(index.names[i]).read_bytes(),
        read_ground_truth=lambda: kept.ground_truth([records[i] for i in good_images], ids, names),
    )
    return index


def read_annotations(path: Path) -> dict[str, Any]:
    """Reads an annotations file and checks all but its annotations and image files.

    Raises:
        DataError: no such file, not JSON, or images or categories that are not as they must be; names the first.
    """
    try:
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error}") from error
    except (ValueError, RecursionError) as error:
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
            if (problem := id_problem(record["id"])) is not None:
                problems.append(f"{place}.id: {problem}")
            elif record["id"] in seen:
                problems.append(f"{place}.id: got {record['id']} a second time, expected different ids")
            else:
                seen.add(record["id"])
            text = "file_name" if key == "images" else "name"
            if not isinstance(record[text], str) or not record[text].strip() or "\0" in record[text]:
                problems.append(f"{place}.{text}: got {shown(record[text])}, expected text")
            if key == "images" and not all(type(v) is int and 0 < v < 2**31 for v in _size(record)):
                problems.append(f"{place}: (height, width): got {shown(_size(record))}, expected positive integers")
    if problems:
        more = [f"and {len(problems) - _SHOWN} more"] * (len(problems) > _SHOWN)
        raise DataError("\n".join(problems[:_SHOWN] + more))
    return content


def _size(record: dict[str, Any]) -> tuple[int, int]:
    return record["height"], record["width"]


def _check_images_once(
    records: dict[int, dict[str, Any]], folder: Path, cache: Path | None
) -> tuple[list[int], int, list[str]]:
    """As `_check_images`; opens no image if all were good at an earlier start with the same folder and records."""
    if cache is None:
        return _check_images(records, folder)
    checked = [(record["id"], record["file_name"], *_size(record)) for record in records.values()]
    digest = hashlib.sha256(json.dumps([str(folder), checked]).encode()).hexdigest()
    noted = cache / f"{digest}.json"
    if noted.exists():
        return list(records), json.loads(noted.read_text())["turned"], []
    good, turned, problems = _check_images(records, folder)
    if not problems:
        cache.mkdir(parents=True, exist_ok=True)
        temporary = cache / f"{digest}.{uuid.uuid4().hex}"
        temporary.write_text(json.dumps({"images": str(folder), "number": len(good), "turned": turned}))
        temporary.replace(noted)
    return good, turned, problems


def _check_images(records: dict[int, dict[str, Any]], folder: Path) -> tuple[list[int], int, list[str]]:
    """Reads every header; returns ids of the good images, how many of them are turned by EXIF, and the problems."""

    def check(record: dict[str, Any]) -> tuple[bool, str | None]:
        path, size = folder / record["file_name"], _size(record)
        try:
            with path.open("rb") as file:
                header = read_header(file, path)
        except FileNotFoundError:
            return False, f"{path}: missing; expected as file_name of image {record['id']}"
        except UserError as error:
            return False, f"{error}; expected a complete image file: fetch it again"
        except OSError as error:
            return False, f"{path}: cannot be read: {error}"
        if header.size == size:
            return header.turned, None
        problem = f"{path}: size (h, w): got {header.size}, expected the annotated {size} of image {record['id']}"
        if header.turned and header.size[::-1] == size:
            problem += (
                ": EXIF's orientation turns it. If its boxes were drawn without that, remove the tag from the file "
                "(exiftool -Orientation= FILE), else exchange height and width"
            )
        return False, problem

    with ThreadPoolExecutor(_HEADER_THREADS) as pool:
        checks = tqdm(pool.map(check, records.values()), "reading image headers", len(records), delay=2, unit=" images")
        checked = list(checks)
    good = [i for i, (_, problem) in zip(records, checked, strict=True) if problem is None]
    problems = [problem for _, problem in checked if problem is not None]
    return good, sum(turned for turned, _ in checked), problems


def judge(
    annotations: Sequence[Any],
    sizes: Mapping[Any, tuple[int, int] | None],
    category_ids: Sequence[int],
    where: object,
) -> tuple[list[Annotation], list[str]]:
    """Reads the annotations of a COCO file, for training and for scoring alike.

    Args:
        annotations: those of the file.
        sizes: image id -> (h, w); `None` where that is not known.
        category_ids: label -> category id.
        where: the file, for the problems.

    Returns:
        The good ones, boxes without area among them, and the problems of the others.
    """
    label_of = {category_id: label for label, category_id in enumerate(category_ids)}
    good, problems = [], []
    for position, annotation in enumerate(annotations):
        found = _judge_one(annotation, sizes, label_of)
        if isinstance(found, str):
            problems.append(f"{where}: annotations[{position}]{found}")
        else:
            good.append(found)
    return good, problems


def _judge_one(
    annotation: Any, sizes: Mapping[Any, tuple[int, int] | None], label_of: Mapping[int, int]
) -> Annotation | str:
    fields = ("image_id", "category_id", "bbox")
    missing = [field for field in fields if not isinstance(annotation, Mapping) or field not in annotation]
    if missing:
        return f": no {', '.join(missing)}; expected {', '.join(fields)}"
    image, category, box = annotation["image_id"], annotation["category_id"], annotation["bbox"]
    if type(image) not in (int, str) or image not in sizes:
        return f".image_id: got {shown(image)}, expected the id of one of the {len(sizes)} images"
    if type(category) is not int or category not in label_of:
        some = ", ".join(map(str, sorted(label_of)[:10])) + ", ..." * (len(label_of) > 10)
        return f".category_id: got {shown(category)}, expected one of the {len(label_of)} categories {some}"
    problem = box_problem(box, sizes[image])
    if problem:
        return f".{problem}"
    crowd, area = (_number(annotation.get(field)) for field in ("iscrowd", "area"))
    if crowd not in (None, 0, 1):
        return f".iscrowd: got {shown(annotation['iscrowd'])}, expected 0 or 1"
    if area is not None and not 0 <= area < math.inf:
        return f".area: got {shown(annotation['area'])}, expected a number of pixels, or none for that of the box"
    text = any(isinstance(annotation.get(field), str) for field in ("iscrowd", "area"))
    area = box[2] * box[3] if area is None else area
    return Annotation(image, label_of[category], tuple(box), area, crowd == 1, text)


def _number(value: Any) -> float | None:
    """A number, also one that is written as text; `None` for null, NaN for anything else."""
    if value is None:
        return None
    try:
        return float(value) if isinstance(value, int | float | str) else math.nan
    except (ValueError, OverflowError):
        return math.nan
