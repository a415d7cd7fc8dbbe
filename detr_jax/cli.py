"""Command lines: a recipe or a checkpoint gives the defaults, flags override any field."""

import argparse
import dataclasses
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path

import tyro

from detr_jax import checkpoint
from detr_jax.config import Config, DataConfig, from_dict
from detr_jax.data.image import DataError
from detr_jax.training import NonFiniteLossError


def load_recipe(path: str) -> Config:
    """Runs a recipe file and returns the `Config` that it assigns to `config`.

    Raises:
        ValueError: no such file, or it has no `Config` named `config`.
    """
    if not Path(path).is_file():
        recipes = ", ".join(sorted(str(p) for p in Path("configs").glob("*.py"))) or "none found in configs/"
        raise ValueError(f"--config {path}: no such file. Recipes: {recipes}")
    spec = importlib.util.spec_from_file_location("recipe", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = getattr(module, "config", None)
    if not isinstance(config, Config):
        raise ValueError(f"--config {path}: expected `config = Config(...)`, got {config!r}")
    return config


def parse_train(argv: Sequence[str]) -> Config:
    """`--config RECIPE [--section.field value ...]` -> the configuration of the run."""
    first = argparse.ArgumentParser(add_help=False)
    first.add_argument("--config")
    known, rest = first.parse_known_args(argv)
    helping = bool({"-h", "--help"} & set(rest))
    if known.config is None and not helping:
        raise ValueError("--config is missing: python train.py --config configs/RECIPE.py --data.root FOLDER")
    default = load_recipe(known.config) if known.config else Config()
    return tyro.cli(
        tyro.conf.AvoidSubcommands[Config],
        default=default,
        args=rest,
        prog="train.py --config RECIPE",
        description="Train a detector. Defaults below are those of the recipe; every field can be overridden.",
    )


@dataclasses.dataclass(frozen=True)
class EvalOptions:
    """What to evaluate, and where the results go."""

    checkpoint: str
    """A run's output directory, its `checkpoints/`, or one checkpoint in it."""
    step: str = "best"
    """`best` (by validation AP; the newest if none has one), `latest`, or a step."""
    batch_size: int = 8
    """Global batch over all devices."""
    results: str | None = None
    """Write the detections here, as JSON that pycocotools loads."""
    pictures: str | None = None
    """Write pictures here: ground truth beside detections."""
    num_pictures: int = 8
    """How many."""
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    """Images; the defaults are those of the checkpoint's training."""


def parse_eval(argv: Sequence[str]) -> EvalOptions:
    """`--checkpoint DIR [...]` -> the options; the checkpoint gives the defaults of `data`."""
    first = argparse.ArgumentParser(add_help=False)
    first.add_argument("--checkpoint")
    known, _ = first.parse_known_args(argv)
    data = DataConfig()
    if known.checkpoint:
        saved = checkpoint.read_metadata(known.checkpoint)
        data = from_dict(saved["config"], saved["model"]).data
    return tyro.cli(
        EvalOptions,
        default=EvalOptions(checkpoint=known.checkpoint or tyro.MISSING, data=data),
        args=list(argv),
        prog="eval.py",
        description="Score a checkpoint with pycocotools on the validation set.",
    )


def run(main) -> None:
    """Runs a program's `main(argv)`; a mistake of the user's ends it with a message, not a traceback."""
    try:
        main(sys.argv[1:])
    except (ValueError, FileNotFoundError, NonFiniteLossError, DataError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
