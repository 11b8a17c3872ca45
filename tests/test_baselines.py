"""Baselines: PEFT's numbers through our functions, stored randomness, real rank allocation."""

from __future__ import annotations

import copy
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from oracles import option_faults, reseal
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from training_helpers import tiny_config

import wara
from wara.adapters import (
    METHODS,
    adapter_state_dict,
    base_hash,
    count_parameters,
    load_adapter_state,
    method_from_options,
)
from wara.adapters.base import AdapterLayer, Method, adapted_layers
from wara.adapters.baselines import AdaLoRA
from wara.adapters.state import ADAPTATION
from wara.errors import WaraError
from wara.signals import Stopped
from wara.training.checkpoint import load_checkpoint
from wara.training.start import run
from wara.training.task import FineTuning

peft = pytest.importorskip("peft")

SMALL: dict[str, dict[str, Any]] = {
    "dora": {"rank": 3, "alpha": 6.0},
    "adalora": {"rank": 2, "init_rank": 3, "alpha": 5.0},
    "vera": {"rank": 8, "d_initial": 0.2},
    "loha": {"rank": 2, "alpha": 3.0},
    "lokr": {"rank": 2, "decompose_factor": 4},
    "fourierft": {"n_frequency": 50, "seed": 3},
}
PARTS = ("bitfit", "ln_tuning")
# What PEFT calls the same options.
THEIRS: dict[str, Any] = {
    "dora": lambda: peft.LoraConfig(r=3, lora_alpha=6, use_dora=True),
    "adalora": lambda: peft.AdaLoraConfig(init_r=3, target_r=2, lora_alpha=5, total_step=9),
    "vera": lambda: peft.VeraConfig(r=8, d_initial=0.2, projection_prng_key=0),
    "loha": lambda: peft.LoHaConfig(r=2, alpha=3),
    "lokr": lambda: peft.LoKrConfig(r=2, alpha=2, decompose_factor=4),
    "fourierft": lambda: peft.FourierFTConfig(
        n_frequency=50, scaling=150.0, random_loc_seed=3, init_weights=True
    ),
}
WHOLE = ("qkv", "o", "fc1")
PATTERN = r"blocks\.\d+\.(attn\.(qkv|proj)|mlp\.fc1)"

each = pytest.mark.parametrize("name", SMALL)


def small_vit() -> VisionTransformer:
    torch.manual_seed(0)
    return VisionTransformer(
        img_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=2, num_classes=3
    ).eval()


def ranks_left(model: nn.Module) -> list[int]:
    layers: list[Any] = list(adapted_layers(model).values())
    tuners = [tuner for layer in layers for tuner in layer.adapter.tuners]
    return [int(tuner.lora_E["default"].count_nonzero()) for tuner in tuners]


def spec(name: str, **options: Any) -> Method:
    return method_from_options(name, {**SMALL.get(name, {}), **options})


def images() -> Tensor:
    torch.manual_seed(1)
    return torch.randn(3, 3, 32, 32)


def stir(model: nn.Module, amount: float = 0.1) -> None:
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in wara.trainable_parameters(model).values():
            parameter.add_(amount * torch.randn_like(parameter))


def pair(name: str, base: nn.Module) -> tuple[nn.Module, Any]:
    """Return `base` adapted by us, and by PEFT directly with the same numbers."""
    ours = wara.adapt(copy.deepcopy(base), spec(name, targets=list(WHOLE)))
    stir(ours)
    config = THEIRS[name]()
    config.target_modules = PATTERN
    theirs = peft.get_peft_model(copy.deepcopy(base), config)
    own = theirs.base_model.model
    own.head.load_state_dict(ours.head.state_dict())
    for path, layer in adapted_layers(ours).items():
        tuner: Any = layer.adapter.tuners[0]
        missing, unknown = own.get_submodule(path).load_state_dict(
            {k: v for k, v in tuner.state_dict().items() if not k.startswith("indices")},
            strict=False,
        )
        assert not unknown
        assert all(k.startswith(("base_layer.", "ranknum.")) for k in missing)
    return ours, theirs


