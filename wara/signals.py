"""SIGTERM, SIGINT and SIGHUP: finish the current step, stop, leave with 143 or 130."""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
import time
from collections.abc import Iterator
from types import FrameType
from typing import Any, NoReturn

from wara.errors import WaraError

HEEDED = tuple(
    getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGHUP") if hasattr(signal, name)
)
_SAME = 0.5  # seconds; `timeout` and control groups signal a process twice, and mean it once
_SWALLOWED = 0.02  # seconds after which a stop that was swallowed is asked for again
_LEAVING = 10.0  # seconds in which files are put in order, undisturbed


class Stopped(SystemExit):
    """The run was asked to stop by a signal; a process that lets it pass exits 143 or 130.

    Args:
        signum: of the signal.
    """

    def __init__(self, signum: int) -> None:
        self.code: int
        super().__init__(128 + (signum if signum == signal.SIGINT else signal.SIGTERM))
        self.signum = signum
        self.told = False

    @property
    def signal_name(self) -> str:
        """`SIGTERM`, `SIGINT` or `SIGHUP`."""
        return signal.Signals(self.signum).name


class StopSignals:
    """Context that turns SIGTERM, SIGINT and SIGHUP into an orderly stop.

    Outside of training steps the first signal raises `Stopped` where the program stands: all files
    are written under a temporary name and renamed, so nothing is left half-written. During
    training (`graceful = True`) the first signal only sets `requested`; the training loop raises
    `Stopped` once the current step is done. A second one never waits, if it comes half a second
    later or more. Once `Stopped` was raised, signals are ignored for ten seconds, so that the
    folder is left in order. With `patient = True` nothing is raised, and `times` is looked at.
    Where Python swallows what is raised (in a destructor, around a fork), the stop comes a moment
    later; what else is swallowed after a stop is not printed.

    SIGHUP stays ignored where it was (`nohup`). Outside the main thread, where Python does not
    allow handlers, the context does nothing.
    """

    def __init__(self) -> None:
        self.graceful = self.patient = False
        self.requested = self.times = 0
        self._noted = self._left = float("-inf")
        self._previous: dict[int, Any] = {}
        self._hook = sys.unraisablehook
        self._swallowed_signal = 0

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            for signum in HEEDED:
                found = signal.getsignal(signum)
                if signum in (signal.SIGTERM, signal.SIGINT) or found != signal.SIG_IGN:
                    self._previous[signum] = found
                    signal.signal(signum, self._handle)
            self._hook, sys.unraisablehook = sys.unraisablehook, self._swallowed
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        pending, self._swallowed_signal = self._swallowed_signal, 0
        for signum, handler in self._previous.items():
            outer = getattr(handler, "__self__", None)
            if isinstance(outer, StopSignals):  # a stop goes on where this context ends
                outer._noted, outer._left = self._noted, self._left
            signal.signal(signum, signal.SIG_DFL if handler is None else handler)
        if self._previous:
            sys.unraisablehook = self._hook
        self._previous.clear()
        if pending and kind is None:
            raise Stopped(pending)

    def _swallowed(self, found: sys.UnraisableHookArgs) -> None:
        if not isinstance(found.exc_value, Stopped):
            if self._left == float("-inf"):  # what a stop left half-made complains as it goes
                self._hook(found)
            return
        self._swallowed_signal = found.exc_value.signum
        self._noted = self._left = float("-inf")

        def again() -> None:
            # To the main thread, so that what it waits in is interrupted.
            main = threading.main_thread().ident
            if self._swallowed_signal and main is not None:
                signal.pthread_kill(main, self._swallowed_signal)

        timer = threading.Timer(_SWALLOWED, again)
        timer.daemon = True
        timer.start()

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if now - self._noted < _SAME or now - self._left < _LEAVING:
            return
        self._noted = now
        self.times += 1
        self.requested = self.requested or signum
        if not (self.patient or (self.graceful and self.times == 1)):
            self.leave(self.requested)

    def leave(self, signum: int) -> NoReturn:
        """Raise `Stopped`.

        Args:
            signum: of the signal, which another process may have got.
        """
        self.requested = signum
        self._left = time.monotonic()
        self._swallowed_signal = 0
        raise Stopped(signum)

    def ignore(self) -> None:
        """Ignore signals from now on, also while the interpreter ends and resets its handlers."""
        for signum in self._previous:
            signal.signal(signum, signal.SIG_IGN)

    def check(self) -> None:
        """Raise `Stopped` when a stop was requested."""
        if self.requested:
            self.leave(self.requested)

    @contextlib.contextmanager
    def outranking(self) -> Iterator[None]:
        """Let a stop that was requested take the place of a failure that is no refusal.

        What a signal to a whole group takes away (a process that trains with this one) fails here
        as well, and is not the reason to tell.
        """
        try:
            yield
        except WaraError:
            raise
        except Exception:
            self.check()
            raise
