"""An image has the same pixels at the door of the model: training, evaluation, Detector, predict, figures, export."""

import json
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from PIL import Image

from detr_jax import cli
from detr_jax.categories import Categories
from detr_jax.checkpoints import Loaded
from detr_jax.config import BackboneConfig, DataConfig, DeformableDETRConfig
from detr_jax.data.coco import load_coco
from detr_jax.data.image import decode, open_image, read_header
from detr_jax.data.pipeline import batches
from detr_jax.data.resample import IMAGENET_MEAN, IMAGENET_STD, resample_batch
from detr_jax.data.sampler import EvalSampler, TrainSampler
from detr_jax.detector import Detector
from detr_jax.errors import DataError, NotFoundError, UserError
from detr_jax.export_standalone import ExportedDetector
from detr_jax.models import build_abstract
from detr_jax.visualize.inspection import Inspector

DATA = DataConfig(
    scales=(64,), eval_scale=64, max_size=96, crop=False, flip=False, max_source_side=160, engine="pillow", workers=1
)
MODEL = DeformableDETRConfig(
    backbone=BackboneConfig(depth=18), hidden_dim=32, num_heads=2, encoder_layers=1, decoder_layers=1, ffn_dim=32
)
RNG = np.random.default_rng(0)
SMOOTH = np.asarray(Image.fromarray(RNG.integers(0, 256, (8, 11, 3), np.uint8)).resize((110, 80)))  # 80 x 110


