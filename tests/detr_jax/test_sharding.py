"""What each host loads: its own rows of the global batch, and all hosts together every row once."""

import re

import jax
import numpy as np
import pytest
import tiny

from detr_jax import sharding
from detr_jax.checkpoints import store
from detr_jax.data.pipeline import batches
from detr_jax.data.sampler import TrainSampler
from detr_jax.data.splits import load_split
from detr_jax.errors import UserError


@pytest.fixture
def rows_of(monkeypatch):
    """`rows_of(process, count, batch_size)`: what `host_rows` says on that process."""

    def rows(process, count, batch_size):
        monkeypatch.setattr(jax, "process_index", lambda: process)
        monkeypatch.setattr(jax, "process_count", lambda: count)
        return sharding.host_rows(batch_size, sharding.make_mesh(8))

    return rows


def test_hosts_share_the_batch_in_order(rows_of):
    assert [rows_of(process, 2, 8) for process in range(2)] == [slice(0, 4), slice(4, 8)]
    assert [rows_of(process, 4, 16) for process in range(4)] == [slice(4 * i, 4 * i + 4) for i in range(4)]
    assert rows_of(0, 1, 8) == slice(0, 8)


def test_what_does_not_divide_is_refused_and_says_what_does(rows_of):
    with pytest.raises(UserError, match=r"train\.fsdp=3 must divide .* devices, 8: possible are 1, 2, 4, 8$"):
        sharding.make_mesh(8, fsdp=3)
    with pytest.raises(UserError, match=r"train\.batch_size=12 must be a multiple of the number of devices, 8$"):
        rows_of(0, 1, 12)
    with pytest.raises(UserError, match=r"train\.batch_size=8 .* devices, 8, times train\.accumulate=2$"):
        sharding.host_rows(8, sharding.make_mesh(8, fsdp=2), accumulate=2)


def test_matrices_are_split_along_their_longest_axis_that_divides():
    specs = {(256, 1024): (None, "fsdp"), (1024, 256): ("fsdp",), (64, 64): (None, "fsdp"), (300, 6): ("fsdp",)}
    specs |= {
        (3, 3, 8, 12): (None, None, None, "fsdp"),
        (1024,): (),
        (): (),
        (7, 5): (),
        (3, 3, 8, 13): (None, None, "fsdp"),
    }
    assert {shape: tuple(sharding.state_spec(shape, 4)) for shape in specs} == specs
    assert tuple(sharding.state_spec((256, 1024), 1)) == ()


def test_a_device_holds_its_share_of_the_state(tmp_path):
    """And a checkpoint of it is restored into another layout."""
    values = {"kernel": np.arange(64.0, dtype=np.float32).reshape(4, 16), "bias": np.arange(8.0, dtype=np.float32)}

    def place(mesh):
        return jax.tree.map(jax.device_put, values, sharding.state_layout(values, mesh))

    state = place(sharding.make_mesh(8, fsdp=4))
    assert [shard.data.shape for shard in state["kernel"].addressable_shards] == [(4, 4)] * 8
    with store.CheckpointWriter(str(tmp_path)) as writer:
        writer.save(1, {"params": state}, {})
    for fsdp in (1, 8):
        other = place(sharding.make_mesh(8, fsdp=fsdp))
        restored = store.restore(str(tmp_path), {"params": other})["params"]
        for name, value in values.items():
            np.testing.assert_array_equal(restored[name], value)
            assert restored[name].sharding == other[name].sharding


def test_parts_of_a_batch_stay_on_their_devices():
    mesh = sharding.make_mesh(8, fsdp=4)
    with jax.set_mesh(mesh):
        rows = jax.device_put(np.arange(32 * 3).reshape(32, 3), sharding.over_data(mesh))
        split = jax.jit(lambda x: sharding.micro_batches(x, 4)).lower(rows).compile()
    parts = split(rows)
    np.testing.assert_array_equal(parts, np.stack([np.asarray(rows)[i::4] for i in range(4)]))
    assert not re.search("all-|collective", split.as_text())


def test_what_two_hosts_load_is_the_batch_of_one(rows_of):
    config = tiny.config()
    index = load_split(config.data, "train")
    sampler = TrainSampler(index, config.data, 8, seed=0)

    def load(rows):
        ((bucket, batch),) = batches(index, sampler, range(1), rows=rows, data_config=config.data)
        return bucket, batch

    bucket, whole = load(rows_of(0, 1, 8))
    parts = [load(rows_of(process, 2, 8)) for process in range(2)]
    assert [bucket for bucket, _ in parts] == [bucket, bucket]
    for name, rows in whole.items():
        np.testing.assert_array_equal(np.concatenate([part[name] for _, part in parts]), rows, err_msg=name)
