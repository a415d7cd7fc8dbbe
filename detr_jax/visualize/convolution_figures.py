"""Where the last convolutions of a backbone look: deformable ones beside plain ones and deformable attention."""

from collections.abc import Sequence

import jax
import numpy as np
from flax import nnx
from matplotlib.figure import Figure

from detr_jax.data.image import ImageLike, open_image
from detr_jax.data.resample import normalize
from detr_jax.detector import Detector
from detr_jax.errors import UserError
from detr_jax.visualize.inspection import Inspector, Sampling
from detr_jax.visualize.panels import Sheet, add_cross, show_image, whole

DEPTH = 3
"""Convolutions that are traced back at most: 9^3 samples (Dai et al., 2017, figure 6)."""
COLOR = "#ff3b30"


def convolution_figure(detector: Detector, image: ImageLike, point: tuple[float, float]) -> Figure:
    """The samples behind a point of C5, of its deformable convolutions: as if they were plain ones, and as they are.

    A third panel has the encoder's sampling points there, where the model is a Deformable DETR with an encoder.

    Args:
        detector: whose backbone has deformable convolutions.
        image: a Pillow image, an array or a path.
        point: (x, y) in pixels of the image.

    Raises:
        ValueError: a backbone without deformable convolutions, or a point outside the image.
    """
    backbone = detector.config.backbone
    if not backbone.deform_version:
        raise UserError(
            "the backbone has no deformable convolutions (model.backbone.deform_version is 0): nothing is sampled "
            "elsewhere than a convolution does"
        )
    opened = open_image(image)
    seen = Inspector(detector)(opened, [point])
    pixels, sizes = detector.prepare(opened)
    graphdef, state = detector.split()

    @jax.jit
    def positions(state, pixels, sizes):
        model = nnx.merge(graphdef, state)
        _, captured = nnx.capture(model.backbone, nnx.Intermediate)(normalize(pixels, sizes), sizes)
        blocks = nnx.to_pure_dict(captured)["stages"][3]
        found = [blocks[i]["convs"][1]["sampling_positions"] for i in sorted(blocks)]
        return [z[0, :, :, 0] for z in found[-DEPTH:]]  # of the first offset group

    layers = [np.asarray(z) for z in positions(state, pixels, sizes)]
    strides = _strides(detector, len(layers))
    scale = sizes[0, ::-1] / np.array(opened.size)  # of the resized image
    cell = np.round(np.array(point) * scale / strides[-1][1])
    plain = [
        plain_positions(z.shape[:2], outside // inside, 2 if backbone.dilation and i else 1)
        for i, (z, (inside, outside)) in enumerate(zip(layers, strides, strict=True))
    ]
    panels = {
        f"{len(plain)} convolutions": trace(plain, cell) * strides[0][0] / scale,
        f"{len(layers)} deformable convolutions": trace(layers, cell) * strides[0][0] / scale,
    }
    if isinstance(seen.encoder, Sampling):
        panels["last encoder layer's attention"] = seen.encoder.locations[-1].reshape(-1, 2)
    heading = f"what is sampled for one cell of C5 at ({point[0]:g}, {point[1]:g})"
    sheet = Sheet([heading], [whole(opened)] * len(panels), len(panels), bar=False)
    for axes, (title, points) in zip(sheet.panels[0], panels.items(), strict=True):
        show_image(axes, opened, whole(opened), f"{title}: {len(points)} samples", gray=True)
        axes.scatter(*points.T, s=7, c=COLOR, linewidths=0, alpha=0.6, zorder=4)
        add_cross(axes, *point)
    return sheet.figure


def trace(layers: Sequence[np.ndarray], cell: np.ndarray) -> np.ndarray:
    """All samples behind one output of the last of some layers.

    Args:
        layers: first to last, float `[h, w, t, 2]`: (column, row) in the layer's input of each sample of each output.
        cell: (column, row) of the output of the last layer.

    Returns:
        `[t^layers, 2]`, (column, row) in the input of the first layer. Between layers, samples go to the nearest pixel;
        those outside of the map stand for the nearest one in it.
    """
    samples = np.asarray(cell, float)[None]
    for positions in reversed(layers):
        h, w = positions.shape[:2]
        column, row = (np.clip(np.round(samples[:, i]), 0, n - 1).astype(int) for i, n in enumerate((w, h)))
        samples = positions[row, column].reshape(-1, 2)
    return samples


def _strides(detector: Detector, number: int) -> list[tuple[int, int]]:
    """Pixels of the image between the cells of the input and of the output, of the last layers of C5."""
    config = detector.config.backbone
    inside = 16 if config.dilation else 32
    # A bottleneck's deformable convolution has the stage's stride in the first block; two 3x3 have it before.
    first = 16 if config.depth >= 50 else inside
    return [(first if number == DEPTH and i == 0 else inside, inside) for i in range(number)]


def plain_positions(shape: Sequence[int], stride: int, dilation: int) -> np.ndarray:
    """Where a 3x3 convolution with an output of that shape (h, w) samples: `[h, w, 9, 2]`, as `trace` takes it."""
    row, column = np.meshgrid(*map(np.arange, shape), indexing="ij")
    taps = dilation * np.stack(np.meshgrid((-1, 0, 1), (-1, 0, 1)), -1).reshape(-1, 2)
    return np.stack([column, row], -1)[:, :, None] * stride + taps
