"""What a run reports: one console line per interval, `metrics.jsonl` and TensorBoard scalars, under the same names."""

import contextlib
import json
import math
import socket
import struct
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import jax
from etils import epath
from tensorboardX.proto import event_pb2
from tensorboardX.record_writer import masked_crc32c
from tensorboardX.summary import scalar

from detr_jax.errors import UserError

_Event: Any = event_pb2.Event  # pyright: ignore[reportAttributeAccessIssue]
_SessionLog: Any = event_pb2.SessionLog  # pyright: ignore[reportAttributeAccessIssue]
_UPLOAD_SECONDS = 30  # between two uploads of a file that grows in a bucket


class _Scores(Protocol):
    def as_dict(self) -> dict[str, float]: ...


class MetricWriter:
    """Writes `output_dir/metrics.jsonl` and `output_dir/tensorboard/`, and prints. Only process 0 does either.

    Training scalars are named `train/...`, scores `val/...`. Every line of `metrics.jsonl` also holds `step` (finished
    training steps), `epoch` and `hours` (wall clock of the run, interruptions left out). Values that are not finite are
    null there, and left out of TensorBoard.

    Throughput and ETA count from the first finished step on, so without its compilation, and without what is `paused`.

    Args:
        output_dir: created if need be; also in a bucket (`gs://...`).
        total_steps: of the whole run.
        steps_per_epoch: for the epoch shown.
        start_step: finished steps of the checkpoint that the run resumes from. What a killed run reported beyond it is
            dropped, so that every step has one line; its scores are dropped too, and reported again.
        interval: of the checkpoint that the run resumes from; see `interval`.
        shown: the terms that the console shows, in this order.
    """

    def __init__(
        self,
        output_dir: str | epath.Path,
        total_steps: int,
        *,
        steps_per_epoch: int,
        start_step: int = 0,
        interval: Mapping[str, Sequence[float]] | None = None,
        shown: Sequence[str] = ("loss", "loss_ce", "loss_bbox", "loss_giou", "class_error", "grad_norm"),
    ):
        self._total_steps = total_steps
        self._steps_per_epoch = steps_per_epoch
        self._shown = shown
        self._terms: defaultdict[str, list[float]] = defaultdict(list)
        for name, values in (interval or {}).items():
            self._terms[name] += values
        self._throughput = _Throughput()
        self._file = self._tensorboard = None
        past_hours = 0.0
        if jax.process_index() == 0:
            folder = epath.Path(output_dir)
            folder.mkdir(parents=True, exist_ok=True)
            kept, past_hours = _keep_until(folder / "metrics.jsonl", start_step)
            self._file = _GrowingFile(folder / "metrics.jsonl", kept)
            (folder / "tensorboard").mkdir(exist_ok=True)
            name = f"events.out.tfevents.{time.time():.0f}.{socket.gethostname()}"
            self._tensorboard = _GrowingFile(folder / "tensorboard" / name, b"")
            self._write_event(_Event(file_version="brain.Event:2"))
            # What an earlier writer reported from this step on is hidden.
            self._write_event(_Event(step=start_step + 1, session_log=_SessionLog(status=_SessionLog.START)))
        self._start = time.perf_counter() - 3600 * past_hours

    def add(self, step: int, terms: Mapping[str, float], *, images: int) -> None:
        """Takes the results of a finished step: loss terms, the gradient's norm; `write` reports their means.

        Args:
            step: the step, counted from 0.
            terms: numbers by name.
            images: global batch size.
        """
        for name, value in terms.items():
            self._terms[name].append(float(value))
        self._throughput.add(images, time.perf_counter())

    def waited(self, seconds: float) -> None:
        """Time that a step waited for its data: its share of the whole is reported."""
        self._throughput.waited += seconds

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Around what is not training, such as evaluation and compilation: does not count in images/s and the ETA."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self._throughput.paused += time.perf_counter() - start

    def write(self, step: int, **scalars: float) -> None:
        """Reports the interval since the last call: the terms' means, the throughput, and `scalars` such as `lr`.

        Args:
            step: finished training steps.
            **scalars: numbers.
        """
        means = {name: sum(values) / len(values) for name, values in self._terms.items()}
        self._terms.clear()
        rates = self._throughput.interval(time.perf_counter())
        self._record(step, "train", means | rates | {name: float(value) for name, value in scalars.items()})
        parts = [f"{name.removeprefix('loss_')} {means[name]:7.4g}" for name in self._shown if name in means]
        parts += [f"{name} {value:.1e}" for name, value in scalars.items()]
        if rates:
            parts.append(f"{rates['images_per_second']:6.1f} images/s")
            parts.append(f"waiting for data {rates['waiting_for_data']:4.0%}")
        else:
            parts += ["     - images/s", "waiting for data    -"]
        seconds = self._throughput.seconds_per_step
        parts.append(f"ETA {'-' if seconds is None else format_seconds((self._total_steps - step) * seconds):>8}")
        self._print(step, parts)

    def write_scores(self, step: int, scores: _Scores, shown: Sequence[str] = ("AP", "AP50", "AP75")) -> None:
        """Reports an evaluation after `step` training steps; the console shows the scores named in `shown`."""
        values = scores.as_dict()
        self._record(step, "val", values)
        self._print(step, [f"{name} {values[name]:.3f}" for name in shown if name in values])

    def interval(self) -> dict[str, list[float]]:
        """The terms since the last `write`: saved with a checkpoint, they make the next line whole after a restart."""
        return {name: list(values) for name, values in self._terms.items()}

    def flush(self) -> None:
        """Uploads what is not in the bucket yet; on a local disk everything is there at once."""
        if self._file is not None and self._tensorboard is not None:
            self._file.flush()
            self._tensorboard.flush()

    def close(self) -> None:
        """Closes the files."""
        if self._file is not None and self._tensorboard is not None:
            self._file.close()
            self._tensorboard.close()

    def __enter__(self) -> "MetricWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _print(self, step: int, parts: Sequence[str]) -> None:
        if self._file is not None:
            epoch, epochs = f"{step / self._steps_per_epoch:.2f}", f"{self._total_steps / self._steps_per_epoch:.2f}"
            head = f"step {step:{len(str(self._total_steps))}}/{self._total_steps}  epoch {epoch:>{len(epochs)}}"
            print("  ".join([head, *parts]), flush=True)

    def _record(self, step: int, kind: str, scalars: Mapping[str, float]) -> None:
        if self._file is None:
            return
        hours = (time.perf_counter() - self._start) / 3600
        record: dict[str, Any] = {
            "step": step,
            "epoch": round(step / self._steps_per_epoch, 4),
            "hours": round(hours, 5),
        }
        for name, value in scalars.items():
            finite = math.isfinite(value)
            record[f"{kind}/{name}"] = value if finite else None
            if finite:
                self._write_event(_Event(step=step, summary=scalar(f"{kind}/{name}", value)))
        self._file.write(json.dumps(record).encode() + b"\n")

    def _write_event(self, event: Any) -> None:
        """Writes at once, in TensorBoard's format. (tensorboardX's own writer waits for ever when the disk is full.)"""
        event.wall_time = time.time()
        data = event.SerializeToString()
        length = struct.pack("<Q", len(data))
        crcs = (struct.pack("<I", masked_crc32c(part)) for part in (length, data))
        if self._tensorboard is not None:
            self._tensorboard.write(length + next(crcs) + data + next(crcs))


