"""The cells of the convergence study: which there are, how each is trained, and what is measured of it.

The protocol is in `docs/convergence.md`; `benchmarks/convergence.py` runs it.
"""

import contextlib
import dataclasses
import json
import os
import platform
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from detr_jax import sharding
from detr_jax.checkpoints import restore_model, store
from detr_jax.cli import load_config
from detr_jax.config import (
    BackboneConfig,
    Config,
    DataConfig,
    DeformableDETRConfig,
    DETRConfig,
    DINOConfig,
    LossConfig,
    ModelConfig,
    OptimConfig,
    TrainConfig,
    from_dict,
)
from detr_jax.data.pipeline import batches
from detr_jax.data.resample import resample_batch
from detr_jax.metric_writer import read_metrics
from detr_jax.models import build, split
from detr_jax.train_step import init_state, make_train_step
from detr_jax.training import NonFiniteLossError, prepare, read_batches, train

DEMO_CONFIG = Path(__file__).resolve().parents[1] / "configs/bccd.py"
RATES = (1e-4, 3e-4, 1e-3)
SCORES = ("AP", "AP50", "AP75", "APs", "APm", "APl")
SIZES = {"bccd": (120, 160), "deep_pcb": (320, 320)}
QUERIES = {"bccd": 50, "deep_pcb": 50}
EPOCHS = {"try": 4, "main": 16, "ablation": 16, "long": 80, "cost": 0}
DEMO_EPOCHS = {"bccd": 11, "deep_pcb": 4}
SEEDS = (0, 1, 2)
FIRST = ("detr", "single_scale", "multi_scale", "two_stage")
THEN = ("detr_dc5", "single_scale_dc5", "refine")
ABLATIONS = ("levels3", "points1", "single_scale_points1")
"""The paper's Table 2, with `single_scale` (1 level, 4 points) and `multi_scale` (4 levels, 4 points)."""
DEMO = {"bccd": ("demo", "dcn", "dino", "bfloat16"), "deep_pcb": ("demo", "dino")}
"""`configs/bccd.py` as it is, and with one change: see `demo_config`."""


@dataclasses.dataclass(frozen=True)
class Cell:
    """One training of the study, or (`cost`) the count and the timing of one model's step."""

    data: str
    part: str
    model: str
    seed: int = 0
    rate: float | None = None
    """Learning rate; `None`: the one that the model's tries chose."""

    @property
    def name(self) -> str:
        """Such as `bccd/main/detr/seed0`."""
        last = f"lr{self.rate:g}" if self.part == "try" else self.part if self.part == "cost" else f"seed{self.seed}"
        return f"{self.data}/{self.part}/{self.model}/{last}"

    @property
    def epochs(self) -> int:
        """Passes over the training images."""
        return DEMO_EPOCHS[self.data] if self.part == "demo" else EPOCHS[self.part]


def all_cells(data_sets: Sequence[str]) -> list[Cell]:
    """Every cell, in the order in which complete comparisons exist early."""
    cells = []
    for data in data_sets:
        for group in (FIRST, THEN):
            cells += [Cell(data, "try", model, rate=rate) for model in group for rate in RATES]
            cells += [Cell(data, "main", model) for model in group]
        cells += [Cell(data, "cost", model) for model in (*FIRST, *THEN, *ABLATIONS)]
        cells += [Cell(data, "main", model, seed) for seed in SEEDS[1:] for model in (*FIRST, *THEN)]
        cells += [Cell(data, "ablation", model) for model in ABLATIONS]
        cells += [Cell(data, "long", "detr")]
        cells += [Cell(data, "ablation", model, seed) for seed in SEEDS[1:] for model in ABLATIONS]
        cells += [Cell(data, "long", "detr", seed) for seed in SEEDS[1:]]
        rate = load_config(str(DEMO_CONFIG)).optim.lr
        cells += [Cell(data, "demo", model, seed, rate) for seed in SEEDS for model in DEMO[data]]
        cells += [Cell(data, "cost", model) for model in DEMO[data]]
    return cells


