"""DINO in PyTorch, the oracle: forward, denoising and losses as functions of tensors by their published names.

Written from the paper and the published facts, one image, one group and one layer at a time, so that it shares no
mistake with what it checks.
"""

import math
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch.nn import functional as F

from detr_jax.config import DINOConfig, LossConfig

Weights = Mapping[str, torch.Tensor]


def linear(w: Weights, name: str, x):
    return F.linear(x, w[f"{name}.weight"], w[f"{name}.bias"])


def norm(w: Weights, name: str, x):
    return F.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"])


def mlp(w: Weights, name: str, x, layers: int):
    for i in range(layers):
        x = linear(w, f"{name}.layers.{i}", x)
        x = x.relu() if i + 1 < layers else x
    return x


def inverse_sigmoid(x):
    x = x.clamp(0, 1)
    return torch.log(x.clamp(min=1e-3) / (1 - x).clamp(min=1e-3))


def sine(x, features: int, temperature: float):
    i = torch.arange(features, dtype=torch.float32)
    angle = x[..., None] / temperature ** (2 * torch.div(i, 2, rounding_mode="floor") / features)
    return torch.stack([angle[..., 0::2].sin(), angle[..., 1::2].cos()], -1).flatten(-2)


def resnet(w: Weights, x) -> list:
    """The four stages' maps."""
    prefix = "backbone.0.body."

    def conv_norm(conv: str, bn: str, x, stride: int):
        kernel = w[f"{prefix}{conv}.weight"]
        x = F.conv2d(x, kernel, stride=stride, padding=kernel.shape[-1] // 2)
        mean, var, weight, bias = (w[f"{prefix}{bn}.{n}"] for n in ("running_mean", "running_var", "weight", "bias"))
        return F.batch_norm(x, mean, var, weight, bias, eps=1e-5)

    x = F.max_pool2d(conv_norm("conv1", "bn1", x, 2).relu(), 3, 2, 1)
    maps = []
    for stage in range(1, 5):
        block = 0
        while f"{prefix}layer{stage}.{block}.conv1.weight" in w:
            name = f"layer{stage}.{block}"
            stride = 2 if stage > 1 and block == 0 else 1
            bottleneck = f"{prefix}{name}.conv3.weight" in w
            shortcut = x
            if f"{prefix}{name}.downsample.0.weight" in w:
                shortcut = conv_norm(f"{name}.downsample.0", f"{name}.downsample.1", x, stride)
            x = conv_norm(f"{name}.conv1", f"{name}.bn1", x, 1 if bottleneck else stride).relu()
            x = conv_norm(f"{name}.conv2", f"{name}.bn2", x, stride if bottleneck else 1)
            if bottleneck:
                x = conv_norm(f"{name}.conv3", f"{name}.bn3", x.relu(), 1)
            x = (x + shortcut).relu()
            block += 1
        maps.append(x)
    return maps


def deformable_attention(w: Weights, name: str, query, reference, tokens, padding, shapes, heads: int):
    """`reference [b, q, l, 2 or 4]`, `padding [b, s]`."""
    b, q, c = query.shape
    levels = len(shapes)
    value = linear(w, f"{name}.value_proj", tokens).masked_fill(padding[..., None], 0)
    offsets = linear(w, f"{name}.sampling_offsets", query).view(b, q, heads, levels, -1, 2)
    points = offsets.shape[4]
    weights = linear(w, f"{name}.attention_weights", query).view(b, q, heads, -1).softmax(-1)
    weights = weights.view(b, q, heads, levels, points)
    result = torch.zeros(b, q, heads, c // heads)
    for level, values in enumerate(value.split([h * width for h, width in shapes], 1)):
        h, width = shapes[level]
        ref = reference[:, :, None, level, None]
        if ref.shape[-1] == 2:
            where = ref + offsets[:, :, :, level] / torch.tensor([width, h])
        else:
            where = ref[..., :2] + offsets[:, :, :, level] / points * ref[..., 2:] * 0.5
        grid = (2 * where - 1).permute(0, 2, 1, 3, 4).flatten(0, 1)
        maps = values.view(b, h, width, heads, -1).permute(0, 3, 4, 1, 2).flatten(0, 1)
        sampled = F.grid_sample(maps, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
        sampled = sampled.view(b, heads, -1, q, points).permute(0, 3, 1, 4, 2)
        result = result + (sampled * weights[:, :, :, level, :, None]).sum(3)
    return linear(w, f"{name}.output_proj", result.flatten(2))


def self_attention(w: Weights, name: str, query, value, blocked, heads: int):
    q, k, v = (
        F.linear(x, weight, bias)
        for x, weight, bias in zip(
            (query, query, value), w[f"{name}.in_proj_weight"].chunk(3), w[f"{name}.in_proj_bias"].chunk(3), strict=True
        )
    )
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    scores = scores.masked_fill(blocked, -math.inf)
    return linear(w, f"{name}.out_proj", (scores.softmax(-1) @ v).transpose(1, 2).flatten(2))


def feed_forward(w: Weights, name: str, x):
    return linear(w, f"{name}.linear2", linear(w, f"{name}.linear1", x).relu())


def encode(w: Weights, config: DINOConfig, images, padded):
    """-> tokens, their padding, their proposals' boxes, shapes and valid ratios of the levels."""
    maps = resnet(w, images)[-config.backbone_maps :]
    features = []
    for level in range(config.num_levels):
        kernel, bias = w[f"input_proj.{level}.0.weight"], w[f"input_proj.{level}.0.bias"]
        if level < len(maps):
            x = F.conv2d(maps[level], kernel, bias)
        else:
            x = F.conv2d(maps[-1] if level == len(maps) else features[-1], kernel, bias, stride=2, padding=1)
        features.append(F.group_norm(x, 32, w[f"input_proj.{level}.1.weight"], w[f"input_proj.{level}.1.bias"]))
    tokens, positions, padding, centers, cells, ratios = [], [], [], [], [], []
    for level, x in enumerate(features):
        h, width = x.shape[2:]
        pad = F.interpolate(padded[None].float(), size=(h, width))[0].bool()
        rows, columns = (~pad).cumsum(1, dtype=torch.float32), (~pad).cumsum(2, dtype=torch.float32)
        rows, columns = rows / (rows[:, -1:] + 1e-6), columns / (columns[:, :, -1:] + 1e-6)
        code = [sine(2 * math.pi * axis, config.hidden_dim // 2, 20.0) for axis in (rows, columns)]
        positions.append(torch.cat(code, -1).flatten(1, 2) + w["transformer.level_embed"][level])
        tokens.append(x.flatten(2).transpose(1, 2))
        padding.append(pad.flatten(1))
        height, wide = (~pad)[:, :, 0].sum(1), (~pad)[:, 0].sum(1)
        ratios.append(torch.stack([wide / width, height / h], -1))
        y, z = torch.meshgrid(torch.arange(h) + 0.5, torch.arange(width) + 0.5, indexing="ij")
        grid = torch.stack([z.flatten(), y.flatten()], -1)
        center = grid / torch.stack([wide, height], -1)[:, None]
        centers.append(center)
        cells.append(torch.cat([center, torch.full_like(center, 0.05 * 2**level)], -1))
    shapes = [tuple(x.shape[2:]) for x in features]
    x, position, padding = torch.cat(tokens, 1), torch.cat(positions, 1), torch.cat(padding, 1)
    ratios = torch.stack(ratios, 1)
    reference = torch.cat(centers, 1)[:, :, None] * ratios[:, None]
    for i in range(config.encoder_layers):
        name = f"transformer.encoder.layers.{i}"
        attended = deformable_attention(
            w, f"{name}.self_attn", x + position, reference, x, padding, shapes, config.num_heads
        )
        x = norm(w, f"{name}.norm1", x + attended)
        x = norm(w, f"{name}.norm2", x + feed_forward(w, name, x))
    return x, padding, torch.cat(cells, 1), shapes, ratios


def propose(w: Weights, queries: int, memory, padding, cells, top):
    """Mixed query selection: what goes into the loss, and the logits of the queries' boxes."""
    unusable = padding | ~((cells > 0.01) & (cells < 0.99)).all(-1)
    anchors = torch.log(cells / (1 - cells)).masked_fill(unusable[..., None], math.inf)
    tokens = linear(w, "transformer.enc_output", memory.masked_fill(unusable[..., None], 0))
    tokens = norm(w, "transformer.enc_output_norm", tokens)
    scores = linear(w, "transformer.enc_out_class_embed", tokens)
    coordinates = mlp(w, "transformer.enc_out_bbox_embed", tokens, 3) + anchors
    top = scores.max(-1)[0].topk(queries, 1)[1] if top is None else torch.tensor(top).long()
    chosen = coordinates.gather(1, top[..., None].expand(-1, -1, 4))
    result = {
        "scores": scores.max(-1)[0],
        "interm_logits": scores.gather(1, top[..., None].expand(-1, -1, scores.shape[-1])),
        "interm_boxes": chosen.sigmoid(),
    }
    return result, chosen.detach()


def forward(w: Weights, config: DINOConfig, images: np.ndarray, sizes: np.ndarray, dn=None, top=None) -> dict[str, Any]:
    """`logits`, `boxes` `[layers, b, q, ...]`, `interm_...` of the proposals and, with `dn` of `denoise`, `dn_...`.

    `top [b, q]` are the tokens to choose where their scores are too near to one another to rank.
    """
    h, width = images.shape[1:3]
    pixels = torch.from_numpy(images.transpose(0, 3, 1, 2).copy())
    valid = (np.arange(h) < sizes[:, :1])[:, :, None] & (np.arange(width) < sizes[:, 1:])[:, None]
    memory, padding, cells, shapes, ratios = encode(w, config, pixels, torch.from_numpy(~valid))
    b, queries = len(images), config.num_queries
    if config.two_stage:
        result, logit = propose(w, queries, memory, padding, cells, top)
    else:
        result, logit = {}, w["transformer.refpoint_embed.weight"].expand(b, -1, -1)

    x = w["transformer.tgt_embed.weight"].expand(b, -1, -1)
    n = 0
    blocked = torch.zeros(queries, queries, dtype=torch.bool)
    if dn is not None and dn["pad"]:
        n = dn["pad"]
        content = torch.zeros(b, n, config.hidden_dim)
        place = torch.zeros(b, n, 4)
        for image, slot, label, box in dn["queries"]:
            content[image, slot] = w["label_enc.weight"][label]
            place[image, slot] = inverse_sigmoid(box)
        x, logit = torch.cat([content, x], 1), torch.cat([place, logit], 1)
        blocked = torch.zeros(n + queries, n + queries, dtype=torch.bool)
        blocked[n:, :n] = True
        size = n // dn["groups"]
        for group in range(dn["groups"]):
            others = torch.ones(n, dtype=torch.bool)
            others[group * size : (group + 1) * size] = False
            blocked[group * size : (group + 1) * size, :n] = others
    reference = logit.sigmoid()

    heads = [0 if config.shared_heads else i for i in range(config.decoder_layers)]
    hidden, references = [], [reference]
    for i in range(config.decoder_layers):
        name = f"transformer.decoder.layers.{i}"
        scaled = reference[:, :, None] * torch.cat([ratios, ratios], -1)[:, None]
        code = torch.cat(
            [sine(2 * math.pi * scaled[:, :, 0, j], config.hidden_dim // 2, 10000.0) for j in (1, 0, 2, 3)], -1
        )
        position = mlp(w, "transformer.decoder.ref_point_head", code, 2)
        attended = self_attention(w, f"{name}.self_attn", x + position, x, blocked, config.num_heads)
        x = norm(w, f"{name}.norm2", x + attended)
        attended = deformable_attention(
            w, f"{name}.cross_attn", x + position, scaled, memory, padding, shapes, config.num_heads
        )
        x = norm(w, f"{name}.norm1", x + attended)
        x = norm(w, f"{name}.norm3", x + feed_forward(w, name, x))
        refined = (mlp(w, f"bbox_embed.{heads[i]}", x, 3) + inverse_sigmoid(reference)).sigmoid()
        references.append(refined if config.look_forward_twice else refined.detach())
        reference = refined.detach()
        hidden.append(norm(w, "transformer.decoder.norm", x))
    logits = torch.stack([linear(w, f"class_embed.{head}", x) for head, x in zip(heads, hidden, strict=True)])
    boxes = torch.stack(
        [
            (mlp(w, f"bbox_embed.{head}", x, 3) + inverse_sigmoid(ref)).sigmoid()
            for head, x, ref in zip(heads, hidden, references[:-1], strict=True)
        ]
    )
    if n:
        result |= {"dn_logits": logits[:, :, :n], "dn_boxes": boxes[:, :, :n]}
    return result | {"logits": logits[:, :, n:], "boxes": boxes[:, :, n:]}


def denoise(targets, noise: Mapping[str, np.ndarray], config: DINOConfig) -> dict[str, Any]:
    """Denoising queries of images, a list of (labels, boxes), with our random numbers of each slot.

    `queries`: (image, slot, label, box) of each one; `pairs`: (image, slot, object) of those to put right.
    """
    most = max(len(labels) for labels, _ in targets)
    groups = max(2 * config.denoising_queries // (2 * most), 1) if most else 1
    sides = (0, 1) if config.contrastive else (0,)
    found: dict[str, Any] = {"groups": groups, "pad": len(sides) * groups * most, "queries": [], "pairs": []}
    for image, (labels, boxes) in enumerate(targets):
        for group in range(groups):
            for negative in sides:
                for t, (label, (x, y, w, h)) in enumerate(zip(labels.tolist(), boxes.tolist(), strict=True)):
                    slot = (group * len(sides) + negative) * most + t
                    random = {name: x[image, slot] for name, x in noise.items()}
                    if random["relabel"] < config.label_noise * 0.5:
                        label = int(random["labels"])
                    corners = torch.tensor([x - w / 2, y - h / 2, x + w / 2, y + h / 2])
                    step = torch.tensor([w, h, w, h]) / 2 * config.box_noise
                    corners = corners + torch.tensor(random["signs"] * (random["amounts"] + negative)) * step
                    x1, y1, x2, y2 = corners.clamp(0, 1)
                    box = torch.stack([(x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1])
                    found["queries"].append((image, slot, label, box))
                    if not negative:
                        found["pairs"].append((image, slot, t))
    return found


def giou(a, b):
    """Of aligned boxes, cxcywh `[..., 4]` -> `[...]`, with the official 1e-6."""
    a, b = (torch.cat([x[..., :2] - x[..., 2:] / 2, x[..., :2] + x[..., 2:] / 2], -1) for x in (a, b))
    inner = (torch.minimum(a[..., 2:], b[..., 2:]) - torch.maximum(a[..., :2], b[..., :2])).clamp(min=0).prod(-1)
    hull = (torch.maximum(a[..., 2:], b[..., 2:]) - torch.minimum(a[..., :2], b[..., :2])).clamp(min=0).prod(-1)
    union = (a[..., 2:] - a[..., :2]).prod(-1) + (b[..., 2:] - b[..., :2]).prod(-1) - inner
    return inner / (union + 1e-6) - (hull - union) / (hull + 1e-6)


def assign(logits, boxes, targets, config: LossConfig) -> list[tuple[int, int, int]]:
    """(image, query, object) of each match."""
    pairs = []
    with torch.no_grad():
        for image, (labels, true) in enumerate(targets):
            p = logits[image].sigmoid()[:, labels]
            positive = config.focal_alpha * (1 - p) ** config.focal_gamma * -torch.log(p + 1e-8)
            negative = (1 - config.focal_alpha) * p**config.focal_gamma * -torch.log(1 - p + 1e-8)
            cost = config.class_cost * (positive - negative)
            cost = cost + config.l1_cost * torch.cdist(boxes[image], true, p=1)
            cost = cost - config.giou_cost * giou(boxes[image][:, None], true[None])
            for query, t in zip(*linear_sum_assignment(cost.numpy()), strict=True):
                pairs.append((image, int(query), int(t)))
    return pairs


def layer_terms(logits, boxes, targets, pairs, count: float, config: LossConfig):
    """Class, L1 and GIoU loss of a layer whose `pairs` are tied."""
    truth = torch.zeros_like(logits)
    for image, query, t in pairs:
        truth[image, query, targets[image][0][t]] = 1
    p = logits.sigmoid()
    entropy = F.binary_cross_entropy_with_logits(logits, truth, reduction="none")
    p_true = p * truth + (1 - p) * (1 - truth)
    weight = config.focal_alpha * truth + (1 - config.focal_alpha) * (1 - truth)
    terms = {"loss_ce": (weight * (1 - p_true) ** config.focal_gamma * entropy).sum() / count}
    found = torch.stack([boxes[image, query] for image, query, _ in pairs]) if pairs else torch.zeros(0, 4)
    true = torch.stack([targets[image][1][t] for image, _, t in pairs]) if pairs else torch.zeros(0, 4)
    return terms | {
        "loss_bbox": (found - true).abs().sum() / count,
        "loss_giou": (1 - giou(found, true)).sum() / count,
    }


def loss(outputs: Mapping[str, torch.Tensor], targets, dn, config: LossConfig):
    """The weighted sum and all terms by their official names; `targets`: a list of (labels, boxes)."""
    count = max(sum(len(labels) for labels, _ in targets), 1)
    terms = {}
    last = len(outputs["logits"]) - 1
    layers = [
        ("" if i == last else f"_{i}", outputs["logits"][i], outputs["boxes"][i], None, count) for i in range(last + 1)
    ]
    if "interm_logits" in outputs:
        layers.append(("_interm", outputs["interm_logits"], outputs["interm_boxes"], None, count))
    for i in range(last + 1) if "dn_logits" in outputs else ():
        suffix = "_dn" if i == last else f"_dn_{i}"
        layers.append((suffix, outputs["dn_logits"][i], outputs["dn_boxes"][i], dn["pairs"], count * dn["groups"]))
    for suffix, logits, boxes, pairs, number in layers:
        pairs = assign(logits, boxes, targets, config) if pairs is None else pairs
        terms |= {name + suffix: x for name, x in layer_terms(logits, boxes, targets, pairs, number, config).items()}
    weights = {"loss_ce": config.class_weight, "loss_bbox": config.l1_weight, "loss_giou": config.giou_weight}
    return sum(weights[re.match(r"loss_[a-z]+", name)[0]] * x for name, x in terms.items()), terms
