"""The projections of deformable attention on a TPU, counted by its compiler."""

import functools
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels import ahead_of_time
from pallas_kernels.ms_deform_attn.order import UNIT, block_order
from pallas_kernels.ms_deform_attn.projections import Weights, project, project_values


def abstract_problem(
    spatial_shapes: Sequence[tuple[int, int]],
    images: int,
    *,
    heads: int = 8,
    points: int = 4,
    channels: int = 256,
    dtype: str = "bfloat16",
) -> tuple[Any, ...]:
    """The arguments of `both_passes`, to compile for."""
    tokens, samples = block_order(spatial_shapes).length, len(spatial_shapes) * points

    def shape(*sizes: int, dtype: str = "float32") -> Any:
        return jax.ShapeDtypeStruct(sizes, dtype)

    features = shape(images, tokens, channels, dtype=dtype)
    rows = 3 * heads * -(-samples // UNIT) * UNIT
    weights = Weights(shape(channels, channels), shape(channels, 1), shape(rows, channels), shape(rows, 1))
    places, valid = shape(images, 2 * len(spatial_shapes), tokens), shape(images, 1, tokens)
    sample = shape(images, heads, samples, tokens)
    gradients = shape(images, heads, channels // heads, tokens, dtype=dtype), sample, sample, sample, features
    return features, features, places, valid, weights, gradients


def both_passes(spatial_shapes, points: int, features, position, places, valid, weights, gradients):
    """The outputs of `project` and of `project_values`, and all gradients."""
    heads = gradients[0].shape[1]

    def run(features, position, weights):
        order = block_order(spatial_shapes)
        outputs: Any = project(features, position, places, valid, weights, order, points, False)
        return tuple(outputs), project_values(features, valid, weights[:2], heads, False)

    outputs, vjp = jax.vjp(run, features, position, weights)
    return outputs, vjp((gradients, gradients[0]))


class Cycles(NamedTuple):
    """Of both passes of a layer."""

    self_attention: float
    cross_attention: float


def kernel_cycles(
    spatial_shapes: Sequence[tuple[int, int]], images: int, heads: int, points: int, channels: int, generation: str
) -> Cycles:
    """Cycles of the bfloat16 kernels.

    They are a kernel's bundles, or what its traffic with the main memory takes at the chip's peak, whichever is more.
    Call it in a process that compiles nothing else (`ahead_of_time.apart`): libtpu writes the bundles of all that a
    process compiles, or of none.
    """
    ahead_of_time.require_libtpu()
    arguments = abstract_problem(spatial_shapes, images, heads=heads, points=points, channels=channels)
    run = functools.partial(both_passes, spatial_shapes, points)
    features, _, _, _, _, gradients = arguments
    tokens, samples = (z.size * jnp.dtype(z.dtype).itemsize for z in (features, gradients[1]))
    # Values are as large as the tokens; samples are three arrays.
    traffic = {
        "forward": 3 * tokens + 3 * samples,
        "backward": 6 * tokens + 3 * samples,
        "values_forward": 2 * tokens,
        "values_backward": 3 * tokens,
    }
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        ahead_of_time.dump_bundles(Path(folder))
        compiled = ahead_of_time.compile_for(generation, run, *arguments)
        limits = ahead_of_time.limits(ahead_of_time.mesh(generation))
        for name, size in traffic.items():
            (kernel,) = ahead_of_time.kernels(compiled, f"ms_deform_attn_project_{name}")
            bundles = ahead_of_time.issued(ahead_of_time.bundles(Path(folder), kernel.label))
            found[name] = max(bundles, size / limits.bandwidth * limits.clock)
    return Cycles(found["forward"] + found["backward"], found["values_forward"] + found["values_backward"])
