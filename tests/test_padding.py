"""What padding does to an image's detections: nothing with `mask_padding`, a little with the official semantics."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from detr_jax.config import BackboneConfig, DeformableDETRConfig, DETRConfig
from detr_jax.models import build

SIZE = (90, 118)


def detector(config, mask_padding: bool):
    """A small detector: biases and box layers away from their initial zeros, so that padding can matter."""
    config = dataclasses.replace(config, backbone=dataclasses.replace(config.backbone, mask_padding=mask_padding))
    model = build(config, rngs=nnx.Rngs(0))
    keys = iter(jax.random.split(jax.random.key(1), 1000))

    def vary(path, leaf):
        small = 0.05 * jax.random.normal(next(keys), leaf.shape)
        return leaf + small if path[-1].key in ("bias", "mean") or "bbox_embed" in str(path) else leaf

    graphdef, state = nnx.split(model)
    return nnx.merge(graphdef, jax.tree_util.tree_map_with_path(vary, nnx.to_pure_dict(state)))


def detect(model, canvas: tuple[int, int], companion: tuple[int, int] | None = None) -> dict:
    """Outputs for one image of `SIZE` on that canvas, beside another image of the batch if asked."""
    image = jax.random.normal(jax.random.key(0), (*SIZE, 3))
    sizes = [SIZE] + ([companion] if companion else [])
    images = np.zeros((len(sizes), *canvas, 3), np.float32)
    images[0, : SIZE[0], : SIZE[1]] = image
    if companion:
        images[1, : companion[0], : companion[1]] = 1.0
    outputs = jax.jit(lambda x, s: model(x, s))(jnp.asarray(images), jnp.array(sizes))
    return {name: np.asarray(outputs[name][0]) for name in ("pred_logits", "pred_boxes")}


SMALL = {
    "hidden_dim": 32,
    "num_heads": 4,
    "encoder_layers": 1,
    "decoder_layers": 2,
    "ffn_dim": 64,
    "num_queries": 12,
    "num_classes": 5,
}
MODELS = {
    "detr": DETRConfig(backbone=BackboneConfig(depth=18), **SMALL),
    "deformable": DeformableDETRConfig(backbone=BackboneConfig(depth=18), **SMALL),
    "group_norm": DeformableDETRConfig(backbone=BackboneConfig(depth=18, norm="group"), **SMALL),
    "two_stage": DeformableDETRConfig(
        backbone=BackboneConfig(depth=18), **SMALL, num_levels=5, box_refinement=True, two_stage=True
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_masked_padding_gives_the_same_boxes_in_any_canvas(name):
    model = detector(MODELS[name], mask_padding=True)
    expected = detect(model, (96, 128))
    for canvas, companion in (((101, 187), None), ((160, 160), (150, 70))):
        got = detect(model, canvas, companion)
        for key, value in expected.items():
            # Sums over canvases of other sizes are added in another order: float32 noise, 1e-6 was seen.
            np.testing.assert_allclose(got[key], value, rtol=0, atol=5e-6, err_msg=f"{key} on {canvas}")


@pytest.mark.parametrize("name", ["detr", "deformable", "group_norm"])
def test_official_padding_moves_the_boxes(name):
    """By some thousandths of the image and some tenths of a logit, as the docstrings of the models say."""
    model = detector(MODELS[name], mask_padding=False)
    expected, got = detect(model, (96, 128)), detect(model, (128, 192))
    assert 1e-3 < np.abs(got["pred_boxes"] - expected["pred_boxes"]).max() < 1e-2
    assert 0.05 < np.abs(got["pred_logits"] - expected["pred_logits"]).max() < 0.5
