"""Pretrained timm Vision Transformers: from a file, from the local cache, or the shipped one."""

from __future__ import annotations

import contextlib
import importlib.resources
import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import timm
import torch
from huggingface_hub import hf_hub_download, try_to_load_from_cache
from huggingface_hub.constants import ENDPOINT as HF_ENDPOINT
from huggingface_hub.constants import HF_HUB_CACHE
from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.data import resolve_model_data_config
from timm.layers import resample_abs_pos_embed
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from wara.errors import WaraError, suggest
from wara.net import reachable
from wara.storage import file_sha256
from wara.vit import BackboneInfo, pair, token_layout

NANO = "wara_nano"
NANO_ARCHITECTURE: dict[str, int] = {
    "img_size": 112,
    "patch_size": 8,
    "embed_dim": 128,
    "depth": 6,
    "num_heads": 4,
}
NANO_DATA: dict[str, Any] = {
    "input_size": (3, 112, 112),
    "mean": (0.5, 0.5, 0.5),
    "std": (0.5, 0.5, 0.5),
    "interpolation": "bicubic",
    "classifier": "head",
}
HUB_FILES = ("model.safetensors", "pytorch_model.bin")

ImageSize = int | tuple[int, int]


def build_backbone(
    name: str,
    *,
    num_classes: int,
    img_size: ImageSize | None = None,
    weights: str | Path | None = None,
    drop_rate: float = 0.0,
    drop_path_rate: float = 0.0,
    offline: str = "phantom",
) -> tuple[nn.Module, BackboneInfo]:
    """Return a pretrained timm ViT with a fresh classifier.

    Weights are looked for in this order: the file `weights`; for `wara_nano` the package; the local
    hub cache; the hub, if it answers. Position embeddings are resampled to `img_size`.

    Args:
        name: timm model name, or `wara_nano`.
        num_classes: outputs of the classifier.
        img_size: input size in pixels, `H = W` or `(H, W)`; none keeps that of pretraining.
        weights: `.safetensors`, or a `.pth`/`.bin` state dict without code in it.
        drop_rate: dropout before the classifier.
        drop_path_rate: stochastic depth.
        offline: what to do when the weights are neither here nor to be had: `phantom` takes
            `wara_nano` in place of the backbone, `error` refuses.

    Returns:
        The model, in evaluation mode, and what is known of it.

    Raises:
        WaraError: kind `config` for an unknown name or a size that does not fit the patches, `data`
            for weights that are missing, `artefact` for weights that do not fit.
    """
    requested = name
    check_name(name)
    _check_grid(name)
    path, source = _find_weights(name, weights)
    if path is None:
        if offline == "error":
            remedy = (
                f"put the file of {_hub_repo(name) or name} at a path and set backbone.weights, "
                f"fill the cache {HF_HUB_CACHE}, or set offline: phantom"
            )
            what = "the weights are not cached and the hub does not answer"
            raise WaraError("data", what, f"backbone {name}", remedy)
        name = NANO
        path, source = _find_weights(name, None)
    assert path is not None
    model = _create(name, num_classes, img_size, drop_rate, drop_path_rate)
    _load(model, name, path)
    data = resolve_model_data_config(model)
    grid, prefix = token_layout(model)
    return model.eval(), BackboneInfo(
        name=name,
        requested=requested,
        options={} if img_size is None else {"img_size": list(pair(img_size))},
        img_size=pair(getattr(model.patch_embed, "img_size", None) or data["input_size"][1:]),
        grid_size=grid,
        num_prefix_tokens=prefix,
        embed_dim=int(model.embed_dim),
        mean=tuple(data["mean"]),
        std=tuple(data["std"]),
        interpolation=data["interpolation"],
        weights_source=source,
        weights_sha256=file_sha256(path),
    )


def check_name(name: str) -> None:
    """Refuse a backbone that timm does not know.

    Raises:
        WaraError: kind "config", naming the nearest ViT.
    """
    if name != NANO and not timm.is_model(name):
        near = [n for n in timm.list_models() if "vit" in n or "deit" in n or "eva" in n]
        remedy = suggest(name.split(".")[0], [*near, NANO])
        if remedy.startswith("choose"):
            remedy = f"choose {NANO}, vit_tiny_patch16_224 or another timm ViT"
        raise WaraError("config", f"unknown backbone '{name}'", "backbone.name", remedy)


def _check_grid(name: str) -> None:
    """Refuse a timm model without a token grid before its weights are looked for."""
    if name != NANO:
        with torch.device("meta"):
            token_layout(timm.create_model(name, pretrained=False))


def _find_weights(name: str, weights: str | Path | None) -> tuple[Path | None, str]:
    """Return the weights file and a description of where it came from."""
    if weights is not None:
        path = Path(weights).expanduser()
        if not path.is_file():
            remedy = "give the path of a .safetensors or .pth file"
            raise WaraError("data", "no such weights file", f"backbone.weights={path}", remedy)
        return path, "a local file"
    if name == NANO:
        return Path(str(importlib.resources.files("wara") / "weights" / f"{NANO}.safetensors")), (
            "shipped with the package"
        )
    cached = _cached(name)
    if cached is not None:
        return cached, f"cached copy of {_hub_repo(name)}"
    repo = _hub_repo(name)
    if repo and reachable(HF_ENDPOINT):
        for file in HUB_FILES:
            # A hub that answers may still not deliver: a proxy between, a file not there.
            with contextlib.suppress(OSError):
                return Path(hf_hub_download(repo, file)), f"hub {repo}"
    return None, ""


