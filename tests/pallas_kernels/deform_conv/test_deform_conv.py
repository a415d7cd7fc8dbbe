"""`deform_conv` against a NumPy loop, finite differences, torchvision and a convolution; its kernel; its errors."""

import dataclasses
import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from deform_conv_cases import CASES, Case, run_torchvision

from pallas_kernels import ms_deform_attn
from pallas_kernels.deform_conv import (
    best_implementation,
    deform_conv,
    offsets_from_channels,
    sampling_positions,
)

pytestmark = pytest.mark.usefixtures("short_loops")

NAMES = ("output", "grad_x", "grad_offsets", "grad_modulation", "grad_kernel")
KERNEL_CASES = {
    "stride_2": Case(size=(19, 23), channels=20, stride=2, spread=2.0, offset_groups=2),
    "dilation_2": Case(
        size=(9, 17), channels=16, padding=2, dilation=2, groups=2, spread=4.0, modulated=False, batch=1
    ),
}
"""Odd sizes, channels that are no multiple of 16, a map of less than a unit, points far outside."""


@functools.partial(jax.jit, static_argnums=(0, 1))
def convolve_and_vjp(implementation, case, inputs, cotangent):
    """Output and gradients, by name."""

    def convolve(*inputs):
        return deform_conv(*inputs, **case.options, implementation=implementation, interpret=True)

    output, vjp = jax.vjp(convolve, *inputs)
    return dict(zip(NAMES, (output, *vjp(cotangent.astype(output.dtype))), strict=True))


def assert_close(got, expected, tolerance, what=""):
    """Equal within a share of the largest number: outputs are sums, whose rounding errors go with their terms."""
    got, expected = np.asarray(got, np.float32), np.asarray(expected, np.float32)
    np.testing.assert_allclose(got, expected, rtol=0, atol=tolerance * max(np.abs(expected).max(), 1e-30), err_msg=what)


def convolve_loop(case, x, offsets, modulation, kernel):
    """The definition, one sample at a time, in float64."""
    (height, width), (h, w) = case.size, case.output_size
    output = np.zeros((case.batch, h, w, case.outputs))
    inputs, outputs = case.channels // case.groups, case.outputs // case.groups
    shared = case.channels // case.offset_groups
    for i, row, column, group, tap in np.ndindex(case.batch, h, w, case.offset_groups, case.k**2):
        tap_row, tap_column = divmod(tap, case.k)
        x_offset, y_offset = map(float, offsets[i, row, column, group, tap])
        left = column * case.stride - case.padding + tap_column * case.dilation + x_offset
        top = row * case.stride - case.padding + tap_row * case.dilation + y_offset
        factor = 1.0 if modulation is None else float(modulation[i, row, column, group, tap])
        sample = np.zeros(shared)
        for m, n in itertools.product(*((math.floor(z), math.floor(z) + 1) for z in (top, left))):
            if 0 <= m < height and 0 <= n < width:
                share = (1 - abs(top - m)) * (1 - abs(left - n))
                sample += share * factor * x[i, m, n, group * shared : (group + 1) * shared]
        for channel, value in enumerate(sample, group * shared):
            part, place = divmod(channel, inputs)
            span = slice(part * outputs, (part + 1) * outputs)
            output[i, row, column, span] += value * kernel[tap_row, tap_column, place, span]
    return output


@pytest.mark.parametrize("name", CASES)
def test_reference_equals_the_loop(name):
    inputs = CASES[name].inputs()
    output = deform_conv(*inputs, **CASES[name].options, implementation="reference")
    assert_close(output, convolve_loop(CASES[name], *inputs), 2e-6)


