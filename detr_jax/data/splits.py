"""Which files are the training and the validation set of a data set, and how they are read."""

import dataclasses
from collections.abc import Sequence

from etils.epath import Path

from detr_jax.config import DataConfig
from detr_jax.data.coco import load_coco
from detr_jax.data.index import DatasetIndex, Split
from detr_jax.errors import DataError


def load_split(
    data: DataConfig, split: Split, category_ids: Sequence[int] | None = None, *, annotated: bool = True
) -> DatasetIndex:
    """Reads the training or validation set that `data` describes.

    Args:
        data: which files, and what to do with bad ones.
        split: `train` or `val`.
        category_ids: label -> category id of a checkpoint; `None` takes all the categories of the annotations.
        annotated: the set must have annotations.

    Raises:
        DataError: see the table in `coco`.
    """
    if data.tfds is not None:
        from detr_jax.data.tfds import load_tfds

        return load_tfds(
            data.tfds,
            split,
            data.tfds_dir,
            on_bad_image=data.on_bad_image,
            on_bad_annotation=data.on_bad_annotation,
            category_ids=category_ids,
        )
    annotations, images = find_split(data, split)
    index = load_coco(
        annotations,
        images,
        on_bad_image=data.on_bad_image,
        on_bad_annotation=data.on_bad_annotation,
        category_ids=category_ids,
    )
    if annotated and not index.annotated:
        raise DataError(
            f"{annotations}: annotations: missing, expected a list. A set without annotations can only be detected on: "
            "python eval.py --checkpoint DIR --results FILE"
        )
    other = (data.val_annotations, data.train_annotations)[split == "val"]
    if annotations == Path(data.root) / "annotations.json" and other is None:
        index = dataclasses.replace(index, report=(*index.report, "training and validation are the same images"))
    return index


def find_split(data: DataConfig, split: Split) -> tuple[Path, Path]:
    """Finds the annotations file and the images folder of a split below `data.root`.

    Explicit paths (`data.train_annotations` and so on) win. Else, in this order:
    `annotations/instances_{split}2017.json` with `{split}2017/`; `annotations/instances_{split}.json` with `images/`
    or `{split}/`; `annotations.json` with `images/`, the same for both splits.

    Raises:
        DataError: not found; lists what was looked for.
    """
    root = Path(data.root)
    given_annotations, given_images = (
        (data.train_annotations, data.train_images) if split == "train" else (data.val_annotations, data.val_images)
    )
    layouts: list[tuple[str, tuple[str, ...]]] = [
        (f"annotations/instances_{split}2017.json", (f"{split}2017",)),
        (f"annotations/instances_{split}.json", ("images", split)),
        ("annotations.json", ("images",)),
    ]
    if given_annotations is not None:
        layouts = [(given_annotations, (f"{split}2017", "images", split))]
    if given_images is not None:
        layouts = [(annotations, (given_images,)) for annotations, _ in layouts]
    for annotations, folders in layouts:
        for folder in folders:
            if (root / annotations).is_file() and (root / folder).is_dir():
                return root / annotations, root / folder
    looked = "\n".join(
        f"  {root / annotations}{'' if (root / annotations).is_file() else ' (no such file)'} with "
        + " or ".join(f"{root / f}/{'' if (root / f).is_dir() else ' (no such folder)'}" for f in folders)
        for annotations, folders in layouts
    )
    raise DataError(
        f"data.root {data.root!r}: no {split} set found. Looked for\n{looked}\n"
        f"Set data.root, or data.{split}_annotations and data.{split}_images"
    )
