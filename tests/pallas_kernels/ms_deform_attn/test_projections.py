"""Attention with its projections in a kernel, against plain JAX, which the models compute elsewhere."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import ahead_of_time
from pallas_kernels.ms_deform_attn import (
    Projections,
    block_order,
    ms_deform_attn,
    ms_deform_cross_attn,
    ms_deform_self_attn,
    projections_bench,
)
from pallas_kernels.ms_deform_attn import projections as module
from pallas_kernels.ms_deform_attn.shapes import COCO_WIDE
from pallas_kernels.ms_deform_attn.tensorcore import OUTSIDE, in_tiles

VMEM_MIB = {"v4": 16, "v5e": 128, "v5p": 96, "v6e": 128, "7x": 64}


class Case(NamedTuple):
    """Sizes; a step of the kernel's grid has up to four tiles of 128 tokens, an image at most one of the maps twice."""

    shapes: tuple[tuple[int, int], ...]
    heads: int
    points: int
    channels: int
    head_dim: int


CASES = {
    "one tile": Case(((5, 12),), 2, 4, 32, 16),
    "steps of three tiles": Case(((17, 21), (9, 11), (3, 4)), 2, 4, 32, 16),
    "samples fill no register": Case(((8, 16), (4, 8), (2, 4)), 2, 3, 32, 16),
    "channels fill no register": Case(((7, 9), (4, 5)), 3, 4, 24, 8),
}


def samples(features, position, projections: Projections, reference_points, valid, *, case: Case):
    """Values, locations and weights by the equations of Deformable DETR, section 4.1."""

    def linear(x, layer):
        kernel, bias = layer
        x = jnp.dot(x, kernel.astype(x.dtype), precision="highest") + bias.astype(x.dtype)
        return x.reshape(*x.shape[:2], case.heads, -1)

    query = features + position
    value = jnp.where(valid[..., None, None], linear(features, projections.value), 0)
    grid = (*query.shape[:2], case.heads, len(case.shapes), case.points)
    weights = jax.nn.softmax(linear(query, projections.logits).astype(jnp.float32)).reshape(grid)
    offsets = [linear(query, layer).astype(jnp.float32).reshape(grid) for layer in (projections.x, projections.y)]
    sizes = np.array([(width, height) for height, width in case.shapes], np.float32)[:, None]
    return value, reference_points[:, :, None, :, None] + jnp.stack(offsets, -1) / sizes, weights


def definition(*arrays, case: Case):
    """The heads' outputs, tokens last, and the features."""
    value, locations, weights = samples(*arrays, case=case)
    output = ms_deform_attn(value, case.shapes, locations, weights, implementation="reference", in_blocks=True)
    return output.reshape(*output.shape[:2], -1).swapaxes(1, 2), arrays[0]


def by_kernel(features, position, projections, reference_points, valid, *, case: Case, interpret=True, **options):
    arrays = features, position, reference_points, valid, case.shapes, projections
    return ms_deform_self_attn(*arrays, num_heads=case.heads, interpret=interpret, **options)


def projected(features, position, projections, reference_points, valid, *, case: Case, interpret=True):
    """What the projections' kernel writes, and the features."""
    order = block_order(case.shapes)
    places, valid = module.places(reference_points, order), (valid & order.is_token)[:, None]
    weights = module.in_rows(projections, case.heads)
    value, *rest = module.project(
        features, position, places, valid.astype(jnp.float32), weights, order, case.points, interpret
    )
    return value[:, :, : case.head_dim], *rest


def projected_by_definition(*arrays, case: Case):
    """The same from `samples`."""
    features = arrays[0]
    value, locations, weights = samples(*arrays, case=case)
    order = block_order(case.shapes)
    value = value.transpose(0, 2, 3, 1) * order.is_token
    return value, *in_tiles(locations, weights, order.is_token, order), features


