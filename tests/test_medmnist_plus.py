"""The configs of the published bar: what they ask for, and that they run on files of that form."""

from __future__ import annotations

import csv
import json
import math
import re
import shlex
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
from medmnist_helpers import BAR, SIZES, write_medmnist
from training_helpers import make_weights

from wara import cli
from wara.adapters import METHODS, LoRA
from wara.backbones import hub
from wara.backbones.names import resolve
from wara.cards import load_card
from wara.compare.grid import with_method
from wara.config import list_configs, load_config
from wara.storage import shipped

TASKS = {
    "retinamnist": ("ordinal", ["no_dr", "mild", "moderate", "severe", "proliferative"]),
    "dermamnist": (
        "multiclass",
        ["actinic_keratoses", "basal_cell_carcinoma", "benign_keratosis", "dermatofibroma",
         "melanoma", "melanocytic_nevi", "vascular_lesions"],
    ),
    "breastmnist": ("binary", ["malignant", "normal_or_benign"]),
    "pneumoniamnist": ("binary", ["normal", "pneumonia"]),
}  # fmt: skip
PAGE = Path(__file__).resolve().parents[1] / "docs" / "evidence.md"


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, no network, and nothing in the home folder."""
    import medmnist.info

    monkeypatch.setenv("WARA_OFFLINE", "1")
    monkeypatch.setenv("WARA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(medmnist.info, "DEFAULT_ROOT", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def small(place: Path) -> list[str]:
    """`--set` of a network small enough to train here, on the whole 224 pixels."""
    keys = {
        "backbone.name": "test_vit",
        "backbone.weights": make_weights(place / "weights.safetensors"),
        "backbone.img_size": 224,
        "epochs": 1,
        "bootstrap": 20,
        "accelerator": "cpu",
        "wandb.mode": "disabled",
    }
    return [word for key, value in keys.items() for word in ("--set", f"{key}={value}")]


@pytest.fixture
def files(place: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Path]:
    """The file of each set, small."""
    return {flag: write_medmnist(place / "cache", flag, monkeypatch) for flag in TASKS}


def test_the_four_sets_of_the_bar_are_shipped() -> None:
    assert {name for name in list_configs() if name.startswith("medmnist_plus_")} == set(BAR)


@pytest.mark.parametrize(("name", "flag"), BAR.items())
def test_a_config_is_the_published_probe(name: str, flag: str) -> None:
    config = load_config(f"{name}.yaml")
    card = load_card(config.dataset)
    assert config.dataset == flag and (card.source.flag, card.source.size) == (flag, 224)
    assert (card.task, card.class_names) == TASKS[flag]
    assert config.offline == "error"  # a bar is not met with phantoms
    backbone = timm.get_pretrained_cfg("vit_base_patch16_224")  # the name in the authors' code
    assert config.backbone.name == f"{backbone.architecture}.{backbone.tag}"
    assert config.backbone.img_size is None and backbone.input_size == (3, 224, 224)
    recipe = (config.epochs, config.batch_size, config.weight_decay, config.warmup_epochs)
    assert recipe == (100, 64, 0.01, 0.0) and config.clip_grad is None
    assert (config.loss, config.data.augment, config.amp) == ("ce", "off", "off")
    assert config.adapter.name == "linear_probe" and config.rates == {"head": 1e-4}


@pytest.mark.parametrize("name", BAR)
def test_the_configs_differ_in_their_data_set_alone(name: str) -> None:
    first, *_ = BAR
    one, other = (load_config(f"{n}.yaml") for n in (first, name))
    assert one.model_copy(update={"dataset": BAR[name]}) == other


def test_the_rates_of_the_bar_hold_in_a_comparison() -> None:
    """The probe and full fine-tuning train at the published rate; adapters keep their own."""
    config = load_config("medmnist_plus_breast.yaml")
    assert with_method(config, "linear_probe").rates == {"head": 1e-4}
    assert with_method(config, "full").rates == {"adapter": 1e-4, "head": 1e-4}
    own = load_config("ultrasound_lora.yaml").rates["adapter"]
    assert with_method(config, "lora").rates == {"adapter": own, "head": 1e-4}
    # `lr` is that of all, and goes before a head's by name where the head is all that trains.
    both = config.model_copy(update={"adapter": LoRA(), "lr": 3e-3})
    assert with_method(both, "linear_probe").rates == {"head": 3e-3}
    assert with_method(both, "lora").rates == {"adapter": 3e-3, "head": 1e-4}


@pytest.mark.parametrize(("name", "flag"), BAR.items())
def test_without_the_real_file_it_refuses_and_says_where_to_put_it(
    name: str, flag: str, place: Path, small: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["train", "--cfg", f"{name}.yaml", *small, "--dry-run"]) == 3
    (line,) = capsys.readouterr().err.splitlines()
    assert str(place / "cache" / "medmnist" / f"{flag}_224.npz") in line and "zenodo" in line
    assert not (place / "runs").exists()


@pytest.mark.parametrize("tag", ["augreg2_in21k_ft_in1k", "dino"])
def test_without_the_real_weights_it_refuses_and_names_them(
    tag: str, files: dict[str, Path], monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr(hub, "try_to_load_from_cache", lambda repo, file: None)
    name = f"vit_base_patch16_224.{tag}"
    argv = ["train", "--cfg", "medmnist_plus_breast.yaml", "--set", f"backbone.name={name}"]
    assert cli.main([*argv, "--dry-run"]) == 3
    (line,) = capsys.readouterr().err.splitlines()
    assert "backbone.weights" in line and f"timm/{name}" in line


@pytest.mark.parametrize(("name", "flag"), BAR.items())
def test_the_plan_names_file_and_splits(
    name: str, flag: str, files: dict[str, Path], small: list[str],
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    assert cli.main(["train", "--cfg", f"{name}.yaml", *small, "--dry-run"]) == 0
    text = capsys.readouterr().out
    assert str(files[flag]) in text.replace("\n", "") and "MD5 verified" in text
    splits = re.findall(r"^ +(train|val|test) +(\d+)", text.replace("splits     ", " " * 11), re.M)
    assert {name: int(count) for name, count in splits} == SIZES
    assert "lr: head 0.0001" in text and "ce (chosen in the config)" in text


def commands() -> list[list[str]]:
    """The comparisons that the page of evidence tells to make."""
    text = PAGE.read_text().replace("\\\n", " ")
    start = "    wara compare --cfg medmnist"
    lines = [line for line in text.splitlines() if line.startswith(start)]
    return [shlex.split(line)[1:] for line in lines]


def after(words: list[str], flag: str) -> str:
    return words[words.index(flag) + 1]


def test_the_page_compares_every_method_on_all_four() -> None:
    probe, every, dino = commands()
    for words in (probe, every, dino):
        start = words.index("--cfg") + 1
        assert words[start : start + 4] == [f"{name}.yaml" for name in BAR]
        assert after(words, "--seeds") == "3"
    assert {*after(every, "--methods").split(","), "linear_probe", "full"} == set(METHODS)
    assert after(probe, "--out") == after(every, "--out") != after(dino, "--out")
    name = after(dino, "--set").removeprefix("backbone.name=")
    assert resolve(name).repo == "timm/vit_base_patch16_224.dino"


def test_page_and_configs_quote_the_same_figures() -> None:
    """Transcribed by hand from Doerrich et al. 2025: the probe, and the probe of DINO."""
    published = {
        "retina": (85.16, 85.57), "derma": (95.88, 96.83),
        "breast": (91.15, 93.43), "pneumonia": (97.63, 98.92),
    }  # fmt: skip
    page = PAGE.read_text()
    for name, figures in published.items():
        text = (shipped("configs") / f"medmnist_plus_{name}.yaml").read_text()
        quoted = re.findall(r"([\d.]+) %", text)
        rows = re.findall(rf"^\| {name}mnist \| \w+ \| ([\d.]+) \|[ |]+$", page, re.I | re.M)
        assert [*map(float, quoted)] == [*map(float, rows)] == [*figures], name


@pytest.mark.slow
def test_the_probe_and_a_method_run_on_all_four(
    files: dict[str, Path], place: Path, small: list[str]
) -> None:
    """The two commands of the page on files of the real form; every cell is a whole run."""
    probe, every, _ = commands()
    every[every.index("--methods") + 1] = "lora"
    few = [*small, "--seeds", "2", "--out", str(place / "bar")]
    assert cli.main([*probe, *few]) == 0
    first = finished(place / "bar")
    assert Counter(key[:2] for key in first) == {(flag, "linear_probe"): 2 for flag in TASKS}
    assert cli.main([*every, *few, "--beside", "majority,linear_probe"]) == 0
    runs = finished(place / "bar")
    assert Counter(key[:2] for key in runs) == {
        (flag, method): 2 for flag in TASKS for method in ("linear_probe", "lora")
    }
    for key, (run, metrics) in first.items():
        assert runs[key] == (run, metrics)  # taken as they are: even the seconds are the same
    with (place / "bar" / "table.csv").open() as stream:
        table = list(csv.DictReader(stream))
    assert {(row["dataset"], row["row"]) for row in table} == {
        (flag, row) for flag in TASKS for row in ("majority", "linear_probe", "lora")
    }
    assert {row["lr"] for row in table if row["row"] == "linear_probe"} == {"0.0001"}

    for (flag, _, _), (run, metrics) in runs.items():
        task, classes = TASKS[flag]
        assert metrics["synthetic"] is False and metrics["backbone"] == "test_vit"
        scores = metrics["test"]
        assert {f"sensitivity_{name}" for name in classes} <= set(scores)
        assert ("qwk" in scores) == (task == "ordinal")
        assert math.isfinite(scores["auc_macro"]["value"])
        assert scores["auc_macro"]["n"] == SIZES["test"]
        check_splits(run, files[flag], classes)


def finished(out: Path) -> dict[tuple[str, str, int], tuple[Path, dict[str, Any]]]:
    """Return data set, method and seed of every finished cell, with its folder and its metrics."""
    found = {}
    for path in out.glob("cells/*/metrics.json"):
        metrics = json.loads(path.read_text())
        seed = load_config(path.with_name("config.yaml")).seed
        found[metrics["dataset"], metrics["method"], seed] = (path.parent, metrics)
    return found


def check_splits(run: Path, path: Path, classes: list[str]) -> None:
    """The splits and labels of a run are those of the file, in its order."""
    with (run / "splits.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    with np.load(path) as arrays:
        for split in SIZES:
            labels = [classes[label] for label in arrays[f"{split}_labels"][:, 0]]
            assert [row["label"] for row in rows if row["split"] == split] == labels
    with (run / "predictions_test.csv").open() as stream:
        reader = csv.DictReader(stream)
        assert len(list(reader)) == SIZES["test"]
        assert {f"prob_{name}" for name in classes} <= set(reader.fieldnames or ())
