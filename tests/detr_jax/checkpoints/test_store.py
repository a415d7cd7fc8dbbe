import os
import signal
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from detr_jax import sharding
from detr_jax.checkpoints import store


def make_state(seed=0):
    """A state as training has it: nested dicts, lists, bfloat16, optax's named tuples, an integer."""
    rng = np.random.default_rng(seed)
    params = {
        "backbone": {"kernel": jnp.asarray(rng.normal(size=(8, 3)), jnp.float32)},
        "layers": [{"bias": jnp.asarray(rng.normal(size=8), jnp.bfloat16)}, {"bias": jnp.arange(5)}],
    }
    opt_state = optax.chain(optax.clip(1.0), optax.adamw(1e-3)).init(params)
    return {"params": params, "opt_state": opt_state, "step": seed}


def assert_equal(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert np.asarray(a).dtype == np.asarray(b).dtype
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def save_all(directory, aps, **kwargs):
    with store.CheckpointWriter(str(directory), **kwargs) as writer:
        for step, ap in aps.items():
            assert writer.save(step, {"params": {"x": np.full(3, step)}}, {}, ap=ap)


def test_round_trip_is_exact_whatever_the_containers(tmp_path):
    state = make_state(7)
    metadata = {
        "config": {"scales": (480, 800), "lr": 2e-4},
        "category_ids": [1, 90],
        "names": ["Zellkern ä"],
        "seed": 3,
    }
    with store.CheckpointWriter(str(tmp_path)) as writer:
        assert writer.save(12, state, metadata, ap=0.25)
    assert_equal(store.restore(str(tmp_path), make_state(1)), state)
    assert store.read_metadata(str(tmp_path)) == {
        "config": {"scales": [480, 800], "lr": 2e-4},
        "category_ids": [1, 90],
        "names": ["Zellkern ä"],
        "seed": 3,
        "step": 12,
        "AP": 0.25,
        "scores": {"AP": 0.25},
        "entries": ["opt_state", "params", "step"],
    }


def test_parameters_alone_without_devices_or_the_optimizer(tmp_path):
    state = make_state()
    with store.CheckpointWriter(str(tmp_path)) as writer:
        writer.save(1, state, {})
    abstract = jax.eval_shape(lambda: state["params"])
    restored = store.restore(str(tmp_path), {"params": abstract})
    assert list(restored) == ["params"]
    assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(restored))
    assert_equal(restored["params"], state["params"])


@pytest.mark.parametrize("devices", [1, 4])
def test_saved_on_eight_devices_restored_on_fewer(tmp_path, devices):
    eight, fewer = sharding.make_mesh(8), sharding.make_mesh(devices)
    split, whole = jax.P("data"), jax.P()
    values = {"split": np.arange(64.0, dtype=np.float32).reshape(16, 4), "whole": np.arange(5)}
    specs = {"split": split, "whole": whole}
    saved = {k: jax.device_put(v, jax.sharding.NamedSharding(eight, specs[k])) for k, v in values.items()}
    with store.CheckpointWriter(str(tmp_path)) as writer:
        writer.save(1, {"params": saved}, {})
    abstract = {
        k: jax.ShapeDtypeStruct(v.shape, v.dtype, sharding=jax.sharding.NamedSharding(fewer, specs[k]))
        for k, v in saved.items()
    }
    restored = store.restore(str(tmp_path), {"params": abstract})["params"]
    assert_equal(restored, saved)
    for name, array in restored.items():
        assert array.sharding == abstract[name].sharding


def test_a_save_during_a_save_is_not_lost_and_the_state_may_be_donated(tmp_path):
    step = jax.jit(lambda x: x + 1, donate_argnums=0)
    x = jnp.zeros((1000, 500))
    with store.CheckpointWriter(str(tmp_path), keep_last=4) as writer:
        for number in range(1, 5):
            x = step(x)
            assert writer.save(number, {"params": {"x": x}}, {})
    assert store.steps(str(tmp_path)) == [1, 2, 3, 4]
    for number in range(1, 5):
        restored = store.restore(str(tmp_path), {"params": {"x": x}}, number)
        np.testing.assert_array_equal(restored["params"]["x"], np.full((1000, 500), number))


def test_keeps_the_last_and_the_best(tmp_path):
    save_all(tmp_path, {1: 0.1, 2: 0.5, 3: 0.5, 4: None, 5: 0.2, 6: None}, keep_last=2, keep_best=1)
    assert store.steps(str(tmp_path)) == [3, 5, 6]
    assert store.latest_step(str(tmp_path)) == 6
    assert store.read_metadata(str(tmp_path), "best")["step"] == 3
    save_all(tmp_path, {7: 0.6, 8: None}, keep_last=1, keep_best=2)  # another run goes on
    assert store.steps(str(tmp_path)) == [3, 7, 8]


def test_the_best_of_equal_scores_is_the_newest(tmp_path):
    save_all(tmp_path, {1: 0.5, 2: 0.5, 3: 0.1}, keep_last=3)
    assert store.steps(str(tmp_path)) == [1, 2, 3]
    assert store.read_metadata(str(tmp_path), "best")["step"] == 2


