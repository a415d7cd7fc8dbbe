"""Pictures of the image's own size, by Pillow: boxes with captions, ground truth beside detections."""

import colorsys
import functools
import math
import warnings
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont

Color = tuple[int, int, int]
Rectangle = tuple[float, float, float, float]

_INK, _PAPER = (28, 28, 28), (255, 255, 255)


def class_color(label: int) -> Color:
    """The color of a class, the same in every picture; classes with near labels differ most."""
    hue = (0.58 + label * (math.sqrt(5) - 1) / 2) % 1  # steps of the golden ratio spread any number of hues
    saturation, value = ((0.85, 1.0), (0.55, 1.0), (0.9, 0.8))[label // 8 % 3]
    red, green, blue = colorsys.hsv_to_rgb(hue, saturation, value)
    return round(255 * red), round(255 * green), round(255 * blue)


def draw_detections(
    image: Image.Image | np.ndarray,
    boxes_xyxy: np.ndarray,
    labels: np.ndarray,
    names: Sequence[str],
    scores: np.ndarray | None = None,
) -> Image.Image:
    """Draws boxes with captions on a copy of an image.

    Lines and letters grow with the image. A caption stays inside of it and off those of better boxes; where there is no
    room for it, it is left out (enlarge small images first). Where a class has many boxes, only its best one is named:
    the color tells the others.

    Args:
        image: an image; as an array uint8 [H, W, 3].
        boxes_xyxy: [n, 4] in its pixels.
        labels: int [n].
        names: label -> class name.
        scores: [n] in [0, 1]; without them captions are the names alone.

    Returns:
        An RGB picture of the image's size.
    """
    picture = _rgb(image).copy()
    boxes_xyxy, labels = np.asarray(boxes_xyxy, float).reshape(-1, 4), np.asarray(labels, int)
    draw = ImageDraw.Draw(picture)
    scale = math.sqrt(picture.width * picture.height)
    line = max(1, round(scale / 320))
    letter = max(10, round(scale / (38 if len(boxes_xyxy) <= 12 else 46)))
    # The best last, on top of the others.
    order = np.arange(len(labels))[::-1] if scores is None else np.argsort(scores, kind="stable")
    for i in order:
        # Of a box that the edge of the image cuts, the line is drawn along the edge.
        left, top, right, bottom = np.clip(boxes_xyxy[i], 0, [picture.width - 1, picture.height - 1] * 2)
        box = (left, top, max(left, right), max(top, bottom))
        draw.rectangle(_grown(box, 1), outline=(0, 0, 0), width=line + 2)
        draw.rectangle(box, outline=class_color(int(labels[i])), width=line)
    counts = np.bincount(labels, minlength=1) if len(labels) else np.zeros(1, int)
    named: set[int] = set()
    taken: list[Rectangle] = []
    for i in order[::-1]:
        label = int(labels[i])
        parts = [] if counts[label] > 8 and label in named else [_line(names[label])]
        named.add(label)
        if scores is not None:
            parts.append(f"{scores[i]:.2f}")
        if parts:
            text = " ".join(parts)
            _caption(draw, text, boxes_xyxy[i], class_color(label), _font(text, letter), picture.size, taken)
    return picture


def compare(
    image: Image.Image | np.ndarray,
    true_boxes_xyxy: np.ndarray,
    true_labels: np.ndarray,
    boxes_xyxy: np.ndarray,
    labels: np.ndarray,
    scores: np.ndarray,
    names: Sequence[str],
    *,
    threshold: float = 0.5,
    width: int = 720,
) -> Image.Image:
    """An image with its ground truth, beside the same with the detections, under headings that count each class.

    Args:
        image: an image; as an array uint8 [H, W, 3].
        true_boxes_xyxy: [t, 4] in its pixels.
        true_labels: int [t].
        boxes_xyxy: [n, 4] in its pixels.
        labels: int [n].
        scores: [n].
        names: label -> class name.
        threshold: detections with a lower score are left out.
        width: of one of the two panels, in pixels; the image is scaled to it.
    """
    picture = _rgb(image)
    factor = width / picture.width
    picture = picture.resize((width, max(1, round(factor * picture.height))), Image.Resampling.LANCZOS)
    shown = np.asarray(scores) >= threshold
    boxes_xyxy, labels, scores = np.asarray(boxes_xyxy)[shown], np.asarray(labels)[shown], np.asarray(scores)[shown]
    truth = draw_detections(picture, factor * np.asarray(true_boxes_xyxy), true_labels, names)
    found = draw_detections(picture, factor * boxes_xyxy, labels, names, scores)
    panels = [
        headed(truth, "ground truth", true_labels, names),
        headed(found, f"detections, score at least {threshold:g}", labels, names),
    ]
    return contact_sheet(panels, columns=2, width=width)


def contact_sheet(pictures: Sequence[Image.Image], *, columns: int = 2, width: int = 720, gap: int = 12) -> Image.Image:
    """Pictures in rows of `columns`, each scaled to `width` pixels, with `gap` pixels of white between and around.

    Raises:
        ValueError: there is no picture.
    """
    if not pictures:
        raise ValueError("contact_sheet: got no pictures, expected at least one")
    scaled = [
        p
        if p.width == width
        else p.resize((width, max(1, round(p.height * width / p.width))), Image.Resampling.LANCZOS)
        for p in map(_rgb, pictures)
    ]
    rows = [scaled[i : i + columns] for i in range(0, len(scaled), columns)]
    heights = [max(picture.height for picture in row) for row in rows]
    columns = len(rows[0])
    sheet = Image.new("RGB", (columns * (width + gap) + gap, sum(heights) + gap * (len(rows) + 1)), _PAPER)
    top = gap
    for row, height in zip(rows, heights, strict=True):
        for column, picture in enumerate(row):
            sheet.paste(picture, (gap + column * (width + gap), top))
        top += height + gap
    return sheet


def _rgb(image: Image.Image | np.ndarray) -> Image.Image:
    return (image if isinstance(image, Image.Image) else Image.fromarray(np.asarray(image))).convert("RGB")


def _font(text: str, size: int, bold: bool = False) -> ImageFont.FreeTypeFont:
    """A font that has the letters of a text."""
    return ImageFont.truetype(font_file(text, bold), size)


@functools.lru_cache(maxsize=1000)
def font_file(text: str, bold: bool = False) -> str:
    """The file of a font that has the letters of a text.

    DejaVu, which matplotlib carries, so that pictures look the same everywhere; for scripts that it lacks (Chinese,
    Thai, ...) a font of the system, of those that matplotlib's font manager finds. Fonts for all scripts have tens of
    megabytes, too many to carry; who has names in a script usually has a font for it.
    """
    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    default = str(folder / ("DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"))
    letters = frozenset(ord(letter) for letter in text if not letter.isspace())
    if letters <= _letters(default):
        return default
    from matplotlib.font_manager import fontManager

    # Upright ones of normal weight first; the order is that of names, not that of the disk.
    fonts = sorted(fontManager.ttflist, key=lambda f: (f.style != "normal", f.weight not in (400, "normal"), f.name))
    best = max([default, *(font.fname for font in fonts)], key=lambda path: len(letters & _letters(path)))
    if missing := letters - _letters(best):
        warnings.warn(
            f"no font on this machine has the letter {chr(min(missing))!r} of {text!r}: it is drawn as a box; install "
            "one that has it, such as those of the Debian packages fonts-noto and fonts-noto-cjk",
            stacklevel=2,
        )
    return best


@functools.cache
def _letters(path: str) -> frozenset[int]:
    """The characters that a font has."""
    from matplotlib.ft2font import FT2Font

    try:
        return frozenset(FT2Font(path).get_charmap())
    except (OSError, RuntimeError):  # removed since the font manager looked, or of a format that it does not read
        return frozenset()


def _line(name: str) -> str:
    """A name on one line, as Pillow measures text."""
    return " ".join(str(name).split())


def _grown(box: Rectangle, by: float) -> Rectangle:
    return box[0] - by, box[1] - by, box[2] + by, box[3] + by


def _overlap(a: Rectangle, b: Rectangle) -> float:
    """Area that two rectangles share."""
    return max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))


