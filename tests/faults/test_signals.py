"""A stop request is exit 130 or 143, leaves a run to go on with, and no process behind."""

from __future__ import annotations

import itertools
import os
import pty
import random
import signal
import sys
import time
from pathlib import Path

import pytest
from forked import Command, Forks, finish, real, status
from training_helpers import assert_same, environment

CODES = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGHUP: 143}
CACHED = (
    "--set", "data.trunk=cache", "--set", "adapter.blocks=last_2",
    "--set", "backbone.drop_path_rate=0",
)  # fmt: skip
MOMENTS = {
    "data check": "wara.data.imageset:ImageSet:survey",
    "first epoch": "wara.training.task:FineTuning:training_step",
    "validation": "wara.training.task:FineTuning:validation_step",
    "evaluation": "wara.training.judge:evaluate_split",
    "results": "wara.runs.results:write_results",
    "cache fill": "wara.training.cache:TrunkCache:_check_room",
}
SLOW = 0.03  # seconds that a step takes longer, so that moments in training are not missed


def words(whole: Path, out: Path, *more: str) -> list[str]:
    return ["train", "--cfg", str(whole / "tiny.yaml"), "--out", str(out), *more]


def stopped(command: Command, out: Path, signum: int) -> list[str]:
    """Return what is wrong after a stop that may have come before the run had a folder."""
    code, wrong = command.wait(), command.orphans()
    if code != CODES[signal.Signals(signum)]:
        wrong.append(f"exit {code}")
    if out.exists() and status(out) not in ("interrupted", "finished", ""):
        wrong.append(f"state {status(out)}")
    if command.text.count("stopped by") != 1 or "Traceback" in command.text:
        wrong.append(f"said {command.text}")
    return wrong


