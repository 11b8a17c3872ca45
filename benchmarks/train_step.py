"""What a training step costs with each method: time and peak memory, as ratios with spread.

    python benchmarks/train_step.py --out benchmarks/results/train_step_cpu.json

One process per method, so that each has a peak memory of its own. The processes wait for their
turn: in every round each takes a few steps, in a new order, so that a drifting machine treats all
alike. So that they fit in memory, candidates run in groups, each with our LoRA and the floor in it.
A step is forward, cross-entropy, backward, AdamW, zero_grad. Reported are the ratios of a
method to our LoRA and to the floor (a frozen trunk with a gradient for its input) within a round:
median and the middle 80 %. Peak memory is what steps add to a process at rest with its model (CPU),
or what the device holds at the most (GPU). On a CPU this takes ViT-S/16 at 224 px; with a GPU,
ViT-B/16 in bf16.
"""

from __future__ import annotations

import argparse
import multiprocessing
import platform
import random
import sys
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from timing import keep, ratio, spread, synchronise, verdict, wanted_lines
from torch import Tensor, nn

import wara
from wara.adapters import method_from_options
from wara.adapters.base import adapted_layers

TARGETS = r"blocks\.\d+\.attn\.(qkv|proj)"
OURS: dict[str, dict[str, Any]] = {
    "linear_probe": {"method": "linear_probe"},
    "lora": {"method": "lora", "rank": 4},
    "wara": {"method": "wara", "rank": 4},
    "tiny_wara": {"method": "tiny_wara"},
    "waveft": {"method": "waveft"},
    "shira": {"method": "shira"},
    "vera": {"method": "vera"},
    "adalora": {"method": "adalora"},
    "loha": {"method": "loha"},
    "lokr": {"method": "lokr"},
    "fourierft": {"method": "fourierft"},
    "dora": {"method": "dora"},
    "rank_conv": {"method": "rank_conv", "rank": 4},
    "adaptformer": {"method": "adaptformer", "budget": "lora_r4"},
    "convpass": {"method": "convpass", "budget": "lora_r4"},
    "vpt": {"method": "vpt", "budget": "lora_r4"},
    "fact_tt": {"method": "fact_tt", "budget": "lora_r4"},
    "apla": {"method": "apla", "budget": "lora_r4"},
    "ssf": {"method": "ssf"},
    "bitfit": {"method": "bitfit"},
    "ln_tuning": {"method": "ln_tuning"},
    "full": {"method": "full"},
}
# What is measured at the same time; those that are compared with each other are in one group.
ALWAYS = ["floor", "lora"]
GROUPS = [
    ["lora (PEFT)", "wara", "tiny_wara", "waveft", "waveft (PEFT)", "shira", "shira (PEFT)"],
    ["linear_probe", "bitfit", "ln_tuning", "full", "wara step by step"],
    ["vera", "adalora", "loha", "lokr", "fourierft", "dora"],
    ["rank_conv", "adaptformer", "convpass", "vpt", "fact_tt", "apla", "ssf"],
]
METHODS = [*ALWAYS, *(name for group in GROUPS for name in group)]
# What is wanted: label, numerator, denominator, bound, and whether the bound is an upper one.
WANTED = [
    ("WaRA at most 1.05 x our LoRA", "wara", "lora", 1.05, True),
    ("WaRA no slower than PEFT's LoRA", "wara", "lora (PEFT)", 1.0, True),
    ("WaveFT at most 1.10 x our LoRA", "waveft", "lora", 1.10, True),
    ("PEFT's WaveFT at least 1.5 x ours", "waveft (PEFT)", "waveft", 1.5, False),
]


def build(name: str, backbone: str, size: int | None) -> tuple[nn.Module, list[nn.Parameter]]:
    """Return the model of a candidate and what it trains; all start from the same base weights."""
    torch.manual_seed(0)
    options = {} if size is None else {"img_size": size}
    model: Any = timm.create_model(backbone, num_classes=10, **options)
    torch.manual_seed(1)
    if name == "floor":
        model.requires_grad_(False)
        return model, []
    if name.endswith("(PEFT)"):
        return with_peft(model, name)
    steps = name == "wara step by step"
    wanted = dict(OURS["wara" if steps else name])
    wara.adapt(model, method_from_options(wanted.pop("method"), wanted))
    if steps:
        _step_by_step(model)
    return model, [p for p in model.parameters() if p.requires_grad]


