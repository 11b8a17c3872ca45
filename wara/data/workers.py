"""Processes that load images: signals are for who started them, and they end with it."""

from __future__ import annotations

import functools
import os
import signal
import sys
from multiprocessing.context import ForkContext, ForkProcess
from multiprocessing.popen_fork import Popen
from multiprocessing.process import BaseProcess
from typing import Any, ClassVar

_LEFT_TO_PARENT = ("SIGINT", "SIGTERM", "SIGHUP")
_PR_SET_PDEATHSIG = 1


def worker_options(count: int) -> dict[str, Any]:
    """Return the arguments of a `DataLoader` that decide how its worker processes live and end.

    A signal to a whole process group (Ctrl-C, `timeout`, a scheduler) reaches workers as well. They
    ignore it: whether and when a run stops is decided by the process that trains, which then ends
    them. When it cannot, because it was killed, the kernel does.

    Args:
        count: of workers.
    """
    if not count:
        return {"num_workers": 0}
    return {
        "num_workers": count,
        "worker_init_fn": functools.partial(_begin, os.getpid()),
        "multiprocessing_context": _Context() if sys.platform == "linux" else None,
    }


def end_with(parent: int) -> None:
    """Let the kernel kill this process when its parent is gone, also while it is stopped (Linux).

    Counted from the thread that started it, which must outlive its use.

    Args:
        parent: process id of the parent.
    """
    if sys.platform != "linux":
        return
    import ctypes

    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # it was gone before the kernel was asked
        os.kill(os.getpid(), signal.SIGKILL)


def _begin(parent: int, _: int) -> None:
    for name in _LEFT_TO_PARENT:
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    end_with(parent)
    # OpenCV, when it is loaded, keeps to one thread: workers are many already.
    cv2 = sys.modules.get("cv2")
    if cv2 is not None:
        cv2.setNumThreads(0)


class _Handle(Popen):
    def terminate(self) -> None:
        # At the end of the interpreter, where a worker that hangs or is stopped would be asked by
        # the very signal that it ignores, and then be waited for.
        self.kill()


class _Process(ForkProcess):
    @staticmethod
    def _Popen(process_obj: BaseProcess) -> Popen:
        return _Handle(process_obj)


class _Context(ForkContext):
    # Forked, so that workers share the images that are kept in memory.
    Process: ClassVar[Any] = _Process
