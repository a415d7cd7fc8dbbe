"""Evaluation: images -> outputs -> detections of a data set -> scores, results file and pictures."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from etils.epath import Path
from flax import nnx
from jax.experimental import multihost_utils
from tqdm import tqdm

from detr_jax import processes, sharding
from detr_jax.checkpoints import store
from detr_jax.checkpoints.load import Loaded, load, set_mask_padding
from detr_jax.config import Config, DataConfig, TTAConfig
from detr_jax.data.index import DatasetIndex
from detr_jax.data.pipeline import batches
from detr_jax.data.sampler import EvalSampler
from detr_jax.data.splits import load_split
from detr_jax.drawing import compare
from detr_jax.errors import UserError
from detr_jax.models.trainable import split
from detr_jax.postprocess import coco_results, write_results
from detr_jax.scoring import Scores, score
from detr_jax.train_step import make_detect_step
from detr_jax.tta import Boxes, flip_boxes, merge, scaled_max_size

Detections = tuple[Any, Any, Any]
"""scores float32 [b, n], labels int32 [b, n], boxes_xyxy float32 [b, n, 4] in pixels of the annotated image."""
Predict = Callable[[tuple[int, int], dict[str, np.ndarray]], Detections]
"""`predict(bucket, batch)`: the detections of this host's rows of a batch."""

TARGETS = ("image_id", "boxes_cxcywh", "labels", "num_boxes")
"""What detecting does not need of a batch."""


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
    for scale, flip in tta.views(config.data.eval_scale):
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
    checkpoint: str | Loaded,
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
        checkpoint: a run's output directory, its `checkpoints/`, one checkpoint in it, or what `checkpoints.load` gives
            of any other checkpoint.
        data: images and evaluation scale.
        step: which one of a run's checkpoints; `best` is the newest where none was saved with an AP.
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
    mesh = sharding.make_mesh()
    if not isinstance(checkpoint, Loaded):
        loaded = load(checkpoint, step=step, mesh=mesh, mask_padding=mask_padding)
    else:
        loaded = checkpoint if mask_padding is None else set_mask_padding(checkpoint, mask_padding)
    graphdef, *arrays = split(loaded.config, loaded.model)
    params, buffers = jax.device_put(arrays, sharding.replicated(mesh))
    config = loaded.run_config(data)
    index = load_split(data, "val", loaded.categories, annotated=False)
    if not index.annotated and not results:
        raise UserError(f"{index.report[0]}, no annotations to score with: pass --results FILE for the detections")
    with jax.set_mesh(mesh), processes.plain_errors():
        if tta is None:
            sampler = EvalSampler(index, data, batch_size)
            detect = make_detect_step(config, graphdef, sampler)
            detections = as_results(detect_on(detect, params, buffers, sampler, data, mesh), index)
        else:
            detections = detect_views(config, (graphdef, params, buffers), index, tta, batch_size, mesh)
    scores = score_images(index, detections) if index.annotated else None
    if jax.process_index() == 0:
        views = [] if tta is None else [describe_views(tta.views(data.eval_scale))]
        table = [scores.table()] if scores else []
        print("\n".join([loaded.report, f"{len(index)} images", *index.report, *views, *table]))
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


def describe_views(views: Sequence[tuple[int, bool]]) -> str:
    """A line about test-time augmentation."""
    return f"test-time augmentation: {len(views)} views, scales {', '.join(map(str, dict(views)))}"


def write_pictures(folder: str, index: DatasetIndex, results: Sequence[Mapping[str, Any]], number: int) -> int:
    """Draws ground truth beside detections for the first `number` images into `folder`; returns how many."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    label_of = {category_id: label for label, category_id in enumerate(index.category_ids)}
    readable = [i for i in range(len(index)) if i not in index.skipped][:number]
    for i in readable:
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
    return len(readable)


def _host_rows(array: Any) -> np.ndarray:
    """The rows of an array split over axis 0 that this process holds."""
    if not isinstance(array, jax.Array) or array.is_fully_addressable:
        return np.asarray(array)
    shards = {shard.index[0].start or 0: shard.data for shard in array.addressable_shards}
    return np.concatenate([np.asarray(shards[start]) for start in sorted(shards)])
