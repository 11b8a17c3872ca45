"""Splitting: stratified by class, never through a group, the same for the same seed."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import numpy as np

SPLITS = ("train", "val", "test")
UNUSED = "unused"
"""What an image is that a smaller training set leaves out."""


def connected_groups(*keys: Sequence[Hashable | None]) -> np.ndarray:
    """Number the groups of items that share any key.

    Args:
        keys: one or several lists of length `n`; items with the same entry in one of them belong
            together, through others too (A and B share a patient, B and C are one file). None
            joins nothing.

    Returns:
        int64 `[n]`, group numbers from 0 in order of appearance.
    """
    n = len(keys[0])
    parent = list(range(n))

    def root(item: int) -> int:
        while parent[item] != item:
            parent[item] = parent[parent[item]]
            item = parent[item]
        return item

    for column in keys:
        first: dict[Hashable, int] = {}
        for item, key in enumerate(column):
            if key is None:
                continue
            if key in first:
                parent[root(item)] = root(first[key])
            else:
                first[key] = item
    numbers: dict[int, int] = {}
    return np.array([numbers.setdefault(root(item), len(numbers)) for item in range(n)], np.int64)


def stratify(
    labels: np.ndarray, groups: np.ndarray, fractions: Sequence[float], seed: int
) -> np.ndarray:
    """Deal groups to splits so that each split gets its share of each class.

    First greedily: groups that hold rare classes first, then large ones, each to the split that
    lacks most of what the group holds (iterative stratification, Sechidis et al. 2011, with
    groups). Then single groups move, as long as that brings class counts and sizes nearer to what
    is wanted. Without groups, a class of at least as many images as splits is in every split.

    Args:
        labels: int `[n]`, or 0/1 `[n, c]`.
        groups: int `[n]` from 0; items of one group stay together.
        fractions: share of each split; they sum to 1.
        seed: decides the order among equals.

    Returns:
        int64 `[n]`, index into `fractions`.
    """
    n = len(groups)
    table = _one_hot(labels)
    # Classes, and the plain number of images as one column more.
    items = np.hstack([table, np.ones((n, 1))])
    counts = np.zeros((int(groups.max(initial=-1)) + 1, items.shape[1]))
    np.add.at(counts, groups, items)
    share = np.asarray(fractions, float)[:, None]
    wanted = share * counts.sum(0)  # [splits, columns]
    # One of each class for every split, where there are groups enough; the largest split pays.
    enough = (counts > 0).sum(0) >= len(fractions)
    wanted = np.maximum(wanted, np.where(enough & (share > 0), 1.0, 0.0))
    largest = int(np.argmax(fractions))
    wanted[largest] += counts.sum(0) - wanted.sum(0)

    rng = np.random.default_rng(np.random.SeedSequence([seed, n]))
    order = rng.permutation(len(counts))
    chosen = np.zeros(len(counts), np.int64)
    _deal(counts, wanted, order, chosen)
    # In shuffled order, so that which of several equal groups moves depends on the seed.
    moved = chosen[order]
    _improve(counts[order], wanted, moved)
    chosen[order] = moved
    return chosen[groups]


def _deal(counts: np.ndarray, wanted: np.ndarray, shuffled: np.ndarray, chosen: np.ndarray) -> None:
    totals = counts.sum(0)
    rarest = np.where(counts > 0, totals, np.inf).min(1, initial=np.inf)
    order = shuffled[np.lexsort((-counts[shuffled, -1], rarest[shuffled]))]
    weight = counts / np.maximum(totals, 1)
    weight[:, -1] *= 1e-6  # size breaks ties between splits that lack as much of the classes
    need = wanted.copy()
    closed = wanted[:, -1] <= 0
    for group in order:
        score = need @ weight[group]
        score[closed] = -np.inf
        split = int(np.argmax(score))
        chosen[group] = split
        need[split] -= counts[group]


def _improve(counts: np.ndarray, wanted: np.ndarray, chosen: np.ndarray, steps: int = 200) -> None:
    """Make the best single move, again and again, on a chi-squared cost."""
    weight = np.where(wanted > 0, 1 / np.maximum(wanted, 1), 0.0)
    need = wanted.copy()
    np.subtract.at(need, chosen, counts)
    for _ in range(steps):
        # Cost of `need` is sum(weight * need ** 2): giving x to a split changes it by
        # sum(weight * (x ** 2 - 2 * x * need)).
        square = (counts**2) @ weight.T  # [groups, splits]
        cross = 2 * counts @ (weight * need).T
        take, leave = square - cross, square + cross
        own = leave[np.arange(len(counts)), chosen]
        gain = -(take + own[:, None])
        gain[np.arange(len(counts)), chosen] = -np.inf
        gain[:, wanted[:, -1] <= 0] = -np.inf
        group, split = np.unravel_index(int(np.argmax(gain)), gain.shape)
        if gain[group, split] <= 1e-9:
            return
        need[chosen[group]] += counts[group]
        need[split] -= counts[group]
        chosen[group] = split


def _one_hot(labels: np.ndarray) -> np.ndarray:
    if labels.ndim == 1:
        return np.eye(int(labels.max(initial=-1)) + 1)[labels]
    # "No finding" is stratified too: it is most of a screening set.
    none = (labels.sum(1, keepdims=True) == 0).astype(float)
    return np.hstack([labels.astype(float), none])
