"""`ms_deform_attn` against a plain NumPy loop: forward, gradients, edges, types, sharding; its errors."""

import functools
import itertools
import math
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sparsecore_interpreter import sparsecore_interpreter

from pallas_kernels.ms_deform_attn import IMPLEMENTATIONS, best_implementation, block_order, ms_deform_attn, tensorcore
from pallas_kernels.ms_deform_attn.shapes import SHAPES, SMALL

LEVELS = ((3, 5), (2, 3), (1, 1))


# The SparseCore's kernels need an interpreter of their own: `test_sparsecore.py`.
INTERPRETED = [name for name in IMPLEMENTATIONS if name != "sparsecore"]
KERNELS = [name for name in INTERPRETED if name != "reference"]


@pytest.fixture(params=INTERPRETED)
def implementation(request, monkeypatch) -> Iterator[str]:
    """Each implementation; what is made for another platform is interpreted."""
    if request.param != "sparsecore":
        yield request.param
        return
    monkeypatch.setitem(
        IMPLEMENTATIONS, request.param, functools.partial(IMPLEMENTATIONS[request.param], interpret=True)
    )
    with sparsecore_interpreter(hazard=True):
        yield request.param


def attend(value, spatial_shapes, locations, weights, implementation="reference", **options):
    """`ms_deform_attn`; kernels of other platforms are interpreted."""
    return ms_deform_attn(
        value, spatial_shapes, locations, weights, implementation=implementation, interpret=True, **options
    )


@functools.partial(jax.jit, static_argnums=(0, 1))
def attend_and_vjp(implementation, spatial_shapes, value, locations, weights, cotangent):
    """The output and the gradients with respect to value, locations and weights."""

    def run(*inputs):
        return attend(inputs[0], spatial_shapes, *inputs[1:], implementation=implementation)

    output, vjp = jax.vjp(run, value, locations, weights)
    return output, *vjp(cotangent.astype(output.dtype))


def assert_close(got, expected, tolerance):
    """Equal within a share of the largest number: outputs are sums, whose rounding errors go with their terms."""
    got, expected = np.asarray(got, np.float32), np.asarray(expected, np.float32)
    np.testing.assert_allclose(got, expected, rtol=0, atol=tolerance * max(np.abs(expected).max(), 1e-30))


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


def problem_of(shape, dtype=np.float32, seed=0):
    """Inputs of a named size, points spread about their query's place, some outside; weights sum to 1."""
    rng = np.random.default_rng(seed)
    queries = shape.queries or shape.tokens
    grid = (shape.batch, queries, shape.heads, len(shape.spatial_shapes), shape.points)
    value = rng.standard_normal((shape.batch, shape.tokens, shape.heads, shape.head_dim), np.float32)
    centres = rng.uniform(0, 1, (shape.batch, queries, 1, 1, 1, 2))
    locations = (centres + 0.2 * rng.standard_normal((*grid, 2))).astype(np.float32)
    weights = rng.uniform(0, 1, grid).astype(np.float32)
    weights /= weights.sum((3, 4), keepdims=True)
    cotangent = rng.standard_normal((shape.batch, queries, shape.heads, shape.head_dim), np.float32)
    return jnp.asarray(value, dtype), locations, weights, cotangent


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("implementation", KERNELS)
def test_equals_the_reference(implementation, name):
    """Forward and every gradient in float32: the same sums in another order."""
    shape = SMALL[name]
    inputs = problem_of(shape)
    expected = attend_and_vjp("reference", shape.spatial_shapes, *inputs)
    for got, z in zip(attend_and_vjp(implementation, shape.spatial_shapes, *inputs), expected, strict=True):
        assert_close(got, z, 1e-5)


