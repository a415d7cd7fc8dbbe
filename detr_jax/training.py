"""The training loop: resumes, logs, scores, saves, and ends in order when it is interrupted."""

import dataclasses
import signal
import time
from collections import deque
from collections.abc import Generator, Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from detr_jax import sharding
from detr_jax.categories import Categories
from detr_jax.checkpoints import describe_run, store
from detr_jax.config import Config
from detr_jax.curves import plot_curves
from detr_jax.data.index import DatasetIndex
from detr_jax.data.pipeline import batches
from detr_jax.data.sampler import EvalSampler, TrainSampler
from detr_jax.data.splits import load_split
from detr_jax.errors import UserError
from detr_jax.evaluation import Scores, evaluate_model
from detr_jax.metric_writer import MetricWriter
from detr_jax.train_step import (
    Model,
    State,
    init_state,
    make_detect_step,
    make_optimizer,
    make_train_step,
    schedule,
)


class NonFiniteLossError(UserError):
    """The loss or the gradient became NaN or infinite."""


@dataclasses.dataclass(frozen=True)
class Run:
    """What a run consists of before its first step."""

    config: Config
    """With the number of classes of the data."""
    mesh: jax.sharding.Mesh
    train_index: DatasetIndex
    val_index: DatasetIndex
    sampler: TrainSampler
    eval_sampler: EvalSampler
    optimizer: optax.GradientTransformation

    @property
    def output_dir(self) -> Path:
        """Of checkpoints, logs and pictures."""
        return Path(self.config.train.output_dir)

    @property
    def categories(self) -> Categories:
        """What the labels stand for."""
        return Categories(self.train_index.category_ids, self.train_index.category_names)

    @property
    def total_steps(self) -> int:
        """Steps of the whole schedule."""
        return len(self.sampler) * self.config.train.epochs

    @property
    def last_step(self) -> int:
        """Where this run stops: the end of the schedule, or `train.max_steps`."""
        return min(self.total_steps, self.config.train.max_steps or self.total_steps)

    def is_log_step(self, done: int) -> bool:
        """Whether to write a log line after so many steps."""
        return done % self.config.train.log_every == 0 or done == self.last_step

    def is_eval_step(self, done: int) -> bool:
        """Whether to evaluate after so many steps."""
        epoch, in_epoch = divmod(done, len(self.sampler))
        every = self.config.train.eval_every
        return done == self.total_steps or (in_epoch == 0 and every > 0 and epoch % every == 0)

    def is_save_step(self, done: int) -> bool:
        """Whether to save a checkpoint after so many steps."""
        return done % self.config.train.checkpoint_every == 0 or done == self.last_step or self.is_eval_step(done)


