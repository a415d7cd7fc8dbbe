"""DINO: its parts one by one, and the whole beside an independent PyTorch model (`dino_torch.py`).

The ordinary run compares a small model with stored numbers (`tests/data/reference/make_dino.py`); `make parity` runs
the PyTorch model live, at the published size too.
"""

import dataclasses
import math

import dino_cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from detr_jax.config import DINOConfig, LossConfig
from detr_jax.denoising import PER_IMAGE, Noise, denoising_queries, draw_noise, num_slots, visible
from detr_jax.losses import denoising_terms
from detr_jax.models import build

SIZE = (100, 135)


@pytest.fixture(scope="module")
def our_step():
    return dino_cases.our_step(dino_cases.SMALL, SIZE)


@pytest.fixture(scope="module")
def noise():
    return dino_cases.noise(num_slots(dino_cases.SMALL, 4))


@pytest.mark.parametrize("name", dino_cases.BATCHES)
def test_agrees_with_stored_numbers_of_pytorch(name, our_step, noise, data_dir):
    with np.load(data_dir / "reference" / "dino.npz") as stored:
        found = {key.removeprefix(f"{name}/"): stored[key] for key in stored.files if key.startswith(f"{name}/")}
    theirs = [{}, {}, {}]
    for key, value in found.items():
        kind, _, rest = key.partition("/")
        theirs[("outputs", "terms", "norms").index(kind)][rest] = value
    dino_cases.assert_agree(our_step(dino_cases.targets(dino_cases.BATCHES[name]), noise), theirs)


@pytest.mark.parity
@pytest.mark.parametrize("name", dino_cases.BATCHES)
def test_agrees_with_pytorch(name, our_step, noise):
    targets = dino_cases.targets(dino_cases.BATCHES[name])
    dino_cases.assert_agree(our_step(targets, noise), dino_cases.torch_step(dino_cases.SMALL, SIZE, targets, noise))


@pytest.mark.parity
def test_five_scales_agree_with_pytorch(noise):
    targets, config, size = dino_cases.targets((3, 2)), dino_cases.FIVE_SCALES, (64, 90)
    ours = dino_cases.our_step(config, size)(targets, noise)
    dino_cases.assert_agree(ours, dino_cases.torch_step(config, size, targets, noise))


@pytest.mark.parity
def test_denoising_alone_agrees_with_pytorch():
    """Learned boxes, heads of each layer, detached boxes, positives only: DN-Deformable-DETR's parts."""
    targets, config = dino_cases.targets((3, 2)), dino_cases.DENOISING_ALONE
    noise = dino_cases.noise(num_slots(config, 4))
    ours = dino_cases.our_step(config, SIZE)(targets, noise)
    dino_cases.assert_agree(ours, dino_cases.torch_step(config, SIZE, targets, noise))


@pytest.mark.parity
def test_the_published_size_agrees_with_pytorch():
    config, size = DINOConfig.r50_4scale(), (256, 333)
    targets = dino_cases.targets((3, 4))
    noise = dino_cases.noise(num_slots(config, 4))
    # Of 1,800 tokens some have scores that float32 noise ranks: theirs takes our order, if its scores agree.
    ours = dino_cases.our_step(config, size)(targets, noise)
    top = ours[0]["top_tokens"]
    theirs = dino_cases.torch_step(config, size, targets, noise, top)
    scores = theirs[0]["scores"]
    np.testing.assert_allclose(
        np.take_along_axis(scores, top, 1), -np.sort(-scores, 1)[:, : config.num_queries], rtol=0, atol=3e-5
    )
    # Of millions of samples some are so near to a whole pixel that rounding picks the side whose slope counts.
    dino_cases.assert_agree(ours, theirs, norm_rtol=1e-3)


