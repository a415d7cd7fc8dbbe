"""The classes of a data set beside those of a model: the same by name, whatever their numbers."""

import dataclasses
from typing import Any

import numpy as np

from detr_jax.categories import Categories
from detr_jax.data.index import DatasetIndex, OnBad, raise_or_skip, skip_report
from detr_jax.errors import DataError


def relabel(index: DatasetIndex, categories: Categories, on_bad_annotation: OnBad = "error") -> DatasetIndex:
    """The index of a data set with a model's labels; ids stay those of the annotations.

    Args:
        index: of the data set.
        categories: of the model.
        on_bad_annotation: what to do with boxes of a class that the model does not have.

    Raises:
        DataError: the data gives ids that the model knows other names, or has boxes of other classes.
    """
    own = Categories(index.category_ids, index.category_names)
    if own == categories:
        return index
    counts = np.bincount(np.concatenate([np.zeros(0, int), *index.labels]), minlength=len(own.ids))
    # A class without boxes, such as the supercategory that Roboflow exports as class 0, contradicts nothing.
    used = [i for i, n in enumerate(counts) if n or own.match(categories).labels[i] >= 0]
    found = Categories(tuple(own.ids[i] for i in used), tuple(own.names[i] for i in used)).match(categories)
    where = index.report[0].partition(": ")[0]
    known = ", ".join(f"{i} {name}" for i, name in list(zip(categories.ids, categories.names, strict=True))[:10])
    known += ", ..." * (len(categories.ids) > 10)
    if found.contradictions:
        listed = "".join(f"\n  {line}" for line in found.contradictions[:10])
        raise DataError(
            f"{where}: categories: not those of the model:{listed}\n"
            f"The model has {known}. Correct the ids or names in the annotations, or use a model of these classes"
        )
    problems = [
        f"{where}: {counts[i]} boxes of category {own.names[i]!r} (id {own.ids[i]}), which the model does not have; "
        f"expected one of {known}"
        for i, label in zip(used, found.labels, strict=True)
        if label < 0
    ]
    raise_or_skip(where, "error", [], on_bad_annotation, problems)
    label_of = np.full(len(own.ids), -1)
    label_of[used] = found.labels
    ids = _ids(own, categories, label_of)
    labels = [label_of[labels] for labels in index.labels]
    return dataclasses.replace(
        index,
        boxes_xyxy=tuple(boxes[mine >= 0] for boxes, mine in zip(index.boxes_xyxy, labels, strict=True)),
        labels=tuple(mine[mine >= 0].astype(np.int32) for mine in labels),
        category_ids=ids,
        category_names=categories.names,
        report=(
            *index.report,
            *([f"{found}"] if set(found.how) - {"kept"} else []),
            *skip_report("classes", problems),
        ),
        read_ground_truth=lambda: _ground_truth(index, ids, categories),
    )


def _ids(own: Categories, categories: Categories, label_of: np.ndarray) -> tuple[int, ...]:
    """The data's id of each label of the model; an unused one where the data does not have the class."""
    mine = {int(label): own.ids[i] for i, label in enumerate(label_of) if label >= 0}
    taken, ids = set(own.ids), []
    for label, category_id in enumerate(categories.ids):
        if label not in mine and category_id in taken:
            category_id = max(*taken, *categories.ids) + 1
        ids.append(mine.get(label, category_id))
        taken.add(ids[-1])
    return tuple(ids)


def _ground_truth(index: DatasetIndex, ids: tuple[int, ...], categories: Categories) -> dict[str, Any]:
    """That of the data set, without the classes that the model does not have."""
    truth, known = index.ground_truth(), set(ids)
    kept = [a for a in truth["annotations"] if a["category_id"] in known]
    return {
        **truth,
        "annotations": [{**annotation, "id": number} for number, annotation in enumerate(kept, 1)],
        "categories": [{"id": i, "name": name} for i, name in zip(ids, categories.names, strict=True)],
    }
