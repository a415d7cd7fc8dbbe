"""The benchmark of a layer: how it counts, what it prints; the kernels compiled by libtpu (slow: `make test-aot`)."""

import functools
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import ahead_of_time, block_order, ms_deform_attn
from pallas_kernels.ms_deform_attn import bench
from pallas_kernels.ms_deform_attn.shapes import COCO_WIDE, SMALL

SQUARE = ((167, 167), (84, 84), (42, 42), (21, 21))  # 1333 x 1333
VMEM_MIB = {"v4": 16, "v5e": 128, "v5p": 96, "v6e": 128, "7x": 64}

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
   0xa LB: >>> { %9 = vld }
   0xb LB: >> { %10 = vld }
   0xc   : > { %p11 = scmp.ge.s32.totalorder %s10, 2 /* loop exit test */ }
"""
COUNT = bench.Count(iteration=3, rest=1, tile=2, head=2 * 7, step=3)


def test_bundles_of_a_kernel_by_loop(tmp_path):
    """Constant loops run once a head, the longest other one over tiles; in it, iterations, and those of the rest."""
    (tmp_path / "18-my_kernel.1-01-final_bundles.txt").write_text(KERNEL)
    assert bench.Count.of(ahead_of_time.bundles(tmp_path, "my_kernel.1")) == COUNT


def test_bundles_of_a_kernel_with_few_tiles(tmp_path):
    """Where a grid step has all tiles, as for 300 queries, their loop has a constant length too."""
    few = KERNEL.replace("{ %8 = vld }", "{ %p8 = scmp.ge.s32.totalorder %s8, 3 /* loop exit test */ }")
    (tmp_path / "18-my_kernel.1-01-final_bundles.txt").write_text(few)
    assert bench.Count.of(ahead_of_time.bundles(tmp_path, "my_kernel.1")) == COUNT


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


def test_visits_follow_the_spread(monkeypatch):
    """More spread, more units; none can be visited twice."""
    units = [bench.visits(SMALL["odd_encoder"], spread) for spread in (0.0, 2.0, 8.0)]
    assert units[0].shape == (2, 2, 6)  # tiles: four, one and one
    means = [z.mean() for z in units]
    assert 1 < means[0] < means[1] < means[2]
    assert max(z.max() for z in units) <= block_order(SMALL["odd_encoder"].spatial_shapes).length // 64
    monkeypatch.setattr(bench, "UNROLL", {"forward": 4, "backward": 8})
    visited = np.array([[[0, 1, 4, 5, 8, 9, 13]]])
    assert bench.iterations(visited, "forward") == (1 + 1 + 2 + 2 + 3 + 4, 0)  # of four units each
    assert bench.iterations(visited, "backward") == (1 + 1 + 1 + 2, 3)  # of eight; of four after none, none and one


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