@each
def test_numbers_and_gradients_are_those_of_peft_itself(name: str) -> None:
    base = small_vit()
    ours, theirs = pair(name, base)
    x = images()
    y, z = ours(x), theirs(x)
    torch.testing.assert_close(y, z, rtol=1e-6, atol=1e-6)
    assert (y - base(x)).abs().max() > 1e-3
    y.square().sum().backward()
    z.square().sum().backward()
    compared = 0
    for path, layer in adapted_layers(ours).items():
        tuner: Any = layer.adapter.tuners[0]
        own = theirs.base_model.model.get_submodule(path)
        for key, parameter in tuner.named_parameters():
            expected = own.get_parameter(key).grad
            torch.testing.assert_close(parameter.grad, expected, rtol=1e-4, atol=1e-5)
            compared += parameter.numel()
    assert compared == count_parameters(ours)["adapter"]
    merged = theirs.merge_and_unload()
    for path, weight in wara.merge(ours).state_dict().items():
        torch.testing.assert_close(weight, merged.state_dict()[path], rtol=1e-5, atol=1e-6)


@each
@pytest.mark.parametrize("targets", [("q", "k", "v"), ("k",), ("q", "v", "fc2")])
def test_parts_of_a_fused_layer_are_layers_of_their_own(name: str, targets: tuple[str]) -> None:
    model = small_vit()
    x = torch.randn(2, 5, 24)
    plain = model.blocks[0].attn.qkv
    wara.adapt(model, spec(name, targets=list(targets)))
    stir(model)
    layer: Any = model.blocks[0].attn.qkv
    rows = {label: (24 * i, 24 * i + 24) for i, label in enumerate("qkv")}
    expected = nn.functional.linear(x, plain.weight, plain.bias).clone()
    for tuner, label in zip(layer.adapter.tuners, [t for t in targets if t in rows], strict=True):
        alone = copy.deepcopy(tuner)
        alone.base_layer = nn.Linear(24, 24)
        alone.base_layer.weight = nn.Parameter(plain.weight[slice(*rows[label])].detach().clone())
        alone.base_layer.bias = nn.Parameter(plain.bias[slice(*rows[label])].detach().clone())
        expected[..., slice(*rows[label])] = alone(x)
    torch.testing.assert_close(layer(x), expected, rtol=1e-6, atol=1e-6)
    delta = layer.adapter.delta_weight()
    for label, (start, stop) in rows.items():
        assert bool(delta[start:stop].any()) == (label in targets)


@each
def test_the_base_is_lent_and_not_copied(name: str) -> None:
    model = small_vit()
    before = base_hash(model)
    held = {p.untyped_storage().data_ptr() for p in model.parameters()}
    wara.adapt(model, spec(name, targets=["q", "v"]))
    assert base_hash(model) == before
    layer: Any = model.blocks[0].attn.qkv
    lent = [tuner.base_layer for tuner in layer.adapter.tuners]
    assert all(not list(part.parameters()) and not list(part.buffers()) for part in lent)
    assert all(part.weight.untyped_storage().data_ptr() in held for part in lent)
    # A copy looks at its own weights, also after they were replaced.
    twin = copy.deepcopy(model)
    weights = twin.blocks[0].attn.qkv
    weights.weight = nn.Parameter(torch.zeros_like(weights.weight))
    assert not weights.adapter.tuners[0].base_layer.weight.any()
    assert lent[0].weight.any()
    largest = max(t.numel() for t in adapter_state_dict(model).values())
    assert largest < 24 * 72


@each
def test_saved_randomness_is_read_and_not_redrawn(name: str, tmp_path: Path) -> None:
    base = small_vit()
    model = wara.adapt(copy.deepcopy(base), spec(name))
    stir(model)
    expected = model(images())
    wara.save_adapter(model, tmp_path)
    if "seed" in json.loads((tmp_path / "adapter_config.json").read_text())["options"]:
        reseal(tmp_path, lambda config: config["options"].update(seed=12345))
    torch.manual_seed(99)
    loaded = wara.load_adapter(copy.deepcopy(base), tmp_path).eval()
    assert torch.equal(loaded(images()), expected)
    wara.unload(loaded)
    plain = copy.deepcopy(base)
    plain.head.load_state_dict(loaded.head.state_dict())
    assert torch.equal(loaded(images()), plain(images()))
    assert type(loaded.blocks[0].attn.qkv) is nn.Linear


def test_vera_shares_and_stores_its_projections_once() -> None:
    model = wara.adapt(small_vit(), spec("vera", targets=["q", "k", "v", "fc2"]))
    drawn = [k for k in adapter_state_dict(model) if "vera_A" in k or "vera_B" in k]
    assert len(drawn) == 2
    model.double()
    shared = {id(t) for k, t in model.named_buffers(remove_duplicate=False) if "vera_A" in k}
    assert len(shared) == 1
    state = {k: v.clone() for k, v in adapter_state_dict(model).items()}
    state[drawn[0]] += 1
    load_adapter_state(model, state)
    last: Any = model.blocks[1].attn.qkv
    assert torch.equal(last.adapter.tuners[2].vera_A["default"], state[drawn[0]])


