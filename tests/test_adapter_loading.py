"""Loading: where layers land, what no file brings, what a failure leaves, what a file may name."""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path
from typing import Any, ClassVar

import pytest
import timm
import torch
from oracles import reseal
from safetensors.torch import load, save
from test_contract import OPTIONS, every_method
from timm.models.beit import Beit
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import wara
from wara.adapters import METHODS, AdapterLayer, Method, adapter_state_dict, options, state
from wara.adapters.lora import LoRA, LoRALayer
from wara.adapters.state import _materialise
from wara.adapters.targets import find_targets
from wara.errors import WaraError

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def vit(**given: Any) -> VisionTransformer:
    torch.manual_seed(0)
    sizes = {"img_size": 48, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 2}
    return VisionTransformer(**{**sizes, "num_classes": 3, **given}).eval()


def stirred(model: Any, method: Method, amount: float = 0.1) -> Any:
    torch.manual_seed(1)
    wara.adapt(model, method)
    with torch.no_grad():
        for parameter in wara.trainable_parameters(model).values():
            parameter.add_(amount * torch.randn_like(parameter))
    return model.eval()


def images(model: Any) -> Tensor:
    torch.manual_seed(2)
    return torch.randn(2, 3, *model.patch_embed.img_size)


@every_method
def test_layers_get_their_numbers_where_their_base_lies(name: str) -> None:
    model = wara.adapt(vit(), METHODS[name](**OPTIONS.get(name, {})), empty=True)
    with FakeTensorMode(allow_non_fake_inputs=True):
        for module in model.modules():
            for key, tensor in module._parameters.items():
                if tensor is not None and not tensor.is_meta:
                    module._parameters[key] = nn.Parameter(torch.empty_like(tensor, device="cuda"))
        _materialise(model)
        for key, tensor in [*model.named_parameters(), *model.named_buffers()]:
            assert tensor.device.type == "cuda", key


class TableLayer(AdapterLayer):
    """Has what no file brings: a buffer and an attribute that follow from the options."""

    table: Tensor

    def __init__(self, width: int, step: float) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(width))
        self.register_buffer("table", torch.arange(width) * step, persistent=False)
        self.extra = torch.full((width,), step)

    def forward(self, base: nn.Module, x: Tensor) -> Tensor:
        return base(x) * self.scale + self.table + self.extra


@options
class Tabled(Method):
    name: ClassVar[str] = "tabled"
    summary: ClassVar[str] = "a table on the first norms"

    step: float = 0.01

    def layers(self, model: Any) -> dict[str, AdapterLayer]:
        return {f"blocks.{i}.norm1": TableLayer(model.embed_dim, self.step) for i in range(2)}


def test_what_no_file_brings_is_made_as_in_training(tmp_path: Path) -> None:
    model = stirred(vit(), Tabled(step=0.03))
    wara.save_adapter(model, tmp_path)
    torch.manual_seed(5)
    drawn = torch.get_rng_state()
    loaded = wara.load_adapter(vit(), tmp_path)
    for one, two in zip(model.modules(), loaded.modules(), strict=True):
        if isinstance(one, TableLayer):
            assert torch.equal(one.table, two.table) and torch.equal(one.extra, two.extra)
    assert torch.equal(loaded(images(model)), model(images(model)))
    torch.manual_seed(5)
    assert torch.equal(torch.get_rng_state(), drawn)


def everything(model: nn.Module) -> list[Any]:
    """Return what a model is made of: objects, attributes, tables, flags and values."""
    found: list[Any] = []
    for path, module in model.named_modules():
        attributes = {k: v for k, v in vars(module).items() if not isinstance(v, dict)}
        tables = {
            f"{name}.{key}": value
            for name, table in vars(module).items()
            if isinstance(table, dict)
            for key, value in table.items()
        }
        tensors = {**module._parameters, **module._buffers}
        numbers = {k: (t.clone(), t.requires_grad) for k, t in tensors.items() if t is not None}
        found.append((path, module, attributes, tables, numbers))
    return found


