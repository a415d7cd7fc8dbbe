"""Models with noise on every parameter, as jitted functions that also hand out intermediate values."""

import functools

import jax
from flax import nnx

from detr_jax.config import BackboneConfig, DETRConfig
from detr_jax.models import build

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
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    leaves = [x + scale * jax.random.normal(key, x.shape) for x, key in zip(leaves, keys, strict=True)]
    return nnx.merge(graphdef, jax.tree.unflatten(tree, leaves), rest)


@functools.cache
def functions(config):
    """The model's state, and it as jitted functions of that and its inputs: plain, and with what was captured."""
    graphdef = None

    def init():
        nonlocal graphdef
        graphdef, state = nnx.split(noisy(build(config, rngs=nnx.Rngs(0))))
        return state

    state = jax.jit(init)()

    def plain(state, images, sizes):
        return nnx.merge(graphdef, state)(images, sizes)

    def captured(state, images, sizes):
        outputs, found = nnx.capture(nnx.merge(graphdef, state), nnx.Intermediate)(images, sizes)
        return outputs, nnx.to_pure_dict(found)

    return state, plain, captured
