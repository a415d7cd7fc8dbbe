"""How fast DETR and Deformable DETR converge, at a size that two CPU cores carry: one command runs the whole study.

    python benchmarks/convergence.py                    # every cell that is not finished, resuming what was interrupted
    python benchmarks/convergence.py --list             # the cells, and which are finished
    python benchmarks/convergence.py --cells 'bccd/main/*/seed0' --time-limit 60
    python benchmarks/convergence.py --figures          # figures and tables from the stored results, in seconds

A cell is one training: a data set, a model, a learning rate and a seed. Its result is one small JSON file in
`--results`, written when it is finished; `--work` holds the checkpoints until then. `--processes 2` runs two cells at
once, each on its half of the cores (or all on one GPU: JAX uses it if there is one); each process takes a cell that no
other has. `docs/convergence.md` has the protocol, fixed before running.

`--data deep_pcb=FOLDER` adds DeepPCB, of which `benchmarks/deep_pcb.py` makes the folder.
"""

import argparse
import contextlib
import fcntl
import fnmatch
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from convergence_cells import RATES, SIZES, Cell, all_cells, choose_rate, run_cell, tries_of

from detr_jax.metric_writer import format_seconds

ROOT = Path(__file__).resolve().parents[1]


def read_result(results: Path, cell: Cell) -> dict[str, Any] | None:
    """The stored result of a cell."""
    path = result_path(results, cell)
    return json.loads(path.read_text()) if path.exists() else None


def result_path(results: Path, cell: Cell) -> Path:
    """Where it is stored."""
    return results / f"{cell.name.replace('/', '-')}.json"


def tuned_rate(cell: Cell, results: Path) -> float | None:
    """The learning rate of a cell; `None` while its tries are not finished."""
    if cell.rate is not None or cell.part == "cost":
        return cell.rate or RATES[0]
    tries = [read_result(results, Cell(cell.data, "try", tries_of(cell.model), rate=rate)) for rate in RATES]
    return None if None in tries else choose_rate([result for result in tries if result])


@contextlib.contextmanager
def claimed(cell: Cell, work: Path) -> Iterator[bool]:
    """Whether this process has the cell; no other one runs it inside."""
    path = work / "claims" / cell.name.replace("/", "-")
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True


def run_all(cells: Sequence[Cell], roots: Mapping[str, Path], results: Path, work: Path) -> None:
    """Runs what is not finished, one cell after another; waits for another process's tries where they are needed."""
    results.mkdir(parents=True, exist_ok=True)
    begin, work_done = time.monotonic(), 0.0
    while open_cells := [cell for cell in cells if not result_path(results, cell).exists()]:
        for cell in open_cells:
            rate = tuned_rate(cell, results)
            with claimed(cell, work) as mine:
                if rate is None or not mine or result_path(results, cell).exists():
                    continue
                print(f"=== {cell.name}, lr {rate:g}", flush=True)
                result = run_cell(cell, rate, roots, work)
                if result is None:
                    return
                temporary = result_path(results, cell).with_suffix(".tmp")
                temporary.write_text(json.dumps(result, indent=1) + "\n")
                temporary.replace(result_path(results, cell))
            work_done += max(cell.epochs, 1)
            left = [other for other in cells if not result_path(results, other).exists()]
            eta = (time.monotonic() - begin) / work_done * sum(max(other.epochs, 1) for other in left)
            last = f"AP {result['curve'][-1]['AP']:.3f}" if result.get("curve") else "done"
            print(f"=== {cell.name}: {last}; {len(left)} of {len(cells)} left, ETA {format_seconds(eta)}", flush=True)
            break
        else:
            tries = {Cell(c.data, "try", tries_of(c.model), rate=r) for c in open_cells for r in RATES}
            if not any(not result_path(results, cell).exists() and cell in cells for cell in tries):
                print("nothing left that no other process has", flush=True)
                return
            time.sleep(20)


def run_processes(number: int, argv: Sequence[str]) -> int:
    """Runs this program so many times at once, each on its share of the cores; returns the first exit code above 0.

    SIGTERM and Ctrl-C reach all of them: they save and stop.
    """
    cores = sorted(os.sched_getaffinity(0))
    environment = os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}  # they share a GPU's memory
    running = []
    for i in range(number):
        process = subprocess.Popen([sys.executable, __file__, *argv, "--processes", "1"], env=environment)
        os.sched_setaffinity(process.pid, cores[i::number] or cores)  # it has not started any thread yet
        running.append(process)
    signal.signal(signal.SIGTERM, lambda *_: [process.terminate() for process in running])
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal sends it to all of them
    return next((code for code in [process.wait() for process in running] if code), 0)


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", nargs="+", default=["*"], help="which, by name, with * for anything")
    parser.add_argument("--list", action="store_true", help="show the cells and stop")
    parser.add_argument("--figures", action="store_true", help="draw the figures, print the tables, and stop")
    parser.add_argument("--time-limit", type=float, metavar="MINUTES", help="save and stop after this time")
    parser.add_argument("--processes", type=int, default=1, help="cells that run at once")
    parser.add_argument("--data", nargs="+", default=[], metavar="NAME=FOLDER", help="such as deep_pcb=FOLDER")
    parser.add_argument("--results", type=Path, default=ROOT / "docs/convergence", help="folder of the JSON files")
    parser.add_argument("--work", type=Path, default=Path("runs/convergence"), help="folder of unfinished trainings")
    return parser.parse_args(argv)


def main(argv: Sequence[str]) -> None:
    """Runs the study."""
    args = parse(argv)
    roots = {"bccd": ROOT / "tests/data/bccd"}
    for item in args.data:
        name, _, folder = item.partition("=")
        if name not in SIZES or not folder:
            sys.exit(f"error: --data {item}: expected NAME=FOLDER with NAME one of {', '.join(SIZES)}")
        roots[name] = Path(folder)
    if args.figures:
        import convergence_figures

        return convergence_figures.draw(args.results, args.results.parent / "convergence.md", all_cells(list(SIZES)))
    cells = [cell for cell in all_cells(list(roots)) if any(fnmatch.fnmatch(cell.name, p) for p in args.cells)]
    if not cells:
        sys.exit(f"error: --cells {' '.join(args.cells)}: no such cell; --list shows them")
    if args.list:
        for cell in cells:
            print(f"{'finished' if result_path(args.results, cell).exists() else '-':<9} {cell.name}")
        return None
    if args.processes > 1:
        sys.exit(run_processes(args.processes, argv))
    if args.time_limit:
        timer = threading.Timer(60 * args.time_limit, lambda: os.kill(os.getpid(), signal.SIGTERM))
        timer.daemon = True
        timer.start()
    run_all(cells, roots, args.results, args.work)


if __name__ == "__main__":
    main(sys.argv[1:])
