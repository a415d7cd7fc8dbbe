"""The figures and tables of `docs/convergence.md`, from the stored results.

python benchmarks/convergence.py --figures
"""

import itertools
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from convergence_cells import RATES, choose_rate
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

Result = dict[str, Any]
NAMES = {
    "detr": "DETR",
    "detr_dc5": "DETR-DC5",
    "single_scale": "Deformable, single-scale",
    "single_scale_dc5": "Deformable, single-scale DC5",
    "multi_scale": "Deformable, multi-scale",
    "refine": "+ refinement",
    "two_stage": "++ two-stage",
    "levels3": "3 levels, 4 points",
    "points1": "4 levels, 1 point",
    "single_scale_points1": "1 level, 1 point",
    "demo": "the demo's config",
    "dcn": "with deformable convolutions in C3 to C5",
    "bfloat16": "in bfloat16",
    "dino": "DINO in its place",
}
SCORES = {"AP": "AP", "AP50": "AP50", "APs": "AP small", "APm": "AP medium", "APl": "AP large"}
BEGIN, END = "<!-- results: written by --figures -->", "<!-- end of results -->"


def draw(results: Path, page: Path, cells: Sequence[Any]) -> None:
    """Draws what the stored results allow into `results`, and writes the tables into `page` between its two marks.

    Args:
        results: folder of the JSON files.
        page: the document.
        cells: all of the study's, to say what was not run.
    """
    sections = []
    for data in dict.fromkeys(cell.data for cell in cells):
        found = load(results, data)
        if not found:
            sections.append(f"### {data}\n\nNot run.")
            continue
        figures = [
            (f"{data}_ap.png", "AP against epochs, compute and time", draw_ap(found, "main")),
            (f"{data}_sizes.png", "AP50 and AP by size of the objects, against epochs", draw_sizes(found)),
            (f"{data}_entropy.png", "Entropy of the attention, against epochs", draw_entropy(found)),
            (f"{data}_demo.png", "The demo's config and one change: AP", draw_ap(found, "demo")),
        ]
        lines = [f"### {data}", "", hardware(found), ""]
        for name, title, figure in figures:
            if figure is not None:
                figure.savefig(results / name)
                lines += [f"![{title}]({results.name}/{name})", ""]
        tables = (rate_table, cost_table, main_table, until_table, ablation_table, entropy_table, demo_table)
        lines += itertools.chain.from_iterable([*table(found), ""] for table in tables)
        lines += [finished(found, [cell for cell in cells if cell.data == data])]
        sections.append("\n".join(lines))
    text = "\n\n".join(sections)
    before, rest = page.read_text().split(BEGIN)
    page.write_text(f"{before}{BEGIN}\n\n{text}\n\n{END}{rest.split(END)[1]}")
    print(text)


def load(results: Path, data: str) -> list[Result]:
    """The stored results of a data set."""
    stored = [json.loads(path.read_text()) for path in sorted(results.glob("*.json"))]
    return [result for result in stored if result["data"] == data]


def finished(found: Sequence[Result], cells: Sequence[Any]) -> str:
    """How many cells of each part have a result."""
    names = {result["cell"] for result in found}
    parts = {part: [c.name in names for c in cells if c.part == part] for part in dict.fromkeys(c.part for c in cells)}
    counts = ", ".join(f"`{part}` {sum(done)} of {len(done)}" for part, done in parts.items())
    return f"Finished cells: {counts}. The others were not run; `--list` names them."


def by_model(found: Iterable[Result], part: str) -> dict[str, list[Result]]:
    """Trained cells of a part of the study, by model in the order of `NAMES`, each by seed."""
    chosen = [result for result in found if result["part"] == part and result["curve"]]
    groups = {name: sorted((r for r in chosen if r["model"] == name), key=lambda r: r["seed"]) for name in NAMES}
    return {name: runs for name, runs in groups.items() if runs}


def epochs_until(curve: Sequence[Mapping[str, Any]], target: float) -> float | None:
    """The first evaluation whose AP is at least `target`, in epochs; `None` if there is none."""
    return next((point["epoch"] for point in curve if point["AP"] >= target), None)


