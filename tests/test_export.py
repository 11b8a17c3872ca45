"""From a run to a bundle: the exported model says what the run said, or nothing is left."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from deploy_helpers import make_run
from sklearn.metrics import confusion_matrix
from training_helpers import make_images

from wara.adapters import unload
from wara.cli import main
from wara.deploy import parity
from wara.deploy.bundle import open_bundle
from wara.deploy.export import Wish, export
from wara.deploy.operating import point_classes, positive_classes
from wara.deploy.predictor import Distance, Predictor, conformal_set
from wara.deploy.reliability import Scored, conformal_threshold, feature_statistics
from wara.errors import WaraError
from wara.evaluation.decisions import choose_threshold, decision_measures, net_benefit
from wara.runs.load import load_run


def quiet(_: str) -> None:
    return


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


# Options of each kind, and whether an update of that kind is merged.
KINDS: dict[str, tuple[dict[str, Any], bool]] = {
    "tiny_wara": ({"rank": 2}, False),
    "waveft": ({}, True),
    "lora": ({"rank": 2}, True),
    "linear_probe": ({}, True),
    "full": ({}, True),
    "adaptformer": ({"bottleneck": 5}, False),
    "convpass": ({"bottleneck": 4}, False),
    "vpt": ({"tokens": 3}, False),
    "fact_tt": ({"rank": 3}, True),
    "apla": ({"rows": 7}, True),
    "ssf": ({}, True),
    "rank_conv": ({"rank": 2}, False),
    "random": ({"method": "wara", "rank": 2, "wavelet": "random", "core": "full"}, False),
}
QUICK = ("waveft",)
SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in KINDS if name not in QUICK]


@pytest.mark.parametrize("kind", [*QUICK, *SLOW])
def test_every_kind_of_method_is_exported(kind: str, place: Path) -> None:
    """Weight-domain updates are merged, those of tokens are nodes; both say what the run said."""
    pytest.importorskip("onnxscript")
    options, merged = KINDS[kind]
    adapter = {"method": kind, **options}
    run = make_run(place, adapter=adapter, epochs=1, out=str(place / kind))
    bundle = open_bundle(export(run, place / f"{kind}.bundle", say=quiet))
    certificate = bundle.manifest["parity"]
    assert certificate["largest_difference"] <= 1e-4 and certificate["flipped"] == 0
    assert certificate["images"] == len(load_run(run).predictions("val").files) + len(
        load_run(run).predictions("test").files
    )
    assert bundle.manifest["model"]["merged"] is merged
    assert bundle.manifest["method"]["name"] == adapter["method"]
    # And on images that the run has not seen, with the adapter as its folder holds it.
    model, size = load_run(run).model(), bundle.manifest["input"]["size"]
    pixels = np.random.default_rng(3).normal(size=(5, 3, *size)).astype(np.float32)
    with torch.no_grad():
        wanted = model(torch.from_numpy(pixels)).numpy()
        without = unload(model)(torch.from_numpy(pixels)).numpy() if _is_taken_off(kind) else None
    np.testing.assert_allclose(
        Predictor(bundle.folder).run(pixels)[0], wanted,
        atol=certificate["limit"]["largest_difference"],
    )  # fmt: skip
    # The adapter is felt by far more than that.
    assert without is None or abs(wanted - without).max() > 1e-2


def _is_taken_off(kind: str) -> bool:
    return kind not in ("linear_probe", "full")


def test_what_a_manifest_tells(bundle: Path) -> None:
    run = load_run(bundle.parent / "run")
    said = open_bundle(bundle).manifest
    assert [c["name"] for c in said["classes"]] == ["calm", "mixed", "rough"]
    assert said["classes"][0]["meaning"] == "coarse"
    assert said["input"] == {
        "size": [32, 32], "mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic",
        "bits": None, "greys": "window", "statistics": "user",
    }  # fmt: skip
    assert said["backbone"]["weights_sha256"] == run.backbone.weights_sha256
    assert said["method"]["name"] == "wara" and said["method"]["options"]["rank"] == 2
    assert said["metrics"]["test"] == run.metrics["test"]
    assert said["intended_use"] == "Tests of the toolkit." and said["limits"] == "Nobody."
    assert said["licence_of_images"] == "not given" and said["parent"] is None
    assert said["data"]["sha256"] == run.provenance["data"]["sha256"]
    assert said["synthetic"] is False
    assert "0.5, 0.5, 0.5 (source: user)" in (bundle / "MODEL_CARD.md").read_text()
    # Nothing of where the images lie, or what they are called.
    text = (bundle / "manifest.json").read_text() + (bundle / "MODEL_CARD.md").read_text()
    assert str(bundle.parent) not in text and "calm_0" not in text


def test_the_operating_point_is_what_validation_images_say(bundle: Path) -> None:
    predictor = Predictor(bundle)
    point = predictor.bundle.manifest["operating_point"]
    run = load_run(bundle.parent / "run")
    for split, name in (("val", "validation"), ("test", "test")):
        table = run.predictions(split).predictions
        scores = predictor.probabilities(table.logits)[:, 2]
        truth = table.labels == 2
        tn, fp, fn, tp = confusion_matrix(truth, scores >= point["threshold"]).ravel()
        said = {key: entry["value"] for key, entry in point[name].items()}
        assert said == pytest.approx(
            {"sensitivity": tp / (tp + fn), "specificity": tn / (tn + fp),
             "ppv": tp / (tp + fp), "npv": tn / (tn + fn)}
        )  # fmt: skip
    assert point["validation"]["sensitivity"]["value"] >= 0.8
    assert point["asked"] == {"sensitivity": 0.8, "specificity": None}


def test_rates_in_the_manifest_are_those_of_the_predictor(bundle: Path) -> None:
    predictor, run = Predictor(bundle, abstain_on=("ood",)), load_run(bundle.parent / "run")
    table = run.predictions("test")
    found = list(predictor.predict([bundle.parent / "data" / file for file in table.files]))
    rates = predictor.reliability["rates"]["test"]
    assert np.mean([p.row["abstain"] for p in found]) == pytest.approx(rates["ood"], abs=1e-4)
    truth = [predictor.classes[label] for label in table.predictions.labels]
    held = [t in p.row["conformal_set"].split("|") for t, p in zip(truth, found, strict=True)]
    assert np.mean(held) == pytest.approx(rates["coverage"], abs=1e-4)


@pytest.mark.slow
def test_int8_says_what_it_costs(
    bundle: Path, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The logits of the small model are so close that rounding alone can turn more than 2 %.
    monkeypatch.setattr(parity, "MOST_FLIPS", 0.5)
    out = export(bundle.parent / "run", place / "int8", Wish(int8=True), say=quiet)
    said = open_bundle(out).manifest
    assert said["model"]["precision"] == "int8"
    assert said["model"]["int8_bytes"] < said["model"]["float32_bytes"]
    exact, rounded = Predictor(bundle, abstain_on=()), Predictor(out, abstain_on=())
    for split, found in said["parity"]["splits"].items():
        table = load_run(bundle.parent / "run").predictions(split)
        paths = [bundle.parent / "data" / file for file in table.files]
        before, after = (list(one.predict(paths)) for one in (exact, rounded))
        flips = sum(b.row["prediction"] != a.row["prediction"]
                    for b, a in zip(before, after, strict=True))  # fmt: skip
        assert found["flipped"] == flips and found["n"] == len(paths)
        # Three times as much where sums of products saturate.
        assert 0 < found["largest_difference"] < 0.025
    onnx = pytest.importorskip("onnx")
    weights = [
        onnx.numpy_helper.to_array(tensor).astype(int)
        for tensor in onnx.load(str(out / "model.onnx")).graph.initializer
        if tensor.data_type == onnx.TensorProto.INT8 and len(tensor.dims) == 2
    ]
    assert weights and max(abs(w).max() for w in weights) <= 64
    assert said["parity"]["limit"] == {"flipped_share": 0.5}
    speed = said["model"]["int8_time_to_float32"]
    assert 0 < speed["p10"] <= speed["median"] <= speed["p90"]
    assert main(["verify", str(out)]) == 0


# -- refusals -------------------------------------------------------------------------------------


@pytest.fixture
def copy(bundle: Path, tmp_path: Path) -> Path:
    """A copy of the run, beside it."""
    run = bundle.parent / tmp_path.name
    shutil.copytree(bundle.parent / "run", run)
    yield run
    shutil.rmtree(run)


def refused(run: Path, out: Path, wish: Wish | None = None) -> WaraError:
    with pytest.raises(WaraError) as caught:
        export(run, out, wish, say=quiet)
    assert not out.exists() and not list(out.parent.glob(f".{out.name}*"))
    return caught.value


def test_assumed_statistics_cannot_be_exported(place: Path) -> None:
    run = make_run(
        place, backbone__mean=None, backbone__std=None, epochs=1, out=str(place / "assumed")
    )
    error = refused(run, place / "assumed.bundle")
    assert error.exit_code == 2 and "backbone.mean" in str(error)


def test_an_unknown_class_and_a_point_that_is_not_reached(bundle: Path, tmp_path: Path) -> None:
    run, out = bundle.parent / "run", tmp_path / "out"
    error = refused(run, out, Wish(positive=["roug"], sensitivity=0.9))
    assert error.exit_code == 2 and "did you mean 'rough'" in str(error)
    error = refused(run, out, Wish(positive=["rough"]))
    assert error.exit_code == 2 and "--sensitivity or --specificity" in str(error)
    error = refused(run, out, Wish(sensitivity=0.9))
    assert error.exit_code == 2 and "name some of: calm, mixed, rough" in str(error)
    known = point_classes(["calm", "mixed", "rough"], "multiclass", positive=[],
                          finding=["rough"], sensitivity=0.9, specificity=None)  # fmt: skip
    assert known == ["rough"]  # what the card says holds where the user says nothing
    error = refused(run, out, Wish(positive=["calm", "mixed", "rough"], sensitivity=0.9))
    assert error.exit_code == 2 and "leave one out" in str(error)
    assert positive_classes(["rough", "rough"], ["calm", "rough"], "binary") == ["rough"]
    with pytest.raises(WaraError, match="which classes are positive"):  # no order tells
        positive_classes([], ["cancer", "healthy"], "binary")
    error = refused(run, out, Wish(positive=["rough"], sensitivity=1.2))
    assert error.exit_code == 2


def test_a_run_that_is_not_finished(copy: Path, tmp_path: Path) -> None:
    said = json.loads((copy / "provenance.json").read_text())
    (copy / "provenance.json").write_text(json.dumps({**said, "status": "interrupted"}))
    assert refused(copy, tmp_path / "out").exit_code == 4


def test_weights_that_are_gone_or_others(copy: Path, tmp_path: Path) -> None:
    error = refused(copy, tmp_path / "out", Wish(weights=tmp_path / "gone.safetensors"))
    assert error.exit_code == 4 and load_run(copy).backbone.weights_sha256 in str(error)
    other = tmp_path / "other.safetensors"
    other.write_bytes(b"x")
    error = refused(copy, tmp_path / "out", Wish(weights=other))
    assert error.exit_code == 4 and "not those of the run" in str(error)


def test_images_that_were_changed(copy: Path, tmp_path: Path) -> None:
    image = copy.parent / "data" / "images" / "calm_000.png"
    whole = image.read_bytes()
    image.write_bytes((image.parent / "rough_000.png").read_bytes())
    try:
        error = refused(copy, tmp_path / "out")
    finally:
        image.write_bytes(whole)
    assert error.exit_code == 4 and "calm_000.png was changed" in str(error)


@pytest.mark.parametrize("column", ["label", "patient"])
def test_labels_and_patients_that_were_changed(column: str, copy: Path, tmp_path: Path) -> None:
    """They would make the manifest contradict its own metrics."""
    table = copy.parent / "data" / "labels.csv"
    whole = table.read_text()
    header, first, *rest = whole.splitlines()
    cells = dict(zip(header.split(","), first.split(","), strict=True))
    cells[column] = {"label": "rough", "patient": "somebody"}[column]
    table.write_text("\n".join([header, ",".join(cells.values()), *rest]) + "\n")
    try:
        error = refused(copy, tmp_path / "out")
    finally:
        table.write_text(whole)
    assert error.exit_code == 4 and "label or patient" in str(error) and cells["file"] in str(error)


def test_an_export_that_says_something_else_leaves_nothing(
    copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parity, "LARGEST", -1.0)
    error = refused(copy, tmp_path / "out")
    assert error.exit_code == 4 and "differs from the run" in str(error)


def test_int8_that_changes_decisions_is_refused() -> None:
    splits = {"val": {"n": 100, "flipped": 3, "largest_difference": 0.1, "auc_change": 0.0}}
    with pytest.raises(WaraError, match="3 of 100 decisions") as caught:
        parity.certify(splits, int8=True)
    assert caught.value.exit_code == 4
    found = parity.certify(splits | {"test": {**splits["val"], "flipped": 1}}, int8=True)
    assert found["limit"] == {"flipped_share": 0.02}


def test_an_existing_folder_is_not_replaced(bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(WaraError, match="something already") as caught:
        export(bundle.parent / "run", tmp_path)
    assert caught.value.exit_code == 2


@pytest.mark.slow
def test_a_killed_export_leaves_no_bundle(
    copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("wara.deploy.export.feature_statistics", stop)
    with pytest.raises(KeyboardInterrupt):
        export(copy, tmp_path / "out", say=quiet)
    assert os.listdir(tmp_path) == []


# -- arithmetic -----------------------------------------------------------------------------------


def test_parity_counts_what_changed() -> None:
    labels = np.array([0, 1, 1, 0])
    run = np.array([[2.0, 0], [0, 1], [0, 3], [1, 0.9]])
    served = run.copy()
    served[3] = [0.9, 1]
    said = parity.compare(labels, run, served, task="binary", classes=["a", "b"])
    assert (said["n"], said["flipped"]) == (4, 1)
    assert said["largest_difference"] == pytest.approx(0.1)
    assert parity.compare(labels[:0], run[:0], served[:0], task="binary", classes=["a", "b"]) == {
        "n": 0, "largest_difference": None, "auc_change": None, "flipped": 0,
    }  # fmt: skip


@pytest.mark.parametrize("seed", range(5))
def test_thresholds_by_brute_force(seed: int) -> None:
    rng = np.random.default_rng(seed)
    truth = rng.random(60) < 0.4
    scores = np.round(truth * 0.3 + rng.random(60), 2)
    for wanted in (0.5, 0.8, 0.95):
        cut = choose_threshold(scores, truth, sensitivity=wanted, specificity=None)
        best = max(
            np.mean(scores[~truth] < t)
            for t in (np.unique(scores)[1:] + np.unique(scores)[:-1]) / 2
            if np.mean(scores[truth] >= t) >= wanted
        )
        assert np.mean(scores[truth] >= cut) >= wanted
        assert np.mean(scores[~truth] < cut) == pytest.approx(best)
        cut = choose_threshold(scores, truth, sensitivity=None, specificity=wanted)
        assert np.mean(scores[~truth] < cut) >= wanted


def test_a_threshold_that_calls_all_alike_is_none() -> None:
    truth = np.array([True, False, True, False])
    with pytest.raises(WaraError, match="the highest is 0.500"):
        choose_threshold(np.array([0.1, 0.2, 0.9, 0.3]), truth, sensitivity=0.9, specificity=None)
    with pytest.raises(WaraError, match="no validation image with the positive"):
        choose_threshold(np.ones(4), np.zeros(4, bool), sensitivity=0.5, specificity=None)


def test_measures_without_a_denominator_are_null_with_a_reason() -> None:
    truth = np.array([True, True, False])
    said = decision_measures(truth, np.zeros(3, bool), patients=None, bootstrap=20, seed=0)
    assert said["ppv"]["value"] is None and said["ppv"]["reason"] and said["ppv"]["n"] == 0
    assert said["sensitivity"]["value"] == 0.0 and said["npv"]["value"] == pytest.approx(1 / 3)


def test_net_benefit_by_hand() -> None:
    scores, truth = np.array([0.9, 0.6, 0.4, 0.2]), np.array([True, False, True, False])
    said = net_benefit(scores, truth, np.array([0.5, 0.25]))
    assert said["model"] == pytest.approx([1 / 4 - 1 / 4, 2 / 4 - 1 / 4 / 3])
    assert said["all"] == pytest.approx([0.0, 0.5 - 0.5 / 3])
    assert (said["none"] == 0).all()


def test_conformal_sets_cover_what_they_promise() -> None:
    """Over many draws the sets hold the true class as often as asked, on average."""
    rng = np.random.default_rng(0)
    held = []
    for _ in range(300):
        logits = rng.normal(size=(120, 4))
        probs = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
        labels = np.array([rng.choice(4, p=p) for p in probs])
        limit, reason = conformal_threshold(probs[:60], labels[:60], 0.9)
        assert reason is None
        held += [
            y in (conformal_set(p, limit) or [])
            for p, y in zip(probs[60:], labels[60:], strict=True)
        ]
    assert 0.895 < np.mean(held) < 0.93


def test_too_few_images_for_a_coverage() -> None:
    limit, reason = conformal_threshold(np.full((8, 2), 0.5), np.zeros(8, int), 0.9)
    assert limit is None and "8 images are too few" in str(reason)
    limit, reason = conformal_threshold(np.full((9, 2), 0.5), np.zeros(9, int), 0.9)
    assert limit is not None
    assert conformal_threshold(np.zeros((9, 2)), np.zeros((9, 2), int), 0.9)[0] is None


def test_distance_is_that_of_the_shrunk_covariance() -> None:
    from sklearn.covariance import LedoitWolf

    rng = np.random.default_rng(0)
    labels = np.arange(90) % 3
    features = rng.normal(size=(90, 8)) @ rng.normal(size=(8, 8)) + 3 * labels[:, None]
    scored = Scored(labels, np.zeros((90, 3)), features, [None] * 90)
    distance = Distance(feature_statistics(scored))
    means = np.stack([features[labels == k].mean(0) for k in range(3)])
    precision = LedoitWolf(assume_centered=True).fit(features - means[labels]).precision_
    for point in rng.normal(size=(5, 8)) * 4:
        wanted = min(np.sqrt((point - m) @ precision @ (point - m)) for m in means)
        assert distance(point) == pytest.approx(wanted, rel=1e-4)


def test_the_tensors_of_a_bundle_are_those_of_the_run(bundle: Path) -> None:
    from safetensors.torch import load_file

    found = load_file(bundle / "model.safetensors")
    own = load_run(bundle.parent / "run").model().state_dict()
    assert found.keys() == own.keys()
    assert all(torch.equal(found[name], own[name].float()) for name in own)


@pytest.mark.slow
def test_more_images_than_the_run_knew_are_no_matter(copy: Path, tmp_path: Path) -> None:
    """A folder that has grown since still holds the images of the run."""
    extra = make_images(tmp_path / "more", (1, 1, 1))
    assert (extra / "labels.csv").is_file()
    table = copy.parent / "data" / "labels.csv"
    whole = table.read_text()
    shutil.copy(extra / "images" / "calm_000.png", copy.parent / "data" / "images" / "new.png")
    table.write_text(whole + "images/new.png,calm,somebody\n")
    try:
        export(copy, tmp_path / "out", say=quiet)
    finally:
        table.write_text(whole)
