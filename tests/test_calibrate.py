"""A bundle fitted to local cases: the same model, other numbers, and what they are worth."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from deploy_helpers import CARD, make_cases
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax
from test_bundle import reseal

from wara.cli import main
from wara.deploy.bundle import MANIFEST, open_bundle
from wara.deploy.calibrate import FEWEST, Wanted, _wish, calibrate
from wara.deploy.labelled import open_labelled
from wara.deploy.models import of_bundle
from wara.deploy.predictor import Distance, Predictor
from wara.deploy.verify import verify
from wara.errors import WaraError
from wara.evaluation.calibration import ece

NAMES = ["calm", "mixed", "rough"]


def quiet(_: str) -> None:
    return


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_cases(tmp_path_factory.mktemp("local") / "cases")


@pytest.fixture(scope="module")
def made(bundle: Path, cases: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("calibrated") / "bundle"
    return calibrate(bundle, str(cases), out, Wanted(bootstrap=60), say=quiet)


@pytest.fixture(scope="module")
def outputs(bundle: Path, cases: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Labels, logits and features of the cases, by the parent."""
    table = [line.split(",") for line in (cases / "labels.csv").read_text().splitlines()[1:]]
    found = list(Predictor(bundle).predict([cases / row[0] for row in table]))
    labels = np.array([NAMES.index(row[1]) for row in table])
    return (
        labels,
        np.stack([p.logits for p in found if p.logits is not None]).astype(float),
        np.stack([p.features for p in found if p.features is not None]),
    )


def softmax(logits: np.ndarray, temperature: float) -> np.ndarray:
    return np.exp(log_softmax(logits / temperature, axis=1))


def nll(labels: np.ndarray, logits: np.ndarray, temperature: float) -> float:
    own = log_softmax(logits / temperature, axis=1)[np.arange(len(labels)), labels]
    return -float(own.mean())


def test_the_model_is_the_same_to_the_byte(made: Path, bundle: Path) -> None:
    parent, child = open_bundle(bundle), open_bundle(made)
    assert child.manifest["parent"]["sha256"] == parent.model_hash != child.model_hash
    files, others = parent.manifest["files"], child.manifest["files"]
    assert set(files) == set(others)
    changed = {name for name in files if files[name] != others[name]}
    assert changed == {"reliability.json", "MODEL_CARD.md"}
    for key in ("metrics", "parity", "input", "model", "backbone", "wara", "data"):
        assert child.manifest[key] == parent.manifest[key]
    assert "3 images" in list(verify(made))[1]
    assert not [path for path in made.parent.iterdir() if path != made]


def test_numbers_are_the_best_of_the_cases(made: Path, outputs: Any) -> None:
    labels, logits, features = outputs
    manifest = open_bundle(made).manifest
    best = minimize_scalar(lambda t: nll(labels, logits, t), bounds=(0.05, 20), method="bounded")
    assert manifest["temperature"] == pytest.approx(best.x, rel=1e-4)
    probs = softmax(logits, manifest["temperature"])
    point, truth = manifest["operating_point"], labels == 2
    reached = (probs[truth, 2] >= point["threshold"]).mean()
    assert reached >= 0.8 and point["local"]["sensitivity"]["value"] == reached
    assert point["positive"] == ["rough"] and point["asked"]["sensitivity"] == 0.8
    assert "validation" not in point
    trusted = json.loads((made / "reliability.json").read_text())
    place = int(np.ceil((len(labels) + 1) * 0.9))
    scores = np.sort(1 - probs[np.arange(len(labels)), labels])
    assert trusted["conformal"]["threshold"] == pytest.approx(scores[place - 1], abs=1e-9)
    distance = Distance((made / "reliability.npz").read_bytes())
    far = np.array([distance(row) for row in features])
    assert trusted["ood"]["threshold"] == pytest.approx(np.quantile(far, 0.99), rel=1e-6)
    assert trusted["chosen_on"] == "local" and list(trusted["rates"]) == ["local"]


