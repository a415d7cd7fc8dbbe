"""Which layout of a data set is taken where a folder holds several."""

from detr_jax.config import DataConfig
from detr_jax.data.splits import find_split


def test_layouts_are_looked_for_in_the_documented_order(tmp_path):
    """`find_split`: COCO 2017's names, then `instances_{split}.json` with `images/` or `{split}/`, then one file."""
    order = [
        ("annotations/instances_val2017.json", "val2017"),
        ("annotations/instances_val.json", "images"),
        ("annotations/instances_val.json", "val"),
        ("annotations.json", "images"),
    ]
    for annotations, images in order:
        (tmp_path / annotations).parent.mkdir(exist_ok=True)
        (tmp_path / annotations).touch()
        (tmp_path / images).mkdir(exist_ok=True)
    data = DataConfig(root=str(tmp_path))
    assert find_split(data, "val") == (tmp_path / order[0][0], tmp_path / order[0][1])
    (tmp_path / order[0][0]).unlink()
    assert find_split(data, "val") == (tmp_path / order[1][0], tmp_path / "images")
    (tmp_path / order[1][0]).unlink()
    assert find_split(data, "val") == (tmp_path / "annotations.json", tmp_path / "images")
