"""Score a checkpoint: `python eval.py --checkpoint DIR [--data.root FOLDER] [--results FILE] [--tta] ...`."""

from detr_jax import cli

if __name__ == "__main__":
    cli.run(cli.evaluate)
