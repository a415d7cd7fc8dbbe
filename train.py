"""Train a detector: `python train.py --config configs/CONFIG.py --data.root FOLDER [--section.field value ...]`."""

from detr_jax import cli, processes
from detr_jax.training import train


def main(argv: list[str]) -> None:
    config = cli.parse_train(argv)
    processes.start()
    train(config)


if __name__ == "__main__":
    cli.run(main)
