"""Losses, schedule, optimiser, refusals, plan, and what a run leaves behind."""

from __future__ import annotations

import csv
import dataclasses
import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file
from timm.scheduler import CosineLRScheduler
from training_helpers import CLASSES, make_images, spawn, tiny_config

import wara
from wara import cli
from wara.adapters import METHODS, method_from_options
from wara.adapters.baselines import PeftMethod
from wara.backbones import build_backbone
from wara.cards import public_name
from wara.config import RunConfig, dump_config, load_config
from wara.data.balance import SplitTable, table_lines
from wara.errors import WaraError
from wara.evaluation.calibration import to_probs
from wara.evaluation.predict import predict
from wara.evaluation.split import evaluate_split
from wara.images import load_tensor
from wara.net import reachable
from wara.runs.progress import Progress
from wara.runs.report import cell, result_table
from wara.training.checkpoint import load_checkpoint
from wara.training.console import Console
from wara.training.loggers import public_config
from wara.training.losses import check_options, loss_per_image, resolve_loss
from wara.training.recipe import Recipe
from wara.training.setup import pick_device
from wara.training.start import run
from wara.training.task import FineTuning, schedule, step_seed

# -- losses -----------------------------------------------------------------------------------


@pytest.fixture
def batch() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(2)
    return rng.normal(0, 2, (6, 3)).astype(np.float32), np.array([0, 2, 1, 1, 0, 2])


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    values = logits.astype(np.float64)
    return values - np.log(np.exp(values).sum(1, keepdims=True))


def test_single_label_losses_against_numpy(batch: tuple[np.ndarray, np.ndarray]) -> None:
    logits, labels = batch
    logs = _log_softmax(logits)
    true = logs[np.arange(6), labels]
    weights = np.array([0.5, 1.0, 3.0])
    smooth = 0.9 * true + 0.1 * logs.mean(1)
    wanted = {
        ("ce", 0.0): -true,
        ("ce", 0.1): -smooth,
        ("weighted_ce", 0.0): -weights[labels] * true,
        ("weighted_ce", 0.1): -weights[labels] * smooth,
        ("focal", 0.0): -((1 - np.exp(true)) ** 1.5) * true,
    }
    for (name, smoothing), expected in wanted.items():
        got = loss_per_image(
            torch.tensor(logits), torch.tensor(labels), loss=name,
            weights=torch.tensor(weights, dtype=torch.float32), gamma=1.5, smoothing=smoothing,
        )  # fmt: skip
        np.testing.assert_allclose(got.numpy(), expected, rtol=1e-5, err_msg=name)


def test_multilabel_losses_against_numpy() -> None:
    rng = np.random.default_rng(3)
    logits, labels = rng.normal(0, 2, (5, 4)), rng.integers(0, 2, (5, 4))
    probs = 1 / (1 + np.exp(-logits))
    right = np.where(labels == 1, probs, 1 - probs)
    x, y = torch.tensor(logits), torch.tensor(labels).float()
    bce = loss_per_image(x, y, loss="bce").numpy()
    np.testing.assert_allclose(bce, -np.log(right).mean(1), rtol=1e-5)
    focal = loss_per_image(x, y, loss="focal", gamma=2.0).numpy()
    np.testing.assert_allclose(focal, (-((1 - right) ** 2) * np.log(right)).mean(1), rtol=1e-4)


def test_focal_loss_of_a_sure_image_has_a_finite_gradient() -> None:
    logits = torch.tensor([[80.0, -80.0]], requires_grad=True)
    loss_per_image(logits, torch.tensor([0]), loss="focal", gamma=0.5).sum().backward()
    assert logits.grad is not None and logits.grad.isfinite().all()


@pytest.mark.parametrize(
    ("loss", "task", "counts", "wanted"),
    [
        ("auto", "multiclass", (30, 10), "ce"),
        ("auto", "binary", (31, 10), "weighted_ce"),
        ("auto", "multilabel", (100, 1), "bce"),
        ("focal", "multilabel", (100, 1), "focal"),
        ("ce", "ordinal", (100, 1), "ce"),
    ],
)
def test_the_choice_of_the_loss(loss: str, task: str, counts: tuple, wanted: str) -> None:
    name, why = resolve_loss(loss, task, counts)
    assert name == wanted and why


@pytest.mark.parametrize(("loss", "task"), [("bce", "binary"), ("weighted_ce", "multilabel")])
def test_a_loss_that_does_not_fit_is_refused(loss: str, task: str) -> None:
    with pytest.raises(WaraError) as caught:
        resolve_loss(loss, task, (10, 10))
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("loss", "task", "smoothing", "monitor", "part"),
    [
        ("focal", "binary", 0.1, "auc_macro", "takes no label smoothing"),
        ("auto", "multilabel", 0.1, "auc_macro", "'bce' takes no label smoothing"),
        ("ce", "multiclass", 0.1, "qwk", "balanced_accuracy, f1_macro$"),
    ],
)
def test_an_option_without_effect_is_refused(
    loss: str, task: str, smoothing: float, monitor: str, part: str
) -> None:
    with pytest.raises(WaraError, match=part) as caught:
        check_options(loss, task, smoothing=smoothing, monitor=monitor)
    assert caught.value.exit_code == 2 and len(str(caught.value).splitlines()) == 1
    check_options("auto", "ordinal", smoothing=0.1, monitor="qwk")
    check_options("focal", task, smoothing=0.0, monitor="f1_macro")