def train(config: Config) -> Scores | None:
    """Trains to the end, or until SIGTERM or Ctrl-C; resumes from the newest checkpoint in `train.output_dir`.

    Returns:
        The scores of the last evaluation; `None` if the run was interrupted before it was finished.

    Raises:
        DataError: something is wrong with the data set; says what, where, and what to do.
        NonFiniteLossError: with the step, the loss terms and the image ids; no checkpoint is written.
        ValueError: `train.output_dir` has a checkpoint of other classes, or `train.init_from` is another model.
    """
    run = prepare(config)
    config, mesh, metadata = run.config, run.mesh, describe_run(run.config, run.categories)
    with jax.set_mesh(mesh), interruption() as interrupted:
        start, graphdef, state = start_or_resume(run, metadata)
        if jax.process_index() == 0:
            print(summary(run, state, start), flush=True)
        train_step = make_train_step(config, graphdef, run.optimizer, run.sampler)
        detect = make_detect_step(config, graphdef, run.eval_sampler)
        learning_rate = schedule(config.optim, run.total_steps)
        compiled, scores = set(), None
        with (
            store.CheckpointWriter(
                str(run.output_dir / "checkpoints"), keep_last=config.train.keep_last, keep_best=config.train.keep_best
            ) as writer,
            MetricWriter(
                str(run.output_dir), run.total_steps, steps_per_epoch=len(run.sampler), start_step=start
            ) as metrics,
            closing(read_batches(run, start)) as feed,
        ):
            running = RunningSteps(run, metrics)
            for step in range(start, run.last_step):
                begin = time.perf_counter()
                bucket, batch = next(feed)
                metrics.waited(time.perf_counter() - begin)
                batch = sharding.put_batch(batch, mesh)
                if bucket in compiled:
                    state, terms = train_step(state, batch, bucket=bucket)
                else:
                    compiled.add(bucket)
                    with metrics.paused():
                        state, terms = jax.block_until_ready(train_step(state, batch, bucket=bucket))
                running.add(step, terms)

                done = step + 1
                log, score = run.is_log_step(done), run.is_eval_step(done)
                # All processes must agree on it, which takes a collective: with several, ask only now and then.
                leave = (jax.process_count() == 1 or log) and sharding.any_process(bool(interrupted))
                save = run.is_save_step(done) or leave
                if log or save:
                    running.check(keep=0)
                if log:
                    metrics.write(done, lr=float(config.optim.lr * jnp.asarray(learning_rate(step))))
                if score:
                    with metrics.paused():
                        params = state.get("ema", state["params"])
                        scores, _ = evaluate_model(
                            detect, params, state["buffers"], run.eval_sampler, config.data, mesh
                        )
                    metrics.write_scores(done, scores)
                if save:
                    writer.save(done, state, metadata, ap=scores.AP if score and scores else None)
                if leave:
                    if jax.process_index() == 0:
                        print(f"stopped at step {done} and saved; the same command goes on from here", flush=True)
                    return None
        if jax.process_index() == 0:
            plot_curves(run.output_dir / "metrics.jsonl").savefig(run.output_dir / "curves.png")
            if scores:
                print(scores.table())
            print(f"curves {run.output_dir / 'curves.png'}, checkpoints {run.output_dir / 'checkpoints'}", flush=True)
        return scores


def prepare(config: Config) -> Run:
    """Reads the data sets and lays out the run; nothing is compiled or written yet.

    Raises:
        DataError: something is wrong with the data set.
        ValueError: the batch does not divide over the devices.
    """
    mesh = sharding.make_mesh()
    sharding.host_rows(config.train.batch_size, mesh)  # raises before the data is read
    train_index = load_split(config.data, "train")
    val_index = load_split(config.data, "val", category_ids=train_index.category_ids)
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, num_classes=train_index.num_classes))
    sampler = TrainSampler(train_index, config.data, config.train.batch_size, config.train.seed)
    eval_sampler = EvalSampler(val_index, config.data, config.train.batch_size)
    optimizer = make_optimizer(config.optim, len(sampler) * config.train.epochs)
    return Run(config, mesh, train_index, val_index, sampler, eval_sampler, optimizer)


def start_or_resume(run: Run, metadata: Mapping[str, Any]) -> tuple[int, Model, State]:
    """Finished steps, model and state: of the newest checkpoint in `train.output_dir`, else newly initialized."""
    start = store.latest_step(str(run.output_dir)) or 0
    if start:
        check_resumable(run.output_dir, metadata)
    graphdef, state = init_state(run.config, run.optimizer, run.mesh, None if start else run.categories)
    if start:
        state = store.restore(str(run.output_dir), state)
    return start, graphdef, state


def read_batches(run: Run, start: int) -> Generator[tuple[tuple[int, int], dict[str, np.ndarray]], None, None]:
    """This process's rows of the batches of all steps from `start` on, with the bucket of each."""
    rows = sharding.host_rows(run.config.train.batch_size, run.mesh)
    steps = range(start, run.last_step)
    with closing(batches(run.train_index, run.sampler, steps, rows=rows, data_config=run.config.data)) as feed:
        for bucket, batch in feed:
            del batch["image_id"]  # may have 64 bits, which do not survive a trip to the device
            yield bucket, batch


class RunningSteps:
    """Steps that the devices may still be at: their terms are fetched one step late, and checked."""

    def __init__(self, run: Run, metrics: MetricWriter):
        self._run, self._metrics = run, metrics
        self._terms: deque[tuple[int, dict[str, jax.Array]]] = deque()

    def add(self, step: int, terms: dict[str, jax.Array]) -> None:
        """Notes a step that was started, and checks those before it."""
        self._terms.append((step, terms))
        self.check(keep=1)

    def check(self, keep: int) -> None:
        """Fetches and checks the terms of all steps but the newest `keep`.

        Raises:
            NonFiniteLossError: with the step, the loss terms and the image ids.
        """
        while len(self._terms) > keep:
            step, terms = self._terms.popleft()
            values = {name: float(value) for name, value in terms.items()}
            if not np.isfinite([values["loss"], values["grad_norm"]]).all():
                raise NonFiniteLossError(describe_non_finite(self._run, step, values))
            self._metrics.add(step, values, images=self._run.config.train.batch_size)


