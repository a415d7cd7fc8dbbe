"""DINO's checkpoints: the official names and detrex's, in and out."""

import dataclasses

import dino_cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers_weights
from flax import nnx
from safetensors.numpy import save_file

from detr_jax.categories import Categories
from detr_jax.checkpoints import convert, key_maps
from detr_jax.checkpoints.load import Loaded, initialize_from, load
from detr_jax.config import DeformableDETRConfig, DINOConfig
from detr_jax.models import build_abstract
from detr_jax.models.trainable import split

CELLS = Categories.contiguous({3: "RBC", 7: "WBC", 9: "platelet", 12: "other", 40: "dust"})
MODELS = {
    "4_scales": dino_cases.SMALL,
    "5_scales": dino_cases.FIVE_SCALES,
    "own_heads": dataclasses.replace(dino_cases.SMALL, shared_heads=False),
    "learned_boxes": dataclasses.replace(dino_cases.SMALL, two_stage=False, contrastive=False),
}


def model_of(config):
    return transformers_weights.load(config, transformers_weights.random_weights(config))


def assert_same(a, b):
    """Equal models, bit by bit."""
    a, b = (dict(nnx.to_flat_state(nnx.state(model))) for model in (a, b))
    assert a.keys() == b.keys()
    for path, leaf in a.items():
        np.testing.assert_array_equal(leaf[...], b[path][...], err_msg=str(path))


def write(tensors, path):
    save_file({name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}, path)
    return path


@pytest.mark.parametrize("name", MODELS)
def test_official_names_and_back_are_bit_identical(name, tmp_path):
    config, model = MODELS[name], model_of(MODELS[name])
    convert.save(tmp_path / "model.safetensors", model, config, CELLS)
    back = convert.load(tmp_path / "model.safetensors")
    assert back.config == config and back.categories == CELLS
    assert_same(back.model, model)
    # From the tensors alone; how a model was trained is in none of them.
    path = write(convert.export(model, config, key_maps.OFFICIAL_DINO), tmp_path / "dino.safetensors")
    back = convert.load(path, num_heads=4)
    assert dataclasses.replace(back.config, denoising_queries=7, contrastive=config.contrastive) == config
    assert_same(back.model, model)
    assert "official DINO" in back.report


def test_names_and_shapes_are_those_of_the_official_checkpoint(data_dir):
    """All 626 tensors, aliases included, and which of them are trained."""
    lines = (data_dir / "reference" / "dino_4scale_names.txt").read_text().splitlines()
    expected = {name: tuple(map(int, shape.split("x"))) for name, shape in (line.split()[:2] for line in lines)}
    frozen = {line.split()[0] for line in lines if "(frozen)" in line}
    config = DINOConfig.r50_4scale()
    graphdef, state = nnx.split(build_abstract(config))
    # One number, seen as a whole tensor.
    zeros = [
        (path, leaf.replace(np.broadcast_to(np.float32(0), leaf.shape))) for path, leaf in nnx.to_flat_state(state)
    ]
    model = nnx.merge(graphdef, nnx.from_flat_state(zeros))
    assert {name: x.shape for name, x in convert.export(model, config, key_maps.OFFICIAL_DINO).items()} == expected
    _, params, _ = split(config, model)
    paths = [".".join(str(part.key) for part in path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    trained = dino_cases.official({path: np.zeros((1, 1)) for path in paths if path.startswith("backbone")})
    weights = {n for n in expected if n.startswith("backbone") and len(expected[n]) == 4}
    assert weights - trained.keys() == frozen and trained.keys() <= weights


def test_detrex_and_back(tmp_path):
    config = dataclasses.replace(MODELS["own_heads"], position_temperature=10000.0, half_pixel=True)
    model = model_of(config)
    model.label_embed[...] = np.append(model.label_embed[...][:-1], np.zeros((1, 64), np.float32), 0)  # has no such row
    tensors = convert.export(model, config, key_maps.DETREX_DINO)
    assert {"neck.convs.2.conv.weight", "neck.extra_convs.0.norm.bias", "transformer.decoder.class_embed.2.bias"} <= (
        tensors.keys()
    )
    assert tensors["label_enc.weight"].shape == (5, 64) and "neck.convs.3.conv.weight" not in tensors
    back = convert.load(write(tensors, tmp_path / "detrex.safetensors"), num_heads=4)
    assert dataclasses.replace(back.config, denoising_queries=7) == config
    assert_same(back.model, model)


def test_heads_of_all_layers_go_to_detrex(tmp_path):
    config, model = MODELS["4_scales"], model_of(MODELS["4_scales"])
    tensors = convert.export(model, config, key_maps.DETREX_DINO)
    for i, ours in ((0, 0), (1, 0), (2, 1)):
        np.testing.assert_array_equal(tensors[f"class_embed.{i}.bias"], model.class_embed[ours].bias[...])
    convert.save(tmp_path / "detrex.safetensors", model, config, CELLS, detrex=True)
    back = convert.load(tmp_path / "detrex.safetensors")
    assert back.config == dataclasses.replace(config, shared_heads=False) and "detrex DINO" in back.report
    np.testing.assert_array_equal(back.model.class_embed[1].bias[...], model.class_embed[0].bias[...])
    with pytest.raises(ValueError, match="only DINO is written with detrex's names"):
        convert.save(tmp_path / "x.safetensors", model, DeformableDETRConfig(), CELLS, detrex=True)


def test_transformers_has_no_dino(tmp_path):
    with pytest.raises(ValueError, match=r"transformers has no DINO: write a \.safetensors file"):
        convert.save(tmp_path / "folder", model_of(MODELS["4_scales"]), MODELS["4_scales"], CELLS)


def test_our_checkpoints_and_fine_tuning_with_other_classes(tmp_path):
    config, model = MODELS["4_scales"], model_of(MODELS["4_scales"])
    loaded = Loaded(config, model, CELLS, "focal", 96, 128, "")
    loaded.save(tmp_path / "ours")
    back = load(tmp_path / "ours")
    assert back.config == config
    assert_same(back.model, model)
    fewer = dataclasses.replace(config, num_classes=3)
    _, params, buffers = split(fewer, model_of(fewer))
    params, buffers = (jax.tree.map(lambda x: jnp.asarray(x) * 0, tree) for tree in (params, buffers))
    params, _, report = initialize_from(
        str(tmp_path / "ours"), fewer, Categories.contiguous({1: "a", 2: "b", 3: "c"}), params, buffers
    )
    assert "initialized anew: class_embed.0.bias, class_embed.0.kernel, class_embed.1.bias" in report
    # The last row of the label table stands for no class, here and there.
    assert not params["label_embed"][:3].any() and not params["class_embed"][1]["kernel"].any()
    np.testing.assert_array_equal(params["query_embed"], model.query_embed[...])
