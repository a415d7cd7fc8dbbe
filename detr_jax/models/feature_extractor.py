"""A detector's backbone and encoder alone, as a feature extractor."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from detr_jax.models.deformable_detr import MultiScaleEncoder, shapes
from detr_jax.models.detr import DETR


class DeformableEncoder(MultiScaleEncoder):
    """What a multi-scale decoder attends to, as a map for each level (strides 8, 16, 32, 64 with four levels)."""

    def __init__(self, detector: MultiScaleEncoder):
        detector = nnx.clone(detector)
        self.config = detector.config
        self.half_pixel, self.temperature = detector.half_pixel, detector.temperature
        self.backbone, self.input_proj = detector.backbone, detector.input_proj
        self.level_embed, self.encoder = detector.level_embed, detector.encoder

    def __call__(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, images: jax.Array, sizes: jax.Array, rngs: nnx.Rngs | None = None
    ) -> tuple[list[jax.Array], list[jax.Array]]:
        """Features.

        Args:
            images: `[b, H, W, 3]`, normalized with the ImageNet mean and standard deviation, zero in the padding.
            sizes: int `[b, 2]`, valid (height, width) of each image.
            rngs: random numbers for dropout; `None` switches it off.

        Returns:
            Maps `[b, h, w, c]` and, bool `[b, h, w]`, which of their cells see the image, from fine to coarse.
        """
        tokens, valid, _ = self.encode(images, sizes, rngs)
        ends = np.cumsum([h * w for h, w in shapes(valid)])
        levels = jnp.split(tokens.rows(tokens.features), ends[:-1], 1)
        return [level.reshape(*v.shape, -1) for level, v in zip(levels, valid, strict=True)], valid


class DETREncoder(DETR):
    """What DETR's decoder attends to, as a map (stride 32, or 16 with DC5)."""

    def __init__(self, detector: DETR):
        detector = nnx.clone(detector)
        self.config = detector.config
        self.backbone, self.input_proj, self.position = detector.backbone, detector.input_proj, detector.position
        self.encoder, self.encoder_norm = detector.encoder, detector.encoder_norm

    def __call__(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, images: jax.Array, sizes: jax.Array, rngs: nnx.Rngs | None = None
    ) -> tuple[list[jax.Array], list[jax.Array]]:
        """As `DeformableEncoder`, with one level."""
        x, _, valid = self.encode(images, sizes, rngs)
        return [x.reshape(*valid.shape, -1)], [valid]
