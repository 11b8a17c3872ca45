"""Point values against scikit-learn, definedness, and refusals."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from sklearn import metrics as sk

from wara.errors import WaraError
from wara.evaluation.metrics import TASKS, decide, evaluate, metric_names, point_metrics


def names(c: int) -> list[str]:
    return [f"k{i}" for i in range(c)]


def sample(task: str, n: int = 120, c: int = 4, seed: int = 0, ties: bool = False):
    """Draw labels and probabilities that agree more often than chance."""
    rng = np.random.default_rng(seed)
    c = 2 if task == "binary" else c
    if task == "multilabel":
        labels = (rng.random((n, c)) < 0.3).astype(int)
        probs = 1 / (1 + np.exp(-(rng.normal(size=(n, c)) + 1.5 * labels - 0.7)))
        return labels, probs.round(1) if ties else probs
    labels = rng.integers(c, size=n)
    logits = rng.normal(size=(n, c)) + 1.2 * np.eye(c)[labels]
    if ties:
        logits = logits.round()
    return labels, np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)


def reference(labels, probs, task: str, c: int) -> dict[str, float]:
    """Every metric straight from scikit-learn; ECE by its definition, image by image."""
    many = task == "multilabel"
    called = decide(probs, task=task)
    y = labels if many else np.eye(c, dtype=int)[labels]
    yhat = called if many else np.eye(c, dtype=int)[called]
    out = {
        "accuracy": sk.accuracy_score(labels.ravel(), called.ravel()),
        "f1_macro": sk.f1_score(labels, called, average="macro"),
    }
    if many:
        out["auc_macro"] = sk.roc_auc_score(labels, probs, average="macro")
        out["balanced_accuracy"] = np.mean(
            [sk.balanced_accuracy_score(y[:, k], yhat[:, k]) for k in range(c)]
        )
        out["brier"] = np.mean([sk.brier_score_loss(y[:, k], probs[:, k]) for k in range(c)])
        pairs = [(probs[:, k], y[:, k]) for k in range(c)]
    else:
        score = probs[:, 1] if task == "binary" else probs
        out["auc_macro"] = sk.roc_auc_score(labels, score, multi_class="ovr", average="macro")
        out["balanced_accuracy"] = sk.balanced_accuracy_score(labels, called)
        out["brier"] = sk.brier_score_loss(labels, score, labels=range(c))
        pairs = [(probs.max(axis=1), labels == called)]
    if task == "ordinal":
        out["qwk"] = sk.cohen_kappa_score(labels, called, weights="quadratic")
    gaps = []
    for conf, came in pairs:
        total = 0.0
        for b in range(15):
            inside = (conf > b / 15) & (conf <= (b + 1) / 15) if b else conf <= 1 / 15
            if inside.any():
                total += inside.mean() * abs(came[inside].mean() - conf[inside].mean())
        gaps.append(total)
    out["ece"] = float(np.mean(gaps))
    for k in range(c):
        # Rounding of the two columns breaks ties differently; the second one is the score of both.
        score = probs[:, 1] * (2 * k - 1) if task == "binary" else probs[:, k]
        out[f"auc_k{k}"] = sk.roc_auc_score(y[:, k], score)
        out[f"sensitivity_k{k}"] = sk.recall_score(y[:, k], yhat[:, k])
        out[f"specificity_k{k}"] = sk.recall_score(y[:, k], yhat[:, k], pos_label=0)
    return out


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("task", TASKS)
def test_point_values_are_those_of_scikit_learn(task, ties):
    labels, probs = sample(task, ties=ties)
    c = probs.shape[1]
    got = point_metrics(labels, probs, task=task, classes=names(c))
    want = reference(labels, probs, task, c)
    assert list(got) == metric_names(task, names(c))
    assert set(got) == set(want)
    for name, value in want.items():
        assert got[name] == pytest.approx(value, abs=1e-12), name


@pytest.mark.parametrize("task", TASKS)
def test_the_metric_names_are_the_contract(task):
    classes = ["no finding", "mass"] if task == "binary" else ["no finding", "mass", "edema"]
    head = ["auc_macro", "accuracy", "balanced_accuracy", "f1_macro"]
    head += ["qwk"] * (task == "ordinal") + ["ece", "brier"]
    tail = [f"{kind}_{k}" for kind in ("auc", "sensitivity", "specificity") for k in classes]
    assert metric_names(task, classes) == head + tail


@pytest.mark.parametrize("task", TASKS)
def test_evaluate_agrees_with_point_metrics_and_is_json(task):
    labels, probs = sample(task)
    classes = names(probs.shape[1])
    full = evaluate(labels, probs, task=task, classes=classes, bootstrap=200)
    assert json.loads(json.dumps(full, allow_nan=False)) == full
    assert {k: v["value"] for k, v in full.items()} == point_metrics(
        labels, probs, task=task, classes=classes
    )
    for name, entry in full.items():
        assert set(entry) == {"value", "low", "high", "n", "reason"}
        assert entry["reason"] is None, name
        assert entry["low"] <= entry["value"] <= entry["high"], name


def test_n_is_the_number_of_images_behind_the_number():
    labels, probs = sample("multiclass", n=50, c=3)
    full = evaluate(labels, probs, task="multiclass", classes=names(3), bootstrap=0)
    for k in range(3):
        assert full[f"sensitivity_k{k}"]["n"] == (labels == k).sum()
        assert full[f"specificity_k{k}"]["n"] == (labels != k).sum()
        assert full[f"auc_k{k}"]["n"] == 50
    assert full["accuracy"]["n"] == 50


def test_an_absent_class_gives_null_and_is_named():
    labels, probs = sample("ordinal", c=4)
    keep = labels != 2
    full = evaluate(labels[keep], probs[keep], task="ordinal", classes=names(4), bootstrap=100)
    gone = ["auc_macro", "auc_k2", "sensitivity_k2", "balanced_accuracy", "f1_macro"]
    for name, entry in full.items():
        if name in gone:
            assert entry["value"] is entry["low"] is entry["high"] is None
            assert "no image of class k2" in entry["reason"]
        else:
            assert entry["value"] is not None, name
    assert full["sensitivity_k2"]["n"] == 0


@pytest.mark.parametrize("task", TASKS)
def test_one_class_only(task):
    _, probs = sample(task, c=3)
    labels = np.ones_like(probs, dtype=int) if task == "multilabel" else np.ones(120, dtype=int)
    full = evaluate(labels, probs, task=task, classes=names(probs.shape[1]), bootstrap=100)
    for name in ("auc_macro", "auc_k1", "specificity_k1", "qwk"):
        if name in full:
            assert full[name]["value"] is None, name
            assert "every image is of class k1" in full[name]["reason"]
    assert full["sensitivity_k1"]["value"] is not None
    assert full["accuracy"]["value"] is not None


def test_many_absent_classes_make_a_short_reason():
    probs = np.full((4, 14), 0.2)
    labels = np.zeros((4, 14), dtype=int)
    full = evaluate(labels, probs, task="multilabel", classes=names(14), bootstrap=10)
    assert full["auc_macro"]["reason"].endswith("and 9 more")
    assert full["accuracy"]["value"] == 1.0


def test_multilabel_threshold_is_inclusive_and_brier_ranges_are_as_stated():
    assert decide([[0.5, 0.49]], task="multilabel").tolist() == [[1, 0]]
    worst = point_metrics([0, 1], [[0, 1], [1, 0]], task="binary", classes=names(2))
    assert worst["brier"] == 1.0 and worst["auc_macro"] == 0.0
    worst = point_metrics([0, 1], [[0, 1], [1, 0]], task="multiclass", classes=names(2))
    assert worst["brier"] == 2.0
    worst = point_metrics([[0, 1]], [[1.0, 0.0]], task="multilabel", classes=names(2))
    assert worst["brier"] == 1.0 and worst["accuracy"] == 0.0


def test_binary_aucs_are_one_number_even_where_float32_saturates():
    logits = np.array([[0, 20], [0, 25], [0, 30], [0, 18]], dtype=np.float32)
    probs = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    got = point_metrics([0, 1, 1, 0], probs, task="binary", classes=["a", "b"])
    assert got["auc_a"] == got["auc_b"] == got["auc_macro"]


def test_float_labels_of_a_batch_and_float32_probabilities_are_taken():
    labels, probs = sample("multilabel")
    args = {"task": "multilabel", "classes": names(4)}
    low = point_metrics(labels.astype(np.float32), probs.astype(np.float32), **args)
    assert low["auc_macro"] == pytest.approx(point_metrics(labels, probs, **args)["auc_macro"])


OK = [[0.2, 0.8], [0.6, 0.4]]


@pytest.mark.parametrize(
    ("labels", "probs", "task", "classes", "kind", "words"),
    [
        ([0, 1], [[math.nan, 1], [0.5, 0.5]], "binary", ["a", "b"], "nonfinite", "row 0"),
        ([0, 1], [[0.5, 0.5], [math.inf, 0]], "binary", ["a", "b"], "nonfinite", "row 1"),
        ([0, 1], [[-2.0, 3.0], [0.5, 0.5]], "binary", ["a", "b"], "usage", "softmax"),
        ([0, 1], [[0.9, 0.9], [0.5, 0.5]], "multiclass", ["a", "b"], "usage", "sum to 1"),
        ([0, 2], OK, "binary", ["a", "b"], "data", "0 to 1"),
        ([0, -1], OK, "binary", ["a", "b"], "data", "0 to 1"),
        ([0, 0.5], OK, "binary", ["a", "b"], "data", "whole"),
        (["a", "b"], OK, "binary", ["a", "b"], "usage", "class indices"),
        ([0, 1, 1], OK, "binary", ["a", "b"], "usage", "shape"),
        ([0, 1], OK, "multilabel", ["a", "b"], "usage", "shape"),
        ([0, 1], [0.2, 0.3], "binary", ["a", "b"], "usage", "shape"),
        ([0, 1], OK, "binary", ["a", "b", "c"], "usage", "3 classes"),
        ([0, 1], OK, "multiclass", ["a", "a"], "usage", "unique"),
        ([0, 1], OK, "multiclass", ["a", "macro"], "usage", "macro"),
        ([0, 1], OK, "multi-class", ["a", "b"], "usage", "did you mean 'multiclass'"),
        ([], np.zeros((0, 2)), "binary", ["a", "b"], "data", "no images"),
    ],
)
def test_refusals(labels, probs, task, classes, kind, words):
    with pytest.raises(WaraError, match=words) as caught:
        evaluate(labels, probs, task=task, classes=classes)
    assert caught.value.kind == kind


def test_patients_of_another_length_and_negative_bootstrap_are_refused():
    with pytest.raises(WaraError, match="3 patients for 2 images"):
        evaluate([0, 1], OK, task="binary", classes=["a", "b"], patients=["x", "y", "z"])
    with pytest.raises(WaraError, match="bootstrap"):
        evaluate([0, 1], OK, task="binary", classes=["a", "b"], bootstrap=-1)
