"""HF `transformers`' names of the weights of DETR and Deformable DETR (native ResNet backbone), and random weights."""

import functools
import re
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from flax import nnx

from detr_jax import models
from detr_jax.config import DeformableDETRConfig, DETRConfig

# Their name becomes our path by these substitutions, in this order.
NAMES = [
    (r"^model\.", r""),
    # backbone
    (r"^backbone\.model\.embedder\.embedder\.convolution", r"backbone.stem_conv"),
    (r"^backbone\.model\.embedder\.embedder\.normalization", r"backbone.stem_norm"),
    (r"^backbone\.model\.encoder\.stages\.(\d)\.layers\.(\d+)", r"backbone.stages.\1.\2"),
    (r"\.shortcut\.convolution", r".downsample_conv"),
    (r"\.shortcut\.normalization", r".downsample_norm"),
    (r"\.layer\.(\d)\.convolution", r".convs.\1"),
    (r"\.layer\.(\d)\.normalization", r".norms.\1"),
    (r"\.running_(mean|var)$", r".\1"),
    # between backbone and transformer
    (r"^input_projection\.", r"input_proj."),
    (r"^input_proj\.(\d)\.0\.", r"input_proj.\1.conv."),
    (r"^input_proj\.(\d)\.1\.", r"input_proj.\1.norm."),
    (r"^position_embedding\.row_embeddings\.weight", r"position.row_embed"),
    (r"^position_embedding\.column_embeddings\.weight", r"position.col_embed"),
    (r"^query_position_embeddings\.weight", r"query_embed"),
    # transformer
    (r"^(encoder|decoder)\.layers\.", r"\1."),
    (r"\.encoder_attn\.", r".cross_attn."),
    (r"_attn\.q_proj\.", r"_attn.query."),
    (r"_attn\.k_proj\.", r"_attn.key."),
    (r"_attn\.v_proj\.", r"_attn.value."),
    (r"_attn\.o_proj\.", r"_attn.out."),
    (r"\.mlp\.fc(\d)\.", r".ffn.linear\1."),
    (r"\.self_attn_layer_norm\.", r".norm1."),
    (r"^(encoder\.\d+)\.final_layer_norm\.", r"\1.norm2."),
    (r"^(decoder\.\d+)\.encoder_attn_layer_norm\.", r"\1.norm2."),
    (r"^(decoder\.\d+)\.final_layer_norm\.", r"\1.norm3."),
    (r"^decoder\.layernorm\.", r"decoder_norm."),
    # two-stage
    (r"^enc_output(_norm)?\.", r"proposals.output\1."),
    (r"^pos_trans(_norm)?\.", r"proposals.position\1."),
    # heads
    (r"^class_labels_classifier\.", r"class_embed."),
    (r"^bbox_predictor\.", r"bbox_embed."),
    (r"^decoder\.(class|bbox)_embed\.", r"\1_embed."),
    # weights of layers: `weight` is the scale of a norm (but in frozen BatchNorm), the kernel of the others
    (r"^(?!backbone)(.*norm\d?)\.weight$", r"\1.scale"),
    (r"^(?!backbone.*norm)(.*)\.weight$", r"\1.kernel"),
]


def our_path(name: str, config: DETRConfig | DeformableDETRConfig) -> str:
    """The path (joined by dots) of their tensor in our model."""
    for pattern, replacement in NAMES:
        name = re.sub(pattern, replacement, name)
    if isinstance(config, DeformableDETRConfig) and not config.box_refinement:
        # One head for all layers; theirs shares it under as many names.
        name = re.sub(r"^(class|bbox)_embed\.\d+\.", r"\1_embed.0.", name)
    return name


def their_layout(path: str, array: np.ndarray, conv: bool) -> np.ndarray:
    """Our tensor as PyTorch holds it: `[out, in]` and `[out, in, y, x]` kernels. `conv`: theirs is a convolution."""
    if not path.endswith(".kernel"):
        return array
    if array.ndim == 2:
        return array.T[:, :, None, None] if conv else array.T
    return array.transpose(3, 2, 0, 1)


def random_weights(config: DETRConfig | DeformableDETRConfig) -> dict[str, np.ndarray]:
    """A value for each tensor of our model, drawn by a generator that its path seeds; activations stay of order 1."""
    abstract = nnx.state(nnx.eval_shape(lambda: models.build(config, rngs=nnx.Rngs(0))))
    shapes = {".".join(map(str, path)): leaf.shape for path, leaf in nnx.to_flat_state(abstract)}
    return {path: _random(path, shape) for path, shape in shapes.items()}


@functools.cache
def _random(path: str, shape: tuple[int, ...]) -> np.ndarray:
    rng = np.random.default_rng(zlib.crc32(path.encode()))
    kind = path.rsplit(".", 1)[-1]
    if kind == "kernel":
        gain = 2 if "backbone" in path or "ffn" in path else 1
        x = rng.standard_normal(shape) * np.sqrt(gain / np.prod(shape[:-1]))
    elif kind in ("scale", "weight", "var"):
        # A residual branch adds little, or the sum over all blocks would grow.
        last = re.search(r"norms\.2\.(scale|weight)", path)
        x = rng.uniform(0.1, 0.3, shape) if last else rng.uniform(0.5, 1.5, shape)
    elif kind == "bias" and "sampling_offsets" in path:
        x = 2 * rng.standard_normal(shape)  # pixels: far enough to leave the map
    elif kind in ("bias", "mean"):
        x = 0.1 * rng.standard_normal(shape)
    else:  # embeddings
        x = rng.standard_normal(shape)
    return x.astype(np.float32)


def load(config: DETRConfig | DeformableDETRConfig, weights: Mapping[str, np.ndarray]) -> Any:
    """Our model with these weights."""
    model = nnx.eval_shape(lambda: models.build(config, rngs=nnx.Rngs(0)))
    graphdef, state = nnx.split(model)
    flat = [(path, leaf.replace(weights[".".join(map(str, path))])) for path, leaf in nnx.to_flat_state(state)]
    return nnx.merge(graphdef, nnx.from_flat_state(flat))
