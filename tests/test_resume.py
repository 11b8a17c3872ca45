"""A run that was killed or stopped and resumed ends bit-identical to one that was not."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from training_helpers import adapter_bytes, assert_same, spawn, tiny_config

from wara.config import RunConfig
from wara.errors import WaraError
from wara.runs.exact import NAMES
from wara.signals import Stopped
from wara.training import checkpoint
from wara.training.checkpoint import Last, load_checkpoint, save_checkpoint
from wara.training.resume import changes_since, facts_here
from wara.training.setup import pick_device
from wara.training.start import run
from wara.training.task import FineTuning

EPOCHS = 4


@pytest.fixture(autouse=True)
def _no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    # They take longer than the training and are looked at elsewhere.
    monkeypatch.setattr("wara.runs.results._figures", lambda *_: None)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with data, weights and `run`, which was trained without interruption."""
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("wara.runs.results._figures", lambda *_: None)
        run(_config(folder), quiet=True)
    return folder


def _config(folder: Path, **changes: Any) -> RunConfig:
    # Dropout, stochastic depth, augmentation, accumulation with a short last window: everything
    # that draws numbers or counts.
    values: dict[str, Any] = {
        "epochs": EPOCHS, "accumulate": 2, "patience": 3, "backbone__drop_path_rate": 0.1,
        "adapter": {"method": "wara", "rank": 2, "level": 1, "dropout": 0.1},
    }  # fmt: skip
    return tiny_config(folder, **values | changes)


def _stop_at(monkeypatch: pytest.MonkeyPatch, batch: int, how: Any) -> None:
    """Call `how` in training batch number `batch` (0-based, over all epochs)."""
    original, seen = FineTuning.training_step, []

    def step(self: FineTuning, *args: Any) -> torch.Tensor:
        seen.append(0)
        if len(seen) == batch + 1:
            how()
        return original(self, *args)

    monkeypatch.setattr(FineTuning, "training_step", step)


