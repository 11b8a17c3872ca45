"""Who runs the jobs: this process, several on this machine, or a Ray cluster."""

from __future__ import annotations

import dataclasses
import json
import queue
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from typing import Protocol

from wara.compare.worker import Job, Outcome, Shelf, Worker
from wara.errors import WaraError
from wara.images import processors
from wara.signals import Stopped, StopSignals
from wara.training.processes import QUIET_START, interpreter_environment

_HEARD = 1.0  # seconds

Done = Callable[[Job, Outcome], None]
"""Called with each job and what came of it, in the order in which they end."""


class Launcher(Protocol):
    """Runs jobs."""

    def run(self, jobs: Sequence[Job], done: Done) -> None:
        """Do all jobs.

        Raises:
            Stopped: after SIGTERM, SIGINT or SIGHUP, once the jobs that were going on have stopped.
        """


class Here:
    """Runs jobs in this process, which has the images in memory from its checks.

    Args:
        shelf: image sets that are open already.
    """

    def __init__(self, shelf: Shelf) -> None:
        self.worker = Worker(shelf)

    def run(self, jobs: Sequence[Job], done: Done) -> None:
        """Do all jobs, one after the other."""
        for job in jobs:
            outcome = self.worker.do(job)
            if outcome["status"] == "interrupted":
                raise Stopped(outcome["signal"])
            done(job, outcome)


class Processes:
    """Runs jobs in several worker processes, each with its share of the cores.

    Args:
        count: how many.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self.threads = max(1, processors() // count)

    def run(self, jobs: Sequence[Job], done: Done) -> None:
        """Do all jobs, `count` at a time."""
        waiting: queue.SimpleQueue[Job] = queue.SimpleQueue()
        for job in jobs:
            waiting.put(job)
        ended: queue.SimpleQueue[tuple[Job, Outcome] | None] = queue.SimpleQueue()
        lanes = [_Lane(self.threads, waiting, ended) for _ in range(min(self.count, len(jobs)))]
        with StopSignals() as stop:
            stop.patient = True
            for lane in lanes:
                lane.start()
            going, told = len(lanes), 0
            try:
                while going:
                    if stop.times > told:
                        told = stop.times
                        for lane in lanes:
                            lane.stop(stop.requested)
                    if told > 1:
                        break
                    try:
                        found = ended.get(timeout=0.2)
                    except queue.Empty:
                        continue
                    if found is None:
                        going -= 1
                    elif found[1]["status"] != "interrupted":
                        done(*found)
            finally:
                for lane in lanes:
                    lane.kill()
            stop.check()


class _Lane(threading.Thread):
    """A worker process and the thread that feeds it; a worker that is killed is replaced."""

    def __init__(
        self,
        threads: int,
        waiting: queue.SimpleQueue[Job],
        ended: queue.SimpleQueue[tuple[Job, Outcome] | None],
    ) -> None:
        super().__init__(daemon=True)
        self.threads, self.waiting, self.ended = threads, waiting, ended
        self.process: subprocess.Popen[str] | None = None
        self.stopping = threading.Event()
        self._starting = threading.Lock()

    def run(self) -> None:
        while not self.stopping.is_set():
            try:
                job = self.waiting.get_nowait()
            except queue.Empty:
                break
            self.ended.put((job, self._do(job)))
        self.kill()
        self.ended.put(None)

    def _do(self, job: Job) -> Outcome:
        with self._starting:  # a worker that starts after the others were told would not stop
            if self.stopping.is_set():
                return {"status": "interrupted", "reason": None}
            process = self._worker()
        assert process.stdin is not None and process.stdout is not None
        try:
            process.stdin.write(json.dumps(dataclasses.asdict(job)) + "\n")
            process.stdin.flush()
            line = process.stdout.readline()
        except OSError:
            line = ""
        outcome: Outcome | None = json.loads(line) if line.endswith("\n") else None
        if outcome is not None and outcome["status"] != "interrupted":
            return outcome
        # A signal to all processes of a job may reach the worker before it reaches this one.
        if self.stopping.wait(_HEARD):
            return {"status": "interrupted", "reason": None}
        how = "told to stop" if outcome else f"killed (code {process.wait()})"
        error = WaraError(
            "resources", f"the worker was {how}", job.place,
            "free memory, or lower --jobs; the same command goes on",
        )  # fmt: skip
        return {"status": "failed", "reason": str(error), "kind": error.kind}

    def _worker(self) -> subprocess.Popen[str]:
        if self.process is None or self.process.poll() is not None:
            code = "from wara.compare.worker import serve; serve()"
            self.process = subprocess.Popen(  # noqa: S603  (this very program)
                [sys.executable, "-c", QUIET_START + code],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                env=interpreter_environment(self.threads),
                # Ctrl-C reaches every process of the terminal; workers hear of it from here, once.
                start_new_session=True,
            )  # fmt: skip
        return self.process

    def stop(self, signum: int) -> None:
        """Ask the worker to stop after its step."""
        with self._starting:
            self.stopping.set()
            if self.process is not None and self.process.poll() is None:
                self.process.send_signal(signum)

    def kill(self) -> None:
        """End the worker; it has nothing to lose between jobs."""
        with self._starting:
            self.stopping.set()
            if self.process is not None and self.process.poll() is None:
                self.process.kill()
                self.process.wait()
