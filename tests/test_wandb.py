"""One experiment is one run of Weights & Biases, as W&B's own reader finds it in the files."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from training_helpers import environment, spawn, tiny_config
from wandb_server import served

from wara.config.schema import WandbConfig
from wara.errors import WaraError
from wara.signals import Stopped
from wara.training.start import run
from wara.training.task import FineTuning
from wara.training.tracking import epochs_in, files_of, is_sent, settle
from wara.training.wandb_charts import charts, update_tables

OFFLINE = {"mode": "offline"}


@pytest.fixture(autouse=True)
def _no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)


def records(path: Path, kind: str) -> Iterator[dict[str, Any]]:
    """Yield the records of a kind in a file, as `wandb leet inspect` prints them."""
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(path)]
    env = environment(WANDB_MODE="offline")
    done = subprocess.run(command, capture_output=True, text=True, env=env, check=True)
    for line in done.stdout.splitlines():
        record = json.loads(line)
        if record["type"] == kind:
            yield record[kind]


def summary_of(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for record in records(path, "summary"):
        found |= record.get("update", {})
    return found


def stop_in(monkeypatch: pytest.MonkeyPatch, epoch: int, signum: int, batches: int) -> None:
    """Send this process a signal in the first batch after `epoch` epochs."""
    original, seen = FineTuning.training_step, []

    def step(self: FineTuning, *args: Any) -> torch.Tensor:
        seen.append(0)
        if len(seen) == epoch * batches + 1:
            os.kill(os.getpid(), signum)
        return original(self, *args)

    monkeypatch.setattr(FineTuning, "training_step", step)


@pytest.fixture(scope="module")
def joined(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of four epochs that was stopped after the second and resumed, offline."""
    folder = tmp_path_factory.mktemp("joined")
    config = tiny_config(folder, epochs=4, wandb=OFFLINE | {"group": "g", "tags": ["a"]})
    with pytest.MonkeyPatch.context() as patch:
        stop_in(patch, 2, signal.SIGTERM, batches=5)
        with pytest.raises(Stopped):
            run(config, quiet=True)
    run(config, resume=True, quiet=True)
    return folder / "run"


def test_a_resumed_run_is_one_run_with_every_epoch_once(joined: Path) -> None:
    run_id = json.loads((joined / "provenance.json").read_text())["wandb_run"]
    files = files_of(joined, run_id)
    assert len(files) == len(list(joined.glob("wandb/*/*.wandb"))) - 1 == 2  # and `latest-run`
    heads = [next(records(path, "run")) for path in files]
    assert {head["run_id"] for head in heads} == {run_id}
    assert all(head["resume"] for head in heads)
    rows = [record["item"] for path in files for record in records(path, "history")]
    assert [row["epoch"] for row in rows if "epoch" in row] == [1, 2, 3, 4]
    stopped = summary_of(files[0])
    assert stopped["epoch"] == 2 and "test_auc_macro" not in stopped


def test_the_summary_holds_the_best_epoch_of_all_attempts(joined: Path) -> None:
    metrics = json.loads((joined / "metrics.json").read_text())
    path = files_of(joined, json.loads((joined / "provenance.json").read_text())["wandb_run"])[-1]
    found = summary_of(path)
    assert found["best_epoch"] == metrics["best_epoch"] and found["epoch"] == 4
    for name in ("auc_macro", "accuracy"):
        assert found[f"val_{name}"] == metrics["val"][name]["value"]
        assert found[f"test_{name}"] == metrics["test"][name]["value"]
    lines = (joined / "metrics.csv").read_text().splitlines()
    header, best = lines[0].split(","), lines[metrics["best_epoch"]].split(",")
    column = header.index("train_loss")
    assert found["train_loss"] == pytest.approx(float(best[column]))


def test_the_axis_is_the_epoch_and_the_config_is_flat(joined: Path) -> None:
    metrics = json.loads((joined / "metrics.json").read_text())
    path = files_of(joined, json.loads((joined / "provenance.json").read_text())["wandb_run"])[0]
    axes = {m["name"]: m.get("step_metric") for m in records(path, "metric") if "name" in m}
    assert axes["val_auc_macro"] == axes["train_loss"] == "epoch" and axes["epoch"] is None
    head = next(records(path, "run"))
    config = head["config"]["update"]
    assert {key: config[key] for key in ("modality", "method", "budget", "split_seed", "seed")} == {
        "modality": None, "method": "wara", "budget": None, "split_seed": 0, "seed": 0
    }  # fmt: skip
    assert config["adapter_params"] == metrics["adapter_params"]
    assert head["run_group"] == "g" and head["tags"] == ["a"]


