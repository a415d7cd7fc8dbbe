"""A whole training step compiled ahead of time for one TPU chip: does it fit, and where do its cycles go?

The step is the one that `train.py` runs, as `detr-jax plan` compiles it: resampling, R50 two-stage Deformable DETR
(`dcn`: with deformable convolutions in the backbone) or DINO-4scale with its denoising queries, bfloat16, matching on
the device, losses, backward and the AdamW update, with boxes and image sizes as in COCO. Nothing runs and no TPU is
needed; each path compiles for five minutes or more on two cores.

    pip install 'libtpu==0.0.42.*'
    JAX_PLATFORMS=cpu python benchmarks/aot_step.py
    JAX_PLATFORMS=cpu python benchmarks/aot_step.py --top 30

The first form compares implementations of the attention. Memory is what the compiler allocates. Milliseconds are
XLA's estimates, and bundles of kernels and gathers, at an assumed clock (`pallas_kernels.ahead_of_time` says what that
leaves out): sorts, and waiting. The matching's loops, whose length depends on the data, count once. Gathers and kernels
are those of layers that are compiled once more, each for itself; the attention's assume offsets that spread by 2
pixels. Kernels of deformable convolutions are not in it: `benchmarks/deform_conv.py` counts those.

The second form, for the first implementation, lists the parts of the step and its most expensive operations, those of
equal layers together, with the line of the source that made them. `FLOP` and `HBM` are the time that an operation's
products and its traffic with the main memory would need at the chip's published peaks, as a share of the estimate:
near 100 % it cannot be made faster without doing less. `compiler` is what no line of the source asked for; among that,
copies between the chip's memories that run beside other work have bytes, but no estimate. Kernels have none either.
"""

import argparse
import dataclasses
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path

from detr_jax.config import Config, DeformableDETRConfig, DINOConfig, LossConfig, TrainConfig
from detr_jax.data.sampler import TrainSampler
from detr_jax.plan import compile_step, count_kernels, stand_in
from detr_jax.sharding import make_mesh
from pallas_kernels import ahead_of_time
from pallas_kernels.compiled_program import Operation, Program

