"""Multi-scale deformable attention on a GPU: Pallas, lowered through Triton.

One program is a block of queries of one head of one image. Nothing here has been timed; the choices follow from how a
GPU fetches memory, and from what Triton and ptxas make of the kernels for compute capability 9.0:

- A sample is four rows of `d` consecutive channels. Neighboring threads fetch a row in 16-byte pieces and use it at
  once, forward and backward; no gathered row is ever written back to memory.
- Indices and shares are worked out once per point, on vectors of queries, and broadcast over the channels. A block has
  fewer queries than threads, so Triton keeps such a vector where its rows are: no shared memory, no barriers.
- Levels are unrolled, points are a loop. That leaves 64 registers per thread forward (40 in bfloat16), 80 backward, so
  that many warps hide each other's fetches; with points unrolled too there were 255, and the compiler took a minute.
- Query blocks are the innermost grid axis: what runs at one time reads mostly one head's maps, 3 MB of the 23 MB of
  800x1333 in float32, and queries that are neighbors read the same lines.
- Backward, the gradients of locations and weights come from four dot products per sample, reduced over channels in
  registers. The gradient of `value` is added atomically in float32, four channels at a time where the GPU can. Atomics
  order a program's warps by barriers: hence one warp per program. The order of the sums, and so their last bits, may
  change from run to run.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import jax.ref
from jax.experimental import pallas as pl

from pallas_kernels.derivatives import first_order

try:
    from jax.experimental.pallas import triton as plt
except ImportError:  # jax 0.12 calls it deprecated; later ones will not have it
    plt: Any = None

WARP_ELEMENTS = 256
"""Queries x padded channels of a warp."""
FORWARD_WARPS = 4
BACKWARD_WARPS = 1
SIGNS = ((-1, -1), (-1, 1), (1, -1), (1, 1))
"""Derivatives of a corner's shares with respect to y and x, in the order of `_corners`."""


def ms_deform_attn_gpu_triton(
    value: jax.Array,
    spatial_shapes: Sequence[tuple[int, int]],
    sampling_locations: jax.Array,
    attention_weights: jax.Array,
    *,
    interpret: bool = False,
) -> jax.Array:
    """Shapes, semantics and gradients of `ms_deform_attn_reference`.

    Args:
        value: `[b, s, h, d]`, float32 or bfloat16; any `d`, though threads idle unless it is a power of two.
        spatial_shapes: (height, width) of each of the `l` levels; static.
        sampling_locations: `[b, q, h, l, p, 2]`, (x, y) in 0-1.
        attention_weights: `[b, q, h, l, p]`.
        interpret: run in the Pallas interpreter: on any platform, slowly.

    Returns:
        `[b, q, h, d]` in `value`'s type, accumulated in float32.
    """
    return _attend(value, tuple(map(tuple, spatial_shapes)), sampling_locations, attention_weights, interpret)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 4))
def _attend(value, spatial_shapes, locations, weights, interpret):
    b, queries, h = locations.shape[:3]
    output = jax.ShapeDtypeStruct((b, queries, h, value.shape[3]), value.dtype)
    return _call(_forward_kernel, (value, locations, weights), output, FORWARD_WARPS, spatial_shapes, interpret)


def _forward(value, spatial_shapes, locations, weights, interpret):
    value, locations, weights = first_order("ms_deform_attn", (value, locations, weights))
    return _attend(value, spatial_shapes, locations, weights, interpret), (value, locations, weights)


def _backward(spatial_shapes, interpret, inputs, gradient):
    value, locations, weights, gradient = first_order("ms_deform_attn", (*inputs, gradient))
    zeros = jnp.zeros_like(value, jnp.float32)
    # In float32 before the kernel, so that rows are read in the layout in which they are added.
    inputs = value.astype(jnp.float32), locations, weights, gradient.astype(jnp.float32), zeros
    outputs = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (zeros, locations, weights)]
    options = {"input_output_aliases": {4: 0}}
    grad_value, *others = _call(_backward_kernel, inputs, outputs, BACKWARD_WARPS, spatial_shapes, interpret, **options)
    return grad_value.astype(value.dtype), *others


_attend.defvjp(_forward, _backward)