def with_orientation(number: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = number
    return exif


def write_formats(folder) -> None:
    """Images of many formats, depths, modes, orientations and sizes."""
    rgb = Image.fromarray(SMOOTH)
    alpha = rgb.convert("RGBA")
    alpha.putalpha(rgb.convert("L"))
    for number in range(1, 9):
        rgb.save(folder / f"turned{number}.jpg", exif=with_orientation(number))
    rgb.convert("L").save(folder / "gray.jpg")
    rgb.convert("CMYK").save(folder / "cmyk.jpg", exif=with_orientation(6))
    rgb.save(folder / "progressive.jpg", progressive=True, subsampling="4:1:1")
    rgb.save(folder / "turned.png", exif=with_orientation(8))
    rgb.save(folder / "turned.tiff", exif=with_orientation(6))
    alpha.save(folder / "alpha.png")
    alpha.save(folder / "alpha.webp", lossless=True)
    rgb.convert("L").convert("LA").save(folder / "gray_alpha.png")
    rgb.quantize(16).save(folder / "palette.png", transparency=3)
    rgb.quantize(16).save(folder / "palette.gif")
    rgb.convert("1").save(folder / "one_bit.png")
    rgb.save(folder / "plain.bmp")
    Image.fromarray(SMOOTH[..., 0].astype(np.uint16) * 257).save(folder / "sixteen_bits.png")
    Image.fromarray(SMOOTH[..., 0].astype(np.uint16) * 257).save(folder / "sixteen_bits.tiff")
    rgb.resize((403, 222)).save(folder / "large.jpg")
    rgb.resize((301, 13)).save(folder / "thin.png")
    rgb.resize((31, 22)).save(folder / "small.png")


@pytest.fixture(scope="module")
def formats(tmp_path_factory):
    """The index of a folder of formats."""
    folder = tmp_path_factory.mktemp("formats")
    write_formats(folder)
    images = []
    for number, path in enumerate(sorted(folder.iterdir())):
        with path.open("rb") as file:
            height, width = read_header(file, str(path)).size
        images.append({"id": number, "file_name": path.name, "height": height, "width": width})
    content = {"images": images, "annotations": [], "categories": [{"id": 1, "name": "thing"}]}
    path = tmp_path_factory.mktemp("annotations") / "a.json"
    path.write_text(json.dumps(content))
    return load_coco(path, folder)


@pytest.fixture(scope="module")
def detector():
    """A detector whose model never runs; `seen` has what it would have been given: pixels, sizes."""
    model = build_abstract(MODEL)
    loaded = Loaded(MODEL, model, Categories((1,), ("thing",)), "focal", 64, 96, "no weights", max_source_side=160)
    detector = Detector(loaded)
    seen = []

    def detect(state, pixels, sizes, orig_sizes):
        seen.append((pixels, sizes))
        return np.zeros((1, 1), np.float32), np.zeros((1, 1), np.int32), np.zeros((1, 1, 4), np.float32)

    detector._detect = detect
    return SimpleNamespace(run=detector, seen=seen)


def by_name(index, sampler) -> dict[str, np.ndarray]:
    """Pixels of the pipeline and the step, as gray levels, by file."""
    found = {}
    run = jax.jit(lambda batch, bucket: resample_batch(batch, bucket, sampler, DATA), static_argnums=1)
    for step in range(len(sampler)):
        plan = sampler.plan(step)
        ((bucket, batch),) = batches(index, sampler, [step], data_config=DATA)
        pixels = np.asarray(run(batch, bucket))
        for i, image, (h, w) in zip(plan.index, pixels, plan.size, strict=True):
            if i >= 0:
                found[index.names[i]] = 255 * (image[:h, :w] * IMAGENET_STD + IMAGENET_MEAN)
    return found


def test_six_ways_give_the_same_pixels(formats, detector, tmp_path, monkeypatch):
    paths = list(formats.names)
    assert any("8 images turned upright" in line or "turned upright" in line for line in formats.report)

    detector.run(paths)
    assert len(detector.seen) == len(paths)
    expected = {}
    for path, (pixels, ((h, w),)) in zip(paths, detector.seen, strict=True):
        expected[path] = pixels[0, :h, :w]
        assert not pixels[0, h:].any() and not pixels[0, :, w:].any()

    # The step does not round between and after the two passes of a resize, as Pillow does: 0.5 each at most.
    for sampler in (TrainSampler(formats, DATA, 5, seed=0), EvalSampler(formats, DATA, 16)):
        found = by_name(formats, sampler)
        for path, pixels in found.items():
            assert pixels.shape == expected[path].shape, path
            np.testing.assert_allclose(pixels, expected[path], atol=1.01, err_msg=path)
        assert len(found) >= len(paths) - 4  # an epoch of training leaves out the remainder

    def same(what):
        for path, (pixels, ((h, w),)) in zip(paths, detector.seen, strict=True):
            np.testing.assert_array_equal(pixels[0, :h, :w], expected[path], err_msg=f"{what} {path}")
        detector.seen.clear()

    same("Detector")
    monkeypatch.setattr(Detector, "from_pretrained", lambda *args, **options: detector.run)
    for path in paths:  # some share a name but for the suffix, which predict refuses
        cli.main(["predict", path, "--checkpoint", "unused", "--out", str(tmp_path / "out")])
    same("predict")
    exported = ExportedDetector.__new__(ExportedDetector)
    exported.about = {"bucket": (96, 96), "batch": 1, "scale": 64, "max_size": 96, "max_source_side": 160}
    exported.about |= {"category_names": ["thing"], "category_ids": [1]}
    exported.weights, exported.detect = None, detector.run._detect
    landscape = [path for path in paths if max(expected[path].shape) <= 96]
    for path in landscape:
        exported(path)
    for path, (pixels, ((h, w),)) in zip(landscape, detector.seen, strict=True):
        np.testing.assert_array_equal(pixels[0, :h, :w], expected[path], err_msg=f"export {path}")
    detector.seen.clear()
    inspector = Inspector.__new__(Inspector)
    inspector.detector, inspector._state = detector.run, None

    def look(state, pixels, sizes, points):
        detector.seen.append((pixels, sizes))
        raise InterruptedError

    inspector._look = look
    for path in paths:
        with pytest.raises(InterruptedError):
            inspector(path)
    same("visualize")


def test_every_way_to_hand_over_an_image_gives_the_same(formats, tmp_path):
    for name in formats.names:
        with open(name, "rb") as file:
            content = file.read()
            file.seek(0)
            expected = np.asarray(open_image(name))
            with Image.open(name) as opened:
                images = [content, bytearray(content), file, opened, expected, jax.numpy.asarray(expected)]
                for image in images:
                    np.testing.assert_array_equal(np.asarray(open_image(image)), expected, err_msg=name)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (None, "got NoneType, expected a path, an array"),
        (3, "got int, expected a path"),
        ({"image": 1}, "got dict, expected a path"),
        (b"no image", "image given as bytes: not an image"),
        (np.zeros((2, 4, 4, 3), np.uint8), r"got uint8 \[2, 4, 4, 3\]"),
        (np.zeros((0, 4, 3), np.uint8), r"got uint8 \[0, 4, 3\]"),
        (jax.numpy.zeros((4, 4, 3)), r"got float32 \[4, 4, 3\]"),
        (Image.new("F", (4, 4)), "mode F: floats have no RGB"),
    ],
)
def test_what_is_no_image_is_refused(detector, image, message):
    with pytest.raises(UserError, match=message):
        detector.run(image)


