"""The order of a decoder's queries on TPUs: who comes where, and that the outputs do not change."""

import dataclasses
from types import SimpleNamespace

import dino_cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import nnx
from transformers_weights import load, random_weights

from detr_jax.denoising import Noise, denoising_queries, num_slots
from detr_jax.models import deformable_detr, dino
from detr_jax.models.query_order import arrange, nearby_first, restore
from pallas_kernels.ms_deform_attn import bench
from pallas_kernels.ms_deform_attn.order import z_order
from pallas_kernels.ms_deform_attn.shapes import Shape

ON_A_TPU = SimpleNamespace(order=True)


def test_z_order():
    """The first bits decide: quarters of the image row by row, then their quarters; x before y."""
    corners = np.array([[0, 0], [1, 0], [0, 1], [1, 1]]) * 0.5
    points = (corners[:, None] + corners / 2).reshape(-1, 2)  # sixteen cells, in their order
    assert (np.diff(z_order(points)) > 0).all()
    np.testing.assert_array_equal(z_order(jnp.asarray(points)), z_order(points))
    np.testing.assert_array_equal(z_order(np.array([[0.0, 0.0], [1.0, 1.0], [-3.0, 7.0]])), [0, 1023, 682])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_queries_there_and_back(dtype):
    """Sorted along the curve, equal places as they were, and back, all bit by bit."""
    random = np.random.default_rng(0)
    reference = jnp.asarray(random.uniform(size=(3, 40, 4)), jnp.float32).at[1, 7:20].set(0.3)
    x = jnp.asarray(random.standard_normal((3, 40, 6)) * 10.0 ** random.integers(-20, 20, (3, 40, 6)), dtype)
    order = nearby_first(None, ON_A_TPU, reference)
    expected = np.argsort(np.asarray(z_order(reference)), axis=1, kind="stable")
    np.testing.assert_array_equal(arrange(order, x), np.take_along_axis(np.asarray(x), expected[..., None], 1))
    layers = jnp.stack([arrange(order, x), arrange(order, -x)])
    np.testing.assert_array_equal(restore(order, layers), jnp.stack([x, -x]))


def test_nothing_is_moved_elsewhere():
    """Without the TPU's kernel, and under `nnx.capture`, whose figures show the queries in the model's order."""
    reference = jnp.zeros((1, 2, 4))
    assert nearby_first(None, SimpleNamespace(order=None), reference) is None
    assert nearby_first(SimpleNamespace(__captures__=()), ON_A_TPU, reference) is None
    assert arrange(None, reference) is reference and restore(None, reference) is reference


def test_tiles_visit_fewer_units(monkeypatch):
    """Three tiles of 300 queries see the whole image each; in order, about half of it."""
    shape = Shape(1, ((64, 64), (32, 32)), 300, heads=1, points=2)
    ordered = bench.visits(shape, 2.0).mean()
    monkeypatch.setattr(bench, "z_order", lambda points: np.zeros(len(points)))
    assert ordered < 0.65 * bench.visits(shape, 2.0).mean()


def outputs_and_gradients(config, size, denoising):
    graphdef, state = nnx.split(load(config, random_weights(config)))
    images = jnp.asarray(np.random.default_rng(0).standard_normal((2, *size, 3)), jnp.float32)
    sizes = jnp.array([size, (size[0] - 9, size[1] - 20)])

    @jax.jit
    def run(state):
        def loss(state):
            outputs = nnx.merge(graphdef, state)(images, sizes, **denoising)
            weighted = [jnp.sum(jnp.sin(x + jnp.arange(x.shape[-2])[:, None])) for x in jax.tree.leaves(outputs)]
            return sum(weighted), outputs

        return jax.grad(loss, has_aux=True)(state)

    return run(state)


@pytest.mark.parametrize("model", ["single-stage", "dino"])
def test_outputs_and_gradients_stay_the_same(model, monkeypatch):
    """The order of additions in self-attention changes: float32 noise of numbers of order 1, and of their gradients.

    `test_implementations.py` does it with two-stage, and with the kernels.
    """
    denoising = {}
    if model == "single-stage":
        config = dataclasses.replace(tiny.config().model, num_queries=9, box_refinement=True, two_stage=False)
    else:
        config = dino_cases.SMALL
        noise = Noise(**dino_cases.noise(num_slots(config, 4)))
        denoising = {"denoising": denoising_queries(dino_cases.targets((3, 2)), noise, config)}
    expected = outputs_and_gradients(config, (64, 96), denoising)
    orders = []

    def as_on_a_tpu(model, memory, reference):
        orders.append(nearby_first(model, ON_A_TPU, reference))
        return orders[-1]

    monkeypatch.setattr(deformable_detr, "nearby_first", as_on_a_tpu)
    monkeypatch.setattr(dino, "nearby_first", as_on_a_tpu)
    got = outputs_and_gradients(config, (64, 96), denoising)
    assert len(orders) == 1
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=max(1e-4 * float(np.abs(y).max(initial=0)), 4e-5))
