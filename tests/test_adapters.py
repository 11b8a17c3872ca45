"""WaRA, Tiny-WaRA and LoRA: identities, oracles, refusals."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import timm
import torch
from oracles import option_faults, wara_update
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

import wara
from wara.adapters import (
    adapter_state_dict,
    count_parameters,
    method_from_options,
    parameter_groups,
    singular_values,
    subband_energy,
)
from wara.adapters.base import adapted_layers
from wara.adapters.targets import block_indices, find_targets
from wara.errors import WaraError


def small_vit(**options: Any) -> VisionTransformer:
    torch.manual_seed(0)
    defaults = {"img_size": 56, "patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 2}
    return VisionTransformer(**{**defaults, "num_classes": 3, **options}).eval()


LAYOUTS = {
    "square": {},
    "wide": {"img_size": (40, 72)},
    "odd with registers": {"img_size": (56, 40), "reg_tokens": 4},
    "no prefix": {"class_token": False, "global_pool": "avg"},
}


def images(model: Any, batch: int = 2) -> Tensor:
    torch.manual_seed(1)
    return torch.randn(batch, 3, *model.patch_embed.img_size)


def stir(model: nn.Module, amount: float = 0.3) -> None:
    """Move every trainable number, so that no identity at the start hides a fault."""
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in wara.trainable_parameters(model).values():
            parameter.add_(amount * torch.randn_like(parameter))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("core", ["scalar", "diag", "full"])
@pytest.mark.parametrize(("wavelet", "level"), [("haar", 1), ("haar", 2), ("db2", 1)])
@pytest.mark.parametrize("prefix", ["adapt", "skip"])
def test_rank_space_equals_the_step_by_step_form(
    layout: str, core: str, wavelet: str, level: int, prefix: str
) -> None:
    model = small_vit(**LAYOUTS[layout])
    if wavelet == "db2" and min(model.patch_embed.grid_size) < 6:
        pytest.skip("the wavelet is longer than this grid")
    spec = wara.WaRA(core=core, wavelet=wavelet, level=level, prefix=prefix, rank=3, alpha=6.0)
    wara.adapt(model, spec).double()
    stir(model)
    layer = adapted_layers(model)["blocks.1.attn.qkv"]
    adapter: Any = layer.adapter
    grid, p = model.patch_embed.grid_size, model.num_prefix_tokens
    x = torch.randn(2, p + grid[0] * grid[1], 32, dtype=torch.float64)
    expected = nn.functional.linear(x, layer.weight, layer.bias)
    for g, (start, stop) in enumerate(adapter.rows):
        expected[..., start:stop] += wara_update(
            x,
            adapter.down[g * 3 : (g + 1) * 3],
            adapter.up[start:stop],
            adapter.full_cores()[g],
            grid,
            prefix_tokens=p,
            prefix=prefix,
            wavelet=wavelet,
            level=level,
            scale=2.0,
        )
    torch.testing.assert_close(layer(x), expected, rtol=1e-9, atol=1e-9)
    single = copy.deepcopy(layer).float()
    torch.testing.assert_close(single(x.float()), expected.float(), rtol=1e-5, atol=1e-5)


def test_gradients_equal_those_of_the_step_by_step_form() -> None:
    model = small_vit(img_size=(56, 40))
    wara.adapt(model, wara.WaRA(core="full", targets=("o",), rank=2)).double()
    stir(model)
    layer = adapted_layers(model)["blocks.0.attn.proj"]
    adapter: Any = layer.adapter
    x = torch.randn(2, 36, 32, dtype=torch.float64, requires_grad=True)
    own = torch.autograd.grad(layer(x).square().sum(), [x, adapter.down, adapter.up, adapter.core])
    delta = wara_update(
        x, adapter.down, adapter.up, adapter.core[0], model.patch_embed.grid_size, prefix_tokens=1
    )
    reference = nn.functional.linear(x, layer.weight, layer.bias) + delta
    oracle = torch.autograd.grad(
        reference.square().sum(), [x, adapter.down, adapter.up, adapter.core]
    )
    for mine, theirs in zip(own, oracle, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_identity_cores_equal_lora_exactly(layout: str) -> None:
    """The trap: with `K_s = I` the transform drops out, so WaRA without cores is LoRA."""
    base = small_vit(**LAYOUTS[layout])
    lora = wara.adapt(copy.deepcopy(base), wara.LoRA(rank=3))
    stir(lora)
    x = images(base)
    for core in ("identity", "scalar", "diag", "full"):
        model = wara.adapt(copy.deepcopy(base), wara.WaRA(rank=3, core=core))
        with torch.no_grad():
            for name, parameter in wara.trainable_parameters(model).items():
                if not name.endswith(".core"):
                    parameter.copy_(wara.trainable_parameters(lora)[name])
        torch.testing.assert_close(model(x), lora(x), rtol=1e-4, atol=1e-5)
        assert torch.equal(model(x), lora(x)) or core != "identity"
        stir(model)
        assert not torch.allclose(model(x), lora(x), atol=1e-3)


@pytest.mark.parametrize("coefficients", [None, 5])
def test_tiny_wara_equals_the_step_by_step_form(coefficients: int | None) -> None:
    model = small_vit(img_size=(40, 72), reg_tokens=2)
    base = copy.deepcopy(model).double()
    method = wara.TinyWaRA(rank=4, coefficients=coefficients, level=2, targets=["q", "k", "v"])
    wara.adapt(model, method).double()
    stir(model, 1.0)
    layer = adapted_layers(model)["blocks.2.attn.qkv"]
    adapter: Any = layer.adapter
    x = torch.randn(1, 3 + 45, 32, dtype=torch.float64)
    expected = nn.functional.linear(x, layer.weight, layer.bias)
    for g, (start, stop) in enumerate(adapter.rows):
        u, sigma, vh = torch.linalg.svd(base.blocks[2].attn.qkv.weight[start:stop])
        down, up = sigma[:4].sqrt()[:, None] * vh[:4], u[:, :4] * sigma[:4].sqrt()
        sign = torch.sign(u[u[:, :4].abs().argmax(0), range(4)])
        down, up = down * sign[:, None], up * sign
        if coefficients is None:
            cores = torch.stack([a * torch.diag(adapter.gain[g]) for a in adapter.band[g]])
            expected[..., start:stop] += up @ adapter.shift[4 * g : 4 * g + 4]
        else:
            cores = torch.stack(
                [
                    sum(v * q for v, q in zip(row, adapter.bases[g], strict=True))
                    for row in adapter.vector[g]
                ]
            )
        delta = wara_update(x, down, up, cores, (5, 9), prefix_tokens=3, level=2, prefix="skip")
        delta[:, :3] = x[:, :3] @ down.T @ cores[0].T @ up.T
        expected[..., start:stop] += delta
    # The factors were rounded to float32 when the adapter was made.
    torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-5)


def test_tiny_wara_shares_down_to_a_handful_of_numbers() -> None:
    base = small_vit()
    counts = {}
    for share in ("subband", "layer", "model"):
        method = wara.TinyWaRA(rank=4, coefficients=6, share=share, targets=["q", "k", "v", "o"])
        model = wara.adapt(copy.deepcopy(base), method)
        counts[share] = count_parameters(model)["adapter"]
        stir(model)
        cores = [m.adapter.cores() for m in adapted_layers(model).values()]
        # Tied or not, the subbands must differ, or no wavelet is left in the update.
        assert all(not torch.allclose(c[:, 0], c[:, 1]) for c in cores)
    # 3 blocks x (q, k, v, o) x 4 subbands x 6; one vector per linear layer; one per model.
    assert counts == {"subband": 3 * 4 * 4 * 6, "layer": 3 * 2 * 6, "model": 6}


def test_the_classifier_alone_trains_in_a_linear_probe_and_everything_in_full() -> None:
    probe = wara.adapt(small_vit(), wara.LinearProbe())
    assert sorted(wara.trainable_parameters(probe)) == ["head.bias", "head.weight"]
    full = wara.adapt(small_vit(), wara.Full())
    assert set(wara.trainable_parameters(full)) == {n for n, _ in full.named_parameters()}


def test_groups_partition_what_trains() -> None:
    model = wara.adapt(small_vit(), wara.WaRA(core="full"))
    groups = parameter_groups(model)
    ids = [id(p) for group in groups.values() for p in group]
    assert len(ids) == len(set(ids))
    assert set(ids) == {id(p) for p in model.parameters() if p.requires_grad}
    assert [tuple(p.shape) for p in groups["core"]] == [(3, 4, 4, 4), (1, 4, 4, 4)] * 3
    assert len(groups["head"]) == 2


def test_merge_of_identity_cores_agrees_and_trained_cores_refuse() -> None:
    model = wara.adapt(small_vit(), wara.WaRA(core="diag")).double()
    with torch.no_grad():
        for name, parameter in wara.trainable_parameters(model).items():
            if not name.endswith(".core"):
                parameter.add_(0.1 * torch.randn_like(parameter))
    x = images(model).double()
    merged = wara.merge(model)
    assert not adapted_layers(merged) and adapted_layers(model)
    torch.testing.assert_close(merged(x), model(x), rtol=1e-10, atol=1e-10)
    stir(model)
    with pytest.raises(WaraError, match="where a token lies") as caught:
        wara.merge(model)
    assert caught.value.exit_code == 2


class SplitAttention(nn.Module):
    """A block whose projections are separate layers, as in many models outside timm."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        weights = (self.query(x) @ self.key(x).transpose(1, 2)).softmax(-1)
        return self.out_proj(weights @ self.value(x))


