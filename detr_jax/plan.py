"""What a training run needs on some devices: its own step, compiled ahead of time for devices that are not here.

Memory, operations and communication are the compiler's. The time of a step is an estimate, made only for TPUs, as the
sum of three parts that in truth overlap or wait: XLA's cycles and the bundles of the kernels (the attention's at
sampling offsets that spread by 2 pixels), both at an assumed clock, and the bytes that are communicated at half of the
published bandwidth between chips. What the host does is not in it.
"""

import contextlib
import dataclasses
import functools
import math
import os
import re
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from detr_jax import sharding
from detr_jax.compilation import missing_memory
from detr_jax.config import Config, DeformableDETRConfig, DINOConfig
from detr_jax.data.buckets import Bucket
from detr_jax.data.index import DatasetIndex
from detr_jax.data.sampler import TrainSampler
from detr_jax.data.splits import load_split
from detr_jax.denoising import num_slots
from detr_jax.errors import UserError
from detr_jax.plan_report import Communication, Memory, Milliseconds, Plan, StepPlan
from detr_jax.train_step import abstract_state, make_optimizer, make_train_step
from detr_jax.training import abstract_batch
from pallas_kernels import ahead_of_time
from pallas_kernels.compiled_program import Program
from pallas_kernels.feed_forward import bench as feed_forward
from pallas_kernels.ms_deform_attn import projections_bench
from pallas_kernels.ms_deform_attn.bench import layer_bundles
from pallas_kernels.ms_deform_attn.order import block_order
from pallas_kernels.ms_deform_attn.shapes import Shape

SPREAD = 2.0
"""Pixels by which the offsets are assumed to spread around their initial values."""


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
    mesh = sharding.make_mesh(devices=devices_of(topology), fsdp=config.train.fsdp)
    chips = count_chips(mesh)
    for batch_size in batch_sizes or [config.train.batch_size]:
        # Raises before anything is compiled.
        sharding.host_rows(batch_size, mesh, accumulate=config.train.accumulate)
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
        if not (missing := missing_memory(error)):
            raise
        return step(time.perf_counter() - start, False, missing)
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
    done = functools.partial(step, seconds, True if is_tpu(mesh) else None, "", memory)
    if not is_tpu(mesh):
        return done(flops, found)
    limits = ahead_of_time.limits(mesh)
    cycles = sum((operation.cycles or 0) * operation.runs for operation in program.operations)
    images = config.train.batch_size // mesh.size
    kernels = count_kernels(compiled, config, sampler.max_boxes, bucket, limits.generation, images)
    # An all-reduce in a ring sends and receives almost all bytes twice.
    sent = 2 * (mesh.size - 1) / mesh.size * sum(z.bytes for z in found)
    ms = Milliseconds(
        xla=1e3 * cycles / limits.clock,
        kernels=1e3 * (kernels.gathers + kernels.bundles) / limits.clock,
        communication=1e3 * sent / limits.link,
    )
    rate = 1e3 * config.train.batch_size / ms.total / count_chips(mesh)
    return done(flops + kernels.flops, found, ms, rate, 1e3 * (flops + kernels.flops) / ms.total / limits.flops)


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


class Kernels(NamedTuple):
    """What XLA does not count of a step on a device."""

    gathers: float = 0.0
    """Bundles of gathers and scatters."""
    bundles: float = 0.0
    """Of Pallas kernels, but for those of deformable convolutions."""
    flops: int = 0
    """Of all kernels but the sampling's; what they compute again in the backward pass is not in it."""


def count_kernels(
    compiled: jax.stages.Compiled, config: Config, max_boxes: int, bucket: Bucket, generation: str, images: int
) -> Kernels:
    """For so many images on a device, in bfloat16; layers are compiled once more for that, each for itself."""
    model = config.model
    if not isinstance(model, DeformableDETRConfig):
        return Kernels()
    gathers = bundles = products = 0
    (encoder, _), (_, decoder_layers) = layers = attention_layers(config, max_boxes, bucket)
    for shape, count in layers:
        per_layer = _layer_bundles(shape, generation, model.implementation or "tensorcore")
        gathers, bundles = gathers + images * count * per_layer[0], bundles + images * count * per_layer[1]
    # The other kernels, where the program has them: see `EncoderLayer.by_kernels` and `MSDeformAttn`.
    c, samples = model.hidden_dim, encoder.heads * len(encoder.spatial_shapes) * encoder.points
    tokens = images, block_order(encoder.spatial_shapes).length, c
    if ahead_of_time.kernels(compiled, "ms_deform_attn_project_forward"):
        bundles += model.encoder_layers * _projection_cycles(encoder, images, c, generation).self_attention
        products += model.encoder_layers * (c + 3 * samples)
    if ahead_of_time.kernels(compiled, "ms_deform_attn_project_values_forward"):
        bundles += decoder_layers * _projection_cycles(encoder, images, c, generation).cross_attention
        products += decoder_layers * c
    if ahead_of_time.kernels(compiled, "feed_forward_forward"):
        bundles += model.encoder_layers * _feed_forward_bundles(tokens, model.ffn_dim, generation, model.dropout)
        products += model.encoder_layers * (c + 2 * model.ffn_dim)
    # Two operations each, and twice as many backward.
    return Kernels(gathers, bundles, 3 * 2 * math.prod(tokens) * products)


@functools.cache
def _projection_cycles(shape: Shape, images: int, channels: int, generation: str) -> projections_bench.Cycles:
    sizes = shape.spatial_shapes, images, shape.heads, shape.points, channels
    return ahead_of_time.apart(projections_bench.kernel_cycles, *sizes, generation)


@functools.cache
def _feed_forward_bundles(tokens: tuple[int, int, int], hidden: int, generation: str, rate: float) -> int:
    passes = ahead_of_time.apart(feed_forward.kernel_bundles, tokens, hidden, generation, rate)
    return sum(issued for issued, _ in passes.values())


@functools.cache
def _layer_bundles(shape: Shape, generation: str, implementation: str) -> tuple[float, float]:
    return ahead_of_time.apart(layer_bundles, shape, generation, implementation, SPREAD)
