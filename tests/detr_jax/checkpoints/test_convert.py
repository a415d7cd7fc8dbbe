"""Other implementations' checkpoints: every tensor finds its place, both ways, or is named."""

import dataclasses
import json
import sys
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_models
import transformers_weights
from flax import nnx
from safetensors.numpy import save_file

from detr_jax.categories import Categories
from detr_jax.checkpoints import convert, key_maps, load
from detr_jax.checkpoints.convert import load_backbone
from detr_jax.checkpoints.files import read_tensors, weight_files
from detr_jax.config import BackboneConfig, DeformableDETRConfig, DETRConfig
from detr_jax.models import build_abstract, split


@pytest.fixture(scope="module")
def detector():
    """A small detector's configuration, parameters and buffers."""
    config = DeformableDETRConfig(
        backbone=BackboneConfig(depth=18), hidden_dim=32, encoder_layers=1, decoder_layers=1, num_levels=1
    )
    graphdef, params, buffers = split(config, model_of(config))
    return graphdef, *jax.tree.map(jnp.asarray, (params, buffers))


@pytest.fixture(scope="module")
def tensors():
    """ResNet-18 with torchvision's names and shapes, written from its architecture."""
    rng = np.random.default_rng(0)
    tensors = {"conv1.weight": (64, 3, 7, 7), "fc.weight": (1000, 512), "fc.bias": (1000,)}
    norms = {"bn1": 64}
    n_in = 64
    for layer, width in enumerate((64, 128, 256, 512), 1):
        for block in range(2):
            name = f"layer{layer}.{block}"
            tensors[f"{name}.conv1.weight"] = (width, n_in, 3, 3)
            tensors[f"{name}.conv2.weight"] = (width, width, 3, 3)
            norms |= {f"{name}.bn1": width, f"{name}.bn2": width}
            if n_in != width:
                tensors[f"{name}.downsample.0.weight"] = (width, n_in, 1, 1)
                norms[f"{name}.downsample.1"] = width
            n_in = width
    for name, width in norms.items():
        tensors |= {f"{name}.{part}": (width,) for part in ("weight", "bias", "running_mean", "running_var")}
    values = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in tensors.items()}
    return values | {f"{name}.num_batches_tracked": np.array(7) for name in norms}


def test_every_tensor_lands_where_its_name_says(detector, tensors, tmp_path):
    _, params, buffers = detector
    save_file(tensors, tmp_path / "resnet18.safetensors")
    new_params, new_buffers, report = load_backbone(
        str(tmp_path / "resnet18.safetensors"), BackboneConfig(depth=18), params, buffers
    )
    assert report == f"backbone: {tmp_path}/resnet18.safetensors: ResNet-18, {len(tensors)} tensors"
    numbers = sum(leaf.size for leaf in jax.tree.leaves((new_params["backbone"], new_buffers["backbone"])))
    used = {name: x for name, x in tensors.items() if not name.startswith("fc.") and "num_batches" not in name}
    assert numbers == sum(x.size for x in used.values())
    kernel = new_params["backbone"]["stages"][1][0]["convs"][0]["kernel"]
    np.testing.assert_array_equal(kernel, tensors["layer2.0.conv1.weight"].transpose(2, 3, 1, 0))
    np.testing.assert_array_equal(new_buffers["backbone"]["stem_norm"]["var"], tensors["bn1.running_var"])
    np.testing.assert_array_equal(new_params["level_embed"], params["level_embed"])


