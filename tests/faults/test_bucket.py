"""A run whose data, checkpoints and metrics are in a bucket, which an emulator of Cloud Storage serves from memory.

It answers late, and every twentieth request fails, as real storage does now and then.
"""

import itertools
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tiny

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.slow


@pytest.fixture
def bucket(monkeypatch, tmp_path):
    """Environment of programs that see the bucket `gs://cells`, with the sixteen images in `data`, and their folder."""
    server_module = pytest.importorskip("gcp_storage_emulator.server")
    numbers = itertools.count(1)

    def unreliable(method):
        def handle(self):
            time.sleep(0.005)
            if next(numbers) % 20 == 0:
                self.rfile.read(int(self.headers.get("Content-Length") or 0))
                self.send_error(503)
            else:
                method(self)

        return handle

    for name in ("do_GET", "do_POST", "do_PUT", "do_DELETE"):
        monkeypatch.setattr(server_module.RequestHandler, name, unreliable(getattr(server_module.RequestHandler, name)))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = server_module.create_server("127.0.0.1", port, in_memory=True, default_bucket="cells")
    server.start()
    address = f"http://127.0.0.1:{port}"
    environment = os.environ | {
        "STORAGE_EMULATOR_HOST": address,
        "TENSORSTORE_GCS_HTTP_URL": address,
        "GOOGLE_CLOUD_PROJECT": "none",
        "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
        "EPATH_USE_TF": "false",
        "PYTHONPATH": str(ROOT),
        "XLA_FLAGS": os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=1"),
    }
    folder = tiny.sixteen_images(tmp_path / "data")
    copy = """
import sys
from etils import epath
for path in epath.Path(sys.argv[1]).glob("*/*"):
    (epath.Path("gs://cells/data") / path.parent.name / path.name).write_bytes(path.read_bytes())
"""
    subprocess.run([sys.executable, "-c", copy, str(folder)], env=environment, check=True)
    yield environment, folder
    server.stop()


def train(config, environment, processes=1, kill_at=None):
    """What process 0 printed; with `kill_at`, all of them are killed (`kill -9`) when it reports that step."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    both = []
    for number in range(processes):
        many = {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}", "JAX_NUM_PROCESSES": str(processes)}
        many["JAX_PROCESS_ID"] = str(number)
        both.append(
            subprocess.Popen(
                [sys.executable, str(ROOT / "train.py"), "--config", str(config)],
                env=environment | (many if processes > 1 else {}),
                cwd=ROOT,
                text=True,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
            )
        )
    if kill_at is not None:
        lines = []
        for line in both[0].stdout:
            lines.append(line)
            if re.match(rf"step +{kill_at}/", line):
                break
        for process in both:
            process.kill()
        outputs = [process.communicate()[0] for process in both]
        assert [process.returncode for process in both] == [-signal.SIGKILL] * processes, "".join(lines + outputs)
        return "".join(lines)
    outputs = [process.communicate(timeout=1800)[0] for process in both]
    assert [process.returncode for process in both] == [0] * processes, "\n".join(outputs)
    return outputs[0]


def losses(environment, path):
    read = "import sys; from etils import epath; print(epath.Path(sys.argv[1]).read_text())"
    result = subprocess.run(
        [sys.executable, "-c", read, path], env=environment, capture_output=True, text=True, check=True
    )
    records = [json.loads(line) for line in result.stdout.splitlines() if line]
    return {record["step"]: record["train/loss"] for record in records if "train/loss" in record}


def test_a_run_in_a_bucket_killed_and_resumed_by_two_processes_and_then_by_four(bucket, tmp_path):
    environment, folder = bucket

    def config(name, data, output_dir):
        run = tiny.fast_config(data, output_dir, epochs=6, eval_every=3, checkpoint_every=1)
        return tiny.write_config(tmp_path / f"{name}.py", run)

    train(config("local", folder, tmp_path / "run"), environment)
    in_bucket = config("bucket", "gs://cells/data", "gs://cells/run")
    train(in_bucket, environment, kill_at=3)
    second = train(in_bucket, environment, processes=2, kill_at=5)
    third = train(in_bucket, environment, processes=4)
    resumed = [int(re.search(r"resuming at step (\d)", output)[1]) for output in (second, third)]
    # A step is reported before it is saved, and saving waits for the save before: that of two steps ago is finished.
    assert resumed[0] in (1, 2, 3) and resumed[1] in (3, 4, 5)
    one, other = (losses(environment, f"{where}/metrics.jsonl") for where in (tmp_path / "run", "gs://cells/run"))
    assert one.keys() == other.keys() == {1, 2, 3, 4, 5, 6}
    # More processes add their sums in another order; Adam divides small gradients by their own size.
    for step, loss in one.items():
        assert other[step] == loss if step <= resumed[0] else np.isclose(other[step], loss, rtol=1e-3), step
