"""Methods made for ViTs, against a ViT written out by hand, and the two controls of WaRA."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from oracles import reseal
from safetensors.torch import load_file, save_file
from test_adapters import images, small_vit, stir
from timm.models.beit import Beit
from timm.models.eva import Eva
from timm.models.vision_transformer import ParallelScalingBlock
from torch import Tensor, nn

import wara
from wara.adapters import METHODS, adapter_state_dict, count_parameters, method_from_options
from wara.adapters.base import adapted_layers
from wara.deploy.graph import Served, export_onnx, plain
from wara.deploy.predictor import session
from wara.errors import WaraError
from wara.training.trunk import Trunk, Upper, check_trunk, trunk_depth
from wara.wavelets import RANDOM, grid_transform, random_transform

# Odd, not square, and with more or fewer prefix tokens than one.
LAYOUTS: dict[str, dict[str, Any]] = {
    "odd": {"img_size": (40, 56)},
    "registers": {"img_size": (24, 40), "reg_tokens": 3},
    "no prefix": {"img_size": (40, 24), "class_token": False, "global_pool": "avg"},
    "layer scale": {"img_size": (32, 48), "init_values": 0.3},
}
NAMES = ["adaptformer", "convpass", "vpt", "fact_tt", "apla", "ssf", "rank_conv"]
SMALL: dict[str, dict[str, Any]] = {
    "adaptformer": {"bottleneck": 5, "scale": 0.7},
    "convpass": {"bottleneck": 4, "scale": 0.5},
    "vpt": {"tokens": 3},
    "fact_tt": {"rank": 3, "scale": 2.0},
    "apla": {"rows": 7, "seed": 4},
    "ssf": {},
    "rank_conv": {"rank": 3, "alpha": 6.0},
    "random": {"wavelet": RANDOM, "rank": 3, "core": "full", "seed": 5},
}
every_layout = pytest.mark.parametrize("layout", LAYOUTS)
every_name = pytest.mark.parametrize("name", [*NAMES, "random"])


def adapted(name: str, model: Any, amount: float = 0.3, **more: Any) -> Any:
    method = "wara" if name == "random" else name
    wara.adapt(model, method_from_options(method, {**SMALL[name], **more}))
    stir(model, amount)
    return model


def pair(name: str, layout: str) -> tuple[Any, Any, dict[str, Tensor]]:
    """Return a model in float64, the same adapted, and the adapter's tensors."""
    base = small_vit(**LAYOUTS[layout]).double()
    model = adapted(name, copy.deepcopy(base))
    return base, model, adapter_state_dict(model)


Behind = Callable[[str, Tensor, Tensor], Tensor]


