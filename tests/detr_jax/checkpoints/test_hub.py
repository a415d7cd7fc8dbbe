"""Checkpoints by name, from a local endpoint that serves the hub's API; offline afterwards."""

import json
import os
import subprocess
import sys
from pathlib import Path

import hub_server
import pytest

from detr_jax.checkpoints import hub

# The module alone, without the package and jax, which it does not need.
SCRIPT = """
import importlib.util, sys
spec = importlib.util.spec_from_file_location("hub", sys.argv[1])
spec.loader.exec_module(hub := importlib.util.module_from_spec(spec))
for name in sys.argv[2:]:
    try:
        print(sorted(p.name for p in hub.locate(name).iterdir()))
    except FileNotFoundError as error:
        print(error)
"""


def locate(tmp_path: Path, endpoint: str, *names: str, **variables: str) -> list[str]:
    """The files that each name gives, or the error, in a process of its own: the endpoint is read on import."""
    env = os.environ | {"HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path / "cache"), "HF_HUB_DISABLE_XET": "1"}
    command = [sys.executable, "-c", SCRIPT, hub.__file__, *names]
    run = subprocess.run(command, env=env | variables, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert run.returncode == 0, run.stderr
    return run.stdout.splitlines()


def test_by_name_then_offline(tmp_path):
    whole, pickled = tmp_path / "hub/org/whole", tmp_path / "hub/org/pickled"
    for folder in (whole, pickled):
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(json.dumps({"model_type": "detr"}))
        (folder / "pytorch_model.bin").write_bytes(b"pickled")
    (whole / "model.safetensors").write_bytes(b"12345678{}")
    (whole / "training_args.py").write_text("")
    with hub_server.serve(tmp_path / "hub") as (endpoint, asked):
        found = locate(tmp_path, endpoint, "org/whole", "org/whole@v1", "org/whole@v9", "org/pickled", "org/none")
    assert found[:2] == ["['config.json', 'model.safetensors']"] * 2
    assert found[2] == "org/whole@v9: the hub's repository has no such revision"
    assert found[3].startswith("org/pickled: the repository has no model.safetensors (found config.json)")
    assert found[4].startswith("org/none: no such file or folder here, and no such repository on the hub")
    assert not [path for path in asked if path.endswith((".bin", ".py"))]
    # The endpoint is gone: what was fetched is found, what was not is said.
    for variables in ({}, {"HF_HUB_OFFLINE": "1"}):
        found = locate(tmp_path, endpoint, "org/whole", "org/other", **variables)
        assert found[0] == "['config.json', 'model.safetensors']"
        assert found[1].startswith("org/other: no such file or folder here; not in the cache of huggingface_hub")


def test_what_is_a_path_is_not_asked_for(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hub, "_fetch", lambda *_: pytest.fail("asked the hub"))
    (tmp_path / "runs/bccd").mkdir(parents=True)
    assert hub.locate("runs/bccd") == Path("runs/bccd")
    for path in ("r50.pth", "weights/r50.safetensors", "/none/at/all", "./runs/x", "a/b/c"):
        assert hub.locate(path) == Path(path)
    with pytest.raises(FileNotFoundError, match=r"runs/bcd: no such file or folder in runs/"):
        hub.locate("runs/bcd")
