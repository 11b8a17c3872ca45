"""A model on images of somewhere else: every number follows from the rows, classes go by name."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from deploy_helpers import CARD, make_cases
from PIL import Image
from sklearn.metrics import (
    accuracy_score,
    balanced_accuracy_score,
    brier_score_loss,
    confusion_matrix,
    f1_score,
    roc_auc_score,
)

from wara.cli import main
from wara.deploy.columns import UNKNOWN, By, groups_of, parse_by
from wara.deploy.evaluate import Request, evaluate
from wara.deploy.predictor import Predictor
from wara.errors import WaraError
from wara.evaluation.groups import SMALLEST, Judged, compare_groups
from wara.storage import file_sha256

NAMES = ["calm", "mixed", "rough"]
Rows = list[dict[str, str]]


def quiet(_: str) -> None:
    return


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_cases(tmp_path_factory.mktemp("elsewhere") / "cases")


@pytest.fixture(scope="module")
def out(bundle: Path, cases: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    request = Request(by=["site", "sex", "age:40,60"], bootstrap=60)
    place = tmp_path_factory.mktemp("evaluated") / "out"
    return evaluate(bundle, str(cases), place, request, say=quiet)


def content(out: Path) -> dict[str, Any]:
    return json.loads((out / "metrics.json").read_text())


def rows(out: Path) -> Rows:
    with (out / "predictions.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def numbers(found: Rows) -> tuple[np.ndarray, np.ndarray]:
    labels = np.array([NAMES.index(row["label"]) for row in found])
    return labels, np.array([[float(row[f"prob_{name}"]) for name in NAMES] for row in found])


def value(entry: dict[str, Any]) -> float:
    assert entry["reason"] is None or entry["reason"].startswith("no interval"), entry
    return entry["value"]


# -- numbers follow from the rows -------------------------------------------------------------


def test_metrics_are_those_of_scikit_learn_on_the_rows(out: Path) -> None:
    found, said = rows(out), content(out)
    labels, probs = numbers(found)
    top = probs.argmax(1)
    assert [row["prediction"] for row in found] == [NAMES[k] for k in top]
    wanted = {
        "auc_macro": roc_auc_score(labels, probs, multi_class="ovr"),
        "accuracy": accuracy_score(labels, top),
        "balanced_accuracy": balanced_accuracy_score(labels, top),
        "f1_macro": f1_score(labels, top, average="macro"),
        "brier": brier_score_loss(labels, probs, scale_by_half=False, labels=[0, 1, 2]),
        "auc_rough": roc_auc_score(labels == 2, probs[:, 2]),
    }
    for name, number in wanted.items():
        assert value(said["metrics"][name]) == pytest.approx(number, abs=1e-12), name
        assert said["metrics"][name]["low"] <= number <= said["metrics"][name]["high"]
    assert said["data"]["images"] == len(found) == 78
    assert said["data"]["classes"] == {"calm": 30, "mixed": 26, "rough": 22}
    assert said["data"]["patients"] == 39


def test_the_operating_point_is_counted(out: Path) -> None:
    found, point = rows(out), content(out)["operating_point"]
    truth = np.array([row["label"] == "rough" for row in found])
    called = np.array([row["decision"] == "positive" for row in found])
    (tn, fp), (fn, tp) = confusion_matrix(truth, called)
    assert point["counts"] == {"true_positive": tp, "false_negative": fn, "false_positive": fp,
                               "true_negative": tn}  # fmt: skip
    assert value(point["sensitivity"]) == tp / (tp + fn) and point["sensitivity"]["n"] == tp + fn
    assert value(point["specificity"]) == tn / (tn + fp)
    assert value(point["ppv"]) == tp / (tp + fp) and value(point["npv"]) == tn / (tn + fn)
    assert set(point["reference"]) == {"validation", "test"}


def test_net_benefit_is_the_formula(out: Path) -> None:
    labels, probs = numbers(rows(out))
    curve, truth, n = content(out)["decision_curve"], labels == 2, len(labels)
    assert len(curve["threshold"]) == 99
    for at, model, everyone in zip(curve["threshold"], curve["model"], curve["all"], strict=True):
        called = probs[:, 2] >= at
        odds = at / (1 - at)
        wanted = (called & truth).sum() / n - (called & ~truth).sum() / n * odds
        assert model == pytest.approx(wanted, abs=1e-12)
        assert everyone == pytest.approx(truth.mean() - (~truth).mean() * odds, abs=1e-12)
    assert set(curve["none"]) == {0.0}


def test_rows_are_those_of_predict(out: Path, bundle: Path, cases: Path) -> None:
    found = rows(out)
    said = [p.row for p in Predictor(bundle).predict([cases / row["file"] for row in found])]
    for row, mine in zip(found, said, strict=True):
        for name in ("prediction", "decision", "conformal_set"):
            assert row[name] == mine[name]
        assert row["abstain"] == str(mine["abstain"]).lower()
        assert float(row["ood_score"]) == pytest.approx(mine["ood_score"], abs=1e-3)
        for name in NAMES:
            assert float(row[f"prob_{name}"]) == pytest.approx(mine[f"prob_{name}"], abs=2e-6)
    held = [row["label"] in row["conformal_set"].split("|") for row in found]
    assert value(content(out)["conformal"]["coverage"]) == pytest.approx(np.mean(held))
    share = content(out)["abstention"]["share"]
    assert value(share) == np.mean([row["abstain"] == "true" for row in found])


def test_groups_are_those_of_the_rows(out: Path) -> None:
    found, by = rows(out), content(out)["by"]
    site = by["site"]
    assert {g: said["n"] for g, said in site["groups"].items()} == {
        g: sum(row["by_site"] == g for row in found) for g in ("north", "south", "west")
    }
    assert site["groups"]["west"]["n"] < SMALLEST
    for kind in ("metrics", "difference"):
        entry = site["groups"]["west"][kind]["accuracy"]
        assert entry["value"] is None and entry["reason"] == f"fewer than {SMALLEST} images"
    own = {}
    for g in ("north", "south"):
        labels, probs = numbers([row for row in found if row["by_site"] == g])
        own[g] = roc_auc_score(labels, probs, multi_class="ovr")
        assert value(site["groups"][g]["metrics"]["auc_macro"]) == pytest.approx(own[g])
    gap = site["gap"]["auc_macro"]
    assert value(gap) == pytest.approx(abs(own["north"] - own["south"]))
    assert {gap["highest"], gap["lowest"]} == {"north", "south"} and gap["low"] >= 0
    difference = site["groups"]["north"]["difference"]["auc_macro"]
    assert value(difference) == pytest.approx(own["north"] - own["south"])
    assert difference["low"] <= difference["value"] <= difference["high"]
    ages = by["age"]["groups"]
    assert list(ages) == ["below 40", "40 to below 60", "60 and above"]
    sexes = by["sex"]["groups"]
    assert sexes[UNKNOWN]["metrics"]["accuracy"]["value"] is not None
    assert sexes[UNKNOWN]["difference"]["accuracy"]["value"] is None
    assert UNKNOWN not in (by["sex"]["gap"]["accuracy"]["highest"],
                           by["sex"]["gap"]["accuracy"]["lowest"])  # fmt: skip


def judged(n: int, worse: float, *, patients: int, bootstrap: int = 300) -> tuple[Judged, Any]:
    """Images of two groups; in the second one predictions are worse by so much noise."""
    rng = np.random.default_rng(3)
    second = np.arange(n) % 2 == 1
    labels = rng.integers(0, 3, n)
    logits = 1.2 * np.eye(3)[labels] + rng.normal(0, 1, (n, 3))
    logits += worse * second[:, None] * rng.normal(0, 1, (n, 3))
    probs = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    truth = labels == 2
    people = [f"p{i % patients}" for i in range(n)]
    images = Judged(
        labels, probs, "multiclass", NAMES, (truth, probs[:, 2] > 0.4), people, bootstrap
    )
    return images, {"one": ~second, "two": second}


def test_intervals_of_differences_tell_groups_apart_that_differ() -> None:
    images, groups = judged(600, 0.0, patients=600)
    same = compare_groups(images, groups)["groups"]["two"]["difference"]["auc_macro"]
    assert same["low"] < 0 < same["high"]
    images, groups = judged(600, 4.0, patients=600)
    found = compare_groups(images, groups)
    worse = found["groups"]["two"]["difference"]["auc_macro"]
    assert worse["high"] < 0
    gap = found["gap"]["auc_macro"]
    assert (gap["highest"], gap["lowest"]) == ("one", "two")
    assert 0 < gap["low"] < gap["value"] < gap["high"]


def test_a_replicate_of_a_group_is_the_metric_of_that_resample() -> None:
    """Held against images that are really drawn, patient by patient."""
    from wara.evaluation.intervals import clusters, draw_counts

    images, groups = judged(120, 1.0, patients=40, bootstrap=4)
    found = images.replicates(groups)
    counts = next(iter(draw_counts(clusters(120, images.patients), 4, 0)))
    for name, mask in groups.items():
        for k in range(4):
            drawn = np.repeat(np.flatnonzero(mask), counts[mask, k].astype(int))
            labels, probs = images.labels[drawn], images.probs[drawn]
            auc = roc_auc_score(labels, probs, multi_class="ovr")
            assert found[name]["auc_macro"][k] == pytest.approx(auc)
            assert images.decisions is not None
            truth, called = (side[drawn] for side in images.decisions)
            assert found[name]["ppv"][k] == pytest.approx(truth[called].mean())


def test_few_patients_make_wide_intervals() -> None:
    widths = []
    for patients in (400, 10):
        images, groups = judged(400, 1.0, patients=patients)
        entry = compare_groups(images, groups)["groups"]["one"]["metrics"]["accuracy"]
        widths.append(entry["high"] - entry["low"])
    assert widths[1] > 0 and widths[0] > 0
    one, _ = judged(400, 1.0, patients=1)
    alone = compare_groups(one, {"all": np.ones(400, bool)})
    entry = alone["groups"]["all"]["metrics"]["accuracy"]
    assert entry["low"] is None and "only one patient" in entry["reason"]
    assert alone["gap"]["accuracy"]["value"] is None


# -- classes go by name -----------------------------------------------------------------------


def carded(cases: Path, folder: Path, change: Callable[[str], str]) -> Path:
    """Write a card of the cases, changed; the table lies where it lay."""
    path = folder / "grain.yaml"
    path.write_text(change(CARD).replace("data/labels.csv", str(cases / "labels.csv")))
    return path


def reordered(text: str) -> str:
    lines = text.splitlines(keepends=True)
    first = next(i for i, line in enumerate(lines) if "name: calm" in line)
    lines[first : first + 3] = lines[first : first + 3][::-1]
    return "".join(lines)


def test_classes_in_another_order_are_the_same_classes(
    out: Path, bundle: Path, cases: Path, tmp_path: Path
) -> None:
    card = carded(cases, tmp_path, reordered)
    assert card.read_text().index("rough") < card.read_text().index("calm")
    request = Request(bootstrap=60)
    other = evaluate(bundle, str(card), tmp_path / "out", request, say=quiet)
    assert content(other)["metrics"] == content(out)["metrics"]
    assert [row["label"] for row in rows(other)] == [row["label"] for row in rows(out)]


def test_a_class_is_known_by_an_alias(bundle: Path, cases: Path, tmp_path: Path) -> None:
    table = (cases / "labels.csv").read_text().replace(",rough,", ",coarse-grained,")
    shutil.copytree(cases, tmp_path / "cases")
    (tmp_path / "cases" / "labels.csv").write_text(table)
    text = "{name: coarse-grained, meaning: fine, aliases: [rough]}"
    card = carded(
        tmp_path / "cases", tmp_path, lambda c: c.replace("{name: rough, meaning: fine}", text)
    )
    made = evaluate(bundle, str(card), tmp_path / "out", Request(bootstrap=0), say=quiet)
    assert {row["label"] for row in rows(made)} == set(NAMES)
    assert content(made)["metrics"]["accuracy"]["reason"] == "no interval: bootstrap is 0"


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        (",rough,", ",roughh,", "the data lack the class 'rough'; {where}; did you mean 'roughh'?"),
        (",rough,", ",roughh,", "class 'roughh' is none of the model's; {where}; "
                                "did you mean 'rough'?"),
        (",rough,", ",calm,", "the data lack the class 'rough'; {where}; name all classes"),
    ],
)  # fmt: skip
def test_classes_that_do_not_match_are_named(
    old: str, new: str, said: str, bundle: Path, cases: Path, tmp_path: Path
) -> None:
    shutil.copytree(cases, tmp_path / "cases")
    table = tmp_path / "cases" / "labels.csv"
    table.write_text(table.read_text().replace(old, new))
    with pytest.raises(WaraError) as caught:
        evaluate(bundle, str(table), tmp_path / "out", say=quiet)
    assert said.format(where=table) in str(caught.value) and caught.value.exit_code == 3
    assert not list(tmp_path.glob("*out*"))


def test_numbers_are_no_places(bundle: Path, cases: Path, tmp_path: Path) -> None:
    """Labels 0, 1, 2 could be the model's classes in its order; nobody has said so."""
    shutil.copytree(cases, tmp_path / "cases")
    table = tmp_path / "cases" / "labels.csv"
    text = table.read_text()
    for k, name in enumerate(NAMES):
        text = text.replace(f",{name},", f",{k},")
    table.write_text(text)
    with pytest.raises(WaraError, match="the data lack the class 'calm'"):
        evaluate(bundle, str(table), tmp_path / "out", say=quiet)


