"""What a layer of multi-scale deformable attention costs.

    python -m pallas_kernels.ms_deform_attn.bench

A layer is all of it: the four projections, softmax, locations, and the operation. On an accelerator every
implementation is timed. Without one (`pip install libtpu`, JAX_PLATFORMS=cpu), layers are compiled for TPUs ahead of
time, and a table shows what the compiler counts: bundles of the TensorCore kernel's inner loop, units visited, vector
memory, and milliseconds at assumed clocks, beside the XLA path. What is waited for (memory, the matrix unit's last
result) is not in it.
"""

import argparse
import dataclasses
import functools
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import ahead_of_time
from pallas_kernels.ms_deform_attn.api import IMPLEMENTATIONS, ms_deform_attn
from pallas_kernels.ms_deform_attn.order import block_order, z_order
from pallas_kernels.ms_deform_attn.shapes import SHAPES, Shape, initial_offsets, query_centers
from pallas_kernels.ms_deform_attn.tensorcore import TILES, UNROLL, in_tiles, touched

SPREADS = (0.0, 2.0, 8.0)
"""Standard deviations in pixels of the offsets around their initial values."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="encoder_800x1333", help="size (default %(default)s)")
    parser.add_argument("--batch", type=int, default=1, help="images (default %(default)s)")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="(default %(default)s)")
    parser.add_argument(
        "--generations",
        nargs="+",
        choices=ahead_of_time.TOPOLOGIES,
        default=["v5e", "v5p", "v6e", "7x"],
        help="TPUs to compile for where there is no accelerator (default %(default)s)",
    )
    parser.add_argument(
        "--implementations",
        nargs="+",
        choices=IMPLEMENTATIONS,
        help="which to time or compile (default: all that run on this accelerator; else tensorcore and xla)",
    )
    parser.add_argument("--repeats", type=int, default=10, help="timed runs; the median counts (default %(default)s)")
    args = parser.parse_args()
    shape, dtype = dataclasses.replace(SHAPES[args.shape], batch=args.batch), jnp.dtype(args.dtype)
    print(f"{args.shape}, batch {shape.batch}, {dtype.name}: {len(shape.spatial_shapes)} levels, {shape.heads} heads")
    if jax.default_backend() == "cpu":
        print_static(shape, dtype, args.generations, args.implementations or ["tensorcore", "xla"])
    else:
        print_timed(shape, dtype, args.implementations or list(IMPLEMENTATIONS), args.repeats)


class LayerInputs(NamedTuple):
    """Arguments of `layer`."""

    parameters: dict[str, dict[str, jax.Array]]
    tokens: jax.Array
    """`[b, s, c]`."""
    query: jax.Array
    """`[b, q, c]`."""
    reference: jax.Array
    """`[b, q, 2]`, (x, y) in 0-1."""


def layer_inputs(shape: Shape, dtype: jnp.dtype, spread: float) -> LayerInputs:
    """Random ones, with which the layer samples as in `shapes.problem`.

    The offsets come from the bias (`initial_offsets`) and from tokens that make them spread by `spread` pixels.
    """
    rng = np.random.default_rng(0)
    c, samples = shape.heads * shape.head_dim, shape.heads * len(shape.spatial_shapes) * shape.points
    offsets = initial_offsets(shape)[:, None]  # [h, 1, p, 2]
    offsets = np.broadcast_to(offsets, (shape.heads, len(shape.spatial_shapes), shape.points, 2)).reshape(samples, 2)

    def normal(*size, scale=1.0):
        return jnp.asarray(scale * rng.standard_normal(size, np.float32), dtype)

    def linear(outputs, bias, scale=1.0):
        return {"kernel": normal(c, outputs, scale=scale * c**-0.5), "bias": jnp.asarray(bias, dtype)}

    parameters = {
        "value": linear(c, np.zeros(c)),
        "x": linear(samples, offsets[:, 0], spread),
        "y": linear(samples, offsets[:, 1], spread),
        "weights": linear(samples, np.zeros(samples)),
        "output": linear(c, np.zeros(c)),
    }
    centers = query_centers(shape, rng)
    if shape.queries is not None:
        centers = centers[np.argsort(z_order(centers))]  # as the models order theirs
    reference = jnp.broadcast_to(jnp.asarray(centers, jnp.float32), (shape.batch, *centers.shape))
    return LayerInputs(
        parameters, normal(shape.batch, shape.tokens, c), normal(shape.batch, len(centers), c), reference
    )


def layer(shape: Shape, implementation: str) -> Callable[..., jax.Array]:
    """The paper's module (section 4.1) as a function of `LayerInputs`, in the order of `in_order`."""
    in_blocks = implementation == "tensorcore"

    def run(parameters, tokens, query, reference):
        value, locations, weights = samples(shape, parameters, tokens, query, reference)
        output = ms_deform_attn(
            value, shape.spatial_shapes, locations, weights, implementation=implementation, in_blocks=in_blocks
        )
        return linear(output.reshape(*output.shape[:2], -1), parameters["output"])

    return run


