import contextlib
import copy
import dataclasses
import io
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from detr_jax import sharding
from detr_jax.config import DataConfig
from detr_jax.data.sampler import EvalSampler
from detr_jax.data.splits import load_split
from detr_jax.evaluation import evaluate, write_pictures
from detr_jax.postprocess import coco_results, postprocess, write_results
from detr_jax.scoring import score

NAMES = ["AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl"]


@pytest.fixture(scope="module")
def index(data_dir):
    return load_split(DataConfig(root=str(data_dir / "bccd")), "val")


def truth_batches(index, batch_size, max_boxes=40):
    """The evaluation's batches without pixels, and a `predict` that knows the truth, filled up to `max_boxes`."""
    sampler = EvalSampler(index, DataConfig(), batch_size)
    plans = [sampler.plan(step) for step in range(len(sampler))]
    position = {image_id: i for i, image_id in enumerate(index.image_ids.tolist())}

    def predict(bucket, batch):
        b = len(batch["image_id"])
        scores, labels = np.zeros([b, max_boxes], np.float32), np.zeros([b, max_boxes], np.int32)
        boxes_xyxy = np.zeros([b, max_boxes, 4], np.float32)
        for row, image_id in enumerate(batch["image_id"].tolist()):
            if image_id >= 0:
                i = position[image_id]
                t = len(index.labels[i])
                scores[row, :t], labels[row, :t], boxes_xyxy[row, :t] = 0.9, index.labels[i], index.boxes_xyxy[i]
        return scores, labels, boxes_xyxy

    return [(plan.bucket, {"image_id": plan.image_id}) for plan in plans], predict


def test_the_twelve_published_numbers(data_dir):
    folder = data_dir / "coco_eval_reference"
    text = (folder / "val2014_fake_eval_res.txt").read_text().split("type=bbox")[1].split("-----")[0]
    published = re.findall(r"= (-?\d\.\d{3})", text)
    results = json.loads((folder / "instances_val2014_fakebbox100_results.json").read_text())
    scores = score(folder / "instances_val2014_100.json", results)
    assert len(published) == 12
    assert [f"{scores.as_dict()[name]:.3f}" for name in NAMES] == published
    # The table is the one that pycocotools prints, but for a space.
    lines = [line.split() for line in text.splitlines() if "@[" in line]
    assert [line.split() for line in scores.table().splitlines()[:12]] == lines


def test_ap_of_each_class_averages_to_ap(data_dir):
    folder = data_dir / "coco_eval_reference"
    results = json.loads((folder / "instances_val2014_fakebbox100_results.json").read_text())
    scores = score(folder / "instances_val2014_100.json", results)
    known = [ap for ap in scores.per_class.values() if ap >= 0]
    assert len(scores.per_class) == 80 and len(known) < 80
    assert np.mean(known) == pytest.approx(scores.AP, abs=1e-12)
    assert scores.per_class["donut"] == -1  # has no box among these images
    assert "person" in scores.table() and "toothbrush" in scores.table()


def pycocotools_numbers(truth: dict, results: list[dict]) -> np.ndarray:
    """The twelve numbers of pycocotools itself."""
    sets = []
    for boxes in (truth["annotations"], results):
        coco = COCO()
        rows = [{"iscrowd": 0, "area": b["bbox"][2] * b["bbox"][3], **b, "id": n} for n, b in enumerate(boxes, 1)]
        coco.dataset = truth | {"annotations": rows}
        coco.createIndex()
        sets.append(coco)
    evaluation = COCOeval(*sets, "bbox")
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    return evaluation.stats


