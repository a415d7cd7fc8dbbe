"""What a deformable 3x3 convolution costs at the sizes of a ResNet's stages on an image of 800 x 1333.

Timed on the device that JAX computes on, forward and forward + backward: `deform_conv` (version 2, one offset group),
a plain convolution of the same size and, on a CPU where it is installed, `torchvision.ops.deform_conv2d`.

    python benchmarks/deform_conv.py

Or compiled ahead of time for TPUs, of which none is needed, and counted (`pip install 'libtpu==0.0.42.*'`):

    JAX_PLATFORMS=cpu python benchmarks/deform_conv.py --static v5e v5p v6e 7x

Milliseconds there are XLA's estimates, and bundles of kernels and gathers, at an assumed clock; what is waited for is
not in them. Offsets are normal noise, of which `--spread` is the standard deviation in pixels.
"""

import argparse
import dataclasses
import functools
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import ahead_of_time
from pallas_kernels.deform_conv import deform_conv
from pallas_kernels.deform_conv.tensorcore import in_tiles
from pallas_kernels.ms_deform_attn.bench import Count, iterations, median_seconds
from pallas_kernels.ms_deform_attn.order import block_order
from pallas_kernels.ms_deform_attn.tensorcore import TILES, touched


@dataclasses.dataclass(frozen=True)
class Layer:
    """A 3x3 convolution of a ResNet-50 or 101 on one image."""

    size: tuple[int, int]
    """Height and width of the input."""
    channels: int
    stride: int = 1

    @property
    def output_size(self) -> tuple[int, int]:
        """Height and width."""
        height, width = self.size
        return -(-height // self.stride), -(-width // self.stride)


LAYERS = {
    "layer2.0": Layer((200, 334), 128, 2),
    "layer2": Layer((100, 167), 128),
    "layer3.0": Layer((100, 167), 256, 2),
    "layer3": Layer((50, 84), 256),
    "layer4.0": Layer((50, 84), 512, 2),
    "layer4": Layer((25, 42), 512),
}
"""The first block of a stage has the stride."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", nargs="+", choices=LAYERS, default=list(LAYERS), help="(default: all)")
    parser.add_argument("--spread", type=float, default=1.0, help="of the offsets (default %(default)s)")
    parser.add_argument("--repeats", type=int, default=5, help="timed runs; the median counts (default %(default)s)")
    parser.add_argument("--implementations", nargs="+", default=["tensorcore", "reference"], help="with --static")
    parser.add_argument("--static", nargs="+", choices=ahead_of_time.TOPOLOGIES, metavar="TPU", help="count, for these")
    args = parser.parse_args()
    if args.static:
        print_static(args)
    else:
        print_timed(args)


def problem(layer: Layer, spread: float, dtype=np.float32) -> tuple[np.ndarray, ...]:
    """x, offsets, modulation and kernel."""
    rng = np.random.default_rng(0)
    samples = (1, *layer.output_size, 1, 9)
    kernel = rng.standard_normal((3, 3, layer.channels, layer.channels), np.float32) / (9 * layer.channels) ** 0.5
    return (
        rng.standard_normal((1, *layer.size, layer.channels), np.float32).astype(dtype),
        spread * rng.standard_normal((*samples, 2), np.float32),
        rng.uniform(0, 1, samples).astype(np.float32),
        kernel,
    )


def with_gradients(convolve: Callable) -> Callable:
    """The output and the gradients of all inputs, given the output's."""

    def passes(gradient, *inputs):
        output, vjp = jax.vjp(convolve, *inputs)
        return output, *vjp(gradient)

    return passes


def print_timed(args: argparse.Namespace) -> None:
    print(f"{jax.devices()[0].device_kind}, float32, ms, median of {args.repeats}\n")
    print(f"{'layer':<10}{'what':<14}{'forward':>10}{'both':>10}", flush=True)
    for name in args.layers:
        layer = LAYERS[name]
        x, offsets, modulation, kernel = problem(layer, args.spread)
        gradient = np.ones((1, *layer.output_size, layer.channels), np.float32)
        plain = functools.partial(
            jax.lax.conv_general_dilated,
            window_strides=(layer.stride,) * 2,
            padding=[(1, 1)] * 2,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        runs = {
            "deform_conv": (
                functools.partial(deform_conv, stride=layer.stride, padding=1),
                (x, offsets, modulation, kernel),
            ),
            "convolution": (plain, (x, kernel)),
        }
        for what, (run, inputs) in runs.items():
            inputs = jax.device_put(inputs)
            forward = median_seconds(jax.jit(run), inputs, args.repeats)
            both = median_seconds(jax.jit(with_gradients(run)), (gradient, *inputs), args.repeats)
            print(f"{name:<10}{what:<14}{1e3 * forward:>10.1f}{1e3 * both:>10.1f}", flush=True)
        if jax.default_backend() == "cpu":
            print(f"{name:<10}{'torchvision':<14}{torchvision_ms(layer, args)}", flush=True)


def torchvision_ms(layer: Layer, args: argparse.Namespace) -> str:
    """The two last columns of the table, of torchvision's op on the same problem."""
    try:
        import torch  # pyright: ignore[reportMissingImports]
        import torchvision  # pyright: ignore[reportMissingImports]
    except ImportError:
        return "  is not installed"
    x, offsets, modulation, kernel = (torch.from_numpy(z) for z in problem(layer, args.spread))
    h, w = layer.output_size
    inputs = [
        x.permute(0, 3, 1, 2).contiguous(),
        offsets.flip(-1).permute(0, 3, 4, 5, 1, 2).reshape(1, 18, h, w).contiguous(),
        kernel.permute(3, 2, 0, 1).contiguous(),
        modulation.permute(0, 3, 4, 1, 2).reshape(1, 9, h, w).contiguous(),
    ]

    def forward(x, offsets, kernel, modulation):
        return torchvision.ops.deform_conv2d(x, offsets, kernel, stride=layer.stride, padding=1, mask=modulation)

    def run(*inputs):
        with torch.no_grad():
            forward(*inputs)

    def both(*inputs):
        inputs = [z.detach().requires_grad_() for z in inputs]
        forward(*inputs).sum().backward()

    return "".join(f"{1e3 * median_seconds(f, tuple(inputs), args.repeats):>10.1f}" for f in (run, both))


def print_static(args: argparse.Namespace) -> None:
    folder = tempfile.TemporaryDirectory()
    try:
        ahead_of_time.require_libtpu()
        ahead_of_time.dump_bundles(Path(folder.name))
    except (ImportError, ValueError) as error:
        sys.exit(str(error))
    print(f"compiled ahead of time, bfloat16, one image, offsets spread {args.spread:g} px; nothing was run")
    print("XLA: its estimate; gathers and kernels: bundles; all in thousands. ms: their sum at an assumed clock\n")
    print(f"{'TPU':<5}{'layer':<10}{'implementation':<16}{'pass':<10}", end="")
    print(f"{'XLA':>9}{'gathers':>9}{'kernels':>9}{'VMEM MiB':>10}{'ms':>8}", flush=True)
    with folder:
        for generation in args.static:
            for name in args.layers:
                for implementation in args.implementations:
                    print_counts(generation, name, implementation, args.spread, Path(folder.name))


def print_counts(generation: str, name: str, implementation: str, spread: float, folder: Path) -> None:
    """Two lines of the table: forward, and what the backward adds."""
    layer = LAYERS[name]
    run = functools.partial(deform_conv, stride=layer.stride, padding=1, implementation=implementation)
    inputs = jax.eval_shape(lambda: tuple(jnp.asarray(z) for z in problem(layer, spread, jnp.bfloat16)))
    gradient = jax.ShapeDtypeStruct((1, *layer.output_size, layer.channels), jnp.bfloat16)
    units = visits(layer, spread) if implementation == "tensorcore" else np.zeros((1, 1, 1), int)
    before = ahead_of_time.Cost()
    for part, function, arguments, kernel_name in (
        ("forward", run, inputs, "ms_deform_attn_"),
        ("backward", with_gradients(run), (gradient, *inputs), "ms_deform_attn_backward"),
    ):
        compiled = ahead_of_time.compile_for(generation, function, *arguments)
        total = ahead_of_time.cost(compiled, folder)
        cost, before = total + before.times(-1), total
        kernels = ahead_of_time.kernels(compiled, kernel_name)
        counts = [Count.of(ahead_of_time.bundles(folder, kernel.label)) for kernel in kernels]
        # Of a map in several parts, each part's kernel visits its share of the units: iterations count once.
        issued = sum(z.tile * units.size + z.head + z.step * -(-units.shape[-1] // TILES) * 9 for z in counts)
        for loop, times in zip(("iteration", "rest"), iterations(units, part), strict=True):
            issued += max((getattr(z, loop) for z in counts), default=0) * times
        vmem = max((kernel.vmem for kernel in kernels), default=0) / 2**20
        ms = (cost.cycles + cost.gathers + issued) / 1e6 / ahead_of_time.CLOCK_GHZ[generation]
        print(f"{generation:<5}{name:<10}{implementation:<16}{part:<10}", end="")
        print(
            f"{cost.cycles / 1e3:>9.0f}{cost.gathers / 1e3:>9.0f}{issued / 1e3:>9.0f}{vmem:>10.0f}{ms:>8.2f}",
            flush=True,
        )


def visits(layer: Layer, spread: float) -> np.ndarray:
    """How many units each tile of each tap visits, `[1, 9, n]`."""
    _, offsets, modulation, _ = problem(layer, spread)
    tiles = functools.partial(in_tiles, size=layer.size, stride=layer.stride, padding=1, dilation=1)
    x, y, _ = tiles(jnp.asarray(offsets), jnp.asarray(modulation))
    first, end = touched(x, y, block_order([layer.size]), 1, interpret=True)
    return np.asarray((end - first).sum(-1))


if __name__ == "__main__":
    main()
