"""Files of tensors: `.safetensors`, `.pth` without running what is pickled in it, folders of `transformers`."""

import json
import tempfile
from collections.abc import Mapping
from typing import Any

import numpy as np
from etils.epath import Path, PathLike

from detr_jax.categories import Categories
from detr_jax.config import MEAN, STD, model_from_dict
from detr_jax.errors import NotFoundError, UserError

Tensors = dict[str, np.ndarray]

_AVERAGED = ("ema", "model_ema", "ema_model", "ema_state_dict", "state_dict_ema")
_WRAPPERS = (*_AVERAGED, "model", "model_state_dict", "state_dict", "module")
"""Entries of a `.pth` file under which the tensors may be, those that are preferred first."""
_PATHS = tuple(
    f"{module}.{kind}{name}"
    for module in ("pathlib", "pathlib._local")
    for kind in ("", "Pure")
    for name in ("Path", "PosixPath", "WindowsPath")
)


def read_tensors(path: PathLike) -> tuple[Tensors, dict[str, Any]]:
    """The tensors of a file or folder as float32, and what else it says about the model.

    `.pth` needs torch. Pickled code in it does not run: what is not a tensor or a plain value is refused.

    Returns:
        Tensors by name, and facts: fields of the model's configuration, `categories`, `scale` and `max_size` of images,
        `notes` on where the tensors were, or all of `config`.

    Raises:
        FileNotFoundError: no such file.
        ValueError: of another format, damaged, with pickled objects that are not plain values, or of images that are
            prepared in another way than here.
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
    if path.suffix in (".pth", ".pt", ".bin", ".ckpt"):
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
    except (SafetensorError, ValueError, TypeError) as error:
        raise UserError(f"{path}: not a .safetensors file, or a damaged one: {error}") from error
    if facts:
        try:
            facts = {
                "config": model_from_dict(facts["config"], facts["model"]),
                "categories": Categories(tuple(facts["category_ids"]), tuple(facts["category_names"])),
                **{name: facts[name] for name in ("scale", "max_size") if name in facts},
            }
        except (KeyError, TypeError) as error:
            raise UserError(
                f"{path}: its metadata 'detr_jax' is not of this version: {error}. Update detr_jax, or read it with "
                "the version that wrote it"
            ) from error
    return tensors, facts


def _read_torch(path: Path) -> tuple[Tensors, dict[str, Any]]:
    import argparse
    import pickle
    import zipfile

    try:
        import torch  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise UserError(
            f"{path}: reading .pth needs PyTorch: pip install torch --index-url https://download.pytorch.org/whl/cpu"
        ) from error
    try:
        # The official files hold their command line, a Namespace of plain values and paths; mmdetection's, its log.
        # (Files from before PyTorch 1.6 are no zip archives, the only ones that it can look into.)
        unknown = torch.serialization.get_unsafe_globals_in_checkpoint(path) if zipfile.is_zipfile(path) else []
        inert = [name for name in unknown if name.split(".")[0] in ("mmengine", "mmcv", "mmdet", "numpy")]
        allowed = [argparse.Namespace, *((_Inert, name) for name in (*inert, *_PATHS))]
        with torch.serialization.safe_globals(allowed):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError, IndexError) as error:
        raise UserError(
            f"{path}: refused, since it is damaged or holds more than tensors and plain values, which could run code. "
            f"If you trust it, save its tensors alone where it comes from. PyTorch says: {error}"
        ) from error
    if not isinstance(content, Mapping):
        raise UserError(f"{path}: holds a {type(content).__name__}; expected a dict of tensors by name")
    given = content.get("args")
    args = vars(given) if isinstance(given, argparse.Namespace) else dict(given) if isinstance(given, Mapping) else {}
    names = {
        "nheads": "num_heads",
        "num_queries": "num_queries",
        "dilation": "dilation",
        "enc_n_points": "encoder_points",
        "dec_n_points": "decoder_points",
    }
    facts = {ours: args[theirs] for theirs, ours in names.items() if args.get(theirs) is not None}

    def has_tensors(value: Any) -> bool:
        return isinstance(value, Mapping) and any(isinstance(v, torch.Tensor) or has_tensors(v) for v in value.values())

    state, place = content, []
    while there := [name for name in _WRAPPERS if has_tensors(state.get(name))]:
        place.append(there[0])
        state = state[there[0]]
        others = [name for name in there[1:] if name != "module"]
        if others:
            facts["notes"] = [f"weights of {place[-1]!r}, not of {' or '.join(map(repr, others))}, which it has too"]
    if place and place != ["model"] and "notes" not in facts:
        facts["notes"] = [f"weights in {' / '.join(map(repr, place))}"]
    found = {name: tensor for name, tensor in state.items() if isinstance(tensor, torch.Tensor)}
    if empty := [name for name, tensor in found.items() if tensor.is_meta]:
        raise UserError(f"{path}: {len(empty)} tensors have no values (PyTorch's meta device), such as {empty[0]}")
    return {name: tensor.detach().to_dense().float().numpy() for name, tensor in found.items()}, facts


def _read_transformers(folder: Path) -> tuple[Tensors, dict[str, Any]]:
    files = weight_files(folder)
    config = _read_json(folder / "config.json")
    tensors: Tensors = {}
    for file in files:
        tensors |= read_tensors(file)[0]
    names = {
        "encoder_attention_heads": "num_heads",
        "two_stage_num_proposals" if config.get("two_stage") else "num_queries": "num_queries",
        "dilation": "dilation",
        "encoder_n_points": "encoder_points",
        "decoder_n_points": "decoder_points",
    }
    facts = {ours: config[theirs] for theirs, ours in names.items() if config.get(theirs) is not None}
    facts.setdefault("dilation", False)
    labels = {int(label): str(name) for label, name in (config.get("id2label") or {}).items()}
    if labels and not all(name.startswith("LABEL_") for name in labels.values()):
        facts["categories"] = Categories(tuple(sorted(labels)), tuple(labels[i] for i in sorted(labels)))
    return tensors, facts | _read_preprocessor(folder)


def weight_files(folder: Path) -> list[Path]:
    """The files of tensors in a folder of `transformers`: one, or the shards that its index lists.

    Raises:
        ValueError: none, no `config.json`, or a shard is missing.
    """
    for name in ("model.safetensors", "pytorch_model.bin"):
        if not (folder / "config.json").is_file():
            break
        index = folder / f"{name}.index.json"
        if (folder / name).is_file():
            return [folder / name]
        if index.is_file():
            shards = [folder / shard for shard in sorted(set(_read_json(index).get("weight_map", {}).values()))]
            missing = [shard.name for shard in shards if not shard.is_file()]
            if missing or not shards:
                raise UserError(f"{index}: names {', '.join(missing) or 'no file'}, which is missing: fetch it again")
            return shards
    names = ", ".join(sorted(p.name for p in folder.iterdir())[:10]) or "nothing"
    raise UserError(f"{folder}: expected config.json and model.safetensors of transformers, found {names}")


def _read_preprocessor(folder: Path) -> dict[str, Any]:
    """How images are prepared, of `preprocessor_config.json` (or `processor_config.json`): `scale`, `max_size`."""
    path = folder / "preprocessor_config.json"
    if path.is_file():
        values = _read_json(path)
    else:
        path = folder / "processor_config.json"
        values = _read_json(path).get("image_processor", {}) if path.is_file() else {}
    size = values.get("size", {})
    if isinstance(size, int):
        size = {"shortest_edge": size, "longest_edge": values.get("max_size", 1333)}
    expected: dict[str, Any] = {
        "image_mean": MEAN,
        "image_std": STD,
        "rescale_factor": 1 / 255,
        "do_resize": True,
        "do_rescale": True,
        "do_normalize": True,
        "resample": 2,  # bilinear
    }
    for name, wanted in expected.items():
        got = values.get(name, wanted)
        if np.shape(got) != np.shape(wanted) or not np.allclose(np.asarray(got, float), wanted, rtol=1e-4):
            raise UserError(f"{path}: {name}: got {got}, expected {wanted}: images are prepared in another way here")
    if size and not set(size) <= {"shortest_edge", "longest_edge"}:
        raise UserError(f"{path}: size: got {size}, expected shortest_edge and longest_edge")
    names = {"shortest_edge": "scale", "longest_edge": "max_size"}
    return {names[name]: int(value) for name, value in size.items() if value}


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not JSON, or damaged: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: got a {type(content).__name__}, expected an object of JSON")
    return content


class _Inert:
    """Stands for a pickled object of another library: keeps nothing, does nothing."""

    def __init__(self, *args: Any, **kwargs: Any):
        pass

    def __setstate__(self, state: Any) -> None:
        pass
