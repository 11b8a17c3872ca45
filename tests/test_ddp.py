"""Two processes that train together end where one process ends."""

from __future__ import annotations

import csv
import json
import signal
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file
from training_helpers import make_images, make_weights, spawn, tiny_config

from wara.errors import WaraError
from wara.signals import Stopped
from wara.training.start import run

pytestmark = pytest.mark.slow

# 41 training images do not divide by 2, nor by the batch: the last batch is uneven and filled up.
SIZES = (25, 20, 16)


def _adapter(run: Path) -> dict[str, np.ndarray]:
    return load_file(run / "adapter" / "adapter_model.safetensors")


@pytest.fixture(scope="module", autouse=True)
def _one_thread(tmp_path_factory: pytest.TempPathFactory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        yield


def test_two_processes_equal_one(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    make_images(tmp_path / "data", SIZES)
    make_weights(tmp_path / "weights.safetensors")
    # No dropout here: processes draw their own numbers, as they must.
    options = {
        "epochs": 3, "accumulate": 2, "loss": "weighted_ce",
        "backbone": {"name": "test_vit", "weights": str(tmp_path / "weights.safetensors"),
                     "img_size": 32},
    }  # fmt: skip
    one = run(tiny_config(tmp_path, out=str(tmp_path / "one"), **options), quiet=True)
    capfd.readouterr()
    two = run(tiny_config(tmp_path, out=str(tmp_path / "two"), devices=2, **options))
    out, err = capfd.readouterr()
    assert out.count("data set ") == 1 and out.count("epoch 3/3") == 1, out + err
    assert "2 processes" in out
    assert err == ""
    wanted, got = _adapter(one), _adapter(two)
    assert wanted.keys() == got.keys()
    for name in wanted:
        np.testing.assert_allclose(got[name], wanted[name], rtol=1e-3, atol=1e-5, err_msg=name)
    rows = []
    for path in (one, two):
        with (path / "metrics.csv").open() as handle:
            rows.append(list(csv.DictReader(handle)))
    for a, b in zip(*rows, strict=True):
        for key in ("epoch", "step"):
            assert a[key] == b[key]
        for key in ("train_loss", "val_loss", "lr"):
            assert float(a[key]) == pytest.approx(float(b[key]), rel=1e-4), key
    for name in ("splits.csv",):
        assert (one / name).read_bytes() == (two / name).read_bytes()
    with (two / "predictions_val.csv").open() as handle:
        files = [row["file"] for row in csv.DictReader(handle)]
    assert len(files) == len(set(files))
    assert json.loads((two / "provenance.json").read_text())["status"] == "finished"
    assert not list(two.rglob(".*"))
    # What two processes left, one can go on with.
    assert run(tiny_config(tmp_path, out=str(two), **options), resume=True, quiet=True) == two


def test_an_error_of_a_process_comes_back(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, devices=2, lr=1e3, lr_core=1e3, lr_head=1e3, clip_grad=None,
                         warmup_epochs=0.0)  # fmt: skip
    with pytest.raises(WaraError) as caught:
        run(config, quiet=True)
    assert caught.value.exit_code == 6
    config = tiny_config(tmp_path, devices=2, batch_size=7)
    with pytest.raises(WaraError) as caught:
        run(config, quiet=True)
    assert caught.value.exit_code == 2 and "batch_size" in str(caught.value)


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_stops_all_processes(tmp_path: Path, signum: int, code: int) -> None:
    config = tiny_config(tmp_path, devices=2, epochs=10_000, warmup_epochs=0.0)
    process = spawn(config)
    curves = tmp_path / "run" / "metrics.csv"
    deadline = time.monotonic() + 180
    while not curves.exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signum)
    out, err = process.communicate(timeout=60)
    assert process.returncode == code, out + err
    assert "go on with --resume" in out
    assert err == ""
    record = json.loads((tmp_path / "run" / "provenance.json").read_text())
    assert record["status"] == "interrupted"


def test_stopped_is_what_the_library_call_raises() -> None:
    assert issubclass(Stopped, SystemExit)
