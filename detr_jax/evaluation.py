"""Evaluation: outputs -> detections -> COCO results -> the twelve COCO numbers.

hotcoco computes them: the numbers of pycocotools to the last bit, which the tests verify, in a fiftieth of the time.
"""

import contextlib
import dataclasses
import io
import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import hotcoco
import jax
import numpy as np
from etils.epath import Path
from flax import nnx
from jax.experimental import multihost_utils
from tqdm import tqdm

from detr_jax import processes, sharding
from detr_jax.categories import Categories
from detr_jax.checkpoints import store
from detr_jax.checkpoints.load import not_finite, restore_model
from detr_jax.config import Config, DataConfig, TTAConfig, from_dict
from detr_jax.data.coco import judge, read_annotations
from detr_jax.data.index import DatasetIndex, index_boxes, raise_or_skip
from detr_jax.data.pipeline import batches
from detr_jax.data.sampler import EvalSampler
from detr_jax.data.splits import load_split
from detr_jax.drawing import compare
from detr_jax.errors import DataError, UserError
from detr_jax.postprocess import coco_results, write_results
from detr_jax.train_step import make_detect_step
from detr_jax.tta import Boxes, flip_boxes, merge, scaled_max_size

Detections = tuple[Any, Any, Any]
"""scores float32 [b, n], labels int32 [b, n], boxes_xyxy float32 [b, n, 4] in pixels of the annotated image."""
Predict = Callable[[tuple[int, int], dict[str, np.ndarray]], Detections]
"""`predict(bucket, batch)`: the detections of this host's rows of a batch."""

_NAMES = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")
TARGETS = ("image_id", "boxes_cxcywh", "labels", "num_boxes")
"""What detecting does not need of a batch."""
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


def evaluate_model(
    detect: Callable[..., Detections],
    params: dict,
    buffers: dict,
    sampler: EvalSampler,
    data: DataConfig,
    mesh: jax.sharding.Mesh,
    *,
    storage_timeout: float = 300.0,
    interrupted: Callable[[], bool] = lambda: False,
) -> tuple[Scores, list[dict[str, Any]]]:
    """Scores a model on the images of a sampler. Call it under `jax.set_mesh(mesh)`.

    Args:
        detect: of `make_detect_step`.
        params: the parameters to score, of `models.split`.
        buffers: the rest of the model.
        sampler: the images.
        data: how they are read.
        mesh: the devices.
        storage_timeout: seconds that storage may take for a batch.
        interrupted: asked before each batch.

    Raises:
        Interrupted: `interrupted()` became true in one of the processes.
        FailedTogether: a process could not read its images.
    """
    found = detect_on(
        detect, params, buffers, sampler, data, mesh, storage_timeout=storage_timeout, interrupted=interrupted
    )
    results = as_results(found, sampler.index)
    return score_images(sampler.index, results), results


def detect_on(
    detect: Callable[..., Detections],
    params: dict,
    buffers: dict,
    sampler: EvalSampler,
    data: DataConfig,
    mesh: jax.sharding.Mesh,
    *,
    storage_timeout: float = 300.0,
    interrupted: Callable[[], bool] = lambda: False,
) -> Detections:
    """A model's detections on the images of a sampler, as `collect` gives them; arguments as `evaluate_model`."""

    def predict(bucket, batch):
        arrays = {name: rows for name, rows in batch.items() if name not in TARGETS}
        return detect(params, buffers, sharding.put_batch(arrays, mesh), bucket=bucket)

    rows = sharding.host_rows(sampler.batch_size, mesh)
    reading: set[str] = set()
    feed = processes.in_step(
        batches(sampler.index, sampler, range(len(sampler)), rows=rows, data_config=data, reading=reading),
        what=lambda: ", ".join(sorted(reading)[:5]) or "images",
        limit=storage_timeout,
        interrupted=interrupted,
    )
    with contextlib.closing(feed):
        return collect(predict, feed, sampler.index, num_batches=len(sampler))


