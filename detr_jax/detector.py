"""Detection in three lines.

detector = Detector.from_pretrained("runs/bccd")
detections = detector("photo.jpg")
detections.draw().save("boxes.jpg")
"""

import dataclasses
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, overload

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from PIL import Image, ImageOps, UnidentifiedImageError

from detr_jax import checkpoint, pretrained, sharding
from detr_jax.categories import Categories
from detr_jax.config import Config, DataConfig, DETRConfig, LossConfig, ModelConfig, from_dict
from detr_jax.data.buckets import smallest_bucket
from detr_jax.data.resample import IMAGENET_MEAN, IMAGENET_STD
from detr_jax.data.transforms import resized
from detr_jax.evaluation import postprocess, restore_model
from detr_jax.models import split
from detr_jax.pictures import draw_detections

Photo = Image.Image | np.ndarray | str | os.PathLike[str]


@dataclasses.dataclass(frozen=True, eq=False)
class Detections:
    """What was found in one photo, best first."""

    boxes_xyxy: np.ndarray
    """float32 [n, 4], pixels of the photo; inside of it."""
    scores: np.ndarray
    """float32 [n] in [0, 1]."""
    labels: np.ndarray
    """int32 [n]: outputs of the class head."""
    categories: Categories
    """What the labels stand for."""
    photo: Image.Image = dataclasses.field(repr=False)
    """The photo, upright, RGB."""

    def __len__(self) -> int:
        return len(self.scores)

    @property
    def category_ids(self) -> list[int]:
        """Category id of each box, as in the annotations that the model was trained on."""
        return [self.categories.ids[label] for label in self.labels]

    @property
    def names(self) -> list[str]:
        """Category name of each box."""
        return [self.categories.names[label] for label in self.labels]

    def draw(self, photo: Image.Image | np.ndarray | None = None) -> Image.Image:
        """The photo, or another picture of its size, with boxes, names and scores."""
        picture = self.photo if photo is None else photo
        return draw_detections(picture, self.boxes_xyxy, self.labels, self.categories.names, self.scores)

    def as_results(self, image_id: int | str) -> list[dict[str, Any]]:
        """In COCO's results format: `image_id`, `category_id`, `bbox` (xywh), `score`, and `category_name`."""
        boxes = np.concatenate([self.boxes_xyxy[:, :2], self.boxes_xyxy[:, 2:] - self.boxes_xyxy[:, :2]], 1)
        columns = zip(self.category_ids, self.names, boxes.tolist(), self.scores.tolist(), strict=True)
        return [
            {"image_id": image_id, "category_id": category, "category_name": name, "bbox": box, "score": score}
            for category, name, box, score in columns
        ]

    def __str__(self) -> str:
        rows = zip(self.names, self.scores, self.boxes_xyxy.round().astype(int).tolist(), strict=True)
        return "\n".join(f"{name:<16} {score:.3f}  {box}" for name, score, box in rows) or "nothing found"


