"""Labels, category ids and names: what an output of the class head stands for.

COCO's 80 categories have ids from 1 to 90, with gaps. The official checkpoints have 91 outputs and use the id itself as
the label (`coco_sparse`: eleven outputs stand for nothing, and should never win). mmdetection, detrex and everything
trained here number the categories without gaps (`contiguous`): label i is the i-th id.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence

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

    def match(self, model: "Categories") -> "Match":
        """Finds each of these classes, of a data set, among those of a model: by name; by id where it has no names."""
        rules: dict[str, Callable[[tuple[int, str], tuple[int, str]], bool]] = {
            "kept": lambda mine, theirs: mine == theirs,
            "by name": lambda mine, theirs: mine[1] == theirs[1],
            "by id": lambda mine, theirs: mine[0] == theirs[0] and _is_number(theirs[1]),
        }
        free = dict(enumerate(zip(model.ids, map(_key, model.names), strict=True)))
        labels, how = [-1] * len(self.ids), ["new"] * len(self.ids)
        for reason, same in rules.items():
            for i, mine in enumerate(zip(self.ids, map(_key, self.names), strict=True)):
                label = next((label for label, theirs in free.items() if labels[i] < 0 and same(mine, theirs)), None)
                if label is not None:
                    labels[i], how[i] = label, reason
                    del free[label]
        return Match(self, model, tuple(labels), tuple(how))


@dataclasses.dataclass(frozen=True)
class Match:
    """Which of a model's labels each class of a data set is."""

    data: Categories
    """Of the data set."""
    model: Categories
    """Of the model."""
    labels: tuple[int, ...]
    """The model's label of each class of the data; -1 for none."""
    how: tuple[str, ...]
    """For each class: `kept` (same id, same name), `by name`, `by id` (the model has no name for it) or `new`."""

    def named(self) -> "Match":
        """The same, without what was found by id alone."""
        pairs = [(-1, "new") if how == "by id" else (i, how) for i, how in zip(self.labels, self.how, strict=True)]
        return Match(self.data, self.model, tuple(i for i, _ in pairs), tuple(how for _, how in pairs))

    @property
    def contradictions(self) -> list[str]:
        """Classes that have the same id in both and different names, where a name is of the other or of neither."""
        names = dict(zip(self.model.ids, self.model.names, strict=True))
        there = {
            i: name
            for i, name, how in zip(self.data.ids, self.data.names, self.how, strict=True)
            if i in names and how in ("by name", "new") and names[i] != "N/A" and not _is_number(names[i])
        }
        swapped = {_key(name) for name in there.values()} == {_key(names[i]) for i in there}
        new = {i for i, how in zip(self.data.ids, self.how, strict=True) if how == "new"}
        return [
            f"id {i} is {name!r} in the data and {names[i]!r} in the model"
            for i, name in there.items()
            if swapped or i in new
        ]

    def __str__(self) -> str:
        """What was kept, mapped and is new, in a line."""
        parts = []
        pairs = list(zip(self.data.ids, self.data.names, self.labels, self.how, strict=True))
        for how in ("kept", "by name", "by id", "new"):
            some = [
                f"{name} ({self.model.ids[label]} -> {i})" if how == "by name" else name
                for i, name, label, reason in pairs
                if reason == how
            ]
            titles = {"by name": "mapped by name", "by id": "taken by id (the checkpoint has no names)"}
            if some:
                more = f", and {len(some) - 8} more" if len(some) > 8 else ""
                parts.append(f"{len(some)} {titles.get(how, how)}: {', '.join(some[:8])}{more}")
        return f"classes: {'; '.join(parts)}"


def _key(name: str) -> str:
    """What two names are compared by: case and spaces around do not matter."""
    return name.strip().casefold()


def _is_number(name: str) -> bool:
    """Whether a name only stands for one that is not known, such as "class 3"."""
    return re.fullmatch(r"(class|category|label)[ _]\d+", _key(name)) is not None
