"""Looking inside a detector: what it attended to, proposed and refined on one image, and which pixels mattered.

seen = Inspector(detector)("photo.jpg", points=[(120, 80)])
seen.decoder.locations  # where each query sampled, in pixels of the image

All of it comes from the model itself, which hands out intermediate values under `nnx.capture` (see
`detr_jax.models.layers.capture`); here they are only put into the image's pixels.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import scipy.special
from flax import nnx
from PIL import Image

from detr_jax.boxes import cxcywh_to_xyxy
from detr_jax.categories import Categories
from detr_jax.config import DETRConfig, ModelConfig
from detr_jax.data.image import ImageLike, open_image
from detr_jax.data.resample import normalize
from detr_jax.detector import Detector
from detr_jax.errors import UserError


@dataclasses.dataclass(frozen=True, eq=False)
class Sampling:
    """Deformable attention of some layers. Rows `q` are queries in the decoder, points in the encoder."""

    references: np.ndarray
    """float32 [layers, q, 2 or 4]: reference points (x, y) or boxes (cx, cy, w, h), pixels of the image."""
    locations: np.ndarray
    """float32 [layers, q, h, l, p, 2]: sampling points (x, y), pixels of the image; they may be outside of it."""
    weights: np.ndarray
    """float32 [layers, q, h, l, p]: attention weights; those of a head sum to 1 over its levels and points."""


@dataclasses.dataclass(frozen=True, eq=False)
class Maps:
    """Softmax attention of some layers over the cells of the feature map. Rows `q` as in `Sampling`."""

    weights: np.ndarray
    """float32 [layers, q, h, y, x]: attention weights; those of a head sum to 1 over the map."""
    cell: tuple[float, float]
    """(width, height) of a cell in pixels of the image; the last ones may reach beyond it."""


@dataclasses.dataclass(frozen=True, eq=False)
class Proposals:
    """What the encoder's tokens proposed (two-stage), all levels one after another."""

    boxes_xyxy: np.ndarray
    """float32 [s, 4], pixels of the image; NaN where a token may not propose."""
    scores: np.ndarray
    """float32 [s] in [0, 1]: that of any object, whatever its class."""
    chosen: np.ndarray
    """int32 [q]: the token that each query comes from."""
    shapes: tuple[tuple[int, int], ...]
    """(height, width) of each level's map, padding included."""
    cells: np.ndarray
    """float32 [l, 2]: (width, height) of each level's cells, pixels of the image."""

    @property
    def levels(self) -> np.ndarray:
        """int [s]: the level of each token."""
        return np.repeat(np.arange(len(self.shapes)), [h * w for h, w in self.shapes])


@dataclasses.dataclass(frozen=True, eq=False)
class Inspection:
    """What a detector did on one image."""

    image: Image.Image = dataclasses.field(repr=False)
    """The image, upright, RGB."""
    categories: Categories
    """What the labels stand for."""
    classification: Literal["focal", "softmax"]
    """As the model was trained."""
    config: ModelConfig
    """The model's."""
    logits: np.ndarray
    """float32 [layers, q, k]: class logits of every decoder layer, the last one last."""
    boxes_cxcywh: np.ndarray
    """float32 [layers, q, 4], in 0-1 of the image."""
    decoder: Sampling | Maps
    """Each query's attention to the image, of every decoder layer."""
    points: np.ndarray
    """float32 [n, 2]: the chosen points (x, y), pixels of the image."""
    encoder: Sampling | Maps | None
    """Self-attention at the chosen points, of every encoder layer; `None` without points or encoder. Of a model with
    `l` levels, row `i * l + level` is point i's cell in that level."""
    proposals: Proposals | None
    """Of a two-stage model."""

    @property
    def probabilities(self) -> np.ndarray:
        """float32 [layers, q, classes], without "no object"."""
        if self.classification == "focal":
            return scipy.special.expit(self.logits)
        return scipy.special.softmax(self.logits, -1)[..., :-1]

    @property
    def scores(self) -> np.ndarray:
        """float32 [q]: each query's best score after the last layer."""
        return self.probabilities[-1].max(-1)

    @property
    def labels(self) -> np.ndarray:
        """int [q]: the class of that score."""
        return self.probabilities[-1].argmax(-1)

    @property
    def boxes_xyxy(self) -> np.ndarray:
        """float32 [layers, q, 4], pixels of the image; they may reach beyond it."""
        return _pixels(self.boxes_cxcywh, np.array(self.image.size, np.float32))

    def best(self, number: int = 1, *, threshold: float = 0.0) -> list[int]:
        """The queries of the highest scores, best first; at most `number`, none below `threshold`."""
        order = np.argsort(-self.scores, kind="stable")[:number]
        return [int(query) for query in order if self.scores[query] >= threshold]

    def check_query(self, query: int) -> int:
        """The query itself.

        Raises:
            ValueError: there is no such query.
        """
        if not 0 <= query < len(self.scores):
            raise UserError(f"query {query}: expected 0 to {len(self.scores) - 1}, the model has so many queries")
        return query

    def caption(self, query: int) -> str:
        """`query 17: RBC 0.93`."""
        return f"query {query}: {self.categories.names[self.labels[query]]} {self.scores[query]:.2f}"