@dataclasses.dataclass
class Loaded:
    """A detector's model, from any checkpoint, with what detecting takes besides."""

    config: ModelConfig
    model: nnx.Module
    categories: Categories
    classification: Literal["focal", "softmax"]
    scale: int
    """Photos' shorter side is resized to this, in pixels."""
    max_size: int
    """... unless the longer one would become longer than this."""
    report: str
    """What was read, for people."""

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Writes a checkpoint of this project, for `load`, `eval.py` and `--init-from`."""
        _, params, buffers = split(self.config, self.model)
        loss = LossConfig.detr() if self.classification == "softmax" else LossConfig()
        config = Config(self.config, loss, DataConfig(eval_scale=self.scale, max_size=self.max_size))
        metadata = {
            "config": dataclasses.asdict(config),
            "model": type(self.config).__name__,
            "category_ids": list(self.categories.ids),
            "category_names": list(self.categories.names),
        }
        with checkpoint.CheckpointWriter(str(Path(directory) / "checkpoints")) as writer:
            writer.save(0, {"params": params, "buffers": buffers}, metadata)


def load(path: str | os.PathLike[str], **facts: Any) -> Loaded:
    """Reads a checkpoint of this project (a run's folder), or of another implementation: see `pretrained.load`.

    Args:
        path: file or folder.
        facts: `dilation` and `num_heads`, for files that do not tell.

    Raises:
        FileNotFoundError: no such file or folder.
        ValueError: it does not fit a detector that this project has; says what does not.
    """
    if not Path(path).exists():
        raise FileNotFoundError(f"{path}: no such file or folder; expected a checkpoint")
    if not is_ours(path):
        found = pretrained.load(Path(path), **facts)
        classification = "softmax" if isinstance(found.config, DETRConfig) else "focal"
        return Loaded(found.config, found.model, found.categories, classification, 800, 1333, found.report)
    step = checkpoint.best_or_latest(str(path))
    saved = checkpoint.read_metadata(str(path), step)
    config = from_dict(saved["config"], saved["model"])
    with jax.set_mesh(mesh := sharding.make_mesh(1)):
        model = nnx.merge(*restore_model(str(path), step, config, mesh))
    categories = Categories(tuple(saved["category_ids"]), tuple(saved["category_names"]))
    report = f"{path}: step {saved['step']} of this project; {pretrained.describe(config.model)}"
    data = config.data
    return Loaded(config.model, model, categories, config.loss.classification, data.eval_scale, data.max_size, report)


def is_ours(path: str | os.PathLike[str]) -> bool:
    """Whether a path is a checkpoint, or a folder of checkpoints, that training here wrote."""
    path = Path(path)
    marks = (path / "checkpoints").is_dir() or (path / "_CHECKPOINT_METADATA").exists()
    return path.is_dir() and (marks or bool(checkpoint.steps(str(path))))


def fine_tuned(
    path: str | os.PathLike[str], config: ModelConfig, categories: Categories, params: dict, buffers: dict
) -> tuple[dict, dict, str]:
    """Parameters and buffers of a new model, taken from a checkpoint; the class heads only if it has the same classes.

    Adapters (`config.tune`) that the checkpoint does not have start anew.

    Args:
        path: of the checkpoint; see `load`.
        config: of the new model.
        categories: of the data to train on.
        params: of the new model, as `models.split` gives them.
        buffers: of the new model.

    Returns:
        The same structures, laid out on the same devices, and a report of what was loaded and what was not.

    Raises:
        ValueError: the models differ in more than their classes; says in which fields.
    """
    source = load(path, dilation=config.backbone.dilation, num_heads=config.num_heads)
    same_classes = source.config.num_classes == config.num_classes and source.categories.ids == categories.ids
    theirs = {tuple(leaf_path): leaf for leaf_path, leaf in nnx.to_flat_state(nnx.state(source.model))}
    loaded, anew, problems = 0, [], []

    def replace(location, leaf):
        nonlocal loaded
        keys = tuple(part.key for part in location[1:])
        found = theirs.pop(keys, None)
        if (keys[0] == "class_embed" and not same_classes) or (found is None and "lora" in keys):
            anew.append(".".join(map(str, keys)))
            return leaf
        if found is None or found.shape != leaf.shape:
            got = "missing" if found is None else list(found.shape)
            problems.append(f"  {'.'.join(map(str, keys))}: {got}, expected {list(leaf.shape)}")
            return leaf
        loaded += 1
        return jax.device_put(np.asarray(found[...], leaf.dtype), leaf.sharding)

    new_params, new_buffers = jax.tree_util.tree_map_with_path(replace, (params, buffers))
    problems += [f"  {'.'.join(map(str, keys))}: {list(leaf.shape)}, not expected" for keys, leaf in theirs.items()]
    if problems:
        fields = (
            field.name for field in dataclasses.fields(config) if field.name not in ("num_classes", "dropout", "tune")
        )
        differ = [
            f"  model.{name}: {getattr(source.config, name, 'none')} in the file, {getattr(config, name)} here"
            for name in fields
            if getattr(source.config, name, None) != getattr(config, name)
        ]
        raise ValueError(
            f"train.init_from={path} is another model than the configuration's: "
            f"{pretrained.describe(source.config)}.\n" + "\n".join(differ + problems[:8])
        )
    report = [source.report, f"  loaded {loaded} tensors, initialised anew: {', '.join(sorted(anew)) or 'none'}"]
    return new_params, new_buffers, "\n".join(report)


class Detector:
    """A model that takes photos and gives boxes.

    Photos are resized as in evaluation (shorter side `scale`, longer side at most `max_size`) and padded to one of five
    canvases, each of which is compiled once, at its first photo: landscape and portrait, with the ratios 4:3 and the
    longest possible, and square. With the official semantics the boxes depend a little on the padding (the model's
    docstring says how much); `backbone.mask_padding` makes them independent of it.

    Args:
        loaded: model, categories and sizes; see `load`.
        scale: instead of `loaded`'s.
        max_size: instead of `loaded`'s.
        batch_size: photos in a step; lists are run in such batches, filled up with empty photos.
    """

    def __init__(self, loaded: Loaded, *, scale: int | None = None, max_size: int | None = None, batch_size: int = 1):
        self.config, self.categories, self.report = loaded.config, loaded.categories, loaded.report
        self.classification: Literal["focal", "softmax"] = loaded.classification
        self.scale, self.max_size, self.batch_size = scale or loaded.scale, max_size or loaded.max_size, batch_size
        if self.scale > self.max_size or self.batch_size < 1:
            raise ValueError(
                f"expected scale <= max_size and batch_size >= 1, got scale={self.scale}, max_size={self.max_size}, "
                f"batch_size={batch_size}"
            )
        self.canvases = canvases(self.scale, self.max_size)
        graphdef, self._state = nnx.split(loaded.model)
        self._graphdef = graphdef

        self.compilations = 0
        """How many canvases have been compiled."""

        @jax.jit
        def detect(state, pixels, sizes, orig_sizes):
            self.compilations += 1  # Python runs this once a compilation
            outputs = nnx.merge(graphdef, state)(normalised(pixels, sizes), sizes)
            return postprocess(outputs, orig_sizes, classification=loaded.classification)

        self._detect = detect

    @classmethod
    def from_pretrained(cls, path: str | os.PathLike[str], *, verbose: bool = True, **options: Any) -> "Detector":
        """The detector of a checkpoint: of this project, official, `transformers`, detrex or mmdetection.

        Args:
            path: file or folder.
            verbose: print what was read.
            options: `dilation` and `num_heads` for `load`, the others for `Detector`.
        """
        facts = {name: options.pop(name) for name in ("dilation", "num_heads") if name in options}
        loaded = load(path, **facts)
        if verbose:
            print(loaded.report)
        return cls(loaded, **options)

    @overload
    def __call__(self, photos: Photo, threshold: float = 0.5) -> Detections: ...

    @overload
    def __call__(self, photos: Sequence[Photo], threshold: float = 0.5) -> list[Detections]: ...

    def __call__(self, photos: Photo | Sequence[Photo], threshold: float = 0.5) -> Detections | list[Detections]:
        """Detects.

        Args:
            photos: a photo, or a list: Pillow images, arrays (uint8 [h, w, 3] or [h, w]) and paths, of any sizes.
            threshold: detections with a lower score are left out.

        Returns:
            The detections of the photo, or a list of those of each one.

        Raises:
            ValueError: an array of another shape or type, a file that is no image.
            FileNotFoundError: no such file.
        """
        if isinstance(photos, Image.Image | np.ndarray | str | os.PathLike):
            return next(iter(self.detect([photos], threshold)))
        return list(self.detect(photos, threshold))

    def detect(self, photos: Iterable[Photo], threshold: float = 0.5) -> Iterator[Detections]:
        """As calling it with a list, but photo after photo, in order, in batches of consecutive ones of a canvas."""
        batch: list[tuple[Image.Image, np.ndarray]] = []
        canvas = -1
        for photo in photos:
            image = open_photo(photo)
            size, bucket = self._place(image)
            if batch and (bucket != canvas or len(batch) == self.batch_size):
                yield from self._run(batch, self.canvases[canvas], threshold)
                batch = []
            canvas = bucket
            batch.append((image, size))
        if batch:
            yield from self._run(batch, self.canvases[canvas], threshold)

    def split(self) -> tuple[nnx.GraphDef, nnx.State]:
        """The model's graph and state: `nnx.merge` puts a model together, also inside `jax.jit`."""
        return self._graphdef, self._state

    def prepare(self, image: Image.Image) -> tuple[np.ndarray, np.ndarray]:
        """A photo as the model gets it: its canvas, uint8 [1, H, W, 3], and its size in it, int32 [1, 2] (h, w)."""
        size, bucket = self._place(image)
        pixels, sizes, _ = filled([(image, size)], self.canvases[bucket], 1)
        return pixels, sizes

    def _place(self, image: Image.Image) -> tuple[np.ndarray, int]:
        """(h, w) to which a photo is resized, and the number of its canvas."""
        size = photo_size(np.array([image.height, image.width]), self.scale, self.max_size)
        return size, int(smallest_bucket(self.canvases, size[None])[0])

    def _run(
        self, batch: list[tuple[Image.Image, np.ndarray]], canvas: tuple[int, int], threshold: float
    ) -> Iterator[Detections]:
        pixels, sizes, orig_sizes = filled(batch, canvas, self.batch_size)
        found = jax.device_get(self._detect(self._state, pixels, sizes, orig_sizes))
        for (image, _), scores, labels, boxes in zip(batch, *found, strict=False):
            order = np.argsort(-scores, kind="stable")
            order = order[scores[order] >= threshold]
            boxes = np.clip(boxes[order], 0, [image.width, image.height] * 2).astype(np.float32)
            yield Detections(boxes, scores[order], labels[order], self.categories, image)


def filled(
    batch: Sequence[tuple[Image.Image, np.ndarray]], canvas: tuple[int, int], batch_size: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Photos, each resized to its (h, w), on canvases.

    Returns:
        pixels uint8 [b, H, W, 3], sizes int32 [b, 2] and the photos' own sizes int32 [b, 2]; rows that are left over
        hold an empty photo.
    """
    pixels = np.zeros((batch_size, *canvas, 3), np.uint8)
    sizes, orig_sizes = np.ones((2, batch_size, 2), np.int32) * 32
    for i, (image, (h, w)) in enumerate(batch):
        pixels[i, :h, :w] = np.asarray(image.resize((int(w), int(h)), Image.Resampling.BILINEAR))
        sizes[i], orig_sizes[i] = (h, w), (image.height, image.width)
    return pixels, sizes, orig_sizes


def normalised(pixels: jax.Array, sizes: jax.Array) -> jax.Array:
    """What models take: uint8 `[b, H, W, 3]` and int `[b, 2]` -> float32 `[b, H, W, 3]`, zero in the padding."""
    inside = (jnp.arange(pixels.shape[1]) < sizes[:, :1])[:, :, None, None]
    inside &= (jnp.arange(pixels.shape[2]) < sizes[:, 1:])[:, None, :, None]
    return jnp.where(inside, (pixels / np.float32(255) - IMAGENET_MEAN) / IMAGENET_STD, 0)


def canvases(scale: int, max_size: int) -> tuple[tuple[int, int], ...]:
    """The five canvases (height, width), smallest first, sides rounded up to multiples of 32."""
    sides = sorted({min(round(scale * ratio), max_size) for ratio in (1, 4 / 3)} | {max_size})
    short, *longer = (-(-side // 32) * 32 for side in sides)
    found = {(short, short)} | {pair for long in longer for pair in ((short, long), (long, short))}
    return tuple(sorted(found, key=lambda pair: (pair[0] * pair[1], pair)))


def photo_size(orig: np.ndarray, scale: int, max_size: int) -> np.ndarray:
    """(h, w) to which a photo of that (h, w) is resized; the official rounding, but never beyond `max_size`."""
    return np.minimum(resized(orig, scale, max_size), max_size)


def open_photo(photo: Photo) -> Image.Image:
    """A photo as an upright RGB image of Pillow."""
    if isinstance(photo, np.ndarray):
        if photo.dtype != np.uint8 or photo.ndim not in (2, 3) or (photo.ndim == 3 and photo.shape[2] != 3):
            raise ValueError(
                f"a photo as an array must be uint8 [h, w, 3] (RGB) or [h, w] (gray), got {photo.dtype} "
                f"{list(photo.shape)}"
            )
        return Image.fromarray(photo).convert("RGB")
    if isinstance(photo, str | os.PathLike):
        if not Path(photo).is_file():
            raise FileNotFoundError(f"{photo}: no such photo")
        try:
            with Image.open(photo) as image:
                return ImageOps.exif_transpose(image).convert("RGB")
        except (UnidentifiedImageError, OSError, SyntaxError) as error:
            raise ValueError(f"{photo}: not an image, or a damaged one: {error}") from error
    return ImageOps.exif_transpose(photo).convert("RGB")
