"""Which core, level, prefix and learning rates should WaRA have by default?

Trains the upper blocks of a ViT on a few hundred real images, once per option and seed, and
prints the test AUROC beside that of LoRA and the linear probe under the same seeds and splits.
The lower blocks are frozen and there is no augmentation, so their tokens are computed once.

    python benchmarks/defaults.py --data DIR --weights FILE.safetensors --seeds 0 1 2 --out out.json

`DIR` holds `labels.csv` (`file,label[,patient]`). Rows are appended to the output as they finish;
rows that are there already are not run again.
"""

from __future__ import annotations

import argparse
import copy
import csv
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import StratifiedGroupKFold
from torch import Tensor, nn

import wara
from wara.adapters import adaptation_of, method_from_options, parameter_groups
from wara.backbones import build_backbone
from wara.images import ImageSpec, load_tensor

LR, WARMUP = 2e-3, 0.1
# Tiny-WaRA as it was when its rows were measured.
FORMER = {"coefficients": 8, "rank": 8, "targets": ["q", "k", "v", "o"]}
OPTIONS: dict[str, dict[str, Any]] = {
    "probe": {"method": "linear_probe"},
    "lora": {"method": "lora"},
    "identity": {"method": "wara", "core": "identity"},
    "diag x1": {"method": "wara", "core": "diag", "lr_core": 1},
    "diag x10": {"method": "wara", "core": "diag", "lr_core": 10},
    "diag x50": {"method": "wara", "core": "diag", "lr_core": 50},
    "scalar x50": {"method": "wara", "core": "scalar", "lr_core": 50},
    "full x10": {"method": "wara", "core": "full", "lr_core": 10},
    "full x50": {"method": "wara", "core": "full", "lr_core": 50},
    "diag x50 level 2": {"method": "wara", "core": "diag", "lr_core": 50, "level": 2},
    "full x10 level 2": {"method": "wara", "core": "full", "lr_core": 10, "level": 2},
    "diag x50 level 3": {"method": "wara", "core": "diag", "lr_core": 50, "level": 3},
    "diag x50 skip": {"method": "wara", "core": "diag", "lr_core": 50, "prefix": "skip"},
    "diag x50 db2": {"method": "wara", "core": "diag", "lr_core": 50, "wavelet": "db2"},
    "tiny x1": {"method": "tiny_wara", **FORMER, "lr_core": 1},
    "tiny x10": {"method": "tiny_wara", **FORMER, "lr_core": 10},
    "lora lr x2.5": {"method": "lora", "lr": 2.5},
    "diag x50 lr x2.5": {"method": "wara", "core": "diag", "lr_core": 50, "lr": 2.5},
}


def read_set(folder: Path) -> tuple[list[Path], np.ndarray, np.ndarray]:
    """Return image paths, label indices and patient names of a folder with `labels.csv`."""
    with (folder / "labels.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    classes = sorted({row["label"] for row in rows})
    labels = np.array([classes.index(row["label"]) for row in rows])
    patients = np.array([row.get("patient") or row["file"] for row in rows])
    return [folder / row["file"] for row in rows], labels, patients


@torch.no_grad()
def lower_tokens(model: Any, images: list[Tensor], blocks: int) -> Tensor:
    """Return tokens `[n_images, n, d]` after the first `blocks` blocks."""
    found = []
    for start in range(0, len(images), 32):
        x = model.patch_embed(torch.stack(images[start : start + 32]))
        x = model.norm_pre(model.patch_drop(model._pos_embed(x)))
        for block in model.blocks[:blocks]:
            x = block(x)
        found.append(x)
    return torch.cat(found)


class Upper(nn.Module):
    """The upper blocks of a ViT, as a model of its own that takes tokens."""

    def __init__(self, model: Any, blocks: int) -> None:
        super().__init__()
        self.model = model
        self.model.blocks = nn.Sequential(*model.blocks[blocks:])

    def forward(self, x: Tensor) -> Tensor:
        """Return logits for tokens."""
        return self.model.forward_head(self.model.norm(self.model.blocks(x)))


def train(
    model: nn.Module,
    forward: Callable[[Tensor], Tensor],
    inputs: Tensor,
    labels: Tensor,
    *,
    lr: float,
    lr_core: float,
    args: Any,
) -> float:
    """Fine-tune an adapted `model` through `forward`; return the mean loss of the last epoch.

    AdamW with weight decay on all but the cores, clipping, a tenth of the steps as warm-up, cosine.
    """
    groups = parameter_groups(model)
    method = adaptation_of(model).method
    optimiser = torch.optim.AdamW(
        [
            {"params": groups["adapter"], "lr": lr, "weight_decay": 0.01},
            {"params": groups["core"], "lr": lr_core, "weight_decay": 0.0},
            {"params": groups["head"], "lr": LR, "weight_decay": 0.01},
        ]
    )
    steps = args.epochs * math.ceil(len(inputs) / args.batch)
    warm = max(1, int(WARMUP * steps))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser,
        lambda s: (
            (s + 1) / warm
            if s < warm
            else 0.5 + 0.5 * math.cos(math.pi * (s - warm) / (steps - warm))
        ),
    )
    parameters = [p for group in groups.values() for p in group]
    losses: list[float] = []
    done = 0
    for _ in range(args.epochs):
        losses = []
        for batch in torch.randperm(len(inputs)).split(args.batch):
            with torch.autocast("cpu", torch.bfloat16, enabled=args.bf16):
                logits = forward(inputs[batch]).float()
            loss = nn.functional.cross_entropy(logits, labels[batch])
            penalty = method.penalty(model)
            optimiser.zero_grad()
            (loss if penalty is None else loss + penalty).backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimiser.step()
            done += 1
            method.on_step(model, done, steps)
            schedule.step()
            losses.append(loss.item())
    return float(np.mean(losses))


