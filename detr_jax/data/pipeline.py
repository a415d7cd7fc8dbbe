"""Reads and decodes the images of the sampler's batches, ahead of time; all that is done to pixels on the host.

Two engines make the same batches, bit by bit: `tf` (tf.data) and `pillow` (a thread pool). Both read images by
`DatasetIndex.image`.
"""

import importlib.util
import itertools
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol

import numpy as np

from detr_jax.config import DataConfig
from detr_jax.data.buckets import Bucket
from detr_jax.data.image import shrink
from detr_jax.data.index import DatasetIndex
from detr_jax.data.sampler import BatchPlan
from detr_jax.errors import DataError

Batch = dict[str, np.ndarray]


class Sampler(Protocol):
    """What the pipeline needs of `TrainSampler` and `EvalSampler`."""

    source_size: np.ndarray
    source_shape: Bucket

    def plan(self, step: int) -> BatchPlan:
        """The global batch of a step."""
        ...


def batches(
    index: DatasetIndex, sampler: Sampler, steps: Iterable[int], *, rows: slice = slice(None), data_config: DataConfig
) -> Generator[tuple[Bucket, Batch], None, None]:
    """Yields the bucket and the batch of each step, `data_config.prefetch` batches ahead.

    Args:
        index: the data set.
        sampler: a sampler of it.
        steps: which steps; may be endless.
        rows: rows of the global batch that this host takes.
        data_config: engine, workers, prefetch and cache.

    Yields:
        bucket (height, width), and a dict of the arrays of `BatchPlan` (but `bucket` and `index`) with `pixels` uint8
        [b, Hs, Ws, 3]: the images at the top left of the sampler's source bucket, black elsewhere. Closing the
        generator stops the threads.

    Raises:
        DataError: a file does not decode; names it.
    """
    plans = (sampler.plan(step).rows(rows) for step in steps)
    loader = _Loader(index, sampler, data_config.cache)
    run = _tf_batches if _engine(data_config) == "tf" else _pillow_batches
    yield from run(loader, plans, data_config)


def _engine(data: DataConfig) -> str:
    if data.engine != "auto":
        return data.engine
    # With a cache nearly every image is a copy in memory, which needs no TensorFlow.
    return "tf" if importlib.util.find_spec("tensorflow") and not data.cache else "pillow"


class _Loader:
    """Decodes image i to its source size, or takes it from the cache."""

    def __init__(self, index: DatasetIndex, sampler: Sampler, cache: bool):
        self.index = index
        self.bucket = sampler.source_shape
        self.sizes = sampler.source_size
        self.cache = cache

    def __call__(self, i: int) -> np.ndarray:
        size = tuple(self.sizes[i].tolist())
        if self.cache and (kept := self.index.decoded.get((i, size))) is not None:
            return kept
        pixels = np.asarray(shrink(self.index.image(i), size))
        if self.cache:
            self.index.decoded[i, size] = pixels
        return pixels


def _batch(plan: BatchPlan, pixels: np.ndarray) -> tuple[Bucket, Batch]:
    arrays = {name: array for name, array in vars(plan).items() if name not in ("bucket", "index")}
    return plan.bucket, {"pixels": pixels, **arrays}


def _pillow_batches(
    loader: _Loader, plans: Iterator[BatchPlan], data: DataConfig
) -> Generator[tuple[Bucket, Batch], None, None]:
    planner, pool = ThreadPoolExecutor(1, "plan"), ThreadPoolExecutor(max(data.workers, 1), "decode")

    def fill(pixels: np.ndarray, i: int) -> None:
        image = loader(i)
        pixels[: image.shape[0], : image.shape[1]] = image

    def start_next() -> tuple[BatchPlan, np.ndarray, list[Future[None]]] | None:
        plan = next(plans, None)
        if plan is None:
            return None
        pixels = np.zeros([len(plan.index), *loader.bucket, 3], np.uint8)
        return plan, pixels, [pool.submit(fill, pixels[row], int(i)) for row, i in enumerate(plan.index) if i >= 0]

    try:
        pending = deque(planner.submit(start_next) for _ in range(max(data.prefetch, 1)))
        while (started := pending.popleft().result()) is not None:
            pending.append(planner.submit(start_next))
            plan, pixels, futures = started
            for future in futures:
                future.result()
            yield _batch(plan, pixels)
    finally:
        planner.shutdown(cancel_futures=True)
        pool.shutdown(cancel_futures=True)


def _tf_batches(
    loader: _Loader, plans: Iterator[BatchPlan], data: DataConfig
) -> Generator[tuple[Bucket, Batch], None, None]:
    import tensorflow as tf

    tf.config.set_visible_devices([], "GPU")
    index = loader.index
    ahead: deque[BatchPlan] = deque()  # plans whose rows TensorFlow has taken, oldest first

    def rows() -> Iterator[int]:
        for plan in plans:
            ahead.append(plan)
            yield from plan.index.tolist()

    def image(i: np.ndarray) -> np.ndarray:
        return loader(int(i)) if i >= 0 else np.zeros([1, 1, 3], np.uint8)

    def load(i: Any) -> Any:
        return tf.ensure_shape(tf.numpy_function(image, [i], tf.uint8), [None, None, 3])

    first = next(plans, None)
    if first is None:
        return
    plans = itertools.chain([first], plans)
    dataset = tf.data.Dataset.from_generator(rows, output_signature=tf.TensorSpec([], tf.int64))
    dataset = dataset.map(load, num_parallel_calls=max(data.workers, 1), deterministic=True)
    dataset = dataset.padded_batch(len(first.index), [*loader.bucket, 3], drop_remainder=True)
    dataset = dataset.prefetch(max(data.prefetch, 1))
    options = tf.data.Options()
    options.threading.private_threadpool_size = max(data.workers, 1)
    iterator = iter(dataset.with_options(options))
    while True:
        try:
            pixels = next(iterator).numpy()
        except StopIteration:
            return
        except tf.errors.OpError as error:
            for i in ahead[0].index[ahead[0].index >= 0] if ahead else []:
                loader(int(i))  # raises an error that names the file
            names = [index.name(i) for i in (ahead[0].index if ahead else []) if i >= 0]
            raise DataError(f"one of {', '.join(names)}: {error.message}") from error
        yield _batch(ahead.popleft(), pixels)
