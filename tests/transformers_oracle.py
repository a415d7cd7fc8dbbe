"""HF `transformers` as the oracle of the forward pass: the same architecture, weights and outputs as a model of ours.

Where it differs from the official PyTorch code, it is put right here.
"""

import copy
import functools
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import transformers

from detr_jax.checkpoints import convert, key_maps
from detr_jax.config import BackboneConfig, DeformableDETRConfig, DETRConfig
from detr_jax.models.resnet import BLOCKS


def build(config: DETRConfig | DeformableDETRConfig) -> torch.nn.Module:
    """Their model of our configuration."""
    common = {
        "use_timm_backbone": False,
        "use_pretrained_backbone": False,
        "backbone": None,
        "num_labels": config.num_classes,
        "num_queries": config.num_queries,
        "d_model": config.hidden_dim,
        "encoder_layers": config.encoder_layers,
        "decoder_layers": config.decoder_layers,
        "encoder_ffn_dim": config.ffn_dim,
        "decoder_ffn_dim": config.ffn_dim,
        "encoder_attention_heads": config.num_heads,
        "decoder_attention_heads": config.num_heads,
        "dropout": config.dropout,
    }
    if isinstance(config, DETRConfig):
        stages = ["stage4"]
        model = transformers.DetrForObjectDetection(
            transformers.DetrConfig(
                **common, backbone_config=_resnet(config.backbone, stages), position_embedding_type=config.position
            )
        )
    else:
        stages = ["stage4"] if config.num_levels == 1 else ["stage2", "stage3", "stage4"]
        model = transformers.DeformableDetrForObjectDetection(
            transformers.DeformableDetrConfig(
                **common,
                backbone_config=_resnet(config.backbone, stages),
                num_feature_levels=config.num_levels,
                encoder_n_points=config.encoder_points,
                decoder_n_points=config.decoder_points,
                with_box_refine=config.box_refinement,
                two_stage=config.two_stage,
                two_stage_num_proposals=config.num_queries,
            )
        )
        if config.box_refinement and not config.two_stage:
            # transformers ties the class heads of all layers here; the official code clones them.
            model.class_embed = torch.nn.ModuleList(copy.deepcopy(head) for head in model.class_embed)
    if config.backbone.dilation:
        # As torchvision's `replace_stride_with_dilation`: no stride, and dilation from the second block on.
        for i, block in enumerate(model.model.backbone.model.encoder.stages[3].layers):
            if i == 0:
                block.shortcut.convolution.stride = (1, 1)
                block.layer[1].convolution.stride = (1, 1)
            else:
                block.layer[1].convolution.dilation = block.layer[1].convolution.padding = (2, 2)
    return model.eval()


def _resnet(config: BackboneConfig, stages: list[str]) -> transformers.ResNetConfig:
    bottleneck = config.depth >= 50
    return transformers.ResNetConfig(
        hidden_sizes=[(256 if bottleneck else 64) * 2**i for i in range(4)],
        depths=list(BLOCKS[config.depth]),
        layer_type="bottleneck" if bottleneck else "basic",
        out_features=stages,
    )


def load(model: torch.nn.Module, config: DETRConfig | DeformableDETRConfig, weights: Mapping[str, np.ndarray]) -> None:
    """Give their model our weights; every tensor of theirs must have one, and every one of ours must be used."""
    paths = {convert.canonical(path.split(".")): path for path in weights}
    unused = set(weights)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            ours = our_name(name, config)
            path = paths[ours]
            array = convert.to_theirs(weights[path], ours, path.endswith(".kernel"))
            assert tensor.shape == array.shape, f"{name} {tuple(tensor.shape)}, our {path} {array.shape}"
            tensor.copy_(torch.from_numpy(array.copy()))
            unused.discard(path)
    assert not unused, f"transformers has no {sorted(unused)}"


@functools.cache
def our_name(name: str, config: DETRConfig | DeformableDETRConfig) -> str:
    """Our name of a tensor of theirs, with PyTorch's leaf."""
    table = _TABLES[type(config)]
    ours = key_maps.rename(name, table)[0]
    if isinstance(config, DeformableDETRConfig) and not config.box_refinement:
        # One head for all layers; theirs shares it under as many names.
        ours = re.sub(r"^(class|bbox)_embed\.\d+\.", r"\1_embed.0.", ours)
    return ours


_TABLES = {
    DETRConfig: key_maps.compile_rows(key_maps.HF_DETR.rows),
    DeformableDETRConfig: key_maps.compile_rows(key_maps.HF_DEFORMABLE.rows),
}


def run(model: torch.nn.Module, images: np.ndarray, sizes: np.ndarray) -> dict[str, Any]:
    """Our model's outputs: `images [b, H, W, 3]`, `sizes [b, 2]`; all decoder layers stacked, last included."""
    with torch.no_grad():
        return {name: x.numpy() for name, x in outputs(model, images, sizes).items()}


def outputs(model: torch.nn.Module, images: np.ndarray, sizes: np.ndarray) -> dict[str, torch.Tensor]:
    """As `run`, for PyTorch to differentiate."""
    h, w = images.shape[1:3]
    pixels = torch.from_numpy(images.transpose(0, 3, 1, 2).copy())
    valid = (np.arange(h) < sizes[:, :1])[:, :, None] & (np.arange(w) < sizes[:, 1:])[:, None]
    outputs = model(pixels, torch.from_numpy(valid), output_hidden_states=True)
    result = {}
    if isinstance(model, transformers.DetrForObjectDetection):
        # Not `auxiliary_loss=True`: it feeds each layer the normalized output of the one before, the official
        # code normalizes only what the heads see. The last state comes normalized.
        hidden = model.model.decoder.layernorm(torch.stack(outputs.decoder_hidden_states[1:-1]))
        hidden = torch.cat([hidden, outputs.last_hidden_state[None]])
        logits, boxes = model.class_labels_classifier(hidden), model.bbox_predictor(hidden).sigmoid()
    else:
        references = [outputs.init_reference_points, *outputs.intermediate_reference_points.unbind(1)[:-1]]
        logits, boxes = [], []
        for i, (x, reference) in enumerate(zip(outputs.intermediate_hidden_states.unbind(1), references, strict=True)):
            offset = torch.nn.functional.pad(_inverse_sigmoid(reference), (0, 4 - reference.shape[-1]))
            logits.append(model.class_embed[i](x))
            boxes.append((model.bbox_embed[i](x) + offset).sigmoid())
        logits, boxes = torch.stack(logits), torch.stack(boxes)
        if outputs.enc_outputs_class is not None:
            result["enc_logits"] = outputs.enc_outputs_class
            result["enc_boxes"] = outputs.enc_outputs_coord_logits.sigmoid()
    torch.testing.assert_close(logits[-1], outputs.logits)
    torch.testing.assert_close(boxes[-1], outputs.pred_boxes)
    return result | {"logits": logits, "boxes": boxes}


def _inverse_sigmoid(x):
    x = x.clamp(0, 1)
    return torch.log(x.clamp(min=1e-5) / (1 - x).clamp(min=1e-5))
