"""How what libtpu says of a compiled program is read."""

import sys
from types import SimpleNamespace

import pytest

from pallas_kernels import ahead_of_time

HLO = """\
HloModule jit_f

%gathered.1 (p: f32[8], i: s32[8]) -> f32[8] {
  %p = f32[8]{0} parameter(0)
  %i = s32[8]{0} parameter(1)
  ROOT %g.1 = f32[8]{0} gather(%p, %i), offset_dims={}
}

%body.1 (t: (s32[], f32[8])) -> (s32[], f32[8]) {
  %x = f32[8]{0} get-tuple-element(%t), index=1
  %add.1 = f32[8]{0} add(%x, %x), backend_config={"window_config":{"estimated_cycles":"5"}}
  ROOT %gather_fusion.7 = f32[8]{0} fusion(%add.1, %i), kind=kCustom, calls=%gathered.1
}

%condition.1 (t: (s32[], f32[8])) -> pred[] {
  %limit = s32[]{:T(128)} constant(3)
  ROOT %less = pred[] compare(%i, %limit), direction=LT
}

ENTRY %main.1 (a: f32[8]) -> f32[8] {
  %a = f32[8]{0} parameter(0)
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


@pytest.fixture
def dumps(tmp_path):
    """A folder of bundles as libtpu leaves it."""
    (tmp_path / "17-gather_fusion-00-schedule-analysis_final_bundles.txt").write_text("not this one")
    (tmp_path / "17-gather_fusion-01-final_bundles.txt").write_text(GATHER)
    return tmp_path


def test_cost_of_loops_gathers_and_unknown_operations(dumps):
    """Copy 100; three times an addition of 5 and a gather of 2 bundles and ten times 4; a sort of unknown cost."""
    compiled = SimpleNamespace(as_text=lambda: HLO)
    assert ahead_of_time.cost(compiled, dumps) == ahead_of_time.Cost(100 + 3 * 5, 3 * (2 + 10 * 4), 1)  # pyright: ignore


def test_kernels_are_found_by_name():
    (kernel,) = ahead_of_time.kernels(SimpleNamespace(as_text=lambda: HLO), "my_kernel")  # pyright: ignore
    assert kernel == ahead_of_time.Kernel("jvp_my_kernel_.1", 2 * 2**20)


def test_of_equal_instructions_one_is_compiled(tmp_path):
    """A kernel that works off a large map in equal parts is such a case."""
    (tmp_path / "17-my_kernel.5-01-final_bundles.txt").write_text(GATHER)
    assert ahead_of_time.bundles(tmp_path, "my_kernel.6") == ahead_of_time.bundles(tmp_path, "my_kernel.5")
    with pytest.raises(FileNotFoundError):
        ahead_of_time.bundles(tmp_path, "other_kernel.6")


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
