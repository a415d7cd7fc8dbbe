"""Weights from elsewhere: torchvision's ResNets for the backbone."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

_NORM = {"weight": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var"}


def torchvision_name(path: tuple[str | int, ...]) -> str:
    """Name of a backbone tensor in torchvision, for its path below `backbone`."""
    match path:
        case ("stem_conv", "kernel"):
            return "conv1.weight"
        case ("stem_norm", part):
            return f"bn1.{_NORM[str(part)]}"
        case ("stages", int(stage), int(block), "convs", int(i), "kernel"):
            return f"layer{stage + 1}.{block}.conv{i + 1}.weight"
        case ("stages", int(stage), int(block), "norms", int(i), part):
            return f"layer{stage + 1}.{block}.bn{i + 1}.{_NORM[str(part)]}"
        case ("stages", int(stage), int(block), "downsample_conv", "kernel"):
            return f"layer{stage + 1}.{block}.downsample.0.weight"
        case ("stages", int(stage), int(block), "downsample_norm", part):
            return f"layer{stage + 1}.{block}.downsample.1.{_NORM[str(part)]}"
    raise KeyError(path)


def read_tensors(path: str) -> dict[str, np.ndarray]:
    """The tensors of a `.safetensors` file, or of a `.pth` file (needs torch; pickled code in it does not run).

    Raises:
        FileNotFoundError: no such file.
        ValueError: neither of the two formats.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such file; expected a .safetensors or .pth file of tensors")
    if path.endswith(".safetensors"):
        from safetensors.numpy import load_file

        return load_file(path)
    if path.endswith((".pth", ".pt")):
        import torch  # pyright: ignore[reportMissingImports]

        tensors = torch.load(path, map_location="cpu", weights_only=True)
        return {name: tensor.numpy() for name, tensor in tensors.items()}
    raise ValueError(f"{path}: expected a .safetensors or .pth file")


def load_backbone(path: str, params: Mapping[str, Any], buffers: Mapping[str, Any]) -> tuple[dict, dict]:
    """`params` and `buffers` of a detector with its backbone taken from torchvision's ResNet weights in `path`.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file's tensors are not those of this backbone; names the first that do not fit.
    """
    if "mean" not in buffers.get("backbone", {}).get("stem_norm", {}):
        raise ValueError(f"{path}: torchvision's weights are for model.backbone.norm='frozen_batch', got 'group'")
    tensors = read_tensors(path)
    # The classifier and BatchNorm's step counters have no place in a detector.
    unused = {name for name in tensors if not name.startswith("fc.") and not name.endswith("num_batches_tracked")}
    problems = []

    def replace(location, leaf):
        keys = tuple(part.key for part in location[1:])
        if keys[0] != "backbone":
            return leaf
        name = torchvision_name(keys[1:])
        unused.discard(name)
        tensor = tensors.get(name)
        if tensor is not None and tensor.ndim == 4:
            tensor = tensor.transpose(2, 3, 1, 0)  # [out, in, h, w] -> [h, w, in, out]
        if tensor is None or tensor.shape != leaf.shape:
            problems.append(f"  {name}: {'missing' if tensor is None else tensor.shape}, expected {leaf.shape}")
            return leaf
        return jax.device_put(jnp.asarray(tensor, leaf.dtype), leaf.sharding)

    loaded = jax.tree_util.tree_map_with_path(replace, (dict(params), dict(buffers)))
    problems += [f"  {name}: {tensors[name].shape}, not expected" for name in sorted(unused)]
    if problems:
        raise ValueError(
            f"{path}: {len(problems)} tensors do not fit the backbone:\n" + "\n".join(problems[:8]) + "\n"
            "Is it torchvision's file for the ResNet of model.backbone.depth?"
        )
    return loaded