@each
def test_merge_is_exact_in_double_precision(name: str) -> None:
    model = small_vit().double()
    x = images().double()
    start = model(x)
    wara.adapt(model, spec(name, targets=["q", "v", "o", "fc1"]))
    assert torch.allclose(model(x), start, rtol=0, atol=1e-12)
    stir(model)
    merged = wara.merge(model)
    assert not adapted_layers(merged)
    assert (merged(x) - model(x)).abs().max() < 1e-10
    assert (merged(x) - start).abs().max() > 1e-3


@each
def test_dropout_draws_and_deterministic_methods_do_not(name: str) -> None:
    model = wara.adapt(small_vit(), spec(name)).train()
    stir(model)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first = model(images())
    torch.set_rng_state(before)
    model(images())
    torch.manual_seed(0)
    images()
    undisturbed = torch.rand(1)
    torch.manual_seed(0)
    x = images()
    model(x)
    assert torch.equal(torch.rand(1), undisturbed)
    assert torch.equal(model(x), first)
    if "dropout" in {f for f in METHODS[name].__dataclass_fields__}:
        noisy = wara.adapt(small_vit(), spec(name, dropout=0.5)).train()
        stir(noisy)
        assert not torch.equal(noisy(x), noisy(x))
        assert torch.equal(noisy.eval()(x), noisy(x))


@pytest.mark.slow
@each
def test_compiled_in_one_graph(name: str) -> None:
    model = wara.adapt(small_vit(), spec(name, targets=["q", "v", "fc1"], blocks="last_1"))
    stir(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(images()), model(images()), rtol=1e-6, atol=1e-6)


@each
def test_bfloat16(name: str) -> None:
    model = wara.adapt(small_vit(), spec(name, targets=["q", "v", "fc1"]))
    stir(model, 0.02)
    exact = model(images())
    with torch.autocast("cpu", torch.bfloat16):
        close = model(images())
        close.float().sum().backward()
    assert (close - exact).abs().max() < 0.1
    assert all(p.grad is not None and p.grad.isfinite().all()
               for p in wara.trainable_parameters(model).values())  # fmt: skip


@each
def test_outside_timm(name: str) -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.keys, self.values = nn.Linear(12, 12), nn.Linear(12, 18)

        def forward(self, x: Tensor) -> Tensor:
            return self.values(self.keys(x))

    torch.manual_seed(0)
    model = nn.Sequential(Attention(), nn.Linear(18, 4)).eval()
    wara.adapt(model, spec(name, targets=["*.keys", "*.values"]))
    stir(model)
    x = torch.randn(5, 12)
    torch.testing.assert_close(wara.merge(model)(x), model(x), rtol=1e-5, atol=1e-5)
    assert len(adapted_layers(model)) == 2


# -- AdaLoRA --------------------------------------------------------------------------------


def adalora(**options: Any) -> AdaLoRA:
    defaults = {"rank": 2, "init_rank": 4, "tinit": 0.2, "tfinal": 0.3, "delta_t": 2}
    return AdaLoRA(**{**defaults, **options})


def train(
    model: Any, method: AdaLoRA, steps: range, total: int, optimiser: Any, log: list[int]
) -> None:
    for step in steps:
        torch.manual_seed(step)
        x, target = torch.randn(4, 3, 32, 32), torch.randint(3, (4,))
        loss = nn.functional.cross_entropy(model(x), target)
        penalty = method.penalty(model)
        optimiser.zero_grad()
        (loss if penalty is None else loss + penalty).backward()
        optimiser.step()
        method.on_step(model, step, total)
        log.append(sum(ranks_left(model)))


def test_adalora_takes_ranks_away_and_keeps_them_away() -> None:
    method = adalora(targets=("q", "v", "o"))
    model = wara.adapt(small_vit(), method)
    optimiser = torch.optim.AdamW(wara.trainable_parameters(model).values(), lr=1e-2)
    log: list[int] = []
    train(model, method, range(1, 21), 20, optimiser, log)
    matrices = 2 * 3
    # `e` starts at 0 and moves in the first step; ranks fall when they are allocated, in every
    # second step, and until the last allocation an optimiser step can bring them back.
    assert log[0] == log[4] == 4 * matrices
    falling = log[5:14:2]
    assert falling == sorted(falling, reverse=True) and len(set(falling)) > 2
    assert log[13:] == [2 * matrices] * 7
    left = ranks_left(model)
    assert len(set(left)) > 1, "an allocation that gives all the same moves nothing"
    # What is off stays off in the merged weight too.
    layer: Any = adapted_layers(model)["blocks.0.attn.proj"]
    assert torch.linalg.matrix_rank(layer.adapter.delta_weight(), rtol=1e-5) == left[1 + 1]