def by_hand(model: Any, pixels: Tensor, behind: Behind, prompts: Any = None) -> Tensor:
    """A ViT step by step; `behind(path, input, output)` may change what an operation gives.

    Prompts of block `i` stand where the paper has them, between prefix and patches.
    """
    state = dict(model.named_parameters())

    def linear(path: str, x: Tensor) -> Tensor:
        return behind(path, x, x @ state[f"{path}.weight"].T + state[f"{path}.bias"])

    def norm(path: str, x: Tensor) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        unit = centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt()
        return behind(path, x, unit * state[f"{path}.weight"] + state[f"{path}.bias"])

    side, width, p = 8, model.embed_dim, model.num_prefix_tokens
    cut = pixels.unfold(2, side, side).unfold(3, side, side).permute(0, 2, 3, 1, 4, 5).flatten(3)
    kernel = state["patch_embed.proj.weight"].flatten(1)
    patches = (cut @ kernel.T + state["patch_embed.proj.bias"]).permute(0, 3, 1, 2)
    x = model._pos_embed(behind("patch_embed.proj", pixels, patches).flatten(2).transpose(1, 2))
    for i, block in enumerate(model.blocks):
        path = f"blocks.{i}"
        t = 0 if prompts is None else prompts[i].shape[0]
        if t:
            own = prompts[i].expand(len(x), -1, -1)
            x = torch.cat([x[:, :p], own, x[:, p:]], 1)
        h = norm(f"{path}.norm1", x)
        q, k, v = linear(f"{path}.attn.qkv", h).chunk(3, -1)
        mixed = []
        for part in range(2):  # heads
            one = slice(part * width // 2, (part + 1) * width // 2)
            scores = q[..., one] @ k[..., one].transpose(1, 2) / (width // 2) ** 0.5
            mixed.append(scores.softmax(-1) @ v[..., one])
        y = linear(f"{path}.attn.proj", torch.cat(mixed, -1))
        x = x + block.ls1(behind(f"{path}.attn", h, y))
        h = norm(f"{path}.norm2", x)
        g = linear(f"{path}.mlp.fc1", h)
        y = linear(f"{path}.mlp.fc2", g * 0.5 * (1 + torch.erf(g / 2**0.5)))
        x = x + block.ls2(behind(f"{path}.mlp", h, y))
        if t:
            x = torch.cat([x[:, :p], x[:, p + t :]], 1)
    last = "fc_norm" if isinstance(model.norm, nn.Identity) else "norm"
    if last == "norm":
        x = norm(last, x)
        return x[:, 0] @ state["head.weight"].T + state["head.bias"]
    return norm(last, x[:, p:].mean(1)) @ state["head.weight"].T + state["head.bias"]


def check(base: Any, model: Any, state: dict[str, Tensor], behind: Behind, **more: Any) -> None:
    pixels = images(model).double()
    own = {key: value for key, value in state.items() if key.startswith("head.")}
    with torch.no_grad():
        untouched = base(pixels)
        base.load_state_dict(own, strict=False)
        wanted = by_hand(base, pixels, behind, **more)
        torch.testing.assert_close(model(pixels), wanted, rtol=1e-9, atol=1e-9)
        assert (wanted - untouched).abs().max() > 1e-2


def neighbours(image: np.ndarray, kernel: Callable[[int, int], Any]) -> np.ndarray:
    """Sum over the nine places around each of `[h, w, c]`; `kernel(i, j)` maps channels."""
    h, w, _ = image.shape
    out = np.zeros_like(image)
    for y in range(h):
        for x in range(w):
            for i in range(3):
                for j in range(3):
                    if 0 <= y + i - 1 < h and 0 <= x + j - 1 < w:
                        out[y, x] += kernel(i, j)(image[y + i - 1, x + j - 1])
    return out


@every_layout
def test_adaptformer(layout: str) -> None:
    base, model, state = pair("adaptformer", layout)

    def behind(path: str, x: Tensor, y: Tensor) -> Tensor:
        if not path.endswith(".mlp"):
            return y
        down, b, up, c = (
            state[f"{path}.adapter.{part}.{kind}"]
            for part in ("down", "up") for kind in ("weight", "bias")
        )  # fmt: skip
        z = torch.einsum("hd,bnd->bnh", down, x) + b
        return y + 0.7 * (torch.einsum("dh,bnh->bnd", up, z * (z > 0)) + c)

    check(base, model, state, behind)


@every_layout
def test_convpass(layout: str) -> None:
    base, model, state = pair("convpass", layout)
    h, w = base.patch_embed.grid_size

    def activated(z: np.ndarray) -> np.ndarray:
        return z / (1 + np.exp(-1.702 * z))

    def behind(path: str, x: Tensor, y: Tensor) -> Tensor:
        if path.rsplit(".", 1)[-1] not in ("attn", "mlp"):
            return y
        own = {k.split("adapter.")[1]: v.numpy() for k, v in state.items() if f"{path}.adap" in k}
        kernel, b = own["conv.weight"], own["conv.bias"]
        out = np.zeros(y.shape)
        for n, tokens in enumerate(x.numpy()):
            z = activated(tokens @ own["down.weight"].T + own["down.bias"])
            p = len(z) - h * w
            alone = [
                neighbours(one.reshape(1, 1, -1), lambda i, j: lambda c: kernel[:, :, i, j] @ c)[0]
                for one in z[:p]
            ]
            grid = neighbours(
                z[p:].reshape(h, w, -1), lambda i, j: lambda c: kernel[:, :, i, j] @ c
            )
            mixed = np.concatenate([*alone, grid.reshape(h * w, -1)]) + b
            out[n] = activated(mixed) @ own["up.weight"].T + own["up.bias"]
        return y + 0.5 * torch.from_numpy(out)

    check(base, model, state, behind)


@every_layout
def test_vpt(layout: str) -> None:
    base, model, state = pair("vpt", layout)
    prompts = [state[f"blocks.{i}.adapter.prompts"] for i in range(len(base.blocks))]
    check(base, model, state, lambda path, x, y: y, prompts=prompts)


def test_prompts_are_drawn_as_in_the_paper() -> None:
    torch.manual_seed(0)
    model = wara.adapt(small_vit(), METHODS["vpt"](tokens=400))
    drawn = model.blocks[0].adapter.prompts.detach()  # type: ignore[union-attr]
    bound = (6 / (3 * 8 * 8 + 32)) ** 0.5
    assert 0.99 * bound < drawn.abs().max() <= bound
    assert drawn.std() == pytest.approx(bound / 3**0.5, rel=0.02)
    assert not torch.equal(drawn, model.blocks[1].adapter.prompts)  # type: ignore[union-attr]


@every_layout
def test_ssf(layout: str) -> None:
    base, model, state = pair("ssf", layout)

    def behind(path: str, x: Tensor, y: Tensor) -> Tensor:
        gamma = state.get(f"{path}.adapter.gamma")
        if gamma is None:
            assert path.rsplit(".", 1)[-1] in ("attn", "mlp")
            return y
        beta = state[f"{path}.adapter.beta"]
        if path == "patch_embed.proj":
            gamma, beta = gamma[:, None, None], beta[:, None, None]
        return gamma * y + beta

    check(base, model, state, behind)


@every_layout
def test_fact_tt(layout: str) -> None:
    base, model, state = pair("fact_tt", layout)
    first, last = (
        state[f"blocks.0.attn.qkv.adapter.{key}"].numpy() for key in ("first", "last")
    )
    d = base.embed_dim
    counts = {"qkv": (3, 1), "proj": (1, 1), "fc1": (4, 1), "fc2": (1, 4)}

    def behind(path: str, x: Tensor, y: Tensor) -> Tensor:
        leaf = path.rsplit(".", 1)[-1]
        if leaf not in counts or path == "patch_embed.proj":
            return y
        core = state[f"{path}.adapter.core"].numpy()
        assert core.shape == (*counts[leaf], 3, 3)
        change = np.zeros((core.shape[0] * d, core.shape[1] * d))
        for i, row in enumerate(core):
            for j, sigma in enumerate(row):
                change[i * d : (i + 1) * d, j * d : (j + 1) * d] = last @ sigma @ first
        return y + 2.0 * x @ torch.from_numpy(change).T

    check(base, model, state, behind)


def test_fact_tt_on_some_matrices_counts_and_cuts() -> None:
    model = adapted("fact_tt", small_vit(), targets=["k", "fc2"], blocks=[1])
    layers = adapted_layers(model)
    assert set(layers) == {"blocks.1.attn.qkv", "blocks.1.mlp.fc2"}
    assert count_parameters(model)["adapter"] == 2 * 3 * 32 + 5 * 9
    change = layers["blocks.1.attn.qkv"].adapter.delta_weight()  # type: ignore[operator]
    assert change[32:64].abs().min() > 0 and not change[:32].any() and not change[64:].any()
    with pytest.raises(WaraError, match=r"fc1 has a side of 80, which is no multiple of 32") as e:
        wara.adapt(small_vit(mlp_ratio=2.5), METHODS["fact_tt"]())
    assert e.value.exit_code == 2


@every_layout
def test_apla(layout: str) -> None:
    base, model, state = pair("apla", layout)
    before = {name: p.clone() for name, p in base.named_parameters()}
    chosen = []
    with torch.no_grad():
        for i, block in enumerate(base.blocks):
            rows = state[f"blocks.{i}.attn.proj.adapter.places"].tolist()
            assert len(set(rows)) == 7 and set(rows) <= set(range(32))
            chosen.append(rows)
            for row, change in zip(
                rows, state[f"blocks.{i}.attn.proj.adapter.change"], strict=True
            ):
                block.attn.proj.weight[row] += change
    assert chosen[0] != chosen[1]
    check(base, model, state, lambda path, x, y: y)
    merged = wara.merge(model)
    for i, rows in enumerate(chosen):
        name = f"blocks.{i}.attn.proj.weight"
        moved = (merged.get_parameter(name) != before[name]).any(1).nonzero().flatten().tolist()
        assert moved == sorted(rows)


def test_the_rows_come_from_the_seed_and_then_from_the_file(tmp_path: Path) -> None:
    def rows(seed: int) -> list[list[int]]:
        torch.manual_seed(int.from_bytes(b"any") + seed)
        model = wara.adapt(small_vit(), METHODS["apla"](rows=5, seed=seed))
        return [layer.adapter.places.tolist() for layer in adapted_layers(model).values()]

    assert rows(1) == rows(1) != rows(2)
    wara.save_adapter(adapted("apla", small_vit()), tmp_path)
    weights = tmp_path / "adapter_model.safetensors"
    tensors = load_file(weights)
    key = "blocks.0.attn.proj.adapter.places"
    other = tensors[key].clone()
    other[0] = next(row for row in range(32) if row not in other.tolist())
    save_file({**tensors, key: other}, weights)
    reseal(tmp_path, lambda content: None)
    loaded = wara.load_adapter(small_vit(), tmp_path)
    assert torch.equal(adapter_state_dict(loaded)[key], other)
    for wrong in (32, int(other[1])):
        other[0] = wrong
        save_file({**tensors, key: other}, weights)
        reseal(tmp_path, lambda content: None)
        with pytest.raises(WaraError, match="trained row occurs twice or lies outside") as caught:
            wara.load_adapter(small_vit(), tmp_path)
        assert caught.value.exit_code == 4


@every_layout
@pytest.mark.parametrize("prefix", ["adapt", "skip"])
def test_rank_conv(layout: str, prefix: str) -> None:
    base = small_vit(**LAYOUTS[layout]).double()
    model = adapted("rank_conv", copy.deepcopy(base), prefix=prefix)
    state = adapter_state_dict(model)
    h, w = base.patch_embed.grid_size

    def behind(path: str, x: Tensor, y: Tensor) -> Tensor:
        if f"{path}.adapter.down" not in state:
            return y
        down, up, core = (
            state[f"{path}.adapter.{key}"].numpy() for key in ("down", "up", "core")
        )
        out = np.zeros(y.shape)
        for n, tokens in enumerate(x.numpy()):
            p = len(tokens) - h * w
            for g in range(len(core)):  # q, k and v, or the one
                z = tokens @ down[3 * g : 3 * g + 3].T
                grid = neighbours(
                    z[p:].reshape(h, w, 3), lambda i, j, g=g: lambda c: core[g, :, i, j] * c
                )
                head = z[:p] * (prefix == "adapt")
                rows = slice(32 * g, 32 * g + 32)
                out[n][:, rows] = np.concatenate([head, grid.reshape(h * w, 3)]) @ up[rows].T
        return y + 6 / 3 * torch.from_numpy(out)

    check(base, model, state, behind)


def test_rank_conv_starts_as_lora_and_can_be_merged_until_kernels_move() -> None:
    model = wara.adapt(small_vit(), METHODS["rank_conv"](rank=3))
    with torch.no_grad():
        for layer in adapted_layers(model).values():
            layer.adapter.up.normal_()  # type: ignore[operator]
    lora = wara.adapt(small_vit(), METHODS["lora"](rank=3))
    lora.load_state_dict({k: v for k, v in model.state_dict().items() if "core" not in k})
    x = images(model)
    with torch.no_grad():
        torch.testing.assert_close(model(x), lora(x), rtol=1e-5, atol=1e-5)
        merged = wara.merge(model).eval()
        torch.testing.assert_close(merged(x), model(x), rtol=1e-5, atol=1e-5)
        model.blocks[0].attn.proj.adapter.core[0, 0, 0, 0] = 0.1  # type: ignore[union-attr]
    with pytest.raises(WaraError, match="where a token lies"):
        wara.merge(model)


@pytest.mark.parametrize(("grid", "level"), [((5, 7), 2), ((4, 6), 1), ((8, 8), 3), ((14, 14), 1)])
def test_the_random_transform_is_orthogonal_with_the_sizes_of_subbands(
    grid: tuple[int, int], level: int
) -> None:
    n = grid[0] * grid[1]
    made = random_transform(grid, level, 3)
    words = np.random.SeedSequence(3).generate_state(4)
    q, r = np.linalg.qr(np.random.RandomState(words).standard_normal((n, n)))
    np.testing.assert_allclose(made.analysis.numpy(), (q * np.sign(np.diag(r))).T, atol=1e-10)
    np.testing.assert_allclose(made.synthesis @ made.analysis, np.eye(n), atol=1e-12)
    assert torch.equal(made.synthesis, made.analysis.T) and sum(made.sizes) == n
    assert len(made.sizes) == 3 * level + 1
    if all(side % 2**level == 0 for side in grid):
        assert made.sizes == grid_transform(grid, "haar", level).sizes
    assert (random_transform(grid, level, 4).analysis - made.analysis).abs().max() > 0.1
    # No part knows of the grid: a constant image, which is all of LL, is spread over all parts.
    constant = (made.analysis @ torch.ones(n, dtype=torch.float64)).square().split(made.sizes)
    shares = [float(part.sum()) / n for part in constant]
    assert max(shares) < 0.95 and sum(shares) == pytest.approx(1)


@every_layout
def test_wara_with_a_random_transform(layout: str) -> None:
    base, model, state = pair("random", layout)
    grid = base.patch_embed.grid_size
    made = random_transform(grid, 1, 5)
    parts = np.split(made.analysis.numpy(), np.cumsum(made.sizes)[:-1])
    projectors = [part.T @ part for part in parts]  # Qᵀ mask_s Q
    np.testing.assert_allclose(sum(projectors), np.eye(len(projectors[0])), atol=1e-12)

    def behind(path: str, x: Tensor, y: Tensor) -> Tensor:
        if f"{path}.adapter.down" not in state:
            return y
        down, up, core = (
            state[f"{path}.adapter.{key}"].numpy() for key in ("down", "up", "core")
        )
        out = np.zeros(y.shape)
        for n, tokens in enumerate(x.numpy()):
            p = len(tokens) - grid[0] * grid[1]
            for g, cores in enumerate(core):
                z = tokens @ down[3 * g : 3 * g + 3].T
                mixed = sum(q @ z[p:] @ k.T for q, k in zip(projectors, cores, strict=True))
                rows = slice(32 * g, 32 * g + 32)
                out[n][:, rows] = np.concatenate([z[:p], mixed]) @ up[rows].T
        return y + torch.from_numpy(out)

    check(base, model, state, behind)


def test_options_without_effect_on_a_random_transform_are_refused() -> None:
    with pytest.raises(WaraError, match="boundary 'zero' means nothing to a random transform"):
        wara.adapt(small_vit(), METHODS["wara"](wavelet=RANDOM, boundary="zero"))
    with pytest.raises(WaraError, match="unknown wavelet 'randon'"):
        METHODS["wara"](wavelet="randon")
    with pytest.raises(WaraError, match="unknown wavelet 'random'"):
        METHODS["waveft"](wavelet=RANDOM)


d, L, PATCHES = 768, 12, 3 * 16 * 16
VIT_B = {
    "adaptformer": (L * (2 * d * 64 + 64 + d), 1.19),
    "convpass": (2 * L * (2 * d * 8 + 9 * 8 * 8 + 8 + 8 + d), 0.33),
    "vpt": (L * 50 * d, 0.46),
    "fact_tt": (2 * d * 16 + 12 * L * 16**2, 0.06),
    "apla": (L * 32 * d, 0.29),
    "ssf": (2 * d + L * 2 * (d + 3 * d + d + d + 4 * d + d) + 2 * d, 0.21),
    "rank_conv": (L * 4 * 4 * (2 * d + 9), 0.30),
}


@pytest.mark.parametrize("name", NAMES)
def test_sizes_on_vit_b(name: str) -> None:
    with torch.device("meta"):
        model = timm.create_model("vit_base_patch16_224", num_classes=10)
    wanted, millions = VIT_B[name]
    found = count_parameters(wara.adapt(model, METHODS[name](), empty=True))["adapter"]
    assert found == wanted and round(found / 1e6, 2) == millions


@every_name
def test_a_model_in_bfloat16(name: str, tmp_path: Path) -> None:
    model = adapted(name, small_vit(**LAYOUTS["registers"]), 0.05)
    x = images(model)
    with torch.no_grad():
        sharp = model(x)
        low = copy.deepcopy(model).bfloat16()
        found = low(x.bfloat16())
        assert found.dtype == torch.bfloat16
        torch.testing.assert_close(found.float(), sharp, rtol=0.1, atol=0.1)
        # And the file of the sharp one, on a base that is not.
        wara.save_adapter(model, tmp_path)
        loaded = wara.load_adapter(small_vit(**LAYOUTS["registers"]).bfloat16(), tmp_path).eval()
        assert torch.equal(loaded(x.bfloat16()), found)


@every_name
def test_the_trunk_ends_where_a_method_begins(name: str) -> None:
    model = adapted(name, small_vit(**LAYOUTS["registers"]), blocks="last_1")
    assert trunk_depth(model) == 2
    size = model.patch_embed.img_size
    check_trunk(model, 2, size)
    x = images(model)
    with torch.no_grad():
        tokens = Trunk(model, 2)(x)
        assert tokens.shape[1] == 4 + 15
        torch.testing.assert_close(Upper(model, 2, size)(tokens), model(x), rtol=1e-4, atol=1e-4)
    assert trunk_depth(adapted(name, small_vit())) == 0


@pytest.mark.parametrize("name", ["adaptformer", "convpass", "vpt", "fact_tt"])
def test_dropout_acts_in_training_alone(name: str) -> None:
    model = adapted(name, small_vit(), dropout=0.5)
    x = images(model)
    with torch.no_grad():
        torch.testing.assert_close(model(x), adapted(name, small_vit())(x))
        model.train()
        assert not torch.equal(model(x), model(x))


# -- architectures ----------------------------------------------------------------------------


def rotary(**more: Any) -> Any:
    torch.manual_seed(0)
    sizes = {"img_size": (40, 24), "patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 2}
    return Eva(**sizes, num_classes=3, use_rot_pos_emb=True, **more).eval()


def test_prompts_have_no_place_where_positions_are_rotary() -> None:
    base = rotary()
    before = wara.adapters.base_hash(base)
    model = adapted("vpt", copy.deepcopy(base))
    assert wara.adapters.base_hash(model) == before
    # The same blocks in a model that has three register tokens.
    other = rotary(num_reg_tokens=3)
    other.blocks.load_state_dict(base.blocks.state_dict())
    x = torch.randn(2, 16, 64)
    rope = base.rope.get_embed()
    for i in range(2):
        prompts = model.blocks[i].adapter.prompts
        with torch.no_grad():
            tokens = torch.cat([x[:, :1], prompts.expand(2, -1, -1), x[:, 1:]], 1)
            wanted = other.blocks[i](tokens, rope=rope)
            found = model.blocks[i](x, rope=rope)
        torch.testing.assert_close(found[:, :1], wanted[:, :1], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(found[:, 1:], wanted[:, 4:], rtol=1e-5, atol=1e-5)
    pixels = torch.randn(2, 3, 40, 24)
    with torch.no_grad():
        features = base.forward_features(pixels)
        assert torch.equal(wara.unload(model).forward_features(pixels), features)
    assert [block.attn.num_prefix_tokens for block in model.blocks] == [1, 1]


@pytest.mark.parametrize("shared", [True, False])
def test_prompts_are_refused_where_pairs_of_places_have_biases(shared: bool) -> None:
    sizes: dict[str, Any] = {"img_size": 48, "patch_size": 8, "embed_dim": 64, "depth": 2}
    model = Beit(
        **sizes, num_heads=2, use_rel_pos_bias=not shared, use_shared_rel_pos_bias=shared
    )
    with pytest.raises(WaraError, match="a bias per pair of places") as caught:
        wara.adapt(model, METHODS["vpt"]())
    assert caught.value.exit_code == 2 and not adapted_layers(model)
    wara.adapt(model, METHODS["convpass"]())


@pytest.mark.parametrize("name", ["adaptformer", "convpass"])
def test_blocks_without_attention_and_mlp_are_refused(name: str) -> None:
    model = small_vit(block_fn=ParallelScalingBlock)
    with pytest.raises(WaraError, match="has no module '(attn|mlp)'") as caught:
        wara.adapt(model, METHODS[name]())
    assert caught.value.exit_code == 2
    with pytest.raises(WaraError, match="has no (blocks|token grid|one width)"):
        wara.adapt(nn.Sequential(nn.Linear(3, 3)), METHODS[name]())


def test_blocks_on_patch_tokens_alone() -> None:
    """CaiT adds its class token after the blocks that are adapted."""
    for name in NAMES:
        torch.manual_seed(0)
        model = timm.create_model("cait_xxs24_224", num_classes=2, img_size=32, depth=2).eval()
        x = torch.randn(2, 3, 32, 32)
        with torch.no_grad():
            before = model(x)
            assert not torch.allclose(adapted(name, model)(x), before), name


# -- served -----------------------------------------------------------------------------------


@pytest.mark.slow
@every_name
def test_the_exported_graph_says_the_same(name: str, tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    model = adapted(name, small_vit(**LAYOUTS["registers"]))
    served, merged = plain(model)
    assert merged == (name in ("fact_tt", "apla", "ssf"))
    path = tmp_path / "model.onnx"
    export_onnx(served, (24, 40), path)
    ready = session(path.read_bytes(), path.name)
    for batch in (1, 3):
        x = images(model, batch)
        with torch.no_grad():
            wanted = Served(model)(x)
        found = ready.run(["logits", "features"], {"images": x.numpy()})
        for one, theirs in zip(found, wanted, strict=True):
            np.testing.assert_allclose(one, theirs.numpy(), atol=1e-4)
