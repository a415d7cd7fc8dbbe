"""Runs that are the same but for their length and folder share what they trace and compile.

Without this each run of a test traces, lowers and loads its programs anew: ten seconds, even where they are cached.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
from matplotlib.figure import Figure

from detr_jax import curves, train_step, training


@contextlib.contextmanager
def shared() -> Iterator[None]:
    """Within it, `training.train` computes an initial state and compiles its steps once per kind of run.

    And it draws no curves, which takes seconds too.
    """
    known: dict[Any, Any] = {}

    def once(name: str, config, total_steps: int, mesh, make: Callable[[], Any]) -> Any:
        train = (
            config.train.seed,
            config.train.batch_size,
            config.train.accumulate,
            config.train.init_from,
            config.train.init_backbone,
        )
        key = (name, config.model, config.loss, config.optim, config.data, train, total_steps, mesh)
        if key not in known:
            known[key] = make()
        return known[key]

    steps: dict[Any, int] = {}  # of each run's optimizer, which cannot tell

    def make_optimizer(config, total_steps):
        optimizer = original_optimizer(config, total_steps)
        steps[optimizer] = total_steps
        return optimizer

    def init_state(config, optimizer, mesh, categories=None):
        total = steps[optimizer]
        make = lambda: original_init(config, optimizer, mesh, categories)  # noqa: E731
        graphdef, state = once(f"init {categories}", config, total, mesh, make)
        return graphdef, jax.tree.map(jnp.copy, state)  # the step consumes it

    def abstract_state(config, optimizer, mesh):
        make = lambda: original_abstract(config, optimizer, mesh)  # noqa: E731
        return once("abstract", config, steps[optimizer], mesh, make)

    def compile_steps(run, graphdef, state, done, interrupted):
        del done  # a run that starts at 0 needs all of what one that goes on needs
        make = lambda: original_compile(run, graphdef, state, 0, interrupted)()  # noqa: E731
        steps = once("steps", run.config, run.total_steps, run.mesh, make)
        return lambda: steps

    original_optimizer, original_init = training.make_optimizer, train_step.init_state
    original_abstract, original_compile = train_step.abstract_state, training.compile_steps
    with (
        mock.patch.object(training, "make_optimizer", make_optimizer),
        mock.patch.object(training, "init_state", init_state),
        mock.patch.object(training, "abstract_state", abstract_state),
        mock.patch.object(training, "compile_steps", compile_steps),
        mock.patch.object(curves, "plot_curves", lambda *args: Figure()),
    ):
        yield
