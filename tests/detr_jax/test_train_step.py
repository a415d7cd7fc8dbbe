"""One training step: what the optimizer is given, what dropout draws, what the averaged parameters are."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

from detr_jax import sharding, train_step
from detr_jax.config import OptimConfig
from detr_jax.data.pipeline import batches
from detr_jax.data.sampler import TrainSampler
from detr_jax.data.splits import load_split

pytestmark = pytest.mark.usefixtures("short_resnet")


def moments(opt_state):
    """Adam's first moments of the learning-rate groups."""
    return [value for _, value in optax.tree.get_all_with_path(opt_state, "mu")]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """`run(devices)`: the product's step for the small model on the host's arrays, and its first state.

    Further arguments are fields of `train` and `model`.
    """
    config = tiny.fast_config(tiny.sixteen_images(tmp_path_factory.mktemp("data") / "cells"))
    index = load_split(config.data, "train")
    sampler = TrainSampler(index, config.data, config.train.batch_size, config.train.seed)
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, num_classes=index.num_classes))
    feed = [
        (bucket, {name: rows for name, rows in batch.items() if name != "image_id"})
        for bucket, batch in batches(index, sampler, range(3), data_config=config.data)
    ]
    optimizer = train_step.make_optimizer(config.optim, 100)
    with jax.set_mesh(mesh := sharding.make_mesh(1)):
        _, state = train_step.init_state(config, optimizer, mesh)
        first = jax.device_get(state)

    def make(devices, *, fsdp=1, accumulate=1, **model):
        mesh = sharding.make_mesh(devices, fsdp=fsdp)
        train = dataclasses.replace(config.train, fsdp=fsdp, accumulate=accumulate)
        changed = dataclasses.replace(config, train=train, model=dataclasses.replace(config.model, **model))
        with jax.set_mesh(mesh):
            graphdef, abstract = train_step.abstract_state(changed, optimizer, mesh)
        step = train_step.make_train_step(changed, graphdef, optimizer, sampler)

        def call(state, number):
            bucket, batch = feed[number]
            with jax.set_mesh(mesh):
                placed = jax.tree.map(lambda x, s: jax.device_put(x, s.sharding), state, abstract)
                placed = jax.tree.map(jnp.copy, placed)  # the step donates it
                state, terms = step(placed, sharding.put_batch(batch, mesh), bucket=bucket)
            for leaf, wanted in zip(jax.tree.leaves(state), jax.tree.leaves(abstract), strict=True):
                assert leaf.sharding.is_equivalent_to(wanted.sharding, leaf.ndim)
            return jax.device_get((state, terms))

        return call, first

    return make


@pytest.fixture(scope="module")
def one(run):
    """As `run(1)`."""
    return run(1)


def slow(*case):
    return pytest.param(*case, marks=pytest.mark.slow)


@pytest.mark.parametrize(("data", "fsdp"), [(4, 2), slow(8, 1), slow(2, 4), slow(1, 8)])
def test_one_device_and_many_take_the_same_step(run, one, data, fsdp):
    (one, first), (many, _) = one, run(data * fsdp, fsdp=fsdp)
    # Not the first batch, where one column of the box head differs: an L1 gradient at its kink, most likely, whose sign
    # rounding decides.
    same_step(one(first, 1), many(first, 1))


def same_step(one, other):
    """Compares what two programs made of the same state and batch."""
    (state, terms), (state8, terms8) = one, other
    # Sums over 8 devices are added in another order: float32 noise, 1e-7 relative for each of some hundred additions.
    # The gradient's norm sums the squares of as many numbers as there are parameters.
    for name, value in terms.items():
        rtol = 1e-4 if name == "grad_norm" else 1e-5
        np.testing.assert_allclose(terms8[name], value, rtol=rtol, err_msg=name)
    # The gradient, as the first moment of Adam holds it.
    one, many = (jax.tree.leaves(moments(s["opt_state"])) for s in (state, state8))
    assert len(one) == len(jax.tree.leaves(state["params"]))
    for a, b in zip(one, many, strict=True):
        np.testing.assert_allclose(b, a, rtol=0, atol=2e-5 * np.abs(a).max() + 1e-8)


