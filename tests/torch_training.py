"""Training in PyTorch, as the official code does it: criterion, optimizer groups, clipping. The oracle of a step."""

import re

import numpy as np
import torch
import transformers_oracle
from scipy.optimize import linear_sum_assignment

from detr_jax.config import DETRConfig, LossConfig, OptimConfig


def giou(a, b):
    """Generalized IoU of aligned boxes, cxcywh `[n, 4]` -> `[n]`."""
    a, b = (torch.cat([x[..., :2] - x[..., 2:] / 2, x[..., :2] + x[..., 2:] / 2], -1) for x in (a, b))
    size = (torch.minimum(a[..., 2:], b[..., 2:]) - torch.maximum(a[..., :2], b[..., :2])).clamp(min=0)
    hull = torch.maximum(a[..., 2:], b[..., 2:]) - torch.minimum(a[..., :2], b[..., :2])
    union = (a[..., 2:] - a[..., :2]).prod(-1) + (b[..., 2:] - b[..., :2]).prod(-1) - size.prod(-1)
    return size.prod(-1) / union - (hull.prod(-1) - union) / hull.prod(-1)


def layer_loss(logits, boxes, targets, config: LossConfig):
    """Terms of one layer: `[b, q, k]`, `[b, q, 4]`, a list of (labels, boxes)."""
    matched = []
    for image, (labels, true_boxes) in enumerate(targets):
        with torch.no_grad():
            if config.classification == "focal":
                p = logits[image].sigmoid()[:, labels]
                positive = config.focal_alpha * (1 - p) ** config.focal_gamma * -torch.log(p + 1e-8)
                negative = (1 - config.focal_alpha) * p**config.focal_gamma * -torch.log(1 - p + 1e-8)
                class_cost = positive - negative
            else:
                class_cost = -logits[image].softmax(-1)[:, labels]
            l1 = torch.cdist(boxes[image], true_boxes, p=1)
            overlap = giou(boxes[image][:, None], true_boxes[None])
            cost = config.class_cost * class_cost + config.l1_cost * l1 - config.giou_cost * overlap
        matched.append([torch.as_tensor(i) for i in linear_sum_assignment(cost.numpy())])
    count = max(sum(len(labels) for labels, _ in targets), 1)
    k = logits.shape[-1]
    classes = torch.full(logits.shape[:2], k if config.classification == "focal" else k - 1)
    for image, ((queries, order), (labels, _)) in enumerate(zip(matched, targets, strict=True)):
        classes[image, queries] = labels[order]
    if config.classification == "focal":
        onehot = torch.nn.functional.one_hot(classes, k + 1)[..., :-1].float()
        bce = torch.nn.functional.binary_cross_entropy_with_logits(logits, onehot, reduction="none")
        p_true = torch.where(onehot > 0, logits.sigmoid(), 1 - logits.sigmoid())
        weight = torch.where(onehot > 0, config.focal_alpha, 1 - config.focal_alpha)
        ce = (weight * (1 - p_true) ** config.focal_gamma * bce).sum() / count
    else:
        weight = torch.ones(k)
        weight[-1] = config.no_object_weight
        ce = torch.nn.functional.cross_entropy(logits.transpose(1, 2), classes, weight)
    predicted = torch.cat([boxes[i][queries] for i, (queries, _) in enumerate(matched)])
    true = torch.cat([b[order] for (_, order), (_, b) in zip(matched, targets, strict=True)])
    return {
        "loss_ce": ce,
        "loss_bbox": (predicted - true).abs().sum() / count,
        "loss_giou": (1 - giou(predicted, true)).sum() / count,
    }


def terms(outputs, targets, config: LossConfig):
    """All terms by our names, and their weighted sum. `outputs`: of `transformers_oracle.outputs`."""
    logits, boxes = outputs["logits"], outputs["boxes"]
    last = len(logits) - 1
    result = {}
    for i in range(last + 1):
        layer = layer_loss(logits[i], boxes[i], targets, config)
        result |= {name if i == last else f"{name}_{i}": value for name, value in layer.items()}
    if "enc_logits" in outputs:
        binary = [(torch.zeros_like(labels), b) for labels, b in targets]
        layer = layer_loss(outputs["enc_logits"], outputs["enc_boxes"], binary, config)
        result |= {f"{name}_enc": value for name, value in layer.items()}
    weights = {"loss_ce": config.class_weight, "loss_bbox": config.l1_weight, "loss_giou": config.giou_weight}
    total = sum(weights[re.match(r"loss_[a-z]+", name)[0].removesuffix("_enc")] * x for name, x in result.items())
    return total, result


class Trainer:
    """A model of `transformers`, trained a step at a time."""

    def __init__(self, config, loss: LossConfig, optim: OptimConfig, weights):
        self.model, self.loss, self.optim = transformers_oracle.build(config), loss, optim
        transformers_oracle.load(self.model, config, weights)
        groups = {"base": [], "backbone": [], "offsets": []}
        self.parameters = {}
        for name, parameter in self.model.named_parameters():
            ours = transformers_oracle.our_name(name, config)
            # Frozen BatchNorm is a constant; so are the stem and the first stage.
            constant = re.match(r"backbone\.(stem|stages\.0\.)|backbone\..*norm", ours)
            parameter.requires_grad_(not constant)
            if constant:
                continue
            self.parameters[ours] = parameter
            offsets = re.search(r"sampling_offsets|reference_points", ours)
            groups["backbone" if "backbone" in ours else "offsets" if offsets else "base"].append(parameter)
        factors = {"base": 1.0, "backbone": optim.backbone_lr_factor, "offsets": optim.offsets_lr_factor}
        self.optimizer = torch.optim.AdamW(
            [{"params": group, "lr": optim.lr * factors[name]} for name, group in groups.items() if group],
            weight_decay=optim.weight_decay,
        )
        self.softmax = isinstance(config, DETRConfig)

    def step(self, images: np.ndarray, sizes: np.ndarray, targets):
        """Loss terms before the step, and gradient norms by our names."""
        torch_targets = [(torch.as_tensor(labels), torch.as_tensor(boxes)) for labels, boxes in targets]
        total, values = terms(transformers_oracle.outputs(self.model, images, sizes), torch_targets, self.loss)
        self.optimizer.zero_grad()
        total.backward()
        norms = {name: float(p.grad.norm()) for name, p in self.parameters.items() if p.grad is not None}
        torch.nn.utils.clip_grad_norm_(list(self.parameters.values()), self.optim.clip_norm)
        self.optimizer.step()
        return {name: float(value.detach()) for name, value in values.items()} | {"loss": float(total.detach())}, norms
