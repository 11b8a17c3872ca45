"""Where weights lie: a path, the package, the local cache of the hub, or the hub if it answers."""

from __future__ import annotations

import contextlib
import importlib.resources
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import hf_hub_download, try_to_load_from_cache
from huggingface_hub.constants import ENDPOINT as HF_ENDPOINT

from wara.backbones.beside import CONFIG, OPEN_CLIP, PREPROCESSOR
from wara.backbones.names import NANO, Named
from wara.errors import WaraError
from wara.net import reachable


@dataclass(frozen=True)
class Weights:
    """A file of weights.

    Args:
        path: where it lies.
        source: where it came from, for people.
        of_name: whether it is what the hub has under that name, not a file that a user gave.
    """

    path: Path
    source: str
    of_name: bool


def find_weights(named: Named, given: str | Path | None) -> Weights | None:
    """Return the weights of a backbone, None when they are neither here nor to be had.

    Args:
        named: what is wanted.
        given: path of a file, or of a folder with one of the hub's files.

    Raises:
        WaraError: kind "data" when there is no such file.
    """
    if given is not None:
        return Weights(_given(Path(given).expanduser(), named), "a local file", False)
    if named.name == NANO:
        path = Path(str(importlib.resources.files("wara") / "weights" / f"{NANO}.safetensors"))
        return Weights(path, "shipped with the package", True)
    if named.repo is None:
        return None
    for file in named.files:
        found = try_to_load_from_cache(named.repo, file)
        if isinstance(found, str):
            return Weights(Path(found), f"cached copy of {named.repo}", True)
    if reachable(HF_ENDPOINT):
        for file in named.files:
            # A hub that answers may still not deliver: a proxy between, a file not there.
            with contextlib.suppress(OSError):
                path = Path(hf_hub_download(named.repo, file))
                _fetch_neighbours(named.repo)
                return Weights(path, f"hub {named.repo}", True)
    return None


def _fetch_neighbours(repo: str) -> None:
    for name in (CONFIG, PREPROCESSOR, OPEN_CLIP):
        with contextlib.suppress(OSError):
            hf_hub_download(repo, name)


def _given(path: Path, named: Named) -> Path:
    if path.is_dir():
        inside = [path / file for file in named.files if (path / file).is_file()]
        if not inside:
            remedy = f"give the path of the file itself, or a folder with {named.files[0]}"
            raise WaraError("data", "no weights in the folder", f"backbone.weights={path}", remedy)
        return inside[0]
    if not path.is_file():
        remedy = "give the path of a .safetensors or .pth file"
        what = "the weights are no regular file" if path.exists() else "no such weights file"
        raise WaraError("data", what, f"backbone.weights={path}", remedy)
    return path
