"""WaveFT (arXiv 2505.12532), §5 and A.1.1: the rank-1 budget on SDXL's attention is 1.451 M.

    pip install 'wara[papers]'
    python benchmarks/papers/sdxl_budget.py

Builds SDXL's UNet without weights (meta device) from its published configuration, and counts what
this package would train on q, k, v and o of self- and cross-attention: by the budget's formulas,
by adapting the model and counting, and by a formula of our own from the configuration alone. Then
the budgets of the paper's Tables 2 and 6, 0.8 to 4 times rank 1, and what each method gets of them.
"""

from __future__ import annotations

import argparse
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from paper_tools import RESULTS, write_result
from torch import nn

from wara.adapters import LoRA, Method, SHiRA, WaveFT, adapt, count_parameters, unload
from wara.adapters.budget import fit
from wara.adapters.targets import find_targets
from wara.errors import WaraError

TARGETS = ("*.attn?.to_q", "*.attn?.to_k", "*.attn?.to_v", "*.attn?.to_out.0")
PAPER = 1_451_000
BUDGETS = (0.8, 0.9, 1.0, 1.5, 2.0, 3.0, 4.0)
"""Of Table 2, in units of rank 1, and of Table 6, the last."""
SDXL: dict[str, Any] = {
    "sample_size": 128,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 2,
    "transformer_layers_per_block": [1, 2, 10],
    "attention_head_dim": [5, 10, 20],
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}


def unet() -> nn.Module:
    """Return SDXL's UNet on the meta device: shapes, no numbers."""
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        model: nn.Module = UNet2DConditionModel(**SDXL)
    return model


def by_formula(config: dict[str, Any]) -> int:
    """Return `Σ (d + o)` over the attention layers, from the configuration alone.

    A transformer block of width `c` has q, k, v, o of `c × c` on itself (`8 c` together), q and o
    on the text (`4 c`), and k and v from the text's width `t` (`2 (c + t)`).
    """
    t, depths = config["cross_attention_dim"], config["transformer_layers_per_block"]
    widths, per_level = config["block_out_channels"], config["layers_per_block"]
    total = 0
    for width, depth, down, up in zip(
        widths, depths, config["down_block_types"], reversed(config["up_block_types"]), strict=True
    ):
        # A level going up has one layer more than going down.
        stacks = per_level * ("CrossAttn" in down) + (per_level + 1) * ("CrossAttn" in up)
        total += stacks * depth * (14 * width + 2 * t)
    return total + depths[-1] * (14 * widths[-1] + 2 * t)  # the middle


def size_at(method: Method, model: nn.Module, budget: float) -> int | None:
    """Return what a method trains at a budget; none where even its smallest size is too large."""
    try:
        return fit(method, model, budget)[2]
    except WaraError:
        return None


def main(arguments: list[str] | None = None) -> dict[str, object]:
    """Count, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args(arguments)
    model = unet()
    shapes = Counter(
        f"{t.linear.out_features}x{t.linear.in_features}" for t in find_targets(model, TARGETS)
    )
    methods: tuple[Method, ...] = (
        LoRA(targets=TARGETS), SHiRA(targets=TARGETS), WaveFT(targets=TARGETS)
    )  # fmt: skip
    counted: dict[str, dict[str, object]] = {}
    for method in methods:
        fitted, wanted, got = fit(method, model, "lora_r1")
        adapt(model, fitted)
        counted[method.name] = {
            "wanted": wanted,
            "fitted": got,
            "adapted": count_parameters(model)["adapter"],
            "per_matrix": getattr(fitted, "k", None),
        }
        unload(model)
    total = by_formula(SDXL)
    budgets = [
        {
            "lora_r1": budget,
            "wanted": round(budget * total),
            **{method.name: size_at(method, model, budget) for method in methods},
        }
        for budget in BUDGETS
    ]
    result: dict[str, object] = {
        "unet_parameters": sum(p.numel() for p in model.parameters()),
        "matrices": sum(shapes.values()),
        "shapes": dict(sorted(shapes.items())),
        "formula": total,
        "paper": PAPER,
        # The paper gives thousands, not rounded but cut off: rounded it would be 1.452 M.
        "agrees": total // 1000 == PAPER // 1000,
        "methods": counted,
        "budgets": budgets,
    }
    for key, value in result.items():
        print(key, value)
    write_result(args.out / "sdxl_budget.json", vars(args), result)
    return result


if __name__ == "__main__":
    main()
