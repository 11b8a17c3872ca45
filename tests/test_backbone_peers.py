"""Weights of other libraries: their own models say what features must come out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from wara.backbones import build_backbone

transformers = pytest.importorskip("transformers")

SIZE: dict[str, Any] = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
                        "intermediate_size": 96, "image_size": 64, "patch_size": 16,
                        "layer_norm_eps": 1e-6}  # fmt: skip
OPTIONS: dict[str, Any] = {"embed_dim": 24, "depth": 2, "num_heads": 2}
IMAGES = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def drawn(model: nn.Module) -> Any:
    """Draw every weight, so that none is a zero or a one that would hide a mistake."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model.eval()


def ours(weights: Path, name: str = "vit_tiny_patch16_224", **options: Any) -> tuple[Any, Any]:
    return build_backbone(
        name, num_classes=3, img_size=64, weights=weights, options={**OPTIONS, **options}
    )


def close(one: Tensor, two: Tensor) -> None:
    torch.testing.assert_close(one, two, atol=2e-5, rtol=1e-4)


def both_names(model: Any, folder: Path) -> list[Path]:
    """Save a model as it is published, and by the names that its modules have in memory."""
    model.save_pretrained(folder)
    torch.save(model.state_dict(), folder / "memory.pth")
    return [folder, folder / "memory.pth"]


@pytest.mark.parametrize("registers", [0, 4])
@pytest.mark.parametrize("gated", [False, True])
def test_dinov2(registers: int, gated: bool, tmp_path: Path) -> None:
    kind = "Dinov2WithRegisters" if registers else "Dinov2"
    more = {"num_register_tokens": registers} if registers else {}
    size = {k: v for k, v in SIZE.items() if k != "intermediate_size"}
    config = getattr(transformers, f"{kind}Config")(**size, use_swiglu_ffn=gated, **more)
    model = drawn(getattr(transformers, f"{kind}Model")(config))
    with torch.no_grad():
        wanted = model(IMAGES).last_hidden_state
    options: dict[str, Any] = {"reg_tokens": registers, "no_embed_class": True} if registers else {}
    name = "vit_tiny_patch16_224"
    if gated:
        name, hidden = "vit_giant_patch14_dinov2", (int(24 * 4 * 2 / 3) + 7) // 8 * 8
        options |= {"mlp_ratio": 2 * hidden / 24, "patch_size": 16}
    for path in both_names(model, tmp_path):
        found, info = ours(path, name, **options)
        close(found.forward_features(IMAGES), wanted)
        assert info.layout == "Hugging Face" and "mask_token (1)" in info.left_out


@pytest.mark.parametrize("gated", [False, True])
def test_dinov3(gated: bool, tmp_path: Path) -> None:
    config = transformers.DINOv3ViTConfig(
        **SIZE, num_register_tokens=4, key_bias=False, use_gated_mlp=gated,
        hidden_act="silu" if gated else "gelu",
    )  # fmt: skip
    model = drawn(transformers.DINOv3ViTModel(config))
    more: dict[str, Any] = {"mlp_ratio": 4.0} if gated else {}
    with torch.no_grad():
        wanted = model(IMAGES).last_hidden_state
    for path in both_names(model, tmp_path):
        found, info = ours(path, f"vit_{'huge_plus' if gated else 'small'}_patch16_dinov3", **more)
        close(found.forward_features(IMAGES), wanted)
        assert info.num_prefix_tokens == 5


def test_vit(tmp_path: Path) -> None:
    model = drawn(transformers.ViTModel(transformers.ViTConfig(**SIZE)))
    with torch.no_grad():
        wanted = model(IMAGES).last_hidden_state
    for path in both_names(model, tmp_path):
        found, info = ours(path)
        close(found.forward_features(IMAGES), wanted)
        assert "pooler (2)" in info.left_out


def test_vit_with_a_classifier(tmp_path: Path) -> None:
    model = drawn(transformers.ViTForImageClassification(transformers.ViTConfig(**SIZE)))
    with torch.no_grad():
        wanted = model.vit(IMAGES).last_hidden_state
    for path in both_names(model, tmp_path):
        found, info = ours(path)
        close(found.forward_features(IMAGES), wanted)
        assert "classifier (2)" in info.left_out


def test_masked_autoencoder(tmp_path: Path) -> None:
    config = transformers.ViTMAEConfig(
        **SIZE, mask_ratio=0.0, decoder_hidden_size=16, decoder_num_hidden_layers=1,
        decoder_num_attention_heads=2, decoder_intermediate_size=32,
    )  # fmt: skip
    model = drawn(transformers.ViTMAEForPreTraining(config))
    order = torch.arange(16.0).repeat(2, 1)
    with torch.no_grad():
        wanted = model.vit(IMAGES, noise=order).last_hidden_state
    for path in both_names(model, tmp_path):
        found, info = ours(path)
        close(found.forward_features(IMAGES), wanted)
        assert any(part.startswith("decoder") for part in info.left_out)


@pytest.mark.parametrize("activation", ["gelu", "quick_gelu"])
def test_clip(activation: str, tmp_path: Path) -> None:
    config = transformers.CLIPVisionConfig(
        **{**SIZE, "layer_norm_eps": 1e-5}, hidden_act=activation
    )
    model = drawn(transformers.CLIPVisionModel(config))
    with torch.no_grad():
        wanted = model(IMAGES).last_hidden_state  # before the last norm, which is for the class
        wanted = next(m for n, m in model.named_modules() if n.endswith("post_layernorm"))(wanted)
    quick = "quickgelu_" if activation == "quick_gelu" else ""
    for path in both_names(model, tmp_path):
        found, info = ours(path, f"vit_base_patch16_clip_{quick}224")
        close(found.forward_features(IMAGES), wanted)
        assert (info.layout, info.statistics) == ("Hugging Face CLIP", "layout")


def test_torchvision(tmp_path: Path) -> None:
    from torchvision.models.vision_transformer import VisionTransformer

    model = drawn(VisionTransformer(64, 16, 2, 2, 24, 96, num_classes=5))
    path = tmp_path / "weights.pth"
    torch.save(model.state_dict(), path)
    with torch.no_grad():
        tokens = model._process_input(IMAGES)
        tokens = torch.cat([model.class_token.expand(2, -1, -1), tokens], 1)
        wanted = model.encoder(tokens)
    found, info = ours(path)
    close(found.forward_features(IMAGES), wanted)
    assert (info.layout, info.statistics) == ("torchvision", "layout")
    assert info.mean == (0.485, 0.456, 0.406) and info.left_out == ["heads (2)"]


def test_a_folder_of_hugging_face_by_its_hub_name(tmp_path: Path) -> None:
    """The architecture, the statistics and the file are what lies in the folder."""
    config = transformers.Dinov2Config(
        hidden_size=384, num_hidden_layers=12, num_attention_heads=6, image_size=56, patch_size=14
    )
    model = drawn(transformers.Dinov2Model(config))
    model.save_pretrained(tmp_path)
    said = {"image_mean": [0.53] * 3, "image_std": [0.25] * 3, "resample": 3}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(said))
    found, info = build_backbone("hf-hub:x/y", num_classes=2, weights=tmp_path, img_size=56)
    assert info.architecture == "vit_small_patch14_dinov2"
    assert (info.statistics, info.mean) == ("config", (0.53, 0.53, 0.53))
    with torch.no_grad():
        images = IMAGES[..., :56, :56]
        close(found.forward_features(images), model(images).last_hidden_state)
