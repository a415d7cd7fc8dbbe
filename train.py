"""Train a detector: `python train.py --config configs/CONFIG.py --data.root FOLDER [--section.field value ...]`."""

from detr_jax import cli

if __name__ == "__main__":
    cli.run(cli.train)
