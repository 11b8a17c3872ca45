"""A comparison small enough to be made in a test."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from training_helpers import environment, tiny_config

from wara import cli
from wara.config import dump_config


def make_config(folder: Path, **changes: Any) -> Path:
    """Write a config of one short epoch over 60 images, with everything it needs."""
    values: dict[str, Any] = {
        "epochs": 1, "bootstrap": 0, "batch_size": 16, "out": None, "warmup_epochs": 0.0,
        "data": {"val_fraction": 0.25, "test_fraction": 0.4},
    }  # fmt: skip
    path = folder / "tiny.yaml"
    path.write_text(dump_config(tiny_config(folder, **values | changes)))
    return path


def arguments(config: Path, out: Path, *more: str) -> list[str]:
    """Return a command line of three methods, two seeds and three rates."""
    return [
        "compare", "--cfg", str(config), "--methods", "lora,wara", "--seeds", "2",
        "--beside", "majority,linear_probe", "--tune", "lr=3", "--out", str(out), *more,
    ]  # fmt: skip


def compare(config: Path, out: Path, *more: str) -> int:
    """Compare in this process; return the exit code."""
    return cli.main(arguments(config, out, *more))


def spawn(config: Path, out: Path, *more: str) -> subprocess.Popen[str]:
    """Start the same in a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "wara.cli", *arguments(config, out, *more)],
        env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def tables(out: Path) -> dict[str, bytes]:
    """Return the tables of a comparison, which follow from its runs alone."""
    return {name: (out / name).read_bytes() for name in ("table.csv", "table.md", "table.tex")}


def cells(out: Path) -> list[Path]:
    """Return the run folders of a comparison."""
    return sorted(Path(entry.path) for entry in os.scandir(out / "cells") if entry.is_dir())
