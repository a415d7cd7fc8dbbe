"""Labels, category ids and names: what an output of the class head stands for.

COCO's 80 categories have ids from 1 to 90, with gaps. The official checkpoints have 91 outputs and use the id itself as
the label (`coco_sparse`: eleven outputs stand for nothing, and should never win). mmdetection, detrex and everything
trained here number the categories without gaps (`contiguous`): label i is the i-th id.
"""

import dataclasses
from collections.abc import Mapping, Sequence

from detr_jax.errors import UserError

# fmt: off
COCO: Mapping[int, str] = {
    1: "person", 2: "bicycle", 3: "car", 4: "motorcycle", 5: "airplane", 6: "bus", 7: "train", 8: "truck", 9: "boat",
    10: "traffic light", 11: "fire hydrant", 13: "stop sign", 14: "parking meter", 15: "bench", 16: "bird", 17: "cat",
    18: "dog", 19: "horse", 20: "sheep", 21: "cow", 22: "elephant", 23: "bear", 24: "zebra", 25: "giraffe",
    27: "backpack", 28: "umbrella", 31: "handbag", 32: "tie", 33: "suitcase", 34: "frisbee", 35: "skis",
    36: "snowboard", 37: "sports ball", 38: "kite", 39: "baseball bat", 40: "baseball glove", 41: "skateboard",
    42: "surfboard", 43: "tennis racket", 44: "bottle", 46: "wine glass", 47: "cup", 48: "fork", 49: "knife",
    50: "spoon", 51: "bowl", 52: "banana", 53: "apple", 54: "sandwich", 55: "orange", 56: "broccoli", 57: "carrot",
    58: "hot dog", 59: "pizza", 60: "donut", 61: "cake", 62: "chair", 63: "couch", 64: "potted plant", 65: "bed",
    67: "dining table", 70: "toilet", 72: "tv", 73: "laptop", 74: "mouse", 75: "remote", 76: "keyboard",
    77: "cell phone", 78: "microwave", 79: "oven", 80: "toaster", 81: "sink", 82: "refrigerator", 84: "book",
    85: "clock", 86: "vase", 87: "scissors", 88: "teddy bear", 89: "hair drier", 90: "toothbrush",
}
"""The 80 categories of COCO's boxes: id -> name."""
# fmt: on


@dataclasses.dataclass(frozen=True)
class Categories:
    """What each label stands for."""

    ids: tuple[int, ...]
    """Label -> category id."""
    names: tuple[str, ...]
    """Label -> name; "N/A" for a label that stands for no category."""

    def __post_init__(self):
        if len(self.ids) != len(self.names):
            raise UserError(f"categories: got {len(self.ids)} ids and {len(self.names)} names")

    @classmethod
    def coco_sparse(cls) -> "Categories":
        """Of the official checkpoints: 91 labels, the label is the id."""
        return cls(tuple(range(91)), tuple(COCO.get(i, "N/A") for i in range(91)))

    @classmethod
    def contiguous(cls, names_by_id: Mapping[int, str]) -> "Categories":
        """Numbered without gaps, by ascending id."""
        ids = sorted(names_by_id)
        return cls(tuple(ids), tuple(names_by_id[i] for i in ids))

    @classmethod
    def guess(cls, num_labels: int, names: Sequence[str] | None = None) -> "Categories":
        """Of a file that says nothing, or only names: COCO's for 91 and 80 outputs; numbers for others."""
        if names is None and num_labels == 91:
            return cls.coco_sparse()
        if names is None and num_labels == len(COCO):
            return cls.contiguous(COCO)
        return cls(tuple(range(num_labels)), tuple(names or (f"class {i}" for i in range(num_labels))))
