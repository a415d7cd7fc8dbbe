"""Surgery: what is kept is exact, outputs that must stay do; every operated model trains and survives a checkpoint."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import transformers_weights
from flax import nnx
from small_models import noise_maps

import detr_jax
from detr_jax import cli, surgery, train_step
from detr_jax.categories import Categories
from detr_jax.checkpoints import store
from detr_jax.checkpoints.load import Loaded, initialize_from
from detr_jax.config import (
    BackboneConfig,
    Config,
    DeformableDETRConfig,
    DETRConfig,
    DINOConfig,
    LossConfig,
    TuneConfig,
    model_from_dict,
)
from detr_jax.models import ResNet, build_abstract, split
from detr_jax.models.resnet import BLOCKS
from detr_jax.surgery.transplant import tensors

CELLS = Categories((4, 5, 9), ("RBC", "WBC", "platelet"))
SMALL = {
    "backbone": BackboneConfig(depth=18, norm="group", freeze_at=0),
    "num_classes": 3,
    "hidden_dim": 32,
    "num_heads": 2,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "ffn_dim": 32,
    "num_queries": 6,
    "dropout": 0.0,
    "tune": TuneConfig(freeze=("backbone",)),
}
MULTI = DeformableDETRConfig(**SMALL, num_levels=2, encoder_points=2, decoder_points=2)
SINGLE = dataclasses.replace(MULTI, num_levels=1)
REFINED = dataclasses.replace(MULTI, box_refinement=True, decoder_layers=2)
TWO_STAGE = dataclasses.replace(REFINED, two_stage=True)
DETR = DETRConfig(**SMALL)
DINO = DINOConfig(
    **SMALL | {"decoder_layers": 2}, num_levels=2, encoder_points=2, decoder_points=2, denoising_queries=2
)
SIZES = np.array([[64, 64], [50, 64]])
IMAGES = np.random.default_rng(0).normal(size=(2, 64, 64, 3)).astype(np.float32)


pytestmark = pytest.mark.usefixtures("short_resnet", "short_resnet_34_and_50")


@pytest.fixture(scope="module")
def short_resnet_34_and_50():
    """One block more than the short ResNet-18, as what they are exchanged for."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(BLOCKS, 34, (1, 1, 2, 1))
        patch.setitem(BLOCKS, 50, (1, 1, 2, 1))
        yield


@pytest.fixture(autouse=True)
def fixed_maps(request, monkeypatch):
    """Noise for the backbone's maps, so that it need not be compiled; its surgery has its own test, without this."""
    if "backbone" not in request.node.name:
        monkeypatch.setattr(ResNet, "__call__", noise_maps)


@functools.cache
def random_model(config):
    """Graph and weights of a model, none of them zero."""
    graphdef, state = nnx.split(transformers_weights.load(config, transformers_weights.random_weights(config)))
    return graphdef, jax.tree.map(jnp.asarray, state)


def loaded(config, **changes) -> Loaded:
    """A detector with random weights."""
    config = dataclasses.replace(config, **changes)
    classification = "softmax" if isinstance(config, DETRConfig) else "focal"
    graphdef, state = random_model(config)
    model = nnx.merge(graphdef, jax.tree.map(lambda x: x, state))
    return Loaded(config, model, CELLS, classification, 64, 96, "random weights")


@functools.cache
def compiled(config):
    """A model's outputs, compiled once for all models of one architecture."""
    graphdef = nnx.split(build_abstract(config))[0]
    return jax.jit(lambda state: nnx.merge(graphdef, state)(IMAGES, SIZES))


def run(detector: Loaded) -> dict:
    """Its outputs on two images."""
    config = dataclasses.replace(detector.config, tune=dataclasses.replace(detector.config.tune, freeze=()))
    return jax.device_get(compiled(config)(nnx.to_pure_dict(nnx.state(detector.model))))


