"""Draws `docs/demo.jpg`, the picture of the README, with the model of `make demo`: `python docs/draw_demo.py`.

On the left the detections of a validation image, on the right the points that the best detection's query samples.
"""

import io
from pathlib import Path

import tyro
from PIL import Image

from detr_jax import Detector
from detr_jax.config import DataConfig
from detr_jax.data.splits import load_split
from detr_jax.visualize import Inspector, sampling_figure

ROOT = Path(__file__).parent.parent


def main(checkpoint: str = "runs/bccd", out: str = str(ROOT / "docs/demo.jpg"), number: int = 3) -> None:
    """Draw the picture of the README.

    Args:
        checkpoint: What `make demo` trained.
        out: The picture.
        number: Which of the validation images.
    """
    index = load_split(DataConfig(root=str(ROOT / "tests/data/bccd")), "val")
    image = Image.open(io.BytesIO(index.encoded(number))).convert("RGB")
    detector = Detector.from_pretrained(checkpoint)
    drawn = detector(image, threshold=0.4).draw()
    file = io.BytesIO()
    sampling_figure(Inspector(detector)(image)).savefig(file, format="png", dpi=200)
    points = Image.open(file).convert("RGB")
    height, gap = 480, 12
    pictures = [picture.resize((picture.width * height // picture.height, height)) for picture in (drawn, points)]
    whole = Image.new("RGB", (sum(picture.width for picture in pictures) + gap, height), "white")
    whole.paste(pictures[0], (0, 0))
    whole.paste(pictures[1], (pictures[0].width + gap, 0))
    whole.save(out, quality=88)
    print(f"wrote {out}")


if __name__ == "__main__":
    tyro.cli(main)
