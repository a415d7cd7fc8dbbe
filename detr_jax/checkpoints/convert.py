"""Weights in and out: what reads other implementations' checkpoints into our models, and writes them back.

The names are in `key maps`. Nothing is left over in silence, either way.
"""

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils.epath import Path, PathLike
from flax import nnx

from detr_jax.categories import Categories
from detr_jax.checkpoints import hub
from detr_jax.checkpoints.files import Tensors, read_tensors
from detr_jax.checkpoints.key_maps import (
    DETREX_DINO,
    HF_DEFORMABLE,
    HF_DETR,
    KEY_MAPS,
    OFFICIAL_DEFORMABLE,
    OFFICIAL_DETR,
    OFFICIAL_DINO,
    TORCHVISION,
    KeyMap,
    compile_rows,
    rename,
)
from detr_jax.config import MEAN, STD, BackboneConfig, DeformableDETRConfig, DETRConfig, DINOConfig, ModelConfig
from detr_jax.errors import UserError
from detr_jax.models import build_abstract
from detr_jax.models.deform_conv import plain_kernel_factor
from detr_jax.models.resnet import BLOCKS

OFFICIAL = {DETRConfig: OFFICIAL_DETR, DeformableDETRConfig: OFFICIAL_DEFORMABLE, DINOConfig: OFFICIAL_DINO}
"""The key map of the official code of each model."""

# Our leaves -> PyTorch's.
_LEAVES = {"kernel": "weight", "scale": "weight", "mean": "running_mean", "var": "running_var"}
# What files hold besides a detector's weights.
_NO_WEIGHTS = {
    r"num_batches_tracked$": "BatchNorm's step counters",
    r"(^|\.)total_(ops|params)$": "counts of a profiler (total_ops, total_params)",
    r"(^|\.)data_preprocessor\.": "image statistics (data_preprocessor)",
    r"(^|\.)(criterion\.|loss_cls\.).*|(^|\.)empty_weight$": "weights of the loss (criterion)",
}


# --- reading ---------------------------------------------------------------------------------------------------------
@dataclasses.dataclass
class Pretrained:
    """A model from a file."""

    config: ModelConfig
    model: nnx.Module
    categories: Categories
    report: str
    """What was read, for people."""
    scale: int = 800
    """Images' shorter side is resized to this, in pixels."""
    max_size: int = 1333
    """... unless the longer one would become longer than this."""


def load(
    path: PathLike, *, dilation: bool | None = None, num_heads: int | None = None, name: str | None = None
) -> Pretrained:
    """A detector from another implementation's checkpoint; the variant is inferred from the tensors.

    Reads `.pth` and `.safetensors` files and folders of `transformers`: see `KEY_MAPS`. Two things leave no trace in
    tensors; where the file does not tell them (`args` beside the official tensors, `config.json`), these arguments do:

    Args:
        path: file or folder.
        dilation: DC5 or not; `None` takes what the file says, and else looks for "dc5" in its name.
        num_heads: `None` takes what the file says, and else 8, as all the published models have.
        name: what it is called in the report; `None` is the path.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a checkpoint of a detector that this project has; names the first tensors that do not fit.
    """
    tensors, facts = read_tensors(path)
    key_map, found, notes = translate(tensors, str(path), facts.get("notes", ()))
    facts |= {k: v for k, v in {"dilation": dilation, "num_heads": num_heads}.items() if v is not None}
    if "dilation" not in facts:
        facts["dilation"] = "dc5" in Path(path).name.lower()
        notes.append(f"DC5: {'yes' if facts['dilation'] else 'no'}, by the file's name (tensors do not tell)")
    if key_map is DETREX_DINO:
        facts = {"position_temperature": 10000.0, "half_pixel": True, **facts}
    try:
        config = facts.get("config") or infer_config(found, facts)
    except KeyError as error:
        lacks = f"no {error.args[0]} among {len(found)} tensors"
        raise UserError(f"{path}: {key_map.title}, but not a whole detector: {lacks}") from error
    model, more = assemble(config, found, str(path))
    categories = facts.get("categories")
    if categories is None:
        categories = Categories.guess(config.num_classes)
        what = "numbered" if categories.names[0] == "class 0" else "COCO's, by the number of outputs"
        more.append(f"the file does not name its {config.num_classes} classes: {what}")
    if len(categories.ids) != config.num_classes:
        raise UserError(f"{path}: {len(categories.ids)} class names for {config.num_classes} outputs of the class head")
    notes = [f"{name or path}: {key_map.title}, {len(tensors)} tensors; {describe(config)}", *notes, *more]
    sizes = {name: facts[name] for name in ("scale", "max_size") if name in facts}
    return Pretrained(config, model, categories, "\n  ".join(notes), **sizes)


