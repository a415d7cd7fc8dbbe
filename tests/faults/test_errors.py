"""A user's mistake ends in one message, a bug of ours in its traceback; a config's own bug names its line."""

import sys
from pathlib import Path

import pytest

from detr_jax import cli
from detr_jax.errors import DataError, NotFoundError, UserError
from detr_jax.training import NonFiniteLossError

ROOT = Path(__file__).parent.parent.parent


def run(main, monkeypatch, argv=()) -> None:
    monkeypatch.setattr(sys, "argv", ["program", *map(str, argv)])
    cli.run(main)


@pytest.mark.parametrize("kind", [UserError, DataError, NotFoundError, NonFiniteLossError])
def test_a_users_mistake_is_one_message(kind, monkeypatch):
    def main(argv):
        raise kind("a.json: images: got 3, expected a list")

    with pytest.raises(SystemExit) as end:
        run(main, monkeypatch)
    assert end.value.code == "error: a.json: images: got 3, expected a list"  # which Python prints, and exits with 1
    assert issubclass(NotFoundError, FileNotFoundError)


@pytest.mark.parametrize("kind", [ValueError, TypeError, KeyError, AssertionError])
def test_a_bug_keeps_its_traceback(kind, monkeypatch):
    def main(argv):
        raise kind("inside")

    with pytest.raises(kind, match="inside"):
        run(main, monkeypatch)


def test_a_file_that_cannot_be_written_is_one_message(tmp_path, monkeypatch):
    with pytest.raises(SystemExit, match=r"error: .*none/results\.json: No such file or directory"):
        run(lambda argv: (tmp_path / "none/results.json").write_text(""), monkeypatch)
    with pytest.raises(OSError, match="no name"):  # nothing to name: not a user's
        run(lambda argv: (_ for _ in ()).throw(OSError("no name")), monkeypatch)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x = 1\nconfig = undefined\n", r"mine\.py, line 2: NameError: name 'undefined' is not defined"),
        ("from detr_jax.config import Config\n\nconfig = Config(\n", r"mine\.py, line 3: SyntaxError: '\(' was never"),
        (
            "from detr_jax.config import DETRConfig\nmodel = DETRConfig(num_queries=0)\n",
            r"mine\.py, line 2: model\.num_queries=0 must be at least 1",
        ),
        ("from detr_jax.config import DETRConfig\nmodel = DETRConfig(queries=0)\n", r"line 2: TypeError: .*'queries'"),
        ("import nothing_like_it\n", r"line 1: ModuleNotFoundError: No module named 'nothing_like_it'"),
        ("config = 3\n", r"mine\.py: expected `config = Config\(\.\.\.\)`, got 3"),
    ],
)
def test_a_mistake_in_a_config_names_its_line(text, message, tmp_path):
    (tmp_path / "mine.py").write_text(text)
    with pytest.raises(UserError, match=message):
        cli.load_config(str(tmp_path / "mine.py"))


def test_a_bug_of_ours_under_a_config_keeps_its_traceback(tmp_path, monkeypatch):
    monkeypatch.setattr("detr_jax.config._check_model", lambda model, multiple: model.no_such_field)
    (tmp_path / "mine.py").write_text("from detr_jax.config import DETRConfig\nmodel = DETRConfig()\n")
    with pytest.raises(AttributeError, match="no_such_field"):
        cli.load_config(str(tmp_path / "mine.py"))


@pytest.mark.parametrize("name", ["README.md", "configs", "configs/none.py"])
def test_what_is_no_config_is_refused(name):
    with pytest.raises(UserError, match=f"--config .*{name}: (expected a Python file|no such file)"):
        cli.load_config(str(ROOT / name))
