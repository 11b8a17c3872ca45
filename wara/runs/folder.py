"""The run folder: its layout, its lock, and who may write into it."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
from pathlib import Path

from filelock import FileLock, Timeout

from wara import storage
from wara.errors import WaraError, storage_error
from wara.runs.pairs import SHEET, TABLE
from wara.runs.report import FIGURES

_LOCK = ".lock"

# All that a run writes at the top of its folder; and of these, what it writes first or deletes
# last, so that one of them is there whenever it was killed.
_SIGNS = frozenset({_LOCK, "config.yaml", "provenance.json", "train.log"})
_INSIDE = {
    "adapter": {"adapter_config.json", "adapter_model.safetensors"},
    "checkpoints": {"last.ckpt", "best.ckpt", "previous.ckpt", "previous_best.ckpt"},
    "plots": {f"{name}.png" for name in FIGURES},
}
"""What it writes in its folders; those of the loggers are theirs as a whole."""
_OWN = _SIGNS | _INSIDE.keys() | {
    "splits.csv", "metrics.csv", "metrics.json", "predictions_val.csv", "predictions_test.csv",
    "report.md", "files.sha256", "wandb", "tensorboard",
    TABLE, SHEET,
}  # fmt: skip


class RunFolder:
    """One run's folder. File names and columns are a public contract (see the docs).

    Args:
        path: the folder; need not exist.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.created = False
        self._lock: FileLock | None = None

    config = property(lambda self: self.path / "config.yaml")
    provenance = property(lambda self: self.path / "provenance.json")
    splits = property(lambda self: self.path / "splits.csv")
    pairs = property(lambda self: self.path / TABLE)
    pairs_sheet = property(lambda self: self.path / SHEET)
    curves = property(lambda self: self.path / "metrics.csv")
    metrics = property(lambda self: self.path / "metrics.json")
    adapter = property(lambda self: self.path / "adapter")
    last = property(lambda self: self.path / "checkpoints" / "last.ckpt")
    best = property(lambda self: self.path / "checkpoints" / "best.ckpt")
    previous = property(lambda self: self.path / "checkpoints" / "previous.ckpt")
    previous_best = property(lambda self: self.path / "checkpoints" / "previous_best.ckpt")
    plots = property(lambda self: self.path / "plots")
    report = property(lambda self: self.path / "report.md")
    log = property(lambda self: self.path / "train.log")
    sealed = property(lambda self: self.path / "files.sha256")

    @staticmethod
    def inside(name: str) -> list[str]:
        """Names of the files that a run writes in `adapter`, `checkpoints` or `plots`."""
        return sorted(_INSIDE[name])

    def predictions(self, split: str) -> Path:
        """Path of the predictions of `val` or `test`."""
        return self.path / f"predictions_{split}.csv"

    # -- may this run write here ------------------------------------------------------------

    @property
    def is_run(self) -> bool:
        """Whether the folder was written by a run that got as far as its config."""
        return self.config.is_file() and (self.provenance.is_file() or self._is_own())

    def _is_own(self) -> bool:
        """Whether a run was here, however short, and nothing else is."""
        try:
            names = {entry.name for entry in self.path.iterdir()}
        except (FileNotFoundError, NotADirectoryError):
            return False
        return bool(names & _SIGNS) and all(n in _OWN or storage.is_temp(n) for n in names)

    @property
    def status(self) -> str:
        """`running`, `interrupted`, `failed` or `finished`, as the last writer left it."""
        try:
            return str(storage.read_json(self.provenance).get("status", "unknown"))
        except (OSError, ValueError):
            return "unknown"

    def check(self, *, resume: bool, overwrite: bool) -> None:
        """Refuse a folder this run must not write into; writes nothing itself.

        Raises:
            WaraError: kind "config", when the folder is in use by something else than this run
                and no flag says what to do; kind "busy", when another process trains in it.
        """
        if resume and overwrite:
            raise WaraError(
                "config", "--resume and --overwrite exclude each other", str(self.path), "use one"
            )
        if self.path.exists() and not self.path.is_dir():
            raise WaraError("config", "not a folder", str(self.path), "choose another with --out")
        if not self.path.is_dir():
            return
        holder = self.holder()
        if holder:
            raise _busy(self.path, holder)
        names = {entry.name for entry in self.path.iterdir()}
        if names <= {_LOCK}:
            return
        if not (self.is_run or self._is_own()):
            raise WaraError(
                "config", "the folder holds files that are not a run's", str(self.path),
                "choose another with --out; it is left as it is",
            )  # fmt: skip
        if not (resume or overwrite):
            state = self.status
            raise WaraError(
                "config", f"the run folder exists ({state})", str(self.path),
                "use --resume to go on from its last checkpoint, --overwrite to delete what it "
                "wrote and start again, or --out for another folder",
            )  # fmt: skip

    def check_writable(self) -> None:
        """Refuse a folder that cannot be made, before minutes of checks on the data.

        Raises:
            WaraError: kind "storage".
        """
        parent = next(p for p in (self.path, *self.path.absolute().parents) if p.exists())
        if not os.access(parent, os.W_OK | os.X_OK):
            raise WaraError(
                "storage", "no permission to write", str(parent), "choose another --out"
            )

    def holder(self) -> str:
        """Who holds the lock, as `pid N on HOST`; empty when nobody does."""
        if not (self.path / _LOCK).exists():
            return ""
        lock = FileLock(self.path / _LOCK)
        try:
            lock.acquire(blocking=False)
        except Timeout:
            return _describe(self.path / _LOCK)
        except OSError as error:
            raise storage_error(error, self.path / _LOCK) from error
        lock.release()
        return ""

    def open(self, *, overwrite: bool = False) -> None:
        """Make the folder, take the lock, and delete what a run wrote there if `overwrite`.

        The lock is the kernel's: it is gone when its process is, however that ended. The pid and
        host beside it only tell whom to wait for.

        Raises:
            WaraError: kind "busy" or "storage".
        """
        lock = FileLock(self.path / _LOCK)
        try:
            self.created = not self.path.exists()
            self.path.mkdir(parents=True, exist_ok=True)
            try:
                lock.acquire(blocking=False)
            except Timeout:
                raise _busy(self.path, _describe(self.path / _LOCK)) from None
            self._lock = lock
            holder = {"pid": os.getpid(), "host": socket.gethostname()}
            (self.path / _LOCK).write_text(json.dumps(holder))
            if overwrite:
                self._clear()
            storage.remove_temps(self.path)
        except OSError as error:
            raise storage_error(error, self.path) from error

    def close(self) -> None:
        """Give the lock back."""
        if self._lock is None:
            return
        storage.remove_temps(self.path)
        # While it is held: whoever waits for it then finds that this lock guards no name.
        (self.path / _LOCK).unlink(missing_ok=True)
        self._lock.release()
        self._lock = None

    def discard(self) -> None:
        """Remove what a run that failed before its first checkpoint wrote, and give back the lock.

        A folder that was there before the run stays, and so do files that no run writes.
        """
        self._clear()
        self.close()
        if self.created:
            with contextlib.suppress(OSError):
                self.path.rmdir()

    def _clear(self) -> None:
        """Delete what runs write, and nothing else: users keep notes beside their results."""
        # What tells a run's folder from another goes last, for a kill in between.
        last = [self.provenance.name, self.config.name]
        own = [entry for entry in self.path.iterdir() if entry.name in _OWN - {_LOCK}]
        for entry in sorted(own, key=lambda e: e.name in last and 1 + last.index(e.name)):
            if entry.is_symlink() or not entry.is_dir():
                entry.unlink()
            elif entry.name not in _INSIDE:
                shutil.rmtree(entry)
            else:
                for name in _INSIDE[entry.name]:
                    (entry / name).unlink(missing_ok=True)
                storage.remove_temps(entry)
                with contextlib.suppress(OSError):  # something of the user's is left in it
                    entry.rmdir()


def _describe(path: Path) -> str:
    try:
        content = storage.read_json(path)
        return f"pid {content['pid']} on {content['host']}"
    except (OSError, ValueError, KeyError):
        return "another process"


def _busy(path: Path, who: str) -> WaraError:
    return WaraError(
        "busy", f"another run is writing here ({who})", str(path),
        "wait for it, stop it, or choose another folder with --out",
    )  # fmt: skip
