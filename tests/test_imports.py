"""Packages import each other as the table says, in no circle, and heavy libraries only where they are used."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILES = sorted([*(ROOT / "detr_jax").rglob("*.py"), *(ROOT / "pallas_kernels").rglob("*.py")])

BASE = {"config", "boxes", "categories", "errors"}
ALLOWED = {
    "errors": set(),
    "stall": set(),
    "interruption": set(),
    "compilation": {"errors", "stall"},
    "run_folder": {"errors"},
    "processes": {"errors", "stall"},
    "resuming": {"checkpoints", "errors"},
    "config": {"errors"},
    "boxes": set(),
    "categories": {"errors"},
    "sharding": {"errors"},
    "matching": BASE | {"sharding"},
    "denoising": {"config", "boxes"},
    "losses": BASE | {"matching", "denoising"},
    "models": {"config", "denoising", "errors", "pallas_kernels", "sharding"},
    "data": {"config", "categories", "errors"},
    "postprocess": {"boxes"},
    "tta": {"boxes"},
    "drawing": set(),
    "checkpoints": {"config", "categories", "errors", "models", "sharding", "stall"},
    "train_step": {
        "config", "categories", "sharding", "models", "denoising", "losses", "postprocess", "data", "checkpoints",
    },
    "detector": {"categories", "checkpoints", "config", "data", "drawing", "errors", "postprocess", "tta"},
    "scoring": {"data", "errors"},
    "evaluation": {
        "categories", "checkpoints", "config", "data", "drawing", "errors", "models", "postprocess", "processes",
        "scoring", "sharding", "train_step", "tta",
    },
    "metric_writer": {"errors"},
    "curves": {"errors", "metric_writer"},
    "training": {
        "config", "categories", "checkpoints", "compilation", "curves", "data", "errors", "evaluation", "interruption",
        "metric_writer", "processes", "resuming", "run_folder", "scoring", "sharding", "stall", "train_step",
    },
    "plan": {
        "compilation", "config", "data", "denoising", "errors", "pallas_kernels", "plan_report", "sharding",
        "train_step", "training",
    },
    "plan_report": set(),
    "export_standalone": {"data", "errors"},
    "export": {"checkpoints", "config", "data", "errors", "export_standalone", "models", "postprocess"},
    "surgery": BASE | {"checkpoints", "data", "models", "postprocess"},
    "visualize": BASE | {
        "checkpoints", "curves", "data", "denoising", "detector", "drawing", "matching", "models", "scoring",
    },
    "cli": {
        "categories", "checkpoints", "config", "data", "detector", "drawing", "errors", "evaluation", "export",
        "plan", "plan_report", "postprocess", "processes", "stall", "surgery", "training", "visualize",
    },
    "": {"detector", "checkpoints"},
    "pallas_kernels": set(),
}  # fmt: skip
"""For each part of `detr_jax` (`""` is its `__init__`) the others that it may import, lazily too."""


def imports(path: Path, *, top_level_only: bool = False) -> set[str]:
    """Dotted names that a file imports, submodules of `from package import submodule` included."""
    tree = ast.parse(path.read_text())
    found = set()
    for node in ast.iter_child_nodes(tree) if top_level_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {f"{node.module}.{name.name}" for name in node.names}
    return found


def part_of(name: str) -> str:
    """`detr_jax.data.coco.load_coco` -> `data`; `pallas_kernels.x` -> `pallas_kernels`."""
    top, *rest = name.split(".")
    if top == "pallas_kernels":
        return top
    return rest[0] if rest and (rest[0] in ALLOWED) else ""


def modules_of(name: str) -> list[str]:
    """The modules of this project that importing a dotted name runs, packages not included."""
    parts = name.split(".")
    for end in (len(parts), len(parts) - 1):
        path = ROOT.joinpath(*parts[:end])
        if path.with_suffix(".py").is_file():
            return [".".join(parts[:end])]
        if (path / "__init__.py").is_file():
            return [".".join(parts[:end])]
    return []


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_part_imports_what_the_table_allows(path):
    here = part_of(".".join(path.relative_to(ROOT).with_suffix("").parts))
    ours = {name for name in imports(path) if name.split(".")[0] in ("detr_jax", "pallas_kernels")}
    parts = {part_of(name) for name in ours} - {here}
    assert parts <= ALLOWED[here], (
        f"{path.name} imports {sorted(parts - ALLOWED[here])}, which the table does not allow"
    )
    if "pallas_kernels" in parts:
        users = ("attention.py", "deform_conv.py", "encoder_layer.py", "layers.py", "plan.py", "query_order.py")
        assert path.name in users, f"only {', '.join(users)} import pallas_kernels"
    if here == "pallas_kernels":
        assert not [name for name in imports(path) if name.split(".")[0] in ("detr_jax", "flax")]


def test_every_part_is_in_the_table_and_no_circle_is_allowed():
    parts = {p.stem for p in (ROOT / "detr_jax").iterdir() if p.suffix == ".py" or (p / "__init__.py").is_file()}
    assert parts - {"__init__"} == set(ALLOWED) - {"", "pallas_kernels"}
    order: list[str] = []
    while len(order) < len(ALLOWED):
        ready = [part for part in ALLOWED if part not in order and ALLOWED[part] <= set(order)]
        assert ready, f"a circle among {sorted(set(ALLOWED) - set(order))}"
        order += ready


def test_no_circle_of_modules_lazy_imports_included():
    graph = {}
    for path in FILES:
        parts = path.relative_to(ROOT).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        found = {module for name_ in imports(path) for module in modules_of(name_)}
        # A package's face names its own modules, which come in by it: that is no circle.
        graph[name] = {m for m in found if m != name and not (name + ".").startswith(m + ".")}
    done: set[str] = set()

    def visit(module: str, above: tuple[str, ...]) -> None:
        assert module not in above, f"circle: {' -> '.join([*above[above.index(module) :], module])}"
        if module not in done:
            for other in graph.get(module, ()):
                visit(other, (*above, module))
            done.add(module)

    for module in graph:
        visit(module, ())


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_heavy_libraries_are_imported_late(path):
    heavy = {"tensorflow", "tensorflow_datasets", "torch", "transformers", "safetensors", "huggingface_hub", "yaml"}
    assert not [name for name in imports(path, top_level_only=True) if name.split(".")[0] in heavy]


@pytest.mark.parametrize(
    ("statement", "absent"),
    [
        ("import detr_jax", ["jax", "numpy", "matplotlib"]),
        ("from detr_jax import cli", ["jax", "numpy", "matplotlib"]),
        ("from detr_jax import Detector", ["hotcoco", "orbax", "detr_jax.data.pipeline", "detr_jax.train_step"]),
    ],
)
def test_what_an_import_does_not_load(statement, absent):
    """What a user waits for: `detr-jax --help`, and detecting without what training needs."""
    check = f"import sys\n{statement}\nprint([name for name in {absent!r} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", check], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
