"""Notebooks: outputs stripped, no address; each says what it draws, and runs in short form in a clean kernel."""

import ast
import json
import os
import sys
from pathlib import Path

import pytest
from wheel_install import run

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
# Runs a notebook as `jupyter execute` does, in its own process: an error in a cell ends it with the traceback.
EXECUTE = """
import sys
from pathlib import Path
import nbformat
from nbclient import NotebookClient
path, folder = map(Path, sys.argv[1:])
notebook = nbformat.read(path, as_version=4)
NotebookClient(notebook, timeout=1200, kernel_name="python3", resources={"metadata": {"path": str(folder)}}).execute()
nbformat.write(notebook, "executed.ipynb")
"""


def cells(path: Path, kind: str) -> list[str]:
    content = json.loads(path.read_text(encoding="utf-8"))
    return ["".join(cell["source"]) for cell in content["cells"] if cell["cell_type"] == kind]


def test_there_are_notebooks():
    assert NOTEBOOKS


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_stands_in_a_checkout_and_says_what_it_draws(path):
    content = json.loads(path.read_text(encoding="utf-8"))
    assert content["nbformat"] == 4 and content["metadata"]["kernelspec"]["name"] == "python3"
    for cell in content["cells"]:
        assert cell["cell_type"] == "markdown" or (cell["outputs"], cell["execution_count"]) == ([], None)
    assert "**What it draws**: " in cells(path, "markdown")[0]
    assert "://" not in path.read_text(encoding="utf-8"), "an address that may not exist"
    code = cells(path, "code")
    installing = [cell for cell in code if "pip install" in cell]
    assert len(installing) == 1, "one cell installs"
    assert '%pip install -q -e "{REPOSITORY}[tf]"' in installing[0], "what it stands in"
    assert "except ImportError" in installing[0] or "find_spec" in installing[0], "only where it is not installed"
    assert any("DETR_JAX_SHORT" in cell for cell in code), "it has a short form"
    for cell in code:  # what a magic or a shell line does is not checked
        lines = [
            line if line.lstrip()[:1] not in ("%", "!") else " " * (len(line) - len(line.lstrip())) + "pass"
            for line in cell.splitlines()
        ]
        ast.parse("\n".join(lines))


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_runs_from_a_clean_kernel_on_the_wheel(path, installed, tmp_path):
    content = json.loads(path.read_text(encoding="utf-8"))
    check = f"import detr_jax\nassert detr_jax.__file__.startswith({str(installed)!r}), detr_jax.__file__\n"
    cell = {"cell_type": "code", "execution_count": None, "id": "check", "metadata": {}, "outputs": [], "source": check}
    content["cells"].insert(0, cell)
    (tmp_path / "notebook.ipynb").write_text(json.dumps(content), encoding="utf-8")
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    environment |= {"PYTHONPATH": str(installed), "DETR_JAX_SHORT": "1", "JAX_PLATFORMS": "cpu", "MPLBACKEND": "agg"}
    program = [sys.executable, "-c", EXECUTE, "notebook.ipynb", str(ROOT / "notebooks")]
    run(program, cwd=tmp_path, env=environment)
    executed = json.loads((tmp_path / "executed.ipynb").read_text(encoding="utf-8"))
    assert all(cell["execution_count"] for cell in executed["cells"] if cell["cell_type"] == "code")
