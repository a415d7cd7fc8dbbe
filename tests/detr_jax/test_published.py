"""Published hyper-parameters, written down again from the papers and the official repositories' tables.

Nothing here is computed from this project's defaults: a changed default, or a changed config, is a failure.

- DETR: facebookresearch/detr, `main.py` (defaults of `get_args_parser`) and README (500 epochs, 16 GPUs x 4 images).
- Deformable DETR: fundamentalvision/Deformable-DETR, `main.py`, `configs/*.sh` and README (50 epochs, batch 32); ICLR
  2021 paper, section 5 and appendix A.4. The paper says Adam; the code uses AdamW.
- DINO: IDEA-Research/DINO, `config/DINO/`.
"""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from detr_jax import cli
from detr_jax.postprocess import postprocess

CONFIGS = Path(__file__).parents[2] / "configs"

TRANSFORMER = {"hidden_dim": 256, "num_heads": 8, "encoder_layers": 6, "decoder_layers": 6, "dropout": 0.1}
DETR_MODEL = TRANSFORMER | {"ffn_dim": 2048, "num_queries": 100, "pre_norm": False, "position": "sine"}
DEFORMABLE_MODEL = TRANSFORMER | {
    "ffn_dim": 1024,
    "num_queries": 300,
    "num_levels": 4,
    "encoder_points": 4,
    "decoder_points": 4,
    "box_refinement": False,
    "two_stage": False,
}
DETR_LOSS = {
    "classification": "softmax",
    "class_weight": 1.0,
    "l1_weight": 5.0,
    "giou_weight": 2.0,
    "class_cost": 1.0,
    "l1_cost": 5.0,
    "giou_cost": 2.0,
    "no_object_weight": 0.1,
    "aux_loss": True,
}
DEFORMABLE_LOSS = {
    "classification": "focal",
    "class_weight": 2.0,
    "l1_weight": 5.0,
    "giou_weight": 2.0,
    "class_cost": 2.0,
    "l1_cost": 5.0,
    "giou_cost": 2.0,
    "focal_alpha": 0.25,
    "focal_gamma": 2.0,
    "aux_loss": True,
}
# datasets/coco.py, the same in both repositories.
DATA = {
    "flip": True,
    "crop": True,
    "scales": (480, 512, 544, 576, 608, 640, 672, 704, 736, 768, 800),
    "max_size": 1333,
    "crop_scales": (400, 500, 600),
    "crop_size": (384, 600),
    "eval_scale": 800,
}
OPTIM = {"weight_decay": 1e-4, "clip_norm": 0.1, "warmup_steps": 0, "drop_factor": 0.1, "ema_decay": 0.0}
# --lr 1e-4 --lr_backbone 1e-5; --lr_drop 400 of 500 epochs.
DETR_OPTIM = OPTIM | {"lr": 1e-4, "backbone_lr_factor": 0.1, "drop_at": 0.8}
# --lr 2e-4 --lr_backbone 2e-5 --lr_linear_proj_mult 0.1; --lr_drop 40 of 50 epochs.
DEFORMABLE_OPTIM = OPTIM | {"lr": 2e-4, "backbone_lr_factor": 0.1, "offsets_lr_factor": 0.1, "drop_at": 0.8}
DETR_TRAIN = {"epochs": 500, "batch_size": 64}
DEFORMABLE_TRAIN = {"epochs": 50, "batch_size": 32}

PUBLISHED = {
    "detr_r50": ("DETR", {}, {}, "42.0"),
    "detr_r50_dc5": ("DETR", {}, {"dilation": True}, "43.3"),
    "detr_r101": ("DETR", {}, {"depth": 101}, "43.5"),
    "detr_r101_dc5": ("DETR", {}, {"depth": 101, "dilation": True}, "44.9"),
    "deformable_detr_r50_single_scale": ("Deformable", {"num_levels": 1}, {}, "39.4"),
    "deformable_detr_r50_single_scale_dc5": ("Deformable", {"num_levels": 1}, {"dilation": True}, "41.5"),
    "deformable_detr_r50": ("Deformable", {}, {}, "44.5"),
    "deformable_detr_r50_refine": ("Deformable", {"box_refinement": True}, {}, "46.2"),
    "deformable_detr_r50_two_stage": ("Deformable", {"box_refinement": True, "two_stage": True}, {}, "46.9"),
}
"""Config -> paper, its fields of the model, those of the backbone, and the repository's AP on val2017."""