def test_charts_and_tables_are_there_and_no_image_of_a_patient(joined: Path) -> None:
    path = files_of(joined, json.loads((joined / "provenance.json").read_text())["wandb_run"])[-1]
    keys = {key.split(".")[0] for record in records(path, "history") for key in record["item"]}
    for name in ("roc", "pr", "confusion", "reliability", "subband_energy", "singular_values"):
        assert f"{name}_table" in keys, name
    assert {"subband_energy", "singular_values"} <= keys and "test_images" not in keys


def test_a_file_cut_short_is_read_as_far_as_it_goes(joined: Path, tmp_path: Path) -> None:
    path = files_of(joined, json.loads((joined / "provenance.json").read_text())["wandb_run"])[0]
    whole, cut = path.read_bytes(), tmp_path / path.name
    assert epochs_in(path) == {1, 2}
    cut.write_bytes(whole[: whole.rindex(b"val_auc_macro") - 60])
    assert epochs_in(cut) <= {1, 2}
    cut.write_bytes(b"no file of W&B")
    with pytest.raises(OSError, match="wandb does not read"):
        epochs_in(cut)


@pytest.mark.slow
def test_an_epoch_lost_in_a_kill_is_made_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The checkpoint of an epoch comes first: W&B may lack it when the process is killed."""
    config = tiny_config(tmp_path, epochs=3, wandb=OFFLINE)
    with monkeypatch.context() as patch:
        stop_in(patch, 2, signal.SIGTERM, batches=5)
        with pytest.raises(Stopped):
            run(config, quiet=True)
    folder = tmp_path / "run"
    run_id = json.loads((folder / "provenance.json").read_text())["wandb_run"]
    (path,) = files_of(folder, run_id)
    monkeypatch.setattr("wara.training.wandb_run.epochs_in", lambda _: {1})
    run(config, resume=True, quiet=True)
    again = files_of(folder, run_id)[-1]
    assert again != path and epochs_in(again) == {2, 3}


def test_variables_hold_where_the_config_is_silent() -> None:
    names = {
        "WANDB_MODE": "disabled", "WANDB_PROJECT": "p", "WANDB_ENTITY": "e",
        "WANDB_RUN_GROUP": "g", "WANDB_TAGS": "one, two,", "WANDB_NOTES": "n",
    }  # fmt: skip
    found = settle(WandbConfig(), names)
    assert (found.mode, found.project, found.entity, found.group) == ("disabled", "p", "e", "g")
    assert (found.tags, found.notes) == (("one", "two"), "n")
    said = {"mode": "offline", "project": "q", "entity": "f", "group": "h", "tags": [], "notes": ""}
    found = settle(WandbConfig.model_validate(said), names)
    assert (found.mode, found.project, found.entity, found.group) == ("offline", "q", "f", "h")
    assert (found.tags, found.notes) == ((), "")
    found = settle(WandbConfig(), {"WANDB_MODE": "", "WANDB_PROJECT": ""})
    assert (found.mode, found.project, found.entity, found.tags) == ("offline", "wara", None, ())
    assert settle(WandbConfig(), {"WANDB_MODE": "dryrun"}).mode == "offline"


def test_a_mode_that_is_none_is_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "onlin")
    with pytest.raises(WaraError, match="WANDB_MODE should be one of .*did you mean") as caught:
        run(tiny_config(tmp_path, wandb={}), dry_run=True, quiet=True)
    assert caught.value.exit_code == 2 and not (tmp_path / "run").exists()
    monkeypatch.setenv("WANDB_MODE", "disabled")
    run(tiny_config(tmp_path, epochs=1, wandb={}), quiet=True)
    assert not (tmp_path / "run" / "wandb").exists()
    assert json.loads((tmp_path / "run" / "provenance.json").read_text())["wandb_run"] is None


def test_a_file_is_sent_when_it_was_online_or_is_marked(tmp_path: Path) -> None:
    offline = tmp_path / "offline-run-20260101_000000-x" / "run-x.wandb"
    offline.parent.mkdir()
    assert not is_sent(offline) and is_sent(tmp_path / "run-20260101_000000-x" / "run-x.wandb")
    Path(f"{offline}.synced").touch()
    assert is_sent(offline)


def rows_of(chart: Any) -> list[list[Any]]:
    return list(chart.table.data)


def test_curves_are_those_of_their_class_where_another_has_no_image() -> None:
    labels = np.array([0, 0, 2, 2])
    probs = np.array([[0.8, 0.15, 0.05], [0.6, 0.3, 0.1], [0.2, 0.1, 0.7], [0.1, 0.6, 0.3]])
    shown = charts(labels, probs, probs.argmax(axis=1), ["a", "b", "c"], "Test")
    assert set(shown) == {"roc", "pr", "confusion", "reliability"}
    for name, corner in (("roc", [0.0, 1.0]), ("pr", [1.0, 1.0])):
        rows = rows_of(shown[name])
        assert {row[0] for row in rows} == {"a", "c"}
        assert corner in [row[1:] for row in rows if row[0] == "c"]  # c parts its images from a's
    cells = {(a, p): n for a, p, n in rows_of(shown["confusion"])}
    assert cells["c", "b"] == 1 and cells["a", "a"] == 2 and cells["b", "b"] == 0
    observed = {x: y for x, key, y in rows_of(shown["reliability"]) if key == "observed"}
    assert observed == {0.6: 0.5, 0.7: 1.0, 0.8: 1.0}


def test_several_findings_have_a_matrix_each() -> None:
    labels = np.array([[1, 0], [0, 1], [1, 1]])
    probs = np.array([[0.9, 0.2], [0.3, 0.8], [0.7, 0.4]])
    shown = charts(labels, probs, (probs > 0.5).astype(int), ["wet lung", "rib"], "Test")
    assert set(shown) == {"roc", "pr", "reliability", "confusion_wet_lung", "confusion_rib"}
    cells = {(a, p): n for a, p, n in rows_of(shown["confusion_rib"])}
    assert cells["rib", "no rib"] == 1 and cells["rib", "rib"] == 1


def test_tables_of_the_update_hold_its_numbers(tmp_path: Path) -> None:
    energy = {"blocks.0": {"LL": 2.0, "HH": float("nan")}}
    found = update_tables(energy, {"blocks.0": {"all": [3.0, 1.0]}}, tmp_path)
    assert found["subband_energy_table"].data == [["blocks.0", "LL", 2.0], ["blocks.0", "HH", None]]
    assert found["singular_values_table"].data == [
        ["blocks.0", "all", 1, 3.0], ["blocks.0", "all", 2, 1.0]
    ]  # fmt: skip
    assert update_tables({}, {}, tmp_path) == {}


STOP = """
import os, signal
from wara.training.task import FineTuning
step, seen = FineTuning.training_step, []
def stopping(self, *args):
    seen.append(0)
    if len(seen) == 11:
        os.kill(os.getpid(), signal.SIGTERM)
    return step(self, *args)
