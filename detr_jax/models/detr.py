"""DETR (Carion et al., ECCV 2020): a transformer over the last feature map, learned object queries."""

import jax
import jax.numpy as jnp
from flax import nnx

from detr_jax.config import DETRConfig
from detr_jax.models.attention import MultiHeadAttention
from detr_jax.models.feed_forward import FeedForward
from detr_jax.models.layers import MLP, Dropout, capture, layer_norm, linear, recompute
from detr_jax.models.padding import valid_cells, valid_nearest
from detr_jax.models.position import LearnedMap, map_angles, sine_2d
from detr_jax.models.resnet import ResNet


class EncoderLayer(nnx.Module):
    """Self-attention and feed-forward over the tokens."""

    def __init__(self, config: DETRConfig, *, rngs: nnx.Rngs):
        c, dtype = config.hidden_dim, config.dtype
        self.pre_norm = config.pre_norm
        self.self_attn = MultiHeadAttention(c, config.num_heads, config.dropout, dtype=dtype, rngs=rngs)
        self.ffn = FeedForward(c, config.ffn_dim, config.dropout, dtype=dtype, rngs=rngs)
        self.norm1, self.norm2 = (layer_norm(c, dtype=dtype, rngs=rngs) for _ in range(2))
        self.dropout = Dropout(config.dropout)

    @jax.named_scope("encoder_layer")
    def __call__(self, x, position, valid, rngs):
        y = self.norm1(x) if self.pre_norm else x
        key = y + position
        x += self.dropout(self.self_attn(key, key, y, key_valid=valid, rngs=rngs), rngs)
        x = x if self.pre_norm else self.norm1(x)
        x += self.dropout(self.ffn(self.norm2(x) if self.pre_norm else x, rngs), rngs)
        return x if self.pre_norm else self.norm2(x)


class DecoderLayer(nnx.Module):
    """Self-attention among the queries, attention to the tokens, feed-forward."""

    def __init__(self, config: DETRConfig, *, rngs: nnx.Rngs):
        c, dtype = config.hidden_dim, config.dtype
        self.pre_norm = config.pre_norm
        self.self_attn = MultiHeadAttention(c, config.num_heads, config.dropout, dtype=dtype, rngs=rngs)
        self.cross_attn = MultiHeadAttention(c, config.num_heads, config.dropout, dtype=dtype, rngs=rngs)
        self.ffn = FeedForward(c, config.ffn_dim, config.dropout, dtype=dtype, rngs=rngs)
        self.norm1, self.norm2, self.norm3 = (layer_norm(c, dtype=dtype, rngs=rngs) for _ in range(3))
        self.dropout = Dropout(config.dropout)

    @jax.named_scope("decoder_layer")
    def __call__(self, x, query_position, memory, position, valid, rngs):
        y = self.norm1(x) if self.pre_norm else x
        query = y + query_position
        x += self.dropout(self.self_attn(query, query, y, rngs=rngs), rngs)
        x = x if self.pre_norm else self.norm1(x)
        query = (self.norm2(x) if self.pre_norm else x) + query_position
        x += self.dropout(self.cross_attn(query, memory + position, memory, key_valid=valid, rngs=rngs), rngs)
        x = x if self.pre_norm else self.norm2(x)
        x += self.dropout(self.ffn(self.norm3(x) if self.pre_norm else x, rngs), rngs)
        return x if self.pre_norm else self.norm3(x)


