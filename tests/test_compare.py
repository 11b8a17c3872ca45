"""`wara compare`: what runs, what is taken from an earlier call, what the tables say."""

from __future__ import annotations

import csv
import dataclasses
import itertools
import json
import os
import random
import re
import shutil
import signal
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from compare_helpers import cells, compare, make_config, spawn, tables
from training_helpers import make_images, tiny_config, with_twins

from wara import cli
from wara.adapters import method_from_options
from wara.compare import cells as cells_module
from wara.compare import worker
from wara.compare.grid import Row, cells_of, with_method
from wara.config import load_config
from wara.data import imageset
from wara.data.imageset import FileReader, ImageSet
from wara.errors import WaraError
from wara.training.setup import prepare
from wara.training.task import FineTuning


@pytest.fixture(autouse=True)
def _no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    # They take longer than the training and are looked at elsewhere.
    monkeypatch.setattr("wara.runs.results._figures", lambda *_: None)


class Whole:
    """A finished comparison, and what it looked at."""

    def __init__(self, folder: Path) -> None:
        self.config, self.out = make_config(folder), folder / "out"
        self.decoded: Counter[int] = Counter()
        self.seen: set[int] = set()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Whole:
    made = Whole(tmp_path_factory.mktemp("compare"))
    load, array, trial = FileReader.load, ImageSet.array, worker.Worker._trial
    within: list[str] = []

    def counted(self: FileReader, index: int, *more: Any) -> Any:
        made.decoded[index] += 1
        return load(self, index, *more)

    def noted(self: ImageSet, index: int, spec: Any) -> Any:
        if within:
            made.seen.add(index)
        return array(self, index, spec)

    def in_trial(self: worker.Worker, job: worker.Job) -> Any:
        within.append(job.key)
        try:
            return trial(self, job)
        finally:
            within.clear()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("wara.runs.results._figures", lambda *_: None)
        patch.setattr(FileReader, "load", counted)
        patch.setattr(ImageSet, "array", noted)
        patch.setattr(worker.Worker, "_trial", in_trial)
        assert compare(made.config, made.out) == 0
    return made


def rows(out: Path) -> dict[str, dict[str, str]]:
    with (out / "table.csv").open() as stream:
        return {row["row"]: row for row in csv.DictReader(stream)}


def splits(run: Path) -> list[str]:
    with (run / "splits.csv").open() as stream:
        return [row["split"] for row in csv.DictReader(stream)]


def test_table_and_report_hold_what_the_runs_gave(whole: Whole) -> None:
    found = rows(whole.out)
    assert list(found) == ["majority", "lora", "wara", "linear_probe"]
    assert found["majority"]["mean"] == "0.500000" and found["majority"]["p"] == ""
    assert found["lora"]["difference"] == "" and found["wara"]["p_holm"]
    records = [json.loads(line) for line in (whole.out / "cells.jsonl").read_text().splitlines()]
    for label in ("lora", "wara", "linear_probe"):
        own = [r for r in records if r["row"] == label]
        scores = [
            json.loads((whole.out / r["folder"] / "metrics.json").read_text())["test"]["auc_macro"]
            for r in own
        ]
        assert [r["test"] for r in own] == [score["value"] for score in scores]
        mean = sum(score["value"] for score in scores) / len(scores)
        assert float(found[label]["mean"]) == pytest.approx(mean, abs=1e-6)
        assert found[label]["runs"] == found[label]["runs_wanted"] == "2"
    folders = [whole.out / r["folder"] for r in records if r["folder"]]
    configs = [load_config(folder / "config.yaml") for folder in folders]
    assert {config.wandb.group for config in configs} == {whole.out.name}
    gap = float(found["wara"]["mean"]) - float(found["lora"]["mean"])
    assert float(found["wara"]["difference"]) == pytest.approx(gap, abs=2e-6)
    page = (whole.out / "report.html").read_text()
    assert "3 trials for each row and split" in page and "<script>" in page
    assert not re.search(r'(src|href)="(https?:|//)', page)
    for target in re.findall(r'href="([^"]+)"', page):
        assert (whole.out / target).is_file()


