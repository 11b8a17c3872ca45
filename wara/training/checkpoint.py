"""Checkpoints that are whole or refused: written aside, read back, hashed, then renamed.

A checkpoint is a dict of plain values and tensors, saved with `torch.save` and loaded with
`weights_only=True`. It carries a SHA-256 over its whole content, so that a file whose bytes
changed on the disk is refused even where the zip container still opens.
"""

from __future__ import annotations

import hashlib
import io
import pickle
import struct
import zipfile
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from wara.errors import WaraError
from wara.runs.folder import RunFolder
from wara.runs.progress import Progress
from wara.storage import file_sha256, link_or_copy, replacing

FORMAT = "wara.checkpoint/1"


def digest(content: object) -> str:
    """SHA-256 over dicts, lists, tuples, tensors and plain values, in a canonical order.

    Raises:
        TypeError: for anything else; such a value would not load with `weights_only=True` either.
    """
    sha = hashlib.sha256()
    _feed(sha, content)
    return sha.hexdigest()


def _feed(sha: Any, value: object) -> None:
    if isinstance(value, Tensor):
        flat = value.detach().cpu().contiguous().reshape(-1)
        sha.update(f"T{value.dtype}{tuple(value.shape)}".encode())
        if flat.numel():
            sha.update(flat.view(torch.uint8).numpy().data)
    elif isinstance(value, dict):
        sha.update(f"D{len(value)}".encode())
        for key in sorted(value, key=lambda key: (type(key).__name__, key)):
            _feed(sha, key)
            _feed(sha, value[key])
    elif isinstance(value, (list, tuple)):
        sha.update(f"L{len(value)}".encode())
        for item in value:
            _feed(sha, item)
    elif isinstance(value, bool) or value is None:
        sha.update(f"P{value}".encode())
    elif isinstance(value, float):
        sha.update(b"F" + struct.pack("<d", value))
    elif isinstance(value, int):
        sha.update(f"I{value};".encode())
    elif isinstance(value, str):
        data = value.encode()
        sha.update(f"S{len(data)}:".encode() + data)
    else:
        raise TypeError(f"a checkpoint holds plain values and tensors, not {type(value).__name__}")


