"""The loop, with the product's own step: whatever ends a run, its good steps are saved and the next start goes on."""

import dataclasses
import functools
import json
import os
import re
import signal
import threading
import time
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny
from etils import epath

from detr_jax import compilation, evaluation, resuming, training
from detr_jax.checkpoints import store
from detr_jax.errors import DataError, UserError
from detr_jax.metric_writer import read_metrics
from detr_jax.stall import StalledError

pytestmark = pytest.mark.usefixtures("short_resnet", "two_devices", "shared_programs")


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """`config(folder, **train)`: three steps, and an evaluation at the end."""
    data = tiny.sixteen_images(tmp_path_factory.mktemp("data") / "cells")

    def make(output_dir, **train):
        defaults = {"epochs": 3, "eval_every": 0, "log_every": 2, "checkpoint_every": 1000}
        return tiny.fast_config(data, output_dir, **(defaults | train))

    return make


def numbers(folder):
    """What a run reported, without times."""
    times = ("hours", "train/images_per_second", "train/waiting_for_data")
    records = read_metrics(Path(folder) / "metrics.jsonl")
    return [{name: value for name, value in record.items() if name not in times} for record in records]


def tensors(folder):
    """Digests of the newest checkpoint's tensors."""
    path = Path(folder) / "checkpoints" / str(store.latest_step(str(folder)))
    from orbax.checkpoint import v1 as ocp

    saved = ocp.checkpointables_metadata(path).metadata
    zeros = {
        entry: {name: np.zeros(leaf.shape, leaf.dtype) for name, leaf in saved[entry].items()}
        for entry in ("params", "opt_state")
    }
    return ocp.load_checkpointables(path, zeros)


