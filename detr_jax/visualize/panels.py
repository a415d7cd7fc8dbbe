"""Panels of figures: parts of an image in rows, with heading, color bar and legend; boxes and crosses on them."""

from collections.abc import Sequence

import matplotlib
import numpy as np
from matplotlib import patheffects
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Colormap, LinearSegmentedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.text import Text
from PIL import Image

from detr_jax.drawing import class_color, font_file

Window = tuple[float, float, float, float]
"""x0, y0, x1, y1 in pixels of an image."""

INK = "0.15"
HEAT: Colormap = matplotlib.colormaps["inferno"]
HEAT_OVER_PHOTO = LinearSegmentedColormap.from_list(
    "heat over image", [(*HEAT(x)[:3], min(0.9, 1.6 * x)) for x in np.linspace(0, 1, 64)]
)
"""`HEAT`, transparent where it is low."""

# Inches.
_MARGIN, _GAP, _HEADING, _TITLE, _LEGEND, _BAR, _BAR_TEXT = 0.2, 0.14, 0.38, 0.27, 0.42, 0.15, 0.85


class Page(Figure):
    """A figure in which every text has a font with its letters, such as names of classes in any script."""

    def draw(self, renderer) -> None:
        for text in self.findobj(Text):
            if not str(text.get_text()).isascii():
                file = font_file(text.get_text(), bold=text.get_fontweight() == "bold")
                text.set_fontfamily(["DejaVu Sans", FontProperties(fname=file).get_name()])
        super().draw(renderer)


