"""Starting from a checkpoint of other classes: rows of the class heads go by name, whatever the ids."""

import dataclasses
import importlib
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny
import transformers_weights
from flax import nnx
from small_models import SMALL_MODELS

from detr_jax.categories import COCO, Categories
from detr_jax.checkpoints import store
from detr_jax.models import split

loading = importlib.import_module("detr_jax.checkpoints.load")  # the package's `load` is the function


def start(monkeypatch, name: str, old: Categories, new: Categories) -> tuple[dict, dict, dict, str]:
    """Class heads of the source, of the new model before and after, and the report."""
    base = dataclasses.replace(SMALL_MODELS[name], hidden_dim=32, ffn_dim=32, encoder_layers=1)
    configs = [dataclasses.replace(base, num_classes=len(c.ids)) for c in (old, new)]
    source = transformers_weights.load(configs[0], transformers_weights.random_weights(configs[0]))
    kind = "softmax" if name == "detr" else "focal"
    found = loading.Loaded(configs[0], source, old, kind, 800, 1333, "the file")
    monkeypatch.setattr(loading, "load", lambda *_, **__: found)
    zeros = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), transformers_weights.random_weights(configs[1]))
    _, params, buffers = split(configs[1], transformers_weights.load(configs[1], zeros))
    params, buffers = jax.device_put((params, buffers))
    after, _, report = loading.initialize_from("file", configs[1], new, params, buffers)
    heads = nnx.to_pure_dict(nnx.state(source))["class_embed"]
    return heads, params["class_embed"], after["class_embed"], report


CATS = Categories((1, 2, 3), ("cat", "dog", "bird"))


def test_foreign_classes_with_the_same_ids_are_new(monkeypatch):
    cells = Categories((1, 2, 3), ("RBC", "WBC", "Platelets"))
    old, new, after, report = start(monkeypatch, "deformable_two_stage", CATS, cells)
    for layer in (0, 1):
        np.testing.assert_array_equal(after[layer]["kernel"], new[layer]["kernel"])
    # The proposals' ranking is no class: it is kept.
    np.testing.assert_array_equal(after[2]["kernel"][:, 0], old[2]["kernel"][:, 0])
    assert "3 new: RBC, WBC, Platelets" in report and "class_embed.0.kernel" in report


def test_renumbered_and_swapped_classes_go_by_name(monkeypatch):
    mixed = Categories((1, 7, 8, 9), ("dog", "cat", "cow", "Bird"))
    old, _, after, report = start(monkeypatch, "detr", CATS, mixed)
    kernel = np.asarray(after["kernel"])
    np.testing.assert_array_equal(kernel[:, [0, 1, 3, 4]], np.asarray(old["kernel"])[:, [1, 0, 2, 3]])
    np.testing.assert_array_equal(kernel[:, 2], 0)
    assert "3 mapped by name: dog (2 -> 1), cat (1 -> 7), Bird (3 -> 9); 1 new: cow" in report


def test_all_of_the_official_91_outputs_that_are_coco_s_classes(monkeypatch):
    sparse, coco = Categories.coco_sparse(), Categories.contiguous(COCO)
    old, _, after, report = start(monkeypatch, "deformable_refine", sparse, coco)
    for layer in (0, 1):
        np.testing.assert_array_equal(after[layer]["bias"], np.asarray(old[layer]["bias"])[list(coco.ids)])
    assert "80 kept: person, bicycle" in report and "new" not in report.splitlines()[-1]
    assert "initialized anew: none" in report


def test_a_model_that_was_trained_with_remat_is_loaded_without(monkeypatch):
    config = tiny.config()
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, remat="all"))
    saved = {"config": dataclasses.asdict(config), "model": "DeformableDETRConfig", "step": 1}
    monkeypatch.setattr(loading.hub, "locate", lambda *args, **kwargs: Path(__file__))
    monkeypatch.setattr(loading, "is_ours", lambda path: True)
    monkeypatch.setattr(store, "best_or_latest", lambda path: 1)
    monkeypatch.setattr(store, "read_metadata", lambda *args: saved | {"category_ids": [1], "category_names": ["cell"]})
    asked = []

    def restore(path, step, config, mesh):
        asked.append(config.model)
        return nnx.split(nnx.Linear(1, 1, rngs=nnx.Rngs(0)), nnx.Param, ...)

    monkeypatch.setattr(loading, "restore_model", restore)
    assert loading.load("run").config.remat == asked[0].remat == "none"


@pytest.mark.parametrize(("ids", "kept"), [((1, 2, 3), True), ((0, 1, 2, 3), False)])
def test_a_checkpoint_without_names_goes_by_ids_that_are_all_the_same(monkeypatch, ids, kept):
    unnamed = Categories(ids, tuple(f"class {i}" for i in ids))
    old, _, after, report = start(monkeypatch, "deformable_single_scale", unnamed, CATS)
    assert np.array_equal(after[0]["bias"], old[0]["bias"]) == kept
    assert ("3 taken by id" if kept else "3 new: cat, dog, bird") in report
