"""What tests of several kernels share."""

import pytest

from pallas_kernels.ms_deform_attn import tensorcore


@pytest.fixture
def short_loops(monkeypatch):
    """The TensorCore's sampling visits two units in an iteration, which its interpreter compiles in half the time.

    `test_tensorcore.py` and the models' tests run it as it is.
    """
    monkeypatch.setattr(tensorcore, "UNROLL", {"forward": 2, "backward": 2})
