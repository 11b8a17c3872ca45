"""Methods over several data sets: mean ranks, and the mean difference to a reference.

Ranks ask for no common scale, and say nothing of how far methods lie apart (Demšar 2006). The mean
difference takes data sets as a sample of such data sets (random effects).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import optimize, stats

from wara.compare.scores import LOWER_IS_BETTER
from wara.compare.statistics import ALPHA, Difference
from wara.errors import WaraError

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Ranking:
    """Mean ranks of methods over data sets.

    Args:
        ranks: method -> mean rank, 1 is best; best first.
        datasets: number of data sets.
        friedman: Friedman's chi-square, corrected for ties; None with a reason.
        p: its p-value, that all methods are alike. The chi-square distribution is a rough one
            below ten data sets, and errs towards "alike".
        critical: Nemenyi's critical difference at 0.05: methods whose mean ranks lie closer are
            not told apart. None with a reason.
        alike: largest sets of neighbouring methods that are not told apart, two or more each.
        reason: why there is no test, or None.
    """

    ranks: dict[str, float]
    datasets: int
    friedman: float | None = None
    p: float | None = None
    critical: float | None = None
    alike: tuple[tuple[str, ...], ...] = ()
    reason: str | None = None


@dataclass(frozen=True)
class Pooled:
    """Mean difference of a method to the reference over data sets.

    Args:
        datasets: number of data sets it is computed from.
        value: mean difference, weighted by precision; None with a reason.
        low: lower end of the 95 % interval of the mean over such data sets.
        high: upper end.
        p: two-sided p-value of no mean difference.
        between: standard deviation of the true differences between data sets.
        reason: why numbers are missing, or None.
    """

    datasets: int
    value: float | None = None
    low: float | None = None
    high: float | None = None
    p: float | None = None
    between: float | None = None
    reason: str | None = None


def rank_methods(
    scores: Mapping[str, Mapping[str, float]], metric: str = "auc_macro"
) -> Ranking:
    """Return mean ranks over data sets, Friedman's test and Nemenyi's critical difference.

    Args:
        scores: data set -> method -> mean of the metric, the same methods everywhere.
        metric: decides whether high or low is best.

    Raises:
        WaraError: `usage` for no data set or no method, for a method without score on some data
            set, or a score that is not finite, by name.
    """
    methods = sorted({method for of in scores.values() for method in of})
    if not methods:
        raise WaraError("usage", "nothing to rank", remedy="give each data set its methods' scores")
    for dataset, of in scores.items():
        for method in methods:
            if not math.isfinite(of.get(method, math.nan)):
                what = f"method {method} has no score"
                remedy = "rank only methods that have one on every data set"
                raise WaraError("usage", what, f"data set {dataset}", remedy)
    table = np.array([[of[method] for method in methods] for of in scores.values()])
    each = stats.rankdata(table if metric in LOWER_IS_BETTER else -table, axis=1)
    mean = each.mean(axis=0)
    ranks = {methods[i]: float(mean[i]) for i in np.argsort(mean, kind="stable")}
    n, k = table.shape
    if n < 2 or k < 3:
        reason = f"no test of ranks: {n} data sets and {k} methods, needs at least 2 and 3"
        return Ranking(ranks, n, reason=reason)
    if np.ptp(each, axis=1).max() == 0:
        return Ranking(ranks, n, reason="no test of ranks: all methods are equal everywhere")
    friedman, p = stats.friedmanchisquare(*each.T)
    critical = critical_difference(n, k)
    return Ranking(ranks, n, float(friedman), float(p), critical, _alike(ranks, critical))


def critical_difference(datasets: int, methods: int) -> float:
    """Return Nemenyi's difference of mean ranks that two of `methods` must exceed at 0.05."""
    quantile = stats.studentized_range.ppf(1 - ALPHA, methods, np.inf) / math.sqrt(2)
    return float(quantile * math.sqrt(methods * (methods + 1) / (6 * datasets)))


def _alike(ranks: Mapping[str, float], critical: float) -> tuple[tuple[str, ...], ...]:
    names, found, reached = list(ranks), [], 0
    for start, name in enumerate(names):
        near = [other for other in names[start:] if ranks[other] - ranks[name] < critical]
        if len(near) > 1 and start + len(near) > reached:
            found.append(tuple(near))
            reached = start + len(near)
    return tuple(found)


def pool_differences(differences: Mapping[str, Difference]) -> Pooled:
    """Return the mean over data sets of a method's differences to one reference.

    Random effects: each true difference is drawn around the mean with a variance that is estimated
    by Paule and Mandel (1982), beside the error of its own estimate. The interval is that of
    Hartung and Knapp with t on k - 1 degrees of freedom, which holds for few data sets, and is
    never shorter than the one without their factor.

    Args:
        differences: data set -> the difference of the same method to the same reference, from
            `compare`; those without numbers are left out.
    """
    known = [one for one in differences.values() if one.error is not None]
    if len(known) < 2:
        return Pooled(len(known), reason="no mean difference: needs at least two data sets")
    value = np.array([one.value for one in known], dtype=np.float64)
    variance = np.array([one.error for one in known], dtype=np.float64) ** 2
    between = paule_mandel(value, variance)
    weight = 1 / (variance + between)
    mean = float(weight @ value / weight.sum())
    factor = max(1.0, _misfit(value, variance, between) / (len(value) - 1))
    error = math.sqrt(factor / weight.sum())
    half = float(stats.t.ppf(1 - ALPHA / 2, len(value) - 1)) * error
    p = float(2 * stats.t.sf(abs(mean) / error, len(value) - 1))
    return Pooled(len(value), mean, mean - half, mean + half, p, math.sqrt(between))


def paule_mandel(value: Floats, variance: Floats) -> float:
    """Return the variance between studies, 0 or more, of estimates [k] with known variances [k]."""
    k = len(value)
    if _misfit(value, variance, 0.0) <= k - 1:
        return 0.0
    # With variances that large, the misfit is below k - 1.
    most = float(((value - value.mean()) ** 2).sum())
    return float(optimize.brentq(lambda at: _misfit(value, variance, at) - (k - 1), 0.0, most))


def _misfit(value: Floats, variance: Floats, between: float) -> float:
    """Return the weighted sum of squares around the weighted mean; k - 1 is expected."""
    weight = 1 / (variance + between)
    return float(weight @ (value - weight @ value / weight.sum()) ** 2)