# Config's method and options, another method, and what of its options is not at its default then.
CARRIED: list[tuple[dict[str, Any], str, dict[str, Any]]] = [
    ({"method": "waveft", "scale": 10.0}, "adaptformer", {}),
    ({"method": "waveft", "scale": 10.0}, "convpass", {}),
    ({"method": "waveft", "scale": 10.0}, "fact_tt", {}),
    ({"method": "waveft", "scale": 10.0}, "shira", {}),  # whose rate is for a scale of 1
    ({"method": "waveft", "k": 30, "seed": 7}, "shira", {"k": 30, "seed": 7}),
    ({"method": "waveft", "seed": 7, "init": "gaussian"}, "fourierft", {}),
    ({"method": "waveft", "seed": 7}, "apla", {}),
    ({"method": "waveft", "wavelet": "db2"}, "wara", {}),
    ({"method": "wara", "wavelet": "random", "seed": 5, "core": "full"}, "waveft", {}),
    ({"method": "wara", "wavelet": "db2", "level": 2}, "tiny_wara", {"wavelet": "db2", "level": 2}),
    ({"method": "wara", "prefix": "skip", "rank": 8}, "rank_conv", {"prefix": "skip", "rank": 8}),
    ({"method": "lora", "rank": 8, "alpha": 4.0}, "loha", {"rank": 8, "alpha": 4.0}),
    ({"method": "lora", "rank": 8}, "fact_tt", {}),
    ({"method": "lora", "rank": 8}, "vera", {}),
    ({"method": "lora", "dropout": 0.1}, "vera", {"dropout": 0.1}),
    ({"method": "lora", "dropout": 0.1}, "vpt", {}),  # of entries of prompts
    ({"method": "lora", "targets": ["q", "v"]}, "fact_tt", {"targets": ["q", "v"]}),
    ({"method": "lora", "targets": ["q", "v"]}, "apla", {"targets": ["q", "v"]}),
    ({"method": "adaptformer", "bottleneck": 5, "scale": 0.3, "dropout": 0.1}, "convpass", {}),
    *[({"method": "wara", "blocks": "last_1"}, name, {"blocks": "last_1"})
      for name in ("adaptformer", "convpass", "vpt", "ssf", "apla", "fact_tt", "fourierft")],
]  # fmt: skip


@pytest.mark.parametrize(("given", "name", "other"), CARRIED)
def test_an_option_goes_over_where_it_means_the_same(
    tmp_path: Path, given: dict[str, Any], name: str, other: dict[str, Any]
) -> None:
    config = tiny_config(tmp_path, adapter=given)
    assert with_method(config, name).adapter == method_from_options(name, other)
    assert with_method(config, given["method"]).adapter == config.adapter


def test_a_method_stands_beside_itself_with_other_options(tmp_path: Path) -> None:
    """An option of a row outranks that of the config; what is not set stays as it is there."""
    config = tiny_config(tmp_path, adapter={"method": "wara", "level": 2, "blocks": "last_1"})
    changed = with_method(config, "wara:wavelet=random:level=1").adapter
    assert changed == dataclasses.replace(config.adapter, wavelet="random", level=1)
    half = with_method(config, "waveft:scale=5:budget=0.5*lora_r1").adapter
    assert half.options() | {"scale": 5.0, "budget": "0.5*lora_r1"} == half.options()
    full = with_method(config, "wara:core=full", "lora_r1").adapter
    assert full.options() | {"core": "full", "budget": "lora_r1"} == full.options()


def test_what_a_method_draws_is_drawn_anew_for_each_seed(tmp_path: Path) -> None:
    """Else no interval would hold what other places of WaveFT or SHiRA would have changed."""
    given = {"method": "waveft", "k": 9, "seed": 5}
    for adapter, method, wanted in [
        (given, "waveft", [5, 6, 9]), (given, "shira", [5, 6, 9]),
        (given, "waveft:seed=3", [3, 3, 3]), (given, "lora", [None, None, None]),
        (given, "vera", [0, 1, 4]),
        ({"method": "wara"}, "wara:wavelet=random", [0, 1, 4]),
        ({"method": "lora", "budget": "lora_r1"}, "wara", [0, 1, 4]),
    ]:  # fmt: skip
        row = Row(with_method(tiny_config(tmp_path, adapter=adapter), method), method)
        drawn = cells_of(row, 2, [0, 1, 4])
        assert [getattr(cell.config.adapter, "seed", None) for cell in drawn] == wanted * 2
        assert [cell.config.seed for cell in drawn] == [0, 1, 4] * 2
        record = tmp_path / "compare.json"  # which takes more seeds later
        record.write_text(json.dumps(cells_module.check_grid(record, cells_of(row, 2, [0]))))
        cells_module.check_grid(record, drawn)
        record.unlink()


