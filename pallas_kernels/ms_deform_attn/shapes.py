"""Named real problem sizes, the one list that tests, benchmarks and tuning read."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Shape:
    """The size of one call of `ms_deform_attn`."""

    batch: int
    """Images."""
    spatial_shapes: tuple[tuple[int, int], ...]
    """(height, width) of each level."""
    queries: int | None = 300
    """Queries; `None` is one for each token (the encoder)."""
    heads: int = 8
    """Attention heads."""
    head_dim: int = 32
    """Channels of a head."""
    points: int = 4
    """Sampling points per head and level."""

    @property
    def tokens(self) -> int:
        """Tokens of all levels."""
        return sum(height * width for height, width in self.spatial_shapes)


COCO = ((100, 134), (50, 67), (25, 34), (13, 17))  # 800 x 1066
COCO_WIDE = ((100, 167), (50, 84), (25, 42), (13, 21))  # 800 x 1333
COCO_SMALL = ((60, 80), (30, 40), (15, 20), (8, 10))  # 480 x 640

SHAPES = {
    "encoder_480x640": Shape(1, COCO_SMALL, None),
    "encoder_800x1066": Shape(1, COCO, None),
    "encoder_800x1333": Shape(2, COCO_WIDE, None),
    "encoder_800x1333_single_scale": Shape(2, COCO_WIDE[2:3], None),
    "encoder_800x1333_dc5": Shape(2, COCO_WIDE[1:2], None),
    "decoder_800x1333": Shape(2, COCO_WIDE),
    "decoder_dino_800x1333": Shape(2, COCO_WIDE, 900 + 200),  # queries and denoising queries
    "encoder_bccd_demo": Shape(4, ((30, 40), (15, 20), (8, 10)), None, head_dim=16),
}

SMALL = {
    "one_of_each": Shape(1, ((1, 1),), 1, heads=1, head_dim=16, points=1),
    "odd_encoder": Shape(2, ((11, 19), (6, 10), (3, 5)), None, heads=2, head_dim=16, points=3),
    "odd_decoder": Shape(1, ((17, 9), (1, 1)), 131, heads=3, head_dim=24, points=2),
    "wide_heads": Shape(1, ((9, 33),), 20, heads=1, head_dim=128, points=4),
}
"""Sizes that a test can run in interpret mode, each with what may go wrong: uneven maps, a level of one pixel, one
query, a last tile that is not full, head widths that are no power of two."""
