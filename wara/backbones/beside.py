"""What the files beside the weights say of them: timm's, Hugging Face's and OpenCLIP's JSON."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import timm

from wara.backbones.statistics import Statistics
from wara.errors import WaraError

CONFIG, PREPROCESSOR, OPEN_CLIP = (
    "config.json", "preprocessor_config.json", "open_clip_config.json",
)  # fmt: skip
_RESAMPLING = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}  # the numbers of Pillow
_SIZES = {192: "tiny", 384: "small", 768: "base", 1024: "large", 1280: "huge"}
_ARCHITECTURES = {
    "vit": "vit_{size}_patch{patch}_{side}",
    "vit_mae": "vit_{size}_patch{patch}_{side}",
    "dinov2": "vit_{size}_patch{patch}_dinov2",
    "dinov2_with_registers": "vit_{size}_patch{patch}_reg4_dinov2",
    "dinov3_vit": "vit_{size}_patch{patch}_dinov3",
    "clip": "vit_{size}_patch{patch}_clip_{side}",
    "siglip": "vit_{size}_patch{patch}_siglip_{side}",
}


@dataclass(frozen=True)
class Beside:
    """What is said of a file of weights by its neighbours; None and empty where nothing is.

    Args:
        architecture: timm's name of it.
        options: arguments of its construction.
        heads: number of attention heads.
        quick_gelu: whether its activation is the approximation of OpenAI's CLIP.
        statistics: what images were normalised by.
        interpolation: how images were resized.
        file: which neighbour says the statistics.
    """

    architecture: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    heads: int | None = None
    quick_gelu: bool | None = None
    statistics: Statistics | None = None
    interpolation: str | None = None
    file: str = ""


def look_beside(folder: Path) -> Beside:
    """Read what lies in the folder of a file of weights.

    Raises:
        WaraError: kind `artefact` when a file of such a name cannot be understood.
    """
    config, processor, clip = (
        _read(folder / name) for name in (CONFIG, PREPROCESSOR, OPEN_CLIP)
    )  # fmt: skip
    vision = config.get("vision_config") or config
    trained = config.get("pretrained_cfg") or config
    preprocess = clip.get("preprocess_cfg") or {}
    tower = (clip.get("model_cfg") or {}).get("vision_cfg") or {}
    told = (
        (PREPROCESSOR, processor.get("image_mean"), processor.get("image_std")),
        (OPEN_CLIP, preprocess.get("mean"), preprocess.get("std")),
        (CONFIG, trained.get("mean"), trained.get("std")),
    )
    file, mean, std = next((one for one in told if one[1] and one[2]), ("", None, None))
    if processor.get("do_normalize") is False:
        file, mean, std = PREPROCESSOR, [0.0] * 3, [1.0] * 3
    activation = vision.get("hidden_act")
    resampling = _RESAMPLING.get(processor.get("resample", -1))
    named = resampling or preprocess.get("interpolation") or trained.get("interpolation")
    args = config.get("model_args") or {}
    return Beside(
        architecture=config.get("architecture")
        or tower.get("timm_model_name")
        or _architecture(config, vision),
        options=args,
        heads=vision.get("num_attention_heads") or args.get("num_heads"),
        quick_gelu=None if activation is None else activation == "quick_gelu",
        statistics=Statistics(_triple(mean, folder / file), _triple(std, folder / file))
        if file
        else None,
        interpolation=named if named in _RESAMPLING.values() else None,
        file=file,
    )


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    remedy = "copy it again, or remove it"
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise WaraError("artefact", "no readable JSON", str(path), remedy) from error
    if not isinstance(found, dict):
        raise WaraError("artefact", "no JSON object", str(path), remedy)
    return found


def _triple(values: Any, path: Path) -> tuple[float, float, float]:
    sound = isinstance(values, list) and len(values) == 3
    if not sound or not all(isinstance(value, int | float) for value in values):
        what = f"mean and std must be three numbers each, not {values}"
        remedy = "set backbone.mean and backbone.std, and correct or remove the file"
        raise WaraError("artefact", what, str(path), remedy)
    return float(values[0]), float(values[1]), float(values[2])


def _architecture(config: dict[str, Any], vision: dict[str, Any]) -> str | None:
    """Return timm's name of what a config of Hugging Face describes, None when it has none."""
    form = _ARCHITECTURES.get(str(config.get("model_type")).removesuffix("_vision_model"), "")
    size = _SIZES.get(vision.get("hidden_size", 0), "")
    name = form.format(size=size, patch=vision.get("patch_size"), side=vision.get("image_size"))
    if vision.get("hidden_act") == "quick_gelu":
        name = name.replace("_clip_", "_clip_quickgelu_")
    return name if timm.is_model(name) else None
