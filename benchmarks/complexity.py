"""Full attention, deformable attention and deformable convolution on an image of 800 x 1333, counted.

    python benchmarks/complexity.py

Multiply-adds are half of the operations that XLA counts in one layer as it is written (lowered, not compiled; gathers
and bilinear weights, which are not matrix products, included as XLA sees them), beside the leading terms of the paper's
formulas (Zhu et al., 2021, section 3, section 4.1 and appendix A.1). The second table measures the attention weights
of new layers on normal noise: what a query gives each key at the start of the training.
"""

import argparse
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from detr_jax.models.attention import MSDeformAttn, MultiHeadAttention, Tokens
from detr_jax.models.deform_conv import DeformConv
from detr_jax.models.layers import Conv

C, HEADS, POINTS = 256, 8, 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, nargs=2, default=(800, 1333), metavar=("HEIGHT", "WIDTH"))
    height, width = parser.parse_args().size
    maps = [(-(-height // s), -(-width // s)) for s in (8, 16, 32, 64)]
    print(
        f"{height} x {width}, {C} channels, {HEADS} heads, {POINTS} points; 10^9 multiply-adds of one layer, 1 image\n"
    )
    print(f"{'layer':<52}{'keys':>8}{'formula':>10}{'counted':>10}", flush=True)
    for name, levels in (("C5 (DETR)", maps[2:3]), ("C4 (DETR-DC5)", maps[1:2]), ("C3 to C6 (Deformable DETR)", maps)):
        tokens = sum(h * w for h, w in levels)
        samples = POINTS * len(levels)
        rows = {
            "full attention": (full(tokens), 2 * tokens * C**2 + 2 * tokens**2 * C + 2 * tokens * C**2),
            "deformable attention": (
                deformable(levels),
                # Values, output, offsets and weights; then the bilinear samples: at four corners, weight times value.
                2 * tokens * C**2 + 3 * tokens * C * HEADS * samples + 5 * tokens * samples * C,
            ),
        }
        for what, (counted, formula) in rows.items():
            print(f"{name + ', ' + what:<52}{tokens:>8}{formula / 1e9:>10.2f}{counted / 1e9:>10.2f}", flush=True)
    h, w = maps[1]
    convolutions = {
        "C4, 3x3 convolution": (Conv(C, C, 3, rngs=nnx.Rngs(0)), h * w * 9 * C**2),
        "C4, deformable 3x3 convolution": (
            DeformConv(C, C, version=1, rngs=nnx.Rngs(0)),
            h * w * 9 * C**2 + h * w * 9 * C * 18 + 5 * h * w * 9 * C,
        ),
    }
    for what, (layer, formula) in convolutions.items():
        counted = operations(layer, jax.ShapeDtypeStruct((1, h, w, C), jnp.float32))
        print(f"{what:<52}{9:>8}{formula / 1e9:>10.2f}{counted / 1e9:>10.2f}", flush=True)
    print(f"\n{'attention weights of a new layer':<52}{'keys':>8}{'1 / keys':>10}{'mean':>10}{'least':>10}{'most':>10}")
    tokens = maps[2][0] * maps[2][1]
    x = jnp.asarray(np.random.default_rng(0).standard_normal((1, tokens, C)), jnp.float32)
    attention = MultiHeadAttention(C, HEADS, 0.0, rngs=nnx.Rngs(0))
    # The module captures its weights; deformable attention's are softmax(0) by initialization, of 16 samples.
    weights = captured(attention, lambda module: module(x, x, x))
    print(line("DETR, C5", tokens, weights))
    query = x[:, :100]
    points = jnp.full((*query.shape[:2], 4, 2), 0.5)
    small = new_tokens([(4, 4), (2, 2), (1, 1), (1, 1)])
    weights = captured(MSDeformAttn(C, HEADS, 4, POINTS, rngs=nnx.Rngs(0)), lambda module: module(query, points, small))
    print(line("Deformable DETR", 4 * POINTS, weights))


def line(what: str, keys: int, weights: np.ndarray) -> str:
    """Of the second table."""
    numbers = (1 / keys, weights.mean(), weights.min(), weights.max())
    return f"{what:<52}{keys:>8}" + "".join(f"{z:>10.5f}" for z in numbers)


def captured(module: nnx.Module, run) -> np.ndarray:
    """The attention weights of a call of a module."""
    _, intermediates = nnx.capture(run, nnx.Intermediate)(module)
    found = dict(nnx.to_flat_state(intermediates))
    return np.asarray(next(value[...] for path, value in found.items() if path[-1] == "attention_weights"))


def operations(module: nnx.Module, *inputs) -> float:
    """Multiply-adds that XLA counts in a call of a module."""
    graphdef, state = nnx.split(module)

    def call(state: nnx.State, *inputs) -> jax.Array:
        merged: Any = nnx.merge(graphdef, state)
        return merged(*inputs)

    cost = jax.jit(call).lower(state, *inputs).cost_analysis()
    assert cost, "XLA counts every program"
    return cost["flops"] / 2


def full(tokens: int) -> float:
    """Multiply-adds of self-attention of so many tokens."""
    x = jax.ShapeDtypeStruct((1, tokens, C), jnp.float32)
    return operations(MultiHeadAttention(C, HEADS, 0.0, rngs=nnx.Rngs(0)), x, x, x)


def deformable(levels: list[tuple[int, int]]) -> float:
    """Multiply-adds of deformable self-attention on these maps."""
    tokens = jax.eval_shape(lambda: new_tokens(levels))
    points = jax.ShapeDtypeStruct((*tokens.valid.shape, len(levels), 2), jnp.float32)
    return operations(MSDeformAttn(C, HEADS, len(levels), POINTS, rngs=nnx.Rngs(0)), tokens.features, points, tokens)


def new_tokens(levels: Sequence[tuple[int, int]]) -> Tokens:
    """Tokens of these maps, all valid, row by row."""
    shape = 1, sum(h * w for h, w in levels)
    return Tokens(jnp.zeros((*shape, C)), jnp.ones(shape, bool), tuple(levels))


if __name__ == "__main__":
    main()