def model_config(name: str, num_queries: int) -> ModelConfig:
    """The model of that name: all have the same backbone, width, layers and queries."""
    same: dict[str, Any] = {
        "backbone": BackboneConfig(depth=18, norm="group", freeze_at=0, dilation=name.endswith("dc5")),
        "hidden_dim": 128,
        "encoder_layers": 2,
        "decoder_layers": 3,
        "ffn_dim": 512,
        "dropout": 0.0,
        "num_queries": num_queries,
    }
    if name.startswith("detr"):
        return DETRConfig(**same)
    points = 1 if name.endswith("points1") else 4
    return DeformableDETRConfig(
        **same,
        num_levels=1 if name.startswith("single_scale") else 3 if name == "levels3" else 4,
        encoder_points=points,
        decoder_points=points,
        box_refinement=name in ("refine", "two_stage"),
        two_stage=name == "two_stage",
    )


def tries_of(model: str) -> str:
    """The model whose learning rate a model takes: an ablation that of the model that it changes."""
    return {"levels3": "multi_scale", "points1": "multi_scale", "single_scale_points1": "single_scale"}.get(
        model, model
    )


def cell_config(cell: Cell, rate: float, roots: Mapping[str, Path], work: Path) -> Config:
    """The configuration of a cell's training; that of the product, with nothing of its own."""
    height, width = SIZES[cell.data]
    root = roots[cell.data]
    if cell.model in DEMO[cell.data]:
        return demo_config(cell, root, work)
    data = DataConfig(
        root=str(root),
        scales=(min(height, width),),
        eval_scale=min(height, width),
        max_size=max(height, width),
        max_source_side=max(height, width),
        crop=False,
        cache=True,
        engine="pillow",
        workers=2,
    )
    if cell.part == "try":
        files = hold_out(root, work / "hold_out" / cell.data)
        images = str((root / "images").resolve())
        data = dataclasses.replace(
            data, train_annotations=files[0], val_annotations=files[1], train_images=images, val_images=images
        )
    model = model_config(cell.model, QUERIES[cell.data])
    return Config(
        model=model,
        loss=LossConfig.detr() if isinstance(model, DETRConfig) else LossConfig(),
        data=data,
        optim=OptimConfig(lr=rate, backbone_lr_factor=1.0, warmup_steps=100, drop_at=0.8),
        train=TrainConfig(
            output_dir=str(work / cell.name),
            batch_size=2,
            epochs=max(cell.epochs, 1),
            seed=cell.seed,
            eval_every=0 if cell.part == "try" else 2 if cell.part == "long" else 1,
            log_every=25,
            checkpoint_every=1000,
            keep_last=cell.epochs if measures_entropy(cell) else 1,
        ),
    )


def demo_config(cell: Cell, root: Path, work: Path) -> Config:
    """The config of `make demo`, changed in the one thing that the cell's model names.

    `dcn` has modulated deformable convolutions in C3 to C5, `dino` is DINO with DINO's loss and everything else equal,
    `bfloat16` computes in it. On DeepPCB, whose images are square, they have 240 x 240 pixels, and every epoch is
    evaluated.
    """
    demo = load_config(str(DEMO_CONFIG))
    model, loss = demo.model, demo.loss
    if cell.model == "dcn":
        model = dataclasses.replace(model, backbone=dataclasses.replace(model.backbone, deform_version=2))
    elif cell.model == "dino":
        model, loss = DINOConfig(**vars(model)), LossConfig.dino()
    elif cell.model == "bfloat16":
        model = dataclasses.replace(model, dtype="bfloat16")
    return dataclasses.replace(
        demo,
        model=model,
        loss=loss,
        data=dataclasses.replace(demo.data, root=str(root)),
        train=dataclasses.replace(
            demo.train,
            output_dir=str(work / cell.name),
            epochs=cell.epochs or demo.train.epochs,
            seed=cell.seed,
            eval_every=demo.train.eval_every if cell.data == "bccd" else 1,
            keep_last=1,
            num_pictures=0,
        ),
    )


