"""Changes to the code that a test must notice: `python tests/mutants.py` applies each to a copy and runs those tests.

A mutant is one textual edit of one file. It is red when its tests fail, which is what it should be; a green one shows
that something may break without anybody noticing. First the tests run once on the copy as it is, where all must pass.
`python tests/mutants.py dropout best` runs those whose names contain one of the words; `--list` names them all.

Whoever makes the tests cheaper, or moves them, runs this afterwards: nothing that held something may go.
"""

import dataclasses
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
COPIED = ("detr_jax", "pallas_kernels", "configs", "tests", "train.py", "eval.py", "pyproject.toml")

PUBLISHED = "tests/detr_jax/test_published.py"
STEP = "tests/detr_jax/test_train_step.py"
PROMISES = "tests/detr_jax/test_promises.py"
IMPORTS = "tests/test_imports.py"


@dataclasses.dataclass(frozen=True)
class Mutant:
    """`old`, which the file holds once, becomes `new`; `tests` (arguments of pytest) must fail."""

    name: str
    file: str
    old: str
    new: str
    tests: str


CONFIG, TRAIN_STEP = "detr_jax/config.py", "detr_jax/train_step.py"
DETECTOR, DEFORMABLE = "detr_jax/detector.py", "detr_jax/models/deformable_detr.py"
ONE_HUNDRED = "tests/detr_jax/test_published.py::test_a_hundred_detections_per_image"
DETACHED = "tests/detr_jax/models/test_detached.py"
ENCODER_LAYER = "detr_jax/models/encoder_layer.py"
IMPLEMENTATIONS = "tests/detr_jax/models/test_implementations.py"
QUERY_ORDER = "detr_jax/models/query_order.py"
QUERY_ORDER_TESTS = "tests/detr_jax/models/test_query_order.py"
PROJECTIONS = "pallas_kernels/ms_deform_attn/projections.py"
PROJECTIONS_KERNELS = "pallas_kernels/ms_deform_attn/projections_kernels.py"
PROJECTIONS_TESTS = "tests/pallas_kernels/ms_deform_attn/test_projections.py"

