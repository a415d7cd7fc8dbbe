"""What a run promises, in the form that takes seconds: `train()` itself, on sixteen images, with a frozen backbone.

Resumed, it ends with the same bits; SIGTERM saves; a loss that is not finite stops it and says where; two processes
train as one; the averaged parameters are the ones that are scored. `test_training.py` holds the long forms (`slow`):
`kill -9`, Ctrl-C, and hundreds of steps.
"""

import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
from collections import Counter
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny
from PIL import Image

from detr_jax import evaluation, sharding, train_step, training
from detr_jax.checkpoints import store
from detr_jax.data.sampler import TrainSampler

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.usefixtures("two_devices", "shared_programs")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return tiny.sixteen_images(tmp_path_factory.mktemp("data") / "cells")


def config(data, output_dir, **train):
    """Three epochs of one step, each saved and scored. One decoder layer and one level, but for DINO."""
    defaults = {"epochs": 3, "eval_every": 1, "checkpoint_every": 1, "keep_last": 3}
    run = tiny.fast_config(data, output_dir, **(defaults | train))
    if train.get("model") == "dino":
        return run
    small = {"decoder_layers": 1, "num_levels": 1, "two_stage": False, "box_refinement": False}
    return dataclasses.replace(run, model=dataclasses.replace(run.model, **small))


def losses(directory: Path) -> dict[int, float]:
    """Step -> loss, from `metrics.jsonl`."""
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["train/loss"] for line in lines if "train/loss" in line}


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    """A run that nothing interrupted: its folder, the parameters that each evaluation scored, and traced buckets."""
    directory = tmp_path_factory.mktemp("whole")
    scored, traced = [], Counter()

    def evaluate_model(detect, params, *args, **kwargs):
        scored.append(jax.device_get(params))
        return original_evaluate(detect, params, *args, **kwargs)

    def postprocess(outputs, *args, **kwargs):
        traced[outputs["pred_logits"].shape] += 1  # Python runs when the step is traced, not when it is called
        return original_postprocess(outputs, *args, **kwargs)

    original_evaluate, original_postprocess = evaluation.evaluate_model, train_step.postprocess
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "evaluate_model", evaluate_model)
        patch.setattr(train_step, "postprocess", postprocess)
        scores = training.train(config(data, directory, num_pictures=2))
    assert scores is not None
    return directory, scored, traced


def saved(directory: Path, step: int) -> dict[str, np.ndarray]:
    """All arrays of a checkpoint, by entry and path."""
    from orbax.checkpoint import v1 as ocp

    path = directory / "checkpoints" / str(step)
    found = ocp.checkpointables_metadata(path).metadata
    entries = {
        entry: {name: np.zeros(leaf.shape, leaf.dtype) for name, leaf in found[entry].items()}
        for entry in ("params", "ema", "opt_state", "step")
    }
    loaded = ocp.load_checkpointables(path, entries)
    return {f"{entry}/{name}": value for entry, leaves in loaded.items() for name, value in leaves.items()}


def test_three_evaluations_compile_the_detection_step_once_per_bucket(whole):
    _, scored, traced = whole
    assert len(scored) == 3
    assert list(traced.values()) == [1], traced  # sixteen images of one shape: one bucket


def test_an_evaluation_draws_what_it_found(data, whole):
    images = json.loads((data / "annotations/instances_val.json").read_text())["images"]
    drawn = sorted((whole[0] / "pictures").iterdir())
    assert [picture.name for picture in drawn] == [f"{image['id']}.jpg" for image in images[:2]]
    with Image.open(drawn[0]) as picture:
        assert picture.width == 2 * 720 + 3 * 12  # truth and detections, side by side


def test_the_averaged_parameters_are_scored_and_saved(whole):
    directory, scored, _ = whole
    for step, params in enumerate(scored, 1):
        checkpoint = saved(directory, step)
        ema = [value for name, value in checkpoint.items() if name.startswith("ema/")]
        raw = [value for name, value in checkpoint.items() if name.startswith("params/")]
        for got, expected in zip(jax.tree.leaves(params), ema, strict=True):
            np.testing.assert_array_equal(got, expected)
        assert any((a != b).any() for a, b in zip(raw, ema, strict=True))


def test_a_checkpoint_answers_with_the_averaged_parameters(whole):
    """`eval.py`, a `Detector`, fine-tuning and surgery read a run by `restore_model`."""
    from detr_jax.checkpoints import load, restore_model
    from detr_jax.config import from_dict

    directory, scored, _ = whole
    metadata = store.read_metadata(str(directory), 3)
    run = from_dict(metadata["config"], metadata["model"])
    _, params, _ = restore_model(str(directory), 3, run, sharding.make_mesh(1))
    for got, expected in zip(jax.tree.leaves(params), jax.tree.leaves(scored[-1]), strict=True):
        np.testing.assert_array_equal(got, expected)
    assert "step 1 of this project" in load(directory, step=1).report


