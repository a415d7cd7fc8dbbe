"""Multi-scale deformable attention on a GPU: Pallas, lowered through Mosaic GPU, where JAX has no Triton any more.

It has never run on a GPU, and was never timed: it is tested in Mosaic's interpreter and lowered for CUDA. The choices
follow from what Mosaic GPU can express. It reads rectangles at scalar indices: it has no gather, and no array of
indices.

- The table has a row for each *cell* between four pixels, its corners side by side, as in `xla.py`. So a sample is one
  rectangle, `[4, d]`, instead of four rows at four places. The table is four times as large as `value`; the bytes
  that samples read are the same. What lies outside of the map is zero in the table.
- XLA works out the cells and the shares of their corners, and differentiates them and the table. The kernels are what
  is left: a weighted sum of rows of the table, and backward a dot product per corner and a row to add.
- A program is one query of one head of one image. Each of its four warps has one corner, each lane a channel: a warp
  reads 128 bytes of float32 that lie side by side, and the corners are summed once, after all points. Rows go straight
  to registers: a copy to shared memory (TMA) costs an arrival of 128 threads at a barrier per row.
- Rows of `CHUNK` points are read before the first one is used. Programs are small, so that many are on a processor and
  hide each other's fetches. Queries are the innermost grid axis: what runs at one time reads mostly one head's maps.
- Backward, rows are added to the table's gradient atomically in float32. The order of the sums, and so their last bits,
  may change from run to run.
- No barriers around stores (`unsafe_no_auto_barriers`): no thread reads what the kernels write.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import jax.ref

from pallas_kernels.derivatives import first_order
from pallas_kernels.ms_deform_attn.xla import cells, corners

LANES = 32
CHUNK = 4


def mosaic() -> Any:
    """`jax.experimental.pallas.mosaic_gpu`, or `None` where it lacks what the kernels need (as before jax 0.12).

    Imported when it is needed: that takes half a second.
    """
    try:
        from jax.experimental.pallas import mosaic_gpu
    except ImportError:
        return None
    return mosaic_gpu if hasattr(mosaic_gpu, "store") and hasattr(mosaic_gpu, "atomic_add") else None


def ms_deform_attn_gpu_mosaic(
    value: jax.Array,
    spatial_shapes: Sequence[tuple[int, int]],
    sampling_locations: jax.Array,
    attention_weights: jax.Array,
    *,
    interpret: bool = False,
) -> jax.Array:
    """Shapes, semantics and gradients of `ms_deform_attn_reference`.

    Args:
        value: `[b, s, h, d]`, float32 or bfloat16; any `d`, though lanes idle unless it is a multiple of 32.
        spatial_shapes: (height, width) of each of the `l` levels; static.
        sampling_locations: `[b, q, h, l, p, 2]`, (x, y) in 0-1.
        attention_weights: `[b, q, h, l, p]`.
        interpret: run in the interpreter of Mosaic GPU: on any platform, slowly.

    Returns:
        `[b, q, h, d]` in `value`'s type, accumulated in float32.
    """
    b, s, h, d = value.shape
    queries = sampling_locations.shape[1]
    spatial_shapes = tuple((height, width) for height, width in spatial_shapes)
    index, share = corners(
        spatial_shapes, sampling_locations.astype(jnp.float32), attention_weights.astype(jnp.float32)
    )
    index = index.reshape(b * h, -1, queries).swapaxes(1, 2)
    share = jnp.moveaxis(share.reshape(b * h, -1, 4, queries), 3, 1)
    index += _cell_count(spatial_shapes) * jnp.arange(b * h, dtype=jnp.int32)[:, None, None]
    value = value.swapaxes(1, 2).reshape(b * h, s, d)
    output: jax.Array = _attend(spatial_shapes, value, index, share, interpret)
    return output.reshape(b, h, queries, d).swapaxes(1, 2)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 4))
def _attend(spatial_shapes, value, index, share, interpret):
    """`output[m, q] = sum over k and c of share[m, q, k, c] * table[index[m, q, k], c]`, for the `table` of `value`."""
    d = value.shape[2]
    table = _table(spatial_shapes, value)
    output = jax.ShapeDtypeStruct((*index.shape[:2], table.shape[2]), value.dtype)
    return _call(_forward_kernel, (index, share, table), output, interpret)[..., :d]


def _forward(spatial_shapes, value, index, share, interpret):
    inputs = first_order("ms_deform_attn", (value, index, share))
    return _attend(spatial_shapes, *inputs, interpret), inputs


def _backward(spatial_shapes, interpret, inputs, gradient):
    value, index, share, gradient = first_order("ms_deform_attn", (*inputs, gradient))
    # In float32 before the kernel, so that rows are read in the layout in which they are added.
    table, to_value = jax.vjp(functools.partial(_table, spatial_shapes), value.astype(jnp.float32))
    gradient = _fill_lanes(gradient.astype(jnp.float32))
    grad_table = jax.ref.new_ref(jnp.zeros_like(table))
    kernel = functools.partial(_backward_kernel, interpret=interpret)
    grad_share = _call(kernel, (index, share, table, gradient, grad_table), share, interpret)
    (grad_value,) = to_value(grad_table[...])
    return grad_value.astype(value.dtype), None, grad_share


_attend.defvjp(_forward, _backward)


def _table(spatial_shapes, value):
    """`[m, s, d]` -> `[m * cells, 4, d]`, `d` filled up with zeros."""
    value = _fill_lanes(value)
    return jax.vmap(functools.partial(cells, spatial_shapes))(value).reshape(-1, 4, value.shape[2])


def _cell_count(spatial_shapes):
    return sum((height + 1) * (width + 1) for height, width in spatial_shapes)


def _fill_lanes(x):
    return jnp.pad(x, ((0, 0), (0, 0), (0, -x.shape[2] % LANES)))


def _call(kernel, inputs, output, interpret):
    plgpu = mosaic()
    heads, queries = inputs[0].shape[:2]
    return plgpu.kernel(
        functools.partial(kernel, plgpu),
        out_type=jax.ShapeDtypeStruct(output.shape, output.dtype),
        grid=(heads, queries),
        grid_names=("head", "query"),
        kernel_name=(kernel.func if isinstance(kernel, functools.partial) else kernel).__name__,
        compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True),
        interpret=plgpu.InterpretGPUParams() if interpret else False,
    )(*inputs)


def _forward_kernel(plgpu, index_ref, share_ref, table_ref, output_ref):
    place = jax.lax.axis_index("head"), jax.lax.axis_index("query")
    layout = _layout(plgpu)

    def sample(rows, output):
        for _, _, row, share in rows:
            output += row * share
        return output

    output = plgpu.layout_cast(jnp.zeros(table_ref.shape[1:], jnp.float32), layout)
    output = _over_points(plgpu, sample, place, index_ref, share_ref, table_ref, output)
    plgpu.store(output_ref.at[place], jnp.sum(output, axis=0).astype(output_ref.dtype), optimized=False)


def _backward_kernel(
    plgpu, index_ref, share_ref, table_ref, gradient_ref, grad_table_ref, grad_share_ref, *, interpret
):
    place = jax.lax.axis_index("head"), jax.lax.axis_index("query")
    layout = _layout(plgpu)
    gradient = plgpu.load(gradient_ref.at[place], layout=layout.reduce(0), optimized=False)
    gradient = _broadcast(plgpu, gradient, 1, table_ref.shape[1:])

    def differentiate(rows, _):
        for point, cell, row, share in rows:
            dots = jnp.sum(row * gradient, axis=1)
            plgpu.store(grad_share_ref.at[*place, point], dots, optimized=False)
            if interpret:  # which has no atomic addition, and runs one program at a time
                grad_table_ref[cell] += share * gradient
            else:
                plgpu.atomic_add(grad_table_ref.at[cell], share * gradient, optimized=False)

    _over_points(plgpu, differentiate, place, index_ref, share_ref, table_ref, None)


def _over_points(plgpu, function, place, index_ref, share_ref, table_ref, carry):
    """A loop of `carry = function(rows, carry)`, `rows` being (point, cell, row, share) of each point of a chunk."""
    layout = _layout(plgpu)
    points = index_ref.shape[2]
    chunk = math.gcd(points, CHUNK)

    def step(i, carry):
        rows = []
        for point in (chunk * i + k for k in range(chunk)):
            cell = index_ref[*place, point]
            row = plgpu.load(table_ref.at[cell], layout=layout, optimized=False).astype(jnp.float32)
            share = plgpu.load(share_ref.at[*place, point], layout=layout.reduce(1), optimized=False)
            rows.append((point, cell, row, _broadcast(plgpu, share, 0, row.shape)))
        return function(rows, carry)

    return jax.lax.fori_loop(0, points // chunk, step, carry)


def _layout(plgpu):
    """Of `[4, d]`: warps have corners, lanes have channels."""
    tiling = plgpu.Tiling(((4, LANES), (1,)))
    return plgpu.Layout.TILED(tiling, warp_dims=(-3,), lane_dims=(-2,), vector_dim=-1)


def _broadcast(plgpu, x, axis, shape):
    """`x`, which has this axis only, as `[4, d]`."""
    return plgpu.layout_cast(jax.lax.broadcast_in_dim(x, shape, (axis,)), _layout(plgpu))