def _caption(
    draw: ImageDraw.ImageDraw,
    text: str,
    box_xyxy: np.ndarray,
    color: Color,
    font: ImageFont.FreeTypeFont,
    size: tuple[int, int],
    taken: list[Rectangle],
) -> None:
    """Writes a caption at the first free corner of its box, inside the picture, if any; notes in `taken` where."""
    pad = max(1, round(font.size / 6))
    while draw.textlength(text, font) + 2 * pad > size[0] and len(text) > 2:
        text = text.rstrip("…")[:-1] + "…"
    width, height = math.ceil(draw.textlength(text, font)) + 2 * pad, sum(font.getmetrics()) + pad
    left, top, right, bottom = (float(side) for side in box_xyxy)
    corners = [
        (left, top - height),  # on top of the box
        (left, top),
        (right - width, top - height),
        (right - width, top),
        (left, bottom),  # below it
        (left, bottom - height),
        (right - width, bottom),
        (right - width, bottom - height),
    ]
    places = []
    for x, y in corners:
        x, y = min(max(x, 0), size[0] - width), min(max(y, 0), size[1] - height)
        places.append((x, y, x + width, y + height))
    overlaps = [sum(_overlap(place, other) for other in taken) for place in places]
    best = int(np.argmin(overlaps))
    place = places[best]
    if overlaps[best] > 0.3 * width * height:
        return
    taken.append(place)
    bright = 0.299 * color[0] + 0.587 * color[1] + 0.114 * color[2] > 130
    draw.rectangle(place, fill=color)
    draw.text((place[0] + pad, place[1] + pad / 2), text, (0, 0, 0) if bright else (255, 255, 255), font)


def headed(picture: Image.Image, title: str, labels: np.ndarray, names: Sequence[str]) -> Image.Image:
    """A picture under its title and a legend: each class that is in it, with its color and number of boxes."""
    labels = np.asarray(labels, int)
    keys = [
        (int(label), f"{_line(names[int(label)])} {count}")
        for label, count in zip(*np.unique(labels, return_counts=True), strict=True)
    ]
    big = _font(title, max(11, picture.width // 36), bold=True)
    small = _font(" ".join(text for _, text in keys), max(10, picture.width // 44))
    row = round(1.5 * small.size)
    # Lay the key out first: it says how high the heading is.
    x, y, places = 0.0, round(1.6 * big.size), []
    for label, text in keys:
        width = row + small.getlength(text) + small.size
        if x and x + width > picture.width:
            x, y = 0.0, y + row
        places.append((x, y, label, text))
        x += width
    page = Image.new("RGB", (picture.width, picture.height + y + row), _PAPER)
    draw = ImageDraw.Draw(page)
    draw.text((0, 0), title, _INK, big)
    for x, y, label, text in places:
        draw.rectangle((x, y + 0.15 * small.size, x + small.size, y + 1.15 * small.size), class_color(label), _INK)
        draw.text((x + row, y), text, _INK, small)
    page.paste(picture, (0, page.height - picture.height))
    return page
