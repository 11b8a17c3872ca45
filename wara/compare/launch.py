"""Who runs the jobs: this process, several on this machine, or a Ray cluster."""

from __future__ import annotations

import dataclasses
import json
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from typing import Protocol

from wara.compare.worker import Job, Outcome, Shelf, Worker
from wara.errors import WaraError
from wara.images import processors
from wara.training.processes import interpreter_environment
from wara.training.signals import Stopped, StopSignals

Done = Callable[[Job, Outcome], None]
"""Called with each job and what came of it, in the order in which they end."""


class Launcher(Protocol):
    """Runs jobs."""

    def run(self, jobs: Sequence[Job], done: Done) -> None:
        """Do all jobs.

        Raises:
            Stopped: after SIGTERM or SIGINT, once the jobs that were going on have stopped.
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
            stop.graceful = True
            for lane in lanes:
                lane.start()
            going, told = len(lanes), False
            try:
                while going:
                    if stop.requested and not told:
                        told = True
                        for lane in lanes:
                            lane.stop(stop.requested)
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
        self.stopping = False

    def run(self) -> None:
        while not self.stopping:
            try:
                job = self.waiting.get_nowait()
            except queue.Empty:
                break
            self.ended.put((job, self._do(job)))
        self.kill()
        self.ended.put(None)

    def _do(self, job: Job) -> Outcome:
        if self.process is None or self.process.poll() is not None:
            self.process = subprocess.Popen(
                [sys.executable, "-c", "from wara.compare.worker import serve; serve()"],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                env=interpreter_environment(self.threads),
                # Ctrl-C reaches every process of the terminal; workers hear of it from here, once.
                start_new_session=True,
            )  # fmt: skip
        assert self.process.stdin is not None and self.process.stdout is not None
        try:
            self.process.stdin.write(json.dumps(dataclasses.asdict(job)) + "\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except OSError:
            line = ""
        if line:
            return json.loads(line)
        if self.stopping:
            return {"status": "interrupted", "reason": None}
        code = self.process.wait()
        error = WaraError(
            "resources", f"the worker was killed (code {code})", job.place,
            "free memory, or lower --jobs; the same command goes on",
        )  # fmt: skip
        return {"status": "failed", "reason": str(error), "kind": error.kind}

    def stop(self, signum: int) -> None:
        """Ask the worker to stop after its step."""
        self.stopping = True
        if self.process is not None and self.process.poll() is None:
            os.kill(self.process.pid, signum)

    def kill(self) -> None:
        """End the worker; it has nothing to lose between jobs."""
        self.stopping = True
        if self.process is not None and self.process.poll() is None:
            self.process.kill()
            self.process.wait()
