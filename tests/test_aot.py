"""Kernels compiled by libtpu for real TPUs, and how its counts are read. Slow parts: `make test-aot`."""

import functools
import os
import subprocess
import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import ahead_of_time, block_order, ms_deform_attn
from pallas_kernels.ms_deform_attn import bench
from pallas_kernels.ms_deform_attn.shapes import COCO_WIDE, SMALL

SQUARE = ((167, 167), (84, 84), (42, 42), (21, 21))  # 1333 x 1333
VMEM_MIB = {"v4": 16, "v5e": 128, "v5p": 96, "v6e": 128, "7x": 64}

HLO = """\
HloModule jit_f

%gathered.1 (p: f32[8], i: s32[8]) -> f32[8] {
  ROOT %g.1 = f32[8]{0} gather(%p, %i), offset_dims={}
}

%body.1 (t: (s32[], f32[8])) -> (s32[], f32[8]) {
  %add.1 = f32[8]{0} add(%x, %y), backend_config={"window_config":{"estimated_cycles":"5"}}
  ROOT %gather_fusion.7 = f32[8]{0} fusion(%add.1, %i), kind=kCustom, calls=%gathered.1
}

%condition.1 (t: (s32[], f32[8])) -> pred[] {
  %limit = s32[]{:T(128)} constant(3)
  ROOT %less = pred[] compare(%i, %limit), direction=LT
}

ENTRY %main.1 (a: f32[8]) -> f32[8] {
  %copy.1 = f32[8]{0} copy(%a), backend_config={"window_config":{"estimated_cycles":"100"}}
  %while.1 = (s32[], f32[8]{0}) while(%copy.1), condition=%condition.1, body=%body.1
  %sort.1 = f32[8]{0} sort(%copy.1), dimensions={0}
  %jvp_my_kernel_.1 = (f32[1,8]{1,0}, s32[4]{0}) custom-call(%a), custom_call_target="tpu_custom_call", \
backend_config={"used_scoped_memory_configs":[{"memory_space":"1","offset":"0","size":"2097152"}]}
}
"""
GATHER = """\
LB: loop begin
     0   :  { %1 = vst }
   0x1 LB: > { %2 = vld }
   0x2   : > { %3 = vld }
   0x3   :  {}
   0x4   : > { %p5 = scmp.ge.s32.totalorder %s4, 10 /* loop exit test */ }
   0x5   :  { %6 = vst }
"""
KERNEL = """\
     0   :  { %1 = vst }
   0x1 LB: > { %2 = vld }
   0x2 LB: >> { %3 = vld }
   0x3   : >> { %p3 = scmp.ge.s32.totalorder %s3, 7 /* loop exit test */ }
   0x4   : > { %4 = vld }
   0x5 LB: >> { %5 = vld }
   0x6 LB: >>> { %6 = vld }
   0x7   :  {}
   0x8   : >>> { %7 = vld }
   0x9 PF: >> { %8 = vld }
   0xa LB: >> { %9 = vld }
   0xb   : > { %p10 = scmp.ge.s32.totalorder %s9, 2 /* loop exit test */ }
"""


@pytest.fixture
def dumps(tmp_path):
    """A folder of bundles as libtpu leaves it."""
    (tmp_path / "17-gather_fusion-00-schedule-analysis_final_bundles.txt").write_text("not this one")
    (tmp_path / "17-gather_fusion-01-final_bundles.txt").write_text(GATHER)
    (tmp_path / "18-my_kernel.1-01-final_bundles.txt").write_text(KERNEL)
    return tmp_path


def test_cost_of_loops_gathers_and_unknown_operations(dumps):
    """Copy 100; three times an addition of 5 and a gather of 2 bundles and ten times 4; a sort of unknown cost."""
    compiled = SimpleNamespace(as_text=lambda: HLO)
    assert ahead_of_time.cost(compiled, dumps) == ahead_of_time.Cost(100 + 3 * 5, 3 * (2 + 10 * 4), 1)  # pyright: ignore


def test_kernels_are_found_by_name():
    (kernel,) = ahead_of_time.kernels(SimpleNamespace(as_text=lambda: HLO), "my_kernel")  # pyright: ignore
    assert kernel == ahead_of_time.Kernel("jvp_my_kernel_.1", 2 * 2**20)


