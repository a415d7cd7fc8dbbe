"""The feed-forward half of a layer as one kernel: as its equations in plain JAX, which the models compute elsewhere."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from detr_jax.models.layers import dropout, relu
from pallas_kernels import ahead_of_time
from pallas_kernels.feed_forward import Weights, bench, feed_forward, tensorcore

VMEM_MIB = {"v4": 16, "v5e": 128, "v5p": 96, "v6e": 128, "7x": 64}
NAMES = ("x", "sampled", *Weights._fields)
KEYS = jnp.asarray(np.random.default_rng(7).integers(0, 2**32, (3, 2)), jnp.uint32)
CASES = {
    # Tokens, channels, hidden channels, rate. Tiles have 384 tokens at most, and hidden channels come in chunks of 256.
    "one tile": (128, 32, 64, 0.0),
    "an incomplete tile": (21, 32, 64, 0.25),
    "tiles and chunks": (400, 32, 300, 0.1),
}


def definition(x, sampled, weights: Weights, keys, *, rate: float):
    """The module's equations."""

    def norm(x, scale, shift):
        x = x.astype(jnp.float32)
        x = x - x.mean(-1, keepdims=True)
        return (x / jnp.sqrt((x * x).mean(-1, keepdims=True) + 1e-5) * scale + shift).astype(sampled.dtype)

    def linear(x, kernel, bias):
        return jnp.dot(x, kernel.astype(x.dtype), precision="highest") + bias.astype(x.dtype)

    keys = [None] * 3 if keys is None else keys
    w = weights
    a = linear(sampled.swapaxes(1, 2), w.kernel0, w.bias0)
    v = norm(x + (a if keys[0] is None else dropout(a, keys[0], rate)), w.scale1, w.shift1)
    h = relu(linear(v, w.kernel1, w.bias1), keys[1], rate)
    z = linear(h, w.kernel2, w.bias2)
    return norm(v + (z if keys[2] is None else dropout(z, keys[2], rate)), w.scale2, w.shift2)


@functools.cache
def problem(name: str, batch: int = 2):
    """Numbers of a case, in float32: x, sampled, weights; the gradient of the output."""
    tokens, c, f, _ = CASES[name]
    random = np.random.default_rng(0)

    def normal(*shape):
        return jnp.asarray(random.standard_normal(shape), jnp.float32)

    weights = Weights(*(0.3 * normal(*size) for size in tensorcore.weight_shapes(24, c, f)))
    weights = weights._replace(scale1=1 + weights.scale1, scale2=1 + weights.scale2)
    x, gradient = (normal(batch, tokens, c) for _ in range(2))
    return (x, normal(batch, 24, tokens), weights), gradient


def both(function, inputs, gradient, keys, **options):
    """The output and the gradients of all inputs, by name."""
    y, vjp = jax.vjp(lambda *inputs: function(*inputs, keys, **options), *inputs)
    dx, dsampled, dweights = vjp(gradient)
    return dict(zip(("y", *NAMES), (y, dx, dsampled, *dweights), strict=True))


def assert_close(got, expected, tolerance):
    for name, z in expected.items():
        z = np.asarray(z, np.float32)
        np.testing.assert_allclose(
            np.asarray(got[name], np.float32), z, rtol=0, atol=tolerance * np.abs(z).max(), err_msg=name
        )


@pytest.mark.parametrize("name", CASES)
def test_equals_the_definition(name):
    """Output and every gradient; float32 in another order of addition: 4e-7 was seen."""
    inputs, gradient = problem(name)
    rate = CASES[name][3]
    keys = KEYS if rate else None
    expected = jax.jit(functools.partial(both, definition, rate=rate))(inputs, gradient, keys)
    got = jax.jit(functools.partial(both, feed_forward, rate=rate, interpret=True))(inputs, gradient, keys)
    assert_close(got, expected, 2e-6)


def test_bfloat16():
    """Between the products the kernel stays in float32, so it is nearer to float32's result than the definition is.

    Gradients jump where a ReLU's input changes its sign: some sums of them are a little farther.
    """
    inputs, gradient = problem("an incomplete tile")
    low = jax.tree.map(lambda z: z.astype(jnp.bfloat16), (*inputs[:2], gradient))
    high = jax.tree.map(lambda z: z.astype(jnp.float32), low)
    plain = jax.jit(functools.partial(both, definition, rate=0.25))
    exact = plain((*high[:2], inputs[2]), high[2], KEYS)
    arrays = (*low[:2], inputs[2]), low[2], KEYS
    by_xla, got = plain(*arrays), both(feed_forward, *arrays, rate=0.25, interpret=True)
    for name in exact:
        errors = [np.abs(np.asarray(z[name] - exact[name], np.float32)).mean() for z in (got, by_xla)]
        assert errors[0] <= 1.2 * errors[1], name
    assert np.abs(np.asarray(got["y"] - exact["y"])).mean() < np.abs(np.asarray(by_xla["y"] - exact["y"])).mean()
    assert got["y"].dtype == got["x"].dtype == jnp.bfloat16 and got["kernel1"].dtype == jnp.float32
    # Roundings of the products' inputs, 2^-9 each.
    assert_close(got, {"y": exact["y"]}, 0.02)


