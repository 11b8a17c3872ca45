"""Means and paired differences of methods on one data set: intervals, tests, verdicts.

`summarise` gives every method's mean with its 95 % interval, `compare` the difference of every
method to a reference. Both hold for other patients, other seeds and other splits than those that
were seen; `wara.compare.spread` says how.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from scipy import stats

from wara.compare.scores import LOWER_IS_BETTER, Cell, Scores, score_cells
from wara.compare.spread import Spread, mean_of, shared_splits, spread
from wara.errors import WaraError, suggest

RESAMPLES = 1000
ROPE = 0.01
ALPHA = 0.05
POWER = 0.8
MOST_SEEDS, MOST_PATIENTS = 1000, 100_000  # nobody plans beyond them

__all__ = ["Cell", "Difference", "Summary", "compare", "summarise"]


@dataclass(frozen=True)
class Summary:
    """The mean of one method over splits and seeds.

    Args:
        value: mean over splits of the mean over seeds; None where undefined.
        low: lower end of the 95 % interval over patients, seeds and splits.
        high: upper end.
        splits: number of splits.
        seeds: fewest seeds of a split.
        patients: different patients in the test images of all splits.
        reason: why `value`, or only the interval, is missing; None when all three are there.
    """

    splits: int
    seeds: int
    patients: int
    value: float | None = None
    low: float | None = None
    high: float | None = None
    reason: str | None = None


@dataclass(frozen=True)
class Difference:
    """A method minus the reference, on the same splits and patients.

    Args:
        value: mean difference, in units of the metric; None where undefined.
        low: lower end of its 95 % interval over patients, seeds and splits.
        high: upper end.
        error: standard error of `value`.
        df: degrees of freedom of `error`.
        p: two-sided p-value of no difference at all.
        p_holm: the same, corrected for the number of methods (Holm).
        verdict: "the same" (interval inside the smallest meaningful difference), "better" or
            "worse" (interval beyond it and `p_holm` below 0.05), "undecided", or None.
        seeds_needed: seeds per split with which the verdict would be reached in 4 of 5 tries if
            the true difference is the one seen; None when decided or when no number would do.
        patients_needed: the same for patients.
        splits: number of splits that both methods have.
        seeds: fewest seeds of a split of either method.
        patients: different patients in all splits.
        reason: why numbers are missing, or None.
    """

    splits: int
    seeds: int
    patients: int
    value: float | None = None
    low: float | None = None
    high: float | None = None
    error: float | None = None
    df: float | None = None
    p: float | None = None
    p_holm: float | None = None
    verdict: str | None = None
    seeds_needed: int | None = None
    patients_needed: int | None = None
    reason: str | None = None

    @property
    def words(self) -> str:
        """The verdict in words, with what would decide an undecided one."""
        if self.verdict != "undecided":
            return self.verdict or f"no verdict: {self.reason}"
        needs = {"seeds": self.seeds_needed, "patients": self.patients_needed}
        known = [f"{number} {what}" for what, number in needs.items() if number is not None]
        if known:
            return f"undecided, would need about {' or '.join(known)}"
        return "undecided, and neither more seeds nor more patients alone would decide it"


def summarise(
    cells: Iterable[Cell], metric: str = "auc_macro", *, resamples: int = RESAMPLES, seed: int = 0
) -> dict[str, Summary]:
    """Return method -> its mean over splits and seeds, with a 95 % interval.

    The interval holds for other patients, seeds and splits. It is symmetric on the logit scale of
    the metric's range, so it stays inside the range.

    Args:
        cells: of one data set, all methods; see `Cell`.
        metric: a name of `wara.evaluation.metrics.metric_names`.
        resamples: of the patients.
        seed: of the resampling.

    Raises:
        WaraError: see `wara.compare.scores.score_cells`.
    """
    cells = list(cells)
    scores = score_cells(cells, metric, resamples=resamples, seed=seed)
    limits = _limits(metric, cells[0])
    found = {}
    for method in scores.seeds:
        signs = {method: 1.0}
        found[method] = Summary(**_design(scores, signs))
        if scores.draws is not None:
            low, high, reason = _inside(spread(scores, signs), *limits)
            found[method] = replace(found[method], low=low, high=high, reason=reason)
    return found


def compare(
    cells: Iterable[Cell],
    reference: str,
    metric: str = "auc_macro",
    *,
    rope: float = ROPE,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> dict[str, Difference]:
    """Return method -> its difference to the reference, for every method but the reference.

    Args:
        cells: of one data set, all methods; see `Cell`.
        reference: the method the others are compared with.
        metric: a name of `wara.evaluation.metrics.metric_names`.
        rope: smallest difference that matters, in units of the metric.
        resamples: of the patients.
        seed: of the resampling.

    Raises:
        WaraError: `usage` for an unknown reference, no other method, a negative `rope`, a method
            with one seed, or one that shares no split with the reference; see also
            `wara.compare.scores.score_cells`.
    """
    cells = list(cells)
    others = _others(cells, reference)
    if rope < 0 or not math.isfinite(rope):
        raise WaraError("usage", f"rope is {rope}", remedy="use 0 or more, in units of the metric")
    scores = score_cells(cells, metric, resamples=resamples, seed=seed)
    signs = {method: {method: 1.0, reference: -1.0} for method in others}
    bare = {method: Difference(**_design(scores, signs[method])) for method in others}
    if scores.draws is None:
        return bare
    spreads = {method: spread(scores, signs[method]) for method in others}
    p = {method: _p_value(of) for method, of in spreads.items() if _no_interval(of) is None}
    corrected = holm(p)
    found = {}
    for method, of in spreads.items():
        if method not in p:
            found[method] = replace(bare[method], reason=_no_interval(of))
            continue
        half = of.reach(ALPHA) * of.error
        ends = (of.value - half, of.value + half)
        verdict = _verdict(ends, corrected[method], rope, metric in LOWER_IS_BETTER)
        needs = _needs(of, rope, len(others)) if verdict == "undecided" else {}
        found[method] = replace(bare[method], low=ends[0], high=ends[1], error=of.error, df=of.df,
                                p=p[method], p_holm=corrected[method], verdict=verdict,
                                **needs)  # fmt: skip
    return found


def holm(p: Mapping[str, float]) -> dict[str, float]:
    """Return p-values corrected for their number by Holm's step-down procedure."""
    found: dict[str, float] = {}
    least = 0.0
    for rank, name in enumerate(sorted(p, key=lambda name: p[name])):
        least = max(least, min(1.0, p[name] * (len(p) - rank)))
        found[name] = least
    return found


