"""`benchmarks/convergence.py`, its figures and `benchmarks/deep_pcb.py`: everything but the trainings themselves."""

import dataclasses
import importlib
import json
import math
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from detr_jax.cli import load_config
from detr_jax.config import DINOConfig, LossConfig

ROOT = Path(__file__).parents[2]
BCCD = ROOT / "tests/data/bccd"


@pytest.fixture(scope="module", autouse=True)
def scripts():
    """The scripts import each other by name, as they find each other when they are run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "benchmarks")
        yield


@pytest.fixture(scope="module")
def study(scripts):
    return importlib.import_module("convergence_cells")


@pytest.fixture(scope="module")
def runner(scripts):
    return importlib.import_module("convergence")


@pytest.fixture(scope="module")
def figures(scripts):
    return importlib.import_module("convergence_figures")


@pytest.fixture(scope="module")
def deep_pcb(scripts):
    return importlib.import_module("deep_pcb")


def result(study, cell, aps, *, loss=1.0, lr=3e-4, **more):
    """What a cell of one evaluation per epoch stores."""
    curve = [
        {"epoch": float(i), "step": 10 * i, "AP": ap, "AP50": 2 * ap, "APs": -1.0, "APm": ap, "APl": ap, "loss": loss}
        for i, ap in enumerate(aps, 1)
    ]
    about = {"cell": cell.name, **dataclasses.asdict(cell), "lr": lr, "hardware": "a machine", "jax": "0"}
    return about | {"epochs": len(aps), "cpu_seconds": 36.0, "curve": curve, **more}


def test_cells(study):
    cells = study.all_cells(["bccd", "deep_pcb"])
    names = [cell.name for cell in cells]
    assert len(set(names)) == len(names)
    for model in (*study.FIRST, *study.THEN):
        assert sum(c.model == model and c.part == "try" and c.data == "bccd" for c in cells) == len(study.RATES)
        assert [c.seed for c in cells if (c.model, c.part, c.data) == (model, "main", "bccd")] == [0, 1, 2]
        place = names.index(f"bccd/main/{model}/seed0")
        assert all(names.index(f"bccd/try/{model}/lr{rate:g}") < place for rate in study.RATES)


def test_models_differ_in_what_is_compared_alone(study, tmp_path):
    roots = {"bccd": BCCD}
    configs = {
        model: study.cell_config(study.Cell("bccd", "main", model), 3e-4, roots, tmp_path)
        for model in (*study.FIRST, *study.THEN, *study.ABLATIONS)
    }
    reference = configs["detr"]
    for name, config in configs.items():
        assert config.loss == (LossConfig.detr() if name.startswith("detr") else LossConfig())
        assert (config.data, config.optim) == (reference.data, reference.optim)
        assert dataclasses.replace(config.train, output_dir="") == dataclasses.replace(reference.train, output_dir="")
        for field in ("hidden_dim", "num_heads", "encoder_layers", "decoder_layers", "ffn_dim", "num_queries"):
            assert getattr(config.model, field) == getattr(reference.model, field), (name, field)
        assert dataclasses.replace(config.model.backbone, dilation=False) == reference.model.backbone
        assert config.model.backbone.dilation == (name in ("detr_dc5", "single_scale_dc5"))
    sizes = {name: (c.model.num_levels, c.model.decoder_points) for name, c in configs.items() if "detr" not in name}
    assert sizes["single_scale_dc5"] == sizes["single_scale"] == (1, 4) and sizes["single_scale_points1"] == (1, 1)
    assert sizes["multi_scale"] == sizes["two_stage"] == (4, 4) and sizes["levels3"] == (3, 4)


def test_the_demo_cells_are_the_demo_with_one_change(study, tmp_path):
    demo = load_config(str(ROOT / "configs/bccd.py"))
    cells = [cell for cell in study.all_cells(["bccd"]) if cell.part == "demo"]
    assert [(c.model, c.seed) for c in cells] == [(m, s) for s in (0, 1, 2) for m in study.DEMO["bccd"]]
    for cell in cells:
        config = study.cell_config(cell, cell.rate, {"bccd": BCCD}, tmp_path)
        ours = dataclasses.replace(config.train, output_dir=demo.train.output_dir, keep_last=2, num_pictures=4)
        assert ours == dataclasses.replace(demo.train, seed=cell.seed)
        assert dataclasses.replace(config.data, root=demo.data.root) == demo.data and config.optim == demo.optim
        assert cell.rate == demo.optim.lr
        same = dict(vars(config.model))
        if cell.model == "dino":
            assert (type(config.model), config.loss) == (DINOConfig, LossConfig.dino())
            same = {name: same[name] for name in vars(demo.model)}
        else:
            assert config.loss == demo.loss
        changed = {"dcn": "backbone", "bfloat16": "dtype"}.get(cell.model)
        assert [name for name, value in vars(demo.model).items() if same[name] != value] == [changed] * bool(changed)


def test_the_demo_on_deep_pcb(study, tmp_path):
    """Four epochs, each evaluated; two-stage against DINO alone."""
    cells = [cell for cell in study.all_cells(["deep_pcb"]) if cell.part == "demo"]
    assert [(c.model, c.seed) for c in cells] == [(m, s) for s in (0, 1, 2) for m in ("demo", "dino")]
    two_stage, dino = (study.cell_config(cell, cell.rate, {"deep_pcb": BCCD}, tmp_path) for cell in cells[:2])
    assert (two_stage.train.epochs, two_stage.train.eval_every) == (4, 1)
    assert type(dino.model) is DINOConfig and dino.data == two_stage.data and dino.optim == two_stage.optim


def test_tries_never_see_the_validation_images(study, tmp_path):
    config = study.cell_config(study.Cell("bccd", "try", "detr", rate=1e-3), 1e-3, {"bccd": BCCD}, tmp_path)
    train, held = (
        json.loads(Path(p).read_text()) for p in (config.data.train_annotations, config.data.val_annotations)
    )
    ids = [{image["id"] for image in part["images"]} for part in (train, held)]
    everything = json.loads((BCCD / "annotations/instances_train.json").read_text())
    assert not ids[0] & ids[1] and ids[0] | ids[1] == {image["id"] for image in everything["images"]}
    assert (len(ids[0]), len(ids[1])) == (154, 51)
    assert len(train["annotations"]) + len(held["annotations"]) == len(everything["annotations"])
    assert {box["image_id"] for box in held["annotations"]} <= ids[1]


def test_choice_of_the_rate(study):
    def tries(*ends):
        cells = [study.Cell("bccd", "try", "detr", rate=rate) for rate in study.RATES]
        return [result(study, c, ap, loss=loss, lr=c.rate) for c, (ap, loss) in zip(cells, ends, strict=True)]

    assert study.choose_rate(tries(([0.3, 0.1], 1), ([0.0, 0.2], 9), ([0.1], 2))) == study.RATES[1]
    assert study.choose_rate(tries(([0.019], 3), ([0.0], 2), ([0.001], 5))) == study.RATES[1], "by the loss"
    assert study.choose_rate(tries(([0.1], 3), ([], 0), ([0.2], 5))) == study.RATES[2], "one diverged"
    with pytest.raises(ValueError, match="all tries of detr diverged"):
        study.choose_rate(tries(([], 1), ([], 1), ([], 1)))


def test_curve(study):
    scores = {f"val/{name}": 0.25 for name in study.SCORES}
    records = [
        {"epoch": 0.5, "step": 5, "hours": 0.1, "train/loss": 4.0},
        {"epoch": 1.0, "step": 10, "hours": 0.2, "train/loss": 3.0},
        {"epoch": 1.5, "step": 15, "hours": 0.3, "train/loss": 2.0},
        {"epoch": 2.0, "step": 20, "hours": 0.4, "train/loss": 1.0},
        {"epoch": 2.0, "step": 20, "hours": 0.5, **scores},
    ]
    (point,) = study.curve(records)
    assert point == {"epoch": 2.0, "step": 20, "hours": 0.5, "loss": 1.5} | dict.fromkeys(study.SCORES, 0.25)


def test_runs_each_cell_once_after_its_tries(study, runner, tmp_path, monkeypatch):
    cells = study.all_cells(["bccd"])
    main = study.Cell("bccd", "main", "two_stage")
    chosen = [main, *(c for c in cells if c.part == "try" and c.model == "two_stage")]
    ran = []

    def run_cell(cell, rate, roots, work):
        ran.append((cell.name, rate))
        return result(study, cell, [0.3 if rate == 1e-3 else 0.1], lr=rate)

    monkeypatch.setattr(runner, "run_cell", run_cell)
    with runner.claimed(chosen[1], tmp_path / "work") as mine:
        assert mine
        with runner.claimed(chosen[1], tmp_path / "work") as again:
            assert not again, "another process has it"
    runner.run_all(chosen, {}, tmp_path / "results", tmp_path / "work")
    assert [name for name, _ in ran[:3]] == [c.name for c in chosen[1:]] and ran[3:] == [(main.name, 1e-3)]
    runner.run_all(chosen, {}, tmp_path / "results", tmp_path / "work")
    assert len(ran) == 4, "what is finished is not run again"
    assert json.loads((tmp_path / "results/bccd-main-two_stage-seed0.json").read_text())["lr"] == 1e-3


def test_attention_entropy(study):
    uniform = np.full((2, 5, 4, 3, 2), 1 / 6)  # [b, q, h, l, p]
    certain = np.zeros((2, 4, 5, 7))  # [b, h, q, s]
    certain[..., 3] = 1
    deformable = {"attention_weights": (uniform,), "sampling_locations": (None,)}
    captured = {"encoder": {0: {"self_attn": deformable}}, "decoder": {0: {"cross_attn": deformable}}}
    for entropy, keys in study.attention_entropy(captured).values():
        assert keys == 6 and float(entropy) == pytest.approx(math.log(6), abs=1e-6)
    layers = {0: {"cross_attn": {"attention_weights": (certain,)}}}
    layers[1] = {"cross_attn": {"attention_weights": (np.full((2, 4, 5, 7), 1 / 7),)}}
    entropy, keys = study.attention_entropy(captured | {"decoder": layers})["decoder"]
    assert keys == 7 and float(entropy) == pytest.approx(math.log(7) / 2, abs=1e-6)


def test_figures_and_tables(study, figures, tmp_path, capsys):
    results, page = tmp_path / "convergence", tmp_path / "convergence.md"
    results.mkdir()
    page.write_text(f"before\n{figures.BEGIN}\nold\n{figures.END}\nafter\n")
    cost = {"gflops_per_step": 2.5, "seconds_per_step": 0.12, "parameters": 1000, "clock": "processor"}
    entropy = [
        {"epoch": e, **{part: {"entropy": v, "keys": 20} for part in ("encoder", "decoder")}}
        for e, v in ((0, 3), (4, 1))
    ]
    stored = [
        result(study, study.Cell("bccd", "main", "detr"), [0.05, 0.1, 0.2, 0.2], entropy=entropy),
        result(study, study.Cell("bccd", "main", "detr", 1), [0.05, 0.1, 0.15, 0.3]),
        result(study, study.Cell("bccd", "main", "multi_scale"), [0.2, 0.3, 0.4, 0.5]),
        result(study, study.Cell("bccd", "main", "multi_scale", 1), [0.1, 0.3, 0.4, 0.5]),
        result(study, study.Cell("bccd", "main", "single_scale"), [0.1, 0.1, 0.1, 0.1]),
        result(study, study.Cell("bccd", "try", "detr", rate=1e-4), [0.01], lr=1e-4, loss=3),
        result(study, study.Cell("bccd", "try", "two_stage", rate=1e-4), [0.1], lr=1e-4, loss=2),
        result(study, study.Cell("bccd", "try", "two_stage", rate=3e-4), [0.3], lr=3e-4, loss=2),
        result(study, study.Cell("bccd", "try", "two_stage", rate=1e-3), [], lr=1e-3),
        result(study, study.Cell("bccd", "cost", "detr"), [], **cost),
        result(study, study.Cell("bccd", "demo", "demo"), [0.1, 0.3]),
        result(study, study.Cell("bccd", "demo", "demo", 1), [0.2, 0.5]),
        result(study, study.Cell("bccd", "demo", "dcn"), [0.2, 0.45]),
    ]
    for one in stored:
        (results / f"{one['cell'].replace('/', '-')}.json").write_text(json.dumps(one))
    figures.draw(results, page, study.all_cells(["bccd", "deep_pcb"]))
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
    rows = {line.split(" | ")[0].strip("| "): line for line in text[text.index("Epochs until DETR") :].splitlines()}
    assert rows["Deformable, multi-scale"] == "| Deformable, multi-scale | 1, 2 | 2.5 (2.0 to 3.0) |"
    assert rows["Deformable, single-scale"] == "| Deformable, single-scale | not reached | - |"
    assert "seed 0: 0.200 at epoch 3; seed 1: 0.300 at epoch 4" in text
    assert "| DETR | 4 | 2 | 0.250 (0.200 to 0.300) | 0.500 (0.400 to 0.600) | - |" in text
    assert "| DETR | 1,000 | 2.5 | 0.12 |" in text
    assert "| DETR | 0.010, 3.00 | - | - | - |" in text, "a rate is chosen among all tries"
    assert "| ++ two-stage | 0.100, 2.00 | 0.300, 2.00 | diverged | 0.0003 |" in text
    assert "| the demo's config | 2 | 0.400 (0.300 to 0.500) | 0.800 (0.600 to 1.000) | - |" in text
    assert "| with deformable convolutions in C3 to C5 | 1 | 0.450 | 0.900 | - |" in text
    assert "| DETR, encoder | 20 | 3.00 | 3.00 (100%) | 1.00 (33%) |" in text
    assert "Ablations: not run." in text and "`main` 5 of 21" in text and "### deep_pcb\n\nNot run." in text
    assert all((results / f"bccd_{name}.png").stat().st_size > 5000 for name in ("ap", "sizes", "entropy", "demo"))
    assert len(figures.draw_ap(stored, "main").axes) == 3
    assert len(figures.draw_ap(stored, "demo").axes) == 1, "no step of these models was counted"
    assert "deep_pcb" in capsys.readouterr().out


def checkout(folder: Path, boxes: str = "10,20,40,60,3\n0 1 2 3 6\n") -> Path:
    """A checkout of DeepPCB with one image per split."""
    root = folder / "PCBData"
    for group, name, listed in (("group00041", "00041000", "trainval.txt"), ("group20085", "20085291", "test.txt")):
        number = group.removeprefix("group")
        (root / group / number).mkdir(parents=True)
        (root / group / f"{number}_not").mkdir()
        Image.new("L", (64, 48)).save(root / group / number / f"{name}_test.jpg")
        (root / group / f"{number}_not" / f"{name}.txt").write_text(boxes)
        (root / listed).write_text(f"{group}/{number}/{name}.jpg {group}/{number}_not/{name}.txt\n")
    return folder


def test_deep_pcb(deep_pcb, tmp_path):
    deep_pcb.convert(checkout(tmp_path / "DeepPCB"), tmp_path / "coco")
    for split, image_id in (("train", 41000), ("val", 20085291)):
        content = json.loads((tmp_path / f"coco/annotations/instances_{split}.json").read_text())
        name = f"{image_id:08}_test.jpg"
        assert content["images"] == [{"id": image_id, "file_name": name, "width": 64, "height": 48}]
        assert (tmp_path / "coco/images" / name).is_file()
        assert [(a["id"], a["image_id"], a["category_id"], a["bbox"], a["area"]) for a in content["annotations"]] == [
            (1, image_id, 3, [10, 20, 30, 40], 1200),
            (2, image_id, 6, [0, 1, 2, 2], 4),
        ]
        assert [c["id"] for c in content["categories"]] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize(
    ("boxes", "message"),
    [("1 2 3 4\n", "line 1: got '1 2 3 4', expected x1 y1 x2 y2 type"), ("1 2 3 4 7\n", "type 7, expected 1 to 6")],
)
def test_deep_pcb_with_wrong_boxes(deep_pcb, tmp_path, boxes, message):
    with pytest.raises(ValueError, match=message):
        deep_pcb.convert(checkout(tmp_path / "DeepPCB", boxes), tmp_path / "coco")


def test_deep_pcb_that_is_not_there(deep_pcb, tmp_path):
    with pytest.raises(FileNotFoundError, match="no folder PCBData in it"):
        deep_pcb.convert(tmp_path, tmp_path / "coco")
