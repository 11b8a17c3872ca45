"""Ranks and mean differences over data sets give the numbers of the literature."""

from __future__ import annotations

import csv
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure
from scipy import stats
from training_helpers import tiny_config

from wara.compare import figures, report
from wara.compare.across import (
    Ranking,
    critical_difference,
    paule_mandel,
    pool_differences,
    rank_methods,
)
from wara.compare.checks import Sized
from wara.compare.grid import MAJORITY, Request, Row
from wara.compare.results import Line, Results
from wara.compare.statistics import Difference, Summary
from wara.errors import WaraError

# Demšar (2006), table 6: AUROC of C4.5 with and without tuning on 14 data sets.
# The fourth digit of `voting` is not printed there, but its rank is.
DEMSAR = {
    "adult": (0.763, 0.768, 0.771, 0.798), "breast": (0.599, 0.591, 0.590, 0.569),
    "wisconsin": (0.954, 0.971, 0.968, 0.967), "cmc": (0.628, 0.661, 0.654, 0.657),
    "ionosphere": (0.882, 0.888, 0.886, 0.898), "iris": (0.936, 0.931, 0.916, 0.931),
    "liver": (0.661, 0.668, 0.609, 0.685), "lung": (0.583, 0.583, 0.563, 0.625),
    "lymph": (0.775, 0.838, 0.866, 0.875), "mushroom": (1.000, 1.000, 1.000, 1.000),
    "tumor": (0.940, 0.962, 0.965, 0.962), "rheum": (0.619, 0.666, 0.614, 0.669),
    "voting": (0.972, 0.981, 0.9751, 0.975), "wine": (0.957, 0.978, 0.946, 0.970),
}  # fmt: skip
# Thirteen trials of the BCG vaccine (Colditz 1994): log risk ratios and their variances.
BCG = np.array([-0.8893, -1.5854, -1.3481, -1.4416, -0.2175, -0.7861, -1.6209, 0.0120, -0.4694,
                -1.3713, -0.3394, 0.4459, -0.0173])  # fmt: skip
BCG_VARIANCE = np.array([0.3256, 0.1946, 0.4154, 0.0200, 0.0512, 0.0069, 0.2230, 0.0040, 0.0564,
                         0.0730, 0.0124, 0.5325, 0.0714])  # fmt: skip


def demsar():
    names = ("C4.5", "C4.5+m", "C4.5+cf", "C4.5+m+cf")
    return {at: dict(zip(names, row, strict=True)) for at, row in DEMSAR.items()}


def test_ranks_are_those_of_demsar():
    found = rank_methods(demsar())
    want = {"C4.5": 3.143, "C4.5+m": 2.000, "C4.5+cf": 2.893, "C4.5+m+cf": 1.964}
    assert found.ranks == pytest.approx(want, abs=5e-4)
    assert list(found.ranks)[0] == "C4.5+m+cf"
    assert found.friedman == pytest.approx(9.28 / (1 - 78 / 840), abs=0.02)  # corrected for ties
    assert found.critical == pytest.approx(1.25, abs=0.01)
    assert found.alike == (("C4.5+m+cf", "C4.5+m", "C4.5+cf", "C4.5"),)
    assert found.p < 0.05


@pytest.mark.parametrize("methods, q", [(2, 1.960), (3, 2.343), (4, 2.569), (10, 3.164)])
def test_critical_differences_are_those_of_the_table(methods, q):
    want = q * math.sqrt(methods * (methods + 1) / 60)
    assert critical_difference(10, methods) == pytest.approx(want, rel=5e-4)


def test_low_is_best_for_errors_and_ties_share_a_rank():
    scores = {"x": {"a": 0.1, "b": 0.1, "c": 0.3}, "y": {"a": 0.1, "b": 0.2, "c": 0.3}}
    assert rank_methods(scores, "brier").ranks == {"a": 1.25, "b": 1.75, "c": 3.0}
    assert rank_methods(scores).ranks == {"c": 1.0, "b": 2.25, "a": 2.75}


