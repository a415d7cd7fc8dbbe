"""What the text of a compiled program says of its operations: cycles, bytes, products, collectives, source lines.

XLA's optimized HLO is read as text, since no other form has the compiler's estimates. What is read here holds for TPUs;
on other platforms there are no estimates of cycles, and the rest is the same.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute", "collective-broadcast")
_NO_WORK = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id", "replica-id"}
_BITS = {"pred": 8, "s4": 4, "u4": 4, "c64": 64, "c128": 128}


class Shape(NamedTuple):
    """An array as it is stored."""

    dtype: str
    dims: tuple[int, ...]
    layout: str
    """XLA's, such as `1,0:T(8,128)S(1)`: dimensions from the fastest on, tiles, memory space."""

    @property
    def on_chip(self) -> bool:
        """In vector or scalar memory, not in the chip's main memory."""
        return re.search(r"S\([1-9]", self.layout) is not None

    @property
    def stored_bytes(self) -> int:
        """Bytes with the padding of the first tile."""
        order, _, tiles = self.layout.partition(":")
        dims = list(self.dims)
        tile = re.match(r"T\(([\d,]+)\)", tiles)
        if tile and order:
            fastest_first = [int(axis) for axis in order.split(",")]
            for axis, size in zip(fastest_first, reversed([int(n) for n in tile[1].split(",")]), strict=False):
                dims[axis] = -(-dims[axis] // size) * size
        return math.prod(dims) * _bits(self.dtype) // 8


@dataclasses.dataclass(frozen=True)
class Instruction:
    """A line of the program."""

    label: str
    opcode: str
    shapes: tuple[Shape, ...]
    """Of its results."""
    operands: tuple[str, ...]
    """Labels."""
    line: str
    """The whole of it."""

    def attribute(self, name: str) -> str | None:
        """The computation or label after `name=`."""
        match = re.search(rf"\b(?:{name})=%?([\w.\-]+)", self.line)
        return match[1] if match else None


@dataclasses.dataclass(frozen=True)
class Operation:
    """An instruction that runs, with what it costs each time."""

    instruction: Instruction
    runs: int
    """How often: the product of the trip counts of the loops that it is in."""
    cycles: int | None
    """XLA's estimate; `None` where it has none."""
    gathers: bool
    """It is a fusion with a gather or a scatter, of which there is no estimate."""
    bytes: int
    """Read from and written to the chip's main memory."""
    flops: int
    """Of its products and convolutions: two per multiplication and addition."""
    scopes: tuple[str, ...]
    """The named scopes (and traced functions) that made it, outermost first."""
    backward: bool
    """It belongs to a derivative."""
    source: str
    """`file.py:line` of the caller that made it, outside of libraries; empty where the compiler made it."""


class Collective(NamedTuple):
    """Communication between devices."""

    kind: str
    """Such as `all-reduce`."""
    bytes: int
    """Of the operands on one device, each run."""
    runs: int
    scopes: tuple[str, ...]
    source: str


class Program:
    """A compiled program, read from `compiled.as_text()`."""

    def __init__(self, text: str):
        self.computations: dict[str, list[Instruction]] = {}
        self.entry = name = ""
        lines: list[Instruction] = []
        frames: dict[str, dict[int, str]] = {}
        table = ""
        for line in text.splitlines():
            if header := re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{$", line):
                name, lines = header[2], []
                self.computations[name] = lines
                self.entry = name if header[1] else self.entry
            elif name:
                if instruction := _read(line):
                    lines.append(instruction)
            elif line in ("FileNames", "FunctionNames", "FileLocations", "StackFrames"):
                table = line
            elif row := re.match(r"(\d+) (.*)", line):
                frames.setdefault(table, {})[int(row[1])] = row[2]
        self._frames = frames

    @functools.cached_property
    def operations(self) -> list[Operation]:
        """All that run, outermost first; what is in a fusion is part of it."""
        return list(self._operations(self.entry, 1))

    @functools.cached_property
    def collectives(self) -> list[Collective]:
        """Between more than one device."""
        found = []
        for operation in self.operations:
            for z in (operation.instruction, *self._inner(operation.instruction)):
                kind = z.opcode.removesuffix("-start")
                if kind in COLLECTIVES and not re.search(r"replica_groups=\{(\{\d+\},?)+\}[,\s]", z.line):
                    shapes = [shape for label in z.operands for shape in self._by_label[label].shapes]
                    size = sum(math.prod(shape.dims) * _bits(shape.dtype) // 8 for shape in shapes)
                    found.append(Collective(kind, size, operation.runs, operation.scopes, operation.source))
        return found

    @functools.cached_property
    def _by_label(self) -> dict[str, Instruction]:
        return {instruction.label: instruction for lines in self.computations.values() for instruction in lines}

    def _operations(self, computation: str, runs: int) -> Iterator[Operation]:
        for instruction in self.computations[computation]:
            opcode = instruction.opcode
            if opcode == "while":
                body, condition = instruction.attribute("body"), instruction.attribute("condition")
                assert body and condition
                yield from self._operations(body, runs * _trips(self.computations[condition]))
            elif opcode in ("call", "conditional", "async-start"):
                called = instruction.attribute("to_apply|true_computation|branch_computations|calls")
                if called is None and (branches := re.search(r"branch_computations=\{%?([\w.\-]+)", instruction.line)):
                    called = branches[1]
                if called:
                    yield from self._operations(called, runs)
            elif opcode not in _NO_WORK and not opcode.endswith("-done"):
                yield self._operation(instruction, runs)

    def _operation(self, instruction: Instruction, runs: int) -> Operation:
        estimate = re.search(r'"estimated_cycles":"?(\d+)', instruction.line)
        inner = self._inner(instruction)
        # What a fusion does is best said by its product; where the compiler made it, by what it was made from.
        products = [z for z in inner if z.opcode in ("dot", "convolution")]
        named = [z.line for z in (*products, instruction, *reversed(inner)) if "op_name=" in z.line]
        name = re.search(r'op_name="([^"]*)"', named[0]) if named else None
        return Operation(
            instruction,
            runs,
            int(estimate[1]) if estimate else None,
            estimate is None
            and instruction.opcode == "fusion"
            and any(z.opcode in ("gather", "scatter") for z in inner),
            self._bytes(instruction),
            sum(self._flops(z) for z in (instruction, *inner)),
            scopes(name[1]) if name else (),
            name is not None and "transpose(" in name[1],
            next(filter(None, map(self._source, named)), ""),
        )

    def _inner(self, instruction: Instruction) -> list[Instruction]:
        """All instructions of a fusion, of fusions in it too."""
        called = instruction.attribute("calls") if instruction.opcode == "fusion" else None
        if called is None:
            return []
        lines = self.computations[called]
        return [*lines, *(inner for line in lines for inner in self._inner(line))]

    def _bytes(self, instruction: Instruction) -> int:
        """Operands and results in main memory; of an operand that is only sliced, the slices."""
        called = instruction.attribute("calls") if instruction.opcode == "fusion" else None
        slices: dict[int, int] = {}
        results = sum(shape.stored_bytes for shape in instruction.shapes if not shape.on_chip)
        if called:
            lines = self.computations[called]
            updated = {z.operands[0]: z for z in lines if z.opcode == "dynamic-update-slice"}
            for parameter in (z for z in lines if z.opcode == "parameter"):
                number = re.search(r"parameter\((\d+)\)", parameter.line)
                users = [z for z in lines if parameter.label in z.operands]
                assert number
                if parameter.label in updated and len(users) == 1:
                    written = self._by_label[updated[parameter.label].operands[1]]
                    slices[int(number[1])] = 0
                    whole = sum(shape.stored_bytes for shape in parameter.shapes if not shape.on_chip)
                    results -= max(whole - sum(shape.stored_bytes for shape in written.shapes), 0)
                elif users and all(z.opcode in ("slice", "dynamic-slice", "gather") for z in users):
                    slices[int(number[1])] = sum(shape.stored_bytes for z in users for shape in z.shapes)
        total = max(results, 0)
        for number, label in enumerate(instruction.operands):
            shapes = [shape for shape in self._by_label[label].shapes if not shape.on_chip]
            whole = sum(shape.stored_bytes for shape in shapes)
            total += min(whole, slices.get(number, whole))
        if instruction.opcode in ("copy-start", "slice-start"):  # results are the copy, its source, and more
            copied = instruction.shapes[:2]
            size = min(shape.stored_bytes for shape in copied)
            total = size * sum(not shape.on_chip for shape in copied)
        return total

    def _flops(self, instruction: Instruction) -> int:
        if instruction.opcode == "dot":
            left = self._by_label[instruction.operands[0]].shapes[0]
            contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", instruction.line)
            assert contracted
            summed = math.prod(left.dims[int(axis)] for axis in contracted[1].split(",") if axis)
            return 2 * math.prod(instruction.shapes[0].dims) * summed
        if instruction.opcode == "convolution":
            left, right = (self._by_label[label].shapes[0].dims for label in instruction.operands[:2])
            return _convolution_flops(instruction.line, left, right, instruction.shapes[0].dims)
        return 0

    def _source(self, line: str) -> str:
        frame = re.search(r"stack_frame_id=(\d+)", line)
        number = int(frame[1]) if frame else 0
        stack = self._frames.get("StackFrames", {})
        while number in stack:
            location, parent = (_field(stack[number], name) for name in ("file_location_id", "parent_frame_id"))
            place = self._frames["FileLocations"][location]
            file = self._frames["FileNames"][_field(place, "file_name_id")].strip('"')
            if "site-packages" not in file:
                return f"{file.rpartition('/')[2]}:{_field(place, 'line')}"
            number = parent if parent != number else 0
        return ""


def scopes(op_name: str) -> tuple[str, ...]:
    """`jit(step)/transpose(jvp(losses))/matching/add` -> `("step", "losses", "matching")`."""
    parts = [re.sub(r"\w+\(", "", part).rstrip(")") for part in op_name.split("/")[:-1]]
    return tuple(part for part in parts if part)


def _read(line: str) -> Instruction | None:
    match = re.match(r"\s*(?:ROOT )?%([\w.\-]+) = (.*?) ([\w\-]+)\(", line)
    if match is None:
        return None
    label, types, opcode = match.groups()
    shapes = tuple(
        Shape(dtype, tuple(int(n) for n in dims.split(",") if n), layout)
        for dtype, dims, layout in re.findall(r"([a-z]\w*)\[([\d,]*)\](?:\{([^}]*)\})?", types)
    )
    depth, end = 1, match.end()
    while depth and end < len(line):
        depth += {"(": 1, ")": -1}.get(line[end], 0)
        end += 1
    return Instruction(label, opcode, shapes, tuple(re.findall(r"%([\w.\-]+)", line[match.end() : end])), line)


def _bits(dtype: str) -> int:
    if dtype in _BITS:
        return _BITS[dtype]
    width = re.search(r"\d+", dtype)
    return int(width[0]) if width else 0


def _field(row: str, name: str) -> int:
    match = re.search(rf"\b{name}=(\d+)", row)
    return int(match[1]) if match else 0


def _trips(condition: list[Instruction]) -> int:
    """Of a loop that counts from 0: the constant that its condition compares with."""
    constants = [int(match[1]) for z in condition if (match := re.search(r" constant\((\d+)\)", z.line))]
    return max(constants, default=1)


def _convolution_flops(line: str, left: Sequence[int], right: Sequence[int], result: Sequence[int]) -> int:
    """Twice the multiplications with what is not padding, as XLA counts them."""
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", line)
    window = re.search(r"window=\{([^}]*)\}", line)
    assert labels
    spatial = [z for z in labels[3] if z.isdigit()]

    def values(name: str, default: str) -> list[str]:
        found = re.search(rf"\b{name}=([\w\-]+)", window[1]) if window else None
        return found[1].split("x") if found else [default] * len(spatial)

    products = 1
    sizes, strides, pads = values("size", "1"), values("stride", "1"), values("pad", "0_0")
    lhs_dilations, rhs_dilations = values("lhs_dilate", "1"), values("rhs_dilate", "1")
    for i, axis in enumerate(spatial):
        n, out = left[labels[1].index(axis)], result[labels[3].index(axis)]
        size, stride, holes, spread = (int(z[i]) for z in (sizes, strides, lhs_dilations, rhs_dilations))
        before = int(pads[i].split("_")[0])
        if holes == stride == 1 and before == 0 and out + (size - 1) * spread <= n:
            products *= out * size
        else:
            products *= sum(
                0 <= place < (n - 1) * holes + 1 and place % holes == 0
                for tap in range(size)
                for place in range(tap * spread - before, tap * spread - before + out * stride, stride)
            )
    batch, features = result[labels[3].index("b")], result[labels[3].index("f")]
    return 2 * products * batch * features * right[labels[2].index("i")]
