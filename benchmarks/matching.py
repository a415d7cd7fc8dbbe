"""Times the assignment of one training step: by default 8 images x 6 layers, 300 queries, 10 of 100 targets real.

Three ways, in one run: `detr_jax.matching.assign`; SciPy through a callback to the host; and the textbook way, a
vectorized Hungarian algorithm (optax's) under `vmap`, its padded rows filled with a constant cost. All must find the
same total cost. The encoder of a two-stage model: `--problems 8 --queries 22000 --skip-textbook`.
"""

import argparse
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax

from detr_jax.matching import assign, assign_on_host


def textbook(cost: jax.Array, num_rows: jax.Array) -> jax.Array:
    real = jnp.arange(cost.shape[1]) < num_rows[:, None]
    padded = jnp.where(real[..., None], cost, 0.0)
    rows, columns = jax.vmap(optax.assignment.hungarian_algorithm)(padded)
    assignment = jax.vmap(lambda r, c: jnp.zeros(cost.shape[1], jnp.int32).at[r].set(c))(rows, columns)
    return jnp.where(real, assignment, -1)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--problems", type=int, default=48, help="images x decoder layers (default %(default)s)")
    parser.add_argument("--queries", type=int, default=300, help="columns (default %(default)s)")
    parser.add_argument("--targets", type=int, default=100, help="rows, padding included (default %(default)s)")
    parser.add_argument("--real", type=int, default=10, help="real rows of each problem (default %(default)s)")
    parser.add_argument("--repeats", type=int, default=7, help="runs of each; the median counts (default %(default)s)")
    parser.add_argument("--skip-textbook", action="store_true", help="leave out the slow one")
    args = parser.parse_args()

    rng = np.random.default_rng(0)
    cost = jnp.asarray(rng.normal(size=(args.problems, args.targets, args.queries)), jnp.float32)
    num_rows = jnp.full(args.problems, args.real, jnp.int32)
    print(f"{args.problems} problems, {args.targets} x {args.queries}, {args.real} real rows, {jax.devices()[0]}")

    candidates = {"detr_jax": assign, "scipy callback": assign_on_host}
    if not args.skip_textbook:
        candidates["textbook, padded"] = textbook
    compiled = {name: jax.jit(function).lower(cost, num_rows).compile() for name, function in candidates.items()}
    totals, seconds = {}, {name: [] for name in compiled}
    for _ in range(args.repeats):  # in turn, so that a busy machine slows all of them
        for name, function in compiled.items():
            start = time.perf_counter()
            columns = jax.block_until_ready(function(cost, num_rows))
            seconds[name].append(time.perf_counter() - start)
            matched = np.take_along_axis(np.asarray(cost), np.maximum(columns, 0)[..., None], axis=-1)[..., 0]
            totals[name] = np.sum(np.where(np.asarray(columns) >= 0, matched, 0), dtype=np.float64)
    ours = np.median(seconds["detr_jax"])
    for name, runs in seconds.items():
        median = np.median(runs)
        print(f"{name:18} {1e3 * median:10.2f} ms {median / ours:8.1f} x   total cost {totals[name]:.4f}")


if __name__ == "__main__":
    main()
