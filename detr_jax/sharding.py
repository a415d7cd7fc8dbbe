"""The device mesh, and how batches and states are laid out on it.

Each device has images of its own: a batch is split over both axes of the mesh, `data` and `fsdp`. The state of the
training (parameters, their moving average, the optimizer's moments) is split over `fsdp` alone: fully sharded data
parallelism. The parameters are put together where a step begins, and their gradients are summed where they are stored.
With an axis `fsdp` of size 1, each device holds all of the state.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from detr_jax.errors import UserError

PyTree = Any
BATCH_AXES = ("data", "fsdp")
"""Mesh axes over which the images of a batch are split."""


def make_mesh(
    num_devices: int | None = None, *, fsdp: int = 1, devices: Sequence[Any] | None = None
) -> jax.sharding.Mesh:
    """A mesh with the axes `data` and `fsdp` over all devices of this program, or those given, or the first of them.

    Raises:
        UserError: the devices do not divide by `fsdp`.
    """
    devices = (jax.devices() if devices is None else devices)[:num_devices]
    if len(devices) % fsdp:
        possible = ", ".join(str(n) for n in range(1, len(devices) + 1) if len(devices) % n == 0)
        raise UserError(f"train.fsdp={fsdp} must divide the number of devices, {len(devices)}: possible are {possible}")
    auto = jax.sharding.AxisType.Auto
    return jax.make_mesh((len(devices) // fsdp, fsdp), BATCH_AXES, axis_types=(auto, auto), devices=devices)


def replicated(mesh: jax.sharding.Mesh) -> jax.sharding.NamedSharding:
    """The whole array on every device."""
    return jax.sharding.NamedSharding(mesh, jax.P())


def over_data(mesh: jax.sharding.Mesh) -> jax.sharding.NamedSharding:
    """The first axis, that of the batch, split over the devices."""
    return jax.sharding.NamedSharding(mesh, jax.P(BATCH_AXES))


def state_spec(shape: tuple[int, ...], fsdp: int) -> jax.P:
    """How an array of the state is split over `fsdp`: along its longest axis that divides, the last one of equals.

    Vectors and arrays without such an axis stay whole: they are small.
    """
    axes = [axis for axis, size in enumerate(shape) if size % fsdp == 0]
    if fsdp == 1 or len(shape) < 2 or not axes:
        return jax.P()
    longest = max(axes, key=lambda axis: (shape[axis], axis))
    return jax.P(*[None] * longest, "fsdp")


def state_layout(state: PyTree, mesh: jax.sharding.Mesh) -> PyTree:
    """The layout of each array of a state, or of a part of one; see `state_spec`."""
    fsdp = mesh.shape.get("fsdp", 1)
    return jax.tree.map(lambda x: jax.sharding.NamedSharding(mesh, state_spec(x.shape, fsdp)), state)


def split_state(state: PyTree) -> PyTree:
    """A state, or a part of one, laid out as `state_layout` says. For programs under `jax.set_mesh`."""
    fsdp = jax.sharding.get_abstract_mesh().shape.get("fsdp", 1)
    if fsdp == 1:
        return state
    return jax.tree.map(lambda x: jax.lax.with_sharding_constraint(x, state_spec(x.shape, fsdp)), state)


def gather(state: PyTree) -> PyTree:
    """What `split_state` split, whole on every device. For programs under `jax.set_mesh`.

    Otherwise XLA would split some of the activations as the parameters are, and exchange those.
    """
    if jax.sharding.get_abstract_mesh().shape.get("fsdp", 1) == 1:
        return state
    return jax.tree.map(lambda x: jax.lax.with_sharding_constraint(x, jax.P()), state)


def host_rows(batch_size: int, mesh: jax.sharding.Mesh, *, accumulate: int = 1) -> slice:
    """The rows of a global batch that this process loads.

    Raises:
        UserError: the batch, or each of the parts that are accumulated, does not divide evenly over the devices.
    """
    if batch_size % (mesh.size * accumulate):
        raise UserError(
            f"train.batch_size={batch_size} must be a multiple of the number of devices, {mesh.size}"
            + (f", times train.accumulate={accumulate}" if accumulate > 1 else "")
        )
    rows = batch_size // jax.process_count()
    return slice(jax.process_index() * rows, (jax.process_index() + 1) * rows)


def put_batch(batch: Mapping[str, np.ndarray], mesh: jax.sharding.Mesh) -> dict[str, jax.Array]:
    """This process's rows of a batch -> global arrays, split over the devices."""
    layout = over_data(mesh)
    return {name: jax.make_array_from_process_local_data(layout, rows) for name, rows in batch.items()}


def split_batch(batch: PyTree, axis: int = 0) -> PyTree:
    """Arrays whose `axis` is that of the images, split over the devices. For programs under `jax.set_mesh`."""
    mesh = jax.sharding.get_abstract_mesh()
    axes = tuple(name for name in BATCH_AXES if mesh.shape.get(name, 1) > 1)
    if not axes:
        return batch
    return jax.tree.map(lambda x: jax.lax.with_sharding_constraint(x, jax.P(*[None] * axis, axes)), batch)


def micro_batches(batch: PyTree, count: int) -> PyTree:
    """`[b, ...]` -> `[count, b / count, ...]`: equal parts of a batch, each with rows of every device.

    Part `i` has the rows `i`, `i + count`, `i + 2 count`, ..., so that no image goes from device to device.
    """
    parts = jax.tree.map(lambda x: x.reshape(x.shape[0] // count, count, *x.shape[1:]).swapaxes(0, 1), batch)
    return split_batch(parts, axis=1)


def describe_devices(mesh: jax.sharding.Mesh, batch_size: int, *, accumulate: int = 1) -> str:
    """One line: devices, processes and how state and batch are split over them."""
    kind = mesh.devices.flat[0].device_kind
    fsdp = mesh.shape.get("fsdp", 1)
    return (
        f"{mesh.size} x {kind} in {jax.process_count()} process(es)"
        + (f", the state split over {fsdp}" if fsdp > 1 else "")
        + f"; batch {batch_size} global, {batch_size // jax.process_count()} per process, "
        f"{batch_size // mesh.size} per device"
        + (f", in {accumulate} parts of {batch_size // mesh.size // accumulate}" if accumulate > 1 else "")
    )
