"""Training beside PyTorch: the same losses, the same gradients, and the same run, from the same weights."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import small_models
import transformers_weights
from flax import nnx

from detr_jax import models, train_step
from detr_jax.checkpoints import convert
from detr_jax.config import BackboneConfig, LossConfig, OptimConfig
from detr_jax.losses import set_prediction_loss

STEPS = 20
MODELS = {
    "detr": small_models.SMALL_MODELS["detr"],
    "multi_scale": dataclasses.replace(small_models.SMALL_MODELS["deformable_refine"], box_refinement=False),
    "refine": small_models.SMALL_MODELS["deformable_refine"],
    "two_stage": small_models.SMALL_MODELS["deformable_two_stage"],
}
MODELS = {
    name: dataclasses.replace(config, dropout=0.0, backbone=BackboneConfig(depth=18)) for name, config in MODELS.items()
}


def initial_weights(config) -> dict[str, np.ndarray]:
    """What training starts from, but for the sampling offsets.

    Those start at whole pixels, where bilinear interpolation has a kink: which of the two one-sided gradients comes out
    is a matter of rounding. A fraction of a pixel more, and there is one gradient.
    """
    rng = np.random.default_rng(0)
    weights = {}
    for path, leaf in nnx.to_flat_state(nnx.state(models.build(config, rngs=nnx.Rngs(0)))):
        name = ".".join(map(str, path))
        weights[name] = np.array(leaf[...])
        if name.endswith("sampling_offsets.bias"):
            weights[name] += rng.uniform(0.2, 0.8, leaf.shape).astype(np.float32)
    return weights


def batch_of(step: int):
    """Two padded images of noise, and their targets, as each side takes them."""
    rng = np.random.default_rng(step)
    images, sizes = small_models.padded_batch(100, 135)
    images = images * rng.uniform(0.5, 1.5, (2, 1, 1, 3)).astype(np.float32)
    num_boxes = rng.integers(1, 5, 2)
    boxes = np.concatenate([rng.uniform(0.3, 0.7, (2, 4, 2)), rng.uniform(0.1, 0.5, (2, 4, 2))], -1).astype(np.float32)
    labels = rng.integers(0, 5, (2, 4))
    ours = {"boxes_cxcywh": boxes, "labels": labels.astype(np.int32), "num_boxes": num_boxes.astype(np.int32)}
    theirs = [(labels[i, :n], boxes[i, :n]) for i, n in enumerate(num_boxes)]
    return images, sizes, ours, theirs


@pytest.mark.parity
@pytest.mark.parametrize("name", MODELS)
def test_twenty_steps_beside_pytorch(name):
    import torch_training

    config = MODELS[name]
    loss = LossConfig.detr() if name == "detr" else LossConfig()
    optim = OptimConfig(lr=1e-4 if name == "detr" else 2e-4)
    weights = initial_weights(config)
    theirs = torch_training.Trainer(config, loss, optim, weights)
    graphdef, params, buffers = models.split(config, transformers_weights.load(config, weights))
    optimizer = train_step.make_optimizer(optim, total_steps=1000)

    @jax.jit
    def step(params, opt_state, images, sizes, targets):
        def total(params):
            return set_prediction_loss(nnx.merge(graphdef, params, buffers)(images, sizes), targets, loss)

        (value, terms), grads = jax.value_and_grad(total, has_aux=True)(params)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return (
            optax.apply_updates(params, updates),
            opt_state,
            terms | {"loss": value},
            jax.tree.map(jnp.linalg.norm, jax.tree.map(jnp.ravel, grads)),
        )

    opt_state = optimizer.init(params)
    for i in range(STEPS):
        images, sizes, our_targets, their_targets = batch_of(i)
        params, opt_state, terms, norms = step(params, opt_state, images, sizes, our_targets)
        expected, expected_norms = theirs.step(images, sizes, their_targets)
        if i == 0:
            for term, value in expected.items():
                np.testing.assert_allclose(terms[term], value, rtol=1e-4, err_msg=term)
            ours = {
                convert.canonical([part.key for part in path]): float(norm)
                for path, norm in jax.tree_util.tree_leaves_with_path(norms)
            }
            assert ours.keys() >= expected_norms.keys()
            largest = max(expected_norms.values())
            for tensor, norm in expected_norms.items():
                # Relative, but for tensors whose gradient is float32 noise beside the others'.
                np.testing.assert_allclose(ours[tensor], norm, rtol=1e-3, atol=1e-6 * largest, err_msg=tensor)
            for tensor in ours.keys() - expected_norms.keys():
                assert ours[tensor] == 0, tensor
        np.testing.assert_allclose(terms["loss"], expected["loss"], rtol=1e-3, err_msg=f"step {i}")
