import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from detr_jax.boxes import (
    aligned_generalized_box_iou,
    box_iou,
    cxcywh_to_xyxy,
    generalized_box_iou,
    xyxy_to_cxcywh,
    xyxy_to_xywh,
)

jit_iou, jit_giou = jax.jit(box_iou), jax.jit(generalized_box_iou)


def random_boxes(rng, *shape):
    """xyxy in [0, 1], with sides of at least 0.05."""
    size = rng.uniform(0.05, 0.5, (*shape, 2))
    start = rng.uniform(0, 1, (*shape, 2)) * (1 - size)
    return np.concatenate([start, start + size], axis=-1).astype(np.float32)


def loop_iou_and_giou(a, b):
    """The definition, in float64, one pair at a time."""
    iou, giou = np.zeros((2, len(a), len(b)))
    for (i, p), (j, q) in itertools.product(enumerate(a.astype(np.float64)), enumerate(b.astype(np.float64))):
        width = max(0, min(p[2], q[2]) - max(p[0], q[0]))
        height = max(0, min(p[3], q[3]) - max(p[1], q[1]))
        union = (p[2] - p[0]) * (p[3] - p[1]) + (q[2] - q[0]) * (q[3] - q[1]) - width * height
        hull = (max(p[2], q[2]) - min(p[0], q[0])) * (max(p[3], q[3]) - min(p[1], q[1]))
        iou[i, j] = width * height / union
        giou[i, j] = iou[i, j] - (hull - union) / hull
    return iou, giou


def test_formats():
    np.testing.assert_allclose(cxcywh_to_xyxy(jnp.array([[0.5, 0.25, 0.5, 0.25]])), [[0.25, 0.125, 0.75, 0.375]])
    boxes = random_boxes(np.random.default_rng(0), 3, 7)
    # Two roundings of numbers up to 1.
    np.testing.assert_allclose(cxcywh_to_xyxy(xyxy_to_cxcywh(boxes)), boxes, atol=2e-7)


@pytest.mark.parametrize("scale", [1.0, 1333.0])
def test_pairs_equal_the_definition(scale):
    rng = np.random.default_rng(1)
    a, b = scale * random_boxes(rng, 30), scale * random_boxes(rng, 40)
    iou, giou = loop_iou_and_giou(a, b)
    # Differences of coordinates are rounded to 6e-8 of up to 1, the smallest side is 0.05.
    np.testing.assert_allclose(box_iou(a, b), iou, atol=5e-6)
    np.testing.assert_allclose(generalized_box_iou(a, b), giou, atol=5e-6)
    np.testing.assert_allclose(aligned_generalized_box_iou(a, b[:30]), np.diagonal(giou), atol=5e-6)


def test_leading_axes():
    rng = np.random.default_rng(2)
    a, b = random_boxes(rng, 2, 1, 3), random_boxes(rng, 4, 5)
    giou = generalized_box_iou(a, b)
    assert giou.shape == (2, 4, 3, 5)
    np.testing.assert_array_equal(giou[1, 2], generalized_box_iou(a[1, 0], b[2]))
    assert generalized_box_iou(a[0, 0], np.zeros((0, 4), np.float32)).shape == (3, 0)


POINT = [0.4, 0.4, 0.4, 0.4]
SEGMENT = [0.2, 0.5, 0.6, 0.5]
BOX = [0.2, 0.2, 0.6, 0.6]


