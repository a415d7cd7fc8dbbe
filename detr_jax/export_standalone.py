"""Runs a detector that `detr_jax.export` wrote; needs jax, flatbuffers, numpy, pillow and simplejpeg, not detr_jax.

    $ python detector.zip photo.jpg ...

or, from a program, with `detector.zip` on `sys.path`:

    import exported
    detector = exported.ExportedDetector("detector.zip")
    for found in detector("photo.jpg"): print(found["name"], found["score"], found["box_xyxy"])
"""

import io
import json
import os
import sys
import zipfile
from typing import Any

import jax
import numpy as np
from jax import export

from detr_jax.data.image import ImageLike, open_image, resize
from detr_jax.data.transforms import resize_size
from detr_jax.errors import UserError


class ExportedDetector:
    """A detector in a file.

    Args:
        path: of the file.

    Attributes:
        about: what the file says of itself: `bucket`, `scale`, `category_names`, ...
        detect: `detect(weights, pixels, sizes, orig_sizes)` with uint8 `[b, H, W, 3]` and int32 `[b, 2]`, (h, w) of the
            images on the bucket and as they were -> scores `[b, n]`, labels `[b, n]`, boxes_xyxy `[b, n, 4]` in pixels
            as they were.
    """

    def __init__(self, path: str | os.PathLike[str]):
        with zipfile.ZipFile(path) as archive:
            self.about: dict[str, Any] = json.loads(archive.read("about.json"))
            self.detect = jax.jit(export.deserialize(bytearray(archive.read("detect.stablehlo"))).call)
            arrays = np.load(io.BytesIO(archive.read("weights.npz")))
            self.weights = jax.device_put([arrays[f"arr_{i}"] for i in range(len(arrays.files))])

    def __call__(self, image: ImageLike, threshold: float = 0.5) -> list[dict[str, Any]]:
        """Detections in an image, best first: `name`, `category_id`, `score`, `box_xyxy` in pixels of the image."""
        opened = open_image(image)
        height, width = self.about["bucket"]
        size = resize_size(np.array([opened.height, opened.width]), self.about["scale"], self.about["max_size"])
        fitting = min(1.0, height / size[0], width / size[1])
        h, w = (max(1, int(side * fitting + 1e-4)) for side in size)
        pixels = np.zeros((self.about["batch"], height, width, 3), np.uint8)
        pixels[0, :h, :w] = np.asarray(resize(opened, (h, w), self.about["max_source_side"]))
        sizes, orig_sizes = np.full((2, self.about["batch"], 2), 32, np.int32)
        sizes[0], orig_sizes[0] = (h, w), (opened.height, opened.width)
        scores, labels, boxes = (np.asarray(x)[0] for x in self.detect(self.weights, pixels, sizes, orig_sizes))
        boxes = np.clip(boxes, 0, [opened.width, opened.height] * 2)
        order = [i for i in np.argsort(-scores, kind="stable") if scores[i] >= threshold]
        names, ids = self.about["category_names"], self.about["category_ids"]
        return [
            {
                "name": names[labels[i]],
                "category_id": ids[labels[i]],
                "score": float(scores[i]),
                "box_xyxy": boxes[i].tolist(),
            }
            for i in order
        ]


def main() -> None:
    """`python detector.zip photo.jpg ...`: prints the detections of images."""
    if len(sys.argv) < 2:
        sys.exit(f"usage: python {sys.argv[0]} photo.jpg ...")
    detector = ExportedDetector(sys.argv[0])
    for image in sys.argv[1:]:
        print(image)
        try:
            detections = detector(image)
        except UserError as error:
            sys.exit(f"error: {error}")
        for found in detections:
            print(f"  {found['name']:<16} {found['score']:.3f}  {[round(x) for x in found['box_xyxy']]}")