class DETR(nnx.Module):
    """End-to-end detection with transformers.

    With `backbone.mask_padding` off (the published model), the convolutions' zero padding meets the image's edge at a
    place that depends on the bucket, and frozen BatchNorm writes its shift into the padding: the boxes of an image
    move with the bucket it is padded to, and with random weights by up to 0.12 of the image's size (logits by 1.0) for
    an image of 90 x 118 pixels and by 0.01 (0.25) for one of 400 x 500. With it on, boxes and logits do not depend on
    bucket and batch but for float32 noise. `tests/test_padding.py` holds both.
    """

    def __init__(self, config: DETRConfig, *, rngs: nnx.Rngs):
        c, dtype = config.hidden_dim, config.dtype
        self.config = config
        self.backbone = ResNet(config.backbone, remat=config.remat == "all", dtype=dtype, rngs=rngs)
        self.input_proj = linear(self.backbone.channels[-1], c, dtype=dtype, rngs=rngs)
        self.position = LearnedMap(c, rngs=rngs) if config.position == "learned" else None
        self.encoder = nnx.List(EncoderLayer(config, rngs=rngs) for _ in range(config.encoder_layers))
        self.encoder_norm = layer_norm(c, dtype=dtype, rngs=rngs) if config.pre_norm else None
        self.decoder = nnx.List(DecoderLayer(config, rngs=rngs) for _ in range(config.decoder_layers))
        self.decoder_norm = layer_norm(c, dtype=dtype, rngs=rngs)
        self.query_embed = nnx.Param(jax.random.normal(rngs.params(), (config.num_queries, c)))
        self.class_embed = linear(c, config.num_classes + 1, rngs=rngs)
        self.bbox_embed = MLP(c, c, 4, 3, rngs=rngs)

    def __call__(self, images: jax.Array, sizes: jax.Array, rngs: nnx.Rngs | None = None) -> dict:
        """Detect.

        Args:
            images: `[b, H, W, 3]`, normalized with the ImageNet mean and standard deviation, zero in the padding.
            sizes: int `[b, 2]`, valid (height, width) of each image.
            rngs: random numbers for dropout; `None` switches it off.

        Returns:
            `pred_logits [b, q, k + 1]` (the last is the no-object class), `pred_boxes [b, q, 4]` (cx, cy, w, h in
            0-1 of the valid image) and `aux_outputs`, the same of the earlier decoder layers, stacked in front.
        """
        memory, position, valid = self.encode(images, sizes, rngs)
        capture(self, "valid_maps", (valid,))
        b, valid = len(images), valid.reshape(len(images), -1)
        query_position = jnp.broadcast_to(self.query_embed[...], (b, *self.query_embed.shape)).astype(memory.dtype)
        x = jnp.zeros_like(query_position)
        hidden = []
        for layer in self.decoder:
            arguments = (x, query_position, memory, position, valid, rngs)
            x = recompute(self.config.remat != "none", layer, *arguments)
            hidden.append(self.decoder_norm(x))
        with jax.named_scope("heads"):
            hidden = jnp.stack(hidden).astype(jnp.float32)
            logits, boxes = self.class_embed(hidden), jax.nn.sigmoid(self.bbox_embed(hidden))
        return {
            "pred_logits": logits[-1],
            "pred_boxes": boxes[-1],
            "aux_outputs": {"pred_logits": logits[:-1], "pred_boxes": boxes[:-1]},
        }

    @jax.named_scope("encoder")
    def encode(
        self, images: jax.Array, sizes: jax.Array, rngs: nnx.Rngs | None
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """The encoder's tokens and their position encoding, both `[b, h * w, c]`, and the valid map `[b, h, w]`."""
        features = self.backbone(images, sizes)[-1]
        b, h, w, _ = features.shape
        if self.config.backbone.mask_padding:
            valid = valid_cells(sizes, (h, w), 16 if self.config.backbone.dilation else 32)
        else:
            valid = valid_nearest(sizes, images.shape[1:3], (h, w))
        if self.position:
            position = self.position(valid)
        else:
            position = sine_2d(map_angles(valid, half_pixel=False), self.config.hidden_dim)
        position = position.reshape(b, h * w, -1).astype(features.dtype)

        memory = self.input_proj(features).reshape(b, h * w, -1)
        for layer in self.encoder:
            arguments = (memory, position, valid.reshape(b, h * w), rngs)
            memory = recompute(self.config.remat != "none", layer, *arguments)
        if self.encoder_norm:
            memory = self.encoder_norm(memory)
        return memory, position, valid
