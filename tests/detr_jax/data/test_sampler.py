"""Plans: determinism, coverage, buckets, and sizes and boxes against an independent reckoning of the official code."""

import dataclasses

import numpy as np
import pytest

from detr_jax.config import DataConfig
from detr_jax.data.buckets import derive_buckets
from detr_jax.data.index import DatasetIndex
from detr_jax.data.sampler import BatchPlan, EvalSampler, TrainSampler
from detr_jax.data.transforms import resize_size

COCO_SIZES = [(480, 640), (427, 640), (640, 480), (640, 427), (333, 500), (640, 640), (360, 640)]


def make_index(n: int, sizes=COCO_SIZES, seed: int = 0, extent: float = 1.0) -> DatasetIndex:
    """n images without files: random boxes, at most `extent` of the image, i % 5 of them in image i."""
    rng = np.random.default_rng(seed)
    size = np.array([sizes[i % len(sizes)] for i in range(n)], np.int32)
    boxes = []
    for i in range(n):
        corners = np.sort(rng.random((i % 5, 2, 2)) * extent, axis=1)
        corners += rng.random((i % 5, 1, 2)) * (1 - extent)
        boxes.append((corners * size[i, ::-1]).reshape(-1, 4).astype(np.float32))
    return DatasetIndex(
        image_ids=np.arange(n, dtype=np.int64) + 1000,
        sizes=size,
        boxes_xyxy=tuple(boxes),
        labels=tuple(np.arange(i % 5, dtype=np.int32) for i in range(n)),
        category_ids=tuple(range(5)),
        category_names=tuple("abcde"),
        report=(),
        names=tuple(f"{i}.jpg" for i in range(n)),
        read=lambda i: b"",
        read_ground_truth=dict,
    )


def arrays(plan: BatchPlan) -> dict[str, np.ndarray]:
    return {name: array for name, array in vars(plan).items() if name != "bucket"}


def assert_equal(a: BatchPlan, b: BatchPlan) -> None:
    assert a.bucket == b.bucket
    for name, array in arrays(a).items():
        np.testing.assert_array_equal(array, arrays(b)[name], err_msg=name)


def test_a_plan_depends_on_seed_and_step_only():
    index, data = make_index(40), DataConfig()
    first = TrainSampler(index, data, 4, seed=3)
    once = [first.plan(step) for step in range(25)]
    again = TrainSampler(index, data, 4, seed=3)
    for step in (24, 3, 17, 0, 10):  # in any order, as after a resume
        assert_equal(again.plan(step), once[step])
    other = TrainSampler(index, data, 4, seed=4)
    assert other.buckets == again.buckets
    assert any((other.plan(s).image_id != once[s].image_id).any() for s in range(3))
    assert any((once[s].image_id != once[s + 10].image_id).any() for s in range(3))  # epochs differ


def test_hosts_take_slices_of_the_same_batch():
    sampler = TrainSampler(make_index(40), DataConfig(), 8, seed=0)
    plan = sampler.plan(2)
    halves = [arrays(sampler.plan(2, slice(4 * host, 4 * host + 4))) for host in range(2)]
    for name, array in arrays(plan).items():
        np.testing.assert_array_equal(np.concatenate([half[name] for half in halves]), array)


@pytest.mark.parametrize(("n", "batch_size"), [(40, 4), (43, 4), (7, 7), (30, 8)])
def test_an_epoch_leaves_out_only_the_remainder(n, batch_size):
    sampler = TrainSampler(make_index(n), DataConfig(), batch_size, seed=0)
    assert len(sampler) == n // batch_size
    left_out = []
    for epoch in range(3):
        plans = [sampler.plan(epoch * len(sampler) + s) for s in range(len(sampler))]
        seen = np.concatenate([plan.index for plan in plans])
        assert len(set(seen.tolist())) == len(seen) == n // batch_size * batch_size
        left_out.append(sorted(set(range(n)) - set(seen.tolist())))
    assert n % batch_size == 0 or left_out[0] != left_out[1]


def test_images_fit_their_bucket_and_the_arrays_their_contract():
    index, data = make_index(200), DataConfig()
    sampler = TrainSampler(index, data, 8, seed=0)
    used = set()
    for step in range(2 * len(sampler)):
        plan = sampler.plan(step)
        used.add(plan.bucket)
        assert plan.bucket in sampler.buckets and (plan.size <= plan.bucket).all() and (plan.size > 0).all()
        assert (plan.source_size <= sampler.source_shape).all()
        assert plan.boxes_cxcywh.shape == (8, 4, 4) and plan.labels.shape == (8, 4)
        assert (plan.crop[:, :2] >= 0).all() and (plan.crop[:, :2] + plan.crop[:, 2:] <= plan.resized_size).all()
        past = np.arange(4) >= plan.num_boxes[:, None]
        assert (plan.boxes_cxcywh[past] == 0).all() and (plan.labels[past] == 0).all()
        kinds = {name: array.dtype.kind + str(array.dtype.itemsize) for name, array in arrays(plan).items()}
        assert kinds == {
            "index": "i8", "source_size": "i4", "flip": "b1", "resized_size": "i4", "crop": "i4", "size": "i4",
            "boxes_cxcywh": "f4", "labels": "i4", "num_boxes": "i4", "image_id": "i8", "orig_size": "i4",
        }  # fmt: skip
    assert len(used) > 2


