"""The feed-forward half of an encoder layer on a TPU, counted by the compiler: one kernel, and XLA with its dropouts.

The layer is that of Deformable DETR (two images of 800 x 1333, bfloat16; forward and backward): two LayerNorms, two
linear layers, dropout of the attention's output, of the hidden layer and of the result. As one kernel
(`pallas_kernels.feed_forward`), without and with dropout; by XLA, without dropout, with ours (bits hashed from the
place of each number), and with `flax.nnx.Dropout` (bits of `jax.random`). Nothing runs; a minute on two cores. A
kernel's cycles are its bundles, XLA's its estimate; neither has what is waited for.

    pip install 'libtpu==0.0.42.*'
    JAX_PLATFORMS=cpu python benchmarks/feed_forward.py
"""

import argparse
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from detr_jax.models import layers
from detr_jax.models.feed_forward import FeedForward
from pallas_kernels import ahead_of_time
from pallas_kernels.feed_forward.bench import kernel_bundles
from pallas_kernels.ms_deform_attn.order import block_order
from pallas_kernels.ms_deform_attn.shapes import COCO_WIDE

IMAGES, CHANNELS, HIDDEN, RATE = 2, 256, 1024, 0.1


class FlaxDropout(nnx.Module):
    """`flax.nnx.Dropout` with the signature of ours."""

    def __init__(self, rate: float):
        self.dropout = nnx.Dropout(rate)

    def __call__(self, x: jax.Array, rngs: nnx.Rngs | None) -> jax.Array:
        return self.dropout(x, rngs=rngs)


class FlaxFeedForward(FeedForward):
    """Ours draws its bits within its ReLU."""

    def __call__(self, x: jax.Array, rngs: nnx.Rngs | None) -> jax.Array:
        return self.linear2(self.dropout(layers.relu(self.linear1(x)), rngs))


class Block(nnx.Module):
    """What an encoder layer does after its attention."""

    def __init__(self, dropout: type, rate: float, rngs: nnx.Rngs):
        feed_forward = FlaxFeedForward if dropout is FlaxDropout else FeedForward
        self.ffn: Any = feed_forward(CHANNELS, HIDDEN, rate, dtype="bfloat16", rngs=rngs)
        self.ffn.dropout, self.dropout = dropout(rate), dropout(rate)
        self.norm1, self.norm2 = (layers.layer_norm(CHANNELS, dtype="bfloat16", rngs=rngs) for _ in range(2))

    def __call__(self, x: jax.Array, attended: jax.Array, rngs: nnx.Rngs) -> jax.Array:
        x = self.norm1(x + self.dropout(attended, rngs))
        return self.norm2(x + self.dropout(self.ffn(x, rngs), rngs))


def count(generation: str, dropout: type, rate: float) -> tuple[float, float]:
    """Millions of cycles, and GiB accessed by XLA's count, of both passes."""
    graphdef, parameters = nnx.split(Block(dropout, rate, nnx.Rngs(0)))

    def passes(parameters, x, attended, gradient, seed):
        def run(parameters, x, attended):
            return nnx.merge(graphdef, parameters)(x, attended, nnx.Rngs(jax.random.key(seed)))

        output, vjp = jax.vjp(run, parameters, x, attended)
        return output, vjp(gradient)

    tokens = jax.ShapeDtypeStruct((IMAGES, block_order(COCO_WIDE).length, CHANNELS), jnp.bfloat16)
    parameters = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), parameters)
    seed = jax.ShapeDtypeStruct((), jnp.uint32)
    compiled = ahead_of_time.compile_for(generation, passes, parameters, tokens, tokens, tokens, seed)
    analysis = compiled.cost_analysis()
    assert analysis is not None
    return ahead_of_time.cost(compiled, folder=None).cycles / 1e6, analysis["bytes accessed"] / 2**30


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--generation", choices=ahead_of_time.TOPOLOGIES, default="v5e", help="(default %(default)s)")
    generation = parser.parse_args().generation
    ahead_of_time.require_libtpu()
    clock, tokens = ahead_of_time.CLOCK_GHZ[generation], (IMAGES, block_order(COCO_WIDE).length, CHANNELS)
    print(f"{generation}: an encoder layer's feed-forward half, forward and backward\n")
    print(f"{'':<28}{'Mcycles':>9}{'ms':>7}{'GiB':>7}")
    for rate in (0.0, RATE):
        passes = ahead_of_time.apart(kernel_bundles, tokens, HIDDEN, generation, rate)
        cycles = sum(bundles for bundles, _ in passes.values()) / 1e6
        print(f"{'one kernel':<18}rate {rate:<5g}{cycles:>9.2f}{cycles / clock:>7.2f}{'-':>7}", flush=True)
    cases = [("XLA", layers.Dropout, 0.0), ("XLA", layers.Dropout, RATE), ("flax.nnx.Dropout", FlaxDropout, RATE)]
    for name, dropout, rate in cases:
        cycles, size = count(generation, dropout, rate)
        print(f"{name:<18}rate {rate:<5g}{cycles:>9.2f}{cycles / clock:>7.2f}{size:>7.2f}", flush=True)


if __name__ == "__main__":
    main()
