"""What was written and is no longer so is named."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from deploy_helpers import make_cases

from wara.cli import main
from wara.deploy.predictor import Predictor
from wara.deploy.trace import Trace, verify_trace
from wara.deploy.verify import verify
from wara.errors import WaraError
from wara.runs.folder import RunFolder
from wara.runs.sealed import seal_run


@pytest.fixture(scope="module")
def trace(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trace")
    cases = make_cases(folder / "cases", (2, 1, 1))
    words = ["predict", str(bundle), str(cases / "images"), "--quiet", "--out"]
    for name in ("a", "b"):
        found = [str(folder / f"{name}.csv"), "--trace", str(folder / "trace.jsonl")]
        assert main([*words, *found]) == 0
    return folder / "trace.jsonl"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda lines: [lines[0], lines[1].replace(": ", ":  ", 1), *lines[2:]], "line 2 was"),
        (lambda lines: [*lines[:3], lines[3][:-1] + ', "kind": "prediction"}', *lines[4:]],
         "line 4 was changed"),
        (lambda lines: lines[1:], "before line 1 a line was removed"),
        (lambda lines: [*lines[:5], *lines[7:]], "before line 6 a line was removed"),
        (lambda lines: [*lines[:6], *lines[:6]], "before line 7 a line was removed, added"),
        (lambda lines: [*lines[:4], "", *lines[4:]], "line 5 is no line of a trace"),
    ],
)  # fmt: skip
def test_a_line_that_was_changed_removed_or_moved_is_named(
    change: Any, said: str, trace: Path, tmp_path: Path
) -> None:
    lines = trace.read_text().splitlines()
    kinds = [json.loads(line)["kind"] for line in lines]
    assert kinds == ["open", *["prediction"] * 4, "close"] * 2
    copy = tmp_path / "trace.jsonl"
    copy.write_text("\n".join(change(lines)) + "\n")
    with pytest.raises(WaraError, match=said) as caught:
        verify_trace(copy)
    assert caught.value.exit_code == 4 and main(["verify", str(copy)]) == 4


@pytest.mark.parametrize(
    "line", [{"kind": "close"}, {"kind": "close", "lines": "1"}, {"kind": ["open"]}, {"kind": "x"},
             {"kind": "open"}, {"kind": "close", "lines": 1, "previous": 0}],
)  # fmt: skip
def test_a_line_that_lacks_what_its_kind_has(line: dict[str, Any], tmp_path: Path) -> None:
    body = {"time": "2026-01-01", "previous": "0" * 64, **line}
    text = json.dumps(body, sort_keys=True, separators=(",", ":"))
    said = hashlib.sha256(text.encode()).hexdigest()
    path = tmp_path / "trace.jsonl"
    path.write_text(json.dumps({**body, "hash": said}) + "\n")
    with pytest.raises(WaraError, match="line 1 is no line of a trace"):
        verify_trace(path)
    assert main(["verify", str(path)]) == 4


def test_a_folder_of_somebody_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def closed(path: Path) -> bool:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "is_file", closed)
    assert main(["verify", str(tmp_path)]) == 5
    assert "cannot be read: Permission denied" in capsys.readouterr().err


def test_calls_without_an_end_are_told(trace: Path, tmp_path: Path) -> None:
    assert not [line for line in verify(trace) if "not closed" in line]
    copy = tmp_path / "trace.jsonl"
    lines = trace.read_text().splitlines()
    copy.write_text("\n".join(lines[:-1]) + "\n")
    assert any("not closed: the call of line 7" in line for line in verify(copy))
    copy.write_text("")
    with pytest.raises(WaraError, match="the trace is empty"):
        list(verify(copy))


def test_a_call_that_was_stopped_does_not_say_that_it_ended(trace: Path, bundle: Path) -> None:
    """The stop may come within a line, so that the call does not know how many there are."""
    path = trace.with_name("stopped.jsonl")
    with pytest.raises(KeyboardInterrupt), Trace(path, Predictor(bundle)) as stopped:
        stopped.lines -= 1  # the stop came after the line was written, before it was counted
        raise KeyboardInterrupt
    assert any("not closed: the call of line 1" in line for line in verify(path))
    with Trace(path, Predictor(bundle)):
        pass
    kinds = [json.loads(line)["kind"] for line in path.read_text().splitlines()]
    assert kinds == ["open", "open", "close"] and list(verify(path))


@pytest.mark.parametrize("name", ["report.md", "plots/roc.png", "checkpoints/best.ckpt"])
def test_every_file_of_a_run_is_checked(name: str, bundle: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(bundle.parent / "run", tmp_path / "run"))
    with (run / name).open("ab") as stream:
        stream.write(b" ")
    with pytest.raises(WaraError, match="changed since the run ended.*") as caught:
        list(verify(run))
    assert caught.value.exit_code == 4 and name in str(caught.value)
    (run / name).unlink()
    if name.startswith("checkpoints"):  # may have been removed, to save space
        assert list(verify(run))
    else:
        with pytest.raises(WaraError, match="gone"):
            list(verify(run))


@pytest.mark.parametrize("name", [
    "config.yaml", "splits.csv", "metrics.csv", "metrics.json", "predictions_val.csv",
    "predictions_test.csv", "provenance.json",
])  # fmt: skip
def test_a_number_of_a_run_that_was_changed(name: str, bundle: Path, tmp_path: Path) -> None:
    """Any that is as valid as the one before: only the checksum tells."""
    run = Path(shutil.copytree(bundle.parent / "run", tmp_path / "run"))
    path = run / name
    old, new = {
        "config.yaml": ("weight_decay: 0.01", "weight_decay: 0.02"),
        "splits.csv": (",false", ",true"),
        "metrics.csv": (",false", ",true"),
        "metrics.json": ('"seconds": ', '"seconds": 1'),
        "provenance.json": ('"seed": 0', '"seed": 1'),
    }.get(name, (",false", ",true"))
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))
    with pytest.raises(WaraError, match="gone, or changed since the run ended") as caught:
        list(verify(run))
    assert caught.value.exit_code == 4 and name in str(caught.value)


def test_a_run_whose_metrics_do_not_follow_from_its_predictions(
    bundle: Path, tmp_path: Path
) -> None:
    run = Path(shutil.copytree(bundle.parent / "run", tmp_path / "run"))
    assert any("metrics.json follows from them" in line for line in verify(run))
    path = run / "metrics.json"
    metrics = json.loads(path.read_text())
    metrics["test"]["accuracy"]["value"] += 0.01
    path.write_text(json.dumps(metrics))
    seal_run(RunFolder(run))
    with pytest.raises(WaraError, match="test accuracy is .* by the predictions") as caught:
        list(verify(run))
    assert caught.value.exit_code == 4


def test_a_run_whose_predictions_lack_an_image(bundle: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(bundle.parent / "run", tmp_path / "run"))
    path = run / "predictions_val.csv"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:2], *lines[3:]]) + "\n")
    seal_run(RunFolder(run))
    with pytest.raises(WaraError, match="not of the val images of splits.csv"):
        list(verify(run))
