"""A file that is being written over when the process is killed is the old or the new one, whole."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

WRITER = """
import sys
from wara import storage
path, text = sys.argv[1], "new " * 200_000
print("ready", flush=True)
while True:
    storage.write_text(path, text)
"""


def test_a_killed_writer_leaves_the_old_or_the_new_file(tmp_path: Path, amount, tally) -> None:
    tries, lost = amount(3, 20), []
    wait = random.Random(0)
    for number in range(tries):
        path = tmp_path / f"{number}.txt"
        old, new = "old " * 200_000, "new " * 200_000
        path.write_text(old)
        writer = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE, text=True
        )
        assert writer.stdout is not None and writer.stdout.readline() == "ready\n"
        time.sleep(wait.uniform(0, 0.05))
        os.kill(writer.pid, signal.SIGKILL)
        writer.wait()
        if path.read_text() not in (old, new):
            lost.append(f"{path.name}: {len(path.read_text())} characters")
    tally("kill while a file is written", tries, lost)
