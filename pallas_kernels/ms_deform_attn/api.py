"""The public operation: argument checks, choice of implementation, sharding."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from pallas_kernels.ms_deform_attn.reference import ms_deform_attn_reference
from pallas_kernels.ms_deform_attn.sparsecore import ms_deform_attn_sparsecore

IMPLEMENTATIONS = {"reference": ms_deform_attn_reference, "sparsecore": ms_deform_attn_sparsecore}


def ms_deform_attn(
    value: ArrayLike,
    spatial_shapes: Sequence[tuple[int, int]],
    sampling_locations: ArrayLike,
    attention_weights: ArrayLike,
    *,
    implementation: str | None = None,
    batch_axis: str = "data",
) -> jax.Array:
    """Weighted sum of bilinear samples at a few points of each level (Deformable DETR, equation 3).

    Under a mesh (`jax.set_mesh`) that has the axis `batch_axis`, the batch is split over it.

    Args:
        value: `[b, s, h, d]`, the levels' tokens one after another, each in row-major order; float32 or bfloat16.
        spatial_shapes: (height, width) of each of the `l` levels; static.
        sampling_locations: `[b, q, h, l, p, 2]`, (x, y), 0 and 1 being the outer edges of the map. Points outside are
            allowed: what lies outside counts as zero.
        attention_weights: `[b, q, h, l, p]`; the caller has normalised them.
        implementation: a key of `IMPLEMENTATIONS`, or `None` for the best on this platform.
        batch_axis: mesh axis over which the batch is sharded.

    Returns:
        `[b, q, h, d]` in `value`'s type, accumulated in float32.

    Raises:
        ValueError: shapes that do not fit together, or an unknown implementation.
    """
    spatial_shapes = tuple((int(height), int(width)) for height, width in spatial_shapes)
    value, sampling_locations, attention_weights = (
        jnp.asarray(x) for x in (value, sampling_locations, attention_weights)
    )
    _check(value, spatial_shapes, sampling_locations, attention_weights)
    name = implementation or "reference"
    if name not in IMPLEMENTATIONS:
        raise ValueError(f"implementation={name!r} is unknown: expected one of {sorted(IMPLEMENTATIONS)} or None")
    kernel = IMPLEMENTATIONS[name]

    def attend(value, sampling_locations, attention_weights):
        return kernel(value, spatial_shapes, sampling_locations, attention_weights)

    mesh = jax.sharding.get_abstract_mesh()
    shards = mesh.shape.get(batch_axis, 1) if batch_axis not in mesh.manual_axes else 1
    if shards > 1 and value.shape[0] % shards == 0:
        attend = jax.shard_map(attend, in_specs=jax.P(batch_axis), out_specs=jax.P(batch_axis), check_vma=False)
    return attend(value, sampling_locations, attention_weights)


def _check(value, spatial_shapes, sampling_locations, attention_weights):
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
    if s != tokens:
        raise ValueError(f"value has {s} tokens, but spatial_shapes {spatial_shapes} make {tokens}")
    expected = (b, h, len(spatial_shapes))
    got = (sampling_locations.shape[0], *sampling_locations.shape[2:4])
    if got != expected:
        raise ValueError(
            f"sampling_locations must have (b, h, l) = {expected} like value and spatial_shapes, got {got}"
        )
