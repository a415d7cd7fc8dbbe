"""Test-time augmentation: an image is detected on at several scales, as it is and flipped, and the boxes are merged.

Merging is weighted boxes fusion (Solovyev et al., Image and Vision Computing 2021). Boxes of one class from different
views that overlap are one object: its box is their mean, weighted by score, and its score their sum divided by the
number of views, so that what few views see counts less. Unlike non-maximum suppression, which keeps the best view's box
and throws away the others, it uses them all to place the box. One rule is added: a cluster has at most one box of a
view. A DETR has no duplicates to suppress within a view: two overlapping boxes there are two objects of a crowd. Where
no view has such a pair, the result is that of the authors' library, `ensemble-boxes`.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from detr_jax.boxes import box_iou


def scaled_max_size(size: int, scale: int, max_size: int) -> int:
    """The longest side of a view of that size, where that of the usual `scale` is `max_size`."""
    return round(max_size * size / scale)


class Boxes(NamedTuple):
    """Detections of an image."""

    scores: np.ndarray
    """float [n]."""
    labels: np.ndarray
    """int [n]."""
    boxes_xyxy: np.ndarray
    """float [n, 4]."""


def flip_boxes(boxes_xyxy: np.ndarray, width: int) -> np.ndarray:
    """Boxes `[..., 4]` of an image of that width, of its mirror image."""
    left, top, right, bottom = np.moveaxis(boxes_xyxy, -1, 0)
    return np.stack([width - right, top, width - left, bottom], -1)


def merge(views: Sequence[Boxes], iou: float, top_k: int = 100) -> Boxes:
    """Weighted boxes fusion, at most one box of a view in each.

    Args:
        views: the detections of one image in each view, in pixels of the image.
        iou: boxes of one class that overlap more than this are one object.
        top_k: the best that are kept.

    Returns:
        The merged detections, best first.
    """
    scores, labels, boxes = (np.concatenate(column) for column in zip(*views, strict=True))
    view_of = np.repeat(np.arange(len(views)), [len(view.scores) for view in views])
    merged: list[tuple[float, int, np.ndarray]] = []
    for label in np.unique(labels):
        clusters: list[list[int]] = []
        means = np.empty((0, 4))
        for i in sorted(np.flatnonzero(labels == label).tolist(), key=lambda i: -scores[i]):
            overlap = box_iou(boxes[i : i + 1].astype(float), means)[0]
            taken = np.array([view_of[i] in view_of[cluster] for cluster in clusters], bool)
            overlap[taken] = 0
            best = int(overlap.argmax()) if len(overlap) else -1
            if best >= 0 and overlap[best] > iou:
                clusters[best].append(i)
                means[best] = np.average(boxes[clusters[best]], 0, np.maximum(scores[clusters[best]], 1e-12))
            else:
                clusters.append([i])
                means = np.concatenate([means, boxes[i : i + 1]])
        merged += [
            (float(scores[cluster].sum()) / len(views), int(label), mean)
            for cluster, mean in zip(clusters, means, strict=True)
        ]
    merged.sort(key=lambda found: -found[0])
    merged = merged[:top_k]
    return Boxes(
        np.array([score for score, _, _ in merged], np.float32),
        np.array([label for _, label, _ in merged], np.int32),
        np.array([box for _, _, box in merged], np.float32).reshape(-1, 4),
    )
