"""Equal budgets: formulas against counted models, the nearest setting, honest refusals."""

from __future__ import annotations

import copy
import importlib.util
import json
import re
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from oracles import option_faults
from timm.models.vision_transformer import VisionTransformer
from torch import nn

import wara
from wara.adapters import METHODS, adaptation_of, count_parameters, method_from_options
from wara.adapters.budget import fit, size_of
from wara.adapters.targets import TargetedMethod, parse_budget
from wara.errors import WaraError

THROUGH_PEFT = {"dora", "adalora", "vera", "loha", "lokr", "fourierft"}
SIZED = [name for name, method in METHODS.items() if method.knob]
FIXED = {"linear_probe", "full", "bitfit", "ln_tuning", "ssf"}
TARGETED = [name for name in SIZED if issubclass(METHODS[name], TargetedMethod)]
needs = {
    name: pytest.mark.skipif(
        name in THROUGH_PEFT and importlib.util.find_spec("peft") is None, reason="needs PEFT"
    )
    for name in METHODS
}
each = pytest.mark.parametrize("name", [pytest.param(n, marks=needs[n]) for n in SIZED])
each_targeted = pytest.mark.parametrize(
    "name", [pytest.param(n, marks=needs[n]) for n in TARGETED]
)


def small_vit(**options: Any) -> VisionTransformer:
    torch.manual_seed(0)
    defaults: dict[str, Any] = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2}
    return VisionTransformer(**{**defaults, "num_heads": 2, "num_classes": 3, **options})


def adapter_size(model: nn.Module, method: Any) -> int:
    return count_parameters(wara.adapt(copy.deepcopy(model), method))["adapter"]


def lora_size(model: nn.Module, rank: int, **options: Any) -> int:
    return adapter_size(model, wara.LoRA(rank=rank, **options))


@pytest.mark.parametrize(
    ("text", "multiple"),
    [
        ("lora_r1", 1), ("lora_r4", 4), ("0.8*lora_r1", 0.8), (" 1.5 * lora_r2 ", 3),
        (".5*lora_r1", 0.5), ("2*lora_r3", 6), ("2.*lora_r1", 2),
    ],
)  # fmt: skip
def test_grammar(text: str, multiple: float) -> None:
    assert parse_budget(text) == pytest.approx(multiple)
    assert option_faults({"method": "wara", "budget": text}) == []


@pytest.mark.parametrize(
    "text", ["lora", "lora_r", "lora_r0", "0*lora_r1", "-1*lora_r1", "lora_r1.5", "vera_r4", "",
             "1e3*lora_r1", "lora_r4*2"]
)  # fmt: skip
def test_anything_else_is_refused(text: str) -> None:
    with pytest.raises(WaraError, match="is not understood; adapter.budget; write lora_r"):
        parse_budget(text)
    faults = option_faults({"method": "lora", "budget": text})
    assert [(f.kind, f.where) for f in faults] == [("config", "adapter.budget")]


def test_every_method_has_a_size_to_set_or_a_fixed_one() -> None:
    assert set(SIZED) | FIXED == set(METHODS)
    assert not set(SIZED) & FIXED


@each_targeted
@pytest.mark.parametrize("targets", [["q", "k", "v", "o"], ["qkv", "fc1"], ["v", "fc2"]])
def test_sizes_are_those_of_the_adapted_model(name: str, targets: list[str]) -> None:
    model = small_vit()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    for budget in ("2.3*lora_r1", "lora_r7"):
        fitted, wanted, got = fit(
            method_from_options(name, {"targets": targets, "blocks": "last_1"}), model, budget
        )
        assert wanted == round(
            parse_budget(budget) * lora_size(model, 1, targets=tuple(targets), blocks="last_1")
        )
        assert got == adapter_size(model, fitted)
        assert fitted.budget is None  # type: ignore[attr-defined]
    assert list(before) == list(model.state_dict())
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in before.items())


@pytest.mark.parametrize("name", sorted({*SIZED} - {"tiny_wara", "apla"} - THROUGH_PEFT))
def test_a_budget_is_the_same_number_for_every_method_of_a_table(name: str) -> None:
    """Whatever a method adapts by itself, unless it is told where."""
    model = small_vit()
    for blocks, count in (("all", 2), ("last_1", 1)):
        fitted, wanted, got = fit(METHODS[name](blocks=blocks), model, "lora_r8")
        assert wanted == 8 * count * 4 * (48 + 48)
        assert got == adapter_size(model, fitted) == pytest.approx(wanted, rel=0.1)