def test_before_and_after_are_those_of_the_cases(made: Path, bundle: Path, outputs: Any) -> None:
    labels, logits, features = outputs
    parent, child = open_bundle(bundle).manifest, open_bundle(made).manifest
    told = child["calibration"]
    assert told["cases"] == 78 and told["patients"] == 39
    for when, manifest in (("before", parent), ("after", child)):
        t, point = manifest["temperature"], manifest["operating_point"]
        assert told["temperature"][when] == t and told["threshold"][when] == point["threshold"]
        probs, truth = softmax(logits, t), labels == 2
        assert told[when]["nll"]["value"] == pytest.approx(nll(labels, logits, t), abs=1e-9)
        assert told[when]["ece"]["value"] == pytest.approx(ece(labels, probs), abs=1e-9)
        called = probs[:, 2] >= point["threshold"]
        assert told[when]["sensitivity"]["value"] == called[truth].mean()
        assert told[when]["specificity"]["value"] == (~called)[~truth].mean()
        assert told[when]["nll"]["low"] < told[when]["nll"]["value"] < told[when]["nll"]["high"]
    assert told["after"]["nll"]["value"] <= told["before"]["nll"]["value"]
    assert told["after"]["coverage"]["value"] >= 0.9
    # Judged by what the others taught, nothing can be better than the best of all.
    assert told["cross_fitted"]["nll"]["value"] > told["after"]["nll"]["value"]
    limit = json.loads((bundle / "reliability.json").read_text())["ood"]["threshold"]
    distance = Distance((bundle / "reliability.npz").read_bytes())
    beyond = np.mean([distance(row) > limit for row in features])
    assert told["beyond_old_limit"]["value"] == pytest.approx(beyond)
    card = (made / "MODEL_CARD.md").read_text()
    assert "78 local cases (of 39 patients)" in card and "cross-fitted" in card
    assert f"{told['before']['ece']['value']:.3f}" in card
    # A temperature that makes it worse on new cases is written with a warning.
    worse = told["cross_fitted"]["nll"]["value"] > told["before"]["nll"]["value"]
    assert worse == (told["warning"] is not None) == ("**Warning:**" in card)


def test_what_it_predicts_follows_the_new_numbers(
    made: Path, cases: Path, outputs: Any
) -> None:
    labels, logits, _ = outputs
    predictor = Predictor(made, abstain_on=("ood", "ambiguous"))
    point = predictor.bundle.manifest["operating_point"]
    table = (cases / "labels.csv").read_text().splitlines()[1:]
    probs = softmax(logits, predictor.bundle.manifest["temperature"])
    found = predictor.predict([cases / line.split(",")[0] for line in table])
    abstained = 0
    for prediction, wanted in zip(found, probs, strict=True):
        row = prediction.row
        assert [row[f"prob_{n}"] for n in NAMES] == pytest.approx(list(wanted), abs=2e-6)
        assert row["decision"] == ("positive" if wanted[2] >= point["threshold"] else "negative")
        abstained += "unlike" in (row["abstain_reason"] or "")
    assert abstained <= 1  # of the very cases whose 99th percentile is the limit


def test_positive_is_what_the_user_names_then_the_model_then_the_card(
    bundle: Path, cases: Path, tmp_path: Path
) -> None:
    card = CARD.replace("data/labels.csv", str(cases / "labels.csv"))
    (tmp_path / "grain.yaml").write_text(card + "positive: [mixed]\n")
    model = of_bundle(Predictor(bundle, abstain_on=()))
    labelled = open_labelled(str(tmp_path / "grain.yaml"), model)
    said = "the card calls mixed positive, the model's operating point rough"
    assert labelled.images.notes[-1] == said
    for point, named, wanted in (
        (model.point, [], "rough"), (None, [], "mixed"),
        (model.point, ["calm"], "calm"), (None, ["calm"], "calm"),
    ):  # fmt: skip
        asked = Wanted(positive=named, sensitivity=0.8)
        assert _wish(replace(model, point=point), labelled, asked)["positive"] == [wanted]
    plain = open_labelled(str(cases), model)
    with pytest.raises(WaraError, match="which classes are positive"):
        _wish(replace(model, point=None), plain, Wanted(sensitivity=0.8))


