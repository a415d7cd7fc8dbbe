"""What a post-norm transformer layer does with what its attention sampled, on the TensorCore of a TPU, as one kernel.

    a = s^T W0 + b0
    u = x + dropout(a)                 v = norm1(u)
    h = dropout(relu(v W1 + b1))       z = h W2 + b2
    w = v + dropout(z)                 y = norm2(w)

By XLA each line is a pass over the tokens in main memory, `h` with four times the channels. Here a tile of tokens goes
through all of them in vector memory. Backward, the tile is computed again from `x` and `s`, so that nothing else is
kept, and the gradients of the weights are added up over the tiles of an image, in float32.

What is dropped is a hash of the number's place in the batch (`pallas_kernels.dropout`), as it is elsewhere: the same
numbers on any number of devices.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.by_platform import tpu_generation, vmem_bytes
from pallas_kernels.derivatives import first_order
from pallas_kernels.dot import dot
from pallas_kernels.dropout import keep
from pallas_kernels.over_mesh import Axes, over_mesh

CHUNK = 256
"""Channels of `h` at a time: the vector unit works on one chunk while the matrix unit makes the next."""
ROWS = (384, 256, 128)
"""Tokens in a tile: the first of these whose tile fits into the vector memory."""
EPSILON = 1e-5
"""Of the norms."""


class Weights(NamedTuple):
    """Of the attention's output projection, the two norms and the two linear layers between them."""

    kernel0: jax.Array
    """`[a, c]`."""
    bias0: jax.Array
    """`[c]`."""
    scale1: jax.Array
    """`[c]`."""
    shift1: jax.Array
    """`[c]`."""
    kernel1: jax.Array
    """`[c, f]`."""
    bias1: jax.Array
    """`[f]`."""
    kernel2: jax.Array
    """`[f, c]`."""
    bias2: jax.Array
    """`[c]`."""
    scale2: jax.Array
    """`[c]`."""
    shift2: jax.Array
    """`[c]`."""


def feed_forward(
    x: jax.Array,
    sampled: jax.Array,
    weights: Weights,
    keys: jax.Array | None = None,
    *,
    rate: float = 0.0,
    batch_axis: Axes = "data",
    interpret: bool = False,
) -> jax.Array:
    """`norm2(v + dropout(linear2(dropout(relu(linear1(v))))))` with `v = norm1(x + dropout(linear0(sampled)))`.

    Differentiable once, in reverse, in `x`, `sampled` and the weights. float32 is multiplied in float32 (six bfloat16
    passes); bfloat16 in bfloat16, with sums, norms and all that lies between the products in float32. Under a mesh
    (`jax.set_mesh`), images are split over `batch_axis`.

    Args:
        x: `[b, s, c]`, float32 or bfloat16: the residual stream.
        sampled: `[b, a, s]`, tokens last: what the heads of the attention have sampled, before its output projection.
        weights: of float32; they are rounded to `x`'s type for the products.
        keys: uint32 `[3, 2]`, two words for each dropout, in the order of the equation above from the inside (that of
            `linear0`, of the ReLU, of `linear2`); `None`: nothing is dropped.
        rate: of all three, from 0 up to 1.
        batch_axis: mesh axis, or several, over which the batch is split.
        interpret: run on the CPU, slowly: for tests.

    Returns:
        `[b, s, c]` in `x`'s type.

    Raises:
        ValueError: shapes that do not fit together, a rate out of its range, or a mesh with other
            axes (`pallas_kernels.over_mesh`).
    """
    _check(x, sampled, weights, keys, rate)
    if 0 in x.shape:
        return jnp.zeros(x.shape, x.dtype)
    images = jnp.arange(x.shape[0], dtype=jnp.uint32)
    if keys is None:
        keys, rate = jnp.zeros((3, 2), jnp.uint32), 0.0

    def of_images(*arrays: jax.Array) -> jax.Array:
        x, sampled, images, keys, *of_layers = arrays
        return _block(x, sampled, images, keys, Weights(*of_layers), rate, interpret)

    shared = (keys, *weights)
    return over_mesh(
        of_images, x, sampled, images, shared=shared, op="feed_forward", batch_axis=batch_axis, partitions=False
    )


