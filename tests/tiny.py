"""A training run small enough for tests, on the blood-cell images: seconds a step at most on one core."""

import dataclasses
import json
import shutil
from pathlib import Path

from detr_jax.config import (
    BackboneConfig,
    Config,
    DataConfig,
    DeformableDETRConfig,
    DINOConfig,
    LossConfig,
    OptimConfig,
    TrainConfig,
    TuneConfig,
)

DATA = Path(__file__).parent / "data"


def config(output_dir: str | Path = "unused", **train) -> Config:
    """Two-stage Deformable DETR with dropout on 64 x 85 pixels; keywords are fields of `TrainConfig`."""
    defaults = {"batch_size": 8, "epochs": 2, "log_every": 1, "eval_every": 0, "num_pictures": 0, "checkpoint_every": 2}
    return Config(
        model=DeformableDETRConfig(
            backbone=BackboneConfig(depth=18, norm="group", freeze_at=0),
            hidden_dim=32,
            num_heads=4,
            encoder_layers=1,
            decoder_layers=2,
            ffn_dim=64,
            num_queries=30,
            num_levels=2,
            encoder_points=2,
            decoder_points=2,
            box_refinement=True,
            two_stage=True,
        ),
        data=DataConfig(
            root=str(DATA / "bccd"),
            scales=(64, 56),
            max_size=96,
            crop=False,
            eval_scale=64,
            max_source_side=160,
            engine="pillow",
            workers=2,
        ),
        optim=OptimConfig(lr=1e-3, ema_decay=0.9),
        train=TrainConfig(output_dir=str(output_dir), **(defaults | train)),
    )


def dino(output_dir: str | Path = "unused", **train) -> Config:
    """The same with DINO, and dropout beside denoising."""
    run = config(output_dir, **train)
    model = DINOConfig(**vars(run.model), denoising_queries=20)
    return dataclasses.replace(run, model=model, loss=LossConfig.dino())


RUNS = {"two_stage": config, "dino": dino}


def sixteen_images(folder: Path) -> Path:
    """A data set of eight training and eight validation images: an epoch is one batch of eight."""
    (folder / "annotations").mkdir(parents=True)
    (folder / "images").mkdir()
    for split in ("train", "val"):
        content = json.loads((DATA / f"bccd/annotations/instances_{split}.json").read_text())
        content["images"] = content["images"][:8]
        kept = {image["id"] for image in content["images"]}
        content["annotations"] = [a for a in content["annotations"] if a["image_id"] in kept]
        (folder / f"annotations/instances_{split}.json").write_text(json.dumps(content))
        for image in content["images"]:
            shutil.copy(DATA / "bccd/images" / image["file_name"], folder / "images")
    return folder


def fast_config(data: Path, output_dir: str | Path = "unused", *, model: str = "two_stage", **train) -> Config:
    """As `RUNS[model]`, on the images of `sixteen_images`; with one bucket and a frozen backbone: it compiles fast."""
    run = RUNS[model](output_dir, **train)
    tune = TuneConfig(freeze=("backbone",))
    return dataclasses.replace(
        run,
        model=dataclasses.replace(run.model, tune=tune),
        data=dataclasses.replace(run.data, root=str(data), scales=(64,)),
    )


def write_config(path: Path, run: Config) -> Path:
    """Writes a config file that says the same as `run`."""
    path.write_text(
        "from detr_jax.config import from_dict\n"
        f"config = from_dict({dataclasses.asdict(run)!r}, {type(run.model).__name__!r})\n"
    )
    return path
