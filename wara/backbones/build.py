"""Builds a ViT that fits its weights, and says what is known of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from huggingface_hub.constants import HF_HUB_CACHE
from timm.data import resolve_model_data_config
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from wara.backbones import agree
from wara.backbones.beside import Beside, look_beside
from wara.backbones.hub import Weights, find_weights
from wara.backbones.layouts import Found, find
from wara.backbones.names import NANO, Named, resolve
from wara.backbones.reading import read_checkpoint
from wara.backbones.statistics import Statistics
from wara.errors import WaraError
from wara.memory import check_memory
from wara.storage import file_sha256
from wara.vit import BackboneInfo, Source, pair, token_layout

NANO_ARCHITECTURE: dict[str, int] = {
    "img_size": 112,
    "patch_size": 8,
    "embed_dim": 128,
    "depth": 6,
    "num_heads": 4,
}
_MOST_BLOCKS = 1000
MOST_CLASSES = 100_000
"""Outputs of a classifier, as many as a card may name."""
NANO_DATA: dict[str, Any] = {
    "input_size": (3, 112, 112),
    "mean": (0.5, 0.5, 0.5),
    "std": (0.5, 0.5, 0.5),
    "interpolation": "bicubic",
    "classifier": "head",
}
# Arguments of timm that have a key of their own here, or would change where weights come from.
_RESERVED = {
    "num_classes": "the data set decides it",
    "in_chans": "images have three channels",
    "img_size": "use backbone.img_size",
    "global_pool": "use backbone.pool",
    "drop_rate": "use backbone.drop_rate",
    "drop_path_rate": "use backbone.drop_path_rate",
    "checkpoint_path": "use backbone.weights",
    **dict.fromkeys(
        ("pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "cache_dir", "features_only"),
        "leave it out",
    ),
}

ImageSize = int | tuple[int, int]


def build_backbone(
    name: str,
    *,
    num_classes: int,
    img_size: ImageSize | None = None,
    weights: str | Path | None = None,
    part: str | None = None,
    pool: str | None = None,
    options: Mapping[str, Any] | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    interpolation: str | None = None,
    drop_rate: float = 0.0,
    drop_path_rate: float = 0.0,
    offline: str = "phantom",
) -> tuple[nn.Module, BackboneInfo]:
    """Return a pretrained timm ViT with a fresh classifier.

    Weights are looked for in this order: the file `weights`; for `wara_nano` the package; the local
    hub cache; the hub, if it answers. Position embeddings are resampled to `img_size`. What of the
    architecture the weights decide (LayerScale, biases, the last norm) follows them.

    Args:
        name: timm model name, `hf-hub:owner/name`, a card of `wara backbones`, or `wara_nano`.
        num_classes: outputs of the classifier.
        img_size: input size in pixels, `H = W` or `(H, W)`; none keeps that of pretraining.
        weights: `.safetensors`, or a `.pth`/`.bin` without code in it (docs/backbones.md).
        part: the network to take where a file holds several.
        pool: `token` or `avg`; none takes what the weights or the architecture imply.
        options: more arguments of the architecture, as timm names them.
        mean: per channel of images in 0..1, with `std`; none takes what is known of the weights.
        std: see `mean`.
        interpolation: how images are resized; none takes what is known of the weights.
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
    if not 0 <= num_classes <= MOST_CLASSES:
        what = f"num_classes is {num_classes}"
        raise WaraError("config", what, "classes", f"give 0 to {MOST_CLASSES} outputs")
    requested, named = name, resolve(name)
    given = dict(options or {})
    _check_options(given)
    if (mean is None) != (std is None):
        what = "mean and std belong together"
        raise WaraError("config", what, "backbone", "give both, or neither")
    if named.architecture is not None:
        # A model without a token grid is refused before its weights are looked for.
        token_layout(_probe(named.architecture, given))
    weight = find_weights(named, weights)
    if weight is None:
        if offline == "error":
            raise _nowhere(named)
        # What was said of the backbone is not true of what stands in for it.
        named, given, part, pool = resolve(NANO), {}, None, None
        mean = std = interpolation = None
        weight = find_weights(named, None)
        assert weight is not None
    beside = Beside() if named.name == NANO else look_beside(weight.path.parent)
    architecture = named.architecture or _hub_architecture(named, beside)
    found = find(read_checkpoint(weight.path), weight.path, part)
    card = named.card
    chosen = {**(card.options if card else {}), **given}
    if named.architecture is None:
        chosen = {**beside.options, **chosen}
    wanted: dict[str, Any] = {
        "num_classes": num_classes,
        "drop_rate": drop_rate,
        "drop_path_rate": drop_path_rate,
    }
    if img_size is None and card is not None:
        img_size = card.img_size
    if img_size is not None:
        wanted["img_size"] = pair(img_size)
    probe, usual_pool = _probe(architecture, chosen), card.pool if card else None
    chosen, pool = agree.implied(probe, found, chosen, pool, usual_pool, weight.path)
    if pool is not None:
        wanted["global_pool"] = pool
    _check_size(architecture, {**chosen, **wanted})
    model = _create(architecture, {**chosen, **wanted})
    agree.check(model, found, beside, architecture, weight.path)
    left_out = agree.load(model, found, architecture, weight.path)
    data = resolve_model_data_config(model)
    user = None if mean is None else Statistics(_three(mean, "mean"), _three(std, "std"))
    statistics, said = _statistics(named, weight, beside, found, user, data)
    grid, prefix = token_layout(model)
    return model.eval(), BackboneInfo(
        name=named.name,
        requested=requested,
        architecture=architecture,
        options=chosen,
        part=found.part,
        pool=str(getattr(model, "global_pool", "")),
        img_size=pair(getattr(model.patch_embed, "img_size", None) or data["input_size"][1:]),
        grid_size=grid,
        num_prefix_tokens=prefix,
        embed_dim=int(model.embed_dim),
        mean=statistics.mean,
        std=statistics.std,
        statistics=said,
        interpolation=interpolation
        or (card.interpolation if card else None)
        or beside.interpolation
        or data["interpolation"],
        layout=found.layout,
        left_out=[*left_out, *found.left_out],
        weights_source=weight.source,
        weights_sha256=file_sha256(weight.path),
    )


