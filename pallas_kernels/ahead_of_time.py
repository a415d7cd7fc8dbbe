"""What the TPU's compiler says of a program, on a machine that has no TPU.

`libtpu` compiles for real slices anywhere. Its optimized HLO carries an estimate of cycles for most operations, and
its dumps show the bundles (instructions that are issued together) of kernels and gathers, which have no estimate. Both
count work that is issued, not waiting: for memory, for the matrix unit's last result, for other chips. A real program
takes longer; the ratio of two of them is more to be trusted than either.
"""

import dataclasses
import importlib.util
import multiprocessing
import os
import re
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import jax
import numpy as np
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.compiled_program import Program

TOPOLOGIES = {"v4": "v4:2x2x1", "v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "7x": "tpu7x:2x2x1"}
"""Generation -> a small slice of it; programs are compiled for its first core."""
CLOCK_GHZ = {"v4": 1.05, "v5e": 1.5, "v5p": 1.75, "v6e": 1.75, "7x": 2.2}
"""Assumed clocks: published or inferred from published peaks, not measured."""
LINK_GBPS = {"v4": 150, "v5e": 100, "v5p": 300, "v6e": 224, "7x": 600}
"""Assumed gigabytes per second that a chip sends to others: half of the published bandwidth, which is of both ways."""


def require_libtpu() -> None:
    """Prepares the environment for compiling without a TPU; call it before anything else of JAX.

    Raises:
        ImportError: `libtpu` is not installed; says which to install.
    """
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # there is no metadata server to wait for
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    # Of this machine, which libtpu would ask for; what is compiled for does not depend on it.
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-4")
    if importlib.util.find_spec("libtpu") is None:
        raise ImportError(
            f"compiling for TPUs needs libtpu, which is not installed: pip install 'jax[tpu]=={jax.__version__}', and "
            "set JAX_PLATFORMS=cpu where there is no TPU"
        )


def dump_bundles(folder: Path) -> None:
    """Lets libtpu write the bundles of what it compiles to `folder`; call it before the first compilation.

    Raises:
        ValueError: JAX may have started libtpu already, to look for a TPU.
    """
    if os.environ.get("JAX_PLATFORMS") != "cpu":
        raise ValueError("set JAX_PLATFORMS=cpu: JAX must not start libtpu before it is told where to write bundles")
    os.environ["LIBTPU_INIT_ARGS"] = (
        f"{os.environ.get('LIBTPU_INIT_ARGS', '')} --xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true "
        "--xla_jf_dump_llo_pass_label_regex=.*final_bundles.*"
    )


def mesh(generation: str) -> jax.sharding.Mesh:
    """One core of a generation (a key of `TOPOLOGIES`), to compile for."""
    from jax.experimental import topologies

    topology = topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGIES[generation])
    return jax.sharding.Mesh(np.array(topology.devices[:1]), ("data",))


def compile_for(generation: str, function: Callable, *arguments) -> jax.stages.Compiled:
    """`function` of arguments of these shapes (`jax.ShapeDtypeStruct`), compiled for one core."""
    target = mesh(generation)
    sharding = jax.sharding.NamedSharding(target, jax.P())
    arguments = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), arguments)
    with jax.set_mesh(target):
        return jax.jit(function, out_shardings=sharding).lower(*arguments).compile()


@dataclasses.dataclass(frozen=True)
class Limits:
    """Published peaks of what JAX calls a device, and what is assumed of it."""

    generation: str
    """A key of `TOPOLOGIES`."""
    flops: float
    """bfloat16 operations per second."""
    bandwidth: float
    """Bytes per second of the main memory."""
    memory: int
    """Bytes of the main memory."""

    @property
    def clock(self) -> float:
        """Cycles per second, assumed."""
        return CLOCK_GHZ[self.generation] * 1e9

    @property
    def link(self) -> float:
        """Bytes per second to other chips, assumed."""
        return LINK_GBPS[self.generation] * 1e9


