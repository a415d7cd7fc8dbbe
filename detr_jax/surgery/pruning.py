"""Pruning of levels and sampling points by the attention that they get, with the drop in outputs shown."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from detr_jax.boxes import box_iou
from detr_jax.checkpoints.load import Loaded
from detr_jax.config import DeformableDETRConfig
from detr_jax.data.buckets import round_up
from detr_jax.data.image import ImageLike, open_image, pad_to_bucket
from detr_jax.data.resample import normalize
from detr_jax.data.transforms import resize_size
from detr_jax.errors import UserError
from detr_jax.postprocess import postprocess
from detr_jax.surgery.transplant import Operated, Origin, Path, by_level, by_sample, deformable, transplant


@dataclasses.dataclass(frozen=True)
class Difference:
    """How the outputs of two detectors differ on some images."""

    logits: float | None
    """Mean |difference| of the class logits, query by query; `None` where queries do not correspond."""
    boxes: float | None
    """... of the boxes, in 0-1 of the image."""
    detections: int
    """Detections of the first one above the threshold."""
    kept: float
    """Share of these that the second one has too: the same class, IoU of at least 0.5."""

    def __str__(self) -> str:
        pairs = (("logit", self.logits), ("box", self.boxes))
        means = "".join(f"mean |{name} change| {value:.4f}, " for name, value in pairs if value is not None)
        return f"{means}{self.kept:.0%} of {self.detections} detections kept"


def difference(before: Loaded, after: Loaded, images: Sequence[ImageLike], *, threshold: float = 0.5) -> Difference:
    """Compares two detectors of the same classes on images.

    Logits and boxes are compared where query `i` of both is the same one: not with two-stage, whose proposals may
    change places, and not where the numbers of queries differ.

    Args:
        before: the first detector.
        after: the second one.
        images: as `Detector` takes them.
        threshold: of the detections' score.
    """
    logits, boxes, found, kept = [], [], 0, 0
    one, two = _Probe(before), _Probe(after)
    aligned = before.config.num_queries == after.config.num_queries and not any(
        getattr(loaded.config, "two_stage", False) for loaded in (before, after)
    )
    for image in images:
        (was, seen, _), (now, still, _) = one(image), two(image)
        if aligned:
            logits.append(np.abs(now["pred_logits"] - was["pred_logits"]).mean())
            boxes.append(np.abs(now["pred_boxes"] - was["pred_boxes"]).mean())
        (scores, labels, places), (new_scores, new_labels, new_places) = seen, still
        iou = box_iou(places, new_places)
        match = (iou >= 0.5) & (labels[:, None] == new_labels) & (new_scores >= threshold)
        found += int((scores >= threshold).sum())
        kept += int(match.any(1)[scores >= threshold].sum())
    return Difference(
        float(np.mean(logits)) if logits else None,
        float(np.mean(boxes)) if boxes else None,
        found,
        kept / found if found else 1.0,
    )


def attention(loaded: Loaded, images: Sequence[ImageLike]) -> dict[tuple[str, int], np.ndarray]:
    """Mean attention weight of each sampling point over queries and images.

    Returns:
        `("encoder" | "decoder", layer)` -> float32 `[h, l, p]`, which sums to 1 for each head.
    """
    deformable(loaded, "attention")
    probe = _Probe(loaded)
    weights = [probe(image)[2] for image in images]
    if not weights:
        raise UserError("attention: got no images; expected at least one")
    return {key: np.mean([found[key] for found in weights], axis=0) for key in weights[0]}


def prune_levels(loaded: Loaded, num_levels: int, *, images: Sequence[ImageLike] = ()) -> Operated:
    """Fewer levels: `prune_levels(loaded, 3, images=["a.jpg"])`; the coarsest extra ones go first, then C3, then C4.

    What remains of the attention is a softmax over the remaining logits. The tensors of the levels that stay are
    exactly the old ones. With images, the report says how much attention each level had, and what the loss of it does.

    Raises:
        ValueError: DETR, or a number of levels that is not below the model's.
    """
    old = deformable(loaded, "prune_levels")
    if not 1 <= num_levels < old.num_levels:
        raise UserError(f"prune_levels: num_levels={num_levels}, expected 1 to {old.num_levels - 1}")
    config = dataclasses.replace(old, num_levels=num_levels)
    first = old.feature_maps - config.feature_maps
    places = list(range(first, first + num_levels))
    notes = [f"levels kept: {places} of 0 to {old.num_levels - 1}"]
    if images:
        share = np.mean([weights.sum(-1).mean(0) for weights in attention(loaded, images).values()], axis=0)
        notes.append(f"attention by level: {', '.join(f'{x:.1%}' for x in share)}")
    what = f"prune_levels: {old.num_levels} -> {num_levels}"
    return _compared(loaded, transplant(loaded, config, by_level(old, places), what, notes=notes), images)


def prune_points(
    loaded: Loaded, *, encoder: int | None = None, decoder: int | None = None, images: Sequence[ImageLike]
) -> Operated:
    """Fewer sampling points, those with most attention: `prune_points(loaded, decoder=2, images=images)`.

    Each layer, head and level keeps its own best. What remains of the attention is a softmax over the remaining logits.
    Offsets that are fractions of a box over the number of points are rescaled: kept points stay where they were.

    Args:
        loaded: a Deformable DETR.
        encoder: points in the encoder; `None` leaves them.
        decoder: points in the decoder; `None` leaves them.
        images: on which the attention is measured.

    Raises:
        ValueError: DETR, no images, or more points than there are.
    """
    old = deformable(loaded, "prune_points")
    points = {"encoder": encoder or old.encoder_points, "decoder": decoder or old.decoder_points}
    for part, before in (("encoder", old.encoder_points), ("decoder", old.decoder_points)):
        if not 1 <= points[part] <= before:
            raise UserError(f"prune_points: {part}={points[part]}, expected 1 to {before}")
    weights = attention(loaded, images)
    shares = []

    def rule(path: Path) -> Origin:
        if not {"sampling_offsets", "attention_weights"} & set(path):
            return Origin(path)
        part, layer = path[:2]
        mean, number = weights[part, layer], points[part]
        best = np.sort(np.argsort(-mean, axis=-1, kind="stable")[..., :number], axis=-1)
        shares.append(np.take_along_axis(mean, best, -1).sum() / mean.sum())
        numbers = np.arange(mean.size).reshape(mean.shape)
        in_boxes = part == "decoder" and old.attends_to_boxes(layer)
        scaled = in_boxes and "sampling_offsets" in path
        return by_sample(path, np.take_along_axis(numbers, best, -1), scale=number / mean.shape[-1] if scaled else 1.0)

    config = dataclasses.replace(old, encoder_points=points["encoder"], decoder_points=points["decoder"])
    what = f"prune_points: encoder {old.encoder_points} -> {points['encoder']}, decoder {old.decoder_points} -> "
    result = transplant(loaded, config, rule, what + str(points["decoder"]))
    return _compared(loaded, result, images, f"attention that the kept points had: {np.mean(shares):.1%}")


def _compared(before: Loaded, after: Operated, images: Sequence[ImageLike], *notes: str) -> Operated:
    """`after`, with the notes and the difference on the images in its report."""
    compared = [f"on {len(images)} images: {difference(before, after, images)}"] if images else []
    changes = dataclasses.replace(after.changes, notes=(*after.changes.notes, *notes, *compared))
    return dataclasses.replace(after, changes=changes)


class _Probe:
    """Runs a model on one image; also gives its mean attention weights."""

    def __init__(self, loaded: Loaded):
        self.loaded = loaded
        graphdef, self.state = nnx.split(loaded.model)

        @jax.jit
        def run(state, pixels, sizes):
            model = nnx.merge(graphdef, state)
            outputs, captured = nnx.capture(model, nnx.Intermediate)(normalize(pixels, sizes), sizes)
            captured = nnx.to_pure_dict(captured)
            weights = {
                (part, i): layer[name]["attention_weights"].mean((0, 1))
                for part, name in (("encoder", "self_attn"), ("decoder", "cross_attn"))
                for i, layer in captured.get(part, {}).items()
                if isinstance(loaded.config, DeformableDETRConfig)
            }
            found = postprocess(outputs, jnp.ones((1, 2)), classification=loaded.classification)
            main = {name: outputs[name][0] for name in ("pred_logits", "pred_boxes")}
            return main, [x[0] for x in found], weights

        self.run = run

    def __call__(self, image: ImageLike) -> tuple[dict[str, Any], list[Any], dict[tuple[str, int], Any]]:
        """Logits `[q, k]` and boxes `[q, 4]`; scores, labels, boxes_xyxy (0-1) of detections; weights `[h, l, p]`."""
        opened = open_image(image)
        size = resize_size(np.array([opened.height, opened.width]), self.loaded.scale, self.loaded.max_size)
        h, w = round_up(size)
        pixels, sizes, _ = pad_to_bucket([(opened, size)], (int(h), int(w)), 1, self.loaded.max_source_side)
        return jax.device_get(self.run(self.state, pixels, sizes))
