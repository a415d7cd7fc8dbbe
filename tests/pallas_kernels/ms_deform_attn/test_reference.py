"""The reference, which is the definition, against a NumPy loop, finite differences and PyTorch's `grid_sample`."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.ms_deform_attn import ms_deform_attn, reference
from pallas_kernels.ms_deform_attn.shapes import SHAPES

LEVELS = ((3, 5), (2, 3), (1, 1))


def attend(value, spatial_shapes, locations, weights):
    """The reference."""
    return ms_deform_attn(value, spatial_shapes, locations, weights, implementation="reference")


def attend_loop(value, spatial_shapes, locations, weights):
    """The definition, one sample at a time, in float64."""
    b, _, h, d = value.shape
    output = np.zeros((b, locations.shape[1], h, d))
    starts = np.cumsum([0, *(height * width for height, width in spatial_shapes)])
    for i, q, j, level, p in np.ndindex(weights.shape):
        height, width = spatial_shapes[level]
        x = float(locations[i, q, j, level, p, 0]) * width - 0.5
        y = float(locations[i, q, j, level, p, 1]) * height - 0.5
        for column, row in itertools.product((math.floor(x), math.floor(x) + 1), (math.floor(y), math.floor(y) + 1)):
            if 0 <= column < width and 0 <= row < height:
                share = (1 - abs(x - column)) * (1 - abs(y - row))
                pixel = value[i, starts[level] + row * width + column, j].astype(np.float64)
                output[i, q, j] += weights[i, q, j, level, p] * share * pixel
    return output


def problem(b=2, q=3, h=2, d=3, p=2, spatial_shapes=LEVELS, seed=0):
    """Random inputs; a third of the points outside the map."""
    rng = np.random.default_rng(seed)
    value = rng.standard_normal((b, sum(height * width for height, width in spatial_shapes), h, d), np.float32)
    locations = rng.uniform(-0.25, 1.25, (b, q, h, len(spatial_shapes), p, 2)).astype(np.float32)
    weights = rng.uniform(0, 1, locations.shape[:-1]).astype(np.float32)
    return value, locations, weights


@pytest.mark.parametrize(
    "size",
    [
        {},
        {"q": 1, "spatial_shapes": ((1, 1),), "p": 1},
        {"b": 1, "q": 1, "h": 1, "d": 1},
        {"b": 3, "q": 7, "h": 3, "d": 5, "p": 3, "spatial_shapes": ((7, 4), (1, 9))},
    ],
    ids=["three levels", "one pixel, one query", "one of each", "odd sizes"],
)
def test_forward(size):
    value, locations, weights = problem(**size)
    shapes = size.get("spatial_shapes", LEVELS)
    output = attend(value, shapes, locations, weights)
    # Sums of some ten products of order 1, in float32.
    np.testing.assert_allclose(output, attend_loop(value, shapes, locations, weights), rtol=0, atol=5e-6)


def test_gradients():
    value, locations, weights = (x.astype(np.float64) for x in problem())
    cotangent = np.random.default_rng(1).standard_normal((2, 3, 2, 3))

    def expected(index, step=1e-5):
        """Central differences: exact but for rounding, the function being linear between pixel centres."""
        gradient = np.zeros_like((value, locations, weights)[index])
        for position in np.ndindex(gradient.shape):
            sums = []
            for sign in (1, -1):
                inputs = [value, locations, weights]
                inputs[index] = inputs[index].copy()
                inputs[index][position] += sign * step
                sums.append((attend_loop(inputs[0], LEVELS, inputs[1], inputs[2]) * cotangent).sum())
            gradient[position] = (sums[0] - sums[1]) / (2 * step)
        return gradient

    def loss(value, locations, weights):
        return (attend(value, LEVELS, locations, weights) * cotangent).sum()

    inputs = [jnp.asarray(x, jnp.float32) for x in (value, locations, weights)]
    for i, gradient in enumerate(jax.jit(jax.grad(loss, (0, 1, 2)))(*inputs)):
        np.testing.assert_allclose(gradient, expected(i), rtol=0, atol=2e-5)


def test_borders():
    """Exactly on and around the border of a 3-pixel row; the gradient at a pixel center is that of the right side."""
    positions = np.array([-1.0, -0.5, 0.0, 2.0, 2.5, 3.0, 1e6, -1e6, np.nan], np.float32)
    value = jnp.array([2.0, 3.0, 5.0]).reshape(1, 3, 1, 1)
    weights = jnp.ones((1, len(positions), 1, 1, 1))
    # (x + 0.5) / 3 * 3 - 0.5 is exact for these.
    locations = np.stack([(positions + 0.5) / 3, np.full_like(positions, 0.5)], -1).reshape(*weights.shape, 2)
    output, vjp = jax.vjp(lambda locations: attend(value, ((1, 3),), locations, weights), jnp.asarray(locations))
    (gradient,) = vjp(jnp.ones_like(output))

    def expected(x):
        return np.interp(x, [-1, 0, 1, 2, 3], [0, 2, 3, 5, 0], left=0, right=0)

    known = positions[:-1]
    np.testing.assert_allclose(output[0, :-1, 0, 0], expected(known), rtol=1e-6)
    right = (expected(known + 1e-3) - expected(known)) / 1e-3
    # The gradient is with respect to locations, whose unit is the map's width. The step of 1e-3 is exact to 1e-4.
    np.testing.assert_allclose(gradient[0, :-1, 0, 0, 0, 0], 3 * right, rtol=1e-4, atol=1e-4)
    assert output[0, -1, 0, 0] == 0  # a NaN lies nowhere


def test_bfloat16():
    value, locations, weights = problem()
    value = jnp.asarray(value, jnp.bfloat16)

    output, vjp = jax.vjp(lambda value: attend(value, LEVELS, locations, weights), value)
    (gradient,) = vjp(jnp.ones_like(output))
    assert output.dtype == gradient.dtype == jnp.bfloat16
    expected = attend_loop(np.asarray(value, np.float32), LEVELS, locations, weights)
    # Accumulated in float32: only the output is rounded, to 8 bits.
    np.testing.assert_allclose(np.asarray(output, np.float32), expected, rtol=2**-8, atol=1e-6)


def test_several_blocks_equal_one(monkeypatch):
    value, locations, weights = problem(q=11)

    def run(block_rows):
        monkeypatch.setattr(reference, "BLOCK_ROWS", {"default": block_rows})
        output, vjp = jax.vjp(lambda *inputs: attend(inputs[0], LEVELS, *inputs[1:]), value, locations, weights)
        return output, *vjp(jnp.cos(jnp.arange(output.size)).reshape(output.shape))

    for blocks, whole in zip(run(130), run(10**6), strict=True):  # 44 x 24 rows, in 8 uneven blocks
        np.testing.assert_allclose(blocks, whole, rtol=1e-5, atol=1e-6)


def test_memory_is_bounded():
    """Forward and backward of the encoder's largest published size, far below the 8 GB of all gathered rows."""
    shape = SHAPES["encoder_800x1333"]
    levels = (shape.heads, len(shape.spatial_shapes), shape.points)
    queries = shape.queries or shape.tokens
    value = jax.ShapeDtypeStruct((shape.batch, shape.tokens, shape.heads, shape.head_dim), jnp.float32)
    locations = jax.ShapeDtypeStruct((shape.batch, queries, *levels, 2), jnp.float32)
    weights = jax.ShapeDtypeStruct((shape.batch, queries, *levels), jnp.float32)

    def loss(value, locations, weights):
        return ms_deform_attn(value, shape.spatial_shapes, locations, weights).sum()

    memory = jax.jit(jax.grad(loss, (0, 1, 2))).lower(value, locations, weights).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 2**30