OPTIONS = [
    ("wara", {"core": "full", "level": 2}), ("wara", {"core": "scalar", "prefix": "skip"}),
    ("wara", {"core": "identity"}), ("wara", {"core": "identity", "prefix": "skip"}),
    ("tiny_wara", {"share": "layer"}), ("tiny_wara", {"share": "model"}),
    ("tiny_wara", {"share": "subband", "level": 2}),
    ("lokr", {"decompose_both": True}), ("lokr", {"decompose_factor": 5}),
    ("lokr", {"decompose_factor": 3}), ("adalora", {"rank": 3, "init_rank": 9}),
    ("waveft", {"allocation": "proportional"}), ("shira", {"allocation": "area"}),
]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "options"), [pytest.param(n, o, marks=needs[n]) for n, o in OPTIONS]
)
def test_sizes_hold_for_other_options(name: str, options: dict[str, Any]) -> None:
    model = small_vit(embed_dim=40, img_size=64)
    method = method_from_options(name, {**options, "targets": ["q", "o", "fc1"]})
    assert size_of(method, model, method.find(model)) == adapter_size(model, method)


@each
def test_no_neighbour_is_nearer(name: str) -> None:
    model = small_vit()
    for budget in ("3*lora_r1", "lora_r5", "12.5*lora_r1"):
        method: Any = method_from_options(name, {})
        fitted, wanted, got = fit(method, model, budget)
        targets = method.find(model)
        option = method.knob[0]
        value = getattr(fitted, option)
        for other in range(max(1, value - 3), value + 4):
            if option == "init_rank" and other <= fitted.rank:
                continue
            if name in ("apla", "tiny_wara") and other > 48:  # all rows, all directions
                continue
            changed = replace(fitted, **{option: other})
            size = size_of(changed, model, targets)
            assert abs(size - wanted) >= abs(got - wanted), (budget, option, other)


def test_methods_meet_the_budget_of_a_real_model() -> None:
    model = timm.create_model("vit_tiny_patch16_224")
    wanted = lora_size(model, 4)
    for name in set(SIZED) - {"tiny_wara"}:
        got = fit(METHODS[name](), model, "lora_r4")[2]
        assert got == pytest.approx(wanted, rel=0.13), name
    for name in ("lora", "waveft", "shira"):
        assert fit(METHODS[name](), model, "lora_r4")[1:] == (wanted, wanted)


def test_tiny_wara_stops_at_the_side_of_a_matrix() -> None:
    model = small_vit()
    fitted: Any = fit(method_from_options("tiny_wara", {}), model, "lora_r64")[0]
    assert fitted.rank == 48 and fitted.coefficients is None
    for own in ({"coefficients": 2}, {"share": "layer"}):  # sized by these, not by a rank
        with pytest.raises(WaraError, match="leave out the budget") as caught:
            fit(method_from_options("tiny_wara", own), model, "lora_r1")
        assert caught.value.kind == "config"


def test_adalora_starts_above_the_rank_it_ends_with() -> None:
    fitted: Any = fit(method_from_options("adalora", {}), small_vit(), "lora_r6")[0]
    assert (fitted.init_rank, fitted.rank) == (6, 4)


def test_lokr_keeps_a_factor_that_was_chosen() -> None:
    model = small_vit()
    fitted: Any = fit(method_from_options("lokr", {"decompose_factor": 6}), model, "lora_r4")[0]
    assert fitted.decompose_factor == 6


@each
def test_a_budget_below_the_minimum_is_refused_and_the_minimum_named(name: str) -> None:
    model = small_vit(embed_dim=16)
    method = method_from_options(name, {})
    if name in ("waveft", "shira", "fourierft", "tiny_wara"):
        budget = "0.0001*lora_r1"
    else:
        budget = "0.1*lora_r1"
    with pytest.raises(WaraError, match="has at least") as caught:
        fit(method, model, budget)
    assert (caught.value.exit_code, caught.value.where) == (2, "adapter.budget")
    least = caught.value.remedy.split()[1]
    fitted, wanted, got = fit(method, model, least)
    assert got <= wanted * 1.1
    if hasattr(fitted, "rank") and name not in ("adalora", "tiny_wara"):
        assert fitted.rank == 1


