"""Splitting: stratified by class, never through a group, the same for the same seed."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import numpy as np

SPLITS = ("train", "val", "test")


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

    Greedy: groups that hold rare classes first, then large ones, each to the split that lacks most
    of what the group holds (iterative stratification, Sechidis et al. 2011, with groups). Any
    class of at least as many groups as splits is present in every split.

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
    counts = np.zeros((int(groups.max(initial=-1)) + 1, table.shape[1]))
    np.add.at(counts, groups, table)
    sizes = np.bincount(groups, minlength=len(counts)).astype(float)
    class_totals = counts.sum(0)
    holders = (counts > 0).sum(0)

    share = np.asarray(fractions, float)[:, None]
    wanted = share * class_totals  # [splits, classes]
    # One of each class for every split, where there are groups enough; the largest split pays.
    floor = np.where((holders >= len(fractions)) & (share > 0), 1.0, 0.0)
    largest = int(np.argmax(fractions))
    wanted = np.maximum(wanted, floor)
    wanted[largest] += class_totals - wanted.sum(0)
    room = share[:, 0] * n

    rng = np.random.default_rng(np.random.SeedSequence([seed, n]))
    shuffled = rng.permutation(len(counts))
    rarest = np.where(counts > 0, class_totals, np.inf).min(1, initial=np.inf)
    order = shuffled[np.lexsort((-sizes[shuffled], rarest[shuffled]))]
    weight = counts / np.maximum(class_totals, 1)
    chosen = np.zeros(len(counts), np.int64)
    for group in order:
        # Room breaks ties between splits that lack as much of the classes.
        score = wanted @ weight[group] + 1e-6 * room / max(n, 1)
        score[share[:, 0] == 0] = -np.inf
        split = int(np.argmax(score))
        chosen[group] = split
        wanted[split] -= counts[group]
        room[split] -= sizes[group]
    return chosen[groups]


def _one_hot(labels: np.ndarray) -> np.ndarray:
    if labels.ndim == 1:
        return np.eye(int(labels.max(initial=-1)) + 1)[labels]
    # "No finding" is stratified too: it is most of a screening set.
    none = (labels.sum(1, keepdims=True) == 0).astype(float)
    return np.hstack([labels.astype(float), none])
