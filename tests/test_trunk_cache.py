"""What the trunk cache keeps: the same training, every byte checked, one fill for all runs."""

from __future__ import annotations

import csv
import json
import os
import signal
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from training_helpers import adapter_bytes, spawn, tiny_config

from wara.config import RunConfig
from wara.data import eval_batches
from wara.errors import WaraError
from wara.evaluation.predict import predict
from wara.signals import Stopped
from wara.training import cache as cache_module
from wara.training.augment import CountedAugment
from wara.training.cache import TrunkCache
from wara.training.fit import fit
from wara.training.plan import describe
from wara.training.setup import Prepared, prepare
from wara.training.start import run
from wara.training.task import FineTuning

EPOCHS, VIEWS = 3, 2
TRAIN, VAL, TEST, TOKENS, WIDTH = 40, 8, 12, 5, 64


@pytest.fixture(autouse=True)
def _no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("wara.runs.results._figures", lambda *_: None)


def config_of(folder: Path, *, blocks: Any = "last_2", **changes: Any) -> RunConfig:
    """A run with everything that draws numbers, and a cache in `folder`."""
    values: dict[str, Any] = {
        "adapter": {"method": "wara", "rank": 2, "level": 1, "dropout": 0.1, "blocks": blocks},
        "epochs": EPOCHS, "warmup_epochs": 0.0, "data__augment": "fundus",
        "data__trunk": "cache", "data__views": VIEWS, "data__cache": str(folder / "cache"),
    }  # fmt: skip
    return tiny_config(folder, **(values | changes))


def prepared(folder: Path, **changes: Any) -> Prepared:
    return prepare(config_of(folder, **changes), report_dir=None)


def cache_of(run: Prepared) -> TrunkCache:
    assert run.trunk is not None
    return run.trunk


def filled(run: Prepared) -> list[str]:
    """Fill the cache of a run; return what was said."""
    said: list[str] = []
    run.fill_trunk(said.append)
    return said


def trained(run: Prepared) -> np.ndarray:
    """Logits of all images after a fit, in float32 and by way of the images."""
    fit(run.model, run.recipe(), run.images, run.splits, run.backbone.spec, trunk=run.trunk)
    return logits_of(run)


def logits_of(run: Prepared) -> np.ndarray:
    everything = range(len(run.images))
    batches = eval_batches(run.images, everything, run.backbone.spec, batch_size=60)
    return predict(run.model, batches, task=run.task, classes=3).logits


# -- the same training ------------------------------------------------------------------------


@pytest.mark.parametrize("amp", ["off", "bf16"])
@pytest.mark.parametrize("method", ["wara", "lora", "waveft", "linear_probe"])
def test_cached_is_uncached_within_float16(tmp_path: Path, method: str, amp: str) -> None:
    adapter = {"method": method}
    if method != "linear_probe":
        adapter |= {"blocks": "last_2", "targets": ["q", "v", "fc1"]}
    if method == "wara":
        adapter["level"] = 1
    options = {"adapter": adapter, "epochs": 1, "amp": amp}
    plain, cached = prepared(tmp_path, data__trunk="off", **options), prepared(tmp_path, **options)
    start, wanted = logits_of(plain), trained(plain)
    filled(cached)
    calls: list[int] = []
    hook = cached.model.get_submodule("blocks.0").register_forward_hook(lambda *_: calls.append(1))
    fit(
        cached.model, cached.recipe(), cached.images, cached.splits, cached.backbone.spec,
        trunk=cached.trunk,
    )  # fmt: skip
    assert not calls  # training and validation ran nothing of the trunk
    hook.remove()
    off = np.abs(logits_of(cached) - wanted).max()
    assert off <= 2e-2 and off < 0.1 * np.abs(wanted - start).max()


REAL = Path(os.environ.get("WARA_REAL_DATA", Path(__file__).parents[2] / "shared"))
TINY = REAL / "weights/vit_tiny_patch16_224_imagenet1k.safetensors"