@pytest.mark.parametrize("name", sorted(FIXED))
def test_fixed_sizes_take_no_budget(name: str) -> None:
    faults = option_faults({"method": name, "budget": "lora_r4"})
    assert [fault.where for fault in faults] == ["adapter.budget"]
    with pytest.raises(WaraError, match="is fixed"):
        fit(METHODS[name](), small_vit(), "lora_r4")


def test_adapt_resolves_the_budget_and_the_folder_holds_the_result(tmp_path: Path) -> None:
    model = small_vit()
    base = copy.deepcopy(model)
    wara.adapt(model, wara.WaRA(budget="lora_r6", core="scalar"))
    record = adaptation_of(model)
    wanted = lora_size(base, 6)
    assert record.budget == (wanted, count_parameters(model)["adapter"])
    assert record.method.rank == 6 and record.method.budget is None  # type: ignore[attr-defined]
    wara.save_adapter(model, tmp_path)
    options = json.loads((tmp_path / "adapter_config.json").read_text())["options"]
    assert (options["rank"], options["budget"]) == (6, None)
    wara.load_adapter(base, tmp_path)


def test_outside_timm() -> None:
    model = nn.Sequential(nn.Linear(7, 11), nn.Linear(11, 5))
    fitted, wanted, got = fit(wara.LoRA(targets=("*",), rank=9), model, "2*lora_r1")
    assert (wanted, got) == (2 * (7 + 11 + 11 + 5),) * 2
    with pytest.raises(WaraError, match="no linear layer matches"):
        fit(wara.LoRA(targets=("*.x",)), model, "lora_r1")


def test_the_table_of_methods_is_complete() -> None:
    text = (Path(__file__).resolve().parents[1] / "docs" / "methods.md").read_text()
    rows = [line.split("|")[1:-1] for line in text.splitlines() if line.startswith("| `")]
    table = {row[0].strip(" `"): row for row in rows if len(row) == 7}
    assert set(table) == set(METHODS)
    for name, method in METHODS.items():
        options = {field.name for field in fields(method)} - {"targets", "blocks", "budget"}
        assert set(re.findall(r"`(\w+)`", table[name][2])) == options, name


@each_targeted
def test_a_budget_beyond_an_option_is_refused_and_the_largest_named(name: str) -> None:
    """Unless the method is full before: then it takes what it can have."""
    model: Any = nn.Sequential(nn.Linear(64, 64))
    model.patch_embed = nn.Module()
    model.patch_embed.grid_size, model.num_prefix_tokens = (4, 4), 1
    method = METHODS[name](targets=("[0]",))
    if name not in ("vera", "fact_tt"):
        fitted, wanted, got = fit(method, model, 10**9)
        assert got < wanted and got == fit(method, model, 2 * 10**9)[2]
        return
    with pytest.raises(WaraError, match=f"'{name}' has at most") as caught:
        fit(method, model, 10**9)
    assert (caught.value.exit_code, caught.value.where) == (2, "adapter.budget")
    most = caught.value.remedy.split()[1]
    fitted, wanted, got = fit(method, model, most)
    assert got == pytest.approx(wanted, rel=0.1)


def test_the_largest_rank_is_that_of_the_matrix() -> None:
    model = nn.Sequential(nn.Linear(3, 2))
    fitted, wanted, got = fit(wara.LoRA(targets=("*",)), model, "lora_r4096")
    assert (fitted.rank, wanted, got) == (2, 4096 * 5, 10)  # type: ignore[attr-defined]
    assert wara.adapt(model, fitted) is model


@pytest.mark.parametrize("name", SIZED)
def test_a_size_and_a_budget_are_refused_together(name: str) -> None:
    own = {field.name for field in fields(METHODS[name])}
    for key in {"rank", *METHODS[name].knob} & own:
        faults = option_faults({"method": name, key: 6, "budget": "lora_r4"})
        assert [fault.what for fault in faults] == [f"{key} and budget are both set"]
        assert option_faults({"method": name, key: None, "budget": "lora_r4"}) == []


@pytest.mark.parametrize("name", [n for n in SIZED if n not in ("waveft", "shira")])
def test_a_size_that_is_null_is_refused(name: str) -> None:
    own = {field.name for field in fields(METHODS[name])}
    key = "rank" if "rank" in own else METHODS[name].knob[0]
    (fault,) = option_faults({"method": name, key: None})
    assert fault.what == f"{key} should be a whole number, not null"
    assert fault.where == f"adapter.{key}" and fault.remedy