def limits(mesh: jax.sharding.Mesh) -> Limits:
    """Of a device of a mesh of TPUs."""
    with jax.set_mesh(mesh):
        info = pltpu.get_tpu_info()
    cores = info.num_cores
    return Limits(
        str(info.chip_version),
        info.bf16_ops_per_second * cores,
        info.mem_bw_bytes_per_second * cores,
        info.hbm_capacity_bytes * cores,
    )


def apart(function: Callable, *args):
    """The result of a function that runs in a process of its own: compilations take gigabytes."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
        return process.submit(function, *args).result()


@dataclasses.dataclass(frozen=True)
class Cost:
    """Cycles of a compiled program outside of Pallas kernels."""

    cycles: float = 0.0
    """Estimated by XLA."""
    gathers: float = 0.0
    """Bundles of gathers and scatters, of which XLA has no estimate."""
    unknown: int = 0
    """Sorts and other operations of which neither is known."""

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(*(a + b for a, b in zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)))

    def times(self, count: int) -> "Cost":
        """The cost of `count` runs."""
        return Cost(self.cycles * count, self.gathers * count, self.unknown * count)


def cost(compiled: jax.stages.Compiled, folder: Path | None) -> Cost:
    """Adds up a program whose bundles are in `folder` (`None`: gathers are left out); loops times their trip counts."""
    total = Cost()
    for operation in Program(compiled.as_text() or "").operations:
        if operation.cycles is not None:
            total += Cost(cycles=operation.cycles * operation.runs)
        elif operation.gathers:
            total += Cost(
                gathers=operation.runs * issued(bundles(folder, operation.instruction.label)) if folder else 0
            )
        elif operation.instruction.opcode in ("sort", "scatter", "gather"):
            total += Cost(unknown=operation.runs)
    return total


@dataclasses.dataclass(frozen=True)
class Kernel:
    """A call of a Pallas kernel."""

    label: str
    """Of its HLO instruction."""
    vmem: int
    """Bytes of vector memory."""


def kernels(compiled: jax.stages.Compiled, name: str) -> list[Kernel]:
    """The calls of Pallas kernels with `name` in their names."""
    found = []
    for line in (compiled.as_text() or "").splitlines():
        if match := re.match(rf"\s*(?:ROOT )?%([\w.\-]*{name}[\w.\-]*) = .* custom-call\(", line):
            used = re.search(r'"used_scoped_memory_configs":\[\{"memory_space":"1","offset":"\d+","size":"(\d+)"', line)
            found.append(Kernel(match[1], int(used[1]) if used else 0))
    return found


@dataclasses.dataclass(frozen=True)
class Bundle:
    """One bundle of a dump."""

    depth: int
    """How many loops it is in."""
    begins: bool
    """It is the first one of a loop."""
    trips: int | None
    """Trip count of the loop that it ends, where that is a constant."""


def bundles(folder: Path, label: str) -> list[Bundle]:
    """The bundles of the HLO instruction `label`, compiled last."""
    base = label.rpartition(".")[0] or label
    for name in (label, base, f"{base}.*"):  # of equal instructions one is compiled, under its own name
        files = [file for file in folder.glob(f"*-{name}-*final_bundles.txt") if "schedule-analysis" not in file.name]
        if files:
            break
    if not files:
        raise FileNotFoundError(f"{folder}: no bundles of {label}: call dump_bundles before anything compiles")
    found, depth = [], 0
    for line in max(files).read_text(errors="replace").splitlines():
        if bundle := re.match(r"\s*(?:0x[0-9a-f]+|\d+)\s+(LB|LH|LE|PB|PF|CT)?\s*:\s*(>*)\s*\{(.*)", line):
            if bundle[3] != "}":  # an empty one belongs to the loop before
                depth = len(bundle[2])
            test = re.search(r"scmp\.\S+ \S+ (\d+) /\* loop exit test", line)
            found.append(Bundle(depth, bundle[1] == "LB", int(test[1]) if test else None))
    return found


def issued(bundles: list[Bundle]) -> int:
    """How many are issued in all: outermost loops times their trip counts, inner ones counted once."""
    total = inside = 0
    for bundle in bundles:
        if bundle.depth == 0:
            total += 1
        else:
            inside += 1
        if bundle.depth == 1 and bundle.trips:
            total, inside = total + inside * bundle.trips, 0
    return total + inside
