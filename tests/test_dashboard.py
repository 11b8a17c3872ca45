"""The dashboard: a layout that W&B's library takes, and what to do where it cannot be made."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import wandb
from training_helpers import environment

from wara import cli
from wara.training import dashboard
from wara.training.dashboard import specification, workspace
from wara.training.wandb_run import _settings


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("WARA_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)


def offline_run(store: Path, run_id: str) -> None:
    store.mkdir(parents=True)
    with wandb.init(id=run_id, project="p", dir=str(store), settings=_settings("offline")) as run:
        run.log({"epoch": 1})


def test_without_a_login_it_says_how_to_send_and_look(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(dashboard, "find_spec", lambda _: object())
    monkeypatch.setattr(dashboard, "unreachable", lambda: "")
    monkeypatch.setattr(dashboard, "unknown_sender", lambda: "wandb is not logged in")
    for name in ("one", "compared/cell two"):
        offline_run(tmp_path / "runs" / name, name[-3:])
    sent = tmp_path / "runs" / "sent"
    offline_run(sent, "sen")
    (path,) = sent.glob("wandb/offline-run-*/run-sen.wandb")
    Path(f"{path}.synced").touch()
    capsys.readouterr()
    assert cli.main(["dashboard", "--project", "p q", "--entity", "e", "--out", "layout.json"]) == 0
    layout, made, runs, send, look = capsys.readouterr().out.splitlines()
    assert layout == "layout     layout.json" and "not logged in; run `wandb login`" in made
    assert runs == "runs       2 below runs are not sent yet"
    assert send == (
        "send       wandb sync --project 'p q' --entity e 'runs/compared/cell two/wandb' "
        "runs/one/wandb"
    )
    assert look == "look here  wandb beta leet runs/sent/wandb"
    words = shlex.split(send)[2:]
    done = subprocess.run(
        [sys.executable, "-m", "wandb", *words, "--dry-run"], env=environment(), text=True,
        capture_output=True,
    )  # fmt: skip
    assert "Would sync 2 run(s)" in done.stdout + done.stderr
    assert json.loads(Path("layout.json").read_text()) == specification("p q", "e")


@pytest.mark.parametrize(
    ("mode", "installed", "words"),
    [
        ("offline", True, "WANDB_MODE is offline; unset it"),
        (None, False, "pip install 'wara[dashboard]'"),
        (None, True, "http://127.0.0.1:9 is not reachable"),
    ],
)
def test_why_it_is_not_made_is_said_with_a_remedy(
    mode: str | None, installed: bool, words: str,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    if mode:
        monkeypatch.setenv("WANDB_MODE", mode)
    monkeypatch.setattr(dashboard, "find_spec", lambda _: object() if installed else None)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    assert cli.main(["dashboard"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert words in lines[1] and lines[2] == "runs       0 below runs are not sent yet"
    assert len(lines) == 3 and Path("dashboard.json").is_file()


def test_a_workspace_is_saved_and_what_w_and_b_refuses_is_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Saved:
        url = "https://wandb.ai/e/p?nw=x"

        def save(self) -> Saved:
            return self

    asked: list[dict[str, Any]] = []
    monkeypatch.setattr(dashboard, "_reason", lambda _: "")
    monkeypatch.setattr(dashboard, "workspace", lambda spec: asked.append(spec) or Saved())
    assert cli.main(["dashboard", "--project", "p", "--entity", "e"]) == 0
    assert capsys.readouterr().out.endswith("dashboard  https://wandb.ai/e/p?nw=x\n")
    assert asked == [specification("p", "e")]

    def refuse(_: Any) -> None:
        raise PermissionError("no access\nto p")

    monkeypatch.setattr(dashboard, "workspace", refuse)
    assert cli.main(["dashboard", "--project", "p", "--entity", "e"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "W&B did not take the dashboard (PermissionError: no access to p)" in line
    assert "--entity" in line and "dashboard.json" in line


def test_the_layout_names_what_runs_send() -> None:
    spec = specification("p", None)
    assert [section["name"] for section in spec["sections"]] == [
        "Accuracy over parameters", "Methods by modality", "Curves", "Calibration",
        "What the adapter learnt",
    ]  # fmt: skip
    text = json.dumps(spec)
    for word in ("config:adapter_params", "summary:test_auc_macro", "reliability_table",
                 "val_auc_macro", "subband_energy"):  # fmt: skip
        assert word in text
    assert spec["group_by"] == ["modality", "method"]


def test_the_library_takes_the_layout() -> None:
    pytest.importorskip("wandb_workspaces")
    spec = specification("p", "e")
    view = workspace(spec)._to_model().model_dump(by_alias=True, exclude_none=True)
    sections = view["spec"]["section"]["panelBankConfig"]["sections"]
    assert [len(s["panels"]) for s in sections] == [len(s["panels"]) for s in spec["sections"]]
    first = sections[0]["panels"][0]["config"]
    assert (first["xAxis"], first["yAxis"]) == (
        "config:adapter_params.value", "summary:test_auc_macro"
    )  # fmt: skip
    grouping = view["spec"]["section"]["runSets"][0]["grouping"]
    assert [group["name"] for group in grouping] == ["modality.value", "method.value"]
    lines = [p["config"] for s in sections for p in s["panels"] if "History" in p["viewType"]]
    assert {line["xAxis"] for line in lines} == {"epoch"}
