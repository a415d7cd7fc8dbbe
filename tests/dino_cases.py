"""Small DINO models, weights and batches that its tests share."""

import dataclasses
from collections.abc import Mapping

import jax
import numpy as np
import small_models
import transformers_weights
from flax import nnx

from detr_jax.checkpoints import convert, key_maps
from detr_jax.config import BackboneConfig, DINOConfig, LossConfig
from detr_jax.denoising import Noise, denoising_queries
from detr_jax.losses import set_prediction_loss
from detr_jax.models.trainable import split

SMALL = DINOConfig(
    backbone=BackboneConfig(depth=18),
    num_classes=5,
    hidden_dim=64,
    num_heads=4,
    encoder_layers=1,
    decoder_layers=2,
    ffn_dim=96,
    num_queries=12,
    denoising_queries=7,
)
FIVE_SCALES = dataclasses.replace(SMALL, num_levels=5, backbone_maps=4)
DENOISING_ALONE = dataclasses.replace(
    SMALL, two_stage=False, look_forward_twice=False, shared_heads=False, contrastive=False, box_noise=0.4
)
# Objects per image: two groups, the largest number of slots, none in one image, none at all.
BATCHES = {"3_2": (3, 2), "1_1": (1, 1), "0_4": (0, 4), "0_0": (0, 0)}


def targets(num_boxes, t: int = 4) -> dict[str, np.ndarray]:
    """A batch's targets, as the model takes them."""
    rng = np.random.default_rng(sum(num_boxes))
    b = len(num_boxes)
    boxes = np.concatenate([rng.uniform(0.3, 0.7, (b, t, 2)), rng.uniform(0.1, 0.5, (b, t, 2))], -1)
    return {
        "boxes_cxcywh": boxes.astype(np.float32),
        "labels": rng.integers(0, 5, (b, t)).astype(np.int32),
        "num_boxes": np.array(num_boxes, np.int32),
    }


def noise(slots: int, b: int = 2) -> dict[str, np.ndarray]:
    """Random numbers of the denoising slots."""
    rng = np.random.default_rng(1)
    return {
        "relabel": rng.uniform(size=(b, slots)).astype(np.float32),
        "labels": rng.integers(0, 5, (b, slots)).astype(np.int32),
        "signs": rng.choice([-1, 1], (b, slots, 4)).astype(np.float32),
        "amounts": rng.uniform(size=(b, slots, 4)).astype(np.float32),
    }


