"""What a signal does, and when."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time

import pytest

from wara.errors import PEER_LOST, WaraError, as_refusal
from wara.signals import Stopped, StopSignals
from wara.training.processes import launch


@pytest.mark.parametrize(
    ("signum", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 143)]
)
def test_a_signal_outside_training_stops_at_once(signum: int, code: int) -> None:
    outside = signal.signal(signum, signal.SIG_DFL)  # these tests may run under nohup
    before = signal.getsignal(signum)
    with pytest.raises(Stopped) as caught, StopSignals():
        os.kill(os.getpid(), signum)
        time.sleep(5)
    assert caught.value.code == code
    assert signal.getsignal(signum) is before
    signal.signal(signum, outside)


def send(signum: int, at: float, clock: list[float]) -> None:
    clock[0] = at
    os.kill(os.getpid(), signum)
    time.sleep(0.01)  # a handler runs between two lines


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [100.0]
    monkeypatch.setattr("wara.signals.time.monotonic", lambda: now[0])
    return now


def test_during_training_the_first_waits_and_the_second_does_not(clock: list[float]) -> None:
    with StopSignals() as stop:
        stop.graceful = True
        send(signal.SIGINT, 100.0, clock)
        assert stop.requested == signal.SIGINT
        send(signal.SIGTERM, 100.4, clock)  # `timeout` signals its child, then the group
        with pytest.raises(Stopped) as caught:
            send(signal.SIGTERM, 100.6, clock)
        assert caught.value.code == 130  # what came first


def test_the_folder_is_put_in_order_undisturbed(clock: list[float]) -> None:
    with StopSignals() as stop:
        with pytest.raises(Stopped):
            send(signal.SIGTERM, 100.0, clock)
        for at in (100.7, 105.0, 109.9):
            send(signal.SIGINT, at, clock)
        with pytest.raises(Stopped):  # where the first was swallowed, or something hangs
            send(signal.SIGINT, 110.1, clock)
        assert stop.requested == signal.SIGTERM


def test_what_surrounds_a_stopped_run_is_as_quiet(clock: list[float]) -> None:
    with StopSignals():
        with pytest.raises(Stopped), StopSignals():
            send(signal.SIGTERM, 100.0, clock)
        send(signal.SIGTERM, 105.0, clock)
        with pytest.raises(Stopped):
            send(signal.SIGTERM, 110.1, clock)


def test_one_who_waits_for_others_is_told_how_often(clock: list[float]) -> None:
    with StopSignals() as stop:
        stop.patient = True
        for at in (100.0, 100.1, 101.0):
            send(signal.SIGTERM, at, clock)
        assert stop.times == 2
        with pytest.raises(Stopped):
            stop.check()


def test_nohup_is_respected() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopSignals() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            time.sleep(0.01)
            assert not stop.requested and signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_stop_outranks_what_dies_of_it_but_no_refusal() -> None:
    stop = StopSignals()
    with pytest.raises(ZeroDivisionError), stop.outranking():
        raise ZeroDivisionError
    stop.requested = signal.SIGTERM
    with pytest.raises(Stopped) as caught, stop.outranking():
        raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Terminated.")
    assert caught.value.code == 143
    with pytest.raises(WaraError, match="full"), stop.outranking():
        raise WaraError("storage", "the disk is full")


@pytest.fixture
def plain_hook(monkeypatch: pytest.MonkeyPatch) -> None:
    """What Python swallows is printed, as outside of pytest."""
    monkeypatch.setattr(sys, "unraisablehook", sys.__unraisablehook__)


def test_a_stop_that_python_swallows_comes_a_moment_later(
    capsys: pytest.CaptureFixture[str], plain_hook: None
) -> None:
    """Whatever a destructor or a hook of a fork raises is printed and dropped."""
    class Struck:
        def __del__(self) -> None:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.01)

    with pytest.raises(Stopped) as caught, StopSignals() as stop:
        Struck()
        assert stop.requested == signal.SIGTERM
        threading.Event().wait()  # what waits is interrupted
    assert caught.value.code == 143 and not capsys.readouterr().err
    assert sys.unraisablehook is sys.__unraisablehook__
    with pytest.raises(Stopped), StopSignals():
        with StopSignals():  # which ends before the moment is over
            Struck()
        pytest.fail("the stop was lost")
    assert not capsys.readouterr().err


def test_what_else_python_swallows_is_told_as_before(
    capsys: pytest.CaptureFixture[str], plain_hook: None
) -> None:
    class Broken:
        def __del__(self) -> None:
            raise ZeroDivisionError

    with StopSignals():
        Broken()
    assert "ZeroDivisionError" in capsys.readouterr().err
    with StopSignals():  # as the command has it, until its process is gone
        with pytest.raises(Stopped), StopSignals():
            signal.raise_signal(signal.SIGTERM)
        Broken()
    assert not capsys.readouterr().err


LATE = "import os, signal; signal.signal(15, signal.SIG_IGN); os.kill(os.getppid(), 15); "


def test_a_signal_does_not_undo_what_processes_have_finished() -> None:
    launch(LATE, {}, 1)
    with pytest.raises(Stopped):
        launch(LATE + "os._exit(143)", {}, 1)


@pytest.mark.parametrize(
    "text",
    [
        "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:589] Connection closed by peer",
        "Application timeout caused pair closure",
        "Timed out waiting 60000ms for recv operation to complete",
    ],
)
def test_what_the_others_say_of_a_process_that_hangs(text: str) -> None:
    refusal = as_refusal(RuntimeError(text))
    assert refusal.exit_code == 7 and refusal.what == PEER_LOST