def unwrap(tensors: Tensors) -> tuple[Tensors, list[str]]:
    """Tensors without what wrappers put before and between their names, and without those that are not of a detector.

    Returns:
        The tensors, and a note on each thing that was found.
    """
    notes = []
    for pattern, reason in _NO_WEIGHTS.items():
        ignored = [name for name in tensors if re.search(pattern, name)]
        if ignored:
            notes.append(f"{len(ignored)} ignored: {reason}")
            tensors = {name: tensor for name, tensor in tensors.items() if name not in ignored}
    compiled = "_orig_mod."
    if any(compiled in name for name in tensors):
        tensors = {name.replace(compiled, ""): tensor for name, tensor in tensors.items()}
        notes.append(f"{compiled!r} removed from names: saved from a compiled model")
    # Two-stage models of transformers have nothing outside of `model.` themselves: names that fit are left alone.
    while _nearest(split_in_proj(tensors))[2]:
        first = {name.partition(".")[0] for name in tensors}
        if len(first) != 1 or not all("." in name for name in tensors):
            break
        prefix = f"{first.pop()}."
        tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
        notes.append(f"all names begin with {prefix!r}, which is removed")
    masks = [name for name in tensors if name.startswith(("bbox_attention.", "mask_head."))]
    if masks and all(name.startswith("detr.") for name in tensors if name not in masks):
        tensors = {name.removeprefix("detr."): tensor for name, tensor in tensors.items() if name not in masks}
        notes.append(f"panoptic DETR: its detector is taken, {len(masks)} tensors of the mask head are left out")
    return tensors, notes


def _nearest(tensors: Tensors) -> tuple[KeyMap, dict[str, str], list[str]]:
    """The key map that knows most of the names; those names with ours, and the names that it lacks."""
    best: tuple[KeyMap, dict[str, str], list[str]] | None = None
    for key_map in KEY_MAPS:
        rows = compile_rows(key_map.rows)
        names = {name: ours[0] for name in tensors if (ours := rename(name, rows))}
        unknown = [name for name in tensors if name not in names]
        if best is None or len(unknown) < len(best[2]):
            best = key_map, names, unknown
    assert best is not None
    return best


def translate(tensors: Tensors, what: str, notes: Sequence[str] = ()) -> tuple[KeyMap, Tensors, list[str]]:
    """Tensors under our names with PyTorch's leaves, in PyTorch's layout; tensors stored several times only once.

    Args:
        tensors: of a file.
        what: its name, for the error.
        notes: what is known of where in the file they were.

    Raises:
        ValueError: no key map has all the names; says which is nearest, the first names that it lacks, and how the
            names were wrapped.
    """
    tensors, wrapped = unwrap(tensors)
    notes = [*notes, *wrapped]
    tensors = split_in_proj(tensors)
    key_map, translated, unknown = _nearest(tensors)
    if unknown or not tensors:
        listed = "\n".join(f"  {name}: {list(tensors[name].shape)}" for name in unknown[:8])
        listed += f"\nFound in the file: {'; '.join(notes)}." if notes else ""
        raise UserError(
            f"{what}: not a checkpoint of DETR, Deformable DETR or DINO that is known here. Nearest: {key_map.title}, "
            f"which has {len(translated)} of its {len(tensors)} tensors, but not\n{listed}\n"
            "A ResNet alone goes to --train.init-backbone."
        )
    convs = {int(ours.split(".")[1]) for ours in translated.values() if re.match(r"input_proj\.\d", ours)}
    found: Tensors = {}
    for name, ours in translated.items():
        extra = re.match(r"input_proj\.extra\.(\d+)\.", ours)
        if extra:
            ours = f"input_proj.{len(convs) + int(extra[1])}.{ours[extra.end() :]}"
        if ours in found and not np.array_equal(found[ours], tensors[name]):
            raise UserError(f"{what}: {name} and another tensor both stand for {ours}, with different values")
        found[ours] = tensors[name]
    if len(found) < len(tensors):
        notes.append(f"{len(tensors) - len(found)} tensors are stored twice (shared heads)")
    # Without refinement, and in the official DINO, one head serves all layers, under as many names.
    layers = sorted({int(name.split(".")[1]) for name in found if re.match(r"bbox_embed\.\d+\.layers", name)})
    aliased = any("decoder.bbox_embed" in name for name in translated)
    one_head = key_map is OFFICIAL_DINO or not (aliased or "proposals.output.weight" in found)
    if len(layers) > 1 and one_head and _tied(found, layers):
        found = {k: v for k, v in found.items() if not re.match(r"(class|bbox)_embed\.[1-9]", k)}
        notes.append("one head for all decoder layers, stored once a layer")
        layers = layers[:1]
    found = {name.replace("_embed.proposals.", f"_embed.{len(layers)}."): tensor for name, tensor in found.items()}
    if key_map is DETREX_DINO and "label_embed" in found:
        # The official table has one row more than classes, which is never read.
        found["label_embed"] = np.pad(found["label_embed"], ((0, 1), (0, 0)))
    return key_map, found, notes


