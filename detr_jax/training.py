"""Training: one jitted, donated step on a mesh, and the loop around it.

Everything that a step does is a pure function of the configuration, the step number and the state: the sampler draws
the batch from (seed, step), dropout's key is folded from them. So a run that was killed and resumed gives the same
numbers as one that was not.
"""

import dataclasses
import functools
import signal
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from detr_jax import checkpoint, sharding
from detr_jax.categories import Categories
from detr_jax.config import Config, OptimConfig
from detr_jax.curves import plot_curves
from detr_jax.data.coco import CocoIndex, load_split
from detr_jax.data.pipeline import batches
from detr_jax.data.resample import resample_batch
from detr_jax.data.sampler import EvalSampler, TrainSampler
from detr_jax.detector import fine_tuned
from detr_jax.evaluation import Scores, evaluate_model
from detr_jax.losses import set_prediction_loss
from detr_jax.metrics import MetricWriter
from detr_jax.models import build, split
from detr_jax.pretrained import load_backbone

Model = nnx.GraphDef
State = dict[str, Any]
"""`params` (trained), `buffers` (the rest of the model), `opt_state`, `step` and, with EMA, `ema`."""


class NonFiniteLossError(RuntimeError):
    """The loss or the gradient became NaN or infinite."""


def schedule(config: OptimConfig, total_steps: int) -> optax.Schedule:
    """Learning rate of a step, relative to the base rate: linear warm-up, constant, one drop."""
    drop_step = round(config.drop_at * total_steps)

    def factor(step):
        warmup = jnp.minimum(1.0, (step + 1) / (config.warmup_steps + 1))
        return warmup * jnp.where(step < drop_step, 1.0, config.drop_factor)

    return factor


def lr_group(path: tuple) -> str:
    """Learning-rate group of the parameter at `path`: `backbone`, `offsets` or `base`."""
    names = {str(getattr(part, "key", part)) for part in path}
    if "backbone" in names:
        return "backbone"
    return "offsets" if names & {"sampling_offsets", "reference_points"} else "base"


def make_optimizer(config: OptimConfig, total_steps: int) -> optax.GradientTransformation:
    """AdamW with the paper's groups, after clipping by the global norm."""
    factor = schedule(config, total_steps)

    def adamw(relative):
        return optax.adamw(lambda step: config.lr * relative * factor(step), weight_decay=config.weight_decay)

    groups = {"base": 1.0, "backbone": config.backbone_lr_factor, "offsets": config.offsets_lr_factor}
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.partition(
            {name: adamw(relative) for name, relative in groups.items()},
            functools.partial(jax.tree_util.tree_map_with_path, lambda path, _: lr_group(path)),
        ),
    )


def init_state(
    config: Config,
    optimizer: optax.GradientTransformation,
    mesh: jax.sharding.Mesh,
    categories: Categories | None = None,
) -> tuple[Model, State]:
    """A newly initialised model and state, the same on every device.

    With `categories`, those of the data, it starts from the checkpoint of `train.init_from`, if any.
    """
    graphdef = None

    def init():
        nonlocal graphdef
        model = build(config.model, rngs=nnx.Rngs(config.train.seed))
        graphdef, params, buffers = split(config.model, model)
        return {"params": params, "buffers": buffers, "opt_state": optimizer.init(params), "step": jnp.zeros((), int)}

    state = jax.jit(init, out_shardings=sharding.replicated(mesh))()
    assert graphdef is not None
    if config.train.init_backbone:
        state["params"], state["buffers"] = load_backbone(config.train.init_backbone, state["params"], state["buffers"])
    if config.train.init_from and categories is not None:
        state["params"], state["buffers"], report = fine_tuned(
            config.train.init_from, config.model, categories, state["params"], state["buffers"]
        )
        if jax.process_index() == 0:
            print(report, flush=True)
    if config.optim.ema_decay:
        state["ema"] = jax.tree.map(jnp.copy, state["params"])
    return graphdef, state


