"""A model gives the same outputs and gradients with every implementation of deformable attention."""

import dataclasses
import functools
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import nnx
from small_models import noise_maps
from transformers_weights import load, random_weights

from detr_jax.models import ResNet, attention, deformable_detr
from detr_jax.models import feed_forward as ours
from detr_jax.models.lora import LoRALinear
from pallas_kernels import ms_deform_attn
from pallas_kernels.feed_forward import feed_forward
from pallas_kernels.ms_deform_attn import IMPLEMENTATIONS


@functools.cache
def outputs_and_gradients(implementation):
    config = dataclasses.replace(tiny.config().model, num_queries=5, decoder_layers=1, implementation=implementation)
    # Not the initial weights: those have points on pixel centers, where gradients have a kink.
    graphdef, state = nnx.split(load(config, random_weights(config)))
    images = jnp.asarray(np.random.default_rng(0).standard_normal((2, 64, 96, 3)), jnp.float32)
    sizes = jnp.array([[64, 96], [50, 64]])

    @jax.jit
    def run(state):
        def loss(state):
            outputs = nnx.merge(graphdef, state)(images, sizes)
            terms = [jnp.sum(jnp.sin(x)) for x in jax.tree.leaves(outputs)]
            return sum(terms), outputs

        return jax.value_and_grad(loss, has_aux=True)(state)

    with (
        mock.patch.object(ResNet, "__call__", noise_maps),
        mock.patch.object(attention, "ms_deform_attn", functools.partial(ms_deform_attn, interpret=True)),
        mock.patch.object(ours, "feed_forward", functools.partial(feed_forward, interpret=True)),
    ):
        (_, outputs), gradients = run(state)
    return outputs, gradients


@pytest.mark.parametrize(
    "implementation", [name for name in IMPLEMENTATIONS if name not in ("reference", "sparsecore")]
)
def test_model_is_the_same(implementation):
    """float32 in another order of addition, through an encoder and a decoder layer, two-stage.

    Some gradients are zero but for rounding (a key's bias under softmax): they are sums of terms of order 1, and 1.8e-5
    was seen.
    """
    expected = jax.tree.leaves(outputs_and_gradients("reference"))
    got = jax.tree.leaves(outputs_and_gradients(implementation))
    for x, y in zip(got, expected, strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=max(1e-4 * float(np.abs(y).max(initial=0)), 4e-5))


@pytest.mark.parametrize("adapters", [False, True])
def test_second_half_of_an_encoder_layer_in_one_kernel(adapters):
    """With dropout: the kernel drops what the modules drop. Adapters on linear layers keep the modules."""
    config = dataclasses.replace(tiny.config().model, dropout=0.3, ffn_dim=48)
    layer = deformable_detr.EncoderLayer(config, rngs=nnx.Rngs(0))
    layer.norm1.bias[...] += 0.5
    layer.norm2.scale[...] *= jnp.arange(config.hidden_dim)
    if adapters:
        layer.ffn.linear1 = LoRALinear(layer.ffn.linear1, 2, rngs=nnx.Rngs(1))
        layer.ffn.linear1.lora.lora_b[...] += 1
    shapes = ((5, 6), (3, 3), (2, 2))[: config.num_levels]
    order = attention.token_order("tensorcore", shapes, config.encoder_points)
    random = np.random.default_rng(0)
    x, position = (jnp.asarray(random.standard_normal((2, order.length, config.hidden_dim)), jnp.float32) for _ in "ab")
    tokens = attention.Tokens(x, jnp.ones(x.shape[:2], bool), shapes, order)
    reference = jnp.full((*x.shape[:2], len(shapes), 2), 0.4)

    def run(layer):
        return layer(tokens, position, reference, nnx.Rngs(dropout=3)).features

    with mock.patch.object(ours, "other_axes", lambda axes: ["another"]):
        expected = run(layer)
    with mock.patch.object(
        ours, "feed_forward", mock.Mock(side_effect=functools.partial(feed_forward, interpret=True))
    ) as kernel:
        got = run(layer)
    assert kernel.call_count == (not adapters)
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-5 * float(jnp.abs(expected).max()))
