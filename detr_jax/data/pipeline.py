"""Reads and decodes the images of the sampler's batches, ahead of time; all that is done to pixels on the host.

Two engines make the same batches, bit by bit: `tf` (tf.data) and `pillow` (a thread pool). Both read images by
`DatasetIndex.image`.
"""

import importlib.util
import itertools
import queue
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future
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
    every_image_once: bool

    def plan(self, step: int, rows: slice = slice(None)) -> BatchPlan:
        """The global batch of a step, or some of its rows."""
        ...


def batches(
    index: DatasetIndex,
    sampler: Sampler,
    steps: Iterable[int],
    *,
    rows: slice = slice(None),
    data_config: DataConfig,
    reading: set[str] | None = None,
) -> Generator[tuple[Bucket, Batch], None, None]:
    """Yields the bucket and the batch of each step, `data_config.prefetch` batches ahead.

    Args:
        index: the data set.
        sampler: a sampler of it.
        steps: which steps; may be endless.
        rows: rows of the global batch that this host takes.
        data_config: engine, workers, prefetch, cache, and whether images that turn out to be bad are skipped. In
            training another image of the batch takes the place of a skipped one; in evaluation `image_id` is -1, and
            the index notes it in `skipped`.
        reading: filled with the names of the files that are being read, for messages.

    Yields:
        bucket (height, width), and a dict of the arrays of `BatchPlan` (but `bucket` and `index`) with `pixels` uint8
        [b, Hs, Ws, 3]: the images at the top left of the sampler's source bucket, black elsewhere. Closing the
        generator stops the threads.

    Raises:
        DataError: a file does not decode; names it.
    """
    plans = (sampler.plan(step, rows) for step in steps)
    loader = _Loader(index, sampler, data_config, set() if reading is None else reading)
    run = _tf_batches if _engine(data_config) == "tf" else _pillow_batches
    yield from run(loader, plans, data_config)


def _engine(data: DataConfig) -> str:
    if data.engine != "auto":
        return data.engine
    # With a cache nearly every image is a copy in memory, which needs no TensorFlow.
    return "tf" if importlib.util.find_spec("tensorflow") and not data.cache else "pillow"


class _Loader:
    """Decodes image i to its source size, or takes it from the cache; black where a bad image is skipped."""

    def __init__(self, index: DatasetIndex, sampler: Sampler, data: DataConfig, reading: set[str]):
        self.index = index
        self.bucket = sampler.source_shape
        self.sizes = sampler.source_size
        self.every_image_once = sampler.every_image_once
        self.cache = data.cache
        self.skip = data.on_bad_image == "skip"
        self.reading = reading

    def __call__(self, i: int) -> np.ndarray:
        try:
            return self._load(i)
        except DataError as error:
            if not self.skip:
                raise
            if i not in self.index.skipped:
                print(f"skipped from now on: {error}", flush=True)
            self.index.skipped[i] = str(error)
            return np.zeros([1, 1, 3], np.uint8)

    def _load(self, i: int) -> np.ndarray:
        size = tuple(self.sizes[i].tolist())
        if self.cache and (kept := self.index.decoded.get((i, size))) is not None:
            return kept
        name = self.index.name(i)
        self.reading.add(name)
        try:
            pixels = np.asarray(shrink(self.index.image(i), size))
        finally:
            self.reading.discard(name)
        if self.cache:
            self.index.decoded[i, size] = pixels
        return pixels

    def batch(self, plan: BatchPlan, pixels: np.ndarray) -> tuple[Bucket, Batch]:
        """The batch of a plan and its pixels, of which those of skipped images are black."""
        arrays = {name: array for name, array in vars(plan).items() if name not in ("bucket", "index")}
        batch = {"pixels": pixels, **arrays}
        bad = [row for row, i in enumerate(plan.index.tolist()) if i in self.index.skipped]
        if bad and self.every_image_once:
            batch["image_id"] = batch["image_id"].copy()
            batch["image_id"][bad] = -1
        elif bad:
            good = [row for row in range(len(plan.index)) if row not in bad]
            if not good:
                problem = self.index.skipped[int(plan.index[bad[0]])]
                raise DataError(f"all {len(bad)} images of a batch were skipped; the first: {problem}")
            rows = np.arange(len(plan.index))
            rows[bad] = np.resize(good, len(bad))
            batch = {name: array[rows] for name, array in batch.items()}
        return plan.bucket, batch


class _Threads:
    """As `ThreadPoolExecutor`, but a thread that waits for storage does not keep the program from ending."""

    def __init__(self, number: int, name: str):
        self._queue: queue.SimpleQueue[tuple[Future[Any], Callable[..., Any], tuple[Any, ...]] | None]
        self._queue = queue.SimpleQueue()
        self._number = number
        for _ in range(number):
            threading.Thread(target=self._work, name=name, daemon=True).start()

    def submit(self, function: Callable[..., Any], *args: Any) -> Future[Any]:
        future: Future[Any] = Future()
        self._queue.put((future, function, args))
        return future

    def shutdown(self) -> None:
        """Drops what was not begun, and lets the threads end."""
        while not self._queue.empty():
            self._queue.get()
        for _ in range(self._number):
            self._queue.put(None)

    def _work(self) -> None:
        while (item := self._queue.get()) is not None:
            future, function, args = item
            try:
                future.set_result(function(*args))
            except BaseException as error:
                future.set_exception(error)


def _pillow_batches(
    loader: _Loader, plans: Iterator[BatchPlan], data: DataConfig
) -> Generator[tuple[Bucket, Batch], None, None]:
    planner, pool = _Threads(1, "plan"), _Threads(max(data.workers, 1), "decode")

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
            yield loader.batch(plan, pixels)
    finally:
        planner.shutdown()
        pool.shutdown()


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
        yield loader.batch(ahead.popleft(), pixels)