def test_a_run_refuses_options_without_effect_all_at_once(tmp_path: Path, folder: Path) -> None:
    config = tiny_config(
        folder, out=str(tmp_path / "run"), loss="focal", label_smoothing=0.1, monitor="qwk"
    )
    with pytest.raises(WaraError) as caught:
        run(config, quiet=True)
    assert caught.value.exit_code == 2 and len(str(caught.value).splitlines()) == 2
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("method", list(METHODS))
def test_the_learning_rate_is_the_methods_unless_one_is_set(
    tmp_path: Path, folder: Path, method: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if issubclass(METHODS[method], PeftMethod):
        pytest.importorskip("peft")
    adapter = {"method": method, **SMALL.get(method, {})}
    config = tiny_config(folder, out=str(tmp_path / "run"), adapter=adapter)
    group, own = next(iter(METHODS[method].rates.items()))
    assert config.resolved().lr == own
    run(config, dry_run=True)
    shown = {"adapter": "adapter", "core": "cores", "head": "head"}[group]
    assert f", lr: {shown} {own:g}" in capsys.readouterr().out
    assert config.model_copy(update={"lr": 0.0}).resolved().lr == 0.0


def test_the_method_of_a_run_is_made_once(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the command line to the report one object is handed on."""
    made: list[wara.WaRA] = []
    original = wara.WaRA.__init__

    def count(self: wara.WaRA, *args: Any, **options: Any) -> None:
        made.append(self)
        original(self, *args, **options)

    (tmp_path / "run.yaml").write_text(dump_config(tiny_config(folder, epochs=1)))
    monkeypatch.setattr(wara.WaRA, "__init__", count)
    argv = ["train", "--cfg", str(tmp_path / "run.yaml"), "--out", str(tmp_path / "run"), "--quiet"]
    assert cli.main(argv) == 0
    assert len(made) == 1


def test_the_fitted_rank_is_what_is_written(
    tmp_path: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = {"method": "wara", "core": "scalar", "budget": "lora_r8"}
    run(tiny_config(folder, out=str(tmp_path / "run"), epochs=1, adapter=adapter))
    saved = json.loads((tmp_path / "run/adapter/adapter_config.json").read_text())["options"]
    trained = load_file(tmp_path / "run/adapter/adapter_model.safetensors")
    ranks = {t.shape[-1] for name, t in trained.items() if name.endswith("adapter.up")}
    written = load_config(tmp_path / "run/config.yaml").adapter
    assert ranks == {8} == {saved["rank"], written.rank} and written.budget is None
    assert "rank=8" in capsys.readouterr().out
    asked = json.loads((tmp_path / "run/provenance.json").read_text())["budget"]
    assert asked["asked"] == "lora_r8" and asked["got"] >= asked["wanted"]
    # The command that began it goes on with it.
    run(tiny_config(folder, out=str(tmp_path / "run"), epochs=1, adapter=adapter), resume=True)
    assert "already finished" in capsys.readouterr().out


@pytest.mark.parametrize("method", [name for name, cls in METHODS.items() if cls.knob])
def test_a_size_beside_a_budget_is_refused(method: str) -> None:
    for key in METHODS[method].knob:
        with pytest.raises(WaraError, match=f"{key} and budget are both set"):
            method_from_options(method, {key: 3, "budget": "lora_r4"})
    assert method_from_options(method, {METHODS[method].knob[0]: None, "budget": "lora_r4"})


@pytest.mark.parametrize("method", list(METHODS))
def test_the_set_rate_is_that_of_what_trains(folder: Path, method: str) -> None:
    if issubclass(METHODS[method], PeftMethod):
        pytest.importorskip("peft")
    adapter = {"method": method, **SMALL.get(method, {})}
    config = tiny_config(folder, adapter=adapter, lr=0.123)
    model = wara.adapt(timm.create_model("test_vit", num_classes=3), config.adapter)
    task = _module(model, rates=config.rates)
    groups = task.configure_optimizers().param_groups
    trained = {group["name"] for group in groups}
    # Whatever trains has a rate, and the first of these is the one that was set.
    assert trained == set(config.rates)
    main = next(iter(METHODS[method].rates))
    assert {group["lr"] for group in groups if group["name"] == main} == {0.123}
    assert main == "head" or 0.123 not in {g["lr"] for g in groups if g["name"] == "head"}


def test_the_plan_says_what_a_budget_came_to(
    tmp_path: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = {"method": "lora", "budget": "1.6*lora_r1"}
    run(tiny_config(folder, out=str(tmp_path / "run"), adapter=adapter), dry_run=True)
    wanted, got = re.search(  # type: ignore[union-attr]
        r"1\.6\*lora_r1: ([\d,]+) parameters wanted, ([\d,]+) got", capsys.readouterr().out
    ).groups()
    unit = int(got.replace(",", "")) / 2  # the nearest rank is 2
    assert int(wanted.replace(",", "")) == pytest.approx(1.6 * unit, abs=1)


# -- schedule and randomness ------------------------------------------------------------------


@pytest.mark.parametrize("warmup", [0, 7])
def test_the_cosine_is_timms(warmup: int) -> None:
    optimiser = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    total = 50
    theirs = CosineLRScheduler(
        optimiser, t_initial=total - warmup, warmup_t=warmup, warmup_prefix=True, t_in_epochs=False,
        warmup_lr_init=1 / (warmup + 1),
    )  # fmt: skip
    for step in range(total):
        theirs.step_update(step)
        ours = schedule(step, total=total, warmup=warmup)
        if step >= warmup:
            assert ours == pytest.approx(optimiser.param_groups[0]["lr"], abs=1e-12)
    ramp = [schedule(step, total=total, warmup=warmup) for step in range(warmup + 1)]
    assert np.allclose(np.diff(ramp), 1 / (warmup + 1)) and ramp[-1] == 1.0
    assert schedule(total, total=total, warmup=warmup) == pytest.approx(0.0)


def test_step_seeds_do_not_repeat() -> None:
    seeds = {step_seed(s, b, r) for s in range(4) for b in range(50) for r in range(2)}
    assert len(seeds) == 400
    torch.manual_seed(max(seeds))
    assert step_seed(1, 2, 0) == step_seed(1, 2, 0)


def test_probabilities_are_exact_and_stable() -> None:
    logits = np.array([[1000.0, 0.0], [0.0, 0.0]], dtype=np.float32)
    assert np.array_equal(to_probs(logits, task="binary"), [[1.0, 0.0], [0.5, 0.5]])
    assert np.array_equal(to_probs(logits, task="multilabel"), [[1.0, 0.5], [0.5, 0.5]])


def _module(model: torch.nn.Module, **changes: Any) -> FineTuning:
    rates = {"adapter": 1e-3, "core": 2e-2, "head": 3e-3}
    options: dict[str, Any] = {
        "rates": rates, "loss": "ce", "batch_size": 8, "weight_decay": 0.1, "epochs": 2
    }  # fmt: skip
    recipe = Recipe(**{**options, **changes})
    return FineTuning(model, recipe, task="multiclass", classes=CLASSES)


def test_every_parameter_has_its_rate_and_decay() -> None:
    model = wara.adapt(timm.create_model("test_vit", num_classes=3), wara.WaRA(rank=2, level=1))
    groups = _module(model).configure_optimizers().param_groups
    place = {id(p): group for group in groups for p in group["params"]}
    trained = wara.trainable_parameters(model)
    assert len(place) == len(trained) == sum(len(group["params"]) for group in groups)
    seen = set()
    for name, parameter in trained.items():
        group = place[id(parameter)]
        kind = "core" if name.endswith("core") else "head" if "head" in name else "adapter"
        assert group["name"] == kind, name
        assert group["lr"] == {"adapter": 1e-3, "core": 2e-2, "head": 3e-3}[kind]
        decays = kind != "core" and parameter.ndim > 1
        assert group["weight_decay"] == (0.1 if decays else 0.0), name
        seen.add(kind)
    assert seen == {"adapter", "core", "head"}


# -- progress ---------------------------------------------------------------------------------


def test_best_epoch_first_wins_ties_and_loss_goes_down() -> None:
    progress = Progress(monitor="auc_macro")
    flags = []
    for value in (0.5, 0.7, 0.7, 0.6):
        progress.epoch += 1
        flags.append(progress.note({}, value))
    assert flags == [True, True, False, False]
    assert (progress.best_epoch, progress.best_value, progress.stale) == (2, 0.7, 2)
    progress = Progress(monitor="val_loss")
    for value in (1.0, 0.5, 0.9):
        progress.epoch += 1
        progress.note({}, value)
    assert progress.best_epoch == 2


# -- whole runs -------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def _no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    # They take longer than the training; the run of `folder` draws them all.
    monkeypatch.setattr("wara.runs.results._figures", lambda *_: None)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data and weights, and a finished run with all figures in `run`."""
    path = tmp_path_factory.mktemp("training")
    run(tiny_config(path, epochs=2, tensorboard=True), quiet=True)
    return path


def test_the_folder_is_complete(folder: Path) -> None:
    names = {str(p.relative_to(folder / "run")) for p in (folder / "run").rglob("*") if p.is_file()}
    board = {name for name in names if name.startswith("tensorboard/")}
    assert len(board) == 1
    figures = {"learning_curves", "roc", "pr", "confusion", "reliability", "subband_energy",
               "singular_values"}  # fmt: skip
    assert names - board == {
        "config.yaml", "provenance.json", "splits.csv", "metrics.csv", "metrics.json",
        "near_duplicates.csv",
        "predictions_val.csv", "predictions_test.csv", "adapter/adapter_config.json",
        "adapter/adapter_model.safetensors", "checkpoints/last.ckpt", "checkpoints/best.ckpt",
        "report.md", "train.log", "files.sha256", *(f"plots/{name}.png" for name in figures),
    }  # fmt: skip


def test_metrics_and_tables_agree(folder: Path) -> None:
    path = folder / "run"
    metrics = json.loads((path / "metrics.json").read_text())
    for key in ("synthetic", "dataset", "backbone", "method", "adapter_params", "head_params",
                "seconds", "peak_memory_mb", "val", "test"):  # fmt: skip
        assert key in metrics
    assert metrics["synthetic"] is False and metrics["method"] == "wara"
    with (path / "predictions_test.csv").open() as handle:
        rows = list(csv.DictReader(handle))
    right = np.mean([row["label"] == row["pred"] for row in rows])
    assert {row["label"] for row in rows} | {row["pred"] for row in rows} <= set(CLASSES)
    for column in ("label", "pred"):
        assert all(CLASSES[int(row[f"{column}_index"])] == row[column] for row in rows)
    assert metrics["test"]["accuracy"]["value"] == pytest.approx(right)
    assert metrics["test"]["accuracy"]["n"] == len(rows)
    with (path / "splits.csv").open() as handle:
        splits = {row["file"]: row for row in csv.DictReader(handle)}
    assert {row["file"] for row in rows} == {f for f, r in splits.items() if r["split"] == "test"}
    for row in rows:
        probs = [float(row[f"prob_{name}"]) for name in CLASSES]
        logits = np.array([float(row[f"logit_{name}"]) for name in CLASSES])
        np.testing.assert_allclose(probs, np.exp(logits) / np.exp(logits).sum(), rtol=1e-9)
        assert splits[row["file"]]["patient"] == row["patient"]
    with (path / "metrics.csv").open() as handle:
        curves = list(csv.DictReader(handle))
    assert [row["epoch"] for row in curves] == ["1", "2"]
    best = curves[metrics["best_epoch"] - 1]
    assert float(best["val_auc_macro"]) == pytest.approx(metrics["val"]["auc_macro"]["value"])


def test_the_adapter_folder_gives_the_logits_of_the_predictions(folder: Path) -> None:
    model, info = wara.build_backbone(
        "test_vit", num_classes=3, img_size=32, weights=folder / "weights.safetensors"
    )
    wara.load_adapter(model, folder / "run" / "adapter")
    with (folder / "run" / "predictions_test.csv").open() as handle:
        rows = list(csv.DictReader(handle))
    images = torch.stack([load_tensor(folder / "data" / row["file"], info.spec) for row in rows])
    wanted = np.array([[float(row[f"logit_{n}"]) for n in CLASSES] for row in rows], np.float32)
    label = torch.zeros(len(rows), dtype=torch.int64)
    # Batches as in the run: the last bits of a matrix product depend on the number of rows.
    batches = [
        {"image": images[i : i + 8], "label": label[i : i + 8],
         "index": torch.arange(i, min(i + 8, len(rows)))}
        for i in range(0, len(rows), 8)
    ]  # fmt: skip
    got = predict(model, batches, task="multiclass", classes=3).logits
    assert np.array_equal(got, wanted)


def test_the_resolved_config_and_the_record(folder: Path) -> None:
    path = folder / "run"
    config = load_config(path / "config.yaml")
    assert config == tiny_config(folder, epochs=2, tensorboard=True).resolved()
    fields = {field.name for field in dataclasses.fields(wara.WaRA)}
    assert set(config.adapter.options()) == fields
    record = json.loads((path / "provenance.json").read_text())
    assert record["status"] == "finished" and record["ended"] >= record["started"][0]
    assert record["synthetic"] is False and record["seed"] == 0
    assert record["backbone"]["name"] == "test_vit"
    assert len(record["data"]["sha256"]) == 64
    log = (path / "train.log").read_text()
    assert "epoch 1/2" in log and "auc_macro" in log
    text = (path / "report.md").read_text()
    assert "plots/roc.png" in text and "| `auc_macro` |" in text and "wara.load_run" in text


@pytest.mark.parametrize(
    ("method", "options"),
    [*((name, {}) for name in METHODS), ("wara", {"budget": "lora_r4"}),
     ("waveft", {"budget": 0.8}), ("waveft", {"k": [3, 4]}), ("lora", {"targets": ["q", "v"]})],
)  # fmt: skip
def test_a_resolved_config_holds_every_option_and_loads_again(
    tmp_path: Path, method: str, options: dict
) -> None:
    plain = RunConfig.model_validate({"adapter": {"method": method, **options}})
    full = plain.resolved()
    left_open = set(METHODS[method].knob) if "budget" in options else set()
    fields = {field.name for field in dataclasses.fields(METHODS[method])}
    assert set(full.adapter.options()) == fields - left_open
    assert options.items() <= full.adapter.options().items()
    rates = {"lr": None, "lr_core": None, "lr_head": None}
    assert full.model_copy(update=rates) == plain
    (tmp_path / "config.yaml").write_text(dump_config(full))
    again = load_config(tmp_path / "config.yaml")
    assert again == full == full.resolved()
    assert method_from_options(method, again.adapter.options()) == METHODS[method](**options)


def test_output_is_the_plan_a_line_per_epoch_and_the_results(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    config = tiny_config(tmp_path, epochs=2)
    run(config)
    out, err = capfd.readouterr()
    assert err == ""
    lines = out.splitlines()
    for word in ("data set", "splits", "backbone", "method", "trainable", "device", "precision",
                 "loss", "output"):  # fmt: skip
        assert any(line.startswith(word) for line in lines), word
    assert sum(line.startswith("epoch ") for line in lines) == 2
    assert any(line.startswith("auc_macro") and "[" in line for line in lines)
    assert any("report.md" in line for line in lines)
    assert not any(word in out.lower() for word in ("lightning", "gpu available", "warning"))
    run(config, overwrite=True, quiet=True)
    out, err = capfd.readouterr()
    assert "epoch" not in out and "data set" not in out and "report.md" in out and err == ""


def test_a_dry_run_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tiny_config(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    run(config, dry_run=True)
    assert sorted(tmp_path.rglob("*")) == before
    out = capsys.readouterr().out
    assert "trainable" in out and "dry run" in out and "epoch 1" not in out


SMALL: dict[str, dict[str, Any]] = {
    "tiny_wara": {"rank": 2},
    "adalora": {"rank": 1, "init_rank": 2},
    "fourierft": {"n_frequency": 9},
}


THROUGH_PEFT = {name for name, method in METHODS.items() if issubclass(method, PeftMethod)}


@pytest.mark.parametrize(
    "method",
    [pytest.param(m, marks=pytest.mark.slow if m in THROUGH_PEFT else ()) for m in METHODS],
)
def test_every_method_trains(tmp_path: Path, folder: Path, method: str) -> None:
    if method in THROUGH_PEFT:
        pytest.importorskip("peft")
    config = tiny_config(
        folder, out=str(tmp_path / "run"), epochs=1,
        adapter={"method": method, **SMALL.get(method, {})},
    )  # fmt: skip
    run(config, quiet=True)
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["method"] == method
    assert metrics["head_params"] == 195
    assert (metrics["adapter_params"] == 0) == (method == "linear_probe")
    # What was saved gives the logits that were written down.
    model, info = build_backbone(
        "test_vit", num_classes=3, img_size=32, weights=folder / "weights.safetensors"
    )
    model = wara.load_adapter(model, tmp_path / "run" / "adapter").eval()
    table = list(csv.DictReader((tmp_path / "run" / "predictions_test.csv").open()))
    image = load_tensor(folder / "data" / table[0]["file"], info.spec)
    written = [float(table[0][f"logit_{name}"]) for name in CLASSES]
    assert model(image[None])[0].tolist() == pytest.approx(written, abs=1e-4)


def test_frozen_weights_do_not_move(folder: Path) -> None:
    saved = load_file(folder / "run" / "adapter" / "adapter_model.safetensors")
    base = load_file(folder / "weights.safetensors")
    assert not set(saved) & {name for name in base if not name.startswith("head.")}


def test_overfitting_lowers_the_loss(tmp_path: Path, folder: Path) -> None:
    config = tiny_config(
        folder, out=str(tmp_path / "run"), epochs=12, data__augment="off",
        backbone__drop_rate=0.0, lr=1e-2, lr_head=1e-2,
    )  # fmt: skip
    run(config, quiet=True)
    with (tmp_path / "run" / "metrics.csv").open() as handle:
        losses = [float(row["train_loss"]) for row in csv.DictReader(handle)]
    assert losses[-1] < 0.6 * losses[0]


def test_bf16_training(tmp_path: Path, folder: Path) -> None:
    run(tiny_config(folder, out=str(tmp_path / "run"), epochs=1, amp="bf16"), quiet=True)
    record = json.loads((tmp_path / "run" / "provenance.json").read_text())
    assert record["torch"]["precision"] == "bf16-mixed"
    state = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    assert all(t.dtype == torch.float32 for t in state.values() if t.is_floating_point())


@pytest.mark.slow
def test_compiled_training(tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = torch.compile
    # Without the minutes that the code generator takes; tracing is what can fail here.
    monkeypatch.setattr(torch, "compile", lambda model: compiled(model, backend="aot_eager"))
    run(tiny_config(folder, out=str(tmp_path / "run"), epochs=1, compile=True), quiet=True)
    assert (tmp_path / "run" / "metrics.json").exists()


def test_accumulation_equals_a_larger_batch(tmp_path: Path, folder: Path) -> None:
    adapters = []
    for name, size, accumulate in (("one", 16, 1), ("two", 8, 2)):
        config = tiny_config(
            folder, out=str(tmp_path / name), epochs=2, batch_size=size, accumulate=accumulate,
            backbone__drop_rate=0.0,
        )  # fmt: skip
        run(config, quiet=True)
        adapters.append(load_file(tmp_path / name / "adapter" / "adapter_model.safetensors"))
    for key, tensor in adapters[0].items():
        torch.testing.assert_close(adapters[1][key], tensor, rtol=1e-3, atol=1e-5)


def test_early_stopping(tmp_path: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # A rate of zero: no epoch is better than the first.
    config = tiny_config(
        folder, out=str(tmp_path / "run"), epochs=9, patience=2, lr=0.0, lr_core=0.0, lr_head=0.0
    )
    run(config)
    assert "stopping early" in capsys.readouterr().out
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["epochs"] == 3 and metrics["best_epoch"] == 1


def test_an_undefined_monitor_falls_back_to_the_loss(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(
        "wara.training.task.point_metrics", lambda *_, **__: {"auc_macro": None, "accuracy": 0.5}
    )
    run(tiny_config(folder, out=str(tmp_path / "run"), epochs=3))
    assert "auc_macro is undefined" in capsys.readouterr().out
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    with (tmp_path / "run" / "metrics.csv").open() as handle:
        losses = [float(row["val_loss"]) for row in csv.DictReader(handle)]
    assert metrics["monitor"] == "val_loss"
    assert metrics["best_epoch"] == 1 + int(np.argmin(losses))


def test_multilabel(tmp_path: Path, folder: Path) -> None:
    make_images(tmp_path / "data")
    lines = (tmp_path / "data" / "labels.csv").read_text().splitlines()
    table = ["file,label,patient,split"]
    for line in lines[1:]:
        file, label, patient = line.split(",")
        found = [label] + (["extra"] if int(patient.split("-")[1]) % 2 else [])
        split = "val" if int(patient.split("-")[1]) % 3 == 0 else "train"
        table.append(f"{file},{'|'.join(found)},{patient},{split}")
    (tmp_path / "data" / "labels.csv").write_text("\n".join(table) + "\n")
    config = tiny_config(
        folder, dataset=str(tmp_path / "data"), out=str(tmp_path / "run"), epochs=1
    )
    run(config, quiet=True)
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["val"]["auc_macro"]["value"] is not None
    with (tmp_path / "run" / "predictions_val.csv").open() as handle:
        rows = list(csv.DictReader(handle))
    names = ["calm", "extra", "mixed", "rough"]
    for row in rows:
        indices = [int(i) for i in row["label_index"].split("|")]
        assert row["label"].split("|") == [names[i] for i in indices]
    assert any("|" in row["label"] for row in rows)


def test_no_test_images_are_said() -> None:
    empty = evaluate_split(
        torch.nn.Linear(1, 1), [], [],
        task="multiclass", classes=CLASSES, name="test", bootstrap=9, seed=0,
    )  # fmt: skip
    scores = empty.scores
    assert scores["auc_macro"]["value"] is None and "no test images" in str(scores["auc_macro"])


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No network, no cached data, no cached weights."""

    def refuse(*_: object, **__: object) -> None:
        raise OSError("no network")

    monkeypatch.setattr("socket.create_connection", refuse)
    monkeypatch.setattr("wara.backbones.hub.try_to_load_from_cache", lambda *_: None)
    monkeypatch.setenv("WARA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")


def _offline(tmp_path: Path, **changes: Any) -> RunConfig:
    values = {
        "dataset": "retinamnist", "out": str(tmp_path / "run"), "epochs": 1, "bootstrap": 0,
        "wandb": {"mode": "disabled"}, "backbone": {"name": "vit_tiny_patch16_224"},
        "data": {"images": 80}, "adapter": {"method": "linear_probe"},
    }  # fmt: skip
    return RunConfig.model_validate({**values, **changes})


def test_offline_phantoms_and_the_small_backbone_stand_in(
    tmp_path: Path, no_network: None, capsys: pytest.CaptureFixture[str]
) -> None:
    run(_offline(tmp_path))
    out = capsys.readouterr().out
    plan = out.split("epoch 1/1")[0]
    assert "SYNTHETIC" in plan and "retinamnist" in plan and "wara_nano" in plan
    assert "on synthetic images:" in out.split("epoch 1/1")[1]
    path = tmp_path / "run"
    for name in ("metrics.json", "provenance.json"):
        assert json.loads((path / name).read_text())["synthetic"] is True, name
    config = json.loads((path / "adapter" / "adapter_config.json").read_text())
    assert config["extra"]["synthetic"] is True
    for name in ("splits.csv", "metrics.csv", "predictions_val.csv", "predictions_test.csv"):
        with (path / name).open() as handle:
            assert {row["synthetic"] for row in csv.DictReader(handle)} == {"true"}, name
    assert "SYNTHETIC" in (path / "report.md").read_text()
    assert (path / "config.yaml").read_text().startswith("# synthetic: true\n")
    assert "SYNTHETIC" in (path / "train.log").read_text()
    for name in ("last", "best"):
        content = load_checkpoint(path / "checkpoints" / f"{name}.ckpt")
        assert content["identity"]["synthetic"] is True
    record = json.loads((path / "provenance.json").read_text())
    assert record["data"]["substituted_for"] == "retinamnist"
    assert record["backbone"]["requested"] == "vit_tiny_patch16_224"
    assert load_config(path / "config.yaml").dataset == "retinamnist"


def test_quiet_still_says_what_stands_in(
    tmp_path: Path, no_network: None, capsys: pytest.CaptureFixture[str]
) -> None:
    run(_offline(tmp_path), quiet=True)
    lines = capsys.readouterr().out.splitlines()
    banners = [line for line in lines if line.startswith("!!!!!!!!")]
    for word in ("retinamnist", "SYNTHETIC", "replaced by 'wara_nano'"):
        assert any(word in line for line in banners), word
    assert not any(line.startswith(("data set", "epoch ")) for line in lines)


def test_offline_error_refuses_with_the_way_out(tmp_path: Path, no_network: None) -> None:
    with pytest.raises(WaraError) as caught:
        run(_offline(tmp_path, offline="error"), quiet=True)
    assert caught.value.exit_code == 3 and caught.value.remedy
    assert not (tmp_path / "run").exists()


def test_given_weights_stay_when_the_data_are_replaced(
    tmp_path: Path, folder: Path, no_network: None, capsys: pytest.CaptureFixture[str]
) -> None:
    backbone = {"name": "test_vit", "img_size": 32, "weights": str(folder / "weights.safetensors")}
    run(_offline(tmp_path, backbone=backbone), dry_run=True)
    assert "test_vit" in capsys.readouterr().out


def test_real_images_with_the_small_backbone_are_not_synthetic(
    tmp_path: Path, folder: Path, no_network: None, capsys: pytest.CaptureFixture[str]
) -> None:
    run(_offline(tmp_path, dataset=str(folder / "data")))
    out = capsys.readouterr().out
    assert "replaced by 'wara_nano'" in out and "SYNTHETIC" not in out
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["synthetic"] is False and metrics["backbone"] == "wara_nano"


# -- refusals ---------------------------------------------------------------------------------


def test_a_non_finite_gradient_stops_before_the_update(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config(folder, out=str(tmp_path / "run"), epochs=4)
    original = FineTuning.training_step
    kept: list[dict[str, torch.Tensor]] = []

    def step(self: FineTuning, batch: Any, number: int) -> torch.Tensor:
        loss = original(self, batch, number)
        if self.current_epoch == 2 and number == 1:
            kept.append({n: p.detach().clone() for n, p in self.named_parameters()})
            kept.append(dict(self.named_parameters()))  # type: ignore[arg-type]
            return loss * float("nan")
        return loss

    monkeypatch.setattr(FineTuning, "training_step", step)
    with pytest.raises(WaraError) as caught:
        run(config, quiet=True)
    assert caught.value.exit_code == 6
    assert "epoch 3, step 12" in caught.value.where
    assert all(torch.equal(value, kept[1][name]) for name, value in kept[0].items())
    last = load_checkpoint(tmp_path / "run" / "checkpoints" / "last.ckpt")
    assert last["progress"]["epoch"] == 2
    assert json.loads((tmp_path / "run" / "provenance.json").read_text())["status"] == "failed"


def test_an_infinite_loss_with_a_finite_gradient_is_noticed(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = loss_per_image
    monkeypatch.setattr(
        "wara.training.task.loss_per_image", lambda *a, **k: original(*a, **k) + math.inf
    )
    with pytest.raises(WaraError, match="loss is not finite") as caught:
        run(tiny_config(folder, out=str(tmp_path / "run")), quiet=True)
    assert caught.value.exit_code == 6
    # Nothing was trained yet, so nothing is left.
    assert not (tmp_path / "run").exists()


def test_a_bug_keeps_its_traceback_in_the_log(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def step(self: FineTuning, *_: Any) -> torch.Tensor:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(FineTuning, "training_step", step)
    with pytest.raises(ZeroDivisionError):
        run(tiny_config(folder, out=str(tmp_path / "run")), quiet=True)
    assert "a bug" in (tmp_path / "run" / "train.log").read_text()
    assert not (tmp_path / "run" / ".lock").exists()


@pytest.mark.parametrize(
    ("error", "code"),
    [(torch.OutOfMemoryError("CUDA out of memory"), 7),
     (RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed."), 7),
     (RuntimeError("upsample does not have a deterministic implementation, but"), 2),
     (RuntimeError("Caught WaraError\nwara.errors.WaraError: error[data]: truncated; x.png"), 3)],
)  # fmt: skip
def test_known_failures_become_refusals(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, code: int
) -> None:
    def step(self: FineTuning, *_: Any) -> torch.Tensor:
        raise error

    monkeypatch.setattr(FineTuning, "training_step", step)
    with pytest.raises(WaraError) as caught:
        run(tiny_config(folder, out=str(tmp_path / "run")), quiet=True)
    assert caught.value.exit_code == code
    assert not (tmp_path / "run").exists()


def test_an_existing_run_is_refused_at_once(folder: Path) -> None:
    with pytest.raises(WaraError) as caught:
        run(tiny_config(folder), quiet=True)
    assert caught.value.exit_code == 2 and "--overwrite" in caught.value.remedy


def test_bad_data_leaves_no_run_folder(tmp_path: Path) -> None:
    config = tiny_config(tmp_path)
    (tmp_path / "data" / "images" / "calm_001.png").write_bytes(b"not an image")
    with pytest.raises(WaraError) as caught:
        run(config, quiet=True)
    assert caught.value.exit_code == 3
    assert "calm_001.png" in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_global_settings_are_put_back(folder: Path, tmp_path: Path) -> None:
    assert not torch.are_deterministic_algorithms_enabled()
    run(tiny_config(folder, out=str(tmp_path / "run"), epochs=1), quiet=True)
    assert not torch.are_deterministic_algorithms_enabled()


# -- plan, report, loggers --------------------------------------------------------------------


def test_device_and_precision() -> None:
    def picked(**options: Any) -> Any:
        return pick_device(RunConfig.model_validate({"accelerator": "cpu", **options}))

    assert picked().accelerator == "cpu"
    assert picked(amp="off").precision == "32-true"
    assert picked(amp="bf16").precision == "bf16-mixed"
    auto = picked(amp="auto")
    assert (auto.precision == "bf16-mixed") == ("has it" in auto.arithmetic)
    if not torch.cuda.is_available():
        with pytest.raises(WaraError) as caught:
            picked(accelerator="gpu")
        assert caught.value.exit_code == 7


def test_fewer_gpus_than_devices_are_not_replaced_by_the_cpu(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    with pytest.raises(WaraError, match="2 GPU.s. asked for, 1 available") as caught:
        pick_device(RunConfig(devices=2))
    assert caught.value.exit_code == 7
    assert pick_device(RunConfig(devices=2, accelerator="cpu")).accelerator == "cpu"


def test_the_split_table_counts() -> None:
    table = SplitTable.of(
        [0, 1, 1, 0], ["p", "p", "q", None], ["train", "train", "val", "test"], ["no", "yes"]
    )
    assert table.counts == {"train": (1, 1), "val": (0, 1), "test": (1, 0)}
    assert table.patients == {"train": 1, "val": 1, "test": None}
    assert table_lines(table)[1].split() == ["train", "2", "1", "1", "1"]
    many = [f"finding number {i}" for i in range(14)]
    wide = SplitTable.of([(1,) * 14], [None], ["train"], many)
    assert "1 finding number 13" in table_lines(wide)[0] and len(table_lines(wide)) == 3


def test_result_cells() -> None:
    full = {"value": 0.91249, "low": 0.8, "high": 0.95, "n": 9, "reason": None}
    assert cell(full) == "0.912 [0.800, 0.950]"
    assert cell({**full, "low": None, "high": None}) == "0.912"
    assert cell({**full, "value": None, "reason": "one class"}) == "undefined: one class"
    assert len(result_table({"ece": full}, {"ece": full, "auc_macro": full})) == 3


def test_the_console_logs_what_it_does_not_print(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with Console(quiet=True) as console:
        console.say("before")
        console.log_to(tmp_path / "train.log")
        console.say("after\ntwo lines")
        console.final("result")
    assert capsys.readouterr().out == "result\n"
    lines = [line[21:] for line in (tmp_path / "train.log").read_text().splitlines()]
    assert lines == ["before", "after", "two lines", "result"]
    with Console(enabled=False) as console:
        console.final("other ranks are silent")
    assert capsys.readouterr().out == ""


def test_public_config_names_no_place() -> None:
    config = RunConfig.model_validate(
        {"dataset": "/home/ann/patients", "out": "/home/ann/out", "data": {"cache": "/home/ann/c"},
         "backbone": {"weights": "/home/ann/w.pth"}}
    )  # fmt: skip
    assert "ann" not in json.dumps(public_config(config.model_dump(mode="json")))


def test_only_shipped_names_of_data_sets_are_public() -> None:
    assert public_name("retinamnist") == public_name("retinamnist", "retinamnist") == "retinamnist"
    assert public_name("retinamnist", "fundus_phantom") == "fundus_phantom"
    for own in ("clinic_ann", "clinic_ann.yaml", "../clinic_ann", "clinic/ann"):
        assert public_name(own) == public_name(own, "clinic_ann") == "local"
        assert public_name(own, "retinamnist") == "local"
        assert public_config({"dataset": own})["dataset"] == "local"


def test_wandb_is_told_no_name_of_the_users_data(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[Any] = []

    class Recorder:
        note = ""

        def __init__(self, _: Any, **options: Any) -> None:
            told.append({k: v for k, v in options.items() if k != "folder"})

        def epoch(self, *_: Any) -> None: ...

        def results(self, *, summary: dict, **_: Any) -> None:
            told.append(summary)

        def close(self, _: int) -> None: ...

    shutil.copytree(folder / "data", tmp_path / "clinic_ann")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("wara.training.loggers.WandbRun", Recorder)
    online = {"mode": "online"}
    run(tiny_config(folder, dataset="clinic_ann", out="run", epochs=1, wandb=online), quiet=True)
    assert len(told) == 2 and "clinic_ann" not in json.dumps(told)
    assert told[0]["name"] == "local_wara_s0" and told[1]["dataset"] == "local"
    assert json.loads(Path("run/metrics.json").read_text())["dataset"] == "clinic_ann"


def test_reachability_is_decided_quickly() -> None:
    assert not reachable("https://127.0.0.1:9", seconds=1.0)


SECRETS = """
import getpass, platform, socket
socket.gethostname = platform.node = lambda: "secrethost"
getpass.getuser = lambda: "secretuser"
"""


@pytest.mark.slow
def test_wandb_offline_holds_no_names(tmp_path: Path) -> None:
    tiny_config(tmp_path)
    shutil.copytree(tmp_path / "data", tmp_path / "clinic_ann")
    own = str(tmp_path / "clinic_ann")
    config = tiny_config(tmp_path, dataset=own, epochs=1, wandb={"mode": "offline"})
    process = spawn(config, SECRETS)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0 and err == "", out + err
    assert "wandb failed" not in out
    store = tmp_path / "run" / "wandb"
    files = [path for path in store.rglob("*") if path.is_file() and not path.is_symlink()]
    assert any(path.suffix == ".wandb" for path in files)
    content = b"".join(path.read_bytes() for path in files)
    for word in ("calm_0", "calm-1", "labels.csv", "weights.safetensors", "secrethost",
                 "secretuser", "clinic_ann"):  # fmt: skip
        assert word.encode() not in content, word
    for word in (b"val_auc_macro", b"test_auc_calm", b"confusion_matrix", b"adapter_config.json"):
        assert word in content, word
    pictures = {path.name.rsplit("_", 2)[0] for path in files if path.suffix in (".png", ".jpg")}
    assert pictures == {"subband_energy", "singular_values"}, pictures


def test_trouble_with_wandb_does_not_end_a_run(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise ConnectionError("no service")

    monkeypatch.setattr("wara.training.loggers.WandbRun", broken)
    run(tiny_config(folder, out=str(tmp_path / "run"), epochs=1, wandb={"mode": "offline"}))
    assert "going on without it" in capsys.readouterr().out
    assert (tmp_path / "run" / "metrics.json").exists()
