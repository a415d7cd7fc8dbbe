"""Curves: each run's values where they were reported, and the best score, wherever in the run it was reached."""

import json

import numpy as np
import pytest
from matplotlib import pyplot
from PIL import Image

from detr_jax.curves import plot_curves


def write_run(path, scale):
    lines = [
        {"step": s, "epoch": s / 10, "hours": s / 100, "train/loss": scale / s, "train/loss_ce": None}
        for s in (1, 2, 3)
    ]
    lines.append({"step": 3, "epoch": 0.3, "hours": 0.03, "val/AP": scale / 10})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_curves_of_one_run(tmp_path):
    figure = plot_curves(write_run(tmp_path / "metrics.jsonl", 6))
    assert len({axes.get_xlim() for axes in figure.axes}) == 1  # what is reported rarely is on the same scale
    loss, _, ap = figure.axes
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["loss", "classification loss", "AP"]
    np.testing.assert_array_equal(loss.lines[0].get_xydata(), [[1, 6], [2, 3], [3, 2]])
    assert ap.get_title(loc="right") == "best 0.600"
    figure.savefig(tmp_path / "curves.png")
    with Image.open(tmp_path / "curves.png") as picture:
        assert picture.width > 800
    assert not pyplot.get_fignums()  # nothing is left in pyplot's global state


def test_curves_of_two_runs_over_hours(tmp_path):
    runs = {name: write_run(tmp_path / f"{name}.jsonl", scale) for name, scale in (("a", 6), ("b", 12))}
    loss = plot_curves(runs, x="hours", curves=["train/loss"]).axes[0]
    assert [text.get_text() for text in loss.get_legend().get_texts()] == ["a", "b"]
    np.testing.assert_allclose(loss.lines[1].get_xydata(), [[0.01, 12], [0.02, 6], [0.03, 4]])


def test_curves_of_nothing(tmp_path):
    (tmp_path / "metrics.jsonl").touch()
    with pytest.raises(ValueError, match=r"metrics\.jsonl: none of train/loss, .* was reported"):
        plot_curves(tmp_path / "metrics.jsonl")


def test_ap_of_sizes_that_no_object_has(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = [{"step": s, "epoch": s, "hours": s, "val/APs": -1.0, "val/APl": s / 10} for s in (1, 2)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    small, large = plot_curves(path, x="epoch").axes
    assert np.isnan(small.lines[0].get_ydata()).all() and small.get_title(loc="right") == "best -"
    np.testing.assert_array_equal(large.lines[0].get_xydata(), [[1, 0.1], [2, 0.2]])
    assert large.get_ylim()[1] > 0.2


def test_the_best_score_is_the_largest(tmp_path):
    path = tmp_path / "metrics.jsonl"
    scores = (0.25, 0.5, 0.125)  # the largest is neither the first nor the last
    path.write_text("\n".join(json.dumps({"step": step, "val/AP": ap}) for step, ap in enumerate(scores)))
    assert plot_curves(path).axes[0].get_title(loc="right") == "best 0.500"
