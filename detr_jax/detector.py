"""Detection in three lines.

detector = Detector.from_pretrained("runs/bccd")
detections = detector("photo.jpg")
detections.draw().save("boxes.jpg")
"""

import dataclasses
import itertools
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, overload

import jax
import numpy as np
from flax import nnx
from PIL import Image, ImageOps

from detr_jax.categories import Categories
from detr_jax.checkpoints.load import Loaded, load
from detr_jax.config import TTAConfig
from detr_jax.data.buckets import inference_buckets, round_up, smallest_bucket
from detr_jax.data.image import ImageLike, is_image, open_image, pad_to_bucket
from detr_jax.data.resample import normalize
from detr_jax.data.transforms import resize_size
from detr_jax.drawing import draw_detections
from detr_jax.errors import UserError
from detr_jax.postprocess import coco_results, postprocess
from detr_jax.tta import Boxes, flip_boxes, merge, scaled_max_size


@dataclasses.dataclass(frozen=True, eq=False)
class Detections:
    """What was found in one image, best first."""

    boxes_xyxy: np.ndarray
    """float32 [n, 4], pixels of the image; inside of it."""
    scores: np.ndarray
    """float32 [n] in [0, 1]."""
    labels: np.ndarray
    """int32 [n]: outputs of the class head."""
    categories: Categories
    """What the labels stand for."""
    image: Image.Image = dataclasses.field(repr=False)
    """The image, upright, RGB."""

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

    def draw(self, image: Image.Image | np.ndarray | None = None) -> Image.Image:
        """The image, or another picture of its size, with boxes, names and scores."""
        picture = self.image if image is None else image
        return draw_detections(picture, self.boxes_xyxy, self.labels, self.categories.names, self.scores)

    def to_supervision(self) -> Any:
        """As `supervision.Detections`, with `class_name` in its data: `pip install supervision`."""
        try:
            import supervision  # pyright: ignore[reportMissingImports]
        except ImportError as error:
            raise UserError("to_supervision needs supervision: pip install supervision") from error
        return supervision.Detections(
            xyxy=self.boxes_xyxy.astype(np.float32).reshape(-1, 4),
            confidence=self.scores.astype(np.float32),
            class_id=np.array(self.category_ids, int),
            data={"class_name": np.array(self.names, str)},
        )

    def as_results(self, image_id: int | str) -> list[dict[str, Any]]:
        """In COCO's results format: `image_id`, `category_id`, `bbox` (xywh), `score`, and `category_name`."""
        rows = coco_results(
            [image_id], self.scores[None], self.labels[None], self.boxes_xyxy[None], self.categories.ids
        )
        return [row | {"category_name": name} for row, name in zip(rows, self.names, strict=True)]

    def __str__(self) -> str:
        rows = zip(self.names, self.scores, self.boxes_xyxy.round().astype(int).tolist(), strict=True)
        return "\n".join(f"{name:<16} {score:.3f}  {box}" for name, score, box in rows) or "nothing found"


