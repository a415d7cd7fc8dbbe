"""Asks a real TPU what nobody could see without one about the SparseCore kernels; one command, some minutes.

    python benchmarks/sparsecore.py

Nothing had executed `implementation="sparsecore"` on a TPU when it was written: it was interpreted on a CPU and
compiled ahead of time. On a TPU v5p, v6e or 7x this prints, each answer on its own, so that a failure hides no other:

1. Does it run, and do its output and gradients agree with the reference?
2. How long does a vector gather or an adding scatter take: at consecutive, random, equal, and equally spaced
   addresses? The compiler tells how many cycles one takes at best, so the fastest pattern shows the clock.
3. Do lanes of one adding scatter that share an address add up? (The kernels do not rely on it.) Do scatters that
   follow each other? (They do.)
4. Does the TensorCore work meanwhile?
5. How long does a layer take, forward and with its backward, with every implementation, and which one wins?

Without such a TPU it prints what the compiler says and ends. Compare its milliseconds, at an assumed 1.75 GHz, with 5.
"""

import argparse
import dataclasses
import traceback
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.experimental.pallas import tpu_sc as plsc

from pallas_kernels.ms_deform_attn import IMPLEMENTATIONS, ms_deform_attn
from pallas_kernels.ms_deform_attn.bench import median_seconds
from pallas_kernels.ms_deform_attn.shapes import SHAPES, Shape, problem
from pallas_kernels.ms_deform_attn.sparsecore import sparse_core, subcore_mesh

STATIC = """\
What the compiler says (libtpu of jax 0.10.2; LIBTPU_INIT_ARGS=--xla_sc_dump_bundles_to=DIR) of one image of 800x1333,
8 heads, 4 levels, 4 points, in milliseconds at an assumed 1.75 GHz, without bank conflicts or waiting for copies:

                                      v5p            v6e            7x
                                 float32  bf16  float32  bf16  float32  bf16
  forward                           0.63  0.45     1.63  0.95     0.62  0.45
  gradient of the weights           0.58  0.47     1.61  1.14     0.62  0.51
  gradient of the values            0.72  0.72     2.24  2.24     0.75  0.75
  XLA around them, forward          0.39     -     0.59     -     0.26     -
  XLA around them, both             0.90     -     2.03     -     0.63     -
"""
BUNDLES = {8: {"gather": 48 / 32, "scatter": 73 / 32}, 16: {"gather": 55 / 32, "scatter": 65 / 32}}  # of the probes
TABLE = 4096  # words in the memory of a subcore that a probe reads or adds to
VECTORS = 32  # of addresses, in a probe's loop


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="encoder_800x1333", help="size (default %(default)s)")
    parser.add_argument("--batch", type=int, default=1, help="images (default %(default)s)")
    parser.add_argument("--repeats", type=int, default=10, help="runs of each; the median counts (default %(default)s)")
    args = parser.parse_args()
    shape = SHAPES[args.shape]
    print(f"{args.shape}, batch {args.batch}, on {jax.devices()[0].device_kind}\n")
    print(STATIC)
    try:
        core = sparse_core()
    except ValueError as error:
        print(f"Nothing to time here: {error}")
        return
    print(f"{core}\n")
    ask("1. Agreement with the reference", lambda: agreement(shape, args.batch))
    ask("2. Time of a vector operation", lambda: addresses(args.repeats))
    ask("3. Equal addresses", duplicates)
    ask("4. Beside the TensorCore", lambda: overlap(shape, args.batch, args.repeats))
    ask("5. Implementations", lambda: implementations(shape, args.batch, args.repeats))


def ask(question: str, answer: Callable[[], None]) -> None:
    """Prints the answer, or why there is none."""
    print(question, flush=True)
    try:
        answer()
    except Exception:  # one failure must not hide the other answers
        print("   FAILED\n" + traceback.format_exc())
    print(flush=True)


