"""The public operation: argument checks, choice of implementation, sharding."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from pallas_kernels.ms_deform_attn.gpu import ms_deform_attn_gpu
from pallas_kernels.ms_deform_attn.order import block_order
from pallas_kernels.ms_deform_attn.reference import ms_deform_attn_reference
from pallas_kernels.ms_deform_attn.sparsecore import ms_deform_attn_sparsecore
from pallas_kernels.ms_deform_attn.tensorcore import ms_deform_attn_tensorcore
from pallas_kernels.ms_deform_attn.tensorcore_walk import too_large
from pallas_kernels.ms_deform_attn.xla import ms_deform_attn_xla

IMPLEMENTATIONS = {
    "reference": ms_deform_attn_reference,
    "xla": ms_deform_attn_xla,
    "tensorcore": ms_deform_attn_tensorcore,
    "sparsecore": ms_deform_attn_sparsecore,
    "gpu": ms_deform_attn_gpu,
}
"""Name -> `f(value, spatial_shapes, sampling_locations, attention_weights, *, interpret)`."""
XLA = ("reference", "xla")
"""Those of them that are plain JAX: any platform runs them, and XLA may partition them."""


def ms_deform_attn(
    value: ArrayLike,
    spatial_shapes: Sequence[tuple[int, int]],
    sampling_locations: ArrayLike,
    attention_weights: ArrayLike,
    *,
    implementation: str | None = None,
    in_blocks: bool = False,
    batch_axis: str = "data",
    head_axis: str = "heads",
    interpret: bool = False,
) -> jax.Array:
    """Weighted sum of bilinear samples at a few points of each level (Deformable DETR, equation 3).

    Differentiable in all three arrays. The gradient with respect to a location that lies exactly on a pixel centre,
    where there is a kink, is that of the cell on its right and below, in every implementation. Under a mesh
    (`jax.set_mesh`), the batch is split over the axis `batch_axis` and the heads over `head_axis`, where the mesh has
    them and they divide.

    Args:
        value: `[b, s, h, d]`, the levels' tokens one after another, each in row-major order; float32 or bfloat16.
        spatial_shapes: (height, width) of each of the `l` levels; static.
        sampling_locations: `[b, q, h, l, p, 2]`, (x, y), 0 and 1 being the outer edges of the map. Points outside are
            allowed: what lies outside counts as zero.
        attention_weights: `[b, q, h, l, p]`; the caller has normalised them.
        implementation: a key of `IMPLEMENTATIONS`, or `None` for the best on this platform (`best_implementation`).
        in_blocks: the tokens are in `block_order(spatial_shapes)` (and the queries, if there are as many of them):
            `value` is `[b, block_order(spatial_shapes).length, h, d]`. Saves `tensorcore` a permutation.
        batch_axis: mesh axis over which the batch is sharded.
        head_axis: mesh axis over which the heads are sharded.
        interpret: run a kernel of another platform here, slowly: for tests.

    Returns:
        `[b, q, h, d]` in `value`'s type, accumulated in float32.

    Raises:
        ValueError: shapes that do not fit together, an unknown implementation, or one that does not take these sizes.
    """
    spatial_shapes = tuple((int(height), int(width)) for height, width in spatial_shapes)
    value, sampling_locations, attention_weights = (
        jnp.asarray(x) for x in (value, sampling_locations, attention_weights)
    )
    _check(value, spatial_shapes, sampling_locations, attention_weights, in_blocks)
    name = implementation or best_implementation(spatial_shapes, attention_weights.shape[-1])
    if name not in IMPLEMENTATIONS:
        raise ValueError(f"implementation={name!r} is unknown: expected one of {sorted(IMPLEMENTATIONS)} or None")
    kernel = functools.partial(IMPLEMENTATIONS[name], interpret=interpret)
    if name == "tensorcore":
        kernel = functools.partial(kernel, in_blocks=in_blocks)
    elif in_blocks:
        kernel = functools.partial(_unblocked, kernel)

    def attend(value, sampling_locations, attention_weights):
        return kernel(value, spatial_shapes, sampling_locations, attention_weights)

    mesh = jax.sharding.get_abstract_mesh()
    axes = {axis: size for axis, size in mesh.shape.items() if axis not in mesh.manual_axes and size > 1}
    batch, heads = (
        axis if value.shape[i] % axes.get(axis, value.shape[i] + 1) == 0 else None
        for i, axis in ((0, batch_axis), (2, head_axis))
    )
    # Without shard_map, XLA gathers what the gathers read, and cannot partition a kernel at all.
    if batch or heads or (axes and name not in XLA):
        spec = jax.P(batch, None, heads)
        attend = jax.shard_map(attend, in_specs=spec, out_specs=spec, check_vma=False)
    return attend(value, sampling_locations, attention_weights)


def best_implementation(spatial_shapes: Sequence[tuple[int, int]], points: int) -> str:
    """The implementation that `None` stands for, on the platform that JAX computes on by default.

    On a TPU it is `tensorcore`, or `xla` where the maps are too large for that; elsewhere `reference`.
    """
    if jax.default_backend() != "tpu":
        return "reference"
    return "tensorcore" if too_large(block_order(spatial_shapes), points) is None else "xla"


def _unblocked(kernel, value, spatial_shapes, sampling_locations, attention_weights):
    """`kernel`, which takes row-major order, on arrays in block order."""
    order = block_order(spatial_shapes)
    if sampling_locations.shape[1] != order.length:
        return kernel(order.from_blocks(value), spatial_shapes, sampling_locations, attention_weights)
    inputs = [order.from_blocks(x) for x in (value, sampling_locations, attention_weights)]
    return order.to_blocks(kernel(inputs[0], spatial_shapes, *inputs[1:]))


def _check(value, spatial_shapes, sampling_locations, attention_weights, in_blocks):
    if value.ndim != 4 or value.dtype not in (jnp.float32, jnp.bfloat16):
        raise ValueError(f"value must be [b, s, h, d] in float32 or bfloat16, got {value.shape} in {value.dtype}")
    if sampling_locations.ndim != 6 or sampling_locations.shape[-1] != 2:
        raise ValueError(f"sampling_locations must be [b, q, h, l, p, 2], got {sampling_locations.shape}")
    if sampling_locations.shape[:-1] != attention_weights.shape:
        raise ValueError(
            "attention_weights must be [b, q, h, l, p] like sampling_locations: "
            f"expected {sampling_locations.shape[:-1]}, got {attention_weights.shape}"
        )
    b, s, h, _ = value.shape
    tokens = sum(height * width for height, width in spatial_shapes)
    if in_blocks:
        tokens = block_order(spatial_shapes).length
    if s != tokens:
        where = ", in block order," if in_blocks else ""
        raise ValueError(f"value has {s} tokens, but spatial_shapes {spatial_shapes}{where} make {tokens}")
    expected = (b, h, len(spatial_shapes))
    got = (sampling_locations.shape[0], *sampling_locations.shape[2:4])
    if got != expected:
        raise ValueError(
            f"sampling_locations must have (b, h, l) = {expected} like value and spatial_shapes, got {got}"
        )
