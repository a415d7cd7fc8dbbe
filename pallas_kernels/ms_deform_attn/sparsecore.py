"""Multi-scale deformable attention on the SparseCores of a TPU (v5p, v6e, 7x), in Pallas.

A SparseCore's vector subcore reads and writes its own memory at a vector of addresses, one per lane. So each subcore
keeps a few channels of the values of one image and head, of all levels, in its memory and walks over all queries:
the cost does not depend on where the points lie. The TensorCore makes the addresses and bilinear weights beforehand
(`corners`, whose gradients are JAX's own), and the kernels multiply by that sparse matrix:

- `gather`, the forward: the lanes are queries; each corner of each point is one gather per plane.
- `gather_products`, the gradient of the bilinear weights: the same gathers, multiplied by the output's gradient.
- `scatter`, the gradient of the values: whether lanes with equal addresses add up in one scatter is documented nowhere,
  so no two ever have one. The lanes are the four corners of a point, which are four pixels, by a few points of one
  query; in one scatter each of these points adds to another channel, and they change places in the next.

A float32 value takes a word of memory; two channels in bfloat16 share one. Sums are in float32.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.experimental.pallas import tpu_sc as plsc

from pallas_kernels.derivatives import first_order

PLANES = (4, 2, 1)  # of a subcore: the most that fit; with more, the unrolled loops would be long
CHUNKS = (128, 64, 32, 16)  # queries that a subcore reads at a time: the most that fit
RESERVED_BYTES = 4096  # of a subcore's memory, for the compiler


def ms_deform_attn_sparsecore(
    value: jax.Array,
    spatial_shapes: Sequence[tuple[int, int]],
    sampling_locations: jax.Array,
    attention_weights: jax.Array,
    *,
    interpret: bool = False,
) -> jax.Array:
    """Shapes and semantics of `ms_deform_attn`, gradients at pixel centers included; any batch, levels, heads, points.

    Args:
        value: `[b, s, h, d]`, float32 or bfloat16.
        spatial_shapes: (height, width) of each of the `l` levels; static.
        sampling_locations: `[b, q, h, l, p, 2]`.
        attention_weights: `[b, q, h, l, p]`.
        interpret: run without a TPU; JAX has no rules for that, the tests' `sparsecore_interpreter.py` adds them.

    Raises:
        ValueError: the device has no SparseCore, or not even one plane of `s` tokens fits a subcore's memory.
    """
    shapes = tuple((height, width) for height, width in spatial_shapes)
    split = Split.of(sparse_core(), shapes, value, sampling_locations)
    base, share = corners(split, sampling_locations.astype(jnp.float32), attention_weights.astype(jnp.float32))
    return jnp.asarray(attend(split, interpret, value, base, share), value.dtype)


def sparse_core():
    """The SparseCores (`SparseCoreInfo`) of the device that is traced for: the mesh's, otherwise the default one.

    Raises:
        ValueError: it has none.
    """
    try:
        info = pltpu.get_tpu_info()
    except ValueError as error:  # not a TPU
        raise ValueError(f"implementation='sparsecore' needs a TPU v5p, v6e or 7x: {error}") from error
    if info.sparse_core is None:
        raise ValueError(
            f"implementation='sparsecore' needs a TPU with SparseCores (v5p, v6e, 7x): {info.chip_version} has none"
        )
    return info.sparse_core


def subcore_mesh(core) -> plsc.VectorSubcoreMesh:
    """All vector subcores of a device, over the axes `core` and `subcore`."""
    return plsc.VectorSubcoreMesh(
        core_axis_name="core", subcore_axis_name="subcore", num_cores=core.num_cores, num_subcores=core.num_subcores
    )


def corners(split: "Split", locations: jax.Array, weights: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The upper left of the four pixels around each point, and the weights of the four.

    Returns:
        int32 `[b, h, chunks, l * p, chunk]`, the pixel's address in a plane: one outside the map has the address that
        its row and column would have. float32 `[b, h, chunks, 4 * l * p, chunk]`: all upper left ones, all upper right
        ones, all lower left ones, all lower right ones; 0 outside.
    """
    tokens = [height * width for height, width in split.spatial_shapes]
    start = split.front + np.cumsum([0, *tokens[:-1]], dtype=np.int32)
    height, width, start = (
        np.repeat(x, split.points)[:, None] for x in (*np.array(split.spatial_shapes, np.int32).T, start)
    )

    def along(axis, size):
        """The pixel before each point in one direction, its weight, the next one's: `[b, h, chunks, l * p, chunk]`."""
        position = split.chunked(locations[..., axis]) * size - 0.5
        low = jnp.floor(position)
        near = jnp.where((low >= 0) & (low < size), low + 1 - position, 0)
        far = jnp.where((low >= -1) & (low < size - 1), position - low, 0)
        return jnp.clip(low.astype(jnp.int32), -1, size - 1), near, far  # as integers: no NaN becomes an address

    column, left, right = along(0, width)
    row, upper, lower = along(1, height)
    upper, lower = (split.chunked(weights) * x for x in (upper, lower))
    address = jnp.asarray(start + row * width + column)
    return address, jnp.concatenate([upper * left, upper * right, lower * left, lower * right], -2)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def attend(split, interpret, value, base, share) -> jax.Array:
    """`[b, s, h, d]`, and what `corners` returns -> float32 `[b, q, h, d]`."""
    return gather(split, value, base, share, interpret)