def test_adalora_allocates_as_peft_does() -> None:
    base = small_vit()
    method = adalora(targets=WHOLE, orth_reg_weight=0.0)
    ours = wara.adapt(copy.deepcopy(base), method)
    config = peft.AdaLoraConfig(
        init_r=4, target_r=2, lora_alpha=4, tinit=4, tfinal=6, deltaT=2, total_step=20,
        beta1=0.85, beta2=0.85, target_modules=PATTERN, modules_to_save=["head"],
    )  # fmt: skip
    theirs = peft.get_peft_model(copy.deepcopy(base), config)
    own: Any = theirs.base_model.model
    for path, layer in adapted_layers(ours).items():
        tuner: Any = layer.adapter.tuners[0]
        for part in ("lora_A", "lora_B", "lora_E"):
            mine = getattr(tuner, part)["default"]
            with torch.no_grad():
                getattr(own.get_submodule(path), part)["default"].copy_(mine)
    optimisers = [
        torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
        for model in (ours, theirs)
    ]
    for step in range(1, 21):
        torch.manual_seed(step)
        x, target = torch.randn(4, 3, 32, 32), torch.randint(3, (4,))
        for model, optimiser in zip((ours, theirs), optimisers, strict=True):
            optimiser.zero_grad()
            nn.functional.cross_entropy(model(x), target).backward()
            optimiser.step()
        method.on_step(ours, step, 20)
        theirs.base_model.update_and_allocate(step)
    for path, layer in adapted_layers(ours).items():
        mine = layer.adapter.tuners[0].lora_E["default"]
        expected = own.get_submodule(path).lora_E["default"]
        assert torch.equal(mine != 0, expected != 0)
        torch.testing.assert_close(mine, expected, rtol=1e-3, atol=1e-5)


def test_adalora_penalty_is_that_of_peft() -> None:
    class Plain(nn.Module):  # PEFT adds the term to what has a `loss`.
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(8, 6), nn.Linear(6, 5)

        def forward(self, x: Tensor) -> Any:
            class Output:
                loss = self.second(self.first(x)).sum() * 0

            return Output()

    torch.manual_seed(0)
    method = adalora(targets=("*first", "*second"), orth_reg_weight=0.7)
    ours = wara.adapt(Plain(), method)
    config = peft.AdaLoraConfig(
        init_r=4, target_r=2, total_step=9, orth_reg_weight=0.7, target_modules=["first", "second"]
    )
    theirs = peft.get_peft_model(Plain(), config)
    for path, layer in adapted_layers(ours).items():
        own: Any = theirs.base_model.model.get_submodule(path)
        for part in ("lora_A", "lora_B"):
            with torch.no_grad():
                getattr(own, part)["default"].copy_(
                    getattr(layer.adapter.tuners[0], part)["default"]
                )
    penalty = method.penalty(ours)
    assert penalty is not None
    # Not `theirs(…)`, which goes past the term.
    expected = theirs.base_model(torch.ones(1, 8)).loss
    torch.testing.assert_close(penalty, expected, rtol=1e-6, atol=1e-6)
    penalty.backward()
    weight: Any = ours.first
    assert weight.adapter.tuners[0].lora_A["default"].grad.any()
    assert adalora(orth_reg_weight=0.0).penalty(ours) is None
    assert wara.LoRA().penalty(ours) is None


@pytest.mark.parametrize("cut", [5, 12, 17])
def test_adalora_resumes_bit_exactly(cut: int) -> None:
    method = adalora(targets=("q", "v"))
    model = wara.adapt(small_vit(), method)
    optimiser = torch.optim.AdamW(wara.trainable_parameters(model).values(), lr=1e-2)
    log: list[int] = []
    train(model, method, range(1, cut + 1), 20, optimiser, log)
    state = {k: v.clone() for k, v in adapter_state_dict(model).items()}
    moments = copy.deepcopy(optimiser.state_dict())
    carried = {k: v.clone() for k, v in method.training_state(model).items()}
    assert carried
    train(model, method, range(cut + 1, 21), 20, optimiser, log)

    again = wara.adapt(small_vit(), method)
    load_adapter_state(again, state)
    method.load_training_state(again, carried)
    fresh = torch.optim.AdamW(wara.trainable_parameters(again).values(), lr=1e-2)
    fresh.load_state_dict(moments)
    train(again, method, range(cut + 1, 21), 20, fresh, [])
    for key, tensor in adapter_state_dict(model).items():
        assert torch.equal(tensor, adapter_state_dict(again)[key]), key


