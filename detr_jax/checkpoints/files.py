"""Files of tensors: `.safetensors`, `.pth` without running what is pickled in it, folders of `transformers`."""

import json
import tempfile
from typing import Any

import numpy as np
from etils.epath import Path, PathLike

from detr_jax.categories import Categories
from detr_jax.config import model_from_dict
from detr_jax.errors import NotFoundError, UserError

Tensors = dict[str, np.ndarray]


def read_tensors(path: PathLike) -> tuple[Tensors, dict[str, Any]]:
    """The tensors of a file or folder as float32, and what it says about the model besides.

    `.pth` needs torch. Pickled code in it does not run: what is not a tensor or a plain value is refused.

    Returns:
        Tensors by name, and facts: fields of the model's configuration, `categories`, or all of `config`.

    Raises:
        FileNotFoundError: no such file.
        ValueError: of another format, or with pickled objects that are not plain values.
    """
    path = Path(path)
    if "://" in str(path) and path.exists():  # the readers below want a local file
        with tempfile.TemporaryDirectory() as folder:
            return read_tensors(_copy(path, Path(folder) / path.name))
    if path.is_dir():
        return _read_transformers(path)
    if not path.is_file():
        raise NotFoundError(f"{path}: no such file; expected a .safetensors or .pth file of tensors, or a folder")
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    if path.suffix in (".pth", ".pt", ".bin"):
        return _read_torch(path)
    raise UserError(f"{path}: expected a .safetensors or .pth file, or a folder of transformers")


def _copy(source: Path, target: Path) -> Path:
    """A file or folder of a bucket, copied."""
    if source.is_dir():
        target.mkdir()
        for path in source.iterdir():
            _copy(path, target / path.name)
    else:
        source.copy(target)
    return target


def _read_safetensors(path: Path) -> tuple[Tensors, dict[str, Any]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            facts = json.loads((file.metadata() or {}).get("detr_jax", "{}"))
            tensors = {name: np.asarray(file.get_tensor(name), np.float32) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise UserError(f"{path}: not a .safetensors file, or a damaged one: {error}") from error
    if facts:
        facts = {
            "config": model_from_dict(facts["config"], facts["model"]),
            "categories": Categories(tuple(facts["category_ids"]), tuple(facts["category_names"])),
        }
    return tensors, facts


def _read_torch(path: Path) -> tuple[Tensors, dict[str, Any]]:
    import argparse
    import pickle
    import zipfile

    try:
        import torch  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise UserError(
            f"{path}: reading .pth takes PyTorch: pip install torch --index-url https://download.pytorch.org/whl/cpu"
        ) from error
    try:
        # The official files hold their command line, a Namespace of plain values; mmdetection's, its log.
        # (Files of before PyTorch 1.6 are no zip archives, which is all that it can look into.)
        unknown = torch.serialization.get_unsafe_globals_in_checkpoint(path) if zipfile.is_zipfile(path) else []
        inert = [(_Inert, name) for name in unknown if name.split(".")[0] in ("mmengine", "mmcv", "mmdet", "numpy")]
        with torch.serialization.safe_globals([argparse.Namespace, *inert]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise UserError(
            f"{path}: refused, since it is damaged or holds more than tensors and plain values, which could run code. "
            f"If you trust it, save its tensors alone where it comes from. PyTorch says: {error}"
        ) from error
    args = vars(content["args"]) if isinstance(content.get("args"), argparse.Namespace) else {}
    names = {
        "nheads": "num_heads",
        "num_queries": "num_queries",
        "dilation": "dilation",
        "enc_n_points": "encoder_points",
        "dec_n_points": "decoder_points",
    }
    facts = {ours: args[theirs] for theirs, ours in names.items() if theirs in args}
    state = content.get("model", content.get("state_dict", content))
    tensors = {name: t.float().numpy() for name, t in state.items() if isinstance(t, torch.Tensor)}
    return tensors, facts


def _read_transformers(folder: Path) -> tuple[Tensors, dict[str, Any]]:
    files = sorted(folder.glob("model*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))
    config_file = folder / "config.json"
    if not files or not config_file.is_file():
        names = ", ".join(sorted(p.name for p in folder.iterdir())[:10]) or "nothing"
        raise UserError(f"{folder}: expected config.json and model.safetensors of transformers, found {names}")
    tensors: Tensors = {}
    for file in files:
        tensors |= read_tensors(file)[0]
    config = json.loads(config_file.read_text())
    names = {
        "encoder_attention_heads": "num_heads",
        "two_stage_num_proposals" if config.get("two_stage") else "num_queries": "num_queries",
        "dilation": "dilation",
        "encoder_n_points": "encoder_points",
        "decoder_n_points": "decoder_points",
    }
    facts = {ours: config[theirs] for theirs, ours in names.items() if config.get(theirs) is not None}
    facts.setdefault("dilation", False)
    labels = {int(label): name for label, name in (config.get("id2label") or {}).items()}
    if labels and len(labels) != 91 and not all(name.startswith("LABEL_") for name in labels.values()):
        facts["categories"] = Categories(tuple(sorted(labels)), tuple(labels[i] for i in sorted(labels)))
    return tensors, facts


class _Inert:
    """Stands for a pickled object of another library: keeps nothing, does nothing."""

    def __init__(self, *args: Any, **kwargs: Any):
        pass

    def __setstate__(self, state: Any) -> None:
        pass