class Sheet:
    """A figure of blocks, one below the other. A block has a heading, panels in rows, a color bar and a legend.

    Args:
        headings: one for each block.
        windows: of a block's panels; those of several rows must have the same shape.
        columns: panels in a row.
        bar: leave room for a color bar.
        below: room below each panel, in inches.
    """

    def __init__(
        self,
        headings: Sequence[str],
        windows: Sequence[Window],
        columns: int,
        *,
        bar: bool = True,
        below: float = 0.0,
    ):
        ratios = [(x1 - x0) / (y1 - y0) for x0, y0, x1, y1 in windows]  # width to height
        rows = -(-len(windows) // columns)
        widest = sum(ratios[:columns])
        height = float(np.clip(10.5 / widest, 1.6, 4.4 if rows == 1 else 3.2))
        right = _BAR + _BAR_TEXT + _GAP if bar else 0.0
        width = 2 * _MARGIN + height * widest + _GAP * (columns - 1) + right
        width = max(width, *(0.5 + 0.092 * len(heading) for heading in headings), 6.5)
        block = _HEADING + rows * (height + _TITLE + below) + (rows - 1) * _GAP / 2 + _LEGEND
        total = block * len(headings) + 0.08
        self.figure = Page(figsize=(width, total), dpi=120)
        FigureCanvasAgg(self.figure)
        self.panels: list[list[Axes]] = []
        """Of each block."""
        self._bars: list[Axes | None] = []
        self._bottoms: list[float] = []
        self._size = width, total
        for i, heading in enumerate(headings):
            top = total - i * block
            self.figure.text(
                *(_MARGIN / width, (top - 0.12) / total), heading, fontsize=11.5, weight="bold", color=INK, va="top"
            )
            panels, x, y = [], _MARGIN, top - _HEADING
            for number, ratio in enumerate(ratios):
                if number and number % columns == 0:
                    x, y = _MARGIN, y - height - _TITLE - below - _GAP / 2
                panels.append(self._axes(x, y - _TITLE - height, height * ratio, height))
                x += height * ratio + _GAP
            self.panels.append(panels)
            bottom = top - block + _LEGEND
            self._bottoms.append(bottom)
            edge = _MARGIN + height * widest + _GAP * columns
            self._bars.append(self._axes(edge, bottom, _BAR, top - _HEADING - _TITLE - bottom) if bar else None)

    def _axes(self, x: float, y: float, width: float, height: float) -> Axes:
        w, h = self._size
        return self.figure.add_axes((x / w, y / h, width / w, height / h))

    def colorbar(self, block: int, norm: Normalize, colors: Colormap, label: str, *, extend: str = "neither") -> None:
        """Fills a block's color bar."""
        axes = self._bars[block]
        assert axes is not None
        bar = self.figure.colorbar(ScalarMappable(norm, colors), cax=axes, extend=extend)
        bar.set_label(label, fontsize=9, color=INK)
        bar.ax.tick_params(labelsize=8)

    def legend(self, block: int, handles: Sequence[Artist]) -> None:
        """A legend in one row below a block, in smaller letters where it would leave the page."""
        size, room = 9.0, self.figure.dpi * (self._size[0] - _MARGIN)
        while True:
            legend = self.figure.legend(
                handles=list(handles),
                loc="upper left",
                bbox_to_anchor=((_MARGIN - 0.1) / self._size[0], (self._bottoms[block] - 0.03) / self._size[1]),
                ncols=len(handles),
                fontsize=size,
                frameon=False,
                columnspacing=1.3,
                handletextpad=0.45,
                borderaxespad=0,
            )
            if size <= 5 or legend.get_window_extent().width <= room:
                break
            legend.remove()
            size -= 0.5


def whole(image: Image.Image) -> Window:
    """All of an image."""
    return 0.0, 0.0, float(image.width), float(image.height)


def show_image(axes: Axes, image: Image.Image, window: Window, title: str, *, gray: bool = False) -> None:
    """A part of an image, a little dull so that what is drawn on it stands out; `gray` for heat on top of it."""
    pixels = np.asarray(image.convert("RGB")).astype(np.float32) / 255
    mean = pixels.mean(-1, keepdims=True)
    pixels = np.broadcast_to(0.25 + 0.5 * mean, pixels.shape) if gray else 0.92 * (0.75 * pixels + 0.25 * mean)
    axes.imshow(pixels, extent=(0, image.width, image.height, 0), interpolation="bilinear")
    axes.set_facecolor("0.93")
    axes.set_xlim(window[0], window[2])
    axes.set_ylim(window[3], window[1])
    axes.set_aspect("equal")
    axes.set_xticks([])
    axes.set_yticks([])
    for side in axes.spines.values():
        side.set_color("0.4")
    axes.set_title(title, fontsize=9.5, color=INK, pad=4)


def show_heat(axes: Axes, values: np.ndarray, extent: Window) -> None:
    """Values in [0, 1], [y, x], over the image; the view stays as it is."""
    view = axes.get_xlim(), axes.get_ylim()
    x0, y0, x1, y1 = extent
    axes.imshow(
        values, cmap=HEAT_OVER_PHOTO, vmin=0, vmax=1, extent=(x0, x1, y1, y0), interpolation="nearest", zorder=2
    )
    axes.set_xlim(view[0])
    axes.set_ylim(view[1])


def add_box(axes: Axes, box_xyxy: np.ndarray, color, *, dashed: bool = False, width: float = 2.0) -> None:
    """A box with a dark edge."""
    x0, y0, x1, y1 = map(float, box_xyxy)
    edge = {"fill": False, "zorder": 3, "joinstyle": "miter"}
    if dashed:
        axes.add_patch(Rectangle((x0, y0), x1 - x0, y1 - y0, edgecolor="black", linewidth=width + 0.8, **edge))
        edge["linestyle"] = (0, (3, 2.5))
    box = Rectangle((x0, y0), x1 - x0, y1 - y0, edgecolor=color, linewidth=width, **edge)
    if not dashed:
        box.set_path_effects([patheffects.withStroke(linewidth=width + 1.4, foreground="black")])
    axes.add_patch(box)


def add_cross(axes: Axes, x: float, y: float, *, size: float = 11) -> None:
    """A white cross with a dark edge."""
    halo = [patheffects.withStroke(linewidth=3.4, foreground="black")]
    axes.plot(*([x], [y]), marker="+", color="white", markersize=size, markeredgewidth=1.8, path_effects=halo, zorder=5)


def add_text(axes: Axes, x: float, y: float, text: str, *, color: object = "white", size: float = 9) -> None:
    """Letters with a dark edge, centered; what is outside the view is not drawn."""
    halo = [patheffects.withStroke(linewidth=2.4, foreground="black")]
    axes.text(
        *(x, y, text), color=color, fontsize=size, ha="center", va="center", path_effects=halo, zorder=6, clip_on=True
    )


def line(label: str, color, *, dashed: bool = False) -> Line2D:
    """A legend's entry for a box."""
    return Line2D(
        [], [], color=color, linewidth=1.8 if dashed else 2.6, linestyle=(0, (3, 2)) if dashed else "-", label=label
    )


def cross(label: str) -> Line2D:
    """A legend's entry for a cross."""
    return Line2D([], [], marker="+", color=INK, linestyle="none", markersize=9, markeredgewidth=1.8, label=label)


def color_of(label: int) -> tuple[float, float, float]:
    """The color of a class, as in the pictures."""
    red, green, blue = class_color(int(label))
    return red / 255, green / 255, blue / 255
