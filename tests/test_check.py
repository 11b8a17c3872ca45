"""`wara check`: the gate of training without a model, its report, what is kept."""

from __future__ import annotations

import csv
import hashlib
import html
import json
import os
import re
import shutil
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.metrics import roc_auc_score
from training_helpers import CLASSES, make_images, tiny_config, with_twins

from wara import cli
from wara.check.content import kind_of
from wara.check.inspection import inspect
from wara.check.sheets import chosen
from wara.config import RunConfig
from wara.data import facts as facts_module
from wara.data import open_source
from wara.data.appearance import looks, warnings
from wara.data.imageset import FileReader
from wara.errors import WaraErrors
from wara.training.setup import prepare
from wara.training.start import run


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of one's own, and files that settle at once."""
    monkeypatch.setenv("WARA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("WARA_OFFLINE", "1")
    monkeypatch.setattr(facts_module, "SETTLED", 0.02)
    return tmp_path / "cache" / "facts"


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = make_images(tmp_path / "data")
    time.sleep(0.05)
    return folder


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files that are read, as they are."""
    names: list[str] = []
    original = FileReader.load

    def load(self, index, *rest):
        names.append(self.paths[index].name)
        return original(self, index, *rest)

    monkeypatch.setattr(FileReader, "load", load)
    return names


def check(*words: object) -> int:
    return cli.main(["check", *map(str, words)])


def content(folder: Path) -> dict:
    return json.loads((folder / "check.json").read_text())


def class_folders(folder: Path, levels: dict[str, float], each: int = 20, side: int = 12) -> Path:
    rng = np.random.default_rng(0)
    for name, level in levels.items():
        (folder / name).mkdir(parents=True)
        for i in range(each):
            pixels = np.clip(rng.normal(level, 20, (side, side)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{i:03d}.png")
    return folder


# --- the report -------------------------------------------------------------------------------


def test_a_report_says_what_the_files_hold(data: Path, tmp_path: Path, capsys) -> None:
    out = tmp_path / "report"
    assert check(data, "--report", out, "--images", 3) == 0
    printed = capsys.readouterr().out
    assert "accepted" in printed and "PNG (60)" in printed
    names = {path.name for path in out.iterdir()}
    sheets = {f"class_{i}.png" for i in range(3)}
    tables = {"check.json", "images.csv", "near_duplicates.csv"}
    assert names == {"report.html", *tables, "brightness.png", *sheets}
    said = content(out)
    assert said["accepted"] and not said["synthetic"] and said["images"] == 60
    assert said["patients"] == 30 and said["files"]["container"] == {"PNG": 60}
    assert sum(part["images"] for part in said["splits"].values()) == 60
    with (out / "images.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    with (data / "labels.csv").open() as stream:
        listed = list(csv.DictReader(stream))
    assert [row["file"] for row in rows] == [row["file"] for row in listed]
    for row, own in zip(rows, listed, strict=True):
        path = data / row["file"]
        pixels = np.asarray(Image.open(path), np.float64)
        assert row["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
        assert (row["label"], row["patient"]) == (own["label"], own["patient"])
        assert (row["width"], row["height"], row["mode"], row["bits"]) == ("32", "32", "L", "8")
        assert float(row["mean"]) == pytest.approx(pixels.mean(), abs=1e-3)
        assert float(row["std"]) == pytest.approx(pixels.std(), abs=1e-3)
    for name in ("calm", "mixed", "rough"):
        own = [float(row["mean"]) for row in rows if row["label"] == name]
        truth = [row["label"] == name for row in rows]
        area = roc_auc_score(truth, [float(row["mean"]) for row in rows])
        assert said["looks"][name]["brightness"][0] == pytest.approx(np.mean(own), abs=1e-3)
        found = said["looks"][name]["auroc"]["brightness"]
        assert found == pytest.approx(max(area, 1 - area), abs=0.02)


def test_a_page_opens_without_a_network(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "report"
    assert check(data, "--report", out) == 0
    page = (out / "report.html").read_text()
    assert not re.search(r"(?:src|href)=\"(?!data:)|https?://|url\(", page)
    browser = shutil.which("chromium") or shutil.which("chromium-browser")
    if browser is None:
        pytest.skip("no Chromium")
    script = (
        "<script>addEventListener('load', () => { document.title = JSON.stringify("
        "[...document.images].map((image) => image.naturalWidth)); });</script>"
    )
    (tmp_path / "page.html").write_text(page + script)
    done = subprocess.run(
        [browser, "--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=5000",
         f"--user-data-dir={tmp_path / 'browser'}", "--host-resolver-rules=MAP * ~NOTFOUND",
         "--dump-dom", (tmp_path / "page.html").as_uri()],
        capture_output=True, text=True, timeout=300, check=True,
    )  # fmt: skip
    widths = json.loads(html.unescape(re.findall(r"<title>(.*?)</title>", done.stdout)[0]))
    assert len(widths) == 4 and min(widths) > 200


def test_the_choice_of_images_does_not_depend_on_their_names(data: Path, tmp_path: Path) -> None:
    def contents(images) -> list[str | None]:
        images.survey()
        return [images.sha256(index) for index in chosen(images, 1, 5)]

    first = contents(open_source(str(data), cache=None, offline="error", seed=0))
    other = tmp_path / "other"
    (other / "images").mkdir(parents=True)
    lines = (data / "labels.csv").read_text().splitlines()
    for number, line in enumerate(reversed(lines[1:])):
        file, rest = line.split(",", 1)
        shutil.copy(data / file, other / f"images/{number:04d}.png")
        lines[1 + number] = f"images/{number:04d}.png,{rest}"
    (other / "labels.csv").write_text("\n".join(lines))
    assert contents(open_source(str(other), cache=None, offline="error", seed=0)) == first
    assert len(first) == 5


def test_brightness_that_gives_the_class_away_is_a_warning(tmp_path: Path, capsys) -> None:
    folder = class_folders(tmp_path / "x", {"dark": 70, "light": 130})
    assert check(folder) == 0
    lines = capsys.readouterr().out.splitlines()
    (warning,) = [line for line in lines if "brightness alone tells" in line]
    assert "'dark'" in warning and "1.000 (darker)" in warning
    same = class_folders(tmp_path / "y", {"a": 100, "b": 100})
    images = open_source(str(same), cache=None, offline="error", seed=0)
    images.survey()
    assert not warnings(images)
    few = class_folders(tmp_path / "z", {"dark": 60, "light": 140}, each=9)
    images = open_source(str(few), cache=None, offline="error", seed=0)
    images.survey()
    assert looks(images)[0].auroc["brightness"] == 1 and not warnings(images)


def test_greys_of_16_bits_are_those_that_are_shown(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for name in ("a", "b"):
        (tmp_path / "x" / name).mkdir(parents=True)
        for i in range(8):
            pixels = rng.integers(0, 4096, (16, 16)).astype(np.uint16)
            Image.fromarray(pixels).save(tmp_path / "x" / name / f"{i}.png")
    images = open_source(str(tmp_path / "x"), cache=None, offline="error", seed=0)
    images.survey()
    assert images.bits == 12
    for index in range(len(images)):
        shown = images.read(index)[:, :, 0].astype(float)
        mean, std = images.facts[index].greys(images.bits)
        assert mean == pytest.approx(shown.mean(), abs=0.5) and images.facts[index].bits == 16
        assert std == pytest.approx(shown.std(), abs=0.5)


def test_pictures_that_are_there_twice_are_shown(
    tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, out = with_twins(tmp_path, "mixed"), tmp_path / "report"
    time.sleep(0.05)
    assert check(data, "--report", out) == 0
    printed = capsys.readouterr().out
    wanted = "copies     1 exact, 1 near-duplicate pairs (0 across splits, 1 with different labels)"
    assert wanted in printed.splitlines()
    said = content(out)
    (same,), near = said["copies"], said["near_duplicates"]
    assert {image["file"] for image in same} == {"images/calm_000.png", "images/again.tiff"}
    assert len({image["split"] for image in same}) == 1
    (pair,) = near["pairs"]
    assert {image["file"]: image["label"] for image in pair["files"]} == {
        "images/calm_000.png": "calm", "images/darker.png": "mixed",
    }  # fmt: skip
    assert (near["images"], near["across_splits"], near["other_labels"]) == (2, 0, 1)
    with (out / "near_duplicates.csv").open() as stream:
        assert [row["kind"] for row in csv.DictReader(stream)] == ["near", "pixels"]
    assert Image.open(out / "near_duplicates.png").size == (2 * 328, 206)
    page = (out / "report.html").read_text()
    assert "Near-duplicates" in page and "calm, mixed" in page and "darker.png" in page

    def never(_):
        raise AssertionError("searched again")

    monkeypatch.setattr("wara.data.imageset.near_pairs", never)
    assert check(data, "--report", out, "--overwrite") == 0
    assert capsys.readouterr().out == printed
    # As the config says: with a split of the user's own, the same pixels on two sides.
    table = data / "labels.csv"
    lines = table.read_text().splitlines()
    splits = ["split", *("train" if "again" in line else "val" for line in lines[1:])]
    table.write_text("\n".join(f"{a},{b}" for a, b in zip(lines, splits, strict=True)))
    assert check(data) == 3
    assert "identical pixels in train (1) and val (1)" in capsys.readouterr().err
    check(data, "--set", "data.allow_duplicates=true")
    assert "identical pixels" not in capsys.readouterr().err


# --- what is refused --------------------------------------------------------------------------


def test_all_offenders_are_in_the_report(data: Path, tmp_path: Path, capsys) -> None:
    broken = sorted((data / "images").glob("calm_*.png"))[:24]
    for path in broken[:22]:
        path.write_bytes(path.read_bytes()[:60])
    broken[23].unlink()
    out = tmp_path / "report"
    assert check(data, "--report", out) == 3
    printed = capsys.readouterr()
    assert "refused    22 x images that cannot be read" in printed.out
    assert len(printed.err.splitlines()) == 21 and f"all are listed in {out}" in printed.err
    said = content(out)
    assert not said["accepted"] and said["unreadable"] == 23
    places = {fault["where"] for fault in said["faults"]}
    assert places >= {str(path) for path in [*broken[:22], broken[23]]}
    page = (out / "report.html").read_text()
    assert all(path.name in page for path in [*broken[:22], broken[23]])


def test_a_set_that_cannot_be_opened_has_a_report_too(tmp_path: Path) -> None:
    folder = class_folders(tmp_path / "x", {"only": 100}, each=3)
    out = tmp_path / "report"
    assert check(folder, "--report", out) == 3
    (fault,) = content(out)["faults"]
    assert "only the class 'only'" in fault["what"]
    assert {path.name for path in out.iterdir()} == {"report.html", "check.json", "images.csv"}


def faults_and_notes(config: RunConfig) -> tuple[list[str], list[str]]:
    found = inspect(config, report=None)
    return [str(fault) for fault in found.findings.refused], list(found.findings.notes)


def test_it_refuses_what_a_dry_run_refuses(tmp_path: Path, capsys) -> None:
    config = tiny_config(tmp_path)
    table = tmp_path / "data" / "labels.csv"
    lines = table.read_text().splitlines()
    shutil.copy(tmp_path / "data/images/calm_000.png", tmp_path / "data/images/calm_001.png")
    run(config, dry_run=True)
    plan = capsys.readouterr().out
    faults, notes = faults_and_notes(config)
    assert not faults and notes and all(note in plan for note in notes)
    splits = ["split", *(("train", "val", "test")[i % 3] for i in range(len(lines) - 1))]
    table.write_text("\n".join(f"{a},{b}" for a, b in zip(lines, splits, strict=True)))
    (tmp_path / "data/images/rough_000.png").write_bytes(b"not an image")
    with pytest.raises(WaraErrors) as caught:
        run(config, dry_run=True)
    faults, _ = faults_and_notes(config)
    assert len(faults) > 20
    assert [str(error) for error in caught.value.errors[:20]] == faults[:20]
    assert f"{len(faults) - 20} more offenders" in str(caught.value)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["retinamnits"], "did you mean 'retinamnist'"),
        (["fundus_wra"], "did you mean 'fundus_wara.yaml'"),
        (["{data}", "--images", "0"], "--images is 0"),
        (["{data}", "--overwrite"], "without a report"),
        (["{data}", "--report", "{data}/images/report"], "among the images"),
        (["{data}", "--report", "{data}"], "not empty"),
        (["{data}", "--set", "data.val_fractoin=0.1"], "val_fraction"),
    ],
)
def test_slips_are_told(words: list[str], said: str, data: Path, capsys) -> None:
    assert check(*(word.format(data=data) for word in words)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line and line.startswith("error[")


def test_an_earlier_report_is_replaced_only_when_asked(data: Path, tmp_path: Path, capsys) -> None:
    out = tmp_path / "report"
    assert check(data, "--report", out) == 0
    (out / "mine.txt").write_text("kept")
    before = (out / "check.json").read_bytes()
    two = class_folders(tmp_path / "x", {"a": 100, "b": 110})
    assert check(two, "--report", out) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert (out / "check.json").read_bytes() == before
    assert check(two, "--report", out, "--overwrite") == 0
    assert content(out)["images"] == 40 and (out / "mine.txt").read_text() == "kept"
    assert not (out / "class_2.png").exists()


def test_a_config_a_card_and_a_path_mean_the_same(data: Path, tmp_path: Path, capsys) -> None:
    config = tmp_path / "mine.yaml"
    config.write_text(f"dataset: {data}\ndata:\n  val_fraction: 0.3\n")
    card = tmp_path / "card.yaml"
    card.write_text(
        "name: card\ntitle: Card\ntask: multiclass\nsource: {kind: csv, path: data/labels.csv}\n"
        "classes:\n" + "".join(f"- {{name: {n}, meaning: ''}}\n" for n in CLASSES)
    )
    tables = []
    for words in ([config], [data, "--set", "data.val_fraction=0.3"],
                  [card, "--set", "data.val_fraction=0.3"], [data]):  # fmt: skip
        assert check(*words) == 0
        printed = capsys.readouterr().out
        tables.append(re.findall(r"(?:train|val|test) +\d.*", printed))
    assert tables[0] == tables[1] == tables[2] != tables[3]


def test_phantoms_are_marked(tmp_path: Path, capsys) -> None:
    out = tmp_path / "report"
    words = ["fundus_wara.yaml", "--set", "data.images=60", "--report", out]
    assert check(*words) == 0
    assert "SYNTHETIC" in capsys.readouterr().out
    assert content(out)["synthetic"] and "SYNTHETIC" in (out / "report.html").read_text()
    with (out / "images.csv").open() as stream:
        assert {row["synthetic"] for row in csv.DictReader(stream)} == {"true"}


def test_kinds_leave_out_what_differs() -> None:
    assert kind_of("patient 'x' is in train (2) and val (11)") == kind_of(
        "patient 'yz' is in train (1) and val (3)"
    )


# --- what is kept between checks --------------------------------------------------------------


def test_a_second_check_reads_nothing_again(data: Path, reads: list[str], capsys) -> None:
    assert check(data) == 0
    first, printed = len(reads), capsys.readouterr().out
    assert check(data) == 0
    assert first == 60 and len(reads) == 60 and capsys.readouterr().out == printed


def test_a_dry_run_takes_what_is_known_and_a_run_does_not(
    tmp_path: Path, reads: list[str], capsys
) -> None:
    config = tiny_config(tmp_path)
    time.sleep(0.05)
    assert check(tmp_path / "data") == 0
    reads.clear()
    run(config, dry_run=True)
    assert reads == []
    prepare(config, report_dir=None)  # what a run does before it trains
    assert len(reads) == 60


def test_a_file_that_differs_is_read_again(data: Path, reads: list[str]) -> None:
    def other(path: Path, pixels: np.ndarray) -> None:
        Image.fromarray(pixels).save(path)

    assert check(data) == 0
    paths = sorted((data / "images").iterdir())
    size, status = paths[0].stat().st_size, paths[0].stat()
    # Of the same size, and with its time set back: only the time of the entry tells.
    changed = bytearray(paths[0].read_bytes())
    changed[-20] ^= 1  # in the pixels or their checksum: damaged
    paths[0].write_bytes(changed)
    os.utime(paths[0], ns=(status.st_atime_ns, status.st_mtime_ns))
    assert paths[0].stat().st_size == size
    assert paths[0].stat().st_mtime_ns == status.st_mtime_ns
    other(paths[1], np.zeros((8, 8), np.uint8))
    reads.clear()
    check(data)
    assert sorted(reads) == sorted(path.name for path in paths[:2])


def test_what_changed_a_moment_ago_is_not_kept(
    data: Path, reads: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(facts_module, "SETTLED", 3600.0)
    assert check(data) == 0 and check(data) == 0
    assert len(reads) == 120


def test_a_damaged_cache_is_made_again(
    data: Path, cache: Path, reads: list[str], tally, amount
) -> None:
    assert check(data) == 0
    (path,) = cache.iterdir()
    whole, rng, lost = path.read_bytes(), np.random.default_rng(0), []
    sound = json.dumps(json.loads(whole.partition(b"\n")[2])["files"], sort_keys=True)
    tries = amount(12, 60)
    images = open_source(str(data), cache=None, offline="error", seed=0)
    wanted = {index: images.reader.load(index, None).facts for index in range(len(images))}
    for number in range(tries):
        damaged = bytearray(whole)
        at = int(rng.integers(len(whole)))
        if number % 3 == 0:
            damaged = damaged[:at]
        elif number % 3 == 1:
            damaged[at] ^= 1 << int(rng.integers(8))
        else:
            damaged[at : at + 40] = b"0" * 40
        path.write_bytes(damaged)
        again = open_source(str(data), cache=None, offline="error", seed=0)
        again.survey(cache=again.fact_cache(cache), known=True)
        if again.facts != wanted:
            lost.append(f"{number}: wrong facts")
        if json.dumps(json.loads(path.read_bytes().partition(b"\n")[2])["files"],
                      sort_keys=True) != sound:  # fmt: skip
            lost.append(f"{number}: not made again")
    tally("damaged caches of facts", tries, lost)
    reads.clear()
    assert check(data) == 0 and reads == []


def test_a_cache_that_cannot_be_written_is_no_failure(data: Path, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("in the way")
    assert check(data) == 0


def test_bits_that_are_declared_later_hold_for_what_is_known(tmp_path: Path, capsys) -> None:
    rng = np.random.default_rng(0)
    for name in ("a", "b"):
        (tmp_path / "x" / name).mkdir(parents=True)
        for i in range(8):
            pixels = rng.integers(0, 4096, (16, 16)).astype(np.uint16)
            Image.fromarray(pixels).save(tmp_path / "x" / name / f"{i}.png")
    time.sleep(0.05)
    assert check(tmp_path / "x") == 0
    assert check(tmp_path / "x", "--set", "data.bits=10") == 3
    assert "the data set has 10 bits" in capsys.readouterr().err