def is_faster(rate: float) -> bool:
    """Than XLA on the TPU compiled for, as far as it is known: not with dropout on v4, by the compilers' counts.

    The hash multiplies whole numbers, which takes Mosaic many instructions there.
    """
    return not rate or tpu_generation() != 4


def weight_shapes(a: int, c: int, f: int) -> tuple[tuple[int, ...], ...]:
    """Of `Weights`, with `a` sampled channels, `c` of the layer and `f` hidden ones."""
    return (a, c), (c,), (c,), (c,), (c, f), (f,), (f, c), (c,), (c,), (c,)


def _check(x, sampled, weights, keys, rate):
    if x.ndim != 3 or x.dtype not in (jnp.float32, jnp.bfloat16):
        raise ValueError(f"x must be [b, s, c] in float32 or bfloat16, got {x.shape} in {x.dtype}")
    b, s, c = x.shape
    if sampled.ndim != 3 or (sampled.shape[0], sampled.shape[2], sampled.dtype) != (b, s, x.dtype):
        raise ValueError(
            f"sampled must be [b, a, s] in the type of x: expected [{b}, a, {s}] in {x.dtype}, got {sampled.shape} in "
            f"{sampled.dtype}"
        )
    f = weights.kernel1.shape[-1]
    for name, shape in zip(Weights._fields, weight_shapes(sampled.shape[1], c, f), strict=True):
        if (got := getattr(weights, name).shape) != shape:
            raise ValueError(f"weights.{name} must be {shape} for x {x.shape} and {f} hidden channels, got {got}")
    if keys is not None and (keys.shape != (3, 2) or keys.dtype != jnp.uint32):
        raise ValueError(f"keys must be uint32 [3, 2], got {keys.dtype} {keys.shape}")
    if not 0 <= rate < 1:
        raise ValueError(f"rate={rate} must be at least 0 and less than 1")


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _block(x, sampled, images, keys, weights, rate, interpret):
    (y,) = _call(_forward_kernel, "forward", (x, sampled), images, keys, weights, rate, interpret)
    return y


def _forward(x, sampled, images, keys, weights, rate, interpret):
    x, sampled, weights = first_order("feed_forward", (x, sampled, weights))
    return _block(x, sampled, images, keys, weights, rate, interpret), (x, sampled, images, keys, weights)


def _backward(rate, interpret, residuals, gradient):
    x, sampled, images, keys, weights = residuals
    x, sampled, weights, gradient = first_order("feed_forward", (x, sampled, weights, gradient))
    arrays = x, sampled, gradient
    dx, dsampled, norms, *linear = _call(_backward_kernel, "backward", arrays, images, keys, weights, rate, interpret)
    scale1, shift1, scale2, shift2 = norms.sum(0)
    kernel0, bias0, kernel1, bias1, kernel2, bias2 = (z.sum(0) for z in linear)
    gradients = Weights(kernel0, bias0[0], scale1, shift1, kernel1, bias1[0], kernel2, bias2[0], scale2, shift2)
    gradients = jax.tree.map(lambda z, weight: z.astype(weight.dtype), gradients, weights)
    return dx, dsampled, None, None, gradients


_block.defvjp(_forward, _backward)


def _call(kernel, name: str, arrays, images, keys, weights: Weights, rate: float, interpret: bool):
    """Runs a kernel over (image, tile of tokens). The gradients of weights are outputs `[b, ...]`, of each image."""
    b, s, c = arrays[0].shape
    dtype, a = arrays[0].dtype, arrays[1].shape[1]
    rows = _tile_rows(a, c, weights.kernel1.shape[1], dtype.itemsize)
    norms = jnp.stack([weights.scale1, weights.shift1, weights.scale2, weights.shift2]).astype(jnp.float32)
    operands = [norms]
    for i in range(3):
        operands.append(getattr(weights, f"kernel{i}").astype(dtype))
        operands.append(getattr(weights, f"bias{i}")[None].astype(jnp.float32))
    tile = pl.BlockSpec((1, rows, c), lambda b, i, *_: (b, i, 0))
    sampled = pl.BlockSpec((1, a, rows), lambda b, i, *_: (b, 0, i))
    whole = [pl.BlockSpec(z.shape, lambda b, i, *_: (0, 0)) for z in operands]
    outputs, out_specs = [jax.ShapeDtypeStruct((b, s, c), dtype)], [tile]
    if name == "backward":
        outputs += [jax.ShapeDtypeStruct((b, a, s), dtype)]
        outputs += [jax.ShapeDtypeStruct((b, *z.shape), jnp.float32) for z in operands]
        out_specs += [sampled] + [pl.BlockSpec((1, *z.shape), lambda b, i, *_: (b, 0, 0)) for z in operands]
    return pl.pallas_call(
        functools.partial(kernel, tokens=s, rate=rate),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(b, pl.cdiv(s, rows)),
            in_specs=[tile, sampled, tile][: len(arrays)] + whole,
            out_specs=out_specs,
        ),
        out_shape=outputs,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=vmem_bytes()
        ),
        interpret=interpret,
        name=f"feed_forward_{name}",
    )(images, keys, *arrays, *operands)