@torch.no_grad()
def auc_macro(forward: Callable[[Tensor], Tensor], inputs: Tensor, labels: np.ndarray) -> float:
    """Return the macro AUROC of a model in evaluation mode."""
    logits = torch.cat([forward(part) for part in inputs.split(64)])
    probabilities = logits.double().softmax(1).numpy()
    return float(roc_auc_score(labels, probabilities, multi_class="ovr", average="macro"))


def core_spread(model: nn.Module) -> float | None:
    """Return the RMS distance of the trained cores from where they started."""
    cores = [p.detach() for n, p in model.named_parameters() if n.endswith("adapter.core")]
    moved = [c - (torch.eye(c.shape[-1]) if c.ndim == 4 else 1.0) for c in cores]
    return float(torch.cat([m.flatten() for m in moved]).square().mean().sqrt()) if moved else None


def arguments(description: str, train: int, epochs: int) -> argparse.ArgumentParser:
    """Return the arguments that experiments on a folder of real images share.

    Args:
        description: of the experiment.
        train: default number of training images.
        epochs: default number of epochs.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--backbone", default="vit_tiny_patch16_224")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--train", type=int, default=train)
    parser.add_argument("--epochs", type=int, default=epochs)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--bf16", action="store_true")
    return parser


def split(
    labels: np.ndarray, patients: np.ndarray, seed: int, count: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return the indices of `count` training images, and of the test images, of other patients."""
    folds = StratifiedGroupKFold(2, shuffle=True, random_state=seed)
    pool, test = next(folds.split(labels, labels, patients))
    return np.random.default_rng(seed).permutation(pool)[:count], test


def main() -> None:
    """Run the experiment."""
    parser = arguments(__doc__.splitlines()[0], train=300, epochs=10)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--options", nargs="+", default=list(OPTIONS), choices=list(OPTIONS))
    parser.add_argument("--blocks", type=int, default=4, help="upper blocks that are adapted")
    args = parser.parse_args()
    files, labels, patients = read_set(args.data)
    count = int(labels.max()) + 1
    base, info = build_backbone(args.backbone, num_classes=count, weights=args.weights)
    base.eval()
    spec = ImageSpec(info.img_size, info.mean, info.std, info.interpolation)
    lower = len(base.blocks) - args.blocks
    tokens = lower_tokens(base, [load_tensor(file, spec) for file in files], lower)
    done = json.loads(args.out.read_text()) if args.out.exists() else []
    for seed in args.seeds:
        chosen, test = split(labels, patients, seed, args.train)
        for name in args.options:
            key = {"data": args.data.name, "seed": seed, "option": name}
            if any(all(row[k] == v for k, v in key.items()) for row in done):
                continue
            option = OPTIONS[name]
            torch.manual_seed(seed)
            upper = Upper(copy.deepcopy(base), lower)
            upper.model.reset_classifier(count)
            plain = {k: v for k, v in option.items() if k not in ("lr", "lr_core")}
            wara.adapt(upper.model, method_from_options(plain.pop("method"), plain))
            upper.train()
            torch.manual_seed(seed)
            start = time.perf_counter()
            loss = train(
                upper.model,
                upper,
                tokens[chosen],
                torch.from_numpy(labels[chosen]),
                lr=LR * option.get("lr", 1),
                lr_core=LR * option.get("lr_core", 1),
                args=args,
            )
            seconds = time.perf_counter() - start
            upper.eval()
            auc = auc_macro(upper, tokens[test], labels[test])
            row = {
                **key,
                "auc_macro": round(auc, 5),
                "train_loss": round(loss, 5),
                "core_rms": core_spread(upper.model),
                "n_train": len(chosen),
                "n_test": len(test),
                "seconds": round(seconds, 1),
            }
            done.append(row)
            args.out.write_text(json.dumps(done, indent=1) + "\n")
            print(row, flush=True)


if __name__ == "__main__":
    main()
