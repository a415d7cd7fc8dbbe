"""Hungarian matching, the bipartite matching of targets and predictions: costs, and an exact assignment.

The assignment runs on the device, inside the jitted step. `config.matcher = "scipy"` calls back to the host instead.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from detr_jax.boxes import cxcywh_to_xyxy, generalized_box_iou
from detr_jax.config import LossConfig
from detr_jax.sharding import BATCH_AXES

# Costs beyond this are no costs: sums over thousands of smaller ones are finite in float32.
_LARGEST_COST = 1e30


@jax.named_scope("matching")
def match(
    outputs: Mapping[str, Any], targets: Mapping[str, Any], config: LossConfig
) -> tuple[jax.Array, jax.Array | None]:
    """Matches the targets with the outputs of every supervised layer, and with the encoder's tokens.

    Each layer is matched on its own. For the encoder (two-stage) all tokens compete and every label counts as 0. Under
    a mesh with the axes of `sharding.BATCH_AXES` each device matches its own images: a loop that XLA partitioned would
    communicate in every iteration. No gradient flows through the matching.

    Args:
      outputs: the model's: pred_logits [b, q, k], pred_boxes [b, q, 4]; optionally aux_outputs (the same, stacked to
        [n, b, ...]; not used without `config.aux_loss`), interm_outputs (the same, of the proposals that became
        queries) and enc_outputs (the same with s tokens for q queries).
      targets: boxes_cxcywh [b, t, 4], labels [b, t], num_boxes [b]; rows from num_boxes on are padding.
      config: cost weights and matcher.

    Returns:
      The index of each target's query, int32 [layers, b, t] (see `stack_layers`), and of its token, int32
      [b, t], or None without enc_outputs. -1 marks padding, targets that outnumber the queries, and every target
      of a problem with costs that are not finite (see `assign`).
    """
    layers = stack_layers(outputs, config)
    encoder = outputs.get("enc_outputs")

    def match_layers(layers, encoder, boxes_cxcywh, labels, num_boxes):
        decoder_indices = _match_each(layers, boxes_cxcywh, labels, num_boxes, config)
        if encoder is None:
            return decoder_indices, None
        encoder = jax.tree.map(lambda x: x[None], encoder)
        return decoder_indices, _match_each(encoder, boxes_cxcywh, jnp.zeros_like(labels), num_boxes, config)[0]

    mesh = jax.sharding.get_abstract_mesh()
    axes = tuple(name for name in BATCH_AXES if mesh.shape.get(name, 1) > 1 and name not in mesh.manual_axes)
    if axes:
        images = jax.P(axes)
        layers_of_images = jax.P(None, axes)
        match_layers = jax.shard_map(
            match_layers,
            in_specs=(layers_of_images, images, images, images, images),
            out_specs=(layers_of_images, images),
            check_vma=False,  # the loop's carry starts as constants, which do not vary over the mesh
        )
    inputs = (layers, encoder, targets["boxes_cxcywh"], targets["labels"], targets["num_boxes"])
    return match_layers(*jax.lax.stop_gradient(inputs))


def stack_layers(outputs: Mapping[str, Any], config: LossConfig) -> dict[str, jax.Array]:
    """The supervised layers: pred_logits [layers, b, q, k], pred_boxes [layers, b, q, 4].

    First the proposals that became queries (interm_outputs), if any, then the decoder layers, the last one last.
    """
    names = ("pred_logits", "pred_boxes")
    layers = [{name: outputs[name][None] for name in names}]
    if config.aux_loss and "aux_outputs" in outputs:
        layers.insert(0, outputs["aux_outputs"])
    if "interm_outputs" in outputs:
        layers.insert(0, {name: outputs["interm_outputs"][name][None] for name in names})
    return {name: jnp.concatenate([layer[name] for layer in layers]) for name in names}


def _match_each(layers, boxes_cxcywh, labels, num_boxes, config):
    """Matches [n, b, ...] outputs with [b, ...] targets as one batch of n * b problems -> int32 [n, b, t]."""
    cost = match_cost(layers["pred_logits"], layers["pred_boxes"], labels, boxes_cxcywh, config)
    n, b, t, q = cost.shape
    solve = assign if config.matcher == "device" else assign_on_host
    return solve(cost.reshape(n * b, t, q), jnp.tile(num_boxes, n)).reshape(n, b, t)


def match_cost(
    pred_logits: jax.Array, pred_boxes: jax.Array, labels: jax.Array, boxes_cxcywh: jax.Array, config: LossConfig
) -> jax.Array:
    """What it costs to match each target with each query (DETR, equation 1 and appendix A.2; Deformable DETR, A.4).

    The weighted sum of the class cost, the L1 distance of the boxes (cxcywh) and -GIoU. The class cost is -probability
    for "softmax"; for "focal" it is by how much the focal loss changes when the query becomes a positive of the class.

    Args:
      pred_logits: [..., q, k].
      pred_boxes: [..., q, 4] cxcywh.
      labels: int [..., t]; a label >= k costs NaN. Leading axes broadcast against those of the predictions.
      boxes_cxcywh: [..., t, 4].
      config: cost weights.

    Returns:
      float32 [..., t, q].
    """
    logits, pred_boxes, boxes = (jnp.asarray(x, jnp.float32) for x in (pred_logits, pred_boxes, boxes_cxcywh))
    if config.classification == "softmax":
        class_cost = -jax.nn.softmax(logits)
    else:
        # The modulating factor (1 - p)^gamma as exp(gamma * log(1 - p)): exact however confident p is.
        log_p, log_not_p = jax.nn.log_sigmoid(logits), jax.nn.log_sigmoid(-logits)
        positive = -config.focal_alpha * jnp.exp(config.focal_gamma * log_not_p) * log_p
        negative = -(1 - config.focal_alpha) * jnp.exp(config.focal_gamma * log_p) * log_not_p
        class_cost = positive - negative
    # Whole rows of queries are gathered, which is cheap for the encoder's tens of thousands of tokens too.
    class_cost = jnp.swapaxes(class_cost, -1, -2)
    labels = jnp.broadcast_to(labels, (*class_cost.shape[:-2], labels.shape[-1]))
    class_cost = jnp.take_along_axis(class_cost, labels[..., None], axis=-2)

    l1_cost = sum(jnp.abs(boxes[..., :, None, i] - pred_boxes[..., None, :, i]) for i in range(4))
    giou = generalized_box_iou(cxcywh_to_xyxy(boxes), cxcywh_to_xyxy(pred_boxes), config.giou_epsilon)
    return config.class_cost * class_cost + config.l1_cost * l1_cost - config.giou_cost * giou


def assign(cost: jax.Array, num_rows: jax.Array) -> jax.Array:
    """Exact minimum-cost assignments of rows to columns, on the device (float32).

    Takes time for the `num_rows` real rows only. min(num_rows, q) rows of each problem are matched.

    Args:
      cost: float32 [n, t, q], n problems.
      num_rows: int [n], how many rows of each problem are real; the others may hold anything.

    Returns:
      int32 [n, t]: each row's column, each column at most once. -1 for rows that are not real, for rows that are left
      over where there are more real rows than columns, and for all rows of a problem in whose real rows any cost is
      NaN, infinite or beyond 1e30: it has no meaningful answer, and the caller can tell by the number of matched rows.
    """
    _, t, q = cost.shape
    cost = jnp.asarray(cost, jnp.float32)
    real = jnp.arange(t) < num_rows[:, None]
    sound = jnp.all((jnp.abs(cost) < _LARGEST_COST) | ~real[..., None], axis=(1, 2))
    num_rows = jnp.where(sound, num_rows, 0)
    solve = jax.vmap(_solve)
    if t <= q:
        return solve(cost, num_rows)[0]
    # The search needs a free column for every row: with more real rows than columns, swap the two.
    swap = num_rows > q
    by_rows, _ = solve(cost, jnp.where(swap, 0, num_rows))
    swapped_cost = jnp.swapaxes(jnp.where(real[..., None], cost, jnp.inf), 1, 2)
    _, by_columns = solve(swapped_cost, jnp.where(swap, q, 0))
    return jnp.where(swap[:, None], by_columns, by_rows)


def assign_on_host(cost: jax.Array, num_rows: jax.Array) -> jax.Array:
    """`assign` by `scipy.optimize.linear_sum_assignment`, as a callback to the host."""
    n, t, _ = cost.shape
    return jax.pure_callback(_assign_with_scipy, jax.ShapeDtypeStruct((n, t), jnp.int32), cost, num_rows)


def _assign_with_scipy(cost, num_rows):
    from scipy.optimize import linear_sum_assignment

    cost, num_rows = np.asarray(cost), np.asarray(num_rows)
    columns = np.full(cost.shape[:2], -1, np.int32)
    for problem, rows, result in zip(cost, num_rows, columns, strict=True):
        real = problem[:rows]
        if np.all(np.abs(real) < _LARGEST_COST):
            matched, result_columns = linear_sum_assignment(real)
            result[matched] = result_columns
    return columns


class _Search(NamedTuple):
    """State of `_solve` for n rows and m columns."""

    price: jax.Array  # float32 [m]: the columns' dual variables
    row_of: jax.Array  # int32 [m]: each column's row, -1 if free
    column_of: jax.Array  # int32 [n]: each row's column, -1 if none yet
    distance: jax.Array  # float32 [m]: length of the shortest path found to each column
    parent: jax.Array  # int32 [m]: the last row on that path
    settled: jax.Array  # bool [m]: that path is final
    radius: jax.Array  # float32: distance of the column that was settled last
    column: jax.Array  # int32: that column, or the one to be flipped next; -1: begin with a new row
    flipping: jax.Array  # bool: a free column was found, its path is being flipped


def _solve(cost: jax.Array, num_rows: jax.Array) -> tuple[jax.Array, jax.Array]:
    """One assignment by successive shortest augmenting paths (Jonker and Volgenant 1987; Crouse 2016, as in SciPy).

    The textbook has three nested loops: over rows; over the columns that Dijkstra's search from that row settles; over
    the path that is then flipped. Under `vmap` each level would wait for the slowest problem of the batch, every time.
    So this is one flat loop whose body makes one problem's next move, whatever that is: the batch takes as many
    iterations as its longest problem, not the sum of the longest searches. Rows that are not real are never begun.
    (Rows of constant cost in their place would all be tied, and every search would walk through those before it.)

    The rows' dual variables are not stored: a matched row's is its cost minus the price of its column.

    Args:
      cost: float32 [n, m]; +inf forbids a pair. Every real row must find a column.
      num_rows: int, the number of real rows.

    Returns:
      int32 [n], each row's column, and int32 [m], each column's row; -1 where there is none.
    """
    n, m = cost.shape
    rows, columns = jnp.arange(n, dtype=jnp.int32), jnp.arange(m, dtype=jnp.int32)
    real = rows < num_rows

    def waiting(search):
        return real & (search.column_of < 0)

    def settle(s):
        """Dijkstra: extends the paths by the row of the last settled column, settles the nearest column."""
        begin = s.column < 0
        row = jnp.where(begin, jnp.argmax(waiting(s)).astype(jnp.int32), s.row_of[s.column])
        offset = jnp.where(begin, 0.0, s.radius - (cost[row, s.column] - s.price[s.column]))
        settled = s.settled & ~begin
        path = cost[row] - s.price + offset
        shorter = ~settled & (begin | (path < s.distance))
        distance = jnp.where(shorter, path, s.distance)
        parent = jnp.where(shorter, row, s.parent)

        reachable = jnp.where(settled, jnp.inf, distance)
        radius = jnp.min(reachable)
        # Of equally near columns a free one, if any: it ends the search. (A maximum is cheaper than an argmax.)
        free = s.row_of < 0
        column = jnp.max(jnp.where(reachable == radius, columns + m * free, -1)) % m
        settled |= columns == column
        found = free[column]
        price = jnp.where(found & settled, s.price + distance - radius, s.price)
        return _Search(price, s.row_of, s.column_of, distance, parent, settled, radius, column, found)

    def flip(s):
        """Gives the column to its parent row, and goes on with the column which that row had."""
        row = s.parent[s.column]
        previous = s.column_of[row]  # -1: the row that the search began with
        row_of = jnp.where(columns == s.column, row, s.row_of)
        column_of = jnp.where(rows == row, s.column, s.column_of)
        return s._replace(row_of=row_of, column_of=column_of, column=previous, flipping=previous >= 0)

    def move(s):
        s = jax.lax.cond(s.flipping, lambda s: s, settle, s)
        return jax.lax.cond(s.flipping, flip, lambda s: s, s)

    search = _Search(
        price=jnp.zeros(m, jnp.float32),
        row_of=jnp.full(m, -1, jnp.int32),
        column_of=jnp.full(n, -1, jnp.int32),
        distance=jnp.zeros(m, jnp.float32),
        parent=jnp.zeros(m, jnp.int32),
        settled=jnp.zeros(m, bool),
        radius=jnp.float32(0),
        column=jnp.int32(-1),
        flipping=jnp.bool_(False),
    )
    search = jax.lax.while_loop(lambda s: jnp.any(waiting(s)), move, search)
    return search.column_of, search.row_of
