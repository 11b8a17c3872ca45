"""Intervals hold the truth, equal methods are not called different, and known answers come out."""

from __future__ import annotations

import math
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import pytest
from scipy import stats
from test_metrics import names, sample

from wara.compare.scores import score_cells
from wara.compare.spread import Spread, Square, spread
from wara.compare.statistics import Cell, compare, holm, summarise
from wara.errors import WaraError
from wara.evaluation.metrics import TASKS, metric_names, point_metrics

TRUTH = 0.88  # AUROC
SIGNAL = stats.norm.ppf(TRUTH) * math.sqrt(2)


def trained(rng, *, methods="ab", splits=1, seeds=3, n=150, pool=None, seed_sd=0.15, split_sd=0.0,
            own=0.1, seed_noise=0.2, gain=0.0):  # fmt: skip
    """Models on test images of `n` patients; the score of a positive is shifted by the signal.

    The noise of a score is the patient's, in part shared by all methods (1 - own), in part of the
    seed alone (seed_noise). Shifts differ between seeds and splits by the given deviations; 0.15
    moves the AUROC by 0.02. `gain` is added to the shift of method b.
    """
    pool = pool or n
    truth = (rng.random(pool) < 0.4).astype(int)
    common = rng.normal(size=pool)
    tests = [rng.permutation(pool)[:n] for _ in range(splits)]
    cells = []
    for method in methods:
        noise = math.sqrt(1 - own) * common + math.sqrt(own) * rng.normal(size=pool)
        signal = SIGNAL + gain * (method == "b")
        for split, test in enumerate(tests):
            here = signal + split_sd * rng.normal()
            for seed in range(seeds):
                score = (here + seed_sd * rng.normal()) * truth[test]
                score = score + math.sqrt(1 - seed_noise) * noise[test]
                score = score + math.sqrt(seed_noise) * rng.normal(size=n)
                p = 1 / (1 + np.exp(-score))
                patients = [f"p{i}" for i in test]
                cells.append(Cell(method, split, seed, "binary", truth[test],
                                  np.stack([1 - p, p], 1), patients))  # fmt: skip
    return cells


def expected(seed_sd=0.15, split_sd=0.0):
    """The mean AUROC over all seeds and splits: a normal shift in a normal distribution."""
    return stats.norm.cdf(SIGNAL / math.sqrt(2 + seed_sd**2 + split_sd**2))


def coverage(repeats: int, **design: Any) -> tuple[float, float]:
    """Return how often the intervals of a mean, and of a difference of equals, hold the truth."""
    rng = np.random.default_rng(11)
    mean = difference = 0
    for repeat in range(repeats):
        cells = trained(rng, **design)
        options = {"resamples": 200, "seed": repeat}
        one = summarise(cells, **options)["a"]
        spreads = {key: design[key] for key in ("seed_sd", "split_sd") if key in design}
        mean += one.low <= expected(**spreads) <= one.high
        two = compare(cells, "a", **options)["b"]
        difference += two.low <= 0 <= two.high
    return mean / repeats, difference / repeats


def delong(labels, one, two):
    """Standard error of the difference of two AUROCs on independent patients (DeLong 1988)."""
    parts = []
    for score in (one, two):
        positive, negative = score[labels == 1], score[labels == 0]
        wins = (positive[:, None] > negative) + 0.5 * (positive[:, None] == negative)
        parts.append((wins.mean(axis=1), wins.mean(axis=0)))
    variance = sum(
        np.var(first - second, ddof=1) / len(first) for first, second in zip(*parts, strict=True)
    )
    return math.sqrt(variance)


@pytest.mark.parametrize("gain", [0.0, 0.6])
def test_differences_agree_with_delong_on_independent_patients(gain):
    cells = trained(np.random.default_rng(3), seeds=1, n=240, seed_sd=0.0, own=0.3, gain=gain)
    again = [replace(cell, seed=1) for cell in cells]  # seeds that do not differ
    found = compare([*cells, *again], "a", resamples=4000)["b"]
    labels = np.asarray(cells[0].labels)
    scores = [np.asarray(cell.probs)[:, 1] for cell in cells]
    points = [
        point_metrics(labels, cell.probs, task="binary", classes=["0", "1"])["auc_macro"]
        for cell in cells
    ]
    error = delong(labels, *scores)
    assert found.value == pytest.approx(points[1] - points[0], abs=1e-12)
    assert found.error == pytest.approx(error, rel=0.05)
    assert found.p == pytest.approx(2 * stats.norm.sf(abs(found.value) / error), abs=0.03)
    assert (found.p < 0.05) == (gain > 0)
    assert found.low == pytest.approx(found.value - 1.96 * error, abs=0.1 * error)