def loss_fn(
    params: dict, buffers: dict, batch: Mapping[str, jax.Array], graphdef: Model, config: Config, *, pixels, key
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Loss of a batch and its terms; `pixels` are the resampled images, `key` draws dropout (`None`: none)."""
    model = nnx.merge(graphdef, params, buffers)
    outputs = model(pixels, batch["size"], rngs=None if key is None else nnx.Rngs(key))
    return set_prediction_loss(outputs, batch, config.loss)


def make_train_step(
    config: Config, graphdef: Model, optimizer: optax.GradientTransformation, sampler: TrainSampler
) -> Callable[..., tuple[State, dict[str, jax.Array]]]:
    """`step(state, batch, canvas=(H, W))` -> next state and terms; compiled once per canvas, donates `state`."""

    def step(state: State, batch: dict[str, jax.Array], *, canvas: tuple[int, int]):
        pixels = resample_batch(batch, canvas, sampler, config.data)
        key = jax.random.fold_in(jax.random.key(config.train.seed), state["step"])
        loss = functools.partial(loss_fn, graphdef=graphdef, config=config, pixels=pixels, key=key)
        (total, terms), grads = jax.value_and_grad(loss, has_aux=True)(state["params"], state["buffers"], batch)
        updates, opt_state = optimizer.update(grads, state["opt_state"], state["params"])
        params = optax.apply_updates(state["params"], updates)
        new = state | {"params": params, "opt_state": opt_state, "step": state["step"] + 1}
        if config.optim.ema_decay:
            # Early on, the mean of all parameters so far: an average that has forgotten the initialisation.
            decay = jnp.minimum(config.optim.ema_decay, (1 + state["step"]) / (10 + state["step"]))
            new["ema"] = optax.incremental_update(params, state["ema"], 1 - decay)
        return new, terms | {"loss": total, "grad_norm": optax.tree.norm(grads)}

    return jax.jit(step, donate_argnums=0, static_argnames="canvas")


def train(config: Config) -> Scores | None:
    """Trains to the end, or until SIGTERM or Ctrl-C; resumes from the newest checkpoint in `train.output_dir`.

    Returns:
        The scores of the last evaluation; `None` if the run was interrupted before it was finished.

    Raises:
        DataError: something is wrong with the data set; says what, where, and what to do.
        NonFiniteLossError: with the step, the loss terms and the image ids; no checkpoint is written.
        ValueError: `train.output_dir` has a checkpoint of other classes, or `train.init_from` is another model.
    """
    mesh = sharding.make_mesh()
    rows = sharding.host_rows(config.train.batch_size, mesh)
    train_index = load_split(config.data, "train")
    val_index = load_split(config.data, "val", category_ids=train_index.category_ids)
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, num_classes=train_index.num_classes))
    sampler = TrainSampler(train_index, config.data, config.train.batch_size, config.train.seed)
    eval_sampler = EvalSampler(val_index, config.data, config.train.batch_size)
    total_steps = len(sampler) * config.train.epochs
    optimizer = make_optimizer(config.optim, total_steps)
    output_dir = Path(config.train.output_dir)
    categories = Categories(train_index.category_ids, train_index.category_names)
    metadata = {
        "config": dataclasses.asdict(config),
        "model": type(config.model).__name__,
        "category_ids": list(train_index.category_ids),
        "category_names": list(train_index.category_names),
    }

    with jax.set_mesh(mesh), interruption() as interrupted:
        start = checkpoint.latest_step(str(output_dir)) or 0
        if start:
            check_resumable(output_dir, metadata)
        graphdef, state = init_state(config, optimizer, mesh, None if start else categories)
        if start:
            state = checkpoint.restore(str(output_dir), state)
        if jax.process_index() == 0:
            print(summary(config, mesh, state, train_index, val_index, sampler, start, total_steps), flush=True)
        train_step = make_train_step(config, graphdef, optimizer, sampler)
        learning_rate = schedule(config.optim, total_steps)
        stop = min(total_steps, config.train.max_steps or total_steps)
        compiled, scores = set(), None
        running: deque = deque()

        def fetch(keep: int) -> None:
            """Fetches and checks the terms of all steps but the newest `keep`, which may still be running."""
            while len(running) > keep:
                step, terms = running.popleft()
                terms = {name: float(value) for name, value in terms.items()}
                if not np.isfinite([terms["loss"], terms["grad_norm"]]).all():
                    raise NonFiniteLossError(describe_non_finite(step, terms, sampler, output_dir))
                metrics.add(step, terms, images=config.train.batch_size)

        with (
            checkpoint.CheckpointWriter(
                str(output_dir / "checkpoints"), keep_last=config.train.keep_last, keep_best=config.train.keep_best
            ) as writer,
            MetricWriter(str(output_dir), total_steps, steps_per_epoch=len(sampler), start_step=start) as metrics,
            closing(batches(train_index, sampler, range(start, stop), rows=rows, data_config=config.data)) as feed,
        ):
            for step in range(start, stop):
                begin = time.perf_counter()
                canvas, batch = next(feed)
                metrics.waited(time.perf_counter() - begin)
                batch.pop("image_id")
                batch = sharding.put_batch(batch, mesh)
                if canvas in compiled:
                    state, terms = train_step(state, batch, canvas=canvas)
                else:
                    compiled.add(canvas)
                    with metrics.paused():
                        state, terms = jax.block_until_ready(train_step(state, batch, canvas=canvas))
                running.append((step, terms))
                fetch(keep=1)

                done = step + 1
                epoch, in_epoch = divmod(done, len(sampler))
                log = done % config.train.log_every == 0 or done == stop
                score = done == total_steps or (
                    in_epoch == 0 and config.train.eval_every > 0 and epoch % config.train.eval_every == 0
                )
                # All processes must agree on it, which takes a collective: with several, ask only now and then.
                leave = (jax.process_count() == 1 or log) and sharding.any_process(bool(interrupted))
                save = done % config.train.checkpoint_every == 0 or done == stop or score or leave
                if log or save:
                    fetch(keep=0)
                if log:
                    metrics.write(done, lr=float(config.optim.lr * jnp.asarray(learning_rate(step))))
                if score:
                    with metrics.paused():
                        params = state.get("ema", state["params"])
                        scores, _ = evaluate_model(config, graphdef, params, state["buffers"], eval_sampler, mesh)
                    metrics.write_scores(done, scores)
                if save:
                    writer.save(done, state, metadata, ap=scores.AP if score and scores else None)
                if leave:
                    if jax.process_index() == 0:
                        print(f"stopped at step {done} and saved; the same command goes on from here", flush=True)
                    return None
        if jax.process_index() == 0:
            plot_curves(output_dir / "metrics.jsonl").savefig(output_dir / "curves.png")
            if scores:
                print(scores.table())
            print(f"curves {output_dir / 'curves.png'}, checkpoints {output_dir / 'checkpoints'}", flush=True)
        return scores


def check_resumable(output_dir: Path, metadata: Mapping[str, Any]) -> None:
    """Raises if the newest checkpoint has other classes; says which fields of the configuration changed."""
    saved = checkpoint.read_metadata(str(output_dir))
    if saved["category_ids"] != metadata["category_ids"]:
        raise ValueError(
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


def describe_non_finite(step: int, terms: Mapping[str, float], sampler: TrainSampler, output_dir: Path) -> str:
    """What to tell about a step that went wrong."""
    listed = ", ".join(f"{name} {value:.4g}" for name, value in terms.items())
    last = checkpoint.latest_step(str(output_dir))
    return (
        f"step {step}: the loss or the gradient is not finite: {listed}. "
        f"Image ids of the batch: {sampler.plan(step).image_id.tolist()}. "
        f"Nothing of it was saved; newest checkpoint in {output_dir}: {'none' if last is None else f'step {last}'}. "
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


def summary(config, mesh, state, train_index: CocoIndex, val_index: CocoIndex, sampler, start, total_steps) -> str:
    """What is about to be trained."""

    def count(tree):
        return sum(leaf.size for leaf in jax.tree.leaves(tree)) / 1e6

    canvases = ", ".join(f"{h}x{w}" for h, w in sampler.canvases)
    lines = [
        f"devices     {sharding.describe_devices(mesh, config.train.batch_size)}",
        f"model       {type(config.model).__name__.removesuffix('Config')}, compute {config.model.dtype}; "
        f"{count(state['params']):.2f} M parameters trained, {count(state['buffers']):.2f} M fixed",
        f"train       {len(train_index)} images, {train_index.num_classes} classes, at most {sampler.max_boxes} boxes; "
        f"photos up to {'x'.join(map(str, sampler.source_canvas))}",
        f"validation  {len(val_index)} images",
        f"buckets     {canvases} (height x width, each compiled once)",
        f"schedule    {config.train.epochs} epochs of {len(sampler)} steps = {total_steps} steps; "
        f"lr {config.optim.lr:g}, x{config.optim.drop_factor:g} after step {round(config.optim.drop_at * total_steps)}",
        f"output      {config.train.output_dir}" + (f", resuming at step {start}" if start else ""),
    ]
    notes = [
        f"  {name}: {line}" for name, index in (("train", train_index), ("val", val_index)) for line in index.report
    ]
    return "\n".join(lines + notes)