@pytest.mark.parametrize("modulated", [False, True])
def test_gradients_equal_finite_differences(modulated):
    """Of every input, in both kinds of groups."""
    case = Case((4, 5), 4, 4, padding=0, groups=2, offset_groups=2, modulated=modulated, spread=1.5, batch=1)
    inputs, cotangent = case.inputs(), case.cotangent()
    gradients = convolve_and_vjp("reference", case, inputs, cotangent)

    def loss(inputs):
        return (convolve_loop(case, *inputs) * cotangent).sum()

    for i, name in enumerate(NAMES[1:]):
        if inputs[i] is None:
            assert gradients[name] is None
            continue
        expected = np.zeros(inputs[i].shape)
        for place in np.ndindex(expected.shape):
            sums = []
            for sign in (1, -1):
                changed = [None if z is None else z.astype(np.float64) for z in inputs]
                changed[i][place] += sign * 1e-5
                sums.append(loss(changed))
            # Exact but for rounding: the output is linear in each input, in offsets between pixel centers.
            expected[place] = (sums[0] - sums[1]) / 2e-5
        assert_close(gradients[name], expected, 1e-5, name)


@pytest.fixture(scope="module")
def stored(data_dir):
    """What torchvision gave, by case."""
    return {name: dict(np.load(data_dir / "deform_conv" / f"{name}.npz")) for name in CASES}


@pytest.mark.parametrize("name", CASES)
def test_equals_torchvision(name, stored):
    """Stored outputs and gradients; float32 sums in another order."""
    arrays = stored[name]
    inputs = tuple(arrays.get(z) for z in ("x", "offsets", "modulation", "kernel"))
    for key, got in convolve_and_vjp("reference", CASES[name], inputs, arrays["cotangent"]).items():
        if got is not None:
            assert_close(got, arrays[key], 1e-5, key)


@pytest.mark.parity
@pytest.mark.parametrize("name", [*CASES, *KERNEL_CASES])
def test_equals_torchvision_live(name):
    pytest.importorskip("torchvision", reason="torchvision's op is compared with where it is installed")
    case = (CASES | KERNEL_CASES)[name]
    inputs, cotangent = case.inputs(seed=3), case.cotangent()
    expected = run_torchvision(case, inputs, cotangent)
    for key, got in convolve_and_vjp("reference", case, inputs, cotangent).items():
        if got is not None:
            assert_close(got, expected[key], 1e-5, key)


@pytest.mark.parametrize("name", KERNEL_CASES)
def test_kernel_equals_the_reference(name):
    """Forward and every gradient in float32: the same sums in another order."""
    case = KERNEL_CASES[name]
    inputs, cotangent = case.inputs(), case.cotangent()
    expected = convolve_and_vjp("reference", case, inputs, cotangent)
    for key, got in convolve_and_vjp("tensorcore", case, inputs, cotangent).items():
        if got is not None:
            assert_close(got, expected[key], 2e-6, key)


def test_kernel_in_bfloat16():
    """Bilinear weights and samples are rounded too, besides inputs and results: 2^-9 of each term."""
    case = KERNEL_CASES["stride_2"]
    x, offsets, modulation, kernel = case.inputs()
    inputs = (jnp.asarray(x, jnp.bfloat16), offsets, modulation, jnp.asarray(kernel, jnp.bfloat16))

    @functools.partial(jax.jit, static_argnums=0)
    def convolve(implementation, *inputs):
        return deform_conv(*inputs, **case.options, implementation=implementation, interpret=True)

    got = convolve("tensorcore", *inputs)
    assert got.dtype == jnp.bfloat16
    assert_close(got, convolve("reference", *inputs), 1e-2)


