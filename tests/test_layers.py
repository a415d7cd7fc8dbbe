"""The packages import one way only, and heavy libraries only where they are used."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LEVELS = {
    **dict.fromkeys(["config", "boxes", "categories", "exported"], 0),
    **dict.fromkeys(["matching", "losses", "models", "data", "dialects", "pretrained", "tensor_files"], 1),
    **dict.fromkeys(["sharding", "checkpoint", "metrics"], 2),
    **dict.fromkeys(["pictures", "panels", "curves", "inspection", "errors"], 3),
    **dict.fromkeys(["attention_figures", "prediction_figures", "error_figures", "visualize"], 3),
    **dict.fromkeys(["evaluation", "detector", "training", "cli"], 3),
    **dict.fromkeys(["surgery", "transplant", "pruning", "soup", "export"], 3),
}
FILES = sorted([*(ROOT / "detr_jax").rglob("*.py"), *(ROOT / "pallas_kernels").rglob("*.py")])


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


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_one_way(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    names = imports(path)
    if parts[0] == "pallas_kernels":
        assert not [name for name in names if name.split(".")[0] in ("detr_jax", "flax")]
        return
    if parts != ("detr_jax", "models", "attention"):
        assert not [name for name in names if name.split(".")[0] == "pallas_kernels"]
    if parts == ("detr_jax", "__init__"):
        return
    for name in names:
        imported = name.split(".")
        if imported[0] == "detr_jax":
            assert LEVELS[imported[1]] <= LEVELS[parts[1]], f"{path.name} imports {name}, which is above it"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_heavy_libraries_are_imported_late(path):
    heavy = {"tensorflow", "tensorflow_datasets", "torch", "transformers", "safetensors"}
    assert not [name for name in imports(path, top_level_only=True) if name.split(".")[0] in heavy]


def test_every_module_has_a_level():
    modules = {p.stem for p in (ROOT / "detr_jax").iterdir() if p.suffix == ".py" or (p / "__init__.py").is_file()}
    assert modules - {"__init__"} == set(LEVELS)