def test_sets_of_methods_that_are_not_told_apart():
    scores = {f"d{i}": {m: -place for place, m in enumerate("abcdef")} for i in range(20)}
    found = rank_methods(scores)
    assert found.critical == pytest.approx(1.686, abs=1e-3)
    assert found.alike == (("a", "b"), ("b", "c"), ("c", "d"), ("d", "e"), ("e", "f"))
    assert found.friedman == pytest.approx(100.0)


@pytest.mark.parametrize("scores, words", [
    ({"x": {"a": 1.0, "b": 2.0}, "y": {"a": 1.0, "b": 2.0}}, "2 methods"),
    ({"x": {"a": 1.0, "b": 2.0, "c": 3.0}}, "1 data sets"),
    ({at: dict.fromkeys("abc", 0.5) for at in "xyz"}, "equal everywhere"),
])  # fmt: skip
def test_no_test_of_ranks_has_a_reason(scores, words):
    found = rank_methods(scores)
    assert len(found.ranks) >= 2
    assert (found.p, found.critical, found.alike) == (None, None, ())
    assert words in found.reason


@pytest.mark.parametrize("scores, words", [
    ({"x": {"a": 1.0, "b": 2.0}, "y": {"a": 1.0}}, ["method b has no score", "data set y"]),
    ({"x": {"a": math.nan}}, ["method a has no score", "data set x"]),
    ({}, ["nothing to rank"]),
])  # fmt: skip
def test_holes_are_refused_by_name(scores, words):
    with pytest.raises(WaraError) as caught:
        rank_methods(scores)
    assert caught.value.exit_code == 2
    assert all(word in str(caught.value) for word in words)


def difference(value=None, error=None):
    return Difference(splits=1, seeds=3, patients=100, value=value, error=error)


def pooled(values, variances):
    pairs = zip(values, np.sqrt(variances), strict=True)
    return pool_differences({str(i): difference(*pair) for i, pair in enumerate(pairs)})


def test_the_mean_of_the_bcg_trials():
    assert paule_mandel(BCG, BCG_VARIANCE) == pytest.approx(0.318, abs=1e-3)  # metafor
    found = pooled(BCG, BCG_VARIANCE)
    assert found.value == pytest.approx(-0.715, abs=1e-3)
    assert found.between == pytest.approx(math.sqrt(0.318), abs=1e-3)
    weight = 1 / (BCG_VARIANCE + found.between**2)
    half = stats.t.ppf(0.975, 12) / math.sqrt(weight.sum())  # Paule-Mandel makes the factor 1
    assert (found.low, found.high) == pytest.approx((found.value - half, found.value + half))
    assert found.p < 0.01


def test_equal_data_sets_have_the_mean_of_fixed_effects():
    found = pooled([0.010, 0.011, 0.012], [1e-4, 1e-4, 1e-4])
    assert (found.value, found.between) == (pytest.approx(0.011), 0.0)
    half = stats.t.ppf(0.975, 2) * 0.01 / math.sqrt(3)  # not shorter because they agree so well
    assert found.high - found.value == pytest.approx(half)


def test_mean_differences_hold_the_truth():
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(600):
        variance = rng.uniform(0.5, 2, size=4) * 1e-4
        values = 0.01 + rng.normal(size=4) * np.sqrt(variance + 2e-4)
        found = pooled(values, variance)
        hits += found.low <= 0.01 <= found.high
    assert 0.93 <= hits / 600 <= 0.99


def test_one_data_set_has_no_mean():
    found = pool_differences({"x": difference(0.1, 0.01), "y": difference()})
    assert (found.datasets, found.value, found.p) == (1, None, None)
    assert "two data sets" in found.reason


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    kept: list[Figure] = []
    save = figures.save
    monkeypatch.setattr(figures, "save", lambda fig, *rest: (kept.append(fig), save(fig, *rest))[1])
    return kept


