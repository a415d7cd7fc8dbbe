"""The definition of deformable convolution: bilinear samples, gathered, and one matrix product."""

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.ms_deform_attn.reference import corners, sparse_matmul


def deform_conv_reference(
    x: jax.Array,
    offsets: jax.Array,
    modulation: jax.Array | None,
    kernel: jax.Array,
    *,
    stride: int,
    padding: int,
    dilation: int,
    groups: int,
    interpret: bool = False,
) -> jax.Array:
    """Shapes and semantics of `deform_conv`; `interpret` changes nothing."""
    b, height, width, c = x.shape
    _, h, w, offset_groups, taps, _ = offsets.shape
    pixel, share = corners(sampling_positions(offsets, stride, padding, dilation), np.array([width, height], np.int32))
    if modulation is not None:
        share *= modulation[..., None].astype(jnp.float32)
    image, group = jnp.arange(b)[:, None, None, None, None, None], jnp.arange(offset_groups)[:, None, None]
    row = (image * height * width + pixel) * offset_groups + group
    columns = sparse_matmul(x.reshape(-1, c // offset_groups), row.reshape(-1, 4), share.reshape(-1, 4))
    columns = columns.reshape(b, h, w, offset_groups, taps, -1).swapaxes(3, 4)
    # Channels are `groups` groups for the product, whatever groups share offsets.
    columns = columns.reshape(b, h, w, taps, groups, -1)
    kernel = kernel.reshape(taps, c // groups, groups, -1).astype(jnp.float32)
    output = jnp.einsum("bhwtgc,tcgo->bhwgo", columns, kernel, precision="highest")
    return output.reshape(b, h, w, -1).astype(x.dtype)


def sampling_positions(offsets: jax.Array, stride: int, padding: int, dilation: int) -> jax.Array:
    """Where each tap of a kernel samples: a convolution's grid plus the offsets.

    Args:
        offsets: `[b, h, w, g, k * k, 2]`, (x, y) in pixels.
        stride: of the convolution.
        padding: of the convolution, on each side.
        dilation: of the convolution.

    Returns:
        float32 like `offsets`, (column, row) in pixels of the input; 0 is the center of the first one.
    """
    _, h, w, _, taps, _ = offsets.shape
    return offsets.astype(jnp.float32) + jnp.asarray(grid(h, w, taps, stride, padding, dilation))[:, :, None]


def grid(h: int, w: int, taps: int, stride: int, padding: int, dilation: int) -> np.ndarray:
    """Where a plain convolution samples: float32 `[h, w, k * k, 2]`, (column, row) in pixels of the input."""
    size = round(taps**0.5)
    row, column, tap_row, tap_column = np.meshgrid(*map(np.arange, (h, w, size, size)), indexing="ij")
    position = np.stack([column * stride + tap_column * dilation, row * stride + tap_row * dilation], -1) - padding
    return position.reshape(h, w, taps, 2).astype(np.float32)
