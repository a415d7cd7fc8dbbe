"""`detr-jax plan`: what the compiler says of a run's step, for devices that are fakes here."""

import dataclasses
import json
import math
from types import SimpleNamespace

import jax
import pytest
import tiny

from detr_jax import cli, plan, plan_report, sharding
from detr_jax.config import DataConfig, DeformableDETRConfig, DINOConfig
from detr_jax.data.sampler import TrainSampler
from detr_jax.errors import UserError
from detr_jax.train_step import abstract_state, make_optimizer
from pallas_kernels.ms_deform_attn.shapes import COCO_WIDE

pytestmark = pytest.mark.usefixtures("short_resnet")


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    run = tiny.fast_config(tiny.sixteen_images(tmp_path_factory.mktemp("data") / "cells"))
    small = {"num_classes": 3, "decoder_layers": 1, "num_levels": 1, "two_stage": False, "box_refinement": False}
    return dataclasses.replace(run, model=dataclasses.replace(run.model, **small))


@pytest.fixture(scope="module")
def printed(config, tmp_path_factory):
    """What the command prints for eight devices, and its JSON."""
    folder = tmp_path_factory.mktemp("plan")
    with pytest.MonkeyPatch.context() as patch:
        lines = []
        patch.setattr("builtins.print", lambda *texts: lines.extend(texts))
        path = tiny.write_config(folder / "config.py", config)
        cli.main(["plan", "--config", str(path), "--topology", "cpu:8", "--json", str(folder / "plan.json")])
    return "\n".join(lines), json.loads((folder / "plan.json").read_text())


def test_nothing_but_gradients_and_a_few_numbers_is_exchanged(printed, config):
    """Each trained parameter's gradient once; besides, scalars of the losses, and the outputs of the matching."""
    (step,) = printed[1]["steps"]
    exchanged = {z["kind"]: z["bytes"] for z in step["communication"]}
    optimizer = make_optimizer(config.optim, 10)
    _, state = abstract_state(config, optimizer, sharding.make_mesh(8))
    gradients = sum(4 * math.prod(x.shape) for x in jax.tree.leaves(state["params"]))
    assert gradients <= exchanged.pop("all-reduce") < gradients + 1024
    assert sum(exchanged.values()) < 1024, exchanged


def test_memory_is_that_of_the_state_on_each_device(printed):
    (step,) = printed[1]["steps"]
    memory = step["memory"]
    assert memory["parameters"] > memory["ema"] > 0  # trained and frozen ones; the average has the trained ones
    assert memory["optimizer"] == pytest.approx(2 * memory["ema"], abs=1024)  # two moments, and counters
    assert memory["temporary"] > 0 and step["fits"] is None and step["ms"] is None
    assert step["flops"] > 1e6 and step["share"] == 1


def test_the_table_says_what_was_compiled(printed):
    text, result = printed
    assert result["devices"] == result["chips"] == 8
    assert "cpu:8: 8 chips, 8 devices" in text and "float32" in text and "all-reduce of" in text


@pytest.mark.parametrize(
    ("topology", "message"),
    [
        ("v9:2x2", "expected a slice such as v5e:4x4"),
        ("v5e:4", "expected a slice such as v5e:4x4"),
        ("cpu", "expected a number of devices, such as cpu:8"),
        ("cpu:99", "JAX has 8 cpu devices here"),
        ("gpu:1", "JAX finds none here"),
    ],
)
def test_wrong_topologies_are_refused(topology, message):
    with pytest.raises(UserError, match=message):
        plan.devices_of(topology)


def test_missing_libtpu_says_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "libtpu", None)
    with pytest.raises(UserError, match="pip install 'jax"):
        plan.devices_of("v5e:4x4")


def test_a_batch_that_does_not_divide_is_refused_before_anything_is_compiled(config):
    with pytest.raises(UserError, match="must be a multiple of the number of devices, 8"):
        plan.plan(config, "cpu:8", batch_sizes=(8, 12))


