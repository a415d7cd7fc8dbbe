"""The SparseCore kernels, interpreted, against the reference; compiled ahead of time for each generation."""

import dataclasses
import re
import runpy
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.experimental.pallas import tpu_sc as plsc
from sparsecore_interpreter import sparsecore_interpreter

from pallas_kernels import ahead_of_time
from pallas_kernels.ms_deform_attn.reference import ms_deform_attn_reference
from pallas_kernels.ms_deform_attn.shapes import SHAPES
from pallas_kernels.ms_deform_attn.sparsecore import Split, ms_deform_attn_sparsecore, sparse_core

LEVELS = ((3, 5), (4, 1), (1, 1))


def problem(b=2, q=19, h=3, d=5, p=3, spatial_shapes=LEVELS):
    """A third of the points anywhere, some outside; a third on borders or pixel centres; a third all on one pixel."""
    rng = np.random.default_rng(0)
    shape = (b, q, h, len(spatial_shapes), p)
    value = rng.standard_normal((b, sum(height * width for height, width in spatial_shapes), h, d), np.float32)
    sizes = np.array([(width, height) for height, width in spatial_shapes])[:, None]
    kinks = np.array([-1, -0.5, 0, 1, 1e6])[rng.integers(0, 5, (*shape, 2))]
    kinks = np.where(rng.random((*shape, 2)) < 0.5, kinks, sizes - 1 - kinks)  # from the left, from the right
    locations = rng.uniform(-0.25, 1.25, (*shape, 2))
    locations = np.where(np.arange(q)[:, None, None, None, None] % 3 == 1, (kinks + 0.5) / sizes, locations)
    locations[:, ::3] = 0.4
    return value, locations.astype(np.float32), rng.uniform(0, 1, shape).astype(np.float32)


def results(implementation, dtype=jnp.float32, spatial_shapes=LEVELS, inputs=None, **kwargs):
    """Output and gradients with respect to values, locations and weights."""
    value, locations, weights = problem(spatial_shapes=spatial_shapes, **kwargs)

    @jax.jit
    def run(value, locations, weights):
        output, vjp = jax.vjp(lambda x, *y: implementation(x, spatial_shapes, *y), value, locations, weights)
        return output, *vjp(jnp.cos(jnp.arange(output.size)).reshape(output.shape).astype(dtype))

    return run(jnp.asarray(value, dtype), locations, weights)


def interpreted(*inputs):
    return ms_deform_attn_sparsecore(*inputs, interpret=True)


@pytest.mark.parametrize(
    ("chip", "size", "planes", "parts"),
    [
        ({"lanes": 16}, {}, 4, 1),
        ({"memory": 13500}, {"dtype": jnp.bfloat16}, 2, 1),
        ({"memory": 15500, "lanes": 16}, {"p": 5, "h": 1, "d": 3}, 1, 1),
        ({"subcores": 4}, {"b": 1, "q": 150, "h": 1, "d": 2, "spatial_shapes": ((1, 1), (2, 9))}, 2, 2),
        ({}, {"b": 1, "q": 1, "h": 1, "d": 1, "spatial_shapes": ((4, 6),), "p": 1}, 1, 1),
    ],
    ids=["16 lanes", "bfloat16, 8 lanes", "one plane", "from one pixel on, shared queries", "one query"],
)
def test_equals_reference(chip, size, planes, parts):
    """Gradients included, at pixel centres and borders too: the cell on the right and below counts."""
    with sparsecore_interpreter(hazard=True, **chip):
        value, locations, _ = problem(**{key: x for key, x in size.items() if key != "dtype"})
        value = jnp.asarray(value, size.get("dtype"))
        split = Split.of(sparse_core(), size.get("spatial_shapes", LEVELS), value, locations)
        assert (split.planes, split.parts) == (planes, parts)
        result = results(interpreted, **size)
    dtype = size.get("dtype", jnp.float32)
    for x, expected in zip(result, results(ms_deform_attn_reference, **size), strict=True):
        assert x.dtype == expected.dtype and x.shape == expected.shape
        scale = float(jnp.abs(expected).max())
        # The same sums in float32 in another order; in bfloat16, values and output are rounded once at the end.
        tolerance = 2**-8 if x.dtype == dtype == jnp.bfloat16 else 2e-6
        np.testing.assert_allclose(x.astype(np.float32), expected.astype(np.float32), rtol=0, atol=tolerance * scale)


@pytest.mark.parametrize("hazard", [False, True])
def test_hazard_model(hazard):
    """Where lanes of a scatter share an address, updates are lost under the model: what the kernels must survive."""
    with sparsecore_interpreter(cores=1, subcores=1, hazard=hazard):

        def kernel(index, value, output, indices, memory):
            pltpu.sync_copy(index, indices)
            pltpu.sync_copy(value, memory)
            plsc.addupdate_scatter(memory, [indices[...]], jnp.ones(8, jnp.float32))
            pltpu.sync_copy(memory, output)

        mesh = plsc.VectorSubcoreMesh(core_axis_name="core", subcore_axis_name="subcore", num_cores=1, num_subcores=1)
        total = pl.kernel(
            kernel,
            out_type=jax.ShapeDtypeStruct((8,), jnp.float32),
            mesh=mesh,
            scratch_types=[pltpu.VMEM((8,), jnp.int32), pltpu.VMEM((8,), jnp.float32)],
            interpret=True,
        )(jnp.array([1, 1, 1, 0, 5, 2, 2, 7]), jnp.zeros(8))
    expected = [1, 1, 1, 0, 0, 1, 0, 1] if hazard else [1, 3, 2, 0, 0, 1, 0, 1]
    np.testing.assert_array_equal(total, expected)


