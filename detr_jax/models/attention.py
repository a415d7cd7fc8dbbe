"""Attention: softmax over all keys (DETR) and multi-scale deformable (Deformable DETR)."""

import dataclasses
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from detr_jax.config import DeformableDETRConfig
from detr_jax.models.layers import Dropout, Linear, capture, linear
from detr_jax.sharding import BATCH_AXES
from pallas_kernels import BlockOrder, block_order, ms_deform_attn
from pallas_kernels.ms_deform_attn import Projections, best_implementation, ms_deform_cross_attn
from pallas_kernels.over_mesh import other_axes


class MultiHeadAttention(nnx.Module):
    """Multi-head attention with separate query, key and value inputs (Deformable DETR, equation 1).

    Complexity: quadratic in the number of tokens, O(q s c), which is why DETR attends to one coarse map only.
    """

    def __init__(self, features: int, num_heads: int, dropout: float, *, dtype=None, rngs: nnx.Rngs):
        # PyTorch draws the three projections as one [3c, c] matrix: Xavier's bound is that of fan_in + fan_out = 4c.
        xavier3 = nnx.initializers.variance_scaling(0.5, "fan_avg", "uniform")
        zeros = nnx.initializers.zeros
        self.num_heads = num_heads
        self.query = linear(features, features, kernel_init=xavier3, bias_init=zeros, dtype=dtype, rngs=rngs)
        self.key = linear(features, features, kernel_init=xavier3, bias_init=zeros, dtype=dtype, rngs=rngs)
        self.value = linear(features, features, kernel_init=xavier3, bias_init=zeros, dtype=dtype, rngs=rngs)
        xavier = nnx.initializers.xavier_uniform()
        self.out = linear(features, features, kernel_init=xavier, bias_init=zeros, dtype=dtype, rngs=rngs)
        self.dropout = Dropout(dropout)

    def __call__(
        self,
        query,
        key,
        value,
        *,
        key_valid: jax.Array | None = None,
        visible: jax.Array | None = None,
        rngs: nnx.Rngs | None = None,
    ):
        """`query [b, q, c]`, `key`, `value [b, s, c]`, `key_valid [b, s]`, `visible [q, s]` -> `[b, q, c]`.

        `visible`, or `[b, 1, q, s]`, says which query sees which key; each must see one.
        """

        def heads(x):
            return x.reshape(*x.shape[:2], self.num_heads, -1)

        query, key, value = heads(self.query(query)), heads(self.key(key)), heads(self.value(value))
        logits = jnp.einsum("bqhd,bshd->bhqs", query * query.shape[-1] ** -0.5, key).astype(jnp.float32)
        if key_valid is not None:
            logits = jnp.where(key_valid[:, None, None], logits, jnp.finfo(jnp.float32).min)
        if visible is not None:
            logits = jnp.where(visible, logits, jnp.finfo(jnp.float32).min)
        weights = jax.nn.softmax(logits)
        capture(self, "attention_weights", weights)  # [b, h, q, s]
        weights = self.dropout(weights, rngs).astype(value.dtype)
        output = jnp.einsum("bhqs,bshd->bqhd", weights, value)
        return self.out(output.reshape(*output.shape[:2], -1))