def samples(shape: Shape, parameters, tokens, query, reference) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Value, sampling locations and attention weights."""
    grid = (shape.heads, len(shape.spatial_shapes), shape.points)
    sizes = [np.array(z, np.float32)[:, None] for z in zip(*[(w, h) for h, w in shape.spatial_shapes], strict=True)]
    offsets = [linear(query, parameters[axis]).astype(jnp.float32) for axis in ("x", "y")]
    x, y = (
        reference[:, :, i, None, None, None] + offsets[i].reshape(*offsets[i].shape[:2], *grid) / sizes[i]
        for i in range(2)
    )
    weights = linear(query, parameters["weights"]).astype(jnp.float32)
    weights = jax.nn.softmax(weights.reshape(*weights.shape[:2], shape.heads, -1)).reshape(x.shape)
    value = linear(tokens, parameters["value"])
    return value.reshape(*value.shape[:2], shape.heads, -1), jnp.stack([x, y], -1), weights


def linear(x: jax.Array, parameters: dict[str, jax.Array]) -> jax.Array:
    """Kernel and bias."""
    return x @ parameters["kernel"] + parameters["bias"]


def both_passes(run: Callable) -> Callable:
    """The output and the gradients with respect to all but the reference points, given the output's."""

    def passes(parameters, tokens, query, reference, gradient):
        output, vjp = jax.vjp(lambda *x: run(*x, reference), parameters, tokens, query)
        return output, *vjp(gradient)

    return passes


def in_order(shape: Shape, implementation: str, arrays: LayerInputs) -> LayerInputs:
    """For `tensorcore`: tokens in block order, and what belongs to the queries, if these are the tokens."""
    if implementation != "tensorcore":
        return arrays
    names = ["tokens"] if shape.queries else ["tokens", "query", "reference"]
    to_blocks = block_order(shape.spatial_shapes).to_blocks
    return arrays._replace(**{name: to_blocks(getattr(arrays, name)) for name in names})


def print_timed(shape: Shape, dtype: jnp.dtype, implementations: list[str], repeats: int) -> None:
    """Milliseconds on this machine's accelerator."""
    print(f"{jax.devices()[0].device_kind}; ms, median of {repeats}\n")
    print(f"{'implementation':<16}{'spread px':>10}{'forward':>10}{'both':>10}", flush=True)
    for spread in SPREADS:
        arrays = layer_inputs(shape, dtype, spread)
        for name in implementations:
            inputs, run = in_order(shape, name, arrays), layer(shape, name)
            try:
                output = jax.jit(run)(*inputs)
                forward = 1e3 * median_seconds(jax.jit(run), inputs, repeats)
                both = 1e3 * median_seconds(jax.jit(both_passes(run)), (*inputs, output), repeats)
            except (ValueError, NotImplementedError, jax.errors.JaxRuntimeError) as error:
                print(f"{name:<16}{spread:>10g}  does not run here: {str(error).splitlines()[0][:90]}", flush=True)
            else:
                print(f"{name:<16}{spread:>10g}{forward:>10.3f}{both:>10.3f}", flush=True)


def median_seconds(run: Callable, arguments: tuple, repeats: int) -> float:
    """Median of `repeats` runs, after one that compiles."""
    jax.block_until_ready(run(*arguments))
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(run(*arguments))
        times.append(time.perf_counter() - start)
    return float(np.median(times))


