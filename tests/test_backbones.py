"""Backbones: strict loading, resampled positions, offline substitution."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file

import wara
from wara.backbones import NANO, build_backbone, hub
from wara.errors import WaraError

REAL = Path(os.environ.get("WARA_REAL_DATA", Path(__file__).parents[2] / "shared"))
REAL_WEIGHTS = REAL / "weights" / "vit_tiny_patch16_224_imagenet1k.safetensors"


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    path = tmp_path / "weights.safetensors"
    save_file(timm.create_model("test_vit").state_dict(), path)
    return path


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(hub, "reachable", lambda url: False)
    monkeypatch.setattr(hub, "try_to_load_from_cache", lambda repo, file: None)


def test_weights_are_those_of_the_file_and_the_head_is_new(weights: Path) -> None:
    model, info = build_backbone("test_vit", num_classes=4, weights=weights)
    reference = timm.create_model(
        "test_vit", pretrained=True, pretrained_cfg_overlay={"file": str(weights)}
    )
    x = torch.randn(2, 3, *info.img_size)
    features = model.eval().forward_features(x)
    assert torch.equal(features, reference.eval().forward_features(x))
    assert model(x).shape == (2, 4)
    assert (info.grid_size, info.num_prefix_tokens, info.embed_dim) == ((10, 10), 1, 64)
    assert info.weights_source == "a local file" and len(info.weights_sha256) == 64


def test_positions_are_resampled_as_timm_does_on_a_non_square_grid(weights: Path) -> None:
    model, info = build_backbone("test_vit", num_classes=4, weights=weights, img_size=(96, 208))
    reference = timm.create_model(
        "test_vit",
        pretrained=True,
        img_size=(96, 208),
        pretrained_cfg_overlay={"file": str(weights)},
    )
    assert info.grid_size == (6, 13) and info.img_size == (96, 208)
    assert torch.equal(model.pos_embed, reference.pos_embed)


@pytest.mark.parametrize("size", [100, (96, 100)])
def test_a_size_that_does_not_fill_the_patches_is_refused(weights: Path, size: Any) -> None:
    with pytest.raises(WaraError, match="set backbone.img_size to 96 or 112") as caught:
        build_backbone("test_vit", num_classes=4, weights=weights, img_size=size)
    assert caught.value.exit_code == 2


def test_weights_of_another_model_are_refused_by_key(weights: Path) -> None:
    with pytest.raises(
        WaraError, match="width 64 and 6 blocks, test_vit3 has width 96 and 9"
    ) as caught:
        build_backbone("test_vit3", num_classes=4, weights=weights)
    assert caught.value.exit_code == 4


def test_damaged_and_missing_weights_are_refused(weights: Path, tmp_path: Path) -> None:
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(WaraError, match="cannot read") as caught:
        build_backbone("test_vit", num_classes=4, weights=weights)
    assert caught.value.exit_code == 4
    (tmp_path / "x.pth").write_bytes(b"\x80\x04nonsense")
    with pytest.raises(WaraError, match="cannot read"):
        build_backbone("test_vit", num_classes=4, weights=tmp_path / "x.pth")
    with pytest.raises(WaraError, match="no such weights file") as caught:
        build_backbone("test_vit", num_classes=4, weights=tmp_path / "none.safetensors")
    assert caught.value.exit_code == 3


def test_a_state_dict_inside_a_training_checkpoint_is_found(tmp_path: Path) -> None:
    source = timm.create_model("test_vit")
    torch.save({"state_dict": source.state_dict()}, tmp_path / "model.pth")
    model, _ = build_backbone("test_vit", num_classes=2, weights=tmp_path / "model.pth")
    assert torch.equal(model.pos_embed, source.pos_embed)


def test_unknown_names_get_the_nearest() -> None:
    with pytest.raises(WaraError, match="did you mean 'vit_tiny_patch16_224'") as caught:
        build_backbone("vit_tny_patch16_224", num_classes=2)
    assert caught.value.exit_code == 2


@pytest.mark.usefixtures("no_network")
def test_without_network_the_shipped_backbone_stands_in_or_the_run_is_refused() -> None:
    model, info = build_backbone("vit_tiny_patch16_224", num_classes=5, offline="phantom")
    assert (info.name, info.requested) == (NANO, "vit_tiny_patch16_224")
    assert model(torch.randn(1, 3, 112, 112)).shape == (1, 5)
    with pytest.raises(
        WaraError, match="set backbone.weights .on the hub: timm/vit_tiny_patch16_224"
    ) as caught:
        build_backbone("vit_tiny_patch16_224", num_classes=5, offline="error")
    assert caught.value.exit_code == 3


def test_the_offline_decision_takes_seconds() -> None:
    start = time.perf_counter()
    # An address of the block reserved for documentation: nothing answers there.
    assert not hub.reachable("https://192.0.2.1", seconds=0.5)
    assert time.perf_counter() - start < 3


def test_the_shipped_backbone_is_a_vit_with_a_14_by_14_grid() -> None:
    model, info = build_backbone(NANO, num_classes=3)
    assert info.grid_size == (14, 14) and info.img_size == (112, 112)
    assert (info.mean, info.interpolation) == ((0.5, 0.5, 0.5), "bicubic")
    assert info.weights_source == "shipped with the package"
    wara.adapt(model, wara.WaRA())
    wide, info = build_backbone(NANO, num_classes=3, img_size=(96, 128))
    assert info.grid_size == (12, 16)
    assert wide(torch.randn(1, 3, 96, 128)).shape == (1, 3)


@pytest.mark.skipif(not REAL_WEIGHTS.is_file(), reason="real weights are not here")
def test_real_imagenet_weights_load_and_adapt() -> None:
    model, info = build_backbone("vit_tiny_patch16_224", num_classes=3, weights=REAL_WEIGHTS)
    assert info.mean == (0.5, 0.5, 0.5)
    x = torch.randn(1, 3, 224, 224)
    before = model.eval()(x)
    assert torch.allclose(wara.adapt(model, wara.WaRA())(x), before, atol=1e-5)


def test_a_hub_that_answers_but_does_not_deliver_is_no_network(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(repo: str, file: str) -> str:
        raise OSError("the connection was reset")

    monkeypatch.setattr(hub, "reachable", lambda url: True)
    monkeypatch.setattr(hub, "try_to_load_from_cache", lambda repo, file: None)
    monkeypatch.setattr(hub, "hf_hub_download", fail)
    assert build_backbone("vit_tiny_patch16_224", num_classes=2)[1].name == NANO


def test_a_model_without_a_token_grid_is_refused_before_its_weights_are_sought() -> None:
    for name in ("resnet18", "resnet50"):
        with pytest.raises(WaraError, match="no token grid") as caught:
            build_backbone(name, num_classes=2)
        assert caught.value.exit_code == 2


def test_files_that_hold_something_else_are_refused(weights: Path, tmp_path: Path) -> None:
    torch.save([torch.zeros(3)], tmp_path / "list.pth")
    for name, file in (("test_vit", tmp_path / "list.pth"), (NANO, tmp_path / "odd.safetensors")):
        save_file({"a": torch.zeros(1)}, tmp_path / "odd.safetensors")
        with pytest.raises(WaraError) as caught:
            build_backbone(name, num_classes=2, weights=file)
        assert caught.value.exit_code == 4
