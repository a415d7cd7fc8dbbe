"""The command that docs/pods.md gives to Slurm, with two processes on this machine and all that saves memory."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import tiny

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.slow

FLAGS = (
    *("--model.dtype", "bfloat16", "--model.remat", "layers", "--train.fsdp", "2", "--train.accumulate", "2"),
    *("--optim.lr-scaling", "sqrt", "--train.interrupted-status", "143"),
)


def start(config):
    """Both processes."""
    slurm = {"SLURM_JOB_ID": str(os.getpid()), "SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": "2"}
    flags = os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=1")
    return [
        subprocess.Popen(
            [sys.executable, str(ROOT / "train.py"), "--config", str(config), *FLAGS],
            env=os.environ
            | slurm
            | {"SLURM_PROCID": number, "SLURM_LOCALID": number, "XLA_FLAGS": flags, "PYTHONPATH": str(ROOT)},
            cwd=ROOT,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        for number in ("0", "1")
    ]


def finish(both):
    outputs = [process.communicate(timeout=1800)[0] for process in both]
    return [process.returncode for process in both], outputs


def test_detected_interrupted_and_resumed(tmp_path):
    data = tiny.sixteen_images(tmp_path / "data")
    run = tiny.fast_config(data, tmp_path / "run", epochs=6, checkpoint_every=1000)
    config = tiny.write_config(tmp_path / "config.py", run)
    both = start(config)
    assert both[0].stdout is not None
    for line in both[0].stdout:
        if re.match(r"step +1/", line):
            break
    both[1].send_signal(signal.SIGTERM)
    codes, outputs = finish(both)
    assert codes == [143, 143], "\n".join(outputs)
    assert "and saved; the same command goes on from here" in outputs[0]
    codes, outputs = finish(start(config))
    assert codes == [0, 0], "\n".join(outputs)
    assert (
        "2 process(es), the state split over 2; batch 8 global, 4 per process, 4 per device, in 2 parts of 2"
        in outputs[0]
    )
    assert re.search(r"resuming at step [1-5]\b", outputs[0]) and re.search(r"step +6/6", outputs[0])
