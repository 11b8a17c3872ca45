"""What public training code calls the tensors of a ViT, and the names that timm gives them.

A file is flattened to dotted names, so that wrappers (`model`, `state_dict`, `teacher`) and
prefixes (`module.`, `backbone.`, `visual.trunk.`) are one thing: whatever stands before the name of
the patch embedding. What lies elsewhere in the file is left out, and listed.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from wara.backbones.statistics import CLIP, HALF, IMAGENET, Statistics
from wara.errors import WaraError, suggest

Rules = tuple[tuple[str, str], ...]

_BLOCK = r"^blocks\.(\d+)\."
_HUGGING_FACE: Rules = (
    (r"^embeddings\.(patch_embeddings|patch_embedding)(\.projection)?\.", "patch_embed.proj."),
    (r"^embeddings\.(cls_token|class_embedding)$", "cls_token"),
    (r"^embeddings\.(position_embeddings|position_embedding\.weight)$", "pos_embed"),
    (r"^embeddings\.distillation_token$", "dist_token"),
    (r"^embeddings\.", ""),  # mask_token, register_tokens
    (r"^((encoder|model)\.)?layers?\.(\d+)\.", r"blocks.\3."),
    (rf"{_BLOCK}(layernorm_before|layer_norm1)\.", r"blocks.\1.norm1."),
    (rf"{_BLOCK}(layernorm_after|layer_norm2)\.", r"blocks.\1.norm2."),
    (rf"{_BLOCK}attention\.attention\.(query|key|value)\.", r"blocks.\1.attn.\2."),
    (rf"{_BLOCK}(attention|self_attn)\.(q|k|v)_proj\.", r"blocks.\1.attn.\3_proj."),
    (rf"{_BLOCK}(attention\.output\.dense|attention\.o_proj|self_attn\.out_proj)\.",
     r"blocks.\1.attn.proj."),
    (rf"{_BLOCK}(intermediate\.dense|mlp\.up_proj)\.", r"blocks.\1.mlp.fc1."),
    (rf"{_BLOCK}(output\.dense|mlp\.down_proj)\.", r"blocks.\1.mlp.fc2."),
    (rf"{_BLOCK}mlp\.weights_in\.", r"blocks.\1.mlp.w12."),
    (rf"{_BLOCK}mlp\.weights_out\.", r"blocks.\1.mlp.w3."),
    (rf"{_BLOCK}layer_scale(\d)\.lambda1$", r"blocks.\1.ls\2.gamma"),
    (r"^(layernorm|post_layernorm)\.", "norm."),
    (r"^pre_layrnorm\.", "norm_pre."),
)  # fmt: skip
_OPENAI_CLIP: Rules = (
    (r"^conv1\.", "patch_embed.proj."),
    (r"^class_embedding$", "cls_token"),
    (r"^positional_embedding$", "pos_embed"),
    (r"^ln_pre\.", "norm_pre."),
    (r"^ln_post\.", "norm."),
    (r"^transformer\.resblocks\.(\d+)\.", r"blocks.\1."),
    (rf"{_BLOCK}ln_(\d)\.", r"blocks.\1.norm\2."),
    (rf"{_BLOCK}attn\.in_proj_", r"blocks.\1.attn.qkv."),
    (rf"{_BLOCK}attn\.out_proj\.", r"blocks.\1.attn.proj."),
    (rf"{_BLOCK}mlp\.c_fc\.", r"blocks.\1.mlp.fc1."),
    (rf"{_BLOCK}mlp\.c_proj\.", r"blocks.\1.mlp.fc2."),
)
_TORCHVISION: Rules = (
    (r"^conv_proj\.", "patch_embed.proj."),
    (r"^class_token$", "cls_token"),
    (r"^encoder\.pos_embedding$", "pos_embed"),
    (r"^encoder\.ln\.", "norm."),
    (r"^encoder\.layers\.encoder_layer_(\d+)\.", r"blocks.\1."),
    (rf"{_BLOCK}ln_(\d)\.", r"blocks.\1.norm\2."),
    (rf"{_BLOCK}self_attention\.in_proj_", r"blocks.\1.attn.qkv."),
    (rf"{_BLOCK}self_attention\.out_proj\.", r"blocks.\1.attn.proj."),
    (rf"{_BLOCK}mlp\.(0|linear_1)\.", r"blocks.\1.mlp.fc1."),
    (rf"{_BLOCK}mlp\.(3|linear_2)\.", r"blocks.\1.mlp.fc2."),
)
_OPENMMLAB: Rules = (
    (r"^patch_embed\.projection\.", "patch_embed.proj."),
    (r"^layers\.(\d+)\.", r"blocks.\1."),
    (rf"{_BLOCK}ln(\d)\.", r"blocks.\1.norm\2."),
    (rf"{_BLOCK}ffn\.layers\.0\.0\.", r"blocks.\1.mlp.fc1."),
    (rf"{_BLOCK}ffn\.layers\.1\.", r"blocks.\1.mlp.fc2."),
    (rf"{_BLOCK}attn\.gamma1\.weight$", r"blocks.\1.ls1.gamma"),
    (rf"{_BLOCK}ffn\.gamma2\.weight$", r"blocks.\1.ls2.gamma"),
    (r"^ln1\.", "norm."),
)
_MONAI: Rules = (
    (r"^patch_embedding\.patch_embeddings\.", "patch_embed.proj."),
    (r"^patch_embedding\.position_embeddings$", "pos_embed"),
    (rf"{_BLOCK}attn\.out_proj\.", r"blocks.\1.attn.proj."),
    (rf"{_BLOCK}mlp\.linear(\d)\.", r"blocks.\1.mlp.fc\2."),
)
# DINOv2 saves blocks in chunks of which each counts on: `blocks.1.6.` is the seventh block.
_TIMM: Rules = ((r"^blocks\.\d+\.(\d+)\.", r"blocks.\1."),)


@dataclass(frozen=True)
class Layout:
    """A way to name the tensors of a ViT.

    Args:
        name: for people.
        anchor: name of the weight of the patch embedding.
        beside: a name that lies beside it, which tells it from other networks.
        rules: regular expressions and what they become, one after the other.
    """

    name: str
    anchor: str
    beside: str
    rules: Rules


LAYOUTS = (
    Layout("timm", "patch_embed.proj.weight", "blocks.", _TIMM),
    Layout("Hugging Face", "embeddings.patch_embeddings.projection.weight", "", _HUGGING_FACE),
    Layout("Hugging Face", "embeddings.patch_embeddings.weight", "", _HUGGING_FACE),
    Layout("Hugging Face CLIP", "embeddings.patch_embedding.weight", "", _HUGGING_FACE),
    Layout("OpenAI CLIP", "conv1.weight", "class_embedding", _OPENAI_CLIP),
    Layout("torchvision", "conv_proj.weight", "class_token", _TORCHVISION),
    Layout("OpenMMLab", "patch_embed.projection.weight", "layers.", _OPENMMLAB),
    Layout("MONAI", "patch_embedding.patch_embeddings.weight", "blocks.", _MONAI),
)
# Where a file holds a network twice, the copy that its authors evaluate: the teacher of a
# self-distillation, the moving average of a training.
_EVALUATED = {"teacher", "ema", "model_ema", "ema_model", "state_dict_ema", "ema_state_dict"}
_WRAPPED = re.compile(r"(_orig_mod|_checkpoint_wrapped_module|_fsdp_wrapped_module)\.")
_DEEPEST = 32
_STATE_DICT = "give the state dict of the network, as .safetensors"
_HEADS = ("num_heads", "num_attention_heads", "n_heads")


@dataclass(frozen=True)
class Found:
    """A ViT that was found in a file.

    Args:
        state: its tensors by the names of timm.
        layout: whose names the file has.
        part: where in the file it lay, dotted; empty for the whole file.
        left_out: what else the file holds, with numbers of tensors.
        statistics: what training code of this layout normalises by, where it has its own.
        heads: number of attention heads, where the file tells it.
    """

    state: dict[str, Tensor]
    layout: str
    part: str
    left_out: tuple[str, ...]
    statistics: Statistics | None
    heads: int | None


def find(content: Any, path: Path, part: str | None = None) -> Found:
    """Find the ViT in what a file holds, and name its tensors as timm does.

    Args:
        content: of the file, as `read_checkpoint` returns it.
        path: of the file, for refusals.
        part: the network to take when the file holds several.

    Raises:
        WaraError: kind `artefact` when there is no ViT, or several and none is the one to take.
    """
    tensors: dict[str, Tensor] = {}
    numbers: dict[str, Any] = {}
    for name, value in _flat(content, path):
        (tensors if isinstance(value, Tensor) else numbers)[_WRAPPED.sub("", name)] = value
    prefix, layout = _choose(tensors, path, part)
    own = {key[len(prefix) :]: value for key, value in tensors.items() if key.startswith(prefix)}
    for name, value in own.items():
        if value.layout != torch.strided or value.is_quantized or value.is_meta:
            what = f"{name} is no plain tensor"
            raise WaraError("artefact", what, str(path), _STATE_DICT)
    others = [key for key in tensors if not key.startswith(prefix)]
    told = {value for key, value in numbers.items() if key.rpartition(".")[2] in _HEADS}
    heads = next(iter(told)) if len(told) == 1 else None
    return Found(
        state=_rename(own, layout.rules),
        layout=_title(layout, own, tensors),
        part=prefix.rstrip("."),
        left_out=_listed(_places(others, prefix)),
        statistics=_statistics(layout, own, tensors),
        heads=heads if isinstance(heads, int) else None,
    )


def _flat(content: Any, path: Path, before: str = "", depth: int = 0) -> Iterator[tuple[str, Any]]:
    """Yield tensors and plain numbers by their dotted names."""
    if not isinstance(content, Mapping):
        return
    if depth > _DEEPEST:  # a mapping may even hold itself
        what = f"mappings that nest more than {_DEEPEST} deep"
        raise WaraError("artefact", what, str(path), _STATE_DICT)
    for key, value in content.items():
        name = f"{before}{key}"
        if isinstance(value, Mapping):
            yield from _flat(value, path, f"{name}.", depth + 1)
        elif isinstance(value, Tensor | int):
            yield name, value


def _choose(tensors: dict[str, Tensor], path: Path, part: str | None) -> tuple[str, Layout]:
    """Return the prefix and the layout of the network to take."""
    found: dict[str, Layout] = {}
    for layout in LAYOUTS:
        for name in tensors:
            prefix = name.removesuffix(layout.anchor)
            if prefix == name or (prefix and not prefix.endswith(".")):
                continue
            if any(key.startswith(prefix + layout.beside) and key != name for key in tensors):
                found.setdefault(prefix, layout)
    if not found:
        some = ", ".join(list(tensors)[:3]) or "no tensors"
        remedy = "give the weights of a ViT by the names of timm or Hugging Face"
        raise WaraError("artefact", f"no ViT in the file: {some}", str(path), remedy)
    parts = {prefix.rstrip("."): prefix for prefix in found}
    if part is not None:
        if part not in parts:
            what = f"the file has no part '{part}'"
            raise WaraError("artefact", what, str(path), _part_remedy(part, parts))
        return parts[part], found[parts[part]]
    evaluated = [p for p in found if _EVALUATED & set(p.split("."))]
    chosen = evaluated if len(evaluated) == 1 else list(found)
    if len(chosen) > 1:
        what = f"the file holds {len(found)} networks: {', '.join(map(repr, parts))}"
        raise WaraError("artefact", what, str(path), "set backbone.part to one of them")
    return chosen[0], found[chosen[0]]


def _part_remedy(part: str, parts: Mapping[str, str]) -> str:
    return "leave backbone.part out" if list(parts) == [""] else suggest(part, parts)


def _rename(state: dict[str, Tensor], rules: Rules) -> dict[str, Tensor]:
    renamed = {}
    for name, value in state.items():
        for pattern, becomes in rules:
            name = re.sub(pattern, becomes, name)
        if name in ("cls_token", "pos_embed") and 0 < value.ndim < 3:
            value = value.reshape(1, -1, value.shape[-1])  # CLIP has no axis of the batch
        renamed[name] = value
    return fuse(renamed)


def fuse(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Join queries, keys and values that lie apart, as timm has them: `attn.qkv`.

    A key without a bias, as in DINOv3, has the bias zero.
    """
    apart = re.compile(rf"{_BLOCK}attn\.(q|k|v|query|key|value)(?:_proj)?\.(weight|bias)$")
    joined: dict[str, Tensor] = {}
    thirds: dict[str, dict[str, Tensor]] = {}
    for name, value in state.items():
        match = apart.match(name)
        if match:
            index, which, kind = match.groups()
            thirds.setdefault(f"blocks.{index}.attn.qkv.{kind}", {})[which[0]] = value
        else:
            joined[name] = value
    for name, parts in thirds.items():
        if name.endswith("bias") and "k" not in parts and "q" in parts:
            parts["k"] = torch.zeros_like(parts["q"])
        # Those of different width are left apart, and told by name as unknown.
        if set(parts) == set("qkv") and len({(p.ndim, *p.shape[1:]) for p in parts.values()}) == 1:
            joined[name] = torch.cat([torch.atleast_1d(parts[which]) for which in "qkv"])
        else:
            joined.update({f"{name}.{which}": part for which, part in parts.items()})
    return joined


