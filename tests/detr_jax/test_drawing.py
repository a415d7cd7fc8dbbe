import json

import numpy as np
import pytest
from PIL import Image

from detr_jax.visualize import class_color, compare, contact_sheet, draw_detections

GRAY = Image.new("RGB", (640, 480), (128, 128, 128))


@pytest.fixture(scope="module")
def cells(data_dir):
    """The image of `bccd` with the most boxes."""
    truth = json.loads((data_dir / "bccd/annotations/instances_val.json").read_text())
    image = max(truth["images"], key=lambda p: sum(a["image_id"] == p["id"] for a in truth["annotations"]))
    annotations = [a for a in truth["annotations"] if a["image_id"] == image["id"]]
    boxes = np.array([a["bbox"] for a in annotations], float)
    boxes[:, 2:] += boxes[:, :2]
    labels = np.array([a["category_id"] for a in annotations]) - min(c["id"] for c in truth["categories"])
    names = [c["name"] for c in truth["categories"]]
    return Image.open(data_dir / "bccd/images" / image["file_name"]), boxes, labels, names


def drawn(picture, original):
    """Pixels that differ: bool [H, W]."""
    return (np.asarray(picture) != np.asarray(original.convert("RGB"))).any(-1)


def test_box_and_caption_have_the_class_color():
    picture = draw_detections(GRAY, np.array([[100, 100, 300, 200]]), np.array([1]), ["a", "b"], np.array([0.5]))
    pixels = np.asarray(picture)
    for x, y in ((100, 150), (300, 150), (200, 200)):  # left, right, bottom; the caption may be at the top
        assert tuple(pixels[y, x]) == class_color(1)
    changed = drawn(picture, GRAY)
    assert not changed[120:180, 120:280].any()  # the object itself stays visible
    assert not changed[:, 320:].any() and not changed[220:].any()
    assert (pixels[70:100, 100:150] == class_color(1)).all(-1).sum() > 100  # the caption, on top of the box


def test_the_photo_is_left_alone():
    image = GRAY.copy()
    draw_detections(image, np.array([[10, 10, 50, 50]]), np.array([0]), ["a"])
    assert image == GRAY


@pytest.mark.parametrize("box", [[0, 0, 640, 480], [600, 0, 639, 20], [0, 460, 30, 480], [-20, -20, 10, 10]])
def test_captions_stay_inside(box):
    """A caption is whole: as many of its pixels are in the picture as for a box in the middle."""
    name, color = ["a rather long name"], class_color(0)

    def area(box):
        pixels = np.asarray(draw_detections(GRAY, np.array([box]), np.array([0]), name))
        rows = (pixels == color).all(-1).sum(1)
        # The rows of the caption are those that have much of the color; lines are thinner, or drawn across all of it.
        return np.median(rows[(rows > 60) & (rows < 300)])

    assert area(box) == pytest.approx(area([200, 200, 240, 240]), rel=0.15)


def test_many_cells_stay_legible(cells):
    image, boxes, labels, names = cells
    assert len(boxes) > 20
    rng = np.random.default_rng(0)
    picture = draw_detections(image, boxes, labels, names, rng.uniform(0.3, 1, len(boxes)))
    assert picture.size == image.size
    # Boxes and captions cover less than half of the image.
    assert 0.05 < drawn(picture, image).mean() < 0.5


@pytest.mark.parametrize("size", [(1, 1), (40, 30), (3000, 2000)])
def test_any_size(size):
    image = Image.new("RGB", size)
    picture = draw_detections(image, np.array([[0, 0, size[0], size[1]]]), np.array([0]), ["name"], np.array([0.9]))
    assert picture.size == size
    assert drawn(picture, image).any()


def test_gray_arrays_inverted_boxes_and_none():
    image = np.zeros((50, 60), np.uint8)
    assert not drawn(draw_detections(image, np.zeros((0, 4)), np.zeros(0, int), []), Image.new("RGB", (60, 50))).any()
    assert draw_detections(image, np.array([[40, 40, 10, 10]]), np.array([0]), ["a"]).size == (60, 50)


def test_colors_of_neighbors_differ():
    colors = np.array([class_color(label) for label in range(8)], float)
    distances = np.abs(colors[:, None] - colors[None]).sum(-1) + 1000 * np.eye(8)
    assert distances.min() > 60  # of 765
    assert class_color(3) == class_color(3)


def test_compare_leaves_out_low_scores(cells):
    image, boxes, labels, names = cells
    scores = np.zeros(len(boxes))
    without = compare(image, boxes, labels, boxes, labels, scores, names, width=320)
    nothing = compare(image, boxes, labels, boxes[:0], labels[:0], scores[:0], names, width=320)
    everything = compare(image, boxes, labels, boxes, labels, scores + 1, names, width=320)
    assert without == nothing
    # The right half differs, the ground truth on the left does not.
    middle = without.width // 2
    changed = drawn(everything, without)
    assert changed[:, middle:].any() and not changed[:, :middle].any()


def test_contact_sheet():
    pictures = [
        Image.new("RGB", size, color) for size, color in (((100, 50), "red"), ((50, 50), "lime"), ((10, 5), "blue"))
    ]
    sheet = contact_sheet(pictures, columns=2, width=100, gap=10)
    assert sheet.size == (2 * 110 + 10, 10 + 100 + 10 + 50 + 10)
    pixels = np.asarray(sheet)
    assert tuple(pixels[20, 20]) == (255, 0, 0)
    assert tuple(pixels[100, 150]) == (0, 255, 0)
    assert tuple(pixels[150, 50]) == (0, 0, 255)
    assert tuple(pixels[150, 150]) == (255, 255, 255)
    with pytest.raises(ValueError, match="no pictures"):
        contact_sheet([])
