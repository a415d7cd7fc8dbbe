"""Any checkpoint -> a model: of this project, official, `transformers`, detrex or mmdetection."""

import dataclasses
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import jax
import numpy as np
from etils.epath import Path
from flax import nnx
from jax.experimental import multihost_utils

from detr_jax import sharding
from detr_jax.categories import Categories
from detr_jax.checkpoints import convert, hub
from detr_jax.config import (
    Config,
    DataConfig,
    DeformableDETRConfig,
    DETRConfig,
    DINOConfig,
    LossConfig,
    ModelConfig,
    from_dict,
)
from detr_jax.errors import NotFoundError, UserError
from detr_jax.models import build_abstract
from detr_jax.models.trainable import split

if TYPE_CHECKING:
    from detr_jax.checkpoints import store


@dataclasses.dataclass
class Loaded:
    """A detector's model, from any checkpoint, with what detecting takes besides."""

    config: ModelConfig
    model: nnx.Module
    categories: Categories
    classification: Literal["focal", "softmax"]
    scale: int
    """Images' shorter side is resized to this, in pixels."""
    max_size: int
    """... unless the longer one would become longer than this."""
    report: str
    """What was read, for people."""
    max_source_side: int = dataclasses.field(default=1333, kw_only=True)
    """Images with a longer side are first shrunk to this, in pixels."""

    @property
    def data(self) -> DataConfig:
        """How images are prepared for it."""
        return DataConfig(eval_scale=self.scale, max_size=self.max_size, max_source_side=self.max_source_side)

    def run_config(self, data: DataConfig) -> Config:
        """Of a run with this model on `data`; its loss is the published one."""
        by_model = {DETRConfig: LossConfig.detr(), DeformableDETRConfig: LossConfig(), DINOConfig: LossConfig.dino()}
        loss = dataclasses.replace(by_model[type(self.config)], classification=self.classification)
        return Config(self.config, loss, data)

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Writes a checkpoint of this project, for `load`, `eval.py` and `--init-from`."""
        from detr_jax.checkpoints import store

        _, params, buffers = split(self.config, self.model)
        config = self.run_config(self.data)
        with store.CheckpointWriter(str(Path(directory) / "checkpoints")) as writer:
            writer.save(0, {"params": params, "buffers": buffers}, describe_run(config, self.categories))


def describe_run(config: Config, categories: Categories) -> dict[str, Any]:
    """The metadata of a checkpoint: the config, and what the labels stand for."""
    return {
        "config": dataclasses.asdict(config),
        "model": type(config.model).__name__,
        "category_ids": list(categories.ids),
        "category_names": list(categories.names),
    }


def load(
    path: str | os.PathLike[str],
    *,
    step: "store.Step" = "best",
    mesh: jax.sharding.Mesh | None = None,
    mask_padding: bool | None = None,
    revision: str | None = None,
    token: str | None = None,
    **facts: Any,
) -> Loaded:
    """Reads a checkpoint of this project (a run's folder), or of another implementation: see `convert.load`.

    Args:
        path: file or folder, or a name on the Hugging Face hub such as `facebook/detr-resnet-50`.
        step: which one of a run's checkpoints; `best` is the newest where none was saved with an AP.
        mesh: whose devices hold each a copy of a run's model; `None` is the first device.
        mask_padding: `backbone.mask_padding` of the model: on, an image in any bucket gives what the official code
            gives for it alone, without padding. `None` takes what the file says, and else off.
        revision: branch, tag or commit there; `None` is `main`. `owner/name@revision` says it too.
        token: of the hub; `None` takes the stored one, or `HF_TOKEN`.
        facts: `dilation` and `num_heads`, for files that do not tell.

    Raises:
        FileNotFoundError: no such file or folder.
        ValueError: it does not fit a detector that this project has; says what does not.
    """
    loaded = _read(path, step, mesh, revision=revision, token=token, **facts)
    if mask_padding is not None:
        loaded = set_mask_padding(loaded, mask_padding)
    tensors = {".".join(map(str, name)): leaf for name, leaf in nnx.to_flat_state(nnx.state(loaded.model))}
    loaded.report = "\n  ".join([loaded.report, *not_finite(tensors)])
    return loaded


def not_finite(tensors: Mapping[str, Any]) -> list[str]:
    """A line that warns of tensors that hold NaN or infinity, if there are any."""
    bad = [name for name, leaf in tensors.items() if not np.isfinite(np.asarray(leaf[...])).all()]
    more = f" and {len(bad) - 3} more" * (len(bad) > 3)
    return [f"WARNING: NaN or infinity in {', '.join(bad[:3])}{more}: what it detects means nothing"] * bool(bad)


def _read(
    path: str | os.PathLike[str],
    step: "store.Step",
    mesh: jax.sharding.Mesh | None,
    *,
    revision: str | None,
    token: str | None,
    **facts: Any,
) -> Loaded:
    where = hub.locate(path, revision=revision, token=token)
    if not where.exists():
        raise NotFoundError(f"{path}: no such file or folder; expected a checkpoint")
    if not is_ours(where):
        found = convert.load(where, name=hub.describe(path, where), **facts)
        classification = found.config.classification
        model, categories = found.model, found.categories
        return Loaded(found.config, model, categories, classification, found.scale, found.max_size, found.report)
    from detr_jax.checkpoints import store

    if step == "best":
        step = store.best_or_latest(str(path))
    saved = store.read_metadata(str(path), step)
    config = from_dict(saved["config"], saved["model"], path)
    # Of training alone; what is looked at inside of a layer must not be computed twice.
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, remat="none"))
    mesh = mesh or sharding.make_mesh(1)
    with jax.set_mesh(mesh):
        model = nnx.merge(*restore_model(str(path), step, config, mesh))
    categories = Categories(tuple(saved["category_ids"]), tuple(saved["category_names"]))
    report = f"{path}: step {saved['step']} of this project; {convert.describe(config.model)}"
    data = config.data
    return Loaded(
        config.model,
        model,
        categories,
        config.loss.classification,
        data.eval_scale,
        data.max_size,
        report,
        max_source_side=data.max_source_side,
    )


def set_mask_padding(loaded: Loaded, mask_padding: bool) -> Loaded:
    """The same detector with `backbone.mask_padding` on or off; its parameters are the same ones."""
    backbone = dataclasses.replace(loaded.config.backbone, mask_padding=mask_padding)
    config = dataclasses.replace(loaded.config, backbone=backbone)
    graphdef, _ = nnx.split(build_abstract(config))
    report = f"{loaded.report}\n  padding {'masked' if mask_padding else 'not masked'}, as asked for"
    return dataclasses.replace(loaded, config=config, model=nnx.merge(graphdef, nnx.state(loaded.model)), report=report)


def is_ours(path: str | os.PathLike[str]) -> bool:
    """Whether a path is a checkpoint, or a folder of checkpoints, that training here wrote."""
    from detr_jax.checkpoints import store

    path = Path(path)
    marks = (path / "checkpoints").is_dir() or (path / "_CHECKPOINT_METADATA").exists()
    return path.is_dir() and (marks or bool(store.steps(str(path))))


def initialize_from(
    path: str | os.PathLike[str], config: ModelConfig, categories: Categories, params: dict, buffers: dict
) -> tuple[dict, dict, str]:
    """Parameters and buffers of a new model, taken from a checkpoint; of the class heads, the rows of the same classes.

    Classes are the same by name, whatever their numbers. A checkpoint that names none is taken by its ids, if they are
    those of the data; else all class heads start anew.

    Adapters (`config.tune`) that the checkpoint does not have start anew.

    Args:
        path: of the checkpoint; see `load`.
        config: of the new model.
        categories: of the data to train on.
        params: of the new model, as `models.split` gives them.
        buffers: of the new model.

    Returns:
        The same structures, laid out on the same devices, and a report of what was loaded and what was not.

    Raises:
        ValueError: the models differ in more than their classes; says in which fields.
    """
    source = load(path, dilation=config.backbone.dilation, num_heads=config.num_heads)
    found_classes = categories.match(source.categories)
    if "by id" in found_classes.how and source.categories.ids != categories.ids:
        found_classes = found_classes.named()
    theirs = {tuple(leaf_path): leaf for leaf_path, leaf in nnx.to_flat_state(nnx.state(source.model))}
    loaded, anew, problems = 0, [], []

    def replace(location, leaf):
        nonlocal loaded
        keys = tuple(part.key for part in location[1:])
        found = theirs.pop(keys, None)
        rows = None
        if found is not None and keys[0] in ("class_embed", "label_embed"):
            rows, axis = class_rows(source.config, found_classes.labels, keys)
            found = np.take(np.asarray(found[...]), np.maximum(rows, 0), axis)
            if found.shape == leaf.shape:
                new = np.expand_dims(rows < 0, [i for i in range(found.ndim) if i != axis % found.ndim])
                found = np.where(new, multihost_utils.process_allgather(leaf, tiled=True), found)
        if (found is None and "lora" in keys) or (rows is not None and (rows < 0).all()):
            anew.append(".".join(map(str, keys)))
            return leaf
        if found is None or found.shape != leaf.shape:
            got = "missing" if found is None else list(found.shape)
            problems.append(f"  {'.'.join(map(str, keys))}: {got}, expected {list(leaf.shape)}")
            return leaf
        loaded += 1
        return jax.device_put(np.asarray(found[...], leaf.dtype), leaf.sharding)

    new_params, new_buffers = jax.tree_util.tree_map_with_path(replace, (params, buffers))
    problems += [f"  {'.'.join(map(str, keys))}: {list(leaf.shape)}, not expected" for keys, leaf in theirs.items()]
    if problems:
        fields = (
            field.name for field in dataclasses.fields(config) if field.name not in ("num_classes", "dropout", "tune")
        )
        differ = [
            f"  model.{name}: {getattr(source.config, name, 'none')} in the file, {getattr(config, name)} here"
            for name in fields
            if getattr(source.config, name, None) != getattr(config, name)
        ]
        raise UserError(
            f"train.init_from={path} is another model than the configuration's: "
            f"{convert.describe(source.config)}.\n" + "\n".join(differ + problems[:8])
        )
    report = [source.report, f"  loaded {loaded} tensors, initialized anew: {', '.join(sorted(anew)) or 'none'}"]
    return new_params, new_buffers, "\n".join([*report, f"  {found_classes}"])


def class_rows(config: ModelConfig, labels: Sequence[int], path: Sequence[Any]) -> tuple[np.ndarray, int]:
    """For each slice of a tensor with one per class, the old one that it is (-1 is a new one), and the axis of them.

    Args:
        config: of the old model.
        labels: for each new class, the old label; -1 is a new class.
        path: of a tensor of `class_embed` or `label_embed`.
    """
    if path[0] == "label_embed":
        return np.array([*labels, config.num_classes]), 0  # the last row is never read
    if isinstance(config, DETRConfig):
        return np.array([*labels, config.num_classes]), -1  # no-object class
    if config.two_stage and not isinstance(config, DINOConfig) and path[1] == config.decoder_layers:
        # Output 0 ranks the proposals, whatever class it is named after. (DINO ranks them by their best class.)
        return np.array([0, *(label if label != 0 else -1 for label in labels[1:])]), -1
    return np.array(labels), -1


def restore_model(
    directory: str, step: "store.Step", config: Config, mesh: jax.sharding.Mesh
) -> tuple[nnx.GraphDef, dict, dict]:
    """Graph, parameters (their moving average where there is one) and buffers of a checkpoint, on every device."""
    from detr_jax.checkpoints import store

    saved = store.read_metadata(directory, step)
    model = build_abstract(config.model)
    graphdef, params, buffers = split(config.model, model)
    trained = "ema" if "ema" in saved["entries"] else "params"

    def place(leaf):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding.replicated(mesh))

    state = store.restore(directory, jax.tree.map(place, {trained: params, "buffers": buffers}), step)
    return graphdef, state[trained], state["buffers"]