@pytest.mark.parametrize("version", [1, 2])
def test_a_deformable_backbone_starts_as_the_convolutions_of_the_file(version, tensors, tmp_path):
    """Also where the file has offsets: then it has them all, and its kernels are taken as they are."""
    backbone = BackboneConfig(depth=18, deform_version=version)
    config = DeformableDETRConfig(backbone=backbone, hidden_dim=32, encoder_layers=1, decoder_layers=1, num_levels=1)
    model = build_abstract(config)
    params, buffers = (jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), x) for x in split(config, model)[1:])
    tensors = dict(tensors)
    save_file(tensors, tmp_path / "resnet18.safetensors")
    new, frozen, _ = load_backbone(str(tmp_path / "resnet18.safetensors"), backbone, params, buffers)
    conv = new["backbone"]["stages"][1][0]["convs"][1]
    theirs = tensors["layer2.0.conv2.weight"].transpose(2, 3, 1, 0)
    np.testing.assert_array_equal(conv["kernel"], version * theirs)
    assert not np.any(conv["offset"]["kernel"])
    np.testing.assert_array_equal(
        frozen["backbone"]["stages"][0][0]["convs"][1]["kernel"], tensors["layer1.0.conv2.weight"].transpose(2, 3, 1, 0)
    )
    channels = 9 * (version + 1)
    for layer, width in ((2, 128), (3, 256), (4, 512)):
        for block in range(2):
            name = f"layer{layer}.{block}.conv2.conv_offset"
            tensors |= {f"{name}.weight": np.full((channels, width, 3, 3), 0.5, np.float32)}
            tensors |= {f"{name}.bias": np.ones(channels, np.float32)}
    save_file(tensors, tmp_path / "dcn.safetensors")
    new, *_ = load_backbone(str(tmp_path / "dcn.safetensors"), backbone, params, buffers)
    conv = new["backbone"]["stages"][1][0]["convs"][1]
    np.testing.assert_array_equal(conv["kernel"], theirs)
    np.testing.assert_array_equal(conv["offset"]["bias"], np.ones(channels))


def test_tensors_that_do_not_fit_are_named_with_both_shapes(detector, tensors, tmp_path):
    _, params, buffers = detector
    wrong = dict(tensors)
    wrong["layer1.0.conv1.weight"] = np.zeros((64, 64, 1, 1), np.float32)
    wrong["layer9.weight"] = np.zeros(3, np.float32)
    del wrong["bn1.bias"]
    save_file(wrong, tmp_path / "wrong.safetensors")
    with pytest.raises(ValueError, match="3 tensors do not fit") as error:
        load_backbone(str(tmp_path / "wrong.safetensors"), BackboneConfig(depth=18), params, buffers)
    message = str(error.value)
    assert "layer1.0.conv1.weight: [1, 1, 64, 64] in our layout, expected [3, 3, 64, 64]" in message
    assert "bn1.bias: missing, expected [64]" in message
    assert "layer9.weight: [3], not expected" in message


def test_group_norm_is_refused(tmp_path, tensors):
    save_file(tensors, tmp_path / "resnet18.safetensors")
    buffers = {"backbone": {"stem_norm": {}}}
    with pytest.raises(ValueError, match="norm='frozen_batch', got 'group'"):
        load_backbone(str(tmp_path / "resnet18.safetensors"), BackboneConfig(), {"level_embed": jnp.zeros(1)}, buffers)


