"""The GPU kernel, interpreted, and the XLA path against the reference; that the kernel lowers for CUDA."""

import functools
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.ms_deform_attn.gpu import ms_deform_attn_gpu
from pallas_kernels.ms_deform_attn.reference import ms_deform_attn_reference
from pallas_kernels.ms_deform_attn.shapes import SHAPES
from pallas_kernels.ms_deform_attn.xla import ms_deform_attn_xla

LEVELS = ((4, 5), (1, 1))


@pytest.fixture(params=["gpu", "xla"])
def attend(request):
    return {"gpu": functools.partial(ms_deform_attn_gpu, interpret=True), "xla": ms_deform_attn_xla}[request.param]


def problem(b=2, q=35, h=2, d=32, p=2, spatial_shapes=LEVELS, seed=0):
    """Random inputs, many points outside. 35 queries are two blocks forward, nine backward, the last one in part."""
    rng = np.random.default_rng(seed)
    value = rng.standard_normal((b, sum(height * width for height, width in spatial_shapes), h, d), np.float32)
    locations = rng.uniform(-0.25, 1.25, (b, q, h, len(spatial_shapes), p, 2)).astype(np.float32)
    weights = rng.uniform(0, 1, locations.shape[:-1]).astype(np.float32)
    return value, locations, weights


def run(attend, value, spatial_shapes, locations, weights):
    """Output and the three gradients."""

    @jax.jit
    def run(value, locations, weights):
        output, vjp = jax.vjp(lambda *x: attend(x[0], spatial_shapes, *x[1:]), value, locations, weights)
        cotangent = jnp.cos(jnp.arange(output.size, dtype=jnp.float32)).reshape(output.shape)
        return output, *vjp(cotangent.astype(output.dtype))

    return run(jnp.asarray(value), jnp.asarray(locations), jnp.asarray(weights))


def assert_equal(attend, value, spatial_shapes, locations, weights):
    """Sums of the same products in another order: some float32 roundings of the largest."""
    got = run(attend, value, spatial_shapes, locations, weights)
    expected = run(ms_deform_attn_reference, value, spatial_shapes, locations, weights)
    for x, y in zip(got, expected, strict=True):
        assert x.dtype == y.dtype
        assert x.shape == y.shape
        np.testing.assert_allclose(x, y, rtol=0, atol=1e-6 * max(1.0, np.abs(y).max()))


@pytest.mark.parametrize("head_dim", [16, 24, 32, 128])
def test_head_dims(attend, head_dim):
    assert_equal(attend, *insert_shapes(problem(d=head_dim)))


def insert_shapes(inputs, spatial_shapes=LEVELS):
    value, *others = inputs
    return value, spatial_shapes, *others


@pytest.mark.parametrize(
    "size",
    [
        {"q": 1, "p": 1, "spatial_shapes": ((1, 1),)},
        {"b": 1, "q": 1, "h": 1, "d": 16},
        {"b": 1, "q": 9, "h": 3, "d": 16, "p": 3, "spatial_shapes": ((1, 9), (7, 1))},
    ],
    ids=["one pixel, one query", "one query", "thin maps"],
)
def test_sizes(attend, size):
    assert_equal(attend, *insert_shapes(problem(**size), size.get("spatial_shapes", LEVELS)))


def test_borders_and_pixel_centres(attend):
    """Every kink and border, at which forward and each gradient must take the reference's cell: right and below."""
    height, width = 4, 8  # (x + 0.5) / size and back is exact in float32
    columns, rows = (np.array([-1, -0.5, 0, 1, n - 1.5, n - 1, n - 0.5, n, n + 3]) for n in (width, height))
    points = np.array(
        [((x + 0.5) / width, (y + 0.5) / height) for y, x in itertools.product(rows, columns)], np.float32
    )
    value, _, weights = problem(b=1, q=len(points), h=1, d=16, p=1, spatial_shapes=((height, width),))
    locations = points.reshape(1, -1, 1, 1, 1, 2)
    assert_equal(attend, value, ((height, width),), locations, weights)

    def sample(x):
        location = jnp.stack([(x + 0.5) / width, 2.5 / height * jnp.ones(())]).reshape(1, 1, 1, 1, 1, 2)
        return attend(jnp.asarray(value), ((height, width),), location, jnp.ones((1, 1, 1, 1, 1)))[0, 0, 0, 0]

    # On the centre of pixel (row 2, column 3), the slope is that towards column 4.
    slope = value[0, 2 * width + 4, 0, 0] - value[0, 2 * width + 3, 0, 0]
    np.testing.assert_allclose(jax.jit(jax.grad(sample))(jnp.float32(3)), slope, rtol=1e-5)


