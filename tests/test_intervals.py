"""Weighted metrics against scikit-learn on explicit resamples; what makes an interval honest."""

from __future__ import annotations

import time

import numpy as np
import pytest
from test_metrics import names, reference, sample

from wara.evaluation.intervals import (
    clusters,
    draw_counts,
    percentile_interval,
    replicate_metrics,
    weighted_auc,
)
from wara.evaluation.metrics import TASKS, decide, evaluate, point_metrics


def one_hot(probs, task):
    called = decide(probs, task=task)
    return (
        called.astype(bool) if task == "multilabel" else np.eye(probs.shape[1], dtype=bool)[called]
    )


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("task", TASKS)
def test_every_replicate_is_the_metric_of_the_explicit_resample(task, ties):
    labels, probs = sample(task, n=80, seed=3, ties=ties)
    n, c = probs.shape
    cluster = clusters(n, [f"p{i // 3}" for i in range(n)])
    counts = np.concatenate(list(draw_counts(cluster, 12, seed=5)), axis=1)
    got = replicate_metrics(
        labels, probs, one_hot(probs, task), counts, task=task, classes=names(c)
    )
    for r in range(12):
        rows = np.repeat(np.arange(n), counts[:, r].astype(int))
        want = reference(labels[rows], probs[rows], task, c)
        assert set(got) == set(want)
        for name, value in want.items():
            assert got[name][r] == pytest.approx(value, abs=1e-10), (name, r)


@pytest.mark.parametrize("task", TASKS)
def test_undefined_replicates_are_exactly_those_of_the_point_metrics(task):
    labels, probs = sample(task, n=7, c=3, seed=11)
    c = probs.shape[1]
    counts = np.concatenate(list(draw_counts(clusters(7, None), 60, seed=1)), axis=1)
    got = replicate_metrics(
        labels, probs, one_hot(probs, task), counts, task=task, classes=names(c)
    )
    undefined = 0
    for r in range(60):
        rows = np.repeat(np.arange(7), counts[:, r].astype(int))
        for name, value in point_metrics(
            labels[rows], probs[rows], task=task, classes=names(c)
        ).items():
            assert (value is None) == bool(np.isnan(got[name][r])), (name, r)
            if value is not None:
                assert got[name][r] == pytest.approx(value, abs=1e-10), (name, r)
            undefined += value is None
    assert undefined > 0  # the test has seen what it is about


def test_a_replicate_draws_whole_patients_and_as_many_as_there_are():
    patients = ["a", "a", "b", None, "c", "c", "c", None]
    cluster = clusters(8, patients)
    assert len(set(cluster.tolist())) == 5
    counts = np.concatenate(list(draw_counts(cluster, 500, seed=0)), axis=1)
    assert counts.shape == (8, 500)
    first = [patients.index("a"), 2, 3, patients.index("c"), 7]
    assert (counts[first].sum(axis=0) == 5).all()
    assert (counts[0] == counts[1]).all() and (counts[4] == counts[6]).all()
    assert (counts[3] != counts[7]).any()
    assert np.abs(counts[first].mean(axis=1) - 1).max() < 0.2


def test_a_patient_named_like_an_image_index_is_not_mixed_up():
    assert len(set(clusters(3, ["1", None, None]).tolist())) == 3


def test_repeating_each_image_within_its_patient_changes_no_interval():
    labels, probs = sample("ordinal", n=90)
    patients = [f"p{i:03d}" for i in range(90)]
    args = {"task": "ordinal", "classes": names(4), "bootstrap": 300}
    once = evaluate(labels, probs, patients=patients, **args)
    three = evaluate(
        labels.repeat(3), probs.repeat(3, axis=0), patients=np.repeat(patients, 3), **args
    )
    naive = evaluate(labels.repeat(3), probs.repeat(3, axis=0), **args)
    for name in once:
        assert three[name]["low"] == pytest.approx(once[name]["low"], abs=1e-12), name
        assert three[name]["high"] == pytest.approx(once[name]["high"], abs=1e-12), name
    width = once["accuracy"]["high"] - once["accuracy"]["low"]
    assert naive["accuracy"]["high"] - naive["accuracy"]["low"] < 0.75 * width


def test_same_seed_same_interval_other_seed_another():
    labels, probs = sample("binary")
    args = {"task": "binary", "classes": names(2), "bootstrap": 200}
    assert evaluate(labels, probs, **args) == evaluate(labels, probs, **args)
    assert evaluate(labels, probs, seed=1, **args) != evaluate(labels, probs, **args)


