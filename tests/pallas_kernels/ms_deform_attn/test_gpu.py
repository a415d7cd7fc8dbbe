"""The GPU kernel lowers for CUDA, on a machine without a GPU; without Triton, JAX says so."""

import functools
import re

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels.ms_deform_attn import gpu, ms_deform_attn
from pallas_kernels.ms_deform_attn.shapes import SHAPES, SMALL, problem


@pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated:DeprecationWarning")  # by jax 0.12
@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_lowers_for_cuda(name, dtype):
    """Forward and backward become Triton kernels at every named size, on a machine without a GPU."""
    shape = SHAPES[name]
    queries, levels = shape.queries or shape.tokens, (shape.heads, len(shape.spatial_shapes), shape.points)
    value = jax.ShapeDtypeStruct((shape.batch, shape.tokens, shape.heads, shape.head_dim), dtype)
    locations = jax.ShapeDtypeStruct((shape.batch, queries, *levels, 2), jnp.float32)
    weights = jax.ShapeDtypeStruct((shape.batch, queries, *levels), jnp.float32)

    @jax.jit
    def step(value, locations, weights):
        attend = functools.partial(ms_deform_attn, implementation="gpu")
        output, vjp = jax.vjp(lambda *x: attend(x[0], shape.spatial_shapes, *x[1:]), value, locations, weights)
        return output, *vjp(output)

    target = "__gpu$xla.gpu.triton"
    device = jax.sharding.AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", num_cores=132, platform="gpu")
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((1,), ("data",), abstract_device=device)):
        module = step.trace(value, locations, weights).lower(lowering_platforms=("cuda",)).as_text()
    assert re.findall(r"custom_call @([\w$.]+)", module).count(target) == 2
    assert "_forward_kernel" in module
    assert "_backward_kernel" in module


def test_without_triton(monkeypatch):
    """As in a JAX that has dropped it."""
    monkeypatch.setattr(gpu, "plt", None)
    inputs = problem(SMALL["one_of_each"])
    with pytest.raises(NotImplementedError, match=r"needs the Triton backend of Pallas, which jax .* does not have"):
        ms_deform_attn(inputs.value, ((1, 1),), *inputs[1:3], implementation="gpu")
