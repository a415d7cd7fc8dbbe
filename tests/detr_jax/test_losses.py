import re

import jax
import jax.numpy as jnp
import loss_reference
import numpy as np
import pytest

from detr_jax.config import LossConfig
from detr_jax.losses import set_prediction_loss, sigmoid_focal_loss

# Most tests share one shape of problem, so that each configuration is compiled once.
jit_loss = jax.jit(set_prediction_loss, static_argnames="config")
jit_loss_and_gradients = jax.jit(jax.value_and_grad(set_prediction_loss, has_aux=True), static_argnames="config")

CONFIGS = {
    "focal": LossConfig(),
    "softmax": LossConfig.detr(),
    "other": LossConfig(
        focal_alpha=0.4, focal_gamma=1.5, class_cost=1.0, l1_cost=0.5, class_weight=3.0, giou_weight=0.7
    ),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_terms_equal_the_papers_formulas(name):
    outputs, targets = loss_reference.random_problem()
    check_terms(outputs, targets, CONFIGS[name])


def test_more_targets_than_queries():
    outputs, targets = loss_reference.random_problem(q=3, t=6, s=7, n=1)
    check_terms(outputs, targets, LossConfig())


def check_terms(outputs, targets, config):
    (total, terms), _ = jit_loss_and_gradients(outputs, targets, config=config)
    expected_total, expected = loss_reference.set_prediction_loss(outputs, targets, config)
    assert terms.keys() == expected.keys()
    for term, value in terms.items():
        assert value.dtype == jnp.float32
        # float32 sums of some hundred terms of like sign.
        np.testing.assert_allclose(value, expected[term], rtol=1e-5, err_msg=term)
    np.testing.assert_allclose(total, expected_total, rtol=1e-5)


@pytest.mark.parametrize("name", CONFIGS)
def test_gradient_equals_finite_differences_of_the_reference(name):
    config = CONFIGS[name]
    outputs, targets = loss_reference.random_problem()
    _, gradients = jit_loss_and_gradients(outputs, targets, config=config)
    rng = np.random.default_rng(5)
    outputs = jax.tree.map(lambda x: x.astype(np.float64), outputs)
    for _ in range(2):
        direction = jax.tree.map(lambda x: rng.normal(size=x.shape), outputs)
        up, down = (
            loss_reference.set_prediction_loss(
                jax.tree.map(lambda x, d, s=step: x + s * d, outputs, direction), targets, config
            )[0]
            for step in (1e-6, -1e-6)
        )
        slope = sum(jax.tree.leaves(jax.tree.map(lambda g, d: np.sum(g * d), gradients, direction)))
        # Central differences of a float64 function: 1e-12 / 1e-6 of rounding, on top of float32 gradients.
        np.testing.assert_allclose(slope, (up - down) / 2e-6, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["focal", "softmax"])
def test_the_losses_of_parts_add_up_to_those_of_the_batch(name):
    outputs, targets = loss_reference.random_problem()
    total, terms = jit_loss(outputs, targets, config=CONFIGS[name])
    parts = []
    for rows in (slice(0, 4), slice(4, 8)):
        part = {key: x[rows] for key, x in outputs.items() if key.startswith("pred")}
        part["aux_outputs"] = {key: x[:, rows] for key, x in outputs["aux_outputs"].items()}
        part["enc_outputs"] = {key: x[rows] for key, x in outputs["enc_outputs"].items()}
        some = {key: x[rows] for key, x in targets.items()}
        parts.append(jit_loss(part, some, config=CONFIGS[name], whole=targets["num_boxes"]))
    assert len({int(targets["num_boxes"][rows].sum()) for rows in (slice(0, 4), slice(4, 8))}) == 2  # of unequal weight
    np.testing.assert_allclose(parts[0][0] + parts[1][0], total, rtol=1e-5)
    for term, value in terms.items():
        np.testing.assert_allclose(parts[0][1][term] + parts[1][1][term], value, rtol=1e-5, atol=1e-5, err_msg=term)


def test_auxiliary_layers_can_be_left_out():
    outputs, targets = loss_reference.random_problem()
    del outputs["enc_outputs"]
    config = LossConfig(aux_loss=False)
    total, terms = jit_loss(outputs, targets, config=config)
    del outputs["aux_outputs"]
    expected, expected_terms = loss_reference.set_prediction_loss(outputs, targets, config)
    assert terms.keys() == expected_terms.keys()
    np.testing.assert_allclose(total, expected, rtol=1e-5)


@pytest.mark.parametrize("name", ["focal", "softmax"])
def test_a_batch_without_any_box(name):
    outputs, targets = loss_reference.random_problem()
    targets["num_boxes"] = np.zeros(8, np.int32)
    (total, terms), gradients = jit_loss_and_gradients(outputs, targets, config=CONFIGS[name])
    expected, _ = loss_reference.set_prediction_loss(outputs, targets, CONFIGS[name])
    np.testing.assert_allclose(total, expected, rtol=1e-5)
    assert (terms["loss_bbox"], terms["loss_giou"], terms["class_error"]) == (0, 0, 100)
    assert all(jnp.all(jnp.isfinite(gradient)) for gradient in jax.tree.leaves(gradients))
    np.testing.assert_array_equal(gradients["pred_boxes"], 0)


@pytest.mark.parametrize("name", ["focal", "softmax"])
def test_saturated_and_degenerate_predictions_have_finite_gradients(name):
    outputs, targets = loss_reference.random_problem()
    outputs = jax.tree.map(np.array, outputs)
    for layer in (outputs, outputs["aux_outputs"], outputs["enc_outputs"]):
        layer["pred_logits"] = 300 * np.sign(layer["pred_logits"])
        layer["pred_boxes"][..., 2:] = 0
    outputs["pred_boxes"][...] = 0
    targets["boxes_cxcywh"][1, 0] = 0
    targets["num_boxes"][:] = 5
    (total, _), gradients = jit_loss_and_gradients(outputs, targets, config=CONFIGS[name])
    assert jnp.isfinite(total)
    assert all(jnp.all(jnp.isfinite(gradient)) for gradient in jax.tree.leaves(gradients))


@pytest.mark.parametrize("matcher", ["device", "scipy"])
@pytest.mark.parametrize("where", ["pred_boxes", "pred_logits", "aux_outputs", "enc_outputs", "boxes_cxcywh", "labels"])
def test_what_cannot_be_matched_gives_nan(where, matcher):
    outputs, targets = loss_reference.random_problem()
    if where == "labels":
        targets["labels"][1, 0] = 4  # as many as there are outputs
    elif where == "boxes_cxcywh":
        targets["boxes_cxcywh"][1, 0, 0] = np.inf
    elif where == "aux_outputs":
        outputs["aux_outputs"]["pred_boxes"][0, 1, 0] = np.nan
    elif where == "enc_outputs":
        outputs["enc_outputs"]["pred_boxes"][1, 0] = np.nan
    else:
        outputs[where][1, 0] = np.nan
    (total, _), _ = jit_loss_and_gradients(outputs, targets, config=LossConfig(matcher=matcher))
    assert jnp.isnan(total)


def test_padding_and_the_order_of_targets_do_not_matter():
    def total(targets):
        return jit_loss_and_gradients(outputs, targets, config=LossConfig())[0][0]

    outputs, targets = loss_reference.random_problem()
    expected = total(targets)
    real = np.arange(5) < targets["num_boxes"][:, None]
    noise = {
        "boxes_cxcywh": np.where(real[..., None], targets["boxes_cxcywh"], np.float32(0.3)),
        "labels": np.where(real, targets["labels"], 2),
    }
    np.testing.assert_array_equal(total({**targets, **noise}), expected)
    full = targets["num_boxes"] == 5
    assert np.any(full)
    for name in ("boxes_cxcywh", "labels"):
        targets[name][full] = targets[name][full, ::-1]
    np.testing.assert_allclose(total(targets), expected, rtol=1e-6)


def test_perfect_predictions():
    outputs, targets = loss_reference.random_problem()
    targets["num_boxes"][:] = 5
    outputs["pred_boxes"][:, :5] = targets["boxes_cxcywh"][:, ::-1]
    outputs["pred_logits"][:] = [-40, -40, -40, -39]  # the last class wins: not counted by `cardinality_error`
    outputs["pred_logits"][:, :5] = 80 * np.eye(4)[targets["labels"][:, ::-1]] - 40
    (_, terms), _ = jit_loss_and_gradients(outputs, targets, config=LossConfig())
    for name in ("loss_bbox", "loss_giou", "class_error", "cardinality_error"):
        assert terms[name] == 0
    assert terms["loss_ce"] < 1e-30


def test_bfloat16_outputs_are_scored_in_float32():
    outputs, targets = loss_reference.random_problem()
    outputs = {name: jnp.asarray(outputs[name], jnp.bfloat16) for name in ("pred_logits", "pred_boxes")}
    check_terms(outputs, targets, LossConfig())


@pytest.mark.parametrize("name", ["focal", "softmax"])
def test_eight_devices_give_the_loss_and_gradients_of_one(name):
    config = CONFIGS[name]
    outputs, targets = loss_reference.random_problem()
    expected = jit_loss_and_gradients(outputs, targets, config=config)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    images, layers = (jax.NamedSharding(mesh, spec) for spec in (jax.P("data"), jax.P(None, "data")))
    shardings = {**dict.fromkeys(outputs, images), "aux_outputs": layers}
    with jax.set_mesh(mesh):
        outputs, targets = jax.device_put(outputs, shardings), jax.device_put(targets, images)
        compiled = jit_loss_and_gradients.lower(outputs, targets, config=config).compile()
        actual = compiled(outputs, targets)
    # The same float32 terms, added in another order.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-6, atol=1e-7), actual, expected)
    # Only sums of scalars cross the devices: no prediction is gathered.
    assert not re.search(r"all-gather|all-to-all|collective-permute", compiled.as_text())


def test_focal_loss():
    # Lin et al. section 3.3: gamma 0 is balanced cross-entropy; gamma 2 divides that of an easy example (0.9) by 100.
    logits = jnp.log(jnp.array([0.9, 0.5]) / jnp.array([0.1, 0.5]))
    positive = jnp.array([True, True])
    plain = sigmoid_focal_loss(logits, positive, 0.25, 0.0)
    np.testing.assert_allclose(plain, -0.25 * np.log([0.9, 0.5]), rtol=1e-6)
    np.testing.assert_allclose(sigmoid_focal_loss(logits, positive) / plain, [0.01, 0.25], rtol=1e-5)
    np.testing.assert_allclose(
        sigmoid_focal_loss(-logits, ~positive), 3 * sigmoid_focal_loss(logits, positive), rtol=1e-6
    )
