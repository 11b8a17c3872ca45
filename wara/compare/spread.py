"""How far a mean of scores would move with other patients, other seeds and other splits.

A score differs for three reasons. With the score of every cell and its value in resamples of the
patients (`wara.compare.scores`):

* *patients*: the variance of the mean over all cells in the resamples. Resamples are shared by all
  cells, so it holds what methods, seeds and splits have in common, and a difference is paired.
* *seeds*: the mean square between the seeds of a split, less what the resamples say that patients
  put into it. Two methods with the same seeds in every split were trained with the same batches,
  augmentation and initial head: their seeds are pairs. Otherwise they are independent draws.
* *splits*: the mean square between the means of splits, less the same. It contains that of seeds.

The variance of a mean is that of patients plus the larger of the two others. This is the analysis
of Obuchowski and Rockette (1995) for readers and cases, with seeds as readers; its degrees of
freedom are those of Hillis (2007), Satterthwaite's for these mean squares. Resampling the few
seeds instead would give an interval that is too short: the variance of a resampled mean of S seeds
is (S - 1) / S of the true one, and no percentile reaches beyond the seeds that were seen.

A part that comes out below 0 by chance counts as 0: leaving it negative made intervals too short in
simulation (88 to 95 %). Where resamples of the patients move the seeds against each other, so that
their mean moves less than the noise taken off, the variance is the mean square itself, as in
Obuchowski and Rockette; a smaller one would have fewer degrees of freedom than there are seeds. The
price is that differences between methods whose seeds hardly differ get intervals that are a little
long. With only two seeds, or two splits, that differ by more than patients do, 95 % intervals hold
the truth in 90 to 93 %; three are enough. Training sets of splits that overlap share more than this
sees: it speaks of splits of such data, not of other hospitals.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import special

from wara.compare.scores import Floats, Scores


@dataclass(frozen=True)
class Square:
    """A mean square between seeds or splits, in units of the variance of the mean.

    Args:
        total: the mean square.
        noise: what patients put into it, by the resamples.
        df: its degrees of freedom.
    """

    total: float
    noise: float
    df: float

    @property
    def net(self) -> float:
        """What is left without the noise of patients; below 0 by chance."""
        return self.total - self.noise

    def scaled(self, total: float, noise: float, df: float) -> Square:
        """Return the square of another design, by factors of its net part and its noise."""
        return Square(max(self.net, 0.0) * total + self.noise * noise, self.noise * noise, df)


@dataclass(frozen=True)
class Spread:
    """A mean, or a difference of two, and the parts of its variance.

    Args:
        value: mean over splits of the mean over seeds.
        patients: variance that other patients would cause.
        seeds: mean square between seeds of each method that has two seeds in some split.
        splits: mean square between splits; None with one split.
        design: number of patients, of splits, and of seeds per split (harmonic mean).
    """

    value: float
    patients: float
    seeds: tuple[Square, ...]
    splits: Square | None
    design: tuple[int, int, float]

    @property
    def by_split(self) -> bool:
        """Whether the splits, and not the seeds, say how much training varies."""
        return self.splits is not None and self.splits.net > self._net_seeds

    @property
    def _net_seeds(self) -> float:
        return max(0.0, sum(square.net for square in self.seeds))

    @property
    def _squares(self) -> tuple[Square, ...]:
        """The squares that say how much training varies."""
        return (self.splits,) if self.splits and (self.by_split or not self.seeds) else self.seeds

    @property
    def error(self) -> float:
        """Standard error of the value."""
        training = max(self._net_seeds, self.splits.net if self.splits else 0.0)
        seen = sum(square.total for square in self._squares)
        return math.sqrt(max(self.patients + training, seen))

    @property
    def df(self) -> float:
        """Degrees of freedom of the error."""
        parts = [(square.total, square.df) for square in self._squares]
        parts.append((self.patients, self.design[0] - 1.0))
        noise = sum(total**2 / df for total, df in parts)
        return self.error**4 / noise if noise > 0 else math.inf

    def reach(self, alpha: float) -> float:
        """Return how many standard errors an interval of level 1 - alpha goes either way."""
        # Not stats.t, whose checks take longer than a thousand designs do here.
        return float(special.stdtrit(min(self.df, 1e9), 1 - alpha / 2))

    def with_seeds(self, seeds: int) -> Spread:
        """Return what to expect of another number of seeds per split."""
        patients, splits, now = self.design
        share = now / seeds
        each = tuple(one.scaled(share, share, splits * (seeds - 1.0)) for one in self.seeds)
        mixed = (1 - share) * sum(one.noise for one in self.seeds)
        between = None
        if self.splits:
            noise = max(self.splits.noise - mixed, 0.0)
            net = max(self.splits.net - (1 - share) * self._net_seeds, 0.0)
            between = Square(net + noise, noise, self.splits.df)
        return Spread(self.value, max(self.patients - mixed, 0.0), each, between,
                      (patients, splits, float(seeds)))  # fmt: skip

    def with_patients(self, patients: int) -> Spread:
        """Return what to expect of another number of patients."""
        share = self.design[0] / patients
        each = tuple(one.scaled(1, share, one.df) for one in self.seeds)
        between = self.splits.scaled(1, share, self.splits.df) if self.splits else None
        return Spread(self.value, self.patients * share, each, between,
                      (patients, *self.design[1:]))  # fmt: skip


def mean_of(scores: Scores, signs: Mapping[str, float]) -> float | None:
    """Return the value that `spread` has, or None where the metric is undefined."""
    if scores.values is None:
        return None
    groups = _groups(scores.values, signs, shared_splits(scores, signs), paired=False)
    return float(sum(np.mean([one.mean() for one in group]) for group in groups))


def shared_splits(scores: Scores, methods: Iterable[str]) -> list[int]:
    """Return the splits that all the methods have."""
    return sorted(set.intersection(*(set(scores.seeds[method]) for method in methods)))


def spread(scores: Scores, signs: Mapping[str, float]) -> Spread:
    """Return the mean of one method, or the difference of two, and the parts of its variance.

    Args:
        scores: of the cells, with draws.
        signs: method -> factor: `{"a": 1}` for the mean of a, `{"a": 1, "b": -1}` for a - b. The
            methods must have a split in common; only such splits count.

    Raises:
        ValueError: without draws.
    """
    if scores.values is None or scores.draws is None:
        raise ValueError(f"no draws: {scores.reason}")
    splits = shared_splits(scores, signs)
    k = len(splits)
    designs = [[scores.seeds[method][split] for split in splits] for method in signs]
    paired = all(design == designs[0] for design in designs)
    values = _groups(scores.values, signs, splits, paired)
    draws = _groups(scores.draws, signs, splits, paired)
    centre = np.sum([[one.mean() for one in group] for group in values], axis=0)
    drawn = np.sum([[one.mean(axis=0) for one in group] for group in draws], axis=0)
    seeds = []
    for value, draw in zip(values, draws, strict=True):
        df = sum(len(one) - 1 for one in value)
        if df:
            share = sum(1 / len(one) for one in value) / k**2 / df
            total, noise = sum(map(_squares, value)), sum(map(_noise, draw))
            seeds.append(Square(total * share, noise * share, df))
    between = None
    if k > 1:
        share = 1 / (k - 1) / k
        between = Square(_squares(centre) * share, _noise(drawn) * share, k - 1)
    patients = float(drawn.mean(axis=0).var(ddof=1))
    each = float(1 / np.mean([1 / len(one) for design in designs for one in design]))
    return Spread(float(centre.mean()), patients, tuple(seeds), between, (scores.patients, k, each))


def _groups(
    numbers: Mapping[str, Mapping[int, Floats]],
    signs: Mapping[str, float],
    splits: Sequence[int],
    paired: bool,
) -> list[list[Floats]]:
    """Return signed numbers of each split [S, ...]: of each method, or paired their sum alone."""
    groups = [[sign * numbers[method][split] for split in splits] for method, sign in signs.items()]
    return [[np.sum(parts, axis=0) for parts in zip(*groups, strict=True)]] if paired else groups


def _squares(values: Floats) -> float:
    """Return the sum of squares of values [S] around their mean."""
    return float(((values - values.mean()) ** 2).sum())


def _noise(draws: Floats) -> float:
    """Return what patients put into such a sum, from the values in each resample [S, resamples]."""
    return float((draws - draws.mean(axis=0)).var(axis=1, ddof=1).sum())
