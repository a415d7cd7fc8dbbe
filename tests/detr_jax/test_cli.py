"""Command lines: configs, overrides, and what a typo or a wrong path gives."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest
import tiny

from detr_jax import cli, training
from detr_jax.config import Config, DeformableDETRConfig, DETRConfig, LossConfig, OptimConfig, from_dict

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "configs").glob("*.py"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_configs_load_and_say_how_to_run_them(path):
    config = cli.load_config(str(path))
    text = path.read_text()
    assert f"python train.py --config configs/{path.name}" in text
    assert config.train.output_dir == f"runs/{path.stem}"
    softmax = config.loss.classification == "softmax"
    assert softmax == isinstance(config.model, DETRConfig)
    assert config.optim.lr_batch_size == config.train.batch_size
    if path.stem not in ("bccd", "fine_tune"):
        assert "Published: AP" in text and "epochs at batch" in text
        assert f"after {config.train.epochs} epochs at batch {config.train.batch_size}" in text


def test_the_learning_rate_follows_the_batch_size_where_that_is_wanted():
    published = OptimConfig(lr=2e-4, lr_batch_size=32)
    assert published.for_batch(8) is published
    root, linear = (dataclasses.replace(published, lr_scaling=scaling) for scaling in ("sqrt", "linear"))
    assert (root.for_batch(8).lr, linear.for_batch(8).lr) == pytest.approx((1e-4, 5e-5))
    assert root.for_batch(8).for_batch(8) == root.for_batch(8)
    assert training.describe_lr(published, 32) == training.describe_lr(root.for_batch(8), 8) == []
    (line,) = training.describe_lr(published, 8)
    assert line.strip() == (
        "lr 0.0002 is for batches of 32, not 8: --optim.lr-scaling sqrt makes it 0.0001, linear 5e-05"
    )


@pytest.mark.parametrize("status", [0, 143])
def test_an_interrupted_run_ends_with_the_status_that_is_asked_for(monkeypatch, status):
    monkeypatch.setattr(cli, "_start_processes", lambda argv: None)
    monkeypatch.setattr(training, "train", lambda config: None)
    argv = ["--config", str(ROOT / "configs/bccd.py"), "--train.interrupted-status", str(status)]
    if status == 0:
        return cli.train(argv)
    with pytest.raises(SystemExit) as end:
        cli.train(argv)
    assert end.value.code == status


def test_the_published_rows_are_all_there():
    assert {path.stem for path in CONFIGS} >= {
        "detr_r50",
        "detr_r50_dc5",
        "detr_r101",
        "detr_r101_dc5",
        "deformable_detr_r50_single_scale",
        "deformable_detr_r50_single_scale_dc5",
        "deformable_detr_r50",
        "deformable_detr_r50_refine",
        "deformable_detr_r50_two_stage",
    }


def test_any_field_can_be_overridden():
    config = cli.parse_train(
        ["--config", str(ROOT / "configs/deformable_detr_r50_two_stage.py"), "--data.root", "/data/coco"]
        + ["--train.batch-size", "8", "--model.backbone.depth", "101", "--data.scales", "480", "512", "--data.no-flip"]
    )
    assert isinstance(config.model, DeformableDETRConfig) and config.model.two_stage
    assert (config.data.root, config.train.batch_size, config.model.backbone.depth) == ("/data/coco", 8, 101)
    assert config.data.scales == (480, 512) and not config.data.flip


def test_a_typo_gets_did_you_mean(capsys):
    with pytest.raises(SystemExit) as error:
        cli.parse_train(["--config", str(ROOT / "configs/bccd.py"), "--train.bach-size", "8"])
    assert error.value.code == 2
    assert "--train.batch-size" in capsys.readouterr().err


def test_help_lists_fields_with_their_meaning(capsys):
    with pytest.raises(SystemExit) as error:
        cli.parse_train(["--config", str(ROOT / "configs/bccd.py"), "--help"])
    assert error.value.code == 0
    text = capsys.readouterr().out
    assert "--train.batch-size" in text and "Global batch over all devices and hosts" in text


def test_help_of_evaluation_loads_nothing(capsys):
    """The checkpoint may be a name on a hub."""
    with pytest.raises(SystemExit, match="0"):
        cli.parse_eval(["--checkpoint", "somebody/deformable-detr", "--help"])
    assert "--tta" in capsys.readouterr().out


def test_wrong_configs_are_named(tmp_path):
    with pytest.raises(ValueError, match="--config is missing"):
        cli.parse_train([])
    with pytest.raises(ValueError, match=r"nowhere\.py: no such file"):
        cli.parse_train(["--config", "nowhere.py"])
    (tmp_path / "empty.py").write_text("x = 1\n")
    with pytest.raises(ValueError, match="expected `config = Config"):
        cli.parse_train(["--config", str(tmp_path / "empty.py")])


def test_scripts_end_with_a_message_not_a_traceback(tmp_path):
    for script, flags, expected in (
        ("train.py", ["--config", "configs/bccd.py", "--data.root", str(tmp_path)], "no train set found"),
        ("eval.py", ["--checkpoint", str(tmp_path / "none")], "none: no such file or folder; expected a checkpoint"),
    ):
        command = [sys.executable, script, *flags]
        one_device = os.environ | {"XLA_FLAGS": ""}
        result = subprocess.run(command, cwd=ROOT, env=one_device, capture_output=True, text=True, check=False)
        assert result.returncode == 1
        assert expected in result.stderr and "Traceback" not in result.stderr, result.stderr


@pytest.mark.parametrize(
    "config", [tiny.config(), Config(model=DETRConfig.r50_dc5(), loss=LossConfig.detr())], ids=["deformable", "detr"]
)
def test_configuration_survives_json(config):
    import dataclasses
    import json

    stored = json.loads(json.dumps(dataclasses.asdict(config)))
    assert from_dict(stored, type(config.model).__name__) == config


def test_two_stage_needs_refinement():
    with pytest.raises(ValueError, match=r"model\.two_stage needs model\.box_refinement"):
        DeformableDETRConfig(two_stage=True)


@pytest.mark.parametrize(
    ("model", "fields", "message"),
    [
        (DeformableDETRConfig, {"hidden_dim": 80}, r"model\.hidden_dim=80 must be a multiple of 32"),
        (DeformableDETRConfig, {"hidden_dim": 96, "num_heads": 5}, r"must be a multiple of model\.num_heads=5"),
        (DeformableDETRConfig, {"num_levels": 0}, r"model\.num_levels=0 must be at least 1"),
        (DETRConfig, {"hidden_dim": 90, "num_heads": 9}, r"model\.hidden_dim=90 must be a multiple of 4"),
        (DETRConfig, {"num_queries": 0}, r"model\.num_queries=0 must be at least 1"),
    ],
)
def test_sizes_that_cannot_be_built_are_refused(model, fields, message):
    with pytest.raises(ValueError, match=message):
        model(**fields)


def test_jax_was_used_before(monkeypatch):
    """A notebook's process: alone, or refused at once; not "a process did not arrive"."""
    from detr_jax import processes

    assert jax.process_count() == 1
    processes.start()
    for name, value in (("COORDINATOR_ADDRESS", "localhost:1"), ("NUM_PROCESSES", "2"), ("PROCESS_ID", "0")):
        monkeypatch.setenv(f"JAX_{name}", value)
    with pytest.raises(processes.ProcessError, match="JAX_COORDINATOR_ADDRESS is set, but jax was used before"):
        processes.start()


@pytest.mark.parametrize(
    ("program", "parse", "argv"),
    [
        (cli.evaluate, "parse_eval", ["--checkpoint", "runs/x"]),
        (cli.train, "parse_train", ["--init-from", "runs/x", "--data.root", "y"]),
    ],
)
def test_processes_meet_before_a_checkpoint_is_read(program, parse, argv, monkeypatch):
    """Reading one touches a device; jax joins the processes only before that."""
    from detr_jax import processes

    order = []
    monkeypatch.setattr(processes, "start", lambda: order.append("start"))

    def stop(*_):
        order.append("parse")
        raise SystemExit

    monkeypatch.setattr(cli, parse, stop)
    with pytest.raises(SystemExit):
        program(argv)
    assert order == ["start", "parse"]
