"""Makes an architecture and a file of weights agree to the tensor, or says why they do not."""

from __future__ import annotations

import inspect
import math
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from timm.layers import resample_abs_pos_embed
from timm.layers.activations import QuickGELU
from torch import Tensor, nn

from wara.backbones.beside import Beside
from wara.backbones.layouts import Found, listed
from wara.backbones.names import NANO
from wara.errors import WaraError
from wara.vit import block_names, classifiers, pair

_SCALE = re.compile(r"blocks\.\d+\.(ls1\.gamma|gamma_1)$")
_QKV_BIAS = re.compile(r"blocks\.\d+\.attn\.qkv\.bias$")
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# Parts beside the encoder that training code saves with it.
_FOREIGN = re.compile(
    r"(.*head.*|.*decoder.*|mask_.*|fc\d*|classif.*|pre_logits|proj.*|predict.*|pooler|text.*|"
    r"logit_.*|rope_embed|local_cls_norm|queue.*|criterion.*|loss.*)"
)
_SIZES = {(192, 12): "tiny", (384, 12): "small", (768, 12): "base", (1024, 24): "large",
          (1280, 32): "huge"}  # fmt: skip
_HINTS = (
    ("unknown", r"lora_", "merge the adapter into the weights first (PEFT: merge_and_unload)"),
    ("unknown", r"attn\.[qk]_norm\.", "set backbone.options: {qk_norm: true}"),
    ("unknown", r"reg", "choose an architecture with registers, as vit_base_patch14_reg4_dinov2"),
    ("missing", r"reg_token", "choose an architecture without registers"),
    ("missing", r"ls\d\.gamma", "choose an architecture without LayerScale"),
    ("unknown", r"norm_pre", "choose an architecture of CLIP, as vit_base_patch16_clip_224"),
    ("missing", r"norm_pre", "choose an architecture without a norm before the blocks"),
)


def implied(
    probe: Any,
    found: Found,
    options: Mapping[str, Any],
    pool: str | None,
    usual_pool: str | None,
    path: Path,
) -> tuple[dict[str, Any], str | None]:
    """Return the options and the pooling that the weights imply.

    Args:
        probe: the model with `options` alone.
        found: the weights.
        options: of the architecture, so far; they go before what is implied.
        pool: what the user asks for.
        usual_pool: what to take where neither user nor weights say anything.
        path: of the weights, for refusals.

    Raises:
        WaraError: kind `artefact` when the weights cannot be pooled that way.
    """
    state, own = found.state, probe.state_dict()
    accepted = inspect.signature(type(probe).__init__).parameters
    more: dict[str, Any] = {}
    if _any(_SCALE, state) and not _any(_SCALE, own):
        more["init_values"] = 1e-5  # any number: the weights hold those that were learnt
    if "blocks.0.attn.qkv.weight" in state:
        if _any(_QKV_BIAS, own) and not _any(_QKV_BIAS, state):
            more["qkv_bias"] = False
        elif not _any(re.compile(r"attn\.(qkv\.|q_)bias"), own) and any(
            torch.any(state[name] != 0) for name in state if _QKV_BIAS.match(name)
        ):
            more["qkv_bias"] = True
    norm, pooled = "norm.weight" in state, "fc_norm.weight" in state
    if pooled and not norm:
        if pool == "token":
            what = "the weights have the last norm of average pooling only (fc_norm)"
            remedy = "leave backbone.pool out, or set it to avg"
            raise WaraError("artefact", what, str(path), remedy)
        pool = "avg"
    elif pooled and pool is None and not {"norm.weight", "fc_norm.weight"} <= own.keys():
        what = "the weights have two last norms, norm and fc_norm"
        remedy = "set backbone.pool to token (norm) or avg (fc_norm)"
        raise WaraError("artefact", what, str(path), remedy)
    pool = pool or usual_pool
    if norm and not pooled and (pool or probe.global_pool) not in ("", "token", "map"):
        # timm would start a new norm after the pooling in place of the one that was trained.
        more[next(key for key in ("fc_norm", "use_fc_norm") if key in accepted)] = False
    return {**{key: value for key, value in more.items() if key in accepted}, **options}, pool


def _any(pattern: re.Pattern[str], names: Iterable[str]) -> bool:
    return any(pattern.search(name) for name in names)