def test_the_figure_shows_ranks_bars_and_the_critical_difference(drawn, tmp_path):
    ranking = rank_methods(demsar())
    path = figures.critical_difference(ranking, tmp_path / "cd.png", title="$AUROC$")
    assert path.read_bytes()[:4] == b"\x89PNG"
    texts = [text.get_text().strip() for text in drawn[0].axes[0].texts]
    for name, rank in ranking.ranks.items():
        assert f"{name}  {rank:.2f}" in texts
    assert any("critical difference 1.25" in text for text in texts)
    bars = [line.get_xdata() for line in drawn[0].axes[0].lines if line.get_linewidth() == 4]
    ends = (min(ranking.ranks.values()), max(ranking.ranks.values()))
    assert len(bars) == 1 and list(bars[0]) == pytest.approx(ends, abs=0.1)
    again = figures.critical_difference(ranking, tmp_path / "again.png", title="$AUROC$")
    assert path.read_bytes() == again.read_bytes()


def test_a_figure_without_test_says_why(drawn, tmp_path):
    ranking = Ranking({"a": 1.0, "b": 2.0}, 1, reason="no test of ranks: one data set")
    figures.critical_difference(ranking, tmp_path / "cd.png", synthetic=True)
    assert any(text.get_text() == ranking.reason for text in drawn[0].axes[0].texts)
    assert not [line for line in drawn[0].axes[0].lines if line.get_linewidth() == 4]
    assert any("synthetic" in text.get_text() for text in drawn[0].texts)


def test_the_report_over_data_sets(tmp_path: Path) -> None:
    """Ranks of methods alone, how many sets a mean is of, no p of 0, and reasons in the table."""
    config, facts = tiny_config(tmp_path), Any
    lines = []
    for name in ("one", "two"):
        for place, method in enumerate([MAJORITY, "lora", "wara", "waveft"]):
            sized = Sized(Row(config, method), facts, 10, 5)  # type: ignore[arg-type]
            told = dict(value=0.5 + 0.1 * place, splits=1, seeds=2, patients=9)
            summary = Summary(**told, reason="no interval: of two resamples")
            difference = None
            if method == "wara" or (method == "waveft" and name == "one"):
                gap = dict(value=0.1, low=0.05, high=0.15, error=0.02, df=8.0)
                difference = Difference(1, 2, 9, **gap, p=1e-9, p_holm=1e-9, verdict="better")
            elif method == "waveft":
                difference = Difference(1, 2, 9, value=0.2, reason="no interval: all the same")
            lines.append(Line(name, sized, 2, [], summary, difference))
    ground = dict(title="", banners=[], synthetic=False)
    grounds = {name: SimpleNamespace(name=name, **ground) for name in ("one", "two")}
    request = Request((config,), ("lora", "wara", "waveft"), (0, 1), 1, tmp_path, rope=0.01)
    report.write(request, SimpleNamespace(grounds=grounds), Results(lines, [], []))  # type: ignore[arg-type]
    text = (tmp_path / "report.md").read_text()
    ranks = text.split("Over all data sets")[1].split("How it was made")[0]
    assert "majority" not in ranks and "| lora | 3.00 | reference |" in ranks
    assert "| wara | 2.00 | +0.100" in ranks and "needs at least two data sets" in ranks
    p = stats.friedmanchisquare([3, 3], [2, 2], [1, 1]).pvalue
    assert f"p {p:.3f}; mean ranks" in ranks
    assert "better, interval beyond 0.01 (p of no difference < 0.001, Holm)." in text
    assert "0.700 (no interval: of two resamples); minus lora" in text
    with (tmp_path / "table.csv").open() as stream:
        table = {(r["dataset"], r["row"]): r for r in csv.DictReader(stream)}
    assert table["one", "wara"]["p_holm"] == "1e-09"
    told = {place: row["reason"] for place, row in table.items()}
    assert told["two", "lora"] == "no interval: of two resamples"
    assert told["two", "waveft"] == "no interval: of two resamples; no interval: all the same"