@pytest.mark.slow
@pytest.mark.skipif(not TINY.exists(), reason="needs real images and weights")
def test_real_images_and_weights_agree_within_what_is_rounded(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "images").symlink_to(REAL / "data/busi/images")
    head, *rows = (REAL / "data/busi/labels.csv").read_text().splitlines()
    (folder / "labels.csv").write_text("\n".join([head, *rows[::8]]) + "\n")
    found = {}
    for trunk, amp in product(("off", "cache"), ("off", "bf16")):
        one = prepared(
            tmp_path, data__trunk=trunk, amp=amp, epochs=1, batch_size=32, lr=2e-3,
            backbone={"name": "vit_tiny_patch16_224", "weights": str(TINY), "img_size": 96},
            adapter={"method": "wara", "blocks": "last_4"}, data__root=str(REAL / "data/busi"),
            data__near_duplicates="ignore",
        )  # fmt: skip
        filled(one)
        found[trunk, amp] = trained(one)

    def apart(one: tuple[str, str], two: tuple[str, str]) -> float:
        return float(np.abs(found[one] - found[two]).mean())

    assert np.abs(found["off", "off"] - found["cache", "off"]).max() <= 2e-2
    assert apart(("off", "off"), ("cache", "off")) <= 1e-3
    # What bfloat16 changes depends on the processor, so it is the measure of itself.
    assert apart(("off", "bf16"), ("cache", "bf16")) <= 1.5 * apart(("off", "off"), ("off", "bf16"))


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open() as handle:
        return list(csv.DictReader(handle))


@pytest.mark.slow
def test_cached_scores_are_uncached_ones_over_five_seeds(tmp_path: Path) -> None:
    means = []
    for trunk in ("off", "cache"):
        found = []
        for seed in range(5):
            out = tmp_path / f"{trunk}{seed}"
            config = config_of(tmp_path, out=str(out), seed=seed, epochs=6, data__trunk=trunk)
            metrics = json.loads((run(config, quiet=True) / "metrics.json").read_text())
            found.append(metrics["test"]["auc_macro"]["value"])
        means.append(np.mean(found))
    assert abs(means[0] - means[1]) <= 0.005, means


def test_epochs_take_the_views_in_turn_and_seeds_share_them() -> None:
    image = np.random.default_rng(0).integers(0, 256, (24, 24, 3), dtype=np.uint8)
    counted = CountedAugment("fundus", seed=1, views=2)
    views = [counted(image, epoch, 5) for epoch in range(4)]
    assert np.array_equal(views[0], views[2]) and np.array_equal(views[1], views[3])
    assert not np.array_equal(views[0], views[1])
    assert np.array_equal(CountedAugment("fundus", seed=2, views=2)(image, 0, 5), views[0])
    assert not np.array_equal(counted(image, 0, 6), views[0])
    fresh = CountedAugment("fundus", seed=1)
    assert not np.array_equal(fresh(image, 0, 5), fresh(image, 2, 5))


@pytest.mark.parametrize("batch", [pytest.param(1, marks=pytest.mark.slow), 7])
def test_resumed_from_the_cache_is_bit_identical(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, batch: int
) -> None:
    whole = run(config_of(tmp_path, out=str(tmp_path / "whole")), quiet=True)
    config = config_of(tmp_path, out=str(tmp_path / "halved"), data__cache_limit=1.0)
    original, seen = FineTuning.training_step, []

    def step(self: FineTuning, *args: Any) -> torch.Tensor:
        seen.append(0)
        if len(seen) == batch + 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(FineTuning, "training_step", step)
        with pytest.raises(Stopped):
            run(config, quiet=True)
    halved = run(config_of(tmp_path, out=str(tmp_path / "halved")), resume=True, quiet=True)
    assert adapter_bytes(whole) == adapter_bytes(halved)
    for name in ("predictions_val.csv", "predictions_test.csv"):
        assert (whole / name).read_bytes() == (halved / name).read_bytes(), name
    told = [json.loads((path / "provenance.json").read_text())["trunk"] for path in (whole, halved)]
    assert told[0] == told[1] and (tmp_path / "cache/trunk" / told[0]["key"]).is_dir()
    curves = [rows_of(path / "metrics.csv") for path in (whole, halved)]
    assert [{**row, "seconds": ""} for row in curves[0]] == [
        {**row, "seconds": ""} for row in curves[1]
    ]
    with pytest.raises(WaraError, match=r"data\.trunk"):
        run(config_of(tmp_path, out=str(halved), data__trunk="off"), resume=True, quiet=True)


# -- what is kept, and under which name ---------------------------------------------------------


def test_only_what_the_run_looks_at_is_kept(tmp_path: Path) -> None:
    trunk = cache_of(prepared(tmp_path))
    assert trunk.shape == (TOKENS, WIDTH) and trunk.depth == 4
    assert trunk.rows == VIEWS * TRAIN + VAL
    assert trunk.size == trunk.rows * (2 * TOKENS * WIDTH + 4)
    filled(prepared(tmp_path))
    assert {path.name for path in trunk.folder.iterdir()} == {
        ".lock", "about.json", "off-0.rows", "fundus-0.rows", "fundus-1.rows"
    }  # fmt: skip
    for file, split, count in (("off", "val", VAL), ("fundus", "train", TRAIN)):
        rows = trunk._files[file, 0]
        there = set(range(60)) - set(rows.missing(range(60)))
        assert there == {i for i, own in enumerate(trunk.splits) if own == split}
        assert len(there) == count
    assert json.loads((trunk.folder / "about.json").read_text()) == trunk.facts


