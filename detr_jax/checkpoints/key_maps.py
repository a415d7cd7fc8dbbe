"""Other implementations' names for the tensors of our models.

A key_map is a table of modules, theirs on the left and ours on the right; `{}` stands for a number. Reading a
checkpoint goes from left to right, writing from right to left. On our side a name ends in PyTorch's word: `weight` for
a kernel and for the scale of a norm (`pretrained.canonical`).
"""

import dataclasses
import re
from collections.abc import Iterable, Sequence

Rows = tuple[tuple[str, str], ...]


def _resnet(prefix: str, rows: Iterable[tuple[str, str]]) -> Rows:
    return tuple((f"{prefix}{theirs}", f"backbone.{ours}") for theirs, ours in rows)


def _attention(theirs: str, ours: str, names: Sequence[str] = ("q_proj", "k_proj", "v_proj", "out_proj")) -> Rows:
    parts = ("query", "key", "value", "out")
    return tuple((f"{theirs}.{name}", f"{ours}.{part}") for name, part in zip(names, parts, strict=True))


def _deformable(theirs: str, ours: str) -> Rows:
    parts = ("sampling_offsets", "attention_weights", "value_proj", "output_proj")
    return tuple((f"{theirs}.{part}", f"{ours}.{part}") for part in parts)


def _same(prefix: str, ours: str, names: Iterable[str]) -> Rows:
    return tuple((f"{prefix}.{name}", f"{ours}.{name}") for name in names)


TORCHVISION: Rows = (
    ("conv1", "stem_conv"),
    ("bn1", "stem_norm"),
    *((f"layer{s + 1}.{{}}.conv{c + 1}", f"stages.{s}.{{}}.convs.{c}") for s in range(4) for c in range(3)),
    *((f"layer{s + 1}.{{}}.bn{c + 1}", f"stages.{s}.{{}}.norms.{c}") for s in range(4) for c in range(3)),
    # mmdetection's; torchvision has no deformable ResNet.
    *((f"layer{s + 1}.{{}}.conv2.conv_offset", f"stages.{s}.{{}}.convs.1.offset") for s in range(4)),
    *((f"layer{s + 1}.{{}}.downsample.0", f"stages.{s}.{{}}.downsample_conv") for s in range(4)),
    *((f"layer{s + 1}.{{}}.downsample.1", f"stages.{s}.{{}}.downsample_norm") for s in range(4)),
)
DETECTRON: Rows = (
    ("stem.conv1", "stem_conv"),
    ("stem.conv1.norm", "stem_norm"),
    *((f"res{s + 2}.{{}}.conv{c + 1}", f"stages.{s}.{{}}.convs.{c}") for s in range(4) for c in range(3)),
    *((f"res{s + 2}.{{}}.conv{c + 1}.norm", f"stages.{s}.{{}}.norms.{c}") for s in range(4) for c in range(3)),
    *((f"res{s + 2}.{{}}.conv2_offset", f"stages.{s}.{{}}.convs.1.offset") for s in range(4)),
    *((f"res{s + 2}.{{}}.shortcut", f"stages.{s}.{{}}.downsample_conv") for s in range(4)),
    *((f"res{s + 2}.{{}}.shortcut.norm", f"stages.{s}.{{}}.downsample_norm") for s in range(4)),
)
HF_RESNET: Rows = (
    ("embedder.embedder.convolution", "stem_conv"),
    ("embedder.embedder.normalization", "stem_norm"),
    ("encoder.stages.{}.layers.{}.layer.{}.convolution", "stages.{}.{}.convs.{}"),
    ("encoder.stages.{}.layers.{}.layer.{}.normalization", "stages.{}.{}.norms.{}"),
    ("encoder.stages.{}.layers.{}.shortcut.convolution", "stages.{}.{}.downsample_conv"),
    ("encoder.stages.{}.layers.{}.shortcut.normalization", "stages.{}.{}.downsample_norm"),
)
_HEADS: Rows = (
    ("class_embed.{}", "class_embed.{}"),
    ("bbox_embed.{}.layers.{}", "bbox_embed.{}.layers.{}"),
)
_HEAD_ALIASES: Rows = (
    ("decoder.class_embed.{}", "class_embed.{}"),
    ("decoder.bbox_embed.{}.layers.{}", "bbox_embed.{}.layers.{}"),
)


def _below(prefix: str, rows: Rows) -> Rows:
    return tuple((f"{prefix}{theirs}", ours) for theirs, ours in rows)


@dataclasses.dataclass(frozen=True, eq=False)
class KeyMap:
    """The names of one implementation of one model."""

    title: str
    rows: Rows
    """(theirs, ours); the first of several names of ours is the one that is written."""


