"""Score a checkpoint: `python eval.py --checkpoint DIR [--data.root FOLDER] [--results FILE] [--tta] ...`."""

from detr_jax import cli, processes
from detr_jax.evaluation import evaluate_checkpoint
from detr_jax.tta import TTAConfig


def main(argv: list[str]) -> None:
    options = cli.parse_eval(argv)
    processes.start()
    evaluate_checkpoint(
        options.checkpoint,
        options.data,
        step=int(options.step) if options.step.isdigit() else options.step,
        batch_size=options.batch_size,
        results=options.results,
        pictures=options.pictures,
        num_pictures=options.num_pictures,
        tta=TTAConfig(options.tta_scales) if options.tta else None,
        mask_padding=options.mask_padding,
    )


if __name__ == "__main__":
    cli.run(main)
