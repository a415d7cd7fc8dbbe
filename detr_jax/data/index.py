"""The index of a data set: everything but the pixels. `coco` and `tfds` fill it; nothing else knows formats."""

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import numpy as np

from detr_jax.errors import DataError

OnBad = Literal["error", "skip"]
Split = Literal["train", "val"]


_SHOWN = 10  # problems listed in an error


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
    plain: np.ndarray
    """bool [n]: a JPEG file at `names[i]` that needs neither rotation nor color conversion."""
    read: Callable[[int], bytes] = dataclasses.field(repr=False)
    """Reads image i."""
    read_ground_truth: Callable[[], dict[str, Any]] = dataclasses.field(repr=False)
    """Reads what `ground_truth` returns."""
    annotated: bool = True
    """Whether there are annotations at all: not in COCO's test sets, which can be detected on but not scored."""
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


def index_boxes(
    image_ids: Sequence[int], sizes: np.ndarray, entries: Iterable[tuple[int, Sequence[float], int, bool]]
) -> tuple[tuple[np.ndarray, ...], tuple[np.ndarray, ...], list[str]]:
    """Groups boxes by image, as the official `ConvertCocoPolysToMask` does: no crowd, clipped, without area dropped.

    Args:
        image_ids: n ids, in the order of the index.
        sizes: [n, 2] (h, w).
        entries: (image id, (x, y, width, height), label, is crowd) of each annotation.

    Returns:
        boxes_xyxy, labels (see `DatasetIndex`) and lines for the report.
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
