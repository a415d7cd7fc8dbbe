"""Checksums of a checkpoint's files: what damaged storage changes is noticed before it is trained on.

`<step>/checksums.sha256` lists every file that was written, in the format of the program `sha256sum`, which verifies it
as well (`cd <step> && sha256sum -c checksums.sha256`). It is written last: a checkpoint without it was not finished.
"""

import hashlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

from etils import epath

FILE = "checksums.sha256"
NOT_FINISHED = "it was not finished"


def write(step_folder: epath.Path) -> None:
    """Writes the digests of all files in a finished checkpoint's folder."""
    with ThreadPoolExecutor(4) as pool:
        names = sorted(_files(step_folder))
        digests = pool.map(lambda name: _digest(step_folder / name), names)
        lines = [f"{digest}  {name}\n" for name, digest in zip(names, digests, strict=True)]
    write_whole(step_folder / FILE, "".join(lines))


def damage(step_folder: epath.Path, entries: tuple[str, ...] | None = None) -> str | None:
    """Says what is wrong with a checkpoint's files; `None` if they are as they were written.

    Args:
        step_folder: of one checkpoint.
        entries: folders of the checkpoint to read; `None` reads all of them.
    """
    try:
        lines = (step_folder / FILE).read_text().splitlines()
    except FileNotFoundError:
        return f"{NOT_FINISHED}: {FILE} is missing"
    except (OSError, ValueError) as error:
        return f"{FILE} cannot be read: {error}"
    expected = {}
    for line in lines:
        digest, separator, name = line.partition("  ")
        if not separator or len(digest) != 64:
            return f"{FILE} is damaged: {line[:80]!r}"
        if entries is None or "/" not in name or name.split("/")[0] in entries:
            expected[name] = digest

    def check(name: str) -> str | None:
        try:
            return None if _digest(step_folder / name) == expected[name] else f"{name} has changed since it was written"
        except FileNotFoundError:
            return f"{name} is missing"
        except OSError as error:
            return f"{name} cannot be read: {error}"

    if not expected:
        return f"{FILE} is empty"
    with ThreadPoolExecutor(4) as pool:
        return next((problem for problem in pool.map(check, expected) if problem), None)


def write_whole(path: epath.Path, text: str) -> None:
    """Writes a small file so that a reader finds all of it or none."""
    if "://" in str(path):  # an object of a bucket appears when it is complete
        path.write_text(text)
        return
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.write_text(text)
    temporary.replace(path)


def _files(folder: epath.Path, prefix: str = "") -> Iterator[str]:
    for path in folder.iterdir():
        if path.is_dir():
            yield from _files(path, f"{prefix}{path.name}/")
        elif not (prefix == "" and path.name in (FILE, f"{FILE}.tmp")):
            yield prefix + path.name


def _digest(path: epath.Path) -> str:
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
