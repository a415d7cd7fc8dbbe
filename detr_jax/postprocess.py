"""From a model's outputs to detections, and to COCO's results format."""

import json
import os
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from etils.epath import Path

from detr_jax.boxes import cxcywh_to_xyxy, xyxy_to_xywh


def postprocess(
    outputs: Mapping[str, Any],
    orig_size: jax.Array,
    *,
    classification: Literal["focal", "softmax"],
    top_k: int = 100,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """A model's outputs as detections; `PostProcess` of the official code of each paper. There is no NMS.

    `focal`: the `top_k` best (query, class) pairs by sigmoid score, best first, so that a query may give several.
    `softmax`: for each query its best class other than the last, the no-object class; in the queries' order.

    Args:
        outputs: `pred_logits` [b, q, k] and `pred_boxes` [b, q, 4] cxcywh, relative to the image.
        orig_size: int32 [b, 2], (h, w) in whose pixels the boxes are wanted.
        classification: as the model was trained.
        top_k: detections per image, at most q * k; for `focal` only.

    Returns:
        scores float32 [b, n], labels int32 [b, n], boxes_xyxy float32 [b, n, 4]; n is `top_k` or q. Boxes may
        reach beyond the image.
    """
    logits, boxes_xyxy = outputs["pred_logits"], cxcywh_to_xyxy(outputs["pred_boxes"])
    if classification == "focal":
        b, q, k = logits.shape
        scores, best = jax.lax.top_k(jax.nn.sigmoid(logits).reshape(b, q * k), min(top_k, q * k))
        labels = best % k
        boxes_xyxy = jnp.take_along_axis(boxes_xyxy, (best // k)[..., None], axis=1)
    else:
        probabilities = jax.nn.softmax(logits, axis=-1)[..., :-1]
        scores, labels = probabilities.max(axis=-1), probabilities.argmax(axis=-1)
    h, w = orig_size[:, 0], orig_size[:, 1]
    return scores, labels.astype(jnp.int32), boxes_xyxy * jnp.stack([w, h, w, h], axis=-1)[:, None].astype(jnp.float32)


def coco_results(
    image_ids: Sequence[int | str],
    scores: np.ndarray,
    labels: np.ndarray,
    boxes_xyxy: np.ndarray,
    category_ids: Sequence[int],
) -> list[dict[str, Any]]:
    """Detections of b images as COCO's results format: `image_id`, `category_id`, `bbox` (xywh), `score`.

    Args:
        image_ids: b ids.
        scores: [b, n].
        labels: int [b, n]; label i is category `category_ids[i]`.
        boxes_xyxy: [b, n, 4], pixels of the annotated images.
        category_ids: of the data set's index.
    """
    boxes_xywh = xyxy_to_xywh(boxes_xyxy)
    categories = np.asarray(category_ids)[labels]
    return [
        {"image_id": image_id, "category_id": category_id, "bbox": box, "score": score}
        for image_id, *rows in zip(image_ids, categories.tolist(), boxes_xywh.tolist(), scores.tolist(), strict=True)
        for category_id, box, score in zip(*rows, strict=True)
    ]


def write_results(path: str | os.PathLike[str], results: Sequence[Mapping[str, Any]]) -> None:
    """Writes COCO results as JSON, which `pycocotools.coco.COCO.loadRes` reads."""
    Path(path).write_text(json.dumps(list(results)))
