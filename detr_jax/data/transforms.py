"""What the official `datasets/transforms.py` does to sizes and boxes, with its roundings. Pixels: see `resample`."""

import numpy as np


def resize_size(sizes: np.ndarray, scale: np.ndarray | int, max_size: int | None = None) -> np.ndarray:
    """`get_size_with_aspect_ratio`.

    Args:
        sizes: [..., 2] (h, w).
        scale: [...] wanted shorter side.
        max_size: limit of the longer side. Rounding may exceed it by a pixel or two, as it does there.

    Returns:
        int32 [..., 2] (h, w).
    """
    sizes = np.asarray(sizes, np.int64)
    short, long = sizes.min(-1), sizes.max(-1)
    scale = np.broadcast_to(scale, short.shape).astype(np.int64)
    if max_size is not None:
        capped = np.rint(max_size * short / long).astype(np.int64)
        scale = np.where(long / short * scale > max_size, np.maximum(capped, 1), scale)
    other = (scale * long / short).astype(np.int64)  # int() of a true division, as there
    portrait = (sizes[..., 0] > sizes[..., 1])[..., None]
    result = np.where(portrait, np.stack([other, scale], -1), np.stack([scale, other], -1))
    return np.where((short == scale)[..., None], sizes, result).astype(np.int32)


def shrink_size(sizes: np.ndarray, max_side: int) -> np.ndarray:
    """Sizes [n, 2] of images after those with a longer side than `max_side` are shrunk to it; int32 [n, 2]."""
    long = sizes.max(-1, keepdims=True)
    smaller = np.maximum(np.rint(sizes * (max_side / long)), 1)
    return np.where(long > max_side, smaller, sizes).astype(np.int32)


def transform_boxes(
    boxes_xyxy: np.ndarray,
    orig_size: np.ndarray,
    flip: bool,
    crop: tuple[np.ndarray, np.ndarray] | None,
    size: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """Flips, crops and normalizes boxes, operation by operation as the official code does, in float32.

    Args:
        boxes_xyxy: float32 [m, 4] pixels of the annotated image.
        orig_size: (h, w) of the annotated image.
        flip: horizontally.
        crop: (h, w) after the first resize, and (top, left, height, width) of the crop in it; or `None`.
        size: final (h, w).

    Returns:
        boxes_cxcywh float32 [m', 4] relative to `size`, and bool [m]: which boxes are left. A crop clips the boxes and
        drops those without area.
    """
    kept = np.ones(len(boxes_xyxy), bool)
    boxes = boxes_xyxy
    height, width = (float(x) for x in orig_size)
    if flip:
        boxes = boxes[:, [2, 1, 0, 3]] * _xyxy(-1, 1) + _xyxy(width, 0)
    if crop is not None:
        (first_h, first_w), (top, left, crop_h, crop_w) = crop
        boxes = boxes * _xyxy(first_w / width, first_h / height)
        boxes = boxes - _xyxy(left, top)
        boxes = np.maximum(np.minimum(boxes, _xyxy(crop_w, crop_h)), np.float32(0))
        kept = np.asarray((boxes[:, 2:] > boxes[:, :2]).all(1))
        boxes = boxes[kept]
        height, width = float(crop_h), float(crop_w)
    boxes = boxes * _xyxy(size[1] / width, size[0] / height)
    x0, y0, x1, y1 = boxes.T
    boxes = np.stack([(x0 + x1) / 2, (y0 + y1) / 2, x1 - x0, y1 - y0], -1)
    return boxes / _xyxy(size[1], size[0]), kept


def _xyxy(x: float, y: float) -> np.ndarray:
    return np.array([x, y, x, y], np.float32)
