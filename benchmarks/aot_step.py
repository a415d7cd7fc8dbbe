"""A whole training step compiled ahead of time for one TPU chip: does it fit, and what does each attention path cost?

The step is the one that `train.py` runs: resampling, R50 two-stage Deformable DETR or DINO-4scale with its denoising
queries, bfloat16, matching on the device, losses, backward and the AdamW update. Nothing runs and no TPU is needed;
each path compiles for five minutes or more on two cores.

    pip install 'libtpu==0.0.42.*'
    JAX_PLATFORMS=cpu python benchmarks/aot_step.py

Memory is what the compiler allocates. Milliseconds are XLA's estimates, and bundles of kernels and gathers, at an
assumed clock (`pallas_kernels.ahead_of_time` says what that leaves out): sorts, and waiting. The
matching's loops, whose length depends on the data, count once. Gathers and kernels are the attention's, of layers that
are compiled once more, each for itself. The kernels' share assumes offsets that spread by 2 pixels.
"""

import argparse
import dataclasses
import multiprocessing
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from detr_jax.config import Config, DataConfig, DeformableDETRConfig, DINOConfig, LossConfig, TrainConfig
from detr_jax.data.pipeline import batches
from detr_jax.data.sampler import TrainSampler
from detr_jax.data.splits import load_split
from detr_jax.denoising import num_slots
from detr_jax.train_step import init_state, make_optimizer, make_train_step
from pallas_kernels import ahead_of_time
from pallas_kernels.ms_deform_attn.bench import static_costs, visits
from pallas_kernels.ms_deform_attn.shapes import Shape

SPREAD = 2.0
MODELS = {
    "two_stage": (DeformableDETRConfig.r50_two_stage(), LossConfig()),
    "dino": (DINOConfig.r50_4scale(), LossConfig.dino()),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--generation", choices=ahead_of_time.TOPOLOGIES, default="v5e", help="(default %(default)s)")
    parser.add_argument("--model", choices=MODELS, default="two_stage", help="(default %(default)s)")
    parser.add_argument("--bucket", type=int, nargs=2, default=(800, 1333), metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("--batch-size", type=int, default=2, help="images on the chip (default %(default)s)")
    parser.add_argument("--implementations", nargs="+", default=["tensorcore", "xla"], help="(default %(default)s)")
    args = parser.parse_args()
    ahead_of_time.require_libtpu()
    height, width = args.bucket
    print(f"one {args.generation} chip, {args.batch_size} images of {height} x {width}, R50 {args.model}, bfloat16")
    print(f"assumed clock {ahead_of_time.CLOCK_GHZ[args.generation]} GHz; nothing was run\n")
    print(f"{'':<12}{'------- GiB -------':^30}{'------------ ms ------------':^40}{'compiled':>10}")
    print(
        f"{'attention':<12}{'state':>10}{'temporary':>10}{'program':>10}"
        f"{'XLA':>10}{'gathers':>10}{'kernels':>10}{'all':>10}{'in s':>10}",
        flush=True,
    )
    for implementation in args.implementations:
        print(apart(line, args.generation, args.model, (height, width), args.batch_size, implementation), flush=True)


def apart(function: Callable, *args):
    """The result of a function that runs in a process of its own: compilations take gigabytes."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
        return process.submit(function, *args).result()


def line(generation: str, name: str, bucket: tuple[int, int], batch_size: int, implementation: str) -> str:
    """Of the table."""
    ahead_of_time.require_libtpu()
    start = time.perf_counter()
    compiled, layers = compile_step(generation, name, bucket, batch_size, implementation)
    seconds = time.perf_counter() - start
    memory = compiled.memory_analysis()
    assert memory is not None
    cost = ahead_of_time.cost(compiled, folder=None)
    gathers = kernels = 0.0
    for shape, count in layers:  # apart from the step: libtpu writes bundles of all that a process compiles, or of none
        per_layer = apart(of_layer, shape, generation, implementation)
        gathers, kernels = gathers + count * per_layer[0], kernels + count * per_layer[1]
    sizes = [memory.argument_size_in_bytes, memory.temp_size_in_bytes, memory.generated_code_size_in_bytes]
    cycles = [cost.cycles, gathers, kernels, cost.cycles + gathers + kernels]
    columns = [f"{size / 2**30:>10.2f}" for size in sizes]
    columns += [f"{z / ahead_of_time.CLOCK_GHZ[generation] / 1e6:>10.1f}" for z in cycles]
    return f"{implementation:<12}{''.join(columns)}{seconds:>10.0f}"


def of_layer(shape: Shape, generation: str, implementation: str) -> tuple[float, float]:
    """Bundles of gathers and of kernels in one layer of attention, forward and backward."""
    ahead_of_time.require_libtpu()
    with tempfile.TemporaryDirectory() as folder:
        ahead_of_time.dump_bundles(Path(folder))
        costs = static_costs(shape, jnp.dtype("bfloat16"), generation, implementation, Path(folder))
    units = visits(shape, SPREAD) if implementation == "tensorcore" else np.zeros(0)
    kernels = sum(count.total(shape, units, part) for part, (_, counts) in costs.items() for count in counts.values())
    return sum(cost.gathers for cost, _ in costs.values()), kernels


def compile_step(generation: str, name: str, bucket: tuple[int, int], batch_size: int, implementation: str):
    """The compiled step; the sizes of the encoder's and the decoder's attention and how many layers have them."""
    published, loss = MODELS[name]
    model = dataclasses.replace(published, implementation=implementation, dtype="bfloat16")
    data, train = DataConfig(root="tests/data/coco_open"), TrainConfig(batch_size=batch_size)
    config = Config(model=model, loss=loss, data=data, train=train)
    index = load_split(config.data, "train")
    sampler = TrainSampler(index, config.data, batch_size, seed=0)
    _, batch = next(batches(index, sampler, [0], data_config=config.data))
    batch.pop("image_id")
    optimizer = make_optimizer(config.optim, total_steps=1000)
    mesh = ahead_of_time.mesh(generation)
    graphdef = None

    def init():
        nonlocal graphdef
        graphdef, state = init_state(config, optimizer, mesh)
        return state

    with jax.set_mesh(mesh):
        state = jax.eval_shape(init)
        assert graphdef is not None
        step: Any = make_train_step(config, graphdef, optimizer, sampler)  # a jitted function
        compiled = step.trace(state, batch, bucket=bucket).lower(lowering_platforms=("tpu",)).compile()
    levels = tuple((-(-bucket[0] // stride), -(-bucket[1] // stride)) for stride in (8, 16, 32, 64))
    encoder = Shape(batch_size, levels, None, model.num_heads, model.hidden_dim // model.num_heads)
    denoising = num_slots(model, sampler.max_boxes) if isinstance(model, DINOConfig) else 0
    decoder = dataclasses.replace(encoder, queries=model.num_queries + denoising)
    return compiled, [(encoder, model.encoder_layers), (decoder, model.decoder_layers)]


if __name__ == "__main__":
    main()