def _attend_backward(split, interpret, inputs, gradient):
    value, base, share, gradient = first_order("ms_deform_attn", (*inputs, gradient))
    grad_share = gather_products(split, value, base, gradient, interpret)
    grad_value = scatter(split.exact(), base, share, gradient, interpret)
    return grad_value.astype(value.dtype), None, grad_share


def _attend_forward(split, interpret, *inputs):
    return attend(split, interpret, *first_order("ms_deform_attn", inputs)), inputs


attend.defvjp(_attend_forward, _attend_backward)


def gather(split, value, base, share, interpret):
    """The forward: float32 `[b, q, h, d]`."""
    lanes, chunk, channels = split.core.num_lanes, split.chunk, split.channels

    def step(memory, base, share, output):
        groups = split.groups(8 // split.planes)
        for group in groups:

            @plsc.parallel_loop(0, chunk, lanes)
            def _(query, group=group):
                total = [jnp.zeros(lanes, jnp.float32)] * channels
                for sample, width in group:
                    address = base[pl.ds(sample * chunk + query, lanes)]
                    for corner, offset in enumerate((0, 1, width, width + 1)):
                        factor = share[pl.ds((corner * len(split.widths) + sample) * chunk + query, lanes)]
                        pixel = split.read(memory, address + offset)
                        total = [x + factor * y for x, y in zip(total, pixel, strict=True)]
                for channel, x in enumerate(total):
                    if group is groups[0]:
                        output[pl.ds(channel * chunk + query, lanes)] = x
                    else:
                        plsc.addupdate(output.at[pl.ds(channel * chunk + query, lanes)], x)

    output = split.run(step, (base, share), split.words(value), channels, name="forward", interpret=interpret)
    output = output.reshape(split.batch, split.heads, split.slices, -1, channels, chunk)
    output = output.transpose(0, 3, 5, 1, 2, 4).reshape(split.batch, -1, split.heads, split.slices * channels)
    return output[:, : split.queries, :, : split.head_dim]


def gather_products(split, value, base, gradient, interpret):
    """The gradient of `share`: the pixels times the output's gradient, summed over channels."""
    lanes, chunk, rows = split.core.num_lanes, split.chunk, 4 * len(split.widths)

    def step(memory, base, gradient, output):
        for group in split.groups(16 // split.planes):

            @plsc.parallel_loop(0, chunk, lanes)
            def _(query, group=group):
                factors = [gradient[pl.ds(channel * chunk + query, lanes)] for channel in range(split.channels)]
                for sample, width in group:
                    address = base[pl.ds(sample * chunk + query, lanes)]
                    for corner, offset in enumerate((0, 1, width, width + 1)):
                        pixel = split.read(memory, address + offset)
                        products = [x * y for x, y in zip(factors, pixel, strict=True)]
                        total = functools.reduce(jnp.add, products)
                        output[pl.ds((corner * len(split.widths) + sample) * chunk + query, lanes)] = total

    inputs = base, split.sliced(gradient)
    output = split.run(step, inputs, split.words(value), rows, name="backward_weights", interpret=interpret)
    columns = math.gcd(rows * chunk, 128)  # as the array, which is large, lies in memory
    output = output.reshape(split.batch, split.heads, split.slices, -1, columns)
    output = functools.reduce(jnp.add, [output[:, :, i] for i in range(split.slices)])
    return output.reshape(split.batch, split.heads, -1, rows, chunk)


def scatter(split, base, share, gradient, interpret):
    """The gradient of `value`: float32 `[b, s, h, d]`."""
    lanes, chunk, channels = split.core.num_lanes, split.chunk, split.channels
    points = lanes // 4  # in a vector, by four corners
    turns = max(points, channels)  # both are powers of two
    padding = -len(split.widths) % points
    widths = (*split.widths, *[0] * padding)

    def step(memory, base, share, gradient):
        lane = jax.lax.iota(jnp.int32, lanes)
        point, below, right = lane >> 2, (lane >> 1) & 1, lane & 1
        row = (lane & 3) * len(widths) + point
        channel = [(point + turn) & (turns - 1) for turn in range(turns)]
        served = [x < channels for x in channel]  # with more points than channels, some wait
        channel = [jnp.minimum(x, channels - 1) for x in channel]
        corner = []
        for first in range(0, len(widths), points):
            width = jnp.full(lanes, widths[first], jnp.int32)
            for i in range(1, points):
                width = jnp.where(point == i, widths[first + i], width)
            corner.append(below * width + right)

        @plsc.parallel_loop(0, chunk)
        def _(query):
            factors = [plsc.load_gather(gradient, [x * chunk + query]) for x in channel]
            for i, offset in enumerate(corner):
                address = plsc.load_gather(base, [(i * points + point) * chunk + query]) + offset
                weight = plsc.load_gather(share, [query * (4 * len(widths)) + row + i * points])
                # In a map one pixel wide, the right and the lower one have one address; one of them is outside.
                inside = weight != 0
                for x, now, factor in zip(channel, served, factors, strict=True):
                    mask = inside & now if channels < points else inside
                    plsc.addupdate_scatter(memory, [address + x * split.plane], weight * factor, mask=mask)

    base = jnp.pad(base, [*[(0, 0)] * 3, (0, padding), (0, 0)])
    if padding:
        share = share.reshape(*share.shape[:3], 4, len(split.widths), chunk)
        share = jnp.pad(share, [*[(0, 0)] * 4, (0, padding), (0, 0)]).reshape(*share.shape[:3], -1, chunk)
    share = jnp.swapaxes(share, -1, -2)
    inputs = base, share, split.sliced(gradient)
    output = split.run(step, inputs, None, 0, name="backward_values", interpret=interpret)
    output = output.reshape(split.batch, split.heads, split.slices, split.parts, channels, split.plane).sum(3)
    output = output.reshape(split.batch, split.heads, -1, split.plane)[:, :, : split.head_dim]
    return output[..., split.front : split.front + split.tokens].transpose(0, 3, 1, 2)


@dataclasses.dataclass(frozen=True)
class Split:
    """How the work is cut up: a task is a slice of the channels of one head of one image, and a part of the queries."""

    core: Any  # SparseCoreInfo
    spatial_shapes: tuple[tuple[int, int], ...]
    batch: int
    heads: int
    head_dim: int
    points: int
    queries: int
    packed: bool  # two channels to a word
    planes: int = 1  # planes of words in a subcore's memory
    chunk: int = 1  # queries that a subcore reads at a time
    chunks: int = 1  # of a task
    parts: int = 1  # tasks that share the queries

    @classmethod
    def of(cls, core, spatial_shapes, value, locations) -> "Split":
        """As many planes as a subcore's memory holds, then chunks as long, then the parts that are done first."""
        batch, _, heads, head_dim = value.shape
        queries, points = locations.shape[1], locations.shape[4]
        packed = value.dtype == jnp.bfloat16
        split = cls(core, spatial_shapes, batch, heads, head_dim, points, queries, packed)
        for planes, chunk in itertools.product(PLANES, CHUNKS):
            split = dataclasses.replace(split, planes=planes, chunk=chunk)
            oversized = planes >= 2 * -(-head_dim // (1 + packed)) or chunk >= 2 * max(queries, CHUNKS[-1])
            if split.bytes <= core.vmem_capacity_bytes and not oversized:
                break
        else:
            raise ValueError(
                f"implementation='sparsecore' keeps the {split.tokens} tokens of spatial_shapes {spatial_shapes} in a "
                f"subcore's memory: {split.bytes} bytes, of {core.vmem_capacity_bytes}; use another implementation"
            )
        chunks = -(-queries // chunk)
        parts = min(range(1, min(chunks, split.workers) + 1), key=lambda parts: split.time(chunks, parts))
        return dataclasses.replace(split, chunks=-(-chunks // parts), parts=parts)

    def exact(self) -> "Split":
        """The same chunks, for planes in float32."""
        split, chunks = dataclasses.replace(self, packed=False), self.parts * self.chunks
        divisors = [parts for parts in range(1, chunks + 1) if chunks % parts == 0]
        parts = min(divisors, key=lambda parts: split.time(chunks, parts))
        return dataclasses.replace(split, chunks=chunks // parts, parts=parts)

    def time(self, chunks: int, parts: int) -> int:
        """In chunks; loading the planes takes about as long as one."""
        rounds = -(-self.batch * self.heads * self.slices * parts // self.workers)
        return rounds * (-(-chunks // parts) + 1)

    @property
    def workers(self) -> int:
        """Vector subcores."""
        return self.core.num_cores * self.core.num_subcores

    @property
    def tokens(self) -> int:
        return sum(height * width for height, width in self.spatial_shapes)

    @property
    def front(self) -> int:
        """Words before the first token, and after the last one, for addresses of pixels outside a level."""
        return max(width for _, width in self.spatial_shapes) + 1

    @property
    def plane(self) -> int:
        """Words of a plane; those of 128 words are aligned for every copy."""
        return -(-(self.tokens + 2 * self.front) // 128) * 128

    @property
    def channels(self) -> int:
        """Channels of a slice."""
        return self.planes * (2 if self.packed else 1)

    @property
    def slices(self) -> int:
        """Slices of a head's channels."""
        return -(-self.head_dim // self.channels)

    @property
    def widths(self) -> tuple[int, ...]:
        """The width of the level of each point of a query."""
        return tuple(width for _, width in self.spatial_shapes for _ in range(self.points))

    def groups(self, size: int) -> list[list[tuple[int, int]]]:
        """The points (index, width of its level) by the loops that go over them: in one loop over all of them the
        compiler runs out of registers, and starting many takes time."""
        points = list(enumerate(self.widths))
        return [points[i : i + size] for i in range(0, len(points), size)]

    @property
    def bytes(self) -> int:
        """Memory of a subcore: its planes and, twice, to copy while it computes, what it reads and writes per chunk."""
        samples = -(-len(self.widths) // 4) * 4
        return 4 * (self.planes * self.plane + 2 * self.chunk * (5 * samples + self.channels)) + RESERVED_BYTES

    def words(self, value: jax.Array) -> jax.Array:
        """`[b, s, h, d]` -> `[b * h * slices, planes * plane]`, float32 or two bfloat16 in an int32."""
        back = self.plane - self.front - self.tokens
        channels = (0, self.slices * self.channels - self.head_dim)
        value = jnp.pad(value.transpose(0, 2, 3, 1), ((0, 0), (0, 0), channels, (self.front, back)))
        if self.packed:
            bits = jax.lax.bitcast_convert_type(value, jnp.uint16).astype(jnp.uint32)
            value = jax.lax.bitcast_convert_type(bits[:, :, ::2] | bits[:, :, 1::2] << 16, jnp.int32)
        return value.reshape(-1, self.planes * self.plane)

    def read(self, memory, address: jax.Array) -> list[jax.Array]:
        """In a kernel: each channel's values at a vector of addresses, in float32."""
        planes = [memory.at[pl.ds(i * self.plane, self.plane)] for i in range(self.planes)]
        words = [plsc.load_gather(plane, [address]) for plane in planes]
        if not self.packed:
            return words
        halves = [half for word in words for half in (word << 16, word & np.int32(-(1 << 16)))]
        return [jax.lax.bitcast_convert_type(half, jnp.float32) for half in halves]

    def chunked(self, x: jax.Array) -> jax.Array:
        """`[b, q, h, ...]` -> `[b, h, parts * chunks, rows, chunk]`, queries that are zero added at the end."""
        chunks = self.parts * self.chunks
        x = x.reshape(self.batch, self.queries, self.heads, -1)
        x = jnp.pad(x, [(0, 0), (0, chunks * self.chunk - self.queries), (0, 0), (0, 0)])
        return x.reshape(self.batch, chunks, self.chunk, self.heads, -1).transpose(0, 3, 1, 4, 2)

    def sliced(self, gradient: jax.Array) -> jax.Array:
        """`[b, q, h, d]` -> `[b, h, slices, parts * chunks, channels, chunk]`."""
        channels = self.slices * self.channels
        gradient = self.chunked(jnp.pad(gradient, [*[(0, 0)] * 3, (0, channels - self.head_dim)]))
        gradient = gradient.reshape(*gradient.shape[:3], self.slices, self.channels, self.chunk)
        return jnp.moveaxis(gradient, 3, 2)

    def run(self, step: Callable, inputs, words, out_rows: int, *, name: str, interpret: bool) -> jax.Array:
        """Runs `step(memory, *input chunks, output chunk)` for every chunk of every task.

        Args:
            step: fills the output chunk; or, where `words` is None, adds to the memory, float32 `[planes * plane]`.
            inputs: `[b, h, (slices,) parts * chunks, rows, columns]`, the last two being a chunk.
            words: what the memory holds, `[b * h * slices, planes * plane]`.
            out_rows: words of the output for each query.
            name: of the kernel.
            interpret: see `ms_deform_attn_sparsecore`.

        Returns:
            Float32, flat: `[b, h, slices, parts * chunks, out_rows, chunk]`; where `words` is None, the memory of
            every task, `[b, h, slices, parts, planes * plane]`.
        """
        core, size = self.core, self.planes * self.plane
        slices = self.batch * self.heads * self.slices
        tasks = slices * self.parts
        adds = words is None
        operands = inputs if adds else [words, *inputs]

        def kernel(*refs):
            *arrays, output, memory = refs
            worker = jax.lax.axis_index("subcore") * core.num_cores + jax.lax.axis_index("core")

            def planes(array, index):
                return array.at[pl.ds(pl.multiple_of(index * size, 128), size)]

            @pl.loop(worker, tasks, step=self.workers)
            def _(task):
                channels, part = task // self.parts, task % self.parts

                def chunks(shape):
                    """The task's chunks in a flat array of `[b, h, (slices,) parts * chunks, rows, columns]`."""
                    table = channels // (slices // math.prod(shape[:-3]))
                    first = (table * self.parts + part) * self.chunks
                    return pl.BlockSpec((math.prod(shape[-2:]),), lambda i: (first + i,))

                if adds:

                    @plsc.parallel_loop(0, size, core.num_lanes, unroll=8)
                    def _(i):
                        memory[pl.ds(i, core.num_lanes)] = jnp.zeros(core.num_lanes, jnp.float32)
                else:
                    pltpu.sync_copy(planes(arrays[0], channels), memory)
                stream = pltpu.emit_pipeline(
                    functools.partial(step, memory),
                    grid=(self.chunks,),
                    in_specs=[chunks(x.shape) for x in inputs],
                    out_specs=[] if adds else [chunks((slices, tasks, out_rows, self.chunk))],
                )
                if adds:
                    stream(*arrays)
                    pltpu.sync_copy(memory, planes(output, task))
                else:
                    stream(*arrays[1:], output)

        out_size = tasks * (size if adds else self.chunks * self.chunk * out_rows)
        call: Callable = pl.kernel(
            kernel,
            out_type=jax.ShapeDtypeStruct((out_size,), jnp.float32),
            mesh=subcore_mesh(core),
            scratch_types=[pltpu.VMEM((size,), jnp.float32 if adds else words.dtype)],
            compiler_params=pltpu.CompilerParams(
                needs_layout_passes=False, use_tc_tiling_on_sc=False, disable_bounds_checks=True
            ),
            name=f"ms_deform_attn_{name}",
            interpret=interpret,
        )
        return call(*(x.reshape(-1) for x in operands))  # of one dimension, so that XLA need not change their layout
