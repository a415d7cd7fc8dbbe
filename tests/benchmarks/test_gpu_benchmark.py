"""`benchmarks/gpu.py` where there is no GPU: its message, its arguments, its table, and a run in the interpreter."""

import importlib.util
import re
import sys
from pathlib import Path

import jax
import numpy as np
import pytest


@pytest.fixture(scope="module")
def benchmark():
    path = Path(__file__).parents[2] / "benchmarks" / "gpu.py"
    spec = importlib.util.spec_from_file_location("gpu_benchmark", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def precision():
    """The benchmark sets it for its process."""
    yield
    jax.config.update("jax_default_matmul_precision", None)


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="there is a GPU")
def test_without_a_gpu(benchmark):
    with pytest.raises(SystemExit, match=r"needs an NVIDIA GPU, and JAX sees only 'cpu'.*--interpret"):
        benchmark.main([])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--batches", "0"], "'0' is not a positive number"),
        (["--shapes", "encoder"], "invalid choice: 'encoder'.*encoder_800x1333"),
        (["--types", "float16"], "invalid choice: 'float16'"),
    ],
)
def test_wrong_arguments(benchmark, arguments, message, capsys):
    with pytest.raises(SystemExit):
        benchmark.main(arguments)
    assert re.search(message, capsys.readouterr().err)


def test_official_extension_that_is_not_there(benchmark, tmp_path, monkeypatch):
    monkeypatch.setattr("sys.path", [*sys.path])
    with pytest.raises(SystemExit, match="cannot import torch and MultiScaleDeformableAttention from there"):
        benchmark.main(["--interpret", "--official", str(tmp_path)])


def test_interpreted_run(benchmark, precision, capsys):
    benchmark.main(["--interpret", "--batches", "2", "--rounds", "1", "--types", "bfloat16"])
    lines = capsys.readouterr().out.splitlines()
    assert "times mean nothing" in lines[0]
    assert " ".join(lines[1].split()) == "shape type batch pass gpu ms xla ms reference ms xla / gpu reference / gpu"
    assert [line.split()[:4] for line in lines[2:]] == [
        [f"{part}_tiny", "bfloat16", "2", direction]
        for part in ("encoder", "decoder")
        for direction in ("forward", "forward+backward")
    ]


def test_disagreement_stops(benchmark):
    expected = [np.ones((2, 3), np.float32)]
    benchmark.check("a", [np.full((2, 3), 1 + 1e-6, np.float32)], expected, np.dtype("float32"))
    for wrong in (1.001, np.nan):
        with pytest.raises(SystemExit, match=r"a: output is .* off the reference"):
            benchmark.check("a", [np.full((2, 3), wrong, np.float32)], expected, np.dtype("float32"))


def test_table(benchmark):
    times = {"gpu": 0.001, "xla": 0.0125, "reference": None, "official": 0.0015}
    slow = {"gpu": None, "xla": 1.0, "reference": None, "official": None}
    rows = [("encoder", "float32", 1, "forward", times), ("decoder_long", "bfloat16", 8, "forward+backward", slow)]
    assert benchmark.table(rows).splitlines() == [
        "shape         type      batch  pass              gpu ms    xla ms  official ms  xla / gpu  official / gpu",
        "encoder       float32       1  forward            1.000    12.500        1.500      12.50            1.50",
        "decoder_long  bfloat16      8  forward+backward       -  1000.000            -          -               -",
    ]
