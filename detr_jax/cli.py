"""Command lines: a config or a checkpoint gives the defaults, flags override any field.

Whatever is heavy is imported where it is used, so that `--help` and a typo are answered at once.
"""

import argparse
import dataclasses
import importlib.metadata
import importlib.util
import json
import os
import sys
import traceback
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from detr_jax.categories import Categories
from detr_jax.config import Config, DataConfig, Dtype, TTAConfig, from_dict
from detr_jax.errors import DataError, NotFoundError, UserError
from detr_jax.stall import StalledError
from detr_jax.visualize import command as figures

if TYPE_CHECKING:
    from PIL import Image

    from detr_jax.checkpoints import Loaded


def load_config(path: str) -> Config:
    """Runs a config file, or one of the configs that come with the package, and returns the `Config` it assigns.

    Args:
        path: a file, or a name such as `deformable_detr_r50_two_stage`.

    Raises:
        UserError: no such file, not a Python file, a mistake in it (with its line), or no `Config` named `config`.
    """
    published = _configs()
    if not Path(path).is_file() and path in published:
        path = str(published[path])
    if not Path(path).is_file():
        raise UserError(f"--config {path}: no such file or config. Configs: {', '.join(published)}")
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


def _configs() -> dict[str, Path]:
    """The configs that come with the package, by name: in its wheel they are inside of it, in a checkout beside it."""
    package = Path(__file__).parent
    folder = package / "configs" if (package / "configs").is_dir() else package.parent / "configs"
    return {path.stem: path for path in sorted(folder.glob("*.py"))}


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


def fine_tuning(checkpoint: str) -> Config:
    """The configuration of a run that starts from a checkpoint: `configs/fine_tune.py` with the file's architecture."""
    from detr_jax.checkpoints import is_ours, load, store

    base = load_config("fine_tune")
    if is_ours(checkpoint):
        saved = store.read_metadata(checkpoint)
        theirs = from_dict(saved["config"], saved["model"])
        nowhere = dict.fromkeys(("train_annotations", "train_images", "val_annotations", "val_images", "tfds"))
        data = dataclasses.replace(theirs.data, root="", **nowhere)
        return dataclasses.replace(base, model=theirs.model, loss=theirs.loss, data=data)
    found = load(checkpoint)
    data = dataclasses.replace(base.data, eval_scale=found.scale, max_size=found.max_size)
    return dataclasses.replace(found.run_config(data), optim=base.optim, train=base.train)


def parse_train(argv: Sequence[str], prog: str = "train.py") -> Config:
    """`--config CONFIG`, or `--init-from CHECKPOINT`, `[--section.field value ...]` -> the config of the run."""
    first = argparse.ArgumentParser(add_help=False)
    first.add_argument("--config")
    # Short for --train.init-from.
    first.add_argument("--init-from", "--train.init-from")
    known, rest = first.parse_known_args(argv)
    if known.init_from:
        rest += ["--train.init-from", known.init_from]
    helping = bool({"-h", "--help"} & set(rest))
    if known.config:
        default = load_config(known.config)
    elif known.init_from:
        default = fine_tuning(known.init_from)
    elif helping:
        default = Config()
    else:
        raise UserError(
            "--config is missing: --config CONFIG --data.root FOLDER, or --init-from CHECKPOINT --data.root FOLDER to "
            f"fine-tune. Configs: {', '.join(_configs())}"
        )
    config = tyro.cli(
        tyro.conf.AvoidSubcommands[Config],
        default=default,
        args=rest,
        prog=f"{prog} --config CONFIG",
        description="Train a detector. Defaults below are those of the config; every field can be overridden.",
    )
    _check_folder("--train.output-dir", config.train.output_dir)
    return config


