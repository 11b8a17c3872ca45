"""A kill that cannot be heeded: what is on the disk is enough to end where nothing happened."""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path

import pytest
from forked import Command, Forks, finish, real, status
from training_helpers import assert_same

from wara.training.checkpoint import load_checkpoint

SLOW = 0.03  # seconds that a step takes longer, so that moments in training are not missed


def start(forks: Forks, whole: Path, out: Path, *more: str, **options) -> Command:
    words = ["train", "--cfg", str(whole / "tiny.yaml"), "--out", str(out), *more]
    return forks.start(*words, log=out.with_suffix(".log"), **options)


def test_at_a_random_moment(forks: Forks, whole: Path, tmp_path: Path, amount, tally) -> None:
    tries, lost, clock = amount(1, 20), [], random.Random(1)
    for number in range(tries):
        out, more = tmp_path / f"{number}", ("--set", f"data.workers={number % 2 * 2}")
        command = start(forks, whole, out, *more, pause=SLOW)
        command.until(out.exists)
        time.sleep(clock.uniform(0, 2))
        command.send(signal.SIGKILL)
        command.wait()
        lost += [f"try {number}: {text}" for text in command.orphans()]
        finish(forks, whole / "tiny.yaml", out)
        assert_same(whole / "run", out)
        lost += [f"try {number}: {path} is left" for path in out.rglob(".*")]
    tally("kill at a random moment", tries, lost)


def test_while_a_checkpoint_is_written(
    forks: Forks, whole: Path, tmp_path: Path, amount, tally
) -> None:
    tries, lost, dice = amount(1, 24), [], random.Random(2)
    for number in range(tries):
        out = tmp_path / f"{number}"
        line = dice.randint(1, 400)
        code = start(forks, whole, out, strike=(signal.SIGKILL, line)).wait()
        if code != -signal.SIGKILL:
            lost.append(f"line {line}: it was not killed, exit {code}")
        for path in out.glob("checkpoints/*.ckpt"):
            load_checkpoint(path)
        finish(forks, whole / "tiny.yaml", out)
        assert_same(whole / "run", out)
        lost += [f"line {line}: {path} is left" for path in out.rglob(".*")]
    tally("kill while a checkpoint is written", tries, lost)


def test_a_data_worker(forks: Forks, whole: Path, tmp_path: Path, amount, tally) -> None:
    """Killed, it ends the run with a remedy; stopped and let go on, it changes nothing."""
    tries, lost, clock = amount(1, 6), [], random.Random(3)
    for number in range(tries):
        out, more = tmp_path / f"{number}", ("--set", "data.workers=2")
        command = start(forks, whole, out, *more, pause=0.2)
        command.until((out / "metrics.csv").exists).until(command.others)
        worker = max(command.others())
        os.kill(worker, signal.SIGSTOP)
        time.sleep(clock.uniform(0, 1))
        if number % 2:
            os.kill(worker, signal.SIGCONT)
            if command.wait():
                lost.append(f"try {number}: stopped and let go on: {command.text}")
        else:
            os.kill(worker, signal.SIGKILL)
            code = command.wait()
            if code != 7 or "lower data.workers" not in command.text:
                lost.append(f"try {number}: exit {code}: {command.text}")
            finish(forks, whole / "tiny.yaml", out)
        lost += [f"try {number}: {text}" for text in command.orphans()]
        assert_same(whole / "run", out)
    tally("kill or halt of a data worker", tries, lost)


def test_a_stopped_worker_does_not_outlive_its_run(
    forks: Forks, whole: Path, tmp_path: Path, tally
) -> None:
    command = start(forks, whole, tmp_path / "run", "--set", "data.workers=2", pause=0.2)
    command.until((tmp_path / "run" / "metrics.csv").exists)
    for pid in command.others():
        os.kill(pid, signal.SIGSTOP)
    command.send(signal.SIGKILL)
    command.wait()
    tally("kill of a run whose workers are halted", 1, command.orphans())


@pytest.mark.slow
@pytest.mark.parametrize("attempt", range(2))
def test_a_command_as_users_start_it(
    forks: Forks, whole: Path, tmp_path: Path, attempt: int, tally
) -> None:
    out, config = tmp_path / "run", str(whole / "tiny.yaml")
    words = "train", "--cfg", config, "--out", str(out), "--set", f"data.workers={2 * attempt}"
    command = real(*words, log=tmp_path / "log").until(out.exists)
    time.sleep(random.Random(attempt).uniform(0, 6))
    command.send(signal.SIGKILL)
    command.wait()
    lost = command.orphans()
    again = real(*words, "--resume", log=tmp_path / "again")
    if again.wait():
        lost.append(again.text)
    assert_same(whole / "run", out)
    tally("kill of a command", 1, lost)


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_one_of_the_processes_that_train_together(
    forks: Forks, whole: Path, tmp_path: Path, rank: int, how: int, tally
) -> None:
    """One that is killed or halted ends the run, with exit 7 and a remedy."""
    out = tmp_path / "run"
    # Long enough for processes that start apart on a busy machine.
    more = "devices=2", "ddp_timeout=60", "epochs=2000", "data.workers=1"
    words = [word for setting in more for word in ("--set", setting)]
    command = start(forks, whole, out, *words).until((out / "metrics.csv").exists)
    os.kill(rank_of(command, rank), how)
    code, lost = command.wait(), command.orphans()
    told = "was killed" if how == signal.SIGKILL else "does not answer"
    said = command.text.splitlines()[-1]
    if code != 7 or f"training process {rank} {told}" not in said or "Traceback" in command.text:
        lost.append(f"exit {code}: {command.text}")
    if status(out) != "failed":
        lost.append(f"state {status(out)}")
    tally("kill or halt of one of two processes", 1, lost)


def rank_of(command: Command, rank: int) -> int:
    """Return the process id of a rank."""
    for pid in command.others():
        variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        parent = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
        if f"LOCAL_RANK={rank}".encode() in variables and parent == command.pid:
            return pid
    raise AssertionError(f"no rank {rank}")


@pytest.mark.slow
@pytest.mark.parametrize("halted", [False, True])
def test_the_launcher_of_processes(
    forks: Forks, whole: Path, tmp_path: Path, halted: bool, tally
) -> None:
    out = tmp_path / "run"
    more = "devices=2", "epochs=2000", "data.workers=1"
    words = [word for setting in more for word in ("--set", setting)]
    command = start(forks, whole, out, *words).until((out / "metrics.csv").exists)
    if halted:
        os.kill(rank_of(command, 1), signal.SIGSTOP)
    command.send(signal.SIGKILL)
    command.wait()
    tally("kill of what started two processes", 1, command.orphans())