@pytest.mark.parametrize(
    ("method", "words"),
    [
        ("wara:wavelet", "does not import"),
        ("wara:level=2:wavelet", "'wavelet' in .* sets nothing"),
        ("wara:level=", "'level=' in .* sets nothing"),
        ("wara:level=2:level=3", "stands twice"),
        ("wara:wavlet=db2", "wavlet.*--methods wara:wavlet=db2.*wavelet"),
        ("wara:level=[", "not YAML.*as in wara:wavelet"),
        ("wara::level=2", "'' in .* sets nothing"),
        ("wara:rank=3:budget=lora_r1", "both set"),
        ("nothing:level=2", "unknown method 'nothing'.*--methods nothing:level=2"),
    ],
)
def test_options_of_a_row_that_say_nothing_are_refused(
    tmp_path: Path, method: str, words: str
) -> None:
    with pytest.raises(WaraError, match=words) as caught:
        with_method(tiny_config(tmp_path), method)
    assert caught.value.exit_code == 2


def test_a_row_may_set_a_size_but_not_beside_a_budget_of_all(tmp_path: Path) -> None:
    for given in ({"rank": 2}, {"budget": "lora_r1"}):
        config = tiny_config(tmp_path, adapter={"method": "lora", "blocks": "last_1", **given})
        for option, value in {"rank": 3, "budget": "lora_r2"}.items():
            adapter = with_method(config, f"lora: {option} = {value}").adapter
            wanted = {"blocks": "last_1", option: value}
            assert adapter == method_from_options("lora", wanted)
    for option in ("rank=3", "budget=lora_r2", "budget=null", "targets=[q]", "blocks=last_1"):
        with pytest.raises(WaraError, match=f"one size.*--methods lora:{re.escape(option)}"):
            with_method(tiny_config(tmp_path), f"lora:{option}", "lora_r1")


def test_rows_that_would_be_the_same_runs_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = ["--seeds", "2", "--beside", "none", "--out", str(tmp_path / "out"), "--plan"]
    config = str(make_config(tmp_path))
    for methods, more, told in [
        ("lora,lora:dropout=0", [], "'lora:dropout=0' would be the same runs as 'lora'"),
        ("lora", ["--sweep-budget", "1,1.1"], r"lora \(1.1\*lora_r1\).* as 'lora \(1\*lora_r1\)'"),
    ]:
        assert cli.main(["compare", "--cfg", config, "--methods", methods, *more, *line]) == 2
        assert re.search(told, capsys.readouterr().err)
    methods = "lora,lora:targets=[q,v]"
    assert cli.main(["compare", "--cfg", config, "--methods", methods, *line]) == 0
    assert "lora:targets=[q,v], adapter" in capsys.readouterr().out


@pytest.mark.slow
def test_variants_are_tuned_and_told_apart(tmp_path: Path) -> None:
    out, method = tmp_path / "out", "wara:core=full"
    assert compare(make_config(tmp_path), out, "--methods", f"lora,wara,{method}") == 0
    found = rows(out)
    assert list(found) == ["majority", "lora", "wara", method, "linear_probe"]
    assert found[method]["runs"] == "2" and found[method]["p_holm"]
    assert int(found[method]["adapter_params"]) > int(found["wara"]["adapter_params"])
    assert len(list((out / "trials").glob("*.json"))) == 4 * 3
    configs = [load_config(folder / "config.yaml") for folder in cells(out)]
    assert Counter(c.adapter.options().get("core") for c in configs)["full"] == 2
    assert method in (out / "report.html").read_text()


def test_a_worker_reads_each_image_once(whole: Whole) -> None:
    assert whole.decoded == Counter(range(60))


def test_copies_lie_in_one_split_of_every_seed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_twins(tmp_path)
    shelf, search, searches = worker.Shelf(), imageset.near_pairs, []
    monkeypatch.setattr(imageset, "near_pairs", lambda own: searches.append(1) or search(own))
    torn = {"group": 0, "ignore": 0}
    for seed, near in itertools.product(range(4), torn):
        config = tiny_config(tmp_path, data__split_seed=seed, data__near_duplicates=near)
        run = prepare(config, report_dir=None, opened=shelf.open)
        first, darker, again = (run.splits[index] for index in (0, 60, 61))
        assert again == first
        torn[near] += darker != first
    assert len(searches) == 1 and torn["group"] == 0 < torn["ignore"]