@functools.cache
def compiled_step(config, loss):
    """A step of plain gradient descent, compiled once for all models of an architecture (with SciPy matching)."""
    config = Config(config, dataclasses.replace(loss, matcher="scipy"))
    graphdef = split(config.model, build_abstract(config.model))[0]
    batch = {
        "size": jnp.asarray(SIZES),
        "boxes_cxcywh": jnp.full((2, 2, 4), 0.4),
        "labels": jnp.zeros((2, 2), int),
        "num_boxes": jnp.array([2, 1]),
    }

    @jax.jit
    def step(params, buffers):
        def loss(params):
            return train_step.loss_fn(params, buffers, batch, graphdef, config, pixels=IMAGES, key=None)[0]

        value, grads = jax.value_and_grad(loss)(params)
        return jax.tree.map(lambda p, g: p - 1e-2 * g, params, grads), value

    return graphdef, step


def assert_close(actual, expected):
    """Equal but for float32 noise: XLA may sum a matrix product of other sizes in another order."""
    np.testing.assert_allclose(actual, expected, atol=1e-4, rtol=1e-4)


def assert_trains(detector: Loaded, tmp_path, *, moves: tuple[str, ...], stays: tuple[str, ...] = ("backbone",)):
    """Three steps: a finite loss, what should move does, what is frozen does not; then a checkpoint and back."""
    loss = LossConfig.detr() if detector.classification == "softmax" else LossConfig()
    graphdef, step = compiled_step(detector.config, loss)
    _, trained, buffers = split(detector.config, detector.model)
    for _ in range(3):
        trained, value = step(trained, buffers)
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


def noise(number):
    return [np.random.default_rng(i).integers(0, 256, (48, 64, 3), np.uint8) for i in range(number)]


# Each ends with the same architecture, so that its step is compiled once.
OPERATIONS = {
    "change_classes": (lambda: surgery.change_classes(of_five_classes(), CELLS), ("class_embed",)),
    "change_queries": (lambda: surgery.change_queries(loaded(MULTI, num_queries=4), 6), ("query_embed",)),
    "add_layers": (
        lambda: surgery.change_layers(loaded(MULTI, encoder_layers=2), encoder=[1], decoder=[None]),
        ("encoder.0.ffn", "decoder.0.ffn.linear2"),
    ),
    "upgrade": (lambda: surgery.upgrade(loaded(SINGLE), num_levels=2), ("level_embed", "input_proj.0.conv.kernel")),
    "prune_levels": (
        lambda: surgery.prune_levels(loaded(MULTI, num_levels=3), 2),
        ("level_embed", "input_proj.0.conv.kernel"),
    ),
    "prune_points": (
        lambda: surgery.prune_points(loaded(MULTI, decoder_points=3), decoder=2, images=noise(1)),
        ("decoder.0.cross_attn.sampling_offsets",),
    ),
    "soup": (lambda: surgery.soup([loaded(MULTI), loaded(MULTI)]), ("decoder.0.ffn",)),
    "merge_lora": (
        lambda: surgery.freeze(surgery.merge_lora(surgery.add_lora(loaded(MULTI), 2)), "backbone"),
        ("decoder.0.self_attn.value",),
    ),
}


def of_five_classes() -> Loaded:
    categories = Categories((1, 2, 3, 4, 5), ("cat", "platelet", "dog", "RBC", "fox"))
    return dataclasses.replace(loaded(MULTI, num_classes=5), categories=categories)


@pytest.mark.parametrize("name", OPERATIONS)
def test_operated_models_train_and_survive_a_checkpoint(name, tmp_path):
    operate, moves = OPERATIONS[name]
    new = operate()
    assert new.config == MULTI
    assert_trains(new, tmp_path, moves=moves)


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
    if config is DETR:
        assert_trains(new, tmp_path, moves=("class_embed",))


def test_classes_of_dino():
    """A new class starts unlikely, so that it ranks no proposal; the embedded labels follow their classes."""
    old = loaded(DINO)
    new = surgery.change_classes(old, Categories((1, 2, 3, 4), ("dog", "platelet", "RBC", "WBC")))
    was, now = run(old), run(new)
    assert_close(now["pred_logits"][..., 1:], was["pred_logits"][..., [2, 0, 1]])
    assert_close(now["pred_boxes"], was["pred_boxes"])
    was_rows, now_rows = (np.asarray(detector.model.label_embed[...]) for detector in (old, new))
    np.testing.assert_array_equal(now_rows[1:], was_rows[[2, 0, 1, 3]])


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
def test_queries(config):
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