def _tied(found: Tensors, layers: Sequence[int]) -> bool:
    """Whether the heads of all layers are the same."""
    heads = [name for name in found if re.match(r"(class|bbox)_embed\.0\.", name)]
    pairs = ((name, re.sub(r"_embed\.0\.", f"_embed.{i}.", name)) for name in heads for i in layers)
    return all(other not in found or np.array_equal(found[name], found[other]) for name, other in pairs)


def split_in_proj(tensors: Tensors) -> Tensors:
    """`in_proj_weight` and `in_proj_bias` of PyTorch's attention as those of query, key and value."""
    result: Tensors = {}
    for name, tensor in tensors.items():
        whole = re.fullmatch(r"(.*\.)in_proj_(weight|bias)", name)
        if whole:
            parts = np.split(tensor, 3)
            result |= {f"{whole[1]}{p}_proj.{whole[2]}": part for p, part in zip("qkv", parts, strict=True)}
        else:
            result[name] = tensor
    return result


def infer_config(found: Mapping[str, np.ndarray], facts: Mapping[str, Any]) -> ModelConfig:
    """The model that tensors belong to.

    Args:
        found: tensors as `translate` gives them.
        facts: what else is known: `dilation`, `num_heads` (8), `num_queries` of a two-stage model (300), and of DINO
            `position_temperature` (20) and `half_pixel` (no).
    """

    def count(pattern: str) -> int:
        return 1 + max((int(m[1]) for name in found if (m := re.match(pattern, name))), default=-1)

    bottleneck = any(re.search(r"stages\.\d\.\d+\.convs\.2", name) for name in found)
    blocks = tuple(count(rf"backbone\.stages\.{s}\.(\d+)\.") for s in range(4))
    depths = [d for d, b in BLOCKS.items() if b == blocks and (d >= 50) == bottleneck]
    if not depths:
        raise UserError(f"a ResNet with {blocks} blocks in its stages, which is none of ResNet-{list(BLOCKS)}")
    frozen = "backbone.stem_norm.running_mean" in found
    backbone = BackboneConfig(
        depth=depths[0],  # pyright: ignore[reportArgumentType]  (one of the four)
        norm="frozen_batch" if frozen else "group",
        dilation=bool(facts.get("dilation", False)),
        freeze_at=2 if frozen else 0,
        **_middle_convs(found),
    )
    num_heads = int(facts.get("num_heads", 8))
    common: dict[str, Any] = {
        "backbone": backbone,
        "num_heads": num_heads,
        "hidden_dim": len(found["decoder.0.norm1.weight"]),
        "encoder_layers": count(r"encoder\.(\d+)\."),
        "decoder_layers": count(r"decoder\.(\d+)\."),
        "ffn_dim": len(found["decoder.0.ffn.linear1.weight"]),
    }
    if "level_embed" not in found:
        return DETRConfig(
            **common,
            num_classes=len(found["class_embed.weight"]) - 1,
            num_queries=len(found["query_embed"]),
            pre_norm="encoder_norm.weight" in found,
            position="learned" if "position.row_embed" in found else "sine",
        )
    num_levels = len(found["level_embed"])
    two_stage = "proposals.output.weight" in found
    points = {
        part: len(found[f"{part}.0.{attention}.attention_weights.bias"]) // (num_heads * num_levels)
        for part, attention in (("encoder", "self_attn"), ("decoder", "cross_attn"))
        if f"{part}.0.{attention}.attention_weights.bias" in found
    }
    common |= {
        "num_classes": len(found["class_embed.0.weight"]),
        "num_levels": num_levels,
        "encoder_points": points.get("encoder", 4),
        "decoder_points": points["decoder"],
        "two_stage": two_stage,
    }
    heads = count(r"bbox_embed\.(\d+)\.")
    if "label_embed" in found:
        return DINOConfig(
            **common,
            num_queries=len(found["query_embed"]),
            backbone_maps=4 if found["input_proj.0.conv.weight"].shape[1] == (256 if bottleneck else 64) else 3,
            shared_heads=heads - two_stage == 1,
            **{name: facts[name] for name in ("position_temperature", "half_pixel") if name in facts},
        )
    return DeformableDETRConfig(
        **common,
        num_queries=int(facts.get("num_queries", 300)) if two_stage else len(found["query_embed"]),
        box_refinement=two_stage or heads > 1,
    )


