"""Every implementation beside the reference, as a fixture."""

from collections.abc import Iterator

import pytest
from sparsecore_interpreter import sparsecore_interpreter

from pallas_kernels.ms_deform_attn import IMPLEMENTATIONS


@pytest.fixture(scope="module", params=[name for name in IMPLEMENTATIONS if name != "reference"])
def implementation(request) -> Iterator[str]:
    """Its name; the SparseCore's runs in an interpreter of our own."""
    if request.param != "sparsecore":
        yield request.param
        return
    with sparsecore_interpreter(hazard=True):
        yield request.param
