"""An exported detector runs where there is no detr_jax, and finds what the detector finds."""

import dataclasses
import json
import os
import subprocess
import sys
import zipfile

import numpy as np
import pytest
import transformers_weights
from PIL import Image

from detr_jax import cli
from detr_jax.categories import Categories
from detr_jax.checkpoints.load import Loaded
from detr_jax.config import BackboneConfig, DeformableDETRConfig, DETRConfig, DINOConfig
from detr_jax.detector import Detector
from detr_jax.export import export

pytestmark = pytest.mark.usefixtures("short_resnet")

SMALL = {
    "backbone": BackboneConfig(depth=18),
    "num_classes": 3,
    "hidden_dim": 32,
    "num_heads": 2,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "ffn_dim": 32,
    "num_queries": 6,
}
DEFORMABLE = DeformableDETRConfig(**SMALL, num_levels=2, box_refinement=True, two_stage=True)
DINO = DINOConfig(**SMALL, num_levels=2, denoising_queries=4)
CELLS = Categories((4, 5, 9), ("RBC", "WBC", "platelet"))
# Imports fail as where the packages are not installed.
ALONE = """
import runpy, sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("detr_jax", "pallas_kernels", "flax", "optax", "orbax"):
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Absent())
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def loaded(config) -> Loaded:
    model = transformers_weights.load(config, transformers_weights.random_weights(config))
    classification = "softmax" if isinstance(config, DETRConfig) else "focal"
    return Loaded(config, model, CELLS, classification, 64, 96, "random weights")


@pytest.mark.parametrize("config", [DEFORMABLE, DINO, DETRConfig(**SMALL)], ids=["deformable", "dino", "detr"])
def test_runs_alone_and_finds_the_same(config, tmp_path):
    detector = loaded(config)
    detector.save(tmp_path / "run")
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 120, 3), np.uint8))
    image.save(tmp_path / "image.png")
    # The bucket that the detector itself takes for an image of 3:4.
    cli.main(["export", str(tmp_path / "run"), str(tmp_path / "detector.zip"), "--bucket", "64", "96"])
    with zipfile.ZipFile(tmp_path / "detector.zip") as archive:
        about = json.loads(archive.read("about.json"))
    assert about["platforms"] == ["cpu", "tpu", "cuda"] and about["category_names"] == ["RBC", "WBC", "platelet"]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, "-c", ALONE, "detector.zip", "image.png"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = [line.split(maxsplit=2) for line in done.stdout.splitlines()[1:]]
    expected = Detector(detector)(image, threshold=0.5)
    assert len(lines) == len(expected) > 0
    for (name, score, box), *wanted in zip(lines, expected.names, expected.scores, expected.boxes_xyxy, strict=True):
        assert name == wanted[0]
        assert abs(float(score) - wanted[1]) < 1e-3  # printed with three digits
        np.testing.assert_allclose(json.loads(box), wanted[2], atol=1)  # printed in whole pixels


def test_a_bucket_or_queries_that_do_not_fit(tmp_path):
    with pytest.raises(ValueError, match=r"bucket=\(60, 96\)"):
        export(loaded(DEFORMABLE), tmp_path / "x.zip", bucket=(60, 96))
    many = loaded(dataclasses.replace(DEFORMABLE, num_queries=100))
    with pytest.raises(ValueError, match="two-stage takes 100 queries"):
        export(many, tmp_path / "x.zip", bucket=(64, 64))
    assert not list(tmp_path.iterdir())
