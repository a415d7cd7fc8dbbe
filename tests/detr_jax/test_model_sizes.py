"""Sizes that no model can have are refused by the config, by name, before anything is built."""

import pytest

from detr_jax.config import DeformableDETRConfig, DETRConfig

COUNTS = ("num_heads", "num_queries", "num_classes", "decoder_layers", "num_levels", "encoder_points", "decoder_points")


@pytest.mark.parametrize("name", COUNTS)
def test_at_least_one(name):
    with pytest.raises(ValueError, match=rf"model\.{name}=0 must be at least 1"):
        DeformableDETRConfig(**{name: 0})


@pytest.mark.parametrize("name", COUNTS[:4])
def test_at_least_one_in_detr(name):
    with pytest.raises(ValueError, match=rf"model\.{name}=0 must be at least 1"):
        DETRConfig(**{name: 0})