def test_trials_are_equal_in_number_and_see_no_test_image(whole: Whole) -> None:
    assert len(list((whole.out / "trials").iterdir())) == 9
    names = splits(cells(whole.out)[0])
    assert {names[index] for index in whole.seen} == {"train", "val"}
    # Each row runs at the rate whose trial did best.
    trials = [json.loads(path.read_text()) for path in (whole.out / "trials").iterdir()]
    assert all(0 <= trial["value"] <= 1 for trial in trials)
    text = (whole.out / "report.md").read_text()
    for label in ("lora", "wara", "linear_probe"):
        lines = [line for line in text.splitlines() if f"| data {label} split" in line
                 and "auc_macro" in line]  # fmt: skip
        best = max(lines, key=lambda line: float(line.split("auc_macro ")[1].split(" ")[0]))
        assert len(lines) == 3 and sum("taken" in line for line in lines) == 1
        assert float(rows(whole.out)[label]["lr"]) in [
            float(line.split(" | ")[1]) for line in lines if "taken" in line
        ]
        value = best.split("auc_macro ")[1].split(" ")[0]
        assert any(value in line for line in lines if "taken" in line)


def test_methods_differ_in_nothing_but_themselves(whole: Whole) -> None:
    by_seed: dict[int, set[str]] = {}
    for run in cells(whole.out):
        seed = json.loads((run / "metrics.json").read_text())["seed"]
        lines = (run / "config.yaml").read_text().splitlines()
        start = lines.index(next(line for line in lines if line.startswith("adapter:")))
        rest = [line for line in lines[:start] if not line.startswith("out:")]
        by_seed.setdefault(seed, set()).add("\n".join(rest))
    assert {seed: len(found) for seed, found in by_seed.items()} == {0: 1, 1: 1}
    assert len({tuple(splits(run)) for run in cells(whole.out)}) == 1


@pytest.fixture
def copy(whole: Whole, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole.out, tmp_path / "copy"))


