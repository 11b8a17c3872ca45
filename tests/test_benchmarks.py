"""The timing scripts compare like with like and write what they measured."""

from __future__ import annotations

import csv
import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from training_helpers import environment, make_images, make_weights

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import learning_rates
import methods_table
import scale
import timing
import train_step

from wara.adapters import METHODS

ROOT = Path(__file__).parents[1]


def test_a_ratio_is_taken_within_the_round() -> None:
    slow = np.array([2.0, 4.0, 6.0])
    assert timing.ratio(slow, slow / 2) == {"median": 2.0, "p10": 2.0, "p90": 2.0}


def test_every_candidate_is_timed_once_a_round() -> None:
    calls: list[str] = []
    seconds = timing.interleave(
        {name: lambda name=name: calls.append(name) for name in "abc"}, rounds=5, warmup=1
    )
    assert {name: len(values) for name, values in seconds.items()} == {"a": 5, "b": 5, "c": 5}
    assert all(sorted(calls[i : i + 3]) == ["a", "b", "c"] for i in range(0, 18, 3))


@pytest.mark.parametrize("name", train_step.METHODS)
def test_all_candidates_start_as_the_same_model(name: str) -> None:
    pytest.importorskip("peft")
    base = train_step.build("floor", "test_vit", None)[0].eval()
    model, parameters = train_step.build(name, "test_vit", None)
    x = torch.randn(2, 3, 160, 160)
    with torch.no_grad():
        same = torch.allclose(model.eval()(x), base(x), rtol=1e-4, atol=1e-5)
    assert same == (name != "vpt")  # attention spreads over its prompts from the start
    assert bool(parameters) == (name != "floor")


def test_verdicts_can_be_written() -> None:
    times = {name: np.array([1.0, 1.1]) for name in train_step.METHODS}
    peaks = dict.fromkeys(train_step.METHODS, 100.0)
    found = json.loads(json.dumps(train_step.verdicts(times, peaks)))
    reached = {row["wanted"]: row["reached"] for row in found}
    assert reached["WaRA at most 1.05 x our LoRA"] and len(found) == 9
    assert not reached["PEFT's WaveFT at least 1.5 x ours"]


def test_candidates_that_are_compared_run_in_one_group() -> None:
    groups = [{*train_step.ALWAYS, *group} for group in train_step.GROUPS]
    assert set(METHODS) <= set(train_step.METHODS)
    for _, top, bottom, _, _ in train_step.WANTED:
        assert any({top, bottom} <= group for group in groups)


def test_the_learning_rates_are_those_that_were_best() -> None:
    rows = json.loads((ROOT / "benchmarks/results/learning_rates_chest_xray.json").read_text())
    measured = {row["method"] for row in rows}
    assert measured <= set(METHODS) == set(learning_rates.RATES)
    text = (ROOT / "docs/methods.md").read_text()
    for name in sorted(measured):
        scores: dict[float, dict[int, float]] = {}
        for row in rows:
            if row["method"] == name:
                scores.setdefault(row["lr"], {})[row["seed"]] = row["auc_macro"]
        assert name == "linear_probe" or set(scores) == set(learning_rates.RATES[name])
        both = {rate: sum(found.values()) for rate, found in scores.items() if len(found) == 2}
        best = max(both, key=both.__getitem__)
        shown = ", ".join(f"{scores[best][seed]:.3f}" for seed in (0, 1))
        if name == "linear_probe":
            assert f"| `linear_probe` | | | {shown} | |" in text
            continue
        assert next(iter(METHODS[name].rates.values())) == best
        assert re.search(rf"\| `{name}` \| {best:g} \| [^|]* \| {shown} \|", text), name


def test_the_rates_of_vit_native_methods_are_those_of_the_trials() -> None:
    results = ROOT / "benchmarks/results"
    with (results / "evidence_vit_native/trials.csv").open() as handle:
        trials = list(csv.DictReader(handle))
    others = json.loads((results / "learning_rates_chest_xray.json").read_text())
    names = {row["method"] for row in trials}
    assert names == set(METHODS) - {row["method"] for row in others}
    text = (ROOT / "docs/methods.md").read_text()
    for name in sorted(names):
        scores: dict[float, dict[str, float]] = {}
        for row in trials:
            if row["method"] == name:
                scores.setdefault(float(row["lr"]), {})[row["dataset"]] = float(row["auc_macro"])
        means = {rate: np.mean(list(found.values())) for rate, found in sorted(scores.items())}
        _, guess, _ = means
        best = max(means, key=means.__getitem__)
        taken = best if means[best] - means[guess] >= 0.01 else guess
        rate = next(iter(METHODS[name].rates.values()))
        assert rate == {0.018: 0.02}.get(taken, taken) and rate in learning_rates.RATES[name], name
        shown = " | ".join(f"{by['busi']:.3f}, {by['chest_xray']:.3f}" for _, by in
                           sorted(scores.items()))  # fmt: skip
        assert f"| `{name}` | {rate:g} | {guess:g} | {shown} |" in text