# -- refusals, and what cannot be used --------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--by", "sit"], "no column 'sit'; --by; did you mean 'site'?"),
        (["--by", "age"], "a column of 60 different numbers, and no bands; --by age; name them"),
        (["--by", "age:60,40"], "'60,40' are no bands"),
        (["--by", "site:1,2"], "bands of a column that holds 'north'"),
        (["--by", "file"], "a column of 78 different values; 20 groups are the most"),
        (["--split", "test"], "no image of the split 'test'; it has no splits"),
        (["--positive", "calm"], "the operating point of the model is of: rough"),
        (["--batch-size", "0"], "--batch-size is 0"),
    ],
)
def test_what_cannot_be_asked(
    words: list[str], said: str, bundle: Path, cases: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    place = tmp_path / "out"
    assert main(["evaluate", str(bundle), "--data", str(cases), "--out", str(place), *words]) == 2
    assert said in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_results_do_not_become_a_class(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tree = tmp_path / "tree"
    for name in ("calm", "mixed", "rough"):
        (tree / name).mkdir(parents=True)
        Image.new("L", (40, 40), 90).save(tree / name / "0.png")
    for verb in ("evaluate", "calibrate"):
        words = [verb, str(bundle), "--data", str(tree), "--out", str(tree / "out")]
        assert main(words) == 2
        assert "--out lies among the images" in capsys.readouterr().err
    words = ["train", "--cfg", "fundus_wara.yaml", "--set", f"dataset={tree}", "--dry-run", "--out"]
    assert main([*words, str(tree / "calm" / "run")]) == 2
    assert "out lies among the images" in capsys.readouterr().err


def test_a_place_that_is_taken_and_a_model_that_is_none(
    out: Path, bundle: Path, cases: Path, tmp_path: Path
) -> None:
    words = ["--data", str(cases), "--out"]
    assert main(["evaluate", str(bundle), *words, str(out)]) == 2
    assert main(["evaluate", str(tmp_path / "none"), *words, str(tmp_path / "a")]) == 4
    assert main(["evaluate", str(cases), *words, str(tmp_path / "a")]) == 4


def test_what_cannot_be_used_is_a_row_with_its_error(
    bundle: Path, cases: Path, tmp_path: Path
) -> None:
    shutil.copytree(cases, tmp_path / "cases")
    table = tmp_path / "cases" / "labels.csv"
    lines = table.read_text().splitlines()
    broken = lines[3].split(",")[0]
    (table.parent / broken).write_bytes((table.parent / broken).read_bytes()[:60])
    lines[5] = lines[5].replace(",calm,", ",,", 1)
    table.write_text("\n".join(lines) + "\n")
    words = ["evaluate", str(bundle), "--data", str(table), "--out"]
    assert main([*words, str(tmp_path / "a")]) == 3
    found = rows(tmp_path / "a")
    bad = [row for row in found if row["error"]]
    assert len(found) == 78 and len(bad) == 2 and all(not row["prob_calm"] for row in bad)
    assert any("no label" in row["error"] for row in bad)
    assert any(row["file"] == broken and "damaged" in row["error"] for row in bad)
    said = content(tmp_path / "a")
    assert said["data"]["unusable"] == 2 and said["data"]["images"] == 76
    assert "2 of 78 images could not be used" in (tmp_path / "a" / "report.md").read_text()
    assert broken not in (tmp_path / "a" / "report.html").read_text()
    assert main([*words, str(tmp_path / "b"), "--allow-partial"]) == 0


# -- a run, and its report --------------------------------------------------------------------


def test_a_run_says_what_its_bundle_says_and_knows_its_images(
    out: Path, bundle: Path, cases: Path, tmp_path: Path
) -> None:
    both = tmp_path / "both"
    shutil.copytree(cases, both)
    train = {row["file"]: row for row in csv.DictReader(
        (bundle.parent / "run" / "splits.csv").open()) if row["split"] == "train"}  # fmt: skip
    known = next(iter(train))
    with (both / "labels.csv").open("a") as table:
        shutil.copy(bundle.parent / "data" / known, both / "known.png")
        assert file_sha256(both / "known.png") == train[known]["sha256"]
        table.write("known.png,calm,somebody,north,f,30\n")
    run = bundle.parent / "run"
    made = evaluate(run, str(both), tmp_path / "out", Request(bootstrap=0), say=quiet)
    said = content(made)
    assert said["data"]["learnt_from"] == 1 and content(out)["data"]["learnt_from"] is None
    assert "1 of 79 images are among those that the model learnt from" in (
        made / "report.md"
    ).read_text()
    assert said["model"]["temperature"] == pytest.approx(
        content(out)["model"]["temperature"], abs=1e-3
    )
    of_bundle = {row["file"]: row for row in rows(out)}
    for row in rows(made):
        if row["file"] in of_bundle:
            for name in NAMES:
                there = float(of_bundle[row["file"]][f"logit_{name}"])
                assert float(row[f"logit_{name}"]) == pytest.approx(there, abs=1e-4)
    assert said["operating_point"]["reason"] and said["abstention"]["reason"]
    assert "--positive" in said["decision_curve"]["reason"]
    again = Request(bootstrap=0, positive=["mixed", "rough"])
    other = evaluate(run, str(cases), tmp_path / "other", again, say=quiet)
    assert content(other)["decision_curve"]["positive"] == ["mixed", "rough"]
    card = CARD.replace("{name: rough,", "{name: coarse, aliases: [rough],")
    card = card.replace("data/labels.csv", str(cases / "labels.csv"))
    (tmp_path / "grain.yaml").write_text(card + "positive: [coarse]\n")
    third = evaluate(run, str(tmp_path / "grain.yaml"), tmp_path / "third", Request(bootstrap=0),
                     say=quiet)  # fmt: skip
    assert content(third)["decision_curve"]["positive"] == ["rough"]


class Seen(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs


def test_the_page_holds_all_it_needs(out: Path) -> None:
    text = (out / "report.html").read_text()
    seen = Seen()
    seen.feed(text)
    assert "http:" not in text and "https:" not in text and "url(" not in text
    assert not {"script", "link", "iframe", "object", "embed"} & set(seen.tags)
    sources = [value for name, value in seen.attributes if name == "src"]
    assert len(sources) == len(list((out / "figures").glob("*.png"))) == 8
    assert all(str(source).startswith("data:image/png;base64,") for source in sources)
    assert not [name for name, _ in seen.attributes if name in ("href", "srcset", "onload")]
    said = content(out)["metrics"]["auc_macro"]
    assert f"{said['value']:.3f}" in text and f"[{said['low']:.3f}, {said['high']:.3f}]" in text


def test_names_in_the_page_are_text(bundle: Path, cases: Path, tmp_path: Path) -> None:
    shutil.copytree(cases, tmp_path / "cases")
    table = tmp_path / "cases" / "labels.csv"
    table.write_text(table.read_text().replace(",north,", ",<script>alert(1)</script>,"))
    request = Request(by=["site"], bootstrap=0)
    made = evaluate(bundle, str(table), tmp_path / "out", request, say=quiet)
    text = (made / "report.html").read_text()
    assert "<script" not in text and "&lt;script&gt;" in text


def test_the_pictures_of_the_markdown_lie_beside_it(out: Path) -> None:
    lines = (out / "report.md").read_text().splitlines()
    named = [line.split("](")[1].rstrip(")") for line in lines if line.startswith("![")]
    assert len(named) == 8 and all((out / name).is_file() for name in named)


def test_a_synthetic_model_or_set_is_stamped(bundle: Path, cases: Path, tmp_path: Path) -> None:
    from test_bundle import reseal

    copy = Path(shutil.copytree(bundle, tmp_path / "copy"))
    reseal(copy, synthetic=True)
    made = evaluate(copy, str(cases), tmp_path / "out", Request(bootstrap=0), say=quiet)
    assert content(made)["synthetic"] is True
    assert {row["synthetic"] for row in rows(made)} == {"true"}
    assert "SYNTHETIC: the model" in (made / "report.html").read_text()


# -- columns ----------------------------------------------------------------------------------


def test_columns_and_bands() -> None:
    assert parse_by("age:40,60", ["age"]) == By("age", (40.0, 60.0))
    assert parse_by("a:b", ["a:b"]) == By("a:b")
    found = groups_of(By("age", (40.0, 60.0)), ["39.9", "40", "60", "", "n/a", "12"])
    assert {name: list(np.flatnonzero(mask)) for name, mask in found.items()} == {
        "below 40": [0, 5], "40 to below 60": [1], "60 and above": [2], UNKNOWN: [3, 4],
    }  # fmt: skip
    few = groups_of(By("grade"), ["10", "2", "2.0", "unknown"])
    assert list(few) == ["2", "10", UNKNOWN] and few["2"].sum() == 2
    with pytest.raises(WaraError, match="such as --by age:"):
        groups_of(By("age"), [str(n) for n in range(30)])
    with pytest.raises(WaraError, match="the column is empty"):
        groups_of(By("age"), ["", "nan"])
    with pytest.raises(WaraError, match="no column 'site'; --by; name a table"):
        parse_by("site", [])


# -- labels that do not exclude each other ----------------------------------------------------


@pytest.mark.slow
def test_labels_apart_are_evaluated_and_calibrated_one_by_one(tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    from deploy_helpers import make_bundle
    from training_helpers import make_images, make_weights

    from wara.deploy.bundle import open_bundle
    from wara.deploy.calibrate import Wanted, calibrate
    from wara.deploy.export import Wish

    data = make_images(tmp_path / "data", (24, 24, 24))
    make_weights(tmp_path / "weights.safetensors")
    head, *lines = (data / "labels.csv").read_text().splitlines()
    words = {"calm": "", "mixed": "a", "rough": "a|b"}
    for name, labels in words.items():
        lines = [line.replace(f",{name},", f",{labels},") for line in lines]
    (data / "labels.csv").write_text("\n".join([head, *lines]) + "\n")
    card = CARD[: CARD.index("classes:")].replace("multiclass", "multilabel") + (
        "classes: [{name: a, meaning: ''}, {name: b, meaning: ''}]\n"
        "positive: [b, a]\nsource: {kind: csv, path: data/labels.csv}\n"
    )
    (tmp_path / "grain.yaml").write_text(card)
    bundle = make_bundle(tmp_path, Wish(specificity=0.5), epochs=1)  # positive as the card says
    swapped = card.replace(
        "[{name: a, meaning: ''}, {name: b, meaning: ''}]",
        "[{name: b, meaning: ''}, {name: a, meaning: ''}]",
    )
    (tmp_path / "other").mkdir()
    other = tmp_path / "other" / "grain.yaml"
    other.write_text(swapped.replace("data/labels.csv", str(data / "labels.csv")))
    request = Request(bootstrap=20)
    made = evaluate(bundle, str(other), tmp_path / "out", request, say=quiet)
    found, said = rows(made), content(made)
    truth = np.array([[n in row["label"].split("|") for n in "ab"] for row in found])
    probs = np.array([[float(row[f"prob_{n}"]) for n in "ab"] for row in found])
    assert said["data"]["classes"] == {"a": 48, "b": 24}
    for k, name in enumerate("ab"):
        assert value(said["metrics"][f"auc_{name}"]) == roc_auc_score(truth[:, k], probs[:, k])
    threshold = said["operating_point"]["threshold"]
    called = probs.max(1) >= threshold
    assert value(said["operating_point"]["sensitivity"]) == called[truth.any(1)].mean()
    assert "not exclusive" in said["conformal"]["reason"]
    child = calibrate(bundle, str(other), tmp_path / "local", Wanted(bootstrap=20), say=quiet)
    manifest = open_bundle(child).manifest
    assert manifest["calibration"]["after"]["coverage"]["value"] is None
    scaled = 1 / (1 + np.exp(-np.array(
        [[float(row[f"logit_{n}"]) for n in "ab"] for row in found]) / manifest["temperature"]
    ))  # fmt: skip
    own = -np.log(np.where(truth, scaled, 1 - scaled)).mean()
    assert manifest["calibration"]["after"]["nll"]["value"] == pytest.approx(own, abs=1e-9)
    table = tmp_path / "plain.csv"
    table.write_text(f"file,label\n{data}/images/calm_000.png,a\n{data}/images/calm_001.png,b\n")
    with pytest.raises(WaraError, match="any number of labels per image, the data have one"):
        evaluate(bundle, str(table), tmp_path / "none", say=quiet)
