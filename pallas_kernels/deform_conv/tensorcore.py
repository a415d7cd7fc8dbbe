"""Deformable convolution on the TensorCore of a TPU, without a gather or a scatter.

Every tap of every output pixel is a query of multi-scale deformable attention with one level and one point, whose
weight is the modulation: its output is one bilinear sample. So the kernels are those of `ms_deform_attn`, forward and
backward, exact for any offset. A tile of 128 queries is one tap of 8 x 16 output pixels: these touch two units of the
input if the tap is the middle one and offsets are zero, up to six for a corner's, more as offsets spread. One matrix
product with the convolution's kernel follows, which is XLA's.
"""

import jax
import jax.numpy as jnp

from pallas_kernels.deform_conv.reference import grid
from pallas_kernels.ms_deform_attn.order import block_order
from pallas_kernels.ms_deform_attn.tensorcore import attend_tiles, drop_outside, too_large


def deform_conv_tensorcore(
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
    """Shapes and semantics of `deform_conv`; `interpret` runs it on the CPU, slowly.

    float32 values are multiplied in float32 (six bfloat16 passes); bfloat16 values in bfloat16, with bilinear weights
    and samples rounded to it, accumulated in float32.

    Raises:
        ValueError: maps of more than 8184 columns or 16368 rows.
    """
    b, height, width, c = x.shape
    _, h, w, offset_groups, taps, _ = offsets.shape
    order, output_order = block_order([(height, width)]), block_order([(h, w)])
    if reason := too_large(order, 1):
        raise ValueError(reason)
    d = c // offset_groups
    value = order.to_blocks(x.reshape(b, height * width, offset_groups, d))
    value = jnp.pad(value, ((0, 0), (0, 0), (0, 0), (0, -d % 16))).transpose(0, 2, 3, 1)

    samples = in_tiles(offsets, modulation, (height, width), stride=stride, padding=padding, dilation=dilation)
    columns = jnp.asarray(attend_tiles(value, *samples, order, interpret))  # [b, g * t, d, queries]
    columns = columns[:, :, :d].reshape(b, offset_groups, taps, d, -1).swapaxes(1, 2)
    columns = columns.reshape(b, taps, groups, c // groups, output_order.length)
    kernel = kernel.reshape(taps, c // groups, groups, -1).astype(x.dtype)
    precision = "highest" if x.dtype == jnp.float32 else None
    output = jnp.einsum("btgcq,tcgo->bqgo", columns, kernel, precision=precision, preferred_element_type=jnp.float32)
    output = output.astype(x.dtype).reshape(b, output_order.length, -1)
    return output_order.from_blocks(output).reshape(b, h, w, -1)


def in_tiles(
    offsets: jax.Array,
    modulation: jax.Array | None,
    size: tuple[int, int],
    *,
    stride: int,
    padding: int,
    dilation: int,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The kernels' view of the samples: columns, rows (in pixels) and weights, of whole tiles of output pixels.

    Args:
        offsets: `[b, h, w, g, t, 2]`.
        modulation: `[b, h, w, g, t]` or `None`.
        size: height and width of the input.
        stride: of the convolution.
        padding: of the convolution.
        dilation: of the convolution.

    Returns:
        float32 `[b, g * t, 1, n * 128]`, three times, as `drop_outside` leaves them.
    """
    b, h, w, _, taps, _ = offsets.shape
    order = block_order([(h, w)])

    def rows(z):
        return order.to_blocks(z.astype(jnp.float32).reshape(b, h * w, -1)).swapaxes(1, 2)[:, :, None]

    places = jnp.asarray(grid(h, w, taps, stride, padding, dilation))[:, :, None]
    column, row = (rows(offsets[..., axis].astype(jnp.float32) + places[..., axis]) for axis in range(2))
    weight = rows(jnp.ones(offsets.shape[:-1]) if modulation is None else modulation)
    return drop_outside(column, row, weight, order.is_token, size[1], size[0])