def layer(shape: Shape, implementation: str, backward: bool) -> Callable:
    """The jitted operation, or its output and gradients."""

    def attend(value, locations, weights):
        return ms_deform_attn(value, shape.spatial_shapes, locations, weights, implementation=implementation)

    def with_backward(*inputs):
        output, vjp = jax.vjp(attend, *inputs)
        return output, *vjp(jnp.cos(jnp.arange(output.size)).reshape(output.shape).astype(output.dtype))

    return jax.jit(with_backward if backward else attend)


def agreement(shape: Shape, batch: int) -> None:
    """Of output and gradients, for both types; the gradients of a bfloat16 run come from a rounded output's."""
    for dtype in (jnp.float32, jnp.bfloat16):
        inputs = problem(dataclasses.replace(shape, batch=batch), dtype)[:3]
        pairs = [layer(shape, name, backward=True)(*inputs) for name in ("sparsecore", "reference")]
        for name, x, expected in zip(("output", "value", "locations", "weights"), *pairs, strict=True):
            x, expected = (np.asarray(a, np.float32) for a in (x, expected))
            error = np.abs(x - expected).max() / np.abs(expected).max()
            good = error < (1e-5 if dtype == jnp.float32 else 1e-2)
            print(f"   {jnp.dtype(dtype).name:9} {name:10} relative error {error:.1e}   {'ok' if good else 'WRONG'}")


def probe(operation: str, rounds: int, *, interpret: bool = False) -> Callable[[jax.Array], jax.Array]:
    """A kernel that runs `VECTORS` vector operations `rounds` times on every subcore, at given addresses.

    It takes int32 `[VECTORS * lanes]` and returns the memory `[TABLE]` of the first subcore: ones that were gathered
    and added up at its start, or what the scatters added to zeros.
    """
    core = sparse_core()
    lanes = core.num_lanes

    def kernel(addresses_hbm, output, addresses, memory):
        pltpu.sync_copy(addresses_hbm, addresses)

        @plsc.parallel_loop(0, TABLE, lanes)
        def _(i):
            memory[pl.ds(i, lanes)] = jnp.full(lanes, 1.0 if operation == "gather" else 0.0)

        @plsc.parallel_loop(0, rounds, carry=jnp.zeros(lanes, jnp.float32))
        def total(i, total):
            values = []
            for j in range(VECTORS):
                # They move on together, or the compiler would see that all rounds are equal.
                address = (addresses[pl.ds(j * lanes, lanes)] + i) & (TABLE - 1)
                if operation == "gather":
                    values.append(plsc.load_gather(memory, [address]))
                else:
                    plsc.addupdate_scatter(memory, [address], jnp.ones(lanes, jnp.float32))
            while len(values) > 1:
                values = [x + y for x, y in zip(values[::2], values[1::2], strict=True)]
            return total + values[0] if values else total

        if operation == "gather":
            memory[pl.ds(0, lanes)] = total

        @pl.when((lax.axis_index("core") == 0) & (lax.axis_index("subcore") == 0))
        def _():
            pltpu.sync_copy(memory, output)

    call: Callable = pl.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct((TABLE,), jnp.float32),
        mesh=subcore_mesh(core),
        scratch_types=[pltpu.VMEM((VECTORS * lanes,), jnp.int32), pltpu.VMEM((TABLE,), jnp.float32)],
        compiler_params=pltpu.CompilerParams(needs_layout_passes=False, use_tc_tiling_on_sc=False),
        interpret=interpret,
    )
    return call


