"""The installed wheel in an empty folder: fine-tuning on exports of the common tools, checkpoints by name."""

import json
import os
import sys
from pathlib import Path

import exports
import hub_server
import numpy as np
import pytest
import tiny
import transformers_weights
from safetensors.numpy import save_file
from wheel_install import run

from detr_jax import cli
from detr_jax.categories import Categories
from detr_jax.checkpoints import Loaded
from detr_jax.config import BackboneConfig, DeformableDETRConfig

pytestmark = pytest.mark.slow

IMAGE = tiny.DATA / "bccd/images/BloodImage_00001.jpg"
CELLS = Categories((1, 2, 3), ("RBC", "WBC", "Platelets"))
MODEL = DeformableDETRConfig(
    backbone=BackboneConfig(depth=18), num_classes=3, hidden_dim=32, num_heads=4, encoder_layers=1, decoder_layers=1,
    ffn_dim=32, num_queries=20, num_levels=2,
)  # fmt: skip
SIZES = ["--data.scales", "64", "--data.eval-scale", "64", "--data.max-size", "96", "--data.no-crop"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """A detector of blood cells, with random weights."""
    folder = tmp_path_factory.mktemp("checkpoint")
    model = transformers_weights.load(MODEL, transformers_weights.random_weights(MODEL))
    Loaded(MODEL, model, CELLS, "focal", 64, 96, "random weights").save(folder)
    return folder


@pytest.fixture
def detr_jax(installed, tmp_path):
    """`detr-jax ARGUMENTS` in an empty folder; gives the output."""

    def program(*arguments: str, **variables: str) -> str:
        environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
        environment |= {"PYTHONPATH": str(installed), "JAX_PLATFORMS": "cpu"} | variables
        return run([sys.executable, str(installed / "bin/detr-jax"), *arguments], cwd=tmp_path, env=environment)

    return program


@pytest.mark.parametrize("name", exports.FORMATS)
def test_from_an_export_to_a_fine_tuned_model(name, checkpoint, detr_jax, tmp_path):
    exports.FORMATS[name](tmp_path / "export")
    options = ["--train.batch-size", "2", "--train.max-steps", "3", *SIZES]
    out = detr_jax("train", "--init-from", str(checkpoint), "--data.root", "export", *options)
    # Roboflow's class 0, which has no boxes, is new; the others go by name.
    assert "RBC" in out and ("1 new: cells" in out) == (name == "roboflow"), out
    image = next((tmp_path / "export").rglob("*.jpg"))
    out = detr_jax("predict", str(image), "--checkpoint", "runs/fine_tune", "--out", "found", "--threshold", "0")
    found = json.loads((tmp_path / "found/results.json").read_text())
    assert found and {row["category_name"] for row in found} <= {"RBC", "WBC", "Platelets", "cells"}, out
    assert (tmp_path / "found" / image.name).is_file()


def test_by_name_and_offline_afterwards(checkpoint, detr_jax, tmp_path):
    hub = tmp_path / "hub"
    for name in ("detector", "private"):
        folder = hub / "org" / name
        folder.parent.mkdir(parents=True, exist_ok=True)
        cli.main(["convert", str(checkpoint), str(folder), "--naming", "transformers"])
    (hub / "timm/resnet18").mkdir(parents=True)
    (hub / "timm/resnet18/config.json").write_text('{"architecture": "resnet18"}')
    save_file(resnet18(), hub / "timm/resnet18/model.safetensors")
    cache = {"HF_HOME": str(tmp_path / "cache"), "HF_HUB_DISABLE_XET": "1"}
    predict = ["predict", str(IMAGE), "--threshold", "0", "--out"]
    exports.voc(tmp_path / "export")
    train = ["train", "--config", "deformable_detr_r50", "--data.root", "export", *SIZES, "--train.max-steps", "1"]
    train += ["--train.init-backbone", "timm/resnet18", "--model.backbone.depth", "18", "--train.batch-size", "1"]
    train += ["--model.hidden-dim", "32", "--model.encoder-layers", "1", "--model.decoder-layers", "1"]
    with hub_server.serve(hub, token="secret") as (endpoint, asked):
        online = cache | {"HF_ENDPOINT": endpoint}
        detr_jax(*predict, "online", "--checkpoint", "org/detector", **online)
        detr_jax(*predict, "private", "--checkpoint", "org/private", HF_TOKEN="secret", **online)
        assert "timm/resnet18" in detr_jax(*train, "--train.output-dir", "online_run", **online)
    assert not [path for path in asked if path.endswith((".bin", ".py"))]
    detr_jax(*predict, "offline", "--checkpoint", "org/detector", HF_HUB_OFFLINE="1", **cache)
    assert "timm/resnet18" in detr_jax(*train, "--train.output-dir", "offline_run", HF_HUB_OFFLINE="1", **cache)
    results = [json.loads((tmp_path / out / "results.json").read_text()) for out in ("online", "private", "offline")]
    assert results[0] and results[0] == results[1] == results[2]


def test_a_private_name_without_its_token(detr_jax, tmp_path):
    (tmp_path / "hub/org/private").mkdir(parents=True)
    with hub_server.serve(tmp_path / "hub", token="secret") as (endpoint, _):
        variables = {"HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path / "cache")}
        with pytest.raises(AssertionError, match=r"org/private.*for a private one set HF_TOKEN"):
            detr_jax("predict", str(IMAGE), "--checkpoint", "org/private", "--out", "out", **variables)


def resnet18() -> dict[str, np.ndarray]:
    """timm's names."""
    rng = np.random.default_rng(0)
    tensors: dict[str, np.ndarray] = {}

    def convolution(conv: str, norm: str, n_in: int, n_out: int, size: int) -> None:
        tensors[f"{conv}.weight"] = 0.05 * rng.standard_normal((n_out, n_in, size, size), np.float32)
        for leaf in ("weight", "bias", "running_mean", "running_var"):
            tensors[f"{norm}.{leaf}"] = np.ones(n_out, np.float32)

    convolution("conv1", "bn1", 3, 64, 7)
    n_in = 64
    for stage, width in enumerate((64, 128, 256, 512), 1):
        for block in range(2):
            name = f"layer{stage}.{block}"
            convolution(f"{name}.conv1", f"{name}.bn1", n_in, width, 3)
            convolution(f"{name}.conv2", f"{name}.bn2", width, width, 3)
            if n_in != width:
                convolution(f"{name}.downsample.0", f"{name}.downsample.1", n_in, width, 1)
            n_in = width
    return tensors | {"fc.weight": np.zeros((1000, 512), np.float32), "fc.bias": np.zeros(1000, np.float32)}