def _hub_repo(name: str) -> str | None:
    """Return the hub repository of a timm model's default weights, if it has any."""
    config = timm.get_pretrained_cfg(name)
    return (config.hf_hub_id or None) if config is not None else None


def _cached(name: str) -> Path | None:
    repo = _hub_repo(name)
    for file in HUB_FILES:
        found = try_to_load_from_cache(repo, file) if repo else None
        if isinstance(found, str):
            return Path(found)
    return None


def _create(
    name: str,
    num_classes: int,
    img_size: ImageSize | None,
    drop_rate: float,
    drop_path_rate: float,
) -> Any:
    """Return the untrained model."""
    options: dict[str, Any] = {
        "num_classes": num_classes,
        "drop_rate": drop_rate,
        "drop_path_rate": drop_path_rate,
    }
    if img_size is not None:
        options["img_size"] = pair(img_size)
    try:
        if name == NANO:
            model: Any = VisionTransformer(**{**NANO_ARCHITECTURE, **options})
            model.pretrained_cfg = dict(NANO_DATA)
        else:
            model = timm.create_model(name, pretrained=False, **options)
    except (TypeError, AssertionError) as error:
        where = f"backbone {name}, img_size {img_size}"
        remedy = "choose another img_size (a multiple of the patch size) or backbone"
        raise WaraError("config", f"timm cannot build it: {error}", where, remedy) from error
    # timm cuts off the pixels that do not fill a patch without a word.
    patch = pair(getattr(model.patch_embed, "patch_size", None) or 1)
    for side, step in zip(pair(img_size or patch), patch, strict=True):
        if side % step:
            below = side // step * step
            what = f"img_size {side} is no multiple of the patch size {step}"
            remedy = f"set backbone.img_size to {below or step} or {below + step}"
            raise WaraError("config", what, f"backbone {name}", remedy)
    return model


def _load(model: Any, name: str, path: Path) -> None:
    """Load weights strictly; only the classifier may differ, which stays fresh."""
    remedy = "give weights of this very architecture"
    state: Any
    try:
        if path.suffix == ".safetensors":
            state = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, UnpicklingError, OSError, RuntimeError, EOFError) as error:
        what = f"cannot read the weights: {str(error).splitlines()[0]}"
        raise WaraError("artefact", what, str(path), "copy the file again") from error
    for wrapper in ("state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(wrapper), dict):
            state = state[wrapper]
    try:
        state = _checkpoint_filter(name)(state, model)
    except (KeyError, AttributeError, TypeError, IndexError, RuntimeError) as error:
        # timm's conversions take the right architecture for granted.
        what = f"the weights are not those of backbone {name}"
        raise WaraError("artefact", what, str(path), remedy) from error
    own = model.state_dict()
    classifiers = _classifier_names(model)
    heads = {key for key in own if key.startswith(classifiers)}
    state = {key: value for key, value in state.items() if not key.startswith(classifiers)}
    missing = sorted(own.keys() - state.keys() - heads)
    unknown = sorted(state.keys() - own.keys())
    odd = sorted(k for k in own.keys() & state.keys() if own[k].shape != state[k].shape)
    if missing or unknown or odd:
        words = [
            f"{word} {', '.join(keys[:3])}{' …' if len(keys) > 3 else ''}"
            for word, keys in (("missing", missing), ("unknown", unknown), ("wrong shape", odd))
            if keys
        ]
        what = f"the weights do not fit backbone {name}"
        raise WaraError("artefact", what, f"{path}: " + "; ".join(words), remedy)
    model.load_state_dict({**state, **{key: own[key] for key in heads}})


def _classifier_names(model: Any) -> tuple[str, ...]:
    """Return the prefixes of the classifier's keys; distilled models have two classifiers."""
    found = (
        (model.pretrained_cfg or {}).get("classifier") if hasattr(model, "pretrained_cfg") else None
    )
    names = found or "head"
    return tuple(f"{n}." for n in ([names] if isinstance(names, str) else names))


def _checkpoint_filter(name: str) -> Callable[[dict[str, Tensor], nn.Module], dict[str, Tensor]]:
    """Return timm's own conversion for checkpoints of a model, position embeddings included."""
    if name == NANO:
        return _resample_position
    module = sys.modules[timm.models.model_entrypoint(name.split(".")[0]).__module__]
    convert = getattr(module, "checkpoint_filter_fn", None)
    if convert is None or len(inspect.signature(convert).parameters) < 2:
        return lambda state, model: state
    return convert


def _resample_position(state: dict[str, Tensor], model: Any) -> dict[str, Tensor]:
    position = state["pos_embed"].float()
    if position.shape != model.pos_embed.shape:
        position = resample_abs_pos_embed(
            position,
            new_size=list(model.patch_embed.grid_size),
            num_prefix_tokens=model.num_prefix_tokens,
        )
    return {**state, "pos_embed": position}