class MSDeformAttn(nnx.Module):
    """Multi-scale deformable attention (Deformable DETR section 4.1, equation 3; with one level it is equation 2).

    Complexity: linear in the number of tokens, O(s c^2) for the projections and O(q h l p d) for the samples, so that
    the encoder can attend to all levels at once. Each head first looks in its own direction: `offset_directions`.
    """

    def __init__(
        self,
        features: int,
        num_heads: int,
        num_levels: int,
        num_points: int,
        *,
        implementation: str | None = None,
        dtype=None,
        rngs: nnx.Rngs,
    ):
        zeros, xavier = nnx.initializers.zeros, nnx.initializers.xavier_uniform()
        samples = num_heads * num_levels * num_points
        self.num_heads, self.num_levels, self.num_points = num_heads, num_levels, num_points
        self.implementation = implementation

        def offsets_init(key, shape, dtype=jnp.float32, out_sharding=None):
            return offset_directions(num_heads, num_levels, num_points).reshape(shape).astype(dtype)

        self.sampling_offsets = linear(
            features, samples * 2, kernel_init=zeros, bias_init=offsets_init, dtype=dtype, rngs=rngs
        )
        self.attention_weights = linear(features, samples, kernel_init=zeros, bias_init=zeros, dtype=dtype, rngs=rngs)
        self.value_proj = linear(features, features, kernel_init=xavier, bias_init=zeros, dtype=dtype, rngs=rngs)
        self.output_proj = linear(features, features, kernel_init=xavier, bias_init=zeros, dtype=dtype, rngs=rngs)

    def __call__(
        self,
        query: jax.Array,
        reference_points: jax.Array,
        tokens: "Tokens",
    ) -> jax.Array:
        """Attend to `tokens` around `reference_points`.

        Args:
            query: `[b, q, c]`.
            reference_points: `[b, q, l, 2]` (x, y) or `[b, q, l, 4]` (cx, cy, w, h), normalized by each level's map.
            tokens: what is sampled; the projected value of padding counts as zero. Queries that are these tokens are
                in their order.

        Returns:
            `[b, q, c]`.
        """
        spatial_shapes = tokens.spatial_shapes
        b, q = query.shape[:2]
        grid = (b, q, self.num_heads, self.num_levels, self.num_points)

        def project(layer: Linear, x: jax.Array) -> jax.Array:
            """In block order, without merging images and tokens: around the TPU's kernel they would be copied."""
            return layer.interleaved(x, 1)[0] if tokens.order else layer(x)

        weights = project(self.attention_weights, query).reshape(*grid[:3], -1).astype(jnp.float32)
        weights = jax.nn.softmax(weights).reshape(grid)
        x, y = (z.reshape(grid).astype(jnp.float32) for z in self.sampling_offsets.interleaved(query, 2))
        reference = reference_points[:, :, None, :, None]
        if reference.shape[-1] == 2:
            sizes = np.array([(w, h) for h, w in spatial_shapes], np.float32)[:, None]
            x, y = reference[..., 0] + x / sizes[..., 0], reference[..., 1] + y / sizes[..., 1]
        else:
            x = reference[..., 0] + x / self.num_points * reference[..., 2] * 0.5
            y = reference[..., 1] + y / self.num_points * reference[..., 3] * 0.5
        locations = jnp.stack([x, y], -1)
        rows = tokens.rows if q == tokens.features.shape[1] else lambda x: x
        capture(self, "reference_points", rows(reference_points))
        capture(self, "sampling_locations", rows(locations))  # [b, q, h, l, p, 2] (x, y) in 0-1 of each level's map
        capture(self, "attention_weights", rows(weights))  # [b, q, h, l, p]
        plain = type(self.value_proj) is Linear and not other_axes(BATCH_AXES)
        if tokens.order is not None and q != tokens.features.shape[1] and plain:
            output = ms_deform_cross_attn(
                tokens.features,
                tokens.valid,
                spatial_shapes,
                self.value_proj.weights(),
                locations,
                weights,
                batch_axis=BATCH_AXES,
            )
        else:
            value = jnp.where(tokens.valid[..., None], project(self.value_proj, tokens.features), 0)
            output = ms_deform_attn(
                value.reshape(*value.shape[:2], self.num_heads, -1),
                spatial_shapes,
                locations,
                weights,
                implementation=self.implementation,
                in_blocks=tokens.order is not None,
                batch_axis=BATCH_AXES,
            )
        return project(self.output_proj, output.reshape(b, q, -1))

    def projections(self) -> Projections:
        """Kernels and biases of what comes before the sampling."""
        kernel, bias = self.sampling_offsets.weights()
        x, y = ((kernel[:, i::2], bias[i::2]) for i in range(2))
        return Projections(self.value_proj.weights(), x, y, self.attention_weights.weights())


def deformable_attention(config: DeformableDETRConfig, num_points: int, *, rngs: nnx.Rngs) -> MSDeformAttn:
    """The attention of an encoder or decoder layer."""
    return MSDeformAttn(
        config.hidden_dim,
        config.num_heads,
        config.num_levels,
        num_points,
        implementation=config.implementation,
        dtype=config.dtype,
        rngs=rngs,
    )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Tokens:
    """The tokens of several levels, in the order that the kernel of deformable attention is made for."""

    features: jax.Array
    """`[b, s, c]`."""
    valid: jax.Array
    """bool `[b, s]`: False at padding."""
    spatial_shapes: tuple[tuple[int, int], ...] = dataclasses.field(metadata={"static": True})
    """(height, width) of each level."""
    order: BlockOrder | None = dataclasses.field(default=None, metadata={"static": True})
    """Blocks of neighbors, as `token_order` says; `None`: levels one after another, row by row."""

    @property
    def level_lengths(self) -> list[int]:
        """How many tokens each level has; the levels come one after another in either order."""
        return self.order.level_lengths if self.order else [math.prod(shape) for shape in self.spatial_shapes]

    def arrange(self, x: jax.Array) -> jax.Array:
        """`[b, rows, ...]`, levels one after another, row by row -> `[b, s, ...]` in the order of the tokens."""
        return self.order.to_blocks(x) if self.order else x

    def rows(self, x: jax.Array) -> jax.Array:
        """Undoes `arrange`."""
        return self.order.from_blocks(x) if self.order else x


def token_order(
    implementation: str | None, spatial_shapes: Sequence[tuple[int, int]], points: int
) -> BlockOrder | None:
    """How an encoder should order its tokens: in blocks for the TPU's kernel, else (`None`) row by row."""
    name = implementation or best_implementation(spatial_shapes, points)
    return block_order(spatial_shapes) if name == "tensorcore" else None


def offset_directions(num_heads: int, num_levels: int, num_points: int) -> jax.Array:
    """Initial offsets `[h, l, p, 2]` in pixels: each head looks in its own direction, point `i` at distance `i + 1`."""
    angle = jnp.arange(num_heads) * (2 * math.pi / num_heads)
    direction = jnp.stack([jnp.cos(angle), jnp.sin(angle)], -1)
    direction /= jnp.abs(direction).max(-1, keepdims=True)
    distance = jnp.arange(1, num_points + 1)[:, None]
    return jnp.broadcast_to(direction[:, None, None] * distance, (num_heads, num_levels, num_points, 2))
