"""Interleaved timing: every round times every candidate once, in a shuffled order.

The speed of a shared machine drifts; two candidates timed in the same round meet the same machine,
so the ratio within a round is what can be compared, and its spread over rounds is what is reported.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch


def synchronise() -> None:
    """Wait for the accelerator, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def interleave(
    candidates: dict[str, Callable[[], Any]], rounds: int, warmup: int = 3, seed: int = 0
) -> dict[str, np.ndarray]:
    """Return seconds `[rounds]` for each candidate."""
    for _ in range(warmup):
        for call in candidates.values():
            call()
    order = random.Random(seed)
    names = list(candidates)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(rounds):
        order.shuffle(names)
        for name in names:
            synchronise()
            start = time.perf_counter()
            candidates[name]()
            synchronise()
            seconds[name].append(time.perf_counter() - start)
    return {name: np.array(values) for name, values in seconds.items()}


def ratio(of: np.ndarray, to: np.ndarray) -> dict[str, float]:
    """Return median and the middle 80 % of the round-by-round ratio of two candidates."""
    low, middle, high = np.quantile(of / to, [0.1, 0.5, 0.9])
    return {k: round(float(v), 3) for k, v in (("median", middle), ("p10", low), ("p90", high))}
