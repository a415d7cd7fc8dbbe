import json
import math

import jax
import pytest

from detr_jax import metric_writer
from detr_jax.metric_writer import MetricWriter, format_seconds, read_metrics


class Clock:
    """Stands for `time.perf_counter`: time passes when the test says so."""

    now = 1000.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(metric_writer.time, "perf_counter", clock)
    return clock


class Scores:
    def as_dict(self):
        return {"AP": 0.4321, "AP50": 0.75, "AP/RBC": -1.0}


def run(writer, clock, steps, seconds=2.0, **terms):
    """So many steps of so many seconds, a quarter of which waits for data."""
    for step in steps:
        clock.now += seconds
        writer.waited(seconds / 4)
        writer.add(step, {"loss": 10.0 + step, **terms}, images=4)


def test_means_throughput_and_time_left(tmp_path, clock, capsys):
    with MetricWriter(str(tmp_path), 1000, steps_per_epoch=100) as writer:
        clock.now += 500  # compilation of the first step
        run(writer, clock, range(10))
        writer.write(10, lr=2e-4)
        with writer.paused():
            clock.now += 300  # evaluation
        run(writer, clock, range(10, 20))
        writer.write(20, lr=2e-4)
    first, second = read_metrics(tmp_path / "metrics.jsonl")
    assert first["step"] == 10 and first["epoch"] == 0.1
    assert first["train/loss"] == pytest.approx(14.5)  # the mean of 10 ... 19
    assert second["train/loss"] == pytest.approx(24.5)
    for record in (first, second):
        assert record["train/images_per_second"] == pytest.approx(2.0)
        assert record["train/waiting_for_data"] == pytest.approx(0.25)
        assert record["train/lr"] == 2e-4
    assert second["hours"] == pytest.approx(840 / 3600, abs=1e-5)  # 500 + 20 + 300 + 20 s, rounded to 1e-5 h
    lines = capsys.readouterr().out.splitlines()
    assert "step   10/1000  epoch  0.10  loss    14.5" in lines[0]
    assert "2.0 images/s  waiting for data  25%  ETA  0:33:00" in lines[0]  # 990 steps of 2 s
    assert lines[1].endswith("ETA  0:32:40")
    assert len(lines[0]) == len(lines[1])


def test_first_step_alone_gives_no_rate(tmp_path, clock, capsys):
    with MetricWriter(str(tmp_path), 10, steps_per_epoch=5) as writer:
        run(writer, clock, range(1))
        writer.write(1)
    assert "train/images_per_second" not in read_metrics(tmp_path / "metrics.jsonl")[0]
    assert capsys.readouterr().out.rstrip().endswith("- images/s  waiting for data    -  ETA        -")


def test_scores(tmp_path, capsys):
    with MetricWriter(str(tmp_path), 10, steps_per_epoch=5) as writer:
        writer.write_scores(5, Scores())
    record = read_metrics(tmp_path / "metrics.jsonl")[0]
    assert {k: v for k, v in record.items() if k.startswith("val/")} == {
        "val/AP": 0.4321,
        "val/AP50": 0.75,
        "val/AP/RBC": -1.0,
    }
    assert capsys.readouterr().out == "step  5/10  epoch 1.00  AP 0.432  AP50 0.750\n"


def test_resuming_drops_what_was_reported_beyond_the_checkpoint(tmp_path, clock):
    with MetricWriter(str(tmp_path), 100, steps_per_epoch=10) as writer:
        for step in (10, 20, 30):
            run(writer, clock, [step])
            writer.write(step)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 40, "train/lo')  # killed in the middle of a line
    assert [record["step"] for record in read_metrics(tmp_path / "metrics.jsonl")] == [10, 20, 30]
    clock.now += 5000  # nobody noticed for a while
    with MetricWriter(str(tmp_path), 100, steps_per_epoch=10, start_step=20) as writer:
        run(writer, clock, [29])
        writer.write(30)
    records = read_metrics(tmp_path / "metrics.jsonl")
    assert [record["step"] for record in records] == [10, 20, 30]
    assert records[-1]["train/loss"] == 39
    assert records[-1]["hours"] == pytest.approx((2 + 2 + 2) / 3600, abs=1e-5)


def test_not_finite_is_null(tmp_path):
    with MetricWriter(str(tmp_path), 10, steps_per_epoch=5) as writer:
        writer.add(0, {"loss": math.nan, "class_error": 50.0}, images=1)
        writer.write(1)
    text = (tmp_path / "metrics.jsonl").read_text()
    record = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert record["train/loss"] is None and record["train/class_error"] == 50.0


def test_lines_are_there_at_once_and_tensorboard_after_closing(tmp_path):
    with MetricWriter(str(tmp_path), 10, steps_per_epoch=5) as writer:
        writer.add(0, {"loss": 1.0}, images=1)
        writer.write(1)
        assert len(read_metrics(tmp_path / "metrics.jsonl")) == 1
    (events,) = (tmp_path / "tensorboard").iterdir()
    assert b"train/loss" in events.read_bytes()


def test_only_process_0_writes(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    with MetricWriter(str(tmp_path / "run"), 10, steps_per_epoch=5) as writer:
        writer.add(0, {"loss": 1.0}, images=1)
        writer.write(1)
        writer.write_scores(1, Scores())
    assert not (tmp_path / "run").exists()
    assert capsys.readouterr().out == ""


def test_a_broken_line_is_named(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step"\n{"step": 3}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2: not JSON"):
        read_metrics(tmp_path / "metrics.jsonl")


@pytest.mark.parametrize("seconds, text", [(0, "0:00:00"), (59.6, "0:01:00"), (3725, "1:02:05"), (360000, "100:00:00")])
def test_format_seconds(seconds, text):
    assert format_seconds(seconds) == text
