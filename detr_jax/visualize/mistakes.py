"""What a detector gets wrong on a data set: false positives and misses with what they cost, and confused classes."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from PIL import Image
from tqdm import tqdm

from detr_jax.boxes import box_iou
from detr_jax.data.index import DatasetIndex
from detr_jax.detector import Detector

Kind = Literal["miss", "wrong class", "duplicate", "badly placed", "nothing there"]

_CHEAPEST = 1e-3  # score of an object that no box at all is on


@dataclasses.dataclass(frozen=True, eq=False)
class Found:
    """All detections in one image, best first."""

    boxes_xyxy: np.ndarray
    """float32 [n, 4], pixels of the image."""
    labels: np.ndarray
    """int [n]."""
    scores: np.ndarray
    """float32 [n]."""


@dataclasses.dataclass(frozen=True, eq=False)
class Error:
    """A false positive or a miss."""

    kind: Kind
    """A miss, or what is wrong with the detection."""
    image: int
    """Position of the image in the index."""
    box_xyxy: np.ndarray
    """float32 [4]: of the detection, or of the object that was missed."""
    label: int
    """Class of it."""
    score: float
    """Of the detection; for a miss the best score that a box on it has for its class, 0 if there is no such box."""
    cost: float
    """In nats: -log(1 - score) of a detection that should not be, -log(score) of one that should."""
    other_xyxy: np.ndarray | None = None
    """float32 [4]: the object that the detection is on, or the detection that is on, or next to, the object missed."""
    other_label: int | None = None
    """Class of that."""


def detect_all(detector: Detector, index: DatasetIndex) -> tuple[list[Found], list[dict[str, Any]]]:
    """Runs a detector over a data set.

    Returns:
        All detections of each image, and the same in COCO's results format, for `scoring.score`.
    """
    found, results = [], []
    images = (read_image(index, i) for i in range(len(index)))
    for i, one in enumerate(tqdm(detector.detect(images, 0.0), "detecting", len(index), leave=False, unit=" images")):
        found.append(Found(one.boxes_xyxy, one.labels, one.scores))
        results += one.as_results(int(index.image_ids[i]))
    return found, results


def read_image(index: DatasetIndex, i: int) -> Image.Image:
    """Image i of a data set."""
    return index.image(i)


def find_mistakes(
    index: DatasetIndex, found: Sequence[Found], *, threshold: float = 0.5, iou: float = 0.5
) -> list[Error]:
    """False positives and misses of all images, the most expensive first.

    As in COCO's evaluation at one overlap: of each class, detections of at least `threshold` take, best first, the
    object left that they overlap most, if by at least `iou`. The others are false positives, the objects left misses.
    A false positive is a `duplicate` on an object that a better one has taken, of the `wrong class` on an object of
    another, `badly placed` with an overlap of 0.1 with one of its class, or there is `nothing there`. (Crowds are not
    objects: what is on them is a false positive here.)
    """
    errors = []
    for i, detections in enumerate(found):
        errors += image_mistakes(i, index.boxes_xyxy[i], index.labels[i], detections, threshold=threshold, iou=iou)
    return sorted(errors, key=lambda error: -error.cost)


def image_mistakes(
    image: int,
    true_boxes_xyxy: np.ndarray,
    true_labels: np.ndarray,
    found: Found,
    *,
    threshold: float = 0.5,
    iou: float = 0.5,
) -> list[Error]:
    """As `find_mistakes`, of one image, in no order."""
    errors = []
    overlaps = box_iou(found.boxes_xyxy, true_boxes_xyxy)
    free = np.ones(len(true_labels), bool)
    for n in np.argsort(-found.scores, kind="stable"):
        if found.scores[n] < threshold:
            break
        same = true_labels == found.labels[n]
        candidates = np.where(same & free, overlaps[n], -1)
        if candidates.max(initial=-1) >= iou:
            free[candidates.argmax()] = False
            continue
        own, others = np.where(same, overlaps[n], -1), np.where(same, -1, overlaps[n])
        kind, on = "nothing there", None
        if own.max(initial=-1) >= iou:
            kind, on = "duplicate", int(own.argmax())
        elif others.max(initial=-1) >= iou:
            kind, on = "wrong class", int(others.argmax())
        elif own.max(initial=-1) >= 0.1:
            kind, on = "badly placed", int(own.argmax())
        cost = -math.log(max(1 - float(found.scores[n]), 1e-7))
        other = (None, None) if on is None else (true_boxes_xyxy[on], int(true_labels[on]))
        box = found.boxes_xyxy[n]
        errors.append(Error(kind, image, box, int(found.labels[n]), float(found.scores[n]), cost, *other))
    for t in np.flatnonzero(free):
        own = np.where(found.labels == true_labels[t], overlaps[:, t], 0)
        fitting = np.where((own >= iou) & (found.scores < threshold), found.scores, 0)
        score = float(fitting.max(initial=0))
        n = int(fitting.argmax()) if score else int(own.argmax()) if own.max(initial=0) >= 0.1 else None
        other = (None, None) if n is None else (found.boxes_xyxy[n], int(found.labels[n]))
        cost = -math.log(max(score, _CHEAPEST))
        errors.append(Error("miss", image, true_boxes_xyxy[t], int(true_labels[t]), score, cost, *other))
    return errors


def confusion(index: DatasetIndex, found: Sequence[Found], *, threshold: float = 0.5, iou: float = 0.5) -> np.ndarray:
    """How often an object of class i was taken for class j: int [k + 1, k + 1].

    The last row counts detections on no object, the last column missed objects. Whatever the classes, detections of at
    least `threshold` take, best first, the object left that they overlap most, if by at least `iou`.
    """
    k = index.num_classes
    counts = np.zeros((k + 1, k + 1), int)
    for boxes, labels, one in zip(index.boxes_xyxy, index.labels, found, strict=True):
        overlaps = box_iou(one.boxes_xyxy, boxes)
        free = np.ones(len(labels), bool)
        for n in np.argsort(-one.scores, kind="stable"):
            if one.scores[n] < threshold:
                break
            candidates = np.where(free, overlaps[n], -1)
            row = k
            if candidates.max(initial=-1) >= iou:
                row = labels[candidates.argmax()]
                free[candidates.argmax()] = False
            counts[row, one.labels[n]] += 1
        counts[:k, k] += np.bincount(labels[free], minlength=k)
    return counts
