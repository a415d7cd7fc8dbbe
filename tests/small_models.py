"""Small models of each variant, and a padded batch: what outputs are compared on."""

import numpy as np

from detr_jax.config import BackboneConfig, DeformableDETRConfig, DETRConfig

SMALL = {
    "backbone": BackboneConfig(depth=18),
    "num_classes": 5,
    "hidden_dim": 64,
    "num_heads": 4,
    "encoder_layers": 1,
    "decoder_layers": 2,
    "ffn_dim": 96,
    "num_queries": 12,
}
SMALL_MODELS = {
    "detr": DETRConfig(**SMALL),
    "detr_learned": DETRConfig(**SMALL, position="learned"),
    "deformable_single_scale": DeformableDETRConfig(**SMALL, num_levels=1),
    "deformable_five_levels": DeformableDETRConfig(**SMALL, num_levels=5, encoder_points=3, decoder_points=2),
    "deformable_refine": DeformableDETRConfig(**SMALL, box_refinement=True),
    "deformable_two_stage": DeformableDETRConfig(**SMALL, box_refinement=True, two_stage=True),
}


def padded_batch(height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Two images of noise, the second one smaller than the bucket both ways."""
    images = np.random.default_rng(0).standard_normal((2, height, width, 3)).astype(np.float32)
    sizes = np.array([(height - 3, width), (height * 3 // 4 + 1, width * 2 // 3)], np.int32)
    for image, (h, w) in zip(images, sizes, strict=True):
        image[h:], image[:, w:] = 0, 0
    return images, sizes


def noise_maps(self, images, sizes) -> list[np.ndarray]:
    """In place of `ResNet.__call__`: maps that need not be compiled, for tests of what comes after them."""
    rng = np.random.default_rng(1)
    shapes = [(len(images), -(-images.shape[1] // s), -(-images.shape[2] // s)) for s in (4, 8, 16, 32)]
    return [rng.normal(size=(*n, c)).astype(np.float32) for n, c in zip(shapes, self.channels, strict=True)]
