"""An adapter folder is replaced in one step: killed anywhere or read at any time, it is whole."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer

import wara
from wara.adapters import read_adapter
from wara.adapters.files import WEIGHTS_FILE

# Elsewhere two names cannot be exchanged; the writer says so.
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs renameat2")

ROOT = Path(__file__).resolve().parents[1]


def adapted(rank: int) -> VisionTransformer:
    torch.manual_seed(0)
    model = VisionTransformer(
        img_size=16, patch_size=8, embed_dim=16, depth=1, num_heads=2, num_classes=2
    )
    wara.adapt(model, wara.WaRA(rank=rank))
    return model


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# `os._exit` is to a process what a kill is: no handler and no `finally` runs.
KILLED = """
import os, shutil, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import torch
torch.set_num_threads(1)
import wara
from test_one_step import adapted, content
home, model = Path(sys.argv[2]), adapted(3)
old, new = wara.save_adapter(adapted(2), home / "old"), wara.save_adapter(model, home / "new")
for folder in (old, new):
    (folder / "note.txt").write_text("the user's own")
own = tuple(str(Path(wara.__file__).parent / name) for name in ("storage.py", "adapters/files.py"))

def save_until(left, folder):
    def trace(frame, event, _):
        nonlocal left
        if frame.f_code.co_filename not in own:
            return None
        if event == "line":
            left -= 1
            if left < 0:
                os._exit(9)
        return trace
    sys.settrace(trace)
    wara.save_adapter(model, folder)

for line in range(10_000):
    folder = home / str(line) / "adapter"
    shutil.copytree(old, folder)
    child = os.fork()
    if not child:
        save_until(line, folder)
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    found = content(folder)
    kinds = [name for name, one in (("old", old), ("new", new)) if content(one) == found]
    print(code, *(kinds or ["broken", sorted(found)]))
    if code != 9:
        break
"""


@pytest.mark.slow
def test_a_kill_before_any_line_of_the_writer_leaves_the_old_adapter_or_the_new(
    tmp_path: Path,
) -> None:
    command = [sys.executable, "-c", KILLED, str(ROOT / "tests"), str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    *killed, last = done.stdout.splitlines()
    assert last == "0 new" and len(killed) > 50
    # Old until one line, new from the next one on; both are seen, so kills came on both sides.
    assert set(killed) == {"9 old", "9 new"}
    assert killed == sorted(killed, reverse=True)


def test_a_reader_never_finds_less_than_an_adapter(tmp_path: Path) -> None:
    """While one writes, another finds a description every time, and its tensors with it."""
    folder, model = tmp_path / "adapter", adapted(2)
    wara.save_adapter(model, folder, extra={"number": 0})
    done, faults, seen = threading.Event(), [], set()

    def read() -> None:
        while not done.is_set():
            try:
                first = read_adapter(folder)
                tensors = (folder / WEIGHTS_FILE).read_bytes()
                second = read_adapter(folder)
            except Exception as error:
                faults.append(error)
                return
            seen.add(first.extra["number"])
            # Where the writer came between, the two descriptions differ.
            if first == second and hashlib.sha256(tensors).hexdigest() != first.tensors_sha256:
                faults.append(AssertionError("tensors of another adapter"))

    reader = threading.Thread(target=read)
    reader.start()
    try:
        for number in range(1, 60):
            with torch.no_grad():
                model.head.bias += 1
            wara.save_adapter(model, folder, extra={"number": number})
    finally:
        done.set()
        reader.join()
    assert not faults
    assert len(seen) > 5
