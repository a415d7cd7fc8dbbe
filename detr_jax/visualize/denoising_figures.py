"""Denoising queries and what they reconstruct (DINO, section 3.3); how stable matching is (DN-DETR, section 3.1)."""

import dataclasses
import functools
import itertools
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import scipy.special
from flax import nnx
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from detr_jax.boxes import box_iou, cxcywh_to_xyxy, xyxy_to_cxcywh
from detr_jax.categories import Categories
from detr_jax.config import DETRConfig, DINOConfig, LossConfig
from detr_jax.data.image import ImageLike, open_image
from detr_jax.data.index import DatasetIndex
from detr_jax.data.resample import normalize
from detr_jax.denoising import denoising_queries, draw_noise, num_slots
from detr_jax.detector import Detector
from detr_jax.errors import UserError
from detr_jax.matching import match
from detr_jax.visualize.mistakes import read_image
from detr_jax.visualize.panels import INK, Page, Sheet, add_box, add_text, color_of, line, show_image, whole


@dataclasses.dataclass(frozen=True, eq=False)
class Reconstruction:
    """What a detector made of noisy copies of an image's objects. Rows `n` are denoising queries."""

    image: Image.Image = dataclasses.field(repr=False)
    """The image, upright, RGB."""
    categories: Categories
    """What the labels stand for."""
    true_boxes_xyxy: np.ndarray
    """float32 [t, 4]: the objects, pixels of the image."""
    true_labels: np.ndarray
    """int [t]: their classes."""
    target: np.ndarray
    """int [n]: the object of each query."""
    positive: np.ndarray
    """bool [n]: queries that should find it; the others should call it background."""
    noisy_boxes_xyxy: np.ndarray
    """float32 [n, 4]: where the queries start, pixels of the image."""
    boxes_xyxy: np.ndarray
    """float32 [n, 4]: after the last layer."""
    scores: np.ndarray
    """float32 [n]: that of the object's class after the last layer."""

    def mean_iou(self) -> tuple[float, float]:
        """Of the positives with their objects, before and after."""
        truth = jnp.asarray(self.true_boxes_xyxy[self.target])
        each = [
            np.asarray(box_iou(jnp.asarray(boxes)[:, None], truth[:, None]))[self.positive].mean()
            for boxes in (self.noisy_boxes_xyxy, self.boxes_xyxy)
        ]
        return float(each[0]), float(each[1])


def reconstruct(
    detector: Detector, image: ImageLike, true_boxes_xyxy: np.ndarray, true_labels: np.ndarray, *, seed: int = 0
) -> Reconstruction:
    """Runs a DINO on an image with denoising queries made of its objects, as in training.

    Args:
        detector: with a DINO that is trained with denoising queries.
        image: as `Detector` takes them.
        true_boxes_xyxy: [t, 4], pixels of the image.
        true_labels: int [t].
        seed: of the noise.

    Raises:
        ValueError: another model, or an image without objects.
    """
    config = detector.config
    if not isinstance(config, DINOConfig) or not config.denoising_queries:
        raise UserError("denoising: this model has no denoising queries; expected a DINO that was trained with them")
    if not len(true_labels):
        raise UserError("denoising: the image has no objects in the annotations, there is nothing to add noise to")
    opened = open_image(image)
    scale = np.tile(np.array(opened.size, np.float32), 2)
    targets = _targets(true_boxes_xyxy, true_labels, opened.size)
    noise = draw_noise(jax.random.key(seed), 1, num_slots(config, len(true_labels)), config.num_classes)
    queries = denoising_queries(targets, noise, config)
    pixels, sizes = detector.prepare(opened)
    graphdef, state = detector.split()

    @jax.jit
    def run(state, pixels, sizes, queries):
        outputs = nnx.merge(graphdef, state)(normalize(pixels, sizes), sizes, denoising=queries)["dn_outputs"]
        return outputs["pred_logits"][-1, 0], outputs["pred_boxes"][-1, 0]

    logits, boxes = jax.device_get(run(state, pixels, sizes, queries))
    real = np.asarray(queries.real[0])
    target = np.asarray(queries.target)[real]
    labels = np.asarray(true_labels)
    return Reconstruction(
        image=opened,
        categories=detector.categories,
        true_boxes_xyxy=np.asarray(true_boxes_xyxy, np.float32),
        true_labels=labels,
        target=target,
        positive=np.asarray(queries.positive)[real],
        noisy_boxes_xyxy=np.asarray(cxcywh_to_xyxy(queries.boxes_cxcywh[0]))[real] * scale,
        boxes_xyxy=np.asarray(cxcywh_to_xyxy(jnp.asarray(boxes)))[real] * scale,
        scores=scipy.special.expit(logits[real, labels[target]]),
    )