def check(model: Any, found: Found, beside: Beside, architecture: str, path: Path) -> None:
    """Refuse weights of another size, with what would fit.

    Raises:
        WaraError: kind `artefact`.
    """
    kernel = found.state.get("patch_embed.proj.weight")
    if kernel is None or kernel.ndim != 4:
        return  # told by name and shape, when the weights are loaded
    width, channels, *side = kernel.shape
    depth = len({name.split(".")[1] for name in found.state if name.startswith("blocks.")})
    own = (int(model.embed_dim), len(block_names(model)))
    if channels != 3:
        what = f"the weights are of images with {channels} channels"
        raise WaraError("artefact", what, str(path), "give weights of colour images")
    patch = pair(model.patch_embed.patch_size)
    if (width, depth) != own:
        what = (
            f"the weights have width {width} and {depth} blocks, {architecture} has "
            f"width {own[0]} and {own[1]} blocks"
        )
        raise WaraError("artefact", what, str(path), _fitting(width, depth, side[0]))
    if tuple(side) != patch:
        what = f"the weights have patches of {side[0]} pixels, {architecture} of {patch[0]}"
        remedy = f"set backbone.options: {{patch_size: {side[0]}}}, or choose such a backbone"
        raise WaraError("artefact", what, str(path), remedy)
    block = model.get_submodule(block_names(model)[0])
    heads = getattr(getattr(block, "attn", None), "num_heads", None)
    told = beside.heads or found.heads
    if heads is not None and told is not None and heads != told:
        what = f"the weights were trained with {told} attention heads, {architecture} has {heads}"
        remedy = f"set backbone.options: {{num_heads: {told}}}"
        raise WaraError("artefact", what, str(path), remedy)
    quick = any(isinstance(module, QuickGELU) for module in model.modules())
    if beside.quick_gelu is not None and beside.quick_gelu != quick:
        what = f"config.json says quick_gelu: {beside.quick_gelu}, {architecture} has another"
        remedy = "choose the backbone with or without `quickgelu` in its name"
        raise WaraError("artefact", what, str(path), remedy)


def _fitting(width: int, depth: int, patch: int) -> str:
    size = _SIZES.get((width, depth))
    for form in ("vit_{}_patch{}_224", "vit_{}_patch{}_dinov2"):
        name = form.format(size, patch)
        if size and timm.is_model(name):
            return f"choose backbone.name {name}"
    return (
        "set backbone.options: "
        f"{{embed_dim: {width}, depth: {depth}, patch_size: {patch}, num_heads: …}}"
    )


def load(model: Any, found: Found, architecture: str, path: Path) -> list[str]:
    """Load weights, every tensor of the model but the classifier's, and nothing else.

    Returns:
        What was left out of the network that was found, with numbers of tensors.

    Raises:
        WaraError: kind `artefact` when a tensor is missing, unknown, of another shape or not sound.
    """
    own = model.state_dict()
    heads = _classifier_names(model)
    state, left = {}, []
    for name, value in found.state.items():
        if _of_no_use(name, value, own, heads, found.state):
            left.append(name)
        else:
            state[name] = value
    _check_values(state, path)
    _check_positions(model, state, path)
    state = _convert(architecture, state, model, path)
    fresh = {name for name in own if name.startswith(heads)}
    state = {name: value for name, value in state.items() if name not in fresh}
    faults = {
        "missing": sorted(own.keys() - state.keys() - fresh),
        "unknown": sorted(state.keys() - own.keys()),
        "wrong shape": sorted(
            k for k in own.keys() & state.keys() if own[k].shape != state[k].shape
        ),
    }
    if any(faults.values()):
        words = [
            f"{word} {', '.join(names[:3])}{' …' if len(names) > 3 else ''}"
            for word, names in faults.items()
            if names
        ]
        what = f"the weights do not fit backbone {architecture}"
        where = f"{path}: " + "; ".join(words)
        raise WaraError("artefact", what, where, _hint(faults))
    model.load_state_dict({**state, **{name: own[name] for name in fresh}})
    return list(listed(left))