@pytest.mark.parametrize(
    "batch", [6, *(pytest.param(b, marks=pytest.mark.slow) for b in (1, 14))]
)
def test_stopped_and_resumed_is_bit_identical(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, batch: int,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    config = _config(whole, out=str(tmp_path / "run"))
    with monkeypatch.context() as patch:
        _stop_at(patch, batch, lambda: os.kill(os.getpid(), signal.SIGTERM))
        with pytest.raises(Stopped) as caught:
            run(config)
    assert caught.value.code == 143
    assert "go on with --resume" in capsys.readouterr().out
    record = json.loads((tmp_path / "run" / "provenance.json").read_text())
    assert record["status"] == "interrupted"
    assert not (tmp_path / "run" / ".lock").exists()
    assert run(config, resume=True, quiet=True) == tmp_path / "run"
    assert_same(whole / "run", tmp_path / "run")
    record = json.loads((tmp_path / "run" / "provenance.json").read_text())
    assert record["status"] == "finished" and len(record["started"]) == 2


@pytest.mark.slow
@pytest.mark.parametrize(
    "adapter",
    [{"method": "vpt", "tokens": 3, "dropout": 0.1},
     {"method": "convpass", "bottleneck": 3, "dropout": 0.1}],
)  # fmt: skip
def test_layers_on_blocks_and_beside_modules_resume_too(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, adapter: dict[str, Any]
) -> None:
    """Prompts and bypasses, stopped in the second of three epochs."""
    unbroken, broken = (
        _config(whole, out=str(tmp_path / name), epochs=3, adapter=dict(adapter))
        for name in ("unbroken", "broken")
    )
    run(unbroken, quiet=True)
    with monkeypatch.context() as patch:
        _stop_at(patch, 8, lambda: os.kill(os.getpid(), signal.SIGTERM))
        with pytest.raises(Stopped):
            run(broken, quiet=True)
    run(broken, resume=True, quiet=True)
    assert_same(tmp_path / "unbroken", tmp_path / "broken")


def test_resume_draws_new_numbers_only_where_counted(whole: Path, tmp_path: Path) -> None:
    """The same run again, with another state of the global generators: nothing leaks in."""
    torch.manual_seed(12345)
    random.seed(5)
    torch.rand(1000)
    run(_config(whole, out=str(tmp_path / "run")), quiet=True)
    assert_same(whole / "run", tmp_path / "run")
    run(_config(whole, out=str(tmp_path / "other"), seed=1), quiet=True)
    assert adapter_bytes(tmp_path / "run") != adapter_bytes(tmp_path / "other")


@pytest.mark.slow
@pytest.mark.parametrize("attempt", range(4))
def test_killed_at_a_random_moment_and_resumed_with_workers(
    whole: Path, tmp_path: Path, attempt: int
) -> None:
    config = _config(whole, out=str(tmp_path / "run"))
    # The kill must fall into training: slow the steps down, and count from the first epoch's log.
    slow = (
        "import time\nfrom wara.training.task import FineTuning\n"
        "step = FineTuning.training_step\n"
        "FineTuning.training_step = lambda self, b, i: (time.sleep(0.1), step(self, b, i))[1]\n"
    )
    process = spawn(config, slow)
    _wait_for(tmp_path / "run" / "train.log", process)
    time.sleep(random.Random(attempt).uniform(0.0, 2.5))
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert not (tmp_path / "run" / "metrics.json").exists()
    again = spawn(_config(whole, out=str(tmp_path / "run"), data__workers=attempt % 3), resume=True)
    out, err = again.communicate(timeout=300)
    assert again.returncode == 0, out + err
    assert_same(whole / "run", tmp_path / "run")
    assert not list((tmp_path / "run").rglob(".*"))


def _wait_for(path: Path, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while not path.exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize("survivor", ["last", "neither"])
def test_a_kill_between_the_two_checkpoints(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, survivor: str
) -> None:
    """`last` of a best epoch is written and `best` is not, or the epoch is lost altogether."""
    config = _config(whole, out=str(tmp_path / "run"))
    original = checkpoint.save_checkpoint
    wanted = "best.ckpt" if survivor == "last" else "last.ckpt"

    def save(path: Path, content: dict) -> None:
        if path.name == wanted:
            raise KeyboardInterrupt
        original(path, content)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save_checkpoint", save)
        with pytest.raises(BaseException):  # noqa: B017  (Lightning turns it into SystemExit)
            run(config, quiet=True)
    assert (tmp_path / "run" / "checkpoints" / "last.ckpt").exists() == (survivor == "last")
    assert not (tmp_path / "run" / "checkpoints" / "best.ckpt").exists()
    run(config, resume=True, quiet=True)
    assert_same(whole / "run", tmp_path / "run")


@pytest.mark.parametrize("left", [["train.log"], ["config.yaml", ".lock"]])
def test_a_kill_before_the_first_checkpoint(
    whole: Path, tmp_path: Path, left: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """What a kill in the first moments leaves is enough to resume, which starts at the start."""
    path = tmp_path / "run"
    path.mkdir()
    for name in left:
        (path / name).write_bytes(b"")
    if "config.yaml" in left:
        (path / "config.yaml").write_bytes((whole / "run" / "config.yaml").read_bytes())
    config = _config(whole, out=str(path))
    run(config, resume=True)
    told = "no checkpoint to resume from yet; starting from the first epoch"
    assert told in capsys.readouterr().out and told in (path / "train.log").read_text()
    assert_same(whole / "run", path)


def test_resume_without_a_run_starts_at_the_start_and_says_so(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A kill may have come before the folder was there."""
    run(_config(whole, out=str(tmp_path / "run")), resume=True, quiet=True)
    assert f"starting from the first epoch: {tmp_path / 'run'}" in capsys.readouterr().out
    assert_same(whole / "run", tmp_path / "run")


def test_a_resume_that_never_began_leaves_nothing(whole: Path, tmp_path: Path) -> None:
    config = _config(whole, out=str(tmp_path / "run"), lr=1e3, clip_grad=None, warmup_epochs=0.0)
    with pytest.raises(WaraError) as caught:
        run(config, resume=True, quiet=True)
    assert caught.value.exit_code == 6 and not (tmp_path / "run").exists()


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(before + 1)
    yield
    torch.set_num_threads(before)


def test_another_number_of_threads_is_refused_or_recorded(
    half: RunConfig, two_threads: None, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, threads = Path(half.out or ""), torch.get_num_threads()
    with pytest.raises(WaraError) as caught:
        run(half, resume=True, quiet=True)
    line = str(caught.value)
    assert caught.value.exit_code == 2
    assert f"threads was {threads - 1} and is {threads}" in line
    assert f"OMP_NUM_THREADS={threads - 1}" in line and "--allow-change threads" in line
    with pytest.raises(WaraError, match="did you mean 'threads'") as caught:
        run(half, resume=True, quiet=True, allow=["thread"])
    assert caught.value.exit_code == 2
    run(half, resume=True, quiet=True, allow=["threads"])
    change = {"name": "threads", "was": threads - 1, "now": threads, "after_epoch": 2}
    assert json.loads((folder / "provenance.json").read_text())["changes"] == [change]
    assert json.loads((folder / "metrics.json").read_text())["changes"] == ["threads"]
    told = f"after epoch 2, threads went from {threads - 1} to {threads}"
    assert told in (folder / "report.md").read_text() and told in capsys.readouterr().out
    # What was allowed once is part of the run, and its folder is whole.
    assert load_checkpoint(folder / "checkpoints" / "last.ckpt")["progress"]["changes"] == [change]
    run(half, resume=True, quiet=True)


def test_every_named_fact_is_looked_at(whole: Path) -> None:
    config, last = _config(whole), whole / "run" / "checkpoints" / "last.ckpt"
    facts = facts_here(pick_device(config), config.devices)
    content = load_checkpoint(last)
    assert set(facts) == set(NAMES) and content["facts"] == facts
    for name in NAMES:
        found = Last(last, {**content, "facts": {**facts, name: "another"}}, "")
        with pytest.raises(WaraError, match=f"{name} was another and is") as caught:
            changes_since(found, facts, [])
        assert caught.value.exit_code == 2 and f"--allow-change {name}" in caught.value.remedy
        assert changes_since(found, facts, [name]) == {name: ("another", facts[name])}


def test_resume_of_a_finished_run_does_nothing(whole: Path) -> None:
    before = {p: p.stat().st_mtime_ns for p in (whole / "run").rglob("*") if p.is_file()}
    run(_config(whole), resume=True, quiet=True)
    assert before == {p: p.stat().st_mtime_ns for p in (whole / "run").rglob("*") if p.is_file()}


def test_a_default_that_is_written_out_is_no_difference(whole: Path) -> None:
    config = _config(whole)
    options = config.adapter.options()
    spelt = {"method": "wara", **options, "wavelet": "haar", "core": "diag", "blocks": "all"}
    run(config.model_validate({**dict(config), "adapter": spelt}), resume=True, quiet=True)
    spelt["core"] = "full"
    with pytest.raises(WaraError, match=r"adapter\.core"):
        run(config.model_validate({**dict(config), "adapter": spelt}), resume=True, quiet=True)


def test_resume_lists_every_difference(whole: Path) -> None:
    with pytest.raises(WaraError) as caught:
        run(_config(whole, lr=1e-3, batch_size=4, data__workers=2), resume=True, quiet=True)
    assert caught.value.exit_code == 2
    lines = str(caught.value).splitlines()
    assert len(lines) == 2
    assert any("; batch_size;" in line for line in lines)
    assert any("; lr;" in line for line in lines)


@pytest.fixture
def half(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunConfig:
    """Config of a run that was stopped in its third epoch."""
    config = _config(whole, out=str(tmp_path / "run"))
    with monkeypatch.context() as patch:
        _stop_at(patch, 11, lambda: os.kill(os.getpid(), signal.SIGTERM))
        with pytest.raises(Stopped):
            run(config, quiet=True)
    return config


def test_resume_refuses_what_is_not_the_runs_own(half: RunConfig, whole: Path) -> None:
    folder = Path(half.out or "")
    last = folder / "checkpoints" / "last.ckpt"
    intact = last.read_bytes()

    previous = last.with_name("previous.ckpt")
    before = previous.read_bytes()
    last.write_bytes(intact[: len(intact) // 2])
    previous.write_bytes(before[: len(before) // 2])
    with pytest.raises(WaraError, match="so is the one before it") as caught:
        run(half, resume=True, quiet=True)
    assert caught.value.exit_code == 4 and "--overwrite" in caught.value.remedy

    previous.write_bytes(before)
    last.write_bytes(intact)
    state = load_checkpoint(last)
    for key, text in (("base_sha256", "weights"), ("data_sha256", "images"), ("classes", "class")):
        changed = {**state, "identity": {**state["identity"], key: "0" * 64}}
        save_checkpoint(last, changed)
        with pytest.raises(WaraError, match=text) as caught:
            run(half, resume=True, quiet=True)
        assert caught.value.exit_code == 4

    name = next(iter(state["state"]))
    del state["state"][name]
    save_checkpoint(last, state)
    with pytest.raises(WaraError) as caught:
        run(half, resume=True, quiet=True)
    assert caught.value.exit_code == 4

    last.write_bytes(intact)
    run(half, resume=True, quiet=True)
    assert_same(whole / "run", folder)


def test_a_checkpoint_holds_what_trains_and_no_more(whole: Path) -> None:
    content = load_checkpoint(whole / "run" / "checkpoints" / "last.ckpt")
    names = set(content["state"])
    assert {"head.weight", "head.bias"} <= names
    assert not any(name.endswith(("qkv.weight", "mlp.fc1.weight")) for name in names)
    size = sum(tensor.numel() for tensor in content["state"].values())
    metrics = json.loads((whole / "run" / "metrics.json").read_text())
    assert size == metrics["adapter_params"] + metrics["head_params"]
