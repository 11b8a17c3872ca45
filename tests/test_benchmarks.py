"""The timing scripts compare like with like and write what they measured."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import timing
import train_step


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
        torch.testing.assert_close(model.eval()(x), base(x), rtol=1e-4, atol=1e-5)
    assert bool(parameters) == (name != "floor")


def test_verdicts_can_be_written() -> None:
    times = {name: np.array([1.0, 1.1]) for name in train_step.METHODS}
    peaks = dict.fromkeys(train_step.METHODS, 100.0)
    found = json.loads(json.dumps(train_step.verdicts(times, peaks)))
    reached = {row["wanted"]: row["reached"] for row in found}
    assert reached["WaRA at most 1.05 x our LoRA"] and len(found) == 9
    assert not reached["PEFT's WaveFT at least 1.5 x ours"]
