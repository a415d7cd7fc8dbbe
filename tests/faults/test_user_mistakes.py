"""Mistakes of a user's, each of which ends in one message that names the file, the field and the cure."""

import dataclasses
import json
import re

import numpy as np
import pytest
import tiny
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.font_manager import fontManager
from PIL import Image

from detr_jax import cli, drawing, training
from detr_jax.checkpoints.files import read_tensors
from detr_jax.checkpoints.load import not_finite
from detr_jax.config import Config, DataConfig, DeformableDETRConfig, LossConfig, OptimConfig, TrainConfig, from_dict
from detr_jax.errors import UserError
from detr_jax.visualize.panels import Page

CONFIG = "configs/bccd.py"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--train.epochs", "0"], r"train\.epochs=0: expected a number of at least 1"),
        (["--train.batch-size", "-2"], r"train\.batch_size=-2"),
        (["--train.log-every", "0"], r"train\.log_every=0"),
        (["--train.max-steps", "0"], r"train\.max_steps=0"),
        (["--train.seed", "-1"], r"train\.seed=-1: expected a number of at least 0"),
        (["--optim.lr", "nan"], r"optim\.lr=nan"),
        (["--optim.ema-decay", "1"], r"optim\.ema_decay=1\.0: expected a share, less than 1"),
        (["--optim.clip-norm", "0"], r"optim\.clip_norm=0"),
        (["--loss.l1-weight", "-1"], r"loss\.l1_weight=-1"),
        (["--loss.giou-cost", "nan"], r"loss\.giou_cost=nan"),
        (["--loss.focal-alpha", "2"], r"loss\.focal_alpha=2"),
        (["--data.max-size", "0"], r"data\.max_size=0"),
        (["--data.buckets", "100", "128"], r"data\.buckets: got \(100, 128\).*holds it is \(128, 128\)"),
        (["--loss.classification", "softmax"], r"loss\.classification: got 'softmax', but .* are for 'focal'"),
    ],
)
def test_a_number_that_cannot_be(flags, message, capsys):
    with pytest.raises(SystemExit):  # tyro shows the message in a frame, over several lines
        cli.parse_train(["--config", CONFIG, *flags])
    shown = capsys.readouterr()
    assert re.search(message, re.sub(r"[\s│]+", " ", shown.out + shown.err))


@pytest.mark.parametrize("section", [TrainConfig, OptimConfig, DataConfig, LossConfig, Config])
def test_the_defaults_can_be(section):
    section()


def test_a_file_where_a_folder_goes(tmp_path):
    (tmp_path / "file").write_text("mine")
    file, below = str(tmp_path / "file"), str(tmp_path / "file/below")
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    for out in (file, below):
        with pytest.raises(UserError, match=r"--out .*file.* is a file, expected a folder"):
            cli.main(["predict", str(tmp_path / "a.png"), "--checkpoint", "none", "--out", out])
        with pytest.raises(UserError, match=r"--out .*file.* is a file, expected a folder"):
            cli.main(["soup", "a", "b", "--out", out])
        with pytest.raises(UserError, match=r"--train\.output-dir .*file.* is a file, expected a folder"):
            cli.parse_train(["--config", CONFIG, "--train.output-dir", out])
    for figure in (tmp_path / "file/a.png", tmp_path / "folder.png"):
        (tmp_path / "folder.png").mkdir(exist_ok=True)
        with pytest.raises(UserError, match=r"--out .*(is a file|is a folder)"):
            cli.main(["visualize", "curves", "run", "--out", str(figure)])
    with pytest.raises(UserError, match="is a folder, expected a file"):
        cli.main(["export", "none", str(tmp_path), "--bucket", "64", "64"])
    assert (tmp_path / "file").read_text() == "mine"


def test_a_soup_of_nothing():
    with pytest.raises(UserError, match=r"no checkpoints given: detr-jax soup CHECKPOINT\.\.\. --out FOLDER"):
        cli.main(["soup", "--out", "unused"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["train"].update(new_field=3), r"run: train\.new_field: .* a newer one wrote it: update detr_jax"),
        (lambda c: c["model"].update(new_field=3), r"run: model\.new_field: .* update detr_jax"),
        (lambda c: c["model"]["backbone"].update(new_field=3), r"run: model\.backbone\.new_field"),
        (lambda c: c.pop("optim"), r"run: optim: got NoneType, expected its fields: the file is damaged"),
        (lambda c: c.update(model=3), r"run: model: got int, expected its fields"),
        (lambda c: c["train"].update(epochs="many"), r"run: train: "),
    ],
)
def test_a_config_of_a_newer_version_or_damaged(change, message):
    stored = json.loads(json.dumps(dataclasses.asdict(tiny.config())))
    change(stored)
    with pytest.raises(UserError, match=message):
        from_dict(stored, "DeformableDETRConfig", "run")


def test_a_model_of_a_newer_version():
    with pytest.raises(UserError, match=r"run: model: got 'FutureConfig', expected one of DETRConfig.*update detr_jax"):
        from_dict(dataclasses.asdict(tiny.config()), "FutureConfig", "run")


def test_nan_weights_are_said():
    tensors = {"a.kernel": np.ones(3), "b.kernel": np.array([1, np.nan]), "c.bias": np.array([np.inf])}
    assert not_finite(tensors) == ["WARNING: NaN or infinity in b.kernel, c.bias: what it detects means nothing"]
    assert not_finite({"a.kernel": np.ones(3)}) == []


