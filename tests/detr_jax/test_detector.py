"""Images in, boxes out: any kind of image, one compilation per bucket, the same boxes as the model gives."""

import dataclasses
import json
import sys
import types

import numpy as np
import pytest
import tiny
import transformers_weights
from flax import nnx
from PIL import Image
from pycocotools.coco import COCO

import detr_jax
from detr_jax import cli, detector, sharding, train_step, training
from detr_jax.categories import Categories
from detr_jax.checkpoints import convert
from detr_jax.config import BackboneConfig, DataConfig, DeformableDETRConfig
from detr_jax.evaluation import evaluate_checkpoint

pytestmark = pytest.mark.usefixtures("short_resnet")

CONFIG = DeformableDETRConfig(
    backbone=BackboneConfig(depth=18),
    num_classes=3,
    hidden_dim=32,
    num_heads=4,
    encoder_layers=1,
    decoder_layers=2,
    ffn_dim=48,
    num_queries=9,
)
CELLS = Categories((4, 5, 9), ("RBC", "WBC", "platelet"))


def loaded(**changes) -> detector.Loaded:
    config = dataclasses.replace(CONFIG, **changes)
    model = transformers_weights.load(config, transformers_weights.random_weights(config))
    return detector.Loaded(config, model, CELLS, "focal", 64, 96, "random weights")


@pytest.fixture(scope="module")
def detect():
    return detector.Detector(loaded())