OFFICIAL_DEFORMABLE = KeyMap(
    "official Deformable DETR",
    (
        *_resnet("backbone.0.body.", TORCHVISION),
        ("input_proj.{}.0", "input_proj.{}.conv"),
        ("input_proj.{}.1", "input_proj.{}.norm"),
        ("transformer.level_embed", "level_embed"),
        *_deformable("transformer.encoder.layers.{}.self_attn", "encoder.{}.self_attn"),
        *_same("transformer.encoder.layers.{}", "encoder.{}", ("norm1", "norm2")),
        *((f"transformer.encoder.layers.{{}}.linear{i}", f"encoder.{{}}.ffn.linear{i}") for i in (1, 2)),
        *_attention("transformer.decoder.layers.{}.self_attn", "decoder.{}.self_attn"),
        *_deformable("transformer.decoder.layers.{}.cross_attn", "decoder.{}.cross_attn"),
        # They number the norms in the order of declaration; self-attention, which comes first, has the second.
        ("transformer.decoder.layers.{}.norm2", "decoder.{}.norm1"),
        ("transformer.decoder.layers.{}.norm1", "decoder.{}.norm2"),
        ("transformer.decoder.layers.{}.norm3", "decoder.{}.norm3"),
        *((f"transformer.decoder.layers.{{}}.linear{i}", f"decoder.{{}}.ffn.linear{i}") for i in (1, 2)),
        ("transformer.reference_points", "reference_points"),
        ("query_embed.weight", "query_embed"),
        ("transformer.enc_output", "proposals.output"),
        ("transformer.enc_output_norm", "proposals.output_norm"),
        ("transformer.pos_trans", "proposals.position"),
        ("transformer.pos_trans_norm", "proposals.position_norm"),
        *_HEADS,
        *_below("transformer.", _HEAD_ALIASES),
    ),
)
# Of a model with two heads a number, one for the decoder layers and one for the proposals, the reader finds the latter.
_PROPOSALS: Rows = (
    ("transformer.enc_out_class_embed", "class_embed.proposals"),
    ("transformer.enc_out_bbox_embed.layers.{}", "bbox_embed.proposals.layers.{}"),
)
OFFICIAL_DINO = KeyMap(
    "official DINO",
    (
        *(row for row in OFFICIAL_DEFORMABLE.rows if not row[1].startswith(("query_embed", "reference", "proposals"))),
        ("transformer.decoder.norm", "decoder_norm"),
        ("transformer.decoder.ref_point_head.layers.{}", "query_position.layers.{}"),
        ("transformer.tgt_embed.weight", "query_embed"),
        ("transformer.refpoint_embed.weight", "anchor_embed"),
        ("transformer.enc_output", "proposals.output"),
        ("transformer.enc_output_norm", "proposals.output_norm"),
        ("label_enc.weight", "label_embed"),
        *_PROPOSALS,
    ),
)
OFFICIAL_DETR = KeyMap(
    "official DETR",
    (
        *_resnet("backbone.0.body.", TORCHVISION),
        ("input_proj", "input_proj"),
        ("backbone.1.row_embed.weight", "position.row_embed"),
        ("backbone.1.col_embed.weight", "position.col_embed"),
        *_attention("transformer.encoder.layers.{}.self_attn", "encoder.{}.self_attn"),
        *_same("transformer.encoder.layers.{}", "encoder.{}", ("norm1", "norm2")),
        *((f"transformer.encoder.layers.{{}}.linear{i}", f"encoder.{{}}.ffn.linear{i}") for i in (1, 2)),
        ("transformer.encoder.norm", "encoder_norm"),
        *_attention("transformer.decoder.layers.{}.self_attn", "decoder.{}.self_attn"),
        *_attention("transformer.decoder.layers.{}.multihead_attn", "decoder.{}.cross_attn"),
        *_same("transformer.decoder.layers.{}", "decoder.{}", ("norm1", "norm2", "norm3")),
        *((f"transformer.decoder.layers.{{}}.linear{i}", f"decoder.{{}}.ffn.linear{i}") for i in (1, 2)),
        ("transformer.decoder.norm", "decoder_norm"),
        ("query_embed.weight", "query_embed"),
        ("class_embed", "class_embed"),
        ("bbox_embed.layers.{}", "bbox_embed.layers.{}"),
    ),
)
_HF_BACKBONES: Rows = (
    *_resnet("model.backbone.conv_encoder.model.", HF_RESNET),
    *_resnet("model.backbone.model.", HF_RESNET),  # transformers 5
    *_resnet("model.backbone.conv_encoder.model.", TORCHVISION),  # timm
    *_resnet("model.backbone.model.", TORCHVISION),
)
_HF_NORMS: Rows = (
    ("model.encoder.layers.{}.self_attn_layer_norm", "encoder.{}.norm1"),
    ("model.encoder.layers.{}.final_layer_norm", "encoder.{}.norm2"),
    ("model.decoder.layers.{}.self_attn_layer_norm", "decoder.{}.norm1"),
    ("model.decoder.layers.{}.encoder_attn_layer_norm", "decoder.{}.norm2"),
    ("model.decoder.layers.{}.final_layer_norm", "decoder.{}.norm3"),
)
_HF_FFN: Rows = tuple(
    (f"model.{part}.layers.{{}}.{mlp}fc{i}", f"{part}.{{}}.ffn.linear{i}")
    for part in ("encoder", "decoder")
    for mlp in ("", "mlp.")  # with "mlp.": transformers 5
    for i in (1, 2)
)


