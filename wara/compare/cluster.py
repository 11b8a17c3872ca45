"""Cells as tasks of a Ray cluster, or of one that is started on this machine."""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Sequence
from typing import Any

from wara.compare.launch import Done
from wara.compare.worker import Job, Outcome, Worker
from wara.errors import WaraError
from wara.images import processors
from wara.net import reachable
from wara.training.processes import interpreter_environment


class Ray:
    """Runs jobs as Ray tasks; every node must see the folder of the comparison by the same name.

    Args:
        address: `host:port` of a cluster, or `ray://host:port`; None starts one here.
        jobs: cells at a time, on a cluster that is started here.
        gpus: of each cell.

    Raises:
        WaraError: kind "usage" when Ray is not installed or nobody answers at the address.
    """

    def __init__(self, address: str | None, *, jobs: int, gpus: float) -> None:
        try:
            import ray
        except ImportError as error:
            remedy = "pip install 'wara[ray]', or --launcher local"
            raise WaraError("usage", "ray is not installed", "--launcher ray", remedy) from error
        remedy = "correct --ray-address, or leave it out to start Ray here"
        if address is not None and address != "auto" and not _answers(address):
            raise WaraError("usage", "no Ray cluster answers", address, remedy)
        cores = processors()
        self.threads = max(1, cores // jobs)
        # Workers must compute as the local launcher's do, with as many threads.
        threads = interpreter_environment(self.threads)["OMP_NUM_THREADS"]
        environment = {"env_vars": {"OMP_NUM_THREADS": threads}}
        here: dict[str, Any] = {} if address else {"num_cpus": cores, "include_dashboard": False}
        try:
            ray.init(
                address=address, log_to_driver=False, logging_level=logging.ERROR,
                runtime_env=environment, **here,
            )  # fmt: skip
        except (ConnectionError, RuntimeError, ValueError) as error:
            what = f"Ray does not start: {' '.join(str(error).split())}"
            raise WaraError("usage", what, address or "", remedy) from error
        self.ray = ray
        # A process that has served a task serves more of them, with its images in memory.
        self.task = ray.remote(num_cpus=self.threads, num_gpus=gpus, max_retries=0)(_do)

    def run(self, jobs: Sequence[Job], done: Done) -> None:
        """Do all jobs, as many at a time as the cluster has room for."""
        going = {self.task.remote(dataclasses.asdict(job)): job for job in jobs}
        try:
            while going:
                (ended, *_), _ = self.ray.wait(list(going), num_returns=1)
                job = going.pop(ended)
                done(job, self._outcome(ended, job))
        finally:
            for task in going:
                self.ray.cancel(task)

    def _outcome(self, task: Any, job: Job) -> Outcome:
        try:
            return self.ray.get(task)
        except self.ray.exceptions.RayError as error:
            what = f"the worker was lost ({type(error).__name__})"
            refusal = WaraError("resources", what, job.place, "the same command goes on")
            return {"status": "failed", "reason": str(refusal), "kind": refusal.kind}


def _answers(address: str) -> bool:
    return reachable(address if "://" in address else f"ray://{address}")


@functools.cache
def _worker() -> Worker:
    return Worker()


def _do(job: dict[str, Any]) -> Outcome:
    return _worker().do(Job(**job))
