"""Image files: what their header says, and their pixels as RGB uint8.

Pixels are those of the official code, `PIL.Image.open(path).convert("RGB")`, with two repairs. A file whose annotated
size is that of its EXIF-rotated image is rotated (the official code would train on boxes that do not fit), and 16-bit
grayscale is scaled by 1/257 to 8 bits (Pillow clips it to white).
"""

import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from detr_jax.data.transforms import resize_size
from detr_jax.errors import DataError, NotFoundError, UserError

_ORIENTATION = 0x0112  # EXIF tag
_END = {"JPEG": b"\xff\xd9", "PNG": b"IEND\xaeB`\x82"}


class Header(NamedTuple):
    """What the header of an image file tells."""

    size: tuple[int, int]
    """(h, w) as stored."""
    rotated: bool
    """EXIF asks for a quarter turn, so that the upright size is (w, h)."""
    plain: bool
    """A complete RGB or grayscale JPEG, which any JPEG decoder turns into the same RGB pixels."""


def read_header(file: BinaryIO) -> Header:
    """Reads the header of an image, and decodes all of it only where its end does not show that it is complete.

    Raises:
        OSError: not an image, or truncated.
        ValueError, SyntaxError: broken, or of a mode that has no RGB.
    """
    image = Image.open(file)
    end = _END.get(image.format or "", b"")
    position = file.tell()
    file.seek(-len(end), io.SEEK_END)
    complete = bool(end) and file.read() == end
    file.seek(position)
    if not complete:
        image.load()  # raises if it is truncated
    if image.mode == "F":
        raise ValueError(f"mode {image.mode}: floats have no RGB; expected 8-bit or 16-bit pixels")
    plain = complete and image.format == "JPEG" and image.mode in ("L", "RGB")
    return Header((image.height, image.width), _quarter_turn(image), plain)


def decode(encoded: bytes, size: tuple[int, int], source_size: tuple[int, int], name: str) -> np.ndarray:
    """Decodes an image file, upright as annotated, and shrinks it when it is larger than wanted.

    Args:
        encoded: content of the file.
        size: annotated (h, w).
        source_size: wanted (h, w); not larger than `size`.
        name: path or key, for the error.

    Returns:
        uint8 [h, w, 3] of `source_size`.

    Raises:
        DataError: the file does not decode, or not to the annotated size.
    """
    try:
        image = Image.open(io.BytesIO(encoded))
        stored = (image.height, image.width)
        rotate = stored != size and stored[::-1] == size and _quarter_turn(image)
        if stored != size and not rotate:
            raise ValueError(f"size (h, w): got {stored}, expected the annotated {size}")
        height, width = source_size
        if source_size != size:  # let the JPEG decoder do the first halvings
            image.draft(None, (2 * height, 2 * width) if rotate else (2 * width, 2 * height))
        if rotate:
            image = ImageOps.exif_transpose(image)
        image = _to_rgb(image)
        if image.size != (width, height):
            image = image.resize((width, height), Image.Resampling.BILINEAR, reducing_gap=2.0)
        return np.asarray(image)
    except (OSError, ValueError, SyntaxError) as error:  # Pillow reports broken PNGs as SyntaxError
        raise DataError(f"{name}: {error}") from error


def _quarter_turn(image: Image.Image) -> bool:
    return image.getexif().get(_ORIENTATION, 1) in (5, 6, 7, 8)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16-bit grayscale: "I;16", "I;16B", or "I"
        pixels = np.asarray(image)
        if pixels.min() < 0 or pixels.max() > 65535:
            raise ValueError(f"mode {image.mode}: got values {pixels.min()}..{pixels.max()}, expected 0..65535")
        image = Image.fromarray(((pixels.astype(np.uint32) + 128) // 257).astype(np.uint8))
    return image if image.mode == "RGB" else image.convert("RGB")


ImageLike = Image.Image | np.ndarray | str | os.PathLike[str]


def open_image(image: ImageLike) -> Image.Image:
    """An image as an upright RGB image of Pillow."""
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim not in (2, 3) or (image.ndim == 3 and image.shape[2] != 3):
            raise UserError(
                f"an image as an array must be uint8 [h, w, 3] (RGB) or [h, w] (gray), got {image.dtype} "
                f"{list(image.shape)}"
            )
        return Image.fromarray(image).convert("RGB")
    if isinstance(image, str | os.PathLike):
        if not Path(image).is_file():
            raise NotFoundError(f"{image}: no such image")
        try:
            with Image.open(image) as opened:
                return ImageOps.exif_transpose(opened).convert("RGB")
        except (UnidentifiedImageError, OSError, SyntaxError) as error:
            raise UserError(f"{image}: not an image, or a damaged one: {error}") from error
    return ImageOps.exif_transpose(image).convert("RGB")


def fit_size(orig: np.ndarray, scale: int, max_size: int) -> np.ndarray:
    """(h, w) to which an image of that (h, w) is resized; the official rounding, but never beyond `max_size`."""
    return np.minimum(resize_size(orig, scale, max_size), max_size)


def pad_to_bucket(
    batch: Sequence[tuple[Image.Image, np.ndarray]], bucket: tuple[int, int], batch_size: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Images, each resized to its (h, w), on buckets.

    Returns:
        pixels uint8 [b, H, W, 3], sizes int32 [b, 2] and the images' own sizes int32 [b, 2]; rows that are left over
        hold an empty image.
    """
    pixels = np.zeros((batch_size, *bucket, 3), np.uint8)
    sizes, orig_sizes = np.ones((2, batch_size, 2), np.int32) * 32
    for i, (image, (h, w)) in enumerate(batch):
        pixels[i, :h, :w] = np.asarray(image.resize((int(w), int(h)), Image.Resampling.BILINEAR))
        sizes[i], orig_sizes[i] = (h, w), (image.height, image.width)
    return pixels, sizes, orig_sizes