def _tile_rows(a: int, c: int, f: int, itemsize: int) -> int:
    """How many tokens a tile has."""
    fixed = 2 * (a + 2 * f) * c * (itemsize + 4)  # the kernels and their gradients, each twice
    per_row = f * (itemsize + 8) + 40 * c + 12 * a  # about what the backward kernel keeps of a token
    return next((rows for rows in ROWS if fixed + rows * per_row <= 7 * vmem_bytes() // 8), ROWS[-1])


class _Tile(NamedTuple):
    """What the forward pass computes of a tile, in the names of the module's docstring."""

    sampled: jax.Array
    keep_a: jax.Array | None
    v_hat: jax.Array
    """`u`, normalized: before scale and shift."""
    v_factor: jax.Array
    """1 / its standard deviation, `[rows, 1]`."""
    v: jax.Array
    """In the products' type."""
    h: list[jax.Array]
    """In chunks of channels, in the products' type."""
    keep_z: jax.Array | None
    w_hat: jax.Array
    w_factor: jax.Array


def _compute(images, keys, x_ref, sampled_ref, *operands, tokens: int, rate: float):
    """A tile, as `_Tile`; tokens beyond the last are computed as zeros."""
    norms, kernel0, bias0, kernel1, bias1, kernel2, bias2 = operands
    rows, c = x_ref.shape[1:]
    f, dtype = kernel1.shape[1], x_ref.dtype
    first = pl.program_id(1) * rows
    token = images[pl.program_id(0)] * jnp.uint32(tokens) + first.astype(jnp.uint32)

    def kept(number: int, channels: int, begin: int, end: int) -> jax.Array | None:
        """The mask of dropout `number` in a slice of its channels; `None` without dropout."""
        if not rate:
            return None
        shape = (rows, end - begin)
        place = (token + lax.broadcasted_iota(jnp.uint32, shape, 0)) * jnp.uint32(channels)
        place += lax.broadcasted_iota(jnp.uint32, shape, 1) + jnp.uint32(begin)
        return keep(place, (keys[number, 0], keys[number, 1]), rate)

    x, sampled = _existing(x_ref, first, tokens, 0), _existing(sampled_ref, first, tokens, 1).astype(dtype)
    a, keep_a = dot(sampled, kernel0[...], (0, 0)) + bias0[...], kept(0, c, 0, c)
    v_hat, v_factor = _normalize(x + _dropped(a, keep_a, rate))
    v = v_hat * norms[0:1] + norms[1:2]
    z, h = bias2[...], []
    for begin in range(0, f, CHUNK):
        chunk = slice(begin, min(begin + CHUNK, f))
        part = jnp.maximum(dot(v.astype(dtype), kernel1[:, chunk]) + bias1[:, chunk], 0)
        h.append(_dropped(part, kept(1, f, chunk.start, chunk.stop), rate).astype(dtype))
        z = z + dot(h[-1], kernel2[chunk])
    keep_z = kept(2, c, 0, c)
    w_hat, w_factor = _normalize(v + _dropped(z, keep_z, rate))
    return _Tile(sampled, keep_a, v_hat, v_factor, v.astype(dtype), h, keep_z, w_hat, w_factor)


def _existing(ref, first: jax.Array, tokens: int, axis: int) -> jax.Array:
    """A tile with its tokens on an axis, in float32, zero beyond the last, where memory may hold anything."""
    x = ref[0].astype(jnp.float32)
    if tokens % x.shape[axis] == 0:
        return x
    return jnp.where(first + lax.broadcasted_iota(jnp.int32, x.shape, axis) < tokens, x, 0)


def _dropped(x: jax.Array, kept: jax.Array | None, rate: float) -> jax.Array:
    """Dropout, and its derivative."""
    return x if kept is None else jnp.where(kept, x * (1 / (1 - rate)), 0)


def _normalize(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(x - mean) / sqrt(variance + epsilon) of each row, and the factor."""
    x = x - x.mean(-1, keepdims=True)
    factor = lax.rsqrt((x * x).mean(-1, keepdims=True) + EPSILON)
    return x * factor, factor


def _normalize_backward(gradient: jax.Array, normalized: jax.Array, factor: jax.Array) -> jax.Array:
    """Of `_normalize`'s input, from that of its output."""
    mean = gradient.mean(-1, keepdims=True)
    return factor * (gradient - mean - normalized * (gradient * normalized).mean(-1, keepdims=True))


def _forward_kernel(images, keys, x_ref, sampled_ref, *refs, tokens: int, rate: float):
    *operands, y_ref = refs
    tile = _compute(images, keys, x_ref, sampled_ref, *operands, tokens=tokens, rate=rate)
    norms = operands[0]
    y_ref[0] = (tile.w_hat * norms[2:3] + norms[3:4]).astype(y_ref.dtype)


def _backward_kernel(images, keys, x_ref, sampled_ref, gradient_ref, *refs, tokens: int, rate: float):
    operands, (dx_ref, dsampled_ref, *grads) = refs[:7], refs[7:]
    norms, kernel0, _, kernel1, _, kernel2, _ = operands
    dnorms, dkernel0, dbias0, dkernel1, dbias1, dkernel2, dbias2 = grads
    tile = _compute(images, keys, x_ref, sampled_ref, *operands, tokens=tokens, rate=rate)

    @pl.when(pl.program_id(1) == 0)
    def _():
        for grad in grads:
            grad[...] = jnp.zeros(grad.shape, grad.dtype)

    def add(grad, rows: slice, value: jax.Array):
        """The sum over the tile's tokens to a row of gradients."""
        grad[0, rows] += value.sum(0, keepdims=True)

    dy = _existing(gradient_ref, pl.program_id(1) * x_ref.shape[1], tokens, 0)
    dw = _normalize_backward(dy * norms[2:3], tile.w_hat, tile.w_factor)
    dz = _dropped(dw, tile.keep_z, rate)
    dv, dz_low = dw, dz.astype(x_ref.dtype)
    for number, h in enumerate(tile.h):
        chunk = slice(number * CHUNK, number * CHUNK + h.shape[1])
        # 0 where the result is, after ReLU and dropout, as in `detr_jax.models.layers.relu`.
        dh = jnp.where(h != 0, dot(dz_low, kernel2[chunk], (1, 1)) * (1 / (1 - rate)), 0)
        dbias1[0, :, chunk] += dh.sum(0, keepdims=True)
        dh_low = dh.astype(x_ref.dtype)
        dkernel1[0, :, chunk] += dot(tile.v, dh_low, (0, 0))
        dkernel2[0, chunk] += dot(h, dz_low, (0, 0))
        dv = dv + dot(dh_low, kernel1[:, chunk], (1, 1))
    add(dnorms, slice(0, 1), dv * tile.v_hat)
    add(dnorms, slice(1, 2), dv)
    add(dnorms, slice(2, 3), dy * tile.w_hat)
    add(dnorms, slice(3, 4), dy)
    add(dbias2, slice(0, 1), dz)
    du = _normalize_backward(dv * norms[0:1], tile.v_hat, tile.v_factor)
    dx_ref[0] = du.astype(dx_ref.dtype)
    da = _dropped(du, tile.keep_a, rate)
    add(dbias0, slice(0, 1), da)
    da_low = da.astype(x_ref.dtype)
    dkernel0[0] += dot(tile.sampled, da_low)
    dsampled_ref[0] = dot(kernel0[...], da_low, (1, 1)).astype(dsampled_ref.dtype)
