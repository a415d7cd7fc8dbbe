"""The training step and the loop: the same numbers on any number of devices, after any interruption."""

import dataclasses
import functools
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import optax
import pytest
import tiny

from detr_jax import sharding, train_step, training
from detr_jax.checkpoints import store
from detr_jax.config import OptimConfig
from detr_jax.data.pipeline import batches
from detr_jax.data.resample import resample_batch
from detr_jax.data.sampler import TrainSampler
from detr_jax.data.splits import load_split

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """Environment of subprocesses: one CPU device each, compilations shared between them."""
    cache = str(tmp_path_factory.mktemp("compiled"))
    return os.environ | {
        "XLA_FLAGS": os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=1"),
        "PYTHONPATH": str(ROOT),
        "JAX_COMPILATION_CACHE_DIR": cache,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }


def start(config: Path, environment, *flags: str) -> subprocess.Popen:
    """`train.py` in a process of its own."""
    command = [sys.executable, str(ROOT / "train.py"), "--config", str(config), *flags]
    return subprocess.Popen(
        command, env=environment, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


def finish(process: subprocess.Popen) -> str:
    """Its output; it must have succeeded."""
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 0, output
    return output


def losses(directory: Path) -> dict[int, float]:
    """Step -> loss, from `metrics.jsonl`."""
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["train/loss"] for line in lines if "train/loss" in line}


def tensors(directory: Path, step: int) -> dict[str, np.ndarray]:
    """All arrays of a checkpoint, without knowing what is in it."""
    from orbax.checkpoint import v1 as ocp

    path = directory / "checkpoints" / str(step)
    saved = ocp.checkpointables_metadata(path).metadata
    # As NumPy arrays: the device that saved them is not one of this process's eight.
    entries = {
        entry: {name: np.zeros(leaf.shape, leaf.dtype) for name, leaf in saved[entry].items()}
        for entry in ("params", "ema", "opt_state", "step")
    }
    loaded = ocp.load_checkpointables(path, entries)
    return {f"{entry}/{name}": value for entry, leaves in loaded.items() for name, value in leaves.items()}


