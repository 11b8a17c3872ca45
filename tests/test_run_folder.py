"""The run folder: who may write, what lies in it, and that nothing is left half-written."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from wara import storage as files
from wara.errors import WaraError
from wara.evaluation.predict import Predictions
from wara.runs import tables
from wara.runs.folder import RunFolder
from wara.runs.provenance import collect, data_sha256
from wara.training.signals import Stopped, StopSignals


def _as_run(path: Path, status: str = "finished") -> RunFolder:
    path.mkdir()
    (path / "config.yaml").write_text("seed: 0\n")
    (path / "provenance.json").write_text(json.dumps({"status": status}))
    return RunFolder(path)


HOLD = """
import fcntl, json, os, socket, sys, time
handle = open(sys.argv[1], "a+")
fcntl.flock(handle, fcntl.LOCK_EX)
handle.write(json.dumps({"pid": os.getpid(), "host": socket.gethostname()}))
handle.flush()
print("ready", flush=True)
time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen]:
    """Another process that holds the lock of `tmp_path/run`, as `RunFolder.open` takes it."""
    (tmp_path / "run").mkdir()
    command = [sys.executable, "-c", HOLD, str(tmp_path / "run" / ".lock")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def test_a_new_folder_is_free(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "a" / "run")
    folder.check(resume=False, overwrite=False)
    assert not folder.path.exists()
    folder.open()
    assert json.loads((folder.path / ".lock").read_text())["pid"] == os.getpid()
    folder.close()
    assert not list(folder.path.iterdir())


@pytest.mark.parametrize("status", ["finished", "interrupted", "running"])
def test_an_existing_run_names_the_flags(tmp_path: Path, status: str) -> None:
    folder = _as_run(tmp_path / "run", status)
    with pytest.raises(WaraError) as caught:
        folder.check(resume=False, overwrite=False)
    assert caught.value.exit_code == 2
    assert status in caught.value.what
    assert "--resume" in caught.value.remedy and "--overwrite" in caught.value.remedy
    folder.check(resume=True, overwrite=False)
    folder.check(resume=False, overwrite=True)


@pytest.mark.parametrize(
    "names", [["train.log"], ["config.yaml"], ["config.yaml", "train.log"], [".config.yaml.7.tmp"]]
)
def test_a_run_killed_at_its_very_start_can_be_used_again(tmp_path: Path, names: list) -> None:
    names = [name.replace(".tmp", files.TEMP_SUFFIX) for name in names] + [".lock"]
    for name in names:
        (tmp_path / name).write_text("")
    folder = RunFolder(tmp_path)
    assert folder.is_run == ("config.yaml" in names)
    folder.check(resume=True, overwrite=False)
    folder.check(resume=False, overwrite=True)
    with pytest.raises(WaraError, match="--overwrite"):
        folder.check(resume=False, overwrite=False)
    # One file of the user's own, and nobody may delete the folder.
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(WaraError, match="not a run's"):
        folder.check(resume=False, overwrite=True)


def test_a_folder_that_only_looks_like_results_is_not_a_run(tmp_path: Path) -> None:
    (tmp_path / "plots").mkdir()
    (tmp_path / "report.md").write_text("written by hand")
    with pytest.raises(WaraError, match="not a run's"):
        RunFolder(tmp_path).check(resume=False, overwrite=True)


def test_a_kill_while_clearing_leaves_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = _as_run(tmp_path / "run")
    for name in ("a_note_of_the_user", "report.md", "zzz"):
        (folder.path / name).write_text("")
    gone = []
    unlink = Path.unlink

    def record(path: Path, **options: bool) -> None:
        gone.append(path.name)
        unlink(path, **options)

    monkeypatch.setattr(Path, "unlink", record)
    folder.open(overwrite=True)
    assert gone[-2:] == ["provenance.json", "config.yaml"] and len(gone) == 5
    folder.close()


def test_nothing_to_resume_is_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "nowhere", tmp_path):
        with pytest.raises(WaraError, match="nothing to resume in") as caught:
            RunFolder(path).check(resume=True, overwrite=False)
        assert caught.value.exit_code == 2 and "--out" in caught.value.remedy
    assert not (tmp_path / "nowhere").exists()


