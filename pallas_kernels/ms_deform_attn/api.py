"""The public operation: argument checks, choice of implementation, sharding."""

import dataclasses
import functools
import operator
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from pallas_kernels.by_platform import expected_platform, tpu_or_default
from pallas_kernels.derivatives import first_order
from pallas_kernels.ms_deform_attn.gpu import ms_deform_attn_gpu
from pallas_kernels.ms_deform_attn.order import block_order
from pallas_kernels.ms_deform_attn.reference import ms_deform_attn_reference
from pallas_kernels.ms_deform_attn.sparsecore import ms_deform_attn_sparsecore
from pallas_kernels.ms_deform_attn.tensorcore import ms_deform_attn_tensorcore
from pallas_kernels.ms_deform_attn.tensorcore_walk import too_large
from pallas_kernels.ms_deform_attn.xla import ms_deform_attn_xla
from pallas_kernels.over_mesh import Axes, over_mesh

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
    batch_axis: Axes = "data",
    head_axis: Axes = "heads",
    interpret: bool = False,
) -> jax.Array:
    """Multi-scale deformable attention: a weighted sum of bilinear samples at a few points of each level.

        output[b, q, h] = sum_l sum_p attention_weights[b, q, h, l, p] value_l[b, h](sampling_locations[b, q, h, l, p])

    This is equation 3 of Deformable DETR (Zhu et al., ICLR 2021, section 4.1) between its projections `W'_m`, which
    make `value`, and `W_m`, which follow; with one level it is equation 2. `value_l` is bilinear between pixel centers,
    which lie at half-integers, and zero outside of the map (`grid_sample` with `align_corners=False` and zeros).

    Differentiable once, in reverse, in all three arrays; `reference` has second derivatives too. The gradient with
    respect to a location that lies exactly on a pixel center, where there is a kink, is that of the cell on its right
    and below, in every implementation. A NaN or infinity in the locations or weights of a query stays in this query's
    output and in its own gradients.

    Under a mesh (`jax.set_mesh`), images are split over `batch_axis` and heads over `head_axis`, where the mesh has
    them; a batch that does not divide is filled up.

    Args:
        value: `[b, s, h, d]`, the levels' tokens one after another, each in row-major order; float32 or bfloat16.
        spatial_shapes: (height, width) of each of the `l` levels; static.
        sampling_locations: `[b, q, h, l, p, 2]`, (x, y), 0 and 1 being the outer edges of the map. Points outside are
            allowed: what lies outside counts as zero.
        attention_weights: `[b, q, h, l, p]`; the caller has normalized them.
        implementation: a key of `IMPLEMENTATIONS`, or `None` for the best on the platform that the program is lowered
            for: on a TPU `tensorcore`, or `xla` where the maps are too large for that; elsewhere `reference`.
        in_blocks: the tokens are in `block_order(spatial_shapes)` (and the queries, if there are as many of them):
            `value` is `[b, block_order(spatial_shapes).length, h, d]`. Saves `tensorcore` a permutation.
        batch_axis: mesh axis, or several, over which the batch is split.
        head_axis: mesh axis, or several, over which the heads are split.
        interpret: run a kernel of another platform here, slowly: for tests.

    Returns:
        `[b, q, h, d]` in `value`'s type, accumulated in float32.

    Raises:
        ValueError: shapes that do not fit together, an unknown implementation, one that does not support these sizes,
            or a mesh over which the work does not split.
    """
    shapes = _checked_shapes(spatial_shapes)
    arrays = [jnp.asarray(x) for x in (value, sampling_locations, attention_weights)]
    value, locations, weights = arrays
    _check(value, shapes, locations, weights, in_blocks)
    if implementation is not None and implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"implementation={implementation!r} is unknown: expected one of {sorted(IMPLEMENTATIONS)} or None"
        )
    if 0 in weights.shape[:3] or value.shape[3] == 0:
        return jnp.zeros((*weights.shape[:3], value.shape[3]), value.dtype)
    name = implementation or best_implementation(shapes, weights.shape[-1])
    call = _Call(name, shapes, in_blocks, interpret)
    if implementation is None and expected_platform() != "tpu":  # but it may be lowered for one
        on_tpu = dataclasses.replace(call, name=_best_on_tpu(shapes, weights.shape[-1]))
        call = functools.partial(_by_platform, on_tpu, call)
    return over_mesh(
        call,
        value,
        locations,
        weights,
        op="ms_deform_attn",
        batch_axis=batch_axis,
        head_axis=head_axis,
        head_dim=2,
        partitions=name in XLA,
    )


