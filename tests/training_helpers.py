"""A data set and a backbone small enough to train in a second."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from PIL import Image, ImageEnhance
from safetensors.torch import save_file

from wara.config import RunConfig
from wara.training.checkpoint import load_checkpoint

ROOT = Path(__file__).resolve().parents[1]
# What differs between two runs of the same config: clocks, and the memory of the process.
TIMES = {"seconds", "peak_memory_mb"}
CLASSES = ("calm", "mixed", "rough")


def make_images(folder: Path, per_class: tuple[int, ...] = (24, 20, 16), side: int = 32) -> Path:
    """Write `labels.csv` and textures whose grain tells the class; two images per patient."""
    (folder / "images").mkdir(parents=True)
    rng = np.random.default_rng(0)
    rows = ["file,label,patient"]
    for label, count in enumerate(per_class):
        for i in range(count):
            grain = 2 ** (3 - label)
            coarse = rng.normal(size=(side // grain + 1, side // grain + 1))
            texture = np.kron(coarse, np.ones((grain, grain)))[:side, :side]
            pixels = np.clip(128 + 40 * texture + rng.normal(0, 25, (side, side)), 0, 255)
            name = f"images/{CLASSES[label]}_{i:03d}.png"
            Image.fromarray(pixels.astype(np.uint8)).save(folder / name)
            rows.append(f"{name},{CLASSES[label]},{CLASSES[label]}-{i // 2}")
    (folder / "labels.csv").write_text("\n".join(rows) + "\n")
    return folder


def make_weights(path: Path) -> Path:
    """Write weights of timm's `test_vit`, drawn from a fixed seed."""
    torch.manual_seed(1)
    save_file(timm.create_model("test_vit", img_size=32).state_dict(), path)
    return path


def tiny_config(folder: Path, **changes: Any) -> RunConfig:
    """A run over `make_images` in `folder/data` with weights in `folder`, made when missing."""
    data, weights = folder / "data", folder / "weights.safetensors"
    if not data.exists():
        make_images(data)
        make_weights(weights)
    values: dict[str, Any] = {
        "dataset": str(data),
        "out": str(folder / "run"),
        "backbone": {"name": "test_vit", "weights": str(weights), "img_size": 32,
                     "drop_rate": 0.1},
        "adapter": {"method": "wara", "rank": 2, "level": 1},
        "epochs": 3,
        "batch_size": 8,
        "bootstrap": 20,
        "wandb": {"mode": "disabled"},
        "amp": "off",
        "accelerator": "cpu",
        "offline": "error",
    }  # fmt: skip
    for key, value in changes.items():
        section, _, name = key.partition("__")
        if name:
            values.setdefault(section, {})[name] = value
        else:
            values[key] = value
    return RunConfig.model_validate(values)


def with_twins(folder: Path, label: str = "calm") -> Path:
    """Add to the images of `tiny_config` a darker and an equal copy of its first one.

    The darker one is listed as `label`.
    """
    tiny_config(folder)
    data = folder / "data"
    first = next(csv.DictReader((data / "labels.csv").open()))
    image = Image.open(data / first["file"])
    ImageEnhance.Brightness(image).enhance(0.95).save(data / "images" / "darker.png")
    image.save(data / "images" / "again.tiff")
    with (data / "labels.csv").open("a") as stream:
        for name, called in (("darker.png", label), ("again.tiff", first["label"])):
            stream.write(f"images/{name},{called},{name}\n")
    return data


def environment(**more: str) -> dict[str, str]:
    """Environment of a child process: one thread, this checkout, no network tries."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **more}
    env.pop("WARA_RANK", None)
    return env


PROGRAM = """
import json, sys
from wara.config import RunConfig
from wara.training.checkpoint import load_checkpoint
from wara.errors import WaraError
from wara.training.start import run
payload = json.loads(sys.argv[1])
try:
    run(RunConfig.model_validate_json(json.dumps(payload["config"])), **payload["flags"])
except WaraError as error:
    print(error, file=sys.stderr)
    sys.exit(error.exit_code)
"""


def spawn(config: RunConfig, before: str = "", **flags: bool) -> subprocess.Popen[str]:
    """Start `run(config, **flags)` in a process of its own; `before` is code to run first."""
    payload = {"config": json.loads(config.model_dump_json()), "flags": flags}
    return subprocess.Popen(
        [sys.executable, "-c", before + PROGRAM, json.dumps(payload)],
        env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def adapter_bytes(run: Path) -> bytes:
    """The exported adapter."""
    return (run / "adapter" / "adapter_model.safetensors").read_bytes()


def assert_same(one: Path, two: Path) -> None:
    """What two runs of one config leave is the same, to the bit."""
    assert adapter_bytes(one) == adapter_bytes(two)
    for name in ("predictions_val.csv", "predictions_test.csv", "splits.csv"):
        assert (one / name).read_bytes() == (two / name).read_bytes(), name
    metrics = [json.loads((run / "metrics.json").read_text()) for run in (one, two)]
    for content in metrics:
        for key in TIMES:
            del content[key]
    assert metrics[0] == metrics[1]
    curves = []
    for path in (one, two):
        with (path / "metrics.csv").open() as handle:
            curves.append([{**row, "seconds": ""} for row in csv.DictReader(handle)])
    assert curves[0] == curves[1] and len(curves[0]) >= 1
    states = [load_checkpoint(run / "checkpoints" / "last.ckpt")
              for run in (one, two)]  # fmt: skip
    for name, tensor in states[0]["state"].items():
        assert torch.equal(tensor, states[1]["state"][name]), name
