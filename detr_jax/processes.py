"""The processes of a run on many hosts: they start, agree, stop and fail together.

A run on one host has one process, for which all of this is nothing.
"""

import contextlib
import os
import queue
import re
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from typing import Any, NoReturn, TypeVar

import jax
import numpy as np

from detr_jax.errors import UserError
from detr_jax.stall import Interrupted, wait_for

T = TypeVar("T")
_START_SECONDS = 60  # until a process that has not arrived is named
_HEARTBEAT_SECONDS = 30  # until a process that died is named
_INTERRUPTED = "interrupted"
_VARIABLES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")


class ProcessError(UserError):
    """What went wrong in another process, or between the processes."""


class FailedTogether(Exception):  # noqa: N818 - carries an error
    """All processes know that one has failed, and are after the same step; the cause is what to raise in the end."""

    def __init__(self, cause: Exception):
        super().__init__(str(cause))
        self.cause = cause


def start() -> None:
    """Joins the processes of a run on many hosts; call it before anything touches a device.

    jax detects the others on TPU slices, Slurm, Open MPI and Kubernetes. Elsewhere set `JAX_COORDINATOR_ADDRESS`
    (host:port of process 0), `JAX_NUM_PROCESSES` and `JAX_PROCESS_ID`. Where there is nothing of that, the run has one
    process; so has one in a process that has used jax before, such as a notebook's.

    Raises:
        ProcessError: not all of the variables are set, a process did not arrive within a minute, or the variables name
            other processes, but jax has been used before.
    """
    if jax.distributed.is_initialized():
        return
    given = {name: os.environ[name] for name in _VARIABLES if os.environ.get(name)}
    if "JAX_NUM_PROCESSES" in given or "JAX_PROCESS_ID" in given:
        missing = [name for name in _VARIABLES if name not in given]
        if missing:
            raise ProcessError(f"{', '.join(given)} set, but not {', '.join(missing)}: set all three, or none")
        numbers = {name: _integer(name, given[name]) for name in _VARIABLES[1:]}
        arguments: dict[str, Any] = {
            "coordinator_address": given["JAX_COORDINATOR_ADDRESS"],
            "num_processes": numbers["JAX_NUM_PROCESSES"],
            "process_id": numbers["JAX_PROCESS_ID"],
        }
    else:
        arguments = {}
    # jax ends the process then, and does not say who is missing: whoever says nothing of the kind.
    late = threading.Timer(0.75 * _START_SECONDS, _say_late, (arguments,))
    late.daemon = True
    late.start()
    try:
        jax.distributed.initialize(
            **arguments,
            initialization_timeout=_START_SECONDS,
            heartbeat_timeout_seconds=_HEARTBEAT_SECONDS,
            shutdown_timeout_seconds=_START_SECONDS,
        )
    except ValueError as error:
        # jax detected no cluster: that is how it says so.
        if arguments or not str(error).startswith(("coordinator_address", "Number of processes", "The process id")):
            raise
    except RuntimeError as error:
        if "must be called before" in str(error):
            if not arguments:
                return
            raise ProcessError(f"{_VARIABLES[0]} is set, but jax was used before the processes met: restart") from error
        raise ProcessError(
            f"not all processes started within {_START_SECONDS} s; jax says: {str(error).splitlines()[0]}"
        ) from error
    finally:
        late.cancel()


def _say_late(arguments: Mapping[str, Any]) -> None:
    known = "process {process_id} of {num_processes}, coordinator {coordinator_address}," if arguments else "a process"
    print(
        f"{known.format(**arguments)} on {socket.gethostname()} is here and waits for the others: "
        f"one that does not say this within {_START_SECONDS} s did not start, or cannot reach process 0",
        file=sys.stderr,
        flush=True,
    )


def _integer(name: str, value: str) -> int:
    if not value.isdigit():
        raise ProcessError(f"{name}: got {value!r}, expected a number")
    return int(value)


def share(text: str) -> list[str]:
    """The texts of all processes, in their order; a collective."""
    if jax.process_count() == 1:
        return [text]
    from jax.experimental import multihost_utils

    encoded = np.frombuffer(text.encode(), np.uint8)
    lengths = multihost_utils.process_allgather(np.array([len(encoded)]), tiled=True)
    padded = np.zeros([1, max(int(lengths.max()), 1)], np.uint8)
    padded[0, : len(encoded)] = encoded
    rows = multihost_utils.process_allgather(padded, tiled=True)
    return [bytes(row[:length]).decode() for row, length in zip(np.asarray(rows), lengths.tolist(), strict=True)]


@contextlib.contextmanager
def all_or_none() -> Iterator[None]:
    """Around what every process does for itself: an error in one becomes an error in all, with its cause.

    `Interrupted` in one is raised in all.
    """
    problem = None
    try:
        yield
    except Exception as error:
        problem = error
    _raise_together(problem)


def agree(facts: Mapping[str, str]) -> None:
    """Raises in all processes unless the facts are the same everywhere.

    Raises:
        ProcessError: names the process, the fact and both values.
    """
    if jax.process_count() == 1:
        return
    lines = "\n".join(f"{name}={value}" for name, value in facts.items())
    first, *others = [text.split("\n") for text in share(lines)]
    for number, other in enumerate(others, 1):
        different = [
            f"  {mine} in process 0, {theirs}" for mine, theirs in zip(first, other, strict=True) if mine != theirs
        ]
        if different:
            raise ProcessError("\n".join([f"process {number} has another run than process 0:", *different[:10]]))


