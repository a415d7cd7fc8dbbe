"""The one decoder of images: any file, bytes, array or Pillow image -> upright RGB pixels of 8 bits.

Training, evaluation, `Detector`, predictions, figures and exported detectors all read images here (an exported detector
carries a copy of this file), so an image has the same pixels everywhere:

- Upright: turned as EXIF's orientation says.
- Palettes, grayscale, CMYK and alpha become RGB as Pillow's `convert("RGB")` does it: alpha is dropped, not blended.
- 16-bit grayscale is scaled by 1/257 (Pillow clips it to white).
- JPEG is decoded by libjpeg-turbo without Pillow between, since Pillow hides what libjpeg warns of: a file that was cut
  in the middle decodes half gray. Here every warning counts as damage. Pixels of intact files are Pillow's.
- Images with a longer side than `max_source_side` are first shrunk to that, then resized.
"""

import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple, Protocol

import numpy as np
import simplejpeg
from PIL import Image, ImageOps

from detr_jax.data.transforms import shrink_size
from detr_jax.errors import NotFoundError, UserError

MAX_SOURCE_SIDE = 1333
"""Longest side, in pixels, to which larger images are shrunk before they are resized, where no config says another."""


class SupportsArray(Protocol):
    """An array of NumPy, JAX or another library."""

    def __array__(self, *args: Any, **kwargs: Any) -> np.ndarray:
        """The array as NumPy's."""
        ...


ImageLike = Image.Image | SupportsArray | str | os.PathLike[str] | bytes | bytearray | memoryview | IO[bytes]
"""An image: a Pillow image, an array (uint8 [h, w, 3] RGB or [h, w] gray), a path, the content of an image file, or an
image file opened for reading bytes."""

_ORIENTATION = 0x0112  # EXIF tag
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_END = {"JPEG": b"\xff\xd9", "PNG": b"IEND\xaeB`\x82"}


class Header(NamedTuple):
    """What the header of an image file tells."""

    size: tuple[int, int]
    """(h, w) when upright."""
    turned: bool
    """Whether EXIF's orientation turns or mirrors it."""


def read_header(file: IO[bytes], name: str) -> Header:
    """Reads the header of an image, and decodes all of it only where its end does not show that it is complete.

    Raises:
        UserError: not an image, truncated, damaged, too large, or of a mode that has no RGB; names it.
    """
    try:
        image = Image.open(file)
        orientation = image.getexif().get(_ORIENTATION, 1)
        # Pillow turns TIFF files itself, and gives the size that they have then.
        quarter = orientation in (5, 6, 7, 8) and image.format != "TIFF"
        size = (image.width, image.height) if quarter else (image.height, image.width)
        end = _END.get(image.format or "", b"")
        file.seek(-len(end), io.SEEK_END)
        complete = bool(end) and file.read() == end
        file.seek(0)
        if complete and image.mode != "F":
            return Header(size, orientation in _TURNS)
    except Exception as error:
        raise _damaged(name, error) from error
    decode(file.read(), name)
    return Header(size, orientation in _TURNS)


def decode(encoded: bytes, name: str) -> Image.Image:
    """Decodes the content of an image file: upright, RGB.

    Args:
        encoded: content of the file.
        name: path or key, for the error.

    Raises:
        UserError: not an image, truncated, damaged, too large, or of a mode that has no RGB; names it.
    """
    try:
        image = Image.open(io.BytesIO(encoded))
        if image.format in ("JPEG", "MPO"):
            # Raises for what libjpeg warns of. Pillow converts CMYK, which is not decoded to RGB there.
            pixels = simplejpeg.decode_jpeg(encoded, "CMYK" if image.mode == "CMYK" else "RGB")
            if image.mode != "CMYK":
                turn = _TURNS.get(image.getexif().get(_ORIENTATION, 1))
                upright = Image.fromarray(pixels)
                return upright if turn is None else upright.transpose(turn)
        return _upright_rgb(image)
    except Exception as error:
        raise _damaged(name, error) from error


def is_image(value: Any) -> bool:
    """Whether a value stands for one image, and not for several."""
    kinds = Image.Image | str | os.PathLike | bytes | bytearray | memoryview
    return isinstance(value, kinds) or hasattr(value, "read") or hasattr(value, "__array__")