def test_exports_with_a_symbolic_batch():
    """One program for any number of images."""
    value, locations, weights = problem(b=3)
    (b,) = jax.export.symbolic_shape("b")
    shapes = [jax.ShapeDtypeStruct((b, *x.shape[1:]), x.dtype) for x in (value, locations, weights)]
    exported = jax.export.export(jax.jit(lambda v, x, w: ms_deform_attn(v, LEVELS, x, w)))(*shapes)
    for images in (1, 3):
        inputs = [x[:images] for x in (value, locations, weights)]
        np.testing.assert_allclose(exported.call(*inputs), attend(inputs[0], LEVELS, *inputs[1:]), rtol=1e-6, atol=1e-6)


def test_second_derivatives():
    """In reverse, of the reference: the gradient is linear in the weights, so its derivative is the pixels'."""
    value, locations, weights = problem(b=1, q=1, h=1, p=1, spatial_shapes=((3, 5),))

    def output(value, weights):
        return attend(value, ((3, 5),), locations, weights).sum()

    second = jax.grad(lambda w: jax.grad(output)(jnp.asarray(value), w).sum())(jnp.asarray(weights))
    expected = jax.grad(output, 1)(jnp.ones_like(value), jnp.asarray(weights))
    np.testing.assert_allclose(second, expected, rtol=1e-6)


@pytest.mark.parity
def test_agrees_with_grid_sample():
    """The official PyTorch formulation, forward and every gradient, on one encoder layer of a small image."""
    import torch

    spatial_shapes = ((15, 20), (8, 10), (4, 5), (2, 3))
    value, locations, weights = problem(q=400, h=8, d=32, p=4, spatial_shapes=spatial_shapes)
    tensors = [torch.from_numpy(x).requires_grad_() for x in (value, locations, weights)]
    b, q, h, _, p = weights.shape
    expected = torch.zeros(b, q, h, 32)
    start = 0
    for level, (height, width) in enumerate(spatial_shapes):
        maps = tensors[0][:, start : start + height * width].permute(0, 2, 3, 1).reshape(b * h, 32, height, width)
        grid = (2 * tensors[1][:, :, :, level] - 1).transpose(1, 2).reshape(b * h, q, p, 2)
        samples = torch.nn.functional.grid_sample(maps, grid, align_corners=False).reshape(b, h, 32, q, p)
        expected = expected + torch.einsum("bhdqp,bqhp->bqhd", samples, tensors[2][:, :, :, level])
        start += height * width
    cotangent = np.random.default_rng(1).standard_normal(expected.shape).astype(np.float32)
    expected.backward(torch.from_numpy(cotangent))

    output, vjp = jax.vjp(lambda *x: ms_deform_attn(x[0], spatial_shapes, *x[1:]), value, locations, weights)
    np.testing.assert_allclose(output, expected.detach().numpy(), rtol=0, atol=1e-5)
    for gradient, tensor in zip(vjp(jnp.asarray(cotangent)), tensors, strict=True):
        assert tensor.grad is not None
        scale = tensor.grad.abs().max().item()
        np.testing.assert_allclose(gradient, tensor.grad.numpy(), rtol=0, atol=1e-5 * scale)
