"""Deformable DETR (Zhu et al., ICLR 2021): every variant of the paper."""

import dataclasses
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from detr_jax.config import DeformableDETRConfig
from detr_jax.errors import UserError
from detr_jax.models.attention import MultiHeadAttention, Tokens, deformable_attention, token_order
from detr_jax.models.encoder_layer import EncoderLayer
from detr_jax.models.feed_forward import FeedForward
from detr_jax.models.layers import (
    MLP,
    Conv,
    Dropout,
    GroupNorm,
    capture,
    inverse_sigmoid,
    layer_norm,
    linear,
    recompute,
)
from detr_jax.models.padding import valid_cells, valid_nearest, zero_padding
from detr_jax.models.position import map_angles, sine_2d, sine_boxes
from detr_jax.models.query_order import arrange, nearby_first, restore
from detr_jax.models.resnet import ResNet


class DecoderLayer(nnx.Module):
    """Self-attention among the queries, deformable attention to the tokens, feed-forward."""

    def __init__(self, config: DeformableDETRConfig, *, rngs: nnx.Rngs):
        c, dtype = config.hidden_dim, config.dtype
        self.self_attn = MultiHeadAttention(c, config.num_heads, config.dropout, dtype=dtype, rngs=rngs)
        self.cross_attn = deformable_attention(config, config.decoder_points, rngs=rngs)
        self.ffn = FeedForward(c, config.ffn_dim, config.dropout, dtype=dtype, rngs=rngs)
        self.norm1, self.norm2, self.norm3 = (layer_norm(c, dtype=dtype, rngs=rngs) for _ in range(3))
        self.dropout = Dropout(config.dropout)

    @jax.named_scope("decoder_layer")
    def __call__(self, x, query_position, reference_points, memory: Tokens, rngs, visible=None):
        """`x`, `query_position [b, q, c]`, `reference_points [b, q, l, 2 or 4]` -> `[b, q, c]`."""
        query = x + query_position
        x = self.norm1(x + self.dropout(self.self_attn(query, query, x, visible=visible, rngs=rngs), rngs))
        attended = self.cross_attn(x + query_position, reference_points, memory)
        x = self.norm2(x + self.dropout(attended, rngs))
        return self.norm3(x + self.dropout(self.ffn(x, rngs), rngs))


class InputProjection(nnx.Module):
    """Convolution to the transformer's width (1x1, or 3x3 with stride 2 for an extra level) and GroupNorm.

    There is no FPN: levels exchange what they know by multi-scale deformable attention (paper section 4.1).
    """

    def __init__(self, n_in: int, config: DeformableDETRConfig, *, size: int, stride: int, rngs: nnx.Rngs):
        xavier = nnx.initializers.xavier_uniform()
        self.conv = Conv(
            n_in, config.hidden_dim, size, stride=stride, bias=True, kernel_init=xavier, dtype=config.dtype, rngs=rngs
        )
        self.norm = GroupNorm(config.hidden_dim)
        self.stride = stride

    @jax.named_scope("input_proj")
    def __call__(self, x: jax.Array, valid: jax.Array | None) -> jax.Array:
        return self.norm(self.conv(x), valid)


