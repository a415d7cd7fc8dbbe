"""DINO (Zhang et al., ICLR 2023): Deformable DETR whose queries are boxes, with denoising.

What it does otherwise than Deformable DETR with two stages follows the official code (IDEA-Research/DINO); where the
paper is silent, that is all there is.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from detr_jax.config import DINOConfig
from detr_jax.denoising import DenoisingQueries, visible
from detr_jax.models.deformable_detr import (
    DecoderLayer,
    MultiScaleEncoder,
    make_bbox_embed,
    make_class_embed,
    token_anchors,
)
from detr_jax.models.layers import MLP, capture, inverse_sigmoid, layer_norm, linear, recompute
from detr_jax.models.position import sine_boxes
from detr_jax.models.query_order import arrange, arrange_visible, nearby_first, restore

# Boxes nearer to 0 or 1 than this count as this near, wherever a logit of a box is taken (Deformable DETR: 1e-5).
EPSILON = 1e-3


class QuerySelection(nnx.Module):
    """Mixed query selection (paper section 3.4): the best tokens propose the queries' boxes; content is learned."""

    def __init__(self, config: DINOConfig, *, rngs: nnx.Rngs):
        c, dtype = config.hidden_dim, config.dtype
        self.num_queries = config.num_queries
        self.output = linear(c, c, kernel_init=nnx.initializers.xavier_uniform(), dtype=dtype, rngs=rngs)
        self.output_norm = layer_norm(c, dtype=dtype, rngs=rngs)

    @jax.named_scope("proposals")
    def __call__(self, memory, valid, valid_maps, class_embed, bbox_embed):
        """The proposals that become queries, best first: `pred_logits [b, q, k]` and `pred_boxes [b, q, 4]`.

        A token's score is that of its best class. Other than in Deformable DETR, only the chosen ones have a loss.
        """
        usable, anchors = token_anchors(memory, valid, valid_maps, self.num_queries)
        tokens = self.output_norm(self.output(jnp.where(usable, memory, 0))).astype(jnp.float32)
        logits = class_embed(tokens)
        _, top = jax.lax.top_k(logits.max(-1), self.num_queries)
        capture(self, "top_tokens", top)  # [b, q]
        capture(self, "scores", logits.max(-1))  # [b, s]
        capture(self, "boxes", jax.nn.sigmoid(bbox_embed(tokens) + anchors))  # [b, s, 4]
        logits, tokens, anchors = (jnp.take_along_axis(x, top[..., None], 1) for x in (logits, tokens, anchors))
        return {"pred_logits": logits, "pred_boxes": jax.nn.sigmoid(bbox_embed(tokens) + anchors)}