@dataclasses.dataclass(frozen=True)
class EvalOptions:
    """What to evaluate, and where the results go."""

    checkpoint: str
    """A run's output directory, its `checkpoints/`, one checkpoint in it; a .pth or .safetensors file, a folder of
    transformers, or a name on the Hugging Face hub."""
    step: Literal["best", "latest"] | int = "best"
    """Of a run: `best` (by validation AP; the newest if none has one), `latest`, or a step."""
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
    tta_scales: tuple[int, ...] | None = TTAConfig.scales
    """The shorter sides, in pixels; None: 0.75, 1, 1.25 and 1.5 times that of evaluation."""
    mask_padding: bool | None = None
    """Mask the padding in every layer: the official result at batch 1. None takes the checkpoint's."""
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    """Images; the defaults are those of the checkpoint's training."""


def parse_eval(argv: Sequence[str], prog: str = "eval.py") -> tuple[EvalOptions, "str | Loaded"]:
    """`--checkpoint PATH [...]` -> the options, whose defaults of `data` are the checkpoint's, and what to evaluate."""
    first = argparse.ArgumentParser(add_help=False)
    first.add_argument("--checkpoint")
    known, _ = first.parse_known_args(argv)
    checkpoint, data = known.checkpoint, DataConfig()
    if checkpoint:
        from detr_jax.checkpoints import is_ours, load, store

        if is_ours(checkpoint):
            saved = store.read_metadata(checkpoint)
            data = from_dict(saved["config"], saved["model"], checkpoint).data
        elif not {"-h", "--help"} & set(argv):  # which needs no gigabyte from a hub
            checkpoint = load(checkpoint)
            data = checkpoint.data
    options = tyro.cli(
        EvalOptions,
        default=EvalOptions(checkpoint=known.checkpoint or tyro.MISSING, data=data),
        args=list(argv),
        prog=prog,
        description="Score a checkpoint on the validation set as pycocotools does; without annotations, detect alone.",
    )
    if options.pictures:
        _check_folder("--pictures", options.pictures)
    if options.results:
        _check_file("--results", options.results)
    return options, checkpoint


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
    data_root: str | None = None,
) -> None:
    """Detect: draws boxes with names on images, and writes results.json.

    With --data-root, which the images belong to, it is in COCO's results format, with the ids of its images and
    categories, and pycocotools loads it. Without, image_id is the file's name and category_id that of the checkpoint.

    Args:
        images: Images, and folders of images.
        checkpoint: A run's folder, an official .pth or .safetensors file, a folder of transformers, or a name on the
            Hugging Face hub, such as facebook/detr-resnet-50.
        out: Folder for the pictures and results.json.
        threshold: Detections with a lower score are left out.
        batch_size: Images per step.
        scale: The shorter side is resized to this; None takes the checkpoint's (800).
        max_size: The longer side is never larger than this; None takes the checkpoint's (1333).
        dilation: DC5 or not, for files that do not tell.
        mask_padding: Mask the padding in every layer: the official result at batch 1. None takes the checkpoint's.
        data_root: The data set that the images are of.
    """
    from tqdm import tqdm

    from detr_jax.data.image import open_image
    from detr_jax.detector import Detector
    from detr_jax.drawing import headed
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
    image_ids: dict[str, int | str] = {path.name: path.name for path in paths}
    category_ids = detector.categories.ids
    if data_root is not None:
        image_ids, category_ids = _ids_in(data_root, [path.name for path in paths], detector.categories)
    folder.mkdir(parents=True, exist_ok=True)
    read, failed, results = deque(), [], []

    def readable() -> "Iterator[Image.Image]":
        for path in tqdm(paths, "detecting", unit=" images"):
            try:
                image = open_image(path)
            except (UserError, OSError) as error:
                failed.append(f"  {error}")
                continue
            read.append(path)
            yield image

    try:
        for detections in detector.detect(readable(), threshold):
            path = read.popleft()
            title = f"{len(detections)} detections, score at least {threshold:g}"
            page = headed(detections.draw(), title, detections.labels, detections.categories.names)
            page.save(folder / f"{path.stem}.jpg", quality=92)
            rows = zip(detections.as_results(image_ids[path.name]), detections.labels.tolist(), strict=True)
            results += [row | {"category_id": category_ids[label]} for row, label in rows]
    finally:
        write_results(folder / "results.json", results)
    done = f"{len(paths) - len(failed)} images, {len(results)} detections of at least {threshold:g}"
    print(f"{done}: {folder}, {folder}/results.json")
    if data_root is None:
        print("results.json has the images' names for ids; for one that pycocotools loads, pass --data-root FOLDER")
    if failed:
        raise UserError("\n".join([f"{len(failed)} of {len(paths)} images could not be read:", *failed]))