def test_split_projections_answer_to_the_same_names() -> None:
    model = nn.Module()
    model.blocks = nn.ModuleList(SplitAttention(8) for _ in range(2))
    names = [t.name for t in find_targets(model, ("q", "v", "o"), "last_1")]
    assert names == ["blocks.1.query", "blocks.1.value", "blocks.1.out_proj"]


def test_any_module_is_adapted_by_path_patterns() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(SplitAttention(8), SplitAttention(8))
    before = model(torch.ones(1, 4, 8))
    wara.adapt(model, wara.LoRA(targets=("*.query", "1.out_proj"), rank=2))
    assert list(adapted_layers(model)) == ["0.query", "1.query", "1.out_proj"]
    torch.testing.assert_close(model(torch.ones(1, 4, 8)), before)


@pytest.mark.parametrize("fused", [True, False])
def test_models_that_read_the_fused_weight_past_the_layer(fused: bool) -> None:
    """EVA computes `F.linear(x, qkv.weight)` itself; the adapter must be called all the same."""
    torch.manual_seed(0)
    base = Eva(
        img_size=56,
        patch_size=8,
        embed_dim=32,
        depth=2,
        num_heads=2,
        num_classes=3,
        qkv_fused=fused,
    ).eval()
    model = copy.deepcopy(base)
    wara.adapt(model, wara.WaRA(targets=("q", "k", "v")))
    x = images(base)
    torch.testing.assert_close(model(x), base(x), rtol=1e-5, atol=1e-5)
    stir(model)
    assert not torch.allclose(model(x), base(x), atol=1e-3)
    model(x).sum().backward()
    assert all(p.grad is not None for p in wara.trainable_parameters(model).values())
    torch.testing.assert_close(
        wara.unload(model).forward_features(x), base.forward_features(x), rtol=0, atol=0
    )


