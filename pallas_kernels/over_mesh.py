"""Splitting a kernel's work over the devices of a mesh: XLA cannot partition a Pallas call."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

Axes = str | Sequence[str] | None
"""Names of mesh axes."""


def over_mesh(
    function: Callable[..., Any],
    *arrays: jax.Array,
    shared: Sequence[jax.Array] = (),
    op: str,
    batch_axis: Axes,
    head_axis: Axes = None,
    head_dim: int = 0,
    partitions: bool,
) -> Any:
    """`function(*arrays, *shared)`, computed by all devices of the mesh (`jax.set_mesh`).

    Images are independent of each other, and so are heads.

    A batch that does not divide is filled up with zeros. Inside of a `jax.shard_map`, only axes that it leaves open
    are used.

    Args:
        function: of any number of images and heads; returns an array or several.
        arrays: `[b, ...]`.
        shared: arrays that all images and heads share, such as a convolution's kernel.
        op: its name, for errors.
        batch_axis: mesh axes over which axis 0 of the arrays and of the results is split, as far as the mesh has them.
        head_axis: mesh axes over which axis `head_dim` of them is split.
        head_dim: the axis of the heads.
        partitions: XLA can partition `function`: other axes of the mesh are left to it.

    Raises:
        ValueError: the heads do not divide, or the mesh has other axes: devices along them would all compute the same.
    """
    mesh, open_axes = jax.sharding.get_abstract_mesh(), _open_axes()
    batch, heads = ([name for name in _names(axes) if open_axes.get(name, 1) > 1] for axes in (batch_axis, head_axis))
    others = other_axes(batch_axis, head_axis)
    if others and not partitions:
        raise ValueError(
            f"{op}: the mesh {dict(open_axes)} has axes {others}, which are neither batch_axis={batch_axis!r} nor "
            f"head_axis={head_axis!r}: devices along them would all compute the same. Name them in batch_axis (a tuple "
            "splits the batch over several axes) or head_axis, or call the operation inside of your own jax.shard_map"
        )
    if not batch and not heads:
        return function(*arrays, *shared)
    count = math.prod(open_axes[name] for name in heads)
    if heads and arrays[0].shape[head_dim] % count:
        raise ValueError(
            f"{op}: {arrays[0].shape[head_dim]} heads do not divide over mesh axes {heads} of size {count}"
        )
    spec = jax.P(tuple(batch), *[None] * (head_dim - 1), tuple(heads)) if heads else jax.P(tuple(batch))
    images = arrays[0].shape[0]
    padding = -images % math.prod(open_axes[name] for name in batch)
    if not isinstance(padding, int) or padding:
        arrays = tuple(jnp.pad(x, ((0, padding), *[(0, 0)] * (x.ndim - 1))) for x in arrays)
    explicit = any(mesh.axis_types[mesh.axis_names.index(name)] == jax.sharding.AxisType.Explicit for name in open_axes)
    if explicit:
        arrays = tuple(jax.sharding.reshard(x, spec) for x in arrays)
        shared = tuple(jax.sharding.reshard(x, jax.P()) for x in shared)
    # XLA alone would gather all of what the reference's gathers read, and cannot partition a kernel at all.
    names = {*batch, *heads} if partitions else {*open_axes}
    in_specs = (*[spec] * len(arrays), *[jax.P()] * len(shared))
    split = jax.shard_map(function, in_specs=in_specs, out_specs=spec, axis_names=names, check_vma=False)
    output = jax.jit(split)(*arrays, *shared)  # outside of a jit too, all of it in one program
    if not isinstance(padding, int) or padding:
        output = jax.tree.map(lambda x: (jax.sharding.reshard(x, jax.P()) if explicit else x)[:images], output)
    return output


def other_axes(*axes: Axes) -> list[str]:
    """Axes of the mesh with more than one device that are none of `axes`; a kernel cannot be split over them."""
    named = [name for some in axes for name in _names(some)]
    return [name for name, size in _open_axes().items() if size > 1 and name not in named]


def _open_axes() -> dict[str, int]:
    """Those that no `jax.shard_map` around has taken, with their sizes."""
    mesh = jax.sharding.get_abstract_mesh()
    return {name: size for name, size in mesh.shape.items() if name not in mesh.manual_axes}


def _names(axes: Axes) -> tuple[str, ...]:
    if axes is None:
        return ()
    return (axes,) if isinstance(axes, str) else tuple(axes)
