"""A data set at a glance: images with their boxes."""

import numpy as np
from PIL import Image

from detr_jax.data.index import DatasetIndex
from detr_jax.drawing import contact_sheet, draw_detections
from detr_jax.visualize.mistakes import read_image


def contact_sheet_of(index: DatasetIndex, number: int = 12, *, width: int = 360) -> Image.Image:
    """Images spread evenly over a data set, each with its boxes and the names of their classes.

    Args:
        index: the data set.
        number: of images.
        width: of each, in pixels.
    """
    chosen = np.unique(np.linspace(0, len(index) - 1, min(number, len(index))).round().astype(int))
    pictures = []
    for i in chosen.tolist():
        image = read_image(index, i)
        factor = width / image.width
        image = image.resize((width, max(1, round(factor * image.height))), Image.Resampling.LANCZOS)
        pictures.append(draw_detections(image, factor * index.boxes_xyxy[i], index.labels[i], index.category_names))
    return contact_sheet(pictures, columns=4, width=width)
