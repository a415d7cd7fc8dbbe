"""Every test runs on 8 fake CPU devices; TensorFlow stays quiet; programs are compiled fast, and each one once."""

import importlib.metadata
import os
import tempfile

os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "")
    + " --xla_force_host_platform_device_count=8"
    + " --xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    # Half the time; later versions have no other emitters.
    + " --xla_cpu_use_fusion_emitters=false" * importlib.metadata.version("jaxlib").startswith("0.10.")
)
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
# pytest's workers and the processes that tests start share what they compile. Set the folder yourself to keep it.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    compiled = tempfile.TemporaryDirectory(prefix="detr_jax_compiled_", ignore_cleanup_errors=True)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = compiled.name
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "0")

from pathlib import Path

import pytest

DATA = Path(__file__).parent / "data"


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """`tests/data`: the real images and annotations that the repository carries."""
    return DATA


@pytest.fixture(scope="module")
def shared_programs():
    """Runs of a module that are the same but for their length and folder trace and compile once."""
    import shared_programs

    with shared_programs.shared():
        yield


@pytest.fixture(scope="module")
def two_devices():
    """What is replicated is computed on each device: two of the eight will do, and two processes have as many."""
    from detr_jax import sharding

    with pytest.MonkeyPatch.context() as patch:
        make_mesh = sharding.make_mesh
        patch.setattr(sharding, "make_mesh", lambda num_devices=2, **axes: make_mesh(num_devices, **axes))
        yield


@pytest.fixture(scope="session")
def installed(tmp_path_factory) -> Path:
    """A folder that holds the packages of the wheel."""
    import wheel_install

    site = tmp_path_factory.mktemp("site")
    wheel_install.install(tmp_path_factory.mktemp("source"), site)
    return site


@pytest.fixture(scope="module")
def short_resnet():
    """ResNet-18 with one block per stage instead of two: half of what a small model's compilation costs.

    For modules that compare a model with itself; not where PyTorch's ResNet-18, a stored output or a process of its own
    is on the other side.
    """
    from detr_jax import models
    from detr_jax.models.resnet import BLOCKS

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(BLOCKS, 18, (1, 1, 1, 1))
        models._abstract.cache_clear()
        yield
    models._abstract.cache_clear()