def best_implementation(spatial_shapes: Sequence[tuple[int, int]], points: int) -> str:
    """The implementation that `None` stands for on the platform expected (that of the mesh, or JAX's default).

    On a TPU it is `tensorcore`, or `xla` where the maps are too large for that; elsewhere `reference`.
    """
    return _best_on_tpu(spatial_shapes, points) if expected_platform() == "tpu" else "reference"


def _best_on_tpu(spatial_shapes, points) -> str:
    return "tensorcore" if too_large(block_order(spatial_shapes), points) is None else "xla"


@dataclasses.dataclass(frozen=True)
class _Call:
    """An implementation as a function of the three arrays; calls that do the same are equal."""

    name: str
    spatial_shapes: tuple[tuple[int, int], ...]
    in_blocks: bool
    interpret: bool

    def __call__(self, value, locations, weights) -> jax.Array:
        kernel = functools.partial(IMPLEMENTATIONS[self.name], interpret=self.interpret)
        if self.name == "tensorcore":
            kernel = functools.partial(kernel, in_blocks=self.in_blocks)
        elif self.in_blocks:
            kernel = functools.partial(_unblocked, kernel)
        return kernel(value, self.spatial_shapes, locations, weights)


@dataclasses.dataclass(frozen=True)
class _Gradients:
    """The gradients of a call, as a function of the three arrays and the gradient of its output."""

    call: _Call

    def __call__(self, value, locations, weights, gradient) -> tuple[jax.Array, ...]:
        return jax.vjp(self.call, value, locations, weights)[1](gradient)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _by_platform(tpu: _Call, default: _Call, value, locations, weights):
    return tpu_or_default(tpu, default, value, locations, weights)


_by_platform.defvjp(
    lambda tpu, default, *arrays: (tpu_or_default(tpu, default, *first_order("ms_deform_attn", arrays)), arrays),
    lambda tpu, default, arrays, gradient: tpu_or_default(
        _Gradients(tpu), _Gradients(default), *first_order("ms_deform_attn", (*arrays, gradient))
    ),
)


def _unblocked(kernel, value, spatial_shapes, sampling_locations, attention_weights):
    """`kernel`, which expects row-major order, on arrays in block order."""
    order = block_order(spatial_shapes)
    if sampling_locations.shape[1] != order.length:
        return kernel(order.from_blocks(value), spatial_shapes, sampling_locations, attention_weights)
    inputs = [order.from_blocks(x) for x in (value, sampling_locations, attention_weights)]
    return order.to_blocks(kernel(inputs[0], spatial_shapes, *inputs[1:]))


def _checked_shapes(spatial_shapes) -> tuple[tuple[int, int], ...]:
    """As tuples of ints."""
    try:
        shapes = tuple((operator.index(height), operator.index(width)) for height, width in spatial_shapes)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"spatial_shapes must be static (height, width) pairs of whole numbers, got {spatial_shapes}"
        ) from error
    if not shapes or min(min(shape) for shape in shapes) < 1:
        raise ValueError(f"spatial_shapes must have at least one level, each of at least 1 x 1, got {shapes}")
    return shapes


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
    if attention_weights.shape[-1] == 0:
        raise ValueError(f"attention_weights must have at least one point per level, got {attention_weights.shape}")
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
