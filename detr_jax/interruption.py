"""SIGTERM and Ctrl-C: the first one asks a run to end in order, the second one ends it."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def interruption() -> Iterator[Callable[[], bool]]:
    """A function that says whether SIGTERM or Ctrl-C came; a second one ends the process as usual."""
    received: list[int] = []
    previous = {}

    def handle(number, frame):
        received.append(number)
        signal.signal(number, previous[number])
        print("\ninterrupted: ending after this step (again to stop at once)", flush=True)

    for number in (signal.SIGTERM, signal.SIGINT):
        previous[number] = signal.getsignal(number)
        signal.signal(number, handle)
    try:
        yield lambda: bool(received)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
