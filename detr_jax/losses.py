"""The set prediction losses: DETR's (the Hungarian loss, equation 2), Deformable DETR's and DINO's."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from detr_jax.boxes import aligned_generalized_box_iou, cxcywh_to_xyxy
from detr_jax.config import LossConfig
from detr_jax.denoising import DenoisingQueries
from detr_jax.matching import match, stack_layers


@jax.named_scope("losses")
def set_prediction_loss(
    outputs: Mapping[str, Any],
    targets: Mapping[str, Any],
    config: LossConfig,
    denoising: DenoisingQueries | None = None,
    whole: jax.Array | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Classification, L1 and GIoU losses of a whole (global) batch, over every supervised layer with its own matching.

    Or of a part of it: the results of equal parts add up to those of the whole batch.

    The terms have the names and the definitions of the official criteria, before weighting:

    - `loss_ce`: "focal": the sigmoid focal loss, summed over queries and classes, / number of boxes. "softmax": the
      weighted mean of the cross-entropy over all queries; unmatched ones are of the no-object class, whose weight is
      `no_object_weight`.
    - `loss_bbox`: L1 distance of matched boxes (cxcywh), summed, / number of boxes.
    - `loss_giou`: 1 - GIoU of matched boxes, summed, / number of boxes.
    - `cardinality_error` (not trained): mean over images of |queries whose best class is not the last - boxes|. The
      last class is the no-object class for DETR; Deformable DETR's code keeps this formula although its last class is
      an ordinary one, and so do we.
    - `class_error` (not trained; last layer only): percentage of matched queries whose best class is not the
      target's; 100 without any target.

    Other decoder layers add `_0`, `_1`, ..., the encoder adds `_enc`; its tokens are matched with every label 0. DINO's
    proposals that became queries add `_interm`, and its denoising queries `_dn` (last layer), `_dn_0`, `_dn_1`, ...:
    see `denoising_terms`.

    The number of boxes is that of the global batch, at least 1. The official code divides each process's sum by the
    mean number of boxes per process and averages gradients over processes: the same. (Its softmax mean is taken per
    process; here over the global batch, so that the loss does not depend on how many devices share it.)

    Args:
      outputs: the model's: pred_logits [b, q, k], pred_boxes [b, q, 4]; optionally aux_outputs (the same, stacked to
        [n, b, ...]; not used without `config.aux_loss`), interm_outputs (the same, of the proposals that became
        queries), enc_outputs (the same with s tokens for q queries) and dn_outputs (of the denoising queries).
      targets: boxes_cxcywh [b, t, 4], labels [b, t], num_boxes [b]; rows from num_boxes on are padding.
      config: weights of the losses and of the matching.
      denoising: the queries that dn_outputs come from.
      whole: num_boxes [B] of the whole batch, where outputs and targets are those of a part of it.

    Returns:
      The weighted sum, and the unweighted terms: float32 scalars. A layer that cannot be matched, because a prediction
      is not finite or a label not below k, gives NaN.
    """
    decoder_indices, encoder_indices = match(outputs, targets, config)
    boxes, labels, num_boxes = targets["boxes_cxcywh"], targets["labels"], targets["num_boxes"]
    whole = num_boxes if whole is None else whole

    def layer_terms(layer, labels, indices):
        predictions = layer["pred_logits"], layer["pred_boxes"]
        return _layer_terms(*predictions, labels, boxes, num_boxes, whole, indices, config)

    layers = stack_layers(outputs, config)
    decoder = jax.vmap(layer_terms, in_axes=(0, None, 0))(layers, labels, decoder_indices)
    *auxiliary, last = [{name: values[i] for name, values in decoder.items()} for i in range(len(decoder_indices))]
    terms = dict(last)
    suffixes = ["interm"] * ("interm_outputs" in outputs) + list(range(len(auxiliary)))
    for suffix, layer in zip(suffixes, auxiliary, strict=False):
        terms |= {f"{name}_{suffix}": value for name, value in layer.items() if name != "class_error"}
    if encoder_indices is not None:
        encoder = layer_terms(outputs["enc_outputs"], jnp.zeros_like(labels), encoder_indices)
        terms |= {f"{name}_enc": value for name, value in encoder.items() if name != "class_error"}

    if denoising is not None:
        terms |= denoising_terms(outputs["dn_outputs"], denoising, targets, config, whole)

    weights = {"loss_ce": config.class_weight, "loss_bbox": config.l1_weight, "loss_giou": config.giou_weight}
    total = jnp.float32(0)
    for loss, weight in weights.items():
        total += weight * sum(value for name, value in terms.items() if name.startswith(loss))
    return total, terms


