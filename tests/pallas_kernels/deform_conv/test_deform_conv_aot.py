"""The kernel at a ResNet's sizes: taken by Mosaic, and compiled by libtpu for real TPUs (`make test-aot`)."""

import functools

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import ahead_of_time
from pallas_kernels.deform_conv import deform_conv

VMEM_MIB = {"v4": 16, "v5e": 128, "v5p": 96, "v6e": 128, "7x": 64}
SIZES = {
    "layer2.0": (200, 334, 128, 2),
    "layer3": (50, 84, 256, 1),
    "layer4": (25, 42, 512, 1),
}
"""Height, width, channels and stride of 3x3 convolutions of a ResNet on an image of 800 x 1333."""


def gradients(stride, x, offsets, modulation, kernel):
    """Of all inputs."""
    convolve = functools.partial(deform_conv, stride=stride, padding=1, implementation="tensorcore")
    return jax.grad(lambda *inputs: convolve(*inputs).astype(jnp.float32).sum(), (0, 1, 2, 3))(
        x, offsets, modulation, kernel
    )


def problem(name, dtype):
    """The function and its arguments' shapes, for one image."""
    height, width, channels, stride = SIZES[name]
    samples = (1, -(-height // stride), -(-width // stride), 1, 9)
    arguments = (
        jax.ShapeDtypeStruct((1, height, width, channels), dtype),
        jax.ShapeDtypeStruct((*samples, 2), jnp.float32),
        jax.ShapeDtypeStruct(samples, jnp.float32),
        jax.ShapeDtypeStruct((3, 3, channels, channels), jnp.float32),
    )
    return functools.partial(gradients, stride), arguments


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_lowers_for_tpus(dtype):
    function, arguments = problem("layer4", dtype)
    lowered = jax.jit(function).trace(*arguments).lower(lowering_platforms=("tpu",)).as_text()
    for kernel in ("touched", "forward", "backward"):
        assert f"ms_deform_attn_{kernel}" in lowered


@pytest.mark.slow
@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("generation", ahead_of_time.TOPOLOGIES)
def test_compiles_within_vector_memory(generation, name):
    """Forward and backward in bfloat16: the compiler refuses what is too much."""
    pytest.importorskip("libtpu", reason="compiling for a TPU needs libtpu: make test-aot")
    ahead_of_time.require_libtpu()
    function, arguments = problem(name, jnp.bfloat16)
    compiled = ahead_of_time.compile_for(generation, function, *arguments)
    kernels = ahead_of_time.kernels(compiled, "ms_deform_attn_backward")
    assert kernels
    assert max(kernel.vmem for kernel in kernels) < VMEM_MIB[generation] * 2**20