def noise(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def test_paths_arrays_and_images_give_the_same(detect, tmp_path):
    array = noise(60, 80)
    Image.fromarray(array).save(tmp_path / "image.png")
    expected = detect(array, threshold=0)
    assert len(expected) == 9 * 3
    assert (np.diff(expected.scores) <= 0).all()
    for image in (Image.fromarray(array), tmp_path / "image.png", str(tmp_path / "image.png")):
        found = detect(image, threshold=0)
        np.testing.assert_array_equal(found.boxes_xyxy, expected.boxes_xyxy)
        np.testing.assert_array_equal(found.scores, expected.scores)
    gray = detect(array[..., 0], threshold=0)
    rgb = detect(np.repeat(array[..., :1], 3, -1), threshold=0)
    np.testing.assert_array_equal(gray.scores, rgb.scores)


def test_boxes_are_the_models_in_pixels_of_the_image(detect):
    """By hand, for an image that needs no resizing: 64 x 88 on a bucket of 64 x 96."""
    array = noise(64, 88)
    found = detect(array, threshold=0)
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    images = np.zeros((1, 64, 96, 3), np.float32)
    images[0, :, :88] = (array / 255 - mean) / std
    outputs = loaded().model(images, np.array([[64, 88]]))
    scores = 1 / (1 + np.exp(-np.asarray(outputs["pred_logits"][0], np.float64)))
    query, label = np.unravel_index(scores.argmax(), scores.shape)
    x, y, w, h = np.asarray(outputs["pred_boxes"][0, query])
    box = np.array([88 * (x - w / 2), 64 * (y - h / 2), 88 * (x + w / 2), 64 * (y + h / 2)]).clip(0, [88, 64, 88, 64])
    assert found.labels[0] == label
    np.testing.assert_allclose(found.scores[0], scores.max(), atol=1e-5)
    np.testing.assert_allclose(found.boxes_xyxy[0], box, atol=1e-2)  # float32 noise of 1e-5 times 88 pixels


def test_a_bucket_is_compiled_once():
    detect = detector.Detector(loaded(), batch_size=2)
    assert detect.compilations == 0
    detect(noise(60, 80))
    assert detect.compilations == 1
    detect([noise(61, 80), noise(300, 400), noise(48, 64)])
    assert detect.compilations == 1
    detect(noise(80, 60))
    assert detect.compilations == 2


def test_a_list_gives_each_image_its_own_boxes(detect):
    images = [noise(60, 80, 1), noise(80, 60, 2), noise(60, 80, 3), noise(70, 70, 4), noise(60, 80, 5)]
    batched = detector.Detector(loaded(), batch_size=2)(images, threshold=0)
    for image, found in zip(images, batched, strict=True):
        alone = detect(image, threshold=0)
        np.testing.assert_allclose(found.boxes_xyxy, alone.boxes_xyxy, atol=1e-2)
        assert found.image.size == image.shape[1::-1]


def test_masked_padding_makes_boxes_independent_of_the_bucket():
    config = {"backbone": dataclasses.replace(CONFIG.backbone, mask_padding=True)}
    small = detector.Detector(loaded(**config))
    large = detector.Detector(loaded(**config), max_size=128)
    image = noise(64, 90)
    assert small.buckets != large.buckets
    np.testing.assert_allclose(small(image, 0).boxes_xyxy, large(image, 0).boxes_xyxy, atol=1e-2)


def test_threshold_names_and_drawing(detect):
    image = noise(60, 80)
    everything = detect(image, threshold=0)
    threshold = float(everything.scores[4])
    found = detect(image, threshold=threshold)
    assert len(found) == 5 and found.scores.min() >= threshold
    assert set(found.names) <= set(CELLS.names)
    assert found.category_ids == [CELLS.ids[label] for label in found.labels]
    assert found.draw().size == (80, 60)
    assert found.draw(np.zeros_like(image)).getpixel((79, 59)) != found.draw().getpixel((79, 59))
    assert (found.boxes_xyxy >= 0).all() and (found.boxes_xyxy <= [80, 60, 80, 60]).all()
    assert len(detect(image, threshold=1.1)) == 0
    assert str(detect(image, threshold=1.1)) == "nothing found"
    assert detect([]) == []
    results = found.as_results(7)
    assert results[0]["image_id"] == 7 and results[0]["category_id"] in CELLS.ids
    x, y, w, h = results[0]["bbox"]
    np.testing.assert_allclose([x, y, x + w, y + h], found.boxes_xyxy[0], rtol=1e-5)


def test_to_supervision(detect, monkeypatch):
    """A stand-in for the library, which has the names that version 0.26 has; without it, an error says what to do."""
    found = detect(noise(60, 80), threshold=0)
    monkeypatch.setitem(sys.modules, "supervision", types.SimpleNamespace(Detections=dict))
    given = found.to_supervision()
    np.testing.assert_array_equal(given["xyxy"], found.boxes_xyxy)
    np.testing.assert_array_equal(given["confidence"], found.scores)
    assert given["class_id"].tolist() == found.category_ids
    assert given["data"]["class_name"].tolist() == found.names
    monkeypatch.setitem(sys.modules, "supervision", None)
    with pytest.raises(ValueError, match="pip install supervision"):
        found.to_supervision()


def test_photos_are_turned_upright(detect, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(noise(60, 80)).save(tmp_path / "turned.jpg", exif=exif)
    assert detect(tmp_path / "turned.jpg").image.size == (60, 80)


def test_what_is_no_photo_is_named(detect, tmp_path):
    (tmp_path / "text.jpg").write_text("no image")
    with pytest.raises(ValueError, match=r"text\.jpg: not an image"):
        detect(tmp_path / "text.jpg")
    with pytest.raises(FileNotFoundError, match=r"none\.jpg: no such image"):
        detect(tmp_path / "none.jpg")
    with pytest.raises(ValueError, match=r"got float64 \[4, 4, 3\]"):
        detect(np.zeros((4, 4, 3)))
    with pytest.raises(ValueError, match=r"got uint8 \[4, 4, 4\]"):
        detect(np.zeros((4, 4, 4), np.uint8))
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match=r"no checkpoint \(latest\) in .*: it is empty"):
        detr_jax.load(tmp_path / "run")
    with pytest.raises(FileNotFoundError, match="no such file or folder; expected a checkpoint"):
        detr_jax.load(tmp_path / "none")


def test_buckets_hold_every_image():
    from detr_jax.data.buckets import smallest_bucket

    buckets = detector.inference_buckets(800, 1333)
    assert buckets == ((800, 800), (800, 1088), (1088, 800), (800, 1344), (1344, 800))
    rng = np.random.default_rng(0)
    short = rng.integers(1, 1000, 1000)
    orig = np.stack([short, short * rng.uniform(1, 4, 1000)], -1).astype(int)
    sizes = detector.resize_size(np.concatenate([orig, orig[:, ::-1]]), 800, 1333)
    assert (smallest_bucket(buckets, sizes) >= 0).all()


# --- with a checkpoint of this project ---


@pytest.fixture(scope="module")
def cells(tmp_path_factory):
    """The folder of eight training and eight validation images."""
    return tiny.sixteen_images(tmp_path_factory.mktemp("cells") / "data")


@pytest.fixture(scope="module")
def run(cells, two_devices, tmp_path_factory):
    """A run of two steps."""
    folder = tmp_path_factory.mktemp("run")
    training.train(tiny.fast_config(cells, folder / "run", max_steps=2))
    return folder / "run"


def test_own_checkpoint_gives_the_boxes_of_its_evaluation(run, cells, tmp_path):
    data = tiny.fast_config(cells).data
    evaluate_checkpoint(str(run), data, results=str(tmp_path / "results.json"))
    results = json.loads((tmp_path / "results.json").read_text())
    detect = detr_jax.Detector.from_pretrained(run)
    assert "step 2 of this project" in detect.report
    annotations = json.loads((tiny.DATA / "bccd/annotations/instances_val.json").read_text())
    image = annotations["images"][0]
    found = detect(tiny.DATA / "bccd/images" / image["file_name"], threshold=0)
    best = max((r for r in results if r["image_id"] == image["id"]), key=lambda r: r["score"])
    # Evaluation shrinks the image on the host first, and resizes on the device: other rounding of the pixels.
    assert found.scores[0] == pytest.approx(best["score"], abs=0.02)


def test_sparse_coco_ids_are_scored_as_they_are(tmp_path):
    """A model with 91 outputs, as the official ones: its labels are COCO's ids."""
    sparse = dataclasses.replace(loaded(num_classes=91), categories=Categories.guess(91))
    sparse.save(tmp_path / "sparse")
    annotations = json.loads((tiny.DATA / "coco_open/annotations/instances_val2017.json").read_text())
    annotations["images"] = [image for image in annotations["images"] if image["width"] > image["height"]][:5]
    kept = {image["id"] for image in annotations["images"]}
    annotations["annotations"] = [a for a in annotations["annotations"] if a["image_id"] in kept]
    (tmp_path / "five.json").write_text(json.dumps(annotations))
    data = DataConfig(
        root=str(tiny.DATA / "coco_open"),
        val_annotations=str(tmp_path / "five.json"),
        eval_scale=64,
        max_size=96,
        max_source_side=128,
    )
    evaluate_checkpoint(str(tmp_path / "sparse"), data, results=str(tmp_path / "results.json"))
    results = json.loads((tmp_path / "results.json").read_text())
    detect = detr_jax.Detector.from_pretrained(tmp_path / "sparse")
    path = tiny.DATA / "coco_open/val2017" / annotations["images"][0]["file_name"]
    found = detect(path, threshold=0)
    assert found.category_ids == found.labels.tolist()
    assert {result["category_id"] for result in results} <= set(range(91))
    best = max((r for r in results if r["image_id"] == int(path.stem)), key=lambda r: r["score"])
    assert found.scores[0] == pytest.approx(best["score"], abs=0.02)


def test_a_file_is_scored_as_the_run_that_it_was_converted_from(run, cells, tmp_path):
    """`eval` takes any checkpoint that `load` takes, and prepares images as its file says."""
    file = tmp_path / "model.safetensors"
    cli.main(["convert", str(run), str(file)])
    found = {}
    for checkpoint in (run, file):
        results = tmp_path / f"{checkpoint.name}.json"
        # The file holds the sizes of images, but not how they are read.
        flags = ["--data.max-source-side", "160", "--data.engine", "pillow"]
        flags += ["--data.root", str(cells), "--results", str(results)]
        options, _ = cli.parse_eval(["--checkpoint", str(checkpoint), *flags])
        assert (options.data.eval_scale, options.data.max_size) == (tiny.config().data.eval_scale, 96)
        cli.main(["eval", "--checkpoint", str(checkpoint), *flags])
        found[checkpoint] = json.loads(results.read_text())
    assert found[run] == found[file]


def test_convert_and_predict(run, tmp_path, capsys):
    cli.main(["convert", str(run), str(tmp_path / "model.safetensors")])
    assert "Deformable DETR" in capsys.readouterr().out
    detect, again = (detr_jax.Detector.from_pretrained(p) for p in (run, tmp_path / "model.safetensors"))
    assert again.categories == detect.categories
    a, b = (dict(nnx.to_flat_state(d._state)) for d in (detect, again))
    for path, leaf in a.items():
        np.testing.assert_array_equal(leaf[...], b[path][...], err_msg=str(path))

    cli.main(["convert", str(tmp_path / "model.safetensors"), str(tmp_path / "ours")])
    back = detr_jax.load(tmp_path / "ours")
    assert back.config == again.config and back.categories == again.categories
    for path, leaf in nnx.to_flat_state(nnx.state(back.model)):
        np.testing.assert_array_equal(leaf[...], a[path][...], err_msg=str(path))

    images = tmp_path / "images"
    images.mkdir()
    Image.fromarray(noise(60, 80)).save(images / "a.png")
    Image.fromarray(noise(80, 60)).save(images / "b.jpg")
    (images / "notes.txt").write_text("not an image")
    capsys.readouterr()
    out = tmp_path / "out"
    cli.main(["predict", str(images), "--checkpoint", str(run), "--out", str(out), "--threshold", "0"])
    assert {p.name for p in out.iterdir()} == {"a.jpg", "b.jpg", "results.json"}
    results = json.loads((out / "results.json").read_text())
    assert {r["image_id"] for r in results} == {"a.png", "b.jpg"}
    assert results[0].keys() == {"image_id", "category_id", "category_name", "bbox", "score"}
    assert "2 images" in capsys.readouterr().out
    with pytest.raises(FileNotFoundError, match="no such image or folder"):
        cli.main(["predict", str(tmp_path / "none.jpg"), "--checkpoint", str(run), "--out", str(out)])
    with pytest.raises(ValueError, match="no images given"):
        cli.main(["predict", "--checkpoint", str(run), "--out", str(out)])
    with pytest.raises(ValueError, match="no image in it"):
        (tmp_path / "empty").mkdir()
        cli.main(["predict", str(tmp_path / "empty"), "--checkpoint", str(run), "--out", str(out)])


def test_predict_on_images_of_a_data_set(run, tmp_path):
    """With `--data-root` the results are COCO's, and pycocotools loads them; an image of another set is named."""
    root = tiny.DATA / "bccd"
    truth = COCO(root / "annotations/instances_val.json")
    ids = sorted(truth.imgs)[:2]
    images = [str(root / "images" / truth.imgs[i]["file_name"]) for i in ids]
    flags = ["--checkpoint", str(run), "--threshold", "0", "--data-root", str(root), "--out", str(tmp_path / "out")]
    cli.main(["predict", *images, *flags])
    results = truth.loadRes(str(tmp_path / "out/results.json"))
    assert set(results.getImgIds(catIds=truth.getCatIds())) <= set(truth.getImgIds())
    assert {a["image_id"] for a in results.anns.values()} == set(ids)
    assert {a["category_id"] for a in results.anns.values()} <= set(truth.getCatIds())
    Image.fromarray(noise(60, 80)).save(tmp_path / "other.png")
    with pytest.raises(ValueError, match=r"--data-root .*: other\.png is none of its images"):
        cli.main(["predict", str(tmp_path / "other.png"), *flags])


def test_fine_tuning_keeps_all_but_the_class_heads(cells, two_devices, tmp_path, capsys):
    config = tiny.fast_config(cells, tmp_path / "run", max_steps=1, init_from=str(tmp_path / "seven.safetensors"))
    config = dataclasses.replace(
        config, optim=dataclasses.replace(config.optim, lr=0.0, weight_decay=0.0, ema_decay=0.0)
    )
    source = dataclasses.replace(config.model, num_classes=7)
    model = transformers_weights.load(source, transformers_weights.random_weights(source))
    convert.save(tmp_path / "seven.safetensors", model, source, Categories.guess(7))
    training.train(config)
    printed = capsys.readouterr().out
    assert "loaded" in printed and "initialized anew: class_embed.0.bias, class_embed.0.kernel" in printed
    tuned = dict(nnx.to_flat_state(nnx.state(detr_jax.load(tmp_path / "run").model)))
    for path, leaf in nnx.to_flat_state(nnx.state(model)):
        if path[0] == "class_embed":
            assert tuned[path].shape[-1] == 3
        else:
            np.testing.assert_array_equal(tuned[path][...], leaf[...], err_msg=str(path))

    other = dataclasses.replace(config, model=dataclasses.replace(config.model, ffn_dim=48, encoder_layers=2))
    with pytest.raises(ValueError, match=r"(?s)seven\.safetensors.*model\.encoder_layers: 1 in the file, 2 here"):
        train_step.init_state(other, train_step.make_optimizer(other.optim, 1), sharding.make_mesh(), CELLS)