def test_the_share_of_each_augmentation():
    index, data = make_index(2000), DataConfig()
    sampler = TrainSampler(index, data, 100, seed=0)
    plans = [sampler.plan(step) for step in range(len(sampler))]
    flip = np.concatenate([plan.flip for plan in plans])
    crop = np.concatenate([(plan.resized_size != plan.source_size).any(1) for plan in plans])
    short = np.concatenate([plan.size.min(1) for plan in plans])
    crop_size = np.concatenate([plan.crop[:, 2:] for plan in plans])[crop]
    first = np.concatenate([plan.resized_size for plan in plans])[crop]
    # 5 standard deviations of a mean of 2000 draws of one half: 5 * 0.5 / sqrt(2000) = 0.056
    assert abs(flip.mean() - 0.5) < 0.056 and abs(crop.mean() - 0.5) < 0.056
    assert set(data.scales) <= set(short.tolist())
    assert set(first.min(1).tolist()) == set(data.crop_scales)
    assert crop_size.min() >= 384 and crop_size.max() <= 600 and len(np.unique(crop_size)) > 150


def official_size(width, height, scale, max_size):
    """`get_size_with_aspect_ratio`, scalar."""
    if max_size is not None:
        low, high = float(min(width, height)), float(max(width, height))
        if high / low * scale > max_size:
            scale = round(max_size * low / high)
    if (width <= height and width == scale) or (height <= width and height == scale):
        return height, width
    if width < height:
        return int(scale * height / width), scale
    return scale, int(scale * width / height)


@pytest.mark.parametrize("max_size", [None, 1333, 640])
def test_sizes_are_the_official_ones(max_size):
    rng = np.random.default_rng(0)
    sizes = np.concatenate([rng.integers(50, 1400, (3000, 2)), np.array(COCO_SIZES)])
    scales = rng.choice([240, 480, 600, 800], len(sizes))
    expected = [official_size(w, h, int(s), max_size) for (h, w), s in zip(sizes.tolist(), scales, strict=True)]
    np.testing.assert_array_equal(resize_size(sizes, scales, max_size), expected)


def official_boxes(index: DatasetIndex, plan: BatchPlan, row: int) -> tuple[np.ndarray, list[int]]:
    """The official transforms of boxes, in float64 and box by box."""
    i = plan.index[row]
    height, width = index.sizes[i].tolist()
    cropped = (plan.resized_size[row] != plan.source_size[row]).any()
    result, kept = [], []
    for number, (x0, y0, x1, y1) in enumerate(index.boxes_xyxy[i].tolist()):
        if plan.flip[row]:
            x0, x1 = width - x1, width - x0
        # now relative to the image or to its crop
        if cropped:
            first_h, first_w = plan.resized_size[row].tolist()
            top, left, crop_h, crop_w = plan.crop[row].tolist()
            x0, x1 = (min(max(x * first_w / width - left, 0), crop_w) / crop_w for x in (x0, x1))
            y0, y1 = (min(max(y * first_h / height - top, 0), crop_h) / crop_h for y in (y0, y1))
        else:
            x0, x1, y0, y1 = x0 / width, x1 / width, y0 / height, y1 / height
        if x1 > x0 and y1 > y0:
            result.append([(x0 + x1) / 2, (y0 + y1) / 2, x1 - x0, y1 - y0])
            kept.append(number)
    return np.array(result).reshape(-1, 4), kept


def test_boxes_are_those_of_the_official_transforms():
    index = make_index(120, extent=0.1)
    sampler = TrainSampler(index, DataConfig(), 8, seed=1)
    dropped = emptied = 0
    for step in range(len(sampler)):
        plan = sampler.plan(step)
        for row in range(8):
            boxes, kept = official_boxes(index, plan, row)
            count = int(plan.num_boxes[row])
            assert count == len(boxes)
            # float32 pixels of up to 1333: a few roundings of 2^-24 relative to the image's size
            np.testing.assert_allclose(plan.boxes_cxcywh[row, :count], boxes, atol=1e-6)
            np.testing.assert_array_equal(plan.labels[row, :count], kept)
            before = len(index.boxes_xyxy[plan.index[row]])
            dropped += before - count
            emptied += before > 0 and count == 0
    assert dropped > 10 and emptied > 0  # both branches of the crop were seen


def test_large_photos_are_shrunk_on_the_host_and_keep_their_boxes():
    index = make_index(8, sizes=[(2000, 3000)])
    data = DataConfig(crop=False)
    plan = TrainSampler(index, data, 4, seed=0).plan(0)
    assert plan.source_size[0].tolist() == [889, 1333] and plan.orig_size[0].tolist() == [2000, 3000]
    boxes, _ = official_boxes(index, plan, 0)
    np.testing.assert_allclose(plan.boxes_cxcywh[0, : len(boxes)], boxes, atol=1e-6)