@pytest.fixture(scope="module")
def cached(forks: Forks, whole: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with a trunk cache, without interruption."""
    folder = tmp_path_factory.mktemp("cached")
    more = *CACHED, "--set", f"data.cache={folder}"
    command = forks.start(*words(whole, folder / "run", *more), log=folder / "log")
    assert command.wait() == 0, command.text
    return folder / "run"


def test_at_every_stage(
    forks: Forks, whole: Path, request: pytest.FixtureRequest, tmp_path: Path, amount, tally
) -> None:
    cases = list(itertools.product(MOMENTS, CODES, (True, False), (2, 0)))
    random.Random(4).shuffle(cases)
    tries, lost = amount(1, 36), []
    for number, (moment, signum, group, workers) in enumerate(cases[:tries]):
        out, more = tmp_path / f"{number}", ["--set", f"data.workers={workers}"]
        reference = whole / "run"
        if moment == "cache fill":
            reference = request.getfixturevalue("cached")
            more += [*CACHED, "--set", f"data.cache={tmp_path / f'cache{number}'}"]
        command = forks.start(
            *words(whole, out, *more), log=tmp_path / f"log{number}",
            at=(MOMENTS[moment], signum, group),
        )  # fmt: skip
        wrong = stopped(command, out, signum)
        if moment not in ("data check", "results") and status(out) != "interrupted":
            wrong.append(f"no state: {status(out)}")
        finish(forks, whole / "tiny.yaml", out, *more)
        assert_same(reference, out)
        lost += [f"{moment}, {signum!r}, group {group}, {workers} workers: {w}" for w in wrong]
    tally("signal at a stage of a run", tries, lost)


def test_at_a_random_moment(forks: Forks, whole: Path, tmp_path: Path, amount, tally) -> None:
    tries, lost, clock = amount(1, 20), [], random.Random(1)
    for number in range(tries):
        out = tmp_path / f"{number}"
        signum, group = clock.choice(list(CODES)), clock.random() < 0.7
        workers = ("--set", f"data.workers={number % 2 * 2}")
        log = tmp_path / f"log{number}"
        command = forks.start(*words(whole, out, *workers), log=log, pause=SLOW)
        # Before the folder there is nothing to lose; see the data check above.
        command.until((out / "provenance.json").exists)
        time.sleep(clock.uniform(0, 1.5))
        command.send(signum, group=group)
        if command.poll() == 0 or (command.wait() == 0 and status(out) == "finished"):
            wrong = command.orphans()  # it was faster
        else:
            wrong = stopped(command, out, signum)
        finish(forks, whole / "tiny.yaml", out)
        assert_same(whole / "run", out)
        lost += [f"try {number}, {signum!r}: {w}" for w in wrong]
    tally("signal at a random moment", tries, lost)


def test_while_a_checkpoint_is_written(
    forks: Forks, whole: Path, tmp_path: Path, amount, tally
) -> None:
    tries, lost, dice = amount(1, 20), [], random.Random(2)
    for number in range(tries):
        out = tmp_path / f"{number}"
        strike = (signal.SIGTERM, dice.randint(1, 400))
        log = tmp_path / f"log{number}"
        command = forks.start(*words(whole, out), log=log, strike=strike)
        wrong = stopped(command, out, signal.SIGTERM)
        finish(forks, whole / "tiny.yaml", out)
        assert_same(whole / "run", out)
        lost += [f"line {strike[1]}: {w}" for w in wrong]
    tally("SIGTERM while a checkpoint is written", tries, lost)


def test_an_impatient_ctrl_c_leaves_a_run_to_go_on_with(
    forks: Forks, whole: Path, tmp_path: Path, amount, tally
) -> None:
    """Signals keep coming: while the step is waited for, and while the folder is put in order."""
    tries, lost, clock = amount(1, 10), [], random.Random(3)
    for number in range(tries):
        out = tmp_path / f"{number}"
        command = forks.start(
            *words(whole, out, "--set", "data.workers=2"), log=tmp_path / f"log{number}", pause=1.0
        )
        command.until((out / "provenance.json").exists)
        time.sleep(clock.uniform(0, 2))
        while command.poll() is None:
            command.send(signal.SIGINT, group=True)
            time.sleep(clock.uniform(0, 0.4))
        wrong = stopped(command, out, signal.SIGINT)
        finish(forks, whole / "tiny.yaml", out)
        assert_same(whole / "run", out)
        lost += [f"try {number}: {w}" for w in wrong]
    tally("signals in a row", tries, lost)


@pytest.mark.slow
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_command_as_users_start_it(
    forks: Forks, whole: Path, tmp_path: Path, signum: int, tally
) -> None:
    out = tmp_path / "run"
    command = real(
        *words(whole, out, "--set", "data.workers=2", "--set", "warmup_epochs=0",
               "--set", "epochs=3"), log=tmp_path / "log",
    )  # fmt: skip
    command.until(lambda: len(command.others()) >= 2)
    command.send(signum, group=True)
    wrong = stopped(command, out, signum)
    tally("signal to the group of a command", 1, wrong)


@pytest.mark.slow
@pytest.mark.parametrize("nohup", [False, True])
def test_a_terminal_is_closed(whole: Path, tmp_path: Path, nohup: bool, tally) -> None:
    """The kernel sends SIGHUP, and what is printed then fails; after `nohup` nothing stops."""
    out, log = tmp_path / "run", tmp_path / "log"
    pid, terminal = pty.fork()
    if not pid:
        if nohup:
            signal.signal(signal.SIGHUP, signal.SIG_IGN)
            os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT), 1)
            os.dup2(1, 2)
        line = ["-m", "wara.cli", *words(whole, out, "--set", "data.workers=2")]
        os.execve(sys.executable, [sys.executable, *line], environment())
    codes: list[int] = []

    def poll() -> int | None:
        if not codes and (found := os.waitpid(pid, os.WNOHANG))[0]:
            codes.append(os.waitstatus_to_exitcode(found[1]))
        return codes[0] if codes else None

    command = Command(pid, "none", log, poll)
    command.until((out / "provenance.json").exists)
    os.close(terminal)
    code = command.wait()
    lost = command.orphans()
    wanted = (0, "finished") if nohup else (143, "interrupted")
    if (code, status(out)) != wanted:
        lost.append(f"exit {code}, state {status(out)}")
    tally("terminal closed", 1, lost)


@pytest.mark.slow
@pytest.mark.parametrize("target", ["process", "group", "ranks", "everyone"])
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_processes_that_train_together(
    forks: Forks, whole: Path, tmp_path: Path, target: str, signum: int, tally
) -> None:
    """To the launcher, to its group, to one rank, or to every process, as control groups do."""
    out, more = tmp_path / "run", ("--set", "devices=2", "--set", "epochs=2000")
    command = forks.start(*words(whole, out, *more), log=tmp_path / "log")
    command.until((out / "metrics.csv").exists)
    if target == "everyone":
        for pid in command.family():
            os.kill(pid, signum)
    elif target == "ranks":
        os.kill(max(command.others()), signum)
    else:
        command.send(signum, group=target == "group")
    wrong = stopped(command, out, signum)
    if status(out) != "interrupted":
        wrong.append(f"state {status(out)}")
    tally("signal to processes that train together", 1, wrong)


@pytest.mark.slow
def test_together_at_random_moments(forks: Forks, whole: Path, tmp_path: Path, amount, tally):
    """Also while they start: a rank that is gone does not keep the others waiting."""
    tries, lost, clock = amount(1, 6), [], random.Random(5)
    reference, more = tmp_path / "whole", ("--set", "devices=2")
    command = forks.start(*words(whole, reference, *more), log=tmp_path / "log")
    assert command.wait() == 0, command.text
    for number in range(tries):
        out = tmp_path / f"{number}"
        command = forks.start(*words(whole, out, *more), log=tmp_path / f"log{number}")
        command.until(lambda command=command: len(command.others()) >= 2)
        time.sleep(clock.uniform(0, 12))
        command.send(signal.SIGINT, group=True)
        wrong = command.orphans() if command.wait() == 0 else stopped(command, out, signal.SIGINT)
        finish(forks, whole / "tiny.yaml", out, *more)
        assert_same(reference, out)
        lost += [f"try {number}: {w}" for w in wrong]
    tally("Ctrl-C while processes train together", tries, lost)


@pytest.mark.slow
@pytest.mark.parametrize("target", ["process", "group", "everyone"])
def test_a_comparison_with_workers(
    forks: Forks, whole: Path, tmp_path: Path, target: str, tally
) -> None:
    line = ["compare", "--cfg", str(whole / "tiny.yaml"), "--methods", "lora,wara", "--seeds", "2",
            "--beside", "none", "--jobs", "2", "--out", str(tmp_path / "out")]  # fmt: skip
    command = forks.start(*line, log=tmp_path / "log")
    command.until(lambda: list(tmp_path.glob("out/cells/*/provenance.json")))
    if target == "everyone":
        for pid in command.family():
            os.kill(pid, signal.SIGTERM)
    else:
        command.send(signal.SIGTERM, group=target == "group")
    code, lost = command.wait(), command.orphans()
    if code != 143 or "Traceback" in command.text:
        lost.append(f"exit {code}: {command.text}")
    again = forks.start(*line, log=tmp_path / "again")
    if again.wait() or not (tmp_path / "out" / "table.csv").exists():
        lost.append(f"cannot be continued: {again.text}")
    tally("signal to a comparison with workers", 1, lost)


VERBS = {
    "predict": "wara.deploy.predictor:Predictor:run",
    "evaluate": "wara.deploy.evaluate:evaluate",
    "export": "wara.storage:temp_name",
}


@pytest.mark.slow
@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_verbs_leave_nothing_half_done(
    forks: Forks, whole: Path, bundle: Path, tmp_path: Path, verb: str, signum: int, tally
) -> None:
    out = tmp_path / "out"
    data = str(whole / "data")
    line = {
        "predict": ["predict", str(bundle), data, "--out", str(out)],
        "evaluate": ["evaluate", str(bundle), "--data", data, "--out", str(out)],
        "export": ["export", str(whole / "run"), "--out", str(out)],
    }[verb]
    command = forks.start(*line, log=tmp_path / "log", at=(VERBS[verb], signum, True))
    code, lost = command.wait(), command.orphans()
    if code != CODES[signal.Signals(signum)] or "Traceback" in command.text:
        lost.append(f"exit {code}: {command.text}")
    left = {path.name for path in tmp_path.iterdir()} - {"log"}
    if left - ({".out.part"} if verb == "predict" else set()):  # rows that --resume goes on with
        lost.append(f"left {left}")
    again = forks.start(*line, log=tmp_path / "again")
    if again.wait():
        lost.append(f"again: {again.text}")
    tally("signal to another verb", 1, lost)