def test_another_operating_point_is_had_for_the_asking(
    bundle: Path, cases: Path, tmp_path: Path
) -> None:
    words = ["calibrate", str(bundle), "--data", str(cases), "--out", str(tmp_path / "new")]
    assert main([*words, "--positive", "mixed,rough", "--specificity", "0.6"]) == 0
    manifest = open_bundle(tmp_path / "new").manifest
    point = manifest["operating_point"]
    assert point["positive"] == ["mixed", "rough"]
    assert point["local"]["specificity"]["value"] >= 0.6
    assert manifest["calibration"]["positive"] == {"before": ["rough"],
                                                   "after": ["mixed", "rough"]}  # fmt: skip
    again = ["calibrate", str(tmp_path / "new"), "--data", str(cases), "--out"]
    assert main([*again, str(tmp_path / "newer")]) == 0
    grandchild = open_bundle(tmp_path / "newer").manifest
    assert grandchild["parent"]["sha256"] == manifest["sha256"]
    assert grandchild["operating_point"]["threshold"] == point["threshold"]


def test_a_parent_without_an_operating_point_has_a_child_without(
    bundle: Path, cases: Path, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(bundle, tmp_path / "copy"))
    reseal(copy, operating_point=None, synthetic=True)
    made = calibrate(copy, str(cases), tmp_path / "out", Wanted(bootstrap=0), say=quiet)
    manifest = open_bundle(made).manifest
    assert manifest["operating_point"] is None and manifest["synthetic"] is True
    assert "sensitivity" not in manifest["calibration"]["before"]
    assert "No operating point" in (made / "MODEL_CARD.md").read_text()


def shortened(cases: Path, folder: Path, keep: Any) -> Path:
    """Copy the cases with those rows of the table that are to be kept."""
    shutil.copytree(cases, folder)
    head, *rows = (folder / "labels.csv").read_text().splitlines()
    (folder / "labels.csv").write_text("\n".join([head, *filter(keep, rows)]) + "\n")
    return folder


def test_too_few_cases_are_counted(bundle: Path, cases: Path, tmp_path: Path) -> None:
    few = shortened(cases, tmp_path / "few", lambda row: int(row[-2:]) % 2)
    n = len((few / "labels.csv").read_text().splitlines()) - 1
    assert n < FEWEST
    with pytest.raises(WaraError, match=f"{n} cases; at least 50 are needed") as caught:
        calibrate(bundle, str(few), tmp_path / "out", say=quiet)
    assert caught.value.exit_code == 2 and [p.name for p in tmp_path.iterdir()] == ["few"]


def test_a_class_without_cases_is_named(bundle: Path, cases: Path, tmp_path: Path) -> None:
    some = shortened(cases, tmp_path / "some", lambda row: ",rough," not in row)
    (tmp_path / "grain.yaml").write_text(
        CARD.replace("data/labels.csv", str(some / "labels.csv"))
    )
    with pytest.raises(WaraError) as caught:
        calibrate(bundle, str(tmp_path / "grain.yaml"), tmp_path / "out", say=quiet)
    assert "no case is of class rough (calm 30, mixed 26, rough 0)" in str(caught.value)
    assert caught.value.exit_code == 2 and not (tmp_path / "out").exists()


def test_a_case_that_cannot_be_read_stops_it(bundle: Path, cases: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(cases, tmp_path / "cases"))
    path = copy / "images" / "calm_003.png"
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(WaraError) as caught:
        calibrate(bundle, str(copy), tmp_path / "out", say=quiet)
    assert "1 cases cannot be used" in str(caught.value) and "calm_003.png" in str(caught.value)
    assert caught.value.exit_code == 3 and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--positive", "rouhg", "--sensitivity", "0.9"], "did you mean 'rough'?"),
        (["--positive", "rough"], "--positive alone sets no threshold"),
        (["--specificity", "1"], "no threshold reaches a specificity of 1.0 on local images"),
        (["--sensitivity", "2"], "give a number from 0 to 1"),
    ],
)
def test_points_that_cannot_be_had(
    words: list[str], said: str, bundle: Path, cases: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    out = tmp_path / "out"
    assert main(["calibrate", str(bundle), "--data", str(cases), "--out", str(out), *words]) == 2
    assert said in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_a_damaged_parent_has_no_child(bundle: Path, cases: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(bundle, tmp_path / "copy"))
    (copy / MANIFEST).write_bytes((copy / MANIFEST).read_bytes().replace(b"0.", b"1.", 1))
    with pytest.raises(WaraError) as caught:
        calibrate(copy, str(cases), tmp_path / "out", say=quiet)
    assert caught.value.exit_code == 4 and not (tmp_path / "out").exists()
