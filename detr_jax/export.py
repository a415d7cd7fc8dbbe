"""A detector as one file that runs without this package: `jax.export`'s StableHLO, the weights, and a small program.

export(loaded, "detector.zip", bucket=(800, 1088))

$ python detector.zip photo.jpg      # needs jax, flatbuffers, numpy, pillow and simplejpeg
"""

import dataclasses
import io
import json
import os
import zipfile
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import export as jax_export

from detr_jax import data, errors, export_standalone
from detr_jax.checkpoints.load import Loaded
from detr_jax.config import DeformableDETRConfig
from detr_jax.data import image, transforms
from detr_jax.data.resample import normalize
from detr_jax.errors import UserError
from detr_jax.models import build_abstract
from detr_jax.postprocess import postprocess

_MODULES = {
    export_standalone: "__init__.py",
    errors: "errors.py",
    data: "data/__init__.py",
    image: "data/image.py",
    transforms: "data/transforms.py",
}
"""What an exported file carries: the program, and the decoder of images as it is here."""


def export(
    loaded: Loaded,
    path: str | os.PathLike[str],
    bucket: tuple[int, int],
    batch: int = 1,
    *,
    platforms: Sequence[str] = ("cpu", "tpu", "cuda"),
) -> None:
    """Writes `detect(weights, pixels, sizes, orig_sizes)`, jitted, and all that it takes to run it.

    The file is a zip archive: `python FILE photo.jpg` prints detections, and `export_standalone.py` in it, which
    imports jax, NumPy, Pillow and simplejpeg only, shows how to call it from a program. Deformable attention is
    exported as its reference implementation, which every platform runs.

    Args:
        loaded: the detector.
        path: of the file, such as `detector.zip`.
        bucket: (height, width) in pixels that images are padded to; multiples of 32. Images that `loaded.scale` makes
            larger than that are shrunk to it.
        batch: images in a call.
        platforms: of jax, on which it will run.

    Raises:
        ValueError: a bucket that is not one, or a model that does not fit it (two-stage with more queries than tokens).
    """
    if batch < 1 or any(side < 32 or side % 32 for side in bucket):
        nearest = tuple(max(32, round(side / 32) * 32) for side in bucket)
        raise UserError(
            f"export: bucket={bucket}, batch={batch}; expected sides that are multiples of 32, such as {nearest}, and "
            "a batch of at least 1"
        )
    config = loaded.config
    if isinstance(config, DeformableDETRConfig):
        config = dataclasses.replace(config, implementation="reference")
    graphdef, _ = nnx.split(build_abstract(config))
    leaves, structure = jax.tree.flatten(nnx.state(loaded.model))

    def detect(weights, pixels, sizes, orig_sizes):
        model = nnx.merge(graphdef, jax.tree.unflatten(structure, weights))
        outputs = model(normalize(pixels, sizes), sizes)
        return postprocess(outputs, orig_sizes, classification=loaded.classification, top_k=config.max_detections)

    weights = [np.asarray(leaf) for leaf in leaves]
    shapes = [jax.ShapeDtypeStruct(weight.shape, weight.dtype) for weight in weights]
    pixels = jax.ShapeDtypeStruct((batch, *bucket, 3), jnp.uint8)
    sizes = jax.ShapeDtypeStruct((batch, 2), jnp.int32)
    program = jax_export.export(jax.jit(detect), platforms=tuple(platforms))(shapes, pixels, sizes, sizes)
    about = {
        "bucket": bucket,
        "batch": batch,
        "scale": loaded.scale,
        "max_size": loaded.max_size,
        "max_source_side": loaded.max_source_side,
        "category_ids": loaded.categories.ids,
        "category_names": loaded.categories.names,
        "report": loaded.report,
        "platforms": list(platforms),
        "jax": jax.__version__,
    }
    arrays = io.BytesIO()
    np.savez(arrays, *weights)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("__main__.py", "import exported\n\nexported.main()\n")
        for module, name in _MODULES.items():
            source = Path(str(module.__file__)).read_text(encoding="utf-8")
            archive.writestr(f"exported/{name}", source.replace("from detr_jax.", "from exported."))
        archive.writestr("about.json", json.dumps(about, indent=2))
        archive.writestr("detect.stablehlo", program.serialize())
        archive.writestr("weights.npz", arrays.getvalue())