@functools.cache
def problem(name: str, batch: int = 2):
    """Features, position, projections; reference points and valid tokens: in float32."""
    case, random = CASES[name], np.random.default_rng(0)
    tokens = block_order(case.shapes).length

    def normal(*shape, scale=1.0):
        return jnp.asarray(scale * random.standard_normal(shape), jnp.float32)

    c, d, count = case.channels, case.heads * case.head_dim, case.heads * len(case.shapes) * case.points
    # Offsets of some pixels: some points lie outside.
    sizes = zip((d, count, count, count), (1.0, 2.0, 2.0, 1.0), strict=True)
    layers = [(normal(c, n, scale=scale * c**-0.5), normal(n, scale=scale)) for n, scale in sizes]
    inputs = normal(batch, tokens, c), normal(batch, tokens, c), Projections(*layers)
    reference_points = jnp.asarray(random.uniform(size=(batch, tokens, len(case.shapes), 2)), jnp.float32)
    return inputs, (reference_points, jnp.asarray(random.uniform(size=(batch, tokens)) < 0.8))


def both(function, inputs, constants, **options):
    """The outputs and the gradients of all inputs, given that of each output: a sine over its places.

    Those of `projected` are zero at points outside of the map, as those of the sampling are; those of what is sampled,
    in the padding of the order.
    """
    output, vjp = jax.vjp(lambda *inputs: function(*inputs, *constants, **options), *inputs)
    gradient = jax.tree.map(lambda z: jnp.sin(jnp.arange(z.size)).reshape(z.shape).astype(z.dtype), output)
    if len(jax.tree.leaves(output)) == 2:
        gradient = gradient[0] * block_order(options["case"].shapes).is_token, gradient[1]
    elif isinstance(output, tuple):
        value, *of_samples, features = gradient
        gradient = value, *(jnp.where(output[1] == OUTSIDE, 0, z) for z in of_samples), features
    return {"output": output, "gradients": vjp(gradient)}


def assert_close(got, expected, tolerance, case: Case):
    """Every array within so much of its largest number. What is put out for the padding of the order says nothing."""
    is_token = block_order(case.shapes).is_token
    for (path, z), x in zip(jax.tree.leaves_with_path(expected), jax.tree.leaves(got), strict=True):
        x, z = (np.asarray(array, np.float32) for array in (x, z))
        if path[0].key == "output" and x.shape[-1] == is_token.size:
            x, z = x[..., is_token], z[..., is_token]
        np.testing.assert_allclose(x, z, rtol=0, atol=tolerance * np.abs(z).max(), err_msg=jax.tree_util.keystr(path))


@pytest.mark.parametrize("name", CASES)
def test_projections_equal_their_definition(name):
    """Output and every gradient; float32 in another order of addition, locations by another formula: 6e-7 was seen."""
    arrays, case = problem(name), CASES[name]
    expected = jax.jit(functools.partial(both, projected_by_definition, case=case))(*arrays)
    got = jax.jit(functools.partial(both, projected, case=case))(*arrays)
    assert_close(got, expected, 2e-6, case)


@pytest.mark.slow
def test_attention_equals_its_definition():
    """All of it. Gradients of locations jump where a point is on a pixel's center, so that rounding may be seen."""
    name = "channels fill no register"
    expected = jax.jit(functools.partial(both, definition, case=CASES[name]))(*problem(name))
    got = jax.jit(functools.partial(both, by_kernel, case=CASES[name]))(*problem(name))
    assert_close(got, expected, 1e-5, CASES[name])


def values(features, kernel, bias, valid, *, case: Case):
    """Those of `project_values`, from their definition."""
    value = jnp.dot(features, kernel, precision="highest") + bias
    return jnp.where((valid & block_order(case.shapes).is_token)[..., None], value, 0)


def cross_attention(features, kernel, bias, locations, weights, valid, *, case: Case):
    value = values(features, kernel, bias, valid, case=case)
    value = value.reshape(*value.shape[:2], case.heads, -1)
    return ms_deform_attn(value, case.shapes, locations, weights, implementation="reference", in_blocks=True)