@pytest.mark.parametrize("task", TASKS)
def test_scores_are_those_of_the_metrics(task):
    labels, probs = sample(task, n=80, seed=3, ties=True)
    cell = Cell("a", 0, 0, task, labels, probs, classes=names(probs.shape[1]))
    want = point_metrics(labels, probs, task=task, classes=cell.classes)
    assert set(want) == set(metric_names(task, cell.classes))
    for metric, value in want.items():
        scores = score_cells([cell], metric, resamples=100, seed=0)
        assert scores.values["a"][0][0] == pytest.approx(value, abs=1e-10), metric
        assert scores.draws["a"][0].std() > 0


def test_a_patient_is_drawn_alike_in_all_splits_and_methods():
    base = trained(np.random.default_rng(0), methods="a", seeds=2, n=60)
    order = np.random.default_rng(1).permutation(60)

    def moved(cell, method, split):
        labels, probs = np.asarray(cell.labels)[order], np.asarray(cell.probs)[order]
        people = [cell.patients[i] for i in order]
        cell = replace(cell, labels=labels, probs=probs, patients=people)
        return replace(cell, method=method, split=split)

    cells = [*base, *(moved(cell, "a", 1) for cell in base)]
    scores = score_cells(cells, "accuracy", resamples=100, seed=0)
    assert scores.patients == 60
    assert np.allclose(scores.draws["a"][0], scores.draws["a"][1])
    assert scores.draws["a"][0].std(axis=1).min() > 0.01
    alone = score_cells(base, "accuracy", resamples=100, seed=0)
    assert np.array_equal(alone.draws["a"][0], scores.draws["a"][0])
    strangers = [replace(cell, patients=None) for cell in cells]
    assert score_cells(strangers, "accuracy", resamples=100, seed=0).patients == 120
    files = [replace(c, patients=None, files=c.patients) for c in cells]
    assert score_cells(files, "accuracy", resamples=100, seed=0).patients == 60


def test_the_order_of_cells_does_not_matter():
    cells = trained(np.random.default_rng(0), methods="abc", splits=2, pool=200)
    shuffled = [cells[i] for i in np.random.default_rng(1).permutation(len(cells))]
    assert summarise(cells) == summarise(shuffled)
    assert compare(cells, "b") == compare(shuffled, "b")


def test_equal_seeds_are_pairs_and_others_are_not():
    rng = np.random.default_rng(5)
    shifts = rng.normal(size=5) * 0.5
    base = trained(rng, methods="a", seeds=1, n=300, seed_sd=0.0)[0]
    logit = np.log(np.asarray(base.probs)[:, 1] / np.asarray(base.probs)[:, 0])

    def cell(method, seed, shift):
        p = 1 / (1 + np.exp(-(logit + shift * np.asarray(base.labels))))
        return replace(base, method=method, seed=seed, probs=np.stack([1 - p, p], 1))

    both = [cell(m, s, shifts[s] + 0.05 * (m == "b")) for m in "ab" for s in range(5)]
    paired = compare(both, "a")["b"]
    other = [replace(one, seed=one.seed + 10) if one.method == "b" else one for one in both]
    independent = compare(other, "a")["b"]
    assert paired.value == independent.value > 0
    assert paired.error < independent.error / 3


