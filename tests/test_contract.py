"""What every method promises, held for every entry of the registry on several kinds of ViT.

A method that is added to `METHODS` is covered as soon as `KEYS` says what it trains and stores.
"""

from __future__ import annotations

import copy
import importlib.util
from functools import cache
from typing import Any

import pytest
import timm
import torch
from timm.models.beit import Beit
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

import wara
from wara.adapters import METHODS, adapter_state_dict, count_parameters, method_from_options
from wara.adapters.base import adapted_layers
from wara.errors import WaraError

# By method: names that train, and names that are stored beside them, on every adapted matrix.
# `@` stands for the number of a matrix within its layer, where each has tensors of its own.
# Methods that sit elsewhere are in `ELSEWHERE`.
KEYS: dict[str, tuple[set[str], set[str]]] = {
    "wara": ({"down", "up", "core"}, set()),
    "tiny_wara": ({"gain", "band", "shift"}, {"down", "up"}),
    "lora": ({"down", "up"}, set()),
    "waveft": ({"coefficients"}, {"places"}),
    "shira": ({"coefficients"}, {"places"}),
    "dora": (
        {
            "tuners.@.lora_A.default.weight",
            "tuners.@.lora_B.default.weight",
            "tuners.@.lora_magnitude_vector.default.weight",
        },
        set(),
    ),
    "adalora": ({f"tuners.@.lora_{x}.default" for x in "ABE"}, set()),
    "vera": ({f"tuners.@.vera_lambda_{x}.default" for x in "bd"}, set()),
    "loha": ({f"tuners.@.hada_w{i}_{x}.default" for i in (1, 2) for x in "ab"}, set()),
    "lokr": ({f"tuners.@.lokr_{x}.default" for x in ("w1", "w2_a", "w2_b")}, set()),
    "fourierft": ({"tuners.@.fourierft_spectrum.default"}, {"tuners.@.indices.default"}),
    "rank_conv": ({"down", "up", "core"}, set()),
    "apla": (set(), set()),
    "adaptformer": (set(), set()),
    "convpass": (set(), set()),
    "vpt": (set(), set()),
    "fact_tt": (set(), set()),
    "ssf": (set(), set()),
    "bitfit": (set(), set()),
    "ln_tuning": (set(), set()),
    "linear_probe": (set(), set()),
    "full": (set(), set()),
}
# Small enough for narrow models; everything else is the default.
OPTIONS: dict[str, dict[str, Any]] = {
    "tiny_wara": {"rank": 4, "targets": ["q", "k", "v", "o"]},
    "adalora": {"rank": 2},
    "vera": {"rank": 16},
    "lokr": {"rank": 2, "decompose_factor": 4},
    "fourierft": {"n_frequency": 30},
}
THROUGH_PEFT = {"dora", "adalora", "vera", "loha", "lokr", "fourierft"}
NORMS = {"LayerNorm", "RmsNorm"}  # timm's own subclass has the first name too
ELSEWHERE = {"adaptformer", "convpass", "vpt", "fact_tt", "apla", "ssf"}
DRAWN = {"vpt"}  # prompts change what attention spreads over, whatever their numbers
PLAIN_BASE = {"bitfit", "ln_tuning", "linear_probe", "full"}

needs_peft = pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="needs PEFT")
every_method = pytest.mark.parametrize(
    "name", [pytest.param(n, marks=needs_peft if n in THROUGH_PEFT else ()) for n in METHODS]
)


