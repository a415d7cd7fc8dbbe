"""An encoder layer on a TPU without its sampling, counted by the compiler: as kernels, and by XLA with its dropouts.

The layer is that of Deformable DETR (two images of 800 x 1333, bfloat16; forward and backward): projections to values,
offsets and weights, softmax, and locations; the output projection, two LayerNorms, two linear layers and three
dropouts. As the two kernels beside the sampling's (`ms_deform_self_attn`, `feed_forward`), without and with dropout; by
XLA, without dropout, with ours (bits hashed from the place of each number), and with `flax.nnx.Dropout` (bits of
`jax.random`). The sampling's own kernels are not in it. Nothing runs; a few minutes on two cores. A kernel's cycles are
its bundles, those of the projections at least what their traffic with the main memory takes at the chip's peak; XLA's
are its estimate.

    pip install 'libtpu==0.0.42.*'
    JAX_PLATFORMS=cpu python benchmarks/encoder_layer.py
"""

import argparse
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from detr_jax.config import DeformableDETRConfig
from detr_jax.models import layers
from detr_jax.models.attention import Tokens
from detr_jax.models.encoder_layer import EncoderLayer
from detr_jax.models.feed_forward import FeedForward
from pallas_kernels import ahead_of_time
from pallas_kernels.feed_forward.bench import kernel_bundles
from pallas_kernels.ms_deform_attn.order import block_order
from pallas_kernels.ms_deform_attn.projections_bench import kernel_cycles
from pallas_kernels.ms_deform_attn.shapes import COCO_WIDE

IMAGES, RATE = 2, 0.1
CONFIG = dataclasses.replace(DeformableDETRConfig.r50_two_stage(), implementation="tensorcore", dtype="bfloat16")


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


class LayerOfModules(EncoderLayer):
    """Without the kernels beside the sampling's."""

    def __init__(self, dropout: type, rate: float):
        rngs: Any = nnx.Rngs(0)
        super().__init__(dataclasses.replace(CONFIG, dropout=rate), rngs=rngs)
        if dropout is FlaxDropout:
            self.ffn = FlaxFeedForward(CONFIG.hidden_dim, CONFIG.ffn_dim, rate, dtype=CONFIG.dtype, rngs=rngs)
        replaced: Any = dropout(rate)
        self.ffn.dropout = self.dropout = replaced

    def fits_kernels(self, tokens: Tokens) -> bool:
        return False


def count(generation: str, layer: EncoderLayer) -> float:
    """Millions of cycles outside of kernels, of both passes."""
    graphdef, parameters = nnx.split(layer)
    order, levels = block_order(COCO_WIDE), len(COCO_WIDE)

    def passes(parameters, x, position, reference_points, valid, gradient, seed):
        def run(parameters, x, position):
            tokens = Tokens(x, valid, COCO_WIDE, order)
            rngs = nnx.Rngs(jax.random.key(seed))
            return nnx.merge(graphdef, parameters)(tokens, position, reference_points, rngs).features

        output, vjp = jax.vjp(run, parameters, x, position)
        return output, vjp(gradient)

    def shape(*sizes: int, dtype: Any) -> Any:
        return jax.ShapeDtypeStruct((IMAGES, order.length, *sizes), dtype)

    x, valid = shape(CONFIG.hidden_dim, dtype=jnp.bfloat16), shape(dtype=bool)
    reference_points, seed = shape(levels, 2, dtype=jnp.float32), jax.ShapeDtypeStruct((), jnp.uint32)
    parameters = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), parameters)
    compiled = ahead_of_time.compile_for(generation, passes, parameters, x, x, reference_points, valid, x, seed)
    return ahead_of_time.cost(compiled, folder=None).cycles / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--generation", choices=ahead_of_time.TOPOLOGIES, default="v5e", help="(default %(default)s)")
    generation = parser.parse_args().generation
    ahead_of_time.require_libtpu()
    clock = ahead_of_time.CLOCK_GHZ[generation]
    print(f"{generation}: an encoder layer without its sampling, forward and backward\n")
    print(f"{'':<18}{'':<10}{'-------- Mcycles --------':^27}\n{'':<28}{'before':>9}{'after':>9}{'XLA':>9}{'ms':>7}")
    sizes = CONFIG.num_heads, CONFIG.encoder_points, CONFIG.hidden_dim
    before = ahead_of_time.apart(kernel_cycles, COCO_WIDE, IMAGES, *sizes, generation).self_attention / 1e6
    tokens = IMAGES, block_order(COCO_WIDE).length, CONFIG.hidden_dim
    for rate in (0.0, RATE):
        passes = ahead_of_time.apart(kernel_bundles, tokens, CONFIG.ffn_dim, generation, rate)
        after = sum(bundles for bundles, _ in passes.values()) / 1e6
        layer = EncoderLayer(dataclasses.replace(CONFIG, dropout=rate), rngs=nnx.Rngs(0))
        rest = count(generation, layer)
        columns = f"{before:>9.2f}{after:>9.2f}{rest:>9.2f}{(before + after + rest) / clock:>7.2f}"
        print(f"{'kernels':<18}rate {rate:<5g}{columns}", flush=True)
    cases = [("XLA", layers.Dropout, 0.0), ("XLA", layers.Dropout, RATE), ("flax.nnx.Dropout", FlaxDropout, RATE)]
    for name, dropout, rate in cases:
        cycles = count(generation, LayerOfModules(dropout, rate))
        print(f"{name:<18}rate {rate:<5g}{'':>9}{'':>9}{cycles:>9.2f}{cycles / clock:>7.2f}", flush=True)


if __name__ == "__main__":
    main()
