"""What a training run needs on some devices: its own step, compiled ahead of time for devices that are not here.

Memory, operations and communication are the compiler's. The time of a step is an estimate, made only for TPUs, as the
sum of three parts that in truth overlap or wait: XLA's cycles and the bundles of the attention's kernels (at sampling
offsets that spread by 2 pixels), both at an assumed clock, and the bytes that are communicated at half of the published
bandwidth between chips. What the host does is not in it.
"""

import contextlib
import dataclasses
import functools
import math
import os
import re
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from detr_jax import sharding
from detr_jax.config import Config, DeformableDETRConfig, DINOConfig
from detr_jax.data.buckets import Bucket
from detr_jax.data.index import DatasetIndex
from detr_jax.data.sampler import TrainSampler
from detr_jax.data.splits import load_split
from detr_jax.denoising import num_slots
from detr_jax.errors import UserError
from detr_jax.train_step import abstract_state, make_optimizer, make_train_step
from detr_jax.training import abstract_batch
from pallas_kernels import ahead_of_time
from pallas_kernels.compiled_program import Program
from pallas_kernels.ms_deform_attn.bench import layer_bundles
from pallas_kernels.ms_deform_attn.shapes import Shape

SPREAD = 2.0
"""Pixels by which the offsets are assumed to spread around their initial values."""
GIB = 2**30


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
    """The attention's Pallas kernels, or the gathers of its other implementations."""
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
    """On one device: those of products and convolutions, without the Pallas kernels'."""
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


def devices_of(topology: str) -> list[Any]:
    """The devices of a slice such as `v5e:4x4`, to compile for, of `cpu:8`, or of `gpu:N`, which must be here.

    Raises:
        UserError: no such topology, no libtpu, or not so many devices.
    """
    kind, _, size = topology.partition(":")
    if kind in ("cpu", "gpu"):
        if not size.isdigit() or int(size) < 1:
            raise UserError(f"--topology {topology}: expected a number of devices, such as {kind}:8")
        return _local_devices(kind, int(size))
    generations = {name.partition(":")[0] for name in ahead_of_time.TOPOLOGIES.values()}
    if kind not in generations or not re.fullmatch(r"\d+(x\d+){1,2}", size):
        raise UserError(
            f"--topology {topology}: expected a slice such as v5e:4x4, v5p:2x2x1 or v6e:16x16 "
            f"({', '.join(sorted(generations))}), cpu:8 or gpu:8"
        )
    try:
        ahead_of_time.require_libtpu()
    except ImportError as error:
        raise UserError(f"--topology {topology}: {error}") from error
    from jax.experimental import topologies

    try:
        return list(topologies.get_topology_desc(platform="tpu", topology_name=topology).devices)
    except (jax.errors.JaxRuntimeError, ValueError, NotImplementedError) as error:
        raise UserError(f"--topology {topology}: libtpu knows no such slice: {str(error).splitlines()[0]}") from error


def _local_devices(kind: str, count: int) -> list[Any]:
    if kind == "cpu" and "host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        with contextlib.suppress(RuntimeError):  # JAX has started already
            jax.config.update("jax_num_cpu_devices", count)
    try:
        found = jax.devices(kind)
    except RuntimeError as error:
        raise UserError(f"--topology {kind}:{count}: JAX finds none here: {str(error).splitlines()[0]}") from error
    if len(found) < count:
        raise UserError(f"--topology {kind}:{count}: JAX has {len(found)} {kind} devices here")
    return found[:count]


def stand_in() -> DatasetIndex:
    """In the place of COCO train2017: as many images, of its commonest sizes in about their shares, without pixels."""
    sizes = [(480, 640)] * 4 + [(427, 640)] * 4 + [(640, 480)] * 2 + [(640, 427), (640, 640)]
    n, most, classes = 118287, 93, 80
    shares = np.resize(np.array(sizes, np.int32), (n, 2))
    shares[:2] = (240, 640), (640, 240)  # some images are as long: one bucket has to hold them
    boxes = np.tile(np.array([[0, 0, 32, 32]], np.float32), (most, 1))
    return DatasetIndex(
        image_ids=np.arange(n, dtype=np.int64),
        sizes=shares,
        boxes_xyxy=(boxes,) * n,
        labels=(np.zeros(most, np.int32),) * n,
        category_ids=tuple(range(classes)),
        category_names=tuple(map(str, range(classes))),
        report=(),
        names=("",) * n,
        read=lambda i: b"",
        read_ground_truth=dict,
    )


