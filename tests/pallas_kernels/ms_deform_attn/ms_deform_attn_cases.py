"""Every implementation, forward and backward, by one compiled program per shape and type."""

import functools
from typing import Any

import jax
import numpy as np

from pallas_kernels.ms_deform_attn import ms_deform_attn

NAMES = ("output", "grad_value", "grad_locations", "grad_weights")


@functools.partial(jax.jit, static_argnames=("implementation", "spatial_shapes", "in_blocks", "batch_axis"))
def attend_and_vjp(value, locations, weights, gradient, *, implementation, spatial_shapes, **options):
    """The output and the gradients, by name; what is made for another platform is interpreted."""

    def attend(value, locations, weights):
        return ms_deform_attn(
            value, spatial_shapes, locations, weights, implementation=implementation, interpret=True, **options
        )

    output, vjp = jax.vjp(attend, value, locations, weights)
    return dict(zip(NAMES, (output, *vjp(gradient.astype(output.dtype))), strict=True))


def run(implementation: str | None, shape, problem, **options) -> dict[str, Any]:
    """`attend_and_vjp` of a `Problem`: its results in float32, and their `dtypes`."""
    results = attend_and_vjp(*problem, implementation=implementation, spatial_shapes=shape.spatial_shapes, **options)
    arrays = {name: np.array(z, np.float32) for name, z in results.items()}
    return arrays | {"dtypes": [z.dtype for z in results.values()]}


def assert_close(got: dict, expected: dict, tolerance: float) -> None:
    """Equal within a share of the largest number: outputs are sums, whose rounding errors go with their terms."""
    assert got["dtypes"] == expected["dtypes"]
    for name in NAMES:
        assert got[name].shape == expected[name].shape
        scale = max(np.abs(expected[name]).max(initial=0), 1e-30)
        np.testing.assert_allclose(got[name], expected[name], rtol=0, atol=tolerance * scale, err_msg=name)
