"""Pixels made on the device against Pillow, on real images."""

import functools

import jax
import numpy as np
import pytest
from PIL import Image

from detr_jax.data.resample import IMAGENET_MEAN, IMAGENET_STD, resample

# Pillow rounds after its horizontal and after its vertical pass, half a gray level each; `resample` does not. So one
# resize differs by at most one gray level, two by at most two (each averages the error of the one before), plus the
# 22-bit fixed point of Pillow's weights and float32: less than 0.01.
ONE_RESIZE, TWO_RESIZES = 1.01, 2.01

run = jax.jit(resample, static_argnames=("bucket", "two_resizes", "max_crop", "only_flip"))


@functools.cache
def open_images(folder) -> list[Image.Image]:
    return [Image.open(path).convert("RGB") for path in sorted(folder.glob("coco_open/*/*.jpg"))]


@pytest.fixture(scope="module")
def real(data_dir):
    images = open_images(data_dir)
    assert len(images) == 16
    return images


def batch(images: list[Image.Image], bucket=(640, 640), junk=0):
    pixels = np.full([len(images), *bucket, 3], junk, np.uint8)
    for row, image in zip(pixels, images, strict=True):
        row[: image.height, : image.width] = np.asarray(image)
    return pixels, np.array([[image.height, image.width] for image in images], np.int32)


def whole(sizes):
    return np.concatenate([np.zeros_like(sizes), sizes], -1)


def gray_levels(image, size) -> np.ndarray:
    image = np.asarray(image)
    assert image.dtype == np.float32
    assert (image[size[0] :] == 0).all() and (image[:, size[1] :] == 0).all()  # padding
    return image[: size[0], : size[1]] * 255 * IMAGENET_STD + 255 * IMAGENET_MEAN


def mirrored(image: Image.Image, flip: bool) -> Image.Image:
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flip else image


@pytest.mark.parametrize("short", [800, 480, 200, 75])  # up, about the same, down
@pytest.mark.parametrize("two_resizes", [False, True])
def test_one_resize_is_pillows(real, short, two_resizes):
    images = real[:4]
    pixels, source = batch(images, junk=77)  # what is outside of an image does not leak in
    size = np.array([[short, short * 4 // 3], [short * 3 // 2, short], [short, short], [short, short + 9]], np.int32)
    flip = np.array([False, True, True, False])
    bucket = (short * 3 // 2, short * 4 // 3)
    result = run(pixels, source, flip, source, whole(source), size, bucket=bucket, two_resizes=two_resizes)
    for row, image in enumerate(images):
        expected = mirrored(image, flip[row]).resize(size[row, ::-1].tolist(), Image.Resampling.BILINEAR)
        difference = np.abs(gray_levels(result[row], size[row]) - np.asarray(expected, np.float32))
        assert difference.max() <= ONE_RESIZE


def test_every_photo_at_the_evaluation_scale(real):
    for start in range(0, 16, 4):
        images = real[start : start + 4]
        pixels, source = batch(images)
        size = np.round(source * (300 / source.min(1, keepdims=True))).astype(np.int32)
        result = run(
            pixels, source, np.zeros(4, bool), source, whole(source), size, bucket=(640, 640), two_resizes=False
        )
        for row, image in enumerate(images):
            expected = image.resize(size[row, ::-1].tolist(), Image.Resampling.BILINEAR)
            difference = np.abs(gray_levels(result[row], size[row]) - np.asarray(expected, np.float32))
            assert difference.max() <= ONE_RESIZE


@pytest.mark.parametrize("first", [400, 600])
def test_crop_branch_is_pillows(real, first):
    rng = np.random.default_rng(first)
    images = real[4:8]
    pixels, source = batch(images)
    resized = (source * (first / source.min(1, keepdims=True))).astype(np.int32)
    crop_size = rng.integers(384, np.minimum(resized, 600), endpoint=True)
    corner = rng.integers(0, resized - crop_size, endpoint=True)
    crop = np.concatenate([corner, crop_size], -1).astype(np.int32)
    size = (crop_size * rng.uniform(0.4, 1.6, (4, 1))).astype(np.int32)
    flip = np.array([True, False, True, False])
    result = run(pixels, source, flip, resized, crop, size, bucket=(960, 960), two_resizes=True)
    for row, image in enumerate(images):
        top, left, height, width = crop[row].tolist()
        small = mirrored(image, flip[row]).resize(resized[row, ::-1].tolist(), Image.Resampling.BILINEAR)
        cut = small.crop((left, top, left + width, top + height))
        expected = cut.resize(size[row, ::-1].tolist(), Image.Resampling.BILINEAR)
        difference = np.abs(gray_levels(result[row], size[row]) - np.asarray(expected, np.float32))
        assert difference.max() <= TWO_RESIZES


def test_crop_without_a_change_of_scale_is_exact(real):
    """A first resize to the same size, and a crop that is not resized, leave the pixels as they are."""
    pixels, source = batch(real[:1])
    crop = np.array([[11, 7, 300, 256]], np.int32)
    result = run(
        pixels, source, np.zeros(1, bool), source, crop, crop[:, 2:], bucket=(320, 256), two_resizes=True, max_crop=300
    )
    # float32: normalization and back
    np.testing.assert_allclose(
        gray_levels(result[0], (300, 256)), pixels[0, 11:311, 7:263].astype(np.float32), atol=1e-4
    )


def test_only_flip_equals_the_general_path(real):
    image = real[0].resize((320, 240))
    pixels, source = batch([image, image], bucket=(240, 320))
    args = (pixels, source, np.array([False, True]), source, whole(source), source)
    quick = run(*args, bucket=(240, 320), two_resizes=False, only_flip=True)
    general = run(*args, bucket=(240, 320), two_resizes=False)
    np.testing.assert_allclose(quick, general, atol=1e-5)  # float32 of values up to 2.6
    with pytest.raises(ValueError, match="only_flip"):
        run(*args, bucket=(256, 320), two_resizes=False, only_flip=True)


def test_padding_rows_are_finite():
    one = np.ones([1, 2], np.int32)
    pixels = np.zeros([1, 64, 64, 3], np.uint8)
    for two_resizes in (False, True):
        result = run(
            pixels, one, np.zeros(1, bool), one, whole(one), one, bucket=(32, 64), two_resizes=two_resizes, max_crop=8
        )
        assert np.isfinite(result).all()
        np.testing.assert_allclose(result[0, 0, 0], -IMAGENET_MEAN / IMAGENET_STD, rtol=1e-6)
