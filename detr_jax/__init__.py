"""DETR and Deformable DETR in JAX/Flax: `detr_jax.load`, `detr_jax.Detector`."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from detr_jax.detector import Detector, load

__all__ = ["Detector", "load"]


def __getattr__(name: str) -> Any:
    """Imports them when they are asked for: `detr_jax.config` alone stays light."""
    if name not in __all__:
        raise AttributeError(f"module 'detr_jax' has no attribute {name!r}")
    from detr_jax import detector

    return getattr(detector, name)