def test_the_replicates_do_not_depend_on_how_many_are_held_at_once(monkeypatch):
    labels, probs = sample("binary")
    args = {"task": "binary", "classes": names(2), "bootstrap": 100}
    whole = evaluate(labels, probs, **args)
    monkeypatch.setattr("wara.evaluation.intervals._CELLS", 120 * 7)
    parts = evaluate(labels, probs, **args)
    for name, entry in whole.items():
        for key in ("low", "high"):
            assert parts[name][key] == pytest.approx(entry[key], abs=1e-12), name


def test_the_interval_of_accuracy_is_near_the_binomial_one():
    rng = np.random.default_rng(0)
    labels = rng.integers(2, size=400)
    right = rng.random(400) < 0.8
    probs = np.eye(2)[np.where(right, labels, 1 - labels)] * 0.8 + 0.1
    entry = evaluate(labels, probs, task="binary", classes=names(2), bootstrap=2000)["accuracy"]
    half = 1.96 * np.sqrt(entry["value"] * (1 - entry["value"]) / 400)
    assert entry["low"] == pytest.approx(entry["value"] - half, abs=0.008)
    assert entry["high"] == pytest.approx(entry["value"] + half, abs=0.008)


@pytest.mark.slow
def test_nineteen_of_twenty_intervals_cover_the_truth():
    # Two normal distributions one standard deviation apart: AUROC is Phi(1 / sqrt 2).
    truth, covered = 0.76025, 0
    for seed in range(200):
        rng = np.random.default_rng(seed)
        labels = rng.integers(2, size=150)
        p = 1 / (1 + np.exp(-(rng.normal(size=150) + labels)))
        probs = np.stack([1 - p, p], axis=1)
        entry = evaluate(labels, probs, task="binary", classes=names(2), seed=seed)["auc_macro"]
        covered += entry["low"] <= truth <= entry["high"]
    assert 180 <= covered <= 199


def test_an_interval_that_would_mean_nothing_is_null_with_a_reason():
    labels, probs = sample("multiclass", n=60, c=3)
    args = {"task": "multiclass", "classes": names(3), "bootstrap": 100}
    for entry in evaluate(labels, probs, patients=["one"] * 60, **args).values():
        assert entry["value"] is not None and entry["low"] is None and entry["high"] is None
        assert entry["reason"] == "no interval: only one patient"
    for entry in evaluate(labels, probs, **{**args, "bootstrap": 0}).values():
        assert entry["low"] is None and "bootstrap is 0" in entry["reason"]

    lone = ["lone" if y == 2 else f"p{i}" for i, y in enumerate(labels)]
    full = evaluate(labels, probs, patients=lone, **args)
    thin = {"auc_macro", "balanced_accuracy", "f1_macro", "auc_k2", "sensitivity_k2"}
    for name, entry in full.items():
        assert entry["value"] is not None
        assert (entry["low"] is None) == (name in thin), name
        if name in thin:
            assert entry["reason"] == "no interval: only one patient for class k2"


def test_a_perfect_score_has_no_zero_width_interval():
    labels = np.array([0, 1] * 10)
    entry = evaluate(labels, np.eye(2)[labels] * 0.8 + 0.1, task="binary", classes=names(2))[
        "sensitivity_k1"
    ]
    assert entry["value"] == 1.0 and entry["low"] is None
    assert "same value" in entry["reason"]


def test_percentiles_leave_out_undefined_replicates_and_need_half_of_them():
    values = np.r_[np.linspace(0, 1, 101), np.full(99, np.nan)]
    low, high, reason = percentile_interval(values, 0.5)
    assert (low, high) == pytest.approx((0.025, 0.975)) and reason is None
    low, high, reason = percentile_interval(np.r_[values, np.full(9, np.nan)], 0.5)
    assert (
        low is high is None and reason == "no interval: defined in 101 of 209 bootstrap replicates"
    )


def test_the_calibration_interval_holds_its_own_value():
    # Well calibrated and many labels: plain percentiles of ECE lie above the value they belong to.
    rng = np.random.default_rng(0)
    probs = rng.random((100, 14))
    labels = (rng.random((100, 14)) < probs).astype(int)
    entry = evaluate(labels, probs, task="multilabel", classes=names(14), bootstrap=300)["ece"]
    assert entry["low"] < entry["value"] < entry["high"]


def test_weighted_auc_of_absent_classes_and_ties():
    counts = np.array([[1.0, 0.0, 2.0], [1.0, 1.0, 0.0], [1.0, 1.0, 1.0]])
    got = weighted_auc(np.array([0.5, 0.5, 0.7]), np.array([True, False, False]), counts)
    assert got[0] == 0.25 and np.isnan(got[1]) and got[2] == 0.0


def test_a_thousand_replicates_take_seconds():
    labels, probs = sample("multilabel", n=2000, c=14)
    start = time.perf_counter()
    evaluate(labels, probs, task="multilabel", classes=names(14), bootstrap=1000)
    assert time.perf_counter() - start < 15  # about 0.7 s on an idle core
