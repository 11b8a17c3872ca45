"""MedMNIST+ files: found in the cache, fetched once, read without pickle."""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import os
import shutil
import socket
import sys
import tempfile
import zipfile
import zlib
from pathlib import Path
from types import ModuleType
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from wara.cards import Card, MedMNISTSource
from wara.data.imageset import ArrayReader, ImageSet, Record
from wara.data.splits import SPLITS
from wara.errors import WaraError, suggest
from wara.net import reachable
from wara.storage import open_regular, replacing

# Arrays above this many bytes are mapped, not loaded: ChestMNIST at 224 px is 5.6 GB.
MAP_ABOVE = 1 << 30
_STALL_SECONDS = 30.0


class Unavailable(Exception):
    """The data cannot be had here and now; the message says why."""


def open_medmnist(card: Card, source: MedMNISTSource, cache: Path) -> ImageSet:
    """Open the `.npz` file of a MedMNIST subset, fetching it first when that is needed.

    Raises:
        Unavailable: when there is no file and it cannot be fetched.
        WaraError: kind "data" when the file is damaged or not the one of the card; kind "config"
            when there is no such subset.
    """
    info = _info(source)
    name = f"{source.flag}{_suffix(source)}.npz"
    if source.file is not None:
        path = (card.base or cache) / Path(source.file).expanduser()
        if not path.is_file():
            raise WaraError("data", "no such file", str(path), "correct `file` in the card")
    else:
        path = _find(name, cache) or _fetch(info, source, cache / "medmnist" / name)
    if source.verify:
        _verify(path, info[f"MD5{_suffix(source)}"])
    arrays = _read_npz(path)
    records, faults = _records(card, arrays, name)
    checked = "MD5 verified" if source.verify else "MD5 not verified"
    return ImageSet(
        card,
        records,
        ArrayReader([arrays[f"{split}_images"] for split in SPLITS]),
        origin=f"{path} ({checked})",
        faults=faults,
    )


def _package() -> ModuleType:
    """Return the module of the medmnist package that lists its files.

    Alone, for the package as a whole imports scikit-learn, pandas and torchvision to say so; and
    not under its own name, for a later `import medmnist.info` would then find half a package.
    """
    return sys.modules.get("medmnist.info") or _alone()


@functools.cache
def _alone() -> ModuleType:
    package = importlib.util.find_spec("medmnist")
    assert package is not None and package.origin is not None
    place = Path(package.origin).with_name("info.py")
    spec = importlib.util.spec_from_file_location("_medmnist_info", place)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _suffix(source: MedMNISTSource) -> str:
    return "" if source.size == 28 else f"_{source.size}"


def _info(source: MedMNISTSource) -> dict[str, Any]:
    known = _package().INFO
    if source.flag not in known:
        raise WaraError(
            "config",
            f"no MedMNIST subset '{source.flag}'",
            "source.flag",
            suggest(source.flag, known),
        )
    info = known[source.flag]
    if f"url{_suffix(source)}" not in info:
        raise WaraError(
            "config",
            f"'{source.flag}' has no files of size {source.size}",
            "source.size",
            "use 28",
        )
    return info


def _find(name: str, cache: Path) -> Path | None:
    root = _package().DEFAULT_ROOT
    folders = [cache / "medmnist", *([Path(root)] if root else [])]
    return next((folder / name for folder in folders if (folder / name).is_file()), None)


def _fetch(info: dict[str, Any], source: MedMNISTSource, path: Path) -> Path:
    url = info[f"url{_suffix(source)}"]
    host = urlsplit(url).hostname
    if not reachable(url):
        raise Unavailable(f"{path} is not there and {host} cannot be reached")
    from torchvision.datasets.utils import download_url  # what medmnist itself calls

    path.parent.mkdir(parents=True, exist_ok=True)
    # Under another name until it is whole and verified, so that a file in the cache is a good one.
    folder = Path(tempfile.mkdtemp(prefix=".fetching-", dir=path.parent))
    stall = socket.getdefaulttimeout()
    try:
        socket.setdefaulttimeout(_STALL_SECONDS)
        download_url(url, str(folder), filename=path.name, md5=info[f"MD5{_suffix(source)}"])
        os.replace(folder / path.name, path)
    except (OSError, RuntimeError) as error:
        raise Unavailable(f"fetching {url} failed: {error}") from error
    finally:
        socket.setdefaulttimeout(stall)
        shutil.rmtree(folder, ignore_errors=True)
    return path


