"""The encoder layer of Deformable DETR: by its modules, or on TPUs by three kernels."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from detr_jax.config import DeformableDETRConfig
from detr_jax.models.attention import Tokens, deformable_attention
from detr_jax.models.feed_forward import FeedForward
from detr_jax.models.layers import Dropout, Linear, is_captured, layer_norm
from detr_jax.sharding import BATCH_AXES
from pallas_kernels.feed_forward import Weights, feed_forward, is_faster
from pallas_kernels.ms_deform_attn import ms_deform_self_attn
from pallas_kernels.over_mesh import other_axes


class EncoderLayer(nnx.Module):
    """Multi-scale deformable self-attention and feed-forward over the tokens of all levels."""

    def __init__(self, config: DeformableDETRConfig, *, rngs: nnx.Rngs):
        c, dtype = config.hidden_dim, config.dtype
        self.self_attn = deformable_attention(config, config.encoder_points, rngs=rngs)
        self.ffn = FeedForward(c, config.ffn_dim, config.dropout, dtype=dtype, rngs=rngs)
        self.norm1, self.norm2 = (layer_norm(c, dtype=dtype, rngs=rngs) for _ in range(2))
        self.dropout = Dropout(config.dropout)

    @jax.named_scope("encoder_layer")
    def __call__(self, tokens: Tokens, position, reference_points, rngs) -> Tokens:
        """`position [b, s, c]`, `reference_points [b, s, l, 2]`, both in the order of the tokens."""
        x = tokens.features
        if self.fits_kernels(tokens):
            x = self.by_kernels(tokens, position, reference_points, rngs)
        else:
            x = self.finish(x, self.self_attn(x + position, reference_points, tokens), rngs)
        return dataclasses.replace(tokens, features=x)

    def finish(self, x: jax.Array, attended: jax.Array, rngs: nnx.Rngs | None) -> jax.Array:
        """What follows the attention."""
        x = self.norm1(x + self.dropout(attended, rngs))
        return self.norm2(x + self.dropout(self.ffn(x, rngs), rngs))

    def fits_kernels(self, tokens: Tokens) -> bool:
        """Whether the kernels do all that is asked for: they know no adapters, and nothing between them is captured.

        They split their work over the mesh's usual axes alone.
        """
        attention, ffn = self.self_attn, self.ffn
        projections = attention.sampling_offsets, attention.attention_weights, attention.value_proj
        layers = *projections, attention.output_proj, ffn.linear1, ffn.linear2
        plain = all(type(layer) is Linear for layer in layers)
        return tokens.order is not None and plain and not is_captured(attention) and not other_axes(BATCH_AXES)

    def by_kernels(self, tokens: Tokens, position, reference_points, rngs: nnx.Rngs | None) -> jax.Array:
        """The layer as kernels, which drop what the modules drop."""
        attention, ffn = self.self_attn, self.ffn
        sampled, x = ms_deform_self_attn(
            tokens.features,
            position,
            reference_points,
            tokens.valid,
            tokens.spatial_shapes,
            attention.projections(),
            num_heads=attention.num_heads,
            batch_axis=BATCH_AXES,
        )
        rate = 0.0 if rngs is None else self.dropout.rate
        if not is_faster(rate):
            return self.finish(x, attention.output_proj.interleaved(sampled.swapaxes(1, 2), 1)[0], rngs)
        drawn = [dropout.draw_key(rngs) for dropout in (self.dropout, ffn.dropout, self.dropout)]
        keys = jnp.stack([key for key in drawn if key is not None]) if rate else None
        weights = Weights(
            *attention.output_proj.weights(),
            *_affine(self.norm1),
            *ffn.linear1.weights(),
            *ffn.linear2.weights(),
            *_affine(self.norm2),
        )
        return feed_forward(x, sampled, weights, keys, rate=rate, batch_axis=BATCH_AXES)


def _affine(norm: nnx.LayerNorm) -> tuple[jax.Array, jax.Array]:
    """Scale and shift."""
    assert norm.scale is not None and norm.bias is not None
    return norm.scale[...], norm.bias[...]
