"""What is in a data set, in lines: images, boxes of each class and size, classes without boxes, problems."""

from collections.abc import Mapping

import numpy as np

from detr_jax.data.index import DatasetIndex

_SMALL, _LARGE = 32**2, 96**2  # COCO's bounds of areas, in pixels


def summarize(sets: Mapping[str, DatasetIndex]) -> str:
    """A table for each set, by its name."""
    return "\n\n".join(f"{name}\n{_describe(index)}" for name, index in sets.items())


def _describe(index: DatasetIndex) -> str:
    counts = np.zeros((index.num_classes, 4), int)  # images, small, medium, large
    for boxes, labels in zip(index.boxes_xyxy, index.labels, strict=True):
        areas = (boxes[:, 2:] - boxes[:, :2]).prod(1)
        sizes = 1 + (areas >= _SMALL).astype(int) + (areas > _LARGE)
        np.add.at(counts, (labels, sizes), 1)
        counts[np.unique(labels), 0] += 1
    low, high = index.sizes.min(0), index.sizes.max(0)
    per_image = [len(labels) for labels in index.labels]
    lines = [
        f"  {line}"
        for line in (
            *index.report,
            f"images of {low[0]}x{low[1]} to {high[0]}x{high[1]} (height x width), {np.mean(per_image):.1f} boxes per "
            f"image, at most {max(per_image)}",
        )
    ]
    width = max(5, *(len(name) for name in index.category_names))
    lines.append(
        f"  {'id':>6}  {'class':<{width}}  {'images':>7}  {'boxes':>7}  {'small':>7}  {'medium':>7}  {'large':>7}"
    )
    for row in np.argsort(-counts[:, 1:].sum(1), kind="stable"):
        images, *sizes = counts[row].tolist()
        cells = "  ".join(f"{number:>7}" for number in (images, sum(sizes), *sizes))
        lines.append(f"  {index.category_ids[row]:>6}  {index.category_names[row]:<{width}}  {cells}")
    empty = [index.category_names[i] for i in np.flatnonzero(counts[:, 0] == 0)]
    if empty:
        listed = f"{', '.join(empty[:10])}{', ...' * (len(empty) > 10)}"
        lines.append(f"  {len(empty)} classes without boxes, whose outputs are never trained to detect: {listed}")
    return "\n".join(lines)