@pytest.mark.parametrize("flags", [(False, False), (True, False), (False, True)])
def test_a_folder_of_other_files_is_never_touched(tmp_path: Path, flags: tuple) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(WaraError, match="not a run's") as caught:
        RunFolder(tmp_path).check(resume=flags[0], overwrite=flags[1])
    assert caught.value.exit_code == 2
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_both_flags_and_a_file_are_refused(tmp_path: Path) -> None:
    with pytest.raises(WaraError, match="exclude"):
        RunFolder(tmp_path / "run").check(resume=True, overwrite=True)
    (tmp_path / "file").write_text("")
    with pytest.raises(WaraError, match="not a folder"):
        RunFolder(tmp_path / "file").check(resume=False, overwrite=False)


def test_overwrite_clears_and_keeps_the_lock(tmp_path: Path) -> None:
    folder = _as_run(tmp_path / "run")
    (folder.path / "plots").mkdir()
    (folder.path / "plots" / "old.png").write_text("")
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "data").write_text("kept")
    (folder.path / "link").symlink_to(outside)
    folder.open(overwrite=True)
    assert [entry.name for entry in folder.path.iterdir()] == [".lock"]
    assert (outside / "data").read_text() == "kept"
    folder.close()


def test_a_folder_in_use_is_busy(tmp_path: Path, holder) -> None:
    folder = RunFolder(tmp_path / "run")
    for attempt in (
        lambda: folder.check(resume=True, overwrite=False),
        lambda: folder.open(overwrite=True),
    ):
        with pytest.raises(WaraError) as caught:
            attempt()
        assert caught.value.exit_code == 8
        assert f"pid {holder.pid}" in caught.value.what


def test_the_lock_of_a_killed_run_is_taken_over(tmp_path: Path, holder) -> None:
    os.kill(holder.pid, signal.SIGKILL)
    holder.wait()
    folder = RunFolder(tmp_path / "run")
    assert (folder.path / ".lock").exists()
    folder.check(resume=True, overwrite=False)
    folder.open()
    assert json.loads((folder.path / ".lock").read_text())["pid"] == os.getpid()
    folder.close()


def test_the_same_process_cannot_hold_a_folder_twice(tmp_path: Path) -> None:
    one, two = RunFolder(tmp_path / "run"), RunFolder(tmp_path / "run")
    one.open()
    with pytest.raises(WaraError) as caught:
        two.open()
    assert caught.value.exit_code == 8
    with pytest.raises(WaraError):
        two.check(resume=True, overwrite=False)
    one.close()
    two.open()
    two.close()


