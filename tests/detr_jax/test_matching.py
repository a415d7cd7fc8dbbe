import dataclasses
import re

import jax
import jax.numpy as jnp
import loss_reference
import numpy as np
import pytest
from scipy.optimize import linear_sum_assignment

from detr_jax.config import LossConfig
from detr_jax.matching import assign, assign_on_host, match, match_cost

MATCHERS = {"device": jax.jit(assign), "scipy": jax.jit(assign_on_host)}
jit_match = jax.jit(match, static_argnames="config")
jit_match_cost = jax.jit(match_cost, static_argnames="config")


def costs(kind, rng, n, t, q):
    if kind == "random":
        return rng.normal(size=(n, t, q))
    if kind == "tied":  # small integers: many equal costs, and sums without rounding
        return rng.integers(0, 3, size=(n, t, q))
    if kind == "constant":
        return np.broadcast_to(rng.integers(-2, 2, size=(n, 1, 1)), (n, t, q))
    # All rows like the same columns: the longest searches.
    return 0.1 * rng.normal(size=(n, t, q)) + 3 * rng.normal(size=(n, 1, q))


@pytest.mark.parametrize("kind", ["random", "tied", "constant", "contested"])
@pytest.mark.parametrize(("t", "q"), [(1, 1), (7, 7), (9, 4), (12, 40)])
@pytest.mark.parametrize("matcher", MATCHERS)
def test_assignments_cost_what_scipys_do(matcher, t, q, kind):
    n = 100
    rng = np.random.default_rng(t + q)
    cost = costs(kind, rng, n, t, q).astype(np.float32)
    num_rows = rng.integers(0, t + 1, size=n).astype(np.int32)
    num_rows[:2] = 0, t
    columns = np.asarray(MATCHERS[matcher](cost, num_rows))
    assert columns.dtype == np.int32
    for i in range(n):
        matched = columns[i] >= 0
        assert matched.sum() == min(num_rows[i], q)
        assert not matched[num_rows[i] :].any()
        assert len(set(columns[i][matched])) == matched.sum()  # no column twice
        best = cost[i, : num_rows[i]][linear_sum_assignment(cost[i, : num_rows[i]])]
        # The search adds up to some ten float32 costs of up to 10: near-ties may be taken within that rounding.
        tolerance = 0 if kind in ("tied", "constant") else 1e-5
        found = cost[i][matched, columns[i][matched]]
        np.testing.assert_allclose(found.sum(dtype=np.float64), best.sum(dtype=np.float64), atol=tolerance, rtol=0)


@pytest.mark.parametrize("t", [3, 8])
@pytest.mark.parametrize("matcher", MATCHERS)
def test_costs_that_are_no_costs_match_nothing(matcher, t):
    rng = np.random.default_rng(0)
    cost = rng.normal(size=(7, t, 5)).astype(np.float32)
    num_rows = np.full(7, 2, np.int32)
    expected = np.array(MATCHERS[matcher](cost, num_rows))
    for i, bad in enumerate([np.nan, np.inf, -np.inf, 2e30]):
        cost[i, 1, 3] = bad
        expected[i] = -1
    cost[4, 2] = np.nan  # padding may hold anything
    cost[5] = np.nan
    expected[5] = -1
    cost[6] *= 1e28  # large is no reason
    columns = MATCHERS[matcher](cost, num_rows)
    np.testing.assert_array_equal(columns, expected)


def test_every_problem_takes_only_its_own_steps(monkeypatch):
    """Counts iterations: with padding and ties they must not grow to the square of the rows."""
    iterations = []
    while_loop = jax.lax.while_loop

    def counting_loop(cond, body, init):
        final, count = while_loop(lambda s: cond(s[0]), lambda s: (body(s[0]), s[1] + 1), (init, 0))
        jax.debug.callback(lambda count: iterations.append(int(count)), count)
        return final

    monkeypatch.setattr(jax.lax, "while_loop", counting_loop)
    t, q = 40, 60
    tied = np.zeros((t, q), np.float32)
    distinct = 1 - np.eye(t, q, dtype=np.float32)
    nan = np.full((t, q), np.nan, np.float32)
    cost, num_rows = np.stack([tied, distinct, distinct, distinct, nan]), np.array([t, t, 5, 0, t])
    jax.block_until_ready(assign(cost, num_rows))
    jax.effects_barrier()
    assert sorted(iterations) == sorted([t, t, 5, 0, 0])