def test_saved_adapter_reloads_bit_for_bit_and_checks_its_base(tmp_path: Any) -> None:
    base = small_vit()
    for method in (wara.WaRA(core="full"), wara.TinyWaRA(share="model"), wara.Full()):
        model = wara.adapt(copy.deepcopy(base), method)
        stir(model)
        folder = wara.save_adapter(model, tmp_path / method.name, classes=["a", "b", "c"])
        fresh = wara.load_adapter(copy.deepcopy(base), folder)
        x = images(base)
        assert torch.equal(fresh(x), model(x))
    config = json.loads((tmp_path / "wara" / "adapter_config.json").read_text())
    assert config["method"] == "wara" and config["classes"] == ["a", "b", "c"]
    torch.manual_seed(5)
    stranger = small_vit()
    nn.init.normal_(stranger.blocks[0].attn.qkv.weight)
    with pytest.raises(WaraError, match="base weights are not those") as caught:
        wara.load_adapter(stranger, tmp_path / "wara")
    assert caught.value.exit_code == 4 and not adapted_layers(stranger)


def test_damaged_adapter_files_are_refused(tmp_path: Any) -> None:
    base = small_vit()
    wara.save_adapter(wara.adapt(copy.deepcopy(base), wara.LoRA()), tmp_path)
    weights = tmp_path / "adapter_model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[: len(content) // 2])
    with pytest.raises(WaraError, match="damaged") as caught:
        wara.load_adapter(copy.deepcopy(base), tmp_path)
    assert caught.value.exit_code == 4
    weights.write_bytes(content)
    (tmp_path / "adapter_config.json").write_text("{")
    with pytest.raises(WaraError, match="not valid JSON"):
        wara.load_adapter(copy.deepcopy(base), tmp_path)


def test_an_adapter_of_another_width_is_refused(tmp_path: Any) -> None:
    wara.save_adapter(wara.adapt(small_vit(), wara.LoRA()), tmp_path)
    with pytest.raises(WaraError) as caught:
        wara.load_adapter(small_vit(embed_dim=48), tmp_path, check_base=False)
    assert caught.value.exit_code == 4


