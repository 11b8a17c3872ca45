"""Several processes that train together: start them, pass signals on, bring errors back.

The processes are fresh interpreters, so this works the same from `train.py`, from `wara train` and
from a caller's own program, whose main module is not imported again. Each of them finds its rank in
the environment, as Lightning expects from an external launcher.
"""

from __future__ import annotations

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
from wara.errors import WaraError, WaraErrors
from wara.images import processors
from wara.training.signals import StopSignals

_GRACE = 15.0  # seconds for the others to end once one process has failed


def launch(code: str, payload: dict[str, Any], count: int) -> None:
    """Run Python code in `count` processes and wait for them.

    Args:
        code: what each interpreter runs; it calls `receive`.
        payload: what `receive` returns there; plain values.
        count: how many processes.

    Raises:
        WaraError: what one of the processes reported.
        Stopped: after SIGTERM or SIGINT, which the processes are given too.
        RuntimeError: when a process failed otherwise; its traceback is on stderr.
    """
    children: list[subprocess.Popen[bytes]] = []
    with tempfile.TemporaryDirectory(prefix="wara-") as folder, StopSignals() as stop:
        stop.graceful = True
        port = _free_port()
        try:
            for rank in range(count):
                line = json.dumps(payload | {"rank": rank, "errors": folder}).encode() + b"\n"
                child = subprocess.Popen(  # noqa: S603  (this very program)
                    [sys.executable, "-c", code],
                    stdin=subprocess.PIPE,
                    env=_environment(rank, count, port),
                    # Ctrl-C on a terminal reaches every process of the group; the children must
                    # get it once, from here, or it would count as the impatient second one.
                    start_new_session=True,
                )
                children.append(child)
                assert child.stdin is not None
                child.stdin.write(line)
                child.stdin.flush()
            _wait(children, stop)
        finally:
            for child in children:
                if child.poll() is None:
                    child.kill()
                child.wait()
                if child.stdin is not None:
                    child.stdin.close()
        stop.check()
        _raise_first(Path(folder), children)


def receive() -> tuple[int, dict[str, Any]]:
    """Return rank and payload in a process that `launch` started; it dies with its launcher."""
    payload: dict[str, Any] = json.loads(sys.stdin.buffer.readline())
    threading.Thread(target=_follow_parent, daemon=True).start()
    return int(payload["rank"]), payload


def report(rank: int, payload: dict[str, Any], errors: Sequence[WaraError]) -> None:
    """Tell the launcher what a process refused."""
    fields = [
        {"kind": e.kind, "what": e.what, "where": e.where, "remedy": e.remedy} for e in errors
    ]
    Path(payload["errors"], f"error-{rank}.json").write_text(json.dumps(fields))


def _wait(children: list[subprocess.Popen[bytes]], stop: StopSignals) -> None:
    passed_on = False
    deadline: float | None = None
    while any(child.poll() is None for child in children):
        if stop.requested and not passed_on:
            passed_on = True
            for child in children:
                if child.poll() is None:
                    child.send_signal(stop.requested)
        failed = any(child.poll() not in (None, 0) for child in children)
        if failed and deadline is None:
            deadline = time.monotonic() + _GRACE
        if deadline is not None and time.monotonic() > deadline:
            return
        time.sleep(0.05)


def _raise_first(folder: Path, children: list[subprocess.Popen[bytes]]) -> None:
    for file in sorted(folder.glob("error-*.json")):
        errors = [WaraError(**fields) for fields in json.loads(file.read_text())]
        raise errors[0] if len(errors) == 1 else WaraErrors(errors)
    for number, child in enumerate(children):
        if child.returncode not in (0, -signal.SIGKILL):
            raise RuntimeError(f"training process {number} ended with code {child.returncode}")
    for number, child in enumerate(children):
        if child.returncode:
            raise WaraError(
                "resources", f"training process {number} was killed", "",
                "free memory, lower batch_size, or use fewer devices",
            )  # fmt: skip


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
    # The launcher holds the other end open for as long as it lives, however it ends.
    sys.stdin.buffer.read()
    os.kill(os.getpid(), signal.SIGKILL)
