"""Several processes that train together: start them, pass signals on, bring errors back.

The processes are fresh interpreters that call `child`, so this works the same
from `train.py`, from `wara train` and from a caller's own program, whose main module is not
imported again. Each of them then finds its rank in the environment, as Lightning expects from an
external launcher.
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
import traceback
from pathlib import Path
from typing import Any

from wara.config import RunConfig
from wara.errors import WaraError, WaraErrors
from wara.training.signals import StopSignals

_RANK = "WARA_RANK"
_GRACE = 15.0  # seconds for the others to end once one process has failed


def rank() -> int | None:
    """Rank of this process when it was started here, else None."""
    value = os.environ.get(_RANK)
    return None if value is None else int(value)


def launch(config: RunConfig, *, resume: bool, overwrite: bool, quiet: bool) -> None:
    """Run the config in `config.devices` processes and wait for them.

    Raises:
        WaraError: what one of the processes refused.
        Stopped: after SIGTERM or SIGINT, which the processes are given too.
        RuntimeError: when a process failed otherwise; its traceback is on stderr.
    """
    payload = {
        "config": json.loads(config.model_dump_json()),
        "resume": resume,
        "overwrite": overwrite,
        "quiet": quiet,
        "argv": sys.argv,
    }
    children: list[subprocess.Popen[bytes]] = []
    with tempfile.TemporaryDirectory(prefix="wara-") as folder, StopSignals() as stop:
        stop.graceful = True
        payload["errors"] = folder
        line = json.dumps(payload).encode() + b"\n"
        port = _free_port()
        try:
            for number in range(config.devices):
                child = subprocess.Popen(
                    [sys.executable, "-c", "from wara.training.launch import child; child()"],
                    stdin=subprocess.PIPE,
                    env=_environment(number, config.devices, port),
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


def _environment(number: int, processes: int, port: int) -> dict[str, str]:
    environment = dict(os.environ)
    package = str(Path(__file__).resolve().parents[2])
    paths = [package, *filter(None, [environment.get("PYTHONPATH")])]
    environment.update(
        {
            _RANK: str(number),
            "LOCAL_RANK": str(number),
            "NODE_RANK": "0",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "PYTHONPATH": os.pathsep.join(paths),
        }
    )
    environment.setdefault("OMP_NUM_THREADS", str(max(1, cores() // processes)))
    if sys.platform == "linux":
        # Without it, gloo looks the host name up, which fails on machines that cannot resolve it.
        environment.setdefault("GLOO_SOCKET_IFNAME", "lo")
    return environment


def cores() -> int:
    """CPU cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _follow_parent() -> None:
    # The launcher holds the other end open for as long as it lives, however it ends.
    sys.stdin.buffer.read()
    os.kill(os.getpid(), signal.SIGKILL)


def main() -> int:
    """Be one of the processes."""
    payload: dict[str, Any] = json.loads(sys.stdin.buffer.readline())
    threading.Thread(target=_follow_parent, daemon=True).start()
    sys.argv = payload["argv"]
    from wara.training.run import run

    try:
        run(
            RunConfig.model_validate_json(json.dumps(payload["config"])),
            resume=payload["resume"],
            overwrite=payload["overwrite"],
            quiet=payload["quiet"],
        )
    except WaraError as error:
        parts = error.errors if isinstance(error, WaraErrors) else (error,)
        fields = [
            {"kind": e.kind, "what": e.what, "where": e.where, "remedy": e.remedy} for e in parts
        ]
        Path(payload["errors"], f"error-{rank()}.json").write_text(json.dumps(fields))
        return error.exit_code
    except Exception as error:
        # A process that loses its peers fails too; only the first fault is worth showing.
        if rank() == 0 or "Connection closed by peer" not in str(error):
            traceback.print_exc()
        return 1
    return 0


def child() -> None:
    """Be one of the processes, and end with its exit code.

    Interpreter shutdown is skipped: the watching thread still blocks on stdin, and a process group
    whose peers are gone may hang in its destructor.
    """
    code = 1
    try:
        code = main()
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