# IDEA-Research/DINO, config/DINO/DINO_4scale.py and its training scripts (which say dn_box_noise_scale=1.0); paper,
# Table 2 and appendix D. The 5-scale model adds C2 as a fifth level.
DINO_MODEL = TRANSFORMER | {
    "dropout": 0.0,
    "ffn_dim": 2048,
    "num_queries": 900,
    "max_detections": 300,
    "num_levels": 4,
    "encoder_points": 4,
    "decoder_points": 4,
    "denoising_queries": 100,
    "label_noise": 0.5,
    "box_noise": 1.0,
    "position_temperature": 20.0,
}
DINO_OPTIM = OPTIM | {"lr": 1e-4, "backbone_lr_factor": 0.1, "offsets_lr_factor": 1.0}
DINO = {
    "dino_r50_4scale_12ep": ({}, 11, 12, "49.0"),
    "dino_r50_5scale_12ep": ({"num_levels": 5}, 11, 12, "49.4"),
    "dino_r50_4scale_24ep": ({}, 20, 24, "50.4"),
    "dino_r50_4scale_36ep": ({}, 30, 36, "50.9"),
}
"""Config -> its fields of the model, the last epoch before the learning rate drops, epochs, AP on val2017."""


@pytest.mark.parametrize("name", DINO)
def test_dinos_configs_are_the_published_ones(name):
    model, drop, epochs, ap = DINO[name]
    config = cli.load_config(str(CONFIGS / f"{name}.py"))
    expected = {
        "model": DINO_MODEL | model,
        "loss": DEFORMABLE_LOSS | {"class_weight": 1.0},
        "data": DATA,
        "optim": DINO_OPTIM,
        "train": {"epochs": epochs, "batch_size": 16},
    }
    sections = dataclasses.asdict(config)
    assert {s: {field: sections[s][field] for field in fields} for s, fields in expected.items()} == expected
    assert round(config.optim.drop_at * epochs, 6) == drop
    assert f"AP {ap}" in (CONFIGS / f"{name}.py").read_text()


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_configs_are_the_published_ones(name):
    paper, model, backbone, ap = PUBLISHED[name]
    config = cli.load_config(str(CONFIGS / f"{name}.py"))
    detr = paper == "DETR"
    expected = {
        "model": (DETR_MODEL if detr else DEFORMABLE_MODEL) | model,
        "backbone": {"depth": 50, "norm": "frozen_batch", "dilation": False, "freeze_at": 2} | backbone,
        "loss": DETR_LOSS if detr else DEFORMABLE_LOSS,
        "data": DATA,
        "optim": DETR_OPTIM if detr else DEFORMABLE_OPTIM,
        "train": DETR_TRAIN if detr else DEFORMABLE_TRAIN,
    }
    sections = dataclasses.asdict(config)
    sections["backbone"] = sections["model"]["backbone"]
    got = {section: {field: sections[section][field] for field in fields} for section, fields in expected.items()}
    assert got == expected
    assert f"AP {ap}" in (CONFIGS / f"{name}.py").read_text()


def test_a_hundred_detections_per_image():
    """`PostProcess` of Deformable DETR keeps the best 100 of all (query, class) pairs: 300 x 91 of them."""
    outputs = {
        "pred_logits": jax.ShapeDtypeStruct((2, 300, 91), jnp.float32),
        "pred_boxes": jax.ShapeDtypeStruct((2, 300, 4), jnp.float32),
    }
    size = jax.ShapeDtypeStruct((2, 2), jnp.int32)
    scores, _, _ = jax.eval_shape(lambda *args: postprocess(*args, classification="focal"), outputs, size)
    assert scores.shape == (2, 100)