def _call(kernel, inputs, outputs, warps, spatial_shapes, interpret, **options):
    b, _, h, d = inputs[0].shape
    queries = inputs[1].shape[1]
    channels = max(pl.next_power_of_2(d), 16)  # Triton's arrays have powers of two for sizes
    block = min(max(warps * WARP_ELEMENTS // channels, 1), pl.next_power_of_2(queries))
    return pl.pallas_call(
        functools.partial(kernel, spatial_shapes=spatial_shapes, block=block, channels=channels, interpret=interpret),
        out_shape=outputs,
        grid=(pl.cdiv(queries, block), h, b),
        compiler_params=plt.CompilerParams(num_warps=warps, num_stages=1),
        interpret=interpret,
        **options,
    )(*inputs)


def _forward_kernel(value_ref, locations_ref, weights_ref, output_ref, *, spatial_shapes, block, channels, interpret):
    del interpret
    image, query, head, channel = _program(block, channels)
    live = query < output_ref.shape[1]

    def sample(level, point, output):
        place = image, query, head, level, point
        weight = _load(weights_ref.at[place], live)
        for token, inside, share_y, share_x in _corners(locations_ref, place, live, spatial_shapes):
            rows = _load(*_rows(value_ref, image, token, head, channel, inside))
            output += rows * (weight * share_y * share_x)[:, None]
        return output

    output = jnp.zeros((block, channels), jnp.float32)
    for level in range(len(spatial_shapes)):
        output = jax.lax.fori_loop(0, locations_ref.shape[4], functools.partial(sample, level), output)
    _store(*_rows(output_ref, image, query, head, channel, live), output)


def _backward_kernel(
    value_ref,
    locations_ref,
    weights_ref,
    gradient_ref,
    _,  # the zeros that grad_value_ref starts from
    grad_value_ref,
    grad_locations_ref,
    grad_weights_ref,
    *,
    spatial_shapes,
    block,
    channels,
    interpret,
):
    image, query, head, channel = _program(block, channels)
    live = query < gradient_ref.shape[1]
    gradient = _load(*_rows(gradient_ref, image, query, head, channel, live))

    def differentiate(level, point, _):
        place = image, query, head, level, point
        weight = _load(weights_ref.at[place], live)
        corners = _corners(locations_ref, place, live, spatial_shapes)
        grad_weight = grad_x = grad_y = jnp.zeros(block, jnp.float32)
        for (token, inside, share_y, share_x), (sign_y, sign_x) in zip(corners, SIGNS, strict=True):
            rows = _load(*_rows(value_ref, image, token, head, channel, inside))
            dot = jnp.sum(rows * gradient, axis=1)  # zero for pixels outside the map
            grad_weight += share_y * share_x * dot
            grad_x += sign_x * share_y * dot
            grad_y += sign_y * share_x * dot
            grad_rows = gradient * (weight * share_y * share_x)[:, None]
            _add(*_rows(grad_value_ref, image, token, head, channel, inside), grad_rows, interpret)
        height, width = spatial_shapes[level]
        _store(grad_weights_ref.at[place], live, grad_weight)
        _store(grad_locations_ref.at[*place, 0], live, grad_x * weight * width)
        _store(grad_locations_ref.at[*place, 1], live, grad_y * weight * height)

    for level in range(len(spatial_shapes)):
        jax.lax.fori_loop(0, locations_ref.shape[4], functools.partial(differentiate, level), None)


def _program(block, channels):
    """This program's image, queries `[block]`, head and channels `[channels]`."""
    query = pl.program_id(0) * block + jnp.arange(block, dtype=jnp.int32)
    return pl.program_id(2), query, pl.program_id(1), jnp.arange(channels, dtype=jnp.int32)


def _corners(locations_ref, place, live, spatial_shapes):
    """The four pixels around one point of each query: (token, inside, share in y, share in x), all `[block]`.

    The formulas are those of `reference.bilinear`, so that both take the same cell for a point on its border.
    """
    level = place[3]
    start = sum(height * width for height, width in spatial_shapes[:level])
    height, width = spatial_shapes[level]
    columns, lines = (
        _neighbors(_load(locations_ref.at[*place, axis], live), size) for axis, size in enumerate((width, height))
    )
    return [
        (start + row * width + column, live & inside_y & inside_x, share_y, share_x)
        for row, inside_y, share_y in lines
        for column, inside_x, share_x in columns
    ]


def _neighbors(location, size):
    """The two pixels beside each point on one axis: index, whether it is inside the map, and share."""
    position = location * size - 0.5
    low = jnp.floor(position)
    neighbors = []
    for pixel, share in ((low, low + 1 - position), (low + 1, position - low)):
        inside = (pixel >= 0) & (pixel < size)
        neighbors.append((jnp.where(inside, pixel, 0).astype(jnp.int32), inside, jnp.where(inside, share, 0)))
    return neighbors


def _rows(ref, image, row, head, channel, mask):
    """`[block, channels]` of a `[b, rows, h, d]` array, and which of it is there."""
    return ref.at[image, row[:, None], head, channel[None]], mask[:, None] & (channel < ref.shape[3])[None]


def _load(ref, mask):
    return plt.load(ref, mask=mask, other=0).astype(jnp.float32)


def _store(ref, mask, x):
    plt.store(ref, x.astype(ref.dtype), mask=mask)


def _add(ref, mask, x, interpret):
    """Adds atomically; `atomic_add` in the interpreter would keep one of several additions to the same place."""
    if interpret:
        jax.ref.addupdate(ref, ..., jnp.where(mask, x, 0))
    else:
        plt.atomic_add(ref, ..., x, mask=mask)
