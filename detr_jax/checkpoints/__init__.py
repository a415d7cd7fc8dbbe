"""Checkpoints: ours (`store`, orbax), and those of other implementations (`convert`), behind one door: `load`."""

from detr_jax.checkpoints.load import Loaded, describe_run, initialize_from, is_ours, load, restore_model

__all__ = ["Loaded", "describe_run", "initialize_from", "is_ours", "load", "restore_model"]