@pytest.mark.parametrize(
    ("a", "b", "iou", "giou"),
    [
        (BOX, BOX, 1, 1),
        (POINT, POINT, 1, 1),
        (SEGMENT, SEGMENT, 1, 1),
        (POINT, BOX, 0, 0),
        (SEGMENT, BOX, 0, 0),
        ([0.8, 0.2, 0.8, 0.2], BOX, 0, 0.16 / 0.24 - 1),
        (POINT, [0.7, 0.1, 0.7, 0.1], 0, -1),
        (POINT, [0.4, 0.7, 0.4, 0.7], 0, -1),
        (POINT, SEGMENT, 0, -1),
        (SEGMENT, [0.4, 0.2, 0.4, 0.8], 0, -1),
        (SEGMENT, [0.4, 0.5, 0.8, 0.5], 1 / 3, 1 / 3),
        (SEGMENT, [0.8, 0.5, 1.0, 0.5], 0, -0.25),
        ([0.4, 0.4, 0.1, 0.1], POINT, 1, 1),
        ([0.4, 0.2, 0.1, 0.6], [0.4, 0.2, 0.4, 0.6], 1, 1),
        ([0.4, 0.4, 0.1, 0.1], BOX, 0, 0),
    ],
)
def test_limits_of_degenerate_boxes(a, b, iou, giou):
    for p, q in ((a, b), (b, a)):
        p, q = jnp.array([p]), jnp.array([q])
        # 2 * 1e-8 of growth over the shortest side of any test box that is not 0, and float32.
        np.testing.assert_allclose(jit_iou(p, q), [[iou]], atol=1e-6)
        np.testing.assert_allclose(jit_giou(p, q), [[giou]], atol=1e-6)


def test_values_and_gradients_are_finite_for_every_degenerate_pair():
    sides = [-0.3, -1e-9, 0.0, 1e-30, 1e-20, 1e-10, 1e-5, 0.2]
    starts = [0.0, 0.5]
    boxes = jnp.array([[x, y, x + w, y + h] for x, y, w, h in itertools.product(starts, starts, sides, sides)])

    giou = jit_giou(boxes, boxes)
    # The quotients round in float32.
    assert jnp.all((giou >= -1 - 1e-6) & (giou <= 1 + 1e-6))
    np.testing.assert_array_equal(jnp.diagonal(giou), 1)
    iou = jit_iou(boxes, boxes)
    assert jnp.all((iou >= 0) & (iou <= 1 + 1e-6))
    for function in (box_iou, generalized_box_iou):
        gradients = jax.jit(jax.grad(lambda a, b, f=function: jnp.sum(f(a, b)), (0, 1)))(boxes, boxes)
        assert all(jnp.all(jnp.isfinite(gradient)) for gradient in gradients)


def test_nan_is_not_hidden():
    boxes = jnp.array([BOX, [jnp.nan, 0, 1, 1]])
    assert jnp.all(jnp.isnan(generalized_box_iou(boxes, boxes)) == jnp.array([[False, True], [True, True]]))


def test_gradient_equals_finite_differences():
    rng = np.random.default_rng(3)
    a, b, direction = random_boxes(rng, 20), random_boxes(rng, 20), rng.normal(size=(20, 4))
    _, slope = jax.jvp(lambda a: aligned_generalized_box_iou(a, b), (jnp.array(a),), (jnp.float32(direction),))
    step = 1e-6 * direction
    up, down = (np.diagonal(loop_iou_and_giou(a.astype(np.float64) + s, b)[1]) for s in (step, -step))
    # Slopes of up to 1 / 0.05 in float32.
    np.testing.assert_allclose(slope, (up - down) / 2e-6, atol=5e-4, rtol=1e-4)


def test_numpy_arrays_stay_numpy():
    """Figures and surgery compare boxes on the host; the definition is the same."""
    a = np.array([[0, 0, 10, 10], [5, 5, 9, 9]], np.float32)
    b = np.array([[0, 0, 10, 9], [20, 20, 30, 30]], np.float32)
    found = box_iou(a, b)
    assert isinstance(found, np.ndarray)
    np.testing.assert_allclose(found, box_iou(jnp.asarray(a), jnp.asarray(b)), rtol=1e-6)
    np.testing.assert_allclose(found[0], [0.9, 0], atol=1e-6)
    np.testing.assert_array_equal(xyxy_to_xywh(a), [[0, 0, 10, 10], [5, 5, 4, 4]])