@pytest.mark.parametrize("config", [LossConfig(), LossConfig.detr()], ids=lambda config: config.classification)
def test_costs_equal_the_papers_formulas(config):
    outputs, targets = loss_reference.random_problem(b=3)
    arrays = (outputs["pred_logits"], outputs["pred_boxes"], targets["labels"], targets["boxes_cxcywh"])
    cost = jit_match_cost(*arrays, config=config)
    assert cost.dtype == jnp.float32
    for i in range(3):
        # Sums of a few float32 terms of up to 10.
        np.testing.assert_allclose(cost[i], loss_reference.match_cost(*(x[i] for x in arrays), config), atol=1e-5)

    stacked = jit_match_cost(*outputs["aux_outputs"].values(), *arrays[2:], config=config)
    assert stacked.shape == (2, 3, 5, 7)


def test_costs_of_saturated_logits_are_finite_and_a_wrong_label_is_seen():
    boxes = jnp.full((3, 4), 0.5)
    logits = jnp.array([[200.0, -200.0], [-200.0, 200.0], [0.0, 0.0]])
    for config in (LossConfig(), LossConfig.detr()):
        cost = jit_match_cost(logits, boxes, jnp.array([0, 1, 2]), boxes, config=config)
        assert jnp.all(jnp.isfinite(cost[:2]))
        assert jnp.all(jnp.isnan(cost[2]))


@pytest.mark.parametrize("matcher", MATCHERS)
def test_every_layer_is_matched_on_its_own(matcher):
    outputs, targets = loss_reference.random_problem()
    config = LossConfig(matcher=matcher)
    decoder, encoder = jit_match(outputs, targets, config=config)
    aux = outputs["aux_outputs"]
    layers = [{name: aux[name][i] for name in aux} for i in range(2)] + [outputs, outputs["enc_outputs"]]
    assert len(decoder) == 3
    for layer, indices in zip(layers, [*decoder, encoder], strict=True):
        labels = targets["labels"] if indices is not encoder else np.zeros_like(targets["labels"])
        for i, num_boxes in enumerate(targets["num_boxes"]):
            cost = loss_reference.match_cost(
                layer["pred_logits"][i], layer["pred_boxes"][i], labels[i], targets["boxes_cxcywh"][i], config
            )
            _, columns = linear_sum_assignment(cost[:num_boxes])
            np.testing.assert_array_equal(indices[i], np.append(columns, [-1] * (len(cost) - num_boxes)))

    del outputs["enc_outputs"]
    decoder, encoder = jit_match(outputs, targets, config=dataclasses.replace(config, aux_loss=False))
    assert (decoder.shape, encoder) == ((1, 8, 5), None)


@pytest.mark.parametrize("matcher", MATCHERS)
def test_sharded_matching_is_equal_and_does_not_communicate(matcher):
    config = LossConfig(matcher=matcher)
    problem = loss_reference.random_problem()
    expected = jit_match(*problem, config=config)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    with jax.set_mesh(mesh):
        images, layers = (jax.NamedSharding(mesh, spec) for spec in (jax.P("data"), jax.P(None, "data")))
        outputs, targets = problem
        shardings = {**dict.fromkeys(outputs, images), "aux_outputs": layers}
        sharded = jax.device_put(outputs, shardings), jax.device_put(targets, images)
        compiled = jit_match.lower(*sharded, config=config).compile()
        actual = compiled(*sharded)
    jax.tree.map(np.testing.assert_array_equal, actual, expected)
    assert actual[0].sharding.spec == jax.P(None, "data")
    program = compiled.as_text()
    assert "while(" in program or matcher == "scipy"
    assert not re.search(r"all-(reduce|gather|to-all)|collective-permute", program)


def test_an_empty_batch_of_targets():
    outputs, targets = loss_reference.random_problem()
    targets["num_boxes"] = np.zeros(8, np.int32)
    for indices in jit_match(outputs, targets, config=LossConfig()):
        np.testing.assert_array_equal(indices, -1)