def test_one_size_has_one_bucket_and_nothing_to_resize():
    index = make_index(8, sizes=[(480, 640)])
    data = DataConfig(scales=(240,), eval_scale=240, max_size=320, crop=False, max_source_side=320)
    for sampler in (TrainSampler(index, data, 2, 0), EvalSampler(index, data, 2)):
        assert sampler.buckets == ((240, 320),) and sampler.source_shape == (240, 320)
        assert sampler.only_flip and not sampler.two_resizes
    changes = ({"max_source_side": 640}, {"crop": True}, {"scales": (240, 200)}, {"buckets": ((256, 320),)})
    for change in changes:
        assert not TrainSampler(index, dataclasses.replace(data, **change), 2, 0).only_flip


def test_small_photos_and_scales_with_crops():
    index = make_index(20, sizes=[(60, 80), (80, 60)])
    data = DataConfig(scales=(48, 64), max_size=100, crop_scales=(40, 50), crop_size=(32, 48))
    sampler = TrainSampler(index, data, 4, 0)
    for step in range(10):
        plan = sampler.plan(step)
        assert (plan.size <= plan.bucket).all() and plan.size.max() <= 101
    tiny = TrainSampler(index, dataclasses.replace(data, crop_size=(384, 600)), 4, 0)  # crops are whole images then
    plan = tiny.plan(0)
    np.testing.assert_array_equal(plan.crop[:, 2:], plan.resized_size)


def test_flip_off():
    sampler = TrainSampler(make_index(40), DataConfig(flip=False), 40, 0)
    assert not sampler.plan(0).flip.any()


@pytest.mark.parametrize("batch_size", [1, 3, 8, 64])
def test_evaluation_covers_each_image_once(batch_size):
    index = make_index(37)
    sampler = EvalSampler(index, DataConfig(), batch_size)
    plans = [sampler.plan(step) for step in range(len(sampler))]
    ids = np.concatenate([plan.image_id for plan in plans])
    assert sorted(ids[ids >= 0].tolist()) == index.image_ids.tolist()
    assert all(len(plan.index) == batch_size and (plan.size <= plan.bucket).all() for plan in plans)
    assert {plan.bucket for plan in plans} == set(sampler.buckets)
    padding = np.concatenate([plan.index for plan in plans]) < 0
    np.testing.assert_array_equal(padding, ids < 0)
    for name, value in {"size": 1, "source_size": 1, "num_boxes": 0, "boxes_cxcywh": 0, "flip": 0}.items():
        assert (np.concatenate([arrays(plan)[name] for plan in plans])[padding] == value).all()
    for plan in plans:
        for row in np.flatnonzero(plan.index >= 0).tolist():
            boxes, _ = official_boxes(index, plan, row)
            np.testing.assert_allclose(plan.boxes_cxcywh[row, : len(boxes)], boxes, atol=1e-6)


def test_derived_buckets_waste_little():
    sampler = TrainSampler(make_index(700), DataConfig(), 4, 0)
    used = padded = 0
    for step in range(len(sampler)):
        plan = sampler.plan(step)
        used += plan.size.prod(1).sum()
        padded += len(plan.size) * np.prod(plan.bucket)
    # One 1333x1333 bucket for all would fill 0.33 of it, batches drawn at random and padded to their largest 0.55.
    assert used / padded > 0.65
    assert len(sampler.buckets) <= 8 and all(side % 32 == 0 for bucket in sampler.buckets for side in bucket)
    assert derive_buckets(np.array([[100, 200]]), np.array([100, 200])) == ((100, 200),)


@pytest.mark.parametrize(
    ("changes", "batch_size", "message"),
    [
        ({}, 0, "batch_size: got 0"),
        ({}, 41, r"got 41, but the training set has 40 images: pass --train.batch-size 40"),
        ({"scales": ()}, 4, r"data.scales: got \(\)"),
        ({"crop_scales": (0,)}, 4, "data.crop_scales"),
        ({"crop_size": (600, 384)}, 4, "data.crop_size"),
        ({"buckets": ((800, 1344), (1344, 800))}, 4, r"data.buckets: .* none of which holds 1250x1333"),
    ],
)
def test_impossible_configs(changes, batch_size, message):
    with pytest.raises(ValueError, match=message):
        TrainSampler(make_index(40), DataConfig(**changes), batch_size, 0)


def test_given_buckets():
    data = DataConfig(buckets=((1344, 1344), (800, 1088)))
    sampler = TrainSampler(make_index(40), data, 4, 0)
    assert sampler.buckets == ((800, 1088), (1344, 1344))
    with pytest.raises(ValueError, match=r"none of which holds 1066x800, an image at data.eval_scale 800"):
        EvalSampler(make_index(40), DataConfig(buckets=((800, 1344),)), 4)
