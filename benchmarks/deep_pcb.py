"""Makes a COCO-format folder from a checkout of DeepPCB (https://github.com/tangsanli5201/DeepPCB, MIT licence).

    git clone https://github.com/tangsanli5201/DeepPCB
    python benchmarks/deep_pcb.py DeepPCB runs/deep_pcb

The tested images (not the templates), unchanged, by the official split: 1,000 to train (`trainval.txt`), 500 to
validate (`test.txt`); 10,013 boxes of six defects.
"""

import argparse
import json
import shutil
import sys
from pathlib import Path
from typing import Any

from PIL import Image

NAMES = ("open", "short", "mousebite", "spur", "copper", "pin-hole")
SPLITS = {"train": "trainval.txt", "val": "test.txt"}


def convert(checkout: Path, target: Path) -> None:
    """Writes `target/annotations/instances_{train,val}.json` and `target/images/`.

    Args:
        checkout: the folder that holds `PCBData`.
        target: created if need be.

    Raises:
        FileNotFoundError: a list, an image or its boxes are not there.
        ValueError: a line that is not `x1 y1 x2 y2 type`; names the file and the line.
    """
    source = checkout / "PCBData"
    if not source.is_dir():
        raise FileNotFoundError(f"{checkout}: no folder PCBData in it; expected a checkout of DeepPCB")
    for folder in ("annotations", "images"):
        (target / folder).mkdir(parents=True, exist_ok=True)
    for split, name in SPLITS.items():
        images: list[dict[str, Any]] = []
        annotations: list[dict[str, Any]] = []
        for line in (source / name).read_text().splitlines():
            if not line.strip():
                continue
            # "group00041/00041/00041000.jpg group00041/00041_not/00041000.txt"; the image is ..._test.jpg.
            photo, boxes = (source / part for part in line.split())
            photo = photo.with_name(f"{photo.stem}_test{photo.suffix}")
            with Image.open(photo) as image:
                width, height = image.size
            image_id = int(boxes.stem)
            images.append({"id": image_id, "file_name": photo.name, "width": width, "height": height})
            shutil.copyfile(photo, target / "images" / photo.name)
            for box, kind in read_boxes(boxes):
                annotations.append(
                    {
                        "id": len(annotations) + 1,
                        "image_id": image_id,
                        "category_id": kind,
                        "bbox": box,
                        "area": box[2] * box[3],
                        "iscrowd": 0,
                    }
                )
        categories = [{"id": number, "name": name} for number, name in enumerate(NAMES, 1)]
        content = {"images": images, "annotations": annotations, "categories": categories}
        (target / f"annotations/instances_{split}.json").write_text(json.dumps(content))
        print(f"{split}: {len(images)} images, {len(annotations)} boxes")


def read_boxes(path: Path) -> list[tuple[list[int], int]]:
    """Boxes (x, y, width, height) and types of a file of lines `x1 y1 x2 y2 type`, types counted from 1."""
    found = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        if not line.strip():
            continue
        try:
            x1, y1, x2, y2, kind = map(int, line.replace(",", " ").split())
        except ValueError:
            raise ValueError(f"{path}, line {number}: got {line!r}, expected x1 y1 x2 y2 type") from None
        if not 1 <= kind <= len(NAMES):
            raise ValueError(f"{path}, line {number}: type {kind}, expected 1 to {len(NAMES)}")
        found.append(([x1, y1, x2 - x1, y2 - y1], kind))
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", type=Path, help="a checkout of DeepPCB")
    parser.add_argument("target", type=Path, help="the new folder")
    options = parser.parse_args()
    try:
        convert(options.checkout, options.target)
    except (FileNotFoundError, ValueError) as error:
        sys.exit(f"error: {error}")