FineTuning.training_step = stopping
"""


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["online", "offline"])
def test_the_server_has_every_epoch_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    """W&B's client sends a run stopped after epoch 2 of 4 and resumed, live or by `wandb sync`."""
    config = tiny_config(tmp_path, epochs=4, wandb={"mode": mode, "project": "p", "entity": "e"})
    with served() as server:
        monkeypatch.setenv("WANDB_BASE_URL", server.url)
        monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
        monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
        for before, flags, code in ((STOP, {}, 143), ("", {"resume": True}, 0)):
            process = spawn(config, before, **flags)
            out, err = process.communicate(timeout=300)
            assert process.returncode == code, out + err
            assert "note: wandb" not in out
        store = tmp_path / "run" / "wandb"
        if mode == "offline":
            assert server.history == {}
            command = [sys.executable, "-m", "wandb", "sync", str(store)]
            subprocess.run(command, env=environment(), check=True, timeout=300)
        (run_id,) = server.history
        assert [row["epoch"] for row in server.rows(run_id) if "epoch" in row] == [1, 2, 3, 4]
        steps = [row["_step"] for row in server.rows(run_id)]
        assert steps == list(range(len(steps)))
        metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
        found = server.summary[run_id]
        assert found["best_epoch"] == metrics["best_epoch"]
        assert found["test_auc_macro"] == metrics["test"]["auc_macro"]["value"]