def assert_same(before: list[Any], after: list[Any]) -> None:
    assert [entry[0] for entry in before] == [entry[0] for entry in after]
    for (path, module, *rest, numbers), (_, now, *rest_now, numbers_now) in zip(
        before, after, strict=True
    ):
        assert module is now, path
        for one, two in zip(rest, rest_now, strict=True):
            assert one.keys() == two.keys(), path
            for key, value in one.items():
                # Buffers may be computed anew; their numbers are compared below.
                buffer = isinstance(value, Tensor) and not isinstance(value, nn.Parameter)
                assert value is two[key] or buffer or value == two[key], f"{path}.{key}"
        for key, (value, trains) in numbers.items():
            assert torch.equal(value, numbers_now[key][0]), f"{path}.{key}"
            assert trains == numbers_now[key][1], f"{path}.{key}"


@every_method
@pytest.mark.parametrize("first", [None, "wara", "bitfit"])
def test_a_failure_while_numbers_are_copied_leaves_the_model_as_it_was(
    name: str, first: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wara.save_adapter(stirred(vit(), METHODS[name](**OPTIONS.get(name, {}))), tmp_path)
    model = vit() if first is None else stirred(vit(), METHODS[first](), 0.2)
    x, before = images(model), everything(model)
    expected = model(x)
    copy_all, calls = state._copy, []

    def failing(own: Any, given: Any) -> None:
        copy_all(own, given)
        calls.append(len(given))
        if len(calls) == 1:
            raise MemoryError("no memory for the last tensor")

    monkeypatch.setattr(state, "_copy", failing)
    with pytest.raises(MemoryError):
        wara.load_adapter(model, tmp_path)
    assert calls
    assert_same(before, everything(model))
    assert torch.equal(model(x), expected)
    monkeypatch.setattr(state, "_copy", copy_all)
    wara.load_adapter(model, tmp_path)  # not stuck


@pytest.mark.parametrize("place", [-1, 10_000, 0])
def test_places_that_cannot_be_leave_the_model_as_it_was(place: int, tmp_path: Path) -> None:
    """Every check of names, shapes and types passes; the layer itself refuses, at the very end."""
    wara.save_adapter(stirred(vit(), wara.SHiRA(k=5)), tmp_path)
    tensors = load((tmp_path / WEIGHTS).read_bytes())
    for key, tensor in tensors.items():
        if key.endswith("places"):
            tensor[:, :2] = place  # outside, or twice the same
    (tmp_path / WEIGHTS).write_bytes(save(tensors))
    reseal(tmp_path, lambda config: None)
    model = stirred(vit(), wara.WaRA())
    x, before = images(model), everything(model)
    expected = model(x)
    with pytest.raises(WaraError, match="a place") as caught:
        wara.load_adapter(model, tmp_path)
    assert caught.value.kind == "artefact"
    assert_same(before, everything(model))
    assert torch.equal(model(x), expected)


def test_a_state_that_fails_to_load_leaves_the_numbers() -> None:
    model = stirred(vit(), wara.SHiRA(k=5))
    given = {name: tensor.clone() for name, tensor in adapter_state_dict(model).items()}
    given["head.bias"] += 1
    given["blocks.1.attn.proj.adapter.places"][:] = -1
    before = everything(model)
    with pytest.raises(WaraError, match="outside"):
        wara.adapters.load_adapter_state(model, given)
    assert_same(before, everything(model))


# -- adapters on modules that hold adapted layers ------------------------------------------------


class WholeLayer(AdapterLayer):
    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(1))

    def forward(self, base: nn.Module, *inputs: Any, **named: Any) -> Tensor:
        return base(*inputs, **named) * self.gain


@options
class Nested(Method):
    """An adapter on each attention, and one on the layers inside."""

    name: ClassVar[str] = "nested"
    summary: ClassVar[str] = "attention and what is in it"

    outer_first: bool = True

    def layers(self, model: nn.Module) -> dict[str, AdapterLayer]:
        inner: dict[str, AdapterLayer] = {
            target.name: LoRALayer(target, rank=2, scale=1.0)
            for target in find_targets(model, ("q", "v"))
        }
        paths = {name.rpartition(".")[0] for name in inner}
        outer: dict[str, AdapterLayer] = {path: WholeLayer() for path in sorted(paths)}
        return outer | inner if self.outer_first else inner | outer


ATTENTIONS = {
    "eva02": lambda: timm.create_model("eva02_tiny_patch14_224", img_size=56, num_classes=3),
    "eva fused": lambda: timm.models.eva.Eva(
        img_size=48, patch_size=8, embed_dim=64, depth=2, num_heads=2, num_classes=3
    ),
    "beit": lambda: Beit(
        img_size=48, patch_size=8, embed_dim=64, depth=2, num_heads=2, num_classes=3
    ),
}