class Proposals(nnx.Module):
    """Two-stage (paper section 4.2): the encoder's tokens make region proposals; the best become the queries."""

    def __init__(self, config: DeformableDETRConfig, *, rngs: nnx.Rngs):
        c, dtype = config.hidden_dim, config.dtype
        xavier = nnx.initializers.xavier_uniform()
        self.num_queries = config.num_queries
        self.output = linear(c, c, kernel_init=xavier, dtype=dtype, rngs=rngs)
        self.output_norm = layer_norm(c, dtype=dtype, rngs=rngs)
        self.position = linear(2 * c, 2 * c, kernel_init=xavier, dtype=dtype, rngs=rngs)
        self.position_norm = layer_norm(2 * c, dtype=dtype, rngs=rngs)

    @jax.named_scope("proposals")
    def __call__(self, memory, valid, valid_maps, class_embed, bbox_embed):
        """The proposals of all tokens (`enc_outputs`) and, for the best `q`, boxes, query position and target."""
        usable, anchors = token_anchors(memory, valid, valid_maps, self.num_queries)
        memory = self.output_norm(self.output(jnp.where(usable, memory, 0)))
        features = memory.astype(jnp.float32)
        logits, coordinates = class_embed(features), bbox_embed(features) + anchors
        enc_outputs = {"pred_logits": logits, "pred_boxes": jax.nn.sigmoid(coordinates)}

        _, top = jax.lax.top_k(logits[..., 0], self.num_queries)
        capture(self, "top_tokens", top)  # [b, q]
        capture(self, "scores", logits[..., 0])  # [b, s]
        capture(self, "boxes", enc_outputs["pred_boxes"])  # [b, s, 4]
        reference = jax.lax.stop_gradient(jnp.take_along_axis(enc_outputs["pred_boxes"], top[..., None], 1))
        embedding = sine_boxes(reference, memory.shape[-1] // 2).astype(memory.dtype)
        query_position, target = jnp.split(self.position_norm(self.position(embedding)), 2, -1)
        return enc_outputs, reference, query_position, target


class MultiScaleEncoder(nnx.Module):
    """Backbone, feature levels and encoder: what Deformable DETR and DINO share."""

    def __init__(self, config: DeformableDETRConfig, *, rngs: nnx.Rngs):
        c = config.hidden_dim
        self.config = config
        self.half_pixel, self.temperature = True, 10000.0  # of the position encoding
        self.backbone = ResNet(config.backbone, remat=config.remat == "all", dtype=config.dtype, rngs=rngs)
        self.input_proj = nnx.List(
            InputProjection(n_in, config, size=size, stride=stride, rngs=rngs)
            for n_in, size, stride in projections(config, self.backbone.channels)
        )
        self.level_embed = nnx.Param(jax.random.normal(rngs.params(), (config.num_levels, c)))
        self.encoder = nnx.List(EncoderLayer(config, rngs=rngs) for _ in range(config.encoder_layers))

    @jax.named_scope("encoder")
    def encode(
        self, images: jax.Array, sizes: jax.Array, rngs: nnx.Rngs | None
    ) -> tuple[Tokens, list[jax.Array], jax.Array]:
        """What the decoder attends to.

        Returns:
            The encoder's tokens; which of them see the image, as a map `[b, h, w]` of each level; and the share of each
            level's map (x, y) that the image fills, `[b, l, 2]`.
        """
        features, valid_maps = self.levels(images, sizes)
        spatial_shapes = shapes(valid_maps)
        valid = jnp.concatenate([v.reshape(len(v), -1) for v in valid_maps], 1)
        angles = [map_angles(v, half_pixel=self.half_pixel).reshape(len(v), -1, 2) for v in valid_maps]
        valid_ratios = jnp.stack([jnp.stack([v[:, 0].mean(-1), v[:, :, 0].mean(-1)], -1) for v in valid_maps], 1)
        centers = jnp.concatenate([cell_boxes(v, 0.0)[..., :2] for v in valid_maps], 1)
        # On TPUs, tokens that are neighbors on the map are kept together from here to the decoder.
        order = token_order(self.config.implementation, spatial_shapes, self.config.encoder_points)
        tokens = Tokens(features, valid, spatial_shapes, order)
        tokens = dataclasses.replace(tokens, features=tokens.arrange(features), valid=tokens.arrange(valid))
        # Both made in the tokens' order: only angles are arranged, and no gradient is, which is a sum over each level.
        lengths, embed = tokens.level_lengths, self.level_embed[...]
        level_embed = [jnp.broadcast_to(z, (n, len(z))) for z, n in zip(embed, lengths, strict=True)]
        position = sine_2d(tokens.arrange(jnp.concatenate(angles, 1)), self.config.hidden_dim, self.temperature)
        position = (position + jnp.concatenate(level_embed)).astype(features.dtype)
        reference_points = tokens.arrange(centers)[:, :, None] * valid_ratios[:, None]
        for layer in self.encoder:
            tokens = recompute(self.config.remat != "none", layer, tokens, position, reference_points, rngs)
        return tokens, valid_maps, valid_ratios

    def levels(self, images: jax.Array, sizes: jax.Array) -> tuple[jax.Array, list[jax.Array]]:
        """Tokens `[b, s, c]`, and each level's valid map `[b, h, w]`."""
        config = self.config
        mask = config.backbone.mask_padding
        maps = self.backbone(images, sizes)
        stride = 16 if config.backbone.dilation else 32
        maps = maps[-config.feature_maps :]
        strides = [4, 8, 16, stride][-len(maps) :]
        tokens, valid_maps = [], []
        source = maps[-1]
        for i, projection in enumerate(self.input_proj):
            if i < len(maps):
                stride, source = strides[i], maps[i]
            else:
                stride *= 2
            shape = tuple(-(-n // projection.stride) for n in source.shape[1:3])
            valid = valid_cells(sizes, shape, stride) if mask else valid_nearest(sizes, images.shape[1:3], shape)
            features = projection(source, valid if mask else None)
            tokens.append(features.reshape(len(images), -1, config.hidden_dim))
            valid_maps.append(valid)
            if i >= len(maps):
                source = zero_padding(features, valid) if mask else features
        return jnp.concatenate(tokens, 1), valid_maps


class DeformableDETR(MultiScaleEncoder):
    """Deformable transformers for end-to-end object detection.

    With `backbone.mask_padding` off (the published model), the padding leaks into the features near the image's edge,
    as in `detr_jax.models.detr.DETR`, and into GroupNorm's statistics: the boxes of an image move with the bucket it is
    padded to, with random weights by up to 0.05 of the image's size (logits by 0.5) for an image of 90 x 118 pixels,
    and by 0.1 (0.7) for one of 400 x 500; with two-stage, proposals of similar score change places too. With it on,
    boxes and logits do not depend on bucket and batch but for float32 noise. `tests/test_padding.py` holds both.
    """

    def __init__(self, config: DeformableDETRConfig, *, rngs: nnx.Rngs):
        super().__init__(config, rngs=rngs)
        c = config.hidden_dim
        self.decoder = nnx.List(DecoderLayer(config, rngs=rngs) for _ in range(config.decoder_layers))
        if config.two_stage:
            self.proposals = Proposals(config, rngs=rngs)
        else:
            self.query_embed = nnx.Param(jax.random.normal(rngs.params(), (config.num_queries, 2 * c)))
            xavier = nnx.initializers.xavier_uniform()
            zeros = nnx.initializers.zeros
            self.reference_points = linear(c, 2, kernel_init=xavier, bias_init=zeros, rngs=rngs)
        # With refinement a head per layer (one more for the proposals), all starting as the same; else one for all.
        heads = config.decoder_heads + config.two_stage
        class_embed = make_class_embed(c, config.num_classes, rngs=rngs)
        bbox_embed = make_bbox_embed(c, size_bias=0.0, rngs=rngs)
        self.class_embed = nnx.List(nnx.clone(class_embed) for _ in range(heads))
        self.bbox_embed = nnx.List(nnx.clone(bbox_embed) for _ in range(heads))
        if not config.two_stage:
            # The first box of a query is small: e^-2 in w and h. Refined layers and proposals start from their anchor.
            self.bbox_embed[0].layers[-1].bias = nnx.Param(jnp.array([0.0, 0.0, -2.0, -2.0]))

    def __call__(self, images: jax.Array, sizes: jax.Array, rngs: nnx.Rngs | None = None) -> dict:
        """Detect.

        Args:
            images: `[b, H, W, 3]`, normalized with the ImageNet mean and standard deviation, zero in the padding.
            sizes: int `[b, 2]`, valid (height, width) of each image.
            rngs: random numbers for dropout; `None` switches it off.

        Returns:
            `pred_logits [b, q, k]` (sigmoid), `pred_boxes [b, q, 4]` (cx, cy, w, h in 0-1 of the valid image),
            `aux_outputs`, the same of the earlier decoder layers, stacked in front, and for two-stage `enc_outputs`,
            `[b, s, k]` and `[b, s, 4]`, the proposals of all tokens.
        """
        memory, valid_maps, valid_ratios = self.encode(images, sizes, rngs)
        capture(self, "valid_maps", tuple(valid_maps))
        capture(self, "valid_ratios", valid_ratios)

        outputs = {}
        if self.config.two_stage:
            outputs["enc_outputs"], reference, query_position, x = self.proposals(
                memory.rows(memory.features),
                memory.rows(memory.valid),
                valid_maps,
                self.class_embed[-1],
                self.bbox_embed[-1],
            )
        else:
            b = len(images)
            queries = jnp.broadcast_to(self.query_embed[...], (b, *self.query_embed.shape))
            query_position, x = jnp.split(queries, 2, -1)
            reference = jax.nn.sigmoid(self.reference_points(query_position))
            query_position, x = (z.astype(memory.features.dtype) for z in (query_position, x))

        order = nearby_first(self, memory, reference)
        reference, query_position, x = (arrange(order, z) for z in (reference, query_position, x))
        logits, boxes = [], []
        for i, layer in enumerate(self.decoder):
            ratios = jnp.tile(valid_ratios, reference.shape[-1] // 2)
            reference_points = reference[:, :, None] * ratios[:, None]
            x = recompute(self.config.remat != "none", layer, x, query_position, reference_points, memory, rngs)
            head = i if self.config.box_refinement else 0
            with jax.named_scope("heads"):
                features = x.astype(jnp.float32)
                offset = inverse_sigmoid(reference)
                offset = jnp.pad(offset, ((0, 0), (0, 0), (0, 4 - offset.shape[-1])))
                logits.append(self.class_embed[head](features))
                boxes.append(jax.nn.sigmoid(self.bbox_embed[head](features) + offset))
            if self.config.box_refinement:
                reference = jax.lax.stop_gradient(boxes[-1])
        logits, boxes = (restore(order, jnp.stack(z)) for z in (logits, boxes))
        return outputs | {
            "pred_logits": logits[-1],
            "pred_boxes": boxes[-1],
            "aux_outputs": {"pred_logits": logits[:-1], "pred_boxes": boxes[:-1]},
        }


def shapes(maps: Sequence[jax.Array]) -> tuple[tuple[int, int], ...]:
    """(height, width) of maps `[b, h, w]`."""
    return tuple((x.shape[1], x.shape[2]) for x in maps)


def projections(config: DeformableDETRConfig, channels: Sequence[int]) -> list[tuple[int, int, int]]:
    """Input width, kernel size and stride of each level's projection; the first extra level reads the raw C5."""
    scales = config.feature_maps
    rows = [(n_in, 1, 1) for n_in in channels[-scales:]]
    for i in range(config.num_levels - scales):
        rows.append((channels[-1] if i == 0 else config.hidden_dim, 3, 2))
    return rows


def token_anchors(
    memory: jax.Array, valid: jax.Array, valid_maps: Sequence[jax.Array], num_queries: int
) -> tuple[jax.Array, jax.Array]:
    """What each token `[b, s, c]` proposes before it is refined (two-stage).

    A token's box is its cell's center with width and height 0.05 * 2^level; those that are not within (0.01, 0.99) and
    those in the padding are out: their box is (1, 1, 1, 1), as sigmoid(inf) is in the official code. Here a large
    finite logit stands for inf, which has no NaN gradient.

    Returns:
        Which tokens may propose, bool `[b, s, 1]`, and the logits of their boxes, `[b, s, 4]`.

    Raises:
        ValueError: fewer tokens than queries.
    """
    if memory.shape[1] < num_queries:
        raise UserError(
            f"two-stage takes {num_queries} queries from the image's tokens, but there are only "
            f"{memory.shape[1]}: use larger images, more levels or fewer model.num_queries"
        )
    boxes = jnp.concatenate([cell_boxes(v, 0.05 * 2**level) for level, v in enumerate(valid_maps)], 1)
    usable = jnp.all((boxes > 0.01) & (boxes < 0.99), -1, keepdims=True) & valid[..., None]
    boxes = jnp.clip(boxes, 0.01, 0.99)
    return usable, jnp.where(usable, jnp.log(boxes / (1 - boxes)), 1e4)


def cell_boxes(valid: jax.Array, size: float) -> jax.Array:
    """Center of each cell of a map, in 0-1 of its valid part, with that width and height: `[b, h * w, 4]`."""
    b, h, w = valid.shape
    x = (jnp.arange(w) + 0.5) / valid[:, 0].sum(-1, keepdims=True)
    y = (jnp.arange(h) + 0.5) / valid[:, :, 0].sum(-1, keepdims=True)
    x, y = jnp.broadcast_to(x[:, None], (b, h, w)), jnp.broadcast_to(y[:, :, None], (b, h, w))
    return jnp.stack([x, y, jnp.full_like(x, size), jnp.full_like(x, size)], -1).reshape(b, h * w, 4)


def make_class_embed(features: int, num_classes: int, *, rngs: nnx.Rngs) -> nnx.Linear:
    """Class logits that start at a probability of 0.01 (focal loss paper, section 4.1)."""
    prior = nnx.initializers.constant(-math.log(99.0))
    return linear(features, num_classes, bias_init=prior, rngs=rngs)


def make_bbox_embed(features: int, *, size_bias: float, rngs: nnx.Rngs) -> MLP:
    """Box offsets that start at (0, 0, `size_bias`, `size_bias`)."""
    head = MLP(features, features, 4, 3, rngs=rngs)
    last = head.layers[-1]
    last.kernel = nnx.Param(jnp.zeros((features, 4)))
    last.bias = nnx.Param(jnp.array([0.0, 0.0, size_bias, size_bias]))
    return head
