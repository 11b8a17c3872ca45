"""Several processes that train together: start them, pass signals on, bring errors back.

One that fails, is killed or hangs ends all of them.

The processes are fresh interpreters, so this works the same from `train.py`, from `wara train` and
from a caller's own program, whose main module is not imported again. Each of them finds its rank in
the environment, as Lightning expects from an external launcher.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import wara
from wara.data.workers import end_with
from wara.errors import PEER_LOST, WaraError, WaraErrors
from wara.images import processors
from wara.signals import HEEDED, Stopped, StopSignals

_GRACE = 15.0  # seconds for the others to end once one process has failed, or a stop is urgent
# Until the run heeds it, which is seconds after the start, Ctrl-C would print a traceback.
QUIET_START = "import signal; signal.signal(signal.SIGINT, signal.SIG_DFL); "


def launch(code: str, payload: dict[str, Any], count: int) -> None:
    """Run Python code in `count` processes and wait for them.

    Args:
        code: what each interpreter runs; it calls `receive`.
        payload: what `receive` returns there; plain values.
        count: how many processes.

    Raises:
        WaraError: what one of the processes reported; kind "resources" when one was killed, or
            the others waited for it in vain.
        Stopped: after SIGTERM, SIGINT or SIGHUP, which the processes are given too.
        RuntimeError: when a process failed otherwise; its traceback is on stderr.
    """
    children: list[subprocess.Popen[bytes]] = []
    ended: dict[int, int] = {}
    with tempfile.TemporaryDirectory(prefix="wara-") as folder, StopSignals() as stop:
        stop.patient = True
        port = _free_port()
        try:
            for rank in range(count):
                line = json.dumps(payload | {"rank": rank, "errors": folder}).encode() + b"\n"
                child = subprocess.Popen(  # noqa: S603  (this very program)
                    [sys.executable, "-c", QUIET_START + code],
                    stdin=subprocess.PIPE,
                    env=_environment(rank, count, port),
                    # Ctrl-C on a terminal reaches every process of the group; the children must
                    # get it once, from here, or it would count as the impatient second one.
                    start_new_session=True,
                )
                children.append(child)
                assert child.stdin is not None
                with contextlib.suppress(BrokenPipeError):  # it is dead, which `_wait` finds
                    child.stdin.write(line)
                    child.stdin.flush()
            ended = _wait(children, stop)
        finally:
            for child in children:
                if child.poll() is None:
                    child.kill()
                child.wait()
                if child.stdin is not None:
                    with contextlib.suppress(BrokenPipeError):
                        child.stdin.close()
        if len(ended) < count or any(ended.values()):  # else a signal came too late
            stop.check()
        _raise_first(Path(folder), count, ended)


def receive() -> tuple[int, dict[str, Any]]:
    """Return rank and payload in a process that `launch` started; it dies with its launcher."""
    end_with(os.getppid())  # the thread below does not run while the process is stopped
    payload: dict[str, Any] = json.loads(sys.stdin.buffer.readline())
    threading.Thread(target=_follow_parent, daemon=True).start()
    return int(payload["rank"]), payload


def report(rank: int, payload: dict[str, Any], errors: Sequence[WaraError]) -> None:
    """Tell the launcher what a process refused."""
    fields = [
        {"kind": e.kind, "what": e.what, "where": e.where, "remedy": e.remedy} for e in errors
    ]
    Path(payload["errors"], f"error-{rank}.json").write_text(json.dumps(fields))


def report_bug(rank: int, payload: dict[str, Any], trace: str) -> None:
    """Leave a traceback with the launcher, which knows whether it is worth showing."""
    Path(payload["errors"], f"trace-{rank}.txt").write_text(trace, errors="backslashreplace")


def _wait(children: Sequence[subprocess.Popen[bytes]], stop: StopSignals) -> dict[int, int]:
    """Wait for the processes; return the code of each one that ended by itself."""
    passed_on = 0
    deadline: float | None = None
    while any(child.poll() is None for child in children):
        if stop.times > passed_on:
            passed_on = stop.times
            for child in children:
                if child.poll() is None:
                    child.send_signal(stop.requested)
        failed = any(child.poll() not in (None, 0) for child in children)
        if (failed or passed_on > 1) and deadline is None:
            deadline = time.monotonic() + _GRACE
        if deadline is not None and time.monotonic() > deadline:
            break
        time.sleep(0.05)
    codes = {rank: child.poll() for rank, child in enumerate(children)}
    return {rank: code for rank, code in codes.items() if code is not None}


def _raise_first(folder: Path, count: int, ended: dict[int, int]) -> None:
    """Raise what began the end, if the processes did not all succeed.

    What a process tells of the loss of another one says least, and is asked last.
    """
    lost = False
    for file in sorted(folder.glob("error-*.json")):
        errors = [WaraError(**fields) for fields in json.loads(file.read_text())]
        if errors[0].what == PEER_LOST:
            lost = True
            continue
        raise errors[0] if len(errors) == 1 else WaraErrors(errors)
    for code in ended.values():
        for signum in HEEDED:
            if code in (-signum, Stopped(signum).code):
                raise Stopped(signum)
    for rank, code in ended.items():
        if code in (-signal.SIGKILL, -signal.SIGBUS):
            raise WaraError(
                "resources", f"training process {rank} was killed", "devices",
                "free memory, lower batch_size, or use fewer devices; then go on with --resume",
            )  # fmt: skip
    for rank, code in ended.items():
        trace = folder / f"trace-{rank}.txt"
        if trace.exists():
            print(trace.read_text(), end="", file=sys.stderr, flush=True)
        if trace.exists() or code < 0:
            raise RuntimeError(f"training process {rank} ended with code {code}")
    if lost or len(ended) < count:
        hung = sorted(set(range(count)) - set(ended))
        who = f"training process {hung[0]} does" if hung else "training processes do"
        raise WaraError(
            "resources", f"{who} not answer any more", "ddp_timeout",
            "see that nothing stops or starves it, or raise it; then go on with --resume",
        )  # fmt: skip
    for rank, code in ended.items():
        if code:
            raise RuntimeError(f"training process {rank} ended with code {code}")


def interpreter_environment(threads: int) -> dict[str, str]:
    """Return the environment of another interpreter that finds this package.

    Args:
        threads: that torch may use there, unless the user has set a number.
    """
    environment = dict(os.environ)
    package = str(Path(wara.__file__).resolve().parents[1])
    paths = [package, *filter(None, [environment.get("PYTHONPATH")])]
    environment["PYTHONPATH"] = os.pathsep.join(paths)
    environment.setdefault("OMP_NUM_THREADS", str(threads))
    return environment


def _environment(number: int, processes: int, port: int) -> dict[str, str]:
    environment = interpreter_environment(max(1, processors() // processes))
    environment.update(
        {
            "LOCAL_RANK": str(number),
            "NODE_RANK": "0",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
    )
    if sys.platform == "linux":
        # Without it, gloo looks the host name up, which fails on machines that cannot resolve it.
        environment.setdefault("GLOO_SOCKET_IFNAME", "lo")
    return environment


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _follow_parent() -> None:
    # The launcher holds the other end open for as long as it lives, however it ends. Not through
    # `sys.stdin`, whose lock a data worker would find taken for ever when it is forked.
    while os.read(0, 4096):
        pass
    os.kill(os.getpid(), signal.SIGKILL)
