"""What WaRA's diagonal cores and Tiny-WaRA's gains learn, over the runs of a comparison.

    python benchmarks/bands_learnt.py comparison wara --out cores.csv

Writes a line for each run and subband: mean and standard deviation of its numbers over all matrices
(and ranks), and for each run the root mean square of how far the bands of one matrix and rank lie
from their mean; prints the same over all runs of a data set.
"""

from __future__ import annotations

import argparse
import csv
import json
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

WEIGHT = {"wara": "core", "tiny_wara": "band"}  # one number for each band (and rank) in each
NAMES = ("LL", "LH", "HL", "HH")  # of one level


def weights(adapter: Path, method: str) -> np.ndarray:
    """Return what a run has learnt for its bands, `[matrices (x ranks), bands]`."""
    (path,) = adapter.glob("*.safetensors")
    found = [
        np.moveaxis(value.astype(np.float64), 1, -1).reshape(-1, value.shape[1])
        for name, value in sorted(load_file(path).items())
        if name.endswith(f".adapter.{WEIGHT[method]}")
    ]
    return np.concatenate(found)


def between(values: np.ndarray) -> float:
    """Return the root mean square of the bands' distance from their mean."""
    return float(np.sqrt(((values - values.mean(axis=1, keepdims=True)) ** 2).mean()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("comparison", type=Path, help="folder of `wara compare`")
    parser.add_argument("method", choices=WEIGHT)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    runs: dict[str, list[np.ndarray]] = {}
    with arguments.out.open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(["dataset", "split", "seed", "band", "mean", "deviation", "between_bands"])
        for line in (arguments.comparison / "cells.jsonl").read_text().splitlines():
            cell = json.loads(line)
            if cell["method"] != arguments.method:
                continue
            values = weights(arguments.comparison / cell["folder"] / "adapter", cell["method"])
            runs.setdefault(cell["dataset"], []).append(values)
            for band, one in zip(NAMES, values.T, strict=True):
                row = [cell["dataset"], cell["split"], cell["seed"], band]
                numbers = (one.mean(), one.std(), between(values))
                table.writerow([*row, *(f"{number:.4f}" for number in numbers)])
    for dataset, found in runs.items():
        values = np.concatenate(found)
        print(f"{dataset}, {len(found)} runs: between bands {between(values):.3f}")
        for band, one in zip(NAMES, values.T, strict=True):
            print(f"  {band}: mean {one.mean():.3f}, deviation {one.std():.3f}")


if __name__ == "__main__":
    main()
