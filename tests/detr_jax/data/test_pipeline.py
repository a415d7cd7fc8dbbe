"""Batches of decoded images: both engines, rotation, shrinking, caching, errors, and a clean end."""

import dataclasses
import io
import itertools
import json
import threading
import time

import numpy as np
import pytest
from PIL import Image, ImageOps

from detr_jax.config import DataConfig
from detr_jax.data.coco import load_coco
from detr_jax.data.image import shrink
from detr_jax.data.pipeline import batches
from detr_jax.data.sampler import EvalSampler, TrainSampler
from detr_jax.data.splits import load_split
from detr_jax.errors import DataError

PILLOW = DataConfig(engine="pillow", workers=2, prefetch=2)


@pytest.fixture(scope="module")
def mixed(tmp_path_factory, data_dir):
    """Six images: plain, grayscale, progressive, a PNG with alpha, one rotated by EXIF, and a large one."""
    folder = tmp_path_factory.mktemp("mixed")
    content = json.loads((data_dir / "coco_open/annotations/instances_val2017.json").read_text())
    sources = [data_dir / "coco_open/val2017" / image["file_name"] for image in content["images"]]
    opened = [Image.open(path).convert("RGB") for path in sources]
    exif = Image.Exif()
    exif[0x0112] = 8
    opened[0].save(folder / "plain.jpg", quality=90)
    opened[1].convert("L").save(folder / "gray.jpg")
    opened[2].save(folder / "progressive.jpg", progressive=True)
    opened[3].convert("RGBA").save(folder / "alpha.png")
    opened[4].save(folder / "rotated.jpg", exif=exif)
    opened[5].resize((2000, 1500)).save(folder / "large.jpg")
    images, annotations = [], []
    for number, path in enumerate(sorted(folder.iterdir()), 1):
        with Image.open(path) as image:
            width, height = (ImageOps.exif_transpose(image) or image).size
        images.append({"id": number, "file_name": path.name, "width": width, "height": height})
        annotations.append({"id": number, "image_id": number, "category_id": 1, "bbox": [10, 20, 30, 40]})
    path = folder / "annotations.json"
    path.write_text(
        json.dumps({"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "thing"}]})
    )
    return load_coco(path, folder)


def test_a_batch(data_dir):
    data = dataclasses.replace(PILLOW, root=str(data_dir / "coco_open"))
    index = load_split(data, "train")
    sampler = TrainSampler(index, data, 4, seed=0)
    plan = sampler.plan(1)
    ((bucket, batch),) = batches(index, sampler, [1], data_config=data)
    assert bucket == plan.bucket
    assert set(batch) == {
        "pixels", "source_size", "flip", "resized_size", "crop", "size",
        "boxes_cxcywh", "labels", "num_boxes", "image_id", "orig_size",
    }  # fmt: skip
    assert batch["pixels"].shape == (4, *sampler.source_shape, 3) and batch["pixels"].dtype == np.uint8
    for row, i in enumerate(plan.index):
        image = np.asarray(Image.open(index.name(i)).convert("RGB"))
        h, w = image.shape[:2]
        assert batch["source_size"][row].tolist() == [h, w]
        np.testing.assert_array_equal(batch["pixels"][row, :h, :w], image)
        assert batch["pixels"][row, h:].max(initial=0) == 0 == batch["pixels"][row, :, w:].max(initial=0)
    for name in set(batch) - {"pixels"}:
        np.testing.assert_array_equal(batch[name], getattr(plan, name))


def test_a_host_reads_its_rows_only(data_dir):
    data = dataclasses.replace(PILLOW, root=str(data_dir / "coco_open"))
    index = load_split(data, "train")
    sampler = TrainSampler(index, data, 4, seed=0)
    ((_, whole),) = batches(index, sampler, [0], data_config=data)
    ((_, part),) = batches(index, sampler, [0], rows=slice(1, 3), data_config=data)
    for name, array in part.items():
        np.testing.assert_array_equal(array, whole[name][1:3])


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # inside tensorflow
def test_both_engines_make_the_same_batches(mixed):
    pytest.importorskip("tensorflow")
    data = dataclasses.replace(PILLOW, max_source_side=800)
    sampler = EvalSampler(mixed, data, 4)
    made = {}
    for engine in ("pillow", "tf"):
        config = dataclasses.replace(data, engine=engine)
        made[engine] = list(batches(mixed, sampler, range(len(sampler)), data_config=config))
    assert (made["pillow"][-1][1]["image_id"] < 0).any()  # a padding row
    for (bucket, ours), (other_bucket, other) in zip(made["pillow"], made["tf"], strict=True):
        assert bucket == other_bucket and ours.keys() == other.keys()
        for name, array in ours.items():
            assert array.dtype == other[name].dtype
            np.testing.assert_array_equal(array, other[name], err_msg=name)
    tf = dataclasses.replace(data, engine="tf")
    stream = batches(mixed, sampler, itertools.cycle([0, 1]), data_config=tf)  # endless, and closed early
    assert [next(stream)[0] for _ in range(3)][2] == made["tf"][0][0]
    stream.close()
    assert list(batches(mixed, sampler, [], data_config=tf)) == []


def test_rotated_photo_is_upright(mixed):
    i = mixed.names.index(next(name for name in mixed.names if "rotated" in name))
    size = tuple(mixed.sizes[i].tolist())
    with Image.open(mixed.name(i)) as image:
        assert image.size == size  # stored as (w, h): the other way round
        expected = np.asarray(ImageOps.exif_transpose(image))
    np.testing.assert_array_equal(mixed.image(i), expected)


def test_large_photo_is_shrunk(mixed):
    i = mixed.names.index(next(name for name in mixed.names if "large" in name))
    small = np.asarray(shrink(mixed.image(i), (300, 400)))
    with Image.open(io.BytesIO(mixed.encoded(i))) as image:
        expected = np.asarray(image.resize((400, 300), Image.Resampling.BILINEAR), np.float32)
    assert small.shape == (300, 400, 3)
    # The halvings before the resize are a box filter; it differs from the triangle only at sharp edges.
    assert np.abs(small - expected).mean() < 2


def test_cache_decodes_once(data_dir, monkeypatch):
    data = dataclasses.replace(PILLOW, root=str(data_dir / "coco_open"), cache=True, engine="auto")
    index = load_split(data, "val")
    sampler = EvalSampler(index, data, 4)
    steps = range(len(sampler))
    first = list(batches(index, sampler, steps, data_config=data))
    assert len(index.decoded) == 8
    monkeypatch.setattr("detr_jax.data.index.decode", None)
    second = list(batches(index, sampler, steps, data_config=data))
    for (_, a), (_, b) in zip(first, second, strict=True):
        np.testing.assert_array_equal(a["pixels"], b["pixels"])


def damaged(tmp_path, engine):
    for i in range(8):
        Image.effect_noise((64, 48), 50).convert("RGB").save(tmp_path / f"{i}.jpg")
    images = [{"id": i, "file_name": f"{i}.jpg", "width": 64, "height": 48} for i in range(8)]
    (tmp_path / "a.json").write_text(
        json.dumps({"images": images, "annotations": [], "categories": [{"id": 1, "name": "a"}]})
    )
    index = load_coco(tmp_path / "a.json", tmp_path)
    data = dataclasses.replace(PILLOW, engine=engine)
    bad = tmp_path / "5.jpg"
    bad.write_bytes(bad.read_bytes()[:-300])
    return batches(index, EvalSampler(index, data, 2), range(4), data_config=data)


@pytest.mark.parametrize("engine", ["pillow", "tf"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # inside tensorflow
def test_a_file_damaged_in_mid_run_is_named(tmp_path, engine):
    if engine == "tf":
        pytest.importorskip("tensorflow")
    stream = damaged(tmp_path, engine)
    next(stream)
    next(stream)
    with pytest.raises(DataError, match=r"5\.jpg: .*[Pp]remature end"):
        next(stream)


def test_a_file_lost_in_mid_run_is_named(mixed, tmp_path):
    lost = dataclasses.replace(mixed, read=lambda i: (tmp_path / "gone.jpg").read_bytes())
    with pytest.raises(DataError, match=r"alpha\.png: .*No such file"):
        list(batches(lost, EvalSampler(lost, PILLOW, 6), [0], data_config=PILLOW))


def test_closing_early_ends_the_threads(data_dir):
    data = dataclasses.replace(PILLOW, root=str(data_dir / "coco_open"))
    index = load_split(data, "train")
    before = threading.active_count()
    stream = batches(index, TrainSampler(index, data, 4, seed=0), itertools.count(), data_config=data)
    next(stream)
    assert threading.active_count() > before
    stream.close()
    deadline = time.monotonic() + 10  # they end after the image that each is at
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.05)
    assert threading.active_count() == before