@pytest.mark.slow
@pytest.mark.parametrize(("data", "fsdp"), [(1, 1), (2, 2)])
def test_accumulated_and_recomputed_it_is_the_same_step(run, data, fsdp):
    """Two parts of a batch, whose sums are divided by what the whole batch has; layers computed again for the gradient.

    Without dropout, whose bits are drawn for each part.
    """
    plain, first = run(1, dropout=0.0)
    saving, _ = run(data * fsdp, fsdp=fsdp, accumulate=2, remat="all", dropout=0.0)
    same_step(plain(first, 0), saving(first, 0))  # the other batches have the kink that is told of above


@pytest.mark.slow
@pytest.mark.parametrize("remat", ["layers", "all"])
def test_what_is_computed_again_is_the_same_with_dropout(run, one, remat):
    (one, first), (again, _) = one, run(1, remat=remat)
    same_step(one(first, 1), again(first, 1))


def test_dropout_draws_anew_at_every_step_and_the_same_when_repeated(one):
    step, first = one
    losses = [step(first | {"step": np.asarray(number)}, 0)[1]["loss"] for number in (0, 1, 2, 1)]
    assert losses[1] == losses[3]
    # Nothing but dropout's bits differs, which move the loss by percents.
    assert min(abs(a - b) for a, b in ((losses[0], losses[1]), (losses[1], losses[2]))) > 1e-4 * losses[0]


def test_averaged_parameters(one):
    """`ema_decay` 0.9, but early on the mean of all parameters so far: (1 + step) / (10 + step)."""
    step, state = one
    average = jax.tree.map(np.float64, state["params"])
    for number in range(3):
        state, _ = step(state, number)
        decay = min(0.9, (1 + number) / (10 + number))
        average = jax.tree.map(lambda a, p, d=decay: d * a + (1 - d) * p, average, state["params"])
    # Three float32 roundings; the parameters are a learning rate of 1e-3 apart.
    jax.tree.map(lambda got, want: np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-7), state["ema"], average)
    apart = [np.abs(a - p).max() for a, p in zip(*map(jax.tree.leaves, (state["ema"], state["params"])), strict=True)]
    assert max(apart) > 1e-4


def test_averaging_starts_from_the_first_parameters_and_decays_as_asked(one):
    step, first = one
    far = first | {"step": np.asarray(1000), "ema": jax.tree.map(np.zeros_like, first["params"])}
    state, _ = step(far, 0)
    jax.tree.map(
        lambda got, p: np.testing.assert_allclose(got, 0.1 * p, rtol=1e-5, atol=1e-9), state["ema"], state["params"]
    )
    jax.tree.map(np.testing.assert_array_equal, first["ema"], first["params"])


def test_gradients_are_clipped_to_the_global_norm():
    """Adam does not see the size of constant gradients, but one of a thousand times that: clipped, it is the same."""
    params = {"class_embed": np.ones(4, np.float32), "backbone": np.ones(4, np.float32)}
    optimizer = train_step.make_optimizer(OptimConfig(lr=1.0, clip_norm=0.1), 100)

    def second_update(scale):
        state = optimizer.init(params)
        for factor in (1.0, scale):
            updates, state = optimizer.update(jax.tree.map(lambda p, f=factor: f * p, params), state, params)
        return updates, optax.tree.norm(moments(state))

    (same, norm), (huge, _) = second_update(1.0), second_update(1000.0)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), huge, same)
    # Moments decay by 0.9: after two steps, 0.19 of a gradient whose norm over all groups is 0.1.
    np.testing.assert_allclose(norm, 0.19 * 0.1, rtol=1e-5)


def test_small_gradients_are_left_alone():
    params = {"class_embed": np.full(4, 0.01, np.float32)}
    optimizer = train_step.make_optimizer(OptimConfig(clip_norm=0.1), 100)
    _, state = optimizer.update(params, optimizer.init(params), params)
    np.testing.assert_allclose(optax.tree.norm(moments(state)), 0.1 * 0.02, rtol=1e-5)