def test_missing_and_foreign_files(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no such file; expected a \.safetensors or \.pth"):
        read_tensors(str(tmp_path / "none.safetensors"))
    (tmp_path / "weights.onnx").write_bytes(b"")
    with pytest.raises(ValueError, match=r"expected a \.safetensors or \.pth file"):
        read_tensors(str(tmp_path / "weights.onnx"))
    (tmp_path / "broken.safetensors").write_bytes(b"not a header")
    with pytest.raises(ValueError, match=r"not a \.safetensors file, or a damaged one"):
        read_tensors(str(tmp_path / "broken.safetensors"))
    with pytest.raises(ValueError, match=r"expected config\.json and model\.safetensors of transformers, found"):
        read_tensors(tmp_path)


# --- whole detectors ---

SMALL: dict[str, Any] = {
    "backbone": BackboneConfig(depth=18),
    "num_classes": 5,
    "hidden_dim": 32,
    "num_heads": 4,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "ffn_dim": 48,
    "num_queries": 12,
}
MODELS = {
    "detr": DETRConfig(**SMALL),
    "detr_r50": DETRConfig(**SMALL | {"backbone": BackboneConfig(depth=50)}),
    "detr_dc5": DETRConfig(**SMALL | {"backbone": BackboneConfig(depth=18, dilation=True)}),
    "detr_pre_norm_learned": DETRConfig(**SMALL, pre_norm=True, position="learned"),
    "single_scale": DeformableDETRConfig(**SMALL, num_levels=1),
    "single_scale_dc5": DeformableDETRConfig(
        **SMALL | {"backbone": BackboneConfig(depth=18, dilation=True)}, num_levels=1
    ),
    "multi_scale": DeformableDETRConfig(**SMALL),
    "refine": DeformableDETRConfig(**SMALL, box_refinement=True, num_levels=5, encoder_points=3),
    "two_stage": DeformableDETRConfig(**SMALL, box_refinement=True, two_stage=True),
    "group_norm": DeformableDETRConfig(**SMALL | {"backbone": BackboneConfig(depth=18, norm="group", freeze_at=0)}),
    "dcn": DeformableDETRConfig(**SMALL | {"backbone": BackboneConfig(depth=18, deform_version=2, deform_groups=4)}),
    "resnext_dcn": DeformableDETRConfig(
        **SMALL | {"backbone": BackboneConfig(depth=50, groups=4, group_width=2, deform_version=1)}
    ),
}
CELLS = Categories.contiguous({3: "RBC", 7: "WBC", 9: "platelet", 12: "other", 40: "dust"})
FACTS = {"num_heads": 4}


def model_of(config):
    return transformers_weights.load(config, transformers_weights.random_weights(config))


def assert_same(a, b):
    """Equal models, bit by bit."""
    a, b = (dict(nnx.to_flat_state(nnx.state(model))) for model in (a, b))
    assert a.keys() == b.keys()
    for path, leaf in a.items():
        np.testing.assert_array_equal(leaf[...], b[path][...], err_msg=str(path))


@pytest.mark.parametrize("name", MODELS)
def test_official_names_and_back_are_bit_identical(name, tmp_path):
    config, model = MODELS[name], model_of(MODELS[name])
    convert.save(tmp_path / "model.safetensors", model, config, CELLS)
    back = convert.load(tmp_path / "model.safetensors")
    assert back.config == config and back.categories == CELLS
    assert_same(back.model, model)


@pytest.mark.parametrize("name", MODELS)
def test_variant_is_inferred_from_the_tensors_alone(name, tmp_path):
    config, model = MODELS[name], model_of(MODELS[name])
    key_map = key_maps.OFFICIAL_DETR if "detr" in name else key_maps.OFFICIAL_DEFORMABLE
    path = tmp_path / ("r18-dc5.safetensors" if config.backbone.dilation else "r18.safetensors")
    save_file({k: np.ascontiguousarray(v) for k, v in convert.export(model, config, key_map).items()}, path)
    back = convert.load(path, num_heads=4)
    # The number of a two-stage model's queries is in no tensor: the published one.
    assert back.config == dataclasses.replace(config, num_queries=300 if name == "two_stage" else 12)
    assert_same(back.model, model)
    assert key_map.title in back.report


@pytest.mark.parametrize("name", ["detr", "detr_r50", "single_scale", "multi_scale", "refine", "two_stage"])
def test_transformers_folder_and_back_is_bit_identical(name, tmp_path):
    config, model = MODELS[name], model_of(MODELS[name])
    convert.save(tmp_path / "folder", model, config, CELLS)
    back = convert.load(tmp_path / "folder")
    assert back.config == config
    assert back.categories.names == CELLS.names
    assert_same(back.model, model)


def test_transformers_has_no_deformable_backbone(tmp_path):
    config, model = MODELS["resnext_dcn"], model_of(MODELS["resnext_dcn"])
    with pytest.raises(ValueError, match=r"has no backbone\.groups, backbone\.deform_version: write a \.safetensors"):
        convert.save(tmp_path / "folder", model, config, CELLS)


def test_transformers_with_a_timm_backbone(tmp_path):
    """Their timm ResNets have torchvision's names."""
    config, model = MODELS["detr_r50"], model_of(MODELS["detr_r50"])
    official = convert.export(model, config, key_maps.OFFICIAL_DETR)
    tensors = {k: v for k, v in convert.export(model, config, key_maps.HF_DETR).items() if "conv_encoder" not in k}
    tensors |= {
        name.replace("backbone.0.body.", "model.backbone.conv_encoder.model."): tensor
        for name, tensor in official.items()
        if name.startswith("backbone.0.body.")
    }
    convert.save(tmp_path, model, config, CELLS)
    save_file({k: np.ascontiguousarray(v) for k, v in tensors.items()}, tmp_path / "model.safetensors")
    back = convert.load(tmp_path)
    assert back.config == config
    assert_same(back.model, model)


@pytest.mark.parametrize("name", ["single_scale", "multi_scale", "refine", "two_stage", "dcn"])
@pytest.mark.parametrize("key_map", [key_maps.DETREX_DEFORMABLE, key_maps.MMDET_DEFORMABLE, key_maps.MMDET2_DEFORMABLE])
def test_detrex_and_mmdetection(name, key_map, tmp_path):
    config, model = MODELS[name], model_of(MODELS[name])
    tensors = convert.export(model, config, key_map)
    # The levels beyond the backbone's are `extra_convs` there; mmdetection's convolutions before a norm have no bias.
    scales = min(config.num_levels, 3)
    for old in [key for key in tensors if key.startswith("neck.convs.")]:
        level, rest = old.removeprefix("neck.convs.").split(".", 1)
        if int(level) >= scales:
            tensors[f"neck.extra_convs.{int(level) - scales}.{rest}"] = tensors.pop(old)
    mmdet = key_map is not key_maps.DETREX_DEFORMABLE
    if mmdet:
        tensors = {k: v for k, v in tensors.items() if not k.endswith("conv.bias")}
        model = nnx.merge(*nnx.split(model))
        for projection in model.input_proj:
            projection.conv.bias[...] = jnp.zeros(32)
    fuse = {k: np.ascontiguousarray(v) for k, v in convert.fused(tensors).items()}
    save_file(fuse, tmp_path / "model.safetensors")
    back = convert.load(tmp_path / "model.safetensors", num_heads=4)
    assert back.report.startswith(f"{tmp_path / 'model.safetensors'}: {key_map.title}")
    assert_same(back.model, model)


def names_of(tensors: Iterable[str], prefix: str) -> set[str]:
    return {name.removeprefix(prefix) for name in tensors if name.startswith(prefix)}


def test_names_are_those_of_the_official_code():
    """Spelled out from models/deformable_detr.py, deformable_transformer.py and ops/modules/ms_deform_attn.py."""
    config = MODELS["two_stage"]
    tensors = convert.export(model_of(config), config, key_maps.OFFICIAL_DEFORMABLE)
    deformable = {
        f"{part}.{leaf}"
        for part in ("sampling_offsets", "attention_weights", "value_proj", "output_proj")
        for leaf in ("weight", "bias")
    }
    ffn = {f"linear{i}.{leaf}" for i in (1, 2) for leaf in ("weight", "bias")}

    def norms(n):
        return {f"norm{i + 1}.{leaf}" for i in range(n) for leaf in ("weight", "bias")}

    assert names_of(tensors, "transformer.encoder.layers.1.") == (
        {f"self_attn.{name}" for name in deformable} | ffn | norms(2)
    )
    assert names_of(tensors, "transformer.decoder.layers.1.") == (
        {f"cross_attn.{name}" for name in deformable}
        | {f"self_attn.{n}" for n in ("in_proj_weight", "in_proj_bias", "out_proj.weight", "out_proj.bias")}
        | (ffn | norms(3))
    )
    heads = {f"class_embed.{i}.{leaf}" for i in range(3) for leaf in ("weight", "bias")} | {
        f"bbox_embed.{i}.layers.{j}.{leaf}" for i in range(3) for j in range(3) for leaf in ("weight", "bias")
    }
    assert {name for name in tensors if "_embed" in name} == (
        heads | {f"transformer.decoder.{name}" for name in heads} | {"transformer.level_embed"}
    )
    assert names_of(tensors, "transformer.") - names_of(tensors, "transformer.decoder.") >= {
        f"{name}.{leaf}"
        for name in ("enc_output", "enc_output_norm", "pos_trans", "pos_trans_norm")
        for leaf in ("weight", "bias")
    }
    assert names_of(tensors, "input_proj.3.") == {"0.weight", "0.bias", "1.weight", "1.bias"}
    assert tensors["transformer.decoder.layers.0.self_attn.in_proj_weight"].shape == (96, 32)
    # The decoder's first norm there belongs to the cross-attention.
    ours = model_of(config).decoder[0].norm2.scale[...]
    np.testing.assert_array_equal(tensors["transformer.decoder.layers.0.norm1.weight"], ours)


def test_a_checkpoint_that_does_not_fit_is_named_with_both_shapes(tmp_path):
    config = MODELS["multi_scale"]
    tensors = convert.export(model_of(config), config, key_maps.OFFICIAL_DEFORMABLE)
    tensors["transformer.encoder.layers.0.linear1.weight"] = np.zeros((7, 32), np.float32)
    del tensors["transformer.level_embed"]
    with pytest.raises(ValueError, match="2 tensors do not fit Deformable DETR") as error:
        convert.assemble(config, convert.translate(tensors, "x")[1], "x")
    assert "encoder.0.ffn.linear1.weight: [32, 7] in our layout, expected [32, 48]" in str(error.value)
    assert "level_embed: missing, expected [4, 32]" in str(error.value)


def test_an_unknown_checkpoint_names_what_is_unknown(tmp_path):
    save_file(
        {"transformer.level_embed": np.zeros(3), "mask_head.weight": np.zeros((2, 2))}, tmp_path / "x.safetensors"
    )
    with pytest.raises(ValueError, match=r"(?s)Nearest: official Deformable DETR.*mask_head\.weight: \[2, 2\]"):
        convert.load(tmp_path / "x.safetensors")


def test_heads_stored_twice_must_agree():
    config = MODELS["refine"]
    tensors = convert.export(model_of(config), config, key_maps.OFFICIAL_DEFORMABLE)
    tensors["transformer.decoder.bbox_embed.0.layers.0.bias"] = np.ones(32, np.float32)
    with pytest.raises(ValueError, match=r"both stand for bbox_embed\.0\.layers\.0\.bias, with different values"):
        convert.translate(tensors, "x")


def test_what_transformers_lacks_is_refused(tmp_path):
    for name, lack in {
        "detr_dc5": "dilation",
        "group_norm": "norm='group'",
        "detr_pre_norm_learned": "pre_norm",
    }.items():
        with pytest.raises(ValueError, match=lack):
            convert.save(tmp_path / name, model_of(MODELS[name]), MODELS[name], CELLS)


def test_pth_without_pytorch_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    (tmp_path / "r50.pth").write_bytes(b"")
    with pytest.raises(ValueError, match=r"r50\.pth: reading \.pth needs PyTorch: pip install torch"):
        convert.load(tmp_path / "r50.pth")


def test_categories_of_coco():
    sparse, contiguous = Categories.guess(91), Categories.guess(80)
    assert sparse.names[1] == "person" and sparse.ids[1] == 1 and sparse.names[12] == "N/A"
    assert contiguous.names[0] == "person" and contiguous.ids[0] == 1
    assert (contiguous.names[79], contiguous.ids[79]) == (sparse.names[90], 90)
    assert len([name for name in sparse.names if name != "N/A"]) == 80
    assert Categories.guess(3).names == ("class 0", "class 1", "class 2")


@pytest.mark.parametrize(
    ("wrap", "note"),
    [
        (lambda name: f"module.{name}", "all names begin with 'module.'"),
        (lambda name: f"model._orig_mod.{name}", "all names begin with 'model.'"),
        (lambda name: name.replace("transformer.", "transformer._orig_mod."), "'_orig_mod.' removed"),
    ],
)
def test_wrapped_names(wrap, note):
    config = MODELS["single_scale"]
    tensors = convert.export(model_of(config), config, key_maps.OFFICIAL_DEFORMABLE)
    extra = {"total_ops": np.zeros(1), "transformer.total_params": np.zeros(1), "criterion.empty_weight": np.ones(3)}
    wrapped = {wrap(name): tensor for name, tensor in (tensors | extra).items()}
    key_map, found, notes = convert.translate(wrapped, "x")
    assert key_map is key_maps.OFFICIAL_DEFORMABLE and note in " ".join(notes)
    assert "2 ignored: counts of a profiler" in " ".join(notes) and "1 ignored: weights of the loss" in " ".join(notes)
    expected = convert.translate(tensors, "x")[1]
    assert found.keys() == expected.keys()
    with pytest.raises(ValueError, match=r"(?s)other\.x: \[2\].*Found in the file: .*in 'ema'.*'module\.'"):
        others = {f"module.{name}": tensor for name, tensor in tensors.items()} | {"module.other.x": np.zeros(2)}
        convert.translate(others, "x", ["weights in 'ema'"])


def test_the_detector_of_panoptic_detr_and_parts_of_detectors():
    config = MODELS["detr"]
    tensors = convert.export(model_of(config), config, key_maps.OFFICIAL_DETR)
    masks = {"mask_head.lay1.weight": np.zeros(2), "bbox_attention.q_linear.weight": np.zeros(2)}
    found, notes = convert.translate({f"detr.{n}": t for n, t in tensors.items()} | masks, "x")[1:]
    assert found.keys() == convert.translate(tensors, "x")[1].keys()
    assert "panoptic DETR: its detector is taken, 2 tensors of the mask head are left out" in notes


def test_nan_in_a_file_is_said(tmp_path):
    config = MODELS["detr"]
    tensors = convert.export(model_of(config), config, key_maps.OFFICIAL_DETR)
    tensors["class_embed.bias"] = np.full_like(tensors["class_embed.bias"], np.nan)
    save_file(tensors, tmp_path / "broken.safetensors")
    assert "WARNING: NaN or infinity in class_embed.bias" in load(tmp_path / "broken.safetensors").report


def test_a_backbone_and_encoder_alone_are_no_detector(tmp_path):
    config = MODELS["detr"]
    tensors = convert.export(model_of(config), config, key_maps.OFFICIAL_DETR)
    save_file({n: t for n, t in tensors.items() if "decoder" not in n}, tmp_path / "part.safetensors")
    with pytest.raises(ValueError, match=r"official DETR, but not a whole detector: no decoder\.0\.norm1\.weight"):
        convert.load(tmp_path / "part.safetensors")


@pytest.fixture
def transformers_folder(tmp_path):
    config = MODELS["single_scale"]
    convert.save(tmp_path / "hf", model_of(config), config, CELLS, scale=480, max_size=640)
    return tmp_path / "hf"


def test_image_sizes_and_names_come_from_the_folder(transformers_folder):
    path = transformers_folder / "preprocessor_config.json"
    back = convert.load(transformers_folder)
    assert (back.scale, back.max_size) == (480, 640) and back.categories.names == CELLS.names
    values = json.loads(path.read_text())
    path.write_text(json.dumps(values | {"size": 600, "max_size": 1000}))
    assert read_tensors(transformers_folder)[1].items() >= {"scale": 600, "max_size": 1000}.items()
    for change, message in (
        ({"image_mean": [0.5, 0.5, 0.5]}, r"preprocessor_config\.json: image_mean: got \[0\.5, 0\.5, 0\.5\], expected"),
        ({"size": {"height": 640, "width": 640}}, r"size: got .*, expected shortest_edge and longest_edge"),
        ({"do_normalize": False}, "do_normalize: got False, expected True"),
    ):
        path.write_text(json.dumps(values | change))
        with pytest.raises(ValueError, match=message):
            read_tensors(transformers_folder)
    config = transformers_folder / "config.json"
    config.write_text(config.read_text()[:-9])
    with pytest.raises(ValueError, match=r"config\.json: not JSON, or damaged"):
        read_tensors(transformers_folder)


def test_shards_are_those_of_the_index(transformers_folder):
    single, index = (transformers_folder / name for name in ("model.safetensors", "model.safetensors.index.json"))
    (transformers_folder / "model_old.safetensors").write_bytes(b"junk")
    assert weight_files(transformers_folder) == [single]
    index.write_text(json.dumps({"weight_map": {"a": "model-1-of-2.safetensors", "b": "model-2-of-2.safetensors"}}))
    single.rename(transformers_folder / "model-1-of-2.safetensors")
    with pytest.raises(ValueError, match=r"names model-2-of-2\.safetensors, which is missing"):
        weight_files(transformers_folder)


# --- files that need PyTorch ---


@pytest.mark.parity
@pytest.mark.parametrize(
    ("wrap", "note"),
    [
        (lambda new, old: {"ema": new, "model": old}, "weights of 'ema', not of 'model'"),
        (lambda new, old: {"ema": {"module": new, "updates": 3}, "model": old}, "weights of 'ema', not of 'model'"),
        (lambda new, old: {"model_state_dict": new, "epoch": 3}, "weights in 'model_state_dict'"),
        (lambda new, old: {"state_dict": {f"module.{k}": v for k, v in new.items()}}, "all names begin with 'module.'"),
    ],
)
def test_wrapped_pth(wrap, note, tmp_path):
    import argparse
    import pathlib

    import torch

    config, model = MODELS["single_scale"], model_of(MODELS["single_scale"])
    tensors = convert.export(model, config, key_maps.OFFICIAL_DEFORMABLE)
    new = {name: torch.from_numpy(tensor.copy()) for name, tensor in tensors.items()}
    args = argparse.Namespace(nheads=4, output_dir=pathlib.Path("out"), resume=None, num_queries=None)
    torch.save(wrap(new, {k: v + 1 for k, v in new.items()}) | {"args": args}, tmp_path / "x.pth")
    back = convert.load(tmp_path / "x.pth")
    assert note in back.report
    assert_same(back.model, model)


@pytest.mark.parity
def test_what_is_no_dict_of_tensors_is_said(tmp_path):
    import torch

    for content, message in (
        ([torch.zeros(1)], "holds a list; expected a dict of tensors"),
        (torch.zeros(1), "holds a Tensor; expected a dict of tensors"),
        ({"a.b": torch.zeros(1, device="meta")}, r"1 tensors have no values .*such as a\.b"),
        ({"a.b": torch.zeros(2).to(torch.float8_e4m3fn)}, r"not a checkpoint of .*"),
    ):
        torch.save(content, tmp_path / "x.pth")
        with pytest.raises(ValueError, match=message):
            convert.load(tmp_path / "x.pth")


@pytest.mark.parity
def test_official_pth_with_its_command_line(tmp_path):
    import argparse

    import torch

    config = dataclasses.replace(MODELS["two_stage"], num_queries=20)
    model = model_of(config)
    state = {
        k: torch.from_numpy(v.copy()) for k, v in convert.export(model, config, key_maps.OFFICIAL_DEFORMABLE).items()
    }
    args = argparse.Namespace(nheads=4, num_queries=20, dilation=False, enc_n_points=4, lr=2e-4, lr_drop=40)
    torch.save({"model": state, "epoch": 49, "args": args}, tmp_path / "r50.pth")
    back = convert.load(tmp_path / "r50.pth")
    assert back.config == config
    assert_same(back.model, model)


@pytest.mark.parity
def test_a_malicious_pickle_is_refused_and_does_not_run(tmp_path):
    import os

    import torch

    class Attack:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "owned"),)

    torch.save({"model": {"w": torch.zeros(1)}, "args": Attack()}, tmp_path / "evil.pth")
    with pytest.raises(ValueError, match=r"evil\.pth: refused"):
        convert.load(tmp_path / "evil.pth")
    assert not (tmp_path / "owned").exists()