@pytest.mark.parametrize("implementation", ["reference", "tensorcore"])
def test_borders(implementation):
    """A 1x1 kernel on a row of three pixels; at a kink the gradient is that of the cell on the right."""
    positions = np.array([-1.0, -0.5, 0.0, 2.0, 2.5, 3.0, 1e6, -1e6], np.float32)
    case = Case((1, len(positions)), 16, 1, k=1, padding=0, batch=1)
    x = np.zeros((1, 1, len(positions), 16), np.float32)
    x[0, 0, :3, 0] = 2, 3, 5
    offsets = np.zeros((1, 1, len(positions), 1, 1, 2), np.float32)
    offsets[0, 0, :, 0, 0, 0] = positions - np.arange(len(positions))
    inputs = (x, offsets, np.ones(offsets.shape[:-1], np.float32), np.ones((1, 1, 16, 1), np.float32))
    got = convolve_and_vjp(implementation, case, inputs, np.ones((1, 1, len(positions), 1), np.float32))

    def expected(z):
        return np.interp(z, [-1, 0, 1, 2, 3], [0, 2, 3, 5, 0], left=0, right=0)

    np.testing.assert_allclose(got["output"][0, 0, :, 0], expected(positions), rtol=1e-6)
    # The step of 1e-3 is exact to 1e-4.
    right = (expected(positions + 1e-3) - expected(positions)) / 1e-3
    np.testing.assert_allclose(got["grad_offsets"][0, 0, :, 0, 0, 0], right, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("groups", [1, 2])
def test_without_offsets_it_is_a_convolution(groups):
    case = Case((7, 9), 8, 6, stride=2, dilation=2, padding=2, groups=groups, spread=0.0, modulated=False)
    x, offsets, _, kernel = case.inputs()
    expected = jax.lax.conv_general_dilated(
        x,
        kernel,
        (2, 2),
        [(2, 2)] * 2,
        rhs_dilation=(2, 2),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=groups,
        precision="highest",
    )
    assert_close(deform_conv(x, offsets, None, kernel, **case.options), expected, 1e-6)


def test_deformable_attention_with_one_point_is_a_deformable_1x1_convolution():
    """One level, one point, identity projections and weight 1: `docs/deformable_convolution.md`."""
    case = Case((5, 7), 4, 4, k=1, padding=0, modulated=False, spread=2.0)
    x, offsets, _, _ = case.inputs()
    height, width = case.size

    @jax.jit
    def both(x, offsets):
        convolved = deform_conv(x, offsets, None, jnp.eye(4)[None, None])
        locations = (sampling_positions(offsets, 1, 0, 1) + 0.5) / np.array([width, height])
        value, locations = x.reshape(2, -1, 1, 4), locations.reshape(2, -1, 1, 1, 1, 2)
        return convolved, ms_deform_attn(value, (case.size,), locations, jnp.ones((2, 35, 1, 1, 1)))

    convolved, attended = both(x, offsets)
    # Locations in 0-1 round the positions: to 2^-24 of the map.
    assert_close(attended.reshape(convolved.shape), convolved, 2e-6)


def test_channels_of_torchvision():
    """y before x, taps in order, groups outermost."""
    channels = np.arange(2 * 9 * 2)[None, None, None]
    offsets = offsets_from_channels(jnp.asarray(channels), 2)
    assert offsets.shape == (1, 1, 1, 2, 9, 2)
    np.testing.assert_array_equal(offsets[0, 0, 0, 1, 2], [2 * 11 + 1, 2 * 11])


@pytest.mark.parametrize("implementation", ["reference", "tensorcore"])
def test_sharded_equals_unsharded(implementation):
    """Over images; the only communication is the sum of the kernel's gradients."""
    case = Case((5, 6), 16, 3, offset_groups=1, batch=4)
    arguments = (case.inputs(), case.cotangent())
    expected = convolve_and_vjp("reference", case, *arguments)
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:4])
    with jax.set_mesh(mesh):
        images = jax.NamedSharding(mesh, jax.P("data"))
        (*arrays, kernel), cotangent = arguments
        inputs = (*jax.device_put(arrays, images), jax.device_put(kernel, jax.NamedSharding(mesh, jax.P())))
        run = jax.jit(convolve_and_vjp.__wrapped__, static_argnums=(0, 1))
        compiled = run.lower(implementation, case, inputs, jax.device_put(cotangent, images)).compile()
        got = compiled(inputs, jax.device_put(cotangent, images))
    for key, z in expected.items():
        assert_close(got[key], z, 2e-6, key)
        assert got[key].sharding.spec[:1] == (() if key == "grad_kernel" else ("data",))
    for collective in ("all-gather", "all-to-all", "collective-permute"):
        assert collective not in compiled.as_text()


