"""`wara rerun` makes the weights of a run again from its folder, or says what differs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from training_helpers import adapter_bytes, tiny_config, with_twins

from wara.cli import main
from wara.errors import WaraError
from wara.runs import exact
from wara.storage import file_sha256
from wara.training.rerun import rerun
from wara.training.start import run
from wara.training.task import FineTuning


@pytest.fixture(autouse=True)
def _no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("wara.runs.results._figures", lambda *_: None)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with data, weights and `run`, whose paths are told from there."""
    folder = tmp_path_factory.mktemp("made")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("wara.runs.results._figures", lambda *_: None)
        with_twins(folder)
        config = tiny_config(folder, epochs=2)
        patch.chdir(folder)
        weights = config.backbone.model_copy(update={"weights": "weights.safetensors"})
        update = {"dataset": "data", "backbone": weights, "out": "run"}
        run(config.model_copy(update=update), quiet=True)
    return folder


def _never(*_: Any) -> None:
    raise AssertionError("trained")


def test_the_same_weights_from_the_folder_alone(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)  # from elsewhere
    torch.manual_seed(99)
    assert main(["rerun", str(made / "run"), "--quiet"]) == 0
    digest = file_sha256(made / "run/adapter/adapter_model.safetensors")
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == f"identical: adapter_model.safetensors sha256 {digest}"
    assert adapter_bytes(made / "run-rerun") == adapter_bytes(made / "run")
    for name in ("splits.csv", "near_duplicates.csv", "near_duplicates.png"):
        assert (made / "run-rerun" / name).read_bytes() == (made / "run" / name).read_bytes()
    shutil.rmtree(made / "run-rerun")


def test_what_differs_is_named_before_training(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(FineTuning, "training_step", _never)
    copy = Path(shutil.copytree(made, tmp_path / "copy"))
    out = tmp_path / "out"
    was = exact.PACKAGES[0]
    with monkeypatch.context() as patch:
        patch.setattr("wara.runs.provenance.versions", lambda: {was: "0.0.1"})
        assert main(["rerun", str(made / "run"), "--out", str(out)]) == 2
    err = capsys.readouterr().err
    assert f"{was} was {torch.__version__.split('+')[0]}" in err and "is 0.0.1" in err
    assert f"--allow-change {was}" in err and not out.exists()
    (copy / "data/images/calm_000.png").write_bytes(
        (copy / "data/images/calm_001.png").read_bytes()
    )
    record = json.loads((copy / "run/provenance.json").read_text())
    assert record["cwd"] == str(made)
    monkeypatch.chdir(copy)
    assert main(["rerun", "run", "--out", str(out)]) in (3, 4)
    assert not out.exists()


@pytest.mark.parametrize(
    ("name", "words"),
    [*((name, "gone, or changed since") for name in (
        "adapter/adapter_model.safetensors", "splits.csv", "near_duplicates.csv",
        "near_duplicates.png")),
     ("files.sha256", "the list of the run's files")],
)  # fmt: skip
def test_a_folder_that_is_not_whole_is_refused(
    made: Path, tmp_path: Path, name: str, words: str
) -> None:
    copy = Path(shutil.copytree(made / "run", tmp_path / "run"))
    (copy / name).write_bytes((copy / name).read_bytes() + b" ")
    with pytest.raises(WaraError, match=words) as caught:
        rerun(copy, tmp_path / "out")
    assert caught.value.exit_code == 4 and name in str(caught.value)
    shutil.rmtree(copy)
    with pytest.raises(WaraError, match="no finished run") as caught:
        rerun(copy, tmp_path / "out")
    assert caught.value.exit_code == 4


def test_weights_that_differ_nonetheless_are_told(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = FineTuning.on_before_optimizer_step

    def shift(self: FineTuning, optimizer: torch.optim.Optimizer) -> None:
        self.model.get_parameter("head.bias").grad += 1e-3
        original(self, optimizer)

    monkeypatch.setattr(FineTuning, "on_before_optimizer_step", shift)
    with pytest.raises(WaraError, match="the weights differ") as caught:
        rerun(made / "run", tmp_path / "out", quiet=True)
    assert caught.value.exit_code == 4
    assert "the first is " in caught.value.what and "largest difference" in caught.value.what
