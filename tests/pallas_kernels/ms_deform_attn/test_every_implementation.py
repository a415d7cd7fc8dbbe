"""Every implementation against the reference: each shape, type and edge, forward and each gradient."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest
from ms_deform_attn_cases import assert_close, run

from pallas_kernels.ms_deform_attn.shapes import SMALL, problem

pytestmark = pytest.mark.usefixtures("short_loops")

EDGES = SMALL["odd_decoder"]
"""Sizes of its maps are powers of two: (x + 0.5) / size is exact, so that a point can lie exactly on a pixel center."""


@pytest.mark.parametrize("name", SMALL)
def test_float32(implementation, name):
    """The same sums in another order."""
    inputs = problem(SMALL[name])
    assert_close(run(implementation, SMALL[name], inputs), run("reference", SMALL[name], inputs), 1e-5)


def test_bfloat16(implementation):
    """Kernels may round the bilinear weights to bfloat16 too (2^-9 of each term), besides the results."""
    shape = SMALL["odd_encoder"]
    inputs = problem(shape, jnp.bfloat16)
    assert_close(run(implementation, shape, inputs), run("reference", shape, inputs), 1e-2)


def kinks(shape):
    """A problem whose queries have all pairs of kinks and borders: pixel centers, edges, just outside, far outside."""
    inputs = problem(shape)
    locations = np.array(inputs.sampling_locations)
    for level, (height, width) in enumerate(shape.spatial_shapes):
        places = [np.array([-1, -0.5, 0, 1, n - 1.5, n - 1, n - 0.5, n, n + 3]) for n in (width, height)]
        x, y = np.array(list(itertools.product(*places)), np.float32).T
        locations[:, : len(x), :, level, 0, 0] = ((x + 0.5) / width)[:, None]
        locations[:, : len(x), :, level, 0, 1] = ((y + 0.5) / height)[:, None]
    return inputs._replace(sampling_locations=jnp.asarray(locations))


def test_kinks_and_borders(implementation):
    """Where the gradient jumps, it is that of the cell on the right and below, in every implementation."""
    inputs = kinks(EDGES)
    assert_close(run(implementation, EDGES, inputs), run("reference", EDGES, inputs), 1e-5)


@pytest.mark.parametrize("place", [-1e9, 1e9, 3e38, -np.inf, np.nan])
def test_points_far_outside_count_as_zero(implementation, place):
    """Whole queries, and one point of others: as if they lay a little outside of the map."""
    inputs = problem(EDGES)
    bad = np.zeros(inputs.sampling_locations.shape, bool)
    bad[:, ::5, :, :, :, 0] = True
    bad[:, 1::5, :, 0, 1, 1] = True
    far, near = (jnp.where(bad, z, inputs.sampling_locations) for z in (place, -1.0))
    got = run(implementation, EDGES, inputs._replace(sampling_locations=far))
    assert_close(got, run("reference", EDGES, inputs._replace(sampling_locations=near)), 1e-5)
    assert not got["output"][:, ::5].any()
    assert not got["grad_locations"][:, ::5].any()


def test_all_weight_on_one_point(implementation):
    """At a pixel's center, by all queries: the output is the pixel, and it alone has a gradient."""
    inputs = problem(EDGES)
    row, column, token = 1, 2, 1 * 16 + 2
    weights = np.zeros(inputs.attention_weights.shape, np.float32)
    weights[..., 0, 1] = 1
    locations = np.array(inputs.sampling_locations)
    locations[..., 0, 1, :] = (column + 0.5) / 16, (row + 0.5) / 4
    got = run(implementation, EDGES, inputs._replace(attention_weights=weights, sampling_locations=locations))
    value, gradient = np.asarray(inputs.value), np.asarray(inputs.gradient)
    np.testing.assert_allclose(got["output"], np.broadcast_to(value[:, None, token], got["output"].shape), rtol=1e-6)
    np.testing.assert_allclose(got["grad_value"][:, token], gradient.sum(1), rtol=0, atol=2e-5)  # of 131 terms
    assert not np.delete(got["grad_value"], token, axis=1).any()


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_weight_that_is_not_finite_stays_in_its_query(implementation, bad):
    """The other queries' outputs and gradients do not change; this one's output says so."""
    shape = SMALL["odd_encoder"]
    inputs = problem(shape)
    weights = np.array(inputs.attention_weights)
    query = 5 * 19 + 9  # in the middle of the first tile, whose lanes other tiles use after it
    weights[0, query, 1, 0, 0] = bad
    got = run(implementation, shape, inputs._replace(attention_weights=jnp.asarray(weights)))
    expected = run(implementation, shape, inputs)
    assert not np.isfinite(got["output"][0, query, 1]).any()
    for name in ("output", "grad_locations", "grad_weights"):
        for z in (got, expected):
            z[name][0, query, 1] = 0
        np.testing.assert_array_equal(got[name], expected[name], err_msg=name)
    # Values that the query's tile does not see: another image, another head.
    np.testing.assert_array_equal(got["grad_value"][1], expected["grad_value"][1])
    np.testing.assert_array_equal(got["grad_value"][:, :, 0], expected["grad_value"][:, :, 0])