@pytest.mark.slow
@pytest.mark.parametrize("model", tiny.RUNS)
def test_one_and_eight_devices_give_the_same_losses_and_gradients(model):
    config = tiny.RUNS[model]()
    index = load_split(config.data, "train")
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, num_classes=index.num_classes))
    sampler = TrainSampler(index, config.data, config.train.batch_size, config.train.seed)
    feed = list(batches(index, sampler, range(3), data_config=config.data))
    results = []
    for devices in (1, 8):
        mesh = sharding.make_mesh(devices)
        with jax.set_mesh(mesh):
            optimizer = train_step.make_optimizer(config.optim, 100)
            graphdef, state = train_step.init_state(config, optimizer, mesh)

            @functools.partial(jax.jit, static_argnames="bucket")
            def gradient(params, buffers, batch, *, bucket, graphdef=graphdef):
                pixels = resample_batch(batch, bucket, sampler, config.data)
                key = jax.random.key(7)
                denoising = train_step.draw_denoising(config.model, batch, key)
                loss = functools.partial(
                    train_step.loss_fn, graphdef=graphdef, config=config, pixels=pixels, key=key, denoising=denoising
                )
                return jax.grad(lambda *a: loss(*a)[0])(params, buffers, batch)

            def put(batch, mesh=mesh):
                return sharding.put_batch({k: v for k, v in batch.items() if k != "image_id"}, mesh)

            bucket, batch = feed[0]
            grads = jax.device_get(gradient(state["params"], state["buffers"], put(batch), bucket=bucket))
            step = train_step.make_train_step(config, graphdef, optimizer, sampler)
            terms = []
            for bucket, batch in feed:
                state, term = step(state, put(batch), bucket=bucket)
                terms.append(jax.device_get(term))
            results.append((grads, terms))
    (grads, terms), (grads8, terms8) = results
    # Sums over 8 devices are added in another order: float32 noise, 1e-7 relative for each of some hundred additions.
    for one, eight in zip(jax.tree.leaves(grads), jax.tree.leaves(grads8), strict=True):
        np.testing.assert_allclose(eight, one, rtol=0, atol=2e-5 * np.abs(one).max() + 1e-7)
    for name in terms[0]:
        np.testing.assert_allclose(terms8[0][name], terms[0][name], rtol=1e-5, err_msg=name)
    # Later steps inherit the noise through Adam, which divides small gradients by their own size.
    for one, eight in zip(terms[1:], terms8[1:], strict=True):
        np.testing.assert_allclose(eight["loss"], one["loss"], rtol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("model", tiny.RUNS)
def test_killed_and_resumed_is_bit_identical(model, tmp_path, environment):
    """`kill -9` in mid-run, then the same command: every tensor as in the run that nothing interrupted."""
    flags = ("--train.max-steps", "10")
    make = tiny.RUNS[model]
    whole = start(tiny.write_config(tmp_path / "whole.py", make(tmp_path / "whole")), environment, *flags)
    finish(whole)
    killed = tiny.write_config(tmp_path / "killed.py", make(tmp_path / "killed"))
    process = start(killed, environment, *flags)
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("step  5/"):
            break
    process.kill()
    process.communicate()
    survived = store.latest_step(str(tmp_path / "killed"))
    assert survived in (2, 4), survived
    output = finish(start(killed, environment, *flags))
    assert f"resuming at step {survived}" in output

    expected, got = tensors(tmp_path / "whole", 10), tensors(tmp_path / "killed", 10)
    assert expected.keys() == got.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(got[name], value, err_msg=name)
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")
    assert (tmp_path / "killed" / "curves.png").stat().st_size > 0


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_interruption_saves_and_exits_0(tmp_path, environment, number):
    config = tiny.write_config(tmp_path / "config.py", tiny.config(tmp_path / "run", checkpoint_every=1000))
    process = start(config, environment)
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("step  3/"):
            break
    process.send_signal(number)
    output = finish(process)
    assert "saved; the same command goes on from here" in output
    step = store.latest_step(str(tmp_path / "run"))
    assert step is not None and step >= 3


@pytest.mark.slow
@pytest.mark.parametrize("model", tiny.RUNS)
def test_two_processes_give_the_losses_of_one(model, tmp_path, environment):
    make = tiny.RUNS[model]
    single = start(
        tiny.write_config(tmp_path / "single.py", make(tmp_path / "single")),
        environment,
        "--train.max-steps",
        "4",
    )
    finish(single)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    config = tiny.write_config(tmp_path / "double.py", make(tmp_path / "double"))
    processes = [
        start(
            config,
            environment
            | {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": str(i)},
            "--train.max-steps",
            "4",
        )
        for i in range(2)
    ]
    outputs = [finish(process) for process in processes]
    assert "2 process(es); batch 8 global, 4 per process" in outputs[0]
    assert "step" not in outputs[1]  # only process 0 reports
    one, two = losses(tmp_path / "single"), losses(tmp_path / "double")
    assert one.keys() == two.keys() == {1, 2, 3, 4}
    np.testing.assert_allclose(two[1], one[1], rtol=1e-5)
    np.testing.assert_allclose(list(two.values()), list(one.values()), rtol=1e-3)


@pytest.mark.slow
def test_non_finite_loss_stops_with_step_terms_and_images(tmp_path, monkeypatch):
    config = tiny.config(tmp_path / "run", max_steps=4, checkpoint_every=1)
    original = train_step.set_prediction_loss

    def broken(outputs, targets, config):
        total, terms = original(outputs, targets, config)
        # The third batch holds an image whose loss is not a number.
        wrong = (targets["num_boxes"] == bad_num_boxes).all()
        return total + jax.numpy.where(wrong, jax.numpy.nan, 0.0), terms

    index = load_split(config.data, "train")
    plan = TrainSampler(index, config.data, config.train.batch_size, config.train.seed).plan(2)
    bad_num_boxes = plan.num_boxes
    monkeypatch.setattr(train_step, "set_prediction_loss", broken)
    with pytest.raises(training.NonFiniteLossError) as error:
        training.train(config)
    message = str(error.value)
    assert message.startswith("step 2: the loss or the gradient is not finite: ")
    assert "loss_giou" in message and "loss nan" in message
    assert str(plan.image_id.tolist()) in message
    assert store.steps(str(tmp_path / "run"))[-1] == 2  # two finished steps, both before the bad one


@pytest.mark.slow
def test_training_goes_down_evaluates_and_resumes_a_finished_run(tmp_path, capsys):
    config = tiny.config(tmp_path / "run", epochs=1, eval_every=1, log_every=5)
    scores = training.train(config)
    assert scores is not None and 0 <= scores.AP <= 1
    curve = losses(tmp_path / "run")
    assert min(curve.values()) < 0.8 * curve[5]
    saved = store.read_metadata(str(tmp_path / "run"))
    assert saved["AP"] == pytest.approx(scores.AP)
    assert saved["category_names"] == ["RBC", "WBC", "Platelets"]
    assert saved["config"]["model"]["num_classes"] == 3
    first = capsys.readouterr().out
    assert "8 x cpu in 1 process(es); batch 8 global, 8 per process, 1 per device" in first
    assert "1 boxes without area dropped" in first
    assert training.train(config) == scores  # nothing left to do


def test_learning_rate_groups_and_schedule():
    config = OptimConfig(lr=1.0, backbone_lr_factor=0.1, offsets_lr_factor=0.01, weight_decay=0.0, clip_norm=1e9)
    params = {
        "backbone": {"kernel": np.ones(2, np.float32)},
        "encoder": {"sampling_offsets": {"kernel": np.ones(2, np.float32)}},
        "reference_points": {"bias": np.ones(2, np.float32)},
        "class_embed": {"kernel": np.ones(2, np.float32)},
    }
    optimizer = train_step.make_optimizer(config, total_steps=10)
    state = optimizer.init(params)
    steps = []
    for _ in range(10):
        updates, state = optimizer.update(jax.tree.map(np.ones_like, params), state, params)
        steps.append(jax.tree.map(lambda x: -float(x[0]), updates))
    # Adam's first step is the learning rate itself; constant gradients keep it so (bias correction: float32 noise).
    assert steps[0]["class_embed"]["kernel"] == pytest.approx(1.0, rel=1e-5)
    assert steps[0]["backbone"]["kernel"] == pytest.approx(0.1, rel=1e-5)
    assert steps[0]["encoder"]["sampling_offsets"]["kernel"] == pytest.approx(0.01, rel=1e-5)
    assert steps[0]["reference_points"]["bias"] == pytest.approx(0.01, rel=1e-5)
    assert steps[7]["class_embed"]["kernel"] == pytest.approx(1.0, rel=1e-4)
    assert steps[8]["class_embed"]["kernel"] == pytest.approx(0.1, rel=1e-4)


def test_warmup_rises_linearly():
    factor = train_step.schedule(OptimConfig(warmup_steps=4), 100)
    np.testing.assert_allclose([factor(step) for step in range(6)], [0.2, 0.4, 0.6, 0.8, 1.0, 1.0], rtol=1e-6)


def test_weight_decay_is_decoupled_and_on_everything():
    config = OptimConfig(lr=0.1, weight_decay=0.5)
    params = {"norm": {"scale": np.full(3, 2.0, np.float32)}}
    optimizer = train_step.make_optimizer(config, 10)
    updates, _ = optimizer.update(jax.tree.map(np.zeros_like, params), optimizer.init(params), params)
    np.testing.assert_allclose(optax.apply_updates(params, updates)["norm"]["scale"], 2.0 * (1 - 0.1 * 0.5), rtol=1e-6)


def test_batch_size_must_divide_over_the_devices(tmp_path):
    with pytest.raises(ValueError, match=r"train\.batch_size=6 must be a multiple of the number of devices, 8"):
        training.train(tiny.config(tmp_path, batch_size=6))


def test_resuming_on_other_classes_is_refused(tmp_path):
    """Before anything is compiled: what the checkpoint says of itself is enough."""
    run = tiny.config(tmp_path / "run")
    with store.CheckpointWriter(str(tmp_path / "run/checkpoints")) as writer:
        classes = {"category_ids": [1, 2, 3], "category_names": ["RBC", "WBC", "Platelets"]}
        writer.save(2, {"step": 2}, {"config": dataclasses.asdict(run), **classes})
    annotations = json.loads((Path(run.data.root) / "annotations/instances_train.json").read_text())
    annotations["categories"].append({"id": 9, "name": "parasite"})
    (tmp_path / "more.json").write_text(json.dumps(annotations))
    changed = dataclasses.replace(run.data, train_annotations=str(tmp_path / "more.json"))
    with pytest.raises(ValueError, match=r"classes \(id, name\) changed since its checkpoints: 3 -> 4 classes"):
        training.train(dataclasses.replace(run, data=changed))