def in_step(
    feed: Iterable[T], *, what: Callable[[], str], limit: float, interrupted: Callable[[], bool]
) -> Generator[T, None, None]:
    """Yields what `feed` yields, read ahead in a thread; stops in all processes at the same element.

    With each element the processes tell each other, through their devices and one element ahead, whether they go on. So
    nobody starts a step that another process does not take part in, and no step waits for it.

    Args:
        feed: as many elements in every process.
        what: says what is waited for, if it takes long.
        limit: seconds that storage may take for an element; see `wait_for`.
        interrupted: whether this process is to stop.

    Raises:
        Interrupted: one process or several were interrupted.
        FailedTogether: in one process, `feed` raised an error.
    """
    with contextlib.closing(_Reader(feed)) as reader:
        agreement = _Agreement()

        def pull() -> tuple[T | None, bool, Exception | None, Any]:
            element, ended, problem, flag = None, False, None, 0
            try:
                element = wait_for(reader.get, what, limit, interrupted)
            except StopIteration:
                ended = True
            except Interrupted:
                flag = 1
            except Exception as error:
                problem, flag = error, 2
            return element, ended, problem, agreement.send(flag)

        following = pull()
        while True:
            element, ended, problem, sent = following
            flag = int(sent)
            if flag == 2:
                try:
                    _raise_together(problem)
                except Exception as cause:
                    raise FailedTogether(cause) from cause
            if flag == 1:
                raise Interrupted
            if ended:
                return
            following = pull()
            if jax.process_count() == 1 and interrupted():
                raise Interrupted  # there is nobody to wait for
            yield element  # pyright: ignore[reportReturnType]


@contextlib.contextmanager
def plain_errors() -> Iterator[None]:
    """Turns `FailedTogether` into its cause."""
    try:
        yield
    except FailedTogether as failure:
        raise failure.cause from None


def abort(error: BaseException) -> NoReturn:
    """Ends this process at once: the others wait for it in a collective, and are told by jax that it is gone."""
    traceback.print_exception(error)
    if isinstance(error, jax.errors.JaxRuntimeError) or re.match("[A-Z_]+: ", str(error)):
        # A collective failed, so another process is gone: jax ends this one and names it when its heartbeat is missed.
        print("waiting to hear which process is gone", file=sys.stderr, flush=True)
        time.sleep(_HEARTBEAT_SECONDS + 10)
    print(f"error: process {jax.process_index()} on {socket.gethostname()} ends: {error}", file=sys.stderr, flush=True)
    sys.stdout.flush()
    os._exit(1)


def _raise_together(problem: Exception | None) -> None:
    """Raises in all processes if one has a problem: its own, or that of the first one that has one."""
    if jax.process_count() > 1:
        mine = "" if problem is None else f"{socket.gethostname()}: {type(problem).__name__}: {problem}"
        mine = _INTERRUPTED if isinstance(problem, Interrupted) else mine
        for number, cause in enumerate(share(mine)):
            if cause and problem is None:
                raise Interrupted if cause == _INTERRUPTED else ProcessError(f"process {number} on {cause}")
    if problem is not None:
        raise problem


class _Agreement:
    """The largest of the processes' flags, computed by the devices while others wait for nothing."""

    def __init__(self):
        if jax.process_count() > 1:
            devices = np.array(jax.devices())
            mesh = jax.sharding.Mesh(devices, ("all",), axis_types=(jax.sharding.AxisType.Auto,))
            self._sharding = jax.sharding.NamedSharding(mesh, jax.P("all"))
            self._max = jax.jit(lambda flags: flags.max(), out_shardings=jax.sharding.NamedSharding(mesh, jax.P()))

    def send(self, flag: int) -> Any:
        """This process's flag; `int` of the result is the largest one."""
        if jax.process_count() == 1:
            return flag
        rows = np.full(jax.local_device_count(), flag, np.int32)
        return self._max(jax.make_array_from_process_local_data(self._sharding, rows))


class _Reader:
    """Runs an iterable in a thread, which can be left alone when storage does not answer."""

    def __init__(self, feed: Iterable[Any]):
        self._queue: queue.Queue[tuple[str, Any]] = queue.Queue(1)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(feed,), name="reader", daemon=True)
        self._thread.start()

    def get(self, seconds: float) -> Any:
        kind, value = self._queue.get(timeout=seconds)
        if kind == "element":
            return value
        self._put((kind, value))  # for whoever asks again
        if kind == "end":
            raise StopIteration
        raise value

    def close(self) -> None:
        self._ended.set()
        self._thread.join(timeout=5)

    def _run(self, feed: Iterable[Any]) -> None:
        iterator = iter(feed)
        try:
            with contextlib.closing(iterator) if isinstance(iterator, Generator) else contextlib.nullcontext():
                for element in iterator:
                    self._put(("element", element))
                    if self._ended.is_set():
                        return
            self._put(("end", None))
        except BaseException as error:
            self._put(("error", error))

    def _put(self, item: tuple[str, Any]) -> None:
        while not self._ended.is_set():
            with contextlib.suppress(queue.Full):
                self._queue.put(item, timeout=0.2)
                return
