"""Processes, the device mesh, and how batches and states are laid out on it."""

import os
from collections.abc import Mapping

import jax
import numpy as np

from detr_jax.errors import UserError


def start_processes() -> None:
    """Joins the processes of a multi-host run; call it before anything touches a device.

    On TPU pods, Slurm and Kubernetes jax finds the others by itself. Elsewhere set `JAX_COORDINATOR_ADDRESS`
    (host:port of process 0), `JAX_NUM_PROCESSES` and `JAX_PROCESS_ID`. Without any of that the run has one process.
    """
    if "JAX_NUM_PROCESSES" in os.environ:
        jax.distributed.initialize(
            os.environ["JAX_COORDINATOR_ADDRESS"],
            int(os.environ["JAX_NUM_PROCESSES"]),
            int(os.environ["JAX_PROCESS_ID"]),
        )
    elif len(os.environ.get("TPU_WORKER_HOSTNAMES", "").split(",")) > 1 or "SLURM_NTASKS" in os.environ:
        jax.distributed.initialize()


def make_mesh(num_devices: int | None = None) -> jax.sharding.Mesh:
    """A mesh with the axis `data` over all devices, or the first `num_devices`."""
    devices = jax.devices()[:num_devices]
    return jax.make_mesh((len(devices),), ("data",), axis_types=(jax.sharding.AxisType.Auto,), devices=devices)


def replicated(mesh: jax.sharding.Mesh) -> jax.sharding.NamedSharding:
    """The whole array on every device."""
    return jax.sharding.NamedSharding(mesh, jax.P())


def host_rows(batch_size: int, mesh: jax.sharding.Mesh) -> slice:
    """The rows of a global batch that this process loads.

    Raises:
        ValueError: the batch does not divide evenly over the devices.
    """
    if batch_size % mesh.size:
        raise UserError(f"train.batch_size={batch_size} must be a multiple of the number of devices, {mesh.size}")
    rows = batch_size // jax.process_count()
    return slice(jax.process_index() * rows, (jax.process_index() + 1) * rows)


def put_batch(batch: Mapping[str, np.ndarray], mesh: jax.sharding.Mesh) -> dict[str, jax.Array]:
    """This process's rows of a batch -> global arrays, split over `data`."""
    sharding = jax.sharding.NamedSharding(mesh, jax.P("data"))
    return {name: jax.make_array_from_process_local_data(sharding, rows) for name, rows in batch.items()}


def any_process(flag: bool) -> bool:
    """Whether the flag is set on any process; a collective when there are several."""
    if jax.process_count() == 1:
        return flag
    from jax.experimental import multihost_utils

    return bool(np.any(multihost_utils.process_allgather(np.array(flag))))


def describe_devices(mesh: jax.sharding.Mesh, batch_size: int) -> str:
    """One line: devices, processes and how a batch is split over them."""
    kind = mesh.devices.flat[0].device_kind
    return (
        f"{mesh.size} x {kind} in {jax.process_count()} process(es); batch {batch_size} global, "
        f"{batch_size // jax.process_count()} per process, {batch_size // mesh.size} per device"
    )
