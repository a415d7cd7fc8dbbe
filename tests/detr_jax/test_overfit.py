"""Each variant can memorise eight real COCO images: model, matching, losses, resampling and evaluation as one.

Minutes each on two cores; `pytest -m slow tests/test_overfit.py`.
"""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tiny

from detr_jax.checkpoints import store
from detr_jax.config import (
    BackboneConfig,
    Config,
    DataConfig,
    DeformableDETRConfig,
    DETRConfig,
    DINOConfig,
    LossConfig,
    OptimConfig,
    TrainConfig,
)

ROOT = Path(__file__).parents[2]
COCO = ROOT / "tests" / "data" / "coco_open"
# Those with few objects, 41 pixels wide or more: the time goes into the variants, not into tiny boxes.
PHOTOS = {"train": (30, 72, 73, 86, 92, 165, 194), "val": (377575,)}

# Evaluation pads each image to other buckets than training does: with masks, that does not change its boxes.
BACKBONE = BackboneConfig(depth=18, norm="group", freeze_at=0, mask_padding=True)
DC5 = dataclasses.replace(BACKBONE, dilation=True)
SMALL = {"hidden_dim": 128, "encoder_layers": 2, "decoder_layers": 3, "ffn_dim": 256, "dropout": 0.0}
DEFORMABLE = DeformableDETRConfig(backbone=BACKBONE, num_queries=30, **SMALL)
DN = dataclasses.replace(DINOConfig.dn_deformable_r50(), backbone=BACKBONE, num_queries=30, **SMALL)
FILES = {"annotations": "annotations.json", "images": "images"}
VARIANTS = {
    "detr": (DETRConfig(backbone=BACKBONE, num_queries=30, **SMALL), 800),
    "single_scale": (dataclasses.replace(DEFORMABLE, num_levels=1), 500),
    "single_scale_dc5": (dataclasses.replace(DEFORMABLE, num_levels=1, backbone=DC5), 500),
    "multi_scale": (DEFORMABLE, 500),
    "refine": (dataclasses.replace(DEFORMABLE, box_refinement=True), 500),
    "two_stage": (dataclasses.replace(DEFORMABLE, box_refinement=True, two_stage=True), 400),
    "dino": (DINOConfig(backbone=BACKBONE, num_queries=30, **SMALL), 400),
    "dn_deformable": (DN, 500),
}
LOSSES = {"detr": LossConfig.detr(), "dino": LossConfig.dino(), "dn_deformable": LossConfig.dino()}


def eight_images(folder: Path) -> Path:
    """A COCO-format folder of them."""
    content: dict = {"images": [], "annotations": []}
    (folder / "images").mkdir(parents=True)
    for split, ids in PHOTOS.items():
        source = json.loads((COCO / f"annotations/instances_{split}2017.json").read_text())
        images = [image for image in source["images"] if image["id"] in ids]
        content["images"] += images
        content["annotations"] += [a for a in source["annotations"] if a["image_id"] in ids]
        for image in images:
            shutil.copy(COCO / f"{split}2017" / image["file_name"], folder / "images")
    used = {annotation["category_id"] for annotation in content["annotations"]}
    content["categories"] = [category for category in source["categories"] if category["id"] in used]
    (folder / "annotations.json").write_text(json.dumps(content))
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_overfits_eight_images(tmp_path, variant):
    model, steps = VARIANTS[variant]
    files = {f"{split}_{what}": name for split in ("train", "val") for what, name in FILES.items()}
    run = Config(
        model=model,
        loss=LOSSES.get(variant, LossConfig()),
        data=DataConfig(
            root=str(eight_images(tmp_path / "data")),
            **files,
            scales=(64,),
            max_size=96,
            eval_scale=64,
            max_source_side=128,
            flip=False,
            crop=False,
            cache=True,
            engine="pillow",
            workers=2,
        ),
        optim=OptimConfig(lr=4e-4, backbone_lr_factor=1.0, offsets_lr_factor=1.0, warmup_steps=20, ema_decay=0.9),
        train=TrainConfig(output_dir=str(tmp_path / "run"), batch_size=8, epochs=steps, eval_every=0, log_every=25),
    )
    command = [sys.executable, "train.py", "--config", str(tiny.write_config(tmp_path / "config.py", run))]
    # A process of its own: the tests' XLA flags compile fast and compute slowly.
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    subprocess.run(command, cwd=ROOT, env=environment, check=True)
    scores = store.read_metadata(str(tmp_path / "run"))
    assert scores["AP"] > 0.9, scores["AP"]
