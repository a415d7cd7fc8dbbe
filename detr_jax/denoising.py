"""Contrastive denoising (DINO, section 3.3; DN-DETR, Li et al., CVPR 2022): queries made of the targets, with noise.

In training the decoder gets, in front of its own queries, noisy copies of an image's objects. From some, the positives,
it must find back box and class; others, with more noise, it must call background. Matching plays no part.

Shapes are static. An image has `num_slots` slots; how they are used follows from the largest number of objects in the
batch, n, by indices alone. With negatives a group has 2n slots: slot t of it is the positive of object t, slot n + t
the negative; without, a group has n. As many groups as fit are used, at least one. In an image with fewer objects the
slots of the missing ones are empty (zero content, reference box at 0.5), and must be called background too, as in the
official code. Slots behind the last group are not used: no query sees them, no loss counts them.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from detr_jax.boxes import cxcywh_to_xyxy, xyxy_to_cxcywh
from detr_jax.config import DINOConfig

# Dropout folds a counter into the same key; it never counts this far.
_STREAM = 2**32 - 1


class Noise(NamedTuple):
    """Random numbers of the slots, independent of the targets."""

    relabel: jax.Array
    """float32 [b, n] in [0, 1): below half of `label_noise`, the label is replaced."""
    labels: jax.Array
    """int32 [b, n]: by this one, which may be the same."""
    signs: jax.Array
    """float32 [b, n, 4]: +1 or -1, where each side (x1, y1, x2, y2) moves."""
    amounts: jax.Array
    """float32 [b, n, 4] in [0, 1): how far, in half widths and heights; negatives one more."""


class DenoisingQueries(NamedTuple):
    """Queries made of a batch's targets."""

    labels: jax.Array
    """int32 [b, n]: noisy labels."""
    boxes_cxcywh: jax.Array
    """float32 [b, n, 4]: noisy boxes, within the image; negatives' widths and heights may be negative."""
    real: jax.Array
    """bool [b, n]: slots that hold an object; the others are empty or not used."""
    target: jax.Array
    """int32 [n]: the object of each slot."""
    positive: jax.Array
    """bool [n]: slots that must be put right, if they hold an object."""
    group: jax.Array
    """int32 [n]: the slot's group."""
    used: jax.Array
    """bool [n]: slots of the groups that are used."""
    num_groups: jax.Array
    """int32 []: how many groups there are."""


PER_IMAGE = ("labels", "boxes_cxcywh", "real")
"""The fields of `DenoisingQueries` that have a row per image."""


def num_slots(config: DINOConfig, max_boxes: int) -> int:
    """Slots per image: for the denoising queries, or for one group of the data set's largest image where that is more.

    Args:
        config: of the model.
        max_boxes: the largest number of boxes in an image, the t of the targets.
    """
    if not config.denoising_queries:
        return 0
    return max(config.denoising_queries, max_boxes) * (2 if config.contrastive else 1)


def draw_noise(key: jax.Array, batch_size: int, slots: int, num_classes: int) -> Noise:
    """The noise of a step: a function of its key, whatever the targets and the devices."""
    keys = jax.random.split(jax.random.fold_in(key, _STREAM), 4)
    shape = (batch_size, slots)
    return Noise(
        jax.random.uniform(keys[0], shape),
        jax.random.randint(keys[1], shape, 0, num_classes),
        jnp.where(jax.random.bernoulli(keys[2], shape=(*shape, 4)), 1.0, -1.0),
        jax.random.uniform(keys[3], (*shape, 4)),
    )


def denoising_queries(targets: Mapping[str, Any], noise: Noise, config: DINOConfig) -> DenoisingQueries:
    """A batch's targets, with noise.

    Args:
        targets: boxes_cxcywh [b, t, 4], labels [b, t], num_boxes [b], of the whole (global) batch.
        noise: of all slots; see `num_slots`, `draw_noise`.
        config: of the model.
    """
    boxes, labels, num_boxes = targets["boxes_cxcywh"], targets["labels"], targets["num_boxes"]
    most = jnp.max(num_boxes)
    n = jnp.maximum(most, 1)
    per_group = n * (2 if config.contrastive else 1)
    slot = jnp.arange(noise.relabel.shape[1], dtype=jnp.int32)
    group, place = slot // per_group, slot % per_group
    target, positive = place % n, place < n
    num_groups = jnp.maximum(config.denoising_queries // n, 1)
    used = (group < num_groups) & (most > 0)
    real = used & (target < num_boxes[:, None])

    noisy_labels = jnp.where(noise.relabel < config.label_noise / 2, noise.labels, labels[:, target])
    boxes = boxes[:, target]
    amounts = noise.amounts + jnp.where(positive, 0.0, 1.0)[:, None]
    half_sizes = jnp.tile(boxes[..., 2:] / 2, 2)
    corners = cxcywh_to_xyxy(boxes) + noise.signs * amounts * half_sizes * config.box_noise
    return DenoisingQueries(
        labels=jnp.where(real, noisy_labels, 0),
        boxes_cxcywh=xyxy_to_cxcywh(jnp.clip(corners, 0, 1)),
        real=real,
        target=target,
        positive=positive,
        group=group,
        used=used,
        num_groups=num_groups,
    )


def visible(queries: DenoisingQueries, num_queries: int) -> jax.Array:
    """Who sees whom in the self-attention: bool [n + q, n + q], rows see columns, denoising queries first.

    A denoising query sees its group and all of the model's queries; these see one another alone, so that no target
    leaks into them.
    """
    same_group = queries.group[:, None] == queries.group
    n = len(same_group)
    return jnp.block(
        [
            [same_group, jnp.ones((n, num_queries), bool)],
            [jnp.zeros((num_queries, n), bool), jnp.ones((num_queries, num_queries), bool)],
        ]
    )