@pytest.mark.parametrize("total", [1, 2, 3, 7])
@pytest.mark.parametrize("shares", [(0.0, 0.0), (0.1, 0.3), (0.0, 0.95), (0.95, 0.0)])
def test_adalora_survives_short_trainings(total: int, shares: tuple[float, float]) -> None:
    method = adalora(targets=("q",), tinit=shares[0], tfinal=shares[1])
    model = wara.adapt(small_vit(), method)
    optimiser = torch.optim.AdamW(wara.trainable_parameters(model).values(), lr=1e-2)
    log: list[int] = []
    train(model, method, range(1, total + 1), total, optimiser, log)
    assert log[-1] == (4 if total < 2 else 2) * 2


def test_adalora_allocates_where_determinism_is_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    original, calls = torch.kthvalue, []

    def as_on_a_gpu(*args: Any, **kwargs: Any) -> Any:
        calls.append(0)
        if torch.are_deterministic_algorithms_enabled():
            raise RuntimeError("kthvalue CUDA does not have a deterministic implementation")
        return original(*args, **kwargs)

    monkeypatch.setattr(torch, "kthvalue", as_on_a_gpu)
    method = adalora(targets=("q",))
    model = wara.adapt(small_vit(), method)
    optimiser = torch.optim.AdamW(wara.trainable_parameters(model).values(), lr=1e-2)
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with pytest.raises(RuntimeError, match="deterministic"):
            torch.kthvalue(torch.ones(3), 1)
        train(model, method, range(1, 5), 4, optimiser, [])
        assert len(calls) > 1
        assert torch.are_deterministic_algorithms_enabled()
        assert torch.is_deterministic_algorithms_warn_only_enabled()
    finally:
        torch.use_deterministic_algorithms(False)


def test_a_run_moves_ranks_and_resumes_bit_exactly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("wara.runs.results._figures", lambda *_: None)
    adapter = {"method": "adalora", "rank": 2, "delta_t": 1, "dropout": 0.1, "tinit": 0.0}
    configs = [
        tiny_config(tmp_path, epochs=3, adapter=adapter, out=str(tmp_path / name))
        for name in ("whole", "cut")
    ]
    run(configs[0], quiet=True)
    last = load_checkpoint(tmp_path / "whole" / "checkpoints" / "last.ckpt")
    values = [t for key, t in last["state"].items() if "lora_E" in key]
    assert sum(int(t.count_nonzero()) for t in values) == 2 * len(values)
    assert len({int(t.count_nonzero()) for t in values}) > 1

    original, seen = FineTuning.training_step, []

    def step(self: FineTuning, *args: Any) -> Tensor:
        seen.append(0)
        if len(seen) == 8:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(FineTuning, "training_step", step)
        with pytest.raises(Stopped):
            run(configs[1], quiet=True)
    run(configs[1], resume=True, quiet=True)
    again = load_checkpoint(tmp_path / "cut" / "checkpoints" / "last.ckpt")
    for part in ("state", "method"):
        assert last[part].keys() == again[part].keys()
        for key, tensor in last[part].items():
            assert torch.equal(tensor, again[part][key]), key


# -- parts of the base ----------------------------------------------------------------------


@pytest.mark.parametrize("name", PARTS)
def test_exactly_the_named_part_trains(name: str) -> None:
    model = small_vit()
    everything = {n: p.shape for n, p in model.named_parameters() if not n.startswith("head.")}
    if name == "bitfit":
        wanted = {n for n in everything if n.endswith(".bias")}
    else:
        wanted = {n for n in everything if ".norm" in n or n.startswith("norm.")}
    wara.adapt(model, spec(name))
    assert set(wara.trainable_parameters(model)) == wanted | {"head.weight", "head.bias"}
    assert count_parameters(model)["adapter"] == sum(everything[n].numel() for n in wanted)


