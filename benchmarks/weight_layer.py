"""Forward and backward of one adapted attention projection, ours and PEFT's, side by side.

    python benchmarks/weight_layer.py --width 384 --batch 8 --out weight_layer.json

The layer is the fused query-key-value projection of a ViT with 196 patch tokens and a class token:
`d` in, `3 d` out. All methods train as much as a LoRA of rank 1 on query, key and value. Rounds are
interleaved, so that whatever else the machine does falls on all alike; each number is a ratio to
the frozen layer (forward, gradient of the input) of the same round: median and quartiles.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from wara.adapters.base import AdaptedLinear
from wara.adapters.lora import LoRALayer
from wara.adapters.sparse import SparseLayer, draw_places
from wara.adapters.targets import Target


def ours(width: int) -> dict[str, Callable[[nn.Linear], nn.Module]]:
    """Return constructors of our layers."""

    def sparse(wavelet: str | None) -> Callable[[nn.Linear], nn.Module]:
        def make(base: nn.Linear) -> nn.Module:
            places = [draw_places((width, width), 2 * width, 0)] * 3
            scale = 1.0 if wavelet is None else 25.0
            return AdaptedLinear(
                base, SparseLayer(target(base), places, scale=scale, wavelet=wavelet)
            )

        return make

    def target(base: nn.Linear) -> Target:
        rows = tuple((i * width, (i + 1) * width) for i in range(3))
        return Target("qkv", base, rows, ("q", "k", "v"))

    return {
        "lora": lambda base: AdaptedLinear(base, LoRALayer(target(base), rank=1, scale=1.0)),
        "waveft": sparse("haar"),
        "waveft_db4": sparse("db4"),
        "shira": sparse(None),
    }


def theirs(width: int) -> dict[str, Callable[[nn.Linear], nn.Module]]:
    """Return constructors of PEFT's layers; empty without PEFT."""
    try:
        import peft
    except ImportError:
        return {}
    k = 6 * width

    def wrap(config: object) -> Callable[[nn.Linear], nn.Module]:
        def make(base: nn.Linear) -> nn.Module:
            model = peft.get_peft_model(nn.Sequential(base), config)
            return model.base_model.model[0]

        return make

    return {
        "peft_lora": wrap(peft.LoraConfig(r=1, target_modules=["0"])),
        "peft_waveft": wrap(peft.WaveFTConfig(n_frequency=k, target_modules=["0"])),
        "peft_waveft_db4": wrap(
            peft.WaveFTConfig(n_frequency=k, wavelet_family="db4", target_modules=["0"])
        ),
        # PEFT sizes SHiRA as r (d + o); r = 1 is 4 d where the others have 6 d.
        "peft_shira": wrap(peft.ShiraConfig(r=1, target_modules=["0"], random_seed=0)),
    }


def step(layer: nn.Module, x: Tensor, gradient: Tensor) -> float:
    """Return the seconds of one forward and backward."""
    x.grad = None
    for parameter in layer.parameters():
        parameter.grad = None
    synchronise(x)
    start = time.perf_counter()
    # PEFT's SHiRA asks for the sparse form of its gradient only implicitly; autograd handles it.
    layer(x).backward(gradient)
    synchronise(x)
    return time.perf_counter() - start


def synchronise(x: Tensor) -> None:
    """Wait for a GPU."""
    if x.device.type == "cuda":
        torch.cuda.synchronize()


def measure(args: argparse.Namespace) -> dict[str, object]:
    """Return the ratios of every layer to the frozen one."""
    torch.manual_seed(0)
    torch.set_num_threads(args.threads)
    dtype = getattr(torch, args.dtype)
    makers = {"frozen": lambda base: base, **ours(args.width), **theirs(args.width)}
    layers = {}
    for name, make in makers.items():
        base = nn.Linear(args.width, 3 * args.width).requires_grad_(False)
        layers[name] = make(base).to(device=args.device, dtype=dtype)
        for path, parameter in layers[name].named_parameters():
            mine = path.startswith("adapter.") or "base_layer" not in path
            parameter.requires_grad_(mine and path not in ("weight", "bias"))
    shape = (args.batch, args.tokens)
    x = torch.randn(*shape, args.width, device=args.device, dtype=dtype).requires_grad_()
    gradient = torch.randn(*shape, 3 * args.width, device=args.device, dtype=dtype)
    seconds: dict[str, list[float]] = {name: [] for name in layers}
    for turn in range(args.rounds + 2):
        for name, layer in layers.items():
            spent = step(layer, x, gradient)
            if turn >= 2:  # two rounds to warm up
                seconds[name].append(spent)
    result: dict[str, object] = {}
    for name, spent in seconds.items():
        ratios = [a / b for a, b in zip(spent, seconds["frozen"], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        result[name] = {
            "ratio": round(middle, 3),
            "low": round(low, 3),
            "high": round(high, 3),
            "milliseconds": round(1e3 * statistics.median(spent), 3),
            "trained": sum(p.numel() for p in layers[name].parameters() if p.requires_grad),
        }
    return result


def main() -> None:
    """Parse, measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--width", type=int, default=384, help="d; 384 is ViT-S, 768 ViT-B")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=197)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--out", type=Path, help="JSON file to write")
    args = parser.parse_args()
    layers = measure(args)
    for name, row in layers.items():
        assert isinstance(row, dict)
        print(
            f"{name:16} {row['ratio']:6.3f} ({row['low']:.3f}-{row['high']:.3f})"
            f" {row['milliseconds']:9.2f} ms  {row['trained']:,} trained"
        )
    setting = {k: v for k, v in vars(args).items() if k != "out"}
    machine = {"torch": torch.__version__, "processor": platform.processor() or platform.machine()}
    if args.out:
        content = {"setting": setting, "machine": machine, "layers": layers}
        args.out.write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main()
