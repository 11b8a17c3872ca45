"""The adapter folder as an artefact: what was changed, or does not fit, never reaches a model."""

from __future__ import annotations

import copy
import functools
import json
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from oracles import reseal
from safetensors.torch import load, save
from timm.models.vision_transformer import VisionTransformer
from torch import nn

import wara
from wara.adapters import adapter_state_dict, read_adapter
from wara.errors import WaraError

CLASSES = ["none", "mild", "severe"]
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def vit(**options: Any) -> VisionTransformer:
    torch.manual_seed(0)
    sizes = {"img_size": 48, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 2}
    return VisionTransformer(**{**sizes, "num_classes": 3, **options}).eval()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    model = wara.adapt(vit(), wara.WaRA(rank=2))
    with torch.no_grad():
        for parameter in wara.trainable_parameters(model).values():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return wara.save_adapter(model, tmp_path / "adapter", classes=CLASSES, task="multiclass")


def refused(model: nn.Module, folder: Path, **options: Any) -> WaraError:
    """Load, expect a refusal of kind artefact, and a model that is left as it was."""
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    kinds = [type(module) for module in model.modules()]
    with pytest.raises(WaraError) as caught:
        wara.load_adapter(model, folder, **options)
    assert caught.value.kind == "artefact", caught.value
    assert str(caught.value).count("\n") == 0 and caught.value.remedy
    assert [type(module) for module in model.modules()] == kinds
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    return caught.value


def test_every_bit_flip_is_refused(folder: Path) -> None:
    model, rng = vit(), random.Random(7)
    for name in (CONFIG, WEIGHTS):
        intact = (folder / name).read_bytes()
        for _ in range(150):
            damaged = bytearray(intact)
            damaged[rng.randrange(len(damaged))] ^= 1 << rng.randrange(8)
            (folder / name).write_bytes(damaged)
            refused(model, folder)
        (folder / name).write_bytes(intact)
    wara.load_adapter(model, folder)


def test_half_of_an_older_adapter_is_refused(folder: Path, tmp_path: Path) -> None:
    other = wara.save_adapter(wara.adapt(vit(), wara.WaRA(rank=2)), tmp_path / "other")
    for name in (CONFIG, WEIGHTS):
        intact = (folder / name).read_bytes()
        (folder / name).write_bytes((other / name).read_bytes())
        refused(vit(), folder)
        (folder / name).write_bytes(intact)


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    state = load((folder / WEIGHTS).read_bytes())
    change(state)
    (folder / WEIGHTS).write_bytes(save(state))
    reseal(folder, lambda config: None)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_are_refused(folder: Path, value: float) -> None:
    rewrite(folder, lambda state: state["head.weight"].view(-1)[3:4].fill_(value))
    assert "not finite, in head.weight" in refused(vit(), folder).what


def test_another_type_is_refused(folder: Path) -> None:
    rewrite(folder, lambda state: state.update({"head.bias": state["head.bias"].half()}))
    assert "wrong type head.bias" in refused(vit(), folder).where


def test_missing_and_foreign_tensors_are_refused(folder: Path) -> None:
    rewrite(folder, lambda state: state.pop("head.bias"))
    assert "missing head.bias" in refused(vit(), folder).where
    rewrite(folder, lambda state: state.update({"head.bias": torch.zeros(3), "x": torch.ones(1)}))
    assert "unknown x" in refused(vit(), folder).where


def test_classes_in_another_order_are_refused(folder: Path) -> None:
    content = json.loads((folder / CONFIG).read_text())
    assert content["classes"] == CLASSES == read_adapter(folder).classes
    assert "classes are" in refused(vit(), folder, classes=CLASSES[::-1]).what
    (folder / CONFIG).write_text(json.dumps(content | {"classes": CLASSES[::-1]}))
    assert "checksum" in refused(vit(), folder).what
    with pytest.raises(WaraError, match="2 class names for a head with 3"):
        wara.save_adapter(wara.adapt(vit(), wara.LoRA()), folder, classes=CLASSES[:2])