def rebuild(
    info: BackboneInfo, *, num_classes: int, weights: str | Path | None = None
) -> nn.Module:
    """Return the backbone that `info` tells of, in evaluation mode, with a fresh classifier.

    Args:
        info: of an adapter or a run.
        num_classes: outputs of the classifier.
        weights: where its weights lie now; none looks in the cache and on the hub.

    Raises:
        WaraError: as `build_backbone`.
    """
    model, _ = build_backbone(
        info.name if weights is None else info.architecture,
        num_classes=num_classes,
        img_size=info.img_size,
        weights=weights,
        part=info.part,
        pool=info.pool,
        options=info.options,
        mean=info.mean,
        std=info.std,
        interpolation=info.interpolation,
        offline="error",
    )
    return model


def skeleton(info: BackboneInfo, *, num_classes: int) -> nn.Module:
    """Return the backbone that `info` tells of without its weights, in evaluation mode.

    Nothing is read or fetched: the numbers in it are any, and come from elsewhere.

    Args:
        info: of an adapter, a run or a bundle.
        num_classes: outputs of the classifier.

    Raises:
        WaraError: kind `config` when timm of this version cannot build it.
    """
    _check_options(info.options)
    if info.architecture != NANO and not timm.is_model(info.architecture):
        what = f"timm knows no architecture '{info.architecture}'"
        raise WaraError("config", what, "backbone", "install the version of timm it was built with")
    sizes = {"num_classes": num_classes, "img_size": info.img_size, "global_pool": info.pool}
    model: nn.Module = _create(info.architecture, {**info.options, **sizes})
    return model.eval()


def _nowhere(named: Named) -> WaraError:
    put = "put their file somewhere and set backbone.weights"
    remedy = (
        f"{named.card.how_to_get}; or set offline: phantom"
        if named.card
        else f"{put} (on the hub: {named.repo}), fill the cache {HF_HUB_CACHE}, "
        "or set offline: phantom"
    )
    if named.repo is None:
        remedy = f"{put}; timm has none"
    what = "the weights are not cached and the hub does not answer"
    return WaraError("data", what, f"backbone {named.name}", remedy)


