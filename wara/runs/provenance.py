"""What produced a run: code, versions, data, weights, machine, times."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import hashlib
import os
import platform
import resource
import secrets
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import wara
from wara.runs.exact import source_sha256
from wara.runs.progress import Progress
from wara.storage import read_json, write_json

_PACKAGES = (
    "torch", "torchvision", "timm", "pytorch-lightning", "ptwt", "PyWavelets", "numpy",
    "scikit-learn", "albumentations", "opencv-python-headless", "medmnist", "safetensors", "Pillow",
    "pydicom", "peft", "wandb",
)  # fmt: skip


class Provenance:
    """`provenance.json` of a run: what made it, and how it stands.

    Args:
        path: of the file.
        facts: what does not change while the run goes on, see `collect`.
        synthetic: whether the images were drawn.
        resumed: whether an earlier process began the run.
        progress: of the run; `changes` and `memory` tell what of it is not as it was planned.
    """

    def __init__(
        self,
        path: Path,
        facts: dict[str, Any],
        *,
        synthetic: bool,
        resumed: bool,
        progress: Progress,
    ) -> None:
        started, wandb_run = [utc_now()], None
        if resumed:
            with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
                earlier = read_json(path)
                wandb_run = earlier.get("wandb_run")
                started = [*earlier["started"], *started]
        self.path = path
        self.content = {
            "synthetic": synthetic, "status": "running", "started": started, "ended": None,
            "wandb_run": wandb_run, **facts, "changes": progress.changes, "memory": progress.micro,
            "peak_memory_mb": None,
        }  # fmt: skip

    def write(self) -> None:
        """Write the file, while the run goes on."""
        write_json(self.path, self.content)

    def wandb_run(self) -> str:
        """Return what W&B knows the run by; drawn once, and kept when the run is resumed."""
        if not self.content["wandb_run"]:
            self.content["wandb_run"] = secrets.token_hex(6)
            self.write()
        return str(self.content["wandb_run"])

    def end(self, status: str, peak: float | None = None) -> None:
        """Note how the run ended: `interrupted`, `failed` or `finished`, and the memory it took."""
        self.content |= {"status": status, "ended": utc_now(), "peak_memory_mb": peak}
        self.write()


def recorded_memory(path: Path) -> list[list[int]]:
    """Return what a `provenance.json` tells of batches in parts, see `Progress.micro`."""
    try:
        found = read_json(path)["memory"]
        return [[int(batch), int(images)] for batch, images in found]
    except (OSError, ValueError, KeyError, TypeError):
        return []  # damaged or not written yet; what went before stands in the checkpoint


def starts(path: Path) -> int:
    """Return how often the run of a `provenance.json` was begun or resumed; 0 without a file."""
    try:
        return len(read_json(path)["started"])
    except (OSError, ValueError, KeyError, TypeError):
        return 0


def amend(path: Path, status: str) -> bool:
    """Note the end of a run that could not do so itself; one that finished is left as it is.

    Returns:
        Whether there was anything to note.
    """
    content = read_json(path)
    if content["status"] in ("finished", status):
        return False
    write_json(path, content | {"status": status, "ended": utc_now()})
    return True


def utc_now() -> str:
    """The time, UTC, ISO 8601."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def collect(
    *,
    command: Sequence[str],
    seed: int,
    data: dict[str, Any],
    backbone: dict[str, Any],
    budget: dict[str, Any] | None,
    trunk: dict[str, Any] | None,
    device: str,
    accelerator: str,
    precision: str,
    processes: int,
) -> dict[str, Any]:
    """Facts about this process and machine, ready for `provenance.json`."""
    return {
        "command": list(command),
        "cwd": os.getcwd(),
        "seed": seed,
        "data": data,
        "backbone": backbone,
        "budget": budget,
        "trunk": trunk,
        "commit": commit(),
        **here(device=device, accelerator=accelerator, precision=precision, processes=processes),
    }


def here(*, device: str, accelerator: str, precision: str, processes: int) -> dict[str, Any]:
    """What of the facts says where and by what a run is computed; see `wara.runs.exact`."""
    return {
        "versions": versions(),
        "code_sha256": source_sha256(),
        "machine": {
            "host": socket.gethostname(),
            "system": platform.platform(),
            "python": platform.python_version(),
            "cpu": cpu_name(),
            "cpus": os.cpu_count(),
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
            "cuda": torch.version.cuda,
        },
        "torch": {
            "device": device,
            "accelerator": accelerator,
            "precision": precision,
            "processes": processes,
            "threads": torch.get_num_threads(),
            "interop_threads": torch.get_num_interop_threads(),
            "deterministic": torch.are_deterministic_algorithms_enabled(),
            "cpu_capability": torch.backends.cpu.get_cpu_capability(),
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS"),
        },
    }


def versions() -> dict[str, str | None]:
    """Installed versions of the packages that decide a result; None where not installed."""
    found: dict[str, str | None] = {"wara": wara.__version__}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found


def commit() -> dict[str, Any] | None:
    """Commit of the checkout this code runs from, and whether files differ; None when installed."""
    root = Path(wara.__file__).resolve().parents[1]
    git = shutil.which("git")
    if git is None or not (root / ".git").exists():
        return None
    try:
        head = subprocess.run(  # noqa: S603  (git by its full path)
            [git, "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True, timeout=10,
            check=True,
        ).stdout.strip()  # fmt: skip
        changed = subprocess.run(  # noqa: S603
            [git, "status", "--porcelain", "--untracked-files=no"], cwd=root, capture_output=True,
            text=True, timeout=10, check=True,
        ).stdout.strip()  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
    return {"sha": head, "changed": bool(changed)}


def cpu_name() -> str:
    """The processor's name."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        return platform.processor() or platform.machine()
    return platform.processor() or platform.machine()


def data_sha256(rows: Iterable[Sequence[object]]) -> str:
    """Hash of the split table: files, labels, patients, splits and image hashes, in order."""
    sha = hashlib.sha256()
    for row in rows:
        sha.update("\x1f".join("" if cell is None else str(cell) for cell in row).encode())
        sha.update(b"\x1e")
    return sha.hexdigest()


def forget_peak_memory() -> bool:
    """Begin to count the memory of this process anew, for a process that does several runs.

    Returns:
        Whether the system can do that; Linux can. Otherwise the peak stays that of all runs so far.
    """
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
    except (OSError, AttributeError):
        return False
    return True


def peak_memory_mb(cuda: bool) -> float:
    """Most memory used so far, in MB: of the GPU when training there, of the process otherwise."""
    if cuda:
        return round(torch.cuda.max_memory_allocated() / 2**20, 1)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # Linux counts in KiB, macOS in bytes.
    return round(peak / (2**20 if sys.platform == "darwin" else 2**10), 1)
