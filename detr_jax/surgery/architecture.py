"""Other classes, queries, layers, levels and backbones for a loaded detector."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
from flax import nnx

from detr_jax.categories import Categories
from detr_jax.checkpoints.convert import describe, describe_backbone, load_backbone
from detr_jax.checkpoints.load import Loaded, class_rows
from detr_jax.config import BackboneConfig, DeformableDETRConfig, DINOConfig, ModelConfig
from detr_jax.errors import UserError
from detr_jax.models import DINO, DeformableDETR, DeformableEncoder, DETREncoder, split
from detr_jax.models.deform_conv import plain_kernel_factor
from detr_jax.surgery.transplant import (
    Operated,
    Origin,
    Path,
    Rule,
    by_level,
    deformable,
    tensors,
    transplant,
    whole,
)

# Output projections of a transformer layer: zero ones add nothing to the residual stream.
_OUTPUTS = ("out", "output_proj", "linear2")


# --- classes and queries ---------------------------------------------------------------------------------------------
def change_classes(
    loaded: Loaded, categories: Categories, *, same_as: Mapping[str, str] | None = None, seed: int = 0
) -> Operated:
    """Other classes; what both lists have by name is kept: `change_classes(loaded, Categories.contiguous({1: "cat"}))`.

    The logits of kept classes and all boxes stay as they were (two-stage: if the proposals do, which output 0 of the
    last head ranks, whatever class it is named after; it is kept at its place. DINO ranks proposals by their best
    class: they stay where that is a kept one). DETR's "no object" is kept.

    Args:
        loaded: the detector.
        categories: the new classes, in the order of the labels.
        same_as: new name -> old name, for classes that are called differently.
        seed: of the new classes' rows.

    Raises:
        ValueError: `same_as` has a name that is not there.
    """
    same_as = dict(same_as or {})
    for names, known, which in ((same_as, categories, "new"), (same_as.values(), loaded.categories, "old")):
        for name in names:
            if name not in known.names:
                raise UserError(f"same_as: {name!r} is none of the {which} classes: {', '.join(known.names)}")
    old = {name: label for label, name in enumerate(loaded.categories.names) if name != "N/A"}
    index = [old.get(same_as.get(name, name), -1) for name in categories.names]

    def rule(path: Path) -> Origin:
        if path[0] not in ("class_embed", "label_embed"):
            return Origin(path)
        rows, axis = class_rows(loaded.config, index, path)
        return Origin(path, rows, axis=axis)

    kept = [name for name, i in zip(categories.names, index, strict=True) if i >= 0]
    gone = [name for name, i in old.items() if i not in index]
    added = [name for name, i in zip(categories.names, index, strict=True) if i < 0]
    lists = {"kept": kept, "new": added, "gone": gone}
    notes = [f"classes {title}: {', '.join(names) or 'none'}" for title, names in lists.items()]
    config = dataclasses.replace(loaded.config, num_classes=len(categories.ids))
    what = f"change_classes: {loaded.config.num_classes} -> {config.num_classes} outputs"
    return transplant(loaded, config, rule, what, categories=categories, notes=notes, seed=seed)


def change_queries(loaded: Loaded, num_queries: int, *, keep: Sequence[int] | None = None, seed: int = 0) -> Operated:
    """More or fewer queries: `change_queries(loaded, 50)`.

    The queries that stay keep their embeddings; their outputs change only through the self-attention among queries. A
    two-stage model has no tensor a query: it takes as many of its best proposals, which stay as they were.

    Args:
        loaded: the detector.
        num_queries: how many.
        keep: which of the old ones come first; `None` takes the first ones.
        seed: of the new ones.

    Raises:
        ValueError: `keep` names a query that there is not, or more than `num_queries`.
    """
    before = loaded.config.num_queries
    keep = list(range(min(before, num_queries))) if keep is None else list(keep)
    if len(keep) > num_queries or not all(0 <= i < before for i in keep):
        raise UserError(f"keep: expected at most {num_queries} of the queries 0 to {before - 1}, got {keep}")
    index = np.array(keep + [-1] * (num_queries - len(keep)))

    def rule(path: Path) -> Origin:
        return Origin(path, index, axis=0) if path[0] in ("query_embed", "anchor_embed") else Origin(path)

    config = dataclasses.replace(loaded.config, num_queries=num_queries)
    return transplant(loaded, config, rule, f"change_queries: {before} -> {num_queries}", seed=seed)


# --- layers ----------------------------------------------------------------------------------------------------------
def change_layers(
    loaded: Loaded,
    *,
    encoder: Sequence[int | None] | None = None,
    decoder: Sequence[int | None] | None = None,
    seed: int = 0,
) -> Operated:
    """Drops, adds, repeats or reorders layers: `change_layers(loaded, decoder=[0, 1, None])` keeps two and adds one.

    Decoder layers take their heads along, if they have their own. Without the last decoder layers, the outputs are
    those that were auxiliary. A new layer's output projections are zero: it adds nothing at first, so that a pre-norm
    model's features (and a refined one's boxes) pass through it unchanged; a post-norm layer still normalizes them.

    Args:
        loaded: the detector.
        encoder: for each encoder layer of the new model the old one that it is, or `None` for a new one; `None` leaves
            the encoder alone.
        decoder: as `encoder`.
        seed: of the new layers.

    Raises:
        ValueError: a layer that there is not, or no decoder layer.
    """
    old = loaded.config
    origins: dict[str, list[int | None]] = {}
    for part, given in (("encoder", encoder), ("decoder", decoder)):
        number = getattr(old, f"{part}_layers")
        origins[part] = list(range(number)) if given is None else list(given)
        if not all(i is None or 0 <= i < number for i in origins[part]):
            raise UserError(f"{part}: expected layers 0 to {number - 1} or None, got {list(given or ())}")
    counts = {f"{part}_layers": len(layers) for part, layers in origins.items()}
    config = dataclasses.replace(old, **counts)
    heads = _heads(old, config, origins["decoder"])

    def rule(path: Path) -> Origin | None:
        if path[0] in ("encoder", "decoder"):
            layer = origins[path[0]][path[1]]
            if layer is not None:
                return Origin((path[0], layer, *path[2:]))
            return Origin(None, fill=0.0) if path[-2] in _OUTPUTS else None
        return heads(path)

    listed = [f"{part} {['new' if i is None else i for i in layers]}" for part, layers in origins.items()]
    return transplant(loaded, config, rule, f"change_layers: {', '.join(listed)}", seed=seed)


def _heads(old: ModelConfig, new: ModelConfig, layers: Sequence[int | None]) -> Rule:
    """The rule for the class and box heads of a model whose decoder layers are those `layers` of the old one.

    A box head adds to a point or to a box, which is another thing to learn. Where that changes, and in new layers, its
    last linear layer is initialized anew: with zeros, so that the box is the one before.
    """
    if not isinstance(old, DeformableDETRConfig) or not isinstance(new, DeformableDETRConfig):
        return whole
    if not new.box_refinement:
        return whole

    rows, source = [], next((i for i in layers if i is not None), 0)
    for i, layer in enumerate(layers):
        source = source if layer is None else layer
        as_is = layer is not None and old.attends_to_boxes(layer) == new.attends_to_boxes(i)
        rows.append((source if old.decoder_heads > 1 else 0, as_is))
    if isinstance(new, DINOConfig) and new.shared_heads:
        rows = [(0, True)]
    if new.two_stage:
        rows.append((old.decoder_heads - (not old.two_stage), old.two_stage))

    def rule(path: Path) -> Origin | None:
        if path[0] not in ("class_embed", "bbox_embed"):
            return Origin(path)
        head, as_is = rows[path[1]]
        if path[:1] + path[2:4] == ("bbox_embed", "layers", 2) and not as_is:
            return None
        return Origin((path[0], head, *path[2:]))

    return rule


# --- upgrades --------------------------------------------------------------------------------------------------------
def upgrade(
    loaded: Loaded,
    *,
    num_levels: int | None = None,
    box_refinement: bool = False,
    two_stage: bool = False,
    new_level_logit: float = -5.0,
    seed: int = 0,
) -> Operated:
    """Single-scale -> multi-scale -> refined -> two-stage: `upgrade(loaded, num_levels=4, two_stage=True)`.

    - Levels: the old ones keep their projection, embedding, offsets and attention, wherever their place is now. The
      attention logits of new levels start at `new_level_logit`; the lower, the less they change (at -1e9 nothing, but
      they would never be trained either; 0 is a new model's).
    - Refinement: every layer gets a copy of the heads; the first layer's logits and boxes stay, later layers start with
      the boxes of the one before.
    - Two-stage: queries and their reference points give way to proposals, which start as the cells' boxes, ranked by a
      copy of the last class head; later layers' heads stay, the first starts with the proposals. Train it before use.

    Args:
        loaded: a Deformable DETR.
        num_levels: of the new model, at least as many as it has.
        box_refinement: refine the boxes layer by layer.
        two_stage: let the encoder propose boxes; implies `box_refinement`.
        new_level_logit: bias of the new levels' attention.
        seed: of what is new.

    Raises:
        ValueError: DETR, which has none of that, or fewer levels than before.
    """
    old = deformable(loaded, "upgrade")
    levels = old.num_levels if num_levels is None else num_levels
    if levels < old.num_levels:
        raise UserError(f"upgrade: num_levels={levels} is less than {old.num_levels}: use prune_levels")
    refined = old.box_refinement or box_refinement or two_stage
    config = dataclasses.replace(old, num_levels=levels, box_refinement=refined, two_stage=old.two_stage or two_stage)
    shift = config.feature_maps - old.feature_maps
    places = [i - shift if 0 <= i - shift < old.num_levels else -1 for i in range(levels)]
    heads, levels_rule = _heads(old, config, range(old.decoder_layers)), by_level(old, places, new_level_logit)

    def rule(path: Path) -> Origin | None:
        return heads(path) if path[0] in ("class_embed", "bbox_embed") else levels_rule(path)

    return transplant(loaded, config, rule, f"upgrade: {describe(old)} -> {describe(config)}", seed=seed)


# --- backbone --------------------------------------------------------------------------------------------------------
def swap_backbone(
    loaded: Loaded, backbone: BackboneConfig | Loaded, *, weights: str | None = None, seed: int = 0
) -> Operated:
    """Another ResNet under the transformer: `swap_backbone(loaded, BackboneConfig(depth=101), weights="r101.pth")`.

    Everything behind the backbone is kept, but for input projections of another width. With the same layers (another
    `dilation`, `freeze_at` or `mask_padding`) the backbone's tensors are kept too.

    Args:
        loaded: the detector.
        backbone: its new backbone, or a detector to take it from, tensors included.
        weights: torchvision's ResNet weights; see `train.init_backbone`. Without, a new backbone is random.
        seed: of what is new.

    Raises:
        ValueError: weights that are not this backbone's.
    """
    donor = backbone if isinstance(backbone, Loaded) else None
    new = donor.config.backbone if donor else backbone
    assert isinstance(new, BackboneConfig)
    old = loaded.config.backbone
    # The other fields leave the tensors alone.
    same = dataclasses.replace(new, dilation=old.dilation, freeze_at=old.freeze_at, mask_padding=old.mask_padding)
    kept = same == old and not weights
    config: ModelConfig = dataclasses.replace(loaded.config, backbone=new)

    def rule(path: Path) -> Origin | None:
        return None if path[0] == "backbone" and not (kept or donor) else Origin(path)

    source = "from the other detector" if donor else "kept" if kept else weights or "initialized anew"
    what = f"swap_backbone: {describe_backbone(old)} -> {describe_backbone(new)}, tensors {source}"
    theirs = {path: x for path, x in tensors(donor.model).items() if path[0] == "backbone"} if donor else None
    result = transplant(loaded, config, rule, what, values=theirs, seed=seed)
    if weights and not donor:
        graphdef, params, buffers = split(config, result.model)
        result.model = nnx.merge(graphdef, *load_backbone(weights, new, params, buffers)[:2])
    return result


def add_deform_conv(loaded: Loaded, version: Literal[1, 2] = 2, *, groups: int = 1) -> Operated:
    """Deformable 3x3 convolutions in C3 to C5 of the backbone that it has: `add_deform_conv(loaded)`.

    Offsets start at zero and version 2's factors at 1/2, for which its kernels are doubled: outputs stay the same, up
    to rounding in another order of summation.

    Args:
        loaded: the detector.
        version: 1, or 2 with modulation.
        groups: of channels with offsets of their own.

    Raises:
        ValueError: the backbone has deformable convolutions already, or `groups` does not divide its channels.
    """
    old = loaded.config.backbone
    if old.deform_version:
        raise UserError(f"add_deform_conv: the backbone has them already: {describe_backbone(old)}")
    new = dataclasses.replace(old, deform_version=version, deform_groups=groups)
    config: ModelConfig = dataclasses.replace(loaded.config, backbone=new)

    def rule(path: Path) -> Origin | None:
        if path[:2] == ("backbone", "stages") and path[2] > 0 and path[4:] == ("convs", 1, "kernel"):
            return Origin(path, scale=plain_kernel_factor(version))
        return Origin(path)  # offsets, which the old one doesn't have, as initialized: zero

    what = f"add_deform_conv: {describe_backbone(old)} -> {describe_backbone(new)}"
    return transplant(loaded, config, rule, what)


def extract_encoder(loaded: Loaded) -> DeformableEncoder | DETREncoder:
    """Backbone and encoder as a feature extractor: `maps, valid = extract_encoder(loaded)(images, sizes)`.

    Maps `[b, h, w, c]` and bool `[b, h, w]` for each level; the features that the decoder attends to, exactly. It is an
    NNX module of its own: train it with `nnx.split`, and `nnx.state` of it saves.
    """
    model: Any = loaded.model
    return DeformableEncoder(model) if isinstance(model, DeformableDETR | DINO) else DETREncoder(model)
