"""Speed of the host's share of the input, against decoding and resizing on the host as PyTorch pipelines do.

    python benchmarks/input.py --root tests/data/coco_open

Prints images per second and core of both paths, in turn, on one core each time, and the share of a training step that
is spent waiting for data: measured with a step that only sleeps, for accelerators that take 50 to 400 ms per batch.
The resize to 800x1333 that the host saves is done by the accelerator inside the step (`detr_jax/data/resample.py`).
"""

import dataclasses
import io
import os
import time
from collections.abc import Callable, Iterator

import numpy as np
import tyro
from PIL import Image

from detr_jax.config import DataConfig
from detr_jax.data.index import DatasetIndex
from detr_jax.data.pipeline import batches
from detr_jax.data.resample import IMAGENET_MEAN, IMAGENET_STD
from detr_jax.data.sampler import TrainSampler
from detr_jax.data.splits import load_split
from detr_jax.data.transforms import resize_size


@dataclasses.dataclass(frozen=True)
class Args:
    """See the top of the file."""

    root: str = "tests/data/coco_open"
    """A COCO-format folder."""
    batch_size: int = 8
    """Images per batch."""
    seconds: float = 5.0
    """Time per measurement."""
    rounds: int = 3
    """Repetitions, in turn; the best counts."""


def host_resize(index: DatasetIndex, batch_size: int, sizes: np.ndarray, normalize: bool = False) -> Iterator[int]:
    """Read, decode, resize to `sizes` [n, 2] with Pillow, normalize to float32 if asked for, batch."""
    height, width = sizes.max(0)
    row = 0
    while True:
        pixels = np.zeros([batch_size, height, width, 3], np.float32 if normalize else np.uint8)
        for target in pixels:
            i = row % len(index)
            h, w = sizes[i].tolist()
            image = Image.open(io.BytesIO(index.encoded(i))).convert("RGB")
            image = np.asarray(image.resize((w, h), Image.Resampling.BILINEAR))
            target[:h, :w] = (image / np.float32(255) - IMAGENET_MEAN) / IMAGENET_STD if normalize else image
            row += 1
        yield batch_size


def device_resize(index: DatasetIndex, data: DataConfig, batch_size: int) -> Iterator[int]:
    """The package's pipeline."""
    sampler = TrainSampler(index, data, batch_size, seed=0)
    for _, batch in batches(index, sampler, iter(int, 1), data_config=data):  # step 0 again and again
        yield len(batch["pixels"])


def images_per_core_second(make: Callable[[], Iterator[int]], seconds: float) -> float:
    """Images over CPU time, so that neither threads nor the machine's other work count."""
    stream = make()
    next(stream)  # imports, tracing, first files
    images, cpu, start = 0, time.process_time(), time.perf_counter()
    while time.perf_counter() - start < seconds:
        images += next(stream)
    return images / (time.process_time() - cpu)


def waiting_share(index: DatasetIndex, data: DataConfig, batch_size: int, step_ms: float, seconds: float) -> float:
    """Share of the time that a loop waits for batches, if its step takes `step_ms` on an accelerator."""
    stream = device_resize(index, data, batch_size)
    next(stream)
    waited, start = 0.0, time.perf_counter()
    while (now := time.perf_counter()) - start < seconds:
        next(stream)
        waited += time.perf_counter() - now
        time.sleep(step_ms / 1000)
    return waited / (time.perf_counter() - start)


def main(args: Args) -> None:
    """Measures and prints."""
    data = DataConfig(root=args.root, workers=os.cpu_count() or 1)
    index = load_split(data, "train")
    engines = {name: dataclasses.replace(data, engine=name) for name in ("pillow", "tf")}
    official = resize_size(index.sizes, 800, 1333)
    largest = np.where(index.sizes[:, :1] > index.sizes[:, 1:], [[1333, 800]], [[800, 1333]])
    paths: dict[str, Callable[[], Iterator[int]]] = {
        "decode + resize to 800x1333": lambda: host_resize(index, args.batch_size, largest),
        "decode + resize, own aspect ratio": lambda: host_resize(index, args.batch_size, official),
        "... and normalize": lambda: host_resize(index, args.batch_size, official, normalize=True),
        **{
            f"detr_jax, {name}": lambda config=config: device_resize(index, config, args.batch_size)
            for name, config in engines.items()
        },
    }
    best = dict.fromkeys(paths, 0.0)
    for _ in range(args.rounds):
        for name, make in paths.items():
            best[name] = max(best[name], images_per_core_second(make, args.seconds))
    reference = best["decode + resize to 800x1333"]
    for name, speed in best.items():
        print(f"{name:36} {speed:7.1f} images/s/core   {speed / reference:5.2f}x")
    for step_ms in (50, 100, 200, 400):
        shares = "   ".join(
            f"{name} {waiting_share(index, config, args.batch_size, step_ms, args.seconds):6.1%}"
            for name, config in engines.items()
        )
        print(f"waiting for data, step of {step_ms:3} ms for {args.batch_size} images: {shares}")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
