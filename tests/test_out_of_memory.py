"""A batch that memory does not suffice for is computed in parts, and the run says so."""

from __future__ import annotations

import csv
import errno
import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from greedy_method import Memory
from training_helpers import adapter_bytes, tiny_config

from wara.config import RunConfig
from wara.errors import WaraError, as_refusal, out_of_memory
from wara.evaluation.parts import Parts
from wara.signals import Stopped
from wara.training.checkpoint import load_checkpoint
from wara.training.start import run
from wara.training.task import FineTuning


@pytest.fixture(autouse=True)
def _plenty(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr("wara.runs.results._figures", lambda *_: None)
    for name in ("images", "in_backward", "only_training", "free_passes"):
        monkeypatch.setattr(Memory, name, getattr(Memory, name))
    yield


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with data, weights and `plain`, a run with memory for everything."""
    folder = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("wara.runs.results._figures", lambda *_: None)
        run(_config(folder, folder / "plain"), quiet=True)
    return folder


def _config(folder: Path, out: Path, dropout: float = 0.0, **changes: Any) -> RunConfig:
    # Batches of 8 with a short last one, two to a step with a short last window, class weights.
    method = {"method": "greedy_method:Greedy", "dropout": dropout, **changes.pop("adapter", {})}
    return tiny_config(
        folder, out=str(out), adapter=method, accumulate=2, loss="weighted_ce",
        backbone__drop_rate=dropout, **changes,
    )  # fmt: skip


def _curves(path: Path) -> list[dict[str, str]]:
    with (path / "metrics.csv").open() as handle:
        return list(csv.DictReader(handle))


@pytest.mark.parametrize(
    "where",
    [
        "backward",
        *(pytest.param(w, marks=pytest.mark.slow) for w in ("forward", "second batch of a step")),
    ],
)
def test_the_loss_is_that_of_an_undisturbed_run(home: Path, tmp_path: Path, where: str) -> None:
    Memory.images, Memory.in_backward = 3, where != "forward"
    # The gradient of the first batch is kept while the second one is done over.
    Memory.free_passes = 1 if where.startswith("second") else 0
    run(_config(home, tmp_path / "run"), quiet=True)
    for one, two in zip(_curves(home / "plain"), _curves(tmp_path / "run"), strict=True):
        assert one["step"] == two["step"]
        for name in ("train_loss", "val_loss"):
            assert float(two[name]) == pytest.approx(float(one[name]), abs=1e-5), name
    start = 1 if where.startswith("second") else 0
    micro = [[start, 4], [start, 2]]
    assert load_checkpoint(tmp_path / "run/checkpoints/last.ckpt")["progress"]["micro"] == micro
    assert json.loads((tmp_path / "run/provenance.json").read_text())["memory"] == micro
    metrics = json.loads((tmp_path / "run/metrics.json").read_text())
    assert (metrics["micro_batch"], metrics["accumulate"]) == (2, 8)
    plain = json.loads((home / "plain/metrics.json").read_text())
    assert (plain["micro_batch"], plain["accumulate"]) == (8, 2)
    told = f"out of memory in batch {start + 1}: from there on batches of 8 were computed 2 images"
    assert told in (tmp_path / "run/report.md").read_text()


def test_a_gradient_in_parts_is_that_of_the_batch(home: Path, tmp_path: Path) -> None:
    """Of the first step, before any rounding has gone through the optimiser."""
    found = []
    original = FineTuning.on_before_optimizer_step

    def look(self: FineTuning, optimizer: torch.optim.Optimizer) -> None:
        if self.optimiser_step_count == 0:
            found.append(
                [p.grad.clone() for group in optimizer.param_groups for p in group["params"]]
            )
        original(self, optimizer)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FineTuning, "on_before_optimizer_step", look)
        for images in (float("inf"), 1):
            Memory.images = images
            run(_config(home, tmp_path / str(images), epochs=1, warmup_epochs=0.0), quiet=True)
    whole, parts = found
    for one, two in zip(whole, parts, strict=True):
        np.testing.assert_allclose(two, one, rtol=1e-4, atol=1e-7)
    assert max(float(g.abs().max()) for g in whole) > 1e-3


@pytest.mark.slow
def test_a_resumed_run_keeps_its_parts_to_the_bit(home: Path, tmp_path: Path) -> None:
    """With dropout, and with more memory after the stop than before."""
    Memory.images = 3
    run(_config(home, tmp_path / "whole", dropout=0.2), quiet=True)
    original, seen = FineTuning.training_step, []

    def step(self: FineTuning, *args: Any) -> torch.Tensor:
        seen.append(0)
        if len(seen) == 3:  # in the first epoch: no checkpoint knows of the parts yet
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, *args)

    config = _config(home, tmp_path / "cut", dropout=0.2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FineTuning, "training_step", step)
        with pytest.raises(Stopped):
            run(config, quiet=True)
    Memory.images = float("inf")
    run(config, resume=True, quiet=True)
    assert adapter_bytes(tmp_path / "cut") == adapter_bytes(tmp_path / "whole")


def test_no_memory_for_one_image_is_refused(home: Path, tmp_path: Path) -> None:
    Memory.images = 0
    with pytest.raises(WaraError, match="one image at a time") as caught:
        run(_config(home, tmp_path / "run"), quiet=True)
    assert caught.value.exit_code == 7 and "img_size" in caught.value.remedy
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_validation_and_prediction_are_halved_too(home: Path, tmp_path: Path) -> None:
    Memory.images, Memory.only_training = 3, False
    run(_config(home, tmp_path / "run"), quiet=True)
    rows = []
    for path in (home / "plain", tmp_path / "run"):
        with (path / "predictions_test.csv").open() as handle:
            rows.append(list(csv.DictReader(handle)))
    for one, two in zip(*rows, strict=True):
        assert one["file"] == two["file"]
        for name in (name for name in one if name.startswith("logit_")):
            assert float(two[name]) == pytest.approx(float(one[name]), abs=1e-4)


def test_a_model_that_does_not_fit_is_refused_before_training(home: Path, tmp_path: Path) -> None:
    """By the machine's own allocator, of which it wants four petabytes."""
    with pytest.raises(WaraError) as caught:
        run(_config(home, tmp_path / "run", adapter={"numbers": 2**50}), quiet=True)
    assert caught.value.exit_code == 7 and "smaller backbone" in caught.value.remedy
    assert not (tmp_path / "run").exists()


def test_parts_put_outputs_together_in_order() -> None:
    asked: list[int] = []

    def model(x: torch.Tensor) -> torch.Tensor:
        asked.append(len(x))
        if len(x) > 2:
            raise MemoryError
        return x * 2

    parts = Parts(model)
    assert parts(torch.arange(7)).tolist() == [0, 2, 4, 6, 8, 10, 12]
    assert parts(torch.arange(3)).tolist() == [0, 2, 4]
    # Found once: 7, 4, then 2 at a time, and so from then on.
    assert asked == [7, 4, 2, 2, 2, 1, 2, 1]
    with pytest.raises(ZeroDivisionError):
        Parts(lambda x: x / (1 // 0))(torch.ones(4))


def test_what_says_that_memory_ran_out() -> None:
    for take in (lambda: torch.empty(2**50), lambda: np.empty(2**55), lambda: bytearray(2**60)):
        with pytest.raises((RuntimeError, MemoryError)) as caught:
            take()
        assert out_of_memory(caught.value) and as_refusal(caught.value).exit_code == 7
    yes = [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("CUDA error: out of memory"),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
    ]
    no = [RuntimeError("shapes differ"), OSError(errno.ENOSPC, "full"), ValueError("out of memory")]
    assert all(map(out_of_memory, yes)) and not any(map(out_of_memory, no))
