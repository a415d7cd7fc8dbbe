"""Buckets: the few sizes (height, width) that batches are padded to, each of which is compiled once."""

import numpy as np

from detr_jax.errors import UserError

Bucket = tuple[int, int]

_MULTIPLE = 32
_MAX_BUCKETS = 8
_MIN_SAVING = 0.05  # of all pixels: what one more bucket has to save to be worth its compilation


def derive_buckets(sizes: np.ndarray, largest: np.ndarray) -> tuple[Bucket, ...]:
    """Chooses buckets that waste little on padding.

    The first one covers everything; then, greedily, the one that saves most pixels on the sample, as long as it saves
    5 % and there are not yet eight. Sides are multiples of 32. If all sizes are the same, that one is the only bucket.

    Args:
        sizes: [n, 2] a sample of final (h, w).
        largest: (h, w) at least as large as any size that is possible, in each direction.

    Returns:
        Buckets by area; the last covers `largest`.
    """
    if (sizes == largest).all():
        return ((int(largest[0]), int(largest[1])),)
    cover = round_up(largest)
    unique, counts = np.unique(round_up(sizes), axis=0, return_counts=True)
    sides = [np.unique(unique[:, axis]) for axis in (0, 1)]
    candidates = np.stack(np.meshgrid(*sides, indexing="ij"), -1).reshape(-1, 2)
    fits = np.all(unique <= candidates[:, None], axis=-1)
    area = candidates.prod(-1)
    pixels = np.full(len(unique), cover.prod())
    chosen = [(int(cover[0]), int(cover[1]))]
    while len(chosen) < _MAX_BUCKETS:
        saved = (np.where(fits, np.maximum(pixels - area[:, None], 0), 0) * counts).sum(1)
        best = int(saved.argmax())
        if saved[best] < _MIN_SAVING * (pixels * counts).sum():
            break
        chosen.append((int(candidates[best, 0]), int(candidates[best, 1])))
        pixels = np.where(fits[best], np.minimum(pixels, area[best]), pixels)
    return tuple(sorted(chosen, key=_area))


def smallest_bucket(buckets: tuple[Bucket, ...], sizes: np.ndarray) -> np.ndarray:
    """[n] number of the smallest bucket, sorted by area, that holds each of `sizes` [n, 2]; -1 where none does."""
    fits = np.all(sizes[:, None] <= np.array(buckets), axis=-1)
    return np.where(np.any(fits, axis=1), np.argmax(fits, axis=1), -1)


def check_buckets(buckets: tuple[Bucket, ...], sizes: np.ndarray, what: str) -> tuple[Bucket, ...]:
    """Sorts the buckets of a config by area.

    Raises:
        ValueError: one of `sizes` [n, 2] (h, w) fits none of them; `what` says whose size it is.
    """
    ordered = tuple(sorted(((int(h), int(w)) for h, w in buckets), key=_area))
    outside = sizes[smallest_bucket(ordered, sizes) < 0]
    if len(outside):
        h, w = outside[0]
        raise UserError(
            f"data.buckets: got {ordered} (height, width), none of which holds {h}x{w}, {what}: "
            "add a bucket, or remove data.buckets to derive them"
        )
    return ordered


def _area(bucket: Bucket) -> tuple[int, int]:
    return bucket[0] * bucket[1], bucket[0]


def round_up(sizes: np.ndarray) -> np.ndarray:
    """Sizes rounded up to multiples of 32, the coarsest stride of the backbones."""
    return -(-np.asarray(sizes, np.int64) // _MULTIPLE) * _MULTIPLE


def inference_buckets(scale: int, max_size: int) -> tuple[tuple[int, int], ...]:
    """The five buckets (height, width), smallest first, sides rounded up to multiples of 32.

    `resize_size` rounds the longer side of an image up to four times as long as wide to `max_size + 2` at most.
    """
    sides = sorted({min(round(scale * ratio), max_size) for ratio in (1, 4 / 3)} | {max_size + 2})
    short, *longer = (-(-side // 32) * 32 for side in sides)
    found = {(short, short)} | {pair for long in longer for pair in ((short, long), (long, short))}
    return tuple(sorted(found, key=lambda pair: (pair[0] * pair[1], pair)))
