"""The index of a COCO-format data set: everything but the pixels.

Labels are contiguous: label `i` is category id `category_ids[i]`, sorted by id. What happens to what is out of order
(errors are gathered, and raised as one `DataError` before training starts):

| found                                                           | outcome                                          |
|-----------------------------------------------------------------|--------------------------------------------------|
| annotations or images not found, malformed JSON, missing key    | error                                            |
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

import dataclasses
import json
import math
import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import numpy as np
from tqdm import tqdm

from detr_jax.config import DataConfig
from detr_jax.data.image import DataError, read_header

OnBad = Literal["error", "skip"]
Split = Literal["train", "val"]

_SHOWN = 10  # problems listed in an error
_HEADER_THREADS = 16


@dataclasses.dataclass(frozen=True, eq=False)
class CocoIndex:
    """Metadata of n images; the pixels stay where they are until `encoded` reads them."""

    image_ids: np.ndarray
    """int64 [n]."""
    sizes: np.ndarray
    """int32 [n, 2]: annotated (h, w)."""
    boxes_xyxy: tuple[np.ndarray, ...]
    """Per image float32 [m, 4], pixels of the annotated size, clipped to the image, no crowd, all with an area."""
    labels: tuple[np.ndarray, ...]
    """Per image int32 [m], contiguous."""
    category_ids: tuple[int, ...]
    """Label -> category id."""
    category_names: tuple[str, ...]
    """Label -> name."""
    report: tuple[str, ...]
    """What was found, dropped and skipped, one line each."""
    names: tuple[str, ...]
    """Path, or key, of each image."""
    plain: np.ndarray
    """bool [n]: a JPEG file at `names[i]` that needs neither rotation nor colour conversion."""
    read: Callable[[int], bytes] = dataclasses.field(repr=False)
    """Reads image i."""
    read_ground_truth: Callable[[], dict[str, Any]] = dataclasses.field(repr=False)
    """Reads what `ground_truth` returns."""
    decoded: dict[tuple[int, tuple[int, int]], np.ndarray] = dataclasses.field(default_factory=dict, repr=False)
    """What `DataConfig.cache` keeps: (image, its decoded (h, w)) -> uint8 [h, w, 3]."""

    def __len__(self) -> int:
        return len(self.image_ids)

    @property
    def num_classes(self) -> int:
        """Number of labels."""
        return len(self.category_ids)

    @property
    def max_boxes(self) -> int:
        """The largest number of boxes in an image."""
        return max(len(labels) for labels in self.labels)

    def encoded(self, i: int) -> bytes:
        """The content of image file i."""
        return self.read(i)

    def name(self, i: int) -> str:
        """Path or key of image i, for messages."""
        return self.names[i]

    def ground_truth(self) -> dict[str, Any]:
        """The data set as pycocotools takes it: `images`, `categories` and all `annotations`, the crowd ones too.

        Boxes are as annotated, not clipped. Annotations are numbered anew from 1 (pycocotools counts a match with
        annotation 0 as none); skipped images and annotations are left out.
        """
        return self.read_ground_truth()


def load_split(data: DataConfig, split: Split, category_ids: Sequence[int] | None = None) -> CocoIndex:
    """Reads the training or validation set that `data` describes.

    Args:
        data: which files, and what to do with bad ones.
        split: `train` or `val`.
        category_ids: label -> category id of a checkpoint; `None` takes all the categories of the annotations.

    Raises:
        DataError: see the table above.
    """
    if data.tfds is not None:
        from detr_jax.data.tfds import load_tfds

        return load_tfds(
            data.tfds,
            split,
            data.tfds_dir,
            on_bad_image=data.on_bad_image,
            on_bad_annotation=data.on_bad_annotation,
            category_ids=category_ids,
        )
    annotations, images = find_split(data, split)
    index = load_coco(
        annotations,
        images,
        on_bad_image=data.on_bad_image,
        on_bad_annotation=data.on_bad_annotation,
        category_ids=category_ids,
    )
    other = (data.val_annotations, data.train_annotations)[split == "val"]
    if annotations == Path(data.root) / "annotations.json" and other is None:
        index = dataclasses.replace(index, report=(*index.report, "training and validation are the same images"))
    return index


def find_split(data: DataConfig, split: Split) -> tuple[Path, Path]:
    """Finds the annotations file and the images folder of a split below `data.root`.

    Explicit paths (`data.train_annotations` and so on) win. Else, in this order:
    `annotations/instances_{split}2017.json` with `{split}2017/`; `annotations/instances_{split}.json` with `images/`
    or `{split}/`; `annotations.json` with `images/`, the same for both splits.

    Raises:
        DataError: not found; lists what was looked for.
    """
    root = Path(data.root)
    given_annotations, given_images = (
        (data.train_annotations, data.train_images) if split == "train" else (data.val_annotations, data.val_images)
    )
    layouts: list[tuple[str, tuple[str, ...]]] = [
        (f"annotations/instances_{split}2017.json", (f"{split}2017",)),
        (f"annotations/instances_{split}.json", ("images", split)),
        ("annotations.json", ("images",)),
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
    raise DataError(
        f"data.root {data.root!r}: no {split} set found. Looked for\n{looked}\n"
        f"Set data.root, or data.{split}_annotations and data.{split}_images"
    )


def load_coco(
    annotations: str | Path,
    images: str | Path,
    *,
    on_bad_image: OnBad = "error",
    on_bad_annotation: OnBad = "error",
    category_ids: Sequence[int] | None = None,
) -> CocoIndex:
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
    records = {record["id"]: record for record in content["images"]}
    names_of = {category["id"]: str(category["name"]) for category in content["categories"]}
    ids = tuple(sorted(names_of) if category_ids is None else (int(i) for i in category_ids))
    names = tuple(names_of.get(i, f"category {i}") for i in ids)

    good_images, plain, image_problems = _check_images(records, Path(images))
    good_annotations, annotation_problems = _check_annotations(content["annotations"], records, ids, path)
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
    index = CocoIndex(
        image_ids=np.array(good_images, np.int64),
        sizes=sizes,
        boxes_xyxy=boxes,
        labels=labels,
        category_ids=ids,
        category_names=names,
        report=(
            f"{path}: {len(good_images)} images, {sum(map(len, labels))} boxes, {len(ids)} categories",
            *report,
            *skip_report("images", image_problems),
            *skip_report("annotations", annotation_problems),
        ),
        names=tuple(str(Path(images) / records[i]["file_name"]) for i in good_images),
        plain=np.array(plain, bool),
        read=lambda i: Path(index.names[i]).read_bytes(),
        read_ground_truth=lambda: _ground_truth(path, index),
    )
    return index


def index_boxes(
    image_ids: Sequence[int], sizes: np.ndarray, entries: Iterable[tuple[int, Sequence[float], int, bool]]
) -> tuple[tuple[np.ndarray, ...], tuple[np.ndarray, ...], list[str]]:
    """Groups boxes by image, as the official `ConvertCocoPolysToMask` does: no crowd, clipped, without area dropped.

    Args:
        image_ids: n ids, in the order of the index.
        sizes: [n, 2] (h, w).
        entries: (image id, (x, y, width, height), label, is crowd) of each annotation.

    Returns:
        boxes_xyxy, labels (see `CocoIndex`) and lines for the report.
    """
    grouped: dict[int, list[tuple[Sequence[float], int]]] = {i: [] for i in image_ids}
    crowd = flat = 0
    for image_id, box, label, is_crowd in entries:
        if image_id in grouped:  # else its image was skipped
            crowd += is_crowd
            if not is_crowd:
                grouped[image_id].append((box, label))
    all_boxes, all_labels = [], []
    for (h, w), group in zip(sizes.tolist(), grouped.values(), strict=True):
        boxes = np.array([box for box, _ in group], np.float32).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        boxes = np.clip(boxes, 0, np.array([w, h, w, h], np.float32))
        keep = (boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])
        flat += int((~keep).sum())
        all_boxes.append(boxes[keep])
        all_labels.append(np.array([label for _, label in group], np.int32)[keep])
    empty = sum(not len(labels) for labels in all_labels)
    report = [f"{crowd} crowd annotations left out of training"] * (crowd > 0)
    report += [f"{flat} boxes without area dropped"] * (flat > 0)
    report += [f"{empty} images without boxes kept"] * (empty > 0)
    return tuple(all_boxes), tuple(all_labels), report


def skip_report(what: str, problems: Sequence[str]) -> list[str]:
    """The line of a report about what was skipped."""
    return [f"{len(problems)} bad {what} skipped; the first: {problems[0]}"] if problems else []


def box_problem(box: Any, size: tuple[int, int]) -> str | None:
    """Says what is wrong with an annotated (x, y, width, height), or `None`; no area is no problem here."""
    numbers = isinstance(box, list | tuple) and len(box) == 4 and all(isinstance(v, int | float) for v in box)
    if not numbers or not all(map(math.isfinite, box)):
        return f"bbox: got {box}, expected 4 finite numbers (x, y, width, height)"
    x, y, w, h = box
    height, width = size
    if w > 0 and h > 0 and (x >= width or y >= height or x + w <= 0 or y + h <= 0):
        return f"bbox: got (x, y, width, height) {box}, entirely outside its image of {height}x{width} (h, w)"
    return None


def raise_or_skip(
    where: object,
    on_bad_image: OnBad,
    image_problems: Sequence[str],
    on_bad_annotation: OnBad,
    annotation_problems: Sequence[str],
) -> None:
    """Raises one error about all the problems that are not to be skipped."""
    lines: list[str] = []
    for flag, outcome, problems in (
        ("--data.on-bad-image", on_bad_image, image_problems),
        ("--data.on-bad-annotation", on_bad_annotation, annotation_problems),
    ):
        if outcome == "error" and problems:
            more = len(problems) - _SHOWN
            lines += [f"  {problem}" for problem in problems[:_SHOWN]]
            lines.append(f"  {f'and {more} more; ' * (more > 0)}correct them, or skip them with {flag} skip")
    if lines:
        raise DataError("\n".join([f"{where}: the data set has errors:", *lines]))


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


def _ground_truth(path: Path, index: CocoIndex) -> dict[str, Any]:
    """Reads the annotations file a second time, rather than keep gigabytes of it through the training."""
    content = _read_json(path)
    records = {record["id"]: record for record in content["images"]}
    used = set(index.image_ids.tolist())
    good, _ = _check_annotations(content["annotations"], records, index.category_ids, path)
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
