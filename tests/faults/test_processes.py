"""Two processes that agree, stop and fail together."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.slow

PREAMBLE = """
import os, signal, sys, time
import jax
from detr_jax import cli, processes, stall
from detr_jax.errors import DataError
from detr_jax.interruption import interruption

def steps(feed, interrupted=lambda: False):
    return processes.in_step(feed, what=lambda: "images", limit=100, interrupted=interrupted)

def work(number):
    ...

def main(argv):
    processes.start()
    work(jax.process_index())
    print("end", flush=True)
"""


def start(tmp_path, body, number, environment):
    indented = "\n".join(f"    {line}" for line in body.strip().splitlines())
    program = PREAMBLE.replace("    ...", indented) + "\ncli.run(main)\n"
    path = tmp_path / "program.py"
    path.write_text(program)
    return subprocess.Popen(
        [sys.executable, str(path)],
        env=environment | {"JAX_PROCESS_ID": str(number)},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


@pytest.fixture
def environment():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    flags = {"XLA_FLAGS": "", "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    return os.environ | flags | {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}", "JAX_NUM_PROCESSES": "2"}


def run_both(tmp_path, body, environment):
    both = [start(tmp_path, body, number, environment) for number in range(2)]
    outputs = [process.communicate(timeout=500)[0] for process in both]
    return [(process.returncode, output) for process, output in zip(both, outputs, strict=True)]


def test_they_share_agree_and_name_what_differs(tmp_path, environment):
    body = """
print(processes.share("ä" * (number + 1)), flush=True)
processes.agree({"train.seed": "0"})
processes.agree({"train.seed": "0", "data": str(number)})
"""
    for code, output in run_both(tmp_path, body, environment):
        assert "['ä', 'ää']" in output
        assert "error: process 1 has another run than process 0:\n  data=0 in process 0, data=1" in output
        assert code == 1 and "Traceback" not in output


def test_a_bad_image_in_one_stops_both_after_the_same_step(tmp_path, environment):
    body = """
def feed():
    for i in range(20):
        if number == 1 and i == 7:
            raise DataError("bad.jpg: truncated")
        time.sleep(0.01 * number)
        yield i

try:
    for i in steps(feed()):
        print("step", i, flush=True)
except processes.FailedTogether as failure:
    raise failure.cause from None
"""
    (first, output0), (second, output1) = run_both(tmp_path, body, environment)
    assert first == second == 1
    assert output0.count("step") == output1.count("step") == 7
    assert f"error: process 1 on {socket.gethostname()}: DataError: bad.jpg: truncated" in output0
    assert "error: bad.jpg: truncated" in output1


def test_sigterm_to_one_stops_both_after_the_same_step(tmp_path, environment):
    body = """
with interruption() as interrupted:
    try:
        for i in steps(range(1000), interrupted):
            print("step", i, flush=True)
            if number == 1 and i == 5:
                os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.05)
    except stall.Interrupted:
        print("stopped", flush=True)
"""
    (first, output0), (second, output1) = run_both(tmp_path, body, environment)
    assert first == second == 0
    assert "stopped" in output0 and "stopped" in output1
    assert 6 <= output0.count("\nstep ") == output1.count("\nstep ") <= 9


def test_where_one_never_arrives_the_others_say_so_and_end(tmp_path, environment):
    begin = time.monotonic()
    process = start(tmp_path, "pass", 0, environment)
    output, _ = process.communicate(timeout=300)
    assert process.returncode != 0
    assert time.monotonic() - begin < 120
    assert "process 0 of 2, coordinator 127.0.0.1:" in output and "is here and waits for the others" in output


def test_one_that_dies_ends_the_other_which_names_it(tmp_path, environment):
    body = """
try:
    for i in steps(range(1000)):
        print("step", i, flush=True)
        if number == 1 and i == 5:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(0.05)
except Exception as error:
    processes.abort(error)
"""
    begin = time.monotonic()
    (first, output), (second, _) = run_both(tmp_path, body, environment)
    assert second == -signal.SIGKILL and first != 0
    assert time.monotonic() - begin < 150
    assert "tasks are unhealthy (stopped sending heartbeats):\n1\n" in output, output  # its number, says jax
