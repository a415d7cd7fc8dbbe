"""Matching costs and losses by the papers' formulas: NumPy, float64, one pair and one image at a time."""

import numpy as np
from scipy.optimize import linear_sum_assignment


def random_problem(*, b=8, q=7, t=5, k=4, s=12, n=2, seed=0):
    """A two-stage model's outputs, and targets with 0 to t boxes, in float32."""
    rng = np.random.default_rng(seed)

    def layer(*shape):
        logits = 2 * rng.normal(size=(*shape, k))
        return {
            "pred_logits": logits.astype(np.float32),
            "pred_boxes": rng.uniform(0.1, 0.9, (*shape, 4)).astype(np.float32),
        }

    outputs = {**layer(b, q), "aux_outputs": layer(n, b, q), "enc_outputs": layer(b, s)}
    targets = {
        "boxes_cxcywh": rng.uniform(0.1, 0.9, (b, t, 4)).astype(np.float32),
        "labels": rng.integers(0, k - 1, (b, t)).astype(np.int32),
        "num_boxes": (np.arange(b) % (t + 1)).astype(np.int32),
    }
    return outputs, targets


def giou(a_cxcywh, b_cxcywh):
    a, b = ([x - w / 2, y - h / 2, x + w / 2, y + h / 2] for x, y, w, h in (a_cxcywh, b_cxcywh))
    width, height = (min(a[i + 2], b[i + 2]) - max(a[i], b[i]) for i in (0, 1))
    intersection = max(width, 0) * max(height, 0)
    union = a_cxcywh[2] * a_cxcywh[3] + b_cxcywh[2] * b_cxcywh[3] - intersection
    hull = np.prod([max(a[i + 2], b[i + 2]) - min(a[i], b[i]) for i in (0, 1)])
    return intersection / union - (hull - union) / hull


def softmax(logits):
    return np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)


def focal(p, positive, config):
    p_true, weight = (p, config.focal_alpha) if positive else (1 - p, 1 - config.focal_alpha)
    return -weight * (1 - p_true) ** config.focal_gamma * np.log(p_true)


def match_cost(logits, pred_boxes, labels, boxes, config):
    """One image: [q, k], [q, 4], [t], [t, 4] -> [t, q]."""
    cost = np.zeros((len(labels), len(logits)))
    for t, q in np.ndindex(*cost.shape):
        if config.classification == "softmax":
            class_cost = -softmax(logits[q])[labels[t]]
        else:
            p = 1 / (1 + np.exp(-logits[q, labels[t]]))
            class_cost = focal(p, True, config) - focal(p, False, config)
        cost[t, q] = config.class_cost * class_cost
        cost[t, q] += config.l1_cost * np.abs(boxes[t] - pred_boxes[q]).sum()
        cost[t, q] -= config.giou_cost * giou(boxes[t], pred_boxes[q])
    return cost


def layer_terms(outputs, targets, config):
    """The terms of one layer of a batch, matched by SciPy."""
    logits, pred_boxes = (np.asarray(outputs[name], np.float64) for name in ("pred_logits", "pred_boxes"))
    num_boxes = targets["num_boxes"]
    b, q, k = logits.shape
    matched_label = {}
    l1 = giou_loss = correct = cardinality = 0.0
    for image in range(b):
        labels = targets["labels"][image, : num_boxes[image]]
        boxes = np.asarray(targets["boxes_cxcywh"][image, : num_boxes[image]], np.float64)
        cost = match_cost(logits[image], pred_boxes[image], labels, boxes, config)
        for t, query in zip(*linear_sum_assignment(cost), strict=True):
            matched_label[image, query] = labels[t]
            l1 += np.abs(pred_boxes[image, query] - boxes[t]).sum()
            giou_loss += 1 - giou(pred_boxes[image, query], boxes[t])
            correct += logits[image, query].argmax() == labels[t]
        predicted = sum(logits[image, query].argmax() != k - 1 for query in range(q))
        cardinality += abs(predicted - len(labels)) / b

    total_boxes = max(num_boxes.sum(), 1)
    if config.classification == "focal":
        p = 1 / (1 + np.exp(-logits))
        ce = sum(focal(p[i, j, c], matched_label.get((i, j)) == c, config) for i, j, c in np.ndindex(b, q, k))
        ce /= total_boxes
    else:
        ce = weights = 0.0
        for i, j in np.ndindex(b, q):
            weight = 1.0 if (i, j) in matched_label else config.no_object_weight
            ce -= weight * np.log(softmax(logits[i, j])[matched_label.get((i, j), k - 1)])
            weights += weight
        ce /= weights
    return {
        "loss_ce": ce,
        "loss_bbox": l1 / total_boxes,
        "loss_giou": giou_loss / total_boxes,
        "class_error": 100 - 100 * correct / max(len(matched_label), 1),
        "cardinality_error": cardinality,
    }


def set_prediction_loss(outputs, targets, config):
    """-> (weighted sum, terms), with the official names."""
    terms = layer_terms(outputs, targets, config)
    layers = {}
    if "aux_outputs" in outputs:
        for i in range(len(outputs["aux_outputs"]["pred_logits"])):
            layers[f"_{i}"] = ({name: x[i] for name, x in outputs["aux_outputs"].items()}, targets)
    if "enc_outputs" in outputs:
        layers["_enc"] = (outputs["enc_outputs"], {**targets, "labels": np.zeros_like(targets["labels"])})
    for suffix, (layer, layer_targets) in layers.items():
        layer = layer_terms(layer, layer_targets, config)
        terms |= {name + suffix: value for name, value in layer.items() if name != "class_error"}
    weight = {"loss_ce": config.class_weight, "loss_bbox": config.l1_weight, "loss_giou": config.giou_weight}
    total = sum(weight.get("_".join(name.split("_")[:2]), 0) * value for name, value in terms.items())
    return total, terms