def vit(**options: Any) -> nn.Module:
    sizes = {"img_size": 48, "patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 2}
    return VisionTransformer(**{**sizes, "num_classes": 3, **options})


def eva(fused: bool) -> nn.Module:
    # Biases for q and v apart from the layer, and none for k.
    sizes = {"img_size": 48, "patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 2}
    return Eva(**sizes, num_classes=3, qkv_fused=fused)


MODELS = {
    "test_vit": lambda: timm.create_model("test_vit", img_size=64, num_classes=3),
    "test_vit2": lambda: timm.create_model("test_vit2", img_size=64, num_classes=3),
    "test_vit3": lambda: timm.create_model("test_vit3", img_size=64, num_classes=3),
    "test_vit4": lambda: timm.create_model("test_vit4", img_size=64, num_classes=3),
    "not square": lambda: vit(img_size=(32, 56)),
    "registers": lambda: vit(reg_tokens=4, img_size=(40, 56)),
    "eva fused": lambda: eva(True),
    "eva split": lambda: eva(False),
    "beit": lambda: Beit(
        img_size=48, patch_size=8, embed_dim=64, depth=2, num_heads=2, num_classes=3
    ),
}
SLOW = {"test_vit2", "test_vit3"}  # deep, and not unlike the others
every_model = pytest.mark.parametrize(
    "kind", [pytest.param(k, marks=pytest.mark.slow if k in SLOW else ()) for k in MODELS]
)


@cache
def built(kind: str) -> nn.Module:
    torch.manual_seed(0)
    model = MODELS[kind]().eval()
    with torch.no_grad():
        # No weight may be trivial: fresh biases are zero, fresh norms one, some heads zero.
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def base(kind: str) -> Any:
    return copy.deepcopy(built(kind))


def method(name: str) -> Any:
    return method_from_options(name, OPTIONS.get(name, {}))


def adapted(kind: str, name: str) -> Any:
    torch.manual_seed(3)
    return wara.adapt(base(kind), method(name))


def images(model: Any) -> Tensor:
    torch.manual_seed(1)
    return torch.randn(2, 3, *model.patch_embed.img_size)


def stir(model: nn.Module, amount: float = 0.05) -> None:
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in wara.trainable_parameters(model).values():
            parameter.add_(amount * torch.randn_like(parameter))


def loss(model: nn.Module) -> Tensor:
    return model(images(model)).float().square().mean()


def attention_layers(model: nn.Module) -> dict[str, int]:
    """Return the layers that are adapted by default, with how many matrices each holds."""
    matrices = {"qkv": 3, "q_proj": 1, "k_proj": 1, "v_proj": 1, "proj": 1}
    return {
        name: matrices[name.rsplit(".", 1)[-1]]
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.startswith("blocks.") and ".attn." in name
    }


def elsewhere(model: nn.Module, name: str) -> tuple[set[str], set[str]]:
    """Return what trains and what is stored for methods that are not on all of attention."""
    bottleneck = [f"{part}.{kind}" for part in ("down", "up") for kind in ("weight", "bias")]
    own: set[str] = set()
    stored: set[str] = set()
    last = {"norm", "fc_norm", "patch_embed.proj"}
    linears = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and "blocks." in n]
    for path, module in model.named_modules():
        leaf, inside = path.rsplit(".", 1)[-1], path.startswith("blocks.")
        keys: list[str] = []
        if name == "adaptformer" and inside and leaf == "mlp":
            keys = bottleneck
        if name == "convpass" and inside and leaf in ("attn", "mlp"):
            keys = [*bottleneck, "conv.weight", "conv.bias"]
        if name == "vpt" and inside and path.count(".") == 1:
            keys = ["prompts"]
        if name == "fact_tt" and path in linears:
            keys = ["core", *(["first", "last"] if path == linears[0] else [])]
        if name == "apla" and path.endswith("attn.proj"):
            keys = ["change"]
            stored.add(f"{path}.adapter.places")
        affine = getattr(module, "weight", None) is not None
        if name == "ssf" and affine and (path in last or inside and leaf[:2] != "ls"):
            keys = ["gamma", *(["beta"] if getattr(module, "bias", None) is not None else [])]
        own |= {f"{path}.adapter.{key}" for key in keys}
    return own, stored


def expected_keys(model: nn.Module, name: str) -> tuple[set[str], set[str]]:
    """Return what must train and what must be saved, from the plain model."""
    trained, stored = KEYS[name]
    own: set[str] = set()
    saved: set[str] = set()
    if name not in PLAIN_BASE | ELSEWHERE:
        for layer, count in attention_layers(model).items():
            for i in range(count):
                own |= {f"{layer}.adapter.{key.replace('@', str(i))}" for key in trained}
                saved |= {f"{layer}.adapter.{key.replace('@', str(i))}" for key in stored}
    if name == "vera":
        first = next(iter(attention_layers(model)))
        saved |= {f"{first}.adapter.tuners.0.vera_{x}.default" for x in "AB"}
    names = [n for n, _ in model.named_parameters()]
    if name in ELSEWHERE:
        own, saved = elsewhere(model, name)
    if name == "full":
        own |= set(names)
    if name == "bitfit":
        own |= {n for n in names if n.rsplit(".", 1)[-1] in ("bias", "q_bias", "v_bias")}
    if name == "ln_tuning":
        norms = [n for n, m in model.named_modules() if type(m).__name__ in NORMS]
        own |= {n for n in names if n.rpartition(".")[0] in norms}
    own |= {n for n in names if n.startswith("head.")}
    return own, own | saved


def test_every_method_is_described() -> None:
    assert set(KEYS) == set(METHODS)


@every_method
@every_model
def test_starts_as_the_base_and_trains_only_its_own(kind: str, name: str) -> None:
    plain = base(kind)
    model = adapted(kind, name)
    x = images(plain)
    with torch.no_grad():
        # DoRA divides by norms and multiplies by them again; that alone rounds.
        same = torch.allclose(model(x), plain(x), rtol=1e-5, atol=2e-5)
        assert same == (name not in DRAWN)
    trained, saved = expected_keys(plain, name)
    assert set(wara.trainable_parameters(model)) == trained
    assert set(adapter_state_dict(model)) == saved
    assert {n for n, p in model.named_parameters() if p.requires_grad} == trained
    numbers = count_parameters(model)
    every = sum(p.numel() for n, p in model.named_parameters() if n in trained)
    assert numbers["trainable"] == every

    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    with torch.no_grad():
        features = model.forward_features(x)
    parameters = list(wara.trainable_parameters(model).values())
    optimiser = torch.optim.SGD(parameters, lr=1.0)
    loss(model.train()).backward()
    assert all(p.grad is None for n, p in model.named_parameters() if n not in trained)
    optimiser.step()
    changed = {n for n, p in model.eval().named_parameters() if not torch.equal(p, before[n])}
    assert changed <= trained
    with torch.no_grad():
        moved = not torch.equal(model.forward_features(x), features)
    assert moved == (name != "linear_probe")  # the probe alone leaves the features as they are
    assert {"head.weight", "head.bias"} <= changed


@every_method
@every_model
def test_merges_into_a_plain_model_or_refuses(kind: str, name: str) -> None:
    model = adapted(kind, name)
    stir(model)
    x = images(model)
    if not METHODS[name].mergeable:
        with pytest.raises(WaraError, match="where a token lies|cannot be folded") as caught:
            wara.merge(model)
        assert caught.value.exit_code == 2
        return
    with torch.no_grad():
        before = model(x)
        merged = wara.merge(model).eval()
        assert torch.equal(model(x), before)  # the adapted model is left as it is
        scale = max(1.0, before.abs().max().item())
        torch.testing.assert_close(merged(x), before, rtol=0, atol=1e-5 * scale)
        assert not adapted_layers(merged) and type(merged) is type(built(kind))
        assert merged.state_dict().keys() == built(kind).state_dict().keys()
        again = wara.merge(merged)
        assert torch.equal(again.eval()(x), merged(x))
        model.double()
        sharp = wara.merge(model).eval()
        torch.testing.assert_close(sharp(x.double()), model(x.double()), rtol=0, atol=1e-10 * scale)


@every_method
@every_model
def test_saves_and_loads_bit_for_bit(kind: str, name: str, tmp_path: Any) -> None:
    model = adapted(kind, name)
    stir(model)
    wara.save_adapter(model, tmp_path)
    torch.manual_seed(99)  # nothing may be drawn anew and left so
    loaded = wara.load_adapter(base(kind), tmp_path).eval()
    x = images(model)
    with torch.no_grad():
        assert torch.equal(loaded(x), model(x))
    mine, theirs = adapter_state_dict(model), adapter_state_dict(loaded)
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[key], theirs[key]) for key in mine)
    # A state dict of the whole model does it as well.
    other = adapted(kind, name)
    other.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert torch.equal(other(x), model(x))


