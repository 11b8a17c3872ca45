"""A model in two parts computes what the whole computes, whatever its architecture."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
from torch import nn

import wara
from wara.errors import WaraError
from wara.training.trunk import Trunk, Upper, check_trunk, trunk_depth

SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 3, "num_heads": 3}
MODELS = {
    "vit_tiny_patch16_224": SMALL,
    "vit_small_patch14_reg4_dinov2": SMALL,
    "vit_base_patch16_clip_224": SMALL,  # norm_pre
    "vit_base_patch16_siglip_224": SMALL,  # attention pooling
    "deit3_small_patch16_224": SMALL,
    "deit_tiny_distilled_patch16_224": SMALL,  # two heads
    "eva02_tiny_patch14_224": SMALL,  # rotary positions
    "vit_small_patch16_dinov3": SMALL,
    "vit_small_patch16_rope_mixed_224": SMALL,  # rotary positions of each block
    "beit_base_patch16_224": SMALL,
    "samvit_base_patch16": {**SMALL, "window_size": 2, "global_attn_indexes": (2,)},
}


def adapted(name: str, method: wara.Method | None = None, **options: object) -> nn.Module:
    torch.manual_seed(0)
    options = {**MODELS.get(name, SMALL), **options}
    model = timm.create_model(name, num_classes=3, **options).eval()
    wara.adapt(model, method or wara.LoRA(rank=2, blocks="last_1"))
    with torch.no_grad():
        for parameter in wara.trainable_parameters(model).values():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_two_parts_are_the_whole(name: str, training: bool) -> None:
    model = adapted(name)
    model.train(training)
    depth, images = trunk_depth(model), torch.randn(4, 3, 32, 32)
    assert depth == 2
    whole = copy.deepcopy(model)
    upper = Upper(model, depth, (32, 32))
    with torch.no_grad():
        tokens = Trunk(model, depth)(images)
    found, wanted = upper(tokens), whole(images)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    for logits in (found, wanted):
        logits.square().sum().backward()
    own, other = (wara.trainable_parameters(each) for each in (model, whole))
    for key, parameter in own.items():
        torch.testing.assert_close(parameter.grad, other[key].grad, rtol=1e-3, atol=1e-4)
    # The model itself was not taken apart.
    with torch.no_grad():
        assert torch.equal(model(images), whole(images))
    assert [n for n, _ in model.named_modules()] == [n for n, _ in whole.named_modules()]
    assert check_trunk(model, depth, (32, 32)) == tuple(tokens.shape[1:])
    assert model.training == training


@pytest.mark.parametrize(
    ("method", "depth"),
    [
        (wara.LoRA(blocks="all"), 0),
        (wara.LoRA(blocks="last_2"), 1),
        (wara.LoRA(blocks=[1]), 1),
        (wara.WaRA(blocks="last_1", level=1), 2),
        (wara.LoRA(targets=["blocks.2.mlp.*"]), 2),
        (wara.LoRA(targets=["*.fc1"]), 0),
        (wara.LinearProbe(), 3),
        (wara.Full(), 0),
        (wara.adapters.METHODS["bitfit"](), 0),
        (wara.adapters.METHODS["ln_tuning"](), 0),
    ],
    ids=str,
)
def test_the_trunk_ends_below_what_changes(method: wara.Method, depth: int) -> None:
    assert trunk_depth(adapted("vit_tiny_patch16_224", method)) == depth


def test_a_linear_probe_runs_no_block() -> None:
    model = adapted("vit_tiny_patch16_224", wara.LinearProbe())
    upper, calls = Upper(model, 3, (32, 32)), []
    for block in model.get_submodule("blocks"):
        block.register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        upper(torch.randn(2, 17, 48))
    assert not calls


def refused(model: nn.Module, depth: int = 2) -> str:
    with pytest.raises(WaraError) as caught:
        check_trunk(model, depth, (32, 32))
    assert caught.value.exit_code == 2 and caught.value.where == "data.trunk"
    return str(caught.value)


@pytest.mark.parametrize(
    ("option", "where"),
    [
        ("drop_path_rate", "blocks.1.drop_path1"),
        ("proj_drop_rate", "blocks.0.attn.proj_drop"),
        ("attn_drop_rate", "blocks.0.attn.attn_drop"),
        ("pos_drop_rate", "pos_drop"),
        ("patch_drop_rate", "patch_drop"),
    ],
)
def test_a_trunk_that_draws_is_refused(option: str, where: str) -> None:
    assert f"({where})" in refused(adapted("vit_tiny_patch16_224", **{option: 0.2}))


def test_dropout_that_an_architecture_has_by_itself_is_found() -> None:
    assert "rel_pos.mlp.drop1" in refused(adapted("vit_relpos_small_patch16_224"))


def test_what_is_drawn_above_the_trunk_is_no_matter() -> None:
    model = adapted("vit_tiny_patch16_224", wara.LoRA(blocks="last_1", dropout=0.5), drop_rate=0.5)
    assert check_trunk(model, 2, (32, 32)) == (17, 48)


def test_a_model_that_is_more_than_its_blocks_is_refused() -> None:
    model = adapted("vit_tiny_patch16_224")

    class Skipping(type(model)):  # type: ignore[misc]
        """Its head also sees what comes before the blocks."""

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) + x.mean((1, 2, 3))[:, None]

    model.__class__ = Skipping
    assert "Skipping cannot be cut below block 2; data.trunk; set data.trunk=off" in refused(model)


def test_a_model_without_blocks_is_refused() -> None:
    model = timm.create_model("test_resnet", num_classes=3)
    wara.adapt(model, wara.LinearProbe())
    with pytest.raises(WaraError, match="has no blocks") as caught:
        trunk_depth(model)
    assert caught.value.exit_code == 2


def test_what_is_compiled_takes_the_tokens_of_each_call() -> None:
    upper = Upper(adapted("vit_tiny_patch16_224"), 2, (32, 32))
    traced = torch.compile(upper, backend="eager")
    with torch.no_grad():
        for seed in (1, 2):
            torch.manual_seed(seed)
            tokens = torch.randn(2, 17, 48)
            torch.testing.assert_close(traced(tokens), upper(tokens))