def compile_step(config: Config, sampler: TrainSampler, mesh: jax.sharding.Mesh, bucket: Bucket):
    """The training step of a config, compiled for the devices of a mesh, which need not be here.

    Returns:
        The compiled program, and the shapes and layouts of its state and batch.

    Raises:
        jax.errors.JaxRuntimeError: the compiler's; `RESOURCE_EXHAUSTED` where it does not fit.
    """
    optimizer = make_optimizer(config.optim, total_steps=len(sampler) * config.train.epochs)
    with jax.set_mesh(mesh):
        graphdef, state = abstract_state(config, optimizer, mesh)
        batch = abstract_batch(sampler, mesh, left_out=("image_id",))
        step: Any = make_train_step(config, graphdef, optimizer, sampler)  # a jitted function
        traced = step.trace(state, batch, bucket=bucket)
        platform = mesh.devices.flat[0].platform
        return traced.lower(lowering_platforms=(platform,)).compile(), state, batch


def plan(
    config: Config,
    topology: str,
    *,
    batch_sizes: Sequence[int] = (),
    dtypes: Sequence[str] = (),
    every_bucket: bool = False,
    report=print,
) -> Plan:
    """Compiles the steps of a run.

    Args:
        config: of the run. Without `data.root` and `data.tfds`, a stand-in for COCO takes the place of the data.
        topology: see `devices_of`.
        batch_sizes: global ones to compare; the config's by default.
        dtypes: compute types to compare; the config's by default.
        every_bucket: or the largest one only, which decides whether the run fits.
        report: is given a line before each compilation.

    Raises:
        UserError: as `devices_of`; a batch that does not divide over the devices; no such data.
    """
    mesh = sharding.make_mesh(devices=devices_of(topology))
    chips = count_chips(mesh)
    for batch_size in batch_sizes or [config.train.batch_size]:
        sharding.host_rows(batch_size, mesh)  # raises before anything is compiled
    if config.data.root or config.data.tfds:
        index, data = load_split(config.data, "train"), config.data.root or str(config.data.tfds)
        config = dataclasses.replace(config, model=dataclasses.replace(config.model, num_classes=index.num_classes))
    else:
        index, data = stand_in(), "a stand-in for COCO (pass --data.root for your data)"
    memory = None
    if is_tpu(mesh):
        memory = ahead_of_time.limits(mesh).memory
    steps = []
    for batch_size in batch_sizes or [config.train.batch_size]:
        for dtype in dtypes or [config.model.dtype]:
            run = dataclasses.replace(
                config,
                model=dataclasses.replace(config.model, dtype=dtype),
                train=dataclasses.replace(config.train, batch_size=batch_size),
            )
            sampler = TrainSampler(index, run.data, batch_size, run.train.seed)
            counts = Counter(sampler.plan(step, slice(0)).bucket for step in range(len(sampler)))
            shares = {bucket: count / len(sampler) for bucket, count in counts.items()}
            for bucket in reversed(sampler.buckets) if every_bucket else sampler.buckets[-1:]:
                report(f"compiling {bucket[0]}x{bucket[1]}, batch {batch_size}, {dtype}, for {topology} ...")
                steps.append(plan_step(run, sampler, mesh, bucket, shares))
    return Plan(topology, mesh.size, chips, memory, len(index), data, config.train.epochs, tuple(steps))


def is_tpu(mesh: jax.sharding.Mesh) -> bool:
    """Whether its devices are TPUs."""
    return mesh.devices.flat[0].platform == "tpu"


def count_chips(mesh: jax.sharding.Mesh) -> int:
    """Of a mesh; some chips are two devices."""
    return len({tuple(getattr(device, "coords", [device.id])) for device in mesh.devices.flat})


