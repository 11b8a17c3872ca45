"""Commands that start within milliseconds: a server imports wara once and forks for each of them.

What is started is `wara.cli.program`, in a session of its own; it ends as an interpreter ends. Its
figures are left out and its steps are slowed down, so that a random moment falls into training.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from training_helpers import environment

SERVER = r"""
import json, os, signal, sys, time
import wara.cli, wara.training.start, wara.training.fit, wara.training.journal
import wara.runs.results, wara.training.cache, wara.compare.start, wara.compare.launch
from wara.training import checkpoint
from wara.training.task import FineTuning

wara.runs.results._figures = lambda *_: None


def strike(signum, number):
    # At the so many-th line that runs while a checkpoint is being written.
    left = [number]

    def trace(frame, event, argument):
        if frame.f_code.co_filename.rsplit(os.sep, 1)[-1] not in ("checkpoint.py", "storage.py"):
            return None
        left[0] -= event == "line"
        if left[0] == 0:
            sys.settrace(None)
            os.kill(os.getpid(), signum)
        return trace

    for name in ("write_last", "write_best"):
        def traced(*arguments, original=getattr(checkpoint, name)):
            if left[0] > 0:
                sys.settrace(trace)
            try:
                original(*arguments)
            finally:
                sys.settrace(None)
        setattr(wara.training.journal, name, traced)


def at(place, signum, group):
    # When a function is called for the first time.
    name, *inside = place.split(":")
    owner = __import__(name, fromlist=["_"])
    for part in inside[:-1]:
        owner = getattr(owner, part)
    original, called = getattr(owner, inside[-1]), []

    def called_first(*arguments, **named):
        if not called:
            called.append(0)
            os.kill(0 if group else os.getpid(), signum)
        return original(*arguments, **named)

    setattr(owner, inside[-1], called_first)


def become(job):
    os.setsid()
    os.environ["WARA_MARK"] = job["mark"]
    out = os.open(job["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(out, 1), os.dup2(out, 2), os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        signal.signal(getattr(signal, name), signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    step = FineTuning.training_step
    FineTuning.training_step = lambda s, *a: (time.sleep(job["pause"]), step(s, *a))[1]
    if job["strike"]:
        strike(*job["strike"])
    if job["at"]:
        at(*job["at"])
    sys.argv = ["wara", *job["words"]]
    wara.cli.program(job["words"])


real = os.fdopen(os.dup(1), "w")
print("ready", file=real, flush=True)
ended = {}
for line in sys.stdin:
    job = json.loads(line)
    if "pid" in job:
        if job["pid"] not in ended:
            found, status = os.waitpid(job["pid"], os.WNOHANG)
            if found:
                ended[found] = os.waitstatus_to_exitcode(status)
        answer = ended.get(job["pid"])
    else:
        answer = os.fork()
        if not answer:
            become(job)
    print(json.dumps(answer), file=real, flush=True)
"""


class Command:
    """A command that was started."""

    def __init__(self, pid: int, mark: str, log: Path, poll: Callable[[], int | None]) -> None:
        self.pid, self.mark, self.log, self.poll = pid, mark, log, poll

    @property
    def text(self) -> str:
        """What it has printed so far."""
        return self.log.read_text() if self.log.exists() else ""

    def wait(self, seconds: float = 240) -> int:
        """Return its exit code."""
        wait_for(lambda: self.poll() is not None, seconds, self)
        code = self.poll()
        assert code is not None
        return code

    def until(self, there: Callable[[], object], seconds: float = 240) -> Command:
        """Wait for something; the command must not end before."""
        wait_for(lambda: there() or self.poll() is not None, seconds, self)
        assert there(), self.text
        return self

    def family(self) -> list[int]:
        """Return the living processes that it started, and itself."""
        found = []
        for folder in Path("/proc").iterdir():
            if not folder.name.isdecimal():
                continue
            with contextlib.suppress(OSError):
                fields = (folder / "stat").read_text().rpartition(")")[2].split()
                marked = f"WARA_MARK={self.mark}".encode() in (folder / "environ").read_bytes()
                if fields[0] not in "ZX" and (int(fields[3]) == self.pid or marked):
                    found.append(int(folder.name))
        return found

    def others(self) -> list[int]:
        """Return the living processes that it started."""
        return [pid for pid in self.family() if pid != self.pid]

    def orphans(self, seconds: float = 30) -> list[str]:
        """Return what still lives some time after its end, in words, and kill it."""
        end = time.monotonic() + seconds
        while (left := self.family()) and time.monotonic() < end:
            time.sleep(0.05)
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        return [f"process {pid} is left" for pid in left]

    def send(self, signum: int, *, group: bool = False) -> None:
        """Send a signal to it, or to its process group."""
        with contextlib.suppress(ProcessLookupError):
            (os.killpg if group else os.kill)(self.pid, signum)


def wait_for(there: Callable[[], object], seconds: float, command: Command | None = None) -> None:
    """Wait for something; it is a failure when it takes very long."""
    end = time.monotonic() + seconds
    while not there():
        assert time.monotonic() < end, command.text if command else "it did not come"
        time.sleep(0.01)


class Forks:
    """Starts commands from a process that has everything imported."""

    def __init__(self) -> None:
        self.server = subprocess.Popen(
            [sys.executable, "-c", SERVER], env=environment(), text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip
        assert self.server.stdout is not None
        assert self.server.stdout.readline() == "ready\n"

    def _ask(self, question: dict[str, Any]) -> Any:
        assert self.server.stdin is not None and self.server.stdout is not None
        self.server.stdin.write(json.dumps(question) + "\n")
        self.server.stdin.flush()
        return json.loads(self.server.stdout.readline())

    def start(
        self, *words: str, log: Path, pause: float = 0.0, strike: Sequence[int] = (),
        at: Sequence[Any] = (),
    ) -> Command:  # fmt: skip
        """Start `wara` with some words.

        Args:
            words: the command line.
            log: takes what it prints.
            pause: seconds that each training step takes longer.
            strike: a signal, and at which line of writing checkpoints it gets it.
            at: a function as `module:class:name`, a signal that is sent when it is first called,
                and whether to the whole process group.
        """
        mark = uuid.uuid4().hex
        job = {
            "words": words, "log": str(log), "pause": pause, "strike": strike, "at": at,
            "mark": mark,
        }  # fmt: skip
        pid = self._ask(job)
        return Command(pid, mark, log, lambda: self._ask({"pid": pid}))

    def close(self) -> None:
        """End the server."""
        assert self.server.stdin is not None
        self.server.stdin.close()
        self.server.wait()


def real(*words: str, log: Path, **options: Any) -> Command:
    """Start a command line as a user does, in a session of its own."""
    mark = uuid.uuid4().hex
    with log.open("ab") as out:
        process = subprocess.Popen(
            [sys.executable, "-m", "wara.cli", *words], env=environment(WARA_MARK=mark),
            stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT,
            start_new_session=True, **options,
        )  # fmt: skip
    return Command(process.pid, mark, log, process.poll)


def finish(forks: Forks, config: Path, out: Path, *more: str) -> None:
    """Go on with a run that was stopped or killed, or start one that left nothing."""
    words = ["train", "--cfg", str(config), "--out", str(out), *more]
    if out.is_dir():
        words.append("--resume")
    command = forks.start(*words, log=out.with_suffix(".resumed"))
    assert command.wait() == 0, command.text


def status(out: Path) -> str:
    """What the record of a run says of it; empty without a run."""
    path = out / "provenance.json"
    return str(json.loads(path.read_text())["status"]) if path.exists() else ""
