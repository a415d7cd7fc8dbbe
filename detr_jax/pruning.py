"""Pruning of levels and sampling points by the attention that they get, with the drop in outputs shown."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from PIL import Image

from detr_jax.boxes import box_iou
from detr_jax.detector import Loaded, Photo, normalised, open_photo, photo_size
from detr_jax.evaluation import postprocess
from detr_jax.models import DeformableDETR
from detr_jax.models.attention import MSDeformAttn
from detr_jax.transplant import Operated, Origin, Path, by_level, by_sample, deformable, transplant


@dataclasses.dataclass(frozen=True)
class Difference:
    """How the outputs of two detectors differ on some photos."""

    logits: float | None
    """Mean |difference| of the class logits, query by query; `None` where queries do not correspond."""
    boxes: float | None
    """... of the boxes, in 0-1 of the photo."""
    detections: int
    """Detections of the first one above the threshold."""
    kept: float
    """Share of these that the second one has too: the same class, IoU of at least 0.5."""

    def __str__(self) -> str:
        pairs = (("logit", self.logits), ("box", self.boxes))
        means = "".join(f"mean |{name} change| {value:.4f}, " for name, value in pairs if value is not None)
        return f"{means}{self.kept:.0%} of {self.detections} detections kept"


def difference(before: Loaded, after: Loaded, photos: Sequence[Photo], *, threshold: float = 0.5) -> Difference:
    """Compares two detectors of the same classes on photos.

    Logits and boxes are compared where query `i` of both is the same one: not with two-stage, whose proposals may
    change places, and not where the numbers of queries differ.

    Args:
        before: the first detector.
        after: the second one.
        photos: as `Detector` takes them.
        threshold: of the detections' score.
    """
    logits, boxes, found, kept = [], [], 0, 0
    one, two = _Probe(before), _Probe(after)
    aligned = before.config.num_queries == after.config.num_queries and not any(
        getattr(loaded.config, "two_stage", False) for loaded in (before, after)
    )
    for photo in photos:
        (was, seen, _), (now, still, _) = one(photo), two(photo)
        if aligned:
            logits.append(np.abs(now["pred_logits"] - was["pred_logits"]).mean())
            boxes.append(np.abs(now["pred_boxes"] - was["pred_boxes"]).mean())
        (scores, labels, places), (new_scores, new_labels, new_places) = seen, still
        iou = np.asarray(box_iou(jnp.asarray(places), jnp.asarray(new_places)))
        match = (iou >= 0.5) & (labels[:, None] == new_labels) & (new_scores >= threshold)
        found += int((scores >= threshold).sum())
        kept += int(match.any(1)[scores >= threshold].sum())
    return Difference(
        float(np.mean(logits)) if logits else None,
        float(np.mean(boxes)) if boxes else None,
        found,
        kept / found if found else 1.0,
    )


def attention(loaded: Loaded, photos: Sequence[Photo]) -> dict[tuple[str, int], np.ndarray]:
    """Mean attention weight of each sampling point over queries and photos.

    Returns:
        `("encoder" | "decoder", layer)` -> float32 `[h, l, p]`, which sums to 1 for each head.
    """
    deformable(loaded, "attention")
    probe = _Probe(loaded)
    weights = [probe(photo)[2] for photo in photos]
    if not weights:
        raise ValueError("attention: got no photos; expected at least one")
    return {key: np.mean([found[key] for found in weights], axis=0) for key in weights[0]}


def prune_levels(loaded: Loaded, num_levels: int, *, photos: Sequence[Photo] = ()) -> Operated:
    """Fewer levels: `prune_levels(loaded, 3, photos=["a.jpg"])`; the coarsest extra ones go first, then C3, then C4.

    What remains of the attention is a softmax over the remaining logits. The tensors of the levels that stay are
    exactly the old ones. With photos, the report says how much attention each level had, and what the loss of it does.

    Raises:
        ValueError: DETR, or a number of levels that is not below the model's.
    """
    old = deformable(loaded, "prune_levels")
    if not 1 <= num_levels < old.num_levels:
        raise ValueError(f"prune_levels: num_levels={num_levels}, expected 1 to {old.num_levels - 1}")
    first = min(old.num_levels, 3) - min(num_levels, 3)
    places = list(range(first, first + num_levels))
    notes = [f"levels kept: {places} of 0 to {old.num_levels - 1}"]
    if photos:
        share = np.mean([weights.sum(-1).mean(0) for weights in attention(loaded, photos).values()], axis=0)
        notes.append(f"attention by level: {', '.join(f'{x:.1%}' for x in share)}")
    config = dataclasses.replace(old, num_levels=num_levels)
    what = f"prune_levels: {old.num_levels} -> {num_levels}"
    return _compared(loaded, transplant(loaded, config, by_level(old, places), what, notes=notes), photos)


def prune_points(
    loaded: Loaded, *, encoder: int | None = None, decoder: int | None = None, photos: Sequence[Photo]
) -> Operated:
    """Fewer sampling points, those with most attention: `prune_points(loaded, decoder=2, photos=photos)`.

    Each layer, head and level keeps its own best. What remains of the attention is a softmax over the remaining logits.
    Offsets that are fractions of a box over the number of points are rescaled: kept points stay where they were.

    Args:
        loaded: a Deformable DETR.
        encoder: points in the encoder; `None` leaves them.
        decoder: points in the decoder; `None` leaves them.
        photos: on which the attention is measured.

    Raises:
        ValueError: DETR, no photos, or more points than there are.
    """
    old = deformable(loaded, "prune_points")
    points = {"encoder": encoder or old.encoder_points, "decoder": decoder or old.decoder_points}
    for part, before in (("encoder", old.encoder_points), ("decoder", old.decoder_points)):
        if not 1 <= points[part] <= before:
            raise ValueError(f"prune_points: {part}={points[part]}, expected 1 to {before}")
    weights = attention(loaded, photos)
    shares = []

    def rule(path: Path) -> Origin:
        if not {"sampling_offsets", "attention_weights"} & set(path):
            return Origin(path)
        part, layer = path[:2]
        mean, number = weights[part, layer], points[part]
        best = np.sort(np.argsort(-mean, axis=-1, kind="stable")[..., :number], axis=-1)
        shares.append(np.take_along_axis(mean, best, -1).sum() / mean.sum())
        numbers = np.arange(mean.size).reshape(mean.shape)
        in_boxes = part == "decoder" and (old.two_stage or (old.box_refinement and layer > 0))
        scaled = in_boxes and "sampling_offsets" in path
        return by_sample(path, np.take_along_axis(numbers, best, -1), scale=number / mean.shape[-1] if scaled else 1.0)

    config = dataclasses.replace(old, encoder_points=points["encoder"], decoder_points=points["decoder"])
    what = f"prune_points: encoder {old.encoder_points} -> {points['encoder']}, decoder {old.decoder_points} -> "
    result = transplant(loaded, config, rule, what + str(points["decoder"]))
    return _compared(loaded, result, photos, f"attention that the kept points had: {np.mean(shares):.1%}")


def _compared(before: Loaded, after: Operated, photos: Sequence[Photo], *notes: str) -> Operated:
    """`after`, with the notes and the difference on the photos in its report."""
    compared = [f"on {len(photos)} photos: {difference(before, after, photos)}"] if photos else []
    changes = dataclasses.replace(after.changes, notes=(*after.changes.notes, *notes, *compared))
    return dataclasses.replace(after, changes=changes)


class _Probe:
    """Runs a model on one photo; also gives its mean attention weights."""

    def __init__(self, loaded: Loaded):
        self.loaded = loaded
        graphdef, self.state = nnx.split(loaded.model)

        @jax.jit
        def run(state, pixels, sizes):
            model = nnx.merge(graphdef, state)
            weights: dict[tuple[str, int], jax.Array] = {}
            if isinstance(model, DeformableDETR):
                layers = [("encoder", i, layer.self_attn) for i, layer in enumerate(model.encoder)]
                layers += [("decoder", i, layer.cross_attn) for i, layer in enumerate(model.decoder)]
                for part, i, attn in layers:
                    recorder: Any = _Recorder(attn, weights, (part, i))
                    attn.attention_weights = recorder
            outputs = model(normalised(pixels, sizes), sizes)
            found = postprocess(outputs, jnp.ones((1, 2)), classification=loaded.classification)
            main = {name: outputs[name][0] for name in ("pred_logits", "pred_boxes")}
            return main, [x[0] for x in found], weights

        self.run = run

    def __call__(self, photo: Photo) -> tuple[dict[str, Any], list[Any], dict[tuple[str, int], Any]]:
        """Logits `[q, k]` and boxes `[q, 4]`; scores, labels, boxes_xyxy (0-1) of detections; weights `[h, l, p]`."""
        image = open_photo(photo)
        size = photo_size(np.array([image.height, image.width]), self.loaded.scale, self.loaded.max_size)
        h, w = (int(n) for n in size)
        pixels = np.zeros((1, -(-h // 32) * 32, -(-w // 32) * 32, 3), np.uint8)
        pixels[0, :h, :w] = np.asarray(image.resize((w, h), Image.Resampling.BILINEAR))
        return jax.device_get(self.run(self.state, pixels, size[None]))


class _Recorder:
    """The layer that predicts a deformable attention's weights, which also notes their mean over queries."""

    def __init__(self, attn: MSDeformAttn, weights: dict, key: tuple[str, int]):
        self.layer, self.weights, self.key = attn.attention_weights, weights, key
        self.grid = (attn.num_heads, attn.num_levels, attn.num_points)

    def __call__(self, query: jax.Array) -> jax.Array:
        logits = self.layer(query)
        weights = jax.nn.softmax(logits.reshape(*logits.shape[:-1], self.grid[0], -1).astype(jnp.float32))
        self.weights[self.key] = weights.mean((0, 1)).reshape(self.grid)
        return logits