def test_without_augmentation_there_is_one_view_and_one_file(tmp_path: Path) -> None:
    trunk = cache_of(prepared(tmp_path, data__augment="off", data__views=9))
    assert trunk.rows == TRAIN + VAL and list(trunk.seen) == [0] and len(trunk._files) == 1


def test_views_beyond_the_epochs_are_not_computed(tmp_path: Path) -> None:
    trunk = cache_of(prepared(tmp_path, data__views=None))
    assert trunk.views == 4 and trunk.rows == EPOCHS * TRAIN + VAL


# Changes that leave the cache in use, and how much of what the other run needs is there then.
SHARED = {
    "seed": ({"seed": 3}, VIEWS * TRAIN + VAL),
    "rate": ({"lr": 1e-4}, VIEWS * TRAIN + VAL),
    "method": ({"adapter": {"method": "lora", "blocks": "last_2"}}, VIEWS * TRAIN + VAL),
    "views": ({"data__views": 3}, VIEWS * TRAIN + VAL),
    "preset": ({"data__augment": "general"}, VAL),
    "split": ({"data__split_seed": 5}, None),  # the images that are in the same part again
}
OWN = {
    "size": {"backbone__img_size": 48},
    "statistics": {"backbone__mean": [0.4] * 3, "backbone__std": [0.3] * 3},
    "interpolation": {"backbone__interpolation": "nearest"},
    "depth": {"blocks": "last_3"},
    "precision": {"amp": "bf16"},
}


@pytest.mark.parametrize("change", SHARED)
def test_runs_share_a_cache(tmp_path: Path, change: str) -> None:
    changes, there = SHARED[change]
    one, other = prepared(tmp_path), prepared(tmp_path, **changes)
    assert cache_of(one).folder == cache_of(other).folder
    filled(one)
    if there is None:
        again = [a == b == "train" for a, b in zip(one.splits, other.splits, strict=True)]
        both = [a == b == "val" for a, b in zip(one.splits, other.splits, strict=True)]
        there = VIEWS * sum(again) + sum(both)
        assert 0 < there < cache_of(one).rows
    assert f": {there} of {cache_of(other).rows} outputs are there" in filled(other)[0]


@pytest.mark.parametrize("change", OWN)
def test_what_decides_a_token_is_another_key(tmp_path: Path, change: str) -> None:
    one, other = prepared(tmp_path), prepared(tmp_path, **OWN[change])
    assert cache_of(one).folder != cache_of(other).folder


def test_other_images_or_weights_or_code_are_another_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = [cache_of(prepared(tmp_path)).folder]
    image = tmp_path / "data/images/calm_000.png"
    image.write_bytes((tmp_path / "data/images/calm_001.png").read_bytes())
    folders.append(cache_of(prepared(tmp_path)).folder)
    config = config_of(tmp_path)
    state = load_file(config.backbone.weights)
    state["blocks.0.mlp.fc1.weight"][0, 0] += 1e-3
    save_file(state, config.backbone.weights)
    folders.append(cache_of(prepared(tmp_path)).folder)
    monkeypatch.setattr(cache_module, "code_sha256", lambda *_: "other")
    folders.append(cache_of(prepared(tmp_path)).folder)
    assert len(set(folders)) == 4


# -- damage, kills, company ---------------------------------------------------------------------


def content(trunk: TrunkCache) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in trunk.folder.glob("*.rows")}