def _others(cells: Sequence[Cell], reference: str) -> list[str]:
    """Return the methods to compare with the reference, all of which can be tested."""
    methods = sorted({cell.method for cell in cells})
    if reference not in methods:
        remedy = suggest(reference, methods) if methods else "finish at least one run"
        raise WaraError("usage", f"no cells of the reference {reference!r}", remedy=remedy)
    if len(methods) == 1:
        raise WaraError("usage", f"nothing to compare {reference!r} with", remedy="add a method")
    others = [method for method in methods if method != reference]
    seeds = Counter((cell.method, cell.split) for cell in cells)
    for method in others:
        shared = [split for one, split in seeds if one == method and seeds[reference, split]]
        if not shared:
            remedy = "test both methods on the same splits"
            where = f"methods {method} and {reference}"
            raise WaraError("usage", "no split in common", where, remedy)
        for one in (method, reference):
            if max(seeds[one, split] for split in shared) < 2:
                what = "a test needs at least two seeds"
                raise WaraError("usage", what, f"method {one}", "run it with two seeds or more")
    return others


def _design(scores: Scores, signs: Mapping[str, float]) -> dict[str, Any]:
    """Return what a result says of its value and of the cells behind it."""
    splits = shared_splits(scores, signs)
    seeds = min(len(scores.seeds[method][split]) for method in signs for split in splits)
    return {"value": mean_of(scores, signs), "splits": len(splits), "seeds": seeds,
            "patients": scores.patients, "reason": scores.reason}  # fmt: skip


def _limits(metric: str, cell: Cell) -> tuple[float, float]:
    """Return the range of a metric."""
    if metric == "qwk":
        return -1.0, 1.0
    # Summed over classes, see `wara.evaluation.metrics`.
    return 0.0, 2.0 if metric == "brier" and cell.task in ("multiclass", "ordinal") else 1.0


def _no_interval(of: Spread) -> str | None:
    """Return why a mean has no interval, or None."""
    if not of.seeds and of.splits is None:
        return "no interval: one seed does not show how much seeds differ"
    # 5 of 5 right is no proof of [1, 1]: resampling cannot show an error it never saw.
    return "no interval: seeds and resamples all give the same value" if of.error < 1e-12 else None


def _inside(of: Spread, floor: float, ceiling: float) -> tuple[Any, Any, str | None]:
    """Return `(low, high, None)` inside the range of the metric, or `(None, None, reason)`."""
    reason = _no_interval(of)
    below, above = of.value - floor, ceiling - of.value
    if reason is None and min(below, above) <= 0:
        reason = "no interval: the mean is at the end of the metric's range"
    if reason:
        return None, None, reason
    width = ceiling - floor
    half = of.reach(ALPHA) * of.error * width / (below * above)
    centre = math.log(below / above)
    low, high = (floor + width / (1 + math.exp(-(centre + z))) for z in (-half, half))
    return low, high, None


def _p_value(of: Spread) -> float:
    return float(2 * stats.t.sf(abs(of.value) / of.error, of.df))


def _verdict(ends: tuple[float, float], p: float, rope: float, lower_is_better: bool) -> str:
    low, high = ends
    if -rope <= low and high <= rope:
        return "the same"
    if p >= ALPHA or (low <= rope and high >= -rope):
        return "undecided"
    return "better" if (low > 0) != lower_is_better else "worse"


def _needs(of: Spread, rope: float, methods: int) -> dict[str, Any]:
    """Return how many seeds or patients would decide, if the true difference is the one seen."""
    patients, _, seeds = of.design
    wanted = abs(abs(of.value) - rope)
    # "The same" is not corrected for the number of methods; for a difference Holm's first step is.
    alpha = ALPHA / methods if abs(of.value) > rope else ALPHA
    power = stats.norm.ppf(POWER)

    def first(numbers: Iterable[int], then: Callable[[int], Spread]) -> int | None:
        for number in numbers:
            of = then(number)
            if (of.reach(alpha) + power) * of.error <= wanted:
                return number
        return None

    more = (math.ceil(patients * 1.02**step) for step in range(1, 500))
    return {
        "seeds_needed": first(range(math.floor(seeds) + 1, MOST_SEEDS), of.with_seeds),
        "patients_needed": first((m for m in more if patients < m <= MOST_PATIENTS),
                                 of.with_patients),
    }  # fmt: skip