def test_far_outside(attend):
    value, locations, weights = problem(b=1, q=4, h=1, d=16, p=1)
    locations[:, :, :, :, :, 0] = np.array([-1e9, 1e9, -7.0, 3e38])[:, None, None, None]
    got = run(attend, value, LEVELS, locations, weights)
    for x in got:
        np.testing.assert_array_equal(x, np.zeros_like(x))


def test_all_weight_on_one_point(attend):
    value, locations, weights = problem()
    weights[:] = 0
    weights[..., 0, 1] = 1
    locations[..., 0, 1, :] = (2.5 / 5, 1.5 / 4)  # the centre of pixel (row 1, column 2) of the first level
    token = 1 * 5 + 2
    output, grad_value, _, _ = run(attend, value, LEVELS, locations, weights)
    np.testing.assert_allclose(output, np.broadcast_to(value[:, None, token], output.shape), rtol=1e-6)
    # All queries add to one row.
    cotangent = np.cos(np.arange(output.size, dtype=np.float32)).reshape(output.shape)
    np.testing.assert_allclose(grad_value[:, token], cotangent.sum(1), rtol=0, atol=1e-5)
    np.testing.assert_allclose(np.delete(grad_value, token, axis=1), 0, rtol=0, atol=1e-5)


def test_bfloat16(attend):
    value, locations, weights = problem()
    value, weights = jnp.asarray(value, jnp.bfloat16), jnp.asarray(weights, jnp.bfloat16)
    got = run(attend, value, LEVELS, locations, weights)
    expected = run(ms_deform_attn_reference, value, LEVELS, locations, weights)
    for x, y in zip(got, expected, strict=True):
        assert x.dtype == y.dtype
        x, y = np.asarray(x, np.float32), np.asarray(y, np.float32)
        # Sums are in float32, in another order: before the last rounding they differ by roundings of float32, after it
        # by one of bfloat16 at most.
        np.testing.assert_allclose(x, y, rtol=2**-7, atol=1e-6 * np.abs(y).max())


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_lowers_for_cuda(name, dtype):
    """Forward and backward become Triton kernels at every named size, on a machine without a GPU."""
    shape = SHAPES[name]
    queries, levels = shape.queries or shape.tokens, (shape.heads, len(shape.spatial_shapes), shape.points)
    value = jax.ShapeDtypeStruct((shape.batch, shape.tokens, shape.heads, shape.head_dim), dtype)
    locations = jax.ShapeDtypeStruct((shape.batch, queries, *levels, 2), jnp.float32)
    weights = jax.ShapeDtypeStruct((shape.batch, queries, *levels), jnp.float32)

    @jax.jit
    def step(value, locations, weights):
        attend = functools.partial(ms_deform_attn_gpu, interpret=False)
        output, vjp = jax.vjp(lambda *x: attend(x[0], shape.spatial_shapes, *x[1:]), value, locations, weights)
        return output, *vjp(output)

    target = "__gpu$xla.gpu.triton"
    checks = [jax.export.DisabledSafetyCheck.custom_call(target)]
    module = jax.export.export(step, platforms=["cuda"], disabled_checks=checks)(
        value, locations, weights
    ).mlir_module()
    assert re.findall(r"custom_call @([\w$.]+)", module).count(target) == 2
    assert "_forward_kernel" in module
    assert "_backward_kernel" in module