def _ran(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    ran: list[str] = []
    do = worker.Worker.do

    def noted(self: worker.Worker, job: worker.Job) -> Any:
        ran.append(job.place)
        return do(self, job)

    monkeypatch.setattr(worker.Worker, "do", noted)
    return ran


def test_finished_cells_are_taken_and_altered_ones_run_again(
    whole: Whole, copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran = _ran(monkeypatch)
    assert compare(whole.config, copy) == 0 and ran == []
    assert tables(copy) == tables(whole.out)
    lora = next(run for run in cells(copy) if "_lora_" in run.name)
    predictions = lora / "predictions_test.csv"
    before = predictions.read_bytes()
    predictions.write_bytes(before.replace(b"calm", b"rough", 1))
    assert compare(whole.config, copy) == 0 and len(ran) == 1 and "lora" in ran[0]
    assert predictions.read_bytes() == before
    assert tables(copy) == tables(whole.out)


def test_a_cell_of_other_code_is_not_taken(
    whole: Whole, copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cells_module, "code_version", lambda: "another")
    ran: list[str] = []

    def refuse(self: worker.Worker, job: worker.Job) -> Any:
        ran.append(job.kind)
        return {"status": "failed", "reason": "not now", "kind": "resources"}

    monkeypatch.setattr(worker.Worker, "do", refuse)
    assert compare(whole.config, copy) == 7
    assert Counter(ran) == {"trial": 9, "cell": 6}


def test_a_failed_cell_is_told_and_stops_nothing(
    whole: Whole, copy: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for run in cells(copy):
        if "_wara_" in run.name:
            shutil.rmtree(run)
            cells_module.seal_path(run).unlink()
    run_here = worker.run_here

    def fails(config: Any, **flags: Any) -> Path:
        if config.seed == 0:
            raise WaraError("nonfinite", "the loss is nan", "epoch 1", "lower lr")
        return run_here(config, **flags)

    with monkeypatch.context() as patch:
        patch.setattr(worker, "run_here", fails)
        assert compare(whole.config, copy) == 6
    assert "1 of 7 cells failed" in capsys.readouterr().err
    found = rows(copy)["wara"]
    assert (found["runs"], found["runs_wanted"], found["p"]) == ("1", "2", "")
    assert "fewer than two finished seeds" in found["reason"]
    assert "the loss is nan" in (copy / "report.md").read_text()
    assert compare(whole.config, copy) == 0  # tried again
    assert tables(copy) == tables(whole.out)


def test_another_config_in_the_folder_is_refused(
    whole: Whole, copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert compare(whole.config, copy, "--set", "batch_size=8") == 2
    assert "batch_size was 16 and is 8" in capsys.readouterr().err
    assert tables(copy) == tables(whole.out)


@pytest.mark.slow
@pytest.mark.parametrize("part", [0, 1])
def test_stopped_and_started_again_gives_the_same_table(
    whole: Whole, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: int
) -> None:
    """There are two steps in each of 15 trainings: 9 trials, then 6 cells."""
    moment = random.Random().randint(*((1, 18), (19, 30))[part])
    print("stopped in step", moment)  # shown when the test fails
    step, made = FineTuning.training_step, []

    def stopping(self: FineTuning, *args: Any) -> Any:
        made.append(0)
        if len(made) == moment:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(FineTuning, "training_step", stopping)
        assert compare(whole.config, tmp_path / "out") == 143
    assert compare(whole.config, tmp_path / "out") == 0
    assert tables(tmp_path / "out") == tables(whole.out)


def test_the_table_is_one_run_of_the_group_in_wandb(
    whole: Whole, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    out = Path(shutil.copytree(whole.out, tmp_path / "again"))
    for _ in range(2):
        assert compare(whole.config, out, "--set", "wandb.mode=offline") == 0
    files = list(out.glob("wandb/offline-run-*/run-*.wandb"))
    assert len(files) == 2 and len({path.name for path in files}) == 1
    for path in files:
        (shown,) = path.parent.glob("files/media/table/comparison_*.table.json")
        table = json.loads(shown.read_text())
        found = [dict(zip(table["columns"], row, strict=True)) for row in table["data"]]
        wanted = list(rows(out).values())
        assert [row["row"] for row in found] == [row["row"] for row in wanted]
        assert [row["mean"] for row in found] == [row["mean"] for row in wanted]
        # The images are somebody's own: neither the name of their folder nor a path is told.
        assert {row["dataset"] for row in found} == {"local"} and "reason" not in table["columns"]
        assert str(whole.config.parent) not in shown.read_text()


@pytest.mark.slow
def test_killed_at_five_random_moments_gives_the_same_table(whole: Whole, tmp_path: Path) -> None:
    out, clock = tmp_path / "out", random.Random()
    killed = 0
    for _ in range(5):
        before = set(out.rglob("*"))
        with spawn(whole.config, out) as process:
            # Some time after it has begun to write, however fast the machine is.
            while process.poll() is None and set(out.rglob("*")) <= before:
                time.sleep(0.05)
            time.sleep(clock.uniform(0, 3))
            killed += process.poll() is None
            process.kill()
    assert killed >= 2
    assert compare(whole.config, out) == 0
    assert tables(out) == tables(whole.out)


@pytest.mark.slow
def test_two_workers_give_the_same_table(whole: Whole, tmp_path: Path) -> None:
    with spawn(whole.config, tmp_path / "out", "--jobs", "2") as process:
        assert process.wait() == 0, process.stdout and process.stdout.read()
    assert tables(tmp_path / "out") == tables(whole.out)


@pytest.mark.slow
def test_ray_gives_the_same_table(whole: Whole, tmp_path: Path) -> None:
    pytest.importorskip("ray")
    with spawn(whole.config, tmp_path / "out", "--launcher", "ray") as process:
        assert process.wait() == 0, process.stdout and process.stdout.read()
    assert tables(tmp_path / "out") == tables(whole.out)


def test_audit_tells_what_the_best_test_epoch_would_have_gained(
    whole: Whole, tmp_path: Path
) -> None:
    argv = ["compare", "--cfg", str(whole.config), "--methods", "lora", "--seeds", "1", "--audit",
            "--reference", "none", "--beside", "none", "--out", str(tmp_path / "out"),
            "--set", "epochs=2"]  # fmt: skip
    assert cli.main(argv) == 0
    (record,) = map(json.loads, (tmp_path / "out/cells.jsonl").read_text().splitlines())
    (path,) = (tmp_path / "out/cells").glob("*.audit.json")
    values = json.loads(path.read_text())
    assert list(values) == ["1", "2"]
    # The score of the chosen epoch is the one that the run itself reports.
    assert values[str(record["best_epoch"])] == pytest.approx(record["test"])
    assert record["audit_gain"] == max(values.values()) - values[str(record["best_epoch"])] >= 0
    assert "Audit: choosing the epoch" in (tmp_path / "out/report.md").read_text()


def test_a_plan_runs_nothing(whole: Whole, tmp_path: Path, capsys: Any) -> None:
    more = ["--plan", "--budget", "lora_r1", "--beside", "linear_probe,ssf"]
    assert compare(whole.config, tmp_path / "out", *more) == 0
    text = capsys.readouterr().out
    # Of a ViT 64 wide and six blocks deep: 6 · 4 · (64 + 64).
    assert "lora (lora_r1), adapter 3,072 of 3,072 wanted, head" in text
    assert "linear_probe, adapter 0, head" in text
    # No budget is told of it. A scale and a shift for each output: two norms, q, k, v, o, both
    # layers of the MLP in six blocks, the patch embedding and the last norm.
    size = 2 * (6 * (2 * 64 + 4 * 64 + 192 + 64) + 2 * 64)
    assert f"ssf, adapter {size:,}, head" in text
    assert "runs       8, after 3 trials per row and split (12 in all)" in text
    assert re.search(r"time       about \d+ s, from one measured step", text)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--methods", "lora,warra"], "did you mean 'wara'?"),
        (["--methods", "lora,lora"], "'lora' stands twice"),
        (["--methods", "wara"], "the reference 'lora' is not among the methods"),
        (["--seeds", "1"], "tested over seeds, of which there is one"),
        (["--seeds", "two"], "'two' are not understood"),
        (["--methods", "lora,bitfit", "--budget", "lora_r2"], "cannot meet a budget"),
        (["--methods", "lora,wara", "--budget", "0.001*lora_r1"], "has at least"),
        (["--methods", "lora,ssf", "--budget", "lora_r1"], "trains is fixed, so it cannot meet"),
        (
            ["--methods", "lora,vpt", "--budget", "lora_r1", "--set", "adapter.targets=[q, v]"],
            "'vpt' has its budget measured on q, k, v and o, not on these targets",
        ),
        (
            ["--methods", "lora,apla", "--budget", "lora_r1", "--set", "adapter.targets=[o]"],
            "'apla' has its budget measured on q, k, v and o, not on these targets",
        ),
        (["--methods", "lora,convpass", "--budget", "0.1*lora_r1"], "'convpass' has at least"),
        (["--metric", "auc"], "there is no metric 'auc'"),
        (["--tune", "lr=2"], "an odd number"),
        (["--tune", "rank=3"], "'rank' is not tuned"),
        (["--beside", "linear_prob"], "did you mean 'linear_probe'?"),
        (["--beside", "lora"], "'lora' has a size that a budget can set"),
        (["--rope", "-1"], "give a number from 0"),
        (["--sweep-train", "25,900"], "900 training images wanted"),
        (["--set", "data.val_fraction=0.5", "--set", "data.test_fraction=0.0"], "test_fraction"),
        (["--launcher", "ray", "--ray-address", "127.0.0.1:1"], "ray"),
    ],
)
def test_bad_input_is_refused_before_anything_runs(
    whole: Whole, tmp_path: Path, capsys: Any, more: list[str], words: str
) -> None:
    assert compare(whole.config, tmp_path / "out", *more) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_folder_of_something_else_is_left_alone(
    whole: Whole, tmp_path: Path, capsys: Any
) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    assert compare(whole.config, tmp_path) == 2
    assert "no comparison" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_splits_of_the_source_cannot_be_repeated(whole: Whole, tmp_path: Path, capsys: Any) -> None:
    data = make_images(tmp_path / "set")
    table = (data / "labels.csv").read_text().splitlines()
    parts = ["train", "train", "train", "val", "val", "test", "test", "test"]
    lines = [f"{row},{parts[i // 2 % 8]}" for i, row in enumerate(table[1:])]
    (data / "labels.csv").write_text("\n".join([f"{table[0]},split", *lines]) + "\n")
    more = ["--set", f"dataset={data}", "--splits", "2"]
    assert compare(whole.config, tmp_path / "out", *more) == 2
    assert "names its splits itself" in capsys.readouterr().err