def save_checkpoint(path: Path, content: dict[str, Any]) -> None:
    """Write `content` to `path`; the file that was there stays until the new one is whole.

    Lightning's own writer goes through `$TMPDIR` and can destroy the previous checkpoint when the
    disk fills up. This one writes beside the target, syncs, reads back, compares, and renames.

    Raises:
        WaraError: kind "storage", when the disk is full, refuses, or returns other bytes.
    """
    buffer = io.BytesIO()
    torch.save({**content, "format": FORMAT, "sha256": digest(content)}, buffer)
    data = buffer.getbuffer()
    with replacing(path) as temp:
        with open(temp, "wb") as handle:
            handle.write(data)
        if file_sha256(temp) != hashlib.sha256(data).hexdigest():
            raise WaraError(
                "storage", "the disk gave back other bytes than were written", str(path),
                "check the disk, or choose another folder with --out",
            )  # fmt: skip


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read and verify `path`; always with `weights_only=True`.

    Raises:
        WaraError: kind "artefact", when the file is missing, truncated, altered or of another
            format.
    """
    remedy = "start again with --overwrite, or put back an intact copy of the file"
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise WaraError("artefact", "no checkpoint", str(path), remedy) from error
    except (
        RuntimeError, EOFError, ValueError, KeyError, OSError, pickle.UnpicklingError,
        zipfile.BadZipFile,
    ) as error:  # fmt: skip
        raise WaraError("artefact", "the checkpoint is damaged", str(path), remedy) from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise WaraError("artefact", f"not a {FORMAT} file", str(path), remedy)
    wanted = content.pop("sha256", None)
    del content["format"]
    if digest(content) != wanted:
        raise WaraError("artefact", "the checkpoint does not match its checksum", str(path), remedy)
    return content


@dataclass(frozen=True)
class Last:
    """The state that a stopped run goes on from.

    Args:
        path: of the file it was read from.
        content: of it, whole: `progress`, `facts`, `identity`, `state`, `optimiser`, `method`.
        damaged: why the newest checkpoint was passed over; empty where it was not.
    """

    path: Path
    content: dict[str, Any]
    damaged: str

    @property
    def progress(self) -> Progress:
        """How far the run was."""
        return Progress(**self.content["progress"])


def write_last(
    folder: RunFolder,
    progress: Progress,
    identity: dict[str, Any],
    facts: dict[str, Any],
    state: dict[str, Tensor],
    optimiser: dict[str, Any],
    method: dict[str, Tensor],
) -> None:
    """Write the state that a stopped run goes on from; the one before it is kept beside it."""
    content = {
        "progress": vars(progress).copy(),
        "facts": facts,
        "identity": identity,
        "state": state,
        "optimiser": optimiser,
        "method": method,
    }
    _keep(folder.last, folder.previous)
    save_checkpoint(folder.last, content)


def read_last(folder: RunFolder) -> Last | None:
    """Read what `write_last` wrote, or the one before where that is damaged; None before the first.

    Raises:
        WaraError: kind "artefact", when all that is there is damaged, or the config is gone that
            says what the state belongs to.
    """
    paths = (folder.last, folder.previous)
    if not any(path.exists() for path in paths):
        return None
    if not folder.config.is_file():
        remedy = "put the file back, or start again with --overwrite"
        raise WaraError("artefact", "the run's config is gone", str(folder.config), remedy)
    faults: list[WaraError] = []
    for path in paths:
        try:
            return Last(path, _read_state(path), faults[0].what if faults else "")
        except WaraError as error:
            faults.append(error)
    if not folder.previous.exists():
        raise faults[0]
    what = f"{faults[0].what}, and so is the one before it"
    raise WaraError("artefact", what, str(folder.last), faults[0].remedy)


def _read_state(path: Path) -> dict[str, Any]:
    content = load_checkpoint(path)
    names = {field.name for field in fields(Progress)}
    parts = {"state", "optimiser", "method", "facts"}
    if set(content.get("progress", {})) != names or not parts <= set(content):
        raise WaraError(
            "artefact", "the checkpoint lacks entries of this version", str(path),
            "resume with the version of wara that wrote it, or start again with --overwrite",
        )  # fmt: skip
    return content


def put_back(folder: RunFolder, last: Last, identity: dict[str, Any]) -> None:
    """Make both checkpoints those of the state that a run goes on from.

    A damaged newest one is replaced by the one before it, so that it does not take its place when
    the next is written. A kill may have come between last and best, and the best may be of an
    epoch that is now made again.

    Raises:
        WaraError: kind "artefact", when no file has the best epoch so far.
    """
    if last.path != folder.last:
        _keep(last.path, folder.last)
    epoch = last.progress.best_epoch
    if epoch:
        state = find_best(folder, last, identity)
        if not _holds(folder.best, epoch):
            write_best(folder, epoch, identity, state)


def find_best(folder: RunFolder, last: Last, identity: dict[str, Any]) -> dict[str, Tensor]:
    """Return the state of the best epoch from whichever file has it.

    Raises:
        WaraError: kind "artefact", when none has.
    """
    epoch = last.progress.best_epoch
    for path in (folder.best, folder.previous_best):
        if _holds(path, epoch):
            return read_best(path, epoch, identity)
    if last.progress.epoch == epoch:
        return last.content["state"]
    return read_best(folder.best, epoch, identity)


def _holds(path: Path, epoch: int) -> bool:
    """Whether a file is whole and of an epoch."""
    try:
        return load_checkpoint(path).get("epoch") == epoch
    except WaraError:
        return False


def write_best(
    folder: RunFolder, epoch: int, identity: dict[str, Any], state: dict[str, Tensor]
) -> None:
    """Write the state of the best epoch; the one before it is kept beside it."""
    _keep(folder.best, folder.previous_best)
    save_checkpoint(folder.best, {"epoch": epoch, "identity": identity, "state": state})


def read_best(path: Path, epoch: int, identity: dict[str, Any]) -> dict[str, Tensor]:
    """Read the state of the best epoch.

    Raises:
        WaraError: kind "artefact", when the file is damaged or not that epoch's of that run.
    """
    content = load_checkpoint(path)
    check_identity(content, identity, path)
    if content.get("epoch") != epoch:
        what = f"holds epoch {content.get('epoch')}, not the best epoch {epoch}"
        raise WaraError("artefact", what, str(path), "start again with --overwrite")
    return content["state"]


def drop_previous(folder: RunFolder) -> None:
    """Remove the older checkpoints of a run that is done."""
    for path in (folder.previous, folder.previous_best):
        path.unlink(missing_ok=True)


def _keep(path: Path, name: Path) -> None:
    """Give a file a second name, under which it stays when its own goes to a newer one."""
    if path.is_file():
        with replacing(name) as temp:
            link_or_copy(path, temp)


def check_identity(content: dict[str, Any], wanted: dict[str, Any], path: Path) -> None:
    """Refuse a checkpoint of another base, method or data set.

    Raises:
        WaraError: kind "artefact".
    """
    found = content.get("identity", {})
    names = {
        "base_sha256": "the backbone's weights are",
        "data_sha256": "the images, labels or splits are",
        "classes": "the classes are",
    }
    for key, text in names.items():
        if found.get(key) != wanted[key]:
            raise WaraError(
                "artefact", f"{text} not those of the checkpoint", str(path),
                "put back what the run was started with, or start again with --overwrite",
            )  # fmt: skip