def test_a_head_of_another_size_is_resized_on_loading(tmp_path: Any) -> None:
    model, other = small_vit(), small_vit()
    wara.save_adapter(wara.adapt(model, wara.WaRA()), tmp_path)
    other.reset_classifier(10)
    fresh = wara.load_adapter(other, tmp_path)
    assert fresh(images(fresh)).shape == (2, 3)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"method": "warra"}, ["unknown method 'warra'", "did you mean 'wara'"]),
        ({"method": "wara", "rnak": 4}, ["no option 'rnak'", "did you mean 'rank'"]),
        (
            {"method": "wara", "rank": "4"},
            ['rank should be a whole number, not "4"', "adapter.rank"],
        ),
        ({"method": "wara", "rank": True}, ["rank should be a whole number, not true"]),
        ({"method": "wara", "core": "dia"}, ["did you mean 'diag'"]),
        ({"method": "wara", "targets": ["q", "kk"]}, ["unknown target 'kk'"]),
        ({"method": "wara", "targets": ["qkv", "q"]}, ["overlaps"]),
        ({"method": "wara", "wavelet": "haarr"}, ["did you mean 'haar'"]),
        ({"method": "lora", "core": "diag"}, ["'lora' has no option 'core'"]),
        ({"method": "wara", "rank": 0}, ["at least 1"]),
        ({"method": "wara", "level": 0}, ["level should be at least 1, not 0"]),
    ],
)
def test_wrong_options_are_named_with_the_nearest_valid_word(
    options: dict[str, Any], words: list[str]
) -> None:
    text = "\n".join(map(str, option_faults(options)))
    assert all(word in text for word in words), text
    with pytest.raises(WaraError) as caught:
        method_from_options(options.pop("method"), options)
    assert caught.value.exit_code == 2


def test_all_wrong_options_are_reported_at_once() -> None:
    faults = option_faults({"method": "wara", "rnak": 4, "level": "deep", "blocks": 1.5})
    assert len(faults) == 3


def test_rows_adapted_twice_are_refused() -> None:
    with pytest.raises(WaraError, match="same rows twice"):
        wara.adapt(small_vit(), wara.LoRA(targets=("q", "*.qkv")))
    with pytest.raises(WaraError, match="blocks should be .*, not \\[true\\]"):
        wara.adapt(small_vit(), wara.LoRA(blocks=[True]))


@pytest.mark.parametrize("method", [wara.Full(), wara.WaRA(), wara.LinearProbe()])
def test_counts_add_up_to_the_model(method: Any) -> None:
    model = wara.adapt(small_vit(), method)
    counts = count_parameters(model)
    assert counts["trainable"] == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert counts["trainable"] + counts["base"] == sum(p.numel() for p in model.parameters())


def test_a_failed_load_leaves_the_model_as_it_was(tmp_path: Any) -> None:
    base = small_vit()
    model = wara.adapt(copy.deepcopy(base), wara.WaRA())
    stir(model)
    x = images(base)
    before = model(x)
    other = small_vit(embed_dim=48, num_classes=7)
    wara.save_adapter(wara.adapt(other, wara.LoRA()), tmp_path / "other")
    wara.save_adapter(model, tmp_path / "own")
    config = tmp_path / "own" / "adapter_config.json"
    fields = json.loads(config.read_text())
    for spoiled in ({"options": None}, {"method": "nonsense"}, {"base_sha256": "0"}):
        config.write_text(json.dumps(fields | spoiled))
        with pytest.raises(WaraError) as caught:
            wara.load_adapter(model, tmp_path / "own")
        assert caught.value.exit_code == 4 and torch.equal(model(x), before)
    with pytest.raises(WaraError):
        wara.load_adapter(model, tmp_path / "other", check_base=False)
    assert torch.equal(model(x), before) and model.num_classes == 3


def test_valid_options_pass() -> None:
    options = {"method": "wara", "rank": 8, "alpha": 16, "blocks": "last_6", "targets": ["q", "v"]}
    assert option_faults(options) == []
    assert option_faults({"method": "lora", "blocks": [0, 2]}) == []


@pytest.mark.parametrize("blocks", ["last_0", "last_9", "first", [3], [-1], []])
def test_blocks_that_do_not_exist_are_refused(blocks: Any) -> None:
    with pytest.raises(WaraError, match="blocks|block"):
        block_indices(blocks, 3)


def test_a_target_that_matches_nothing_lists_what_there_is() -> None:
    model = small_vit()
    with pytest.raises(WaraError, match=r"no linear layer matches \*\.quary.*fc1"):
        wara.adapt(model, wara.LoRA(targets=("*.quary",)))
    with pytest.raises(WaraError, match="carries no adapter"):
        wara.trainable_parameters(model)


