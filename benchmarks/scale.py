"""What the trunk cache saves end to end, beside the same uncached and PEFT's LoRA on all blocks.

    python benchmarks/scale.py --out benchmarks/results/scale_cpu.json

A candidate opens and checks the images, builds the model, fills the cache if it has one, trains and
validates every epoch, and predicts validation and test images at the end. Tables, figures and
reports, which all would share, are left out. `cached` starts from an empty cache in every round;
`cached again` finds the outputs there, as every run of a comparison but the first does. Images are
phantoms, resized; weights are drawn, since the time does not depend on them. Candidates take turns,
in a new order every round; reported are ratios within a round, median and the middle 80 %.
"""

from __future__ import annotations

import argparse
import platform
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from safetensors.torch import save_file
from timing import interleave, keep, ratio, spread, verdict, wanted_lines
from torch import nn
from train_step import with_peft

from wara.config import RunConfig
from wara.data import eval_batches
from wara.evaluation.predict import predict
from wara.training.augment import PRESETS, build_augment
from wara.training.batches import ImageDataModule
from wara.training.fit import fit
from wara.training.run import evaluate
from wara.training.setup import kernels, prepare
from wara.training.task import schedule

WANTED = [
    ("uncached at least 2 x cached", "uncached", "cached", 2.0),
    ("LoRA (PEFT) on all blocks at least 4 x cached", "lora (PEFT), all blocks", "cached", 4.0),
]


def config_of(
    backbone: str, folder: Path, args: argparse.Namespace, adapter: Any = None, **changes: Any
) -> RunConfig:
    """Return a run on phantoms; data and weights lie in `folder`, `changes` are of the data."""
    data = {"cache": str(folder / "data"), "images": args.images, "views": args.views, **changes}
    return RunConfig.model_validate(
        {
            "dataset": "ultrasound_phantom", "epochs": args.epochs, "batch_size": args.batch,
            "backbone": {
                "name": backbone, "weights": str(folder / f"{backbone}.safetensors"),
                "img_size": args.size,
            },
            "adapter": adapter or {"method": args.method, "blocks": args.blocks},
            "amp": args.amp, "bootstrap": 0, "offline": "error", "wandb": {"mode": "disabled"},
            "warmup_epochs": 0.0, "data": data,
        }
    )  # fmt: skip


def ours(config: RunConfig) -> None:
    """Train and predict by wara."""
    with kernels(config.deterministic):
        run = prepare(config, report_dir=None)
        run.fill_trunk()
        fit(run.model, run.recipe(), run.images, run.splits, run.backbone.spec, trunk=run.trunk)
        evaluate(run)


def peft(config: RunConfig) -> None:
    """Train LoRA of PEFT on all blocks in a plain loop, and predict.

    Args:
        config: of a linear probe, which leaves the layers to PEFT; images, batches and epochs are
            those of the others.
    """
    run = prepare(config, report_dir=None)
    recipe, device = run.recipe(), "cuda" if run.device.accelerator == "gpu" else "cpu"
    model, parameters = with_peft(run.model, "lora")
    model.to(device)
    data = ImageDataModule(
        run.images, run.splits, spec=run.backbone.spec, batch_size=recipe.batch_size,
        augment=recipe.augment, views=recipe.views, seed=recipe.seed,
    )  # fmt: skip
    optimiser = torch.optim.AdamW(parameters, lr=recipe.main_rate, weight_decay=recipe.weight_decay)
    loader: Any = data.train_dataloader()
    decay = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda step: schedule(step, total=recipe.epochs * len(loader), warmup=0)
    )
    half = torch.autocast(device, torch.bfloat16, enabled=recipe.precision == "bf16-mixed")
    for epoch in range(recipe.epochs):
        loader.sampler.set_epoch(epoch)
        model.train()
        for batch in loader:
            with half:
                logits = model(batch["image"].to(device)).float()
            nn.functional.cross_entropy(logits, batch["label"].to(device)).backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimiser.step()
            decay.step()
            optimiser.zero_grad()
        with half:
            predict(model, data.val_dataloader(), task=run.task, classes=len(run.classes))
    for name in ("val", "test"):
        batches = eval_batches(
            run.images, run.indices(name), run.backbone.spec, batch_size=recipe.batch_size
        )
        predict(model, batches, task=run.task, classes=len(run.classes))


def candidates(
    backbone: str, folder: Path, args: argparse.Namespace
) -> dict[str, Callable[[], None]]:
    """Return what is timed, by name; the cache of `cached again` is filled here."""
    torch.manual_seed(0)
    model = timm.create_model(backbone, img_size=args.size)
    save_file(model.state_dict(), folder / f"{backbone}.safetensors")

    def cached() -> None:
        # Drawn phantoms lie in the folder of the data, so they are given to the fresh one.
        with tempfile.TemporaryDirectory(dir=folder) as fresh:
            (Path(fresh) / "phantoms").symlink_to(folder / "data" / "phantoms")
            ours(config_of(backbone, folder, args, trunk="cache", cache=fresh))

    warm = config_of(backbone, folder, args, trunk="cache")
    prepare(warm, report_dir=None).fill_trunk(print)
    return {
        "cached": cached,
        "cached again": lambda: ours(warm),
        "uncached": lambda: ours(config_of(backbone, folder, args)),
        "lora (PEFT), all blocks": lambda: peft(
            config_of(backbone, folder, args, {"method": "linear_probe"})
        ),
    }


def measure(backbone: str, args: argparse.Namespace) -> dict[str, Any]:
    """Time all candidates in rounds and return the figures."""
    with tempfile.TemporaryDirectory() as name:
        times = interleave(candidates(backbone, Path(name), args), args.rounds, warmup=args.warmup)
    rows = {
        name: {
            "seconds": round(float(np.median(seconds)), 2),
            "time / cached": ratio(seconds, times["cached"]),
        }
        for name, seconds in times.items()
    }
    wanted = [
        verdict(label, times[top], times[bottom], bound, at_most=False)
        for label, top, bottom, bound in WANTED
    ]
    return {"rows": rows, "wanted": wanted}


def table(result: dict[str, Any]) -> str:
    """Return the figures as a Markdown table."""
    lines = ["| candidate | seconds | time / cached |", "|---|---|---|"]
    for name, row in result["rows"].items():
        lines.append(f"| {name} | {row['seconds']:.1f} | {spread(row['time / cached'])} |")
    return "\n".join([*lines, "", *wanted_lines(result["wanted"])])


def main() -> None:
    """Measure, print the tables, write the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument(
        "--models", nargs="+", default=["vit_tiny_patch16_224", "vit_small_patch16_224"]
    )
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--images", type=int, default=500, help="of all splits together")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--views", type=int, default=4)
    parser.add_argument("--blocks", default="last_4")
    parser.add_argument("--method", default="wara")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--amp", default="auto", choices=["auto", "off", "bf16"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--warmup", type=int, default=0, help="rounds that are not counted")
    args = parser.parse_args()
    # Imported on first use, which no candidate shall pay for.
    build_augment(next(name for name in PRESETS if name != "off"))(np.zeros((8, 8, 3), np.uint8), 0)
    gpu = torch.cuda.is_available()
    results: dict[str, Any] = {
        "setting": {key: value for key, value in vars(args).items() if key != "out"},
        "machine": torch.cuda.get_device_name() if gpu else platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
    for backbone in args.models:
        results[backbone] = measure(backbone, args)
        print(f"\n{backbone}\n\n{table(results[backbone])}\n", flush=True)
    keep(results, args.out)


if __name__ == "__main__":
    main()