def damage(trunk: TrunkCache, how: str) -> None:
    path = trunk.folder / "fundus-1.rows"
    data = bytearray(path.read_bytes())
    first = trunk.splits.index("train") * len(data) // 60
    if how == "a bit":
        data[first + 100] ^= 4
    elif how == "a checksum":
        data[first] ^= 1
    elif how == "a hole":
        data[first : first + len(data) // 60] = bytes(len(data) // 60)
    elif how == "cut":
        del data[-7:]
    path.write_bytes(data)
    if how == "gone":
        path.unlink()


@pytest.mark.parametrize(
    ("how", "lost"),
    [
        ("a bit", 1), ("cut", TRAIN),
        *(pytest.param(*other, marks=pytest.mark.slow)
          for other in (("a checksum", 1), ("a hole", 1), ("gone", TRAIN))),
    ],  # fmt: skip
)
def test_damage_is_found_and_mended(tmp_path: Path, how: str, lost: int) -> None:
    trunk = cache_of(one := prepared(tmp_path))
    filled(one)
    whole = content(trunk)
    damage(trunk, how)
    said = filled(prepared(tmp_path))
    assert f"{trunk.rows - lost} of {trunk.rows} outputs are there" in said[0]
    assert said[1].startswith(f"trunk cache: {lost} outputs computed")
    mended = content(trunk)
    for name in whole:  # one image alone and in a batch may differ in the last bit
        rows = [
            np.frombuffer(data[name], trunk._files["off", 0]._type) for data in (whole, mended)
        ]
        np.testing.assert_allclose(rows[0]["numbers"], rows[1]["numbers"], rtol=2e-3, atol=1e-3)
    assert len(filled(prepared(tmp_path))) == 1


def test_a_killed_fill_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trunk, written = cache_module.RowFile, []
    original = trunk.write

    def write(self: Any, rows: Any) -> None:
        if len(written) == 3:
            original(self, rows[:1])
            raise KeyboardInterrupt
        written.append(len(rows))
        original(self, rows)

    with monkeypatch.context() as patch:
        patch.setattr(trunk, "write", write)
        with pytest.raises(KeyboardInterrupt):
            filled(prepared(tmp_path))
    assert f": {sum(written) + 1} of " in filled(prepared(tmp_path))[0]


def test_two_at_once_compute_each_output_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = [prepared(tmp_path) for _ in range(2)]
    written: list[int] = []
    original = cache_module.RowFile.write

    def write(self: Any, rows: Any) -> None:
        written.append(len(rows))
        original(self, rows)

    monkeypatch.setattr(cache_module.RowFile, "write", write)
    with ThreadPoolExecutor(2) as pool:
        said = list(pool.map(filled, runs))
    assert sum(written) == cache_of(runs[0]).rows
    assert sorted(map(len, said)) == [1, 2]


@pytest.mark.slow
def test_two_processes_at_once_end_alike(tmp_path: Path) -> None:
    config_of(tmp_path)  # makes the data
    configs = [config_of(tmp_path, out=str(tmp_path / name)) for name in "ab"]
    for process in [spawn(config) for config in configs]:
        out, err = process.communicate(timeout=300)
        assert process.returncode == 0, out + err
    assert adapter_bytes(tmp_path / "a") == adapter_bytes(tmp_path / "b")


# -- refusals and words -------------------------------------------------------------------------


def refusal(config: RunConfig) -> WaraError:
    with pytest.raises(WaraError) as caught:
        run(config, quiet=True)
    assert "\n" not in str(caught.value)
    return caught.value


def test_a_cache_above_the_limit_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    error = refusal(config_of(tmp_path, data__cache_limit=1e-5))
    assert error.exit_code == 5 and error.where == "data.cache_limit"
    assert "0.1 MB, above 1e-05 GB" in error.what
    assert not (tmp_path / "run").exists() and not (tmp_path / "cache/trunk").exists()


def test_a_full_disk_is_told_before_the_fill(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache_module.shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    error = refusal(config_of(tmp_path))
    assert error.exit_code == 5 and "0.0 MB are free" in error.what


def test_a_cache_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file")
    assert refusal(config_of(tmp_path)).exit_code == 5


def test_tokens_beyond_float16_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, forward = prepared(tmp_path), cache_module.Trunk.forward
    monkeypatch.setattr(cache_module.Trunk, "forward", lambda *a: forward(*a) * 1e6)
    with pytest.raises(WaraError, match="do not fit into float16") as caught:
        filled(one)
    assert caught.value.exit_code == 6


def test_stochastic_depth_is_refused_at_once(tmp_path: Path) -> None:
    error = refusal(config_of(tmp_path, backbone__drop_path_rate=0.2))
    assert error.exit_code == 2 and "drop_path_rate=0" in error.remedy


def plan_of(folder: Path, **changes: Any) -> list[str]:
    lines = [line.split(None, 1) for line in describe(prepared(folder, **changes)).lines()]
    return [rest[0] for name, *rest in lines if name == "trunk"]


def test_the_plan_tells_the_size_or_that_there_is_nothing_to_gain(tmp_path: Path) -> None:
    assert plan_of(tmp_path) == [
        "cache of 0.1 MB: 88 outputs of the lower 4 blocks in float16; views of each training "
        "image: 2"
    ]
    (line,) = plan_of(tmp_path, blocks="all")
    assert line.startswith("nothing to gain from a cache: the first block changes too")
    assert prepared(tmp_path, blocks="all").trunk is None
    assert plan_of(tmp_path, data__trunk="off") == ["views of each training image: 2"]
    assert plan_of(tmp_path, data__trunk="off", data__views=None) == []
