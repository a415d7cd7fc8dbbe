"""Everything that draws, in one place: functions that return figures (matplotlib) or pictures (Pillow).

`visualize` is the command line's choice of them: `detr-jax visualize PHOTO --checkpoint X --what sampling`.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import tyro
from matplotlib.figure import Figure
from PIL import Image

from detr_jax import checkpoint as checkpoints
from detr_jax.attention_figures import attention_figure, encoder_figure, saliency_figure, sampling_figure
from detr_jax.config import DataConfig, from_dict
from detr_jax.curves import plot_curves
from detr_jax.data.coco import CocoIndex, load_split
from detr_jax.detector import Detector, is_ours, open_photo
from detr_jax.error_figures import confusion_figure, errors_figure
from detr_jax.errors import confusion, detect_all, find_errors
from detr_jax.errors import photo as image_of
from detr_jax.evaluation import score
from detr_jax.inspection import Inspection, Inspector, Saliency
from detr_jax.pictures import class_color, compare, contact_sheet, draw_detections
from detr_jax.prediction_figures import matching_figure, proposals_figure, refinement_figure

__all__ = [
    "Inspection",
    "Inspector",
    "Saliency",
    "attention_figure",
    "class_color",
    "compare",
    "confusion",
    "confusion_figure",
    "contact_sheet",
    "detect_all",
    "draw_detections",
    "encoder_figure",
    "errors_figure",
    "find_errors",
    "matching_figure",
    "plot_curves",
    "proposals_figure",
    "refinement_figure",
    "saliency_figure",
    "sampling_figure",
    "visualize",
]

What = Literal[
    "sampling",
    "encoder",
    "attention",
    "saliency",
    "refinement",
    "proposals",
    "matching",
    "truth",
    "errors",
    "confusion",
    "curves",
]
_SUFFIXES = (".png", ".jpg", ".jpeg", ".pdf", ".svg", ".webp")


def visualize(
    photo: tyro.conf.Positional[tuple[str, ...]] = (),
    /,
    *,
    checkpoint: tuple[str, ...],
    what: What = "sampling",
    out: str = "figure.png",
    query: int | None = None,
    points: tuple[tuple[float, float], ...] = (),
    by: Literal["layer", "head", "level"] | None = None,
    layer: int = -1,
    head: int | None = None,
    level: int | None = None,
    threshold: float = 0.5,
    data_root: str | None = None,
    x: Literal["epoch", "hours", "step"] = "epoch",
    dilation: bool | None = None,
) -> None:
    """Draw what happens inside a detector, or what it gets wrong, into a figure.

    Of one photo: sampling (where a query of Deformable DETR sampled it), encoder (what --points attend to), attention
    (what each object's query attends to), saliency (which pixels move a detection), refinement (a query's box layer by
    layer), proposals (of a two-stage model's encoder). Of a photo with annotations, the first of the validation set if
    none is given: matching (which query got which object), truth (ground truth beside detections). Of the validation
    set: errors (the most expensive misses and false positives), confusion (of classes; AP by size and class). Of
    training runs: curves.

    Args:
        photo: One photo.
        checkpoint: As for predict. Several for encoder and attention (a row each), and for curves.
        what: Which figure; see above.
        out: File to write: .png, .jpg, .webp, .pdf or .svg.
        query: Which query; None takes that of the best detection.
        points: x y of points in the photo, in pixels, one after another; for encoder. None takes three.
        by: Sampling: a panel for each layer, head or level. None merges heads and levels.
        layer: Decoder or encoder layer from 0; negative from the end.
        head: This attention head alone.
        level: This feature level alone; for encoder the level of the points' cells (0).
        threshold: Detections with a lower score do not count; for truth, errors and confusion.
        data_root: A COCO-format folder; None takes that of the checkpoint's training.
        x: Horizontal axis of the curves.
        dilation: DC5 or not, for files that do not tell.
    """
    if not out.lower().endswith(_SUFFIXES):
        raise ValueError(f"--out {out}: expected a file that ends with {', '.join(_SUFFIXES)}")
    several = ("attention", "encoder", "curves")
    if len(checkpoint) == 0:
        raise ValueError("--checkpoint: got none, expected at least one")
    if len(checkpoint) > 1 and what not in several:
        raise ValueError(
            f"--what {what} takes one --checkpoint, got {' '.join(checkpoint)} ({', '.join(several)} take several; "
            "the photo goes before --checkpoint)"
        )
    if len(photo) > 1:
        raise ValueError(f"one photo makes a figure, got {len(photo)}: {' '.join(photo)}")
    with_annotations, of_data = what in ("matching", "truth"), what in ("errors", "confusion", "curves")
    if not photo and not with_annotations and not of_data:
        raise ValueError(f"--what {what} needs a photo: detr-jax visualize PHOTO --checkpoint X --what {what}")
    if photo and of_data:
        about = "runs" if what == "curves" else "a data set"
        raise ValueError(f"--what {what} is about {about}, not about a photo: leave {photo[0]} out")
    if photo and not Path(photo[0]).is_file():
        raise FileNotFoundError(f"{photo[0]}: no such photo")
    if what == "curves":
        names = [Path(run).name for run in checkpoint]
        names = names if len(set(names)) == len(names) else checkpoint
        figure = plot_curves({name: _metrics_file(run) for name, run in zip(names, checkpoint, strict=True)}, x=x)
    else:
        image = open_photo(photo[0]) if photo else None
        detectors = [Detector.from_pretrained(path, dilation=dilation) for path in checkpoint]
        if image is not None and not with_annotations:
            figure = _of_photo(what, detectors, image, query, layer=layer, head=head, level=level, by=by, points=points)
        else:
            index = _validation(checkpoint[0], detectors[0], data_root)
            if of_data:
                figure = _of_data(what, detectors[0], index, threshold)
            else:
                figure = _of_truth(what, detectors[0], index, _position(index, photo), threshold)
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    if isinstance(figure, Image.Image):
        figure.save(out)
    else:
        figure.savefig(out)
    print(f"wrote {out}")


def _of_photo(
    what: What,
    detectors: Sequence[Detector],
    photo: Image.Image,
    query: int | None,
    *,
    layer: int,
    head: int | None,
    level: int | None,
    by: Literal["layer", "head", "level"] | None,
    points: Sequence[tuple[float, float]],
) -> Figure:
    """The figures that need nothing but a photo."""
    inspectors = [Inspector(detector) for detector in detectors]
    if what == "saliency":
        return saliency_figure(inspectors[0].saliency(photo, query))
    if what == "encoder" and not points:
        points = [(photo.width * u, photo.height / 2) for u in (0.25, 0.5, 0.75)]
    seen = [inspector(photo, points if what == "encoder" else ()) for inspector in inspectors]
    if what == "encoder":
        return encoder_figure(seen, layer=layer, head=head, level=level or 0)
    if what == "attention":
        return attention_figure(seen, None if query is None else [query], layer=layer, head=head)
    if what == "sampling":
        return sampling_figure(seen[0], query, by=by, layer=layer, head=head, level=level)
    return refinement_figure(seen[0], query) if what == "refinement" else proposals_figure(seen[0])


def _of_truth(what: What, detector: Detector, index: CocoIndex, i: int, threshold: float) -> Figure | Image.Image:
    """The figures that need a photo with its annotations."""
    photo, boxes, labels = image_of(index, i), index.boxes_xyxy[i], index.labels[i]
    if what == "matching":
        return matching_figure(Inspector(detector)(photo), boxes, labels)
    found = detector(photo, threshold)
    detections = found.boxes_xyxy, found.labels, found.scores
    return compare(photo, boxes, labels, *detections, index.category_names, threshold=threshold)


def _of_data(what: What, detector: Detector, index: CocoIndex, threshold: float) -> Figure:
    """The figures that need a data set."""
    found, results = detect_all(detector, index)
    if what == "errors":
        return errors_figure(find_errors(index, found, threshold=threshold), index)
    counts = confusion(index, found, threshold=threshold)
    return confusion_figure(counts, index.category_names, score(index.ground_truth(), results))


def _metrics_file(run: str) -> Path:
    path = Path(run) / "metrics.jsonl"
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; curves are drawn of a run's output folder")
    return path


def _validation(path: str, detector: Detector, root: str | None) -> CocoIndex:
    """The validation set of a folder, or of a checkpoint's training."""
    data = DataConfig()
    if is_ours(path):
        saved = checkpoints.read_metadata(path)
        data = from_dict(saved["config"], saved["model"]).data
    if root is not None:
        data = DataConfig(root=root)
    if not data.root and data.tfds is None:
        raise ValueError(f"{path} does not say what it was trained on: pass --data-root FOLDER, in COCO's format")
    return load_split(data, "val", category_ids=detector.categories.ids)


def _position(index: CocoIndex, photo: Sequence[str]) -> int:
    """Where a photo is in a data set, by the name of its file; the first without a photo."""
    names = [Path(index.name(i)).name for i in range(len(index))]
    for path in photo:
        if Path(path).name not in names:
            raise ValueError(
                f"{path}: none of the {len(names)} images of the validation set has this name, so its objects are not "
                f"known; {index.name(0)} is one of them"
            )
        return names.index(Path(path).name)
    return 0
