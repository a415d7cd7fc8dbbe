"""`detr-jax visualize FIGURE`: one function per figure, each with the flags that it needs."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from detr_jax.errors import NotFoundError, UserError

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from PIL import Image

    from detr_jax.data.index import DatasetIndex
    from detr_jax.detector import Detector

_SUFFIXES = (".png", ".jpg", ".jpeg", ".pdf", ".svg", ".webp")

OneImage = Annotated[str, tyro.conf.Positional]
"""An image file."""


def visualize() -> None:
    """Draw figures: `detr-jax visualize --help` lists them."""
    raise UserError(f"which figure? detr-jax visualize {{{','.join(COMMANDS)}}} ...")


def sampling(
    image: OneImage,
    /,
    checkpoint: str,
    out: str = "sampling.png",
    query: int | None = None,
    by: Literal["layer", "head", "level"] | None = None,
    layer: int = -1,
    head: int | None = None,
    level: int | None = None,
    dilation: bool | None = None,
) -> None:
    """Where a query of Deformable DETR sampled the image: reference point, sampling points and their weights.

    Args:
        image: An image.
        checkpoint: As for predict.
        out: File to write: .png, .jpg, .webp, .pdf or .svg.
        query: Which query; None takes that of the best detection.
        by: A panel for each layer, head or level. None merges heads and levels.
        layer: Decoder layer from 0; negative from the end.
        head: This attention head alone.
        level: This feature level alone.
        dilation: DC5 or not, for files that do not tell.
    """
    _check_out(out)
    from detr_jax.visualize.attention_figures import sampling_figure

    (seen,) = _inspect([checkpoint], image, dilation)
    _write(sampling_figure(seen, query, by=by, layer=layer, head=head, level=level), out)


def encoder(
    image: OneImage,
    /,
    checkpoint: tuple[str, ...],
    out: str = "encoder.png",
    points: tuple[tuple[float, float], ...] = (),
    layer: int = -1,
    head: int | None = None,
    level: int = 0,
    dilation: bool | None = None,
) -> None:
    """What points of the image attend to in the encoder; a row per checkpoint.

    Args:
        image: An image.
        checkpoint: As for predict; several are drawn below one another.
        out: File to write: .png, .jpg, .webp, .pdf or .svg.
        points: x y of points in pixels, one after another; none takes three.
        layer: Encoder layer from 0; negative from the end.
        head: This attention head alone.
        level: Feature level of the points' cells.
        dilation: DC5 or not, for files that do not tell.
    """
    _check_out(out)
    from detr_jax.data.image import open_image
    from detr_jax.visualize.attention_figures import encoder_figure

    if not points:
        size = open_image(image).size
        points = tuple((size[0] * u, size[1] / 2) for u in (0.25, 0.5, 0.75))
    _write(encoder_figure(_inspect(checkpoint, image, dilation, points), layer=layer, head=head, level=level), out)


def attention(
    image: OneImage,
    /,
    checkpoint: tuple[str, ...],
    out: str = "attention.png",
    query: int | None = None,
    layer: int = -1,
    head: int | None = None,
    dilation: bool | None = None,
) -> None:
    """What each object's query attends to; a row per checkpoint.

    Args:
        image: An image.
        checkpoint: As for predict; several are drawn below one another.
        out: File to write: .png, .jpg, .webp, .pdf or .svg.
        query: Which query; None takes those of the best detections.
        layer: Decoder layer from 0; negative from the end.
        head: This attention head alone.
        dilation: DC5 or not, for files that do not tell.
    """
    _check_out(out)
    from detr_jax.visualize.attention_figures import attention_figure

    seen = _inspect(checkpoint, image, dilation)
    _write(attention_figure(seen, None if query is None else [query], layer=layer, head=head), out)


def saliency(
    image: OneImage,
    /,
    checkpoint: str,
    out: str = "saliency.png",
    query: int | None = None,
    dilation: bool | None = None,
) -> None:
    """Which pixels move a detection: gradient norms of its box and score (Deformable DETR, appendix A.5).

    Args:
        image: An image.
        checkpoint: As for predict.
        out: File to write: .png, .jpg, .webp, .pdf or .svg.
        query: Which query; None takes that of the best detection.
        dilation: DC5 or not, for files that do not tell.
    """
    _check_out(out)
    from detr_jax.data.image import open_image
    from detr_jax.visualize.attention_figures import saliency_figure
    from detr_jax.visualize.inspection import Inspector

    opened = open_image(image)
    _write(saliency_figure(Inspector(_detector(checkpoint, dilation)).saliency(opened, query)), out)


def refinement(
    image: OneImage,
    /,
    checkpoint: str,
    out: str = "refinement.png",
    query: int | None = None,
    dilation: bool | None = None,
) -> None:
    """A query's box, decoder layer by decoder layer.

    Args:
        image: An image.
        checkpoint: As for predict.
        out: File to write: .png, .jpg, .webp, .pdf or .svg.
        query: Which query; None takes that of the best detection.
        dilation: DC5 or not, for files that do not tell.
    """
    _check_out(out)
    from detr_jax.visualize.prediction_figures import refinement_figure

    (seen,) = _inspect([checkpoint], image, dilation)
    _write(refinement_figure(seen, query), out)


def proposals(image: OneImage, /, checkpoint: str, out: str = "proposals.png", dilation: bool | None = None) -> None:
    """What the encoder of a two-stage model proposed.

    Args:
        image: An image.
        checkpoint: As for predict.
        out: File to write: .png, .jpg, .webp, .pdf or .svg.
        dilation: DC5 or not, for files that do not tell.
    """
    _check_out(out)
    from detr_jax.visualize.prediction_figures import proposals_figure

    (seen,) = _inspect([checkpoint], image, dilation)
    _write(proposals_figure(seen), out)


def matching(
    image: Annotated[str | None, tyro.conf.Positional] = None,
    /,
    *,
    checkpoint: str,
    out: str = "matching.png",
    data_root: str | None = None,
    dilation: bool | None = None,
) -> None:
    """Which query the Hungarian matching gives which object of an annotated image.

    Args:
        image: An image of the validation set; the first if none is given.
        checkpoint: As for predict.
        out: File to write: .png, .jpg, .webp, .pdf or .svg.
        data_root: A COCO-format folder; None takes that of the checkpoint's training.
        dilation: DC5 or not, for files that do not tell.
    """
    _check_out(out)
    from detr_jax.visualize.inspection import Inspector
    from detr_jax.visualize.mistakes import read_image
    from detr_jax.visualize.prediction_figures import matching_figure

    detector, index, i = _annotated(image, checkpoint, data_root, dilation)
    seen = Inspector(detector)(read_image(index, i))
    _write(matching_figure(seen, index.boxes_xyxy[i], index.labels[i]), out)


def denoising(
    image: Annotated[str | None, tyro.conf.Positional] = None,
    /,
    *,
    checkpoint: str,
    out: str = "denoising.png",
    data_root: str | None = None,
) -> None:
    """Noisy copies of an annotated image's objects, and what DINO reconstructs from them.

    Args:
        image: An image of the validation set; the first if none is given.
        checkpoint: As for predict; a DINO.
        out: File to write: .png, .jpg, .webp, .pdf or .svg.
        data_root: A COCO-format folder; None takes that of the checkpoint's training.
    """
    _check_out(out)
    from detr_jax.visualize.denoising_figures import denoising_figure, reconstruct
    from detr_jax.visualize.mistakes import read_image

    detector, index, i = _annotated(image, checkpoint, data_root, None)
    found = reconstruct(detector, read_image(index, i), index.boxes_xyxy[i], index.labels[i])
    _write(denoising_figure(found), out)


def stability(
    runs: tyro.conf.Positional[tuple[str, ...]],
    /,
    out: str = "stability.png",
    num_images: int = 50,
    data_root: str | None = None,
) -> None:
    """How many queries change their object from checkpoint to checkpoint (DN-DETR's instability of the matching).

    Args:
        runs: Output folders of runs that kept several checkpoints (--train.keep-last).
        out: File to write: .png, .jpg, .webp, .pdf or .svg.
        num_images: The first images of the validation set.
        data_root: A COCO-format folder; None takes that of the run.
    """
    _check_out(out)
    from detr_jax.checkpoints import store
    from detr_jax.visualize.denoising_figures import match_objects, stability_figure

    if not runs:
        raise UserError("no runs given: detr-jax visualize stability RUN...")
    found: dict[str, dict] = {}
    for name, run in zip(_short_names(runs), runs, strict=True):
        by_step = found[name] = {}
        for step in store.steps(run):
            detector, index, _ = _annotated(None, str(Path(run) / "checkpoints" / str(step)), data_root, None)
            by_step[step] = match_objects(detector, index, range(min(num_images, len(index))))
    _write(stability_figure(found), out)


def truth(
    image: Annotated[str | None, tyro.conf.Positional] = None,
    /,
    *,
    checkpoint: str,
    out: str = "truth.png",
    threshold: float = 0.5,
    data_root: str | None = None,
    dilation: bool | None = None,
) -> None:
    """Ground truth beside detections.

    Args:
        image: An image of the validation set; the first if none is given.
        checkpoint: As for predict.
        out: File to write: .png, .jpg, .webp, .pdf or .svg.
        threshold: Detections with a lower score are left out.
        data_root: A COCO-format folder; None takes that of the checkpoint's training.
        dilation: DC5 or not, for files that do not tell.
    """
    _check_out(out)
    from detr_jax.drawing import compare
    from detr_jax.visualize.mistakes import read_image

    detector, index, i = _annotated(image, checkpoint, data_root, dilation)
    opened, true = read_image(index, i), (index.boxes_xyxy[i], index.labels[i])
    found = detector(opened, threshold)
    detections = found.boxes_xyxy, found.labels, found.scores
    _write(compare(opened, *true, *detections, index.category_names, threshold=threshold), out)


def mistakes(
    checkpoint: str,
    out: str = "mistakes.png",
    threshold: float = 0.5,
    data_root: str | None = None,
    dilation: bool | None = None,
) -> None:
    """The most expensive misses and false positives on the validation set.

    Args:
        checkpoint: As for predict.
        out: File to write: .png, .jpg, .webp, .pdf or .svg.
        threshold: Detections with a lower score do not count.
        data_root: A COCO-format folder; None takes that of the checkpoint's training.
        dilation: DC5 or not, for files that do not tell.
    """
    _check_out(out)
    from detr_jax.visualize.mistake_figures import mistakes_figure
    from detr_jax.visualize.mistakes import detect_all, find_mistakes

    detector, index, _ = _annotated(None, checkpoint, data_root, dilation)
    found, _ = detect_all(detector, index)
    _write(mistakes_figure(find_mistakes(index, found, threshold=threshold), index), out)


def confusion(
    checkpoint: str,
    out: str = "confusion.png",
    threshold: float = 0.5,
    data_root: str | None = None,
    dilation: bool | None = None,
) -> None:
    """Confused classes of the validation set, and AP by size and class.

    Args:
        checkpoint: As for predict.
        out: File to write: .png, .jpg, .webp, .pdf or .svg.
        threshold: Detections with a lower score do not count.
        data_root: A COCO-format folder; None takes that of the checkpoint's training.
        dilation: DC5 or not, for files that do not tell.
    """
    _check_out(out)
    from detr_jax.scoring import score
    from detr_jax.visualize.mistake_figures import confusion_figure
    from detr_jax.visualize.mistakes import confusion, detect_all

    detector, index, _ = _annotated(None, checkpoint, data_root, dilation)
    found, results = detect_all(detector, index)
    counts = confusion(index, found, threshold=threshold)
    _write(confusion_figure(counts, index.category_names, score(index.ground_truth(), results)), out)


def convolution(
    image: OneImage,
    /,
    checkpoint: str,
    out: str = "convolution.png",
    point: tuple[float, float] | None = None,
    dilation: bool | None = None,
) -> None:
    """What deformable convolutions sample, beside plain ones and deformable attention.

    Args:
        image: An image.
        checkpoint: As for predict.
        out: File to write: .png, .jpg, .webp, .pdf or .svg.
        point: x y in pixels; none takes the middle.
        dilation: DC5 or not, for files that do not tell.
    """
    _check_out(out)
    from detr_jax.data.image import open_image
    from detr_jax.visualize.convolution_figures import convolution_figure

    opened = open_image(image)
    point = point or (opened.width / 2, opened.height / 2)
    _write(convolution_figure(_detector(checkpoint, dilation), opened, point), out)


def curves(
    runs: tyro.conf.Positional[tuple[str, ...]],
    /,
    out: str = "curves.png",
    x: Literal["epoch", "hours", "step"] = "epoch",
) -> None:
    """Losses and AP of one or several runs.

    Args:
        runs: Output folders of runs.
        out: File to write: .png, .jpg, .webp, .pdf or .svg.
        x: Horizontal axis.
    """
    _check_out(out)
    if not runs:
        raise UserError("no runs given: detr-jax visualize curves RUN...")
    from detr_jax.curves import plot_curves

    files = {name: _metrics_file(run) for name, run in zip(_short_names(runs), runs, strict=True)}
    _write(plot_curves(files, x=x), out)


COMMANDS: dict[str, Callable[..., None]] = {
    "sampling": sampling,
    "convolution": convolution,
    "encoder": encoder,
    "attention": attention,
    "saliency": saliency,
    "refinement": refinement,
    "proposals": proposals,
    "matching": matching,
    "denoising": denoising,
    "stability": stability,
    "truth": truth,
    "mistakes": mistakes,
    "confusion": confusion,
    "curves": curves,
}


def _check_out(out: str) -> None:
    """Before anything is computed."""
    if not out.lower().endswith(_SUFFIXES):
        raise UserError(f"--out {out}: expected a file that ends with {', '.join(_SUFFIXES)}")
    blocked = [place for place in Path(out).parents if place.exists() and not place.is_dir()]
    if blocked or Path(out).is_dir():
        raise UserError(f"--out {out}: {blocked[0] if blocked else out} is a {'file' if blocked else 'folder'}")


def _write(figure: "Figure | Image.Image", out: str) -> None:
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    from PIL import Image

    if isinstance(figure, Image.Image):
        figure.save(out)
    else:
        figure.savefig(out)
    print(f"wrote {out}")


def _detector(checkpoint: str, dilation: bool | None) -> "Detector":
    from detr_jax.detector import Detector

    return Detector.from_pretrained(checkpoint, dilation=dilation)


def _inspect(
    checkpoints: Sequence[str], image: str, dilation: bool | None, points: Sequence[tuple[float, float]] = ()
) -> list:
    """What the detector of each checkpoint did on an image."""
    from detr_jax.data.image import open_image
    from detr_jax.visualize.inspection import Inspector

    if not checkpoints:
        raise UserError("--checkpoint: got none, expected at least one")
    opened = open_image(image)
    return [Inspector(_detector(path, dilation))(opened, points) for path in checkpoints]


def _annotated(
    image: str | None, checkpoint: str, root: str | None, dilation: bool | None
) -> "tuple[Detector, DatasetIndex, int]":
    """The detector, its validation set (or that of `root`), and the place of an image in it: 0 for none."""
    from detr_jax.checkpoints import is_ours, store
    from detr_jax.config import DataConfig, from_dict
    from detr_jax.data.splits import load_split

    if image is not None and not Path(image).is_file():
        raise NotFoundError(f"{image}: no such image")
    detector = _detector(checkpoint, dilation)
    data = DataConfig()
    if is_ours(checkpoint):
        saved = store.read_metadata(checkpoint)
        data = from_dict(saved["config"], saved["model"], checkpoint).data
    if root is not None:
        data = DataConfig(root=root)
    if not data.root and data.tfds is None:
        raise UserError(f"{checkpoint} does not say what it was trained on: pass --data-root FOLDER, in COCO's format")
    index = load_split(data, "val", detector.categories)
    names = [Path(index.name(i)).name for i in range(len(index))]
    if image is None:
        return detector, index, 0
    if Path(image).name not in names:
        raise UserError(
            f"{image}: none of the {len(names)} images of the validation set has this name, so its objects are not "
            f"known; {names[0]} is one of them"
        )
    return detector, index, names.index(Path(image).name)


def _short_names(runs: Sequence[str]) -> Sequence[str]:
    """The folders' names, or their paths where two have the same."""
    names = [Path(run).name for run in runs]
    return names if len(set(names)) == len(names) else runs


def _metrics_file(run: str) -> Path:
    path = Path(run) / "metrics.jsonl"
    if not path.is_file():
        raise NotFoundError(f"{path}: no such file; curves are drawn of a run's output folder")
    return path