def test_queries_of_two_stage_are_the_best_proposals():
    old = loaded(TWO_STAGE)
    new = surgery.change_queries(old, 4)
    assert len(new.changes.kept) == len(tensors(old.model)) and not new.changes.changed
    was, now = run(old)["enc_outputs"], run(new)["enc_outputs"]
    assert_close(now["pred_logits"], was["pred_logits"])


@pytest.mark.parametrize(
    "config", [MULTI, REFINED, TWO_STAGE, DETR, DINO], ids=["multi", "refined", "two_stage", "detr", "dino"]
)
def test_dropping_the_last_decoder_layer_gives_the_auxiliary_outputs(config):
    old = loaded(config, decoder_layers=2)
    short = surgery.change_layers(old, decoder=[0])
    was, now = run(old), run(short)
    assert_close(now["pred_logits"], was["aux_outputs"]["pred_logits"][0])
    assert_close(now["pred_boxes"], was["aux_outputs"]["pred_boxes"][0])
    if config is TWO_STAGE:
        assert_close(now["enc_outputs"]["pred_boxes"], was["enc_outputs"]["pred_boxes"])
    dropped = {name.split(".")[0] for name in short.changes.dropped}
    assert dropped == {"decoder"} | ({"class_embed", "bbox_embed"} if config in (REFINED, TWO_STAGE) else set())
    # Adding one again leaves the first as it is.
    long = surgery.change_layers(short, decoder=[0, None])
    kept = run(long)["aux_outputs"]
    assert_close(kept["pred_logits"][0], now["pred_logits"])
    assert_close(kept["pred_boxes"][0], now["pred_boxes"])


def test_dino_trains_after_surgery_and_with_adapters(tmp_path):
    old = loaded(DINO, num_levels=3, num_queries=4)
    new = surgery.change_queries(surgery.prune_levels(old, 2), 6)
    assert new.config == DINO and "query_embed" in new.changes.changed
    assert_trains(new, tmp_path, moves=("query_embed", "query_position", "proposals", "bbox_embed", "decoder.1.ffn"))
    tuned = surgery.add_lora(new, 2)
    assert_close(run(tuned)["pred_boxes"], run(new)["pred_boxes"])
    merged = surgery.merge_lora(tuned)
    assert_close(run(merged)["pred_boxes"], run(new)["pred_boxes"])


def test_dino_with_heads_of_its_own_layers():
    old = loaded(DINO, shared_heads=False)
    new = surgery.change_layers(old, decoder=[1])
    kept = [(path, origin) for path, origin in ((("class_embed", 0, "bias"), 1), (("class_embed", 1, "bias"), 2))]
    for path, origin in kept:
        np.testing.assert_array_equal(tensors(new.model)[path], tensors(old.model)[("class_embed", origin, "bias")])


def test_a_new_refined_layer_starts_with_the_boxes_before_it():
    old = loaded(REFINED)
    new = surgery.change_layers(old, decoder=[0, 1, None])
    was, now = run(old), run(new)
    assert_close(now["aux_outputs"]["pred_boxes"][1], was["pred_boxes"])
    assert_close(now["pred_boxes"], was["pred_boxes"])


def test_a_new_layer_of_a_pre_norm_model_changes_nothing():
    old = loaded(DETR, pre_norm=True)
    new = surgery.change_layers(old, encoder=[0, None], decoder=[0, None])
    was, now = run(old), run(new)
    assert_close(now["pred_logits"], was["pred_logits"])
    assert_close(now["pred_boxes"], was["pred_boxes"])


def test_layers_that_are_not_there():
    with pytest.raises(ValueError, match=r"decoder: expected layers 0 to 0 or None, got \[0, 2\]"):
        surgery.change_layers(loaded(MULTI), decoder=[0, 2])
    with pytest.raises(ValueError, match=r"model\.decoder_layers=0 must be at least 1"):
        surgery.change_layers(loaded(MULTI), decoder=[])


@pytest.mark.parametrize("levels", [(1, 4), (2, 3)])
def test_more_levels_keep_the_old_ones_in_their_place(levels):
    old = loaded(MULTI, num_levels=levels[0])
    was = run(old)
    for logit, tolerance in ((-1e9, 1e-4), (-5.0, 0.2)):  # -1e9: no attention at all; -5: below 1 % a sample
        new = surgery.upgrade(old, num_levels=levels[1], new_level_logit=logit)
        np.testing.assert_allclose(run(new)["pred_logits"], was["pred_logits"], atol=tolerance)
    rows = [name for name in new.changes.changed if "level_embed" in name]
    assert rows and not new.changes.dropped


