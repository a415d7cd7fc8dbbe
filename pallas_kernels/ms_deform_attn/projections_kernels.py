"""The kernels of the projections: bodies that `projections.py` calls over (image, some tiles of tokens)."""

import functools

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.dot import dot
from pallas_kernels.ms_deform_attn.tensorcore import drop_outside


def _softmax(logits):
    """Over the samples of a head, which are rows."""
    exponentials = jnp.exp(logits - logits.max(0, keepdims=True))
    return exponentials / exponentials.sum(0, keepdims=True)


def _heads(rows, kind: int, heads: int, samples: int):
    """Rows of a kind (0: x, 1: y, 2: logits), for each head."""
    step = rows.shape[0] // (3 * heads)
    return [rows[(kind * heads + head) * step :][:samples] for head in range(heads)]


def _values(features, valid_ref, value_w, value_b, value_ref):
    """Writes them."""
    value = dot(value_w[...], features, (1, 1)) + value_b[...]
    value_ref[0] = jnp.where(valid_ref[0] > 0, value, 0).astype(value_ref.dtype).reshape(value_ref.shape[1:])


def _values_gradients(features, valid_ref, dvalue_ref, value_w):
    """Of the tokens, the kernel and the bias."""
    dvalue = dvalue_ref[0].reshape(value_w.shape[0], -1).astype(jnp.float32)
    dvalue = jnp.where(valid_ref[0] > 0, dvalue, 0)
    low = dvalue.astype(features.dtype)
    return dot(low, value_w[...], (0, 0)), dot(low, features, (1, 0)), dvalue.sum(1, keepdims=True)


def _add(refs, sums) -> None:
    """To what the tiles of an image have so far."""

    @pl.when(pl.program_id(1) == 0)
    def _():
        for ref in refs:
            ref[...] = jnp.zeros(ref.shape, ref.dtype)

    for ref, z in zip(refs, sums, strict=True):
        ref[0] += z


def values_forward_kernel(features_ref, valid_ref, value_w, value_b, value_ref):
    _values(features_ref[0], valid_ref, value_w, value_b, value_ref)


def values_backward_kernel(features_ref, valid_ref, dvalue_ref, value_w, _, dfeatures_ref, *sum_refs):
    dfeatures, *sums = _values_gradients(features_ref[0], valid_ref, dvalue_ref, value_w)
    dfeatures_ref[0] = dfeatures.astype(dfeatures_ref.dtype)
    _add(sum_refs, sums)


def forward_kernel(
    features_ref, position_ref, place_ref, valid_ref, value_w, value_b, sample_w, sample_b,
    value_ref, x_ref, y_ref, weight_ref, *, shapes, points,
):  # fmt: skip
    features = features_ref[0]
    _values(features, valid_ref, value_w, value_b, value_ref)
    rows = dot(sample_w[...], features + position_ref[0], (1, 1)) + sample_b[...]
    _, heads, samples, tokens = x_ref.shape
    level = lax.div(lax.broadcasted_iota(jnp.int32, (samples, tokens), 0), points)

    def of_levels(values):
        """Each level's value in its rows."""
        return functools.reduce(
            lambda rest, i: jnp.where(level == i, values[i], rest), range(1, len(shapes)), values[0]
        )

    count = len(shapes)
    columns, lines = (
        of_levels([place_ref[0, axis * count + i : axis * count + i + 1, :] for i in range(count)]) for axis in range(2)
    )
    width, height = (of_levels([jnp.float32(shape[axis]) for shape in shapes]) for axis in (1, 0))
    groups = (_heads(rows, kind, heads, samples) for kind in range(3))
    for head, (x, y, logits) in enumerate(zip(*groups, strict=True)):
        found = drop_outside(columns + x, lines + y, _softmax(logits), True, width, height)
        for ref, z in zip((x_ref, y_ref, weight_ref), found, strict=True):
            ref[0, head] = z


def backward_kernel(
    features_ref, position_ref, valid_ref, dvalue_ref, dx_ref, dy_ref, dweight_ref, dresidual_ref,
    value_w, _, sample_w, sample_b, dfeatures_ref, dposition_ref, *sum_refs,
):  # fmt: skip
    features, dtype = features_ref[0], features_ref.dtype
    query = features + position_ref[0]
    _, heads, samples, tokens = dx_ref.shape
    step = sample_w.shape[0] // (3 * heads)
    first = 2 * heads * step  # row of logits
    logits = dot(sample_w[first:], query, (1, 1)) + sample_b[first:]
    fill = [jnp.zeros((step - samples, tokens), jnp.float32)] if step > samples else []
    drows = []
    for ref in (dx_ref, dy_ref):
        for head in range(heads):
            drows += [ref[0, head], *fill]
    for head in range(heads):
        weight, dweight = _softmax(logits[head * step :][:samples]), dweight_ref[0, head]
        drows += [weight * (dweight - (weight * dweight).sum(0, keepdims=True)), *fill]
    drows = jnp.concatenate(drows, 0)
    low = drows.astype(dtype)
    dquery = dot(low, sample_w[...], (0, 0))
    dfeatures, *of_values = _values_gradients(features, valid_ref, dvalue_ref, value_w)
    dfeatures_ref[0] = (dfeatures + dquery + dresidual_ref[0].astype(jnp.float32)).astype(dtype)
    dposition_ref[0] = dquery.astype(dtype)
    _add(sum_refs, (*of_values, dot(low, query, (1, 0)), drows.sum(1, keepdims=True)))