def print_static(shape: Shape, dtype: jnp.dtype, generations: list[str], implementations: list[str]) -> None:
    """What the compiler counts, on a machine without an accelerator."""
    folder = tempfile.TemporaryDirectory()
    try:
        ahead_of_time.require_libtpu()
        ahead_of_time.dump_bundles(Path(folder.name))
    except (ImportError, ValueError) as error:
        sys.exit(f"no accelerator here: {error}")
    units = {spread: visits(shape, spread) for spread in SPREADS}
    print("no accelerator here: compiled ahead of time; nothing was run\n")
    print(
        "units of 8 x 8 pixels that a tile of 128 queries and a head visit, and iterations of the kernels' inner loops:"
    )
    for spread, count in units.items():
        loops = ", ".join(
            f"{whole} {name} (of {unroll} units)" + (f" and {rest} of half of it" if rest else "")
            for name, unroll in UNROLL.items()
            for whole, rest in [iterations(count, name)]
        )
        print(f"  offsets spread {spread:g} px: {count.mean():6.1f} units; {loops}")
    print("\nassumed clocks in GHz: " + ", ".join(f"{k} {ahead_of_time.CLOCK_GHZ[k]}" for k in generations))
    print("XLA: its estimate in Mcycles; gathers: bundles of gathers and scatters in millions; kernel: bundles in")
    print("millions, and those of an iteration; ms: all of them at each spread; VMEM: MiB of the kernel\n")
    spreads = "".join(f"{f'{spread:g} px':>9}" for spread in SPREADS)
    print(f"{'':36}{'':>7}{'':>9}{'-- kernel Mbundles --':^27}{'per':>8}{'':>6}{'------- ms -------':^27}")
    print(
        f"{'TPU':<5}{'implementation':<16}{'pass':<15}{'XLA':>7}{'gathers':>9}{spreads}{'iter.':>8}{'VMEM':>6}{spreads}"
    )
    with folder:
        for generation in generations:
            for name in implementations:
                for line in static_lines(shape, dtype, generation, name, units, Path(folder.name)):
                    print(line, flush=True)


def static_lines(shape, dtype, generation, name, units, folder):
    """Two lines of the table: forward and backward."""
    for part, (cost, kernels) in static_costs(shape, dtype, generation, name, folder).items():
        counts = list(kernels.values())
        issued = [sum(count.total(shape, z, part) for count in counts) / 1e6 for z in units.values()]
        ms = [(cost.cycles / 1e6 + cost.gathers / 1e6 + z) / ahead_of_time.CLOCK_GHZ[generation] for z in issued]
        gathers = (f"{cost.gathers / 1e6:.2f}" if cost.gathers else "-") + ("+" if cost.unknown else "")
        kernel = "".join(f"{z:>9.2f}" if counts else f"{'-':>9}" for z in issued)
        inner = f"{max(count.iteration for count in counts)}" if counts else "-"
        vmem = f"{max(kernel.vmem for kernel in kernels) / 2**20:.0f}" if kernels else "-"
        line = f"{generation:<5}{name:<16}{part:<15}{cost.cycles / 1e6:>7.2f}{gathers:>9}{kernel}{inner:>8}{vmem:>6}"
        yield line + "".join(f"{z:>9.2f}" for z in ms)


def static_costs(
    shape: Shape, dtype: jnp.dtype, generation: str, implementation: str, folder: Path
) -> dict[str, tuple[ahead_of_time.Cost, dict[ahead_of_time.Kernel, "Count"]]]:
    """Of the forward pass and of what the backward adds: the cost outside of kernels, and the kernels' bundles."""
    arrays = jax.eval_shape(lambda: in_order(shape, implementation, layer_inputs(shape, dtype, 0.0)))
    run = layer(shape, implementation)
    gradient = jax.ShapeDtypeStruct(arrays.query.shape, dtype)
    before, costs = ahead_of_time.Cost(), {}
    for part, function, arguments, names in (
        ("forward", run, arrays, "ms_deform_attn_"),
        ("backward", both_passes(run), (*arrays, gradient), "ms_deform_attn_backward"),
    ):
        compiled = ahead_of_time.compile_for(generation, function, *arguments)
        cost = ahead_of_time.cost(compiled, folder)
        kernels = ahead_of_time.kernels(compiled, names)
        counts = {kernel: Count.of(ahead_of_time.bundles(folder, kernel.label)) for kernel in kernels}
        costs[part] = cost + before.times(-1), counts
        before = cost
    return costs