@pytest.mark.parity
def test_mmdetection_pth_with_its_log(tmp_path, monkeypatch):
    """Its objects are not there when the file is read, and are not needed."""
    import types

    import torch

    class HistoryBuffer:
        def __init__(self):
            self.values = np.arange(3)

    HistoryBuffer.__module__, HistoryBuffer.__qualname__ = "mmengine.logging.history_buffer", "HistoryBuffer"
    module = types.ModuleType("mmengine.logging.history_buffer")
    module.HistoryBuffer = HistoryBuffer
    config, model = MODELS["single_scale"], model_of(MODELS["single_scale"])
    tensors = convert.fused(convert.export(model, config, key_maps.MMDET_DEFORMABLE))
    state = {name: torch.from_numpy(tensor.copy()) for name, tensor in tensors.items()}
    with monkeypatch.context() as patch:
        for name in ("mmengine", "mmengine.logging"):
            patch.setitem(sys.modules, name, types.ModuleType(name))
        patch.setitem(sys.modules, module.__name__, module)
        content = {"state_dict": state, "message_hub": {"log": HistoryBuffer()}, "meta": {"lr": np.float64(1.0)}}
        torch.save(content, tmp_path / "mmdet.pth")
    assert_same(convert.load(tmp_path / "mmdet.pth", num_heads=4).model, model)


