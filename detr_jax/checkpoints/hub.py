"""Checkpoints by name: `facebook/detr-resnet-50` of the Hugging Face hub, through `huggingface_hub` and its cache.

Only JSON and safetensors are fetched. `HF_TOKEN`, `HF_HUB_OFFLINE`, `HF_HUB_CACHE` and `HF_ENDPOINT` mean what they do
there; what was fetched once is found again without a network.
"""

import os
import re

from etils.epath import Path

from detr_jax.errors import NotFoundError

_FILES = (
    "config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "model.safetensors.index.json",
    "model.safetensors",
    "model-*-of-*.safetensors",
)


def locate(path: str | os.PathLike[str], *, revision: str | None = None, token: str | None = None) -> Path:
    """The file or folder of a checkpoint: as given if it exists, else fetched from the hub if it is a name there.

    Args:
        path: file or folder; or `owner/name`, or `owner/name@revision`.
        revision: branch, tag or commit of the hub's repository; `None` is `main`.
        token: of the hub; `None` takes the one that `hf auth login` stored, or `HF_TOKEN`.

    Raises:
        FileNotFoundError: neither there nor on the hub, or the hub does not give it; says why, and what to do.
    """
    local = Path(path)
    named = re.fullmatch(r"([\w.-]+/[\w.-]+?)(?:@([\w./-]+))?", str(path))
    is_file = local.suffix in (".safetensors", ".pth", ".pt", ".bin", ".ckpt")
    if local.exists() or named is None or is_file or local.parts[0] in (".", ".."):
        return local
    if local.parent.is_dir():
        raise NotFoundError(f"{path}: no such file or folder in {local.parent}/; expected a checkpoint")
    name, revision = named[1], named[2] or revision
    found = _fetch(name, revision, token)
    if not any(found.glob("model*.safetensors")):
        names = ", ".join(sorted(p.name for p in found.iterdir())) or "nothing that is read here"
        raise NotFoundError(
            f"{name}: the repository has no model.safetensors (found {names}), and pickled weights are not fetched. "
            "Save it again with safe serialization, or give a file"
        )
    return found


def _fetch(name: str, revision: str | None, token: str | None) -> Path:
    """The folder of a repository's snapshot in the cache."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    of = f"{name}@{revision}" if revision else name
    try:
        return Path(snapshot_download(name, revision=revision, token=token, allow_patterns=list(_FILES)))
    except GatedRepoError as error:
        reason = f"asks for its terms to be accepted at https://huggingface.co/{name}; then set HF_TOKEN"
        raise NotFoundError(f"{of}: the hub {reason}") from error
    except RevisionNotFoundError as error:
        raise NotFoundError(f"{of}: the hub's repository has no such revision") from error
    except RepositoryNotFoundError as error:
        reason = "no such file or folder here, and no such repository on the hub (for a private one set HF_TOKEN)"
        raise NotFoundError(f"{of}: {reason}") from error
    except LocalEntryNotFoundError as error:
        reason = "not in the cache of huggingface_hub, and the hub cannot be reached, or HF_HUB_OFFLINE is set"
        raise NotFoundError(f"{of}: no such file or folder here; {reason}") from error
    except (HfHubHTTPError, HFValidationError) as error:
        raise NotFoundError(f"{of}: the hub answers: {str(error).splitlines()[0]}") from error


def describe(path: str | os.PathLike[str], found: Path) -> str:
    """What a checkpoint is called in reports: the hub's name and commit, or the path."""
    return str(path) if Path(path) == found else f"{str(path).partition('@')[0]} (hub, commit {found.name[:12]})"