def _ids_in(root: str, names: Sequence[str], categories: Categories) -> tuple[dict[str, int | str], tuple[int, ...]]:
    """Id of each image in a data set, by its file's name, and the data set's category id of each label."""
    from detr_jax.data.splits import load_split

    ids: dict[str, int | str] = {}
    category_ids = categories.ids
    for split in ("val", "train"):
        try:
            index = load_split(DataConfig(root=root, on_bad_image="skip"), split, categories, annotated=False)
        except DataError:
            if split == "train" and not ids:
                raise
            continue
        category_ids = index.category_ids
        found = {Path(name).name: i for name, i in zip(index.names, index.image_ids.tolist(), strict=True)}
        if set(names) <= set(found):
            return {name: found[name] for name in names}, category_ids
        ids |= found
    missing = [name for name in names if name not in ids]
    what = f"{missing[0]} is none of its images" if missing else "the images are of both splits; give those of one"
    raise UserError(f"--data-root {root}: {what}")


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


def data(folder: tyro.conf.Positional[str], /, out: str = "data.png", images: int = 12) -> None:
    """Look at a data set before training: its format, boxes per class and size, problems, and a contact sheet.

    Args:
        folder: As --data.root takes it: COCO, Roboflow, CVAT, Label Studio, YOLO or Pascal VOC.
        out: Picture of some images with their boxes.
        images: How many of them.
    """
    from detr_jax.data.splits import load_split
    from detr_jax.data.summary import summarize
    from detr_jax.visualize.data_figures import contact_sheet_of

    # Nothing is refused here: what training would stop at is a line of the summary.
    config = DataConfig(root=folder, on_bad_image="skip", on_bad_annotation="skip")
    train_set = load_split(config, "train")
    sets = {"train": train_set}
    try:
        sets["val"] = load_split(config, "val")
    except DataError as error:
        print(f"validation: {str(error).splitlines()[0]}")
    if tuple(sets.get("val", train_set).names) == tuple(train_set.names):
        sets = {"train and val": train_set}
    print(summarize(sets))
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    contact_sheet_of(train_set, images).save(out)
    print(f"wrote {out}: {min(images, len(train_set))} images with their boxes")


def _start_processes(argv: Sequence[str]) -> None:
    """Before a checkpoint is read for its config, which touches a device; not for `--help`."""
    if not {"-h", "--help"} & set(argv):
        from detr_jax import processes

        processes.start()


def train(argv: Sequence[str]) -> None:
    """`detr-jax train`, and train.py."""
    _start_processes(argv)
    config = parse_train(argv, "detr-jax train")
    from detr_jax.training import train

    if train(config) is None and config.train.interrupted_status:
        sys.exit(config.train.interrupted_status)


def evaluate(argv: Sequence[str]) -> None:
    """`detr-jax eval`, and eval.py."""
    _start_processes(argv)
    options, checkpoint = parse_eval(argv, "detr-jax eval")
    from detr_jax.evaluation import evaluate_checkpoint

    evaluate_checkpoint(
        checkpoint,
        options.data,
        step=options.step,
        batch_size=options.batch_size,
        results=options.results,
        pictures=options.pictures,
        num_pictures=options.num_pictures,
        tta=TTAConfig(options.tta_scales) if options.tta else None,
        mask_padding=options.mask_padding,
    )


