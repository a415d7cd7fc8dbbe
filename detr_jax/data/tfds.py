"""The index of a data set that TensorFlow Datasets has prepared, such as `coco/2017`; needs no TensorFlow.

It reads all examples once, for their boxes; images stay encoded. Random access needs ArrayRecord files. Labels are
those of TFDS, 0 to k - 1, and so are the category ids: those of `coco/2017` are 0 to 79, not COCO's own 1 to 90.
"""

import io
from typing import Any

import numpy as np
from tqdm import tqdm

from detr_jax.data.image import read_header
from detr_jax.data.index import (
    Annotation,
    DatasetIndex,
    OnBad,
    Split,
    box_problem,
    id_problem,
    index_boxes,
    raise_or_skip,
    skip_report,
)
from detr_jax.errors import DataError, UserError

_SPLITS = {"train": ("train",), "val": ("validation", "val")}


def load_tfds(
    name: str,
    split: Split,
    data_dir: str | None = None,
    *,
    on_bad_image: OnBad = "error",
    on_bad_annotation: OnBad = "error",
) -> DatasetIndex:
    """Reads the metadata of a prepared TFDS data set with features `image` and `objects` (`bbox`, `label`).

    `image/id` and `objects/is_crowd`, `objects/area` are used where they exist. Sizes are those of the stored images.

    Args:
        name: as `tfds.builder` takes it.
        split: `train` or `val`.
        data_dir: `None` is the TFDS default.
        on_bad_image: see `DataConfig`.
        on_bad_annotation: see `DataConfig`.

    Raises:
        DataError: not prepared, not as ArrayRecord files, other features, or bad content: see `detr_jax.data.coco`.
    """
    source, names = _open(name, split, data_dir)
    ids = tuple(range(len(names)))
    positions, keys, sizes, entries, image_problems, box_problems = [], [], [], [], [], []
    images: list[dict[str, Any]] = []
    for position in tqdm(range(len(source)), f"reading {name}", delay=2, unit=" examples"):
        example = source[position]
        image_id, key = int(example.get("image/id", position)), f"{name}[{split}][{position}]"
        try:
            header = read_header(io.BytesIO(example["image"]), f"{key}.image")
        except UserError as error:
            image_problems.append(f"{error}; expected a complete image: prepare it again")
            continue
        height, width = header.size
        positions.append(position)
        keys.append(key)
        sizes.append(header.size)
        images.append({"id": image_id, "height": height, "width": width, "file_name": key})
        objects = example["objects"]
        crowd = objects.get("is_crowd", [False] * len(objects["label"]))
        for number, (box, label) in enumerate(zip(objects["bbox"], objects["label"], strict=True)):
            y0, x0, y1, x1 = (float(v) for v in box)
            bbox = [x0 * width, y0 * height, (x1 - x0) * width, (y1 - y0) * height]
            problem = box_problem(bbox, header.size)
            if problem is None and not 0 <= label < len(names):
                problem = f"label: got {label}, expected 0 to {len(names) - 1}"
            if problem is not None:
                box_problems.append(f"{key}.objects[{number}].{problem}")
                continue
            area = float(objects["area"][number]) if "area" in objects else bbox[2] * bbox[3]
            entries.append(Annotation(image_id, int(label), bbox, area, bool(crowd[number])))
    raise_or_skip(f"data.tfds {name!r}", on_bad_image, image_problems, on_bad_annotation, box_problems)
    if not images:
        raise DataError(f"data.tfds {name!r}: split {split!r} is empty; expected at least one readable image")
    image_ids = [image["id"] for image in images]
    if len(set(image_ids)) < len(image_ids):
        raise DataError(f"data.tfds {name!r}: image/id: got an id twice, expected different ids")
    if problems := [problem for i in image_ids if (problem := id_problem(i)) is not None]:
        raise DataError(f"data.tfds {name!r}: image/id: {problems[0]}")
    boxes, labels, kept, report = index_boxes(image_ids, np.array(sizes, np.int32), entries)
    return DatasetIndex(
        image_ids=np.array(image_ids, np.int64),
        sizes=np.array(sizes, np.int32),
        boxes_xyxy=boxes,
        labels=labels,
        category_ids=ids,
        category_names=tuple(names),
        report=(
            f"TFDS {name} {split}: {len(images)} images, {sum(map(len, labels))} boxes, {len(names)} categories",
            *report,
            *skip_report("images", image_problems),
            *skip_report("annotations", box_problems),
        ),
        names=tuple(keys),
        read=lambda i: source[positions[i]]["image"],
        read_ground_truth=lambda: kept.ground_truth(images, ids, names),
    )


def _open(name: str, split: Split, data_dir: str | None) -> tuple[Any, list[str]]:
    """Returns a random-access source of examples with encoded images, and the label names."""
    import tensorflow_datasets as tfds

    try:
        builder = tfds.builder(name, data_dir=data_dir)
    except Exception as error:  # TFDS has many
        raise DataError(f"data.tfds {name!r}: {str(error).splitlines()[0]}") from error
    where = f"data.tfds {name!r} in {builder.data_dir}"
    prepare = f"tfds.builder({name!r}, file_format='array_record', data_dir=...).download_and_prepare()"
    if not builder.info.splits:
        raise DataError(f"{where}: not prepared. Prepare it in Python: {prepare}")
    if (file_format := str(builder.info.file_format and builder.info.file_format.value)) != "array_record":
        raise DataError(
            f"{where}: file format: got {file_format}, expected array_record (random access). Convert it:\n"
            "  python -m tensorflow_datasets.scripts.convert_format --out_file_format=array_record "
            f"--dataset_version_dir={builder.data_dir} --out_dir=...\nor prepare it anew in Python: {prepare}"
        )
    found = [candidate for candidate in _SPLITS[split] if candidate in builder.info.splits]
    if not found:
        raise DataError(
            f"{where}: splits: got {', '.join(builder.info.splits)}, expected {' or '.join(_SPLITS[split])}"
        )
    try:
        names = list(builder.info.features["objects"]["label"].names)  # pyright: ignore
        source = builder.as_data_source(split=found[0], decoders={"image": tfds.decode.SkipDecoding()})  # pyright: ignore
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"{where}: features: got {builder.info.features}, expected 'image' and 'objects' with 'bbox' and 'label'"
        ) from error
    return source, names