def with_peft(model: Any, name: str) -> tuple[nn.Module, list[nn.Parameter]]:
    """PEFT's own layers on the whole linear layers, with as many numbers as ours have there."""
    import peft

    width = model.embed_dim
    if name.startswith("lora"):
        # One pair on the fused layer where ours has three: rank 4 on q, k, v is rank 6 on qkv.
        ranks = {r".*qkv": 6}
        config = peft.LoraConfig(r=4, lora_alpha=4, target_modules=TARGETS, rank_pattern=ranks)
    elif name.startswith("waveft"):
        config = peft.WaveFTConfig(n_frequency=4 * width, target_modules=TARGETS)
    else:
        config = peft.ShiraConfig(r=1, target_modules=TARGETS)
    model = peft.inject_adapter_in_model(config, model)
    model.get_classifier().requires_grad_(True)
    return model, [p for p in model.parameters() if p.requires_grad]


def _step_by_step(model: Any) -> None:
    """Replace every WaRA layer by the form in full width, subband by subband."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
    from oracles import StepByStepWaRA

    grid, prefix = model.patch_embed.grid_size, model.num_prefix_tokens
    for name, layer in adapted_layers(model).items():
        adapter: Any = layer.adapter
        parts = [
            StepByStepWaRA(None, down, up, core, grid, prefix)
            for down, up, core in zip(
                adapter.down.detach().split(adapter.rank),
                adapter.up.detach().split(adapter.sizes),
                adapter.full_cores().detach(),
                strict=True,
            )
        ]
        model.set_submodule(name, Stepped(layer.base, parts))


class Stepped(nn.Module):
    """A frozen linear layer with one step-by-step adapter per row group."""

    def __init__(self, base: nn.Linear, parts: list[Any]) -> None:
        super().__init__()
        self.base, self.parts = base, nn.ModuleList(parts)

    def forward(self, x: Tensor) -> Tensor:
        """Return `[b, n, o]`."""
        return self.base(x) + torch.cat([part.update(x) for part in self.parts], dim=-1)


def work(pipe: Connection, name: str, args: argparse.Namespace, size: int | None) -> None:
    """Take steps when told to, and answer with seconds per step; a process of its own."""
    torch.set_num_threads(args.threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, parameters = build(name, args.model, size)
    model.to(device).train()
    side = model.patch_embed.img_size
    x = torch.randn(args.batch, 3, *side, device=device, requires_grad=name == "floor")
    labels = torch.randint(0, 10, (args.batch,), device=device)
    optimiser = torch.optim.AdamW(parameters, lr=1e-4) if parameters else None

    def step() -> None:
        with torch.autocast(device, torch.bfloat16, enabled=args.amp == "bf16"):
            logits = model(x)
        nn.functional.cross_entropy(logits.float(), labels).backward()
        if optimiser is None:
            x.grad = None
        else:
            optimiser.step()
            optimiser.zero_grad()

    at_rest = 0.0
    if device == "cpu":
        # The most that was held until now, by loading and by the parent, does not count (Linux).
        Path("/proc/self/clear_refs").write_text("5")
        at_rest = resident_mb("VmRSS")
    for _ in range(2):
        step()
    counts = sum(p.numel() for p in parameters)
    pipe.send({"trainable": counts})
    while pipe.recv():
        if device == "cuda":
            step()  # takes back the memory that it gave up after its last turn
        synchronise()
        start = time.perf_counter()
        for _ in range(args.steps):
            step()
        synchronise()
        pipe.send((time.perf_counter() - start) / args.steps)
        if device == "cuda":
            torch.cuda.empty_cache()  # the others of the group need the device, too
    if device == "cuda":
        peak = torch.cuda.max_memory_allocated() / 2**20
    else:
        # What training adds: libraries that a method imports are not its working memory.
        peak = resident_mb("VmHWM") - at_rest
    pipe.send(peak)


def resident_mb(which: str) -> float:
    """Return the memory this process holds now (`VmRSS`) or held at most (`VmHWM`), in MiB."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[which].split()[0]) / 2**10