def _of_no_use(
    name: str,
    value: Tensor,
    own: Mapping[str, Tensor],
    heads: tuple[str, ...],
    state: Mapping[str, Tensor],
) -> bool:
    if name in own and not name.startswith(heads):
        return False
    top = name.split(".")[0]
    if top not in {key.split(".")[0] for key in own} or name.startswith(heads):
        if _FOREIGN.fullmatch(top):
            return True
        # Of two last norms the model has the one that fits its pooling.
        other = {"norm": "fc_norm.weight", "fc_norm": "norm.weight"}.get(top)
        return name.startswith(heads) or (other in state and other in own)
    if name.endswith(".bias_mask"):
        return True
    no_bias = name.removesuffix("qkv.bias") + "q_bias" not in own
    return bool(_QKV_BIAS.match(name)) and no_bias and not torch.any(value != 0)


def _check_values(state: Mapping[str, Tensor], path: Path) -> None:
    for name, value in state.items():
        if value.dtype not in _FLOATS:
            what = f"{name} holds {str(value.dtype).removeprefix('torch.')}, not weights"
            remedy = "give the weights as they were before quantisation"
            raise WaraError("artefact", what, str(path), remedy)
        if not torch.isfinite(value).all():
            what = f"{name} holds values that are not finite"
            remedy = "give another checkpoint of that training"
            raise WaraError("artefact", what, str(path), remedy)


def _check_positions(model: Any, state: Mapping[str, Tensor], path: Path) -> None:
    """Refuse position embeddings that no square grid explains, before they are resampled as one."""
    position, own = state.get("pos_embed"), getattr(model, "pos_embed", None)
    if position is None or own is None or position.shape == own.shape or position.ndim != 3:
        return
    bare = getattr(model, "no_embed_class", False) and "register_tokens" not in state
    prefix = 0 if bare else 1 if "register_tokens" in state else int(model.num_prefix_tokens)
    patches = position.shape[1] - prefix
    if patches < 1 or math.isqrt(patches) ** 2 != patches:
        what = f"position embeddings of {position.shape[1]} tokens: with {prefix} before them, the "
        what += f"other {patches} are no square grid"
        remedy = "choose the architecture with as many class and register tokens as the weights"
        raise WaraError("artefact", what, str(path), remedy)


def _convert(
    architecture: str, state: dict[str, Tensor], model: Any, path: Path
) -> dict[str, Tensor]:
    """Send weights through timm's own conversion, which resamples position embeddings."""
    rotary = hasattr(model, "rope")
    if rotary and "register_tokens" in state:
        state["storage_tokens"] = state.pop("register_tokens")
    for gate in [name for name in state if ".mlp.gate_proj." in name]:
        # Hugging Face has gate, value and output of a gated layer apart; DINOv2 has one of two.
        w1, w2, w3, fc1, fc2 = (gate.replace("gate_proj", n) for n in "w1 w2 w3 fc1 fc2".split())
        state |= {w1: state.pop(gate), w2: state.pop(fc1), w3: state.pop(fc2)}
        if not rotary:
            state[w1.replace("w1", "w12")] = torch.cat([state.pop(w1), state.pop(w2)])
    if "register_tokens" in state or _any(re.compile(r"mlp\.w12\."), state):
        # By this name timm knows DINOv2, whose registers and gated layers it then converts.
        state["mask_token"] = torch.zeros(1)
    try:
        return _conversion(architecture)(state, model)
    # timm's conversions take the right architecture for granted.
    except Exception as error:
        what = f"the weights are not those of backbone {architecture}"
        raise WaraError("artefact", what, str(path), _hint({})) from error


def _hint(faults: Mapping[str, list[str]]) -> str:
    for word, pattern, remedy in _HINTS:
        if _any(re.compile(pattern), faults.get(word, [])):
            return remedy
    return "name in backbone.name (and backbone.options) the architecture of these very weights"


def _classifier_names(model: Any) -> tuple[str, ...]:
    """Return the prefixes of the classifier's keys; distilled models have two classifiers."""
    own = {id(module) for module in classifiers(model)}
    names = [name for name, module in model.named_modules() if id(module) in own]
    return tuple(f"{name}." for name in names or ["head"])


def _conversion(architecture: str) -> Callable[[dict[str, Tensor], nn.Module], dict[str, Tensor]]:
    """Return timm's own conversion for checkpoints of a model, position embeddings included."""
    if architecture == NANO:
        return _resample_position
    module = sys.modules[timm.models.model_entrypoint(architecture.split(".")[0]).__module__]
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
