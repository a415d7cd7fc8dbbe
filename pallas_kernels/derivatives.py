"""A clear error where a kernel has no further derivative."""

import functools
from typing import Any

import jax


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def first_order(op: str, arrays: Any) -> Any:
    """`arrays`, for the two functions of `op`'s `jax.custom_vjp`: whoever differentiates these too gets a message.

    Raises:
        NotImplementedError: it is differentiated.
    """
    del op
    return arrays


@first_order.defjvp
def _(op, primals, tangents):
    del primals, tangents
    raise NotImplementedError(
        f"second derivatives of {op}: its kernels have first ones only. Use implementation='reference' for them"
    )
