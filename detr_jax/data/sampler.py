"""Which images make a batch, and how each one is augmented: drawn from metadata alone, in NumPy.

A plan is a pure function of (seed, step) and of the data set. It describes the global batch, so the number of hosts
does not change the order, and training resumes at any step. The augmentation is the official one:
`RandomHorizontalFlip`, then half the time `RandomResize(scales, max_size)` and else `RandomResize(crop_scales)`,
`RandomSizeCrop(*crop_size)`, `RandomResize(scales, max_size)`.

Each batch is formed inside one bucket. The images that are left over where the buckets are cut into batches are merged
on the smallest bucket that covers them, so that an epoch leaves out `len(index) % batch_size` images drawn at random,
as the official `drop_last` does, and no more.
"""

import dataclasses
import functools

import numpy as np

from detr_jax.config import DataConfig
from detr_jax.data.buckets import Bucket, check_buckets, derive_buckets, smallest_bucket
from detr_jax.data.index import DatasetIndex
from detr_jax.data.transforms import resize_size, shrink_size, transform_boxes
from detr_jax.errors import UserError

_BUCKET_SAMPLE = 5000  # draws, at least, that the training buckets are derived from


@dataclasses.dataclass(frozen=True)
class BatchPlan:
    """A batch without its pixels; b rows, t boxes."""

    bucket: Bucket
    """(height, width) that the batch is padded to."""
    index: np.ndarray
    """int64 [b]: position in the `DatasetIndex`; -1 is a padding row."""
    source_size: np.ndarray
    """int32 [b, 2]: (h, w) of the decoded image."""
    flip: np.ndarray
    """bool [b]: flipped horizontally, before all else."""
    resized_size: np.ndarray
    """int32 [b, 2]: (h, w) after the first resize of the crop branch; `source_size` outside of it."""
    crop: np.ndarray
    """int32 [b, 4]: (top, left, height, width) in the resized image."""
    size: np.ndarray
    """int32 [b, 2]: final (h, w), at most `bucket`."""
    boxes_cxcywh: np.ndarray
    """float32 [b, t, 4]: relative to `size`; zeros after `num_boxes`."""
    labels: np.ndarray
    """int32 [b, t]: contiguous; zeros after `num_boxes`."""
    num_boxes: np.ndarray
    """int32 [b]."""
    image_id: np.ndarray
    """int64 [b]; -1 is a padding row."""
    orig_size: np.ndarray
    """int32 [b, 2]: annotated (h, w)."""


@dataclasses.dataclass(frozen=True)
class _Draw:
    """How each of n images is augmented; fields as in `BatchPlan`."""

    flip: np.ndarray
    resized_size: np.ndarray
    crop: np.ndarray
    size: np.ndarray
    cropped: np.ndarray
    """bool [n]: took the crop branch."""


@dataclasses.dataclass(frozen=True)
class _Epoch:
    draw: _Draw
    batches: np.ndarray
    """[steps, b] positions in the index."""
    buckets: list[Bucket]


class _Sampler:
    """What training and evaluation share."""

    def __init__(self, index: DatasetIndex, data: DataConfig, batch_size: int):
        if batch_size < 1:
            raise UserError(f"train.batch_size: got {batch_size}, expected at least 1")
        self.index = index
        self.batch_size = batch_size
        self.max_boxes = max(index.max_boxes, 1)
        """t: boxes per row of a plan."""
        self.source_size = shrink_size(index.sizes, data.max_source_side)
        """int32 [n, 2]: (h, w) of the decoded images."""
        height, width = self.source_size.max(0)
        self.source_shape: Bucket = (int(height), int(width))
        """(height, width) of the batches' `pixels`."""
        self.buckets: tuple[Bucket, ...] = ()
        """The buckets, by area."""

    def _fills_bucket(self, sizes: np.ndarray) -> bool:
        """Whether decoded images and final `sizes` [n, 2] are all those of the only bucket."""
        same = (self.source_size == self.source_shape).all() and (sizes == self.source_shape).all()
        return bool(same) and self.buckets == (self.source_shape,)

    def _uncropped(self, flip: np.ndarray, size: np.ndarray) -> _Draw:
        whole = np.concatenate([np.zeros_like(self.source_size), self.source_size], -1)
        return _Draw(flip, self.source_size, whole, size, np.zeros(len(size), bool))

    def _plan(self, bucket: Bucket, rows: np.ndarray, draw: _Draw) -> BatchPlan:
        """Rows [b] of the index, augmented as drawn; -1 makes a padding row of one pixel."""
        real = rows >= 0
        boxes_cxcywh = np.zeros([len(rows), self.max_boxes, 4], np.float32)
        labels = np.zeros([len(rows), self.max_boxes], np.int32)
        num_boxes = np.zeros(len(rows), np.int32)
        for row, i in enumerate(rows):
            if i >= 0:
                crop = (draw.resized_size[i], draw.crop[i]) if draw.cropped[i] else None
                boxes, kept = transform_boxes(
                    self.index.boxes_xyxy[i], self.index.sizes[i], bool(draw.flip[i]), crop, draw.size[i]
                )
                num_boxes[row] = len(boxes)
                boxes_cxcywh[row, : len(boxes)] = boxes
                labels[row, : len(boxes)] = self.index.labels[i][kept]

        def pick(array: np.ndarray, padding: int | list[int]) -> np.ndarray:
            mask = real.reshape(-1, *[1] * (array.ndim - 1))
            return np.where(mask, array[rows], np.array(padding, array.dtype))

        return BatchPlan(
            bucket=bucket,
            index=rows,
            source_size=pick(self.source_size, [1, 1]),
            flip=pick(draw.flip, 0),
            resized_size=pick(draw.resized_size, [1, 1]),
            crop=pick(draw.crop, [0, 0, 1, 1]),
            size=pick(draw.size, [1, 1]),
            boxes_cxcywh=boxes_cxcywh,
            labels=labels,
            num_boxes=num_boxes,
            image_id=pick(self.index.image_ids, -1),
            orig_size=pick(self.index.sizes, [1, 1]),
        )