@pytest.mark.parity
@pytest.mark.parametrize("name", ["detr", "detr_r50", "single_scale", "multi_scale", "refine", "two_stage"])
def test_transformers_reads_and_writes_the_same_model(name, tmp_path):
    """Ours -> their `from_pretrained` -> the same outputs; their `save_pretrained` -> ours -> the same outputs."""
    import torch
    import transformers

    config, model = MODELS[name], model_of(MODELS[name])
    convert.save(tmp_path / "ours", model, config, CELLS)
    kind = "DetrForObjectDetection" if isinstance(config, DETRConfig) else "DeformableDetrForObjectDetection"
    theirs, info = getattr(transformers, kind).from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    images, sizes = small_models.padded_batch(100, 135)
    expected = jax.tree.map(np.asarray, nnx.jit(lambda m: m(images, sizes))(model))
    with torch.no_grad():
        h, w = images.shape[1:3]
        valid = (np.arange(h) < sizes[:, :1])[:, :, None] & (np.arange(w) < sizes[:, 1:])[:, None]
        got = theirs.eval()(torch.from_numpy(images.transpose(0, 3, 1, 2).copy()), torch.from_numpy(valid))
    # Float32 noise of numbers of order 1; the oracle's own test holds more models and layers.
    np.testing.assert_allclose(got.logits.numpy(), expected["pred_logits"], atol=5e-5)
    np.testing.assert_allclose(got.pred_boxes.numpy(), expected["pred_boxes"], atol=5e-5)
    theirs.save_pretrained(tmp_path / "theirs")
    assert_same(convert.load(tmp_path / "theirs").model, model)