@dataclasses.dataclass(frozen=True)
class PlanOptions:
    """What to compile, and for what."""

    topology: str
    """A slice of TPUs, such as v5e:4x4, v5e:16x16, v5p:2x2x1 or v6e:4x4, none of which need be here; cpu:8; gpu:N,
    which must be here."""
    batch_size: tuple[int, ...] = ()
    """Global batches to compare; with two, the largest that should fit is estimated. None is the config's."""
    dtype: tuple[Dtype, ...] = ()
    """Compute types to compare. None is the config's."""
    every_bucket: bool = False
    """Compile all buckets, not only the largest, which decides whether the run fits. A compilation takes minutes."""
    json: str | None = None
    """Write the plan here too."""
    run: Annotated[Config, tyro.conf.arg(name="")] = dataclasses.field(default_factory=Config)
    """The config; every field can be overridden. Without --data.root, a stand-in for COCO is the data."""


def parse_plan(argv: Sequence[str]) -> PlanOptions:
    """`--config CONFIG --topology TOPOLOGY [...]` -> the options."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--config")
    known, rest = first.parse_known_args(argv)
    if known.config is None and not {"-h", "--help"} & set(rest):
        raise UserError(f"--config is missing: --config CONFIG --topology v5e:4x4. Configs: {', '.join(_configs())}")
    run = load_config(known.config) if known.config else Config()
    options = tyro.cli(
        tyro.conf.AvoidSubcommands[PlanOptions],
        default=PlanOptions(topology=tyro.MISSING, run=run),
        args=rest,
        prog="detr-jax plan --config CONFIG",
        description="Compile a run's training step for devices that are not here: does it fit, what would it cost?",
    )
    if options.json:
        _check_file("--json", options.json)
    return options


def plan(argv: Sequence[str]) -> None:
    """`detr-jax plan`."""
    options = parse_plan(argv)
    if not options.topology.startswith("gpu"):
        os.environ.setdefault("JAX_PLATFORMS", "cpu")  # no accelerator is needed, so none is taken
    from detr_jax.plan import plan
    from detr_jax.plan_report import table

    result = plan(
        options.run,
        options.topology,
        batch_sizes=options.batch_size,
        dtypes=options.dtype,
        every_bucket=options.every_bucket,
    )
    print("\n".join(table(result)))
    if options.json:
        Path(options.json).write_text(json.dumps(dataclasses.asdict(result), indent=1) + "\n")


COMMANDS: dict[str, Callable[..., None]] = {
    "predict": predict,
    "data": data,
    "convert": convert,
    "export": export,
    "soup": soup,
}


def main(argv: Sequence[str] | None = None) -> None:
    """`detr-jax train`, `eval`, `plan`, `predict`, `data`, `visualize`, `convert`, `export` and `soup`."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv[:1] == ["--version"]:
        print(f"detr-jax {importlib.metadata.version('detr-jax')}")
        return
    with_config = {"train": train, "eval": evaluate, "plan": plan}
    if argv and argv[0] in with_config:
        with_config[argv[0]](argv[1:])
        return
    if argv[:1] == ["visualize"]:
        about = "Draw what happens inside a detector, or what it gets wrong. Each figure has its own --help."
        prog, commands, argv = "detr-jax visualize", figures.COMMANDS, argv[1:]
    else:
        about = (
            "DETR, Deformable DETR and DINO. `detr-jax train` and `detr-jax eval` train and score, `detr-jax plan` "
            "says what a training would need; see their --help."
        )
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
    except StalledError as error:
        print(f"error: {error.filename}: {error.strerror}", file=sys.stderr, flush=True)
        sys.stdout.flush()
        os._exit(1)  # threads that wait for storage would keep the process
    except OSError as error:
        if error.filename is None:
            raise
        sys.exit(f"error: {error.filename}: {error.strerror}")