class Detector:
    """A model that takes images and gives boxes.

    Images are resized as in evaluation (shorter side `scale`, longer side at most `max_size`) and padded to one of five
    buckets, each of which is compiled once, at its first image: landscape and portrait, with the ratios 4:3 and the
    longest possible, and square; an image that is more than four times as long as wide may get one of its own. With
    the official semantics the boxes depend a little on the padding (the model's docstring says how much);
    `backbone.mask_padding` makes them independent of it.

    Args:
        loaded: model, categories and sizes; see `load`.
        scale: instead of `loaded`'s.
        max_size: instead of `loaded`'s.
        batch_size: images in a step; lists are run in such batches, filled up with empty images.
        tta: test-time augmentation: detect in several views of an image and merge what is found. Each of its scales
            has five buckets of its own, with longer sides that grow with it.
    """

    def __init__(
        self,
        loaded: Loaded,
        *,
        scale: int | None = None,
        max_size: int | None = None,
        batch_size: int = 1,
        tta: TTAConfig | None = None,
    ):
        self.config, self.categories, self.report = loaded.config, loaded.categories, loaded.report
        self.classification: Literal["focal", "softmax"] = loaded.classification
        self.scale, self.max_size, self.batch_size = scale or loaded.scale, max_size or loaded.max_size, batch_size
        if self.scale > self.max_size or self.batch_size < 1:
            raise UserError(
                f"expected scale <= max_size and batch_size >= 1, got scale={self.scale}, max_size={self.max_size}, "
                f"batch_size={batch_size}"
            )
        self.max_source_side = loaded.max_source_side
        self.buckets = inference_buckets(self.scale, self.max_size)
        graphdef, self._state = nnx.split(loaded.model)
        self._graphdef = graphdef

        self.compilations = 0
        """How many buckets have been compiled."""

        @jax.jit
        def detect(state, pixels, sizes, orig_sizes):
            self.compilations += 1  # Python runs this once a compilation
            outputs = nnx.merge(graphdef, state)(normalize(pixels, sizes), sizes)
            return postprocess(
                outputs, orig_sizes, classification=loaded.classification, top_k=loaded.config.max_detections
            )

        self._detect = detect
        self._tta = tta
        self._scaled = {
            size: Detector(
                loaded, scale=size, max_size=scaled_max_size(size, self.scale, self.max_size), batch_size=batch_size
            )
            for size in dict(tta.views(self.scale) if tta else ())
        }

    @classmethod
    def from_pretrained(cls, path: str | os.PathLike[str], *, verbose: bool = True, **options: Any) -> "Detector":
        """The detector of a checkpoint: of this project, official, `transformers`, detrex or mmdetection.

        Args:
            path: file or folder, or a name on the Hugging Face hub such as `facebook/detr-resnet-50`.
            verbose: print what was read.
            options: `dilation`, `num_heads`, `mask_padding`, `revision` and `token` for `load`, the others for
                `Detector`.
        """
        names = ("dilation", "num_heads", "mask_padding", "revision", "token")
        facts = {name: options.pop(name) for name in names if name in options}
        loaded = load(path, **facts)
        if verbose:
            print(loaded.report)
        return cls(loaded, **options)

    @overload
    def __call__(self, images: ImageLike, threshold: float = 0.5) -> Detections: ...

    @overload
    def __call__(self, images: Sequence[ImageLike], threshold: float = 0.5) -> list[Detections]: ...

    def __call__(
        self, images: ImageLike | Iterable[ImageLike], threshold: float = 0.5
    ) -> Detections | list[Detections]:
        """Detects.

        Args:
            images: an image, or a list: Pillow images, arrays (uint8 [h, w, 3] or [h, w], of NumPy or JAX), paths,
                image files as bytes, and open image files, of any sizes.
            threshold: detections with a lower score are left out.

        Returns:
            The detections of the image, or a list of those of each one.

        Raises:
            UserError: an array of another shape or type, a file that is no image, or something else altogether.
            NotFoundError: no such file.
        """
        given: Any = images
        if is_image(given) or not isinstance(given, Iterable) or isinstance(given, Mapping):
            one: list[Any] = [given]
            return next(iter(self.detect(one, threshold)))
        return list(self.detect(given, threshold))

    def detect(self, images: Iterable[ImageLike], threshold: float = 0.5) -> Iterator[Detections]:
        """As calling it with a list, but image after image, in order, in batches of consecutive ones of a bucket."""
        if self._tta is not None:
            yield from self._detect_views(images, threshold, self._tta)
            return
        batch: list[tuple[Image.Image, np.ndarray]] = []
        bucket = (0, 0)
        for image in images:
            opened = open_image(image)
            size, place = self._place(opened)
            if batch and (place != bucket or len(batch) == self.batch_size):
                yield from self._run(batch, bucket, threshold)
                batch = []
            bucket = place
            batch.append((opened, size))
        if batch:
            yield from self._run(batch, bucket, threshold)

    def _detect_views(self, images: Iterable[ImageLike], threshold: float, tta: TTAConfig) -> Iterator[Detections]:
        """`detect` with test-time augmentation; an image is opened once."""
        places, views = tta.views(self.scale), []
        copies = itertools.tee(map(open_image, images), len(places))
        for (scale, flip), copy in zip(places, copies, strict=True):
            views.append(self._scaled[scale].detect(map(ImageOps.mirror, copy) if flip else copy, threshold=0.0))
        for found in zip(*views, strict=True):
            image = found[0].image
            boxes = [
                Boxes(z.scores, z.labels, flip_boxes(z.boxes_xyxy, image.width) if flip else z.boxes_xyxy)
                for z, (_, flip) in zip(found, places, strict=True)
            ]
            merged = merge(boxes, tta.iou)
            kept = merged.scores >= threshold
            yield Detections(merged.boxes_xyxy[kept], merged.scores[kept], merged.labels[kept], self.categories, image)

    def split(self) -> tuple[nnx.GraphDef, nnx.State]:
        """The model's graph and state: `nnx.merge` puts a model together, also inside `jax.jit`."""
        return self._graphdef, self._state

    def prepare(self, image: Image.Image) -> tuple[np.ndarray, np.ndarray]:
        """An image as the model gets it: its bucket, uint8 [1, H, W, 3], and its size in it, int32 [1, 2] (h, w)."""
        size, place = self._place(image)
        pixels, sizes, _ = pad_to_bucket([(image, size)], place, 1, self.max_source_side)
        return pixels, sizes

    def _place(self, image: Image.Image) -> tuple[np.ndarray, tuple[int, int]]:
        """(h, w) to which an image is resized, as in evaluation, and its bucket."""
        size = resize_size(np.array([image.height, image.width]), self.scale, self.max_size)
        found = int(smallest_bucket(self.buckets, size[None])[0])
        if found >= 0:
            return size, self.buckets[found]
        h, w = round_up(size)
        return size, (int(h), int(w))

    def _run(
        self, batch: list[tuple[Image.Image, np.ndarray]], bucket: tuple[int, int], threshold: float
    ) -> Iterator[Detections]:
        pixels, sizes, orig_sizes = pad_to_bucket(batch, bucket, self.batch_size, self.max_source_side)
        found = jax.device_get(self._detect(self._state, pixels, sizes, orig_sizes))
        for (image, _), scores, labels, boxes in zip(batch, *found, strict=False):
            order = np.argsort(-scores, kind="stable")
            order = order[scores[order] >= threshold]
            boxes = np.clip(boxes[order], 0, [image.width, image.height] * 2).astype(np.float32)
            yield Detections(boxes, scores[order], labels[order], self.categories, image)
