"""The run folder: who may write, what lies in it, and that nothing is left half-written."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
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
    for name in ("metrics.csv", "report.md", "train.log"):
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


def test_a_run_that_has_no_folder_yet_may_be_resumed(tmp_path: Path) -> None:
    for path in (tmp_path / "nowhere", tmp_path):
        RunFolder(path).check(resume=True, overwrite=False)
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
    (folder.path / "plots" / "roc.png").write_text("")
    (folder.path / "wandb" / "offline-run-1").mkdir(parents=True)
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "best.ckpt").write_text("kept")
    (folder.path / "checkpoints").symlink_to(outside)
    folder.open(overwrite=True)
    assert [entry.name for entry in folder.path.iterdir()] == [".lock"]
    assert (outside / "best.ckpt").read_text() == "kept"
    folder.close()


@pytest.mark.parametrize("clear", ["overwrite", "discard"])
def test_what_no_run_writes_is_never_deleted(tmp_path: Path, clear: str) -> None:
    folder = _as_run(tmp_path / "run")
    mine = [
        "thesis.tex",
        "plots/for_the_paper.png",
        "adapter/README",
        "data/image.png",
        "plots/x/y",
    ]
    theirs = ["report.md", "plots/roc.png", "adapter/adapter_config.json", "checkpoints/last.ckpt"]
    for name in (*mine, *theirs):
        (folder.path / name).parent.mkdir(parents=True, exist_ok=True)
        (folder.path / name).write_text(name)
    folder.check(resume=False, overwrite=True)
    folder.open(overwrite=clear == "overwrite")
    if clear == "discard":
        folder.discard()
    else:
        folder.close()
    left = [p for p in folder.path.rglob("*") if p.is_file()]
    assert {str(p.relative_to(folder.path)) for p in left} == set(mine)
    assert all(p.read_text() == str(p.relative_to(folder.path)) for p in left)
    assert not (folder.path / "checkpoints").exists()


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


CLASSES = ["no", "yes, surely"]


def _two(task: str = "binary") -> Predictions:
    logits = np.array([[-1.5, 2.25], [0.1, 0.7]], dtype=np.float32)
    labels = np.array([[1, 1], [0, 0]] if task == "multilabel" else [1, 0])
    return Predictions.of(np.arange(2), labels, logits, task)


def _written(path: Path, task: str = "binary") -> Path:
    tables.write_predictions(
        path, _two(task), files=["x", "y"], patients=["p", None], classes=CLASSES, synthetic=True
    )
    return path


def test_splits_follow_the_contract(tmp_path: Path) -> None:
    path = tmp_path / "splits.csv"
    row = tables.SplitRow("a,b.png", 0, None, "train", "f" * 64)
    tables.write_splits(path, [row], classes=CLASSES, synthetic=True)
    assert tables.read_splits(path, classes=CLASSES, task="binary") == [row]
    assert list(csv.DictReader(path.open())) == [
        {"file": "a,b.png", "label": "no", "label_index": "0", "patient": "", "split": "train",
         "sha256": "f" * 64, "synthetic": "true"}
    ]  # fmt: skip


@pytest.mark.parametrize("task", ["binary", "multilabel"])
def test_predictions_follow_the_contract(tmp_path: Path, task: str) -> None:
    path, found = _written(tmp_path / "predictions_test.csv", task), _two(task)
    back = tables.read_predictions(path, classes=CLASSES, task=task)
    assert (back.files, back.patients, back.classes) == (["x", "y"], ["p", None], CLASSES)
    for name in vars(found):
        assert np.array_equal(getattr(back.predictions, name), getattr(found, name)), name
    with path.open() as handle:
        head, *rows = csv.reader(handle)
    assert head == [
        "file", "patient", "label", "label_index", "pred", "pred_index", "prob_no",
        "prob_yes, surely", "logit_no", "logit_yes, surely", "synthetic",
    ]  # fmt: skip
    several = ["x", "p", "no|yes, surely", "0|1", "yes, surely", "1"]
    one = ["x", "p", "yes, surely", "1", "yes, surely", "1"]
    assert rows[0][:6] == (several if task == "multilabel" else one)
    assert rows[1][2:4] == (["", ""] if task == "multilabel" else ["no", "0"])
    assert np.array_equal(np.array([row[6:8] for row in rows], dtype=float), found.probs)


def test_curves_follow_the_contract(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    history = [{"epoch": 1, "val_auc_macro": None}, {"epoch": 2, "val_auc_macro": 0.5}]
    tables.write_curves(path, history, synthetic=True)
    assert [r["val_auc_macro"] for r in csv.DictReader(path.open())] == ["", "0.5"]
    assert tables.read_curves(path) == history


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("label_index", "index", "no column label_index"),
        ("patient", "file", "a column stands twice"),
        ("x,p", "x", "rows of different length"),
        ("pred_index,", "pred_index,more,", "rows of different length"),
        (',"yes, surely",1,', ',"yes, surely",7,', "row 1; "),
        (',"yes, surely",1,', ',"yes, surely",,', "label_index is ''"),
        (",no,0,", ",no,0|1,", "row 2; "),
        (",no,0,", ",no,zero,", "label_index is 'zero'"),
        (",no,0,", ",yes,0,", "label is 'yes', which is not the class of its number 0"),
        ("2.25", "two", "'two', which is not a finite number"),
        ("2.25", "nan", "'nan', which is not a finite number"),
        ("x,p", "\udcff,p", "not UTF-8"),
    ],
)
def test_a_damaged_table_is_refused_by_name(tmp_path: Path, old: str, new: str, words: str) -> None:
    path = _written(tmp_path / "predictions_val.csv")
    text = path.read_text()
    assert old in text
    path.write_bytes(text.replace(old, new, 1).encode(errors="surrogateescape"))
    with pytest.raises(WaraError) as caught:
        tables.read_predictions(path, classes=CLASSES, task="binary")
    error = caught.value
    assert error.exit_code == 4 and str(path) in error.where and error.remedy
    assert words in str(error)


def test_predictions_of_no_image_read_back(tmp_path: Path) -> None:
    nothing = Predictions.of(np.zeros(0, int), np.zeros(0, int), np.zeros((0, 2), "f4"), "binary")
    path = tmp_path / "predictions_test.csv"
    tables.write_predictions(
        path, nothing, files=[], patients=[], classes=["a", "b"], synthetic=False
    )
    back = tables.read_predictions(path, classes=["a", "b"], task="binary")
    assert back.classes == ["a", "b"] and back.predictions.probs.shape == (0, 2)
    with pytest.raises(WaraError, match="No such file"):
        tables.read_predictions(tmp_path / "nowhere.csv", classes=["a"], task="binary")


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
        command=["train.py"], seed=1, data={}, backbone={}, budget=None, trunk=None, device="cpu",
        accelerator="cpu", precision="32-true", processes=1,
    )  # fmt: skip
    assert json.loads(json.dumps(record)) == record
    assert record["versions"]["torch"] and record["torch"]["threads"] >= 1