def _middle_convs(found: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Groups and deformation of a backbone's 3x3 convolutions, by their tensors' shapes."""
    outputs, inputs = found["backbone.stages.0.0.convs.1.weight"].shape[:2]
    groups = outputs // inputs
    result = {"groups": groups, "group_width": outputs // groups}
    bias = found.get("backbone.stages.1.0.convs.1.offset.bias")
    if bias is not None:
        # 18 channels for a group of offsets, 27 with modulation. A multiple of both would be three groups, which do not
        # divide a ResNet's channels.
        version = 2 if len(bias) % 27 == 0 else 1
        result |= {"deform_version": version, "deform_groups": len(bias) // (18 if version == 1 else 27)}
    return result


def describe_backbone(backbone: BackboneConfig) -> str:
    """A backbone in a few words, such as "ResNeXt-101 64x4d + DCN v2"."""
    name = f"ResNet-{backbone.depth}"
    if backbone.groups > 1:
        name = f"ResNeXt-{backbone.depth} {backbone.groups}x{backbone.group_width}d"
    return name + " DC5" * backbone.dilation + f" + DCN v{backbone.deform_version}" * (backbone.deform_version > 0)


def describe(config: ModelConfig) -> str:
    """A configuration in a line."""
    backbone = describe_backbone(config.backbone)
    if isinstance(config, DETRConfig):
        kind = "DETR"
    elif isinstance(config, DINOConfig):
        learned = "" if config.two_stage else ", learned boxes"
        kind = f"DINO, {config.num_levels} levels{' with C2' if config.backbone_maps == 4 else ''}{learned}"
    else:
        scale = "single-scale" if config.num_levels == 1 else f"{config.num_levels} levels"
        steps = " + box refinement" * config.box_refinement + " + two-stage" * config.two_stage
        kind = f"Deformable DETR, {scale}{steps}"
    return (
        f"{kind}, {backbone}, {config.hidden_dim} wide, {config.encoder_layers} + {config.decoder_layers} layers, "
        f"{config.num_queries} queries, {config.num_classes} classes"
    )


def assemble(config: ModelConfig, found: Tensors, what: str) -> tuple[nnx.Module, list[str]]:
    """The model of a configuration with tensors as `translate` gives them; every one is used, every one is there.

    Raises:
        ValueError: they do not fit; names the first that do not, with both shapes.
    """
    graphdef, state = nnx.split(build_abstract(config))
    unused, problems, notes, values = set(found), [], [], []
    for path, leaf in nnx.to_flat_state(state):
        name = canonical(path)
        tensor = found.get(name)
        if tensor is None and re.match(r"class_embed\.\d", name):
            # transformers shares the class heads of a refined model, and stores the first.
            tensor = found.get(re.sub(r"\d", "0", name, count=1))
            notes += ["class heads of all layers: the first one's"] if name.endswith("1.bias") else []
        if tensor is None and re.fullmatch(r"input_proj\.\d+\.conv\.bias", name):
            tensor = np.zeros(leaf.shape, np.float32)
            notes.append(f"{name}: not in the file, 0")
        unused.discard(name)
        if tensor is not None:
            tensor = to_ours(tensor, len(leaf.shape), path[-1] == "kernel")
        if tensor is None or tensor.shape != leaf.shape:
            got = "missing" if tensor is None else f"{list(tensor.shape)} in our layout"
            problems.append(f"  {name}: {got}, expected {list(leaf.shape)}")
            continue
        values.append((path, leaf.replace(jnp.asarray(tensor))))
    problems += [f"  {name}: {list(found[name].shape)}, not expected" for name in sorted(unused)]
    if problems:
        raise UserError(f"{what}: {len(problems)} tensors do not fit {describe(config)}:\n" + "\n".join(problems[:8]))
    return nnx.merge(graphdef, nnx.from_flat_state(values)), notes


def canonical(path: Sequence[Any]) -> str:
    """Our path with PyTorch's leaf: `("encoder", 0, "norm1", "scale")` -> `encoder.0.norm1.weight`."""
    *modules, leaf = map(str, path)
    return ".".join([*modules, _LEAVES.get(leaf, leaf)])


def to_ours(tensor: np.ndarray, ndim: int, kernel: bool) -> np.ndarray:
    """PyTorch's layout -> ours: `[out, in]` -> `[in, out]`, `[out, in, h, w]` -> `[h, w, in, out]`."""
    if not kernel:
        return tensor
    if tensor.ndim == 4 and ndim == 2:  # a 1x1 convolution that is a matrix here
        tensor = tensor[:, :, 0, 0]
    return tensor.T if tensor.ndim == 2 else tensor.transpose(2, 3, 1, 0)


def to_theirs(tensor: np.ndarray, name: str, kernel: bool) -> np.ndarray:
    """Our layout -> PyTorch's; DETR's `input_proj`, a matrix here, is a 1x1 convolution there."""
    if not kernel:
        return tensor
    tensor = tensor.T if tensor.ndim == 2 else tensor.transpose(3, 2, 0, 1)
    return tensor[:, :, None, None] if name == "input_proj.weight" and tensor.ndim == 2 else tensor


def load_backbone(
    path: str, config: BackboneConfig, params: Mapping[str, Any], buffers: Mapping[str, Any]
) -> tuple[dict, dict, str]:
    """`params` and `buffers` of a detector with its backbone taken from ResNet weights with torchvision's names.

    The third result is a line for people: what was read.

    `path` is a file, or a name on the Hugging Face hub such as `timm/resnet50.tv_in1k`, which has these names too.

    Where the backbone has deformable convolutions and the file has not, they start as the file's convolutions: their
    offsets stay as they are (new ones are zero), and version 2's kernels are doubled (`DeformConv`).

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file's tensors are not those of this backbone; names the first that do not fit.
    """
    if "mean" not in buffers.get("backbone", {}).get("stem_norm", {}):
        raise UserError(f"{path}: torchvision's weights are for model.backbone.norm='frozen_batch', got 'group'")
    where = hub.locate(path)
    tensors, _ = read_tensors(where)
    # The classifier and BatchNorm's step counters have no place in a detector.
    unused = {name for name in tensors if not name.startswith("fc.") and not name.endswith("num_batches_tracked")}
    rows = compile_rows((ours, theirs) for theirs, ours in TORCHVISION)
    problems = []
    new_offsets = config.deform_version > 0 and not any(".conv_offset." in name for name in tensors)

    def replace(location, leaf):
        path = [part.key for part in location[1:]]
        if path[0] != "backbone":
            return leaf
        name = rename(canonical(path[1:]), rows)[0]
        if new_offsets and ".conv_offset." in name:
            return leaf
        unused.discard(name)
        tensor = to_ours(tensors[name], leaf.ndim, path[-1] == "kernel") if name in tensors else None
        if tensor is None or tensor.shape != leaf.shape:
            got = "missing" if tensor is None else f"{list(tensor.shape)} in our layout"
            problems.append(f"  {name}: {got}, expected {list(leaf.shape)}")
            return leaf
        if new_offsets and re.fullmatch(r"layer[234]\.\d+\.conv2\.weight", name):
            tensor = tensor * plain_kernel_factor(config.deform_version)
        return jax.device_put(jnp.asarray(tensor, leaf.dtype), leaf.sharding)

    loaded = jax.tree_util.tree_map_with_path(replace, (dict(params), dict(buffers)))
    problems += [f"  {name}: {list(tensors[name].shape)}, not expected" for name in sorted(unused)]
    plain = describe_backbone(dataclasses.replace(config, deform_version=0))
    if problems:
        raise UserError(
            f"{path}: {len(problems)} tensors do not fit the backbone:\n" + "\n".join(problems[:8]) + "\n"
            f"Is it torchvision's file for a {plain}, as model.backbone says?"
        )
    return *loaded, f"backbone: {hub.describe(path, where)}: {plain}, {len(tensors)} tensors"


# --- writing ---------------------------------------------------------------------------------------------------------
def save(
    path: PathLike,
    model: nnx.Module,
    config: ModelConfig,
    categories: Categories,
    *,
    detrex: bool = False,
    scale: int = 800,
    max_size: int = 1333,
) -> None:
    """Writes a model for other implementations; float32, exact.

    A path that ends in `.safetensors` gets the official code's names (what `load_state_dict` there expects), and beside
    the tensors the configuration, so that reading it back needs no guess. Any other path becomes a folder of
    `transformers`: `config.json` and `model.safetensors`, for `from_pretrained`.

    With `detrex`, a DINO's `.safetensors` gets detrex's names instead. Each decoder layer has heads of its own there.
    Position encodings are no tensors: for a model with the official ones, set `temperature=20`, `offset=0.0` there.

    Raises:
        ValueError: the model has no counterpart there.
    """
    from safetensors.numpy import save_file

    path = Path(path)
    if detrex and not isinstance(config, DINOConfig):
        raise UserError(f"{path}: only DINO is written with detrex's names; use the official ones")
    if path.suffix == ".safetensors":
        key_map = DETREX_DINO if detrex else OFFICIAL[type(config)]
        file = path
        path.parent.mkdir(parents=True, exist_ok=True)
    else:
        if isinstance(config, DINOConfig):
            raise UserError(f"{path}: transformers has no DINO: write a .safetensors file, with the official names")
        key_map = HF_DETR if isinstance(config, DETRConfig) else HF_DEFORMABLE
        file = path / "model.safetensors"
        text = json.dumps(transformers_config(config, categories), indent=2)
        path.mkdir(parents=True, exist_ok=True)
        (path / "config.json").write_text(text)
        (path / "preprocessor_config.json").write_text(json.dumps(preprocessor_config(scale, max_size), indent=2))
    written = dataclasses.replace(config, shared_heads=False) if isinstance(config, DINOConfig) and detrex else config
    facts = {
        "model": type(config).__name__,
        "config": dataclasses.asdict(written),
        "category_ids": categories.ids,
        "category_names": categories.names,
        "scale": scale,
        "max_size": max_size,
    }
    tensors = export(model, config, key_map)
    save_file(
        {name: np.ascontiguousarray(t) for name, t in tensors.items()},
        file,
        {"format": "pt", "detr_jax": json.dumps(facts)},
    )


def export(model: nnx.Module, config: ModelConfig, key_map: KeyMap) -> Tensors:
    """A model's tensors under the names, and in the layout, of the official code, `transformers`, or detrex's DINO."""
    rows = compile_rows(tuple((ours, theirs) for theirs, ours in key_map.rows))
    result: Tensors = {}
    for path, leaf in nnx.to_flat_state(nnx.state(model)):
        name = canonical(path)
        tensor = to_theirs(np.asarray(leaf[...], np.float32), name, path[-1] == "kernel")
        names = [name]
        if isinstance(config, DeformableDETRConfig) and (head := re.search(r"(?<=_embed\.)\d+(?=\.)", name)):
            proposals = int(head[0]) == config.decoder_heads
            if proposals and key_map is not OFFICIAL_DINO:
                names = [name.replace(f"_embed.{head[0]}.", f"_embed.{config.decoder_layers}.")]
            elif proposals:
                names = [name.replace(f"_embed.{head[0]}.", "_embed.proposals.")]
            elif config.decoder_heads == 1:
                names = [name.replace("_embed.0.", f"_embed.{i}.") for i in range(config.decoder_layers)]
        if key_map is DETREX_DINO and isinstance(config, DINOConfig):
            tensor = tensor[:-1] if name == "label_embed" else tensor
            if (level := re.match(r"input_proj\.(\d+)", name)) and (extra := int(level[1]) - config.feature_maps) >= 0:
                names = [f"input_proj.extra.{extra}{name[level.end() :]}"]
        for alias in names:
            translations = [t for t in rename(alias, rows) if _stored(t, config)]
            primary = translations[:1] + [t for t in translations[1:] if ".decoder." in t and "_embed." in t]
            if not primary:
                raise UserError(f"{key_map.title} has no name for {name}")
            result |= dict.fromkeys(primary, tensor)
    return fused(result) if key_map in OFFICIAL.values() or key_map is DETREX_DINO else result


def _stored(name: str, config: ModelConfig) -> bool:
    """Whether a checkpoint of theirs holds this name: the decoder shares the heads only where it uses them."""
    if not isinstance(config, DeformableDETRConfig) or not re.search(r"\bdecoder\.(class|bbox)_embed\.", name):
        return True
    return config.two_stage or isinstance(config, DINOConfig) if ".class_embed." in name else config.box_refinement


def fused(tensors: Tensors) -> Tensors:
    """The inverse of `split_in_proj`."""
    result: Tensors = {}
    for name, tensor in tensors.items():
        part = re.fullmatch(r"(.*\.)([qkv])_proj\.(weight|bias)", name)
        if part is None:
            result[name] = tensor
        elif part[2] == "q":
            names = (f"{part[1]}{p}_proj.{part[3]}" for p in "qkv")
            result[f"{part[1]}in_proj_{part[3]}"] = np.concatenate([tensors[n] for n in names])
    return result


def preprocessor_config(scale: int, max_size: int) -> dict[str, Any]:
    """`preprocessor_config.json` of `transformers`: how images are prepared, of which `read_tensors` reads it."""
    return {
        "image_processor_type": "DetrImageProcessor",
        "do_resize": True,
        "size": {"shortest_edge": scale, "longest_edge": max_size},
        "resample": 2,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(MEAN),
        "image_std": list(STD),
        "do_pad": True,
    }


def transformers_config(config: ModelConfig, categories: Categories) -> dict[str, Any]:
    """`config.json` of `transformers` for a model.

    Raises:
        ValueError: its ResNet has no DC5, GroupNorm, groups or deformable convolutions, its DETR no pre-norm.
    """
    lacking = {
        "backbone.dilation": config.backbone.dilation,
        "backbone.norm='group'": config.backbone.norm == "group",
        "backbone.groups": config.backbone.groups > 1 or config.backbone.group_width != 64,
        "backbone.deform_version": config.backbone.deform_version > 0,
        "pre_norm": getattr(config, "pre_norm", False),
    }
    if any(lacking.values()):
        names = ", ".join(name for name, lacks in lacking.items() if lacks)
        raise UserError(f"transformers has no {names}: write a .safetensors file, with the official names, instead")
    bottleneck = config.backbone.depth >= 50
    deformable = isinstance(config, DeformableDETRConfig)
    stages = ["stage4"] if not deformable or config.num_levels == 1 else ["stage2", "stage3", "stage4"]
    result: dict[str, Any] = {
        "architectures": ["DeformableDetrForObjectDetection" if deformable else "DetrForObjectDetection"],
        "model_type": "deformable_detr" if deformable else "detr",
        "use_timm_backbone": False,
        "use_pretrained_backbone": False,
        "backbone": None,
        "backbone_config": {
            "model_type": "resnet",
            "hidden_sizes": [(256 if bottleneck else 64) * 2**i for i in range(4)],
            "depths": list(BLOCKS[config.backbone.depth]),
            "layer_type": "bottleneck" if bottleneck else "basic",
            "out_features": stages,
        },
        "d_model": config.hidden_dim,
        "num_queries": config.num_queries,
        "dropout": config.dropout,
        "id2label": {str(i): name for i, name in enumerate(categories.names)},
        "label2id": {name: i for i, name in enumerate(categories.names)},
    }
    for part, layers in (("encoder", config.encoder_layers), ("decoder", config.decoder_layers)):
        result |= {f"{part}_layers": layers, f"{part}_ffn_dim": config.ffn_dim}
        result[f"{part}_attention_heads"] = config.num_heads
    if isinstance(config, DeformableDETRConfig):
        result |= {
            "num_feature_levels": config.num_levels,
            "encoder_n_points": config.encoder_points,
            "decoder_n_points": config.decoder_points,
            "with_box_refine": config.box_refinement,
            "two_stage": config.two_stage,
            "two_stage_num_proposals": config.num_queries,
        }
    else:
        result["position_embedding_type"] = config.position
    return result