def _title(layout: Layout, own: Iterable[str], tensors: Iterable[str]) -> str:
    return layout.name if layout.name != "timm" else _kind(own, tensors)[0]


def _statistics(layout: Layout, own: Iterable[str], tensors: Iterable[str]) -> Statistics | None:
    """Return what the public training code of a layout normalises by, None where it has no own."""
    if layout.name == "timm":
        return _kind(own, tensors)[1]
    if "CLIP" in layout.name:
        return HALF if _siglip(tensors) else CLIP
    return IMAGENET if layout.name == "torchvision" else None


def _siglip(tensors: Iterable[str]) -> bool:
    return any(name.rpartition(".")[2] == "logit_bias" for name in tensors)


def _kind(own: Iterable[str], tensors: Iterable[str]) -> tuple[str, Statistics | None]:
    """Tell who wrote a file that has the names of timm, by what lies beside the ViT."""
    own, tensors = list(own), list(tensors)
    if any(name.startswith(("decoder_blocks.", "decoder_embed.")) for name in own):
        return "MAE", IMAGENET
    if any("visual.trunk." in name for name in tensors):
        return "OpenCLIP", HALF if _siglip(tensors) else CLIP
    if "storage_tokens" in own:
        return "DINOv3", IMAGENET
    heads = any(re.search(r"(^|\.)(dino_head|ibot_head)\.", name) for name in tensors)
    if heads or ("mask_token" in own and "blocks.0.ls1.gamma" in own):
        return "DINO", IMAGENET
    return "timm", None


def _places(names: Iterable[str], prefix: str) -> Iterator[str]:
    """Yield for each name outside of the network what it belongs to."""
    inside = prefix.split(".")
    for name in names:
        parts = name.split(".")
        same = 0
        while same < min(len(parts), len(inside)) - 1 and parts[same] == inside[same]:
            same += 1
        yield ".".join(parts[: same + 1])


def _listed(places: Iterable[str]) -> tuple[str, ...]:
    return tuple(f"{place} ({count})" for place, count in sorted(Counter(places).items()))


def listed(names: Iterable[str]) -> tuple[str, ...]:
    """Return the parts that names belong to, with their numbers: `decoder_blocks (96)`."""
    return _listed(name.split(".")[0] for name in names)