@dataclasses.dataclass(frozen=True, eq=False)
class Saliency:
    """How much each pixel moves a detection."""

    image: Image.Image = dataclasses.field(repr=False)
    """The image, upright, RGB."""
    caption: str
    """Which detection."""
    box_xyxy: np.ndarray
    """float32 [4], pixels of the image."""
    norms: np.ndarray
    """float32 [5, h, w]: norm over the colors of the gradient of the box's cx, cy, w, h (in 0-1 of the image) and of
    the score, by the normalized pixels of the resized image that the model gets."""


class Inspector:
    """Runs a detector's model on images and keeps what happens inside.

    Args:
        detector: the detector; images are resized and padded as it does. Each bucket is compiled once more.
    """

    def __init__(self, detector: Detector):
        self.detector = detector
        graphdef, self._state = detector.split()

        @jax.jit
        def look(state, pixels, sizes, points):
            model = nnx.merge(graphdef, state)
            outputs, captured = nnx.capture(model, nnx.Intermediate)(normalize(pixels, sizes), sizes)
            return _first_image(outputs, nnx.to_pure_dict(captured), points)

        @jax.jit
        def gradients(state, pixels, sizes, query, label):
            model = nnx.merge(graphdef, state)

            def detection(images):
                outputs = model(images, sizes)
                logits = outputs["pred_logits"][0, query]
                focal = detector.classification == "focal"
                scores = jax.nn.sigmoid(logits) if focal else jax.nn.softmax(logits)
                return jnp.append(outputs["pred_boxes"][0, query], scores[label])

            _, pull_back = jax.vjp(detection, normalize(pixels, sizes))
            return jax.lax.map(lambda row: jnp.linalg.norm(pull_back(row)[0][0], axis=-1), jnp.eye(5))

        self._look, self._gradients = look, gradients

    def __call__(self, image: ImageLike, points: Sequence[tuple[float, float]] = ()) -> Inspection:
        """Detects, and looks at it.

        Args:
            image: a Pillow image, an array or a path, as for `Detector`.
            points: (x, y) in pixels of the image, at which to look at the encoder's attention.

        Raises:
            ValueError: a point outside the image.
        """
        opened, config = open_image(image), self.detector.config
        for x, y in points:
            if not (0 <= x < opened.width and 0 <= y < opened.height):
                raise UserError(
                    f"point ({x:g}, {y:g}) is outside the image, which has {opened.width} x {opened.height}"
                )
        places = np.array(points, np.float32).reshape(-1, 2)
        pixels, sizes = self.detector.prepare(opened)
        size = np.array(opened.size, np.float32)
        outputs, found = jax.device_get(self._look(self._state, pixels, sizes, places / size))
        if isinstance(config, DETRConfig):
            stride = 16 if config.backbone.dilation else 32
            cell = (stride * size[0] / sizes[0, 1], stride * size[1] / sizes[0, 0])
            decoder, encoder = _maps(found["decoder"], cell), _maps(found["encoder"], cell)
        else:
            decoder, encoder = _sampling(found["decoder"], size), _sampling(found["encoder"], size)
        assert decoder is not None
        proposals = None
        if "proposals" in found:
            boxes, logits, chosen, filled = found["proposals"]
            usable = (boxes < 1).any(-1, keepdims=True)  # the model puts (1, 1, 1, 1) where there is none
            boxes, scores = _pixels(np.where(usable, boxes, np.nan), size), scipy.special.expit(logits)
            shapes = tuple(valid.shape for valid in found["valid_maps"])
            proposals = Proposals(boxes, np.where(usable[:, 0], scores, 0), chosen, shapes, size / filled)
        return Inspection(
            image=opened,
            categories=self.detector.categories,
            classification=self.detector.classification,
            config=config,
            logits=outputs["pred_logits"],
            boxes_cxcywh=outputs["pred_boxes"],
            decoder=decoder,
            points=places,
            encoder=encoder if len(places) else None,
            proposals=proposals,
        )

    def saliency(self, image: ImageLike, query: int | None = None) -> Saliency:
        """Gradients of a detection by the image's pixels (Deformable DETR, appendix A.5).

        What the model detaches is constant here as in training: with refinement, the boxes of the layer before.

        Args:
            image: as for calling it.
            query: which detection; `None` takes the best.
        """
        seen = self(image)
        query = seen.best()[0] if query is None else seen.check_query(query)
        pixels, sizes = self.detector.prepare(seen.image)
        norms = np.asarray(self._gradients(self._state, pixels, sizes, query, int(seen.labels[query])))
        h, w = sizes[0]
        return Saliency(seen.image, seen.caption(query), seen.boxes_xyxy[-1, query], norms[:, :h, :w])