def cross_attention_by_kernel(features, kernel, bias, locations, weights, valid, *, case: Case, **options):
    arrays = features, valid, case.shapes, (kernel, bias), locations, weights
    return ms_deform_cross_attn(*arrays, interpret=True, **options)


def cross_problem(name: str, batch: int):
    """Features, kernel and bias, locations and weights of five queries; valid tokens."""
    case, random = CASES[name], np.random.default_rng(1)
    (features, _, projections), (_, valid) = problem(name, batch)
    grid = (batch, 5, case.heads, len(case.shapes), case.points)
    locations = jnp.asarray(random.uniform(-0.2, 1.2, (*grid, 2)), jnp.float32)
    return (features, *projections.value, locations, jnp.asarray(random.uniform(size=grid), jnp.float32)), (valid,)


@pytest.mark.slow
def test_cross_attention_equals_its_definition():
    """Output and every gradient."""
    name = "channels fill no register"
    arrays, case = cross_problem(name, 1), CASES[name]
    expected = jax.jit(functools.partial(both, cross_attention, case=case))(*arrays)
    got = jax.jit(functools.partial(both, cross_attention_by_kernel, case=case))(*arrays)
    assert_close(got, expected, 1e-5, case)


@pytest.mark.parametrize("name", ["steps of three tiles", "channels fill no register"])
def test_values_equal_their_definition(name):
    """Under an interpreter in which memory that was not written is NaN."""
    interpret = pltpu.InterpretParams(uninitialized_memory="nan", out_of_bounds_reads="raise", detect_races=True)
    (features, *layer, _, _), (valid,) = cross_problem(name, 2)
    case = CASES[name]

    def by_kernel(features, kernel, bias, valid):
        rows = module._rows((kernel, bias), case.heads, 16)
        row = module._as_row(valid, block_order(case.shapes))
        value = module.project_values(features, row, tuple(rows), case.heads, interpret)[:, :, : case.head_dim]
        return value.reshape(len(value), -1, value.shape[-1]).swapaxes(1, 2)

    expected = jax.jit(functools.partial(both, functools.partial(values, case=case)))((features, *layer), (valid,))
    got = jax.jit(functools.partial(both, by_kernel))((features, *layer), (valid,))
    assert_close(got, expected, 2e-6, case)


def test_cross_attention_over_a_mesh(monkeypatch):
    """Three images on four devices. Something short stands for the sampling."""

    def stand_in(value, x, y, weight, *_):
        samples = jnp.where(x == OUTSIDE, 0, weight * jnp.sin(x) * jnp.cos(y)).sum(2, keepdims=True)
        return samples * value.sum(3, keepdims=True)

    def expected_output(features, kernel, bias, locations, weights, valid, *, case):
        value = values(features, kernel, bias, valid, case=case)
        value = value.reshape(*value.shape[:2], case.heads, -1).transpose(0, 2, 3, 1)
        samples = in_tiles(locations, weights, np.ones(5, bool), block_order(case.shapes))
        return stand_in(value, *samples)[..., :5].transpose(0, 3, 1, 2)

    monkeypatch.setattr(module, "attend_tiles", stand_in)
    arrays, case = cross_problem("one tile", 3), CASES["one tile"]
    expected = jax.jit(functools.partial(both, expected_output, case=case))(*arrays)
    with jax.set_mesh(jax.make_mesh((2, 2), ("data", "fsdp"), devices=jax.devices()[:4])):
        run = functools.partial(both, cross_attention_by_kernel, case=case, batch_axis=("data", "fsdp"))
        assert_close(jax.jit(run)(*arrays), expected, 2e-6, case)