@pytest.mark.parametrize("implementation", KERNELS)
def test_bfloat16_equals_the_reference(implementation):
    """Kernels may round the weights to bfloat16 too (2^-9 of each term), besides the results."""
    shape = SMALL["odd_encoder"]
    inputs = problem_of(shape, jnp.bfloat16)
    expected = attend_and_vjp("reference", shape.spatial_shapes, *inputs)
    for got, z in zip(attend_and_vjp(implementation, shape.spatial_shapes, *inputs), expected, strict=True):
        assert got.dtype == z.dtype
        assert_close(got, z, 1e-2)


@pytest.mark.parametrize("implementation", ["reference", "tensorcore"])
def test_block_order(implementation):
    """The same numbers with tokens (and queries, where they are the tokens) in block order; zero in the padding."""
    shape = SMALL["odd_encoder"]
    order = block_order(shape.spatial_shapes)
    value, locations, weights, _ = problem_of(shape)
    expected = attend(value, shape.spatial_shapes, locations, weights)
    inputs = [order.to_blocks(jnp.asarray(z)) for z in (value, locations, weights)]
    output = attend(inputs[0], shape.spatial_shapes, *inputs[1:], implementation, in_blocks=True)
    assert_close(order.from_blocks(output), expected, 1e-5)
    assert np.all(np.asarray(output)[:, ~order.is_token] == 0)
    few = (locations[:, :7], weights[:, :7])
    output = attend(inputs[0], shape.spatial_shapes, *few, implementation, in_blocks=True)
    assert_close(output, expected[:, :7], 1e-5)


def test_block_order_is_a_permutation():
    order = block_order([(11, 19), (1, 1)])
    x = jnp.arange(2 * 210 * 3).reshape(2, 210, 3)
    blocks = order.to_blocks(x)
    assert blocks.shape == (2, order.length, 3)
    np.testing.assert_array_equal(order.from_blocks(blocks), x)
    np.testing.assert_array_equal(blocks[:, order.is_token].sort(1), x)
    # A unit is a square of the map: its first row is eight tokens of the first row, its second those below.
    np.testing.assert_array_equal(blocks[0, :16, 0], 3 * np.r_[0:8, 19:27])


def test_what_none_stands_for(monkeypatch):
    """On a TPU the kernel, or the XLA path where maps are too large for it; a name that does not take them raises."""
    huge = ((1, 9000), (1, 1))
    assert best_implementation(LEVELS, points=4) == "reference"
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    assert best_implementation(LEVELS, points=4) == "tensorcore"
    assert best_implementation(huge, points=4) == "xla"
    assert best_implementation(LEVELS, points=1000) == "xla"
    arrays = problem(spatial_shapes=huge)
    expected = ms_deform_attn(arrays[0], huge, *arrays[1:], implementation="xla")
    assert_close(ms_deform_attn(arrays[0], huge, *arrays[1:]), expected, 0)
    with pytest.raises(ValueError, match=r"too large .* 1126 columns of 8 pixels \(at most 1023\).*'xla'"):
        ms_deform_attn(arrays[0], huge, *arrays[1:], implementation="tensorcore")


def test_maps_larger_than_the_memory(monkeypatch):
    """A map whose values do not fit is worked off in parts."""
    shape = SMALL["odd_encoder"]
    inputs = problem_of(shape)
    expected = attend_and_vjp("reference", shape.spatial_shapes, *inputs)
    monkeypatch.setattr(tensorcore, "_vmem", lambda: 3 * 2**16)
    parts = tensorcore.parts(block_order(shape.spatial_shapes), 9)  # less than the forward takes for a unit
    assert len(parts) > 1
    assert sum(part.units for part in parts) == block_order(shape.spatial_shapes).units
    got = attend_and_vjp.__wrapped__("tensorcore", shape.spatial_shapes, *inputs)
    for z, other in zip(got, expected, strict=True):
        assert_close(z, other, 1e-5)


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_tensorcore_lowers_for_tpus(name, dtype):
    """Mosaic takes the kernels at the real sizes; whether the compiler can fit them into a chip, it does not say."""
    shape = SHAPES[name]
    queries = shape.queries or shape.tokens
    grid = (shape.batch, queries, shape.heads, len(shape.spatial_shapes), shape.points)
    inputs = (
        jax.ShapeDtypeStruct((shape.batch, shape.tokens, shape.heads, shape.head_dim), dtype),
        jax.ShapeDtypeStruct((*grid, 2), jnp.float32),
        jax.ShapeDtypeStruct(grid, jnp.float32),
    )

    def loss(value, locations, weights):
        output = ms_deform_attn(value, shape.spatial_shapes, locations, weights, implementation="tensorcore")
        return output.astype(jnp.float32).sum()

    lowered = jax.jit(jax.grad(loss, (0, 1, 2))).trace(*inputs).lower(lowering_platforms=("tpu",)).as_text()
    for kernel in ("touched", "forward", "backward"):
        assert f"ms_deform_attn_{kernel}" in lowered


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
def test_reference_forward(size):
    value, locations, weights = problem(**size)
    shapes = size.get("spatial_shapes", LEVELS)
    output = attend(value, shapes, locations, weights)
    # Sums of some ten products of order 1, in float32.
    np.testing.assert_allclose(output, attend_loop(value, shapes, locations, weights), rtol=0, atol=5e-6)


