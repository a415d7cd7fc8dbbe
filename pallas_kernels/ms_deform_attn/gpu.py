"""Multi-scale deformable attention on a GPU: by Pallas' Triton backend where JAX has it, else by Mosaic GPU.

Triton first: its kernel reads `value` itself, that of Mosaic GPU a table four times as large. Neither has been timed.
"""

from collections.abc import Sequence

import jax

from pallas_kernels.ms_deform_attn import gpu_mosaic, gpu_triton


def ms_deform_attn_gpu(
    value: jax.Array,
    spatial_shapes: Sequence[tuple[int, int]],
    sampling_locations: jax.Array,
    attention_weights: jax.Array,
    *,
    interpret: bool = False,
) -> jax.Array:
    """Shapes, semantics and gradients of `ms_deform_attn_reference`.

    Raises:
        NotImplementedError: this JAX has neither backend.
    """
    if gpu_triton.plt is not None:
        kernel = gpu_triton.ms_deform_attn_gpu_triton
    elif gpu_mosaic.mosaic() is not None:
        kernel = gpu_mosaic.ms_deform_attn_gpu_mosaic
    else:
        raise NotImplementedError(
            "implementation='gpu' needs the Triton backend of Pallas, or Mosaic GPU as in jax 0.12. jax "
            f"{jax.__version__} has neither: use implementation='reference', or jax 0.12"
        )
    return kernel(value, spatial_shapes, sampling_locations, attention_weights, interpret=interpret)