def _hub_architecture(named: Named, beside: Beside) -> str:
    if beside.architecture is None:
        what = f"no config.json beside the weights tells the architecture of {named.name}"
        remedy = "put it there, or name timm's model in backbone.name"
        raise WaraError("artefact", what, "", remedy)
    return beside.architecture


def _check_options(options: Mapping[str, Any]) -> None:
    for key in options:
        if key in _RESERVED:
            raise WaraError("config", f"no option '{key}'", "backbone.options", _RESERVED[key])
    depth = options.get("depth")
    if isinstance(depth, int) and depth > _MOST_BLOCKS:  # even without numbers it takes minutes
        what = f"depth is {depth}"
        raise WaraError("config", what, "backbone.options", f"set at most {_MOST_BLOCKS}")


def _three(values: Sequence[float] | None, name: str) -> tuple[float, float, float]:
    found = tuple(map(float, values or ()))
    if len(found) != 3 or (name == "std" and min(found) <= 0):
        what = f"{name} is {list(found)}"
        raise WaraError("config", what, f"backbone.{name}", "give three numbers, std above 0")
    return found


def _statistics(
    named: Named,
    weight: Weights,
    beside: Beside,
    found: Found,
    user: Statistics | None,
    data: Mapping[str, Any],
) -> tuple[Statistics, Source]:
    """Return what images are normalised by, and who says so.

    Raises:
        WaraError: kind `artefact` when the name says one thing and the file another.
    """
    usual = Statistics(tuple(data["mean"]), tuple(data["std"]))
    if user is not None:
        return user, "user"
    if named.name == NANO and weight.of_name:
        return usual, "package"
    if named.card is not None:
        return named.card.statistics, "card"
    if beside.statistics is not None:
        return beside.statistics, "config"
    by_name = usual if named.tag or weight.of_name else None
    if by_name is None:
        return (usual, "assumed") if found.statistics is None else (found.statistics, "layout")
    if found.statistics is not None and not found.statistics.close_to(by_name):
        what = (
            f"{named.name} goes with mean {by_name.mean}, a file of {found.layout} with "
            f"{found.statistics.mean}"
        )
        remedy = "set backbone.mean and backbone.std to what these weights were trained with"
        raise WaraError("artefact", what, str(weight.path), remedy)
    return by_name, "tag"


def _probe(architecture: str, options: Mapping[str, Any]) -> Any:
    """Return the model without memory for its weights."""
    with torch.device("meta"):
        return _create(architecture, options)


def _check_size(architecture: str, options: Mapping[str, Any]) -> None:
    """Refuse a model that memory cannot hold, before it is made.

    Raises:
        WaraError: kind `resources`.
    """
    own = _probe(architecture, options).state_dict().values()
    needed = sum(tensor.numel() * tensor.element_size() for tensor in own)
    remedy = "choose a smaller backbone, img_size or option of it"
    check_memory(needed, "the backbone", f"backbone {architecture}, {dict(options)}", remedy)


def _create(architecture: str, options: Mapping[str, Any]) -> Any:
    """Return the untrained model."""
    try:
        if architecture == NANO:
            model: Any = VisionTransformer(**{**NANO_ARCHITECTURE, **options})
            model.pretrained_cfg = dict(NANO_DATA)
        else:
            model = timm.create_model(architecture, pretrained=False, **options)
    # The arguments are the user's, and timm checks few of them.
    except Exception as error:
        where = f"backbone {architecture}, {dict(options)}"
        remedy = "choose another img_size (a multiple of the patch size), backbone or option"
        what = f"timm cannot build it: {' '.join(str(error).split())}"
        raise WaraError("config", what, where, remedy) from error
    # timm cuts off the pixels that do not fill a patch without a word.
    patch = pair(getattr(getattr(model, "patch_embed", None), "patch_size", None) or 1)
    for side, step in zip(pair(options.get("img_size") or patch), patch, strict=True):
        if side % step:
            below = side // step * step
            what = f"img_size {side} is no multiple of the patch size {step}"
            remedy = f"set backbone.img_size to {below or step} or {below + step}"
            raise WaraError("config", what, f"backbone {architecture}", remedy)
    return model