class _GrowingFile:
    """A file that is appended to. Objects in a bucket cannot grow: there it is written anew, at most every 30 s."""

    def __init__(self, path: epath.Path, content: bytes):
        self._path, self._local = path, None
        self._content, self._uploaded = bytearray(), 0.0
        if "://" in str(path):
            self.write(content)
        else:
            temporary = path.with_name(f"{path.name}.tmp")
            self._local = open(temporary, "wb", buffering=0)  # noqa: SIM115
            self.write(content)
            temporary.replace(path)  # killed before this, a run still has the file as it was

    def write(self, data: bytes) -> None:
        """Appends.

        Raises:
            OSError: the disk is full, say.
        """
        if self._local is None:
            self._content += data
            if time.monotonic() > self._uploaded + _UPLOAD_SECONDS:
                self.flush()
            return
        while data:
            data = data[self._local.write(data) :]

    def flush(self) -> None:
        if self._local is None:
            self._path.write_bytes(bytes(self._content))
            self._uploaded = time.monotonic()

    def close(self) -> None:
        self.flush()
        if self._local is not None:
            self._local.close()


def read_metrics(path: str | epath.PathLike) -> list[dict[str, Any]]:
    """The lines of a `metrics.jsonl`, in the order written. A half-written last line (a killed run) is left out.

    Raises:
        ValueError: a line that is not JSON; names the file and the line.
    """
    records = []
    lines = epath.Path(path).read_text().splitlines(keepends=True)
    for number, line in enumerate(lines, 1):
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError as error:
            if number < len(lines) or line.endswith("\n"):
                raise UserError(f"{path}, line {number}: not JSON ({error})") from error
    return records


def format_seconds(seconds: float) -> str:
    """`h:mm:ss`."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}"


class _Throughput:
    """Counts images and time from the first finished step on."""

    def __init__(self):
        self.waited = self.paused = 0.0
        self.seconds_per_step: float | None = None
        """Smoothed over some intervals."""
        self._steps = self._images = 0
        self._since: float | None = None

    def add(self, images: int, now: float) -> None:
        """A step of so many images is finished."""
        if self._since is None:
            self._restart(now)
        else:
            self._steps += 1
            self._images += images

    def interval(self, now: float) -> dict[str, float]:
        """Rates since the last call; empty if no step counts."""
        rates = {}
        if self._since is not None:
            seconds = max(now - self._since - self.paused, 1e-9)
            if self._steps:
                latest, smoothed = seconds / self._steps, self.seconds_per_step
                self.seconds_per_step = latest if smoothed is None else 0.7 * smoothed + 0.3 * latest
                waiting = min(self.waited / seconds, 1.0)
                rates = {"images_per_second": self._images / seconds, "waiting_for_data": waiting}
            self._restart(now)
        return rates

    def _restart(self, now: float) -> None:
        self._since = now
        self._steps = self._images = 0
        self.waited = self.paused = 0.0


def _keep_until(path: epath.Path, step: int) -> tuple[bytes, float]:
    """The lines up to `step`, without its scores, and the hours of the last one."""
    if not path.exists():
        return b"", 0.0
    records = read_metrics(path)
    kept = [record for record in records if record["step"] < step or (record["step"] == step and not _is_score(record))]
    return "".join(json.dumps(record) + "\n" for record in kept).encode(), kept[-1]["hours"] if kept else 0.0


def _is_score(record: Mapping[str, Any]) -> bool:
    return any(name.startswith("val/") for name in record)