def hold_out(root: Path, folder: Path) -> tuple[str, str]:
    """Annotation files of the training images without every fourth (by id), and of those: to choose learning rates."""
    content = json.loads((root / "annotations/instances_train.json").read_text())
    ids = sorted(image["id"] for image in content["images"])
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, chosen in (("train", set(ids) - set(ids[3::4])), ("held_out", set(ids[3::4]))):
        part = content | {
            "images": [image for image in content["images"] if image["id"] in chosen],
            "annotations": [box for box in content["annotations"] if box["image_id"] in chosen],
        }
        path = folder.resolve() / f"{name}.json"
        temporary = path.with_suffix(f".{os.getpid()}")
        temporary.write_text(json.dumps(part))
        temporary.replace(path)
        paths.append(str(path))
    return paths[0], paths[1]


def choose_rate(tries: Sequence[Mapping[str, Any]]) -> float:
    """The learning rate of the best try: highest AP on the held-out images, or, where no try has learned enough for
    its AP to say anything (all below 0.02), the lowest training loss of the last epoch."""
    learned = [result for result in tries if result["curve"]]
    if not learned:
        raise ValueError(f"all tries of {tries[0]['model']} diverged")
    best = max(learned, key=lambda result: result["curve"][-1]["AP"])
    if best["curve"][-1]["AP"] < 0.02:
        best = min(learned, key=lambda result: result["curve"][-1]["loss"])
    return best["lr"]


def measures_entropy(cell: Cell) -> bool:
    """Which cells keep all checkpoints until they are finished, to look at the attention in each."""
    return cell.part == "main" and cell.seed == 0


def run_cell(cell: Cell, rate: float, roots: Mapping[str, Path], work: Path) -> dict[str, Any] | None:
    """Trains and returns the result; `None` if it was interrupted."""
    config = cell_config(cell, rate, roots, work)
    about = {"cell": cell.name, **dataclasses.asdict(cell), "lr": rate, "hardware": hardware(), "jax": jax.__version__}
    if cell.part == "cost":
        return about | step_cost(config)
    output = Path(config.train.output_dir)
    if not is_finished(output, cell):
        before = time.process_time()
        try:
            train(config)
        except NonFiniteLossError as error:
            shutil.rmtree(output)
            return about | {"epochs": cell.epochs, "curve": [], "diverged": str(error)}
        finally:
            with (output / "cpu_seconds").open("a") as file:  # one line per session of a run that was interrupted
                file.write(f"{time.process_time() - before}\n")
        if not is_finished(output, cell):
            return None
    records = read_metrics(output / "metrics.jsonl")
    result = about | {"epochs": cell.epochs, "steps": records[-1]["step"], "curve": curve(records)}
    result["cpu_seconds"] = round(sum(map(float, (output / "cpu_seconds").read_text().split())), 1)
    if measures_entropy(cell):
        result["entropy"] = entropies(output)
    shutil.rmtree(output)
    return result


def is_finished(output: Path, cell: Cell) -> bool:
    """Whether the training has its last evaluation."""
    path = output / "metrics.jsonl"
    return path.exists() and any("val/AP" in r and r["epoch"] == cell.epochs for r in read_metrics(path))


