"""The TensorCore kernel's own: block order, maps in parts, what Mosaic accepts, memory that is not initialized."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from ms_deform_attn_cases import assert_close, run

from pallas_kernels.ms_deform_attn import block_order, ms_deform_attn, tensorcore
from pallas_kernels.ms_deform_attn.shapes import SHAPES, Shape, problem
from pallas_kernels.ms_deform_attn.tensorcore_walk import PLACE, SPAN, parts

TWO_TILES = Shape(1, ((5, 19),), None, heads=1, head_dim=16, points=1)


def in_blocks(order, inputs):
    """A `Problem` of an encoder in block order."""
    return type(inputs)(*map(order.to_blocks, inputs))


@pytest.mark.parametrize("name", ["reference", "tensorcore"])
def test_block_order(name):
    """The same numbers with tokens and queries in block order. What is in the padding does not matter, NaN included."""
    shape = TWO_TILES
    order, inputs = block_order(shape.spatial_shapes), problem(shape)
    expected = run("reference", shape, inputs)
    padded = [jnp.where(order.is_token.reshape(-1, *[1] * (z.ndim - 2)), z, jnp.nan) for z in in_blocks(order, inputs)]
    padded[3] = order.to_blocks(inputs.gradient)
    got = run(name, shape, padded, in_blocks=True)
    assert not got["output"][:, ~order.is_token].any()
    for key in ("output", "grad_value", "grad_locations", "grad_weights"):
        got[key] = order.from_blocks(got[key])
    assert_close(got, expected, 1e-5)


@pytest.mark.parametrize("name", ["reference", "tensorcore"])
def test_few_queries_on_tokens_in_block_order(name):
    """As a decoder has them."""
    shape = TWO_TILES
    order, inputs = block_order(shape.spatial_shapes), problem(shape)
    few = [inputs.sampling_locations[:, :7], inputs.attention_weights[:, :7]]

    def attend(value, **options):
        return ms_deform_attn(value, shape.spatial_shapes, *few, interpret=True, **options)

    expected = attend(inputs.value, implementation="reference")
    got = attend(order.to_blocks(inputs.value), implementation=name, in_blocks=True)
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-5)


def test_block_order_is_a_permutation():
    order = block_order([(11, 19), (1, 1)])
    x = jnp.arange(2 * 210 * 3).reshape(2, 210, 3)
    blocks = order.to_blocks(x)
    assert blocks.shape == (2, order.length, 3)
    np.testing.assert_array_equal(order.from_blocks(blocks), x)
    np.testing.assert_array_equal(blocks[:, order.is_token].sort(1), x)
    # A unit is a square of the map: its first row is eight tokens of the first row, its second those below.
    np.testing.assert_array_equal(blocks[0, :16, 0], 3 * np.r_[0:8, 19:27])


def test_packed_words():
    """Every field of a word at its limits."""
    for fields in (PLACE, SPAN):
        for chosen in fields.bits:
            numbers = {name: fields.limit(name) - 1 if name == chosen else 1 for name in fields.bits}
            word = fields.pack(**{name: np.int32(z) for name, z in numbers.items()})
            assert word.dtype == np.int32
            assert {name: int(fields.unpack(jnp.asarray(word), name)) for name in fields.bits} == numbers
            assert fields.keep(word, chosen) == fields.pack(**{chosen: np.int32(numbers[chosen])})


def test_maps_larger_than_the_memory(monkeypatch):
    """A map whose values do not fit is worked off in parts."""
    shape = Shape(1, ((17, 9), (3, 3)), 20, heads=1, head_dim=16, points=1)
    inputs = problem(shape)
    monkeypatch.setattr(tensorcore, "_units", lambda unit_bytes: 4)
    pieces = parts(block_order(shape.spatial_shapes), 4)
    assert [part.units for part in pieces] == [4, 4]
    assert_close(run("tensorcore", shape, inputs), run("reference", shape, inputs), 1e-5)


@pytest.mark.parametrize("backward", [False, True])
def test_memory_that_is_not_initialized(backward):
    """Under an interpreter in which such memory is NaN, reads out of bounds raise, and races are found."""
    shape = Shape(1, ((3, 9),), None, heads=1, head_dim=16, points=1)
    inputs = problem(shape)
    interpret = pltpu.InterpretParams(uninitialized_memory="nan", out_of_bounds_reads="raise", detect_races=True)

    def attend(*arrays):
        return tensorcore.ms_deform_attn_tensorcore(arrays[0], shape.spatial_shapes, *arrays[1:], interpret=interpret)

    expected = run("reference", shape, inputs)
    if not backward:
        np.testing.assert_allclose(jax.jit(attend)(*inputs[:3]), expected["output"], rtol=0, atol=1e-5)
        return
    gradients = jax.jit(lambda *z: jax.vjp(attend, *z[:3])[1](z[3]))(*inputs)
    for name, got in zip(("grad_value", "grad_locations", "grad_weights"), gradients, strict=True):
        np.testing.assert_allclose(got, expected[name], rtol=0, atol=1e-5 * np.abs(expected[name]).max())


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

    step = jax.jit(jax.value_and_grad(loss, (0, 1, 2)))
    lowered = step.trace(*inputs).lower(lowering_platforms=("tpu",)).as_text()
    for kernel in ("touched", "forward", "backward"):
        assert f"ms_deform_attn_{kernel}" in lowered
