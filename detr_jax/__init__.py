"""DETR and Deformable DETR in JAX/Flax: `detr_jax.load`, `detr_jax.Detector`."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from detr_jax.checkpoints.load import load
    from detr_jax.detector import Detector

__all__ = ["Detector", "load"]


def __getattr__(name: str) -> Any:
    """Imports them when they are asked for: `detr_jax.config` alone stays light."""
    if name == "Detector":
        from detr_jax.detector import Detector

        return Detector
    if name == "load":
        from detr_jax.checkpoints.load import load

        return load
    raise AttributeError(f"module 'detr_jax' has no attribute {name!r}")