def test_one_difference_in_numbers():
    cells = trained(np.random.default_rng(2), seeds=4, seed_sd=0.4, gain=2.0)
    found = compare(cells, "a", rope=0.01)["b"]
    scores = score_cells(cells, "auc_macro", resamples=1000, seed=0)
    gaps = scores.values["b"][0] - scores.values["a"][0]
    draws = scores.draws["b"][0] - scores.draws["a"][0]
    cov = np.cov(draws)
    shared = (cov.sum() - np.trace(cov)) / 12
    assert gaps.var(ddof=1) > np.trace(cov) / 4 - shared  # so nothing is cut at 0
    variance = gaps.var(ddof=1) / 4 + shared  # Obuchowski and Rockette
    assert found.error**2 == pytest.approx(variance)
    assert (found.splits, found.seeds, found.patients) == (1, 4, 150)
    assert found.verdict == "better" == found.words
    assert compare(cells, "b")["a"].verdict == "worse"
    assert compare(cells, "b")["a"].low == pytest.approx(-found.high)
    assert compare(cells, "a", rope=0.5)["b"].verdict == "the same"
    assert compare(cells, "b", "brier")["a"].value > 0
    assert compare(cells, "b", "brier", rope=0.0)["a"].verdict == "worse"  # more error


def test_what_an_undecided_comparison_needs():
    cells = trained(np.random.default_rng(2), seed_sd=0.02, gain=0.3)
    found = compare(cells, "a")["b"]
    assert (found.verdict, found.seeds_needed) == ("undecided", None)
    m = found.patients_needed
    assert found.words == f"undecided, would need about {m} patients"
    of = spread(score_cells(cells, "auc_macro", resamples=1000, seed=0), {"b": 1.0, "a": -1.0})

    def decides(then):
        reach = then.reach(0.05) + stats.norm.ppf(0.8)
        return reach * then.error <= abs(abs(of.value) - 0.01)

    assert m > 150
    assert decides(of.with_patients(m)) and not decides(of.with_patients(m - m // 20))

    cells = trained(np.random.default_rng(3), seed_sd=0.3, own=0.01, seed_noise=0.02, gain=0.5)
    found = compare(cells, "a")["b"]
    n = found.seeds_needed
    assert found.words == f"undecided, would need about {n} seeds"  # patients alone would not do
    of = spread(score_cells(cells, "auc_macro", resamples=1000, seed=0), {"b": 1.0, "a": -1.0})
    assert decides(of.with_seeds(n)) and not decides(of.with_seeds(n - 1))
    only = compare(trained(np.random.default_rng(1), seed_sd=0.02, gain=0.3), "a")["b"]
    assert only.words == "undecided, and neither more seeds nor more patients alone would decide it"


def design(splits, seeds, patients):
    """The spread of a design with known parts, no patient in two splits."""
    split, seed, shared, own = (0.02 * (splits > 1)) ** 2, 0.015**2, 0.3**2, 0.2**2
    own_part = own / patients / seeds / splits
    all_patients = shared / patients / splits + own_part
    total = seed / splits / seeds + own_part
    squares = (Square(total, own_part, splits * (seeds - 1)),)
    training = (split + seed / seeds) / splits
    between = Square(training + all_patients, all_patients, splits - 1) if splits > 1 else None
    return Spread(0.1, all_patients, squares, between, (patients, splits, seeds))


@pytest.mark.parametrize("splits", [1, 4])
def test_planned_designs_are_those_designs(splits):
    now = design(splits, 3, 150)
    for planned, then in (
        (now.with_seeds(7), design(splits, 7, 150)),
        (now.with_patients(900), design(splits, 3, 900)),
        (now.with_patients(900).with_seeds(12), design(splits, 12, 900)),
    ):
        assert planned.error == pytest.approx(then.error)
        assert planned.df == pytest.approx(then.df)
        assert planned.design == then.design
        assert then.error < 0.97 * now.error


def test_an_error_has_about_as_many_degrees_of_freedom_as_its_seeds():
    # Resamples move three seeds against each other: the mean moves less than the noise taken off.
    found = Spread(-0.002, 5e-6, (Square(2e-5, 3e-5, 2),), None, (50, 1, 3.0))
    assert found.error == pytest.approx(2e-5**0.5)
    assert found.df == pytest.approx(1 / (1 / 2 + 0.25**2 / 49), rel=1e-3)
    assert found.reach(0.05) < 4.4


def test_with_one_seed_the_splits_say_how_much_training_varies():
    # Also where they differ by less than their patients do: two of them are little to go by.
    found = Spread(0.86, 1e-4, (), Square(2e-5, 3e-5, 1), (156, 2, 1.0))
    assert found.error == pytest.approx(1e-2)
    assert found.df == pytest.approx(1 / (0.2**2 / 1 + 1 / 155))


def test_holm():
    assert holm({"a": 0.01, "b": 0.04, "c": 0.03}) == pytest.approx(
        {"a": 0.03, "c": 0.06, "b": 0.06}
    )
    assert holm({"a": 0.9, "b": 0.8}) == pytest.approx({"a": 1.0, "b": 1.0})


def test_more_methods_need_more_evidence():
    cells = trained(np.random.default_rng(6), methods="abcdefghi", gain=0.45)
    alone = compare([cell for cell in cells if cell.method in "ab"], "a", rope=0.0)["b"]
    many = compare(cells, "a", rope=0.0)["b"]
    assert alone.p == many.p == alone.p_holm < 0.05 < many.p_holm
    assert (alone.verdict, many.verdict) == ("better", "undecided")


# True coverage of 95 % gives a share of 250 repeats outside these limits in 1 of 300 tries.
QUICK = {"repeats": 250, "low": 0.908, "high": 0.985}
THOROUGH = {"repeats": 1000, "low": 0.93, "high": 0.97}


def hold_the_truth(limits, **design):
    found = coverage(limits["repeats"], **design)
    for share in found:
        assert limits["low"] <= share <= limits["high"], found


def test_intervals_hold_the_truth():
    hold_the_truth(QUICK, seeds=3)


@pytest.mark.slow
@pytest.mark.parametrize(("seeds", "seed_sd"), [(3, 0.2), (4, 0.3), (5, 0.1)])
def test_intervals_hold_the_truth_for_few_and_more_seeds(seeds, seed_sd):
    hold_the_truth(THOROUGH, seeds=seeds, seed_sd=seed_sd)


@pytest.mark.slow
@pytest.mark.parametrize("split_sd", [0.1, 0.25])
def test_intervals_hold_the_truth_over_splits_that_share_patients(split_sd):
    # Where splits hardly differ, differences get intervals that are a little long.
    hold_the_truth({**THOROUGH, "high": 0.985}, splits=4, seeds=2, pool=400, split_sd=split_sd)


def test_the_simulation_tells_when_seeds_are_resampled_by_themselves():
    # The interval that is often reported: percentiles over resampled patients and seeds.
    rng = np.random.default_rng(1)
    hits = 0
    for repeat in range(150):
        cells = trained(rng, methods="a", seed_sd=0.6)
        scores = score_cells(cells, "auc_macro", resamples=200, seed=repeat)
        draws, picks = scores.draws["a"][0], rng.integers(3, size=(3, 200))
        low, high = np.percentile(draws[picks, np.arange(200)].mean(axis=0), [2.5, 97.5])
        hits += low <= expected(seed_sd=0.6) <= high
    assert hits / 150 < QUICK["low"]


@pytest.mark.slow
@pytest.mark.parametrize("paired", [False, True])
def test_a_method_is_not_called_different_from_itself(paired):
    rng = np.random.default_rng(8)
    different = significant = 0
    for repeat in range(400):
        cells = trained(rng, own=0.0)
        if not paired:
            cells = [replace(c, seed=c.seed + 3) if c.method == "b" else c for c in cells]
        found = compare(cells, "a", resamples=100, seed=repeat, rope=0.0)["b"]
        significant += found.verdict in ("better", "worse")
        different += min(found.high, -found.low) < -0.01  # the verdict with the usual rope
        assert (found.verdict in ("better", "worse")) == (found.p < 0.05)
    assert different <= significant <= 0.05 * 400
    assert significant > 0  # it can happen, and the test would see it


@pytest.fixture
def cells():
    return trained(np.random.default_rng(0), seeds=2, n=40)


def refused(kind, words, call, *arguments, **options):
    with pytest.raises(WaraError) as caught:
        call(*arguments, **options)
    assert (caught.value.kind, caught.value.exit_code) == (kind, 3 if kind == "data" else 2)
    for word in words:
        assert word in str(caught.value)


def test_one_seed_is_no_test(cells):
    alone = [c for c in cells if c.method == "a" or c.seed == 0]
    refused("usage", ["at least two seeds", "method b"], compare, alone, "a")
    refused("usage", ["at least two seeds", "method b"], compare, alone, "b")
    found = summarise(alone)
    assert found["a"].low < found["a"].value < found["a"].high
    assert found["b"].value > 0.5
    assert (found["b"].low, found["b"].high) == (None, None)
    assert "one seed" in found["b"].reason


@pytest.mark.parametrize("change, word", [
    ({"labels": 1}, "other labels"), ({"patients": 1}, "other patients"), ({"n": 39}, "39 test"),
    ({"files": ["x"] * 40}, "other files"), ({"classes": ["x", "y"]}, "other classes"),
    ({"task": "multiclass"}, "task multiclass"),
])  # fmt: skip
def test_other_images_are_refused_by_name(cells, change, word):
    last = cells[-1]
    if "n" in change:
        fields = {"labels": last.labels[:39], "probs": last.probs[:39],
                  "patients": last.patients[:39]}  # fmt: skip
    elif change.get("labels"):
        fields = {"labels": 1 - last.labels}
    elif change.get("patients"):
        fields = {"patients": last.patients[::-1]}
    else:
        fields = change
    other = [*cells[:-1], replace(last, **fields)]
    words = [word, "method b, split 0, seed 1", "method a, split 0, seed 0"]
    refused("data", words, compare, other, "a")
    refused("data", words, summarise, other)


def test_what_cannot_be_compared_is_refused(cells):
    refused("usage", ["reference 'lora'"], compare, cells, "lora")
    refused("usage", ["reference 'lora'"], compare, [], "lora")
    refused("usage", ["nothing to compare"], compare, cells[:2], "a")
    refused("usage", ["no cells"], summarise, [])
    refused("usage", ["given twice", "method b, split 0, seed 1"], summarise, [*cells, cells[-1]])
    refused("usage", ["unknown metric 'auc_makro'", "auc_macro"], summarise, cells, "auc_makro")
    refused("usage", ["rope is -1"], compare, cells, "a", rope=-1)
    refused("usage", ["rope is nan"], compare, cells, "a", rope=math.nan)
    refused("usage", ["resamples is 10"], summarise, cells, resamples=10)
    moved = [replace(c, split=int(c.method == "b")) for c in cells]
    refused("usage", ["no split in common", "methods b and a"], compare, moved, "a")
    short = [*cells[:-1], replace(cells[-1], patients=["p"])]
    refused("usage", ["1 patients for 40 images", "method b"], summarise, short)


def test_numbers_that_mean_nothing_are_null_with_a_reason(cells):
    def with_labels(labels):
        return [replace(cell, labels=labels) for cell in cells]

    found = compare(with_labels(np.zeros(40, int)), "a")["b"]
    assert (found.value, found.p, found.verdict) == (None, None, None)
    assert "no image of class 1" in found.reason and found.words.startswith("no verdict: ")
    lonely = np.eye(40, dtype=int)[3]
    found = compare(with_labels(lonely), "a")["b"]
    assert found.value is not None and found.p is None
    assert found.reason == "split 0: no interval: only one patient without class 0"
    same = [replace(c, probs=cells[0].probs) for c in cells]
    found = compare(same, "a")["b"]
    assert (found.value, found.low, found.verdict) == (0.0, None, None)
    assert "same value" in found.reason
    perfect = [replace(c, probs=np.eye(2)[np.asarray(c.labels)]) for c in cells]
    found = summarise(perfect)["a"]
    assert (found.value, found.high) == (1.0, None) and found.reason.startswith("no interval")


def test_intervals_stay_in_the_range_of_their_metric():
    cells = trained(np.random.default_rng(0), n=30, seed_sd=0.5, gain=0.5)
    for metric in ("auc_macro", "accuracy", "brier", "ece"):
        for of in summarise(cells, metric).values():
            assert 0 <= of.low < of.value < of.high <= 1, metric
    assert set(asdict(summarise(cells)["a"])) >= {"value", "low", "high", "reason"}