TWO_STAGE = DeformableDETRConfig.r50_two_stage()
MODELS = {
    "two_stage": (TWO_STAGE, LossConfig()),
    "dcn": (
        dataclasses.replace(TWO_STAGE, backbone=dataclasses.replace(TWO_STAGE.backbone, deform_version=2)),
        LossConfig(),
    ),
    "dino": (DINOConfig.r50_4scale(), LossConfig.dino()),
}
PARTS = (
    "resampling", "backbone", "stem", "stage_1", "stage_2", "stage_3", "stage_4", "input_proj", "encoder",
    "encoder_layer", "proposals", "decoder_layer", "heads", "losses", "matching", "update",
)  # fmt: skip
"""Named scopes of the step, roughly in the order in which it runs. An operation belongs to the innermost one."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--generation", choices=ahead_of_time.TOPOLOGIES, default="v5e", help="(default %(default)s)")
    parser.add_argument("--model", choices=MODELS, default="two_stage", help="(default %(default)s)")
    parser.add_argument("--bucket", type=int, nargs=2, default=(800, 1333), metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("--batch-size", type=int, default=2, help="images on the chip (default %(default)s)")
    parser.add_argument("--implementations", nargs="+", default=["tensorcore", "xla"], help="(default %(default)s)")
    parser.add_argument("--top", type=int, metavar="N", help="list the parts, and the N most expensive operations")
    parser.add_argument(
        "--hlo", type=Path, metavar="FILE", help="with --top: keep the compiled text, or read it if the file exists"
    )
    args = parser.parse_args()
    ahead_of_time.require_libtpu()
    height, width = args.bucket
    print(f"one {args.generation} chip, {args.batch_size} images of {height} x {width}, R50 {args.model}, bfloat16")
    print(f"assumed clock {ahead_of_time.CLOCK_GHZ[args.generation]} GHz; nothing was run\n")
    case = args.generation, args.model, (height, width), args.batch_size
    if args.top is not None:
        if args.hlo and args.hlo.exists():
            text = args.hlo.read_text()
        else:
            text = ahead_of_time.apart(text_of_step, *case, args.implementations[0])
            if args.hlo:
                args.hlo.write_text(text)
        print("\n".join(tables(Program(text).operations, args.generation, args.top)))
        return
    print(f"{'':<12}{'------- GiB -------':^30}{'------------ ms ------------':^40}{'compiled':>10}")
    print(
        f"{'attention':<12}{'state':>10}{'temporary':>10}{'program':>10}"
        f"{'XLA':>10}{'gathers':>10}{'kernels':>10}{'all':>10}{'in s':>10}",
        flush=True,
    )
    for implementation in args.implementations:
        print(ahead_of_time.apart(line, *case, implementation), flush=True)


def compile_case(generation: str, name: str, bucket: tuple[int, int], batch_size: int, implementation: str):
    """The compiled step, its config and its sampler."""
    ahead_of_time.require_libtpu()
    published, loss = MODELS[name]
    model = dataclasses.replace(published, implementation=implementation, dtype="bfloat16")
    config = Config(model=model, loss=loss, train=TrainConfig(batch_size=batch_size))
    sampler = TrainSampler(stand_in(), config.data, batch_size, seed=0)
    mesh = make_mesh(devices=list(ahead_of_time.mesh(generation).devices.flat))
    compiled, _, _ = compile_step(config, sampler, mesh, bucket)
    return compiled, config, sampler


def text_of_step(*case) -> str:
    """The optimized HLO; arguments of `compile_case`."""
    return compile_case(*case)[0].as_text()


def line(generation: str, name: str, bucket: tuple[int, int], batch_size: int, implementation: str) -> str:
    """Of the table of implementations."""
    start = time.perf_counter()
    compiled, config, sampler = compile_case(generation, name, bucket, batch_size, implementation)
    seconds = time.perf_counter() - start
    memory = compiled.memory_analysis()
    cost = ahead_of_time.cost(compiled, folder=None)
    kernels = count_kernels(compiled, config, sampler.max_boxes, bucket, generation, batch_size)
    sizes = [memory.argument_size_in_bytes, memory.temp_size_in_bytes, memory.generated_code_size_in_bytes]
    cycles = [cost.cycles, kernels.gathers, kernels.bundles, cost.cycles + kernels.gathers + kernels.bundles]
    columns = [f"{size / 2**30:>10.2f}" for size in sizes]
    columns += [f"{z / ahead_of_time.CLOCK_GHZ[generation] / 1e6:>10.1f}" for z in cycles]
    return f"{implementation:<12}{''.join(columns)}{seconds:>10.0f}"


def part_of(operation: Operation) -> str:
    """Its innermost scope of `PARTS`; `other` without one, `compiler` for what the compiler made."""
    named = [scope for scope in operation.scopes if scope in PARTS]
    return named[-1] if named else "other" if operation.scopes else "compiler"


def tables(operations: Sequence[Operation], generation: str, top: int) -> Iterator[str]:
    """The parts of a step, and its most expensive operations, as tables in Markdown."""
    limits = ahead_of_time.limits(ahead_of_time.mesh(generation))

    def ms(operation: Operation) -> float:
        return 1e3 * operation.runs * (operation.cycles or 0) / limits.clock

    def shares(time: float, flops: float, size: float) -> str:
        if not time:
            return "| |"
        return f"{1e5 * flops / limits.flops / time:.0f} % | {1e5 * size / limits.bandwidth / time:.0f} %"

    parts = defaultdict(list)
    for operation in operations:
        parts[part_of(operation)].append(operation)
    whole = sum(map(ms, operations))
    yield "| part | forward, ms | backward, ms | share | TFLOP | GB | FLOP | HBM |"
    yield "|---|---|---|---|---|---|---|---|"
    for part in (*PARTS, "other", "compiler", "all"):
        inside = operations if part == "all" else parts[part]
        if not inside:
            continue
        backward = sum(ms(z) for z in inside if z.backward)
        time = sum(map(ms, inside))
        flops, size = sum(z.flops * z.runs for z in inside), sum(z.bytes * z.runs for z in inside)
        yield (
            f"| {part} | {time - backward:.1f} | {backward:.1f} | {time / whole:.1%} | {flops / 1e12:.2f} | "
            f"{size / 1e9:.1f} | {shares(time, flops, size)} |"
        )
    yield ""
    alike = defaultdict(list)  # such as those of the six layers
    for operation in operations:
        shape = operation.instruction.shapes[0] if operation.instruction.shapes else None
        result = f"{shape.dtype}[{','.join(map(str, shape.dims))}]" if shape else ""
        part = part_of(operation) + (", backward" if operation.backward else "")
        alike[operation.instruction.opcode, result, part, operation.source].append(operation)
    yield "| ms | runs | operation | result | part | source | MB | FLOP | HBM |"
    yield "|---|---|---|---|---|---|---|---|---|"
    for (opcode, result, part, source), group in sorted(alike.items(), key=lambda item: -sum(map(ms, item[1])))[:top]:
        time, runs = sum(map(ms, group)), sum(z.runs for z in group)
        flops, size = sum(z.flops * z.runs for z in group), sum(z.bytes * z.runs for z in group)
        yield (
            f"| {time:.2f} | {runs} | {opcode} | `{result}` | {part} | {source} | {size / 1e6:.0f} | "
            f"{shares(time, flops, size)} |"
        )


if __name__ == "__main__":
    main()