def _first_image(outputs: dict[str, Any], captured: dict[str, Any], points: jax.Array):
    """What `Inspection` needs of a batch's first image, little enough to fetch: encoder rows at the points alone."""
    layers = {
        name: jnp.concatenate([outputs["aux_outputs"][name][:, 0], outputs[name][:1]])
        for name in ("pred_logits", "pred_boxes")
    }
    valid_maps = [valid[0] for valid in captured["valid_maps"]]
    tokens, start, all_filled = [], 0, []
    for valid in valid_maps:  # levels one after another, row by row
        filled = jnp.stack([valid[0].sum(), valid[:, 0].sum()])  # (x, y): cells that the image fills
        x, y = jnp.clip(jnp.floor(points * filled), 0, filled - 1).astype(jnp.int32).T
        tokens.append(start + y * valid.shape[1] + x)
        start += valid.size
        all_filled.append(filled)
    tokens = jnp.stack(tokens, 1).reshape(-1)

    def attention(layer, rows):
        weights = layer["attention_weights"][0]
        if "sampling_locations" not in layer:
            h, w = valid_maps[0].shape
            weights = jnp.swapaxes(weights, 0, 1)[rows]
            return {"weights": weights.reshape(*weights.shape[:2], h, w), "valid": valid_maps[0]}
        ratios = captured["valid_ratios"][0]  # 0-1 of the image -> 0-1 of each level's map
        locations = layer["sampling_locations"][0][rows] / ratios[:, None]
        reference = layer["reference_points"][0][rows]
        reference /= jnp.tile(ratios, reference.shape[-1] // 2)
        return {"weights": weights[rows], "locations": locations, "reference": reference[:, 0]}

    def all_layers(part, name, rows):
        found = captured.get(part, {})
        return [attention(found[i][name], rows) for i in sorted(found)]

    found: dict[str, Any] = {
        "valid_maps": valid_maps,
        "decoder": all_layers("decoder", "cross_attn", slice(None)),
        "encoder": all_layers("encoder", "self_attn", tokens),
    }
    if "proposals" in captured:
        boxes, scores, top = (captured["proposals"][name][0] for name in ("boxes", "scores", "top_tokens"))
        found["proposals"] = (boxes, scores, top, jnp.stack(all_filled))
    return layers, found


def _pixels(boxes_cxcywh: np.ndarray, size: np.ndarray) -> np.ndarray:
    """Boxes in 0-1 of an image as xyxy in its pixels; `size` is (w, h)."""
    return np.asarray(cxcywh_to_xyxy(jnp.asarray(boxes_cxcywh))) * np.tile(size, 2)


def _sampling(layers: list[dict[str, np.ndarray]], size: np.ndarray) -> Sampling | None:
    """Layers of `_first_image` in pixels of an image of that size (w, h)."""
    if not layers:
        return None
    references, locations, weights = (
        np.stack([layer[name] for layer in layers]) for name in ("reference", "locations", "weights")
    )
    return Sampling(references * np.tile(size, references.shape[-1] // 2), locations * size, weights)


def _maps(layers: list[dict[str, np.ndarray]], cell: tuple[float, float]) -> Maps | None:
    """Layers of `_first_image`, without the padding."""
    if not layers:
        return None
    valid = layers[0]["valid"]
    rows, columns = int(valid[:, 0].sum()), int(valid[0].sum())
    return Maps(np.stack([layer["weights"] for layer in layers])[..., :rows, :columns], cell)
