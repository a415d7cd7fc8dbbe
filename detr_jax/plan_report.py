"""The report of `detr_jax.plan`: numbers of each step, what follows from them for a run, and a table."""

import dataclasses
import math
from collections.abc import Iterator, Sequence

GIB = 2**30
Bucket = tuple[int, int]


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes on one device."""

    parameters: int
    """Trained and frozen ones."""
    optimizer: int
    ema: int
    batch: int
    temporary: int
    """Activations and whatever else the step keeps in between."""
    program: int

    @property
    def total(self) -> int:
        """Of all."""
        return sum(dataclasses.astuple(self))


@dataclasses.dataclass(frozen=True)
class Communication:
    """Collectives of one kind."""

    kind: str
    count: int
    """In a step."""
    bytes: int
    """Of the operands on one device, in a step."""


@dataclasses.dataclass(frozen=True)
class Milliseconds:
    """Estimate of a step's time, by part."""

    xla: float
    """Everything that XLA compiles."""
    kernels: float
    """Pallas kernels, or the gathers of the attention's other implementations."""
    communication: float

    @property
    def total(self) -> float:
        """If nothing overlaps."""
        return self.xla + self.kernels + self.communication


@dataclasses.dataclass(frozen=True)
class StepPlan:
    """The step of one bucket."""

    batch_size: int
    """Global."""
    dtype: str
    bucket: Bucket
    share: float
    """Of the steps of an epoch."""
    mean_pixels: float
    """Of the buckets of an epoch's steps, all buckets counted."""
    compile_seconds: float
    fits: bool | None
    """`None` where the compiler does not say."""
    problem: str
    """What the compiler says where it does not fit."""
    memory: Memory | None = None
    flops: int = 0
    """On one device: those of products and convolutions, without the attention's kernels."""
    communication: tuple[Communication, ...] = ()
    ms: Milliseconds | None = None
    images_per_second_per_chip: float | None = None
    mfu: float | None = None
    """`flops` in the step's time, as a share of the peak."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """Of a run: one step for each batch size, dtype and bucket."""

    topology: str
    devices: int
    chips: int
    device_memory: int | None
    """Bytes of a device's main memory."""
    images: int
    """Of an epoch."""
    data: str
    """Which images."""
    epochs: int
    steps: tuple[StepPlan, ...]

    def chip_hours_per_epoch(self, steps: Sequence[StepPlan]) -> float | None:
        """Of the buckets of one batch size and dtype; those not compiled count like the largest, by their pixels."""
        ms, pixels = 0.0, steps[0].mean_pixels
        for step in steps:
            if step.ms is None:
                return None
            ms += step.share * step.ms.total
            pixels -= step.share * math.prod(step.bucket)
        largest = max(steps, key=lambda step: math.prod(step.bucket))
        if largest.ms:
            ms += largest.ms.total * pixels / math.prod(largest.bucket)
        return self.images // largest.batch_size * ms / 3.6e6 * self.chips

    def groups(self) -> list[list[StepPlan]]:
        """The steps by batch size and dtype."""
        keys = dict.fromkeys((step.batch_size, step.dtype) for step in self.steps)
        return [[step for step in self.steps if (step.batch_size, step.dtype) == key] for key in keys]


def largest_batch(first: StepPlan, second: StepPlan, memory: int, devices: int) -> int:
    """The largest global batch that should fit, by a line through the memory of two steps that differ in their batch.

    Parameters, optimizer and program count as constant. An estimate: compile it before relying on it.
    """
    assert first.memory and second.memory
    slope = (second.memory.total - first.memory.total) / (second.batch_size - first.batch_size)
    constant = first.memory.total - slope * first.batch_size
    return max(int((memory - constant) / slope) // devices * devices, 0)


def table(result: Plan) -> Iterator[str]:
    """Lines for a person."""
    limit = f" of {result.device_memory / GIB:.1f} GiB" if result.device_memory else ""
    yield f"{result.topology}: {result.chips} chips, {result.devices} devices{limit}"
    yield f"{result.images} images: {result.data}"
    yield ""
    names = [field.name for field in dataclasses.fields(Memory)]
    yield "".join(
        f"{name:>12}" for name in ["batch", "dtype", "bucket", "fits", *names, "GiB in all", "TFLOP", "compiled s"]
    )
    for step in result.steps:
        fits = {True: "yes", False: "NO", None: "?"}[step.fits]
        cells = [str(step.batch_size), step.dtype, "x".join(map(str, step.bucket)), fits]
        if step.memory:
            sizes = [*dataclasses.astuple(step.memory), step.memory.total]
            cells += [f"{size / GIB:.2f}" for size in sizes] + [f"{step.flops / 1e12:.2f}"]
        else:
            cells += [""] * (len(names) + 2)
        yield "".join(f"{cell:>12}" for cell in [*cells, f"{step.compile_seconds:.0f}"]) + f"  {step.problem}".rstrip()
    for step in result.steps:
        exchanged = ", ".join(f"{z.count} {z.kind} of {z.bytes / 2**20:.1f} MiB" for z in step.communication)
        yield ""
        bucket = "x".join(map(str, step.bucket))
        yield f"batch {step.batch_size}, {step.dtype}, {bucket} ({step.share:.0%} of the steps)"
        yield f"  exchanged between devices: {exchanged or 'nothing'}"
        if step.ms and step.mfu:
            yield (
                f"  step about {step.ms.total:.0f} ms: XLA {step.ms.xla:.0f}, kernels {step.ms.kernels:.0f}, "
                f"communication {step.ms.communication:.1f}; {step.images_per_second_per_chip:.1f} images/s/chip, "
                f"MFU {step.mfu:.1%}"
            )
    for steps in result.groups():
        hours = result.chip_hours_per_epoch(steps)
        if hours is not None:
            compiled = sum(step.share for step in steps)
            rest = "" if compiled > 0.999 else f" (the other {1 - compiled:.0%} of the steps count by their pixels)"
            yield ""
            yield (
                f"batch {steps[0].batch_size}, {steps[0].dtype}: {hours:.2f} chip hours per epoch, "
                f"{hours * result.epochs:.1f} for {result.epochs} epochs, "
                f"{hours * result.epochs / result.chips:.1f} hours on this slice{rest}"
            )
    yield from _largest(result)


def _largest(result: Plan) -> Iterator[str]:
    steps = [step for step in result.steps if step.memory]
    if result.device_memory is None:
        return
    for first in steps:
        for second in steps:
            same = (first.dtype, first.bucket) == (second.dtype, second.bucket)
            if same and first.batch_size < second.batch_size:
                most = largest_batch(first, second, result.device_memory, result.devices)
                yield (
                    f"largest batch in {first.dtype} by a line through {first.batch_size} and {second.batch_size}: "
                    f"about {most}"
                )