@pytest.mark.parametrize("outer_first", [True, False])
@pytest.mark.parametrize("kind", ATTENTIONS)
def test_adapters_inside_adapted_modules_are_alive(
    kind: str, outer_first: bool, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    base: Any = ATTENTIONS[kind]().eval()
    with torch.no_grad():
        for parameter in base.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    model: Any = stirred(copy.deepcopy(base), Nested(outer_first=outer_first))
    x = images(base)
    model(x).square().sum().backward()
    for key, parameter in wara.trainable_parameters(model).items():
        assert parameter.grad is not None and bool(parameter.grad.any()), key
    loaded = wara.load_adapter(copy.deepcopy(base), wara.save_adapter(model, tmp_path)).eval()
    assert torch.equal(loaded(x), model(x))
    # What another part of the program sets on an adapted module reaches the module.
    attention = model.blocks[0].attn
    attention.fused_attn = False
    torch.testing.assert_close(model(x), loaded(x))
    attention.scale, before = 3.0, attention.scale
    assert attention.base.scale == 3.0 and not torch.allclose(model(x), loaded(x))
    attention.fused_attn, attention.scale = True, before
    assert torch.equal(model(x), loaded(x))
    layer = next(m for m in model.modules() if isinstance(m, wara.adapters.base.AdaptedLinear))
    layer.note = "noted"
    assert layer.base.note == layer.note == "noted" and layer.in_features == layer.base.in_features
    features = wara.unload(model).forward_features(x)
    assert torch.equal(features, base.forward_features(x))


# -- running statistics --------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["lora", "bitfit", "linear_probe", "full"])
def test_running_statistics_stand_still(name: str, tmp_path: Path) -> None:
    def hybrid() -> Any:
        torch.manual_seed(0)
        model: Any = vit()
        model.norm_pre = nn.Sequential(nn.Identity(), PatchNorm(48))
        return model.eval()

    base = hybrid()
    start = {key: buffer.clone() for key, buffer in base.named_buffers()}
    assert any("running" in key for key in start)
    model = wara.adapt(copy.deepcopy(base), METHODS[name]()).train()
    optimiser = torch.optim.SGD(list(wara.trainable_parameters(model).values()), lr=0.01)
    for _ in range(2):
        model.train()
        model(3 + images(model)).square().mean().backward()
        optimiser.step()
    for key, buffer in model.named_buffers():
        assert torch.equal(buffer, start[key]) if key in start else True, key
    wara.save_adapter(model, tmp_path)
    loaded = wara.load_adapter(copy.deepcopy(base), tmp_path).eval()
    assert torch.equal(loaded(images(base)), model.eval()(images(base)))
    if name != "full":
        plain = wara.unload(model).train()
        plain(3 + images(base))
        assert any(not torch.equal(b, start[k]) for k, b in plain.named_buffers())


class PatchNorm(nn.BatchNorm1d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.transpose(1, 2)).transpose(1, 2)


def test_statistics_of_the_head_train_and_are_saved(tmp_path: Path) -> None:
    def model_with_head(classes: int) -> Any:
        model: Any = timm.create_model("levit_128s", num_classes=classes).eval()
        return model

    torch.manual_seed(0)
    base = model_with_head(3)
    model = wara.adapt(copy.deepcopy(base), LoRA(targets=("stages.*.linear",))).train()
    model(torch.randn(2, 3, 224, 224)).sum().backward()
    assert bool(model.head.bn.running_mean.any())
    wara.save_adapter(model, tmp_path)
    other = copy.deepcopy(base)
    other.reset_classifier(7)
    loaded: Any = wara.load_adapter(other, tmp_path).eval()
    x = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        assert torch.equal(loaded(x), model.eval()(x))


# -- what a file may name ------------------------------------------------------------------------

MODULE = """
import sys
from typing import ClassVar
from wara.adapters import LoRA, options
from pathlib import Path
Path({mark!r}).write_text("run")

@options
class Own(LoRA):
    name: ClassVar[str] = "own"
"""


def test_a_file_imports_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mark = tmp_path / "mark"
    (tmp_path / "foreign_method.py").write_text(MODULE.format(mark=str(mark)))
    monkeypatch.syspath_prepend(str(tmp_path))
    wara.save_adapter(stirred(vit(), wara.LoRA()), tmp_path / "adapter")
    reseal(tmp_path / "adapter", lambda config: config.update(method="foreign_method:Own"))
    with pytest.raises(WaraError, match="import foreign_method first") as caught:
        wara.load_adapter(vit(), tmp_path / "adapter")
    assert caught.value.kind == "artefact" and not mark.exists()
    import foreign_method  # type: ignore[import-not-found]

    assert mark.exists()
    wara.load_adapter(vit(), tmp_path / "adapter")
    monkeypatch.delitem(sys.modules, "foreign_method")
    wara.load_adapter(vit(), tmp_path / "adapter", methods=[foreign_method.Own])
    assert "foreign_method" not in sys.modules


@pytest.mark.parametrize(
    "name", ["this:x", "antigravity:X", ":X", "os:system", "os:", "sys:", ":",
             "wara.errors:WaraError", "os:path.join", "nothing", "..x:Y"]
)  # fmt: skip
def test_other_names_are_refused(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wara.save_adapter(stirred(vit(), wara.LoRA()), tmp_path)
    reseal(tmp_path, lambda config: config.update(method=name))
    with pytest.raises(WaraError) as caught:
        wara.load_adapter(vit(), tmp_path)
    assert caught.value.kind == "artefact" and caught.value.remedy
    assert not capsys.readouterr().out and "this" not in sys.modules


def test_a_config_may_name_a_module_that_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "boom_method.py").write_text("raise SystemError('boom')")
    monkeypatch.syspath_prepend(str(tmp_path))
    for name, words in (("boom_method:X", "boom"), (":X", "of the form"), ("os:", "of the form")):
        with pytest.raises(WaraError, match=words) as caught:
            wara.adapters.find_method(name)
        assert caught.value.kind == "config"


def test_a_class_made_in_a_function_is_given_to_load(tmp_path: Path) -> None:
    @options
    class Local(LoRA):
        name: ClassVar[str] = "local"

    model = stirred(vit(), Local(rank=3))
    wara.save_adapter(model, tmp_path)
    with pytest.raises(WaraError, match="methods="):
        wara.load_adapter(vit(), tmp_path)
    loaded = wara.load_adapter(vit(), tmp_path, methods=[Local])
    assert torch.equal(loaded(images(model)), model(images(model)))


# -- what is written can be read -----------------------------------------------------------------


def deep(levels: int) -> Any:
    found: Any = 1
    for _ in range(levels):
        found = [found]
    return found


@pytest.mark.parametrize(
    "given",
    [
        {"extra": {"loss": float("nan")}},
        {"extra": {"path": Path("x")}},
        {"extra": {1: "a", "1": "b"}},
        {"extra": {"deep": deep(50_000)}},
        {"extra": {"long": "x" * (1 << 22)}},
        {"task": "regression"},
        {"bits": 99},
        {"greys": "grey"},
        {"classes": [1, 2, 3]},
    ],
    ids=lambda given: " ".join(map(str, given)),
)
def test_what_could_not_be_read_is_not_written(given: dict[str, Any], tmp_path: Path) -> None:
    model = stirred(vit(), wara.LoRA())
    wara.save_adapter(model, tmp_path / "a")
    intact = (tmp_path / "a" / CONFIG).read_bytes()
    with pytest.raises(WaraError) as caught:
        wara.save_adapter(model, tmp_path / "a", **given)
    assert caught.value.kind == "config" and caught.value.remedy
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400
    assert (tmp_path / "a" / CONFIG).read_bytes() == intact


def test_numbers_that_are_not_finite_are_not_written(tmp_path: Path) -> None:
    model = stirred(vit(), wara.LoRA())
    with torch.no_grad():
        model.head.bias[1] = float("inf")
    with pytest.raises(WaraError, match="not finite, in head.bias") as caught:
        wara.save_adapter(model, tmp_path / "a")
    assert caught.value.kind == "nonfinite" and not (tmp_path / "a").exists()


@every_method
def test_every_method_is_read_back_as_it_was_written(name: str, tmp_path: Path) -> None:
    model = stirred(vit(), METHODS[name](**OPTIONS.get(name, {})))
    wara.save_adapter(model, tmp_path, extra={"epoch": 3, "lists": [1, [2.5, None]], "größe": "ß"})
    found = wara.adapters.read_adapter(tmp_path)
    assert found.method == name and found.extra["größe"] == "ß"
    assert json.loads((tmp_path / CONFIG).read_text())["fingerprint"] == 2