class TrainSampler(_Sampler):
    """Augmented batches without end: step s belongs to epoch `s // len(sampler)`.

    Args:
        index: the training set.
        data: augmentation and buckets.
        batch_size: global batch b.
        seed: of the order and of the augmentation; at least 0.

    Raises:
        ValueError: fewer images than `batch_size`, sizes that are not positive, or buckets that are too small.
    """

    def __init__(self, index: DatasetIndex, data: DataConfig, batch_size: int, seed: int):
        super().__init__(index, data, batch_size)
        if len(index) < batch_size:
            raise UserError(
                f"train.batch_size: got {batch_size}, but the training set has {len(index)} images: "
                f"pass --train.batch-size {len(index)} or less"
            )
        for field in ("scales", "crop_scales"):
            if min(getattr(data, field), default=0) < 1:
                raise UserError(f"data.{field}: got {getattr(data, field)}, expected one or more sizes in pixels")
        if not 1 <= data.crop_size[0] <= data.crop_size[1]:
            raise UserError(f"data.crop_size: got {data.crop_size}, expected (smallest, largest) in pixels")
        self._data = data
        self._seed = seed
        possible = self._possible_sizes()
        largest = possible.max(0)
        if data.buckets is None:
            rng = np.random.default_rng(0)  # of its own, so that the buckets do not depend on the seed
            draws = [self._draw_images(rng).size for _ in range(-(-_BUCKET_SAMPLE // len(index)))]
            self.buckets = derive_buckets(np.concatenate(draws), largest)
        else:
            self.buckets = check_buckets(data.buckets, largest[None], "the largest training height and width")
        self.two_resizes = data.crop
        """Some images are resized twice: an argument of `resample`."""
        self.only_flip = not data.crop and self._fills_bucket(possible)
        """No image is resized: an argument of `resample`."""
        self._epoch = functools.lru_cache(maxsize=2)(self._draw_epoch)

    every_image_once = False
    """A bad image's place may be taken by another one: see `pipeline.batches`."""

    def __len__(self) -> int:
        """Steps of an epoch."""
        return len(self.index) // self.batch_size

    def plan(self, step: int, rows: slice = slice(None)) -> BatchPlan:
        """The global batch of a step, counted from 0 over all epochs, or some of its rows."""
        number, position = divmod(step, len(self))
        epoch = self._epoch(number)
        return self._plan(epoch.buckets[position], epoch.batches[position][rows], epoch.draw)

    def _draw_epoch(self, number: int) -> _Epoch:
        # Nothing is carried from epoch to epoch: (seed, number) is the key of a counter-based generator.
        rng = np.random.Generator(np.random.Philox(np.random.SeedSequence([self._seed, number])))
        draw = self._draw_images(rng)
        order = rng.permutation(len(self.index))[: len(self) * self.batch_size]
        bucket_of = smallest_bucket(self.buckets, draw.size[order])
        full, left = [], []
        for i in range(len(self.buckets)):
            members = order[bucket_of == i]
            cut = len(members) // self.batch_size * self.batch_size
            full.append(members[:cut])
            left.append(members[cut:])
        left = np.concatenate(left)
        heights, widths = draw.size[left].T
        left = left[np.lexsort((np.maximum(heights, widths), heights > widths))]  # alike ones share a batch
        batches = np.concatenate([*full, left]).reshape(-1, self.batch_size)
        batches = rng.permutation(batches)
        bucket_of = smallest_bucket(self.buckets, draw.size[batches].max(1))
        return _Epoch(draw, batches, [self.buckets[i] for i in bucket_of])

    def _draw_images(self, rng: np.random.Generator) -> _Draw:
        data, sizes, n = self._data, self.index.sizes, len(self.index)
        flip = (rng.random(n) < 0.5) & data.flip
        scale = rng.choice(np.array(data.scales), n)
        draw = self._uncropped(flip, resize_size(sizes, scale, data.max_size))
        if not data.crop:
            return draw
        cropped = rng.random(n) < 0.5
        first = resize_size(sizes, rng.choice(np.array(data.crop_scales), n))
        low, high = np.minimum(data.crop_size[0], first), np.minimum(data.crop_size[1], first)
        crop_size = rng.integers(low, high, endpoint=True)
        corner = rng.integers(0, first - crop_size, endpoint=True)
        crop = np.concatenate([corner, crop_size], -1).astype(np.int32)
        either = cropped[:, None]
        return _Draw(
            flip=flip,
            resized_size=np.where(either, first, draw.resized_size),
            crop=np.where(either, crop, draw.crop),
            size=np.where(either, resize_size(crop_size, scale, data.max_size), draw.size),
            cropped=cropped,
        )

    def _possible_sizes(self) -> np.ndarray:
        """[n, 2] final sizes, among them the largest height and the largest width that can be drawn."""
        data, sizes = self._data, np.unique(self.index.sizes, axis=0)
        before = [sizes]
        if data.crop:
            first = np.concatenate([resize_size(sizes, scale) for scale in data.crop_scales])
            low, high = np.minimum(data.crop_size[0], first).min(0), np.minimum(data.crop_size[1], first).max(0)
            crops = np.meshgrid(np.arange(low[0], high[0] + 1), np.arange(low[1], high[1] + 1))
            before.append(np.stack(crops, -1).reshape(-1, 2))
        return np.concatenate([resize_size(b, scale, data.max_size) for b in before for scale in data.scales])


class EvalSampler(_Sampler):
    """Each image exactly once at the evaluation scale, bucket after bucket.

    The last batch of each bucket is filled with padding rows: `index` and `image_id` are -1, one black pixel, no boxes.

    Args:
        index: the validation set.
        data: scale and buckets.
        batch_size: global batch b.
        flip: every image left to right.

    Raises:
        ValueError: an image fits none of `data.buckets`.
    """

    every_image_once = True
    """A bad image's place stays empty: see `pipeline.batches`."""
    two_resizes = False
    """No image is resized twice: an argument of `resample`."""

    def __init__(self, index: DatasetIndex, data: DataConfig, batch_size: int, *, flip: bool = False):
        super().__init__(index, data, batch_size)
        if data.eval_scale < 1:
            raise UserError(f"data.eval_scale: got {data.eval_scale}, expected a size in pixels")
        sizes = resize_size(index.sizes, data.eval_scale, data.max_size)
        if data.buckets is None:
            buckets = derive_buckets(sizes, sizes.max(0))
        else:
            buckets = check_buckets(data.buckets, sizes, f"an image at data.eval_scale {data.eval_scale}")
        self.buckets = tuple(buckets[i] for i in np.unique(smallest_bucket(buckets, sizes)))
        self.only_flip = self._fills_bucket(sizes)
        """No image is resized: an argument of `resample`."""
        self._draw = self._uncropped(np.full(len(index), flip), sizes)
        self._batches: list[tuple[Bucket, np.ndarray]] = []
        bucket_of = smallest_bucket(self.buckets, sizes)
        for i, bucket in enumerate(self.buckets):
            members = np.flatnonzero(bucket_of == i)
            rows = np.pad(members, (0, -len(members) % batch_size), constant_values=-1)
            self._batches += [(bucket, batch) for batch in rows.reshape(-1, batch_size)]

    def __len__(self) -> int:
        """Steps of the evaluation."""
        return len(self._batches)

    def plan(self, step: int, rows: slice = slice(None)) -> BatchPlan:
        """The global batch of a step, from 0 to `len(self) - 1`, or some of its rows."""
        bucket, batch = self._batches[step]
        return self._plan(bucket, batch[rows], self._draw)
