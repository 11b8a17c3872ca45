"""Checks before a run, and the translation of known failures into refusals."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from wara.errors import WaraError


def check_writable(path: Path) -> None:
    """Refuse an output folder that cannot be made, before minutes of checks on the data."""
    parent = next(p for p in (path, *path.absolute().parents) if p.exists())
    if not os.access(parent, os.W_OK | os.X_OK):
        raise WaraError("storage", "no permission to write", str(parent), "choose another --out")


def differences(old: Any, new: Any, prefix: str = "") -> dict[str, tuple[Any, Any]]:
    """Return what differs between two nested dicts, as dotted key -> (old, new)."""
    if isinstance(old, dict) and isinstance(new, dict):
        found: dict[str, tuple[Any, Any]] = {}
        for key in sorted(old.keys() | new.keys()):
            found |= differences(old.get(key), new.get(key), f"{prefix}.{key}" if prefix else key)
        return found
    return {} if old == new else {prefix: (old, new)}


def as_refusal(error: BaseException) -> BaseException:
    """Turn errors with a known cause and remedy into refusals; others pass as they are."""
    text = str(error)
    if isinstance(error, WaraError):
        return error
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in text:
        return WaraError(
            "resources", "not enough memory", "",
            "lower batch_size (and raise accumulate), or choose a smaller backbone or img_size",
        )  # fmt: skip
    if "DataLoader worker" in text and ("killed" in text or "exited" in text):
        return WaraError(
            "resources", "a data worker was killed", "data.workers",
            "lower data.workers, or give the machine more (shared) memory",
        )  # fmt: skip
    if "does not have a deterministic implementation" in text:
        return WaraError(
            "config", text.split(".")[0], "deterministic",
            "set deterministic=false; resuming is then not bit-exact",
        )  # fmt: skip
    # An error raised in a data worker arrives as text; its last line is ours.
    inside = re.search(r"error\[(data|artefact|storage|resources)\]: (.*)", text)
    if inside:
        parts = [*inside.group(2).split("; "), "", ""][:3]
        return WaraError(inside.group(1), *parts)
    return error


@contextlib.contextmanager
def torch_settings(deterministic: bool) -> Iterator[None]:
    """Deterministic kernels for the time of the run, and put back what was set before."""
    debug: Any = torch.utils.deterministic
    before = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    fill = debug.fill_uninitialized_memory
    try:
        torch.use_deterministic_algorithms(deterministic)
        # A debugging aid that costs a pass over every new tensor.
        debug.fill_uninitialized_memory = False
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warn_only)
        debug.fill_uninitialized_memory = fill
