"""The index of a data set: everything but the pixels. `coco` and `tfds` fill it; nothing else knows formats."""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from PIL import Image

from detr_jax.data.image import decode
from detr_jax.errors import DataError, UserError

OnBad = Literal["error", "skip"]
Split = Literal["train", "val"]


_SHOWN = 10  # problems listed in an error
_FARTHEST = 1e9  # pixels: beyond any image, and exact enough in float32 to be clipped to one


@dataclasses.dataclass(frozen=True, eq=False)
class DatasetIndex:
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
    read: Callable[[int], bytes] = dataclasses.field(repr=False)
    """Reads image i."""
    read_ground_truth: Callable[[], dict[str, Any]] = dataclasses.field(repr=False)
    """Reads what `ground_truth` returns."""
    annotated: bool = True
    """Whether there are annotations at all: not in COCO's test sets, which can be detected on but not scored."""
    decoded: dict[tuple[int, tuple[int, int]], np.ndarray] = dataclasses.field(default_factory=dict, repr=False)
    """What `DataConfig.cache` keeps: (image, its decoded (h, w)) -> uint8 [h, w, 3]."""
    skipped: dict[int, str] = dataclasses.field(default_factory=dict, repr=False)
    """Images that turned out to be bad when they were read, where such are skipped: what is wrong with each."""

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

    def image(self, i: int) -> Image.Image:
        """Image i, upright, RGB, of its annotated size.

        Raises:
            DataError: the file cannot be read, does not decode, or not to the annotated size; names it.
        """
        name, (height, width) = self.name(i), self.sizes[i].tolist()
        try:
            image = decode(self.encoded(i), name)
        except OSError as error:
            raise DataError(f"{name}: {error}") from error
        except UserError as error:
            raise DataError(str(error)) from error
        if image.size != (width, height):
            raise DataError(
                f"{name}: size (h, w): got {(image.height, image.width)}, expected the annotated {(height, width)}"
            )
        return image

    def name(self, i: int) -> str:
        """Path or key of image i, for messages."""
        return self.names[i]

    def fingerprint(self) -> str:
        """A digest of everything but the pixels and where they are; two indexes with the same one hold the same."""
        digest = hashlib.sha256(json.dumps([self.category_ids, self.category_names]).encode())
        for array in (self.image_ids, self.sizes, *self.boxes_xyxy, *self.labels):
            digest.update(f"{array.dtype}{array.shape}".encode())
            digest.update(array.tobytes())
        return digest.hexdigest()

    def ground_truth(self) -> dict[str, Any]:
        """The data set as pycocotools takes it: `images`, `categories` and all `annotations`, the crowd ones too.

        Boxes are as annotated, not clipped. Annotations are numbered anew from 1 (pycocotools counts a match with
        annotation 0 as none); skipped images and annotations, and boxes without area, are left out.
        """
        return self.read_ground_truth()


class Annotation(NamedTuple):
    """A box as it was read: what it means is decided."""

    image_id: Any
    label: int
    bbox: Sequence[float]
    """(x, y, width, height), pixels of the annotated image, not clipped."""
    area: float
    """Square pixels: that of the object's mask where there is one, by which COCO's evaluation tells sizes apart."""
    crowd: bool
    text: bool = False
    """Whether a number was written as text."""


@dataclasses.dataclass(frozen=True, eq=False)
class GroundTruth:
    """The boxes that are scored, crowds among them: arrays of all images, one after another."""

    image: np.ndarray
    """int32 [m]: position of the image in the index."""
    label: np.ndarray
    """int32 [m]."""
    bbox: np.ndarray
    """float64 [m, 4]: as annotated."""
    area: np.ndarray
    """float64 [m]."""
    crowd: np.ndarray
    """bool [m]."""

    def ground_truth(
        self, images: Sequence[Mapping[str, Any]], category_ids: Sequence[int], category_names: Sequence[str]
    ) -> dict[str, Any]:
        """As `DatasetIndex.ground_truth`."""
        columns = (column.tolist() for column in (self.image, self.label, self.bbox, self.area, self.crowd))
        return {
            "images": list(images),
            "annotations": [
                {
                    "id": number,
                    "image_id": images[image]["id"],
                    "category_id": category_ids[label],
                    "bbox": bbox,
                    "area": area,
                    "iscrowd": int(crowd),
                }
                for number, (image, label, bbox, area, crowd) in enumerate(zip(*columns, strict=True), 1)
            ],
            "categories": [{"id": i, "name": name} for i, name in zip(category_ids, category_names, strict=True)],
        }


