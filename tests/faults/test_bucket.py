"""A run whose data, checkpoints and metrics are in a bucket, which an emulator of Cloud Storage serves from memory.

It answers late, and every twentieth request fails, as real storage does now and then.
"""

import itertools
import json
import os
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


def train(config, environment, processes=1):
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
    outputs = [process.communicate(timeout=900)[0] for process in both]
    assert [process.returncode for process in both] == [0] * processes, "\n".join(outputs)
    return outputs[0]


def losses(environment, path):
    read = "import sys; from etils import epath; print(epath.Path(sys.argv[1]).read_text())"
    result = subprocess.run(
        [sys.executable, "-c", read, path], env=environment, capture_output=True, text=True, check=True
    )
    records = [json.loads(line) for line in result.stdout.splitlines() if line]
    return {record["step"]: record["train/loss"] for record in records if "train/loss" in record}


def test_a_run_in_a_bucket_by_one_process_and_then_by_two(bucket, tmp_path):
    environment, folder = bucket

    def config(name, data, output_dir, **fields):
        run = tiny.fast_config(data, output_dir, epochs=3, eval_every=0, checkpoint_every=1, **fields)
        return tiny.write_config(tmp_path / f"{name}.py", run)

    train(config("local", folder, tmp_path / "run"), environment)
    train(config("first", "gs://cells/data", "gs://cells/run", max_steps=1), environment)
    output = train(config("second", "gs://cells/data", "gs://cells/run"), environment, processes=2)
    assert "resuming at step 1" in output
    one, other = (losses(environment, f"{where}/metrics.jsonl") for where in (tmp_path / "run", "gs://cells/run"))
    assert one.keys() == other.keys() == {1, 2, 3}
    assert other[1] == one[1]
    # Two processes add their sums in another order; Adam divides small gradients by their own size.
    np.testing.assert_allclose([other[2], other[3]], [one[2], one[3]], rtol=1e-3)