@pytest.mark.parametrize("case", ["crowds and areas", "ties", "only crowd", "no area", "more than 100"])
def test_the_numbers_are_those_of_pycocotools(case):
    rng = np.random.default_rng(len(case))
    truth = {"images": [{"id": i} for i in range(12)], "categories": [{"id": i, "name": f"c{i}"} for i in (3, 1, 80)]}
    annotations, results = [], []
    for image in range(12):
        for _ in range(rng.integers(0, 7)):
            # Sides and areas at the very bounds of small, medium and large too.
            side, area = rng.choice([10, 32, 96, 200]), rng.choice([32**2, 96**2, 500, 0])
            flat = case == "no area" and rng.random() < 0.5
            box = [*rng.uniform(0, 300, 2).tolist(), float(side), 0.0 if flat else float(side)]
            crowd = int(case == "only crowd" or rng.random() < 0.3)
            label = {"image_id": image, "category_id": int(rng.choice([1, 3, 80]))}
            annotations.append(label | {"bbox": box, "area": float(area), "iscrowd": crowd})
            for scale in rng.uniform(0.8, 1.25, (2, 4)):
                results.append(label | {"bbox": (scale * box).tolist(), "score": float(rng.random())})
        for _ in range(120 if case == "more than 100" else 6):
            box = [*rng.uniform(0, 300, 2).tolist(), *rng.uniform(1, 200, 2).tolist()]
            results.append({"image_id": image, "category_id": 3, "bbox": box, "score": float(rng.random())})
    if case == "ties":
        results = [result | {"score": round(result["score"], 1)} for result in results]
    truth["annotations"] = annotations
    # Boxes without area are neither trained nor scored here; pycocotools would count them as missed.
    expected = pycocotools_numbers(truth | {"annotations": [a for a in annotations if a["bbox"][3] > 0]}, results)
    # The same float64 sums in the same order.
    np.testing.assert_allclose([getattr(score(truth, results), name) for name in NAMES], expected, rtol=0, atol=1e-12)


def test_bare_ground_truth(index):
    """No `info`, `area` or `iscrowd`; the caller's dictionaries stay as they were."""
    full = index.ground_truth()
    keys = ("image_id", "category_id", "bbox", "id")
    bare = {
        "images": full["images"],
        "categories": full["categories"],
        # Numbered from 0, as many tools do; pycocotools by itself takes a match with annotation 0 for none.
        "annotations": [{k: a[k] for k in keys} | {"id": i} for i, a in enumerate(full["annotations"])],
    }
    before = copy.deepcopy(bare)
    results = [{"score": 1.0, **{k: a[k] for k in keys[:3]}} for a in full["annotations"][:60]]
    assert score(bare, results) == score(full, results)
    assert bare == before and "id" not in results[0]


def test_no_results_at_all(index):
    scores = score(index.ground_truth(), [])
    assert scores.AP == scores.AR100 == 0
    assert set(scores.per_class.values()) == {0.0}


def test_no_ground_truth_at_all(index):
    nothing = index.ground_truth() | {"annotations": []}
    assert set(score(nothing, []).as_dict().values()) == {-1.0}


def test_results_of_unknown_images(index):
    with pytest.raises(ValueError, match="1 image ids are not in the ground truth, such as 99999"):
        score(index.ground_truth(), [{"image_id": 99999, "category_id": 1, "bbox": [0, 0, 1, 1], "score": 1.0}])


def test_classes_that_share_a_name():
    categories = [{"id": 3, "name": "cell"}, {"id": 5, "name": "cell"}, {"id": 9, "name": "other"}]
    scores = score({"images": [{"id": 1}], "categories": categories, "annotations": []}, [])
    assert list(scores.per_class) == ["cell (3)", "cell (5)", "other"]


