"""DINO against two-stage Deformable DETR, and against denoising alone: equal backbone, sizes, queries and epochs.

Trains each model from scratch with each seed, on the demo's blood cells or on another COCO-format folder, one run after
another. Then it prints AP by epoch and draws AP against epochs and hours. What is finished is not trained again, what
was interrupted goes on.

    python benchmarks/dino.py                                        # 9 runs of 11 epochs, as `make demo` trains
    python benchmarks/dino.py --data-root FOLDER --out runs/pcb_study --epochs 20
"""

import argparse
import dataclasses
import subprocess
import sys
from pathlib import Path

import numpy as np

from detr_jax.cli import load_config
from detr_jax.config import Config, DINOConfig, LossConfig
from detr_jax.curves import plot_curves
from detr_jax.metric_writer import read_metrics

ROOT = Path(__file__).resolve().parents[1]
MODELS = ("two_stage", "denoising", "dino")


def configure(model: str, seed: int, args: argparse.Namespace) -> Config:
    """The demo's config with another model; its two-stage model as it is."""
    demo = load_config(str(ROOT / "configs/bccd.py"))
    loss = demo.loss
    fields = vars(demo.model)
    changed = demo.model
    if model != "two_stage":
        loss = LossConfig.dino()
        changed = DINOConfig(**fields)
    if model == "denoising":
        off = {"two_stage": False, "look_forward_twice": False, "shared_heads": False, "contrastive": False}
        changed = dataclasses.replace(changed, label_noise=0.4, box_noise=0.4, **off)
    train = dataclasses.replace(
        demo.train,
        output_dir=str(args.out / f"{model}_seed{seed}"),
        seed=seed,
        epochs=args.epochs,
        eval_every=args.eval_every,
        keep_last=args.epochs // args.eval_every + 1,
    )
    data = dataclasses.replace(demo.data, root=str(args.data_root))
    return dataclasses.replace(demo, model=changed, loss=loss, data=data, train=train)


def run(config: Config) -> Path:
    """Trains, in a process of its own; its `metrics.jsonl`."""
    folder = Path(config.train.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "config.py"
    file.write_text(
        "from detr_jax.config import from_dict\n"
        f"config = from_dict({dataclasses.asdict(config)!r}, {type(config.model).__name__!r})\n"
    )
    subprocess.run([sys.executable, str(ROOT / "train.py"), "--config", str(file)], check=True, cwd=ROOT)
    return folder / "metrics.jsonl"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-root", type=Path, default=ROOT / "tests/data/bccd", help="COCO-format folder")
    parser.add_argument("--out", type=Path, default=Path("runs/dino_study"), help="folder of the runs")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=11)
    parser.add_argument("--eval-every", type=int, default=2)
    args = parser.parse_args()
    args.out = args.out.absolute()
    files = {(model, seed): run(configure(model, seed, args)) for seed in args.seeds for model in args.models}
    table(files, args.models)
    for x in ("epoch", "hours"):
        names = {f"{model}, seed {seed}": file for (model, seed), file in files.items()}
        plot_curves(names, x=x, curves=["val/AP", "val/AP50", "train/loss_bbox"]).savefig(args.out / f"by_{x}.png")
    print(f"\nfigures in {args.out}")


def table(files: dict[tuple[str, int], Path], models: list[str]) -> None:
    """AP by epoch: mean over seeds, and half of the range."""
    print(f"{'AP after epoch':<16}{''.join(f'{model:>18}' for model in models)}")
    curves: dict[tuple[str, float], list[float]] = {}
    for (model, _), file in files.items():
        for record in read_metrics(file):
            if "val/AP" in record:
                curves.setdefault((model, record["epoch"]), []).append(record["val/AP"])
    for epoch in sorted({epoch for _, epoch in curves}):
        cells = [curves.get((model, epoch), [float("nan")]) for model in models]
        print(f"{epoch:<16g}{''.join(f'{np.mean(c):>11.3f} +-{np.ptp(c) / 2:.3f}' for c in cells)}", flush=True)


if __name__ == "__main__":
    main()