def _hf_attention(theirs: str, ours: str) -> Rows:
    return (
        *_attention(theirs, ours),
        (f"{theirs}.o_proj", f"{ours}.out"),  # transformers 5
    )


HF_DEFORMABLE = KeyMap(
    "transformers DeformableDetrForObjectDetection",
    (
        *_HF_BACKBONES,
        *_HF_NORMS,
        *_HF_FFN,
        ("model.input_proj.{}.0", "input_proj.{}.conv"),
        ("model.input_proj.{}.1", "input_proj.{}.norm"),
        ("model.level_embed", "level_embed"),
        *_deformable("model.encoder.layers.{}.self_attn", "encoder.{}.self_attn"),
        *_hf_attention("model.decoder.layers.{}.self_attn", "decoder.{}.self_attn"),
        *_deformable("model.decoder.layers.{}.encoder_attn", "decoder.{}.cross_attn"),
        ("model.reference_points", "reference_points"),
        ("model.query_position_embeddings.weight", "query_embed"),
        ("model.enc_output", "proposals.output"),
        ("model.enc_output_norm", "proposals.output_norm"),
        ("model.pos_trans", "proposals.position"),
        ("model.pos_trans_norm", "proposals.position_norm"),
        *_HEADS,
        *_below("model.", _HEAD_ALIASES),
    ),
)
HF_DETR = KeyMap(
    "transformers DetrForObjectDetection",
    (
        *_HF_BACKBONES,
        *_HF_NORMS,
        *_HF_FFN,
        ("model.input_projection", "input_proj"),
        *(
            (f"model.{where}.{axis}_embeddings.weight", f"position.{axis[:3]}_embed")
            for where in ("backbone.position_embedding", "position_embedding")
            for axis in ("row", "column")
        ),
        *_hf_attention("model.encoder.layers.{}.self_attn", "encoder.{}.self_attn"),
        *_hf_attention("model.decoder.layers.{}.self_attn", "decoder.{}.self_attn"),
        *_hf_attention("model.decoder.layers.{}.encoder_attn", "decoder.{}.cross_attn"),
        ("model.decoder.layernorm", "decoder_norm"),
        ("model.query_position_embeddings.weight", "query_embed"),
        ("class_labels_classifier", "class_embed"),
        ("bbox_predictor.layers.{}", "bbox_embed.layers.{}"),
    ),
)
_NECK: Rows = (
    ("neck.convs.{}.conv", "input_proj.{}.conv"),
    ("neck.extra_convs.{}.conv", "input_proj.extra.{}.conv"),
)
DETREX_DEFORMABLE = KeyMap(
    "detrex Deformable DETR",
    (
        *_resnet("backbone.", DETECTRON),
        *_NECK,
        ("neck.convs.{}.norm", "input_proj.{}.norm"),
        ("neck.extra_convs.{}.norm", "input_proj.extra.{}.norm"),
        ("transformer.level_embeds", "level_embed"),
        *_deformable("transformer.encoder.layers.{}.attentions.0", "encoder.{}.self_attn"),
        *((f"transformer.encoder.layers.{{}}.norms.{i}", f"encoder.{{}}.norm{i + 1}") for i in range(2)),
        ("transformer.encoder.layers.{}.ffns.0.layers.0.0", "encoder.{}.ffn.linear1"),
        ("transformer.encoder.layers.{}.ffns.0.layers.1", "encoder.{}.ffn.linear2"),
        *_attention("transformer.decoder.layers.{}.attentions.0.attn", "decoder.{}.self_attn"),
        *_deformable("transformer.decoder.layers.{}.attentions.1", "decoder.{}.cross_attn"),
        *((f"transformer.decoder.layers.{{}}.norms.{i}", f"decoder.{{}}.norm{i + 1}") for i in range(3)),
        ("transformer.decoder.layers.{}.ffns.0.layers.0.0", "decoder.{}.ffn.linear1"),
        ("transformer.decoder.layers.{}.ffns.0.layers.1", "decoder.{}.ffn.linear2"),
        ("transformer.reference_points", "reference_points"),
        ("query_embedding.weight", "query_embed"),
        ("transformer.enc_output", "proposals.output"),
        ("transformer.enc_output_norm", "proposals.output_norm"),
        ("transformer.enc_outpout_norm", "proposals.output_norm"),  # as it is spelled there
        ("transformer.pos_trans", "proposals.position"),
        ("transformer.pos_trans_norm", "proposals.position_norm"),
        *_HEADS,
        *_below("transformer.", _HEAD_ALIASES),
    ),
)
DETREX_DINO = KeyMap(
    "detrex DINO",
    (
        *(row for row in DETREX_DEFORMABLE.rows if not row[1].startswith(("query_embed", "reference", "proposals"))),
        ("transformer.decoder.norm", "decoder_norm"),
        ("transformer.decoder.ref_point_head.layers.{}", "query_position.layers.{}"),
        ("transformer.tgt_embed.weight", "query_embed"),
        ("transformer.enc_output", "proposals.output"),
        ("transformer.enc_output_norm", "proposals.output_norm"),
        ("label_enc.weight", "label_embed"),
    ),
)
MMDET_DEFORMABLE = KeyMap(
    "mmdetection 3 Deformable DETR",
    (
        *_resnet("backbone.", TORCHVISION),
        *_NECK,
        ("neck.convs.{}.gn", "input_proj.{}.norm"),
        ("neck.extra_convs.{}.gn", "input_proj.extra.{}.norm"),
        ("level_embed", "level_embed"),
        *_deformable("encoder.layers.{}.self_attn", "encoder.{}.self_attn"),
        *((f"encoder.layers.{{}}.norms.{i}", f"encoder.{{}}.norm{i + 1}") for i in range(2)),
        ("encoder.layers.{}.ffn.layers.0.0", "encoder.{}.ffn.linear1"),
        ("encoder.layers.{}.ffn.layers.1", "encoder.{}.ffn.linear2"),
        *_attention("decoder.layers.{}.self_attn.attn", "decoder.{}.self_attn"),
        *_deformable("decoder.layers.{}.cross_attn", "decoder.{}.cross_attn"),
        *((f"decoder.layers.{{}}.norms.{i}", f"decoder.{{}}.norm{i + 1}") for i in range(3)),
        ("decoder.layers.{}.ffn.layers.0.0", "decoder.{}.ffn.linear1"),
        ("decoder.layers.{}.ffn.layers.1", "decoder.{}.ffn.linear2"),
        ("reference_points_fc", "reference_points"),
        ("query_embedding.weight", "query_embed"),
        ("memory_trans_fc", "proposals.output"),
        ("memory_trans_norm", "proposals.output_norm"),
        ("pos_trans_fc", "proposals.position"),
        ("pos_trans_norm", "proposals.position_norm"),
        ("bbox_head.cls_branches.{}", "class_embed.{}"),
        *((f"bbox_head.reg_branches.{{}}.{2 * i}", f"bbox_embed.{{}}.layers.{i}") for i in range(3)),
    ),
)
_V2 = "bbox_head.transformer."
MMDET2_DEFORMABLE = KeyMap(
    "mmdetection 2 Deformable DETR",
    (
        *(row for row in MMDET_DEFORMABLE.rows if row[0].startswith(("backbone.", "neck.", "bbox_head."))),
        *(
            (f"bbox_head.{theirs}", ours)
            for theirs, ours in DETREX_DEFORMABLE.rows
            if theirs.startswith(("transformer.", "query_embedding"))
        ),
    ),
)
KEY_MAPS = (
    OFFICIAL_DEFORMABLE,
    OFFICIAL_DINO,
    OFFICIAL_DETR,
    HF_DEFORMABLE,
    HF_DETR,
    DETREX_DEFORMABLE,
    DETREX_DINO,
    MMDET_DEFORMABLE,
    MMDET2_DEFORMABLE,
)


def compile_rows(rows: Iterable[tuple[str, str]]) -> list[tuple[re.Pattern, str]]:
    """Rows for `renamed`, which goes from left to right."""
    leaf = r"(\.(?:weight|bias|running_mean|running_var))?"
    return [(re.compile(re.escape(a).replace(r"\{\}", r"(\d+)") + leaf), b) for a, b in rows]


def rename(name: str, rows: list[tuple[re.Pattern, str]]) -> list[str]:
    """All translations of a name."""
    matches = ((pattern.fullmatch(name), template) for pattern, template in rows)
    return [template.format(*m.groups()) + (m.groups()[-1] or "") for m, template in matches if m]
