"""`detr-jax visualize` as it is typed: every figure, and what bad input gives."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
import tiny
from PIL import Image
from transformers_weights import load, random_weights

from detr_jax import cli
from detr_jax.categories import Categories
from detr_jax.checkpoints import describe_run, store
from detr_jax.data.splits import load_split
from detr_jax.models import split as split_parameters

pytestmark = pytest.mark.usefixtures("short_resnet")


@pytest.fixture(scope="module")
def run(tmp_path_factory, data_dir):
    """The output folder of a run, with random parameters, and a validation image."""
    folder = tmp_path_factory.mktemp("run")
    root = folder / "two_images"
    (root / "annotations").mkdir(parents=True)
    (root / "images").mkdir()
    for split in ("train", "val"):
        truth = json.loads((data_dir / f"bccd/annotations/instances_{split}.json").read_text())
        truth["images"] = truth["images"][:2]
        kept = {image["id"] for image in truth["images"]}
        truth["annotations"] = [z for z in truth["annotations"] if z["image_id"] in kept]
        (root / f"annotations/instances_{split}.json").write_text(json.dumps(truth))
        for image in truth["images"]:
            shutil.copy(data_dir / "bccd/images" / image["file_name"], root / "images")
    config = tiny.config(folder, batch_size=2)
    config = dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, num_classes=3),
        data=dataclasses.replace(config.data, root=str(root)),
    )
    index = load_split(config.data, "val")
    _, params, buffers = split_parameters(config.model, load(config.model, random_weights(config.model)))
    metadata = describe_run(config, Categories(index.category_ids, index.category_names))
    with store.CheckpointWriter(str(folder / "checkpoints"), keep_last=1, keep_best=0) as writer:
        writer.save(1, {"params": params, "buffers": buffers}, metadata)
    lines = [{"step": step, "epoch": step / 2, "hours": step / 9, "train/loss": 3 / step} for step in (1, 2)]
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder, root / "images" / index.name(0)


def visualize(*arguments):
    cli.main(["visualize", *map(str, arguments)])


@pytest.mark.parametrize(
    ("what", "flags"),
    [
        ("sampling", ["--query", "3", "--by", "head"]),
        ("truth", ["--threshold", "0.01"]),
        pytest.param("encoder", ["--points", "20", "30", "100", "60"], marks=pytest.mark.slow),
        pytest.param("saliency", [], marks=pytest.mark.slow),
        pytest.param("refinement", ["--query", "0"], marks=pytest.mark.slow),
        pytest.param("proposals", [], marks=pytest.mark.slow),
        pytest.param("matching", [], marks=pytest.mark.slow),
    ],
)
def test_figures_of_an_image(what, flags, run, tmp_path, capsys):
    folder, image = run
    out = tmp_path / "figures" / f"{what}.png"
    visualize(what, image, "--checkpoint", folder, "--out", out, *flags)
    assert f"wrote {out}" in capsys.readouterr().out
    pixels = np.asarray(Image.open(out).convert("L"))
    assert min(pixels.shape) > 100
    assert pixels.std() > 5  # something is drawn


@pytest.mark.slow
@pytest.mark.parametrize(("what", "flags"), [("mistakes", ["--threshold", "0.01"]), ("confusion", [])])
def test_figures_of_a_data_set(what, flags, run, tmp_path):
    out = tmp_path / f"{what}.jpg"
    visualize(what, "--checkpoint", run[0], "--out", out, *flags)
    assert np.asarray(Image.open(out)).std() > 5


def test_curves_of_two_runs(run, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    shutil.copy(run[0] / "metrics.jsonl", other)
    out = tmp_path / "curves.svg"
    visualize("curves", run[0], other, "--x", "hours", "--out", out)
    assert "<svg" in out.read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["sampling", "{image}", "--checkpoint", "{run}", "--out", "figure.gif"],
            r"--out figure\.gif: expected .* \.png",
        ),
        (["sampling", "nowhere.jpg", "--checkpoint", "{run}"], r"nowhere\.jpg: no such image"),
        (["sampling", "{image}", "--checkpoint", "nowhere"], "nowhere: no such file or folder; expected a checkpoint"),
        (["sampling", "{image}", "--checkpoint", "{run}", "--query", "30"], r"query.* 30.* 0 .*29"),
        (["sampling", "{image}", "--checkpoint", "{run}", "--layer", "2"], r"layer.* 2"),
        (["encoder", "{image}", "--checkpoint", "{run}", "--points", "900", "1"], "900"),
        (["truth", "{other}", "--checkpoint", "{run}"], "none of the 2 images of the validation set"),
        (["curves", "{empty}"], r"metrics\.jsonl: no such file"),
        (["mistakes", "--checkpoint", "{run}", "--data-root", "{empty}"], "no val set found"),
    ],
)
def test_bad_input_says_what_is_wrong(arguments, message, run, tmp_path):
    other = tmp_path / "other.png"
    Image.new("RGB", (64, 48)).save(other)
    (tmp_path / "empty").mkdir()
    names = {"run": run[0], "image": run[1], "other": other, "empty": tmp_path / "empty"}
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        visualize(*[argument.format(**names) for argument in arguments])


@pytest.mark.parametrize(
    "arguments",
    [
        ["sampling", "--checkpoint", "x"],
        ["sampling", "a.jpg", "b.jpg", "--checkpoint", "x"],
        ["sampling", "a.jpg", "--checkpoint", "x", "y"],
        ["curves", "run", "--checkpoint", "x"],
        ["nothing"],
        [],
    ],
)
def test_flags_that_a_figure_does_not_have_are_refused(arguments, capsys):
    with pytest.raises(SystemExit) as error:
        visualize(*arguments)
    assert error.value.code == 2
    assert "visualize" in capsys.readouterr().err


def test_help_says_what_the_figures_are(capsys):
    with pytest.raises(SystemExit) as error:
        visualize("--help")
    assert error.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for what in ("sampling", "saliency", "refinement", "proposals", "matching", "confusion", "curves"):
        assert what in text
