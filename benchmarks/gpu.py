"""Multi-scale deformable attention on an NVIDIA GPU: the Pallas kernel against XLA's gathers and the official CUDA op.

`gpu` is the kernel that `implementation="gpu"` runs. Where that is Triton's, and JAX has Mosaic GPU too, `mosaic` is
the other one.

For each size, type and batch, all implementations first have to agree with the reference, output and gradients; then
they are timed in turn, compilation left out. Ratios are times divided by the kernel's: above 1, the kernel is faster.
Calls follow each other without waiting, but Python dispatches each: 0.05 ms or so is the least that this can show.

    pip install -e '.[cuda]'
    python benchmarks/gpu.py
    python benchmarks/gpu.py --official DIR    # DIR has the built PyTorch extension MultiScaleDeformableAttention

`--interpret` tries the script itself on any machine: tiny sizes, the kernel in the interpreter, meaningless times.
"""

import argparse
import dataclasses
import functools
import importlib
import os
import sys
import time
from collections.abc import Callable, Sequence

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # leaves memory to PyTorch

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.ms_deform_attn import gpu_triton
from pallas_kernels.ms_deform_attn.gpu import ms_deform_attn_gpu
from pallas_kernels.ms_deform_attn.gpu_mosaic import mosaic, ms_deform_attn_gpu_mosaic
from pallas_kernels.ms_deform_attn.reference import ms_deform_attn_reference
from pallas_kernels.ms_deform_attn.shapes import SHAPES, Shape, problem
from pallas_kernels.ms_deform_attn.xla import ms_deform_attn_xla

TINY = {
    "encoder_tiny": Shape(1, ((3, 4), (2, 2)), None, heads=2, head_dim=16, points=2),
    "decoder_tiny": Shape(1, ((3, 4), (2, 2)), 5, heads=2, head_dim=16, points=2),
}


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    gpus = [device for device in jax.devices() if device.platform == "gpu"]
    if not gpus and not args.interpret:
        sys.exit(
            f"benchmarks/gpu.py needs an NVIDIA GPU, and JAX sees only {jax.devices()[0].platform!r}: run it on a "
            "machine that has one, with `pip install -e '.[cuda]'`. `--interpret` tries the script without."
        )
    official = load_official(args.official) if args.official else None
    print(
        f"{gpus[0].device_kind if gpus else 'no GPU, interpreted: times mean nothing'}, jax {jax.__version__}",
        flush=True,
    )
    shapes = TINY if args.interpret else SHAPES
    jax.config.update("jax_default_matmul_precision", "highest")  # or the reference's sums would be in TensorFloat-32
    rows = []
    for name in shapes if args.interpret else args.shapes:
        for dtype in args.types:
            for batch in args.batches:
                shape = dataclasses.replace(shapes[name], batch=batch)
                label = f"{name} {dtype} batch {batch}"
                times = compare(label, shape, jnp.dtype(dtype), official, args.rounds, args.interpret)
                rows += [(name, dtype, batch, part, seconds) for part, seconds in times.items()]
                print(f"{label}: done", file=sys.stderr, flush=True)
    print(table(rows))


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["encoder_800x1333", "decoder_800x1333"])
    parser.add_argument("--types", nargs="+", choices=["float32", "bfloat16"], default=["float32", "bfloat16"])
    parser.add_argument("--batches", nargs="+", type=positive, default=[1, 2, 4, 8], help="images")
    parser.add_argument("--rounds", type=positive, default=5, help="timed rounds, each one running all in turn")
    parser.add_argument("--official", metavar="DIR", help="folder of the built PyTorch extension, to compare with it")
    parser.add_argument("--interpret", action="store_true", help="tiny sizes, without a GPU")
    return parser.parse_args(argv)


def positive(text: str) -> int:
    """An int of at least 1."""
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number")
    return int(text)


def load_official(folder: str):
    """The official PyTorch extension."""
    sys.path.insert(0, folder)
    try:
        importlib.import_module("torch")  # before the extension, whose symbols it has
        return importlib.import_module("MultiScaleDeformableAttention")
    except ImportError as error:
        sys.exit(
            f"--official {folder}: cannot import torch and MultiScaleDeformableAttention from there ({error}). "
            "Build it with `python setup.py build` in the official code's models/ops; DIR is its build/lib.* folder."
        )


def compare(
    label: str, shape: Shape, dtype: jnp.dtype, official, rounds: int, interpret: bool
) -> dict[str, dict[str, float | None]]:
    """Seconds of each implementation, forward and forward + backward; `None` where memory does not suffice."""
    inputs = problem(shape, dtype)
    kernels: dict[str, Callable] = {
        "gpu": functools.partial(ms_deform_attn_gpu, interpret=interpret),
        "xla": ms_deform_attn_xla,
        "reference": ms_deform_attn_reference,
    }
    if not interpret and gpu_triton.plt is not None and mosaic() is not None:
        kernels["mosaic"] = ms_deform_attn_gpu_mosaic
    times = {}
    for part, wrap in (("forward", forward), ("forward+backward", forward_backward)):
        runs: dict[str, Callable] = {
            name: functools.partial(wrap(kernel, shape.spatial_shapes), *inputs) for name, kernel in kernels.items()
        }
        if official and dtype == jnp.float32:  # it has no bfloat16
            runs["official"] = official_run(official, shape, inputs, part == "forward+backward")
        expected = attempt(runs["reference"])
        for name, run in runs.items():
            got = attempt(run)
            if got is None:
                runs = {key: value for key, value in runs.items() if key != name}
            elif expected is not None:
                check(f"{label}, {part}, {name}", got, expected, dtype)
        del expected
        seconds = {name: [] for name in runs}
        for _ in range(rounds):
            for name, run in runs.items():
                seconds[name].append(timed(run))
        times[part] = {
            name: float(np.median(seconds[name])) if name in runs else None for name in [*kernels, "official"]
        }
    return times