def test_only_the_last(tmp_path):
    save_all(tmp_path, {1: 0.9, 2: 0.1, 3: None}, keep_last=1, keep_best=0)
    assert store.steps(str(tmp_path)) == [3]


def test_a_step_that_is_saved_is_left_as_it_is(tmp_path):
    with store.CheckpointWriter(str(tmp_path)) as writer:
        assert writer.save(1, {"params": {"x": np.ones(2)}}, {"first": True})
        assert not writer.save(1, {"params": {"x": np.zeros(2)}}, {"first": False})
    assert store.read_metadata(str(tmp_path))["first"]


def test_a_half_written_checkpoint_is_ignored_and_removed(tmp_path):
    save_all(tmp_path, {1: None})
    partial = tmp_path / "2.orbax-checkpoint-tmp"
    (partial / "params").mkdir(parents=True)
    (partial / "params" / "_METADATA").write_text("{")
    assert store.latest_step(str(tmp_path)) == 1
    assert store.read_metadata(str(tmp_path))["step"] == 1
    assert partial.exists()  # readers touch nothing: a run may be writing it
    save_all(tmp_path, {2: None})
    assert store.steps(str(tmp_path)) == [1, 2]
    assert not partial.exists()


def test_kill_while_saving_leaves_the_finished_checkpoint(tmp_path):
    program = """
import sys, numpy as np
from detr_jax.checkpoints.store import CheckpointWriter
writer = CheckpointWriter(sys.argv[1], keep_last=1)
writer.save(1, {"params": {"x": np.full((2000, 2000), 1)}}, {})
writer.wait()
print("saved", flush=True)
step = 1
while True:
    step += 1
    writer.save(step, {"params": {"x": np.full((2000, 2000), step)}}, {})
"""
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[3])}
    process = subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=environment,
    )
    assert process.stdout is not None
    with process.stdout:
        assert process.stdout.readline() == b"saved\n"
        # The next save is under way about now; wherever it stands, a finished checkpoint must be there.
        process.send_signal(signal.SIGKILL)
        process.wait()
    latest = store.latest_step(str(tmp_path))
    assert latest is not None
    restored = store.restore(str(tmp_path), {"params": {"x": jax.ShapeDtypeStruct((2000, 2000), int)}})
    assert (restored["params"]["x"] == latest).all()
    save_all(tmp_path, {latest + 1: None})
    assert store.latest_step(str(tmp_path)) == latest + 1


def test_finds_checkpoints_from_the_run_or_from_one_of_them(tmp_path):
    save_all(tmp_path / "checkpoints", {3: 0.5, 4: 0.1})
    assert store.latest_step(str(tmp_path)) == 4
    assert store.read_metadata(str(tmp_path))["step"] == 4
    assert store.read_metadata(str(tmp_path / "checkpoints" / "3"))["step"] == 3


def test_says_what_is_there_instead_of_a_checkpoint(tmp_path):
    assert store.latest_step(str(tmp_path / "nothing")) is None
    with pytest.raises(FileNotFoundError, match=r"no checkpoint \(latest\) in .*nothing: it does not exist"):
        store.read_metadata(str(tmp_path / "nothing"))
    with pytest.raises(FileNotFoundError, match="it is empty"):
        store.read_metadata(str(tmp_path))
    (tmp_path / "notes.txt").touch()
    with pytest.raises(FileNotFoundError, match=r"it holds notes\.txt"):
        store.restore(str(tmp_path), {})
    save_all(tmp_path, {1: None, 2: None})
    with pytest.raises(FileNotFoundError, match=r"of step 7 in .*: it holds steps 1, 2$"):
        store.read_metadata(str(tmp_path), 7)
    with pytest.raises(FileNotFoundError, match=r"\(best\) .*: it holds steps 1, 2, saved without AP"):
        store.read_metadata(str(tmp_path), "best")


def test_names_the_tensors_that_do_not_fit(tmp_path):
    with store.CheckpointWriter(str(tmp_path)) as writer:
        writer.save(1, {"params": {"head": {"kernel": np.zeros((256, 91), np.float32)}, "old": np.zeros(2)}}, {})
    wanted = {
        "head": {"kernel": jax.ShapeDtypeStruct((256, 3), jnp.float32)},
        "new": [jax.ShapeDtypeStruct((4,), jnp.bfloat16)],
    }
    with pytest.raises(ValueError, match="entry 'params': 3 of 3 tensors do not fit") as error:
        store.restore(str(tmp_path), {"params": wanted})
    for line in (
        "head/kernel: float32 [256, 91] in the checkpoint, float32 [256, 3] expected",
        "new/0: nothing in the checkpoint, bfloat16 [4] expected",
        "old: float64 [2] in the checkpoint, nothing expected",
    ):
        assert line in str(error.value)


def test_metadata_must_be_json(tmp_path):
    with store.CheckpointWriter(str(tmp_path)) as writer, pytest.raises(TypeError):
        writer.save(1, {"params": {"x": np.ones(2)}}, {"model": object()})


def test_keep_nothing_is_refused(tmp_path):
    with pytest.raises(ValueError, match="keep_last must be at least 1"):
        store.CheckpointWriter(str(tmp_path), keep_last=0)
