"""The models: the published sizes, initialization, variants, types and gradients."""

import dataclasses
import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from transformers_weights import load, random_weights

from detr_jax.config import BackboneConfig, DeformableDETRConfig, DETRConfig, DINOConfig
from detr_jax.models import build, build_abstract, split
from detr_jax.models.attention import offset_directions
from detr_jax.models.layers import Dropout, GroupNorm, dropout, max_pool, relu
from detr_jax.models.position import LearnedMap
from detr_jax.models.resnet import ResNet

pytestmark = pytest.mark.usefixtures("short_resnet")

# Trainable parameters of the published code with 91 classes, the ResNet's stem and first stage frozen.
PUBLISHED = {
    "detr_r50": (DETRConfig.r50(), 41_302_368),
    "detr_r50_dc5": (DETRConfig.r50_dc5(), 41_302_368),
    "single_scale": (DeformableDETRConfig.r50_single_scale(), 33_844_193),
    "single_scale_dc5": (DeformableDETRConfig.r50_single_scale_dc5(), 33_844_193),
    "multi_scale": (DeformableDETRConfig.r50(), 39_847_265),
    "refine": (DeformableDETRConfig.r50_refine(), 40_627_260),
    "two_stage": (DeformableDETRConfig.r50_two_stage(), 40_959_129),
    "dino_4scale": (DINOConfig.r50_4scale(), 46_670_782),
}
SMALL = {
    "backbone": BackboneConfig(depth=18),
    "num_classes": 5,
    "hidden_dim": 32,
    "num_heads": 4,
    "encoder_layers": 1,
    "decoder_layers": 2,
    "ffn_dim": 64,
    "num_queries": 12,
}
TWO_STAGE = DeformableDETRConfig(**SMALL, num_levels=3, box_refinement=True, two_stage=True)
SIZES = jnp.array([[64, 96], [50, 71]])


def images() -> jax.Array:
    """Two images on a bucket of 64 x 96, the second one padded."""
    pixels = jax.random.normal(jax.random.key(0), (2, 64, 96, 3))
    inside = (jnp.arange(64)[:, None] < SIZES[:, 0, None, None]) & (jnp.arange(96) < SIZES[:, 1, None, None])
    return jnp.where(inside[..., None], pixels, 0)


def run(config, dropout_seed=None):
    """Outputs of a detector with random weights, compiled."""
    _, state = nnx.split(load(config, random_weights(config)))
    return compiled(config)(state, None if dropout_seed is None else jax.random.key(dropout_seed))


@functools.cache
def compiled(config):
    """A model's outputs as a compiled function of its state and of dropout's key (`None`: no dropout)."""
    graphdef = nnx.split(build_abstract(config))[0]

    @jax.jit
    def detect(state, key):
        rngs = None if key is None else nnx.Rngs(key)
        return nnx.merge(graphdef, state)(images(), SIZES, rngs=rngs)

    return detect


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameter_counts_are_the_published_ones(name):
    config, published = PUBLISHED[name]
    _, params, _ = split(config, build_abstract(config))
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params)) == published


def test_r101_and_dc5_shapes():
    graphdef, state = nnx.split(nnx.eval_shape(lambda: ResNet(DETRConfig.r101_dc5().backbone, rngs=nnx.Rngs(0))))
    backbone = nnx.merge(graphdef, state)
    assert [len(stage) for stage in backbone.stages] == [3, 4, 23, 3]
    assert [block.convs[1].dilation for block in backbone.stages[3]] == [1, 2, 2]
    images = jax.ShapeDtypeStruct((1, 96, 128, 3), jnp.float32)
    maps = jax.eval_shape(lambda state, x: nnx.merge(graphdef, state)(x, jnp.array([[96, 128]])), state, images)
    assert [m.shape for m in maps] == [(1, 24, 32, 256), (1, 12, 16, 512), (1, 6, 8, 1024), (1, 6, 8, 2048)]


# `test_parity.py` runs the others, and other numbers of levels.
VARIANTS = {
    "detr": DETRConfig(**SMALL),
    "detr_pre_norm": DETRConfig(**SMALL, pre_norm=True),
    "two_levels": DeformableDETRConfig(**SMALL, num_levels=2),
    "two_stage": TWO_STAGE,
}


@pytest.mark.parametrize("name", VARIANTS)
def test_outputs(name):
    config = VARIANTS[name]
    outputs = run(config)
    classes = config.num_classes + isinstance(config, DETRConfig)
    assert outputs["pred_logits"].shape == (2, 12, classes) and outputs["pred_boxes"].shape == (2, 12, 4)
    assert outputs["aux_outputs"]["pred_logits"].shape == (1, 2, 12, classes)
    assert outputs["aux_outputs"]["pred_boxes"].shape == (1, 2, 12, 4)
    assert ("enc_outputs" in outputs) == (name == "two_stage")
    for leaf in jax.tree.leaves(outputs):
        assert leaf.dtype == jnp.float32 and bool(jnp.isfinite(leaf).all())
    assert bool(((outputs["pred_boxes"] > 0) & (outputs["pred_boxes"] < 1)).all())