def measure(args: argparse.Namespace, size: int | None) -> dict[str, Any]:
    """Run all candidates, group by group, and return the figures."""
    result: dict[str, Any] = {"rows": {}, "wanted": []}
    for group in GROUPS:
        chosen = [name for name in group if name in args.methods]
        if chosen:
            found = measure_group([*ALWAYS, *chosen], args, size)
            # LoRA and the floor keep the figures of the first group.
            result["rows"] = {**found["rows"], **result["rows"]}
            result["wanted"] += found["wanted"]
    order = [name for name in METHODS if name in result["rows"]]
    return {**result, "rows": {name: result["rows"][name] for name in order}}


def measure_group(group: list[str], args: argparse.Namespace, size: int | None) -> dict[str, Any]:
    """Run the candidates of a group in rounds and return the figures."""
    context = multiprocessing.get_context("spawn")
    pipes, workers, counts = {}, {}, {}
    for name in group:
        here, there = context.Pipe()
        worker = context.Process(target=work, args=(there, name, args, size), daemon=True)
        worker.start()
        there.close()
        # One after the other: building all at once would thrash a small machine.
        counts[name] = here.recv()["trainable"]
        pipes[name], workers[name] = here, worker
        print(f"ready: {name}, {counts[name]:,} trainable", flush=True)
    order, names = random.Random(0), list(group)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(args.rounds):
        order.shuffle(names)
        for name in names:
            pipes[name].send(True)
            seconds[name].append(pipes[name].recv())
    peaks = {}
    for name in group:
        pipes[name].send(False)
        peaks[name] = pipes[name].recv()
        workers[name].join()
    times = {name: np.array(values) for name, values in seconds.items()}
    rows = {}
    for name in group:
        rows[name] = {
            "trainable": counts[name],
            "seconds": round(float(np.median(times[name])), 4),
            "time / lora": ratio(times[name], times["lora"]),
            "time / floor": ratio(times[name], times["floor"]),
            "peak_mb": round(peaks[name], 1),
        }
    return {"rows": rows, "wanted": verdicts(times, peaks)}


def verdicts(times: dict[str, np.ndarray], peaks: dict[str, float]) -> list[dict[str, Any]]:
    """Return what was wanted, what was measured, and whether it was reached."""
    found: list[dict[str, Any]] = []
    for label, top, bottom, bound, at_most in WANTED:
        if top in times and bottom in times:
            found.append(verdict(label, times[top], times[bottom], bound, at_most))
    if "lora (PEFT)" in peaks:
        for name in ("lora", "wara", "tiny_wara", "waveft", "shira"):
            if name in peaks:
                got = round(peaks[name] / peaks["lora (PEFT)"], 3)
                label = f"peak memory of {name} no higher than PEFT's LoRA"
                found.append({"wanted": label, "got": got, "reached": bool(got <= 1.0)})
    return found


def table(result: dict[str, Any]) -> str:
    """Return the figures as a Markdown table."""
    lines = [
        "| method | trainable | ms per step | time / our LoRA | time / floor | peak MB |",
        "|---|---|---|---|---|---|",
    ]
    for name, row in result["rows"].items():
        lines.append(
            f"| {name} | {row['trainable']:,} | {1e3 * row['seconds']:.0f} | "
            f"{spread(row['time / lora'])} | {spread(row['time / floor'])} | {row['peak_mb']:.0f} |"
        )
    return "\n".join([*lines, "", *wanted_lines(result["wanted"])])


def main() -> None:
    """Measure, print the table, write the figures."""
    gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument(
        "--model", default="vit_base_patch16_224" if gpu else "vit_small_patch16_224"
    )
    parser.add_argument("--sizes", type=int, nargs="+", default=[224, 512] if gpu else [224])
    parser.add_argument("--batch", type=int, default=64 if gpu else 8)
    parser.add_argument("--amp", default="bf16" if gpu else "off", choices=["bf16", "off"])
    parser.add_argument("--steps", type=int, default=5 if gpu else 1, help="steps per turn")
    parser.add_argument("--rounds", type=int, default=30 if gpu else 12)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--methods", nargs="+", default=METHODS[2:], choices=METHODS)
    args = parser.parse_args()
    results: dict[str, Any] = {
        "setting": {**{k: v for k, v in vars(args).items() if k != "out"}, "gpu": gpu},
        "machine": torch.cuda.get_device_name() if gpu else platform.machine(),
        "torch": torch.__version__,
    }
    for size in args.sizes:
        results[f"{size} px"] = measure(args, size)
        print(f"\n{size} px\n\n{table(results[f'{size} px'])}\n", flush=True)
    keep(results, args.out)


if __name__ == "__main__":
    main()