@pytest.mark.parametrize("name", PARTS)
def test_a_trained_part_is_plain_and_can_be_taken_back(name: str, tmp_path: Path) -> None:
    base = small_vit()
    model = wara.adapt(copy.deepcopy(base), spec(name))
    stir(model)
    merged = wara.merge(model)
    assert torch.equal(merged(images()), model(images()))
    assert not hasattr(merged, ADAPTATION)
    wara.save_adapter(model, tmp_path / "one")
    stir(model)
    wara.save_adapter(model, tmp_path / "two")
    expected = model(images())
    # Two adapters on one base, without building the base anew.
    other = wara.load_adapter(copy.deepcopy(base), tmp_path / "one")
    wara.load_adapter(other, tmp_path / "two")
    assert torch.equal(other(images()), expected)
    wara.unload(other)
    for key, tensor in base.state_dict().items():
        if not key.startswith("head."):
            assert torch.equal(tensor, other.state_dict()[key]), key


def test_bitfit_finds_the_biases_of_eva() -> None:
    model = Eva(img_size=32, patch_size=8, embed_dim=24, depth=1, num_heads=2, num_classes=3)
    names = set(wara.trainable_parameters(wara.adapt(model, spec("bitfit"))))
    assert {"blocks.0.attn.q_bias", "blocks.0.attn.v_bias"} <= names


def test_ln_tuning_finds_other_norms() -> None:
    model = nn.Sequential(nn.RMSNorm(4), timm.layers.RmsNorm(4), nn.Linear(4, 4))
    wara.adapt(model, spec("ln_tuning"))
    assert set(wara.trainable_parameters(model)) == {"0.weight", "1.weight"}


@pytest.mark.parametrize("name", PARTS)
def test_a_model_without_the_part_is_refused(name: str) -> None:
    model = nn.Sequential(nn.Linear(4, 4, bias=False))
    with pytest.raises(WaraError, match="no parameters of the kind") as caught:
        wara.adapt(model, spec(name))
    assert caught.value.exit_code == 2
    assert not hasattr(model, ADAPTATION)


# -- options and the missing extra ----------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "where"),
    [
        ({"method": "dora", "rank": 0}, "rank"),
        ({"method": "dora", "dropout": 1.0}, "dropout"),
        ({"method": "adalora", "rank": 4, "init_rank": 4}, "init_rank"),
        ({"method": "adalora", "tinit": 0.6, "tfinal": 0.4}, "tfinal"),
        ({"method": "adalora", "tinit": -0.1}, "tinit"),
        ({"method": "adalora", "delta_t": 0}, "delta_t"),
        ({"method": "adalora", "beta1": 1.0}, "beta1"),
        ({"method": "adalora", "orth_reg_weight": -1.0}, "orth_reg_weight"),
        ({"method": "vera", "d_initial": 0.0}, "d_initial"),
        ({"method": "loha", "alpha": -1.0}, "alpha"),
        ({"method": "lokr", "decompose_factor": 0}, "decompose_factor"),
        ({"method": "fourierft", "n_frequency": 0}, "n_frequency"),
        ({"method": "fourierft", "init": "zeros"}, "init"),
        ({"method": "bitfit", "rank": 4}, "rank"),
        ({"method": "lokr", "targets": ["qq"]}, "targets"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, Any], where: str) -> None:
    faults = option_faults(options)
    assert [fault.where for fault in faults] == [f"adapter.{where}"]
    assert all(fault.kind == "config" and fault.remedy for fault in faults)


def test_more_coefficients_than_entries_are_refused() -> None:
    with pytest.raises(WaraError, match="a matrix has 576 entries; .*; set at most 576"):
        wara.adapt(small_vit(), spec("fourierft", n_frequency=577))
    wara.adapt(small_vit(), spec("fourierft", n_frequency=576, targets=["k"]))


@each
def test_missing_extra_is_told_with_the_install_line(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    model = small_vit()
    with pytest.raises(WaraError, match=r"pip install 'wara\[baselines\]'") as caught:
        wara.adapt(model, spec(name))
    assert caught.value.exit_code == 2
    assert not hasattr(model, ADAPTATION)
    assert not any(isinstance(module, AdapterLayer) for module in model.modules())


@pytest.mark.slow
def test_peft_is_imported_only_when_used() -> None:
    code = (
        "import sys, timm, wara; from wara.adapters import METHODS\n"
        "m = wara.adapt(timm.create_model('test_vit'), METHODS['lora']())\n"
        "METHODS['vera'](); wara.adapt(timm.create_model('test_vit'), METHODS['bitfit']())\n"
        "assert 'peft' not in sys.modules and 'transformers' not in sys.modules"
    )
    root = Path(wara.__file__).resolve().parents[1]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
