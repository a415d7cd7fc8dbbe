"""COCO's twelve numbers of detections.

hotcoco computes them: the numbers of pycocotools to the last bit, which the tests verify, in a fiftieth of the time.
"""

import contextlib
import dataclasses
import io
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import hotcoco
import numpy as np
from etils.epath import Path

from detr_jax.data.coco import judge, read_annotations
from detr_jax.data.index import index_boxes, raise_or_skip
from detr_jax.errors import DataError, UserError

_NAMES = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")
_ROWS = (
    ("Average Precision", "AP", "0.50:0.95", "all", 100),
    ("Average Precision", "AP", "0.50", "all", 100),
    ("Average Precision", "AP", "0.75", "all", 100),
    ("Average Precision", "AP", "0.50:0.95", "small", 100),
    ("Average Precision", "AP", "0.50:0.95", "medium", 100),
    ("Average Precision", "AP", "0.50:0.95", "large", 100),
    ("Average Recall", "AR", "0.50:0.95", "all", 1),
    ("Average Recall", "AR", "0.50:0.95", "all", 10),
    ("Average Recall", "AR", "0.50:0.95", "all", 100),
    ("Average Recall", "AR", "0.50:0.95", "small", 100),
    ("Average Recall", "AR", "0.50:0.95", "medium", 100),
    ("Average Recall", "AR", "0.50:0.95", "large", 100),
)


@dataclasses.dataclass(frozen=True)
class Scores:
    """COCO's numbers for boxes, in [0, 1]; -1 where the ground truth has no such box."""

    AP: float
    """Average precision, mean over IoU 0.50:0.95."""
    AP50: float
    """AP at IoU 0.50."""
    AP75: float
    """AP at IoU 0.75."""
    APs: float
    """AP of small objects: area below 32^2 pixels."""
    APm: float
    """AP of medium objects."""
    APl: float
    """AP of large objects: area above 96^2 pixels."""
    AR1: float
    """Average recall with 1 detection per image."""
    AR10: float
    """Average recall with 10 detections per image."""
    AR100: float
    """Average recall with 100 detections per image."""
    ARs: float
    """AR100 of small objects."""
    ARm: float
    """AR100 of medium objects."""
    ARl: float
    """AR100 of large objects."""
    per_class: dict[str, float]
    """AP of each class, by name (and id, where several classes share a name)."""

    def as_dict(self) -> dict[str, float]:
        """The twelve numbers by name, and `AP/<class>` for each class."""
        return {name: getattr(self, name) for name in _NAMES} | {f"AP/{k}": ap for k, ap in self.per_class.items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, float]) -> "Scores":
        """The `Scores` that `as_dict` was called on."""
        per_class = {name.removeprefix("AP/"): value for name, value in values.items() if name.startswith("AP/")}
        return cls(**{name: values[name] for name in _NAMES}, per_class=per_class)

    def table(self) -> str:
        """The COCO table, as pycocotools prints it, and the AP of each class."""
        lines = [
            f" {title:<18} ({kind}) @[ IoU={iou:<9} | area={area:>6} | maxDets={dets:>3} ] = {getattr(self, name):0.3f}"
            for name, (title, kind, iou, area, dets) in zip(_NAMES, _ROWS, strict=True)
        ]
        width = max(map(len, self.per_class), default=0)
        cells = [f"{name:<{width}} {ap:6.3f}" for name, ap in self.per_class.items()]
        columns = max(1, min(3, 100 // (width + 9))) if len(cells) > 10 else 1
        height = -(-len(cells) // columns)
        lines += ["", " AP per class:"]
        lines += [" " + "   ".join(cells[row::height]) for row in range(height)]
        return "\n".join(lines)


def score(ground_truth: Mapping[str, Any] | str | os.PathLike[str], results: Sequence[Mapping[str, Any]]) -> Scores:
    """Scores COCO results against COCO annotations, as pycocotools does.

    Args:
        ground_truth: the annotations, or their file: `images`, `categories` and `annotations`, judged as those that are
            trained on, see `detr_jax.data.coco`.
        results: in COCO's results format; may be empty.

    Raises:
        DataError: annotations that are not as they must be.
        UserError: results of images that the ground truth does not have.
    """
    if isinstance(ground_truth, str | os.PathLike):
        content: Mapping[str, Any] = read_annotations(Path(ground_truth))
    else:
        content = ground_truth
    images, categories = content["images"], content["categories"]
    unknown = {result["image_id"] for result in results} - {image["id"] for image in images}
    if unknown:
        raise UserError(f"results: {len(unknown)} image ids are not in the ground truth, such as {min(unknown)}")
    truth = _coco(images, categories, _scored(content, ground_truth))
    detected = _coco(images, categories, results)
    evaluation = hotcoco.COCOeval(truth, detected, "bbox")
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    assert evaluation.eval is not None
    precision = evaluation.eval["precision"][:, :, :, 0, -1]  # IoU, recall, class; all areas, 100 detections
    counts = Counter(category["name"] for category in categories)
    names = {c["id"]: c["name"] if counts[c["name"]] == 1 else f"{c['name']} ({c['id']})" for c in categories}
    per_class = {}
    for k, category_id in enumerate(evaluation.params.catIds):
        values = precision[:, :, k]
        per_class[names[category_id]] = float(values.mean()) if (values > -1).all() else -1.0
    return Scores(*map(float, evaluation.stats), per_class=per_class)


def _scored(content: Mapping[str, Any], source: Any) -> list[dict[str, Any]]:
    """The annotations that count, as `load_coco` reads them."""
    images, categories = content["images"], content["categories"]
    sizes = {i["id"]: (i["height"], i["width"]) if "height" in i and "width" in i else None for i in images}
    where = source if isinstance(source, str | os.PathLike) else "ground truth"
    if "annotations" not in content:
        raise DataError(f"{where}: annotations: missing, so that there is nothing to score with")
    ids = [category["id"] for category in categories]
    found, problems = judge(content["annotations"], sizes, ids, where)
    raise_or_skip(where, "error", (), "error", problems)
    unbounded = [sizes[image["id"]] or (2**30, 2**30) for image in images]
    *_, truth, _ = index_boxes(list(sizes), np.array(unbounded, np.int32).reshape(-1, 2), found)
    return truth.ground_truth(images, ids, [category["name"] for category in categories])["annotations"]


def _coco(
    images: Sequence[Mapping[str, Any]], categories: Sequence[Mapping[str, Any]], boxes: Iterable[Mapping[str, Any]]
) -> hotcoco.COCO:
    """The evaluator's data set of annotations or results."""
    annotations = []
    for number, box in enumerate(boxes, 1):  # as pycocotools, for which a match with annotation 0 is none
        area = box.get("area", box["bbox"][2] * box["bbox"][3])
        annotations.append({**box, "id": number, "area": area, "iscrowd": int(box.get("iscrowd", 0))})
    content = {"images": list(images), "categories": list(categories), "annotations": annotations}
    return hotcoco.COCO({"info": {}, **content})
