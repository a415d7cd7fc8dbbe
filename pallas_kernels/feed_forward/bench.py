"""The feed-forward half of a layer on a TPU, counted by its compiler: the kernel, and XLA's operations in its place."""

import tempfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import ahead_of_time
from pallas_kernels.feed_forward.tensorcore import Weights, feed_forward, weight_shapes


def abstract_problem(
    shape: tuple[int, int, int], hidden: int, dtype: str = "bfloat16"
) -> tuple[Any, Any, Weights, Any]:
    """The arguments of `feed_forward` for tokens `[b, s, c]`, to compile for."""
    b, s, c = shape
    sizes: list[Any] = [jax.ShapeDtypeStruct(size, jnp.float32) for size in weight_shapes(c, c, hidden)]
    sampled = jax.ShapeDtypeStruct((b, c, s), dtype)
    return jax.ShapeDtypeStruct(shape, dtype), sampled, Weights(*sizes), jax.ShapeDtypeStruct((3, 2), jnp.uint32)


def both_passes(x, sampled, weights, keys, gradient, *, rate: float = 0.1):
    """The output of `feed_forward`, and all gradients."""
    y, vjp = jax.vjp(lambda x, sampled, w: feed_forward(x, sampled, w, keys, rate=rate), x, sampled, weights)
    return y, vjp(gradient)


def kernel_bundles(
    shape: tuple[int, int, int], hidden: int, generation: str, rate: float = 0.1
) -> dict[str, tuple[int, int]]:
    """Bundles and bytes of vector memory of the bfloat16 kernels, by pass: `forward` and `backward`.

    Call it in a process that compiles nothing else (`ahead_of_time.apart`): libtpu writes the bundles of all that a
    process compiles, or of none.
    """
    ahead_of_time.require_libtpu()
    x, sampled, weights, keys = abstract_problem(shape, hidden)
    with tempfile.TemporaryDirectory() as folder:
        ahead_of_time.dump_bundles(Path(folder))
        compiled = ahead_of_time.compile_for(
            generation, lambda *arrays: both_passes(*arrays, rate=rate), x, sampled, weights, keys, x
        )
        found = {}
        for name in ("forward", "backward"):
            (kernel,) = ahead_of_time.kernels(compiled, f"feed_forward_{name}")
            found[name] = ahead_of_time.issued(ahead_of_time.bundles(Path(folder), kernel.label)), kernel.vmem
    return found
