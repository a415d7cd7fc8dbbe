"""One training step and one inference on this machine, against HF `transformers` in PyTorch, in turn.

Two-stage Deformable DETR, R50, float32, batch 1: forward, loss and backward at 480x640, inference at 800x1066. Both
train the same layers (the stem and the first stage are frozen) on the same number of threads, each in a process of its
own; compilation is not timed.
The loss here also has the encoder's term, which transformers' leaves out. On a machine that is doing other work too,
threads that wait for each other distort the times: pin both to one core with `taskset -c 0`.

    pip install torch transformers
    python benchmarks/step.py
"""

import argparse
import contextlib
import multiprocessing
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from detr_jax import models
from detr_jax.config import DeformableDETRConfig, LossConfig
from detr_jax.losses import set_prediction_loss

BOXES = 7
run: Callable[[], object]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="timed rounds, each one running both in turn")
    parser.add_argument("--ours-only", action="store_true", help="without PyTorch")
    args = parser.parse_args()
    sides = ["detr_jax"] if args.ours_only else ["detr_jax", "transformers"]
    for name, height, width, train in (("training step", 480, 640, True), ("inference", 800, 1066, False)):
        with contextlib.ExitStack() as stack:
            processes = {side: stack.enter_context(process()) for side in sides}
            for side, worker in processes.items():
                worker.submit(prepare, side, height, width, train).result()
            seconds = {side: [] for side in sides}
            for _ in range(args.rounds):
                for side, worker in processes.items():
                    seconds[side].append(worker.submit(timed).result())
        line = "  ".join(f"{side} {np.median(times):6.2f} s (best {min(times):.2f})" for side, times in seconds.items())
        print(f"{name} {height}x{width}:  {line}", flush=True)
        if not args.ours_only:
            ratio = np.median(np.array(seconds["transformers"]) / np.array(seconds["detr_jax"]))
            print(f"{name} {height}x{width}:  detr_jax is {ratio:.2f}x as fast", flush=True)


def process() -> ProcessPoolExecutor:
    """A process that runs one side, so that the two do not share allocators and threads."""
    return ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))


def prepare(side: str, height: int, width: int, train: bool) -> None:
    """In the side's process: builds and compiles."""
    global run
    rng = np.random.default_rng(0)
    image = rng.standard_normal((1, height, width, 3)).astype(np.float32)
    boxes = rng.uniform(0.2, 0.4, (1, BOXES, 4)).astype(np.float32)
    labels = rng.integers(0, 91, (1, BOXES))
    run = {"detr_jax": ours, "transformers": theirs}[side](image, boxes, labels, train)


def timed() -> float:
    """In the side's process: seconds of one run."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def ours(image: np.ndarray, boxes: np.ndarray, labels: np.ndarray, train: bool) -> Callable[[], object]:
    """Compiled step or inference."""
    config = DeformableDETRConfig.r50_two_stage()
    graphdef, params, rest = models.split(config, models.build(config, rngs=nnx.Rngs(0)))
    sizes = jnp.array([image.shape[1:3]], jnp.int32)
    targets = {"boxes_cxcywh": jnp.asarray(boxes), "labels": jnp.asarray(labels), "num_boxes": jnp.array([BOXES])}

    @jax.jit
    def step(params, rest, image, key):
        def loss(params):
            outputs = nnx.merge(graphdef, params, rest)(image, sizes, nnx.Rngs(key))
            return set_prediction_loss(outputs, targets, LossConfig())[0]

        return jax.value_and_grad(loss)(params)

    @jax.jit
    def infer(params, rest, image):
        outputs = nnx.merge(graphdef, params, rest)(image, sizes)
        return outputs["pred_logits"], outputs["pred_boxes"]

    pixels = jnp.asarray(image)
    start = time.perf_counter()
    args = (params, rest, pixels, jax.random.key(0)) if train else (params, rest, pixels)
    compiled = (step if train else infer).lower(*args).compile()
    memory = compiled.memory_analysis()
    size = f", {memory.temp_size_in_bytes / 2**30:.2f} GiB of temporaries" if memory else ""
    print(f"detr_jax compiled in {time.perf_counter() - start:.1f} s{size}", flush=True)
    jax.block_until_ready(compiled(*args))
    return lambda: jax.block_until_ready(compiled(*args))


def theirs(image: np.ndarray, boxes: np.ndarray, labels: np.ndarray, train: bool) -> Callable[[], object]:
    """The same in PyTorch."""
    import torch  # pyright: ignore[reportMissingImports]
    import transformers  # pyright: ignore[reportMissingImports]

    backbone = transformers.ResNetConfig(
        hidden_sizes=[256, 512, 1024, 2048],
        depths=[3, 4, 6, 3],
        layer_type="bottleneck",
        out_features=["stage2", "stage3", "stage4"],
    )
    model = transformers.DeformableDetrForObjectDetection(
        transformers.DeformableDetrConfig(
            use_timm_backbone=False,
            use_pretrained_backbone=False,
            backbone=None,
            backbone_config=backbone,
            num_labels=91,
            with_box_refine=True,
            two_stage=True,
            auxiliary_loss=True,
        )
    )
    # transformers freezes all of a native backbone; the configs train stages 2 to 4.
    for name, parameter in model.model.backbone.named_parameters():
        parameter.requires_grad_("stages.0." not in name and "embedder" not in name)
    pixels = torch.from_numpy(image.transpose(0, 3, 1, 2).copy())
    targets = [{"class_labels": torch.from_numpy(labels[0]), "boxes": torch.from_numpy(boxes[0])}]

    def step():
        model.zero_grad()
        model(pixels, labels=targets).loss.backward()

    def infer():
        with torch.inference_mode():
            model(pixels)

    model.train(train)
    run = step if train else infer
    run()
    return run


if __name__ == "__main__":
    main()
