"""The public operation: what `None` stands for, meshes, empty inputs, derivatives that there are not, and errors."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ms_deform_attn_cases import assert_close, attend_and_vjp, run

from pallas_kernels.ms_deform_attn import best_implementation, ms_deform_attn
from pallas_kernels.ms_deform_attn.shapes import Shape, problem

pytestmark = pytest.mark.usefixtures("short_loops")

TINY = Shape(4, ((2, 3), (1, 1)), 3, heads=2, head_dim=16, points=1)
HUGE = ((1, 9000), (1, 1))
AUTO, EXPLICIT = jax.sharding.AxisType.Auto, jax.sharding.AxisType.Explicit
KERNEL = "ms_deform_attn_forward"


def attend(inputs, shape=TINY, **options):
    """The operation on a `Problem`."""
    return ms_deform_attn(inputs.value, shape.spatial_shapes, *inputs[1:3], **options)


def under(axes, types, function):
    """`function()` under a mesh."""
    mesh = jax.make_mesh(tuple(axes.values()), tuple(axes), axis_types=(types,) * len(axes))
    with jax.set_mesh(mesh):
        return function()


def test_none_follows_the_platform_lowered_for():
    """Not that of the machine: the kernel in a program for TPUs, the reference in others, forward and backward."""
    inputs = problem(TINY)

    @jax.jit
    def step(inputs):
        return jax.grad(lambda value: attend(inputs._replace(value=value)).sum())(inputs.value)

    traced = step.trace(inputs)
    for platform in ("tpu", "cpu", "cuda"):
        text = traced.lower(lowering_platforms=(platform,)).as_text()
        assert ("ms_deform_attn_backward" in text) == (platform == "tpu")
    assert_close(run(None, TINY, inputs), run("reference", TINY, inputs), 0)


def test_none_where_maps_are_too_large():
    """XLA's path on TPUs; the kernel itself says why not."""
    shape = Shape(1, HUGE, 3, heads=1, head_dim=16, points=1)
    inputs = problem(shape)
    lowered = jax.jit(lambda inputs: attend(inputs, shape)).trace(inputs).lower(lowering_platforms=("tpu",))
    assert KERNEL not in lowered.as_text()
    with pytest.raises(ValueError, match=r"too large .* 1126 columns of 8 pixels \(at most 1023\).*'xla'"):
        attend(inputs, shape, implementation="tensorcore")


def test_best_implementation(monkeypatch):
    assert best_implementation(TINY.spatial_shapes, points=4) == "reference"
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    assert best_implementation(TINY.spatial_shapes, points=4) == "tensorcore"
    assert best_implementation(HUGE, points=4) == "xla"
    assert best_implementation(TINY.spatial_shapes, points=2000) == "xla"