def test_memory_that_is_not_initialized():
    """Under an interpreter in which such memory is NaN, reads out of bounds raise, and races are found."""
    interpret = pltpu.InterpretParams(uninitialized_memory="nan", out_of_bounds_reads="raise", detect_races=True)
    inputs, gradient = problem("an incomplete tile", batch=1)
    expected = jax.jit(functools.partial(both, definition, rate=0.25))(inputs, gradient, KEYS)
    got = jax.jit(functools.partial(both, feed_forward, rate=0.25, interpret=interpret))(inputs, gradient, KEYS)
    assert_close(got, expected, 2e-6)


def test_over_a_mesh():
    """Three images on four devices: the same numbers are dropped, and gradients of weights are summed up."""
    inputs, gradient = problem("an incomplete tile", batch=3)
    expected = jax.jit(functools.partial(both, definition, rate=0.25))(inputs, gradient, KEYS)
    with jax.set_mesh(jax.make_mesh((2, 2), ("data", "fsdp"), devices=jax.devices()[:4])):
        run = jax.jit(functools.partial(both, feed_forward, rate=0.25, batch_axis=("data", "fsdp"), interpret=True))
        assert_close(run(inputs, gradient, KEYS), expected, 2e-6)


def test_what_is_refused():
    (x, sampled, weights), _ = problem("one tile")
    with pytest.raises(
        ValueError, match=r"x must be \[b, s, c\] in float32 or bfloat16, got \(2, 128, 32\) in float16"
    ):
        feed_forward(x.astype(jnp.float16), sampled, weights)
    with pytest.raises(
        ValueError, match=r"sampled must be \[b, a, s\] .* expected \[2, a, 128\] in float32, got \(2, 24, 127"
    ):
        feed_forward(x, sampled[..., 1:], weights)
    with pytest.raises(ValueError, match=r"sampled must be .* in float32, got \(2, 24, 128\) in bfloat16"):
        feed_forward(x, sampled.astype(jnp.bfloat16), weights)
    with pytest.raises(ValueError, match=r"weights.kernel2 must be \(64, 32\) .* got \(32, 64\)"):
        feed_forward(x, sampled, weights._replace(kernel2=weights.kernel1))
    with pytest.raises(ValueError, match=r"keys must be uint32 \[3, 2\], got uint32 \(2,\)"):
        feed_forward(x, sampled, weights, KEYS[0], rate=0.1)
    with pytest.raises(ValueError, match=r"rate=1.0 must be at least 0 and less than 1"):
        feed_forward(x, sampled, weights, KEYS, rate=1.0)
    with (
        jax.set_mesh(jax.make_mesh((2, 2), ("data", "model"), devices=jax.devices()[:4])),
        pytest.raises(ValueError, match=r"feed_forward: the mesh .* has axes \['model'\]"),
    ):
        feed_forward(x, sampled, weights)
    assert feed_forward(x[:0], sampled[:0], weights).shape == (0, 128, 32)


def test_second_derivatives_are_refused():
    (x, sampled, weights), _ = problem("one tile")

    def gradient(x):
        return jax.grad(lambda x: feed_forward(x, sampled, weights, interpret=True).sum())(x).sum()

    with pytest.raises(NotImplementedError, match="second derivatives of feed_forward"):
        jax.grad(gradient)(x)


def test_rows_of_a_tile(monkeypatch):
    """They fit into the vector memory."""
    assert tensorcore._tile_rows(256, 256, 1024, 2) == 384
    monkeypatch.setattr(tensorcore, "vmem_bytes", lambda: 16 * 2**20)
    assert tensorcore._tile_rows(256, 256, 1024, 2) == 256 and tensorcore._tile_rows(256, 256, 8192, 4) == 128


def test_where_it_is_faster(monkeypatch):
    """Not on v4 with dropout."""
    for generation, rate, expected in ((4, 0.1, False), (4, 0.0, True), (5, 0.1, True), (None, 0.1, True)):
        monkeypatch.setattr(tensorcore, "tpu_generation", lambda generation=generation: generation)
        assert tensorcore.is_faster(rate) is expected


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_lowers_for_tpus(dtype):
    """Mosaic takes the kernels at a real size; whether the compiler can fit them into a chip, it does not say."""
    x, sampled, weights, keys = bench.abstract_problem((1, 25728, 256), 1024, dtype)
    lowered = jax.jit(bench.both_passes).trace(x, sampled, weights, keys, x).lower(lowering_platforms=("tpu",))
    assert all(f"feed_forward_{name}" in lowered.as_text() for name in ("forward", "backward"))


@pytest.mark.slow
@pytest.mark.parametrize(("hidden", "dtype"), [(1024, "bfloat16"), (1024, "float32"), (2048, "bfloat16")])
@pytest.mark.parametrize("generation", ahead_of_time.TOPOLOGIES)
def test_compiles_within_vector_memory(generation, hidden, dtype):
    """Forward and backward, two images of 800 x 1333: the compiler refuses what is too much."""
    pytest.importorskip("libtpu", reason="compiling for a TPU needs libtpu: make test-aot")
    ahead_of_time.require_libtpu()
    x, sampled, weights, keys = bench.abstract_problem((2, 25728, 256), hidden, dtype)
    compiled = ahead_of_time.compile_for(generation, bench.both_passes, x, sampled, weights, keys, x)
    found = ahead_of_time.kernels(compiled, "feed_forward_")
    assert len(found) == 2 and max(kernel.vmem for kernel in found) <= VMEM_MIB[generation] * 2**20