MUTANTS = [
    Mutant(
        "what is in a loop counts once",
        "pallas_kernels/compiled_program.py",
        "runs * _trips(self.computations[condition])",
        "runs",
        "tests/pallas_kernels/test_compiled_program.py",
    ),
    # The order of a decoder's queries.
    Mutant(
        "query order: outputs are not put back",
        QUERY_ORDER,
        '"bpq,...bpc->...bqc", order',
        '"bpq,...bpc->...bqc", jnp.eye(order.shape[1])[None].repeat(len(order), 0)',
        QUERY_ORDER_TESTS,
    ),
    Mutant("query order: ties lose a query", QUERY_ORDER, " & (number < number[:, None])", "", QUERY_ORDER_TESTS),
    Mutant(
        "query order: along rows alone",
        "pallas_kernels/ms_deform_attn/order.py",
        "x >> bit & 1 | (y >> bit & 1) << 1",
        "x >> bit & 1",
        QUERY_ORDER_TESTS,
    ),
    Mutant(
        "query order: captured queries are moved",
        QUERY_ORDER,
        "memory.order is None or is_captured(model)",
        "memory.order is None",
        QUERY_ORDER_TESTS,
    ),
    Mutant(
        "query order: denoising queries see those that were there before",
        "detr_jax/models/dino.py",
        "arrange_visible(order, sees)",
        "sees",
        QUERY_ORDER_TESTS,
    ),
    Mutant(
        "query order: DINO's boxes stay",
        "detr_jax/models/dino.py",
        "x, reference = (arrange(order, z) for z in (x, reference))",
        "x = arrange(order, x)",
        QUERY_ORDER_TESTS,
    ),
    # The sampling's kernel.
    Mutant(
        "sampling's kernel: the wrong half of the units that are left",
        "pallas_kernels/ms_deform_attn/tensorcore_kernels.py",
        "visit(units[:half])",
        "visit(units[half:])",
        "tests/pallas_kernels/ms_deform_attn/test_tensorcore.py",
    ),
    Mutant(
        "sampling's kernel: nothing is left after the last whole iteration",
        "pallas_kernels/ms_deform_attn/tensorcore_walk.py",
        "(count > self.iterations * unroll).astype(jnp.int32)",
        "0",
        "tests/pallas_kernels/ms_deform_attn/test_tensorcore.py",
    ),
    # Position encodings.
    Mutant(
        "position: cosines are sines",
        "detr_jax/models/position.py",
        "(math.pi / 2 * odd)",
        "(0 * odd)",
        "tests/detr_jax/models/test_parity.py",
    ),
    # The feed-forward kernel.
    Mutant(
        "feed-forward kernel: tokens beyond the last count",
        "pallas_kernels/feed_forward/tensorcore.py",
        "    if tokens % x.shape[axis] == 0:",
        "    if True:",
        "tests/pallas_kernels/test_feed_forward.py -k initialized",
    ),
    Mutant(
        "feed-forward kernel: images share their dropout",
        "pallas_kernels/feed_forward/tensorcore.py",
        "images[pl.program_id(0)] * jnp.uint32(tokens) + ",
        "",
        "tests/pallas_kernels/test_feed_forward.py -k definition",
    ),
    Mutant(
        "feed-forward kernel: images of a mesh are counted anew on each device",
        "pallas_kernels/feed_forward/tensorcore.py",
        "dx, dsampled, norms, *linear = _call(",
        "images = images - images[0]\n    dx, dsampled, norms, *linear = _call(",
        "tests/pallas_kernels/test_feed_forward.py -k mesh",
    ),
    Mutant(
        "feed-forward kernel: ReLU's derivative is 1 at 0",
        "pallas_kernels/feed_forward/tensorcore.py",
        "dh = jnp.where(h != 0, ",
        "dh = jnp.where(h >= 0, ",
        "tests/pallas_kernels/test_feed_forward.py -k definition",
    ),
    Mutant(
        "feed-forward kernel: gradients of one tile only",
        "pallas_kernels/feed_forward/tensorcore.py",
        "@pl.when(pl.program_id(1) == 0)",
        "@pl.when(pl.program_id(1) >= 0)",
        "tests/pallas_kernels/test_feed_forward.py -k definition",
    ),
    # An encoder layer by kernels.
    Mutant(
        "adapters are left out by the encoder's kernels",
        ENCODER_LAYER,
        "plain = all(type(layer) is Linear for layer in layers)",
        "plain = True",
        f"{IMPLEMENTATIONS} -k by_kernels",
    ),
    Mutant(
        "the encoder's kernels capture nothing",
        ENCODER_LAYER,
        " and not is_captured(attention)",
        "",
        "tests/detr_jax/visualize/test_inspection.py -k blocks",
    ),
    Mutant(
        "the feed-forward kernel draws in another order",
        ENCODER_LAYER,
        "keys = jnp.stack([key for key in drawn",
        "keys = jnp.stack([key for key in drawn[::-1]",
        f"{IMPLEMENTATIONS} -k by_kernels",
    ),
    Mutant(
        "projections' kernel: gradients of one step only",
        PROJECTIONS_KERNELS,
        "@pl.when(pl.program_id(1) == 0)",
        "@pl.when(pl.program_id(1) >= 0)",
        f"{PROJECTIONS_TESTS} -k projections",
    ),
    Mutant(
        "projections' kernel: the residual's gradient is left out",
        PROJECTIONS_KERNELS,
        " + dresidual_ref[0].astype(jnp.float32)",
        "",
        f"{PROJECTIONS_TESTS} -k projections",
    ),
    Mutant(
        "projections' kernel: the padding of the order samples",
        PROJECTIONS,
        "    points = jnp.where(order.is_token[:, None, None], points, -jnp.inf)\n",
        "",
        f"{PROJECTIONS_TESTS} -k projections",
    ),
    Mutant(
        "projections' kernel: values of padding have gradients",
        PROJECTIONS_KERNELS,
        "    dvalue = jnp.where(valid_ref[0] > 0, dvalue, 0)\n",
        "",
        f"{PROJECTIONS_TESTS} -k projections",
    ),
    Mutant(
        "projections' kernel: softmax without its mean gradient",
        PROJECTIONS_KERNELS,
        "weight * (dweight - (weight * dweight).sum(0, keepdims=True))",
        "weight * dweight",
        f"{PROJECTIONS_TESTS} -k projections",
    ),
    Mutant(
        "relu without dropout is scaled as with it",
        "detr_jax/models/layers.py",
        "    scale = 1 if primals[1] is None else 1 - rate",
        "    scale = 1 - rate",
        "tests/detr_jax/models/test_models.py -k relu",
    ),
    # Imports.
    *(
        Mutant(
            f"detector imports {module} lazily",
            DETECTOR,
            "    def __len__(self) -> int:\n",
            f"    def _late(self):\n        from detr_jax import {module}\n\n        return {module}\n\n"
            "    def __len__(self) -> int:\n",
            f"{IMPORTS} -k detector",
        )
        for module in ("cli", "training")
    ),
    *(
        Mutant(
            f"models import {module}",
            "detr_jax/models/layers.py",
            "\nimport jax\n",
            f"\nimport jax\n\nimport detr_jax.{module}\n",
            f"{IMPORTS} -k layers.py",
        )
        for module in ("data", "losses")
    ),
    # Published hyper-parameters: the defaults, ...
    *(
        Mutant(f"{old} -> {new}", CONFIG, f"    {old}\n", f"    {new}\n", PUBLISHED)
        for old, new in (
            ("lr: float = 2e-4", "lr: float = 1e-4"),
            ("backbone_lr_factor: float = 0.1", "backbone_lr_factor: float = 1.0"),
            ("offsets_lr_factor: float = 0.1", "offsets_lr_factor: float = 1.0"),
            ("weight_decay: float = 1e-4", "weight_decay: float = 1e-2"),
            ("clip_norm: float = 0.1", "clip_norm: float = 1.0"),
            ("drop_at: float = 0.8", "drop_at: float = 0.9"),
            ("drop_factor: float = 0.1", "drop_factor: float = 0.5"),
            ("eval_scale: int = 800", "eval_scale: int = 640"),
            ("dropout: float = 0.1", "dropout: float = 0.0"),
            ("max_size: int = 1333", "max_size: int = 1024"),
            ("crop: bool = True", "crop: bool = False"),
            ("no_object_weight: float = 0.1", "no_object_weight: float = 1.0"),
            ("focal_alpha: float = 0.25", "focal_alpha: float = 0.5"),
            ("num_queries: int = 300", "num_queries: int = 100"),
        )
    ),
    Mutant("top-k 100 -> 300", "detr_jax/postprocess.py", "top_k: int = 100", "top_k: int = 300", ONE_HUNDRED),
    # ... and each config.
    *(
        Mutant(f"{name}: {old} -> {new}", f"configs/{name}.py", old, new, f"{PUBLISHED} -k {name}]")
        for name, batch, epochs in (
            ("detr_r50", 64, 500),
            ("detr_r50_dc5", 64, 500),
            ("detr_r101", 64, 500),
            ("detr_r101_dc5", 64, 500),
            ("deformable_detr_r50_single_scale", 32, 50),
            ("deformable_detr_r50_single_scale_dc5", 32, 50),
            ("deformable_detr_r50", 32, 50),
            ("deformable_detr_r50_refine", 32, 50),
            ("deformable_detr_r50_two_stage", 32, 50),
        )
        for old, new in (
            (f" batch_size={batch},", f" batch_size={batch // 2},"),
            (f"epochs={epochs}", f"epochs={epochs - 1}"),
        )
    ),
    Mutant(
        "DETRConfig.r101() builds ResNet-50",
        CONFIG,
        "return cls(backbone=BackboneConfig(depth=101))",
        "return cls(backbone=BackboneConfig(depth=50))",
        PUBLISHED,
    ),
    # Checkpoints, data, curves, sizes.
    *(
        Mutant(
            f"best answers the {what}",
            "detr_jax/checkpoints/store.py",
            "max(scores, key=lambda step: (scores[step], step), default=None)",
            new,
            "tests/detr_jax/checkpoints/test_store.py -k best",
        )
        for what, new in (
            ("newest", "max(available, default=None)"),
            ("oldest of ties", "max(scores, key=lambda step: (scores[step], -step), default=None)"),
        )
    ),
    Mutant(
        "data layouts in reverse",
        "detr_jax/data/splits.py",
        "    if given_annotations is not None:\n        layouts =",
        "    layouts = layouts[::-1]\n    if given_annotations is not None:\n        layouts =",
        "tests/detr_jax/data/test_splits.py",
    ),
    Mutant(
        "the curves' best is the minimum",
        "detr_jax/curves.py",
        "best = max((value",
        "best = min((value",
        "tests/detr_jax/test_curves.py",
    ),
    *(
        Mutant(
            f"zero {name} are accepted",
            CONFIG,
            f'        "{name}",\n',
            "",
            "tests/detr_jax/test_model_sizes.py",
        )
        for name in ("encoder_points", "decoder_points")
    ),
    Mutant(
        "zero points are accepted by the operation",
        "pallas_kernels/ms_deform_attn/api.py",
        "if attention_weights.shape[-1] == 0:",
        "if False:",
        "tests/pallas_kernels/ms_deform_attn/test_api.py -k errors",
    ),
    # The training step.
    Mutant(
        "EMA is off",
        TRAIN_STEP,
        'new["ema"] = optax.incremental_update(params, state["ema"], 1 - decay)',
        'new["ema"] = state["ema"]',
        f"{STEP} -k averag",
    ),
    Mutant(
        "EMA is not an average",
        TRAIN_STEP,
        'optax.incremental_update(params, state["ema"], 1 - decay)',
        "params",
        f"{STEP} -k averag",
    ),
    Mutant(
        "EMA is never read from a checkpoint",
        "detr_jax/checkpoints/load.py",
        'trained = "ema" if "ema" in saved["entries"] else "params"',
        'trained = "params"',
        f"{PROMISES} -k averaged",
    ),
    Mutant(
        "raw parameters are evaluated",
        "detr_jax/training.py",
        'params = state.get("ema", state["params"])\n                    scores, results',
        'params = state["params"]\n                    scores, results',
        f"{PROMISES} -k averaged",
    ),
    Mutant(
        "dropout's key is the same every step",
        TRAIN_STEP,
        'jax.random.fold_in(jax.random.key(config.train.seed), state["step"])',
        "jax.random.key(config.train.seed)",
        f"{STEP} -k dropout",
    ),
    Mutant(
        "gradients are not clipped",
        TRAIN_STEP,
        "        optax.clip_by_global_norm(config.clip_norm),\n",
        "",
        f"{STEP} -k clipped",
    ),
    Mutant(
        "no stop_gradient in refinement",
        DEFORMABLE,
        "reference = jax.lax.stop_gradient(boxes[-1])",
        "reference = boxes[-1]",
        DETACHED,
    ),
    Mutant(
        "no stop_gradient of proposals",
        DEFORMABLE,
        'jax.lax.stop_gradient(jnp.take_along_axis(enc_outputs["pred_boxes"], top[..., None], 1))',
        'jnp.take_along_axis(enc_outputs["pred_boxes"], top[..., None], 1)',
        DETACHED,
    ),
    Mutant(
        "every host loads the first rows",
        "detr_jax/sharding.py",
        "slice(jax.process_index() * rows, (jax.process_index() + 1) * rows)",
        "slice(0, rows)",
        "tests/detr_jax/test_sharding.py",
    ),
    Mutant(
        "a part of a batch counts its own boxes only",
        "detr_jax/losses.py",
        "total_boxes = jnp.maximum(jnp.sum(whole), 1)",
        "total_boxes = jnp.maximum(jnp.sum(num_boxes), 1)",
        "tests/detr_jax/test_losses.py -k add_up",
    ),
    Mutant(
        "every device holds all of the state",
        "detr_jax/sharding.py",
        'return jax.P(*[None] * longest, "fsdp")',
        "return jax.P()",
        "tests/detr_jax/test_sharding.py",
    ),
    Mutant(
        "a loss that is not finite is ignored",
        "detr_jax/training.py",
        'if not np.isfinite([values["loss"], values["grad_norm"]]).all():',
        "if False:",
        f"{PROMISES} -k finite",
    ),
    Mutant(
        "SIGTERM does not save",
        "detr_jax/training.py",
        "    except Interrupted:\n        save()\n",
        "    except Interrupted:\n",
        f"{PROMISES} -k sigterm",
    ),
    *(
        Mutant(
            f"{what} is not resumed",
            "detr_jax/training.py",
            "        return store.restore(str(run.output_dir), shapes, start, verify=False)\n",
            "        return initialize() | store.restore(str(run.output_dir), "
            f'{{name: leaf for name, leaf in shapes.items() if name != "{entry}"}}, start, verify=False)\n',
            f"{PROMISES} -k resumed",
        )
        for what, entry in (("the optimizer's state", "opt_state"), ("the average", "ema"))
    ),
]


