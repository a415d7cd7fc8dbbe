"""Two writers, damaged checkpoints, a full disk, storage that does not answer: without a model."""

import errno
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from etils import epath

from detr_jax import processes, resuming, run_folder, stall
from detr_jax.checkpoints import checksums, store
from detr_jax.errors import UserError
from detr_jax.interruption import interruption
from detr_jax.metric_writer import MetricWriter, read_metrics

ROOT = Path(__file__).parents[2]


def save_all(directory, numbers=(1, 2, 3), **metadata):
    with store.CheckpointWriter(str(directory / "checkpoints"), keep_last=5) as writer:
        for step in numbers:
            writer.save(step, {"params": {"x": np.full(300, step, np.float32)}}, metadata)


def test_a_second_run_on_a_folder_is_refused_and_a_killed_one_leaves_it_free(tmp_path):
    program = """
import sys, time
from etils import epath
from detr_jax import run_folder
with run_folder.lock(epath.Path(sys.argv[1])):
    print("locked", flush=True)
    time.sleep(60)
"""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", program, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment) as first:
        assert first.stdout is not None and first.stdout.readline() == b"locked\n"
        with (
            pytest.raises(run_folder.FolderInUseError, match=rf"in use by process {first.pid} on "),
            run_folder.lock(epath.Path(tmp_path)),
        ):
            pass
        first.send_signal(signal.SIGKILL)
    with run_folder.lock(epath.Path(tmp_path)):  # the kernel gave it back
        pass


def test_a_lock_in_a_bucket_is_taken_over_once_it_stands_still(tmp_path, monkeypatch):
    monkeypatch.setattr(run_folder, "_BEAT", 0.05)
    path = epath.Path(tmp_path) / "lock"
    with (
        run_folder._signs_of_life(path),
        pytest.raises(run_folder.FolderInUseError, match=f"process {os.getpid()} on "),
        run_folder._signs_of_life(path),
    ):
        pass
    assert not path.exists()
    path.write_text(json.dumps({"who": "process 1 on a host that is gone", "token": "x", "beat": 3}))
    with run_folder._signs_of_life(path):
        assert "a host that is gone" not in path.read_text()


def test_the_other_processes_must_see_the_folder(tmp_path, monkeypatch):
    token = run_folder.leave_token(epath.Path(tmp_path))
    run_folder.check_token(epath.Path(tmp_path), token)
    monkeypatch.setattr(run_folder.time, "sleep", lambda seconds: None)
    with pytest.raises(UserError, match="All hosts need the same one"):
        run_folder.check_token(epath.Path(tmp_path), "of another folder")


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def data_file(folder):
    return max((path for path in folder.rglob("d/*") if path.is_file()), key=lambda path: path.stat().st_size)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: flip(data_file(folder)), "has changed since it was written"),
        (lambda folder: flip(folder / "_CHECKPOINT_METADATA"), "_CHECKPOINT_METADATA has changed"),
        (lambda folder: data_file(folder).write_bytes(b""), "has changed since it was written"),
        (lambda folder: data_file(folder).unlink(), "is missing"),
        (lambda folder: [path.unlink() for path in folder.rglob("*") if path.is_file()], "it was not finished"),
        (lambda folder: flip(folder / checksums.FILE), "checksums|is missing|has changed"),
    ],
    ids=["one bit", "one bit of the metadata", "emptied file", "missing file", "no files", "one bit of the checksums"],
)
def test_a_damaged_newest_checkpoint_falls_back_to_the_one_before(tmp_path, capsys, damage, message):
    save_all(tmp_path)
    damage(tmp_path / "checkpoints" / "3")
    (tmp_path / "checkpoints" / "notes").mkdir()  # a stray folder, and one that looks like a checkpoint
    assert resuming.choose_checkpoint(epath.Path(tmp_path), None) == 2
    said = capsys.readouterr().out
    assert "the checkpoint of step 3 cannot be used: " in said and "going on from step 2" in said
    assert [part for part in message.split("|") if part in said]
    assert store.steps(str(tmp_path)) == [1, 2]
    assert (tmp_path / "checkpoints" / "3.damaged").is_dir()
    save_all(tmp_path, [3])  # the step is free again
    assert store.steps(str(tmp_path)) == [1, 2, 3]