@every_method
@pytest.mark.parametrize("kind", ["test_vit", "registers", "eva fused"])
def test_low_precision(kind: str, name: str) -> None:
    model = adapted(kind, name)
    stir(model, 0.01)
    x = images(model)
    with torch.no_grad():
        sharp = model(x)
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(x)
    assert logits.dtype == torch.bfloat16
    torch.testing.assert_close(logits.float(), sharp, rtol=0.1, atol=0.1)
    logits.float().square().mean().backward()
    for key, parameter in wara.trainable_parameters(model).items():
        assert parameter.grad is not None, key
        assert parameter.grad.isfinite().all() and parameter.grad.dtype == torch.float32


@every_method
def test_a_copy_stands_alone(name: str) -> None:
    kind = "registers"
    model = adapted(kind, name)
    stir(model)
    twin = copy.deepcopy(model)
    x = images(model)
    with torch.no_grad():
        before = model(x)
        assert torch.equal(twin(x), before)
        stir(twin, 0.1)
        assert torch.equal(model(x), before) and not torch.equal(twin(x), before)
    loss(twin).backward()
    assert all(p.grad is None for p in model.parameters())


@every_method
def test_two_adapters_take_turns_on_one_base(name: str, tmp_path: Any) -> None:
    kind = "registers"
    x = images(built(kind))
    expected = {}
    for other, amount in ((name, 0.05), ("lora", 0.1)):
        model = adapted(kind, other)
        stir(model, amount)
        wara.save_adapter(model, tmp_path / f"{other}{amount}")
        with torch.no_grad():
            expected[f"{other}{amount}"] = model(x)
    one = base(kind)
    weight = one.blocks[0].attn.qkv.weight
    storage = weight.data_ptr()
    with torch.no_grad():
        features = one.forward_features(x)
        if name == "full":  # nothing to go back to
            wara.load_adapter(one, tmp_path / f"{name}0.05")
            with pytest.raises(WaraError, match="changes the base weights"):
                wara.load_adapter(one, tmp_path / "lora0.1")
            return
        for turn in (*expected, *expected):
            wara.load_adapter(one, tmp_path / turn).eval()
            assert torch.equal(one(x), expected[turn])
        wara.unload(one)
        assert torch.equal(one.forward_features(x), features)
    assert one.blocks[0].attn.qkv.weight.data_ptr() == storage  # never copied, never reloaded


def check_compiles(name: str) -> None:
    torch.manual_seed(0)
    model = wara.adapt(vit(depth=1, reg_tokens=2), method(name))
    stir(model)
    expected = loss(model)
    expected.backward()
    parameters = wara.trainable_parameters(model)
    gradients = {key: p.grad.clone() for key, p in parameters.items()}
    model.zero_grad()
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager")
    value = compiled(images(model)).float().square().mean()
    torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-5)
    value.backward()
    for key, parameter in parameters.items():
        torch.testing.assert_close(parameter.grad, gradients[key], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["wara", "waveft"])
def test_compiles(name: str) -> None:
    check_compiles(name)


@pytest.mark.slow
@every_method
def test_every_method_compiles(name: str) -> None:
    check_compiles(name)
