"""Command lines: a config or a checkpoint gives the defaults, flags override any field.

Whatever is heavy is imported where it is used, so that `--help` and a typo are answered at once.
"""

import argparse
import dataclasses
import importlib.util
import sys
import traceback
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import tyro

from detr_jax.config import Config, DataConfig, from_dict
from detr_jax.errors import NotFoundError, UserError
from detr_jax.tta import TTAConfig
from detr_jax.visualize import command as figures

if TYPE_CHECKING:
    from PIL import Image


def load_config(path: str) -> Config:
    """Runs a config file and returns the `Config` that it assigns to `config`.

    Raises:
        UserError: no such file, not a Python file, a mistake in it (with its line), or no `Config` named `config`.
    """
    if not Path(path).is_file():
        configs = ", ".join(sorted(str(p) for p in Path("configs").glob("*.py"))) or "none found in configs/"
        raise UserError(f"--config {path}: no such file. Configs: {configs}")
    if Path(path).suffix != ".py":
        raise UserError(f"--config {path}: expected a Python file, *.py, that assigns `config = Config(...)`")
    spec = importlib.util.spec_from_file_location("config", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        line = _line_of(error, path)
        if line is None:
            raise  # not in the config: a bug of ours
        name = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
        message = error.msg if isinstance(error, SyntaxError) else str(error)
        raise UserError(f"--config {path}, line {line}: {name}{message}") from error
    config = getattr(module, "config", None)
    if not isinstance(config, Config):
        raise UserError(f"--config {path}: expected `config = Config(...)`, got {config!r}")
    return config


def _line_of(error: Exception, path: str) -> int | None:
    """The line of a config file that an error comes from; `None` for a bug inside of this package."""
    config, package = Path(path).resolve(), Path(__file__).resolve().parent
    if isinstance(error, SyntaxError) and error.filename and Path(error.filename).resolve() == config:
        return error.lineno
    line = None
    for frame in traceback.extract_tb(error.__traceback__):
        file = Path(frame.filename).resolve()
        if file == config:
            line = frame.lineno
        elif file.is_relative_to(package) and line is not None and not isinstance(error, UserError):
            return None
    return line


def parse_train(argv: Sequence[str]) -> Config:
    """`--config CONFIG [--section.field value ...]` -> the configuration of the run."""
    first = argparse.ArgumentParser(add_help=False)
    first.add_argument("--config")
    # Short for --train.init-from.
    first.add_argument("--init-from")
    known, rest = first.parse_known_args(argv)
    if known.init_from:
        rest += ["--train.init-from", known.init_from]
    helping = bool({"-h", "--help"} & set(rest))
    if known.config is None and not helping:
        raise UserError("--config is missing: python train.py --config configs/CONFIG.py --data.root FOLDER")
    default = load_config(known.config) if known.config else Config()
    config = tyro.cli(
        tyro.conf.AvoidSubcommands[Config],
        default=default,
        args=rest,
        prog="train.py --config CONFIG",
        description="Train a detector. Defaults below are those of the config; every field can be overridden.",
    )
    _check_folder("--train.output-dir", config.train.output_dir)
    return config


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
    tta: bool = False
    """Test-time augmentation: every image at the scales of `tta_scales`, also flipped, the boxes merged."""
    tta_scales: tuple[int, ...] = TTAConfig.scales
    """The shorter sides, in pixels."""
    mask_padding: bool | None = None
    """Mask the padding in every layer: the official result at batch 1. None takes the checkpoint's."""
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    """Images; the defaults are those of the checkpoint's training."""


def parse_eval(argv: Sequence[str]) -> EvalOptions:
    """`--checkpoint DIR [...]` -> the options; the checkpoint gives the defaults of `data`."""
    first = argparse.ArgumentParser(add_help=False)
    first.add_argument("--checkpoint")
    known, _ = first.parse_known_args(argv)
    data = DataConfig()
    if known.checkpoint:
        from detr_jax.checkpoints import store

        saved = store.read_metadata(known.checkpoint)
        data = from_dict(saved["config"], saved["model"], known.checkpoint).data
    options = tyro.cli(
        EvalOptions,
        default=EvalOptions(checkpoint=known.checkpoint or tyro.MISSING, data=data),
        args=list(argv),
        prog="eval.py",
        description="Score a checkpoint with pycocotools on the validation set; without annotations, detect alone.",
    )
    if options.pictures:
        _check_folder("--pictures", options.pictures)
    if options.results:
        _check_file("--results", options.results)
    return options


_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif")


def predict(
    images: tyro.conf.Positional[tuple[str, ...]],
    /,
    checkpoint: str,
    out: str,
    threshold: float = 0.5,
    batch_size: int = 1,
    scale: int | None = None,
    max_size: int | None = None,
    dilation: bool | None = None,
    mask_padding: bool | None = None,
) -> None:
    """Detect: draws boxes with names on images, and writes results.json in COCO's results format.

    Args:
        images: Images, and folders of images.
        checkpoint: A run's folder, an official .pth or .safetensors file, or a folder of transformers.
        out: Folder for the pictures and results.json.
        threshold: Detections with a lower score are left out.
        batch_size: Images per step.
        scale: The shorter side is resized to this; None takes the checkpoint's (800).
        max_size: The longer side is never larger than this; None takes the checkpoint's (1333).
        dilation: DC5 or not, for files that do not tell.
        mask_padding: Mask the padding in every layer: the official result at batch 1. None takes the checkpoint's.
    """
    from tqdm import tqdm

    from detr_jax.data.image import open_image
    from detr_jax.detector import Detector
    from detr_jax.postprocess import write_results

    paths, folder = _find_images(images), Path(out)
    if inside := [path for path in paths if path.resolve().parent == folder.resolve()]:
        raise UserError(f"--out {out}: {inside[0]} is in it, and pictures could replace images: choose another folder")
    _check_folder("--out", out)
    detector = Detector.from_pretrained(
        checkpoint,
        batch_size=batch_size,
        scale=scale,
        max_size=max_size,
        dilation=dilation,
        mask_padding=mask_padding,
    )
    folder.mkdir(parents=True, exist_ok=True)
    read, failed, results = deque(), [], []

    def readable() -> "Iterator[Image.Image]":
        for path in tqdm(paths, "detecting", unit=" images"):
            try:
                image = open_image(path)
            except (ValueError, OSError) as error:
                failed.append(f"  {error}")
                continue
            read.append(path)
            yield image

    try:
        for detections in detector.detect(readable(), threshold):
            path = read.popleft()
            detections.draw().save(folder / f"{path.stem}.jpg", quality=92)
            results += detections.as_results(path.name)
    finally:
        write_results(folder / "results.json", results)
    done = f"{len(paths) - len(failed)} images, {len(results)} detections of at least {threshold:g}"
    print(f"{done}: {folder}, {folder}/results.json")
    if failed:
        raise UserError("\n".join([f"{len(failed)} of {len(paths)} images could not be read:", *failed]))


def _find_images(given: Sequence[str]) -> list[Path]:
    """The files given, and those in the folders given."""
    paths = []
    for path in map(Path, given):
        if path.is_dir():
            inside = sorted(p for p in path.iterdir() if p.suffix.lower() in _SUFFIXES)
            if not inside:
                raise UserError(f"{path}: no image in it; expected {', '.join(_SUFFIXES)}")
            paths += inside
        elif path.is_file():
            paths.append(path)
        else:
            raise NotFoundError(f"{path}: no such image or folder")
    twice = [stem for stem, count in Counter(path.stem for path in paths).items() if count > 1]
    if not paths:
        raise UserError("no images given: detr-jax predict IMAGE... --checkpoint X --out DIR")
    if twice:
        raise UserError(f"several images are called {twice[0]}: their pictures would overwrite each other")
    return paths


def _check_folder(field: str, path: str) -> None:
    """Raises `UserError` where there is a file, or a file on the way there: before anything is computed."""
    for place in (Path(path), *Path(path).parents):
        if place.exists() and not place.is_dir():
            raise UserError(f"{field} {path}: {place} is a file, expected a folder, or nothing yet")


def _check_file(field: str, path: str) -> None:
    """Raises `UserError` where there is a folder, or a file on the way there: before anything is computed."""
    if Path(path).is_dir():
        raise UserError(f"{field} {path}: is a folder, expected a file")
    _check_folder(field, str(Path(path).parent))


def _check_new_folder(field: str, path: str) -> None:
    """As `_check_folder`, and where there is a checkpoint already."""
    _check_folder(field, path)
    if (Path(path) / "checkpoints").exists():
        raise UserError(f"{field} {path}: holds a checkpoint already; remove it, or choose another name")


def convert(
    source: tyro.conf.Positional[str],
    target: tyro.conf.Positional[str],
    /,
    naming: Literal["auto", "ours", "official", "transformers", "detrex"] = "auto",
    dilation: bool | None = None,
    num_heads: int | None = None,
    mask_padding: bool | None = None,
) -> None:
    """Convert a checkpoint: official, transformers, detrex, mmdetection or ours, to official, transformers or ours.

    Args:
        source: A .pth or .safetensors file, a folder of transformers, or a run's folder.
        target: A .safetensors file, for the official names; a folder, for ours.
        naming: Auto goes by the target; a folder can be of transformers instead (--naming transformers), a DINO's file
            of detrex.
        dilation: DC5 or not, for files that do not tell.
        num_heads: Attention heads, for files that do not tell (8).
        mask_padding: Mask the padding in every layer: the official result at batch 1. None takes the checkpoint's.
    """
    from detr_jax.checkpoints.convert import save
    from detr_jax.checkpoints.load import load

    if naming == "auto":
        naming = "official" if target.endswith(".safetensors") else "ours"
    if (naming in ("official", "detrex")) != target.endswith(".safetensors"):
        raise ValueError(f"{target}: official and detrex's names go to a .safetensors file, the others to a folder")
    if (naming == "official") != target.endswith(".safetensors"):
        raise UserError(f"{target}: official names go to a .safetensors file, the others to a folder")
    if Path(target).exists():
        raise UserError(f"{target}: exists already; remove it, or choose another name")
    _check_folder("target", str(Path(target).parent))
    loaded = load(source, dilation=dilation, num_heads=num_heads, mask_padding=mask_padding)
    print(loaded.report)
    if naming == "ours":
        loaded.save(target)
    else:
        sizes = {"scale": loaded.scale, "max_size": loaded.max_size}
        save(target, loaded.model, loaded.config, loaded.categories, detrex=naming == "detrex", **sizes)
    print(f"wrote {target}, {naming} names")


def export(
    checkpoint: tyro.conf.Positional[str],
    out: tyro.conf.Positional[str],
    /,
    bucket: tuple[int, int],
    batch: int = 1,
    mask_padding: bool | None = None,
) -> None:
    """Export a detector as one file that runs without this package: python FILE image.jpg.

    Args:
        checkpoint: As predict takes it.
        out: The file, such as detector.zip.
        bucket: Height and width in pixels that images are padded to, multiples of 32.
        batch: Images per call.
        mask_padding: Mask the padding in every layer: the official result at batch 1. None takes the checkpoint's.
    """
    from detr_jax.checkpoints.load import load
    from detr_jax.export import export

    _check_file("out", out)
    export(load(checkpoint, mask_padding=mask_padding), out, bucket, batch)
    print(f"wrote {out}: python {out} image.jpg")


def soup(checkpoints: tyro.conf.Positional[tuple[str, ...]], /, out: str) -> None:
    """Average checkpoints of one architecture.

    Args:
        checkpoints: Two or more, as predict takes them.
        out: Folder of the new checkpoint.
    """
    from detr_jax import surgery

    if not checkpoints:
        raise UserError("no checkpoints given: detr-jax soup CHECKPOINT... --out FOLDER")
    _check_new_folder("--out", out)
    mixed = surgery.soup(checkpoints)
    mixed.save(out)
    print(f"{mixed.changes}\nwrote {out}")


COMMANDS: dict[str, Callable[..., None]] = {"predict": predict, "convert": convert, "export": export, "soup": soup}


def main(argv: Sequence[str] | None = None) -> None:
    """`detr-jax predict`, `visualize`, `convert`, `export` and `soup`."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv[:1] == ["visualize"]:
        about = "Draw what happens inside a detector, or what it gets wrong. Each figure has its own --help."
        prog, commands, argv = "detr-jax visualize", figures.COMMANDS, argv[1:]
    else:
        about = "DETR and Deformable DETR. `detr-jax visualize` draws figures; train.py and eval.py train and score."
        prog, commands = "detr-jax", COMMANDS | {"visualize": figures.visualize}
    tyro.extras.subcommand_cli_from_dict(commands, prog=prog, description=about, args=argv)


def entry() -> None:
    """The `detr-jax` program."""
    run(main)


def run(main: Callable[[Sequence[str]], None]) -> None:
    """Runs a program's `main(argv)`; a mistake of the user's ends it with a message, a bug with its traceback.

    Files that cannot be read or written count as the user's.
    """
    try:
        main(sys.argv[1:])
    except UserError as error:
        sys.exit(f"error: {error}")
    except OSError as error:
        if error.filename is None:
            raise
        sys.exit(f"error: {error.filename}: {error.strerror}")
