"""Checkpoints of detrex and mmdetection whose names are spelled out here, not written by the tables that read them.

Two-stage Deformable DETR, one layer each. Sources: detrex `projects/deformable_detr/modeling/` and `detrex/layers/`,
with detectron2's ResNet; mmdetection `mmdet/models/detectors/deformable_detr.py` and `layers/transformer/` (version 3),
`dense_heads/deformable_detr_head.py` and `utils/transformer.py` (version 2), with mmcv's transformer blocks.
"""

import zlib

import numpy as np
import pytest
from safetensors.numpy import save_file

from detr_jax.checkpoints import convert

C, FFN, HEADS, LEVELS, POINTS, CLASSES = 32, 48, 4, 4, 4, 5
SAMPLES = HEADS * LEVELS * POINTS
NORM = {"weight": (), "bias": (), "running_mean": (), "running_var": ()}
DEFORMABLE = {
    "sampling_offsets": (2 * SAMPLES, C),
    "attention_weights": (SAMPLES, C),
    "value_proj": (C, C),
    "output_proj": (C, C),
}


def layers(shapes: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Names of layers, with the shapes of their weights -> names and shapes of weights and biases."""
    result = {}
    for name, shape in shapes.items():
        result |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    return result


def norms(names: dict[str, int]) -> dict[str, tuple[int, ...]]:
    return {f"{name}.{part}": (width,) for name, width in names.items() for part in NORM}


def resnet18_of_torchvision() -> dict[str, tuple[int, ...]]:
    found = {"backbone.conv1.weight": (64, 3, 7, 7)} | norms({"backbone.bn1": 64})
    n_in = 64
    for layer, width in enumerate((64, 128, 256, 512), 1):
        for block in range(2):
            name = f"backbone.layer{layer}.{block}"
            found |= {f"{name}.conv1.weight": (width, n_in, 3, 3), f"{name}.conv2.weight": (width, width, 3, 3)}
            found |= norms({f"{name}.bn1": width, f"{name}.bn2": width})
            if n_in != width:
                found |= {f"{name}.downsample.0.weight": (width, n_in, 1, 1)} | norms({f"{name}.downsample.1": width})
            n_in = width
    return found


def resnet18_of_detectron2() -> dict[str, tuple[int, ...]]:
    found = {"backbone.stem.conv1.weight": (64, 3, 7, 7)} | norms({"backbone.stem.conv1.norm": 64})
    n_in = 64
    for stage, width in enumerate((64, 128, 256, 512), 2):
        for block in range(2):
            name = f"backbone.res{stage}.{block}"
            found |= {f"{name}.conv1.weight": (width, n_in, 3, 3), f"{name}.conv2.weight": (width, width, 3, 3)}
            found |= norms({f"{name}.conv1.norm": width, f"{name}.conv2.norm": width})
            if n_in != width:
                found |= {f"{name}.shortcut.weight": (width, n_in, 1, 1)} | norms({f"{name}.shortcut.norm": width})
            n_in = width
    return found


def neck(norm: str, *, bias: bool) -> dict[str, tuple[int, ...]]:
    """C3 to C5 by 1x1 convolutions, and a level more from C5."""
    convs = {f"neck.convs.{i}": (C, width, 1, 1) for i, width in enumerate((128, 256, 512))}
    convs["neck.extra_convs.0"] = (C, 512, 3, 3)
    found = {f"{name}.conv.weight": shape for name, shape in convs.items()}
    found |= {f"{name}.conv.bias": (C,) for name in convs if bias}
    return found | {f"{name}.{norm}.{part}": (C,) for name in convs for part in ("weight", "bias")}


def old_transformer(prefix: str) -> dict[str, tuple[int, ...]]:
    """mmcv's blocks, which detrex and mmdetection 2 have: `attentions`, `ffns`, `norms`."""
    encoder, decoder = f"{prefix}encoder.layers.0", f"{prefix}decoder.layers.0"
    return {
        f"{prefix}level_embeds": (LEVELS, C),
        f"{decoder}.attentions.0.attn.in_proj_weight": (3 * C, C),
        f"{decoder}.attentions.0.attn.in_proj_bias": (3 * C,),
    } | layers(
        {f"{encoder}.attentions.0.{name}": shape for name, shape in DEFORMABLE.items()}
        | {f"{decoder}.attentions.1.{name}": shape for name, shape in DEFORMABLE.items()}
        | {f"{decoder}.attentions.0.attn.out_proj": (C, C)}
        | {f"{part}.ffns.0.layers.0.0": (FFN, C) for part in (encoder, decoder)}
        | {f"{part}.ffns.0.layers.1": (C, FFN) for part in (encoder, decoder)}
        | {f"{encoder}.norms.{i}": (C,) for i in range(2)}
        | {f"{decoder}.norms.{i}": (C,) for i in range(3)}
        | {f"{prefix}enc_output": (C, C), f"{prefix}enc_output_norm": (C,)}
        | {f"{prefix}pos_trans": (2 * C, 2 * C), f"{prefix}pos_trans_norm": (2 * C,)}
    )


def new_transformer() -> dict[str, tuple[int, ...]]:
    """mmdetection 3: `self_attn`, `cross_attn`, `ffn`, `norms`."""
    encoder, decoder = "encoder.layers.0", "decoder.layers.0"
    return {
        "level_embed": (LEVELS, C),
        f"{decoder}.self_attn.attn.in_proj_weight": (3 * C, C),
        f"{decoder}.self_attn.attn.in_proj_bias": (3 * C,),
    } | layers(
        {f"{encoder}.self_attn.{name}": shape for name, shape in DEFORMABLE.items()}
        | {f"{decoder}.cross_attn.{name}": shape for name, shape in DEFORMABLE.items()}
        | {f"{decoder}.self_attn.attn.out_proj": (C, C)}
        | {f"{part}.ffn.layers.0.0": (FFN, C) for part in (encoder, decoder)}
        | {f"{part}.ffn.layers.1": (C, FFN) for part in (encoder, decoder)}
        | {f"{encoder}.norms.{i}": (C,) for i in range(2)}
        | {f"{decoder}.norms.{i}": (C,) for i in range(3)}
        | {"memory_trans_fc": (C, C), "memory_trans_norm": (C,)}
        | {"pos_trans_fc": (2 * C, 2 * C), "pos_trans_norm": (2 * C,)}
    )


# Two heads: of the decoder's layer, and of the proposals.
DETREX_HEADS = layers(
    {f"{where}class_embed.{i}": (CLASSES, C) for where in ("", "transformer.decoder.") for i in range(2)}
    | {
        f"{where}bbox_embed.{i}.layers.{j}": (4 if j == 2 else C, C)
        for where in ("", "transformer.decoder.")
        for i in range(2)
        for j in range(3)
    }
)
MMDET_HEADS = layers(
    {f"bbox_head.cls_branches.{i}": (CLASSES, C) for i in range(2)}
    | {f"bbox_head.reg_branches.{i}.{j}": (4 if j == 4 else C, C) for i in range(2) for j in (0, 2, 4)}
)

# Where a tensor of theirs must land: our path -> their name, without what all three share.
OLD = {
    "encoder.0.self_attn.sampling_offsets": "encoder.layers.0.attentions.0.sampling_offsets",
    "encoder.0.norm1": "encoder.layers.0.norms.0",
    "encoder.0.norm2": "encoder.layers.0.norms.1",
    "encoder.0.ffn.linear1": "encoder.layers.0.ffns.0.layers.0.0",
    "decoder.0.self_attn.out": "decoder.layers.0.attentions.0.attn.out_proj",
    "decoder.0.cross_attn.attention_weights": "decoder.layers.0.attentions.1.attention_weights",
    "decoder.0.norm1": "decoder.layers.0.norms.0",
    "decoder.0.norm2": "decoder.layers.0.norms.1",
    "decoder.0.norm3": "decoder.layers.0.norms.2",
    "decoder.0.ffn.linear2": "decoder.layers.0.ffns.0.layers.1",
    "proposals.output": "enc_output",
    "proposals.position_norm": "pos_trans_norm",
}
NEW = {
    "encoder.0.self_attn.sampling_offsets": "encoder.layers.0.self_attn.sampling_offsets",
    "encoder.0.norm1": "encoder.layers.0.norms.0",
    "encoder.0.norm2": "encoder.layers.0.norms.1",
    "encoder.0.ffn.linear1": "encoder.layers.0.ffn.layers.0.0",
    "decoder.0.self_attn.out": "decoder.layers.0.self_attn.attn.out_proj",
    "decoder.0.cross_attn.attention_weights": "decoder.layers.0.cross_attn.attention_weights",
    "decoder.0.norm1": "decoder.layers.0.norms.0",
    "decoder.0.norm2": "decoder.layers.0.norms.1",
    "decoder.0.norm3": "decoder.layers.0.norms.2",
    "decoder.0.ffn.linear2": "decoder.layers.0.ffn.layers.1",
    "proposals.output": "memory_trans_fc",
    "proposals.position_norm": "pos_trans_norm",
}
MMDET_SHARED = {
    "input_proj.0.norm": "neck.convs.0.gn",
    "input_proj.3.norm": "neck.extra_convs.0.gn",
    "class_embed.1": "bbox_head.cls_branches.1",
    "bbox_embed.0.layers.1": "bbox_head.reg_branches.0.2",
    "bbox_embed.1.layers.2": "bbox_head.reg_branches.1.4",
}
DETREX_SHARED = {
    "input_proj.0.conv": "neck.convs.0.conv",
    "input_proj.3.norm": "neck.extra_convs.0.norm",
    "class_embed.1": "class_embed.1",
    "bbox_embed.0.layers.1": "bbox_embed.0.layers.1",
    "bbox_embed.1.layers.2": "bbox_embed.1.layers.2",
}
V2 = "bbox_head.transformer."
CHECKPOINTS = {
    "detrex": (
        resnet18_of_detectron2() | neck("norm", bias=True) | old_transformer("transformer.") | DETREX_HEADS,
        {ours: f"transformer.{theirs}" for ours, theirs in OLD.items()} | DETREX_SHARED,
        "backbone.res3.1.conv2.weight",
        "transformer.decoder.layers.0.attentions.0.attn.in_proj_weight",
    ),
    "mmdetection 3": (
        resnet18_of_torchvision() | neck("gn", bias=False) | new_transformer() | MMDET_HEADS,
        NEW | MMDET_SHARED,
        "backbone.layer2.1.conv2.weight",
        "decoder.layers.0.self_attn.attn.in_proj_weight",
    ),
    "mmdetection 2": (
        resnet18_of_torchvision() | neck("gn", bias=False) | old_transformer(V2) | MMDET_HEADS,
        {ours: f"{V2}{theirs}" for ours, theirs in OLD.items()} | MMDET_SHARED,
        "backbone.layer2.1.conv2.weight",
        f"{V2}decoder.layers.0.attentions.0.attn.in_proj_weight",
    ),
}


def follow(model, path: str):
    """`encoder.0.norm1` of a model."""
    for part in path.split("."):
        model = model[int(part)] if part.isdigit() else getattr(model, part)
    return model


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_every_tensor_finds_the_place_that_its_name_says(name, tmp_path):
    shapes, places, convolution, packed = CHECKPOINTS[name]
    tensors = {}
    for key, shape in shapes.items():
        # The copies of the heads below `transformer.decoder.` are the same tensors in detrex.
        seed = zlib.crc32(key.removeprefix("transformer.decoder.").encode())
        tensors[key] = np.random.default_rng(seed).standard_normal(shape, np.float32)
    save_file(tensors, tmp_path / "model.safetensors")
    found = convert.load(tmp_path / "model.safetensors", num_heads=HEADS)
    assert name in found.report
    model, config = found.model, found.config
    assert (config.num_levels, config.encoder_layers, config.decoder_layers, config.num_classes) == (4, 1, 1, CLASSES)
    assert config.box_refinement and config.two_stage and config.backbone.depth == 18
    for ours, theirs in places.items():
        layer, weight = follow(model, ours), tensors[f"{theirs}.weight"]
        if weight.ndim == 1:
            np.testing.assert_array_equal(layer.scale[...], weight, err_msg=ours)
        elif weight.ndim == 2:
            np.testing.assert_array_equal(layer.kernel[...], weight.T, err_msg=ours)
        else:
            np.testing.assert_array_equal(layer.kernel[...], weight.transpose(2, 3, 1, 0), err_msg=ours)
        np.testing.assert_array_equal(layer.bias[...], tensors[f"{theirs}.bias"], err_msg=ours)
    conv = follow(model, "backbone.stages.1.1.convs.1")
    np.testing.assert_array_equal(conv.kernel[...], tensors[convolution].transpose(2, 3, 1, 0))
    attention = model.decoder[0].self_attn
    for i, layer in enumerate((attention.query, attention.key, attention.value)):
        np.testing.assert_array_equal(layer.kernel[...], tensors[packed][C * i : C * (i + 1)].T)
