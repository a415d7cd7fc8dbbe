"""The training loop: resumes, logs, saves, scores, and ends in order, also when something interrupts it or fails."""

import dataclasses
import functools
import json
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from etils import epath

from detr_jax import compilation, processes, resuming, run_folder, sharding, stall
from detr_jax.categories import Categories
from detr_jax.checkpoints import describe_run, store
from detr_jax.config import Config, OptimConfig
from detr_jax.data.index import DatasetIndex
from detr_jax.data.pipeline import batches
from detr_jax.data.sampler import EvalSampler, TrainSampler
from detr_jax.data.splits import load_split
from detr_jax.errors import UserError
from detr_jax.evaluation import TARGETS, evaluate_model, write_pictures
from detr_jax.interruption import interruption
from detr_jax.metric_writer import MetricWriter
from detr_jax.scoring import Scores
from detr_jax.stall import Interrupted
from detr_jax.train_step import (
    Model,
    State,
    abstract_state,
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
    def output_dir(self) -> epath.Path:
        """Of checkpoints, logs and pictures; may be in a bucket."""
        return epath.Path(self.config.train.output_dir)

    @property
    def categories(self) -> Categories:
        """What the labels stand for."""
        return Categories(self.train_index.category_ids, self.train_index.category_names)

    @functools.cached_property
    def fingerprints(self) -> dict[str, str]:
        """What the data sets hold, except pixels: equal for equal data sets."""
        return {"train": self.train_index.fingerprint(), "val": self.val_index.fingerprint()}

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
        return done == self.total_steps or (in_epoch == 0 and every > 0 and (epoch == 1 or epoch % every == 0))

    def is_save_step(self, done: int) -> bool:
        """Whether to save a checkpoint after so many steps."""
        return done % self.config.train.checkpoint_every == 0 or done == self.last_step or self.is_eval_step(done)


def train(config: Config) -> Scores | None:
    """Trains to the end, or until SIGTERM or Ctrl-C; resumes from the newest checkpoint in `train.output_dir`.

    Whatever ends a run after good steps, they are saved: an interruption, bad data, a failing evaluation. Only a loss
    that is not finite is not.

    Returns:
        The scores of the last evaluation; `None` if the run was interrupted before it was finished.

    Raises:
        DataError: something is wrong with the data set; says what, where, and what to do.
        NonFiniteLossError: with the step, the loss terms and the image ids; no checkpoint is written.
        UserError: `train.output_dir` is in use or has checkpoints of other data; `train.init_from` is another model.
        OSError: a file cannot be read or written: the disk is full, say.
        ProcessError: another process failed, or has another config, other data or another folder.
    """
    output_dir = epath.Path(config.train.output_dir)
    profile = parse_profile_steps(config.train.profile_steps)
    cache = epath.Path(config.train.compilation_cache or output_dir / "compilation_cache")
    with processes.all_or_none():
        run = prepare(config)
    with interruption() as interrupted, jax.set_mesh(run.mesh), lock(run), compilation.cache(cache):
        try:
            scores = train_steps(run, profile, interrupted)
        except Interrupted:
            return None
    if jax.process_index() == 0:
        from detr_jax.curves import plot_curves  # matplotlib takes half a second to import

        figure = plot_curves(output_dir / "metrics.jsonl")
        with (output_dir / "curves.png").open("wb") as file:
            figure.savefig(file, format="png")
        if scores:
            print(scores.table())
        print(f"curves {output_dir / 'curves.png'}, checkpoints {output_dir / 'checkpoints'}", flush=True)
    return scores


def train_steps(run: Run, profile: range, interrupted: Callable[[], bool]) -> Scores | None:
    """The steps of a run that are still to do, after which it is evaluated and saved. Call it under the run's mesh.

    Raises:
        Interrupted: the run was interrupted, and saved.
        Others: as `train`.
    """
    config, metadata = run.config, describe_run(run.config, run.categories) | {"data": run.fingerprints}
    start, saved = find_start(run, metadata, interrupted)
    graphdef, shapes = abstract_state(config, run.optimizer, run.mesh)
    compiled = compile_steps(run, graphdef, shapes, start, interrupted)  # while the state is read or computed
    state = make_state(run, shapes, start, interrupted)
    done = start
    if jax.process_index() == 0:
        print(summary(run, state, done), flush=True)
    train_step, detect = compiled()
    learning_rate = schedule(config.optim, run.total_steps)
    aps = {int(step): ap for step, ap in saved.get("aps", {}).items()}
    scores = Scores.from_dict(saved["scores"]) if saved.get("scores") else None
    with (
        store.CheckpointWriter(
            str(run.output_dir / "checkpoints"),
            keep_last=config.train.keep_last,
            keep_best=config.train.keep_best,
            timeout=config.train.storage_timeout,
        ) as writer,
        MetricWriter(
            run.output_dir,
            run.total_steps,
            steps_per_epoch=len(run.sampler),
            start_step=done,
            interval=saved.get("interval"),
        ) as metrics,
        closing(read_batches(run, done, interrupted)) as feed,
    ):
        running = RunningSteps(run, metrics)

        def save() -> None:
            running.check(keep=0)
            metrics.flush()  # a checkpoint is never ahead of the metrics
            if done > start:  # else there is nothing new
                writer.save(done, state, {**metadata, "interval": metrics.interval(), "aps": aps})

        def evaluate(scores: Scores | None = None) -> Scores:
            results = None
            if scores is None:
                with metrics.paused():
                    params = state.get("ema", state["params"])
                    scores, results = evaluate_model(
                        detect,
                        params,
                        state["buffers"],
                        run.eval_sampler,
                        config.data,
                        run.mesh,
                        storage_timeout=config.train.storage_timeout,
                        interrupted=interrupted,
                    )
                writer.score(done, scores.as_dict())
            aps[done] = scores.AP
            metrics.write_scores(done, scores)
            if results is not None:
                with metrics.paused():
                    draw_results(run, results, interrupted)
            return scores

        with ending(save, done=lambda: done):
            if done and run.is_eval_step(done):  # it may have been stopped between being saved and being scored
                scores = evaluate(scores)
            while done < run.last_step and not out_of_patience(aps, config.train.patience):
                begin = time.perf_counter()
                bucket, batch = next(feed)
                metrics.waited(time.perf_counter() - begin)
                with tracing(done, profile, run.output_dir), jax.transfer_guard("disallow"):
                    state, terms = train_step(state, batch, bucket=bucket)
                running.add(done, terms)
                done += 1
                if run.is_log_step(done):
                    running.check(keep=0)
                    metrics.write(done, lr=float(config.optim.lr * jnp.asarray(learning_rate(done - 1))))
                if run.is_save_step(done):
                    save()
                if run.is_eval_step(done):
                    scores = evaluate()
    return scores


def prepare(config: Config) -> Run:
    """Reads the data sets and lays out the run; nothing is compiled yet.

    Raises:
        DataError: something is wrong with the data set.
        UserError: the batch does not divide over the devices.
    """
    mesh = sharding.make_mesh(fsdp=config.train.fsdp)
    accumulate = config.train.accumulate
    sharding.host_rows(config.train.batch_size, mesh, accumulate=accumulate)  # raises before the data is read
    cache = epath.Path(config.train.output_dir) / "intact_images"
    train_index = load_split(config.data, "train", cache=cache)
    categories = Categories(train_index.category_ids, train_index.category_names)
    val_index = load_split(config.data, "val", categories, cache=cache)
    config = dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, num_classes=train_index.num_classes),
        optim=config.optim.for_batch(config.train.batch_size),
    )
    sampler = TrainSampler(train_index, config.data, config.train.batch_size, config.train.seed)
    eval_sampler = EvalSampler(val_index, config.data, config.train.batch_size // accumulate)
    optimizer = make_optimizer(config.optim, len(sampler) * config.train.epochs)
    return Run(config, mesh, train_index, val_index, sampler, eval_sampler, optimizer)


@contextmanager
def lock(run: Run) -> Iterator[None]:
    """Makes this run the only one that writes to its folder, once all processes agree on what they are to do."""
    facts = resuming.flat(dataclasses.asdict(run.config)) | run.fingerprints
    processes.agree({name: json.dumps(value) for name, value in facts.items()})
    with ExitStack() as held:
        with processes.all_or_none():
            if jax.process_index() == 0:
                held.enter_context(run_folder.lock(run.output_dir))
                token = run_folder.leave_token(run.output_dir)
            else:
                token = ""
        token = processes.share(token)[0]
        with processes.all_or_none():
            run_folder.check_token(run.output_dir, token)
        yield


def find_start(run: Run, metadata: Mapping[str, Any], interrupted: Callable[[], bool]) -> tuple[int, dict[str, Any]]:
    """Finished steps, and what was saved with them, of the checkpoint in `train.output_dir` to go on from; else 0."""
    start = 0
    with processes.all_or_none():
        if jax.process_index() == 0:
            start = stall.call(
                lambda: resuming.choose_checkpoint(run.output_dir, run.config.train.resume_from),
                lambda: f"the checkpoints in {run.output_dir}",
                run.config.train.storage_timeout,
                interrupted,
            )
    start = int(processes.share(str(start))[0])
    if not start:
        return 0, {}
    saved = store.read_metadata(str(run.output_dir), start)
    with processes.all_or_none():
        changed = resuming.check(run.output_dir, saved, metadata)
    if changed and jax.process_index() == 0:
        print("\n".join(changed), flush=True)
    return start, saved


def make_state(run: Run, shapes: State, start: int, interrupted: Callable[[], bool]) -> State:
    """The state of `shapes` after `start` steps: read from that checkpoint, or computed for a new run."""

    def initialize() -> State:
        with jax.set_mesh(run.mesh):
            return init_state(run.config, run.optimizer, run.mesh, run.categories)[1]

    def restore() -> State:
        return store.restore(str(run.output_dir), shapes, start, verify=False)

    with processes.all_or_none():
        if not start:
            return stall.call(initialize, lambda: "the first parameters", float("inf"), interrupted)
        where = f"the checkpoint of step {start} in {run.output_dir}"
        return stall.call(restore, lambda: where, run.config.train.storage_timeout, interrupted)


def compile_steps(
    run: Run, graphdef: Model, state: State, done: int, interrupted: Callable[[], bool]
) -> Callable[[], tuple[Callable[..., Any], Callable[..., Any]]]:
    """Begins to compile the training step and the detection step for all buckets that the run needs.

    Returns:
        A function that waits for the two, and returns them.
    """
    train_step: Any = make_train_step(run.config, graphdef, run.optimizer, run.sampler)
    detect: Any = make_detect_step(run.config, graphdef, run.eval_sampler)
    programs: dict[tuple[str, compilation.Bucket], Callable[[], Any]] = {}
    if done < run.last_step:
        batch = abstract_batch(run.sampler, run.mesh, left_out=("image_id",))
        for bucket in run.sampler.buckets:
            programs["train", bucket] = functools.partial(train_step.lower, state, batch, bucket=bucket)
    if any(run.is_eval_step(step) for step in range(done, run.last_step + 1)):
        batch = abstract_batch(run.eval_sampler, run.mesh, left_out=TARGETS)
        params = state.get("ema", state["params"])
        for bucket in run.eval_sampler.buckets:
            programs["detect", bucket] = functools.partial(detect.lower, params, state["buffers"], batch, bucket=bucket)
    wait = compilation.compile_buckets(programs, run.mesh, interrupted=interrupted, report=jax.process_index() == 0)

    def compiled() -> tuple[Callable[..., Any], Callable[..., Any]]:
        with processes.all_or_none():
            by_bucket = wait()

        def choose(name):
            return lambda *args, bucket: by_bucket[name, bucket](*args)

        return choose("train"), choose("detect")

    return compiled


def draw_results(run: Run, results: Sequence[Mapping[str, Any]], interrupted: Callable[[], bool]) -> None:
    """Draws the first validation images with what was found in them into `output_dir/pictures`, by process 0."""
    folder, number = run.output_dir / "pictures", run.config.train.num_pictures
    with processes.all_or_none():
        if number and jax.process_index() == 0:
            stall.call(
                lambda: write_pictures(str(folder), run.val_index, results, number),
                lambda: f"pictures in {folder}",
                run.config.train.storage_timeout,
                interrupted,
            )


def abstract_batch(
    sampler: TrainSampler | EvalSampler, mesh: jax.sharding.Mesh, left_out: Sequence[str]
) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes and layout of the batches of a sampler, whose buckets share them."""
    plan = {name: array for name, array in vars(sampler.plan(0)).items() if name not in ("bucket", "index", *left_out)}
    arrays = {"pixels": np.broadcast_to(np.uint8(0), (sampler.batch_size, *sampler.source_shape, 3)), **plan}
    layout = sharding.over_data(mesh)
    return {name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=layout) for name, x in arrays.items()}


def read_batches(
    run: Run, start: int, interrupted: Callable[[], bool]
) -> Generator[tuple[tuple[int, int], dict[str, jax.Array]], None, None]:
    """The batches of all steps from `start` on, on the devices, with the bucket of each; see `processes.in_step`."""
    rows = sharding.host_rows(run.config.train.batch_size, run.mesh)
    steps, reading = range(start, run.last_step), set[str]()
    feed = batches(run.train_index, run.sampler, steps, rows=rows, data_config=run.config.data, reading=reading)
    together = processes.in_step(
        feed, what=lambda: describe_files(reading), limit=run.config.train.storage_timeout, interrupted=interrupted
    )
    with closing(together):
        for bucket, batch in together:
            del batch["image_id"]  # may have 64 bits, which do not survive a trip to the device
            yield bucket, sharding.put_batch(batch, run.mesh)


@contextmanager
def ending(save: Callable[[], None], done: Callable[[], int]) -> Iterator[None]:
    """Saves the finished steps when something ends the run before its end."""
    try:
        yield
    except NonFiniteLossError:
        raise
    except Interrupted:
        save()
        if jax.process_index() == 0:
            print(f"stopped at step {done()} and saved; the same command goes on from here", flush=True)
        raise
    except Exception as error:
        together = isinstance(error, processes.FailedTogether)
        if jax.process_count() > 1 and not together:
            processes.abort(error)
        cause = error.cause if together else error
        try:
            save()
        except Exception as other:
            cause.add_note(f"The steps since the newest checkpoint are lost: {other}")
            raise cause from None
        if jax.process_index() == 0:
            print(f"stopped at step {done()} by an error; it is saved", flush=True)
        raise cause from None


@contextmanager
def tracing(step: int, steps: range, output_dir: epath.Path) -> Iterator[None]:
    """Traces the steps of `train.profile_steps` with jax's profiler, for xprof or TensorBoard."""
    if steps and step == steps.start:
        jax.profiler.start_trace(str(output_dir / "profile"))
    with jax.profiler.StepTraceAnnotation("train", step_num=step):
        yield
    if steps and step == steps.stop - 1:
        jax.profiler.stop_trace()


def parse_profile_steps(text: str | None) -> range:
    """`10:15` -> range(10, 15).

    Raises:
        UserError: not two numbers, the first one smaller.
    """
    if text is None:
        return range(0)
    first, _, last = text.partition(":")
    if not (first.isdigit() and last.isdigit() and int(first) < int(last)):
        raise UserError(f"train.profile_steps: got {text!r}, expected FIRST:LAST, such as 10:15")
    return range(int(first), int(last))


def out_of_patience(aps: Mapping[int, float], patience: int | None) -> bool:
    """Whether the last `patience` evaluations brought no better AP than those before."""
    if patience is None or len(aps) <= patience:
        return False
    values = [ap for _, ap in sorted(aps.items())]
    return max(values[-patience:]) <= max(values[:-patience])


def describe_files(names: set[str]) -> str:
    """Some of the files that are being read."""
    some = sorted(names)
    return ", ".join(some[:5]) + (f" and {len(some) - 5} more" if len(some) > 5 else "") or "images"


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
            values = {name: float(value) for name, value in jax.device_get(terms).items()}
            if not np.isfinite([values["loss"], values["grad_norm"]]).all():
                raise NonFiniteLossError(describe_non_finite(self._run, step, values))
            self._metrics.add(step, values, images=self._run.config.train.batch_size)


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


def summary(run: Run, state: State, start: int) -> str:
    """What is about to be trained."""
    config, sampler = run.config, run.sampler

    def count(tree):
        return sum(leaf.size for leaf in jax.tree.leaves(tree)) / 1e6

    buckets = ", ".join(f"{h}x{w}" for h, w in sampler.buckets)
    drop_step = round(config.optim.drop_at * run.total_steps)
    devices = sharding.describe_devices(run.mesh, config.train.batch_size, accumulate=config.train.accumulate)
    lines = [
        f"devices     {devices}",
        f"model       {type(config.model).__name__.removesuffix('Config')}, compute {config.model.dtype}; "
        f"{count(state['params']):.2f} M parameters trained, {count(state['buffers']):.2f} M frozen",
        f"train       {len(run.train_index)} images, {run.train_index.num_classes} classes, at most "
        f"{sampler.max_boxes} boxes; images up to {'x'.join(map(str, sampler.source_shape))}",
        f"validation  {len(run.val_index)} images" + describe_first_scores(run, start),
        f"buckets     {buckets} (height x width, each compiled once)",
        f"schedule    {config.train.epochs} epochs of {len(sampler)} steps = {run.total_steps} steps; "
        f"lr {config.optim.lr:g}, x{config.optim.drop_factor:g} after step {drop_step}",
        *describe_lr(config.optim, config.train.batch_size),
        f"output      {config.train.output_dir}"
        + (f", resuming at step {start}" if start else "")
        + "; Ctrl-C saves and stops, the same command goes on",
    ]
    indexes = {"train": run.train_index, "val": run.val_index}
    lines += [f"  {name}: {line}" for name, index in indexes.items() for line in index.report]
    return "\n".join(lines + [f"  {name}: {line}" for name, index in indexes.items() for line in crowded(run, index)])


def describe_first_scores(run: Run, start: int) -> str:
    """When there are scores and pictures to look at, and where."""
    epoch = len(run.sampler)
    ends_of_epochs = range(start // epoch * epoch + epoch, run.last_step + 1, epoch)
    step = next(filter(run.is_eval_step, ends_of_epochs), None)
    if step is None:
        return ""
    pictures = f", drawn in {run.output_dir / 'pictures'}" if run.config.train.num_pictures else ""
    return f"; scored at step {step}{pictures}"


def describe_lr(optim: OptimConfig, batch_size: int) -> list[str]:
    """A line about a learning rate that is for another batch size, if it is."""
    if batch_size == optim.lr_batch_size:
        return []
    sqrt, linear = (optim.scaled_lr(batch_size, scaling) for scaling in ("sqrt", "linear"))
    return [
        f"  lr {optim.lr:g} is for batches of {optim.lr_batch_size}, not {batch_size}: "
        f"--optim.lr-scaling sqrt makes it {sqrt:.3g}, linear {linear:.3g}"
    ]


def crowded(run: Run, index: DatasetIndex) -> list[str]:
    """A line that warns of images with more boxes than the model has queries, if there are any."""
    queries, number = run.config.model.num_queries, [len(labels) for labels in index.labels]
    too_many = sum(n > queries for n in number)
    return [
        f"WARNING: {too_many} images have more boxes than model.num_queries={queries}: those that are left over are "
        f"never found. At most {max(number)} boxes are in an image: pass --model.num-queries {max(number)} or more"
    ] * (too_many > 0)
