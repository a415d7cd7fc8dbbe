"""Models with random parameters, as functions that also hand out intermediate values."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from transformers_weights import load, random_weights

from detr_jax.config import BackboneConfig, DETRConfig

DETR = DETRConfig(
    backbone=BackboneConfig(depth=18, norm="group", freeze_at=0),
    hidden_dim=32,
    num_heads=4,
    encoder_layers=1,
    decoder_layers=2,
    ffn_dim=64,
    num_queries=10,
)


def noisy(model, scale=0.1):
    """Adds noise to every parameter: the initial sampling offsets and attention weights hardly depend on the input."""
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)
    rng = np.random.default_rng(1)  # in NumPy: nothing to compile
    noise = jax.tree.map(
        lambda x: jnp.asarray(np.asarray(x) + scale * rng.standard_normal(x.shape, np.float32)), params
    )
    return nnx.merge(graphdef, noise, rest)


@functools.cache
def functions(config):
    """A model's state, and it as functions of that and its inputs: plain, and with what was captured."""
    graphdef, state = nnx.split(load(config, random_weights(config)))
    state = jax.tree.map(jnp.asarray, state)

    def plain(state, images, sizes):
        return nnx.merge(graphdef, state)(images, sizes)

    def captured(state, images, sizes):
        outputs, found = nnx.capture(nnx.merge(graphdef, state), nnx.Intermediate)(images, sizes)
        return outputs, nnx.to_pure_dict(found)

    return state, plain, captured