@pytest.mark.parametrize("hazard", [False, True])
def test_benchmark_finds_lost_updates(hazard, capsys):
    """The probe that asks a real TPU."""
    benchmark = runpy.run_path(str(Path(__file__).parents[3] / "benchmarks" / "sparsecore.py"))
    with sparsecore_interpreter(cores=1, subcores=1, hazard=hazard):
        benchmark["duplicates"](interpret=True)
    lanes, following = capsys.readouterr().out.splitlines()
    assert ("LOSE UPDATES" if hazard else "add up") in lanes
    assert "follow each other at one address add up: 25600 of 25600" in following


def test_errors():
    value, locations, weights = problem()
    inputs = (value, LEVELS, locations, weights)
    with pytest.raises(ValueError, match=r"'sparsecore' needs a TPU v5p, v6e or 7x: .*cpu"):
        ms_deform_attn_sparsecore(*inputs)
    with sparsecore_interpreter(cores=None), pytest.raises(ValueError, match=r"needs a TPU with SparseCores .* none"):
        ms_deform_attn_sparsecore(*inputs)
    with (
        sparsecore_interpreter(memory=8192),
        pytest.raises(ValueError, match=r"the 20 tokens of spatial_shapes .*: 1\d{4} bytes, of 8192; use another"),
    ):
        ms_deform_attn_sparsecore(*inputs)


@pytest.fixture(params=["v5p", "v6e", "7x"])
def device(request):
    """A device of each generation that has SparseCores, to compile for."""
    pytest.importorskip("libtpu", reason="compiling for a TPU needs libtpu: pip install 'jax[tpu]'")
    ahead_of_time.require_libtpu()
    mesh = ahead_of_time.mesh(request.param)
    with jax.set_mesh(mesh):
        yield mesh.devices[0]


def schedule(function, device, dtype, batch, *other) -> list[str]:
    """The scheduled instructions of `function(value, locations, weights, ...)` at the encoder's published size."""
    shape = dataclasses.replace(SHAPES["encoder_800x1333"], batch=batch)
    points = (shape.batch, shape.tokens, shape.heads, len(shape.spatial_shapes), shape.points)
    sharding = jax.sharding.SingleDeviceSharding(device)
    inputs = [
        jax.ShapeDtypeStruct((shape.batch, shape.tokens, shape.heads, shape.head_dim), dtype, sharding=sharding),
        jax.ShapeDtypeStruct((*points, 2), jnp.float32, sharding=sharding),
        jax.ShapeDtypeStruct(points, jnp.float32, sharding=sharding),
        *(jax.ShapeDtypeStruct(size, jnp.bfloat16, sharding=sharding) for size in other),
    ]
    text = jax.jit(function).lower(*inputs).compile().as_text()
    assert "is_scheduled=true" in text
    return text[text.index("\nENTRY") :].splitlines()


def attend(*inputs):
    return ms_deform_attn_sparsecore(inputs[0], SHAPES["encoder_800x1333"].spatial_shapes, *inputs[1:])


def starts(lines: list[str], kernel: str) -> list[int]:
    """Where a kernel starts; it is asynchronous and on the SparseCores' thread."""
    found = [i for i, line in enumerate(lines) if re.search(rf" %\S*{kernel}\S* = .* call-start\(", line)]
    assert all('async_execution_thread="sparsecore"' in lines[i] for i in found)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
def test_compiles(device, dtype):
    """Forward and backward: each kernel fits a subcore's memory and is asynchronous."""

    def loss(*inputs):
        return attend(*inputs).astype(jnp.float32).sum()

    lines = schedule(jax.value_and_grad(loss, (0, 1, 2)), device, dtype, 2)
    for kernel in ("forward", "backward_weights", "backward_values"):
        assert len(starts(lines, f"ms_deform_attn_{kernel}")) == 1


@pytest.mark.slow
def test_runs_beside_the_tensorcore(device):
    """Matrix products that do not need the kernel's output are scheduled between its start and its end.

    XLA is free to: with two images it does on v5p and v6e, on 7x it puts them behind the kernel.
    """

    def attend_and_multiply(value, locations, weights, x, matrix):
        for _ in range(12):
            x = jax.nn.relu(x @ matrix)
        return attend(value, locations, weights), x

    lines = schedule(attend_and_multiply, device, jnp.float32, 1, (SHAPES["encoder_800x1333"].tokens, 256), (256, 256))
    (start,) = starts(lines, "ms_deform_attn_forward")
    (end,) = [i for i, line in enumerate(lines) if re.search(r" %\S*ms_deform_attn_forward\S* = .* call-done\(", line)]
    assert sum("dot_general" in line for line in lines[start:end]) >= 6
