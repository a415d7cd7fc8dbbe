"""Compiling ahead of the first step: every bucket at once, with a progress line, and from a cache at the next start."""

import contextlib
import os
import queue
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
from etils import epath
from jax.experimental.compilation_cache import compilation_cache

from detr_jax.errors import UserError
from detr_jax.stall import wait_for

Bucket = tuple[int, int]


@contextlib.contextmanager
def cache(folder: epath.Path) -> Iterator[None]:
    """Keeps compiled programs in `folder` for later starts, unless jax was told another place."""
    config: Any = jax.config
    if config.jax_compilation_cache_dir:
        yield
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))
    compilation_cache.reset_cache()  # jax looks at its setting once
    try:
        yield
    finally:
        jax.config.update("jax_compilation_cache_dir", None)
        compilation_cache.reset_cache()


def compile_buckets(
    programs: Mapping[tuple[str, Bucket], Callable[[], Any]],
    mesh: jax.sharding.Mesh,
    *,
    interrupted: Callable[[], bool] = lambda: False,
    report: bool = True,
) -> Callable[[], dict[tuple[str, Bucket], Any]]:
    """Begins to compile programs side by side.

    Args:
        programs: by name and bucket, functions that lower a program: `lambda: step.lower(...)`.
        mesh: the devices.
        interrupted: asked while waiting.
        report: print a line per program.

    Returns:
        A function that waits for all of them and returns the compiled programs, by the same keys. It raises

        - UserError: a program does not fit into the devices' memory; says what to change.
        - Interrupted: `interrupted()` became true. The compiler cannot be stopped: its threads end with the process.
    """
    todo: queue.SimpleQueue[tuple[tuple[str, Bucket], Callable[[], Any]]] = queue.SimpleQueue()
    done: queue.SimpleQueue[tuple[tuple[str, Bucket], Any, float]] = queue.SimpleQueue()
    for item in programs.items():
        todo.put(item)

    def work() -> None:
        while True:
            try:
                key, lower = todo.get_nowait()
            except queue.Empty:
                return
            start = time.perf_counter()
            try:
                with jax.set_mesh(mesh):
                    compiled = lower().compile()
            except Exception as error:  # raised where it is waited for
                compiled = error
            done.put((key, compiled, time.perf_counter() - start))

    for _ in range(min(len(programs), os.cpu_count() or 1, 8)):
        threading.Thread(target=work, name="compile", daemon=True).start()

    def wait() -> dict[tuple[str, Bucket], Any]:
        compiled = {}
        for number in range(1, len(programs) + 1):
            key, program, seconds = wait_for(
                lambda wait: done.get(timeout=wait), lambda: "the compiler", float("inf"), interrupted
            )
            name, (height, width) = key
            if isinstance(program, Exception):
                if missing := missing_memory(program):
                    raise UserError(
                        f"{name} {height}x{width} does not fit into a device's memory: {missing}. Take a smaller "
                        "--train.batch-size, --train.accumulate 2, --model.dtype bfloat16 or --model.remat layers "
                        "(docs/training.md, 'Memory and batch size'); detr-jax plan tries them without the devices"
                    ) from program
                raise program
            compiled[key] = program
            if report:
                line = f"compiled {number}/{len(programs)}  {name} {height}x{width}  {seconds:.1f} s"
                print(f"{line}  {describe_memory(program)}", flush=True)
        return compiled

    return wait


def missing_memory(error: Exception) -> str:
    """What the compiler says of a program that needs more memory than a device has; empty for other errors."""
    message = str(error)
    if not isinstance(error, jax.errors.JaxRuntimeError) or "RESOURCE_EXHAUSTED" not in message:
        return ""
    found = re.search(r"Used [\d.]+\w? of [\d.]+\w? hbm", message)
    return found[0] if found else message.splitlines()[0]


def describe_memory(program: Any) -> str:
    """What a compiled program needs of each device's memory: its arguments, results, temporary arrays and code."""
    sizes = program.memory_analysis()
    if sizes is None:  # not every platform says
        return ""
    results = sizes.output_size_in_bytes - sizes.alias_size_in_bytes  # without those in the place of arguments
    inside = sizes.temp_size_in_bytes + sizes.generated_code_size_in_bytes
    return f"{(sizes.argument_size_in_bytes + results + inside) / 2**30:.2f} GiB per device"