def test_reference_gradients():
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


def test_borders(implementation):
    """Exactly on and around the border of a 3-pixel row; the gradient at a pixel centre is that of the right side."""
    positions = np.array([-1.0, -0.5, 0.0, 2.0, 2.5, 3.0, 1e6, -1e6, np.nan], np.float32)
    value = np.zeros((1, 3, 1, 16), np.float32)
    value[0, :, 0, 0] = 2, 3, 5
    weights = np.ones((1, len(positions), 1, 1, 1), np.float32)
    # (x + 0.5) / 3 * 3 - 0.5 is exact for these.
    locations = np.stack([(positions + 0.5) / 3, np.full_like(positions, 0.5)], -1).reshape(*weights.shape, 2)
    cotangent = np.zeros((1, len(positions), 1, 16), np.float32)
    cotangent[..., 0] = 1
    output, _, gradient, _ = attend_and_vjp(implementation, ((1, 3),), value, locations, weights, cotangent)

    def expected(x):
        return np.interp(x, [-1, 0, 1, 2, 3], [0, 2, 3, 5, 0], left=0, right=0)

    known = positions[:-1]
    np.testing.assert_allclose(output[0, :-1, 0, 0], expected(known), rtol=1e-6)
    right = (expected(known + 1e-3) - expected(known)) / 1e-3
    # The gradient is with respect to locations, whose unit is the map's width. The step of 1e-3 is exact to 1e-4.
    np.testing.assert_allclose(gradient[0, :-1, 0, 0, 0, 0], 3 * right, rtol=1e-4, atol=1e-4)
    assert output[0, -1, 0, 0] == 0 or np.isnan(output[0, -1, 0, 0])  # and the others are not touched by it


def test_all_weight_on_one_point(implementation):
    value, locations, weights = problem(d=16)
    weights[:] = 0
    weights[..., 1, 1] = 1
    locations[..., 1, 1, :] = (1.5 / 3, 0.5 / 2)  # the centre of pixel (row 0, column 1) of level 1
    output = attend(value, LEVELS, locations, weights, implementation)
    pixel = np.broadcast_to(value[:, None, 15 + 1], output.shape)
    np.testing.assert_allclose(output, pixel, rtol=1e-6)


def test_reference_in_bfloat16():
    value, locations, weights = problem()
    value = jnp.asarray(value, jnp.bfloat16)

    output, vjp = jax.vjp(lambda value: attend(value, LEVELS, locations, weights), value)
    (gradient,) = vjp(jnp.ones_like(output))
    assert output.dtype == gradient.dtype == jnp.bfloat16
    expected = attend_loop(np.asarray(value, np.float32), LEVELS, locations, weights)
    # Accumulated in float32: only the output is rounded, to 8 bits.
    np.testing.assert_allclose(np.asarray(output, np.float32), expected, rtol=2**-8, atol=1e-6)


