"""The GPU kernels lower for CUDA, on a machine without a GPU; the one by Mosaic GPU equals the reference, interpreted.

Triton's is interpreted in `test_every_implementation.py`. The other one works on `xla.py`'s cells and shares, so that
points on borders, far outside, or not finite are tested there; its interpreter needs milliseconds per sample.
"""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ms_deform_attn_cases import assert_close, run

from pallas_kernels.ms_deform_attn import IMPLEMENTATIONS, gpu_mosaic, gpu_triton, ms_deform_attn
from pallas_kernels.ms_deform_attn.gpu_mosaic import mosaic, ms_deform_attn_gpu_mosaic
from pallas_kernels.ms_deform_attn.gpu_triton import ms_deform_attn_gpu_triton
from pallas_kernels.ms_deform_attn.shapes import SHAPES, SMALL, Shape, problem

needs_mosaic = pytest.mark.skipif(mosaic() is None, reason=f"Mosaic GPU of jax {jax.__version__} lacks stores")
TINY = Shape(2, ((3, 5), (1, 1)), 3, heads=2, head_dim=24, points=3)
"""With unused lanes, chunks of two points, and points outside of the map."""

TRITON, MOSAIC = "__gpu$xla.gpu.triton", "mosaic_gpu_v2"
"""Custom calls."""


@pytest.fixture
def interpreted(monkeypatch) -> str:
    """The name of the kernel by Mosaic GPU, while a test runs."""
    monkeypatch.setitem(IMPLEMENTATIONS, "gpu_mosaic", ms_deform_attn_gpu_mosaic)
    return "gpu_mosaic"


def lowered(kernel, shape: Shape, dtype) -> str:
    """Forward and backward for an H100."""
    queries, levels = shape.queries or shape.tokens, (shape.heads, len(shape.spatial_shapes), shape.points)
    value = jax.ShapeDtypeStruct((shape.batch, shape.tokens, shape.heads, shape.head_dim), dtype)
    locations = jax.ShapeDtypeStruct((shape.batch, queries, *levels, 2), jnp.float32)
    weights = jax.ShapeDtypeStruct((shape.batch, queries, *levels), jnp.float32)

    @jax.jit
    def step(value, locations, weights):
        output, vjp = jax.vjp(lambda *x: kernel(x[0], shape.spatial_shapes, *x[1:]), value, locations, weights)
        return output, *vjp(output)

    device = jax.sharding.AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", num_cores=132, platform="gpu")
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((1,), ("data",), abstract_device=device)):
        return step.trace(value, locations, weights).lower(lowering_platforms=("cuda",)).as_text()


def targets(module: str) -> list[str]:
    """Of its custom calls."""
    return re.findall(r"custom_call @([\w$.]+)", module)


@pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated:DeprecationWarning")  # by jax 0.12
@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(
    ("kernel", "target"),
    [
        pytest.param(ms_deform_attn_gpu_triton, TRITON, id="triton"),
        pytest.param(ms_deform_attn_gpu_mosaic, MOSAIC, id="mosaic", marks=needs_mosaic),
    ],
)
def test_lowers_for_cuda(name, dtype, kernel, target):
    """Forward and backward become GPU kernels at every named size, on a machine without a GPU."""
    module = lowered(kernel, SHAPES[name], dtype)
    assert targets(module).count(target) == 2
    assert "_forward_kernel" in module
    assert "_backward_kernel" in module


@pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated:DeprecationWarning")  # by jax 0.12
def test_chooses_triton_where_it_is():
    """The one name, with what this JAX has."""
    assert targets(lowered(IMPLEMENTATIONS["gpu"], TINY, jnp.float32)).count(TRITON) == 2


@needs_mosaic
def test_chooses_mosaic_without_triton(monkeypatch):
    """As in a JAX that has dropped Triton."""
    monkeypatch.setattr(gpu_triton, "plt", None)
    assert targets(lowered(IMPLEMENTATIONS["gpu"], TINY, jnp.float32)).count(MOSAIC) == 2


def test_with_neither(monkeypatch):
    """An error says so."""
    monkeypatch.setattr(gpu_triton, "plt", None)
    monkeypatch.setattr(gpu_mosaic, "mosaic", lambda: None)
    inputs = problem(SMALL["one_of_each"])
    with pytest.raises(NotImplementedError, match=r"Triton backend of Pallas, or Mosaic GPU .* has neither"):
        ms_deform_attn(inputs.value, ((1, 1),), *inputs[1:3], implementation="gpu")


@needs_mosaic
@pytest.mark.parametrize(
    ("shape", "dtype", "tolerance"),
    [
        pytest.param(TINY, jnp.float32, 1e-5, id="tiny"),
        pytest.param(dataclasses.replace(SMALL["wide_heads"], queries=5), jnp.bfloat16, 1e-2, id="wide_heads"),
    ],
)
def test_mosaic_equals_the_reference(interpreted, shape, dtype, tolerance):
    """The same sums in another order; in bfloat16, results are rounded too."""
    inputs = problem(shape, dtype)
    assert_close(run(interpreted, shape, inputs), run("reference", shape, inputs), tolerance)


@needs_mosaic
def test_mosaic_adds_nothing_from_outside(interpreted):
    """Points outside of the map, at infinity or nowhere count as zero."""
    inputs = problem(TINY)
    locations = np.array(inputs.sampling_locations)
    locations[0, 0, 0, :, 0], locations[0, 0, 0, :, 1], locations[1, 2] = -1, np.nan, np.inf
    near = np.where(np.isfinite(locations), locations, -1)
    got = run(interpreted, TINY, inputs._replace(sampling_locations=jnp.asarray(locations)))
    assert_close(got, run("reference", TINY, inputs._replace(sampling_locations=jnp.asarray(near))), 1e-5)
    assert not got["output"][1, 2].any()
    assert not got["grad_locations"][1, 2].any()


@needs_mosaic
def test_a_weight_that_is_not_finite_stays_in_its_query(interpreted):
    """The other queries' outputs and gradients do not change; this one's output says so."""
    inputs = problem(TINY)
    inputs = inputs._replace(sampling_locations=jnp.full_like(inputs.sampling_locations, 0.55))  # all of them inside
    weights = np.array(inputs.attention_weights)
    weights[0, 1, 1, 0, 0] = np.nan
    got = run(interpreted, TINY, inputs._replace(attention_weights=jnp.asarray(weights)))
    expected = run(interpreted, TINY, inputs)
    assert not np.isfinite(got["output"][0, 1, 1]).any()
    for name in ("output", "grad_locations", "grad_weights"):
        for z in (got, expected):
            z[name][0, 1, 1] = 0
        np.testing.assert_array_equal(got[name], expected[name], err_msg=name)