def check_resumable(output_dir: Path, metadata: Mapping[str, Any]) -> None:
    """Raises if the newest checkpoint has other classes; says which fields of the configuration changed."""
    saved = store.read_metadata(str(output_dir))
    if saved["category_ids"] != metadata["category_ids"]:
        raise UserError(
            f"{output_dir}: trained on category ids {saved['category_ids']}, the annotations now have "
            f"{metadata['category_ids']}: use another train.output_dir"
        )
    old, new = flat(saved["config"]), flat(metadata["config"])
    changed = [f"  {name}: {old.get(name)} -> {new.get(name)}" for name in new if old.get(name) != new.get(name)]
    if changed and jax.process_index() == 0:
        print("\n".join(["resuming with a changed configuration:", *changed]), flush=True)


def flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested configuration -> `{"train.seed": 0, ...}`, tuples as lists, as JSON gives them back."""
    result = {}
    for name, value in config.items():
        if isinstance(value, Mapping):
            result |= flat(value, f"{prefix}{name}.")
        else:
            result[prefix + name] = jax.tree.map(lambda x: x, as_list(value))
    return result


def as_list(value: Any) -> Any:
    """Tuples, nested ones too, as lists."""
    return [as_list(item) for item in value] if isinstance(value, tuple | list) else value


def describe_non_finite(run: Run, step: int, terms: Mapping[str, float]) -> str:
    """What to tell about a step that went wrong."""
    listed = ", ".join(f"{name} {value:.4g}" for name, value in terms.items())
    last = store.latest_step(str(run.output_dir))
    return (
        f"step {step}: the loss or the gradient is not finite: {listed}. "
        f"Image ids of the batch: {run.sampler.plan(step).image_id.tolist()}. "
        f"Nothing of it was saved; newest checkpoint in {run.output_dir}: "
        f"{'none' if last is None else f'step {last}'}. "
        "Look at these images' annotations, or lower optim.lr"
    )


@contextmanager
def interruption() -> Iterator[list[int]]:
    """A list that a first SIGTERM or Ctrl-C makes non-empty; a second one ends the process as usual."""
    received: list[int] = []
    previous = {}

    def handle(number, frame):
        received.append(number)
        signal.signal(number, previous[number])
        print("\ninterrupted: saving after this step (again to stop at once)", flush=True)

    for number in (signal.SIGTERM, signal.SIGINT):
        previous[number] = signal.getsignal(number)
        signal.signal(number, handle)
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def summary(run: Run, state: State, start: int) -> str:
    """What is about to be trained."""
    config, sampler = run.config, run.sampler

    def count(tree):
        return sum(leaf.size for leaf in jax.tree.leaves(tree)) / 1e6

    buckets = ", ".join(f"{h}x{w}" for h, w in sampler.buckets)
    drop_step = round(config.optim.drop_at * run.total_steps)
    lines = [
        f"devices     {sharding.describe_devices(run.mesh, config.train.batch_size)}",
        f"model       {type(config.model).__name__.removesuffix('Config')}, compute {config.model.dtype}; "
        f"{count(state['params']):.2f} M parameters trained, {count(state['buffers']):.2f} M frozen",
        f"train       {len(run.train_index)} images, {run.train_index.num_classes} classes, at most "
        f"{sampler.max_boxes} boxes; images up to {'x'.join(map(str, sampler.source_shape))}",
        f"validation  {len(run.val_index)} images",
        f"buckets     {buckets} (height x width, each compiled once)",
        f"schedule    {config.train.epochs} epochs of {len(sampler)} steps = {run.total_steps} steps; "
        f"lr {config.optim.lr:g}, x{config.optim.drop_factor:g} after step {drop_step}",
        f"output      {config.train.output_dir}" + (f", resuming at step {start}" if start else ""),
    ]
    indexes = {"train": run.train_index, "val": run.val_index}
    return "\n".join(lines + [f"  {name}: {line}" for name, index in indexes.items() for line in index.report])
