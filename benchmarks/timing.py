"""Interleaved timing: every round times every candidate once, in a shuffled order.

The speed of a shared machine drifts; two candidates timed in the same round meet the same machine,
so the ratio within a round is what can be compared, and its spread over rounds is what is reported.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable
from pathlib import Path
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


def spread(cell: dict[str, float]) -> str:
    """Return a ratio as text."""
    return f"{cell['median']:.2f} ({cell['p10']:.2f} to {cell['p90']:.2f})"


def verdict(
    label: str, top: np.ndarray, bottom: np.ndarray, bound: float, at_most: bool
) -> dict[str, Any]:
    """Return what was wanted of the ratio of two candidates, what it is, and whether it is so."""
    got = ratio(top, bottom)
    reached = bool(got["median"] <= bound if at_most else got["median"] >= bound)
    return {"wanted": label, "got": got, "reached": reached}


def wanted_lines(rows: list[dict[str, Any]]) -> list[str]:
    """Return verdicts as the lines of a Markdown table."""
    lines = ["| wanted | measured | reached |", "|---|---|---|"]
    for row in rows:
        got = spread(row["got"]) if isinstance(row["got"], dict) else f"{row['got']:.2f}"
        lines.append(f"| {row['wanted']} | {got} | {'yes' if row['reached'] else 'no'} |")
    return lines


def keep(results: dict[str, Any], path: Path | None) -> None:
    """Write figures as JSON, if anywhere."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(results, indent=1) + "\n")