def visits(shape: Shape, spread: float) -> np.ndarray:
    """How many units each tile of each image and head visits, `[b, h, n]`."""
    arrays = layer_inputs(shape, jnp.dtype("float32"), spread)
    order = block_order(shape.spatial_shapes)
    _, locations, weights = jax.jit(functools.partial(samples, shape))(*arrays)
    is_query = np.ones(locations.shape[1], bool)
    if shape.queries is None:
        locations, weights, is_query = order.to_blocks(locations), order.to_blocks(weights), order.is_token
    x, y, _ = in_tiles(locations, weights, is_query, order)
    first, end = touched(x, y, order, shape.points, interpret=True)
    return np.asarray((end - first).sum(-1))


def layer_bundles(shape: Shape, generation: str, implementation: str, spread: float) -> tuple[float, float]:
    """Bundles of gathers and of kernels in one bfloat16 layer, forward and backward.

    Call it in a process that compiles nothing else (`ahead_of_time.apart`): libtpu writes the bundles of all that a
    process compiles, or of none.
    """
    ahead_of_time.require_libtpu()
    with tempfile.TemporaryDirectory() as folder:
        ahead_of_time.dump_bundles(Path(folder))
        costs = static_costs(shape, jnp.dtype("bfloat16"), generation, implementation, Path(folder))
    units = visits(shape, spread) if implementation == "tensorcore" else np.zeros(0)
    kernels = sum(count.total(shape, units, part) for part, (_, counts) in costs.items() for count in counts.values())
    return sum(cost.gathers for cost, _ in costs.values()), kernels


def iterations(units: np.ndarray, part: str) -> tuple[int, int]:
    """Of the inner loop of the kernel of a pass (`forward`, `backward`), for all tiles, and of the one for the rest.

    Backward, a tile's last units have a loop of half the length where they fit into it (`Walk.rest`).
    """
    unroll = UNROLL[part]
    rest = unroll // 4 * 2 if part == "backward" else 0
    whole = (units + unroll - 1 - rest) // unroll
    return int(whole.sum()), int((units > whole * unroll).sum())


@dataclasses.dataclass(frozen=True)
class Count:
    """Bundles of a kernel, by how often they are issued."""

    iteration: int
    """In the innermost loop."""
    rest: int
    """In the one after it, for what is left."""
    tile: int
    """Around it, in the loop over tiles."""
    head: int
    """In loops of constant length, once for each image and head."""
    step: int
    """Once for each step of the grid."""

    @classmethod
    def of(cls, bundles: list[ahead_of_time.Bundle]) -> "Count":
        """The grid's loop is the outermost. In it, the one with another inside goes over the tiles.

        Without such a one, it is the longest without a constant length.
        """
        loops: list[list[ahead_of_time.Bundle]] = []
        for bundle in bundles:
            if bundle.depth >= 2 and (not loops or (bundle.begins and bundle.depth == 2)):
                loops.append([])
            if bundle.depth >= 2:
                loops[-1].append(bundle)
        trips = [next((bundle.trips for bundle in loop if bundle.trips), None) for loop in loops]

        def rank(i: int) -> tuple[bool, bool, int]:
            return any(bundle.depth > 2 for bundle in loops[i]), trips[i] is None, len(loops[i])

        over_tiles = loops[max(range(len(loops)), key=rank)]
        inner: list[int] = []
        for bundle in over_tiles:
            if bundle.depth > 2:
                inner += [0] * (bundle.begins or not inner)
                inner[-1] += 1
        iteration, rest = [*inner, 0, 0][:2]
        return cls(
            iteration=iteration,
            rest=rest,
            tile=len(over_tiles) - iteration - rest,
            head=sum(
                len(loop) * count for loop, count in zip(loops, trips, strict=True) if count and loop is not over_tiles
            ),
            step=sum(bundle.depth == 1 for bundle in bundles),
        )

    def total(self, shape: Shape, units: np.ndarray, part: str) -> int:
        """For the pass of a problem whose tiles visit so many units (`visits`)."""
        heads = shape.batch * shape.heads
        steps = heads * -(-units.shape[-1] // TILES)
        whole, rest = iterations(units, part)
        loops = self.iteration * whole + self.rest * rest
        return loops + self.tile * units.size + self.head * heads + self.step * steps


if __name__ == "__main__":
    main()
