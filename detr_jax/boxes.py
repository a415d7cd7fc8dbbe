"""Box formats, IoU and GIoU.

`cxcywh` is (center x, center y, width, height); `xyxy` is (left, top, right, bottom); `xywh`, COCO's, is (left, top,
width, height). Leading axes are free. Every function takes JAX arrays or NumPy arrays, and returns the same kind.

Degenerate boxes. IoU and GIoU are 0 / 0 where boxes have no area, so they are computed for boxes that are grown by 1e-8
on every side. For boxes normalized to the image that is less than the rounding of float32 coordinates; without area it
gives the limits that shrinking boxes have:

- equal boxes have IoU = GIoU = 1, points and segments too;
- a point or segment against a box with area has IoU = 0, and GIoU = the share of the hull that the box fills, minus 1;
- segments on one line have the IoU and GIoU of intervals;
- any other points and segments have IoU = 0 and GIoU = -1.

An inverted side (right < left or bottom < top) counts as a side of length 0 at its left or top. Values and gradients
are finite for all finite boxes of a sensible size (areas whose squares are finite in float32).
"""

from typing import TypeVar

import jax
import numpy as np

Array = TypeVar("Array", jax.Array, np.ndarray)

# Large enough that the square of an area, which the gradient of a quotient divides by, is a normal float32 number.
_GROWTH = 1e-8


def cxcywh_to_xyxy(boxes_cxcywh: Array) -> Array:
    """[..., 4] -> [..., 4]."""
    center, size = boxes_cxcywh[..., :2], boxes_cxcywh[..., 2:]
    return _namespace(boxes_cxcywh).concatenate([center - size / 2, center + size / 2], axis=-1)


def xyxy_to_cxcywh(boxes_xyxy: Array) -> Array:
    """[..., 4] -> [..., 4]."""
    start, stop = boxes_xyxy[..., :2], boxes_xyxy[..., 2:]
    return _namespace(boxes_xyxy).concatenate([(start + stop) / 2, stop - start], axis=-1)


def xyxy_to_xywh(boxes_xyxy: Array) -> Array:
    """[..., 4] -> [..., 4]."""
    start, stop = boxes_xyxy[..., :2], boxes_xyxy[..., 2:]
    return _namespace(boxes_xyxy).concatenate([start, stop - start], axis=-1)


def box_iou(a_xyxy: Array, b_xyxy: Array) -> Array:
    """Intersection over union of all pairs: [..., n, 4], [..., m, 4] -> [..., n, m], in [0, 1]."""
    intersection, union, _ = _areas(a_xyxy[..., :, None, :], b_xyxy[..., None, :, :])
    return intersection / union


def generalized_box_iou(a_xyxy: Array, b_xyxy: Array, epsilon: float = 0.0) -> Array:
    """GIoU (Rezatofighi et al., CVPR 2019) of all pairs: [..., n, 4], [..., m, 4] -> [..., n, m], in [-1, 1].

    `epsilon` is added to both areas that are divided by, as in DINO's code (1e-6).
    """
    return aligned_generalized_box_iou(a_xyxy[..., :, None, :], b_xyxy[..., None, :, :], epsilon)


def aligned_generalized_box_iou(a_xyxy: Array, b_xyxy: Array, epsilon: float = 0.0) -> Array:
    """GIoU of each box with its counterpart: [..., 4], [..., 4] -> [...], leading axes broadcast."""
    intersection, union, hull = _areas(a_xyxy, b_xyxy)
    return intersection / (union + epsilon) - (hull - union) / (hull + epsilon)


def _namespace(array):
    """jax.numpy or numpy."""
    return array.__array_namespace__()


def _areas(a_xyxy, b_xyxy):
    """Areas of the intersection, of the union and of the smallest enclosing box."""
    xp = _namespace(a_xyxy)
    a, b = ([boxes[..., i] for i in range(4)] for boxes in (a_xyxy, b_xyxy))
    area_a = area_b = intersection = hull = 1.0
    for start, stop in ((0, 2), (1, 3)):  # x, then y
        a_start, a_stop = a[start], xp.maximum(a[start], a[stop])
        b_start, b_stop = b[start], xp.maximum(b[start], b[stop])
        overlap = xp.minimum(a_stop, b_stop) - xp.maximum(a_start, b_start)
        extent = xp.maximum(a_stop, b_stop) - xp.minimum(a_start, b_start)
        area_a *= a_stop - a_start + 2 * _GROWTH
        area_b *= b_stop - b_start + 2 * _GROWTH
        intersection *= xp.maximum(overlap + 2 * _GROWTH, 0)
        hull *= extent + 2 * _GROWTH
    return intersection, area_a + area_b - intersection, hull