def open_image(image: ImageLike) -> Image.Image:
    """An image, however it is given, as an upright RGB image of Pillow.

    Raises:
        NotFoundError: no such file.
        UserError: a file that is no image or damaged, an array of another shape or type, or something else altogether.
    """
    if isinstance(image, str | os.PathLike):
        if not Path(image).is_file():
            raise NotFoundError(f"{os.fspath(image)}: no such image")
        return decode(Path(image).read_bytes(), os.fspath(image))
    if isinstance(image, bytes | bytearray | memoryview):
        return decode(bytes(image), "image given as bytes")
    if isinstance(image, Image.Image):
        try:
            return _upright_rgb(image)
        except Exception as error:
            raise _damaged(str(getattr(image, "filename", "") or "image"), error) from error
    if hasattr(image, "read"):
        file: Any = image
        content = file.read()
        if not isinstance(content, bytes):
            raise UserError(f"image: got a file opened as text, expected open(path, 'rb'): {image!r}")
        return decode(content, str(getattr(image, "name", "image given as an open file")))
    if not hasattr(image, "__array__"):
        raise UserError(
            f"image: got {type(image).__name__}, expected a path, an array, a Pillow image, bytes or an open file"
        )
    pixels: np.ndarray = np.asarray(image)
    if pixels.dtype != np.uint8 or pixels.ndim not in (2, 3) or pixels.shape[2:] not in ((), (3,)) or not pixels.size:
        raise UserError(
            f"an image as an array must be uint8 [h, w, 3] (RGB) or [h, w] (gray), got {pixels.dtype} "
            f"{list(pixels.shape)}"
        )
    return Image.fromarray(pixels).convert("RGB")


def shrink(image: Image.Image, size: Sequence[int]) -> Image.Image:
    """An image shrunk to (h, w) of `shrink_size`; itself if it has that size."""
    h, w = (int(side) for side in size)
    if image.size == (w, h):
        return image
    return image.resize((w, h), Image.Resampling.BILINEAR, reducing_gap=2.0)


def resize(image: Image.Image, size: Sequence[int], max_source_side: int) -> Image.Image:
    """An image resized to (h, w) as those of a data set are: shrunk to `max_source_side` first, if it is larger."""
    h, w = (int(side) for side in size)
    image = shrink(image, shrink_size(np.array([image.height, image.width]), max_source_side).tolist())
    return image.resize((w, h), Image.Resampling.BILINEAR)


def pad_to_bucket(
    batch: Sequence[tuple[Image.Image, np.ndarray]], bucket: tuple[int, int], batch_size: int, max_source_side: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Images, each resized to its (h, w), on buckets.

    Returns:
        pixels uint8 [b, H, W, 3], sizes int32 [b, 2] and the images' own sizes int32 [b, 2]; rows that are left over
        hold an empty image.
    """
    pixels = np.zeros((batch_size, *bucket, 3), np.uint8)
    sizes, orig_sizes = np.ones((2, batch_size, 2), np.int32) * 32
    for i, (image, (h, w)) in enumerate(batch):
        pixels[i, :h, :w] = np.asarray(resize(image, (h, w), max_source_side))
        sizes[i], orig_sizes[i] = (h, w), (image.height, image.width)
    return pixels, sizes, orig_sizes


def _upright_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F":
        raise ValueError("mode F: floats have no RGB; expected pixels of 8 or 16 bits")
    image.load()
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # 16-bit grayscale: "I;16", "I;16B", or "I"
        pixels = np.asarray(image)
        if pixels.min() < 0 or pixels.max() > 65535:
            raise ValueError(f"mode {image.mode}: got values {pixels.min()}..{pixels.max()}, expected 0..65535")
        image = Image.fromarray(((pixels.astype(np.uint32) + 128) // 257).astype(np.uint8))
    return image if image.mode == "RGB" else image.convert("RGB")


def _damaged(name: str, error: Exception) -> UserError:
    """What to say of a file that does not decode. Decoders raise errors of many types on damaged files."""
    if isinstance(error, Image.DecompressionBombError):
        return UserError(f"{name}: too large: {error} Shrink it, or cut it into tiles.")
    return UserError(f"{name}: not an image, or a damaged one: {error}")