@pytest.mark.parametrize(
    "options",
    [
        {"num_heads": 4},
        {"global_pool": "avg"},
        {"norm_layer": functools.partial(nn.LayerNorm, eps=1e-5)},
        {"act_layer": nn.ReLU},
        {"reg_tokens": 2},
        {"depth": 3},
        {"img_size": 64},
        {"patch_size": 4, "img_size": 24},
        {"pre_norm": True},
        {"init_values": 1.0},
    ],
    ids=lambda options: next(iter(options)),
)
def test_another_base_is_refused(folder: Path, options: dict[str, Any]) -> None:
    base = vit()
    other = vit(**options)
    # The same numbers wherever there are any: only what is done with them differs.
    own = base.state_dict()
    fitting = {k: v for k, v in other.state_dict().items() if k in own and own[k].shape == v.shape}
    other.load_state_dict({**other.state_dict(), **{name: own[name] for name in fitting}})
    refused(other, folder)


def test_a_changed_value_or_buffer_of_the_base_is_refused(folder: Path) -> None:
    model = vit()
    with torch.no_grad():
        model.blocks[1].mlp.fc1.bias[5] += 1e-6
    refused(model, folder)
    swin = timm.create_model("test_vit", num_classes=3)
    swin.register_buffer("scale_index", torch.arange(4))
    wara.save_adapter(wara.adapt(swin, wara.LoRA()), folder)
    other = timm.create_model("test_vit", num_classes=3)
    other.load_state_dict({k: v for k, v in wara.unload(swin).state_dict().items()
                           if k != "scale_index"})  # fmt: skip
    other.register_buffer("scale_index", torch.arange(4).flip(0))
    refused(other, folder)


