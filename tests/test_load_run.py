"""A run read back from its folder: its model as the report says, and damage told by its file."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from training_helpers import CLASSES, tiny_config

import wara
from wara import __version__
from wara.errors import WaraError
from wara.images import load_tensor
from wara.runs import load_run
from wara.runs.folder import RunFolder
from wara.runs.sealed import seal_run
from wara.training.start import run

HINT = "read it with wara 0.1.0, or train again"


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run whose weights were named by a path that counts from another folder."""
    path = tmp_path_factory.mktemp("load")
    tiny_config(path)  # makes data and weights
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("wara.runs.results._figures", lambda *_: None)
        patch.chdir(path)
        changes = {"epochs": 2, "warmup_epochs": 2, "backbone__weights": "weights.safetensors"}
        run(tiny_config(path, **changes), quiet=True)
    return path / "run"


@pytest.fixture
def copy(finished: Path, tmp_path: Path) -> Path:
    return shutil.copytree(finished, tmp_path / "copy")


def test_the_lines_of_the_report_give_the_model(
    finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = (finished / "report.md").read_text()
    (lines,) = re.findall(r"```python\n(.*?)```", text, re.S)
    monkeypatch.chdir(finished)
    names: dict[str, Any] = {}
    exec(compile(lines, "report.md", "exec"), names)
    loaded, model = names["run"], names["model"]
    assert not model.training and loaded.classes == list(CLASSES)
    table = loaded.predictions("test")
    images = torch.stack(
        [load_tensor(finished.parent / "data" / f, loaded.spec) for f in table.files]
    )
    with torch.no_grad():
        logits = model(images).numpy()
    np.testing.assert_allclose(logits, table.predictions.logits, rtol=1e-4, atol=1e-5)
    assert [row.file for row in loaded.splits() if row.split == "test"] == table.files
    assert [row["epoch"] for row in loaded.curves()] == [1, 2]


def test_the_report_says_what_to_doubt(finished: Path) -> None:
    text = (finished / "report.md").read_text()
    assert "the best epoch lies inside the warm-up of 2 epochs" in text
    table = load_run(finished).predictions("test").predictions
    counts = np.bincount(table.labels, minlength=3), np.bincount(table.predicted, minlength=3)
    for i, name in enumerate(CLASSES):
        (row,) = re.findall(rf"^\| {name} \| (.*) \|$", text, re.M)
        assert row.split(" | ")[2:] == [str(counts[0][i]), str(counts[1][i])]
        never = re.search(rf"never predicted on the test images:.*\b{name} \({counts[0][i]} ", text)
        assert (never is None) == (counts[1][i] > 0)
    assert "fewer than 10 images of a class" in text and "calm in val (" in text
    metrics = json.loads((finished / "metrics.json").read_text())
    for name, metric in metrics["test"].items():
        (cells,) = re.findall(rf"^\| `{name}` \| (.*) \|$", text, re.M)
        value, n = cells.split(" | ")[2:]
        assert n == str(metric["n"])
        if metric["value"] is not None and metric["low"] is None:
            (sign,) = re.findall(r"\(\d+\)$", value)
            assert f"\n{sign} {metric['reason']}" in text


def refused(folder: Path, read: str) -> WaraError:
    with pytest.raises(WaraError) as caught:
        loaded = load_run(folder)
        {
            "predictions_test.csv": lambda: loaded.predictions("test"),
            "splits.csv": loaded.splits,
            "metrics.csv": loaded.curves,
        }[read]()
    return caught.value


FILES = (
    "config.yaml", "provenance.json", "metrics.json", "splits.csv", "predictions_test.csv",
    "metrics.csv", "adapter/adapter_config.json", "adapter/adapter_model.safetensors",
)  # fmt: skip
DAMAGE = {
    "gone": None,
    "bytes": b"\xff\xfe\x00\x81",
    "list": b"[1, 2]\n",
    "deep": b"[" * 100_000,
    "other": b'{"seed": {"a": 1}, "epochs": [], "synthetic": "yes"}\n',
    "half": ...,
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("name", [name for name in FILES if not name.endswith(".safetensors")])
def test_a_damaged_file_is_named(copy: Path, name: str, damage: str) -> None:
    path = copy / name
    content: Any = DAMAGE[damage]
    if content is None:
        path.unlink()
    else:
        half = path.read_bytes()[: path.stat().st_size * 2 // 3]
        path.write_bytes(half if content is ... else content)
    if (name, damage) == ("config.yaml", "half"):
        path.write_text(path.read_text().rpartition("\n")[0] + "\nepochs: [1,\n")
    error = refused(copy, name)
    where = str(copy) if damage == "gone" and name in ("config.yaml", FILES[6]) else name
    assert error.exit_code == 4 and error.remedy
    assert where in error.where or (str(copy) in error.where and name.startswith("adapter"))
    words = str(error)
    assert "\n" not in words and not re.search(r"Error\(|\bNone\b|Errno|\bdict\b|<class", words)


@pytest.mark.parametrize(
    ("name", "keys", "value"),
    [
        ("metrics.json", ["synthetic"], None),
        ("metrics.json", ["test", "accuracy", "value"], "high"),
        ("metrics.json", ["test", "accuracy", "n"], -1),
        ("metrics.json", ["val"], []),
        ("provenance.json", ["versions"], "0.1.0"),
        ("provenance.json", ["data"], None),
        ("provenance.json", ["status"], 3),
    ],
)  # fmt: skip
def test_a_wrong_value_is_named(copy: Path, name: str, keys: list[str], value: Any) -> None:
    content = inner = json.loads((copy / name).read_text())
    for key in keys[:-1]:
        inner = inner[key]
    inner[keys[-1]] = value
    (copy / name).write_text(json.dumps(content))
    error = refused(copy, name)
    assert error.exit_code == 4 and ".".join(keys) in error.what and name in error.where


def as_of_0_1_0(folder: Path) -> None:
    """Make a folder what 0.1.0 left: fewer keys, another form of the adapter."""
    record = json.loads((folder / "provenance.json").read_text())
    record["versions"]["wara"] = "0.1.0"
    (folder / "provenance.json").write_text(json.dumps(record))
    adapter = folder / "adapter" / "adapter_config.json"
    adapter.write_text(json.dumps(json.loads(adapter.read_text()) | {"version": 1}))
    config = (folder / "config.yaml").read_text()
    (folder / "config.yaml").write_text(re.sub(r"  modality: .*\n", "", config))
    (folder / "files.sha256").unlink()


def test_a_run_of_another_version_is_told_as_such(copy: Path) -> None:
    as_of_0_1_0(copy)
    with pytest.raises(WaraError) as caught:
        load_run(copy)
    what = f"written by wara 0.1.0, and this is {__version__}"
    assert caught.value.exit_code == 4
    assert caught.value.what.startswith(what) and caught.value.remedy == HINT
    with pytest.raises(WaraError) as caught:
        run(tiny_config(copy.parent, out=str(copy), epochs=2), resume=True)
    assert caught.value.exit_code == 4 and caught.value.what.startswith(what)
    assert "0.1.0" in caught.value.remedy and "--overwrite" in caught.value.remedy


def test_a_later_patch_of_this_version_reads_and_says_nothing(copy: Path) -> None:
    record = json.loads((copy / "provenance.json").read_text())
    record["versions"]["wara"] = __version__ + ".1"
    record["more"] = {"of": "another version"}
    (copy / "provenance.json").write_text(json.dumps(record))
    seal_run(RunFolder(copy))
    assert wara.load_run(copy).provenance["more"] == record["more"]