def test_several_blocks_equal_one(monkeypatch):
    from pallas_kernels.ms_deform_attn import reference

    value, locations, weights = problem(q=11)

    def run(block_rows):
        monkeypatch.setattr(reference, "BLOCK_ROWS", {"default": block_rows})
        output, vjp = jax.vjp(lambda *inputs: ms_deform_attn(inputs[0], LEVELS, *inputs[1:]), value, locations, weights)
        return output, *vjp(jnp.cos(jnp.arange(output.size)).reshape(output.shape))

    for blocks, whole in zip(run(130), run(10**6), strict=True):  # 44 x 24 rows, in 8 uneven blocks
        np.testing.assert_allclose(blocks, whole, rtol=1e-5, atol=1e-6)


def test_sharded_equals_unsharded(implementation):
    """Over images and heads, without communication."""
    value, locations, weights = problem(b=4, d=16)
    cotangent = np.random.default_rng(1).standard_normal((4, 3, 2, 16), np.float32)
    arrays = (value, locations, weights, cotangent)
    expected = attend_and_vjp(implementation, LEVELS, *arrays)
    auto = jax.sharding.AxisType.Auto
    mesh = jax.make_mesh((4, 2), ("data", "heads"), axis_types=(auto, auto))
    spec = jax.P("data", None, "heads")
    with jax.set_mesh(mesh):
        inputs = jax.device_put(arrays, jax.NamedSharding(mesh, spec))
        compiled = jax.jit(attend_and_vjp.__wrapped__, static_argnums=(0, 1)).lower(implementation, LEVELS, *inputs)
        compiled = compiled.compile()
        for sharded, whole in zip(compiled(*inputs), expected, strict=True):
            assert sharded.sharding.spec[:3:2] == spec[::2]
            np.testing.assert_allclose(sharded, whole, rtol=1e-6, atol=1e-6)
    for collective in ("all-gather", "all-reduce", "all-to-all", "collective-permute"):
        assert collective not in compiled.as_text()


def test_batch_that_does_not_divide_over_the_mesh(implementation):
    value, locations, weights = problem(b=3, d=16)
    with jax.set_mesh(jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))):
        output = attend(jnp.asarray(value), LEVELS, locations, weights, implementation)
    np.testing.assert_allclose(output, attend_loop(value, LEVELS, locations, weights), rtol=0, atol=5e-6)


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


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"value": np.zeros((2, 22, 6), np.float32)}, r"value must be \[b, s, h, d\].*\(2, 22, 6\)"),
        ({"value": np.zeros((2, 22, 2, 3), np.int32)}, "float32 or bfloat16, got .* in int32"),
        ({"spatial_shapes": ((3, 5), (2, 3))}, "value has 22 tokens, but .* make 21"),
        ({"locations": np.zeros((2, 3, 2, 3, 2), np.float32)}, r"sampling_locations must be \[b, q, h, l, p, 2\]"),
        ({"weights": np.zeros((2, 3, 2, 3, 4), np.float32)}, r"expected \(2, 3, 2, 3, 2\), got \(2, 3, 2, 3, 4\)"),
        ({"spatial_shapes": ((2, 11),)}, r"\(b, h, l\) = \(2, 2, 1\).* got \(2, 2, 3\)"),
        ({"in_blocks": True}, r"value has 22 tokens, but spatial_shapes .*, in block order, make 384"),
        ({"implementation": "cuda"}, r"implementation='cuda' is unknown: expected one of \[.*'reference'"),
    ],
)
def test_errors(change, message):
    value, locations, weights = problem()
    inputs = {"value": value, "spatial_shapes": LEVELS, "locations": locations, "weights": weights} | change
    with pytest.raises(ValueError, match=message):
        ms_deform_attn(
            inputs["value"],
            inputs["spatial_shapes"],
            inputs["locations"],
            inputs["weights"],
            implementation=inputs.get("implementation"),
            in_blocks=inputs.get("in_blocks", False),
        )


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
