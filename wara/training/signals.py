"""SIGTERM and SIGINT: finish the current step, stop, leave with 143 or 130."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any


class Stopped(SystemExit):
    """The run was asked to stop by a signal; a process that lets it pass exits 143 or 130."""

    def __init__(self, signum: int) -> None:
        super().__init__(128 + signum)
        self.signum = signum

    @property
    def signal_name(self) -> str:
        """`SIGTERM` or `SIGINT`."""
        return signal.Signals(self.signum).name


class StopSignals:
    """Context that turns SIGTERM and SIGINT into an orderly stop.

    Outside of training steps the first signal raises `Stopped` where the program stands: all files
    are written under a temporary name and renamed, so nothing is left half-written. During
    training (`graceful = True`) the first signal only sets `requested`; the training loop raises
    `Stopped` once the current step is done. A second signal never waits.

    Outside the main thread, where Python does not allow handlers, the context does nothing.
    """

    def __init__(self) -> None:
        self.graceful = False
        self.requested = 0
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            for signum in (signal.SIGTERM, signal.SIGINT):
                self._previous[signum] = signal.getsignal(signum)
            self.install()
        return self

    def __exit__(self, *_: object) -> None:
        for signum, handler in self._previous.items():
            signal.signal(signum, signal.SIG_DFL if handler is None else handler)
        self._previous.clear()

    def install(self) -> None:
        """Put the handlers in place, again if need be.

        Lightning registers its own SIGTERM handler when fitting starts; that one ends the process
        with exit code 0 and talks to other ranks from inside a signal handler. Training calls
        this once Lightning is done.
        """
        for signum in self._previous:
            signal.signal(signum, self._handle)

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        again = bool(self.requested)
        self.requested = signum
        if again or not self.graceful:
            raise Stopped(signum)

    def check(self) -> None:
        """Raise `Stopped` when a stop was requested."""
        if self.requested:
            raise Stopped(self.requested)