def test_the_stand_in_has_cocos_buckets():
    index = plan.stand_in()
    sampler = TrainSampler(index, DataConfig(), 32, 0)
    assert len(sampler) == 118287 // 32 and sampler.max_boxes == 93 and sampler.source_shape == (640, 640)
    assert sampler.buckets[-1] == (1344, 1344) and len(sampler.buckets) > 3


def test_attention_layers_of_published_models():
    config = dataclasses.replace(tiny.config(), model=DeformableDETRConfig.r50_two_stage())
    (encoder, _), (decoder, layers) = plan.attention_layers(config, 93, (800, 1333))
    assert encoder.spatial_shapes == COCO_WIDE and encoder.queries is None
    assert (decoder.queries, layers) == (300, 6)
    config = dataclasses.replace(config, model=DINOConfig.r50_5scale())
    (encoder, _), (decoder, _) = plan.attention_layers(config, 93, (800, 1333))
    assert encoder.spatial_shapes == ((200, 334), *COCO_WIDE) and decoder.queries == 900 + 200


def test_kernels_count_where_the_program_has_them(monkeypatch):
    config = dataclasses.replace(tiny.config(), model=DeformableDETRConfig.r50_two_stage())
    monkeypatch.setattr(plan, "_layer_bundles", lambda *_: (1.0, 10.0))
    monkeypatch.setattr(plan, "_feed_forward_bundles", lambda tokens, *_: tokens[0] * 100)
    cycles = plan.projections_bench.Cycles(2000, 500)
    monkeypatch.setattr(plan, "_projection_cycles", lambda *_: cycles)
    for name, bundles, products in (
        ("ms_deform_attn_project_forward", 12000, 256 + 384),
        ("ms_deform_attn_project_values_forward", 3000, 256),
        ("feed_forward_forward", 1200, 256 + 2 * 1024),
    ):
        compiled = SimpleNamespace(as_text=lambda name=name: f"%jvp_{name}_.1 = f32[] custom-call(%x)")
        kernels = plan.count_kernels(compiled, config, 93, (800, 1333), "v5e", 2)
        assert (kernels.gathers, kernels.bundles) == (24, 240 + bundles)
        assert kernels.flops == 6 * 3 * 2 * 2 * 25728 * 256 * products
    kernels = plan.count_kernels(SimpleNamespace(as_text=lambda: ""), config, 93, (800, 1333), "v5e", 2)
    assert kernels == (24, 240, 0)


def test_hours_and_largest_batch():
    """Buckets that were not compiled count by their pixels, here half as many; memory grows by a line."""

    def step(batch_size, temporary):
        memory = plan_report.Memory(10, 20, 0, batch_size, temporary, 5)
        ms = plan_report.Milliseconds(80.0, 15.0, 5.0)
        return plan_report.StepPlan(
            batch_size,
            "bfloat16",
            (64, 64),
            0.25,
            (0.25 + 0.75 / 2) * 64**2,
            1.0,
            True,
            "",
            memory,
            10,
            (),
            ms,
            1.0,
            0.5,
        )

    small, large = step(16, 160), step(32, 320)
    result = plan_report.Plan("v5e:4x4", 16, 16, 1000, 3200, "", 50, (small, large))
    assert result.chip_hours_per_epoch([large]) == pytest.approx((0.25 + 0.75 / 2) * 100 * 0.1 / 3600 * 16)
    assert plan_report.largest_batch(small, large, 1000, 16) == 80  # (1000 - 35) / 11 = 87
    assert any("about 80" in line for line in plan_report.table(result))


@pytest.mark.slow
def test_a_slice_of_tpus(config):
    """With libtpu (`make test-aot`): the step fits, takes time, and its chips exchange nothing but gradients."""
    pytest.importorskip("libtpu", reason="compiling for a TPU needs libtpu: make test-aot")
    (step,) = plan.plan(config, "v5e:2x2", dtypes=("bfloat16",)).steps
    assert step.fits and step.memory and step.ms and step.mfu
    assert step.memory.total < 2**30 and 0 < step.mfu < 1
    assert min(step.ms.xla, step.ms.kernels, step.ms.communication) > 0
    assert {z.kind for z in step.communication} == {"all-reduce"}