def denoising_figure(found: Reconstruction, *, number: int = 8) -> Figure:
    """The first group of denoising queries: positives, that should become the object, and negatives, that should not.

    Args:
        found: see `reconstruct`.
        number: objects to draw, the largest first.
    """
    before, after = found.mean_iou()
    sides = [found.positive, ~found.positive] if (~found.positive).any() else [found.positive]
    scores = " / ".join(f"{found.scores[side].mean():.2f}" for side in sides)
    window = whole(found.image)
    heading = f"denoising: mean IoU {before:.2f} -> {after:.2f}; mean score of the object's class {scores}"
    sheet = Sheet([heading], [window] * len(sides), len(sides), bar=False)
    size = np.prod(found.true_boxes_xyxy[:, 2:] - found.true_boxes_xyxy[:, :2], axis=1)
    shown = np.argsort(-size, kind="stable")[:number]
    titles = ("positives: to be put right", "negatives: to be called background")
    for axes, side, title in zip(sheet.panels[0], sides, titles, strict=False):
        show_image(axes, found.image, window, title)
        for t in shown:
            query = int(np.flatnonzero(side & (found.target == t))[0])  # of the first group
            color = color_of(int(found.true_labels[t]))
            add_box(axes, found.true_boxes_xyxy[t], "white", width=1.2)
            add_box(axes, found.noisy_boxes_xyxy[query], color, dashed=True, width=1.2)
            add_box(axes, found.boxes_xyxy[query], color, width=1.7)
            size = np.array(found.image.size)
            x, y = found.boxes_xyxy[query, :2].clip(0.03 * size, 0.97 * size)  # a whole number, inside of the image
            add_text(axes, float(x), float(y), f"{found.scores[query]:.2f}")
    color = color_of(int(found.true_labels[shown[0]]))
    handles = [line("object", "0.4"), line("noisy box", color, dashed=True), line("after the last layer", color)]
    sheet.legend(0, handles)
    return sheet.figure


def match_objects(detector: Detector, index: DatasetIndex, images: Sequence[int]) -> list[np.ndarray]:
    """For each image, the object of each query after the last layer: int [q], -1 for none."""
    config = detector.config
    loss = LossConfig.detr() if isinstance(config, DETRConfig) else LossConfig()
    loss = dataclasses.replace(LossConfig.dino() if isinstance(config, DINOConfig) else loss, aux_loss=False)
    graphdef, state = detector.split()

    found = []
    for i in images:
        image = read_image(index, i)
        outputs = _outputs(graphdef, state, *detector.prepare(image))
        targets = _targets(index.boxes_xyxy[i], index.labels[i], image.size)
        of_target = np.asarray(match(outputs, targets, loss)[0])[-1, 0]
        objects = np.full(config.num_queries, -1)
        objects[of_target[of_target >= 0]] = np.flatnonzero(of_target >= 0)
        found.append(objects)
    return found


@functools.partial(jax.jit, static_argnames="graphdef")
def _outputs(graphdef, state, pixels, sizes):
    """Of the last layer; compiled once for all checkpoints of a model."""
    outputs = nnx.merge(graphdef, state)(normalize(pixels, sizes), sizes)
    return {name: outputs[name] for name in ("pred_logits", "pred_boxes")}


def instability(before: Sequence[np.ndarray], after: Sequence[np.ndarray]) -> float:
    """How many queries of an image have another object than before, on average (DN-DETR, equation 1).

    Args:
        before: for each image the object of each query, -1 for none; see `match_objects`.
        after: the same, of a later checkpoint.
    """
    return float(np.mean([(a != b).sum() for a, b in zip(before, after, strict=True)]))


def stability_figure(runs: Mapping[str, Mapping[int, Sequence[np.ndarray]]]) -> Figure:
    """Instability of the matching from checkpoint to checkpoint; a line for each run.

    With two stages, query i is the i-th best proposal, so that a change of ranks counts too.

    Args:
        runs: for each run, by step, what `match_objects` gives for the same images.

    Raises:
        ValueError: a run with fewer than two checkpoints.
    """
    figure = Page(figsize=(6.5, 3.6), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for name, by_step in runs.items():
        steps = sorted(by_step)
        if len(steps) < 2:
            raise UserError(f"{name}: {len(steps)} checkpoint; expected two or more (train.keep_last keeps more)")
        changes = [instability(by_step[a], by_step[b]) for a, b in itertools.pairwise(steps)]
        axes.plot(steps[1:], changes, marker="o", markersize=3, linewidth=1.4, label=name)
    axes.set_xlabel("step", color=INK)
    axes.set_ylabel("queries per image with another object", color=INK)
    axes.set_ylim(0)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=9)
    return figure


def _targets(boxes_xyxy: np.ndarray, labels: np.ndarray, size: tuple[int, int]) -> dict[str, jax.Array]:
    """An image's objects as a batch of one."""
    boxes = np.asarray(boxes_xyxy, np.float32) / np.tile(np.array(size, np.float32), 2)
    return {
        "boxes_cxcywh": xyxy_to_cxcywh(jnp.asarray(boxes))[None],
        "labels": jnp.asarray(labels, jnp.int32)[None],
        "num_boxes": jnp.array([len(labels)]),
    }