@pytest.fixture(scope="module")
def whole(tmp_path_factory, config):
    """A run that nothing happened to."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert training.train(config(folder)) is not None
    return folder


def same_end(folder, whole):
    assert numbers(folder) == numbers(whole)
    jax.tree.map(np.testing.assert_array_equal, tensors(folder), tensors(whole))


def at_step(monkeypatch, step, action):
    """Runs `action` when a run has finished `step` steps."""
    original = training.RunningSteps.add

    def add(self, number, terms):
        original(self, number, terms)
        if number == step - 1:
            action()

    monkeypatch.setattr(training.RunningSteps, "add", add)


def test_sigterm_is_noticed_between_log_steps_and_nothing_is_lost(tmp_path, config, whole, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        at_step(patch, 1, lambda: os.kill(os.getpid(), signal.SIGTERM))
        assert training.train(config(tmp_path / "run")) is None
    assert store.latest_step(str(tmp_path / "run")) == 1  # not a log step
    assert "and saved; the same command goes on from here" in capsys.readouterr().out
    training.train(config(tmp_path / "run"))
    same_end(tmp_path / "run", whole)


def test_sigterm_while_the_first_parameters_are_computed(tmp_path, config, monkeypatch):
    ended = threading.Event()

    def compile_for_ever(*args):
        os.kill(os.getpid(), signal.SIGTERM)
        ended.wait(60)

    monkeypatch.setattr(training, "init_state", compile_for_ever)
    start = time.monotonic()
    assert training.train(config(tmp_path / "run")) is None
    assert time.monotonic() - start < 30
    ended.set()


def test_a_checkpoint_whose_storage_does_not_answer_is_named(config, whole, monkeypatch):
    answer = threading.Event()
    monkeypatch.setattr(store, "restore", lambda *args, **kwargs: answer.wait(60))
    with pytest.raises(StalledError, match="storage did not answer") as error:
        training.train(config(whole, storage_timeout=0.5))
    assert error.value.filename == f"the checkpoint of step 3 in {whole}"
    answer.set()


def test_a_damaged_checkpoint_costs_its_steps_and_no_more(tmp_path, config, whole, capsys):
    run = config(tmp_path / "run", checkpoint_every=1)
    training.train(dataclasses.replace(run, train=dataclasses.replace(run.train, max_steps=2)))
    newest = tmp_path / "run" / "checkpoints" / "2"
    data = max((path for path in newest.rglob("d/*") if path.is_file()), key=lambda path: path.stat().st_size)
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 1
    data.write_bytes(content)
    training.train(run)
    assert "has changed since it was written" in capsys.readouterr().out
    same_end(tmp_path / "run", whole)


def test_a_bad_image_saves_the_steps_before_it(tmp_path, config, monkeypatch):
    from detr_jax.data import pipeline

    original, run = pipeline._Loader._load, config(tmp_path / "run")

    def load(self, i):
        if len(seen) >= 20 and not self.every_image_once:
            raise DataError("bad.jpg: truncated")
        seen.append(i)
        return original(self, i)

    seen: list[int] = []
    monkeypatch.setattr(pipeline._Loader, "_load", load)
    with pytest.raises(DataError, match=r"bad\.jpg"):
        training.train(run)
    assert store.latest_step(str(tmp_path / "run")) == 2


def test_a_failing_evaluation_loses_nothing_and_is_made_up_for(tmp_path, config, whole, monkeypatch):
    run = config(tmp_path / "run")

    def fail(*args):
        raise RuntimeError("scoring failed")

    with monkeypatch.context() as patch:
        patch.setattr(evaluation, "score", fail)
        with pytest.raises(RuntimeError, match="scoring failed"):
            training.train(run)
    assert store.latest_step(str(tmp_path / "run")) == 3
    scores = training.train(run)
    assert scores is not None and store.read_metadata(str(tmp_path / "run"))["AP"] == scores.AP
    same_end(tmp_path / "run", whole)


def metadata(**changes):
    return {
        "category_ids": [1, 2],
        "category_names": ["cat", "dog"],
        "config": {"train": {"seed": 0}},
        "data": {"train": "a", "val": "b"},
    } | changes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"category_names": ["cat", "wolf"]}, r"classes \(id, name\) changed .*\(2, 'dog'\) -> \(2, 'wolf'\)"),
        ({"category_ids": [1, 3]}, r"\(2, 'dog'\) -> \(3, 'dog'\)"),
        ({"data": {"train": "other", "val": "b"}}, "training images or annotations changed"),
    ],
)
def test_other_data_than_before_is_refused(changes, message):
    with pytest.raises(UserError, match=message):
        resuming.check(epath.Path("run"), metadata(), metadata(**changes))


def test_what_changed_otherwise_is_said():
    changed = metadata(data={"train": "a", "val": "other"}, config={"train": {"seed": 1}})
    lines = resuming.check(epath.Path("run"), metadata(), changed)
    assert "validation images or annotations changed" in lines[0]
    assert lines[-1] == "  train.seed: 0 -> 1"
    assert resuming.check(epath.Path("run"), metadata(), metadata()) == []


def test_the_fingerprint_is_of_what_the_annotations_say(tmp_path):
    from detr_jax.data.splits import load_split

    data = tiny.config().data
    index = load_split(data, "train")
    assert index.fingerprint() == load_split(data, "train").fingerprint()
    annotations = json.loads((Path(data.root) / "annotations/instances_train.json").read_text())
    annotations["annotations"][0]["bbox"][0] += 1
    (tmp_path / "changed.json").write_text(json.dumps(annotations))
    changed = dataclasses.replace(data, train_annotations=str(tmp_path / "changed.json"), train_images="images")
    assert index.fingerprint() != load_split(changed, "train").fingerprint()


@pytest.mark.parametrize(
    ("aps", "patience", "out"),
    [
        ({}, 1, False),
        ({1: 0.5}, 1, False),
        ({1: 0.5, 2: 0.5}, 1, True),
        ({1: 0.5, 2: 0.6}, 1, False),
        ({1: 0.5, 2: 0.4, 3: 0.45}, 2, True),
        ({1: 0.5, 2: 0.4, 3: 0.55}, 2, False),
        ({1: 0.5, 2: 0.4, 3: 0.45}, None, False),
    ],
)
def test_patience(aps, patience, out):
    assert training.out_of_patience(aps, patience) is out


def test_the_first_epoch_is_scored_so_that_mistakes_show_early(tmp_path):
    run = training.Run(tiny.config(tmp_path), *[None] * 3, sampler=[None] * 10, eval_sampler=None, optimizer=None)  # pyright: ignore

    def scored(**train):
        changed = dataclasses.replace(run.config, train=dataclasses.replace(run.config.train, epochs=7, **train))
        one = dataclasses.replace(run, config=changed)
        return [step for step in range(1, 71) if one.is_eval_step(step)], training.describe_first_scores(one, 10)

    drawn = f"drawn in {tmp_path / 'pictures'}"
    assert scored(eval_every=3, num_pictures=1) == ([10, 30, 60, 70], f"; scored at step 30, {drawn}")
    assert scored(eval_every=1) == ([10, 20, 30, 40, 50, 60, 70], "; scored at step 20")
    assert scored(eval_every=0) == ([70], "; scored at step 70")
    assert scored(eval_every=0, max_steps=25) == ([70], "")


def test_scores_are_kept_where_drawing_fails(tmp_path, config, monkeypatch):
    def full(*args):
        raise OSError("no space for pictures")

    monkeypatch.setattr(training, "write_pictures", full)
    with pytest.raises(OSError, match="no space for pictures"):
        training.train(config(tmp_path, num_pictures=1))
    assert "val/AP" in numbers(tmp_path)[-1]


def test_a_step_that_needs_too_much_memory_says_what_to_change():
    class Lowered:
        def __init__(self, message):
            self.message = message

        def compile(self):
            raise jax.errors.JaxRuntimeError(self.message)

    def compile_one(message):
        programs = {("train", (800, 1344)): lambda: Lowered(message)}
        return compilation.compile_buckets(programs, jax.make_mesh((1,), ("data",), devices=jax.devices()[:1]))()

    tpu = "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Used 18.06G of 15.75G hbm. Exceeded hbm capacity"
    cure = r"Take a smaller --train\.batch-size, .*--model\.remat layers"
    with pytest.raises(UserError, match=rf"train 800x1344 does not fit .*: Used 18\.06G of 15\.75G hbm\. {cure}"):
        compile_one(tpu)
    with pytest.raises(jax.errors.JaxRuntimeError, match="a bug"):
        compile_one("INTERNAL: a bug")


def test_a_compiled_program_says_its_memory(capsys):
    mesh = jax.make_mesh((1,), ("data",), devices=jax.devices()[:1])
    for donated, total in ((), "2.00"), ((0,), "1.00"):
        add = jax.jit(lambda x: x + 1, donate_argnums=donated)
        lower = functools.partial(add.lower, jax.ShapeDtypeStruct((2**28,), np.float32))
        compilation.compile_buckets({("train", (64, 85)): lower}, mesh)()
        said = capsys.readouterr().out
        assert re.fullmatch(rf"compiled 1/1  train 64x85  [\d.]+ s  {total} GiB per device\n", said)


def test_profile_steps():
    assert training.parse_profile_steps("10:15") == range(10, 15)
    assert not training.parse_profile_steps(None)
    for text in ("10", "15:10", "a:b", "10:15:2"):
        with pytest.raises(UserError, match=f"profile_steps: got '{text}', expected FIRST:LAST"):
            training.parse_profile_steps(text)


def test_a_second_start_opens_no_image(tmp_path, config, monkeypatch):
    from detr_jax.data import coco
    from detr_jax.data.splits import load_split

    data, cache = config(tmp_path).data, epath.Path(tmp_path) / "intact"
    first = load_split(data, "train", cache=cache)
    monkeypatch.setattr(coco, "read_header", lambda *args: pytest.fail("an image was opened"))
    assert load_split(data, "train", cache=cache).fingerprint() == first.fingerprint()


def test_a_bad_image_in_mid_run_is_skipped_where_that_is_wanted(tmp_path, config, capsys):
    from detr_jax.data.pipeline import batches
    from detr_jax.data.sampler import EvalSampler, TrainSampler
    from detr_jax.data.splits import load_split

    data = dataclasses.replace(config(tmp_path).data, on_bad_image="skip")
    for split, sampler_of in (
        ("train", lambda index: TrainSampler(index, data, 8, 0)),
        ("val", lambda index: EvalSampler(index, data, 8)),
    ):
        index = load_split(data, split)

        def read(i, index=index):
            return b"broken" if i == 3 else Path(index.names[i]).read_bytes()

        sampler = sampler_of(index)
        broken = dataclasses.replace(index, read=read)
        for engine in ("pillow", "tf"):
            chosen = dataclasses.replace(data, engine=engine)
            ((_, batch),) = batches(broken, sampler, range(1), data_config=chosen)
            ids, bad = batch["image_id"].tolist(), int(index.image_ids[3])
            assert bad not in ids and (-1 in ids) == (split == "val")
            assert list(broken.skipped) == [3]
            if split == "train":
                assert len(set(ids)) == 7  # another one is there twice
    assert capsys.readouterr().out.count("skipped from now on: ") == 2