def test_batch_that_does_not_divide():
    """Three images on four devices; without modulation, which then is no array to split."""
    case = Case((5, 6), 16, 3, batch=3, modulated=False)
    arguments = (case.inputs(), case.cotangent())
    expected = convolve_and_vjp("reference", case, *arguments)
    with jax.set_mesh(jax.make_mesh((4,), ("data",), devices=jax.devices()[:4])):
        got = jax.jit(convolve_and_vjp.__wrapped__, static_argnums=(0, 1))("reference", case, *arguments)
    for key, z in expected.items():
        assert_close(got[key], z, 2e-6, key)


def test_mesh_that_is_not_split():
    """A kernel never computes the same on several devices in silence."""
    case = Case((5, 6), 16, 3)
    with (
        jax.set_mesh(jax.make_mesh((4, 2), ("data", "model"))),
        pytest.raises(ValueError, match=r"deform_conv: the mesh .* has axes \['model'\]"),
    ):
        deform_conv(*case.inputs(), **case.options, implementation="tensorcore")


@pytest.mark.parametrize("implementation", ["reference", "tensorcore"])
@pytest.mark.parametrize("change", [{"batch": 0}, {"size": (1, 9), "padding": 0}], ids=["no image", "no output"])
def test_empty(implementation, change):
    case = dataclasses.replace(Case(), **change)
    got = convolve_and_vjp(implementation, case, case.inputs(), case.cotangent())
    assert got["output"].shape == case.cotangent().shape
    assert all(np.all(np.asarray(z) == 0) for z in got.values())


def test_what_none_stands_for(monkeypatch):
    """On a TPU the kernel, or the reference where the map is too large for it; a name that does not take it raises."""
    assert best_implementation((7, 9)) == "reference"
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    assert best_implementation((7, 9)) == "tensorcore"
    assert best_implementation((1, 9000)) == "reference"
    case = Case((1, 9000), 1, 1, k=1, padding=0, batch=1)
    with pytest.raises(ValueError, match=r"1126 columns of 8 pixels \(at most 1023\)"):
        deform_conv(*case.inputs(), implementation="tensorcore")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": np.zeros((2, 7, 9), np.float32)}, r"x must be \[b, H, W, c\] .*got \(2, 7, 9\) in float32"),
        ({"x": np.zeros((2, 7, 9, 8), np.int32)}, r"float32 or bfloat16, got .* in int32"),
        ({"kernel": np.zeros((3, 5, 8, 6))}, r"kernel must be \[k, k, c / groups, c_out\], got \(3, 5, 8, 6\)"),
        ({"groups": 2}, r"does not fit x with 8 channels and groups=2"),
        ({"kernel": np.zeros((3, 3, 4, 5)), "groups": 2}, "groups must divide c and c_out"),
        ({"stride": 2}, r"offsets must be .* = \[2, 4, 5, g, 9, 2\] .* got \(2, 7, 9, 1, 9, 2\)"),
        ({"stride": 0}, "stride=0 must be at least 1"),
        ({"offsets": np.zeros((2, 7, 9, 3, 9, 2))}, "have 3 groups, which do not divide 8 channels"),
        ({"modulation": np.zeros((2, 7, 9, 1, 8))}, r"expected \(2, 7, 9, 1, 9\), got \(2, 7, 9, 1, 8\)"),
        ({"implementation": "cuda"}, r"implementation='cuda' is unknown: expected one of \['reference'"),
    ],
)
def test_errors(change, message):
    names = ("x", "offsets", "modulation", "kernel")
    arguments = dict(zip(names, Case().inputs(), strict=True)) | Case().options | change
    with pytest.raises(ValueError, match=message):
        deform_conv(**arguments)