def test_token_domain_methods_refuse_a_model_without_a_grid() -> None:
    with pytest.raises(WaraError, match="no token grid"):
        wara.adapt(nn.Sequential(nn.Linear(4, 4)), wara.WaRA(targets=("0*",)))


def test_an_input_of_another_size_is_refused_and_not_misread() -> None:
    model = small_vit(dynamic_img_size=True)
    wara.adapt(model, wara.WaRA())
    with pytest.raises(WaraError, match="grid 7x7"):
        model(torch.randn(1, 3, 64, 64))


def energy_of_proj(model: Any) -> tuple[Tensor, dict[str, float], Any]:
    """Return what the first output projection sees, its energies, and its adapter."""
    x = images(model)
    seen: list[Tensor] = []
    layer = adapted_layers(model)["blocks.0.attn.proj"]
    handle = layer.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    energy = subband_energy(model, x)["blocks.0.attn.proj"]
    handle.remove()
    adapter: Any = layer.adapter
    return seen[0], energy, adapter


def test_analysis_agrees_with_direct_computation() -> None:
    model = small_vit(img_size=(40, 72))
    wara.adapt(model, wara.WaRA(core="full", rank=3, alpha=6.0))
    stir(model)
    tokens, energy, adapter = energy_of_proj(model)
    zero = torch.zeros_like(adapter.core[0])
    for s, name in enumerate(adapter.mixer.names):
        cores = zero.clone()
        cores[s] = adapter.core[0, s]
        delta = wara_update(tokens, adapter.down, adapter.up, cores, (5, 9), prefix_tokens=1)
        expected = (2.0 * delta[:, 1:]).square().sum().item() / 2
        assert energy[name] == pytest.approx(expected, rel=1e-4)
    spectra = singular_values(model)["blocks.0.attn.qkv[k]"]
    adapter = adapted_layers(model)["blocks.0.attn.qkv"].adapter
    dense = 2.0 * adapter.up[32:64] @ adapter.core[1, 2] @ adapter.down[3:6]
    torch.testing.assert_close(
        spectra["HL_1"], torch.linalg.svdvals(dense.detach())[:3], rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("boundary", ["symmetric", "zero"])
def test_energies_hold_the_constant_of_tiny_wara(boundary: Any) -> None:
    """It is one more channel of the input, of ones, which lives where its bands say."""
    model = small_vit(img_size=(40, 72))
    wara.adapt(model, wara.TinyWaRA(rank=3, boundary=boundary))
    stir(model)
    tokens, energy, adapter = energy_of_proj(model)
    tokens = torch.cat([tokens, torch.ones_like(tokens[..., :1])], -1)
    down = torch.block_diag(adapter.down, torch.ones(1, 1))
    up = torch.cat([adapter.up, (adapter.up @ adapter.shift)[:, None]], 1)
    for s, name in enumerate(adapter.mixer.names):
        cores = torch.zeros(len(adapter.mixer.names), 4, 4)
        cores[s] = torch.block_diag(adapter.full_cores()[0, s], torch.ones(1, 1))
        delta = wara_update(tokens, down, up, cores, (5, 9), prefix_tokens=1, boundary=boundary)
        assert energy[name] == pytest.approx(delta[:, 1:].square().sum().item() / 2, rel=1e-4)


def test_tiny_wara_of_earlier_files_is_what_it_was() -> None:
    """They hold all options, so the form that is the default now does not touch them."""
    options = {
        "targets": ["q", "k", "v", "o"], "blocks": "all", "budget": None, "rank": 8, "alpha": None,
        "prefix": "adapt", "wavelet": "haar", "level": 1, "boundary": "symmetric", "seed": 0,
        "coefficients": 8, "share": "subband",
    }  # fmt: skip
    method = wara.adapters.method_from_options("tiny_wara", options)
    assert method.options() == options
    model = wara.adapt(small_vit(), method)
    stored = {name.rsplit(".", 1)[1] for name in adapter_state_dict(model) if "adapter" in name}
    assert stored == {"vector", "down", "up", "bases"}
    first: Any = adapted_layers(model)["blocks.0.attn.qkv"].adapter
    drawn = torch.randn(3, 8, 8, 8, generator=torch.Generator().manual_seed(0)) / 8**0.5
    assert torch.equal(first.bases, drawn)


def test_distilled_models_train_both_heads() -> None:
    model = timm.create_model("deit_tiny_distilled_patch16_224", num_classes=2, img_size=32)
    wara.adapt(model, wara.WaRA(blocks=[0]))
    heads = {n for n in wara.trainable_parameters(model) if n.startswith("head")}
    assert heads == {"head.weight", "head.bias", "head_dist.weight", "head_dist.bias"}
