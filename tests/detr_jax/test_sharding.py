"""What each host loads: its own rows of the global batch, and all hosts together every row once."""

import jax
import numpy as np
import pytest
import tiny

from detr_jax import sharding
from detr_jax.data.pipeline import batches
from detr_jax.data.sampler import TrainSampler
from detr_jax.data.splits import load_split


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
