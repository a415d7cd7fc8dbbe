"""What the models hand to `nnx.capture`: the values that they compute with, and nothing when nobody asks."""

import dataclasses
import functools
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from captured_models import DETR, functions, noisy
from flax import nnx

from detr_jax.models import attention, deformable_detr, detr

pytestmark = pytest.mark.usefixtures("short_resnet")

DEFORMABLE = tiny.config().model
MODELS = [DEFORMABLE, dataclasses.replace(DEFORMABLE, box_refinement=False, two_stage=False), DETR]
NAMES = ["two-stage", "one-stage", "detr"]


def inputs():
    images = jax.random.normal(jax.random.key(0), (2, 64, 96, 3))
    return images, jnp.array([[64, 80], [48, 96]])


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


@pytest.mark.parametrize("box", [2, 4])
def test_deformable_attention_against_numpy(box):
    b, q, h, levels, p, c = 2, 5, 4, 2, 3, 32
    shapes = [(4, 6), (2, 3)]
    layer = noisy(attention.MSDeformAttn(c, h, levels, p, rngs=nnx.Rngs(0)))
    rng = np.random.default_rng(0)
    query, tokens = rng.normal(size=(b, q, c)).astype("f"), rng.normal(size=(b, 30, c)).astype("f")
    reference = rng.uniform(0.2, 0.8, (b, q, levels, box)).astype("f")
    _, found = nnx.capture(layer, nnx.Intermediate)(
        query, reference, attention.Tokens(jnp.asarray(tokens), jnp.ones((b, 30), bool), tuple(shapes))
    )

    def project(linear):
        return query.astype(float) @ np.asarray(linear.kernel[...], float) + np.asarray(linear.bias[...], float)

    weights = softmax(project(layer.attention_weights).reshape(b, q, h, -1)).reshape(b, q, h, levels, p)
    offsets = project(layer.sampling_offsets).reshape(b, q, h, levels, p, 2)
    locations = np.empty_like(offsets)
    for level, (height, width) in enumerate(shapes):
        center = reference[:, :, None, level, None, :2]
        size = reference[:, :, None, level, None, 2:] / p / 2 if box == 4 else 1 / np.array([width, height])
        locations[:, :, :, level] = center + offsets[:, :, :, level] * size
    # float32 against float64, numbers up to some units: observed differences below 2e-6.
    np.testing.assert_allclose(found["attention_weights"][...], weights, atol=1e-5)
    np.testing.assert_allclose(found["sampling_locations"][...], locations, atol=1e-5)
    np.testing.assert_array_equal(found["reference_points"][...], reference)


def test_softmax_attention_against_numpy():
    layer = noisy(attention.MultiHeadAttention(32, 4, 0.0, rngs=nnx.Rngs(0)))
    rng = np.random.default_rng(0)
    query, key = rng.normal(size=(2, 5, 32)).astype("f"), rng.normal(size=(2, 7, 32)).astype("f")
    valid = np.arange(7) < np.array([[7], [4]])
    _, found = nnx.capture(layer, nnx.Intermediate)(query, key, key, key_valid=valid)

    def heads(linear, x):
        y = x.astype(float) @ np.asarray(linear.kernel[...], float) + np.asarray(linear.bias[...], float)
        return y.reshape(*y.shape[:2], 4, 8)

    logits = np.einsum("bqhd,bshd->bhqs", heads(layer.query, query), heads(layer.key, key)) / np.sqrt(8)
    weights = softmax(np.where(valid[:, None, None], logits, -np.inf))
    np.testing.assert_allclose(found["attention_weights"][...], weights, atol=1e-5)  # as above
    assert (found["attention_weights"][...][1, :, :, 4:] == 0).all()


@functools.cache
def results(config):
    """Outputs, outputs with capturing, what was captured, and what `ms_deform_attn` got: (locations, weights)."""
    state, plain, captured = functions(config)
    original = attention.ms_deform_attn

    @jax.jit
    def run(*args):
        got = []

        def spy(value, shapes, locations, weights, **rest):
            got.append((locations, weights))
            return original(value, shapes, locations, weights, **rest)

        with mock.patch.object(attention, "ms_deform_attn", spy):
            return *captured(*args), got

    return jax.jit(plain)(state, *inputs()), *run(state, *inputs())