def forward(kernel: Callable, spatial_shapes) -> Callable:
    """Compiled: the output."""
    return jax.jit(lambda value, locations, weights, gradient: (kernel(value, spatial_shapes, locations, weights),))


def forward_backward(kernel: Callable, spatial_shapes) -> Callable:
    """Compiled: the output and its gradients."""

    @jax.jit
    def run(value, locations, weights, gradient):
        output, vjp = jax.vjp(lambda *x: kernel(x[0], spatial_shapes, *x[1:]), value, locations, weights)
        return output, *vjp(gradient)

    return run


def official_run(extension, shape: Shape, inputs: Sequence[jax.Array], backward: bool) -> Callable:
    """The same by the official extension, on the GPU of PyTorch."""
    import torch  # pyright: ignore[reportMissingImports]

    value, locations, weights, gradient = (torch.from_numpy(np.array(x)).cuda() for x in inputs)
    sizes = torch.tensor(shape.spatial_shapes, dtype=torch.long, device="cuda")
    starts = torch.cat([sizes.new_zeros(1), sizes.prod(1).cumsum(0)[:-1]])
    arguments = value, sizes, starts, locations, weights
    gradient = gradient.flatten(2)
    step = shape.batch  # images a launch; must divide the batch

    def run():
        outputs = [extension.ms_deform_attn_forward(*arguments, step)]
        if backward:
            outputs += extension.ms_deform_attn_backward(*arguments, gradient, step)
        return outputs

    return run


def attempt(run: Callable) -> list[np.ndarray] | None:
    """Results of a run, float32 on the host; `None` where the GPU's memory does not suffice."""
    try:
        return [np.asarray(x.cpu() if hasattr(x, "cpu") else x, np.float32) for x in run()]
    except RuntimeError as error:  # JAX's and PyTorch's are both RuntimeErrors
        if "RESOURCE_EXHAUSTED" in str(error) or "out of memory" in str(error):
            return None
        raise


def check(label: str, got: Sequence[np.ndarray], expected: Sequence[np.ndarray], dtype: jnp.dtype) -> None:
    """Stops unless the results agree: sums in another order in float32, one rounding apart in bfloat16."""
    names = "output", "gradient of value", "gradient of locations", "gradient of weights"
    for name, x, y in zip(names, got, expected, strict=False):
        scale = np.abs(y).max()
        limit = (2e-5 if dtype == jnp.float32 else 2e-2) * scale
        difference = np.abs(x.reshape(y.shape) - y).max()
        if not difference <= limit:
            sys.exit(f"{label}: {name} is {difference:.2e} off the reference, {limit:.2e} allowed: not timed")


def timed(run: Callable, shortest: float = 0.05) -> float:
    """Seconds of a run, as the mean of as many as take `shortest` seconds together."""
    count = 1
    while True:
        start = time.perf_counter()
        for _ in range(count - 1):
            run()
        wait(run())
        seconds = time.perf_counter() - start
        if seconds >= shortest:
            return seconds / count
        count = max(count + 1, int(1.2 * count * shortest / max(seconds, 1e-6)))


def wait(result: Sequence) -> None:
    """Until the GPU has computed these arrays of JAX or PyTorch."""
    if hasattr(result[0], "cpu"):
        sys.modules["torch"].cuda.synchronize()
    else:
        jax.block_until_ready(result)


def table(rows: Sequence[tuple[str, str, int, str, dict[str, float | None]]]) -> str:
    """Aligned: milliseconds of each implementation, and how many times the kernel's they are."""
    names = [name for name in rows[0][4] if any(row[4][name] for row in rows)]
    others = [name for name in names if name != "gpu"]
    head = ["shape", "type", "batch", "pass", *(f"{x} ms" for x in names), *(f"{x} / gpu" for x in others)]
    lines = [head]
    for shape, dtype, batch, part, seconds in rows:
        times = [f"{1e3 * s:.3f}" if (s := seconds[x]) else "-" for x in names]
        ours = seconds["gpu"]
        ratios = [f"{s / ours:.2f}" if (s := seconds[x]) and ours else "-" for x in others]
        lines.append([shape, dtype, str(batch), part, *times, *ratios])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    left = {0, 1, 3}
    return "\n".join(
        "  ".join(x.ljust(w) if i in left else x.rjust(w) for i, (x, w) in enumerate(zip(line, widths, strict=True)))
        for line in lines
    )


if __name__ == "__main__":
    main()