@pytest.mark.slow
def test_a_grid_of_rates_is_fitted_and_goes_on_where_it_stopped(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    command = [
        sys.executable, str(ROOT / "benchmarks/learning_rates.py"),
        "--data", str(make_images(tmp_path / "data")), "--backbone", "test_vit", "--size", "32",
        "--weights", str(make_weights(tmp_path / "weights.safetensors")), "--out", str(out),
        "--train", "20", "--epochs", "2", "--seeds", "0", "--methods", "wara", "linear_probe",
        "--rates", "0.001",
    ]  # fmt: skip
    for _ in range(2):
        done = subprocess.run(command, capture_output=True, text=True, env=environment())
        assert done.returncode == 0, done.stderr
    assert not done.stdout  # every row was there already
    rows = json.loads(out.read_text())
    assert [(row["method"], row["n_train"], row["n_val"]) for row in rows] == [
        ("wara", 20, 30), ("linear_probe", 20, 30)
    ]  # fmt: skip
    assert all(0 <= row["auc_macro"] <= 1 and row["train_loss"] > 0 for row in rows)


@pytest.mark.slow
def test_the_cache_is_timed_end_to_end(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    out = tmp_path / "out.json"
    done = subprocess.run(
        [
            sys.executable, str(ROOT / "benchmarks/scale.py"), "--models", "test_vit",
            "--size", "32", "--images", "40", "--epochs", "2", "--rounds", "2", "--out", str(out),
        ],
        capture_output=True, text=True, env=environment(),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text())["test_vit"]
    assert found["rows"]["cached"]["time / cached"]["median"] == 1.0
    assert len(found["rows"]) == 4 and len(found["wanted"]) == len(scale.WANTED)
    for row, (label, *_, bound) in zip(found["wanted"], scale.WANTED, strict=True):
        assert row["wanted"] == label and row["reached"] == (row["got"]["median"] >= bound)


def test_the_rate_in_question_is_that_of_what_trains() -> None:
    args = SimpleNamespace(epochs=8, batch=32, bf16=False)
    rates = {name: learning_rates.recipe(name, 0.5, 0, args).rates for name in METHODS}
    assert rates["lora"] == {"adapter": 0.5, "head": 2e-3}
    assert rates["wara"] == {"adapter": 0.5, "core": 5e-2, "head": 2e-3}
    assert rates["tiny_wara"] == {"core": 0.5, "head": 2e-3}
    assert rates["linear_probe"] == {"head": 2e-3}


def test_the_table_of_methods_shows_runs_as_they_are() -> None:
    def run(method: str, seed: int, auc: float | None) -> dict[str, object]:
        value = {"value": auc, "low": 0.5, "high": 0.9, "n": 9, "reason": None}
        metrics = dict.fromkeys(methods_table.METRICS, value)
        return {"method": method, "seed": seed, "adapter_params": 1234, "lr": 2e-3, **metrics}

    spread = {"median": 1.05, "p10": 1.0, "p90": 1.1}
    cost = {"wara": {"time / lora": spread, "seconds": 0.25, "peak_mb": 99.6}}
    rows = [run("wara", 0, 0.7), run("wara", 1, 0.8), run("lora", 0, 0.75), run("shira", 0, None)]
    lines = methods_table.table(rows, cost).splitlines()
    cells = {line.split("|")[1].strip(" `"): line.split("|")[2:-1] for line in lines[2:]}
    assert [cell.strip() for cell in cells["wara"]] == [
        "1,234", "0.002", *["0.750 (0.700 to 0.800)"] * 3, "250", "1.05 (1.00 to 1.10)", "100",
    ]  # fmt: skip
    assert cells["lora"][2].strip() == "0.750 [0.500, 0.900]" and not cells["lora"][-1].strip()
    assert cells["shira"][2].strip() == "null" and "vera" not in cells
