"""Every shipped config that takes phantoms runs on them: offline, to the end."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from medmnist_helpers import BAR

from wara.cli import main, read_config
from wara.config import list_configs

# Those of the published bar refuse phantoms; tests/test_medmnist_plus.py runs them.
NAMES = [name for name in list_configs() if name not in BAR]
SMALL = ["data.images=60", "epochs=1", "bootstrap=20", "wandb.mode=disabled"]


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_config_runs_on_phantoms(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WARA_OFFLINE", "1")
    monkeypatch.setenv("WARA_CACHE", str(tmp_path / "cache"))
    out = tmp_path / "run"
    settings = [part for key in SMALL for part in ("--set", key)]
    assert main(["train", "--cfg", name, "--out", str(out), "--quiet", *settings]) == 0
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["synthetic"] is True and metrics["backbone"] == "wara_nano"
    assert name.endswith(metrics["method"])
    entry = metrics["test"]["auc_macro"]
    for number in (entry["value"], entry["low"], entry["high"]):
        assert math.isfinite(number) if number is not None else entry["reason"]


@pytest.mark.parametrize("name", NAMES)
def test_configs_say_what_images_show(name: str) -> None:
    assert name.startswith(str(read_config(name, []).data.modality))