def test_learned_positions_end_at_50():
    with pytest.raises(ValueError, match="covers maps up to 50 x 50, got 2 x 51"):
        LearnedMap(8, rngs=nnx.Rngs(0))(jnp.ones((1, 2, 51), bool))


def test_two_stage_needs_as_many_tokens_as_queries():
    config = dataclasses.replace(TWO_STAGE, num_queries=1000)
    graphdef, state = nnx.split(build_abstract(config))
    # 8 x 12 + 4 x 6 + 2 x 3
    with pytest.raises(ValueError, match="takes 1000 queries from the image's tokens, but there are only 126"):
        jax.eval_shape(lambda state: nnx.merge(graphdef, state)(images(), SIZES), state)


@pytest.mark.parametrize(
    ("config", "size"),
    [(DETRConfig(**SMALL), (1, 1)), (DeformableDETRConfig(**SMALL), (33, 1))],
    ids=["detr", "deformable"],
)
def test_tiny_and_odd_buckets(config, size):
    graphdef, state = nnx.split(load(config, random_weights(config)))
    outputs = jax.jit(lambda state: nnx.merge(graphdef, state)(jnp.ones((1, *size, 3)), jnp.array([size])))(state)
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(outputs))


def test_dropout_is_active_only_with_rngs():
    config = DeformableDETRConfig(**SMALL, num_levels=2, dropout=0.5)
    plain = run(config)
    dropped, other = run(config, 1), run(config, 2)
    assert np.abs(dropped["pred_logits"] - plain["pred_logits"]).max() > 1e-2
    assert np.abs(dropped["pred_logits"] - other["pred_logits"]).max() > 1e-2


def test_bfloat16_compute_is_near_float32():
    half = run(dataclasses.replace(TWO_STAGE, two_stage=False, dtype="bfloat16"))
    full = run(dataclasses.replace(TWO_STAGE, two_stage=False))
    # bfloat16 has 8 bits: 0.4% a rounding, some tens of them in a row.
    assert np.abs(half["pred_boxes"] - full["pred_boxes"]).max() < 0.05
    assert np.abs(half["pred_logits"] - full["pred_logits"]).max() < 0.3


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_trained_parameter_gets_a_finite_gradient(dtype):
    config = dataclasses.replace(TWO_STAGE, dtype=dtype)
    # Not the initial weights: box layers start at zero, which hides what lies before them.
    graphdef, params, buffers = split(config, load(config, random_weights(config)))

    def loss(params):
        outputs = nnx.merge(graphdef, params, buffers)(images(), SIZES)
        return sum(jnp.square(leaf - 0.3).sum() for leaf in jax.tree.leaves(outputs))

    grads = jax.jit(jax.grad(loss))(params)
    for path, grad in jax.tree_util.tree_leaves_with_path(grads):
        name = jax.tree_util.keystr(path)
        assert bool(jnp.isfinite(grad).all()), name
        # Softmax does not see a constant that all keys share.
        if "'key'" not in name or "'bias'" not in name:
            assert float(jnp.abs(grad).max()) > 0, name


def initial(config):
    """A newly initialized detector without its backbone."""

    def init():
        model = build(config, rngs=nnx.Rngs(0))
        del model.backbone
        return model

    return nnx.jit(init)()


def test_initialization():
    model = initial(TWO_STAGE)
    for head in model.class_embed:
        np.testing.assert_allclose(head.bias[...], -math.log(99), rtol=1e-6)
    for head in model.bbox_embed:
        np.testing.assert_array_equal(head.layers[-1].kernel[...], 0)
        np.testing.assert_array_equal(head.layers[-1].bias[...], 0)  # two-stage: 0 everywhere
    refined = initial(dataclasses.replace(TWO_STAGE, two_stage=False))
    biases = [head.layers[-1].bias[...].tolist() for head in refined.bbox_embed]
    assert biases == [[0, 0, -2, -2], [0, 0, 0, 0]]
    plain = build_abstract(DeformableDETRConfig(**SMALL))
    assert len(plain.class_embed) == len(plain.bbox_embed) == 1
    attention = model.encoder[0].self_attn
    np.testing.assert_array_equal(attention.sampling_offsets.kernel[...], 0)
    np.testing.assert_array_equal(attention.attention_weights.kernel[...], 0)
    np.testing.assert_array_equal(attention.sampling_offsets.bias[...], offset_directions(4, 3, 4).ravel())
    for layer in (attention.value_proj, model.encoder[0].ffn.linear1, model.proposals.output):
        kernel = np.asarray(layer.kernel[...])
        bound = math.sqrt(6 / sum(kernel.shape))
        assert 0.95 * bound < np.abs(kernel).max() <= bound
    # PyTorch's packed projection of self-attention: fan_in + fan_out = 4 x 32.
    assert 0.95 < np.abs(model.decoder[0].self_attn.query.kernel[...]).max() / math.sqrt(6 / 128) <= 1
    assert 0.9 < np.abs(model.class_embed[0].kernel[...]).max() * math.sqrt(32) <= 1


