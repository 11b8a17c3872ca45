"""A process that serves many cells: what they share is imported, checked and decoded once."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import queue
import signal
import threading
import time
import traceback
from pathlib import Path
from typing import Any

from wara.compare.cells import seal, seal_path
from wara.config import RunConfig
from wara.data.imageset import ImageSet
from wara.data.workers import end_with
from wara.errors import WaraError, as_refusal
from wara.runs.folder import RunFolder
from wara.runs.provenance import forget_peak_memory
from wara.signals import Stopped, StopSignals
from wara.storage import read_json, write_json
from wara.training.run import evaluate, run_here
from wara.training.setup import Prepared, kernels, open_images, prepare

Outcome = dict[str, Any]
"""`status` (`finished | failed | interrupted`), `reason`, and what the job found; plain values."""


@dataclasses.dataclass(frozen=True)
class Job:
    """Something a worker can do, as plain values that cross to other processes.

    Args:
        kind: `cell`, a run with all its files; or `trial`, a training that is judged on the
            validation images and leaves one file.
        config: of the run, as JSON; its `out` is where the results go.
        key: of the cell.
        place: the cell for people.
        audit: metric to compute on the test images after each epoch; empty for none.
    """

    kind: str
    config: str
    key: str
    place: str
    audit: str = ""


class Shelf:
    """Image sets that were opened before, by what decides their images."""

    def __init__(self) -> None:
        self._sets: dict[str, ImageSet] = {}

    def open(self, config: RunConfig) -> ImageSet:
        """Return the images of a config; they are read once in this process."""
        data = config.data
        shared = [config.dataset, config.offline, data.cache, data.images, data.modality]
        shared += [data.bits, data.greys, data.root]
        key = json.dumps(shared)
        # What is drawn follows from the seed of the split; each split has images of its own.
        drawn = f"{key} {data.split_seed}"
        for known in (key, drawn):
            if known in self._sets:
                return self._sets[known]
        found = open_images(config)
        self._sets[drawn if found.synthetic else key] = found
        return found


class Worker:
    """Runs jobs one after the other."""

    def __init__(self, shelf: Shelf | None = None) -> None:
        self.shelf = shelf or Shelf()

    def do(self, job: Job) -> Outcome:
        """Do a job; what fails is an outcome too, and the next job can be done."""
        began = time.perf_counter()
        try:
            with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
                found = self._cell(job) if job.kind == "cell" else self._trial(job)
        except Stopped as stop:
            return {"status": "interrupted", "reason": stop.signal_name, "signal": stop.signum}
        except Exception as error:
            refusal = as_refusal(error)
            if refusal.kind == "bug":
                traceback.print_exc()
            reason = " ".join(str(refusal).split())
            return {"status": "failed", "reason": reason, "kind": refusal.kind}
        return {"status": "finished", "reason": None, "wall": time.perf_counter() - began, **found}

    def _cell(self, job: Job) -> Outcome:
        config = RunConfig.model_validate_json(job.config)
        folder, counted = RunFolder(config.folder), forget_peak_memory()
        # A seal that did not hold is the reason why the cell is run again.
        altered = seal_path(folder.path).exists()
        watch = Audit(folder.path, job.audit) if job.audit else None
        begin: dict[str, Any] = {"quiet": True, "opened": self.shelf.open, "watch": watch}
        if folder.is_run and not altered:
            try:
                run_here(config, resume=True, **begin)
            except WaraError as error:
                if error.kind not in ("artefact", "config"):
                    raise
                run_here(config, overwrite=True, **begin)
        else:
            run_here(config, overwrite=True, **begin)
        metrics = read_json(folder.metrics)
        measured = {
            "seconds_per_epoch": metrics["seconds"] / metrics["epochs"],
            "peak_memory_mb": metrics["peak_memory_mb"] if counted else None,
        }
        seal(folder.path, job.key, measured)
        return measured

    def _trial(self, job: Job) -> Outcome:
        from wara.training.fit import fit
        from wara.training.journal import Journal

        config = RunConfig.model_validate_json(job.config)
        with StopSignals() as stop, kernels(config.deterministic):
            run = prepare(config, report_dir=None, opened=self.shelf.open)
            progress = fit(
                run.model, run.recipe(), run.images, run.splits, run.backbone.spec,
                journal=Journal(stop=stop),
            )  # fmt: skip
            stop.graceful = False
            stop.check()
        found = {
            "key": job.key,
            "monitor": progress.monitor,
            "value": progress.best_value,
            "epoch": progress.best_epoch,
        }
        write_json(config.folder, found)
        return found


class Audit:
    """What the test images would say after each epoch, kept beside the cell.

    Args:
        folder: of the run.
        metric: name of it.
    """

    def __init__(self, folder: Path, metric: str) -> None:
        self.path, self.metric = audit_path(folder), metric

    def __call__(self, run: Prepared, epoch: int) -> None:
        """Judge the model as it is, and leave it so."""
        modes = [(module, module.training) for module in run.model.modules()]
        plain = dataclasses.replace(run, config=run.config.model_copy(update={"bootstrap": 0}))
        value = evaluate(plain, ["test"])["test"].scores[self.metric]["value"]
        for module, training in modes:
            module.training = training
        # An epoch that is done over after a kill gives the same number again.
        found = read_json(self.path) if epoch > 1 and self.path.exists() else {}
        write_json(self.path, {**found, str(epoch): value})


def audit_path(folder: Path) -> Path:
    """Return where the audit of a cell lies: beside the folder of its run."""
    return folder.with_name(f"{folder.name}.audit.json")


def serve() -> None:
    """Be a worker process: a job per line of stdin, an outcome per line of stdout.

    It ends with its parent, however that ends: the other end of stdin is then closed.
    """
    end_with(os.getppid())  # the thread below does not run while the process is stopped
    jobs: queue.SimpleQueue[str] = queue.SimpleQueue()
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)

    def follow() -> None:
        # Not `sys.stdin`, whose lock a data worker would find taken for ever when it is forked.
        with os.fdopen(os.dup(0)) as lines:
            for line in lines:
                jobs.put(line)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=follow, daemon=True).start()
    worker = Worker()
    while True:
        outcome = worker.do(Job(**json.loads(jobs.get())))
        replies.write(json.dumps(outcome) + "\n")
        replies.flush()
