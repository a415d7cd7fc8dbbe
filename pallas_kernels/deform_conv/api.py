"""The public operation: argument checks, choice of implementation, sharding."""

import functools

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from pallas_kernels.by_platform import expected_platform
from pallas_kernels.deform_conv.reference import deform_conv_reference
from pallas_kernels.deform_conv.tensorcore import deform_conv_tensorcore
from pallas_kernels.ms_deform_attn.order import block_order
from pallas_kernels.ms_deform_attn.tensorcore_walk import too_large
from pallas_kernels.over_mesh import Axes, over_mesh

IMPLEMENTATIONS = {"reference": deform_conv_reference, "tensorcore": deform_conv_tensorcore}
"""Name -> `f(x, offsets, modulation, kernel, *, stride, padding, dilation, groups, interpret)`."""


def deform_conv(
    x: ArrayLike,
    offsets: ArrayLike,
    modulation: ArrayLike | None,
    kernel: ArrayLike,
    *,
    stride: int = 1,
    padding: int = 0,
    dilation: int = 1,
    groups: int = 1,
    implementation: str | None = None,
    batch_axis: Axes = "data",
    interpret: bool = False,
) -> jax.Array:
    """Convolution whose taps sample where `offsets` say (Dai et al., 2017, equation 2; Zhu et al., 2019, equation 1).

        y(p) = sum_t kernel_t . m_t(p) . x(p + p_t + offset_t(p))

    with `p_t` the place of tap `t` in a plain convolution, `x` between pixels bilinear, and zero outside. It is
    differentiable in all four arrays. Where a sample lies exactly on a pixel's center there is a kink: the gradient of
    its offset is that of the cell on its right and below, as in torchvision. Under a mesh (`jax.set_mesh`), images are
    split over `batch_axis`, where the mesh has it; a batch that does not divide is filled up with zeros.

    There are two kinds of groups, each independent of the other. The `g` *offset groups* (`deform_groups` of
    mmdetection) are consecutive channels that share offsets, as many as `offsets` has. `groups` are those of an
    ordinary grouped convolution, as ResNeXt's: outputs of a group see its channels alone.

    Args:
        x: `[b, H, W, c]`, float32 or bfloat16.
        offsets: `[b, h, w, g, k * k, 2]`, (x, y) in pixels of `x`, taps row by row; `h` and `w` are the output's size.
            `offsets_from_channels` makes them of the channels that torchvision and mmdetection have.
        modulation: `[b, h, w, g, k * k]`, factors of the samples (version 2), or `None` for version 1.
        kernel: `[k, k, c / groups, c_out]`.
        stride: pixels between outputs.
        padding: zeros on each side.
        dilation: pixels between taps.
        groups: of the product; must divide `c` and `c_out`.
        implementation: a key of `IMPLEMENTATIONS`, or `None` for the best on this platform (`best_implementation`).
        batch_axis: mesh axes over which the batch is sharded, a name or several.
        interpret: run a kernel of another platform here, slowly: for tests.

    Returns:
        `[b, h, w, c_out]` in `x`'s type, accumulated in float32.

    Raises:
        ValueError: shapes that do not fit together, an unknown implementation, one that does not take these sizes, or a
            mesh with other axes under a kernel (`pallas_kernels.over_mesh`).
    """
    x, offsets, kernel = (jnp.asarray(z) for z in (x, offsets, kernel))
    modulation = None if modulation is None else jnp.asarray(modulation)
    _check(x, offsets, modulation, kernel, stride, padding, dilation, groups)
    name = implementation or best_implementation((x.shape[1], x.shape[2]))
    if name not in IMPLEMENTATIONS:
        raise ValueError(f"implementation={name!r} is unknown: expected one of {sorted(IMPLEMENTATIONS)} or None")
    b, h, w = offsets.shape[:3]
    if b * h * w * x.shape[1] * x.shape[2] == 0:
        return jnp.zeros((b, h, w, kernel.shape[-1]), x.dtype)
    convolve = functools.partial(
        IMPLEMENTATIONS[name],
        stride=stride,
        padding=padding,
        dilation=dilation,
        groups=groups,
        interpret=interpret,
    )
    arrays = (x, offsets) if modulation is None else (x, offsets, modulation)

    def of_images(*arrays: jax.Array) -> jax.Array:
        x, offsets, *modulation, kernel = arrays
        return convolve(x, offsets, modulation[0] if modulation else None, kernel)

    return over_mesh(
        of_images, *arrays, shared=[kernel], op="deform_conv", batch_axis=batch_axis, partitions=name == "reference"
    )


def offsets_from_channels(channels: jax.Array, offset_groups: int = 1) -> jax.Array:
    """Offsets as torchvision, mmdetection and the authors' code have them, as `deform_conv` takes them.

    Args:
        channels: `[b, h, w, g * k * k * 2]`: of each offset group and tap, row by row, y and then x.
        offset_groups: `g`.

    Returns:
        `[b, h, w, g, k * k, 2]`, (x, y).
    """
    return channels.reshape(*channels.shape[:3], offset_groups, -1, 2)[..., ::-1]


def best_implementation(size: tuple[int, int]) -> str:
    """The implementation that `None` stands for on the platform expected (that of the mesh, or JAX's default).

    On a TPU it is `tensorcore`, or `reference` where the map (height, width) is too large for that or empty; elsewhere
    `reference`.
    """
    if expected_platform() != "tpu":
        return "reference"
    return "tensorcore" if too_large(block_order([size]), 1) is None else "reference"


def _check(x, offsets, modulation, kernel, stride, padding, dilation, groups):
    if x.ndim != 4 or x.dtype not in (jnp.float32, jnp.bfloat16):
        raise ValueError(f"x must be [b, H, W, c] in float32 or bfloat16, got {x.shape} in {x.dtype}")
    if kernel.ndim != 4 or kernel.shape[0] != kernel.shape[1]:
        raise ValueError(f"kernel must be [k, k, c / groups, c_out], got {kernel.shape}")
    for name, value, least in (("stride", stride, 1), ("padding", padding, 0), ("dilation", dilation, 1)):
        if value < least:
            raise ValueError(f"{name}={value} must be at least {least}")
    b, height, width, c = x.shape
    size, _, inputs, outputs = kernel.shape
    if groups < 1 or inputs * groups != c or outputs % groups:
        raise ValueError(
            f"kernel {kernel.shape} does not fit x with {c} channels and groups={groups}: expected [k, k, c / groups, "
            "c_out], and groups must divide c and c_out"
        )
    reach = dilation * (size - 1) + 1
    h, w = (max(0, (n + 2 * padding - reach) // stride + 1) for n in (height, width))
    if offsets.ndim != 6 or (*offsets.shape[:3], *offsets.shape[4:]) != (b, h, w, size * size, 2):
        raise ValueError(
            f"offsets must be [b, h, w, g, k * k, 2] = [{b}, {h}, {w}, g, {size * size}, 2] for x {x.shape}, kernel "
            f"{kernel.shape}, stride={stride}, padding={padding} and dilation={dilation}, got {offsets.shape}"
        )
    if offsets.shape[3] < 1 or c % offsets.shape[3]:
        raise ValueError(f"offsets {offsets.shape} have {offsets.shape[3]} groups, which do not divide {c} channels")
    if modulation is not None and modulation.shape != offsets.shape[:-1]:
        raise ValueError(
            f"modulation must be [b, h, w, g, k * k] like offsets: expected {offsets.shape[:-1]}, got "
            f"{modulation.shape}"
        )