HOSTILE: dict[str, Callable[[dict[str, Any]], Any]] = {
    "rank": lambda config: config["options"].update(rank=10**12),
    "a rank within bounds": lambda config: config["options"].update(rank=4096),
    "level": lambda config: config["options"].update(level=10**9),
    "a number beyond floats": lambda config: config["options"].update(alpha=10**400),
    "blocks": lambda config: config["options"].update(blocks=list(range(10**5))),
    "targets": lambda config: config["options"].update(targets=["*" * 300 + "x"] * 50),
    "classes": lambda config: config.update(num_classes=1_000_000),
    "more classes": lambda config: config.update(num_classes=10**12),
    "another method": lambda config: config.update(method="lora", options={"rank": 2}),
    "no method": lambda config: config.update(method="os:system", options={}),
    "coefficients": lambda config: config.update(
        method="tiny_wara", options={"rank": 48, "coefficients": 1_000_000}
    ),
    "places": lambda config: config.update(method="waveft", options={"k": 10**15}),
    "random matrices": lambda config: config.update(method="vera", options={"rank": 10**9}),
    "a million rows": lambda config: config.update(method="vera", options={"rank": 1_000_000}),
    "kind": lambda config: config.update(options=[1]),
    "hash": lambda config: config.update(base_sha256="0" * 64),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_descriptions_are_refused(folder: Path, name: str) -> None:
    reseal(folder, HOSTILE[name])
    refused(vit(), folder)


@pytest.mark.parametrize(
    "text",
    [
        "[" * 100_000 + "]" * 100_000,
        '{"a":' * 50_000 + "1" + "}" * 50_000,
        '{"format": "wara-adapter", "version": ' + "9" * 100_000 + "}",
        '{"format": "wara-adapter", "version": 1}',
        '{"format": "wara-adapter", "version": 2, "version": 2}',
        '{"format": "wara-adapter", "version": 2, "options": {"alpha": NaN}}',
        "{}",
        "null",
        "\ud800".encode("utf-16", "surrogatepass").decode("latin-1"),
        " " * (1 << 23),
    ],
    ids=lambda text: text[:12],
)
def test_other_json_is_refused(folder: Path, text: str) -> None:
    (folder / CONFIG).write_text(text, encoding="utf-8")
    refused(vit(), folder)


MEASURE = """
import resource, sys, time
import torch, wara
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from test_artefact import HOSTILE, vit
from oracles import reseal
from wara.errors import WaraError
folder = Path(sys.argv[2])
model = vit()
intact = (folder / "adapter_config.json").read_bytes()
try: import peft  # as the first of its methods would; that is no part of a refusal
except ImportError: pass
for name, change in HOSTILE.items():
    (folder / "adapter_config.json").write_bytes(intact)
    reseal(folder, change)
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    kind = "loaded"
    try: wara.load_adapter(model, folder)
    except WaraError as error: kind = error.kind
    spent = time.process_time() - start
    taken = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    print(f"{name}|{kind}|{spent:.2f}|{taken:.0f}")
"""


@pytest.mark.slow
def test_a_refusal_takes_little(folder: Path) -> None:
    """Peak memory in a process of its own; processor time as a bound against hangs, not a speed."""
    root = Path(__file__).resolve().parents[1]
    command = [sys.executable, "-c", MEASURE, str(root / "tests"), str(folder)]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    rows = [line.split("|") for line in done.stdout.splitlines()]
    assert {row[0] for row in rows} == set(HOSTILE)
    for name, kind, seconds, megabytes in rows:
        assert kind == "artefact", name
        assert float(seconds) < 5 and float(megabytes) < 500, (name, seconds, megabytes)


def test_an_adapter_of_a_compiled_model_loads(tmp_path: Path) -> None:
    torch._dynamo.reset()
    for kind in ("whole", "block"):
        model = wara.adapt(vit(), wara.WaRA(rank=2)).eval()
        with torch.no_grad():
            for parameter in wara.trainable_parameters(model).values():
                parameter.add_(0.1 * torch.randn_like(parameter))
        wanted = adapter_state_dict(model)
        x = torch.randn(2, 3, 48, 48)
        with torch.no_grad():
            logits = model(x)
        if kind == "whole":
            saved: Any = torch.compile(model, backend="eager")
        else:
            model.blocks[1] = torch.compile(model.blocks[1], backend="eager")
            saved = model
        folder = wara.save_adapter(saved, tmp_path / kind)
        assert not any("_orig_mod" in name for name in load((folder / WEIGHTS).read_bytes()))
        loaded = wara.load_adapter(vit(), folder)
        assert adapter_state_dict(loaded).keys() == wanted.keys()
        with torch.no_grad():
            assert torch.equal(loaded(x), logits)
        # And onto a compiled base, from which it is taken off again.
        base = torch.compile(vit(), backend="eager")
        wara.load_adapter(base, folder)
        with torch.no_grad():
            torch.testing.assert_close(base(x), logits)
        wara.unload(base)
        merged = wara.merge(wara.adapt(base, wara.LoRA()))
        assert type(merged) is VisionTransformer


def test_loading_draws_and_decomposes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = wara.adapt(vit(), wara.TinyWaRA(rank=4))
    tiny = wara.save_adapter(model, tmp_path / "tiny")
    sparse = wara.save_adapter(wara.adapt(vit(), wara.WaveFT()), tmp_path / "sparse")
    bases = [vit(), vit()]

    def never(*args: Any, **__: Any) -> Any:
        if not (args and isinstance(args[0], torch.Tensor) and args[0].is_meta):
            raise AssertionError("called while loading")

    monkeypatch.setattr(torch.linalg, "svd", never)
    monkeypatch.setattr(torch, "randn", never)
    monkeypatch.setattr(torch, "randperm", never)
    monkeypatch.setattr(nn.init, "kaiming_uniform_", never)
    loaded = wara.load_adapter(bases[0], tiny)
    for name, tensor in adapter_state_dict(model).items():
        assert torch.equal(tensor, adapter_state_dict(loaded)[name])
    wara.load_adapter(bases[1], sparse)


@pytest.mark.parametrize("first", [wara.LoRA(), wara.TinyWaRA(rank=4), None])
def test_a_failed_load_gives_back_the_very_same_model(folder: Path, first: Any) -> None:
    model = vit(num_heads=4)
    if first is not None:
        wara.adapt(model, first)
    before = dict(model.named_parameters())
    grads = {name: p.requires_grad for name, p in before.items()}
    with pytest.raises(WaraError):
        wara.load_adapter(model, folder)
    after = dict(model.named_parameters())
    assert before.keys() == after.keys()
    assert all(after[name] is parameter for name, parameter in before.items())
    assert grads == {name: p.requires_grad for name, p in after.items()}
    other = wara.save_adapter(wara.adapt(vit(num_classes=7), wara.Full()), folder.parent / "full")
    head = model.head
    refusing = copy.deepcopy(model)
    with pytest.raises(WaraError):
        wara.load_adapter(refusing, other)
    assert model.head is head and refusing.num_classes == 3
    if first is None:
        wara.adapt(refusing, wara.LoRA())  # not stuck