def test_bundles_of_a_kernel_by_loop(dumps):
    """Constant loops run once a head, the longest other one goes over tiles, what is in it over iterations."""
    count = bench.Count.of(ahead_of_time.bundles(dumps, "my_kernel.1"))
    assert count == bench.Count(iteration=3, tile=2, head=2 * 7, step=3)


def test_missing_bundles_say_what_to_do(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no bundles of fusion\.3: call dump_bundles before"):
        ahead_of_time.bundles(tmp_path, "fusion.3")


def test_missing_libtpu_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "libtpu", None)
    with pytest.raises(ImportError, match="pip install 'jax\\[tpu"):
        ahead_of_time.require_libtpu()


def test_bundles_need_jax_to_leave_tpus_alone(tmp_path, monkeypatch):
    monkeypatch.delenv("JAX_PLATFORMS")
    with pytest.raises(ValueError, match="set JAX_PLATFORMS=cpu"):
        ahead_of_time.dump_bundles(tmp_path)


def test_timing_on_a_device(capsys):
    """Here the CPU; what does not run on it says so and does not stop the others."""
    bench.print_timed(SMALL["odd_decoder"], jnp.dtype("float32"), ["sparsecore", "reference", "xla"], repeats=1)
    lines = capsys.readouterr().out.splitlines()[3:]
    assert [line.split()[:2] for line in lines[:4]] == [
        ["sparsecore", "0"],
        ["reference", "0"],
        ["xla", "0"],
        ["sparsecore", "2"],
    ]
    assert "does not run here" in lines[0]
    assert all(float(z) > 0 for line in lines[1:3] for z in line.split()[2:])


def test_visits_follow_the_spread():
    """More spread, more units; none can be visited twice."""
    units = [bench.visits(SMALL["odd_encoder"], spread) for spread in (0.0, 2.0, 8.0)]
    assert units[0].shape == (2, 2, 6)  # tiles: four, one and one
    means = [z.mean() for z in units]
    assert 1 < means[0] < means[1] < means[2]
    assert max(z.max() for z in units) <= block_order(SMALL["odd_encoder"].spatial_shapes).units
    assert bench.iterations(np.array([[[0, 1, 4, 5]]])) == 4


def need_libtpu():
    pytest.importorskip("libtpu", reason="compiling for a TPU needs libtpu: make test-aot")
    ahead_of_time.require_libtpu()


@pytest.mark.slow
@pytest.mark.parametrize("spatial_shapes", [COCO_WIDE, SQUARE], ids=["800x1333", "1333x1333"])
@pytest.mark.parametrize("generation", ahead_of_time.TOPOLOGIES)
def test_compiles_within_vector_memory(generation, spatial_shapes):
    """Forward and backward of an encoder layer, two images, bfloat16: the compiler refuses what is too much."""
    need_libtpu()
    tokens = sum(height * width for height, width in spatial_shapes)
    attend = functools.partial(ms_deform_attn, implementation="tensorcore")

    def gradients(value, locations, weights):
        return jax.grad(lambda *x: attend(x[0], spatial_shapes, *x[1:]).astype(jnp.float32).sum(), (0, 1, 2))(
            value, locations, weights
        )

    compiled = ahead_of_time.compile_for(
        generation,
        gradients,
        jax.ShapeDtypeStruct((2, tokens, 8, 32), jnp.bfloat16),
        jax.ShapeDtypeStruct((2, tokens, 8, 4, 4, 2), jnp.float32),
        jax.ShapeDtypeStruct((2, tokens, 8, 4, 4), jnp.float32),
    )
    kernels = ahead_of_time.kernels(compiled, "ms_deform_attn_backward")
    assert kernels
    assert max(kernel.vmem for kernel in kernels) < VMEM_MIB[generation] * 2**20


@pytest.mark.slow
def test_static_cost_on_v5e():
    """At most 2 / 5 ms (forward / backward of a layer and image) at a spread of 2 pixels, 4 / 10 ms at 8."""
    need_libtpu()
    command = [sys.executable, "-m", "pallas_kernels.ms_deform_attn.bench", "--generations", "v5e"]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [*command, "--implementations", "tensorcore"], env=environment, capture_output=True, text=True, check=True
    )
    rows = {line.split()[2]: [float(z) for z in line.split()[-2:]] for line in done.stdout.splitlines()[-2:]}
    assert rows["forward"][0] <= 2.0
    assert rows["forward"][1] <= 4.0
    assert rows["backward"][0] <= 5.0
    assert rows["backward"][1] <= 10.0
