"""Runs a SparseCore kernel (`pl.kernel` on a `VectorSubcoreMesh`, `interpret=True`) on a CPU, subcore by subcore.

JAX 0.10.2 has no interpretation rules for the SparseCore's operations; this adds them, through private modules, so that
the very program that is compiled for a TPU can be checked. What a gather reads outside its memory is not a number.
Nothing here sees races, alignment or a full memory.
"""

import contextlib
import dataclasses
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import pytest
from jax import lax

JAX_VERSION = "0.10.2"


@contextlib.contextmanager
def sparsecore_interpreter(
    *, cores: int | None = 2, subcores=2, lanes=8, memory=512 * 1024, hazard=False
) -> Iterator[None]:
    """While it is open, the CPU passes for a TPU with these SparseCores, and `interpret=True` runs on them.

    What is jitted under one of these must not be called under another.

    Args:
        cores: SparseCores; `None` for a TPU that has none.
        subcores: vector subcores of each.
        lanes: words of a vector.
        memory: bytes of a subcore's memory.
        hazard: an adding scatter reads, adds and writes a whole vector at a time: of lanes with equal addresses only
            the last one counts. It is documented nowhere that a SparseCore does any better.
    """
    if jax.__version__ != JAX_VERSION:
        pytest.skip(f"the SparseCore interpreter uses private parts of jax {JAX_VERSION}, this is {jax.__version__}")
    from jax._src.pallas import hlo_interpreter
    from jax._src.pallas.mosaic import tpu_info

    _register()
    chip = tpu_info.get_tpu_info_for_chip(tpu_info.ChipVersion.TPU_7X, 1)
    core = cores and tpu_info.SparseCoreInfo(
        num_cores=cores,
        num_subcores=subcores,
        num_lanes=lanes,
        vmem_capacity_bytes=memory,
        dma_granule_size_bytes=32,
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(tpu_info.registry, "cpu", lambda: dataclasses.replace(chip, sparse_core=core))
        patch.setattr(hlo_interpreter, "kernel_to_hlo_jaxpr", _axes_of_the_grid(hlo_interpreter.kernel_to_hlo_jaxpr))
        patch.setitem(_model, "hazard", hazard)
        tpu_info.get_tpu_info.cache_clear()
        try:
            yield
        finally:
            tpu_info.get_tpu_info.cache_clear()


_model = {"hazard": False}


def _axes_of_the_grid(lower):
    """The interpreter runs a mesh as a grid, but leaves `axis_index("core")` in the kernel: it is a `program_id`."""
    from jax._src.pallas import primitives

    def lowered(jaxpr, consts, grid_mapping, *args, **kwargs):
        jaxpr, consts, scratch = lower(jaxpr, consts, grid_mapping, *args, **kwargs)
        names = list(grid_mapping.grid_names or ())

        def renamed(equation):
            axis = equation.params.get("axis_name")
            if equation.primitive is not lax.axis_index_p or axis not in names:
                return equation
            return equation.replace(primitive=primitives.program_id_p, params={"axis": names.index(axis)})

        return jaxpr.replace(eqns=[renamed(equation) for equation in jaxpr.eqns]), consts, scratch

    return lowered


def _register() -> None:
    """State discharge, which turns references into arrays, for the operations that the kernels use."""
    from jax._src.pallas.mosaic import sc_primitives
    from jax._src.state import discharge

    discharge.register_discharge_rule(sc_primitives.gather_p)(_gather)
    discharge.register_discharge_rule(sc_primitives.scatter_p)(_scatter)
    discharge.register_discharge_rule(sc_primitives.swap_p)(_addupdate)
    discharge.register_partial_discharge_rule(sc_primitives.parallel_loop_p)(_parallel_loop)


def _gather(in_avals, out_avals, *args, tree):
    from jax._src.state import discharge

    array, transforms, indices, mask = tree.unflatten(args)
    if transforms:
        array = discharge.transform_array(array, transforms)
    outside = jnp.nan if array.dtype == jnp.float32 else 0x7FC07FC0  # two NaNs in bfloat16
    target = array.at[tuple(indices)]
    values = target.get(mode="fill", fill_value=outside, wrap_negative_indices=False)
    return (None,) * len(in_avals), values if mask is None else jnp.where(mask, values, 0)


def _scatter(in_avals, out_avals, *args, tree, add):
    array, transforms, indices, values, mask = tree.unflatten(args)
    assert not transforms
    if mask is not None:
        indices = (jnp.where(mask, indices[0], array.shape[0]), *indices[1:])
    target = array.at[tuple(indices)]
    if add and _model["hazard"]:
        array = target.set(values + target.get(mode="fill", fill_value=0), mode="drop")
    else:
        array = target.add(values, mode="drop") if add else target.set(values, mode="drop")
    return (array, *[None] * (len(in_avals) - 1)), ()


def _addupdate(in_avals, out_avals, array, values, *transforms, has_mask, tree, add):
    from jax._src.state import discharge

    assert add and not has_mask
    transforms = jax.tree.unflatten(tree, transforms)
    old = discharge.transform_array(array, transforms)
    _, array = discharge.transform_swap_array(array, transforms, old + values)
    return (array, *[None] * (len(in_avals) - 1)), old


def _parallel_loop(should_discharge, in_avals, out_avals, *args, tree, unroll, jaxpr):
    """A `fori_loop`: the references among the constants that are to be discharged become part of its carry."""
    from jax._src import core
    from jax._src.interpreters import partial_eval
    from jax._src.state import discharge

    lower, upper, step, consts, carry = tree.unflatten(args)
    lower_discharged, upper_discharged, step_discharged, discharged, carry_discharged = tree.unflatten(should_discharge)
    assert not any([lower_discharged, upper_discharged, step_discharged, *carry_discharged])
    closed = core.ClosedJaxpr(partial_eval.convert_constvars_jaxpr(jaxpr), ())
    body = discharge.discharge_state(closed, should_discharge=[*discharged, False, *[False] * len(carry)])
    outputs = len(jaxpr.outvars)

    def iteration(i, state):
        arrays, carry = iter(state[0]), state[1]
        inputs = [next(arrays) if is_array else const for is_array, const in zip(discharged, consts, strict=True)]
        results = core.eval_jaxpr(body.jaxpr, body.consts, *inputs, jnp.int32(lower + i * step), *carry)
        return tuple(results[outputs:]), tuple(results[:outputs])

    arrays = tuple(const for is_array, const in zip(discharged, consts, strict=True) if is_array)
    arrays, carry = lax.fori_loop(0, (upper - lower + step - 1) // step, iteration, (arrays, tuple(carry)))
    arrays = iter(arrays)
    new = [next(arrays) if is_array else None for is_array in discharged]
    return (None, None, None, *new, *[None] * len(carry)), list(carry)