def test_what_cross_attention_refuses():
    (features, kernel, bias, locations, weights), (valid,) = cross_problem("one tile", 2)
    case = CASES["one tile"]

    def run(features=features, kernel=kernel, bias=bias, locations=locations, weights=weights):
        return cross_attention_by_kernel(features, kernel, bias, locations, weights, valid, case=case)

    with pytest.raises(ValueError, match=r"attention_weights .* must be .* with b = 2 and l = 1"):
        run(locations=locations[:, 1:])
    with pytest.raises(ValueError, match=r"the kernel of value must be \[32, h \* d\] with h = 2, got \(31, 32\)"):
        run(kernel=kernel[1:])
    with pytest.raises(ValueError, match=r"features have 127 tokens"):
        run(features=features[:, 1:])
    assert run(locations=locations[:, :0], weights=weights[:, :0]).shape == (2, 0, 2, 16)


def test_bfloat16():
    """Results of the products stay in float32, so they are nearer to float32's than the definition's are."""
    name = "steps of three tiles"
    (features, position, projections), constants = problem(name)
    low = features.astype(jnp.bfloat16), position.astype(jnp.bfloat16)
    exact = projected_by_definition(*(z.astype(jnp.float32) for z in low), projections, *constants, case=CASES[name])
    by_xla = projected_by_definition(*low, projections, *constants, case=CASES[name])
    got = projected(*low, projections, *constants, case=CASES[name])
    assert got[0].dtype == jnp.bfloat16 and got[1].dtype == jnp.float32
    is_token = block_order(CASES[name].shapes).is_token
    for x, y, z in zip(got[:-1], by_xla[:-1], exact[:-1], strict=True):
        errors = [np.abs(np.asarray(array - z, np.float32)[..., is_token]).mean() for array in (x, y)]
        assert errors[0] <= errors[1]


def test_memory_that_is_not_initialized():
    """Under an interpreter in which such memory is NaN, reads out of bounds raise, and races are found."""
    interpret = pltpu.InterpretParams(uninitialized_memory="nan", out_of_bounds_reads="raise", detect_races=True)
    arrays, case = problem("samples fill no register", batch=1), CASES["samples fill no register"]
    expected = jax.jit(functools.partial(both, projected_by_definition, case=case))(*arrays)
    got = jax.jit(functools.partial(both, projected, case=case, interpret=interpret))(*arrays)
    assert_close(got, expected, 2e-6, case)


def test_padding_may_hold_anything():
    """Values that are not valid count as zero, whatever the tokens are."""
    (features, *rest), (reference_points, valid) = problem("one tile")
    broken = jnp.where(valid[..., None], features, jnp.nan)
    run = functools.partial(projected, case=CASES["one tile"])
    value, bad = run(features, *rest, reference_points, valid), run(broken, *rest, reference_points, valid)
    np.testing.assert_array_equal(value[0], bad[0])
    assert not np.asarray(bad[0]).transpose(0, 3, 1, 2)[~np.asarray(valid)].any()


def test_over_a_mesh(monkeypatch):
    """Three images on four devices: gradients of weights are summed up. Something short stands for the sampling."""

    def stand_in(value, x, y, weight, *_):
        return value * jnp.where(x == OUTSIDE, 0, weight * jnp.sin(x) * jnp.cos(y)).sum(2, keepdims=True)

    def expected_output(*arrays, case):
        *samples, features = projected_by_definition(*arrays, case=case)
        output = stand_in(*samples)
        return output.reshape(len(output), -1, output.shape[-1]), features

    monkeypatch.setattr(module, "attend_tiles", stand_in)
    arrays, case = problem("one tile", batch=3), CASES["one tile"]
    expected = jax.jit(functools.partial(both, expected_output, case=case))(*arrays)
    with jax.set_mesh(jax.make_mesh((2, 2), ("data", "fsdp"), devices=jax.devices()[:4])):
        run = jax.jit(functools.partial(both, by_kernel, case=case, batch_axis=("data", "fsdp")))
        assert_close(run(*arrays), expected, 1e-5, case)