def test_damage_is_never_restored(tmp_path):
    save_all(tmp_path, [1])
    flip(data_file(tmp_path / "checkpoints" / "1" / "params"))
    with pytest.raises(UserError, match=r"1 is damaged: params/.* has changed .*has no other"):
        store.restore(str(tmp_path), {"params": {"x": np.zeros(300, np.float32)}})
    with pytest.raises(UserError, match="no checkpoint is intact"):
        resuming.choose_checkpoint(epath.Path(tmp_path), None)
    assert store.steps(str(tmp_path)) == [1]  # nothing was renamed


def test_sha256sum_verifies_a_checkpoint(tmp_path):
    save_all(tmp_path, [1])
    command = ["sha256sum", "--check", "--quiet", checksums.FILE]
    subprocess.run(command, cwd=tmp_path / "checkpoints" / "1", check=True)


def test_going_back_to_a_step(tmp_path, capsys):
    save_all(tmp_path, config={"train": {}})
    folder = epath.Path(tmp_path)
    with pytest.raises(UserError, match=r"got 7, but .* has checkpoints of steps: 1, 2, 3"):
        resuming.choose_checkpoint(folder, 7)
    assert resuming.choose_checkpoint(folder, 1) == 1
    assert store.steps(str(tmp_path)) == [1]
    assert "3.discarded now" in capsys.readouterr().out
    save_all(tmp_path, [2], config={"train": {"resume_from": 1}})
    assert resuming.choose_checkpoint(folder, 1) == 2  # the same command goes on


def test_saving_leaks_neither_files_nor_threads(tmp_path):
    def held():
        return len(os.listdir("/proc/self/fd")), threading.active_count()

    with store.CheckpointWriter(str(tmp_path), keep_last=1) as writer:
        counts = []
        for step in range(5):
            writer.save(step, {"params": {"x": np.ones(3)}}, {})
            writer.wait()
            counts.append(held())
    assert counts[-1] == counts[1]


def test_a_full_disk_ends_the_metrics_at_once(tmp_path):
    (tmp_path / "metrics.jsonl.tmp").symlink_to("/dev/full")
    with MetricWriter(str(tmp_path), 10, steps_per_epoch=5) as writer:
        writer.add(0, {"loss": 1.0}, images=1)
        with pytest.raises(OSError, match="No space left on device") as error:
            writer.write(1)
    assert error.value.errno == errno.ENOSPC


def test_a_full_disk_is_named_by_the_checkpoint(tmp_path, monkeypatch):
    def full(folder):
        raise OSError(errno.ENOSPC, "No space left on device")

    save_all(tmp_path, [1])
    monkeypatch.setattr(checksums, "write", full)
    message = "the checkpoint of step 2 could not be written: no space left on device; the newest one is of step 1"
    with (
        pytest.raises(OSError, match=message),
        store.CheckpointWriter(str(tmp_path / "checkpoints"), keep_last=5) as writer,
    ):
        writer.save(2, {"params": {"x": np.ones(300, np.float32)}}, {})
    assert store.newest_intact(str(tmp_path))[0] == 1


@pytest.mark.parametrize("stalling", ["begin", "end"])
def test_a_save_that_stalls_is_an_error_that_names_it(tmp_path, monkeypatch, stalling):
    release = threading.Event()
    begin = store.ocp.training.Checkpointer.save_checkpointables_async

    def stalled(*args, **kwargs):
        release.wait(60)
        return begin(*args, **kwargs) if stalling == "begin" else None

    state = {"params": {"x": np.ones(300, np.float32)}}
    try:
        if stalling == "begin":
            monkeypatch.setattr(store.ocp.training.Checkpointer, "save_checkpointables_async", stalled)
        else:
            monkeypatch.setattr(checksums, "write", stalled)
        with store.CheckpointWriter(str(tmp_path), timeout=0.5) as writer:
            with pytest.raises(stall.StalledError, match="storage did not answer") as error:
                writer.save(1, state, {})
                writer.wait()
            assert str(tmp_path / "1") in error.value.filename
            with pytest.raises(stall.StalledError, match="an earlier save has not ended"):
                writer.save(2, state, {})
    finally:
        release.set()
        for thread in threading.enumerate():
            if thread.name in ("storage", "checkpoint"):
                thread.join()


