"""ResNet, ResNeXt and deformable backbones: published sizes, torchvision's outputs, and how a new one starts."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from detr_jax.checkpoints.convert import canonical
from detr_jax.checkpoints.key_maps import TORCHVISION, compile_rows, rename
from detr_jax.config import BackboneConfig, DeformableDETRConfig
from detr_jax.models import build_abstract
from detr_jax.models.deform_conv import DeformConv
from detr_jax.models.layers import Conv
from detr_jax.models.resnet import ResNet

FC = 2048 * 1000 + 1000
# `num_params` of torchvision's weights, BatchNorm's affine included, the classifier not.
PUBLISHED = {
    "resnet101": (BackboneConfig(depth=101), 44_549_160 - FC),
    "resnext101_32x8d": (BackboneConfig.resnext101_32x8d(), 88_791_336 - FC),
    "resnext101_64x4d": (BackboneConfig.resnext101_64x4d(), 83_455_272 - FC),
}


def shapes(module):
    """Of a module's tensors, by our names with PyTorch's leaves."""
    return {canonical(path): leaf.shape for path, leaf in nnx.to_flat_state(nnx.state(module))}


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameter_counts_are_the_published_ones(name):
    config, published = PUBLISHED[name]
    found = shapes(nnx.eval_shape(lambda: ResNet(config, rngs=nnx.Rngs(0))))
    assert sum(math.prod(shape) for key, shape in found.items() if "running" not in key) == published


def test_deformable_convolutions_are_in_c3_to_c5():
    """mmdetection's `stage_with_dcn=(False, True, True, True)`; 27 channels for 9 taps, 3 x 3 from each width."""
    config = DeformableDETRConfig.x101_dcn_two_stage()
    found = shapes(build_abstract(config))
    offsets = {key: shape for key, shape in found.items() if ".offset." in key}
    blocks = {".".join(key.split(".")[2:4]) for key in offsets}
    assert blocks == {f"{stage}.{i}" for stage, n in ((1, 4), (2, 23), (3, 3)) for i in range(n)}
    plain = shapes(build_abstract(DeformableDETRConfig.x101_two_stage()))
    more = sum(math.prod(shape) for shape in found.values()) - sum(math.prod(shape) for shape in plain.values())
    assert more == sum(n * (9 * width * 27 + 27) for n, width in ((4, 512), (23, 1024), (3, 2048)))


@pytest.mark.parametrize("version", [1, 2])
def test_a_new_deformable_convolution_is_a_convolution(version):
    """Of any groups, stride and dilation."""
    options = {"stride": 2, "dilation": 2, "groups": 4}
    x = jax.random.normal(jax.random.key(0), (2, 9, 7, 16))
    conv = Conv(16, 8, 3, **options, rngs=nnx.Rngs(0))
    deformable = DeformConv(16, 8, version=version, offset_groups=2, **options, rngs=nnx.Rngs(0))
    np.testing.assert_allclose(deformable(x), conv(x), rtol=0, atol=2e-6)


def test_offsets_train():
    """They get gradients, and move the output."""
    layer = DeformConv(16, 8, version=2, rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(0), (1, 5, 6, 16))
    graphdef, params = nnx.split(layer)
    gradients = jax.grad(lambda params: jnp.sin(nnx.merge(graphdef, params)(x)).sum())(params)
    assert all(bool(jnp.any(z != 0)) for z in jax.tree.leaves(gradients))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"depth": 34, "groups": 32, "group_width": 4}, "needs bottleneck blocks: set .* to 50 or 101, got 34"),
        ({"groups": 0}, r"model\.backbone\.groups=0 must be at least 1"),
        ({"deform_version": 1, "deform_groups": 3}, "deform_groups=3 must divide the 128 channels"),
        ({"depth": 50, "groups": 1, "group_width": 4, "norm": "group"}, "= 4 must be a multiple of 32"),
    ],
)
def test_impossible_backbones(fields, message):
    with pytest.raises(ValueError, match=message):
        BackboneConfig(**fields)


@pytest.mark.parity
@pytest.mark.parametrize("name", ["resnet50", "resnext101_32x8d", "resnext101_64x4d"])
def test_outputs_are_torchvisions(name):
    """Every tensor of theirs has a place here, and the maps are equal on equal weights."""
    torchvision = pytest.importorskip("torchvision", reason="compared where torchvision is installed")
    import torch

    config = BackboneConfig(depth=50) if name == "resnet50" else PUBLISHED[name][0]
    torch.manual_seed(0)
    theirs = getattr(torchvision.models, name)(norm_layer=torchvision.ops.FrozenBatchNorm2d).eval()
    tensors = {key: x.numpy() for key, x in theirs.state_dict().items() if not key.startswith("fc.")}
    rows = compile_rows((ours, other) for other, ours in TORCHVISION)
    graphdef, state = nnx.split(nnx.eval_shape(lambda: ResNet(config, rngs=nnx.Rngs(0))))
    leaves = []
    for path, leaf in nnx.to_flat_state(state):
        tensor = tensors.pop(rename(canonical(path), rows)[0])
        tensor = tensor.transpose(2, 3, 1, 0) if path[-1] == "kernel" else tensor
        assert tensor.shape == leaf.shape
        leaves.append((path, leaf.replace(jnp.asarray(tensor))))
    assert not tensors
    ours = nnx.merge(graphdef, nnx.from_flat_state(leaves))
    images = np.random.default_rng(0).standard_normal((1, 64, 96, 3)).astype(np.float32)
    with torch.no_grad():
        x = torch.from_numpy(images).permute(0, 3, 1, 2)
        x = theirs.maxpool(theirs.relu(theirs.bn1(theirs.conv1(x))))
        expected = []
        for layer in (theirs.layer1, theirs.layer2, theirs.layer3, theirs.layer4):
            x = layer(x)
            expected.append(x.permute(0, 2, 3, 1).numpy())
    for x, y in zip(ours(jnp.asarray(images), jnp.array([[64, 96]])), expected, strict=True):
        # A hundred layers of float32 sums in another order.
        np.testing.assert_allclose(x, y, rtol=0, atol=2e-5 * np.abs(y).max())
