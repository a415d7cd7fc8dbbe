"""The device mesh, and how batches and states are laid out on it."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from detr_jax.errors import UserError


def make_mesh(num_devices: int | None = None, *, devices: Sequence[Any] | None = None) -> jax.sharding.Mesh:
    """A mesh with the axis `data` over all devices of this program, or those given, or the first `num_devices`."""
    devices = (jax.devices() if devices is None else devices)[:num_devices]
    return jax.make_mesh((len(devices),), ("data",), axis_types=(jax.sharding.AxisType.Auto,), devices=devices)


def replicated(mesh: jax.sharding.Mesh) -> jax.sharding.NamedSharding:
    """The whole array on every device."""
    return jax.sharding.NamedSharding(mesh, jax.P())


def over_data(mesh: jax.sharding.Mesh) -> jax.sharding.NamedSharding:
    """The first axis, that of the batch, split over the devices."""
    return jax.sharding.NamedSharding(mesh, jax.P("data"))


def host_rows(batch_size: int, mesh: jax.sharding.Mesh) -> slice:
    """The rows of a global batch that this process loads.

    Raises:
        UserError: the batch does not divide evenly over the devices.
    """
    if batch_size % mesh.size:
        raise UserError(f"train.batch_size={batch_size} must be a multiple of the number of devices, {mesh.size}")
    rows = batch_size // jax.process_count()
    return slice(jax.process_index() * rows, (jax.process_index() + 1) * rows)


def put_batch(batch: Mapping[str, np.ndarray], mesh: jax.sharding.Mesh) -> dict[str, jax.Array]:
    """This process's rows of a batch -> global arrays, split over `data`."""
    layout = over_data(mesh)
    return {name: jax.make_array_from_process_local_data(layout, rows) for name, rows in batch.items()}


def describe_devices(mesh: jax.sharding.Mesh, batch_size: int) -> str:
    """One line: devices, processes and how a batch is split over them."""
    kind = mesh.devices.flat[0].device_kind
    return (
        f"{mesh.size} x {kind} in {jax.process_count()} process(es); batch {batch_size} global, "
        f"{batch_size // jax.process_count()} per process, {batch_size // mesh.size} per device"
    )
