"""Twenty times `kill -9` at random moments of one run: in a step, while a checkpoint is written, in an evaluation."""

import os
import random
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tiny

from detr_jax.checkpoints import store
from detr_jax.metric_writer import read_metrics

ROOT = Path(__file__).parents[2]
TIMES = ("hours", "train/images_per_second", "train/waiting_for_data")


def start(config):
    flags = os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=1")
    return subprocess.Popen(
        [sys.executable, str(ROOT / "train.py"), "--config", str(config)],
        env=os.environ | {"XLA_FLAGS": flags, "PYTHONPATH": str(ROOT)},
        cwd=ROOT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def finish(config):
    process = start(config)
    output, _ = process.communicate(timeout=1200)
    assert process.returncode == 0, output


def tensors(folder):
    from orbax.checkpoint import v1 as ocp

    path = Path(folder) / "checkpoints" / str(store.latest_step(str(folder)))
    saved = ocp.checkpointables_metadata(path).metadata
    zeros = {
        entry: {name: np.zeros(leaf.shape, leaf.dtype) for name, leaf in saved[entry].items()}
        for entry in ("params", "ema", "opt_state", "step")
    }
    loaded = ocp.load_checkpointables(path, zeros)
    return {f"{entry}/{name}": value for entry, leaves in loaded.items() for name, value in leaves.items()}


def numbers(folder):
    records = read_metrics(Path(folder) / "metrics.jsonl")
    return [{name: value for name, value in record.items() if name not in TIMES} for record in records]


@pytest.mark.slow
def test_twenty_kills_change_nothing(tmp_path):
    data = tiny.sixteen_images(tmp_path / "data")

    def config(name):
        run = tiny.fast_config(data, tmp_path / name, epochs=60, eval_every=7, log_every=5, checkpoint_every=3)
        return tiny.write_config(tmp_path / f"{name}.py", run)

    finish(config("whole"))
    killed, moments = config("killed"), random.Random(0)
    for _ in range(20):
        process = start(killed)
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith(("compiled 2/2", "step")):
                break
        time.sleep(moments.uniform(0, 4))
        process.kill()
        process.communicate()
    finish(killed)
    assert numbers(tmp_path / "killed") == numbers(tmp_path / "whole")
    expected, got = tensors(tmp_path / "whole"), tensors(tmp_path / "killed")
    assert expected.keys() == got.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(got[name], value, err_msg=name)
