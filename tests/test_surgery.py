"""Surgery: what is kept is exact, outputs that must stay do; every operated model trains and survives a checkpoint."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import transformers_weights
from flax import nnx

import detr_jax
from detr_jax import surgery, training
from detr_jax.categories import Categories
from detr_jax.config import (
    BackboneConfig,
    Config,
    DeformableDETRConfig,
    DETRConfig,
    LossConfig,
    TuneConfig,
)
from detr_jax.detector import Loaded
from detr_jax.models import ResNet, split
from detr_jax.transplant import tensors

CELLS = Categories((4, 5, 9), ("RBC", "WBC", "platelet"))
SMALL = {
    "backbone": BackboneConfig(depth=18, norm="group", freeze_at=0),
    "num_classes": 3,
    "hidden_dim": 32,
    "num_heads": 2,
    "encoder_layers": 1,
    "decoder_layers": 2,
    "ffn_dim": 32,
    "num_queries": 6,
    "dropout": 0.0,
    "tune": TuneConfig(freeze=("backbone",)),
}
MULTI = DeformableDETRConfig(**SMALL, num_levels=2, encoder_points=2, decoder_points=2)
SINGLE = dataclasses.replace(MULTI, num_levels=1)
REFINED = dataclasses.replace(MULTI, box_refinement=True)
TWO_STAGE = dataclasses.replace(REFINED, two_stage=True)
DETR = DETRConfig(**SMALL)
SIZES = np.array([[64, 64], [50, 64]])
IMAGES = np.random.default_rng(0).normal(size=(2, 64, 64, 3)).astype(np.float32)


@pytest.fixture(autouse=True)
def fixed_maps(request, monkeypatch):
    """Noise for the backbone's maps, so that it need not be compiled; its surgery has its own test, without this."""

    def maps(self, images, sizes):
        rng = np.random.default_rng(1)
        shapes = [(len(images), images.shape[1] // s, images.shape[2] // s) for s in (4, 8, 16, 32)]
        return [rng.normal(size=(*n, c)).astype(np.float32) for n, c in zip(shapes, self.channels, strict=True)]

    if "backbone" not in request.node.name:
        monkeypatch.setattr(ResNet, "__call__", maps)


def loaded(config, **changes) -> Loaded:
    """A detector with random weights, none of them zero."""
    config = dataclasses.replace(config, **changes)
    model = transformers_weights.load(config, transformers_weights.random_weights(config))
    model = nnx.merge(*jax.tree.map(jnp.asarray, nnx.split(model)))
    classification = "softmax" if isinstance(config, DETRConfig) else "focal"
    return Loaded(config, model, CELLS, classification, 64, 96, "random weights")


def run(detector: Loaded) -> dict:
    """Its outputs on two images."""
    graphdef, state = nnx.split(detector.model)
    return jax.device_get(jax.jit(lambda state: nnx.merge(graphdef, state)(IMAGES, SIZES))(state))


def assert_close(actual, expected):
    """Equal but for float32 noise: XLA may sum a matrix product of other sizes in another order."""
    np.testing.assert_allclose(actual, expected, atol=1e-4, rtol=1e-4)


def assert_trains(detector: Loaded, tmp_path, *, moves: tuple[str, ...], stays: tuple[str, ...] = ("backbone",)):
    """Three steps: a finite loss, what should move does, what is frozen does not; then a checkpoint and back."""
    loss = LossConfig.detr() if detector.classification == "softmax" else LossConfig()
    config = Config(detector.config, dataclasses.replace(loss, matcher="scipy"))  # compiles faster than "device"
    graphdef, params, buffers = split(config.model, detector.model)
    optimizer = optax.sgd(1e-2)
    batch = {
        "size": jnp.asarray(SIZES),
        "boxes_cxcywh": jnp.full((2, 2, 4), 0.4),
        "labels": jnp.zeros((2, 2), int),
        "num_boxes": jnp.array([2, 1]),
    }

    @jax.jit
    def step(params, buffers, opt_state):
        def loss(params):
            return training.loss_fn(params, buffers, batch, graphdef, config, pixels=IMAGES, key=None)[0]

        value, grads = jax.value_and_grad(loss)(params)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return jax.tree.map(jnp.add, params, updates), opt_state, value

    trained, opt_state = params, optimizer.init(params)
    for _ in range(3):
        trained, opt_state, value = step(trained, buffers, opt_state)
        assert np.isfinite(value)
    before, model = tensors(detector.model), nnx.merge(graphdef, trained, buffers)
    after = tensors(model)
    for name in moves:
        assert all((after[p] != before[p]).any() for p in after if ".".join(map(str, p)).startswith(name)), name
        assert any(".".join(map(str, p)).startswith(name) for p in after), name
    for path in after:
        if path[0] in stays:
            np.testing.assert_array_equal(after[path], before[path], err_msg=str(path))

    dataclasses.replace(detector, model=model).save(tmp_path / "operated")
    again = detr_jax.load(tmp_path / "operated")
    assert (again.config, again.categories) == (detector.config, detector.categories)
    restored = tensors(again.model)
    assert restored.keys() == after.keys()
    for path in after:
        np.testing.assert_array_equal(restored[path], after[path], err_msg=str(path))


@pytest.mark.parametrize("config", [MULTI, TWO_STAGE, DETR], ids=["multi", "two_stage", "detr"])
def test_classes_are_kept_by_name(config, tmp_path):
    old = loaded(config)
    before = {path: value.copy() for path, value in tensors(old.model).items()}
    new = surgery.change_classes(
        old, Categories((1, 2, 3, 4), ("dog", "platelet", "erythrocyte", "cat")), same_as={"erythrocyte": "RBC"}
    )
    assert new.config.num_classes == 4 and new.categories.names[0] == "dog"
    was, now = run(old), run(new)
    # The classes kept keep their logits, the boxes stay, and so does "no object".
    was_labels, now_labels = ([2, 0, 3], [1, 2, 4]) if config is DETR else ([2, 0], [1, 2])
    assert_close(now["pred_logits"][..., now_labels], was["pred_logits"][..., was_labels])
    assert_close(now["pred_boxes"], was["pred_boxes"])
    if config is TWO_STAGE:
        assert_close(now["enc_outputs"]["pred_logits"][..., 0], was["enc_outputs"]["pred_logits"][..., 0])
    assert "classes kept: platelet, erythrocyte" in str(new.changes) and "classes gone: WBC" in str(new.changes)
    assert all(name.startswith("class_embed") for name in new.changes.changed) and not new.changes.new
    for path, value in tensors(old.model).items():  # the old one is as it was
        np.testing.assert_array_equal(value, before[path])
    assert_trains(new, tmp_path, moves=("class_embed",))


def test_names_that_no_class_has():
    with pytest.raises(ValueError, match=r"'RCB' is none of the old classes: RBC, WBC, platelet"):
        surgery.change_classes(loaded(MULTI), CELLS, same_as={"WBC": "RCB"})


def test_coco_without_gaps_from_the_official_numbering():
    old = dataclasses.replace(loaded(SINGLE, num_classes=91), categories=Categories.coco_sparse())
    new = surgery.change_classes(
        old, Categories.contiguous({i: n for i, n in enumerate(old.categories.names) if n != "N/A"})
    )
    assert new.config.num_classes == 80 and "classes new: none" in str(new.changes)
    was, now = tensors(old.model), tensors(new.model)
    for path in [("class_embed", 0, "kernel"), ("class_embed", 0, "bias")]:
        np.testing.assert_array_equal(now[path], was[path][..., list(new.categories.ids)])


@pytest.mark.parametrize("config", [MULTI, DETR], ids=["deformable", "detr"])
def test_queries(config, tmp_path):
    old = loaded(config)
    for layer in old.model.decoder:  # without it, a query's outputs do not depend on the others
        layer.self_attn.out.kernel[...] = jnp.zeros_like(layer.self_attn.out.kernel[...])
    more = surgery.change_queries(old, 8)
    assert more.changes.changed == ("query_embed",)
    was, now = run(old), run(more)
    assert now["pred_logits"].shape[1] == 8
    assert_close(now["pred_logits"][:, :6], was["pred_logits"])
    assert_close(now["pred_boxes"][:, :6], was["pred_boxes"])
    fewer = surgery.change_queries(old, 2, keep=[4, 1])
    assert_close(run(fewer)["pred_boxes"], was["pred_boxes"][:, [4, 1]])
    with pytest.raises(ValueError, match="expected at most 2 of the queries 0 to 5"):
        surgery.change_queries(old, 2, keep=[6])
    assert_trains(more, tmp_path, moves=("query_embed",))


def test_queries_of_two_stage_are_the_best_proposals():
    old = loaded(TWO_STAGE)
    new = surgery.change_queries(old, 4)
    assert len(new.changes.kept) == len(tensors(old.model)) and not new.changes.changed
    was, now = run(old)["enc_outputs"], run(new)["enc_outputs"]
    assert_close(now["pred_logits"], was["pred_logits"])


@pytest.mark.parametrize("config", [MULTI, REFINED, TWO_STAGE, DETR], ids=["multi", "refined", "two_stage", "detr"])
def test_dropping_the_last_decoder_layer_gives_the_auxiliary_outputs(config, tmp_path):
    old = loaded(config)
    short = surgery.change_layers(old, decoder=[0])
    was, now = run(old), run(short)
    assert_close(now["pred_logits"], was["aux_outputs"]["pred_logits"][0])
    assert_close(now["pred_boxes"], was["aux_outputs"]["pred_boxes"][0])
    if config is TWO_STAGE:
        assert_close(now["enc_outputs"]["pred_boxes"], was["enc_outputs"]["pred_boxes"])
    dropped = {name.split(".")[0] for name in short.changes.dropped}
    assert dropped == {"decoder"} | ({"class_embed", "bbox_embed"} if config in (REFINED, TWO_STAGE) else set())
    # Adding one, and a second encoder layer, leaves the first as it is.
    long = surgery.change_layers(short, decoder=[0, None], encoder=[0, 0])
    assert long.config.decoder_layers == 2 and long.config.encoder_layers == 2
    if config is REFINED:
        assert_trains(long, tmp_path, moves=("decoder.1.ffn", "bbox_embed.1", "encoder.1"))


def test_a_new_refined_layer_starts_with_the_boxes_before_it():
    old = loaded(REFINED)
    new = surgery.change_layers(old, decoder=[0, 1, None])
    was, now = run(old), run(new)
    assert_close(now["aux_outputs"]["pred_boxes"][1], was["pred_boxes"])
    assert_close(now["pred_boxes"], was["pred_boxes"])


def test_a_new_layer_of_a_pre_norm_model_changes_nothing(tmp_path):
    old = loaded(DETR, pre_norm=True)
    new = surgery.change_layers(old, encoder=[0, None], decoder=[0, 1, None])
    was, now = run(old), run(new)
    assert_close(now["pred_logits"], was["pred_logits"])
    assert_close(now["pred_boxes"], was["pred_boxes"])
    assert_trains(new, tmp_path, moves=("encoder.1.ffn.linear2", "decoder.2.ffn.linear2"))


def test_layers_that_are_not_there():
    with pytest.raises(ValueError, match=r"decoder: expected layers 0 to 1 or None, got \[0, 2\]"):
        surgery.change_layers(loaded(MULTI), decoder=[0, 2])
    with pytest.raises(ValueError, match=r"model\.decoder_layers=0 must be at least 1"):
        surgery.change_layers(loaded(MULTI), decoder=[])


@pytest.mark.parametrize("levels", [(1, 2), (1, 4), (2, 3), (4, 5)])
def test_more_levels_keep_the_old_ones_in_their_place(levels):
    old = loaded(MULTI, num_levels=levels[0])
    was = run(old)
    for logit, tolerance in ((-1e9, 1e-4), (-5.0, 0.2)):  # -1e9: no attention at all; -5: below 1 % a sample
        new = surgery.upgrade(old, num_levels=levels[1], new_level_logit=logit)
        np.testing.assert_allclose(run(new)["pred_logits"], was["pred_logits"], atol=tolerance)
    rows = [name for name in new.changes.changed if "level_embed" in name]
    assert rows and not new.changes.dropped


def test_single_scale_becomes_two_stage_step_by_step(tmp_path):
    single = loaded(SINGLE)
    multi = surgery.upgrade(single, num_levels=2)
    refined = surgery.upgrade(multi, box_refinement=True)
    two_stage = surgery.upgrade(refined, two_stage=True)
    assert two_stage.config == TWO_STAGE
    was, now = run(multi), run(refined)
    assert_close(now["aux_outputs"]["pred_logits"], was["aux_outputs"]["pred_logits"])
    assert_close(now["aux_outputs"]["pred_boxes"], was["aux_outputs"]["pred_boxes"])
    assert_close(
        now["pred_boxes"], now["aux_outputs"]["pred_boxes"][0]
    )  # later layers start with the first one's boxes
    last = run(two_stage)
    assert_close(last["aux_outputs"]["pred_boxes"][0], last["pred_boxes"])
    proposed = last["enc_outputs"]["pred_boxes"]  # the cells' boxes, 0.05 and 0.1 wide; 1 where they are out
    inside = proposed[..., 2] < 0.99
    assert_close(proposed[inside][:, 2:].round(3) % 0.05 % 0.05, 0 * proposed[inside][:, 2:])
    dropped = {name.split(".")[0] for name in two_stage.changes.dropped}
    assert dropped == {"query_embed", "reference_points", "bbox_embed"}  # the first box head's last layer
    assert {"proposals", "bbox_embed"} == {name.split(".")[0] for name in two_stage.changes.new}
    assert_trains(two_stage, tmp_path, moves=("proposals.output.kernel", "bbox_embed.2", "level_embed"))
    assert surgery.upgrade(single, num_levels=2, two_stage=True).config == TWO_STAGE


def test_upgrades_that_are_none():
    with pytest.raises(ValueError, match="num_levels=1 is less than 2: use prune_levels"):
        surgery.upgrade(loaded(MULTI), num_levels=1)
    with pytest.raises(ValueError, match="upgrade is for Deformable DETR"):
        surgery.upgrade(loaded(DETR), two_stage=True)


def test_backbones(tmp_path):
    old = loaded(MULTI, tune=TuneConfig())
    deeper = surgery.swap_backbone(old, BackboneConfig(depth=34, norm="group", freeze_at=0))
    assert {name.split(".")[0] for name in deeper.changes.new} == {"backbone"}  # ResNet-34 is as wide as ResNet-18
    wider = surgery.swap_backbone(old, BackboneConfig(depth=50, freeze_at=2))
    new = {name.rsplit(".", 1)[0] for name in wider.changes.new if not name.startswith("backbone")}
    assert new == {"input_proj.0.conv", "input_proj.1.conv"} - {"input_proj.0.norm"}
    same = surgery.swap_backbone(old, dataclasses.replace(old.config.backbone, dilation=True))
    assert len(same.changes.kept) == len(tensors(old.model))
    donor = loaded(dataclasses.replace(DETR, tune=TuneConfig()))
    taken = surgery.swap_backbone(deeper, donor)
    theirs, ours = tensors(donor.model), tensors(taken.model)
    for path in (path for path in theirs if path[0] == "backbone"):
        np.testing.assert_array_equal(ours[path], theirs[path])
    assert_close(run(taken)["pred_logits"], run(dataclasses.replace(old, model=taken.model))["pred_logits"])
    assert_trains(taken, tmp_path, moves=("backbone.stem_conv",), stays=())


def test_freezing_is_followed_by_training_and_checkpoints(tmp_path):
    old = loaded(MULTI)
    new = surgery.freeze(old, "backbone", "encoder", "decoder.0", "query_embed")
    assert new.changes.trained[1] < new.changes.trained[0] and len(new.changes.kept) == len(tensors(old.model))
    assert_trains(new, tmp_path, moves=("decoder.1.ffn",), stays=("backbone", "encoder", "query_embed"))
    path = ("decoder", 0, "ffn", "linear1", "kernel")
    np.testing.assert_array_equal(tensors(detr_jax.load(tmp_path / "operated").model)[path], tensors(old.model)[path])
    assert surgery.freeze(new).changes.trained[1] > new.changes.trained[0]
    with pytest.raises(ValueError, match="'decodr' is on no path of this model"):
        surgery.freeze(old, "decodr")
    with pytest.raises(ValueError, match="nothing is left to train"):
        surgery.freeze(surgery.change_queries(old, 2), *{str(path[0]) for path in tensors(old.model)})


@pytest.mark.parametrize("config", [TWO_STAGE, DETR], ids=["two_stage", "detr"])
def test_lora_starts_as_the_identity_trains_alone_and_merges(config, tmp_path):
    old = loaded(config)
    new = surgery.add_lora(old, rank=2)
    assert all(".lora." in name for name in new.changes.new) and new.changes.new
    was = run(old)
    np.testing.assert_array_equal(run(new)["pred_logits"], was["pred_logits"])
    frozen = tuple({str(path[0]) for path in tensors(old.model)} - {"class_embed", "bbox_embed", "encoder", "decoder"})
    assert_trains(new, tmp_path, moves=("class_embed", "decoder.0.self_attn.query.lora.lora_b"), stays=frozen)
    tuned = detr_jax.load(tmp_path / "operated")
    before, after = tensors(old.model), tensors(tuned.model)
    for path in before:  # kernels under adapters too
        if path[0] in ("encoder", "decoder"):
            np.testing.assert_array_equal(after[path], before[path])
    merged = surgery.merge_lora(tuned)
    assert merged.config == dataclasses.replace(config, tune=TuneConfig())
    outputs = run(tuned)
    assert np.abs(outputs["pred_logits"] - was["pred_logits"]).max() > 1e-2
    assert_close(run(merged)["pred_logits"], outputs["pred_logits"])
    with pytest.raises(ValueError, match="merge_lora: the model has no adapters"):
        surgery.merge_lora(merged)
    with pytest.raises(ValueError, match="the model has adapters of rank 2"):
        surgery.add_lora(tuned)
    with pytest.raises(ValueError, match=r"model\.tune\.lora_on: 'qeury' is on no path"):
        surgery.add_lora(old, on=("qeury",))
