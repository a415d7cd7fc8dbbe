"""What the official code means: classification by the model, padding, learning rates, heads that start as one."""

import dataclasses

import jax
import numpy as np
import pytest
import small_models
from flax import nnx

import detr_jax
from detr_jax import cli
from detr_jax.categories import Categories
from detr_jax.checkpoints import convert, store
from detr_jax.config import Config, DeformableDETRConfig, DETRConfig, DINOConfig, LossConfig
from detr_jax.errors import UserError
from detr_jax.losses import set_prediction_loss
from detr_jax.models import build, build_abstract
from detr_jax.train_step import lr_group

SMALL = small_models.SMALL


def test_the_loss_must_fit_the_model():
    with pytest.raises(UserError, match=r"loss\.classification: got 'focal', but .*DETRConfig.*LossConfig\.detr\(\)"):
        Config(model=DETRConfig())
    with pytest.raises(UserError, match=r"got 'softmax', but .*DeformableDETRConfig are for 'focal'"):
        Config(model=DeformableDETRConfig(), loss=LossConfig.detr())
    Config(model=DETRConfig(), loss=LossConfig.detr())
    Config(model=DINOConfig(), loss=LossConfig.dino())


@pytest.mark.parametrize("two_stage", [False, True])
def test_refined_heads_start_as_one(two_stage):
    config = DeformableDETRConfig(**SMALL, num_levels=1, box_refinement=True, two_stage=two_stage)

    def heads():  # of the whole model, whose other parameters are not computed
        model = build(config, rngs=nnx.Rngs(0))
        return [[nnx.to_pure_dict(nnx.state(h)) for h in heads] for heads in (model.class_embed, model.bbox_embed)]

    class_embed, bbox_embed = jax.jit(heads)()
    assert len(class_embed) == len(bbox_embed) == 2 + two_stage
    biases = [head["layers"][2].pop("bias").tolist() for head in bbox_embed]
    for first, *others in (class_embed, bbox_embed):
        for other in others:
            jax.tree.map(np.testing.assert_array_equal, first, other)
    start = [0, 0, 0, 0] if two_stage else [0, 0, -2, -2]
    assert biases == [start, *[[0, 0, 0, 0]] * (len(biases) - 1)]


def test_learned_positions_learn_as_the_backbone():
    """There they are `backbone.1.row_embed`, and main.py tells the groups apart by "backbone" in the name."""
    model = build_abstract(DETRConfig(**SMALL, position="learned"))
    groups = {path: lr_group(path) for path, _ in nnx.to_flat_state(nnx.state(model))}
    assert groups["position", "row_embed"] == groups["position", "col_embed"] == "backbone"
    assert {group for path, group in groups.items() if path[0] not in ("position", "backbone")} == {"base"}


def test_proposals_are_supervised_without_auxiliary_losses():
    rng = np.random.default_rng(0)
    layer = {"pred_logits": rng.normal(size=(1, 5, 3)), "pred_boxes": rng.uniform(0.2, 0.8, (1, 5, 4))}
    outputs = {**layer, "enc_outputs": {name: x[:, :4] for name, x in layer.items()}}
    targets = {"boxes_cxcywh": np.full((1, 1, 4), 0.5), "labels": np.zeros((1, 1), int), "num_boxes": np.ones(1, int)}
    config = LossConfig(aux_loss=False)
    total, terms = jax.jit(set_prediction_loss, static_argnums=2)(outputs, targets, config)
    weights = {"loss_ce": 2, "loss_bbox": 5, "loss_giou": 2}
    expected = sum(w * (terms[name] + terms[f"{name}_enc"]) for name, w in weights.items())
    np.testing.assert_allclose(total, expected, rtol=1e-6)


@pytest.fixture(scope="module")
def dc5_file(tmp_path_factory):
    """A DC5 detector under the official names, with statistics of BatchNorm that are not 0 and 1."""
    backbone = dataclasses.replace(SMALL["backbone"], dilation=True)
    config = DETRConfig(**{**SMALL, "backbone": backbone, "encoder_layers": 1, "decoder_layers": 1})
    model = build(config, rngs=nnx.Rngs(0))
    rng = np.random.default_rng(0)
    for path, leaf in nnx.to_flat_state(nnx.state(model)):
        if path[-1] in ("mean", "bias") and "backbone" in path:
            leaf[...] = jax.numpy.asarray(rng.normal(0, 0.3, leaf.shape).astype(np.float32))
    path = tmp_path_factory.mktemp("dc5") / "dc5.safetensors"
    convert.save(path, model, config, Categories.guess(5))
    return path


def test_mask_padding_is_set_on_loading(dc5_file, tmp_path):
    """On, an image in any bucket gives what it gives alone, without padding: the official result at batch 1."""
    image, sizes = np.zeros((1, 64, 96, 3), np.float32), np.array([[48, 80]], np.int32)
    image[:, :48, :80] = np.random.default_rng(0).standard_normal((48, 80, 3))
    official, masked = detr_jax.load(dc5_file), detr_jax.load(dc5_file, mask_padding=True)
    assert masked.config.backbone.mask_padding and not official.config.backbone.mask_padding
    assert "padding masked, as asked for" in masked.report
    run = nnx.jit(lambda model, image, sizes: model(image, sizes)["pred_boxes"])
    alone = run(official.model, image[:, :48, :80], sizes)
    # float32: sums over other numbers of zeros are added up in another order
    np.testing.assert_allclose(run(masked.model, image, sizes), alone, atol=2e-6)
    moved = np.abs(run(official.model, image, sizes) - alone).max()
    assert moved > 1e-4, moved


def test_the_programs_hand_mask_padding_on(dc5_file, tmp_path, monkeypatch):
    cli.main(["convert", str(dc5_file), str(tmp_path / "ours"), "--mask-padding", "True"])
    saved = store.read_metadata(str(tmp_path / "ours"))
    assert saved["config"]["model"]["backbone"]["mask_padding"]
    options, _ = cli.parse_eval(["--checkpoint", str(tmp_path / "ours"), "--mask-padding", "False"])
    assert options.mask_padding is False
    given = []
    monkeypatch.setattr("detr_jax.detector.load", lambda path, **options: given.append(options))
    with pytest.raises(AttributeError):
        detr_jax.Detector.from_pretrained(dc5_file, mask_padding=True, verbose=False)
    assert given == [{"mask_padding": True}]
