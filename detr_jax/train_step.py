"""The training step and the detection step: pure functions of a state and a batch, each compiled once per bucket.

Everything that a step does is a pure function of the config, the step number and the state: the sampler draws the batch
from (seed, step), the key of dropout and denoising queries is folded from them. So a run that was killed and resumed
gives the same numbers as one that was not.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from detr_jax import sharding
from detr_jax.categories import Categories
from detr_jax.checkpoints.convert import load_backbone
from detr_jax.checkpoints.load import initialize_from
from detr_jax.config import Config, DINOConfig, ModelConfig, OptimConfig
from detr_jax.data.resample import resample_batch
from detr_jax.data.sampler import EvalSampler, TrainSampler
from detr_jax.denoising import PER_IMAGE, DenoisingQueries, denoising_queries, draw_noise, num_slots
from detr_jax.losses import set_prediction_loss
from detr_jax.models import build
from detr_jax.models.trainable import split
from detr_jax.postprocess import postprocess

Model = nnx.GraphDef


State = dict[str, Any]
"""`params` (trained), `buffers` (the rest of the model), `opt_state`, `step` and, with EMA, `ema`."""


def schedule(config: OptimConfig, total_steps: int) -> optax.Schedule:
    """Learning rate of a step, relative to the base rate: linear warm-up, constant, one drop."""
    drop_step = round(config.drop_at * total_steps)

    def factor(step):
        warmup = jnp.minimum(1.0, (step + 1) / (config.warmup_steps + 1))
        return warmup * jnp.where(step < drop_step, 1.0, config.drop_factor)

    return factor


def lr_group(path: tuple) -> str:
    """Learning-rate group of the parameter at `path`: `backbone`, `offsets` or `base`.

    DETR's learned position encodings are in the backbone's group: there they are a part of it, `backbone.1`.
    """
    names = {str(getattr(part, "key", part)) for part in path}
    if names & {"backbone", "row_embed", "col_embed"}:
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


def abstract_state(
    config: Config, optimizer: optax.GradientTransformation, mesh: jax.sharding.Mesh
) -> tuple[Model, State]:
    """The model, and the shapes and layout of a state: what a checkpoint is restored into; nothing is computed."""
    graphdef, init = _initializer(config, optimizer)
    state = jax.eval_shape(init)
    if config.optim.ema_decay:
        state["ema"] = state["params"]
    layout = sharding.state_layout(state, mesh)
    return graphdef(), jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, layout)


def init_state(
    config: Config,
    optimizer: optax.GradientTransformation,
    mesh: jax.sharding.Mesh,
    categories: Categories | None = None,
) -> tuple[Model, State]:
    """A newly initialized model and state, the same however many devices hold it.

    With `categories`, those of the data, it starts from the checkpoint of `train.init_from`, if any.
    """
    graphdef, init = _initializer(config, optimizer)
    state = jax.jit(init, out_shardings=sharding.state_layout(jax.eval_shape(init), mesh))()
    if config.train.init_backbone:
        state["params"], state["buffers"], report = load_backbone(
            config.train.init_backbone, config.model.backbone, state["params"], state["buffers"]
        )
        if jax.process_index() == 0:
            print(report, flush=True)
    if config.train.init_from and categories is not None:
        state["params"], state["buffers"], report = initialize_from(
            config.train.init_from, config.model, categories, state["params"], state["buffers"]
        )
        if jax.process_index() == 0:
            print(report, flush=True)
    if config.optim.ema_decay:
        state["ema"] = jax.tree.map(jnp.copy, state["params"])
    return graphdef(), state


def _initializer(
    config: Config, optimizer: optax.GradientTransformation
) -> tuple[Callable[[], Model], Callable[[], State]]:
    """A function that builds a state, and one that returns its model once the first one was traced."""
    graphdef = None

    def init():
        nonlocal graphdef
        model = build(config.model, rngs=nnx.Rngs(config.train.seed))
        graphdef, params, buffers = split(config.model, model)
        return {"params": params, "buffers": buffers, "opt_state": optimizer.init(params), "step": jnp.zeros((), int)}

    def model() -> Model:
        assert graphdef is not None
        return graphdef

    return model, init


def draw_denoising(config: ModelConfig, batch: Mapping[str, jax.Array], key: jax.Array) -> DenoisingQueries | None:
    """The denoising queries of a global batch; `None` for a model without."""
    if not isinstance(config, DINOConfig) or not config.denoising_queries:
        return None
    b, t = batch["labels"].shape
    noise = draw_noise(key, b, num_slots(config, t), config.num_classes)
    return denoising_queries(batch, noise, config)


def loss_fn(
    params: dict,
    buffers: dict,
    batch: Mapping[str, jax.Array],
    graphdef: Model,
    config: Config,
    *,
    pixels: jax.Array,
    key: jax.Array | None,
    denoising: DenoisingQueries | None = None,
    whole: jax.Array | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Loss of a batch and its terms.

    `pixels` are the resampled images; `key` draws dropout (`None`: none); `denoising` is of `draw_denoising`, `whole`
    as in `set_prediction_loss`.
    """
    model = nnx.merge(graphdef, params, buffers)
    rngs = None if key is None else nnx.Rngs(key)
    queries = {} if denoising is None else {"denoising": denoising}
    outputs = model(pixels, batch["size"], rngs=rngs, **queries)
    return set_prediction_loss(outputs, batch, config.loss, denoising, whole)


