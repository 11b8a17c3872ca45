"""The run folder: its layout, its lock, and who may write into it."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import socket
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from wara.errors import WaraError
from wara.training import files

_LOCK = ".lock"
_held: set[Path] = set()

# All that a run writes at the top of its folder; and of these, what it writes first or deletes
# last, so that one of them is there whenever it was killed.
_SIGNS = frozenset({_LOCK, "config.yaml", "provenance.json", "train.log"})
_OWN = _SIGNS | {
    "splits.csv", "metrics.csv", "metrics.json", "predictions_val.csv", "predictions_test.csv",
    "report.md", "adapter", "checkpoints", "plots", "wandb", "tensorboard",
}  # fmt: skip


class RunFolder:
    """One run's folder. File names and columns are a public contract (see the docs).

    Args:
        path: the folder; need not exist.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.created = False
        self.synthetic = False
        self._lock: IO[str] | None = None

    config = property(lambda self: self.path / "config.yaml")
    provenance = property(lambda self: self.path / "provenance.json")
    splits = property(lambda self: self.path / "splits.csv")
    curves = property(lambda self: self.path / "metrics.csv")
    metrics = property(lambda self: self.path / "metrics.json")
    adapter = property(lambda self: self.path / "adapter")
    last = property(lambda self: self.path / "checkpoints" / "last.ckpt")
    best = property(lambda self: self.path / "checkpoints" / "best.ckpt")
    plots = property(lambda self: self.path / "plots")
    report = property(lambda self: self.path / "report.md")
    log = property(lambda self: self.path / "train.log")

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
        return bool(names & _SIGNS) and all(n in _OWN or files.is_temp(n) for n in names)

    @property
    def status(self) -> str:
        """`running`, `interrupted`, `failed` or `finished`, as the last writer left it."""
        try:
            content = json.loads(self.provenance.read_text())
        except (OSError, ValueError):
            return "unknown"
        return str(content.get("status", "unknown")) if isinstance(content, dict) else "unknown"

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
            if resume:
                raise self._nothing()
            return
        holder = self.holder()
        if holder:
            raise WaraError(
                "busy", f"another run is writing here ({holder})", str(self.path),
                "wait for it, stop it, or choose another folder with --out",
            )  # fmt: skip
        names = {entry.name for entry in self.path.iterdir()}
        if resume and not names:
            raise self._nothing()
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
                "use --resume to go on from its last checkpoint, --overwrite to delete it and "
                "start again, or --out for another folder",
            )  # fmt: skip

    def _nothing(self) -> WaraError:
        return WaraError(
            "config", f"nothing to resume in {self.path}", "--resume",
            "check --out, or leave --resume out",
        )  # fmt: skip

    def holder(self) -> str:
        """Who holds the lock, as `pid N on HOST`; empty when nobody does."""
        path = self.path / _LOCK
        if path.resolve() in _held:
            return f"pid {os.getpid()} on {socket.gethostname()}"
        try:
            with open(path, "r+") as handle:
                return "" if _try_lock(handle) else _describe(handle)
        except FileNotFoundError:
            return ""
        except OSError as error:
            raise files.storage_error(error, path) from error

    def open(self, *, overwrite: bool = False) -> None:
        """Make the folder, take the lock, and clear it if `overwrite`.

        The lock is the kernel's (POSIX, so it also goes over NFS): it is gone when its process
        is, however that ended. The pid and host in the file only tell whom to wait for.

        Raises:
            WaraError: kind "busy" or "storage".
        """
        lock = self.path / _LOCK
        try:
            self.created = not self.path.exists()
            self.path.mkdir(parents=True, exist_ok=True)
            if lock.resolve() in _held:
                raise _busy(self.path, f"pid {os.getpid()}")
            while True:
                handle = open(lock, "a+")  # noqa: SIM115  (held until `close`)
                if not _try_lock(handle):
                    who = _describe(handle)
                    handle.close()
                    raise _busy(self.path, who)
                # The previous holder deletes the file when done; if that happened between opening
                # and locking, this is a lock on a file nobody else can see.
                with contextlib.suppress(FileNotFoundError):
                    if os.fstat(handle.fileno()).st_ino == lock.stat().st_ino:
                        break
                handle.close()
            handle.truncate(0)
            handle.write(json.dumps({"pid": os.getpid(), "host": socket.gethostname()}))
            handle.flush()
            self._lock = handle
            _held.add(lock.resolve())
            if overwrite:
                self._clear()
            files.remove_temps(self.path)
        except OSError as error:
            raise files.storage_error(error, self.path) from error

    def close(self) -> None:
        """Give the lock back."""
        if self._lock is None:
            return
        files.remove_temps(self.path)
        path = self.path / _LOCK
        _held.discard(path.resolve())
        path.unlink(missing_ok=True)
        self._lock.close()
        self._lock = None

    def discard(self) -> None:
        """Remove what a run that failed before its first checkpoint wrote, and give back the lock.

        A folder that was there before the run stays, empty.
        """
        self._clear()
        self.close()
        if self.created:
            with contextlib.suppress(OSError):
                self.path.rmdir()

    def _clear(self) -> None:
        # What tells a run's folder from another goes last, for a kill in between.
        last = [self.provenance.name, self.config.name]
        entries = [entry for entry in self.path.iterdir() if entry.name != _LOCK]
        for entry in sorted(entries, key=lambda e: e.name in last and 1 + last.index(e.name)):
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry)
            else:
                entry.unlink()

    # -- tables -----------------------------------------------------------------------------

    def write_splits(self, rows: Sequence[tuple[str, str, str | None, str, str]]) -> None:
        """Write `splits.csv`; a row is file, label, patient, split, sha256."""
        columns = ("file", "label", "patient", "split", "sha256")
        files.write_csv(self.splits, *self._stamped(columns, rows))

    def write_curves(self, history: Sequence[Mapping[str, float | None]]) -> None:
        """Write `metrics.csv`, one row per epoch."""
        columns = list(history[0]) if history else ["epoch"]
        rows = [[row.get(name) for name in columns] for row in history]
        files.write_csv(self.curves, *self._stamped(columns, rows))

    def write_predictions(
        self,
        split: str,
        *,
        names: Sequence[str],
        patients: Sequence[str | None],
        labels: NDArray[Any],
        predicted: NDArray[Any],
        probs: NDArray[np.float64],
        logits: NDArray[np.float32],
        classes: Sequence[str],
    ) -> None:
        """Write `predictions_<split>.csv`: file, patient, label, pred, prob_*, logit_*.

        Multilabel labels and predictions are written as 0/1 digits joined by spaces, in class
        order. Numbers are written so that they read back as the same float.
        """
        columns = ["file", "patient", "label", "pred"]
        columns += [f"prob_{name}" for name in classes] + [f"logit_{name}" for name in classes]
        rows = [
            [name, patient, label_text(label), label_text(pred)]
            + [repr(float(value)) for value in prob]
            + [repr(float(value)) for value in logit]
            for name, patient, label, pred, prob, logit in zip(
                names, patients, labels, predicted, probs, logits, strict=True
            )
        ]
        files.write_csv(self.predictions(split), *self._stamped(columns, rows))

    def _stamped(
        self, columns: Sequence[str], rows: Sequence[Sequence[object]]
    ) -> tuple[list[str], list[list[object]]]:
        # `synthetic` comes last so that the contract's columns keep their places.
        stamp = "true" if self.synthetic else "false"
        return [*columns, "synthetic"], [[*row, stamp] for row in rows]


def label_text(label: Any) -> str:
    """A label as it stands in a table: its number, or its 0/1 digits joined by spaces."""
    values = np.asarray(label)
    return " ".join(str(int(v)) for v in values) if values.ndim else str(int(values))


def utc_now() -> str:
    """The time, UTC, ISO 8601."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def _try_lock(handle: IO[str]) -> bool:
    try:
        fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    return True


def _describe(handle: IO[str]) -> str:
    handle.seek(0)
    try:
        content = json.loads(handle.read())
        return f"pid {content['pid']} on {content['host']}"
    except (ValueError, KeyError, TypeError):
        return "another process"


def _busy(path: Path, who: str) -> WaraError:
    return WaraError(
        "busy", f"another run is writing here ({who})", str(path),
        "wait for it, stop it, or choose another folder with --out",
    )  # fmt: skip
