"""torchvision's ResNet files: every tensor finds its place, or is named."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import save_file

from detr_jax.config import BackboneConfig, DeformableDETRConfig
from detr_jax.models import build, split
from detr_jax.pretrained import load_backbone, read_tensors, torchvision_name


@pytest.fixture(scope="module")
def detector():
    """A small detector's configuration, parameters and buffers."""
    config = DeformableDETRConfig(
        backbone=BackboneConfig(depth=18), hidden_dim=32, encoder_layers=1, decoder_layers=1, num_levels=1
    )
    return split(config, build(config, rngs=nnx.Rngs(0)))


@pytest.fixture(scope="module")
def tensors():
    """ResNet-18 with torchvision's names and shapes, written from its architecture."""
    rng = np.random.default_rng(0)
    tensors = {"conv1.weight": (64, 3, 7, 7), "fc.weight": (1000, 512), "fc.bias": (1000,)}
    norms = {"bn1": 64}
    n_in = 64
    for layer, width in enumerate((64, 128, 256, 512), 1):
        for block in range(2):
            name = f"layer{layer}.{block}"
            tensors[f"{name}.conv1.weight"] = (width, n_in, 3, 3)
            tensors[f"{name}.conv2.weight"] = (width, width, 3, 3)
            norms |= {f"{name}.bn1": width, f"{name}.bn2": width}
            if n_in != width:
                tensors[f"{name}.downsample.0.weight"] = (width, n_in, 1, 1)
                norms[f"{name}.downsample.1"] = width
            n_in = width
    for name, width in norms.items():
        tensors |= {f"{name}.{part}": (width,) for part in ("weight", "bias", "running_mean", "running_var")}
    values = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in tensors.items()}
    return values | {f"{name}.num_batches_tracked": np.array(7) for name in norms}


def test_every_tensor_lands_where_its_name_says(detector, tensors, tmp_path):
    _, params, buffers = detector
    save_file(tensors, tmp_path / "resnet18.safetensors")
    new_params, new_buffers = load_backbone(str(tmp_path / "resnet18.safetensors"), params, buffers)
    leaves = jax.tree_util.tree_leaves_with_path((new_params["backbone"], new_buffers["backbone"]))
    names = {torchvision_name(tuple(part.key for part in path[1:])) for path, _ in leaves}
    assert names == {name for name in tensors if not name.startswith("fc.") and "num_batches" not in name}
    kernel = new_params["backbone"]["stages"][1][0]["convs"][0]["kernel"]
    np.testing.assert_array_equal(kernel, tensors["layer2.0.conv1.weight"].transpose(2, 3, 1, 0))
    np.testing.assert_array_equal(new_buffers["backbone"]["stem_norm"]["var"], tensors["bn1.running_var"])
    np.testing.assert_array_equal(new_params["level_embed"], params["level_embed"])


def test_tensors_that_do_not_fit_are_named_with_both_shapes(detector, tensors, tmp_path):
    _, params, buffers = detector
    wrong = dict(tensors)
    wrong["layer1.0.conv1.weight"] = np.zeros((64, 64, 1, 1), np.float32)
    wrong["layer9.weight"] = np.zeros(3, np.float32)
    del wrong["bn1.bias"]
    save_file(wrong, tmp_path / "wrong.safetensors")
    with pytest.raises(ValueError, match="3 tensors do not fit") as error:
        load_backbone(str(tmp_path / "wrong.safetensors"), params, buffers)
    message = str(error.value)
    assert "layer1.0.conv1.weight: (1, 1, 64, 64), expected (3, 3, 64, 64)" in message
    assert "bn1.bias: missing, expected (64,)" in message
    assert "layer9.weight: (3,), not expected" in message


def test_group_norm_is_refused(tmp_path, tensors):
    save_file(tensors, tmp_path / "resnet18.safetensors")
    buffers = {"backbone": {"stem_norm": {}}}
    with pytest.raises(ValueError, match="norm='frozen_batch', got 'group'"):
        load_backbone(str(tmp_path / "resnet18.safetensors"), {"level_embed": jnp.zeros(1)}, buffers)


def test_missing_and_foreign_files(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no such file; expected a \.safetensors or \.pth"):
        read_tensors(str(tmp_path / "none.safetensors"))
    (tmp_path / "weights.bin").write_bytes(b"")
    with pytest.raises(ValueError, match=r"expected a \.safetensors or \.pth file"):
        read_tensors(str(tmp_path / "weights.bin"))