def test_single_scale_becomes_two_stage_step_by_step(tmp_path):
    single = loaded(SINGLE, decoder_layers=2)
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
    assert new == {"input_proj.0.conv", "input_proj.1.conv"}
    same = surgery.swap_backbone(old, dataclasses.replace(old.config.backbone, dilation=True))
    assert len(same.changes.kept) == len(tensors(old.model))
    donor = loaded(dataclasses.replace(DETR, tune=TuneConfig()))
    taken = surgery.swap_backbone(deeper, donor)
    theirs, ours = tensors(donor.model), tensors(taken.model)
    for path in (path for path in theirs if path[0] == "backbone"):
        np.testing.assert_array_equal(ours[path], theirs[path])
    taken.save(tmp_path / "taken")
    again = tensors(detr_jax.load(tmp_path / "taken").model)
    assert all((again[path] == ours[path]).all() for path in ours)


@pytest.mark.parametrize("version", [1, 2])
def test_a_backbone_becomes_deformable(version):
    """The same maps, in another order of summation."""
    old = loaded(MULTI, tune=TuneConfig())
    new = surgery.add_deform_conv(old, version, groups=2)
    assert new.config.backbone.deform_version == version and not new.changes.dropped
    assert {name.split(".")[6] for name in new.changes.new} == {"offset"}
    assert bool(new.changes.changed) == (version == 2)

    def maps(detector):
        graphdef, state = nnx.split(detector.model.backbone)
        return jax.jit(lambda state: nnx.merge(graphdef, state)(IMAGES, SIZES))(state)

    for x, y in zip(maps(new), maps(old), strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=1e-5 * np.abs(y).max())
    with pytest.raises(ValueError, match="the backbone has them already: ResNet-18 \\+ DCN v"):
        surgery.add_deform_conv(new)


@pytest.mark.slow
def test_a_swapped_backbone_trains(tmp_path):
    old = loaded(MULTI, tune=TuneConfig())
    new = surgery.swap_backbone(old, BackboneConfig(depth=18, norm="group", freeze_at=1), weights=None)
    assert_trains(new, tmp_path, moves=("backbone.stages.3",), stays=())


def test_freezing_is_followed_by_training_and_checkpoints(tmp_path):
    old = loaded(MULTI)
    new = surgery.freeze(old, "backbone", "encoder", "decoder", "query_embed")
    assert new.changes.trained[1] < new.changes.trained[0] and len(new.changes.kept) == len(tensors(old.model))
    assert_trains(new, tmp_path, moves=("class_embed",), stays=("backbone", "encoder", "decoder", "query_embed"))
    assert surgery.freeze(new).changes.trained[1] > new.changes.trained[0]
    with pytest.raises(ValueError, match="'decodr' is on no path of this model"):
        surgery.freeze(old, "decodr")
    with pytest.raises(ValueError, match="nothing is left to train"):
        surgery.freeze(surgery.change_queries(old, 2), *{str(path[0]) for path in tensors(old.model)})


@pytest.mark.parametrize("config", [MULTI, DETR], ids=["deformable", "detr"])
def test_lora_starts_as_the_identity_trains_alone_and_merges(config, tmp_path):
    old = loaded(config)
    new = surgery.add_lora(old, rank=2)
    assert all(".lora." in name for name in new.changes.new) and new.changes.new
    was = run(old)
    np.testing.assert_array_equal(run(new)["pred_logits"], was["pred_logits"])
    if config is DETR:
        return
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


