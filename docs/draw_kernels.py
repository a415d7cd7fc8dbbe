"""Draws `kernels.png`: what the TensorCore kernel does for one tile of queries and one head.

python docs/draw_kernels.py
"""

from pathlib import Path

import jax.numpy as jnp
import matplotlib
import numpy as np
from matplotlib.patches import Rectangle

from pallas_kernels import block_order
from pallas_kernels.ms_deform_attn.order import UNIT
from pallas_kernels.ms_deform_attn.tensorcore import in_tiles, touched

matplotlib.use("agg")
import matplotlib.pyplot as plt

HEIGHT, WIDTH, POINTS = 40, 64, 4
TOP, LEFT = 16, 16  # of the tile: 8 x 16 queries
OUTLIER = (34.0, 45.0)  # row and column of the one point that lies far away


def main() -> None:
    rng = np.random.default_rng(1)
    order = block_order([(HEIGHT, WIDTH)])
    row, column = np.mgrid[:HEIGHT, :WIDTH].reshape(2, -1)
    away = np.arange(1, POINTS + 1)[:, None] * [0.4, 1.0]  # of a head that looks to the lower right: (row, column)
    points = np.stack([row, column], -1)[:, None] + away + rng.normal(0, 1.0, (HEIGHT * WIDTH, POINTS, 2))
    points[TOP * WIDTH + LEFT, 0] = OUTLIER
    locations = (points[None, :, None, None, :, ::-1] + 0.5) / [WIDTH, HEIGHT]  # [1, q, 1, 1, p, 2]
    locations = order.to_blocks(jnp.asarray(locations, jnp.float32))
    weights = jnp.full(locations.shape[:-1], 1 / POINTS)
    x, y, weight = in_tiles(locations, weights, order.is_token, order)
    first, end = (np.asarray(z) for z in touched(x, y, order, POINTS, interpret=True))
    tile = TOP // UNIT * (WIDTH // (2 * UNIT)) + LEFT // (2 * UNIT)
    lanes = slice(tile * 128, tile * 128 + 128)
    x, y, weight = (np.asarray(z)[0, 0, :, lanes] for z in (x, y, weight))  # [p, 128]

    figure = plt.figure(figsize=(12.5, 4.6), layout="constrained")
    axes = figure.subplots(1, 3, width_ratios=[1.55, 0.8, 1.0])
    draw_map(axes[0], x, y, first[0, 0, tile], end[0, 0, tile])
    query = 2 * UNIT + 2  # row 2 and column 2 of the tile
    draw_hats(axes[1], x[:, query], y[:, query], TOP, LEFT)
    draw_matrix(axes[2], x, y, weight, TOP, LEFT)
    path = Path(__file__).with_name("kernels.png")
    figure.savefig(path, dpi=110)
    print(f"wrote {path}")


def draw_map(axis, x, y, first, end) -> None:
    """Units, the tile, its points, and which units are visited."""
    for band in range(HEIGHT // UNIT):
        for unit in range(first[band], end[band]):
            axis.add_patch(Rectangle((unit * UNIT - 0.5, band * UNIT - 0.5), UNIT, UNIT, color="#fdd49e", zorder=0))
    axis.add_patch(Rectangle((LEFT - 0.5, TOP - 0.5), 2 * UNIT, UNIT, fill=False, edgecolor="#08519c", linewidth=2))
    axis.plot(x.ravel(), y.ravel(), ".", color="black", markersize=2)
    axis.annotate(
        "one point far away\ncosts one unit more",
        OUTLIER[::-1],
        (46.5, 24),
        arrowprops={"arrowstyle": "->"},
        fontsize=9,
        ha="left",
    )
    axis.text(LEFT - 0.2, TOP - 1.2, "tile: 128 queries", color="#08519c", fontsize=9)
    axis.set_xticks(np.arange(0, WIDTH + 1, UNIT) - 0.5, [str(i) for i in range(0, WIDTH + 1, UNIT)])
    axis.set_yticks(np.arange(0, HEIGHT + 1, UNIT) - 0.5, [str(i) for i in range(0, HEIGHT + 1, UNIT)])
    axis.grid(color="#bbbbbb", linewidth=0.7)
    axis.set(xlim=(-0.5, WIDTH - 0.5), ylim=(HEIGHT - 0.5, -0.5), aspect="equal", xlabel="column", ylabel="row")
    visited = int((end - first).sum())
    axis.set_title(f"1  Units of 8 x 8 pixels: {visited} of {HEIGHT * WIDTH // UNIT**2} are visited", fontsize=10)


def hat(distance) -> np.ndarray:
    """max(0, 1 - |distance|)."""
    return np.maximum(1 - np.abs(distance), 0)


def draw_hats(axis, x, y, top, left) -> None:
    """The points of one query, and their weights on the pixels of a unit."""
    rows, columns = top + np.arange(UNIT), left + np.arange(UNIT)
    shares = sum(hat(y[p] - rows)[:, None] * hat(x[p] - columns) for p in range(POINTS)) / POINTS
    axis.imshow(shares, cmap="Oranges", extent=(left - 0.5, left + UNIT - 0.5, top + UNIT - 0.5, top - 0.5))
    axis.plot(x, y, "o", color="black", markersize=4)
    axis.set(xlim=(left - 0.5, left + UNIT - 0.5), ylim=(top + UNIT - 0.5, top - 0.5), xlabel="column", ylabel="row")
    axis.set_title("2  One query's points in one unit:\nsum of hat(x - column) hat(y - row)", fontsize=10)


def draw_matrix(axis, x, y, weight, top, left) -> None:
    """W of two units side by side, for all queries of the tile."""
    row, column = (z.reshape(UNIT, 2, UNIT).swapaxes(0, 1).ravel() for z in np.mgrid[:UNIT, : 2 * UNIT])
    matrix = sum(
        weight[p] * hat(x[p] - (left + column)[:, None]) * hat(y[p] - (top + row)[:, None]) for p in range(POINTS)
    )
    axis.imshow(matrix, cmap="Oranges", interpolation="nearest")
    axis.axhline(63.5, color="#888888", linewidth=0.7)
    axis.set(xlabel="128 queries of the tile", ylabel="128 pixels of two units")
    axis.set_title("3  W: every query's weights on two units;\nthe matrix unit does output += values x W", fontsize=10)


if __name__ == "__main__":
    main()