def test_discard_leaves_nothing(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    folder.open()
    files.write_text(folder.config, "seed: 0")
    folder.discard()
    assert not folder.path.exists()
    (tmp_path / "mine").mkdir()
    folder = RunFolder(tmp_path / "mine")
    folder.open()
    folder.discard()
    assert folder.path.is_dir() and not list(folder.path.iterdir())


def test_leftovers_of_a_kill_are_cleaned(tmp_path: Path) -> None:
    folder = _as_run(tmp_path / "run")
    (folder.path / "checkpoints").mkdir()
    left = files.temp_name(folder.last)
    left.write_bytes(b"half a checkpo")
    folder.open()
    assert not left.exists()
    folder.close()


def test_a_failed_write_keeps_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "metrics.json"
    files.write_json(path, {"a": 1})
    with pytest.raises(ValueError, match="JSON"):
        files.write_json(path, {"a": float("nan")})
    with pytest.raises(RuntimeError), files.replacing(path) as temp:
        temp.write_text("half")
        raise RuntimeError
    assert json.loads(path.read_text()) == {"a": 1}
    assert os.listdir(tmp_path) == ["metrics.json"]


def test_a_folder_that_cannot_be_made_is_exit_5(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(WaraError) as caught:
        RunFolder(tmp_path / "file" / "run").open()
    assert caught.value.exit_code == 5


def test_tables_follow_the_contract(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    row = tables.SplitRow("a,b.png", 0, None, "train", "f" * 64)
    tables.write_splits(folder.splits, [row], synthetic=True)
    assert tables.read_splits(folder.splits) == [row]
    rows = list(csv.DictReader(folder.splits.open()))
    assert rows == [
        {"file": "a,b.png", "label": "0", "patient": "", "split": "train", "sha256": "f" * 64,
         "synthetic": "true"}
    ]  # fmt: skip
    probs = np.array([[0.1, 0.9], [1 / 3, 2 / 3]])
    logits = np.array([[-1.5, 2.25], [0.1, 0.7]], dtype=np.float32)
    found = Predictions(np.arange(2), np.array([1, 0]), logits, probs, np.array([1, 1]))
    classes = ["no", "yes, surely"]
    tables.write_predictions(
        folder.predictions("test"), found,
        files=["x", "y"], patients=["p", None], classes=classes, synthetic=True,
    )  # fmt: skip
    back = tables.read_predictions(folder.predictions("test"))
    assert (back.files, back.patients, back.classes) == (["x", "y"], ["p", None], classes)
    for name in vars(found):
        assert np.array_equal(getattr(back.predictions, name), getattr(found, name)), name
    with folder.predictions("test").open() as handle:
        table = list(csv.reader(handle))
    assert table[0] == [
        "file", "patient", "label", "pred", "prob_no", "prob_yes, surely",
        "logit_no", "logit_yes, surely", "synthetic",
    ]  # fmt: skip
    assert table[2][:4] == ["y", "", "0", "1"]
    assert np.array_equal(np.array([row[4:6] for row in table[1:]], dtype=float), probs)
    assert np.array_equal(np.array([row[6:8] for row in table[1:]], dtype=np.float32), logits)
    history = [{"epoch": 1, "val_auc_macro": None}, {"epoch": 2, "val_auc_macro": 0.5}]
    tables.write_curves(folder.curves, history, synthetic=True)
    assert [r["val_auc_macro"] for r in csv.DictReader(folder.curves.open())] == ["", "0.5"]
    assert tables.read_curves(folder.curves) == history


@pytest.mark.parametrize("text", ["", "file,label\n1,2\n", "file,label,patient,pred\nx,a,p,0\n",
                                  "file,label,patient,pred\nx,1\n", "\xff"])  # fmt: skip
def test_a_table_of_another_form_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "predictions_val.csv"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(WaraError) as caught:
        tables.read_predictions(path)
    assert caught.value.exit_code == 4
    with pytest.raises(WaraError):
        tables.read_predictions(tmp_path / "nowhere.csv")


def test_predictions_of_no_image_read_back(tmp_path: Path) -> None:
    nothing = Predictions.of(np.zeros(0, int), np.zeros(0, int), np.zeros((0, 2), "f4"), "binary")
    path = tmp_path / "predictions_test.csv"
    tables.write_predictions(
        path, nothing, files=[], patients=[], classes=["a", "b"], synthetic=False
    )
    back = tables.read_predictions(path)
    assert back.classes == ["a", "b"] and back.predictions.probs.shape == (0, 2)


def test_multilabel_cells() -> None:
    assert tables.label_text(np.array([1, 0, 1])) == "1 0 1"
    assert tables.label_text(np.int64(3)) == "3"


def test_data_hash_sees_every_cell() -> None:
    rows = [("a", "0", None, "train", "x"), ("b", "1", "p", "val", "y")]
    seen = {data_sha256(rows), data_sha256(rows[::-1])}
    for r, row in enumerate(rows):
        for c in range(len(row)):
            changed = [list(other) for other in rows]
            changed[r][c] = "changed"
            seen.add(data_sha256(changed))
    assert len(seen) == 12


def test_provenance_is_json() -> None:
    record = collect(
        command=["train.py"], seed=1, data={}, backbone={}, budget=None, device="cpu",
        precision="32-true", processes=1,
    )  # fmt: skip
    assert json.loads(json.dumps(record)) == record
    assert record["versions"]["torch"] and record["torch"]["threads"] >= 1


# -- signals ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_outside_training_stops_at_once(signum: int, code: int) -> None:
    before = signal.getsignal(signum)
    with pytest.raises(Stopped) as caught, StopSignals():
        os.kill(os.getpid(), signum)
        time.sleep(5)
    assert caught.value.code == code
    assert signal.getsignal(signum) is before


def test_during_training_the_first_waits_and_the_second_does_not() -> None:
    with StopSignals() as stop:
        stop.graceful = True
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.01)
        assert stop.requested == signal.SIGTERM
        with pytest.raises(Stopped):
            stop.check()
        with pytest.raises(Stopped):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(5)
