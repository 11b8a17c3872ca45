"""Which learning rate should each method have by default?

Fits a ViT with each method at a few rates, on a few hundred real images at half the side, so that
a CPU gets through all of it, and prints the AUROC on validation images of other patients. There is
no test set: a rate is chosen here, nothing is claimed.

    python benchmarks/learning_rates.py --data DIR --weights FILE.safetensors --out out.json

`DIR` holds `labels.csv` (`file,label[,patient]`); splits keep patients together. The head has a
rate of its own, the same for all. Rows are appended to the output as they finish; rows that are
there already are not run again.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from defaults import arguments, split
from torch import nn

import wara
from wara.adapters import METHODS
from wara.backbones import build_backbone
from wara.data import ImageSet, eval_batches, open_source
from wara.evaluation.split import evaluate_split
from wara.images import ImageSpec
from wara.training.fit import fit
from wara.training.recipe import Recipe

# A factor of about three apart, around what each method's arithmetic suggests.
RATES: dict[str, list[float]] = {
    "lora": [7e-4, 2e-3, 6e-3, 2e-2],
    "wara": [7e-4, 2e-3, 6e-3, 2e-2],
    "tiny_wara": [5e-3, 1.5e-2, 5e-2, 1.5e-1],
    "waveft": [2e-4, 6e-4, 2e-3, 6e-3],
    "shira": [5e-3, 1.5e-2, 5e-2, 1.5e-1],
    "dora": [7e-4, 2e-3, 6e-3, 2e-2],
    "adalora": [2e-3, 6e-3, 2e-2, 6e-2],
    "vera": [5e-3, 1.5e-2, 5e-2, 1.5e-1],
    "loha": [7e-4, 2e-3, 6e-3, 2e-2],
    "lokr": [7e-4, 2e-3, 6e-3, 2e-2, 6e-2],
    "fourierft": [1.5e-2, 5e-2, 1.5e-1, 5e-1],
    "rank_conv": [7e-4, 2e-3, 6e-3, 2e-2],
    "adaptformer": [2e-3, 6e-3, 2e-2, 6e-2],
    "convpass": [7e-4, 2e-3, 6e-3, 2e-2],
    "vpt": [2e-3, 6e-3, 2e-2, 6e-2],
    "fact_tt": [7e-4, 2e-3, 6e-3, 2e-2],
    "apla": [3e-4, 1e-3, 3e-3, 1e-2],
    "ssf": [2e-3, 6e-3, 2e-2, 6e-2],
    "bitfit": [6e-4, 2e-3, 6e-3, 2e-2],
    "ln_tuning": [6e-4, 2e-3, 6e-3, 2e-2, 6e-2],
    "full": [3e-5, 1e-4, 3e-4, 1e-3],
    "linear_probe": [0.0],
}


def recipe(name: str, rate: float, seed: int, args: argparse.Namespace) -> Recipe:
    """Return how a method is trained at a rate; the head's and WaRA's cores' stay as they are."""
    rates = dict(METHODS[name].rates)
    if name != "linear_probe":
        rates[next(iter(rates))] = rate
    return Recipe(
        rates=rates,
        loss="ce",
        epochs=args.epochs,
        batch_size=args.batch,
        weight_decay=0.01,
        warmup_epochs=0.1 * args.epochs,
        clip_grad=1.0,
        seed=seed,
        precision="bf16-mixed" if args.bf16 else "32-true",
    )


def measure(
    model: nn.Module, plan: Recipe, images: ImageSet, splits: Sequence[str], spec: ImageSpec
) -> dict[str, Any]:
    """Fit a model and score it, as the last epoch leaves it, on the validation images."""
    start = time.perf_counter()
    progress = fit(model, plan, images, splits, spec)
    chosen = [i for i, name in enumerate(splits) if name == "val"]
    found = evaluate_split(
        model, eval_batches(images, chosen, spec, batch_size=64), images.records,
        task=images.card.task, classes=images.card.class_names, name="val", bootstrap=0,
        seed=plan.seed,
    )  # fmt: skip
    loss, auc = progress.history[-1]["train_loss"], found.scores["auc_macro"]["value"]
    assert loss is not None
    return {
        "auc_macro": round(auc, 5),
        "train_loss": round(loss, 5),
        "n_val": len(chosen),
        "seconds": round(time.perf_counter() - start, 1),
    }


def main() -> None:
    """Run the experiment."""
    parser = arguments(__doc__.splitlines()[0], train=256, epochs=8)
    parser.add_argument("--methods", nargs="+", default=list(RATES), choices=list(RATES))
    parser.add_argument("--rates", type=float, nargs="+", help="in place of those of the script")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--size", type=int, default=112)
    args = parser.parse_args()
    images = open_source(str(args.data), cache=None, offline="error", seed=0)
    patients = np.array([record.patient or record.file for record in images.records])
    count = len(images.card.class_names)
    base, info = build_backbone(
        args.backbone, num_classes=count, img_size=args.size, weights=args.weights
    )
    setting = {key: getattr(args, key) for key in ("backbone", "size", "epochs", "batch", "bf16")}
    done = json.loads(args.out.read_text()) if args.out.exists() else []
    for seed in args.seeds:
        chosen, held_out = split(images.labels, patients, seed, args.train)
        splits = np.full(len(images), "neither", dtype=object)
        splits[chosen], splits[held_out] = "train", "val"
        for name in args.methods:
            for rate in args.rates or RATES[name]:
                key = {"data": args.data.name, **setting, "n_train": len(chosen)}
                key |= {"seed": seed, "method": name, "lr": rate}
                if any(all(row[k] == v for k, v in key.items()) for row in done):
                    continue
                torch.manual_seed(seed)
                model = copy.deepcopy(base)
                model.reset_classifier(count)
                wara.adapt(model, METHODS[name]())
                plan = recipe(name, rate, seed, args)
                row = key | measure(model, plan, images, splits.tolist(), info.spec)
                done.append(row)
                args.out.write_text(json.dumps(done, indent=1) + "\n")
                print(row, flush=True)


if __name__ == "__main__":
    main()
