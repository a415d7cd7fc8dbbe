"""What a backbone's convolutions sample: tracing by hand, and the figure of a detector."""

import numpy as np
import pytest
import tiny
import transformers_weights
from PIL import Image

from detr_jax.categories import Categories
from detr_jax.config import BackboneConfig, DeformableDETRConfig
from detr_jax.detector import Detector, Loaded
from detr_jax.visualize.convolution_figures import convolution_figure, plain_positions, trace


def detector(**backbone):
    """With random weights."""
    config = DeformableDETRConfig(
        backbone=BackboneConfig(depth=18, **backbone),
        num_classes=3,
        hidden_dim=32,
        num_heads=4,
        encoder_layers=1,
        decoder_layers=1,
        ffn_dim=32,
        num_queries=9,
        num_levels=1,
    )
    model = transformers_weights.load(config, transformers_weights.random_weights(config))
    return Detector(Loaded(config, model, Categories.contiguous({1: "a", 2: "b", 3: "c"}), "focal", 64, 96, ""))


def test_two_plain_convolutions_see_five_pixels():
    samples = trace([plain_positions((9, 9), 1, 1)] * 2, np.array([4, 5]))
    places, counts = np.unique(samples, axis=0, return_counts=True)
    expected = np.stack(np.meshgrid(np.arange(2, 7), np.arange(3, 8), indexing="ij"), -1).reshape(-1, 2)
    np.testing.assert_array_equal(places, expected)
    np.testing.assert_array_equal(counts.reshape(5, 5), np.outer([1, 2, 3, 2, 1], [1, 2, 3, 2, 1]))


def test_stride_and_dilation():
    samples = trace([plain_positions((4, 4), 2, 1), plain_positions((4, 4), 1, 2)], np.array([2, 2]))
    assert np.unique(samples[:, 0]).tolist() == [-1, 0, 1, 3, 4, 5, 6, 7]  # of columns 0, 2 and 3, as 4 is outside


def test_offsets_are_followed():
    """One tap each: two to the right, then to the nearest pixel, then half a pixel up."""
    first, last = np.zeros((3, 5, 1, 2)), np.zeros((3, 5, 1, 2))
    column, row = np.meshgrid(np.arange(5), np.arange(3))
    first[..., 0, :] = np.stack([column, row - 0.5], -1)
    last[..., 0, :] = np.stack([column + 1.8, row], -1)
    np.testing.assert_array_equal(trace([first, last], np.array([1, 2])), [[3, 1.5]])


def test_a_plain_backbone_is_refused():
    with pytest.raises(ValueError, match="no deformable convolutions"):
        convolution_figure(detector(), Image.new("RGB", (80, 60)), (10, 10))


@pytest.mark.slow
def test_figure():
    """Three panels: plain, deformable with its random offsets, attention."""
    image = next((tiny.DATA / "bccd/images").glob("*.jpg"))
    figure = convolution_figure(detector(deform_version=2), image, (100, 80))
    points = [axes.collections[0].get_offsets() for axes in figure.axes]
    assert [len(z) for z in points] == [81, 81, 16]
    assert not np.allclose(points[0], points[1])
