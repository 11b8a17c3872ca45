"""A small run and its bundle, made once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from training_helpers import make_images, make_weights, tiny_config

from wara.deploy.export import Wish, export
from wara.training.run import run_here

CARD = """\
name: grain
title: Textures of three grains
task: multiclass
modality: null
classes:
  - {name: calm, meaning: coarse}
  - {name: mixed, meaning: of both}
  - {name: rough, meaning: fine}
source: {kind: csv, path: data/labels.csv}
intended_use: Tests of the toolkit.
limits: Nobody.
"""


def make_run(folder: Path, **changes: Any) -> Path:
    """Train on textures of three grains, with a card and statistics that are known."""
    if not (folder / "data").exists():
        make_images(folder / "data", (40, 40, 40))
        make_weights(folder / "weights.safetensors")
        (folder / "grain.yaml").write_text(CARD)
    changes = {"backbone__mean": (0.5, 0.5, 0.5), "backbone__std": (0.5, 0.5, 0.5)} | changes
    config = tiny_config(folder, dataset=str(folder / "grain.yaml"), **changes)
    run_here(config)
    return Path(config.out or "")


def make_bundle(folder: Path, wish: Wish | None = None, **changes: Any) -> Path:
    """Train and export."""
    run = make_run(folder, **changes)
    return export(run, folder / "bundle", wish, say=lambda _: None)


def make_cases(folder: Path, per_class: tuple[int, ...] = (30, 26, 22)) -> Path:
    """Write labelled images of another place: noisier, with columns for site, sex and age."""
    make_images(folder, per_class)
    rng = np.random.default_rng(7)
    header, *rows = (folder / "labels.csv").read_text().splitlines()
    lines = [f"{header},site,sex,age"]
    for number, row in enumerate(rows):
        path = folder / row.split(",")[0]
        pixels = np.asarray(Image.open(path)).astype(float) + rng.normal(0, 12, (32, 32))
        Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(path)
        site = "north" if number % 7 < 3 else "west" if number % 7 == 3 else "south"
        sex = ("f", "m", "unknown")[number // 2 % 3]
        lines.append(f"{row},{site},{sex},{20 + number * 7 % 60}")
    (folder / "labels.csv").write_text("\n".join(lines) + "\n")
    return folder
