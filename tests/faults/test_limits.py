"""A disk that is full, memory that is not there: one line, and the run goes on with room."""

from __future__ import annotations

import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from training_helpers import assert_same, environment

from wara.storage import read_json

pytestmark = pytest.mark.slow


def command(whole: Path, out: Path, *more: str) -> list[str]:
    words = ["train", "--cfg", str(whole / "tiny.yaml"), "--out", str(out), "--quiet", *more]
    return [sys.executable, "-m", "wara.cli", *words]


def fails_in_one_line(code: int, said: str, wanted: int, kind: str) -> bool:
    lines = [line for line in said.splitlines() if line.startswith("error[")]
    return code == wanted and len(lines) == 1 and kind in lines[0] and "Traceback" not in said


def may_mount() -> bool:
    """Whether a file system of its own may be made here."""
    words = ["unshare", "--mount", "mount", "-t", "tmpfs", "none", "/mnt"]
    return shutil.which("unshare") is not None and not subprocess.run(
        words, capture_output=True
    ).returncode


# Mounts are those of this process alone. The first run gets little room, the second enough.
ON_A_SMALL_DISK = """
mount -t tmpfs -o size=$1k none $2 || exit 99
shift; disk=$1; copy=$2; shift; shift
"$@"
echo "first: $?"
mount -o remount,size=256m $disk
"$@" --resume
echo "second: $?"
cp -r $disk/run $copy
"""


@pytest.mark.skipif(not may_mount(), reason="no file system may be mounted here")
def test_a_run_on_a_full_disk_goes_on_once_there_is_room(
    whole: Path, tmp_path: Path, amount: Callable[[int, int], int], tally: Callable[..., None]
) -> None:
    size = sum(path.stat().st_size for path in (whole / "run").rglob("*") if path.is_file()) // 1024
    draw, lost, tries = random.Random(2), [], amount(2, 10)
    for number in range(tries):
        disk, copy = tmp_path / f"disk{number}", tmp_path / f"run{number}"
        disk.mkdir()
        room = draw.randint(20, size)
        done = subprocess.run(
            ["unshare", "--mount", "bash", "-c", ON_A_SMALL_DISK, "bash", str(room), str(disk),
             str(copy), *command(whole, disk / "run")],
            capture_output=True, text=True, env=environment(), timeout=300,
        )  # fmt: skip
        said, _, rest = done.stdout.partition("first: ")
        first, second = int(rest.split()[0]), int(rest.rpartition("second: ")[2].split()[0])
        told = done.stderr
        if not (first == 0 or fails_in_one_line(first, told, 5, "error[storage]")) or second:
            lost.append(f"{room} kB: {first}, then {second}: {said} {told}")
        else:
            assert_same(whole / "run", copy)
    tally("training on a disk that is full", tries, lost)


@pytest.mark.skipif(shutil.which("prlimit") is None, reason="no prlimit here")
def test_memory_that_is_not_there_is_told_as_such(
    whole: Path, tmp_path: Path, amount: Callable[[int, int], int], tally: Callable[..., None]
) -> None:
    draw, lost, tries = random.Random(3), [], amount(3, 12)
    for number in range(tries):
        # Below the first not even Python's own modules load, above the last there is enough.
        limit, out = draw.randint(1_200, 6_000) * 10**6, tmp_path / f"run{number}"
        done = subprocess.run(
            ["prlimit", f"--as={limit}", *command(whole, out)],
            capture_output=True, text=True, timeout=300,
            env=environment(OPENBLAS_NUM_THREADS="1"),
        )  # fmt: skip
        if done.returncode == 0:
            assert_same(whole / "run", out)
        elif not fails_in_one_line(done.returncode, done.stderr, 7, "error[resources]"):
            lost.append(f"{limit / 1e9:.1f} GB: {done.returncode}: {done.stderr[-300:]}")
        elif (out / "provenance.json").exists():
            assert read_json(out / "provenance.json")["status"] != "finished"
    tally("training with less memory than it needs", tries, lost)