def test_what_is_refused():
    (features, position, projections), (reference_points, valid) = problem("one tile")
    case = CASES["one tile"]

    def run(features=features, position=position, projections=projections, points=reference_points, valid=valid):
        return by_kernel(features, position, projections, points, valid, case=case)

    with pytest.raises(ValueError, match=r"features must be \[b, s, c\] in float32 or bfloat16, got .* in float16"):
        run(features.astype(jnp.float16))
    with pytest.raises(ValueError, match=r"features have 127 tokens, but spatial_shapes .* in block order make 128"):
        run(features[:, 1:])
    with pytest.raises(ValueError, match=r"position must be \(2, 128, 32\) for features .* got \(2, 128, 31\)"):
        run(position=position[..., 1:])
    with pytest.raises(ValueError, match=r"position must be float32 like features, got bfloat16"):
        run(position=position.astype(jnp.bfloat16))
    with pytest.raises(ValueError, match=r"reference_points must be \(2, 128, 1, 2\) .* got \(2, 128, 1, 1\)"):
        run(points=reference_points[..., 1:])
    with pytest.raises(ValueError, match=r"valid must be \(2, 128\) .* got \(2, 127\)"):
        run(valid=valid[:, 1:])
    with pytest.raises(ValueError, match=r"the kernel of x must be \(32, 8\) .* got \(32, 7\)"):
        run(projections=projections._replace(x=(projections.x[0][:, 1:], projections.x[1])))
    with pytest.raises(ValueError, match=r"32 values and 8 samples do not divide over 3 heads and 1 levels"):
        by_kernel(features, position, projections, reference_points, valid, case=case._replace(heads=3))
    with (
        jax.set_mesh(jax.make_mesh((2, 2), ("data", "model"), devices=jax.devices()[:4])),
        pytest.raises(ValueError, match=r"ms_deform_self_attn: the mesh .* has axes \['model'\]"),
    ):
        run()
    nothing = run(features[:0], position[:0], points=reference_points[:0], valid=valid[:0])
    assert [z.shape for z in nothing] == [(0, 32, 128), (0, 128, 32)]


def test_second_derivatives_are_refused():
    (features, *rest), constants = problem("one tile")

    def gradient(features):
        outputs = functools.partial(projected, case=CASES["one tile"])
        return jax.grad(lambda x: sum(z.sum() for z in outputs(x, *rest, *constants)))(features).sum()

    with pytest.raises(NotImplementedError, match="second derivatives of ms_deform_self_attn"):
        jax.grad(gradient)(features)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("points", [4, 3])
def test_lowers_for_tpus(points, dtype):
    """Mosaic takes the kernels at a real size; whether the compiler can fit them into a chip, it does not say."""
    arguments = projections_bench.abstract_problem(COCO_WIDE, 1, points=points, dtype=dtype)
    run = functools.partial(projections_bench.both_passes, COCO_WIDE, points)
    lowered = jax.jit(run).trace(*arguments).lower(lowering_platforms=("tpu",))
    assert all(f"ms_deform_attn_project_{name}" in lowered.as_text() for name in ("forward", "backward"))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("generation", ahead_of_time.TOPOLOGIES)
def test_compiles_within_vector_memory(generation, dtype):
    """Forward and backward of both, two images of 800 x 1333: the compiler refuses what is too much."""
    pytest.importorskip("libtpu", reason="compiling for a TPU needs libtpu: make test-aot")
    ahead_of_time.require_libtpu()
    arguments = projections_bench.abstract_problem(COCO_WIDE, 2, dtype=dtype)
    run = functools.partial(projections_bench.both_passes, COCO_WIDE, 4)
    compiled = ahead_of_time.compile_for(generation, run, *arguments)
    found = ahead_of_time.kernels(compiled, "ms_deform_attn_project_")
    assert len(found) == 4 and max(kernel.vmem for kernel in found) <= VMEM_MIB[generation] * 2**20