def run_tests(copy: Path, tests: str) -> tuple[int, str]:
    """pytest's exit code and output."""
    environment = os.environ | {"PYTHONPATH": str(copy), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-m", "pytest", "-n", "0", "-x", "-q", "-p", "no:cacheprovider", *tests.split(" ", 2)]
    result = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True, check=False)
    return result.returncode, result.stdout + result.stderr


def main(words: list[str]) -> int:
    """0 if every mutant is red."""
    chosen = [mutant for mutant in MUTANTS if not words or any(word in mutant.name for word in words)]
    if words == ["--list"]:
        print("\n".join(mutant.name for mutant in MUTANTS))
        return 0
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(copy / "compiled"))
        for name in COPIED:
            source = ROOT / name
            if source.is_dir():
                shutil.copytree(source, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(source, copy / name)
        for tests in sorted({mutant.tests for mutant in chosen}):
            code, output = run_tests(copy, tests)
            if code:
                print(f"{tests} fails without any change (pytest's exit code is {code}):\n{output[-3000:]}")
                return 2
        wrong = 0
        for mutant in chosen:
            path = copy / mutant.file
            text = path.read_text()
            if text.count(mutant.old) != 1:
                wrong += 1
                print(f"STALE  {mutant.name}: {mutant.file} holds the text {text.count(mutant.old)} times, not once")
                continue
            path.write_text(text.replace(mutant.old, mutant.new))
            code, output = run_tests(copy, mutant.tests)
            path.write_text(text)
            verdict = {0: "GREEN", 1: "red"}.get(code, "BROKEN")  # 1: tests failed; else nothing was tested
            wrong += verdict != "red"
            print(f"{verdict:6} {mutant.name}  ({mutant.tests})", flush=True)
            if verdict == "BROKEN":
                print(output[-2000:])
        print(f"{len(chosen) - wrong} of {len(chosen)} red")
        return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
