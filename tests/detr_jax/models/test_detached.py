"""Where the gradient must not go: back through the boxes that a later layer, or the decoder, starts from."""

import jax
import jax.numpy as jnp
import pytest
import transformers_weights
from flax import nnx
from small_models import noise_maps

from detr_jax.config import BackboneConfig, DeformableDETRConfig
from detr_jax.models import ResNet, split

CONFIG = DeformableDETRConfig(
    backbone=BackboneConfig(depth=18),
    num_classes=3,
    hidden_dim=32,
    num_heads=2,
    encoder_layers=1,
    decoder_layers=2,
    ffn_dim=32,
    num_queries=6,
    num_levels=2,
    box_refinement=True,
    two_stage=True,
)


@pytest.fixture(scope="module")
def gradients():
    """Of the last decoder layer's outputs alone, with respect to each prediction head: [class_embed, bbox_embed]."""

    # Not the initial weights: box layers that start at zero would hide what lies before them.
    model = transformers_weights.load(CONFIG, transformers_weights.random_weights(CONFIG))
    graphdef, params, buffers = split(CONFIG, model)

    def loss(params):
        outputs = nnx.merge(graphdef, params, buffers)(jnp.zeros((2, 64, 64, 3)), jnp.array([[64, 64], [50, 64]]))
        return jnp.square(outputs["pred_boxes"] - 0.3).sum() + jnp.square(outputs["pred_logits"]).sum()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ResNet, "__call__", noise_maps)
        grads = jax.jit(jax.grad(loss))(params)
    return {
        name: [max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(head)) for head in grads[name].values()]
        for name in ("class_embed", "bbox_embed")
    }


def test_a_refined_box_is_a_constant_for_the_next_layer(gradients):
    first, last, _ = gradients["bbox_embed"]
    assert first == 0 and last > 0


def test_a_proposal_is_a_constant_for_the_decoder(gradients):
    """Its head, the last one, learns from the encoder's loss alone; so does the class head that ranks proposals."""
    assert gradients["bbox_embed"][2] == 0
    first, last, proposals = gradients["class_embed"]
    assert first == proposals == 0 and last > 0