def plan_step(
    config: Config, sampler: TrainSampler, mesh: jax.sharding.Mesh, bucket: Bucket, shares: Mapping[Bucket, float]
) -> StepPlan:
    """Compiles the step of a bucket and reads what the compiler says of it; `shares` of an epoch's steps."""
    start, share = time.perf_counter(), shares.get(bucket, 0.0)
    mean_pixels = sum(share * math.prod(bucket) for bucket, share in shares.items())
    step = functools.partial(StepPlan, config.train.batch_size, config.model.dtype, bucket, share, mean_pixels)
    try:
        compiled, state, batch = compile_step(config, sampler, mesh, bucket)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return step(time.perf_counter() - start, False, _what_is_missing(str(error)))
    seconds = time.perf_counter() - start
    sizes: Any = compiled.memory_analysis()
    memory = Memory(
        parameters=device_bytes((state["params"], state["buffers"])),
        optimizer=device_bytes(state["opt_state"]),
        ema=device_bytes(state.get("ema")),
        batch=device_bytes(batch),
        temporary=sizes.temp_size_in_bytes,
        program=sizes.generated_code_size_in_bytes,
    )
    program = Program(compiled.as_text() or "")
    flops = sum(operation.flops * operation.runs for operation in program.operations)
    found = communication(program)
    done = functools.partial(step, seconds, True if is_tpu(mesh) else None, "", memory, flops, found)
    if not is_tpu(mesh):
        return done()
    limits = ahead_of_time.limits(mesh)
    cycles = sum((operation.cycles or 0) * operation.runs for operation in program.operations)
    attention = 0.0
    for shape, count in attention_layers(config, sampler.max_boxes, bucket):
        implementation = getattr(config.model, "implementation", None) or "tensorcore"
        attention += count * sum(_layer_bundles(shape, limits.generation, implementation))
    # An all-reduce in a ring sends and receives almost all bytes twice.
    sent = 2 * (mesh.size - 1) / mesh.size * sum(z.bytes for z in found)
    per_device = config.train.batch_size // mesh.size
    ms = Milliseconds(
        1e3 * cycles / limits.clock, 1e3 * per_device * attention / limits.clock, 1e3 * sent / limits.link
    )
    images = 1e3 * config.train.batch_size / ms.total / count_chips(mesh)
    return done(ms, images, 1e3 * flops / ms.total / limits.flops)


def communication(program: Program) -> tuple[Communication, ...]:
    """What the devices of a compiled program exchange, by kind."""
    found: dict[str, Communication] = {}
    for z in program.collectives:
        before = found.get(z.kind, Communication(z.kind, 0, 0))
        found[z.kind] = Communication(z.kind, before.count + z.runs, before.bytes + z.bytes * z.runs)
    return tuple(found.values())


def device_bytes(tree: Any) -> int:
    """Of arrays, the part that one device holds."""
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * jnp.dtype(x.dtype).itemsize for x in jax.tree.leaves(tree))


def attention_layers(config: Config, max_boxes: int, bucket: Bucket) -> list[tuple[Shape, int]]:
    """The sizes of deformable attention for one image, and how many layers have them."""
    model = config.model
    if not isinstance(model, DeformableDETRConfig):
        return []
    last = 16 if model.backbone.dilation else 32
    strides = [4, 8, 16, last][4 - model.feature_maps :]
    strides += [last * 2 ** (i + 1) for i in range(model.num_levels - len(strides))]
    levels = tuple((-(-bucket[0] // stride), -(-bucket[1] // stride)) for stride in strides)
    width = model.hidden_dim // model.num_heads
    encoder = Shape(1, levels, None, model.num_heads, width, model.encoder_points)
    denoising = num_slots(model, max_boxes) if isinstance(model, DINOConfig) else 0
    queries = model.num_queries + denoising
    decoder = dataclasses.replace(encoder, queries=queries, points=model.decoder_points)
    return [(encoder, model.encoder_layers), (decoder, model.decoder_layers)]


@functools.cache
def _layer_bundles(shape: Shape, generation: str, implementation: str) -> tuple[float, float]:
    return ahead_of_time.apart(layer_bundles, shape, generation, implementation, SPREAD)


def _what_is_missing(message: str) -> str:
    """The sentence of the compiler's message that says how much memory it would need."""
    found = re.search(r"Used [\d.]+\w? of [\d.]+\w? hbm", message)
    return found[0] if found else message.splitlines()[0]


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
                f"  step about {step.ms.total:.0f} ms: XLA {step.ms.xla:.0f}, attention kernels {step.ms.kernels:.0f}, "
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
