"""Forward agreement with HF `transformers` on random weights and a padded batch.

The ordinary run compares small models with stored outputs (`tests/data/reference/make.py`); `make parity` runs the
published sizes side by side with PyTorch.
"""

import jax
import numpy as np
import pytest
import transformers_weights
from flax import nnx
from small_models import SMALL_MODELS, padded_batch

from detr_jax.config import DeformableDETRConfig, DETRConfig

PUBLISHED = {
    "detr": DETRConfig.r50(),
    "detr_dc5": DETRConfig.r50_dc5(),
    "deformable_single_scale": DeformableDETRConfig.r50_single_scale(),
    "deformable_single_scale_dc5": DeformableDETRConfig.r50_single_scale_dc5(),
    "deformable": DeformableDETRConfig.r50(),
    "deformable_refine": DeformableDETRConfig.r50_refine(),
    "deformable_two_stage": DeformableDETRConfig.r50_two_stage(),
}


def our_outputs(config, images, sizes) -> dict[str, np.ndarray]:
    """Logits and boxes of all decoder layers, stacked, and of the proposals."""
    model = transformers_weights.load(config, transformers_weights.random_weights(config))
    outputs = jax.tree.map(np.asarray, nnx.jit(lambda model: model(images, sizes))(model))
    aux, encoder = outputs["aux_outputs"], outputs.get("enc_outputs", {})
    return {
        "logits": np.concatenate([aux["pred_logits"], outputs["pred_logits"][None]]),
        "boxes": np.concatenate([aux["pred_boxes"], outputs["pred_boxes"][None]]),
        **{name.replace("pred", "enc"): value for name, value in encoder.items()},
    }


def assert_agree(ours, theirs, tolerance):
    assert ours.keys() == theirs.keys()
    if "enc_logits" in ours:
        # Proposals of nearly equal score may swap places between the two: compare the queries by proposed token.
        ours, theirs = (sort_queries(outputs) for outputs in (ours, theirs))
    for name, expected in theirs.items():
        np.testing.assert_allclose(ours[name], expected, rtol=0, atol=tolerance, err_msg=name)


def sort_queries(outputs):
    num_queries = outputs["logits"].shape[2]
    top = np.argsort(-outputs["enc_logits"][..., 0], axis=-1, kind="stable")[:, :num_queries]
    unusable = (np.take_along_axis(outputs["enc_boxes"], top[..., None], 1) == 1).all(-1)
    order = np.argsort(np.where(unusable, -1, top), axis=-1, kind="stable")[None, :, :, None]
    return outputs | {name: np.take_along_axis(outputs[name], order, 2) for name in ("logits", "boxes")}


@pytest.mark.parametrize("name", SMALL_MODELS)
def test_agrees_with_stored_outputs_of_transformers(name, data_dir):
    config = SMALL_MODELS[name]
    with np.load(data_dir / "reference" / f"{name}.npz") as stored:
        theirs = dict(stored)
    # Float32 noise of numbers of order 1 through some thirty layers: 1e-5 was seen.
    assert_agree(our_outputs(config, *padded_batch(100, 135)), theirs, 3e-5)


@pytest.mark.parity
@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes_agree_with_transformers(name):
    import transformers_oracle

    config = PUBLISHED[name]
    images, sizes = padded_batch(256, 333)
    model = transformers_oracle.build(config)
    transformers_oracle.load(model, config, transformers_weights.random_weights(config))
    # Float32 noise of numbers of order 1 through some eighty layers: 1.6e-5 was seen.
    assert_agree(our_outputs(config, images, sizes), transformers_oracle.run(model, images, sizes), 5e-5)


@pytest.mark.parity
def test_stored_outputs_are_those_of_transformers(data_dir):
    import transformers_oracle

    for name, config in SMALL_MODELS.items():
        model = transformers_oracle.build(config)
        transformers_oracle.load(model, config, transformers_weights.random_weights(config))
        with np.load(data_dir / "reference" / f"{name}.npz") as stored:
            for key, value in transformers_oracle.run(model, *padded_batch(100, 135)).items():
                # Float32 noise of PyTorch itself: another processor sums in another order; 1.2e-5 was seen.
                np.testing.assert_allclose(value, stored[key], rtol=0, atol=3e-5, err_msg=f"{name} {key}")