def best(curve: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """The evaluation with the highest AP, the first of equal ones."""
    return max(curve, key=lambda point: point["AP"])


def spread(values: Sequence[float], form: str = ".3f") -> str:
    """`mean (lowest to highest)`, or the value where there is one."""
    if not values or min(values) < 0:
        return "-"
    mean = f"{np.mean(values):{form}}"
    return mean if len(values) == 1 else f"{mean} ({min(values):{form}} to {max(values):{form}})"


def at_the_end(runs: Sequence[Result]) -> list[str]:
    """The `SCORES` of their last evaluations, over seeds."""
    return [spread([run["curve"][-1][score] for run in runs]) for score in SCORES]


def table(title: str, head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """A Markdown table."""
    lines = [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)]
    return [title, "", *lines]


def hardware(found: Sequence[Result]) -> str:
    """What the cells ran on, and for how long."""
    trained = [result for result in found if "cpu_seconds" in result]
    hours = sum(result["cpu_seconds"] for result in trained) / 3600
    where = ", ".join(sorted({result["hardware"] for result in found}))
    versions = ", ".join(sorted({result["jax"] for result in found}))
    return f"{len(trained)} trainings, {hours:.1f} hours of processor time in all, on {where}; jax {versions}."


def rate_table(found: Sequence[Result]) -> list[str]:
    """Learning rates tried, and, of a model with all its tries, the one that its other trainings take."""
    rows = []
    for model in NAMES:
        runs = [run for run in found if run["part"] == "try" and run["model"] == model]
        if not runs:
            continue
        curves = {run["lr"]: run["curve"] for run in runs}
        ends = {
            r: f"{curve[-1]['AP']:.3f}, {curve[-1]['loss']:.2f}" if curve else "diverged" for r, curve in curves.items()
        }
        taken = f"{choose_rate(runs):g}" if set(RATES) <= set(curves) and any(curves.values()) else "-"
        rows.append([NAMES[model], *(ends.get(rate, "-") for rate in RATES), taken])
    title = "Learning rates tried: AP on the held-out training images, loss of the last epoch."
    return table(title, ["", *(f"{rate:g}" for rate in RATES), "taken"], rows)


def main_table(found: Sequence[Result]) -> list[str]:
    """What each model reached."""
    rows = []
    for part, note in (("main", ""), ("long", ", long run")):
        for model, runs in by_model(found, part).items():
            numbers = at_the_end(runs)
            rows.append([NAMES[model] + note, str(runs[0]["epochs"]), str(len(runs)), *numbers])
    if not rows:
        return ["Main curve: not run."]
    head = ["", "epochs", "seeds", *SCORES.values()]
    return table("At the end of the training, mean (lowest to highest) over seeds.", head, rows)


def cost_table(found: Sequence[Result]) -> list[str]:
    """What a training step costs."""
    costs = {result["model"]: result for result in found if result["part"] == "cost"}
    rows = [
        [NAMES[model], f"{c['parameters']:,}", f"{c['gflops_per_step']:.1f}", f"{c['seconds_per_step']:.2f}"]
        for model in NAMES
        if (c := costs.get(model))
    ]
    if not rows:
        return ["Cost of a step: not counted."]
    clock = " and ".join(sorted({result["clock"] for result in costs.values()}))
    head = ["", "parameters", "GFLOPs", f"seconds ({clock})"]
    return table("A training step: GFLOPs as XLA counts them, and time.", head, rows)


def until_table(found: Sequence[Result]) -> list[str]:
    """Epochs until DETR's best AP."""
    main = by_model(found, "main")
    lines = []
    for part, name in (("main", "DETR's best AP"), ("long", "the best AP of DETR's long run")):
        references = {run["seed"]: best(run["curve"]) for run in by_model(found, part).get("detr", [])}
        rows = []
        for model, runs in main.items():
            pairs = [
                (epochs_until(r["curve"], references[r["seed"]]["AP"]), r) for r in runs if r["seed"] in references
            ]
            if not pairs:
                continue
            reached = [(epochs, references[run["seed"]]["epoch"] / epochs) for epochs, run in pairs if epochs]
            each = ", ".join("not reached" if epochs is None else f"{epochs:g}" for epochs, _ in pairs)
            fewer = spread([ratio for _, ratio in reached], ".1f") if len(reached) == len(pairs) else "-"
            rows.append([NAMES[model], each, fewer])
        if rows:
            shown = "; ".join(f"seed {s}: {p['AP']:.3f} at epoch {p['epoch']:g}" for s, p in references.items())
            title = f"Epochs until {name} ({shown}), for each seed, and how many times fewer that is."
            lines += [*table(title, ["", "epochs", "times fewer"], rows), ""]
    return lines[:-1] or ["Epochs until DETR's best AP: not run."]


def ablation_table(found: Sequence[Result]) -> list[str]:
    """Levels and points."""
    order = {"single_scale_points1": "", "single_scale": "1 level, 4 points", "points1": "", "levels3": ""}
    order |= {"multi_scale": "4 levels, 4 points"}
    groups = by_model(found, "ablation") | by_model(found, "main")
    rows = []
    for model, name in order.items():
        if model in groups:
            numbers = at_the_end(groups[model])
            rows.append([name or NAMES[model], str(len(groups[model])), *numbers])
    if not by_model(found, "ablation"):
        return ["Ablations: not run."]
    return table("Levels and sampling points (the paper's Table 2).", ["", "seeds", *SCORES.values()], rows)


def demo_table(found: Sequence[Result]) -> list[str]:
    """The demo's config, and with one change."""
    groups = by_model(found, "demo")
    rows = [[NAMES[model], str(len(runs)), *at_the_end(runs)] for model, runs in groups.items()]
    if not rows:
        return ["The demo's config and one change: not run."]
    title = "The demo's config and one change, at the end of its training, mean (lowest to highest) over seeds."
    return table(title, ["", "seeds", *SCORES.values()], rows)


def entropy_table(found: Sequence[Result]) -> list[str]:
    """Attention entropy at the start and at the end."""
    rows = []
    for model, runs in by_model(found, "main").items():
        series = next((run["entropy"] for run in runs if "entropy" in run), None)
        if series:
            for part in ("encoder", "decoder"):
                first, last = series[0][part], series[-1][part]
                most = math.log(first["keys"])
                values = [f"{x['entropy']:.2f} ({x['entropy'] / most:.0%})" for x in (first, last)]
                rows.append([f"{NAMES[model]}, {part}", str(first["keys"]), f"{most:.2f}", *values])
    if not rows:
        return ["Attention entropy: not run."]
    return table("Attention entropy in nats.", ["", "N_k", "log N_k", "at the start", "at the end"], rows)


def new_figure(columns: int) -> tuple[Figure, list[Any]]:
    """An empty figure of some panels in a row."""
    figure = Figure(figsize=(4.6 * columns, 3.6), layout="constrained", dpi=110)
    FigureCanvasAgg(figure)
    panels = [figure.add_subplot(1, columns, number + 1) for number in range(columns)]
    for axes in panels:
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    return figure, panels


def plot(axes: Any, runs: Sequence[Result], score: str, factor: float | None, model: str) -> None:
    """Mean over seeds as a line, lowest to highest as a band, against the epoch or `factor` x step."""
    points = [(p["epoch"] if factor is None else factor * p["step"]) for p in runs[0]["curve"]]
    values = np.array([[p[score] for p in run["curve"]] for run in runs])
    color = f"C{list(NAMES).index(model)}"
    axes.plot(points, values.mean(0), label=NAMES[model], color=color, linewidth=1.5, marker=".", markersize=4)
    axes.fill_between(points, values.min(0), values.max(0), color=color, alpha=0.18, linewidth=0)


def draw_ap(found: Sequence[Result], part: str) -> Figure | None:
    """AP against epochs, compute and time."""
    groups = by_model(found, part)
    if not groups:
        return None
    costs = {result["model"]: result for result in found if result["part"] == "cost" and result["model"] in groups}
    figure, panels = new_figure(3 if costs else 1)
    clock = next((result["clock"] for result in costs.values()), "")
    units = (("epoch", None, 1), ("TFLOPs", "gflops_per_step", 1e-3), (f"minutes, {clock}", "seconds_per_step", 1 / 60))
    for axes, (label, key, unit) in zip(panels, units, strict=False):
        for model, runs in groups.items():
            if key is None or model in costs:
                plot(axes, runs, "AP", None if key is None else costs[model][key] * unit, model)
        axes.set_xlabel(label)
        axes.set_ylabel("AP")
        axes.set_ylim(bottom=0)
    panels[0].legend(fontsize=7, frameon=False)
    return figure


def draw_sizes(found: Sequence[Result]) -> Figure | None:
    """AP50 and AP by size, against epochs."""
    groups = by_model(found, "main")
    shown = [s for s in list(SCORES)[1:] if any(r["curve"][-1][s] >= 0 for runs in groups.values() for r in runs)]
    if not shown:
        return None
    figure, panels = new_figure(len(shown))
    for axes, score in zip(panels, shown, strict=True):
        for model, runs in groups.items():
            plot(axes, runs, score, None, model)
        axes.set_title(SCORES[score], fontsize=10)
        axes.set_xlabel("epoch")
        axes.set_ylim(bottom=0)
    panels[0].legend(fontsize=7, frameon=False)
    return figure


def draw_entropy(found: Sequence[Result]) -> Figure | None:
    """Entropy of the attention relative to log N_k."""
    series = {r["model"]: r["entropy"] for runs in by_model(found, "main").values() for r in runs if "entropy" in r}
    if not series:
        return None
    figure, panels = new_figure(2)
    for axes, part in zip(panels, ("encoder", "decoder"), strict=True):
        for model, points in series.items():
            share = [p[part]["entropy"] / math.log(p[part]["keys"]) for p in points]
            color = f"C{list(NAMES).index(model)}"
            label = f"{NAMES[model]}, N_k = {points[0][part]['keys']}"
            axes.plot([p["epoch"] for p in points], share, color=color, label=label, linewidth=1.5, marker=".")
        axes.set_title(part, fontsize=10)
        axes.set_xlabel("epoch")
        axes.set_ylabel("entropy / log N_k")
        axes.legend(fontsize=7, frameon=False)
    return figure