def test_a_resumed_run_ends_with_the_same_bits(data, whole, tmp_path):
    """Parameters, their average, the optimizer's state and the losses."""
    assert training.train(config(data, tmp_path, max_steps=1)) is not None
    assert store.steps(str(tmp_path)) == [1]
    assert training.train(config(data, tmp_path)) is not None
    expected, got = saved(whole[0], 3), saved(tmp_path, 3)
    assert expected.keys() == got.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(got[name], value, err_msg=name)
    assert losses(tmp_path) == losses(whole[0])
    assert (tmp_path / "curves.png").stat().st_size > 0


def test_sigterm_saves_and_says_how_to_go_on(data, tmp_path, monkeypatch, capsys):
    add = training.RunningSteps.add

    def interrupted(self, step, terms):
        add(self, step, terms)
        if step == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(training.RunningSteps, "add", interrupted)
    before = signal.getsignal(signal.SIGTERM)
    # Without evaluations or checkpoints of its own: what is saved, the signal saved.
    assert training.train(config(data, tmp_path, epochs=9, eval_every=0, checkpoint_every=1000)) is None
    assert "saved; the same command goes on from here" in capsys.readouterr().out
    assert store.steps(str(tmp_path)) == [2]
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_loss_that_is_not_finite_stops_with_step_terms_and_images(data, tmp_path, monkeypatch):
    plan = TrainSampler.plan

    def broken(self, step, rows=slice(None)):
        found = plan(self, step, rows)
        return dataclasses.replace(found, boxes_cxcywh=np.full_like(found.boxes_cxcywh, np.nan)) if step == 1 else found

    monkeypatch.setattr(TrainSampler, "plan", broken)
    run = config(data, tmp_path)
    with pytest.raises(training.NonFiniteLossError) as error:
        training.train(run)
    message = str(error.value)
    images = json.loads((data / "annotations/instances_train.json").read_text())["images"]
    assert "step 1: the loss or the gradient is not finite" in message
    assert "loss_giou" in message and "loss nan" in message
    assert all(str(image["id"]) in message for image in images)
    assert store.steps(str(tmp_path)) == [1]  # the step before the bad one


def test_two_processes_give_the_losses_of_one(data, whole, tmp_path):
    one, two = losses(whole[0]), losses_of_two_processes(config(data, tmp_path / "double", eval_every=0, max_steps=2))
    assert two.keys() == {1, 2}
    # The same batch over two devices; sums between processes may be added in another order.
    np.testing.assert_allclose(two[1], one[1], rtol=1e-5)
    # The second step inherits that through Adam, which divides small gradients by their own size.
    np.testing.assert_allclose(two[2], one[2], rtol=1e-3)


@pytest.mark.slow
def test_dino_resumes_and_trains_in_two_processes(data, tmp_path):
    """The same numbers, denoising included."""
    options = {"model": "dino", "eval_every": 0}
    training.train(config(data, tmp_path / "whole", **options))
    training.train(config(data, tmp_path / "resumed", max_steps=1, **options))
    training.train(config(data, tmp_path / "resumed", **options))
    expected, got = (saved(tmp_path / name, 3) for name in ("whole", "resumed"))
    for name, value in expected.items():
        np.testing.assert_array_equal(got[name], value, err_msg=name)
    line = json.loads((tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()[0])
    assert line["train/loss_ce_dn"] > 0 and line["train/loss_bbox_dn_0"] > 0 and line["train/loss_giou_interm"] > 0
    one = losses(tmp_path / "whole")
    assert losses(tmp_path / "resumed") == one
    two = losses_of_two_processes(config(data, tmp_path / "double", max_steps=2, **options))
    np.testing.assert_allclose(two[1], one[1], rtol=1e-5)
    np.testing.assert_allclose(two[2], one[2], rtol=1e-3)


def losses_of_two_processes(run) -> dict[int, float]:
    """Step -> loss of a run by two processes with a device each."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    directory = Path(run.train.output_dir)
    file = tiny.write_config(directory.with_suffix(".py"), run)
    environment = os.environ | {
        "XLA_FLAGS": os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=1"),
        "PYTHONPATH": str(ROOT),
        "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
        "JAX_NUM_PROCESSES": "2",
    }
    processes = [
        subprocess.Popen(
            [sys.executable, str(ROOT / "train.py"), "--config", str(file)],
            env=environment | {"JAX_PROCESS_ID": str(i)},
            cwd=ROOT,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        for i in range(2)
    ]
    outputs = [process.communicate(timeout=600)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], "\n".join(outputs)
    assert "2 process(es); batch 8 global, 4 per process" in outputs[0]
    assert "step" not in outputs[1]  # only process 0 reports
    return losses(directory)
