"""What one adapted linear layer costs: frozen, LoRA, WaRA in rank space, WaRA step by step.

    python benchmarks/adapter_layer.py --out benchmarks/results/adapter_layer_cpu.json

Each candidate runs forward and backward on the fused query-key-value layer of a ViT-B (768 wide,
14 × 14 grid, one class token). Times are taken in the same process, interleaved; reported are
ratios of candidates within a round, and the share of the frozen layer's time an adapter adds.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from timing import interleave, ratio
from torch import nn

from wara.adapters.base import AdaptedLinear
from wara.adapters.lora import LoRALayer
from wara.adapters.targets import Target
from wara.adapters.wara import Tokens, WaRALayer
from wara.wavelets import SubbandMixer

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from oracles import StepByStepWaRA  # noqa: E402


def candidates(
    width: int, grid: tuple[int, int], rank: int, batch: int, core: str, device: str
) -> dict[str, Callable[[], None]]:
    """Return one forward-and-backward call per candidate, all on the same input and weight."""
    torch.manual_seed(0)
    out = 3 * width
    linear = nn.Linear(width, out).requires_grad_(False)
    target = Target("qkv", linear, ((0, out),), ("qkv",))
    options = {"rank": rank, "scale": 1.0}
    lora = LoRALayer(target, **options)
    tokens = Tokens(SubbandMixer(grid), prefix_tokens=1, prefix="adapt")
    wara = WaRALayer(target, tokens, core=core, **options)
    nn.init.normal_(lora.up)
    wara.up = nn.Parameter(lora.up.detach().clone())
    wara.down = nn.Parameter(lora.down.detach().clone())
    steps = StepByStepWaRA(linear, wara.down, wara.up, wara.full_cores()[0], grid, 1)
    layers: dict[str, nn.Module] = {
        "frozen": linear,
        "lora": AdaptedLinear(linear, lora),
        "wara": AdaptedLinear(linear, wara),
        "step by step": steps,
    }
    x = torch.randn(batch, 1 + grid[0] * grid[1], width, device=device, requires_grad=True)
    gradient = torch.randn(batch, 1 + grid[0] * grid[1], out, device=device)
    with torch.no_grad():
        layers = {name: layer.to(device) for name, layer in layers.items()}
        torch.testing.assert_close(
            layers["wara"](x), layers["step by step"](x), rtol=1e-3, atol=1e-3
        )

    def call(layer: nn.Module) -> Callable[[], None]:
        def once() -> None:
            x.grad = None
            for parameter in layer.parameters():
                parameter.grad = None
            layer(x).backward(gradient)

        return once

    return {name: call(layer) for name, layer in layers.items()}


def main() -> None:
    """Time the candidates and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--grid", type=int, nargs=2, default=(14, 14))
    parser.add_argument("--rank", type=int, default=4)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--core", default="diag")
    parser.add_argument("--rounds", type=int, default=40)
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    grid = (args.grid[0], args.grid[1])
    calls = candidates(args.width, grid, args.rank, args.batch, args.core, device)
    seconds = interleave(calls, args.rounds)
    result = {
        "setting": {
            **vars(args),
            "out": None,
            "device": device,
            "threads": torch.get_num_threads(),
        },
        "machine": platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "milliseconds": {k: round(1e3 * float(v.mean()), 3) for k, v in seconds.items()},
        "ratio to frozen": {k: ratio(v, seconds["frozen"]) for k, v in seconds.items()},
        "wara / lora": ratio(seconds["wara"], seconds["lora"]),
        "step by step / wara": ratio(seconds["step by step"], seconds["wara"]),
        "step by step adds / wara adds": ratio(
            seconds["step by step"] - seconds["frozen"].mean(),
            seconds["wara"] - seconds["frozen"].mean(),
        ),
    }
    print(json.dumps(result, indent=1))
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