def curve(records: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The evaluations of a run, each with the mean training loss of the epoch before."""
    points = []
    for record in records:
        if "val/AP" in record:
            losses = [r["train/loss"] for r in records if "train/loss" in r and 0 <= record["epoch"] - r["epoch"] < 1]
            point = {"epoch": record["epoch"], "step": record["step"], "hours": round(record["hours"], 4)}
            point |= {name: round(record[f"val/{name}"], 4) for name in SCORES}
            points.append(point | {"loss": round(float(np.mean(losses)), 4)})
    return points


def entropies(output: Path) -> list[dict[str, Any]]:
    """Entropy of the attention to the image, at the start and in each kept checkpoint, on eight validation images."""
    saved = store.read_metadata(str(output))
    run = prepare(from_dict(saved["config"], saved["model"]))
    config, rows = run.config, sharding.host_rows(run.config.train.batch_size, run.mesh)
    feed = batches(run.val_index, run.eval_sampler, range(4), rows=rows, data_config=config.data)
    graphdef, *start = split(config.model, build(config.model, rngs=nnx.Rngs(config.train.seed)))

    images = []
    with contextlib.closing(feed), jax.set_mesh(run.mesh):
        for bucket, batch in feed:
            batch.pop("image_id")
            placed = sharding.put_batch(batch, run.mesh)
            images.append((resample_batch(placed, bucket, run.eval_sampler, config.data), placed["size"]))

    @jax.jit
    def look(params, buffers, pixels, sizes):
        model = nnx.merge(graphdef, params, buffers)
        _, captured = nnx.capture(model, nnx.Intermediate)(pixels, sizes)
        return attention_entropy(nnx.to_pure_dict(captured))

    def mean(epoch: float, params: dict, buffers: dict) -> dict[str, Any]:
        found = [jax.device_get(look(params, buffers, pixels, sizes)) for pixels, sizes in images]
        return {"epoch": epoch} | {
            part: {"entropy": round(float(np.mean([f[part][0] for f in found])), 4), "keys": int(found[0][part][1])}
            for part in found[0]
        }

    points = [mean(0.0, *start)]
    for step in store.steps(str(output)):
        if step % len(run.sampler) == 0:
            _, params, buffers = restore_model(str(output), step, config, run.mesh)
            points.append(mean(step / len(run.sampler), params, buffers))
    return points


def attention_entropy(captured: Mapping[str, Any]) -> dict[str, tuple[Any, int]]:
    """Entropy of a model's attention to the image: the encoder's to itself, and that of the queries.

    Args:
        captured: the intermediates of a forward pass.

    Returns:
        For `encoder` and `decoder` the mean entropy in nats over images, heads, rows and layers, and N_k, how many keys
        a row weighs: equal weights, each 1 / N_k, have the entropy log N_k.
    """
    result = {}
    for part, name in (("encoder", "self_attn"), ("decoder", "cross_attn")):
        values, keys = [], 0
        for layer in captured[part].values():
            weights = layer[name]["attention_weights"][0]
            if "sampling_locations" in layer[name]:  # [b, q, h, l, p]; of DETR [b, h, q, s]
                weights = weights.reshape(*weights.shape[:3], -1)
            keys = weights.shape[-1]
            values.append(-jax.scipy.special.xlogy(weights, weights).sum(-1).mean())
        result[part] = (jnp.stack(values).mean(), keys)
    return result


def step_cost(config: Config) -> dict[str, Any]:
    """GFLOPs of a training step as XLA counts them, and its seconds: the median of 20.

    On a CPU these are seconds of processor time, so that other work on the machine does not count.
    """
    run = prepare(dataclasses.replace(config, train=dataclasses.replace(config.train, max_steps=22)))
    on_cpu = jax.default_backend() == "cpu"
    clock = time.process_time if on_cpu else time.perf_counter
    seconds = []
    with jax.set_mesh(run.mesh), contextlib.closing(read_batches(run, 0, lambda: False)) as feed:
        graphdef, state = init_state(run.config, run.optimizer, run.mesh)
        step: Any = make_train_step(run.config, graphdef, run.optimizer, run.sampler)
        compiled: Any = None
        for bucket, batch in feed:
            compiled = compiled or step.lower(state, batch, bucket=bucket).compile()
            begin = clock()
            state, _ = jax.block_until_ready(compiled(state, batch))
            seconds.append(clock() - begin)
    flops = compiled.cost_analysis()["flops"]
    return {
        "gflops_per_step": round(flops / 1e9, 3),
        "seconds_per_step": round(float(np.median(seconds[2:])), 4),
        "clock": "processor" if on_cpu else "wall",
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(state["params"])),
    }


def hardware() -> str:
    """What the cell ran on."""
    device = jax.devices()[0]
    if device.platform != "cpu":
        return f"{jax.device_count()} x {device.device_kind}"
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), name)
    return f"{len(os.sched_getaffinity(0))} core(s) of {name}"