def test_focal_detections_are_the_best_of_all_pairs():
    rng = np.random.default_rng(0)
    b, q, k, n = 2, 6, 4, 10
    logits = rng.normal(size=(b, q, k)).astype(np.float32)
    boxes = rng.uniform(0.2, 0.6, (b, q, 4)).astype(np.float32)
    size = np.array([[480, 640], [100, 50]], np.int32)
    scores, labels, boxes_xyxy = jax.jit(postprocess, static_argnames=("classification", "top_k"))(
        {"pred_logits": logits, "pred_boxes": boxes}, size, classification="focal", top_k=n
    )
    for i in range(b):
        order = np.argsort(-logits[i].ravel())[:n]
        np.testing.assert_array_equal(labels[i], order % k)
        # float32 rounding of one sigmoid, and of a few operations on numbers of up to 640.
        np.testing.assert_allclose(scores[i], 1 / (1 + np.exp(-logits[i].ravel()[order])), rtol=1e-6)
        cx, cy, w, h = boxes[i][order // k].T
        height, width = size[i]
        expected = [(cx - w / 2) * width, (cy - h / 2) * height, (cx + w / 2) * width, (cy + h / 2) * height]
        np.testing.assert_allclose(boxes_xyxy[i], np.stack(expected, -1), atol=1e-3)


def test_focal_gives_no_more_than_there_is():
    outputs = {"pred_logits": jnp.zeros((1, 3, 2)), "pred_boxes": jnp.full((1, 3, 4), 0.5)}
    scores, _, _ = postprocess(outputs, jnp.ones((1, 2), int), classification="focal")
    assert scores.shape == (1, 6)


def test_softmax_detections_leave_out_no_object():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(2, 5, 4)).astype(np.float32)
    logits[:, 0, -1] = 10.0  # surely no object: still a detection, with a small score
    outputs = {"pred_logits": logits, "pred_boxes": np.full((2, 5, 4), 0.5, np.float32)}
    scores, labels, boxes_xyxy = postprocess(outputs, np.array([[10, 20]] * 2), classification="softmax")
    probabilities = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    np.testing.assert_array_equal(labels, logits[..., :-1].argmax(-1))
    np.testing.assert_allclose(scores, probabilities[..., :-1].max(-1), rtol=1e-5)  # float32 rounding of a softmax
    assert labels.max() < 3 and (scores[:, 0] < 0.01).all()
    np.testing.assert_array_equal(boxes_xyxy, np.broadcast_to([5.0, 2.5, 15.0, 7.5], (2, 5, 4)))


def test_results_are_plain_json_that_pycocotools_loads(index, tmp_path):
    ids = index.image_ids[:2]
    boxes_xyxy = np.array([[[10, 20, 30, 60]], [[0, 0, 5, 5]]], np.float32)
    results = coco_results(
        ids.tolist(), np.array([[0.5], [0.25]], np.float32), np.array([[2], [0]]), boxes_xyxy, [7, 8, 90]
    )
    assert results == [
        {"image_id": int(ids[0]), "category_id": 90, "bbox": [10, 20, 20, 40], "score": 0.5},
        {"image_id": int(ids[1]), "category_id": 7, "bbox": [0, 0, 5, 5], "score": 0.25},
    ]
    write_results(tmp_path / "results.json", results)
    truth = COCO()
    truth.dataset = index.ground_truth() | {"info": {}}
    with contextlib.redirect_stdout(io.StringIO()):
        truth.createIndex()
        loaded = truth.loadRes(str(tmp_path / "results.json"))
    assert [annotation["bbox"] for annotation in loaded.dataset["annotations"]] == [[10, 20, 20, 40], [0, 0, 5, 5]]


@pytest.mark.parametrize("batch_size", [1, 4, 64])
def test_evaluates_each_image_once(index, batch_size):
    batches, predict = truth_batches(index, batch_size)
    scores, results = evaluate(predict, batches, index)
    # The truth, and after it boxes of score 0 in a corner. It finds everything, but for cells annotated twice.
    assert scores.AR100 > 0.98 and scores.AP > 0.98
    assert [r["image_id"] for r in results[::40]] == index.image_ids.tolist()
    assert len(results) == 40 * len(index)


def test_detections_split_over_devices(index):
    batches, predict = truth_batches(index, 8)
    rows = jax.sharding.NamedSharding(sharding.make_mesh(8), jax.P("data"))
    expected = evaluate(predict, batches, index)
    assert evaluate(lambda *batch: jax.device_put(predict(*batch), rows), batches, index) == expected


@pytest.mark.parametrize("broken, times", [(lambda b: b[1:], 0), (lambda b: b[:1] + b, 2)])
def test_an_image_left_out_or_seen_twice_is_an_error(index, broken, times):
    batches, predict = truth_batches(index, 4)
    with pytest.raises(ValueError, match=rf"4 of {len(index)} images .*\.jpg \(id \d+\) was covered {times} times"):
        evaluate(predict, broken(batches), index)


def test_no_batch_is_an_error(index):
    with pytest.raises(ValueError, match="nothing to evaluate"):
        evaluate(lambda bucket, batch: None, [], index)


def test_pictures_leave_out_images_that_were_skipped(index, tmp_path):
    damaged = dataclasses.replace(index, skipped={0: "damaged"})
    assert write_pictures(str(tmp_path), damaged, [], 2) == 2
    assert {path.stem for path in tmp_path.iterdir()} == {str(image_id) for image_id in index.image_ids[1:3]}
