"""What must be the same for a run to give the same bits again, as one list of named facts."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import wara
from wara.errors import WaraError, suggest

_ELSEWHERE = {"compare", "deploy", "cli.py"}  # rooms that come after a run

PACKAGES = (
    "torch", "torchvision", "timm", "pytorch-lightning", "ptwt", "PyWavelets", "numpy",
    "scikit-learn", "albumentations", "opencv-python-headless", "Pillow", "pydicom", "peft",
)  # fmt: skip
"""Packages whose arithmetic, or whose choice of the best epoch, comes into the weights."""

NAMES = ("threads", "devices", "device", "amp", "cpu", "python", "code", *PACKAGES)
"""Names of the facts, as `--allow-change` takes them."""

Facts = dict[str, Any]
Changes = dict[str, tuple[Any, Any]]
"""Fact -> (what it was, what it is)."""

_BACK = {
    "threads": "set OMP_NUM_THREADS={}",
    "devices": "set devices={}",
    "device": "train on {}",
    "amp": "set amp as it was, which gave {}",
    "cpu": "go on where the processor is {}",
    "python": "use Python {}",
    "code": "check out the code that began it",
}


@functools.cache
def source_sha256() -> str:
    """Return a hash of the part of this package that decides what comes of a run."""
    package, digest = Path(wara.__file__).parent, hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        place = path.relative_to(package)
        if place.parts[0] not in _ELSEWHERE:
            digest.update(f"{place.as_posix()}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()


def facts_of(provenance: Mapping[str, Any]) -> Facts:
    """Return the named facts of what `collect` gathered, now or when a run was begun.

    Args:
        provenance: with `machine`, `torch`, `versions` and `code_sha256`; what is not there is
            None.
    """
    machine, torch, versions = (provenance.get(k) or {} for k in ("machine", "torch", "versions"))
    return {
        "threads": torch.get("threads"),
        "devices": torch.get("processes"),
        "device": machine.get("gpu") if torch.get("accelerator") == "gpu" else "cpu",
        "amp": torch.get("precision"),
        "cpu": f"{machine.get('cpu')} ({torch.get('cpu_capability')})",
        "python": machine.get("python"),
        "code": provenance.get("code_sha256"),
        **{name: versions.get(name) for name in PACKAGES},
    }


def changed(then: Mapping[str, Any], now: Mapping[str, Any]) -> Changes:
    """Return the named facts that differ."""
    return {
        name: (then.get(name), now.get(name)) for name in NAMES if then.get(name) != now.get(name)
    }


def check_names(allow: Iterable[str]) -> None:
    """Refuse a name that is none of a fact.

    Raises:
        WaraError: kind "usage".
    """
    for name in allow:
        if name not in NAMES:
            what = f"no fact is named '{name}'"
            raise WaraError("usage", what, "--allow-change", suggest(name, NAMES))


def refusals(changes: Changes, where: str, allow: Sequence[str]) -> list[WaraError]:
    """Return a line for each change that was not allowed by its name."""
    found = []
    for name, (was, now) in changes.items():
        if name in allow:
            continue
        back = _BACK.get(name, f"install {name} {{}}").format(was)
        remedy = f"{back}, or accept another result with --allow-change {name}"
        what = f"{name} was {_short(name, was)} and is {_short(name, now)}"
        found.append(WaraError("config", what, where, remedy))
    return found


def sentences(changes: Iterable[Mapping[str, Any]]) -> list[str]:
    """Return what a report says of changes that were allowed, see `Progress.changes`."""
    return [
        f"not bit-identical to an undisturbed run: after epoch {change['after_epoch']}, "
        f"{change['name']} went from {_short(change['name'], change['was'])} to "
        f"{_short(change['name'], change['now'])} (--allow-change {change['name']})"
        for change in changes
    ]


def _short(name: str, value: Any) -> str:
    if value is None:
        return "not recorded" if name not in PACKAGES else "not installed"
    return str(value)[:12] if name == "code" else str(value)