def _verify(path: Path, expected: str) -> None:
    with open_regular(path) as stream:
        found = hashlib.file_digest(stream, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
    if found != expected:
        raise WaraError(
            "data",
            f"not the official file: MD5 {found} instead of {expected}",
            str(path),
            "delete it, so that it is fetched again; a file of your own needs a card with "
            "`verify: false`",
        )


def _read_npz(path: Path) -> dict[str, np.ndarray]:
    keys = [f"{split}_{part}" for split in SPLITS for part in ("images", "labels")]
    try:
        with np.load(path, allow_pickle=False) as archive:
            missing = [key for key in keys if key not in archive]
            if missing:
                raise WaraError(
                    "data", f"no array {', '.join(missing)}", str(path), "use a MedMNIST file"
                )
            arrays = {key: _array(archive, key, path) for key in keys}
    except (OSError, ValueError, EOFError, KeyError, zlib.error, zipfile.BadZipFile) as error:
        raise WaraError(
            "data", f"damaged file: {error}", str(path), "delete it and fetch it again"
        ) from error
    for split in SPLITS:
        images, labels = arrays[f"{split}_images"], arrays[f"{split}_labels"]
        good = images.dtype == np.uint8 and (
            images.ndim == 3 or (images.ndim == 4 and images.shape[3] == 3)
        )
        if not good or len(images) != len(labels) or labels.dtype.kind not in "iu":
            raise WaraError(
                "data",
                f"{split}: images {images.dtype} {images.shape}, labels {labels.dtype} "
                f"{labels.shape}",
                str(path),
                "images must be uint8 [n, h, w] or [n, h, w, 3], with one integer label row each",
            )
    return arrays


def _array(archive: Any, key: str, path: Path) -> np.ndarray:
    """Read one array of an open `.npz`; a huge one is unpacked once and mapped into memory."""
    member = f"{key}.npy"
    size = archive.zip.getinfo(member).file_size
    if size <= MAP_ABOVE or not os.access(path.parent, os.W_OK):
        return archive[key]
    state = path.stat()
    # Named by size and time of the packed file, so that another file is unpacked anew.
    unpacked = path.with_name(f"{path.stem}.{state.st_size}-{state.st_mtime_ns}") / member
    if not unpacked.is_file() or unpacked.stat().st_size != size:
        with replacing(unpacked) as partial, archive.zip.open(member) as packed:
            with partial.open("wb") as stream:
                shutil.copyfileobj(packed, stream, 1 << 22)
    return np.load(unpacked, mmap_mode="r", allow_pickle=False)


def _records(
    card: Card, arrays: dict[str, np.ndarray], name: str
) -> tuple[list[Record], list[WaraError]]:
    records: list[Record] = []
    faults: list[WaraError] = []
    width = len(card.classes) if card.task == "multilabel" else 1
    limit = 1 if card.task == "multilabel" else len(card.classes) - 1
    for split in SPLITS:
        rows = arrays[f"{split}_labels"].astype(np.int64)
        rows = rows.reshape(len(rows), -1)
        if rows.shape[1] != width:
            raise WaraError(
                "data",
                f"{split}: {rows.shape[1]} labels per image, the card has {width}",
                name,
                "use the card of this file",
            )
        for position, row in enumerate(rows.tolist()):
            file = f"{name}/{split}/{position}"
            if min(row) < 0 or max(row) > limit:
                faults.append(
                    WaraError("data", f"label {row} outside the card", file, f"0 to {limit} exist")
                )
            # Kept even then, so that record numbers and array positions agree; the gate refuses.
            label = tuple(row) if card.task == "multilabel" else row[0]
            records.append(Record(file, label, None, split))
    return records, faults
