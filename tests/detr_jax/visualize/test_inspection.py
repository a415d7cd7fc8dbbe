"""`Inspector`: what it says about an image is what the model computed, in the image's pixels."""

import functools

import jax
import numpy as np
import pytest
import tiny
from captured_models import DETR, functions
from flax import nnx

from detr_jax.categories import Categories
from detr_jax.checkpoints.load import Loaded
from detr_jax.data.resample import normalize
from detr_jax.detector import Detector
from detr_jax.models import attention, build_abstract, deformable_detr
from detr_jax.visualize.inspection import Inspector, Maps, Sampling

pytestmark = pytest.mark.usefixtures("short_resnet")

POINTS = [(10, 20), (630, 470), (320.5, 100)]


def make_detector(config, classification):
    graphdef = nnx.split(build_abstract(config))[0]
    state, _, _ = functions(config)  # parameters with noise, so that every token differs
    names = tuple(f"class {i}" for i in range(config.num_classes))
    categories = Categories(tuple(range(1, config.num_classes + 1)), names)
    return Detector(Loaded(config, nnx.merge(graphdef, state), categories, classification, 60, 96, "noise"))


@pytest.fixture(scope="module")
def deformable():
    """A two-stage Deformable DETR, and what it did on an image of 640 x 480, shown to it as 80 x 60 on 96 x 64."""
    detector = make_detector(tiny.config().model, "focal")
    inspector = Inspector(detector)
    return detector, inspector, inspector(image(), POINTS)


@pytest.fixture(scope="module")
def detr():
    detector = make_detector(DETR, "softmax")
    return detector, Inspector(detector)(image(), POINTS)


def image():
    return str(tiny.DATA / "bccd/images/BloodImage_00001.jpg")


def captured(detector, seen):
    graphdef, state = detector.split()
    pixels, sizes = detector.prepare(seen.image)

    @jax.jit
    def run(state):
        outputs, found = nnx.capture(nnx.merge(graphdef, state), nnx.Intermediate)(normalize(pixels, sizes), sizes)
        return outputs, nnx.to_pure_dict(found)

    return *run(state), pixels.shape[1:3], sizes[0]


def test_deformable(deformable):
    detector, _, seen = deformable
    outputs, found, bucket, size = captured(detector, seen)
    assert bucket == (64, 96) and size.tolist() == [60, 80]
    np.testing.assert_allclose(seen.boxes_cxcywh[-1], outputs["pred_boxes"][0], atol=1e-6)
    np.testing.assert_allclose(seen.logits[0], outputs["aux_outputs"]["pred_logits"][0, 0], atol=1e-5)
    # Levels of 6 x 4 and 3 x 2 cells, of which the image fills 5 x 4 and 3 x 2 (80 of 96 pixels are 2.5 cells).
    filled = np.array([[5 / 6, 1], [1, 1]])
    for part, layers, ours, rows in (("decoder", 2, seen.decoder, slice(None)), ("encoder", 1, seen.encoder, None)):
        assert isinstance(ours, Sampling) and len(ours.weights) == layers
        for i in range(layers):
            layer = found[part][i]["cross_attn" if part == "decoder" else "self_attn"]
            if rows is None:  # the cells of the points: (column, row) in each level, which start at 0 and 24
                cells = [[(0, 0), (0, 0)], [(4, 3), (2, 1)], [(2, 0), (1, 0)]]
                rows = [24 * level + y * (6, 3)[level] + x for point in cells for level, (x, y) in enumerate(point)]
            locations = np.asarray(layer["sampling_locations"])[0][rows] / filled[:, None] * (640, 480)
            np.testing.assert_allclose(ours.locations[i], locations, rtol=1e-5, atol=1e-2)  # of 640 pixels in float32
            weights = np.asarray(layer["attention_weights"])[0][rows]
            np.testing.assert_allclose(ours.weights[i], weights, atol=1e-5)  # another program: other roundings
    np.testing.assert_allclose(ours.weights.sum((-1, -2)), 1, atol=1e-5)
    # The cells that the points are in, center by center.
    centers = [(64, 60), (320 / 3, 120), (576, 420), (1600 / 3, 360), (320, 60), (320, 120)]
    np.testing.assert_allclose(seen.encoder.references[0], centers, atol=1e-2)


def test_refinement_starts_from_the_proposals(deformable):
    _, _, seen = deformable
    xy, wh = seen.decoder.references[..., :2], seen.decoder.references[..., 2:]
    corners = np.concatenate([xy - wh / 2, xy + wh / 2], -1)
    proposals = seen.proposals
    assert proposals.shapes == ((4, 6), (2, 3)) and proposals.boxes_xyxy.shape == (30, 4)
    np.testing.assert_allclose(proposals.cells, [(128, 120), (640 / 3, 240)], rtol=1e-5)
    # float32, up to 640 pixels.
    usable = ~np.isnan(proposals.boxes_xyxy[proposals.chosen]).any(-1)
    assert usable.sum() > 10
    np.testing.assert_allclose(corners[0][usable], proposals.boxes_xyxy[proposals.chosen][usable], atol=1e-2)
    np.testing.assert_allclose(corners[1], seen.boxes_xyxy[0], atol=1e-2)
    assert (proposals.scores[np.isnan(proposals.boxes_xyxy[:, 0])] == 0).all()


