"""What padding does to an image's detections: nothing with `mask_padding`, a little with the official semantics."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from transformers_weights import load, random_weights

from detr_jax.config import BackboneConfig, DeformableDETRConfig, DETRConfig

pytestmark = pytest.mark.usefixtures("short_resnet")

SIZE = (90, 118)


def detector(config, mask_padding: bool):
    """A small detector with random weights: with the initial ones, biases and box layers of zero hide the padding."""
    config = dataclasses.replace(config, backbone=dataclasses.replace(config.backbone, mask_padding=mask_padding))
    return load(config, random_weights(config))


def detect(model, bucket: tuple[int, int], companion: tuple[int, int] | None = None) -> dict:
    """Outputs for one image of `SIZE` on that bucket, beside another image of the batch if asked."""
    image = jax.random.normal(jax.random.key(0), (*SIZE, 3))
    sizes = [SIZE] + ([companion] if companion else [])
    images = np.zeros((len(sizes), *bucket, 3), np.float32)
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
    "two_stage_group_norm": DeformableDETRConfig(
        backbone=BackboneConfig(depth=18, norm="group"), **SMALL, num_levels=5, box_refinement=True, two_stage=True
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_masked_padding_gives_the_same_boxes_in_any_bucket(name):
    model = detector(MODELS[name], mask_padding=True)
    expected = detect(model, (96, 128))
    for bucket, companion in (((101, 187), None), ((160, 160), (150, 70))):
        got = detect(model, bucket, companion)
        for key, value in expected.items():
            # Sums over buckets of other sizes are added in another order: float32 noise, 5.5e-6 was seen. Unmasked
            # padding moves boxes by more than 0.01 (below).
            np.testing.assert_allclose(got[key], value, rtol=0, atol=2e-5, err_msg=f"{key} on {bucket}")


@pytest.mark.parametrize("name", ["detr", "deformable"])
def test_official_padding_moves_the_boxes(name):
    """By some hundredths of the image and some tenths of a logit, as the docstrings of the models say."""
    model = detector(MODELS[name], mask_padding=False)
    expected, got = detect(model, (96, 128)), detect(model, (128, 192))
    assert 0.01 < np.abs(got["pred_boxes"] - expected["pred_boxes"]).max() < 0.2
    assert 0.2 < np.abs(got["pred_logits"] - expected["pred_logits"]).max() < 2