def detect_views(
    config: Config,
    model: tuple[nnx.GraphDef, dict, dict],
    index: DatasetIndex,
    tta: TTAConfig,
    batch_size: int,
    mesh: jax.sharding.Mesh,
) -> list[dict[str, Any]]:
    """COCO results of all images with test-time augmentation. Call it under `jax.set_mesh(mesh)`.

    Args:
        config: of the run; its evaluation scale and maximal size say how sides grow with the scale of a view.
        model: graph, parameters and buffers.
        index: the images.
        tta: the views and how they are merged.
        batch_size: global batch.
        mesh: the devices.
    """
    graphdef, params, buffers = model
    views: list[list[Boxes]] = []
    for scale, flip in tta.views:
        longest = scaled_max_size(scale, config.data.eval_scale, config.data.max_size)
        data = dataclasses.replace(config.data, eval_scale=scale, max_size=longest, buckets=None)
        sampler = EvalSampler(index, data, batch_size, flip=flip)
        detect = make_detect_step(dataclasses.replace(config, data=data), graphdef, sampler)
        scores, labels, boxes_xyxy = detect_on(detect, params, buffers, sampler, data, mesh)
        if flip:
            boxes_xyxy = np.stack([flip_boxes(z, w) for z, (_, w) in zip(boxes_xyxy, index.sizes, strict=True)])
        views.append([Boxes(*image) for image in zip(scores, labels, boxes_xyxy, strict=True)])
    merged = [merge(image, tta.iou) for image in zip(*views, strict=True)]
    return [
        row
        for image_id, found in zip(index.image_ids.tolist(), merged, strict=True)
        for row in coco_results(
            [image_id], found.scores[None], found.labels[None], found.boxes_xyxy[None], index.category_ids
        )
    ]


def evaluate_checkpoint(
    directory: str,
    data: DataConfig,
    *,
    step: store.Step = "best",
    batch_size: int = 8,
    results: str | None = None,
    pictures: str | None = None,
    num_pictures: int = 8,
    tta: TTAConfig | None = None,
    mask_padding: bool | None = None,
) -> Scores | None:
    """Scores a checkpoint on the validation set of `data`, prints the tables, writes what is asked for.

    A set without annotations, such as COCO's test-dev, is detected on but not scored: what is returned is `None`.

    Args:
        directory: a run's output directory, its `checkpoints/`, or one checkpoint.
        data: images and evaluation scale.
        step: which checkpoint; `best` is the newest where none was saved with an AP.
        batch_size: global batch.
        results: file for the detections, as JSON that pycocotools loads.
        pictures: folder for pictures of ground truth beside detections.
        num_pictures: how many.
        tta: test-time augmentation.
        mask_padding: instead of the checkpoint's `backbone.mask_padding`; see `checkpoints.load`.

    Raises:
        FileNotFoundError: no such checkpoint.
        ValueError: a set without annotations, and no file for the results.
        DataError: something is wrong with the data set.
    """
    if step == "best":
        step = store.best_or_latest(directory)
    saved = store.read_metadata(directory, step)
    config = dataclasses.replace(from_dict(saved["config"], saved["model"], directory), data=data)
    if mask_padding is not None:
        backbone = dataclasses.replace(config.model.backbone, mask_padding=mask_padding)
        config = dataclasses.replace(config, model=dataclasses.replace(config.model, backbone=backbone))
    categories = Categories(tuple(saved["category_ids"]), tuple(saved["category_names"]))
    index = load_split(data, "val", categories, annotated=False)
    if not index.annotated and not results:
        raise UserError(f"{index.report[0]}, no annotations to score with: pass --results FILE for the detections")
    mesh = sharding.make_mesh()
    model = restore_model(directory, step, config, mesh)
    warnings = not_finite({jax.tree_util.keystr(path): leaf for path, leaf in jax.tree.leaves_with_path(model[1:])})
    with jax.set_mesh(mesh), processes.plain_errors():
        if tta is None:
            sampler = EvalSampler(index, data, batch_size)
            detect = make_detect_step(config, model[0], sampler)
            detections = as_results(detect_on(detect, *model[1:], sampler, data, mesh), index)
        else:
            detections = detect_views(config, model, index, tta, batch_size, mesh)
    scores = score_images(index, detections) if index.annotated else None
    if jax.process_index() == 0:
        views = [] if tta is None else [f"test-time augmentation: {len(tta.views)} views, scales {tta.scales}"]
        table = [scores.table()] if scores else []
        print(
            "\n".join(
                [f"{directory}, step {saved['step']}, {len(index)} images", *index.report, *views, *table, *warnings]
            )
        )
        if results:
            write_results(results, detections)
            print(f"results   {results}: {len(detections)} detections")
        if pictures:
            number = write_pictures(pictures, index, detections, num_pictures)
            print(f"pictures  {pictures}: {number} images, ground truth beside detections")
    return scores


def evaluate(
    predict: Predict,
    feed: Iterable[tuple[tuple[int, int], dict[str, np.ndarray]]],
    index: DatasetIndex,
    *,
    num_batches: int | None = None,
) -> tuple[Scores, list[dict[str, Any]]]:
    """Runs a detector over a data set and scores it: arguments and errors as `collect`.

    Returns:
        The scores, and the COCO results of all images, ordered as in the index.
    """
    results = as_results(collect(predict, feed, index, num_batches=num_batches), index)
    return score_images(index, results), results


def as_results(detections: Detections, index: DatasetIndex) -> list[dict[str, Any]]:
    """The COCO results of all images of an index."""
    return coco_results(index.image_ids.tolist(), *detections, index.category_ids)