def test_pruned_points_stay_where_they_were():
    """With the weight of the others made nothing, the outputs stay: offsets in boxes are rescaled, others are not."""
    old = loaded(REFINED, decoder_points=3)
    grid = (REFINED.num_heads, REFINED.num_levels, 3)
    for layer in old.model.decoder:
        weights = layer.cross_attn.attention_weights
        keep = np.zeros(grid, bool)
        keep[0, :, 1:] = keep[1, :, :2] = True  # another choice for each head
        weights.bias[...] = jnp.where(keep.reshape(-1), weights.bias[...], -1e9)
    new = surgery.prune_points(old, decoder=2, images=noise(1))
    was, now = run(old), run(new)
    assert_close(now["pred_logits"], was["pred_logits"])
    assert_close(now["pred_boxes"], was["pred_boxes"])
    assert "attention that the kept points had: 100.0%" in str(new.changes)
    assert "mean |box change| 0.0000, 100% of" in str(new.changes)
    with pytest.raises(ValueError, match="decoder=4, expected 1 to 3"):
        surgery.prune_points(old, decoder=4, images=noise(1))
    with pytest.raises(ValueError, match="got no images"):
        surgery.prune_points(old, decoder=2, images=[])


@pytest.mark.parametrize(("before", "after", "kept"), [(2, 1, [1]), (4, 3, [0, 1, 2]), (4, 2, [1, 2])])
def test_pruned_levels_are_those_without_attention(before, after, kept):
    """As above: the levels that stay are all that was attended to."""
    old = loaded(MULTI, num_levels=before)
    for attn in (old.model.encoder[0].self_attn, old.model.decoder[0].cross_attn):
        bias = attn.attention_weights.bias
        keep = np.zeros((MULTI.num_heads, before, 2), bool)
        keep[:, kept] = True
        bias[...] = jnp.where(keep.reshape(-1), bias[...], -1e9)
    new = surgery.prune_levels(old, after, images=noise(1) if before == 4 else ())
    assert_close(run(new)["pred_logits"], run(old)["pred_logits"])
    assert f"levels kept: {kept}" in str(new.changes)
    if before == 4:
        assert "0.0%" in str(new.changes) and "detections kept" in str(new.changes)
    with pytest.raises(ValueError, match=f"num_levels={before}, expected 1 to {before - 1}"):
        surgery.prune_levels(old, before)


def test_a_difference_is_seen():
    old = loaded(MULTI)
    same = surgery.difference(old, old, noise(2), threshold=0.3)
    assert (same.logits, same.boxes, same.kept) == (0, 0, 1) and same.detections > 0
    moved = surgery.freeze(old, "backbone")
    bias = moved.model.bbox_embed[0].layers[2].bias
    bias[...] = bias[...] + jnp.array([4.0, 4.0, 0.0, 0.0])
    changed = surgery.difference(old, moved, noise(2), threshold=0.3)
    assert changed.kept < 0.5 and changed.logits == 0 and changed.boxes is not None and changed.boxes > 0.1
    fewer = surgery.difference(old, surgery.change_queries(old, 3), noise(1), threshold=0.3)
    assert fewer.logits is None and fewer.boxes is None


def test_soups_are_averages(tmp_path):
    one, two = loaded(MULTI), loaded(MULTI)
    two.model.level_embed[...] = two.model.level_embed[...] + 4
    two.save(tmp_path / "two")
    mixed = surgery.soup([one, tmp_path / "two"], weights=[3, 1])
    assert mixed.changes.changed == ("level_embed",) and "0.750 of 0" in str(mixed.changes)
    np.testing.assert_allclose(mixed.model.level_embed[...], one.model.level_embed[...] + 1, rtol=1e-6)
    cli.main(["soup", str(tmp_path / "two"), str(tmp_path / "two"), "--out", str(tmp_path / "mixed")])
    same = detr_jax.load(tmp_path / "mixed").model
    np.testing.assert_array_equal(same.level_embed[...], two.model.level_embed[...])
    with pytest.raises(ValueError, match=r"source 1 is of another architecture: decoder\.1\..* \[.*\], not missing"):
        surgery.soup([one, loaded(MULTI, decoder_layers=2)])
    with pytest.raises(ValueError, match=r"source 1 has the classes \('cat'"):
        surgery.soup([one, of_five_classes()])
    with pytest.raises(ValueError, match="expected as many weights as sources"):
        surgery.soup([one], weights=[1, 2])