def make_train_step(
    config: Config, graphdef: Model, optimizer: optax.GradientTransformation, sampler: TrainSampler
) -> Callable[..., tuple[State, dict[str, jax.Array]]]:
    """`step(state, batch, bucket=(H, W))` -> next state and terms; compiled once per bucket, donates `state`.

    With `train.accumulate`, parts of the batch go through the model one after another. The gradient is that of the
    whole batch: losses are divided by its number of boxes. Denoising queries are drawn for all of it, dropout per part.
    """
    count = config.train.accumulate

    def step(state: State, batch: dict[str, jax.Array], *, bucket: tuple[int, int]):
        key = jax.random.fold_in(jax.random.key(config.train.seed), state["step"])
        params, buffers = sharding.gather((state["params"], state["buffers"]))
        denoising = draw_denoising(config.model, batch, key)

        def differentiate(batch, key, denoising, whole):
            pixels = resample_batch(batch, bucket, sampler, config.data)
            loss = functools.partial(loss_fn, graphdef=graphdef, config=config, pixels=pixels, key=key)
            loss = functools.partial(loss, denoising=denoising, whole=whole)
            (total, terms), grads = jax.value_and_grad(loss, has_aux=True)(params, buffers, batch)
            return sharding.split_state(grads), terms | {"loss": total}

        def add_part(grads, part):
            number, batch, rows = part
            queries = None if denoising is None else denoising._replace(**rows)
            more, terms = differentiate(batch, jax.random.fold_in(key, number), queries, whole)
            return jax.tree.map(jnp.add, grads, more), terms

        if count == 1:
            grads, terms = differentiate(batch, key, denoising, None)
        else:
            whole = batch["num_boxes"]
            rows = {} if denoising is None else {name: getattr(denoising, name) for name in PER_IMAGE}
            parts = jnp.arange(count), *sharding.micro_batches((batch, rows), count)
            zeros = sharding.split_state(jax.tree.map(jnp.zeros_like, state["params"]))
            grads, terms = jax.lax.scan(add_part, zeros, parts)
            terms = jax.tree.map(lambda x: x.sum(0), terms)
        with jax.named_scope("update"):
            updates, opt_state = optimizer.update(grads, state["opt_state"], state["params"])
            params = optax.apply_updates(state["params"], updates)
            new = state | {"params": params, "opt_state": opt_state, "step": state["step"] + 1}
            if config.optim.ema_decay:
                # Early on, the mean of all parameters so far: an average that has forgotten the initialization.
                decay = jnp.minimum(config.optim.ema_decay, (1 + state["step"]) / (10 + state["step"]))
                new["ema"] = optax.incremental_update(params, state["ema"], 1 - decay)
            return sharding.split_state(new), terms | {"grad_norm": optax.tree.norm(grads)}

    return jax.jit(step, donate_argnums=0, static_argnames="bucket")


def make_detect_step(
    config: Config, graphdef: Model, sampler: EvalSampler
) -> Callable[..., tuple[jax.Array, jax.Array, jax.Array]]:
    """`detect(params, buffers, batch, bucket=(H, W))` -> scores, labels, boxes as `postprocess` gives them.

    Compiled once per bucket: build it once per run, however often the run is evaluated.
    """

    def detect(params: dict, buffers: dict, batch: dict[str, jax.Array], *, bucket: tuple[int, int]):
        model = nnx.merge(graphdef, *sharding.gather((params, buffers)))
        outputs = model(resample_batch(batch, bucket, sampler, config.data), batch["size"])
        detections = postprocess(
            outputs,
            batch["orig_size"],
            classification=config.loss.classification,
            top_k=config.model.max_detections,
        )
        return sharding.split_batch(detections)

    return jax.jit(detect, static_argnames="bucket")