def explicit_queries(targets, noise, config):
    """Denoising queries by loops over images, groups and objects: (label, box, positive, object) of each slot."""
    most = int(targets["num_boxes"].max())
    parts = 2 if config.contrastive else 1
    groups = max(config.denoising_queries // most, 1)
    slots = {}
    for image, group, part in np.ndindex(len(targets["num_boxes"]), groups, parts):
        for t in range(targets["num_boxes"][image]):
            slot = (group * parts + part) * most + t
            x, y, w, h = targets["boxes_cxcywh"][image, t].astype(float)
            steps = noise["signs"][image, slot] * (noise["amounts"][image, slot] + part) * config.box_noise / 2
            x1, y1, x2, y2 = np.clip(
                np.array([x - w / 2, y - h / 2, x + w / 2, y + h / 2]) + steps * [w, h, w, h], 0, 1
            )
            relabeled = noise["relabel"][image, slot] < config.label_noise / 2
            label = noise["labels"][image, slot] if relabeled else targets["labels"][image, t]
            slots[image, slot] = label, [(x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1], part == 0, t
    return slots, groups, parts * groups * most


@pytest.mark.parametrize("contrastive", [True, False])
@pytest.mark.parametrize("num_boxes", [(3, 2), (0, 4), (4, 4)])
def test_denoising_queries_are_those_of_the_loops(num_boxes, contrastive):
    config = dataclasses.replace(dino_cases.SMALL, contrastive=contrastive, box_noise=0.4)
    targets, noise = dino_cases.targets(num_boxes), dino_cases.noise(num_slots(config, 4))
    queries = denoising_queries(targets, Noise(**noise), config)
    expected, groups, pad = explicit_queries(targets, noise, config)
    assert queries.num_groups == groups and queries.used.sum() == pad and queries.used[:pad].all()
    assert queries.real.sum() == len(expected)
    for (image, slot), (label, box, positive, t) in expected.items():
        assert queries.real[image, slot] and queries.labels[image, slot] == label
        assert queries.positive[slot] == positive and queries.target[slot] == t
        np.testing.assert_allclose(queries.boxes_cxcywh[image, slot], box, atol=1e-6)  # float32 sums


# Largest number of objects in the batch -> groups, slots used: of the official code, with 100 denoising queries.
@pytest.mark.parametrize(
    ("most", "groups", "pad"), [(5, 20, 200), (12, 8, 192), (3, 33, 198), (51, 1, 102), (130, 1, 260), (0, None, 0)]
)
def test_groups_are_those_of_the_official_code(most, groups, pad):
    config = DINOConfig.r50_4scale()
    slots = num_slots(config, 130)
    assert slots == 260 and num_slots(config, 63) == 200
    targets = {
        "boxes_cxcywh": np.full((2, 130, 4), 0.5, np.float32),
        "labels": np.zeros((2, 130), np.int32),
        "num_boxes": np.array([most // 2, most], np.int32),
    }
    queries = denoising_queries(targets, draw_noise(jax.random.key(0), 2, slots, 91), config)
    assert queries.used.sum() == pad and (groups is None or queries.num_groups == groups)


def test_who_sees_whom():
    queries = denoising_queries(
        dino_cases.targets((3, 2)), Noise(**dino_cases.noise(14)), dino_cases.SMALL
    )  # 2 groups of 6, 2 slots not used
    sees = np.asarray(visible(queries, 3))
    assert sees.shape == (17, 17)
    assert sees[14:, 14:].all() and not sees[14:, :14].any()
    assert sees[:14, 14:].all()
    assert sees[:6, :6].all() and sees[6:12, 6:12].all()
    assert not sees[:6, 6:14].any() and not sees[6:12, :6].any() and not sees[6:12, 12:14].any()
    assert sees.any(1).all()


def test_noise_is_that_of_the_paper():
    noise = draw_noise(jax.random.key(3), 64, 200, 91)
    # 12,800 draws: the standard deviation of these shares and means is below 0.005.
    np.testing.assert_allclose((noise.relabel < 0.25).mean(), 0.25, atol=0.02)
    np.testing.assert_allclose((noise.signs > 0).mean(), 0.5, atol=0.02)
    np.testing.assert_allclose(noise.amounts.mean(), 0.5, atol=0.02)
    assert set(np.unique(noise.labels)) == set(range(91)) and set(np.unique(noise.signs)) == {-1.0, 1.0}
    # The four corners move on their own.
    corners = np.corrcoef((noise.signs * noise.amounts).reshape(-1, 4), rowvar=False)
    np.testing.assert_allclose(corners, np.eye(4), atol=0.05)
    again, other = (draw_noise(jax.random.key(seed), 64, 200, 91) for seed in (3, 4))
    np.testing.assert_array_equal(noise.amounts, again.amounts)
    assert (noise.amounts != other.amounts).mean() > 0.99


def test_denoising_changes_nothing_else_and_groups_do_not_see_each_other(our_step, noise):
    targets = dino_cases.targets((3, 2))
    outputs, _, _ = our_step(targets, noise)
    others = {name: x.copy() for name, x in noise.items()}
    others["signs"][:, 6:] *= -1  # the second group
    changed, _, _ = our_step(targets, others)
    for name in ("logits", "boxes", "interm_logits", "interm_boxes"):
        np.testing.assert_array_equal(outputs[name], changed[name])
    np.testing.assert_array_equal(outputs["dn_boxes"][:, :, :6], changed["dn_boxes"][:, :, :6])
    assert np.abs(outputs["dn_boxes"][:, :, 6:12] - changed["dn_boxes"][:, :, 6:12]).max() > 1e-3


def test_eight_devices_and_parts_of_a_batch_draw_the_queries_and_losses_of_one():
    rng = np.random.default_rng(0)
    config, loss = dataclasses.replace(dino_cases.SMALL, denoising_queries=10), LossConfig.dino()
    targets = {
        "boxes_cxcywh": rng.uniform(0.2, 0.6, (8, 3, 4)).astype(np.float32),
        "labels": rng.integers(0, 5, (8, 3)).astype(np.int32),
        "num_boxes": np.arange(8, dtype=np.int32) % 4,
    }
    slots = num_slots(config, 3)
    outputs = {
        "pred_logits": rng.normal(size=(2, 8, slots, 5)).astype(np.float32),
        "pred_boxes": rng.uniform(0.2, 0.6, (2, 8, slots, 4)).astype(np.float32),
    }

    @jax.jit
    def terms(outputs, targets, step):
        key = jax.random.fold_in(jax.random.key(0), step)
        queries = denoising_queries(targets, draw_noise(key, 8, slots, 5), config)
        return queries, denoising_terms(outputs, queries, targets, loss)

    expected = terms(outputs, targets, 7)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    with jax.set_mesh(mesh):
        sharded = jax.device_put(targets, jax.NamedSharding(mesh, jax.P("data")))
        actual = terms(jax.device_put(outputs, jax.NamedSharding(mesh, jax.P(None, "data"))), sharded, 7)
    jax.tree.map(np.testing.assert_array_equal, actual[0], expected[0])
    assert actual[0].num_groups == 3 and len(expected[1]) == 6
    # The same float32 terms, added in another order.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-6), actual[1], expected[1])

    @jax.jit
    def part(outputs, queries, targets, number):
        rows = number + 2 * np.arange(4)
        some = {name: x[rows] for name, x in targets.items()}
        queries = queries._replace(**{name: getattr(queries, name)[rows] for name in PER_IMAGE})
        outputs = {name: x[:, rows] for name, x in outputs.items()}
        return denoising_terms(outputs, queries, some, loss, targets["num_boxes"])

    parts = [part(outputs, expected[0], targets, number) for number in (0, 1)]
    for name, value in expected[1].items():
        np.testing.assert_allclose(parts[0][name] + parts[1][name], value, rtol=2e-6, err_msg=name)


def test_initialization():
    config = dataclasses.replace(dino_cases.SMALL, num_queries=50)

    def init():
        model = build(config, rngs=nnx.Rngs(0))
        del model.backbone
        return model

    model = nnx.jit(init)()
    assert len(model.class_embed) == len(model.bbox_embed) == 2
    for heads in (model.class_embed, model.bbox_embed):  # the proposals' start as copies
        jax.tree.map(np.testing.assert_array_equal, *(nnx.state(head) for head in heads))
    np.testing.assert_allclose(model.class_embed[0].bias[...], -math.log(99), rtol=1e-6)
    for leaf in (model.bbox_embed[0].layers[-1].kernel, model.bbox_embed[0].layers[-1].bias):
        np.testing.assert_array_equal(leaf[...], 0)
    np.testing.assert_allclose([model.label_embed[...].std(), model.level_embed[...].std()], 1, atol=0.15)
    for kernel in (model.query_embed, model.query_position.layers[0].kernel, model.proposals.output.kernel):
        bound = math.sqrt(6 / sum(kernel.shape))
        assert 0.95 * bound < jnp.abs(kernel[...]).max() <= bound


def test_configurations_that_cannot_be():
    with pytest.raises(ValueError, match=r"model\.box_refinement: DINO always refines"):
        DINOConfig(box_refinement=False, two_stage=False)
    with pytest.raises(ValueError, match=r"model\.box_noise=-1 must be at least 0"):
        DINOConfig(box_noise=-1)