def addresses(repeats: int, few: int = 10_000, many: int = 110_000) -> None:
    """Of gathers and scatters; what starting the kernel takes is subtracted."""
    lanes = sparse_core().num_lanes
    number = np.arange(VECTORS * lanes)
    patterns = {
        "consecutive": number,
        "random": np.random.default_rng(0).integers(0, TABLE, VECTORS * lanes),
        "equal in a vector": number // lanes * 97 % TABLE,
        "16 words apart": number * 16 % TABLE,
        "128 words apart": number * 128 % TABLE + number * 128 // TABLE % 128,
    }
    for operation in ("gather", "scatter"):
        short, long = (jax.jit(probe(operation, rounds)) for rounds in (few, many))
        for name, address in patterns.items():
            address = jnp.asarray(address, jnp.int32)
            seconds = median_seconds(long, (address,), repeats) - median_seconds(short, (address,), repeats)
            nanoseconds = seconds * 1e9 / ((many - few) * VECTORS)
            clock = BUNDLES[lanes][operation] / nanoseconds
            print(f"   {operation:8} {name:18} {nanoseconds:6.2f} ns a vector of {lanes}, as at {clock:5.2f} GHz")


def duplicates(*, interpret: bool = False) -> None:
    """Counts what arrives where eight or sixteen lanes, or scatters that follow each other, add to one word."""
    lanes = sparse_core().num_lanes
    add = jax.jit(probe("scatter", 100, interpret=interpret))
    for name, address in (
        ("lanes of one scatter", np.zeros(VECTORS * lanes)),
        ("scatters that follow each other", np.arange(VECTORS * lanes) % lanes),
    ):
        memory = np.asarray(add(jnp.asarray(address, jnp.int32)))
        expected = 100 * VECTORS * lanes
        verdict = "add up" if memory.sum() == expected else "LOSE UPDATES"
        print(f"   {name} at one address {verdict}: {memory.sum():.0f} of {expected}")


def overlap(shape: Shape, batch: int, repeats: int) -> None:
    """The kernel, matrix products that take about as long, and both in one program."""
    inputs = problem(dataclasses.replace(shape, batch=batch))[:3]
    attend = layer(shape, "sparsecore", backward=False)
    x, matrix = jnp.ones((shape.tokens, 1024), jnp.bfloat16), jnp.eye(1024, dtype=jnp.bfloat16)

    def multiply(count, x):
        return lax.fori_loop(0, count, lambda _, x: jax.nn.relu(x @ matrix), x)

    kernel = median_seconds(attend, inputs, repeats)
    ten = median_seconds(jax.jit(lambda x: multiply(10, x)), (x,), repeats)
    count = max(1, round(10 * kernel / ten))
    products = median_seconds(jax.jit(lambda x: multiply(count, x)), (x,), repeats)
    both = median_seconds(jax.jit(lambda x, *inputs: (attend(*inputs), multiply(count, x))), (x, *inputs), repeats)
    hidden = (kernel + products - both) / min(kernel, products)
    print(
        f"   kernel {1e3 * kernel:.2f} ms, {count} products {1e3 * products:.2f} ms, both {1e3 * both:.2f} ms:", end=" "
    )
    print(f"{100 * hidden:.0f}% of the shorter one is hidden")


def implementations(shape: Shape, batch: int, repeats: int) -> None:
    """Milliseconds of each, for two types and two spreads of the points."""
    for dtype in (jnp.float32, jnp.bfloat16):
        for spread in (2.0, 16.0):
            inputs = problem(dataclasses.replace(shape, batch=batch), dtype, spread=spread)[:3]
            for backward in (False, True):
                seconds = {}
                for name in IMPLEMENTATIONS:
                    try:
                        seconds[name] = median_seconds(layer(shape, name, backward), inputs, repeats)
                    except Exception as error:  # made for another platform, or it fails: the others still count
                        print(f"   {name} does not run: {str(error).splitlines()[0][:90]}")
                times = ", ".join(f"{name} {1e3 * x:.2f} ms" for name, x in sorted(seconds.items(), key=lambda x: x[1]))
                what = "forward and backward" if backward else "forward"
                print(f"   {jnp.dtype(dtype).name}, {spread:.0f} px, {what}: {times}", flush=True)
                print(f"      {min(seconds, key=lambda name: seconds[name])} wins")


if __name__ == "__main__":
    main()
