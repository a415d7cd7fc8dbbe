"""Waiting for storage that may not answer: first a warning that names what is waited for, then an error."""

import errno
import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

T = TypeVar("T")
_POLL = 0.2  # seconds


class StalledError(OSError):
    """Storage did not answer within the limit."""


class Interrupted(Exception):  # noqa: N818 - not an error
    """SIGTERM or Ctrl-C came."""


def wait_for(
    get: Callable[[float], T], what: Callable[[], str], limit: float, interrupted: Callable[[], bool] = lambda: False
) -> T:
    """Calls `get(seconds)`, which raises `queue.Empty` or `TimeoutError` as long as there is nothing, until it returns.

    A warning that says `what` is waited for comes after a fifth of `limit`.

    Raises:
        StalledError: nothing came in `limit` seconds.
        Interrupted: `interrupted()` became true.
    """
    start, warned = time.monotonic(), False
    while True:
        if interrupted():
            raise Interrupted
        try:
            return get(_POLL)
        except (queue.Empty, TimeoutError):
            waited = time.monotonic() - start
            if waited > limit:
                message = f"storage did not answer for {waited:.0f} s (limit: train.storage_timeout)"
                raise StalledError(errno.ETIMEDOUT, message, what()) from None
            if waited > limit / 5 and not warned:
                warned = True
                print(f"warning: nothing from storage for {waited:.0f} s, waiting for {what()}", flush=True)


def call(
    function: Callable[[], T], what: Callable[[], str], limit: float, interrupted: Callable[[], bool] = lambda: False
) -> T:
    """`function()`, in a thread that is left alone where it takes longer than `limit`; see `wait_for`.

    Raises:
        Others: what the function raises.
    """
    future: Future[T] = Future()
    done = threading.Event()

    def work() -> None:
        try:
            future.set_result(function())
        except BaseException as error:
            future.set_exception(error)
        done.set()

    def get(seconds: float) -> None:
        if not done.wait(seconds):
            raise queue.Empty

    threading.Thread(target=work, name="storage", daemon=True).start()
    wait_for(get, what, limit, interrupted)
    return future.result()
