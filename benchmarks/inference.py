"""What serving costs: merged and adapted models against the base, ONNX Runtime against timm.

    python benchmarks/inference.py --out benchmarks/results/inference_cpu.json
    python benchmarks/inference.py --bundles nano=B1 tiny=B2 --out results.json

The first form times one batch of a ViT with random weights, all candidates in one process, in
rounds. With `--bundles` the program of each bundle is called as a hospital would: from a process
that starts to the first row, and the peak memory over 500 and over 5,000 files.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import timm
import torch
from PIL import Image
from timing import interleave, ratio
from torch import nn

from wara.adapters import adapt, method_from_options, trainable_parameters
from wara.deploy.graph import export_onnx, plain
from wara.deploy.predictor import session

METHODS = ("wara", "tiny_wara", "waveft", "lora")
# Ratio, and the most (or least) that is wanted of it.
WANTED = {
    "lora merged / base eager": 1.02,
    "waveft merged / base eager": 1.02,
    "wara onnx / base onnx": 1.05,
    "tiny_wara onnx / base onnx": 1.05,
    "base eager / base onnx": 1.0,
}


def models(backbone: str, classes: int) -> dict[str, nn.Module]:
    """Return the base and, for each method, the model that is served."""
    torch.manual_seed(0)
    base = timm.create_model(backbone, num_classes=classes).eval()
    weights = base.state_dict()
    found = {"base": base}
    for name in METHODS:
        model = timm.create_model(backbone, num_classes=classes)
        model.load_state_dict(weights)
        adapt(model, method_from_options(name, {}))
        with torch.no_grad():  # an adapter that was trained is not the zero it begins with
            for parameter in trainable_parameters(model).values():
                parameter.add_(0.02 * torch.randn_like(parameter))
        found[name] = plain(model)[0]
    return found


def batches(args: argparse.Namespace) -> dict[str, Any]:
    """Time one batch in every form, and return seconds, ratios and what was wanted."""
    made = models(args.backbone, args.classes)
    size = made["base"].patch_embed.img_size
    images = torch.randn(args.batch, 3, *size)
    calls: dict[str, Callable[[], Any]] = {}
    eager = {"base": "base eager", "lora": "lora merged", "waveft": "waveft merged",
             "wara": "wara eager", "tiny_wara": "tiny_wara eager"}  # fmt: skip
    for name, label in eager.items():
        calls[label] = _eager(made[name], images)
    with tempfile.TemporaryDirectory() as folder:
        for name in ("base", "wara", "tiny_wara"):
            path = Path(folder) / f"{name}.onnx"
            export_onnx(made[name], size, path)
            ready = session(path.read_bytes(), path.name, args.threads)
            _agree(made[name], ready, images)
            calls[f"{name} onnx"] = _served(ready, images.numpy())
    seconds = interleave(calls, args.rounds)
    ratios = {}
    for words, limit in WANTED.items():
        of, to = words.split(" / ")
        found = ratio(seconds[of], seconds[to])
        least = words.startswith("base eager")
        met = found["median"] >= limit if least else found["median"] <= limit
        ratios[words] = {**found, "wanted": f"{'>=' if least else '<='} {limit}", "reached": met}
    ratios["wara eager / base eager"] = ratio(seconds["wara eager"], seconds["base eager"])
    return {
        "milliseconds": {k: round(1e3 * float(np.median(v)), 2) for k, v in seconds.items()},
        "images per second": {
            k: round(args.batch / float(np.median(v)), 1) for k, v in seconds.items()
        },
        "ratios": ratios,
    }


def _eager(model: nn.Module, images: torch.Tensor) -> Callable[[], Any]:
    def call() -> None:
        with torch.inference_mode():
            model(images)

    return call


def _served(ready: Any, pixels: np.ndarray) -> Callable[[], Any]:
    return lambda: ready.run(["logits"], {"images": pixels})


def _agree(model: nn.Module, ready: Any, images: torch.Tensor) -> None:
    """Raise unless both say the same: what is timed must be the same work."""
    with torch.inference_mode():
        wanted = model(images).numpy()
    found = ready.run(["logits"], {"images": images.numpy()})[0]
    np.testing.assert_allclose(found, wanted, atol=1e-3)


# -- bundles ---------------------------------------------------------------------------------------


def bundles(args: argparse.Namespace) -> dict[str, Any]:
    """Call the program of each bundle, in turns, and measure processes as a whole."""
    found: dict[str, Any] = {}
    named = dict(entry.split("=", 1) for entry in args.bundles)
    with tempfile.TemporaryDirectory() as folder:
        files = _draw(Path(folder) / "images", 5000)
        starts: dict[str, list[float]] = {name: [] for name in named}
        for _ in range(args.rounds):
            for name, bundle in named.items():
                starts[name].append(_call(bundle, files[:1], Path(folder))[0])
        for name, bundle in named.items():
            wanted = 2.0 if "nano" in name else 4.0
            seconds = float(np.median(starts[name]))
            few, many = (_call(bundle, files[:n], Path(folder)) for n in (500, 5000))
            growth = many[1] / few[1]
            found[name] = {
                "seconds to the first row": {
                    "median": round(seconds, 3),
                    "p10": round(float(np.quantile(starts[name], 0.1)), 3),
                    "p90": round(float(np.quantile(starts[name], 0.9)), 3),
                    "wanted": f"<= {wanted}", "reached": seconds <= wanted,
                },
                "peak MB of 500 files": round(few[1] / 1024),
                "peak MB of 5000 files": round(many[1] / 1024),
                "peak of 5000 / of 500": {
                    "ratio": round(growth, 3), "wanted": "<= 1.1", "reached": growth <= 1.1,
                },
                "files per second": round(5000 / many[0], 1),
            }  # fmt: skip
    return found


def _draw(folder: Path, count: int) -> list[Path]:
    """Write photographs of noise and shade, each under many names."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    paths = []
    for number in range(count):
        path = folder / f"{number:05}.jpg"
        if number < 20:
            shade = np.linspace(40, 200, 512)[None, :, None] + rng.normal(0, 12, (384, 512, 3))
            Image.fromarray(np.clip(shade, 0, 255).astype(np.uint8)).save(path)
        else:
            path.symlink_to(paths[number % 20].name)
        paths.append(path)
    return paths


# A process begins with the peak of the one that forked it, so that a small one has to do that.
_LAUNCH = """
import resource, subprocess, sys, time
start = time.perf_counter()
subprocess.run(sys.argv[1:], check=True, stderr=subprocess.DEVNULL)
print(time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
"""


def _call(bundle: str, files: list[Path], folder: Path) -> tuple[float, int]:
    """Return seconds and peak resident kilobytes of one call of `infer.py`."""
    listed = folder / "list.txt"
    listed.write_text("\n".join(map(str, files)) + "\n")
    words = [sys.executable, str(Path(bundle) / "infer.py"), f"@{listed}", "--quiet",
             "--out", str(folder / "rows.csv")]  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", _LAUNCH, *words], capture_output=True, text=True, check=True
    )
    seconds, kilobytes = done.stdout.split()
    return float(seconds), int(kilobytes)


def main() -> None:
    """Measure and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--backbone", default="vit_tiny_patch16_224")
    parser.add_argument("--classes", type=int, default=5)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--bundles", nargs="+", metavar="NAME=FOLDER")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    result = {
        "setting": {
            k: v for k, v in vars(args).items() if k not in ("out", "bundles")
        },
        "machine": platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "onnxruntime": onnxruntime.__version__,
        **(bundles(args) if args.bundles else batches(args)),
    }  # fmt: skip
    print(json.dumps(result, indent=1))
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