def index_boxes(
    image_ids: Sequence[Any], sizes: np.ndarray, annotations: Iterable[Annotation]
) -> tuple[tuple[np.ndarray, ...], tuple[np.ndarray, ...], GroundTruth, list[str]]:
    """Groups boxes by image; those without area are left out, of training and of scoring alike.

    Those for training are as in the official `ConvertCocoPolysToMask`: without crowds, clipped.

    Args:
        image_ids: n ids, in the order of the index.
        sizes: [n, 2] (h, w).
        annotations: of these images and others, whose are left out.

    Returns:
        boxes_xyxy, labels (see `DatasetIndex`), what is scored, and lines for the report.
    """
    grouped: dict[Any, list[Annotation]] = {i: [] for i in image_ids}
    for annotation in annotations:
        if annotation.image_id in grouped:  # else its image was skipped
            grouped[annotation.image_id].append(annotation)
    all_boxes, all_labels, scored, flat, text = [], [], [], 0, 0
    for i, ((h, w), group) in enumerate(zip(sizes.tolist(), grouped.values(), strict=True)):
        boxes = np.array([annotation.bbox for annotation in group], np.float32).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        boxes = np.clip(boxes, 0, np.array([w, h, w, h], np.float32))
        labels = np.array([annotation.label for annotation in group], np.int32)
        crowd = np.array([annotation.crowd for annotation in group], bool)
        has_area = (boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])
        all_boxes.append(boxes[has_area & ~crowd])
        all_labels.append(labels[has_area & ~crowd])
        scored += [(i, annotation) for annotation, keep in zip(group, has_area, strict=True) if keep]
        flat += int((~has_area).sum())
        text += sum(annotation.text for annotation in group)
    truth = GroundTruth(
        image=np.array([i for i, _ in scored], np.int32),
        label=np.array([annotation.label for _, annotation in scored], np.int32),
        bbox=np.array([annotation.bbox for _, annotation in scored], np.float64).reshape(-1, 4),
        area=np.array([annotation.area for _, annotation in scored], np.float64),
        crowd=np.array([annotation.crowd for _, annotation in scored], bool),
    )
    crowds, empty = int(truth.crowd.sum()), sum(not len(labels) for labels in all_labels)
    report = [f"{crowds} crowd annotations left out of training"] * (crowds > 0)
    report += [f"{flat} boxes without area dropped, from training and scoring"] * (flat > 0)
    report += [f"{text} annotations with iscrowd or area as text, read as numbers"] * (text > 0)
    report += [f"{empty} images without boxes kept"] * (empty > 0)
    return tuple(all_boxes), tuple(all_labels), truth, report


def skip_report(what: str, problems: Sequence[str]) -> list[str]:
    """The line of a report about what was skipped."""
    return [f"{len(problems)} bad {what} skipped; the first: {problems[0]}"] if problems else []


def id_problem(value: Any) -> str | None:
    """Says what is wrong with the id of an image or a category, or `None`."""
    if type(value) is int and 0 <= value < 2**63:
        return None
    return f"got {shown(value)}, expected an integer from 0 to 2^63 - 1"


def box_problem(box: Any, size: tuple[int, int] | None) -> str | None:
    """Says what is wrong with an annotated (x, y, width, height), or `None`; no area is no problem here.

    Args:
        box: what the file has.
        size: (h, w) of its image; `None`: not known.
    """
    numbers = isinstance(box, list | tuple) and len(box) == 4 and all(type(v) in (int, float) for v in box)
    if not numbers or not all(-_FARTHEST < v < _FARTHEST for v in box):
        return f"bbox: got {shown(box)}, expected 4 finite numbers (x, y, width, height)"
    if size is None:
        return None
    x, y, w, h = box
    height, width = size
    if w > 0 and h > 0 and (x >= width or y >= height or x + w <= 0 or y + h <= 0):
        return f"bbox: got (x, y, width, height) {box}, entirely outside its image of {height}x{width} (h, w)"
    return None


def shown(value: Any) -> str:
    """A value for a message: short, however long it is."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:60]}... ({len(text)} characters)"


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