def test_files_that_are_no_images(detector, tmp_path):
    (tmp_path / "text.jpg").write_text("no image")
    with (tmp_path / "text.jpg").open() as file, pytest.raises(UserError, match="opened as text, expected open"):
        detector.run(file)
    with (tmp_path / "text.jpg").open("rb") as file, pytest.raises(UserError, match=r"text\.jpg: not an image"):
        detector.run(file)
    with pytest.raises(NotFoundError, match="no such image"):
        detector.run(tmp_path)


def test_a_jpeg_that_was_cut_in_the_middle_is_damaged(tmp_path):
    Image.effect_noise((64, 48), 50).convert("RGB").save(tmp_path / "a.jpg")
    whole = (tmp_path / "a.jpg").read_bytes()
    cut = whole[: len(whole) // 2] + whole[len(whole) // 2 + 400 :]
    (tmp_path / "a.jpg").write_bytes(cut)
    with Image.open(tmp_path / "a.jpg") as image:
        image.load()  # Pillow says nothing
    with pytest.raises(UserError, match=r"a\.jpg: not an image, or a damaged one: Corrupt JPEG data"):
        open_image(tmp_path / "a.jpg")
    record = {"id": 1, "file_name": "a.jpg", "height": 48, "width": 64}
    content = {"images": [record], "annotations": [], "categories": [{"id": 1, "name": "a"}]}
    (tmp_path / "a.json").write_text(json.dumps(content))
    index = load_coco(tmp_path / "a.json", tmp_path)  # its end is there: found when it is decoded
    with pytest.raises(DataError, match=r"a\.jpg: .*Corrupt JPEG data"):
        index.image(0)
    for end in (len(whole) // 2, len(whole) - 1, 200, 3):
        with pytest.raises(UserError, match=r"a\.jpg: not an image, or a damaged one"):
            decode(whole[:end], "a.jpg")


def test_an_image_of_182_megapixels_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)  # of which Pillow refuses the double
    Image.new("RGB", (60, 50)).save(tmp_path / "a.png")
    with pytest.raises(UserError, match=r"a\.png: too large: Image size \(3000 pixels\).* Shrink it, or cut it"):
        open_image(tmp_path / "a.png")
    records = [{"id": i, "file_name": name, "height": 50, "width": 60} for i, name in enumerate(("a.png", "b.png"))]
    Image.new("RGB", (30, 25)).save(tmp_path / "b.png")
    records[1] |= {"height": 25, "width": 30}
    content = {"images": records, "annotations": [], "categories": [{"id": 1, "name": "a"}]}
    (tmp_path / "a.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match=r"a\.png: too large"):
        load_coco(tmp_path / "a.json", tmp_path)
    index = load_coco(tmp_path / "a.json", tmp_path, on_bad_image="skip")
    assert index.image_ids.tolist() == [1] and "1 bad images skipped" in index.report[-1]
