"""Choosing a function by the platform that a program is lowered for, not by the one that it is traced on.

`jax.lax.platform_dependent` does that too, but traces every choice each time. A Pallas kernel takes a second to trace,
so here a function is traced when it is lowered.
"""

from collections.abc import Callable
from typing import Any

import jax
from jax.core import ShapedArray
from jax.experimental.pallas import tpu as pltpu
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir


def expected_platform() -> str:
    """The platform of the mesh's devices (`jax.set_mesh`), else of JAX's default device: cpu, gpu or tpu."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform


def vmem_bytes() -> int:
    """Bytes of vector memory of the TPU compiled for, as far as it is known: the mesh's, or the default device."""
    info = _tpu_info()
    return info.vmem_capacity_bytes if info else 64 * 2**20  # all but v4 have this much


def tpu_generation() -> int | None:
    """4 for v4, 5 for v5e and v5p, and so on, of the TPU compiled for; `None` where it is not known."""
    info = _tpu_info()
    return info.generation if info else None


def _tpu_info() -> pltpu.TpuInfo | None:
    try:
        return pltpu.get_tpu_info()
    except ValueError:  # traced on another platform
        return None


def tpu_or_default(tpu: Callable, default: Callable, *arrays: jax.Array) -> Any:
    """`tpu(*arrays)` in a program that is lowered for TPUs, `default(*arrays)` in others.

    It has no derivatives: call it in a `jax.custom_vjp`. For `vmap`, axis 0 of all arrays and results must be a batch.

    Args:
        tpu: hashable; returns an array, or several, of the same shapes and types as `default`.
        default: hashable; for all other platforms.
        arrays: their arguments.
    """
    tree = jax.tree.structure(jax.eval_shape(default, *arrays))
    return jax.tree.unflatten(tree, _choice.bind(*arrays, tpu=tpu, default=default))


def _flat(function: Callable) -> Callable:
    return lambda *arrays: jax.tree.leaves(function(*arrays))


def _batched(arrays, axes, **choices):
    """The mapped axis becomes part of the batch."""
    (size,) = {x.shape[axis] for x, axis in zip(arrays, axes, strict=True) if axis is not None}
    arrays = [batching.bdim_at_front(x, axis, size) for x, axis in zip(arrays, axes, strict=True)]
    outputs = _choice.bind(*(x.reshape(-1, *x.shape[2:]) for x in arrays), **choices)
    return [x.reshape(size, -1, *x.shape[1:]) for x in outputs], [0] * len(outputs)


_choice = Primitive("tpu_or_default")
_choice.multiple_results = True
_choice.def_impl(lambda *arrays, **choices: jax.jit(lambda *arrays: _choice.bind(*arrays, **choices))(*arrays))
_choice.def_abstract_eval(
    lambda *shapes, tpu, default: [
        ShapedArray(x.shape, x.dtype)
        for x in jax.tree.leaves(jax.eval_shape(default, *(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in shapes)))
    ]
)
batching.primitive_batchers[_choice] = _batched
mlir.register_lowering(_choice, lambda ctx, *xs, tpu, default: mlir.lower_fun(_flat(default))(ctx, *xs))
mlir.register_lowering(_choice, lambda ctx, *xs, tpu, default: mlir.lower_fun(_flat(tpu))(ctx, *xs), platform="tpu")