def test_blocks_of_tokens_make_no_difference(deformable, monkeypatch):
    """On TPUs the encoder's tokens are in another order, which nobody sees; its kernels capture nothing."""
    detector, _, seen = deformable
    monkeypatch.setattr(deformable_detr, "token_order", lambda _, shapes, points: attention.block_order(shapes))
    interpreted = functools.partial(attention.ms_deform_cross_attn, interpret=True)
    monkeypatch.setattr(attention, "ms_deform_cross_attn", interpreted)
    again = Inspector(detector)(image(), POINTS)
    # Sums over the same numbers in another order, float32; up to 640 pixels.
    np.testing.assert_allclose(again.encoder.references, seen.encoder.references, atol=1e-2)
    np.testing.assert_allclose(again.encoder.weights, seen.encoder.weights, atol=1e-4)
    np.testing.assert_allclose(again.encoder.locations, seen.encoder.locations, atol=0.1)
    np.testing.assert_allclose(again.boxes_xyxy, seen.boxes_xyxy, atol=0.1)
    np.testing.assert_array_equal(again.proposals.chosen, seen.proposals.chosen)


def test_it_sees_what_the_detector_detects(deformable, detr):
    for detector, seen in ((deformable[0], deformable[2]), detr):
        found = detector(image(), 0.0)
        best = seen.best()[0]
        assert found.scores[0] == pytest.approx(seen.scores[best], abs=1e-6)
        assert found.labels[0] == seen.labels[best]
        boxes = np.clip(seen.boxes_xyxy[-1, best], 0, (640, 480) * 2)
        np.testing.assert_allclose(found.boxes_xyxy[0], boxes, atol=1e-2)
        name = detector.categories.names[found.labels[0]]
        assert seen.caption(best) == f"query {best}: {name} {found.scores[0]:.2f}"
        assert seen.best(3, threshold=2.0) == []


def test_detr(detr):
    detector, seen = detr
    _, found, bucket, size = captured(detector, seen)
    assert bucket == (64, 96) and size.tolist() == [60, 80]
    # The image fills 3 of 3 columns (nearest: 80 of 96 pixels is 2.5 cells) and both rows.
    valid = np.asarray(found["valid_maps"][0][0])
    rows, columns = int(valid[:, 0].sum()), int(valid[0].sum())
    assert isinstance(seen.decoder, Maps) and isinstance(seen.encoder, Maps)
    assert seen.decoder.cell == pytest.approx((32 * 640 / 80, 32 * 480 / 60))
    weights = np.asarray(found["decoder"][1]["cross_attn"]["attention_weights"][0]).reshape(4, -1, 2, 3)
    expected = weights.swapaxes(0, 1)[..., :rows, :columns]
    np.testing.assert_allclose(seen.decoder.weights[1], expected, atol=1e-4)  # another program: other roundings
    np.testing.assert_allclose(seen.decoder.weights.sum((-1, -2)), 1, atol=1e-5)  # nothing is in the padding
    weights = np.asarray(found["encoder"][0]["self_attn"]["attention_weights"][0])
    tokens = [min(int(y / 480 * rows), rows - 1) * 3 + min(int(x / 640 * columns), columns - 1) for x, y in POINTS]
    assert len(set(tokens)) == 3
    expected = weights[:, tokens].swapaxes(0, 1).reshape(3, 4, 2, 3)[..., :rows, :columns]
    np.testing.assert_allclose(seen.encoder.weights[0], expected, atol=1e-4)  # as above


@pytest.mark.slow  # compiles two gradients of the whole model
def test_saliency_is_the_gradient(deformable):
    detector, inspector, seen = deformable
    query = seen.best(3)[2]
    saliency = inspector.saliency(image(), query)
    graphdef, state = detector.split()
    pixels, sizes = detector.prepare(seen.image)
    label = int(seen.labels[query])

    @jax.jit
    @jax.grad
    def gradient(images, output):
        outputs = nnx.merge(graphdef, state)(images, sizes)
        probability = jax.nn.sigmoid(outputs["pred_logits"][0, query, label])
        return output[0] * outputs["pred_boxes"][0, query, 2] + output[1] * probability

    for row, output in ((2, (1.0, 0.0)), (4, (0.0, 1.0))):
        expected = np.linalg.norm(gradient(normalize(pixels, sizes), output)[0], axis=-1)[:60, :80]
        # Two orders of the same sums in float32.
        np.testing.assert_allclose(saliency.norms[row], expected, rtol=1e-3, atol=1e-4 * expected.max())
        assert expected.max() > 0
    np.testing.assert_allclose(saliency.box_xyxy, seen.boxes_xyxy[-1, query], atol=1e-2)


def test_bad_input(deformable):
    _, inspector, seen = deformable
    with pytest.raises(ValueError, match=r"point \(640, 3\) is outside the image, which has 640 x 480"):
        inspector(image(), [(3, 3), (640, 3)])
    with pytest.raises(ValueError, match="query 30: expected 0 to 29"):
        inspector.saliency(image(), 30)
    with pytest.raises(FileNotFoundError, match=r"nowhere\.jpg: no such image"):
        inspector("nowhere.jpg")
    with pytest.raises(ValueError, match="query -1"):
        seen.check_query(-1)