def test_the_first_signal_asks_and_the_second_one_ends_as_usual():
    ended = []
    usual = signal.signal(signal.SIGTERM, lambda *args: ended.append(args))
    try:
        with interruption() as interrupted:
            assert not interrupted()
            signal.raise_signal(signal.SIGTERM)
            assert interrupted() and not ended
            signal.raise_signal(signal.SIGTERM)
            assert ended
    finally:
        signal.signal(signal.SIGTERM, usual)


def test_a_full_disk_for_real():
    program = """
import numpy as np
from detr_jax import cli
from detr_jax.checkpoints import store
def main(argv):
    with store.CheckpointWriter("/mnt/run", keep_last=9) as writer:
        for step in range(9):
            writer.save(step, {"params": {"x": np.random.default_rng(step).random(100_000)}}, {})
cli.run(main)
"""
    mount = ["unshare", "-rm", "sh", "-c", 'mount -t tmpfs -o size=3m tmpfs /mnt && exec "$0" "$@"']
    if subprocess.run([*mount, "true"], capture_output=True, check=False).returncode:
        pytest.skip("mounting needs user namespaces")
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    result = subprocess.run(
        [*mount, sys.executable, "-c", program],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == 1
    assert "could not be written: no space left on device; the newest one is of step" in result.stderr
    assert "Traceback" not in result.stderr


def test_storage_that_does_not_answer_is_a_warning_and_then_an_error(capsys):
    def nothing(seconds):
        raise queue.Empty

    start = time.monotonic()
    with pytest.raises(stall.StalledError, match="storage did not answer") as error:
        stall.wait_for(nothing, lambda: "a.jpg, b.jpg", 0.4)
    assert error.value.filename == "a.jpg, b.jpg"
    assert time.monotonic() - start < 5
    assert capsys.readouterr().out.count("warning: nothing from storage") == 1
    with pytest.raises(stall.Interrupted):
        stall.wait_for(nothing, lambda: "", 60, lambda: True)


def steps_of(feed, *, interrupted=lambda: False, limit=60.0):
    return processes.in_step(feed, what=lambda: "images", limit=limit, interrupted=interrupted)


def test_batches_stop_after_a_step_that_was_finished():
    assert list(steps_of([1, 2, 3])) == [1, 2, 3]

    def failing():
        yield from (1, 2)
        raise UserError("bad.jpg: truncated")

    done = []
    with pytest.raises(processes.FailedTogether, match=r"bad\.jpg") as error:
        done.extend(steps_of(failing()))
    assert isinstance(error.value.cause, UserError)

    taken = []
    with pytest.raises(stall.Interrupted):
        for element in steps_of(iter(range(100)), interrupted=lambda: len(taken) >= 3):
            taken.append(element)
    assert 3 <= len(taken) <= 4


def test_an_interruption_is_noticed_while_storage_stalls():
    release = threading.Event()

    def stalled():
        yield 1
        release.wait()

    taken = []
    start = time.monotonic()
    with pytest.raises(stall.Interrupted):
        for element in steps_of(stalled(), interrupted=lambda: time.monotonic() > start + 0.3):
            taken.append(element)
    release.set()
    assert time.monotonic() - start < 10


def test_the_terms_of_an_unfinished_interval_survive(tmp_path):
    with MetricWriter(str(tmp_path), 10, steps_per_epoch=5) as writer:
        writer.add(0, {"loss": 1.0}, images=1)
        interval = json.loads(json.dumps(writer.interval()))
    with MetricWriter(str(tmp_path), 10, steps_per_epoch=5, start_step=1, interval=interval) as writer:
        writer.add(1, {"loss": 2.0}, images=1)
        writer.write(2)
    assert [record["train/loss"] for record in read_metrics(tmp_path / "metrics.jsonl")] == [1.5]


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"JAX_NUM_PROCESSES": "2"}, "JAX_NUM_PROCESSES set, but not JAX_COORDINATOR_ADDRESS, JAX_PROCESS_ID"),
        (
            {"JAX_COORDINATOR_ADDRESS": "localhost:1", "JAX_NUM_PROCESSES": "two", "JAX_PROCESS_ID": "0"},
            "JAX_NUM_PROCESSES: got 'two', expected a number",
        ),
    ],
)
def test_half_of_the_variables_of_many_processes(monkeypatch, variables, message):
    for name in ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(processes.ProcessError, match=message):
        processes.start()
