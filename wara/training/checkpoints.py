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
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning.plugins.io import CheckpointIO
from torch import Tensor

from wara.errors import WaraError
from wara.training.files import replacing

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


class SafeCheckpointIO(CheckpointIO):
    """Checkpoint files that survive a kill at any moment.

    Lightning's own writer goes through `$TMPDIR` and can destroy the previous checkpoint when the
    disk fills up. This one writes beside the target, syncs, reads back, compares, and renames.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None
    ) -> None:
        """Write `checkpoint` to `path`; the file that was there stays until the new one is whole.

        Raises:
            WaraError: kind "storage", when the disk is full, refuses, or returns other bytes.
        """
        path = Path(path)
        buffer = io.BytesIO()
        torch.save({**checkpoint, "format": FORMAT, "sha256": digest(checkpoint)}, buffer)
        data = buffer.getbuffer()
        with replacing(path) as temp:
            with open(temp, "wb") as handle:
                handle.write(data)
            if _file_sha256(temp) != hashlib.sha256(data).hexdigest():
                raise WaraError(
                    "storage", "the disk gave back other bytes than were written", str(path),
                    "check the disk, or choose another folder with --out",
                )  # fmt: skip

    def load_checkpoint(
        self,
        path: str | Path,
        map_location: Any | None = "cpu",
        weights_only: bool | None = True,
    ) -> dict[str, Any]:
        """Read and verify `path`; always with `weights_only=True`.

        Raises:
            WaraError: kind "artefact", when the file is missing, truncated, altered or of another
                format.
        """
        path = Path(path)
        remedy = "start again with --overwrite, or put back an intact copy of the file"
        try:
            content = torch.load(path, map_location=map_location, weights_only=True)
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
            raise WaraError(
                "artefact", "the checkpoint does not match its checksum", str(path), remedy
            )
        return content

    def remove_checkpoint(self, path: str | Path) -> None:
        """Delete `path` if it exists."""
        Path(path).unlink(missing_ok=True)


def _file_sha256(path: Path) -> str:
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()