def test_more_boxes_than_queries_are_said(tmp_path):
    run = training.prepare(tiny.config(tmp_path))
    index = run.train_index
    assert training.crowded(run, index) == []
    few = dataclasses.replace(run.config, model=dataclasses.replace(run.config.model, num_queries=10))
    (line,) = training.crowded(dataclasses.replace(run, config=few), index)
    number = sum(len(labels) > 10 for labels in index.labels)
    assert line.startswith(f"WARNING: {number} images have more boxes than model.num_queries=10")
    assert line.endswith(f"pass --model.num-queries {index.max_boxes} or more")


def test_shards_and_old_files_of_transformers(tmp_path):
    from safetensors.numpy import save_file

    (tmp_path / "config.json").write_text("{}")
    save_file({"a": np.ones(2, np.float32)}, tmp_path / "model.safetensors")
    save_file({"old": np.ones(2, np.float32)}, tmp_path / "model_old.safetensors")
    tensors, _ = read_tensors(tmp_path)
    assert list(tensors) == ["a"]
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config\.json: not JSON"):
        read_tensors(tmp_path)
    (tmp_path / "config.json").write_text("[" * 100_000)
    with pytest.raises(UserError, match=r"config\.json: not JSON"):
        read_tensors(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").rename(tmp_path / "model-00001-of-00002.safetensors")
    weights = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weights}))
    with pytest.raises(UserError, match=r"index\.json: .*model-00002-of-00002\.safetensors.* missing"):
        read_tensors(tmp_path)
    save_file({"b": np.ones(2, np.float32)}, tmp_path / "model-00002-of-00002.safetensors")
    assert sorted(read_tensors(tmp_path)[0]) == ["a", "b"]


@pytest.mark.parametrize("kind", ["list", "tensor", "meta", "float8"])
def test_what_is_in_a_pth(kind, tmp_path):
    torch = pytest.importorskip("torch")
    content = {
        "list": [torch.ones(2)],
        "tensor": torch.ones(2),
        "meta": {"a": torch.ones(2, device="meta")},
        "float8": {"a": torch.ones(2).to(torch.float8_e4m3fn)},
    }[kind]
    torch.save(content, tmp_path / "a.pth")
    if kind == "float8":
        assert read_tensors(tmp_path / "a.pth")[0]["a"].tolist() == [1, 1]
    else:
        with pytest.raises(UserError, match=r"a\.pth"):
            read_tensors(tmp_path / "a.pth")


def write_font(path, letter: str) -> None:
    """A font with one letter, a filled square."""
    pen = TTGlyphPen(None)
    pen.moveTo((0, 0))
    for corner in ((0, 800), (800, 800), (800, 0)):
        pen.lineTo(corner)
    pen.closePath()
    square = pen.glyph()
    font = FontBuilder(1000, isTTF=True)
    font.setupGlyphOrder([".notdef", "square"])
    font.setupCharacterMap({ord(letter): "square"})
    font.setupGlyf({".notdef": TTGlyphPen(None).glyph(), "square": square})
    font.setupHorizontalMetrics({".notdef": (1000, 0), "square": (1000, 0)})
    font.setupHorizontalHeader(ascent=800, descent=-200)
    font.setupNameTable({"familyName": "Faults", "styleName": "Regular"})
    font.setupOS2(sTypoAscender=800)
    font.setupPost()
    font.save(path)


def test_class_names_of_any_script_are_drawn(tmp_path, monkeypatch):
    letter = "\U00016a5e"  # of the script Mro
    monkeypatch.setattr(fontManager, "ttflist", list(fontManager.ttflist))
    write_font(tmp_path / "faults.ttf", letter)
    fontManager.addfont(str(tmp_path / "faults.ttf"))
    drawing.font_file.cache_clear()
    assert drawing._font(f"{letter}{letter}", 12).path == str(tmp_path / "faults.ttf")
    assert drawing._font("cat and Кот", 12).path.endswith("DejaVuSans.ttf")
    image, boxes = np.zeros((90, 120, 3), np.uint8), np.array([[10.0, 20, 80, 70]])
    picture = drawing.draw_detections(image, boxes, np.array([0]), [letter])
    assert picture.size == (120, 90)

    def drawn(name: str) -> np.ndarray:
        figure = Page(figsize=(1, 1))
        figure.text(0.2, 0.4, name, fontsize=30)
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
        return np.asarray(canvas.buffer_rgba())[..., 0]

    # The square is filled; the empty box that stands for a missing letter is not. DejaVu has "A" in the same figure.
    assert (drawn(letter) == 0).mean() > 0.04
    assert not np.array_equal(drawn(f"A{letter}"), drawn(letter))


def test_a_script_without_a_font_is_said(monkeypatch):
    monkeypatch.setattr(fontManager, "ttflist", [])
    drawing.font_file.cache_clear()
    with pytest.warns(UserWarning, match=r"no font on this machine has the letter .*fonts-noto-cjk"):
        drawing._font("\U00016a5f", 12)


def test_names_with_line_breaks_are_drawn_on_one_line():
    image, boxes = np.zeros((90, 120, 3), np.uint8), np.array([[10.0, 20, 80, 70]])
    labels, scores = np.array([0]), np.array([0.9])
    pictures = [drawing.draw_detections(image, boxes, labels, [name], scores) for name in ("tea\ncup", "tea cup")]
    np.testing.assert_array_equal(*map(np.asarray, pictures))
    drawing.compare(image, boxes, labels, boxes, labels, scores, ["tea\r\n cup"])


def test_a_bucket_names_the_nearest():
    from detr_jax.categories import Categories
    from detr_jax.checkpoints import Loaded
    from detr_jax.export import export

    model = DeformableDETRConfig()
    loaded = Loaded(model, None, Categories((), ()), "focal", 800, 1333, "")  # pyright: ignore[reportArgumentType]
    with pytest.raises(UserError, match=r"bucket=\(799, 1000\).*multiples of 32, such as \(800, 992\)"):
        export(loaded, "unused.zip", (799, 1000))