def test_vmap():
    """Over several batches."""
    inputs = problem(TINY)
    two = jax.tree.map(lambda x: jnp.stack([x, x[::-1]]), inputs)
    got = jax.vmap(attend, in_axes=(type(inputs)(0, 0, None, None),))(two._replace(attention_weights=two[2][0]))
    assert got.shape == (2, *attend(inputs).shape)
    np.testing.assert_allclose(got[0], attend(inputs), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", [None, "tensorcore"])
def test_sharded_equals_unsharded(name):
    """Over images and heads, without communication."""
    inputs = problem(TINY)
    expected = run("reference", TINY, inputs)
    mesh = jax.make_mesh((4, 2), ("data", "heads"), axis_types=(AUTO, AUTO))
    spec = jax.P("data", None, "heads")
    with jax.set_mesh(mesh):
        inputs = jax.device_put(inputs, jax.NamedSharding(mesh, spec))
        step = functools.partial(attend_and_vjp.__wrapped__, implementation=name, spatial_shapes=TINY.spatial_shapes)
        compiled = jax.jit(step).lower(*inputs).compile()
        for key, sharded in compiled(*inputs).items():
            assert sharded.sharding.spec[:3:2] == spec[::2]
            np.testing.assert_allclose(sharded, expected[key], rtol=1e-5, atol=1e-5)
    for collective in ("all-gather", "all-reduce", "all-to-all", "collective-permute"):
        assert collective not in compiled.as_text()


@pytest.mark.parametrize("types", [AUTO, EXPLICIT], ids=["auto", "explicit"])
@pytest.mark.parametrize("name", [None, "gpu"])
def test_meshes(name, types):
    """A batch that does not divide, axes of other names, and a call inside of the user's own shard_map."""
    inputs = problem(TINY)
    expected = run("reference", TINY, inputs)
    options = {"implementation": name, "interpret": True}
    by_axes = jax.jit(functools.partial(attend, batch_axis=("x", "y"), **options))
    np.testing.assert_allclose(under({"x": 2, "y": 4}, types, lambda: by_axes(inputs)), expected["output"], atol=1e-5)

    def own():
        # The user splits the images over `x`; what is left is split over `data`.
        split = jax.shard_map(
            functools.partial(attend, **options),
            in_specs=jax.P("x"),
            out_specs=jax.P("x"),
            axis_names={"x"},
            check_vma=False,
        )
        place = functools.partial(jax.sharding.reshard, out_shardings=jax.P("x"))  # explicit meshes ask for it
        return jax.jit(split)(jax.tree.map(place, inputs) if types == EXPLICIT else inputs)

    np.testing.assert_allclose(under({"x": 2, "data": 4}, types, own), expected["output"], atol=1e-5)


def test_what_a_mesh_cannot_split_is_refused():
    """Never computed by every device in silence."""
    inputs = problem(TINY)
    kernel = functools.partial(attend, inputs, implementation="gpu", interpret=True)
    with pytest.raises(
        ValueError, match=r"mesh .*'x': 8.* has axes \['x'\], which are neither .* Name them in batch_axis"
    ):
        under({"x": 8}, AUTO, kernel)
    with pytest.raises(ValueError, match=r"2 heads do not divide over mesh axes \['heads'\] of size 8"):
        under({"heads": 8}, AUTO, kernel)


@pytest.mark.parametrize("name", [None, "xla", "tensorcore", "gpu"])
@pytest.mark.parametrize("empty", [{"batch": 0}, {"queries": 0}, {"heads": 0}], ids=str)
def test_empty(name, empty):
    """No images, no queries or no heads: an empty output, and gradients of zero."""
    shape = Shape(**{"batch": 2, "spatial_shapes": ((2, 3),), "queries": 3, "heads": 2, "points": 1} | empty)
    grid = (shape.batch, shape.queries, shape.heads, 1, 1)
    arrays = [jnp.ones(z) for z in ((shape.batch, 6, shape.heads, 4), (*grid, 2), grid)]
    output, vjp = jax.vjp(
        lambda *z: ms_deform_attn(z[0], shape.spatial_shapes, *z[1:], implementation=name, interpret=True), *arrays
    )
    assert output.shape == (*grid[:3], 4)
    for gradient, array in zip(vjp(output), arrays, strict=True):
        np.testing.assert_array_equal(gradient, jnp.zeros_like(array))


@pytest.mark.parametrize("name", [None, "tensorcore", "gpu"])
def test_derivatives_that_there_are_not(name):
    """Second ones and those in forward mode, with a message."""
    inputs = problem(TINY)

    def output(value):
        return attend(inputs._replace(value=value), implementation=name, interpret=True).sum()

    with pytest.raises(NotImplementedError, match=r"second derivatives of ms_deform_attn: .*='reference'"):
        jax.eval_shape(jax.grad(lambda value: jax.grad(output)(value).sum()), inputs.value)
    if name is None:  # JAX's own message, at the end of the computation
        with pytest.raises(TypeError, match="forward-mode"):
            jax.jvp(output, (inputs.value,), (inputs.value,))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"value": np.zeros((4, 7, 6), np.float32)}, r"value must be \[b, s, h, d\].*\(4, 7, 6\)"),
        ({"value": np.zeros((4, 7, 2, 3), np.int32)}, "float32 or bfloat16, got .* in int32"),
        ({"spatial_shapes": ((3, 5), (2, 3))}, "value has 7 tokens, but .* make 21"),
        ({"locations": np.zeros((4, 3, 2, 2, 2), np.float32)}, r"sampling_locations must be \[b, q, h, l, p, 2\]"),
        ({"weights": np.zeros((4, 3, 2, 2, 4), np.float32)}, r"expected \(4, 3, 2, 2, 1\), got \(4, 3, 2, 2, 4\)"),
        ({"spatial_shapes": ((1, 7),)}, r"\(b, h, l\) = \(4, 2, 1\).* got \(4, 2, 2\)"),
        ({"spatial_shapes": ((-4, -5), (0, 3))}, r"at least one level, each of at least 1 x 1, got \(\(-4, -5\)"),
        ({"spatial_shapes": ((2.0, 3.5), (1, 1))}, r"static \(height, width\) pairs of whole numbers"),
        ({"spatial_shapes": ()}, "at least one level"),
        ({"weights": np.zeros((4, 3, 2, 2, 0)), "locations": np.zeros((4, 3, 2, 2, 0, 2))}, "at least one point"),
        ({"in_blocks": True}, r"value has 7 tokens, but spatial_shapes .*, in block order, make 256"),
        ({"implementation": "cuda"}, r"implementation='cuda' is unknown: expected one of \[.*'reference'"),
    ],
)
def test_errors(change, message):
    value, locations, weights = (np.asarray(z) for z in problem(TINY)[:3])
    inputs = {
        "value": value,
        "spatial_shapes": TINY.spatial_shapes,
        "locations": locations,
        "weights": weights,
    } | change
    with pytest.raises(ValueError, match=message):
        ms_deform_attn(
            inputs["value"],
            inputs["spatial_shapes"],
            inputs["locations"],
            inputs["weights"],
            implementation=inputs.get("implementation"),
            in_blocks=inputs.get("in_blocks", False),
        )
