"""Every method on one data set: parameters, AUROC, step time and memory, as a table.

    python benchmarks/methods_table.py --runs runs/busi --jobs 2 --cost COST.json --out OUT.json \
        -- --cfg ultrasound_wara.yaml --set dataset=DIR ...

What stands after `--` goes to `train.py`, for every method with `--set adapter.method=M` and for
every seed with `--set seed=S`. Run folders that are finished are read and not run again, stopped
ones are resumed. `COST.json` is what `benchmarks/train_step.py` wrote for the same backbone and
batch size; without it the table has no times.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from wara.adapters import METHODS
from wara.config import load_config
from wara.images import processors

ROOT = Path(__file__).resolve().parents[1]
METRICS = ("auc_macro", "balanced_accuracy", "ece")


def train(method: str, seed: int, args: argparse.Namespace) -> Path | None:
    """Run one method with one seed, unless that was done; return its folder, none if it failed."""
    folder = args.runs / f"{method}_s{seed}"
    command = [
        sys.executable, str(ROOT / "train.py"), *args.train, "--quiet",
        "--set", f"adapter.method={method}", "--set", f"seed={seed}", "--out", str(folder),
    ]  # fmt: skip
    if folder.exists():
        command.append("--resume")
    threads = max(1, processors() // args.jobs)
    environment = {"OMP_NUM_THREADS": str(threads), **os.environ}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        # The other methods go on. What an earlier command left in the folder is not taken for it.
        print(f"{method}, seed {seed}: exit {done.returncode}\n{done.stderr.strip()}", flush=True)
        return None
    print(f"{method}, seed {seed}: done", flush=True)
    return folder


def read(folder: Path) -> dict[str, Any]:
    """Return what a finished run reports."""
    found = json.loads((folder / "metrics.json").read_text())
    row = {key: found[key] for key in ("method", "seed", "adapter_params", "head_params")}
    row["lr"] = load_config(folder / "config.yaml").lr
    return {**row, **{name: found["test"][name] for name in METRICS}}


def table(rows: list[dict[str, Any]], cost: dict[str, Any]) -> str:
    """Return the runs as a Markdown table, one row per method."""
    lines = [
        "| method | adapter parameters | lr | test macro AUROC | balanced accuracy | ECE | "
        "ms per step | step time / LoRA | peak MB |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for method in METHODS:
        runs = [row for row in rows if row["method"] == method]
        if not runs:
            continue
        cells = [f"`{method}`", f"{runs[0]['adapter_params']:,}", f"{runs[0]['lr']:g}"]
        cells += [_cell([run[name] for run in runs]) for name in METRICS]
        step = cost.get(method)
        if step is not None:
            ratio = step["time / lora"]
            cells += [
                f"{1e3 * step['seconds']:.0f}",
                f"{ratio['median']:.2f} ({ratio['p10']:.2f} to {ratio['p90']:.2f})",
                f"{step['peak_mb']:.0f}",
            ]
        else:
            cells += ["", "", ""]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(values: list[dict[str, Any]]) -> str:
    """One run: value and interval; several: mean, and the smallest and largest of the runs."""
    if any(value["value"] is None for value in values):
        return "null"
    points = [value["value"] for value in values]
    if len(values) == 1:
        return f"{points[0]:.3f} [{values[0]['low']:.3f}, {values[0]['high']:.3f}]"
    return f"{np.mean(points):.3f} ({min(points):.3f} to {max(points):.3f})"


def main() -> None:
    """Train what is missing, print the table, write the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=Path, required=True, help="folder of the run folders")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time; they share the cores")
    parser.add_argument("--cost", type=Path, help="JSON of train_step.py")
    parser.add_argument("--out", type=Path)
    parser.add_argument("train", nargs="*", help="after --: arguments of train.py")
    args = parser.parse_args()
    jobs = [(method, seed) for seed in args.seeds for method in args.methods]
    with ThreadPoolExecutor(args.jobs) as pool:
        folders = list(pool.map(lambda job: train(*job, args), jobs))
    rows = [read(folder) for folder in folders if folder is not None]
    cost: dict[str, Any] = {}
    if args.cost:
        measured = json.loads(args.cost.read_text())
        cost = next(value["rows"] for key, value in measured.items() if key.endswith(" px"))
    print(table(rows, cost))
    missing = [job for job, folder in zip(jobs, folders, strict=True) if folder is None]
    for method, seed in missing:
        print(f"failed: {method}, seed {seed}")
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps({"rows": rows}, indent=1) + "\n")
    sys.exit(1 if missing else 0)


if __name__ == "__main__":
    main()
