"""A run's folder has one writer at a time."""

import contextlib
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator

from etils import epath

from detr_jax.errors import UserError

_BEAT = 10.0  # seconds between two signs of life


class FolderInUseError(UserError):
    """Another process writes to the folder."""


@contextlib.contextmanager
def lock(folder: epath.Path) -> Iterator[None]:
    """Makes this process the only writer of `folder`, which is created if need be.

    On a file system, the kernel holds the lock (`flock`) and gives it back when the process ends, however it ends. In a
    bucket, or where there is no `flock`, the file `lock` changes every ten seconds; one that stands still for longer
    was left by a process that was killed.

    Raises:
        FolderInUseError: another process has the lock; says which.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "lock"
    if "://" in str(path):
        with _signs_of_life(path):
            yield
        return
    import fcntl  # not on Windows

    with open(path, "a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise _in_use(folder, file.read()) from None
        except OSError:  # a network file system without locks
            with _signs_of_life(path):
                yield
            return
        file.truncate(0)
        file.write(_myself())
        file.flush()
        yield


def leave_token(folder: epath.Path) -> str:
    """Writes a file that the other processes of the run look for; see `check_token`."""
    token = uuid.uuid4().hex
    (folder / "token").write_text(token)
    return token


def check_token(folder: epath.Path, token: str) -> None:
    """Raises unless this process sees the file that process 0 wrote: all processes need one folder.

    Raises:
        UserError: it does not.
    """
    for _ in range(20):  # network file systems take some seconds
        if _read(folder / "token") == token:
            return
        time.sleep(0.5)
    raise UserError(
        f"train.output_dir {folder} is not the folder that process 0 writes to. All hosts need the same one: "
        "a bucket (gs://...), or a file system that they share"
    )


@contextlib.contextmanager
def _signs_of_life(path: epath.Path) -> Iterator[None]:
    """The lock as a file that changes as long as its owner lives."""
    found = _read(path)
    if found:
        print(f"{path} exists: waiting {2.5 * _BEAT:.0f} s to see whether its process lives", flush=True)
        deadline = time.monotonic() + 2.5 * _BEAT
        while found and time.monotonic() < deadline:
            time.sleep(_BEAT / 10)
            now = _read(path)
            if now not in ("", found):
                raise _in_use(path.parent, json.loads(now)["who"])
            found = now
    token = uuid.uuid4().hex

    def sign(beat: int) -> None:
        path.write_text(json.dumps({"who": _myself(), "token": token, "beat": beat}))

    def mine() -> bool:
        return token in _read(path)

    sign(0)
    time.sleep(_BEAT / 5)  # of two that start in the same moment, the last one to write has it
    if not mine():
        raise _in_use(path.parent, _read(path))
    ended = threading.Event()

    def beat() -> None:
        number = 0
        while not ended.wait(_BEAT):
            number += 1
            with contextlib.suppress(OSError):
                if not mine():
                    print(f"error: another process took over {path.parent}; this one ends", flush=True)
                    os._exit(1)
                sign(number)

    thread = threading.Thread(target=beat, name="lock", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        path.unlink(missing_ok=True)


def _read(path: epath.Path) -> str:
    try:
        return path.read_text()
    except FileNotFoundError:
        return ""


def _myself() -> str:
    return f"process {os.getpid()} on {socket.gethostname()} since {time.strftime('%Y-%m-%d %H:%M:%S')}"


def _in_use(folder: epath.Path, who: str) -> FolderInUseError:
    return FolderInUseError(
        f"train.output_dir {folder} is in use by {who or 'another process'}. "
        "Wait until it ends, or choose another train.output_dir"
    )