def test_initial_offsets_point_around_the_circle():
    offsets = offset_directions(8, 1, 2)[:, 0]
    expected = [(1, 0), (1, 1), (0, 1), (-1, 1), (-1, 0), (-1, -1), (0, -1), (1, -1)]
    np.testing.assert_allclose(offsets[:, 0], expected, atol=2e-6)  # float32 sine and cosine
    np.testing.assert_allclose(offsets[:, 1], 2 * np.array(expected), atol=4e-6)


@pytest.mark.parametrize("shape", [(2, 7, 9, 4), (1, 8, 6, 3)])
def test_max_pool_is_the_3x3_stride_2_maximum(shape):
    x = jax.random.normal(jax.random.key(0), shape)
    expected = nnx.max_pool(x, (3, 3), strides=(2, 2), padding=((1, 1), (1, 1)))
    np.testing.assert_array_equal(max_pool(x), expected)


def test_group_norm_is_flax_group_norm():
    x = 3 + 2 * jax.random.normal(jax.random.key(0), (2, 5, 7, 64))
    expected = nnx.GroupNorm(64, 32, epsilon=1e-5, use_fast_variance=False, rngs=nnx.Rngs(0))(x)
    # The same sums in another order: float32 noise.
    np.testing.assert_allclose(GroupNorm(64)(x), expected, atol=2e-6)
    valid = jnp.arange(7)[None, None] < jnp.array([4, 7])[:, None, None]
    masked = GroupNorm(64)(x, jnp.broadcast_to(valid, (2, 5, 7)))
    np.testing.assert_allclose(masked[0, :, :4], GroupNorm(64)(x[:1, :, :4])[0], atol=2e-6)


def test_dropout_keeps_the_mean():
    x = jnp.ones((40, 99, 101))
    y = Dropout(0.1)(x, nnx.Rngs(0))
    # 400,000 draws: the standard deviation of the share is 0.0005.
    np.testing.assert_allclose((y == 0).mean(), 0.1, atol=0.002)
    np.testing.assert_allclose(y[y != 0], 1 / 0.9, rtol=1e-6)
    assert (y == Dropout(0.1)(x, nnx.Rngs(0))).all() and (Dropout(0.1)(x, None) == x).all()
    # Neighbors along any axis, and the same place under another key, agree no more often than strangers do.
    dropped = y == 0
    other = Dropout(0.1)(x, nnx.Rngs(1)) == 0
    pairs = [(dropped[1:], dropped[:-1]), (dropped[:, 1:], dropped[:, :-1]), (dropped[..., 1:], dropped[..., :-1])]
    for a, b in [*pairs, (dropped, other)]:
        np.testing.assert_allclose((a & b).mean(), 0.01, atol=0.001)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_relu_and_its_dropout_differentiate_as_their_definition(dtype):
    """Bit for bit, in both modes; zeros, where the derivative is 0, included."""
    rng = np.random.default_rng(0)
    x, g = (jnp.asarray(rng.integers(-3, 4, (7, 130)) / 3, dtype) for _ in range(2))
    key, rate = jnp.array([1, 2], jnp.uint32), 0.3
    for ours, definition in (
        (relu, nnx.relu),
        (lambda x: relu(x, None, rate), nnx.relu),
        (lambda x: relu(x, key, rate), lambda x: dropout(nnx.relu(x), key, rate)),
    ):
        for differentiate in (
            lambda f: (f(x), *jax.vjp(f, x)[1](g)),
            lambda f: jax.jvp(f, (x,), (g,)),
        ):
            for got, expected in zip(differentiate(ours), differentiate(definition), strict=True):
                assert got.dtype == dtype
                np.testing.assert_array_equal(got, expected)


def test_dropout_is_the_same_on_any_number_of_devices():
    x = jnp.ones((8, 6, 32))
    drop = jax.jit(lambda x: Dropout(0.5)(x, nnx.Rngs(3)))
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    split = jax.device_put(x, jax.sharding.NamedSharding(mesh, jax.P("data")))
    np.testing.assert_array_equal(drop(split), drop(x))
    assert not re.search(r"all-(gather|reduce|to-all)", drop.lower(split).compile().as_text())