def _layer_terms(pred_logits, pred_boxes, labels, boxes_cxcywh, num_boxes, whole, indices, config):
    """The terms of one layer: [b, q, k], [b, q, 4], [b, t], [b, t, 4], [b], [B], [b, t] -> dict of scalars."""
    logits, pred_boxes, boxes = (jnp.asarray(x, jnp.float32) for x in (pred_logits, pred_boxes, boxes_cxcywh))
    _, q, k = logits.shape
    total_boxes = jnp.maximum(jnp.sum(whole), 1).astype(jnp.float32)
    total_matched = jnp.sum(jnp.minimum(whole, q))
    matched = indices >= 0
    # NaN if any image has fewer matches than it must have: `match` refuses costs that are not finite.
    unmatchable = jnp.where(jnp.all(jnp.sum(matched, axis=-1) == jnp.minimum(num_boxes, q)), 0.0, jnp.nan)

    # Each query's class; k, which is none of the outputs, for queries without a target. -1 -> q is dropped.
    query_labels = jax.vmap(lambda index, label: jnp.full(q, k).at[index].set(label, mode="drop"))(
        jnp.where(matched, indices, q), labels
    )
    if config.classification == "focal":
        positive = query_labels[..., None] == jnp.arange(k)
        loss_ce = jnp.sum(sigmoid_focal_loss(logits, positive, config.focal_alpha, config.focal_gamma)) / total_boxes
    else:
        query_labels = jnp.minimum(query_labels, k - 1)
        nll = -jnp.take_along_axis(jax.nn.log_softmax(logits), query_labels[..., None], axis=-1)[..., 0]
        weight = jnp.where(query_labels == k - 1, config.no_object_weight, 1.0)
        unmatched = len(whole) * q - total_matched
        loss_ce = jnp.sum(weight * nll) / (total_matched + config.no_object_weight * unmatched)

    # A target without a query is compared with itself: a difference of 0, and no gradient.
    queries = jnp.where(matched, indices, 0)[..., None]
    matched_boxes = jnp.where(matched[..., None], jnp.take_along_axis(pred_boxes, queries, axis=1), boxes)
    loss_bbox = jnp.sum(jnp.abs(matched_boxes - boxes)) / total_boxes
    giou = aligned_generalized_box_iou(cxcywh_to_xyxy(matched_boxes), cxcywh_to_xyxy(boxes), config.giou_epsilon)
    loss_giou = jnp.sum(1 - giou, where=matched) / total_boxes

    best = jnp.argmax(logits, axis=-1)
    correct = matched & (jnp.take_along_axis(best, queries[..., 0], axis=1) == labels)
    class_error = 100 * len(labels) / len(whole) - 100 * jnp.sum(correct) / jnp.maximum(total_matched, 1)
    cardinality_error = jnp.sum(jnp.abs(jnp.sum(best != k - 1, axis=-1) - num_boxes)) / len(whole)
    return {
        "loss_ce": loss_ce + unmatchable,
        "loss_bbox": loss_bbox + unmatchable,
        "loss_giou": loss_giou + unmatchable,
        "class_error": class_error,
        "cardinality_error": cardinality_error,
    }


def denoising_terms(
    outputs: Mapping[str, jax.Array],
    queries: DenoisingQueries,
    targets: Mapping[str, Any],
    config: LossConfig,
    whole: jax.Array | None = None,
) -> dict[str, jax.Array]:
    """The terms of the denoising queries (DINO, section 3.3), which need no matching.

    A positive must give the box and the class of its object. All others are background, the empty slots of images
    with fewer objects too. Sums are divided by the number of boxes times the number of groups. In a batch without any
    box all terms are 0.

    Args:
      outputs: pred_logits [layers, b, n, k], pred_boxes [layers, b, n, 4], the last decoder layer last.
      queries: that these outputs come from.
      targets: as of `set_prediction_loss`.
      config: weights.
      whole: as of `set_prediction_loss`.
    """
    num_boxes: jax.Array = targets["num_boxes"] if whole is None else whole
    logits, pred_boxes = (jnp.asarray(outputs[name], jnp.float32) for name in ("pred_logits", "pred_boxes"))
    labels, boxes = (targets[name][:, queries.target] for name in ("labels", "boxes_cxcywh"))
    count = (jnp.maximum(jnp.sum(num_boxes), 1) * queries.num_groups).astype(jnp.float32)
    tied = queries.real & queries.positive
    positive = tied[..., None] & (labels[..., None] == jnp.arange(logits.shape[-1]))
    focal = sigmoid_focal_loss(logits, positive, config.focal_alpha, config.focal_gamma)
    # A slot that is not tied is compared with its object itself: a difference of 0, and no gradient.
    pred_boxes = jnp.where(tied[..., None], pred_boxes, boxes)
    giou = aligned_generalized_box_iou(cxcywh_to_xyxy(pred_boxes), cxcywh_to_xyxy(boxes), config.giou_epsilon)
    by_layer = {
        "loss_ce": jnp.sum(focal, where=queries.used[:, None], axis=(1, 2, 3)),
        "loss_bbox": jnp.sum(jnp.abs(pred_boxes - boxes), axis=(1, 2, 3)),
        "loss_giou": jnp.sum(1 - giou, where=tied, axis=(1, 2)),
    }
    last = len(logits) - 1
    supervised = range(last + 1) if config.aux_loss else [last]
    return {
        f"{name}_dn" if i == last else f"{name}_dn_{i}": values[i] / count
        for i in supervised
        for name, values in by_layer.items()
    }


def sigmoid_focal_loss(logits: jax.Array, positive: jax.Array, alpha: float = 0.25, gamma: float = 2.0) -> jax.Array:
    """The focal loss (Lin et al., ICCV 2017, eq. 5) of each logit, not reduced.

    Args:
      logits: float32 [...].
      positive: bool [...], what sigmoid(logits) should say.
      alpha: weight of the positives; that of the negatives is 1 - alpha.
      gamma: focusing exponent.
    """
    toward = jnp.where(positive, logits, -logits)  # sigmoid(toward) is the probability of the truth
    weight = jnp.where(positive, alpha, 1 - alpha)
    return -weight * jnp.exp(gamma * jax.nn.log_sigmoid(-toward)) * jax.nn.log_sigmoid(toward)