def official(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Tensors of ours under the official names that are not aliases, in PyTorch's layout."""
    rows = key_maps.compile_rows(tuple((ours, theirs) for theirs, ours in key_maps.OFFICIAL_DINO.rows))
    result = {}
    for path, tensor in tensors.items():
        name = convert.canonical(path.split("."))
        if "proposals.output.kernel" in tensors:
            name = name.replace("_embed.1.", "_embed.proposals.")  # of shared heads, the second is the proposals'
        theirs = key_maps.rename(name, rows)[0]
        result[theirs] = convert.to_theirs(tensor, name, path.endswith(".kernel"))
    return convert.fused(result)


def our_step(config: DINOConfig, size: tuple[int, int]):
    """`step(targets, noise)` -> outputs, terms, gradient norms by official names, of random weights; compiled once.

    The outputs have `top_tokens [b, q]` too, the tokens that became queries, best first. They are those of this very
    program: another one rounds otherwise, and may rank two tokens of nearly equal score the other way.
    """
    images, sizes = small_models.padded_batch(*size)
    model = transformers_weights.load(config, transformers_weights.random_weights(config))
    graphdef, params, buffers = split(config, model)

    @jax.jit
    def step(params, buffers, images, sizes, targets, noise):
        def total(params):
            queries = denoising_queries(targets, Noise(**noise), config)
            model = nnx.merge(graphdef, params, buffers)
            outputs, captured = nnx.capture(model, nnx.Intermediate)(images, sizes, denoising=queries)
            value, terms = set_prediction_loss(outputs, targets, LossConfig.dino(), queries)
            tokens = nnx.to_pure_dict(captured)["proposals"]["top_tokens"] if config.two_stage else None
            return value, (outputs, terms | {"loss": value}, tokens)

        (_, (outputs, terms, tokens)), gradients = jax.value_and_grad(total, has_aux=True)(params)
        return outputs, terms, gradients, tokens

    def run(targets, noise):
        outputs, terms, gradients, tokens = jax.device_get(step(params, buffers, images, sizes, targets, noise))
        flat = jax.tree_util.tree_leaves_with_path(gradients)
        by_name = {".".join(str(part.key) for part in path): value for path, value in flat}
        norms = {name: np.linalg.norm(value) for name, value in official(by_name).items()}
        return _stacked(outputs) | {"top_tokens": tokens}, {name: float(x) for name, x in terms.items()}, norms

    return run


def _stacked(outputs) -> dict[str, np.ndarray]:
    """As `dino_torch.forward` names them."""
    result = {}
    for name, short in (("pred_logits", "logits"), ("pred_boxes", "boxes")):
        result[short] = np.concatenate([outputs["aux_outputs"][name], outputs[name][None]])
        if "interm_outputs" in outputs:
            result[f"interm_{short}"] = outputs["interm_outputs"][name]
        result[f"dn_{short}"] = outputs["dn_outputs"][name]
    return result


def torch_step(config: DINOConfig, size: tuple[int, int], targets, noise, top=None):
    """The same of the PyTorch model, as NumPy; without objects there is no `dn_...`."""
    import dino_torch
    import torch

    images, sizes = small_models.padded_batch(*size)
    weights = {name: torch.tensor(x) for name, x in official(transformers_weights.random_weights(config)).items()}
    for name, x in weights.items():
        constant = any(part in name for part in ("running", ".bn", ".downsample.1.", "body.conv1", "body.layer1"))
        x.requires_grad_(not constant)
    pairs = [
        (torch.tensor(targets["labels"][i, :n]).long(), torch.tensor(targets["boxes_cxcywh"][i, :n]))
        for i, n in enumerate(targets["num_boxes"])
    ]
    dn = dino_torch.denoise(pairs, noise, config)
    outputs = dino_torch.forward(weights, config, images, sizes, dn, top)
    total, terms = dino_torch.loss(outputs, pairs, dn, LossConfig.dino())
    total.backward()
    norms = {
        name: float(x.grad.norm()) if x.grad is not None else 0.0 for name, x in weights.items() if x.requires_grad
    }
    terms = {name: float(value.detach()) for name, value in terms.items()} | {"loss": float(total.detach())}
    return {name: x.detach().numpy() for name, x in outputs.items()}, terms, norms


def assert_agree(ours, theirs, *, norm_rtol: float = 1e-4) -> None:
    """Outputs, terms and gradient norms of `our_step` with those of `torch_step`."""
    (outputs, terms, norms), (their_outputs, their_terms, their_norms) = ours, theirs
    for name, expected in their_outputs.items():
        if name != "scores":
            # Float32 noise of numbers of order 1 through some thirty layers: 6e-6 was seen.
            actual = outputs[name][:, :, : expected.shape[2]] if name.startswith("dn") else outputs[name]
            np.testing.assert_allclose(actual, expected, rtol=0, atol=3e-5, err_msg=name)
    for name, expected in their_terms.items():
        np.testing.assert_allclose(terms[name], expected, rtol=1e-5, err_msg=name)
    for name in terms.keys() - their_terms.keys():
        # Without any object theirs has no denoising terms, ours are 0; the others are not trained.
        assert ("_dn" in name and terms[name] == 0) or name.startswith(("class_error", "cardinality_error")), name
    assert norms.keys() == their_norms.keys()
    largest = max(their_norms.values())
    for name, expected in their_norms.items():
        # Relative, except for tensors whose gradient is float32 noise beside the others'. 6e-6 was seen with optimized
        # programs; those of the tests add up a convolution's pixels one by one, to within 1.3e-4.
        rtol = 2 * norm_rtol if name.startswith("backbone") else norm_rtol
        np.testing.assert_allclose(norms[name], expected, rtol=rtol, atol=1e-6 * largest, err_msg=name)