class DINO(MultiScaleEncoder):
    """DETR with improved denoising anchor boxes.

    Encoder and decoder layers are Deformable DETR's. New are the queries: a query is a box, whose sine encoding gives
    its position, anew in each layer, and a content, which is learned (mixed query selection). Padding moves the boxes
    as in `detr_jax.models.deformable_detr.DeformableDETR`.
    """

    def __init__(self, config: DINOConfig, *, rngs: nnx.Rngs):
        super().__init__(config, rngs=rngs)
        self.half_pixel, self.temperature = config.half_pixel, config.position_temperature
        c = config.hidden_dim
        self.decoder = nnx.List(DecoderLayer(config, rngs=rngs) for _ in range(config.decoder_layers))
        self.decoder_norm = layer_norm(c, dtype=config.dtype, rngs=rngs)
        self.query_position = MLP(
            2 * c, c, c, 2, kernel_init=nnx.initializers.xavier_uniform(), dtype=config.dtype, rngs=rngs
        )
        normal, xavier = nnx.initializers.normal(1.0), nnx.initializers.xavier_uniform()
        content_init = xavier if config.two_stage else normal
        self.query_embed = nnx.Param(content_init(rngs.params(), (config.num_queries, c), jnp.float32))
        if config.two_stage:
            self.proposals = QuerySelection(config, rngs=rngs)
        else:
            self.anchor_embed = nnx.Param(normal(rngs.params(), (config.num_queries, 4), jnp.float32))
        # The official table has one row more than there are classes. Its last row is never read.
        self.label_embed = nnx.Param(normal(rngs.params(), (config.num_classes + 1, c), jnp.float32))
        # One head for all decoder layers, or one each; the last is the proposals'. All start alike.
        heads = config.decoder_heads + config.two_stage
        first_class, first_box = (
            make_class_embed(c, config.num_classes, rngs=rngs),
            make_bbox_embed(c, size_bias=0.0, rngs=rngs),
        )
        self.class_embed = nnx.List(nnx.clone(first_class) for _ in range(heads))
        self.bbox_embed = nnx.List(nnx.clone(first_box) for _ in range(heads))

    def __call__(
        self,
        images: jax.Array,
        sizes: jax.Array,
        rngs: nnx.Rngs | None = None,
        denoising: DenoisingQueries | None = None,
    ) -> dict:
        """Detect.

        Args:
            images: `[b, H, W, 3]`, normalized with the ImageNet mean and standard deviation, zero in the padding.
            sizes: int `[b, 2]`, valid (height, width) of each image.
            rngs: random numbers for dropout; `None` switches it off.
            denoising: in training, `[b, n]` queries made of the targets; they change none of the other outputs.

        Returns:
            `pred_logits [b, q, k]` (sigmoid), `pred_boxes [b, q, 4]` (cx, cy, w, h in 0-1 of the valid image),
            `aux_outputs`, the same of the earlier decoder layers, stacked in front; with mixed query selection
            `interm_outputs`, the same of the proposals that became queries; and with `denoising` `dn_outputs`,
            `[layers, b, n, k]` and `[layers, b, n, 4]`, of those queries after every decoder layer.
        """
        config = self.config
        assert isinstance(config, DINOConfig)
        memory, valid_maps, valid_ratios = self.encode(images, sizes, rngs)
        capture(self, "valid_maps", tuple(valid_maps))
        capture(self, "valid_ratios", valid_ratios)

        b, outputs = len(images), {}
        x = jnp.broadcast_to(self.query_embed[...], (b, *self.query_embed.shape))
        if config.two_stage:
            rows, rows_valid = memory.rows(memory.features), memory.rows(memory.valid)
            proposals = self.proposals(rows, rows_valid, valid_maps, self.class_embed[-1], self.bbox_embed[-1])
            outputs["interm_outputs"] = proposals
            reference = jax.lax.stop_gradient(proposals["pred_boxes"])
        else:
            reference = jnp.broadcast_to(jax.nn.sigmoid(self.anchor_embed[...]), (b, config.num_queries, 4))
        sees, n = None, 0
        if denoising is not None:
            sees, n = visible(denoising, config.num_queries), denoising.labels.shape[1]
            content = jnp.where(denoising.real[..., None], self.label_embed[...][denoising.labels], 0)
            logit = inverse_sigmoid(denoising.boxes_cxcywh, EPSILON)
            boxes = jax.nn.sigmoid(jnp.where(denoising.real[..., None], logit, 0))
            x, reference = jnp.concatenate([content, x], 1), jnp.concatenate([boxes, reference], 1)
        x = x.astype(memory.features.dtype)

        order = nearby_first(self, memory, reference)
        x, reference = (arrange(order, z) for z in (x, reference))
        sees = arrange_visible(order, sees)
        logits, boxes = [], []
        detached = reference
        for i, layer in enumerate(self.decoder):
            reference_points = detached[:, :, None] * jnp.tile(valid_ratios, 2)[:, None]
            embedding = sine_boxes(reference_points[:, :, 0, [1, 0, 2, 3]], config.hidden_dim // 2)
            query_position = self.query_position(embedding.astype(x.dtype))
            arguments = (x, query_position, reference_points, memory, rngs, sees)
            x = recompute(config.remat != "none", layer, *arguments)
            head = 0 if config.shared_heads else i
            bbox_embed = self.bbox_embed[head]
            with jax.named_scope("heads"):
                features = self.decoder_norm(x).astype(jnp.float32)
                logits.append(self.class_embed[head](features))
                boxes.append(jax.nn.sigmoid(bbox_embed(features) + inverse_sigmoid(reference, EPSILON)))
                # The next layer looks around the box of the features as they are; the heads see them normalized.
                refined = jax.nn.sigmoid(bbox_embed(x.astype(jnp.float32)) + inverse_sigmoid(detached, EPSILON))
            detached = jax.lax.stop_gradient(refined)
            reference = refined if config.look_forward_twice else detached
        logits, boxes = (restore(order, jnp.stack(z)) for z in (logits, boxes))
        if denoising is not None:
            outputs["dn_outputs"] = {"pred_logits": logits[:, :, :n], "pred_boxes": boxes[:, :, :n]}
            logits, boxes = logits[:, :, n:], boxes[:, :, n:]
        return outputs | {
            "pred_logits": logits[-1],
            "pred_boxes": boxes[-1],
            "aux_outputs": {"pred_logits": logits[:-1], "pred_boxes": boxes[:-1]},
        }