@pytest.mark.parametrize("config", MODELS[:2], ids=NAMES[:2])
def test_captured_is_what_the_operation_got(config):
    _, outputs, found, got = results(config)
    layers = [found["encoder"][0]["self_attn"], *(found["decoder"][i]["cross_attn"] for i in range(2))]
    assert len(got) == len(layers)
    for layer, (locations, weights) in zip(layers, got, strict=True):
        np.testing.assert_array_equal(layer["sampling_locations"], locations)
        np.testing.assert_array_equal(layer["attention_weights"], weights)
    assert [v.shape for v in found["valid_maps"]] == [(2, 4, 6), (2, 2, 3)]
    ratios = found["valid_ratios"]
    # (x, y) of 80 x 64 and 96 x 48 pixels on the bucket of 96 x 64, to float32's precision.
    np.testing.assert_allclose(ratios[:, 0], [[5 / 6, 1], [1, 3 / 4]], rtol=1e-6)
    if config.box_refinement:  # a layer starts from the boxes of the one before
        reference = layers[2]["reference_points"] / np.tile(ratios, 2)[:, None]
        boxes = outputs["aux_outputs"]["pred_boxes"][0]
        np.testing.assert_allclose(reference, np.repeat(boxes[:, :, None], 2, 2), atol=1e-6)  # float32: * ratio / ratio
    if config.two_stage:
        top, scores = found["proposals"]["top_tokens"], outputs["enc_outputs"]["pred_logits"][..., 0]
        assert top.shape == (2, config.num_queries)
        chosen = np.take_along_axis(np.asarray(scores), np.asarray(top), 1)
        np.testing.assert_array_equal(chosen, -np.sort(-np.asarray(scores), 1)[:, : config.num_queries])


@pytest.mark.parametrize("config", MODELS, ids=NAMES)
def test_capturing_changes_nothing(config):
    outputs, again, found, _ = results(config)
    assert found["decoder"][1]["cross_attn"]["attention_weights"].shape[0] == 2
    # Equal arithmetic; XLA may fuse two programs differently: float32 noise in logits of order 1, 6e-6 was seen.
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=0, atol=2e-5), outputs, again)


@pytest.mark.parametrize("config", MODELS, ids=NAMES)
def test_off_is_free(config, monkeypatch):
    """The program that is traced is, letter for letter, that of models which capture nothing."""
    state, plain, _ = functions(config)
    program = str(jax.make_jaxpr(plain)(state, *inputs()))
    calls = []
    for module in (attention, deformable_detr, detr):
        monkeypatch.setattr(module, "capture", lambda module, name, value: calls.append(name))
    assert program == str(jax.make_jaxpr(lambda *args: plain(*args))(state, *inputs()))
    assert "attention_weights" in calls  # the second program was indeed traced without


def layer_and_inputs():
    rng = np.random.default_rng(0)
    query, tokens = rng.normal(size=(2, 5, 32)).astype("f"), rng.normal(size=(2, 30, 32)).astype("f")
    reference = rng.uniform(0.2, 0.8, (2, 5, 2, 2)).astype("f")
    layer = noisy(attention.MSDeformAttn(32, 4, 2, 3, rngs=nnx.Rngs(0)))
    return layer, query, (reference, attention.Tokens(jnp.asarray(tokens), jnp.ones((2, 30), bool), ((4, 6), (2, 3))))


def test_nothing_stays_on_the_model():
    layer, query, rest = layer_and_inputs()
    before = nnx.split(layer)[0]
    nnx.capture(layer, nnx.Intermediate)(query, *rest)
    assert nnx.split(layer)[0] == before
    layer(query, *rest)
    assert nnx.split(layer)[0] == before


def test_gradients_are_the_same():
    layer, query, rest = layer_and_inputs()
    graphdef, state = nnx.split(layer)  # `nnx.capture` wants a module that was made under the same transformation

    def plain(query):
        return (nnx.merge(graphdef, state)(query, *rest) ** 2).sum()

    def captured(query):
        return (nnx.capture(nnx.merge(graphdef, state), nnx.Intermediate)(query, *rest)[0] ** 2).sum()

    gradient = jax.grad(plain)(query)
    assert np.abs(gradient).max() > 0
    np.testing.assert_array_equal(gradient, jax.grad(captured)(query))