def collect(
    predict: Predict,
    feed: Iterable[tuple[tuple[int, int], dict[str, np.ndarray]]],
    index: DatasetIndex,
    *,
    num_batches: int | None = None,
) -> Detections:
    """Runs a detector over a data set. With several processes each one sees its rows and gets all the detections.

    Args:
        predict: the detections of a batch; each process is given, and gives, its own rows of the global batch. Padding
            rows (image_id -1) are dropped.
        feed: (bucket, batch) of the evaluation pipeline.
        index: what is detected on.
        num_batches: for the progress line, which process 0 shows.

    Returns:
        The detections, an image of the index after the other; zeros for one that was skipped, see `index.skipped`.

    Raises:
        ValueError: an image was covered twice or not at all; names the first.
    """
    position = {image_id: i for i, image_id in enumerate(index.image_ids.tolist())} | {-1: -1}
    done: list[tuple[np.ndarray, ...]] = []
    pending = None
    progress = tqdm(
        feed,
        "evaluating",
        num_batches,
        leave=False,
        unit=" batches",
        disable=jax.process_index() != 0,
        mininterval=1,
    )
    for bucket, batch in progress:
        rows = np.array([position[image_id] for image_id in batch["image_id"].tolist()], np.int32)
        following = (rows, *predict(bucket, batch))  # runs on the device while the batch before is fetched
        if pending is not None:
            done.append(tuple(map(_host_rows, pending)))
        pending = following
    if pending is not None:
        done.append(tuple(map(_host_rows, pending)))
    if not done:
        raise ValueError("nothing to evaluate: there is no batch")
    # Positions, not image ids: those may have 64 bits, which do not survive a trip through the devices.
    rows, scores, labels, boxes_xyxy = (
        multihost_utils.process_allgather(np.concatenate(column), tiled=True) for column in zip(*done, strict=True)
    )
    covered = np.bincount(rows[rows >= 0], minlength=len(index))
    skipped = np.isin(np.arange(len(index)), list(index.skipped))  # by this process
    skipped = multihost_utils.process_allgather(skipped[None], tiled=True).any(0)
    if (wrong := (covered != 1) & ~skipped).any():
        i = int(np.argmax(wrong))
        raise ValueError(
            f"{wrong.sum()} of {len(index)} images were not covered exactly once: "
            f"{index.name(i)} (id {index.image_ids[i]}) was covered {covered[i]} times"
        )
    for i in np.flatnonzero(skipped).tolist():
        index.skipped.setdefault(i, f"{index.name(i)}: skipped by another process")
    real = rows >= 0

    def by_image(column: np.ndarray) -> np.ndarray:
        ordered = np.zeros([len(index), *column.shape[1:]], column.dtype)
        ordered[rows[real]] = column[real]
        return ordered

    return by_image(scores), by_image(labels), by_image(boxes_xyxy)


def score_images(index: DatasetIndex, results: Sequence[Mapping[str, Any]]) -> Scores:
    """Scores the COCO results of an index, except for images that could not be read and were skipped."""
    truth = index.ground_truth()
    if index.skipped:
        left_out = {int(index.image_ids[i]) for i in index.skipped}
        truth["images"] = [image for image in truth["images"] if image["id"] not in left_out]
        truth["annotations"] = [one for one in truth["annotations"] if one["image_id"] not in left_out]
        results = [result for result in results if result["image_id"] not in left_out]
        if jax.process_index() == 0:
            print(f"{len(left_out)} of {len(index)} images cannot be read and are not scored", flush=True)
    return score(truth, results)


def write_pictures(folder: str, index: DatasetIndex, results: Sequence[Mapping[str, Any]], number: int) -> int:
    """Draws ground truth beside detections for the first `number` images into `folder`; returns how many."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    label_of = {category_id: label for label, category_id in enumerate(index.category_ids)}
    number = min(number, len(index))
    for i in range(number):
        found = [result for result in results if result["image_id"] == index.image_ids[i]]
        boxes = np.array([result["bbox"] for result in found], float).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        picture = compare(
            index.image(i),
            index.boxes_xyxy[i],
            index.labels[i],
            boxes,
            np.array([label_of[result["category_id"]] for result in found], int),
            np.array([result["score"] for result in found], float),
            index.category_names,
            threshold=0.3,
        )
        with (Path(folder) / f"{index.image_ids[i]}.jpg").open("wb") as file:
            picture.save(file, "JPEG", quality=90)
    return number


def _host_rows(array: Any) -> np.ndarray:
    """The rows of an array split over axis 0 that this process holds."""
    if not isinstance(array, jax.Array) or array.is_fully_addressable:
        return np.asarray(array)
    shards = {shard.index[0].start or 0: shard.data for shard in array.addressable_shards}
    return np.concatenate([np.asarray(shards[start]) for start in sorted(shards)])


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