def test_moving_average_of_a_run(tmp_path):
    model = loaded(MULTI)
    values = [1.0, 2.0, 6.0]
    with store.CheckpointWriter(str(tmp_path / "run" / "checkpoints"), keep_last=3) as writer:
        model.save(tmp_path / "one")
        metadata = store.read_metadata(str(tmp_path / "one"))
        for step, value in enumerate(values):
            _, params, buffers = split(model.config, model.model)
            params["level_embed"] = jnp.full_like(params["level_embed"], value)
            writer.save(step, {"params": params, "buffers": buffers}, metadata)
    mean = surgery.moving_average(tmp_path / "run", decay=0.5)
    expected = ((1.0 * 0.5 + 2.0 * 0.5) * 0.5) + 6.0 * 0.5
    np.testing.assert_allclose(mean.model.level_embed[...], expected, rtol=1e-6)
    with pytest.raises(FileNotFoundError, match="no checkpoint in it"):
        surgery.moving_average(tmp_path / "none")


@pytest.mark.parametrize(
    "config",
    [MULTI, dataclasses.replace(DETR, pre_norm=True), dataclasses.replace(DINO, decoder_layers=1)],
    ids=["deformable", "detr", "dino"],
)
def test_extracted_features_are_what_the_decoder_attends_to(config):
    old = loaded(config)
    extractor = surgery.extract_encoder(old)
    memory = []

    class Spy(nnx.Module):
        def __call__(self, x, position, *others, **_):
            # Deformable DETR hands its layers tokens that know their order, DETR the encoder's output.
            tokens = [other for other in others if hasattr(other, "features")]
            memory.append(tokens[0].rows(tokens[0].features) if tokens else others[0])
            return x

    graphdef, state = nnx.split(old.model)

    @jax.jit
    def attended(state):
        memory.clear()
        model = nnx.merge(graphdef, state)
        model.decoder = nnx.List([Spy()])
        model(IMAGES, SIZES)
        return memory[0]

    graph, features = nnx.split(extractor)
    maps, valid = jax.jit(lambda state: nnx.merge(graph, state)(IMAGES, SIZES))(features)
    assert [m.shape[:3] for m in maps] == [v.shape for v in valid]
    assert [m.shape[1:] for m in maps] == [(4, 4, 32), (2, 2, 32)][-len(maps) :]
    assert_close(jnp.concatenate([m.reshape(2, -1, 32) for m in maps], 1), attended(state))
    assert not {path[0] for path in tensors(extractor)} & {"decoder", "class_embed", "bbox_embed", "query_embed"}

    def loss(state):
        return sum(jnp.square(m).mean() for m in nnx.merge(graph, state)(IMAGES, SIZES)[0])

    value, grads = jax.jit(jax.value_and_grad(loss))(features)
    assert np.isfinite(value) and np.abs(nnx.to_pure_dict(grads)["encoder"][0]["ffn"]["linear1"]["kernel"]).max() > 0


def test_fine_tuning_with_adapters_from_a_checkpoint_without(tmp_path):
    old = loaded(MULTI)
    old.save(tmp_path / "old")
    config = surgery.add_lora(old, 2).config
    _, params, buffers = split(config, surgery.add_lora(old, 2).model)
    buffers = jax.tree.map(jnp.zeros_like, buffers)
    params, buffers, report = initialize_from(tmp_path / "old", config, CELLS, params, buffers)
    assert "decoder.0.self_attn.query.lora.lora_a" in report
    np.testing.assert_array_equal(buffers["level_embed"], old.model.level_embed[...])
    assert "query" in params["decoder"][0]["self_attn"] and "ffn" not in params["decoder"][0]


def test_what_is_trained_is_part_of_the_configuration():
    flags = ["--model.tune.freeze", "backbone", "encoder.0", "--model.tune.lora-rank", "4"]
    config = cli.parse_train(["--config", str(tiny.DATA.parents[1] / "configs" / "bccd.py"), *flags]).model
    assert config.tune == TuneConfig(freeze=("backbone", "encoder.0"), lora_rank=4)
    values = dataclasses.asdict(config)
    assert model_from_dict(values, type(config).__name__) == config
    del values["tune"]  # as in checkpoints from before there was one
    assert model_from_dict(values, type(config).__name__).tune == TuneConfig()
    with pytest.raises(ValueError, match=r"model\.tune\.lora_rank=-1 must be at least 0"):
        dataclasses.replace(config, tune=TuneConfig(lora_rank=-1))
