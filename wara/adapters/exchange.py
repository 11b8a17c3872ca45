"""Adapters in the file format of Hugging Face PEFT: LoRA, WaveFT and SHiRA, in and out.

PEFT itself is not needed. Its WaveFT files hold no places; both sides draw them from the shape of
the weight and the seed (`draw_places`). PEFT adapts a fused query-key-value layer as one matrix.
"""

from __future__ import annotations

import glob
import json
import math
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from wara.adapters.base import AdaptedLinear, Method, adapted_layers
from wara.adapters.files import CONFIG_FILE, WEIGHTS_FILE
from wara.adapters.inject import adapt, replacing_adapter
from wara.adapters.lora import LoRA, LoRALayer
from wara.adapters.sparse import SHiRA, SparseLayer, WaveFT, draw_places
from wara.adapters.state import adaptation_of, named_parameters
from wara.adapters.targets import (
    ALIASES,
    Blocks,
    find_targets,
    is_pattern,
)
from wara.errors import WaraError
from wara.storage import parse_json, read_regular, replacing_folder
from wara.vit import classifier_names, plain_name, unwrap

PREFIX = "base_model.model."
PARTS = {
    "LORA": ("lora_A.weight", "lora_B.weight"),
    "WAVEFT": ("waveft_spectrum",),
    "SHIRA": ("shira_weight", "shira_indices"),
}
# What a saved option may be without changing what the adapter computes. Any other option that is
# set stands for something that these files cannot be read without.
_READ = {
    "LORA": "r lora_alpha lora_dropout use_rslora rank_pattern alpha_pattern init_lora_weights",
    "WAVEFT": "n_frequency n_frequency_pattern scaling wavelet_family use_idwt random_loc_seed "
    "proportional_parameters init_weights",
    "SHIRA": "r mask_type random_seed init_weights",
}
_HARMLESS = (
    "peft_type peft_version auto_mapping base_model_name_or_path revision task_type inference_mode "
    "target_modules exclude_modules layers_to_transform layers_pattern modules_to_save "
    "fan_in_fan_out megatron_core qalora_group_size ensure_weight_tying"
)
_PLAIN_STARTS = (True, False, "gaussian", "orthogonal", None)

Layers = dict[str, dict[str, Tensor]]
Read = tuple[type[Method], dict[str, Any]]


def import_peft(model: nn.Module, folder: str | Path) -> nn.Module:
    """Put an adapter that PEFT saved onto a model, in place.

    An adapter that the model carries is taken off first. A classifier in the file (PEFT's
    `modules_to_save`) is loaded too; without one the model keeps its own. LoRA pairs of different
    ranks are filled up with zeros to the largest.

    Args:
        model: the base model, with the layer names of training.
        folder: with `adapter_config.json` and `adapter_model.safetensors`.

    Returns:
        The same model, adapted by `LoRA`, `WaveFT` or `SHiRA`, ready to predict or to train on.

    Raises:
        WaraError: kind `artefact` when the files are damaged, do not fit the model, or hold a
            method or option that has no counterpart here.
    """
    folder = Path(folder)
    config, state = _read(folder)
    kind = config["peft_type"]
    layers, rest = _split(state, kind, folder)
    with replacing_adapter(model) as inner:
        _check_layers(inner, layers, folder)
        classes = _match_classifier(inner, rest, folder)
        if classes is not None:
            inner.reset_classifier(classes)  # type: ignore[operator]
        names = [name for name in map(plain_name, dict(inner.named_modules())) if name in layers]
        cls, options = _METHODS[kind](config, layers, names)
        adapt(inner, cls(**options, **_targets(inner, names)))
        _fill(inner, config, layers)
        own = named_parameters(inner)
        with torch.no_grad():
            for name, tensor in rest.items():
                own[name].copy_(tensor)
    return model


def _refuse(what: str, where: object, remedy: str) -> WaraError:
    return WaraError("artefact", what, str(where), remedy)


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the options and tensors of a folder, checked to be of a kind that is known."""
    remedy = "give a folder that PEFT's save_pretrained wrote, with safetensors"
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        if not (folder / name).is_file():
            raise _refuse(f"no {name} in the PEFT folder", folder, remedy)
    try:
        config = parse_json(read_regular(folder / CONFIG_FILE))
    except (OSError, ValueError) as error:
        raise _refuse("not valid JSON", folder / CONFIG_FILE, remedy) from error
    kind = config.get("peft_type")
    if kind not in PARTS:
        known = ", ".join(sorted(PARTS))
        raise _refuse(f"PEFT type {kind!r} cannot be imported", folder, f"known are {known}")
    known_keys = {*_READ[kind].split(), *_HARMLESS.split()}
    odd = sorted(k for k, v in config.items() if k not in known_keys and v and v != "none")
    if kind == "LORA" and config.get("init_lora_weights", True) not in _PLAIN_STARTS:
        odd.append("init_lora_weights")  # PiSSA and its kin change the base weights
    if odd:
        what = f"the adapter was made with {', '.join(odd)}, which has no counterpart here"
        raise _refuse(what, folder / CONFIG_FILE, "merge it with PEFT and load the merged weights")
    try:
        state = load(read_regular(folder / WEIGHTS_FILE))
    except SafetensorError as error:
        remedy = "copy the folder again; the file is damaged"
        raise _refuse(str(error), folder / WEIGHTS_FILE, remedy) from error
    return config, state


def _split(state: dict[str, Tensor], kind: str, folder: Path) -> tuple[Layers, dict[str, Tensor]]:
    """Return the adapter's tensors by layer and part, and the other tensors by name."""
    layers: Layers = {}
    rest: dict[str, Tensor] = {}
    for key, tensor in state.items():
        name = key.removeprefix(PREFIX)
        part = next((p for p in PARTS[kind] if name.endswith(f".{p}")), None)
        if part is None:
            rest[name] = tensor
        else:
            layers.setdefault(name.removesuffix(f".{part}"), {})[part] = tensor
    lacking = sorted(name for name, parts in layers.items() if set(parts) != set(PARTS[kind]))
    if lacking or not layers:
        what = f"tensors of {lacking[0]} are missing" if lacking else "it holds no adapter tensor"
        raise _refuse(what, folder / WEIGHTS_FILE, "save the adapter again with PEFT")
    return layers, rest


def _check_layers(model: nn.Module, layers: Layers, folder: Path) -> None:
    """Refuse layers that the model lacks, and tensors that do not fit it."""
    every = model.named_modules()
    linears = {plain_name(name): m for name, m in every if isinstance(m, nn.Linear)}
    remedy = "use the model that the adapter was trained on"
    for name, parts in layers.items():
        if name not in linears:
            raise _refuse(f"the model has no linear layer {name}", folder, remedy)
        o, d = linears[name].weight.shape
        if "lora_A.weight" in parts:
            a, b = parts["lora_A.weight"].shape, parts["lora_B.weight"].shape
            fits = len(a) == len(b) == 2 and a[1] == d and b[0] == o and a[0] == b[1]
        elif "shira_indices" in parts:
            places, k = parts["shira_indices"], parts["shira_weight"].numel()
            limits = torch.tensor([[o], [d]])
            fits = places.shape == (2, k) and bool(((places >= 0) & (places < limits)).all())
        else:
            fits = 1 <= parts["waveft_spectrum"].numel() <= o * d
        if not fits:
            raise _refuse(f"the tensors do not fit the {o}x{d} layer {name}", folder, remedy)


def _match_classifier(model: nn.Module, rest: dict[str, Tensor], folder: Path) -> int | None:
    """Return the number of classes to change the classifier to, if any.

    Raises:
        WaraError: kind `artefact` when the file holds tensors of anything but the classifier.
    """
    if not rest:
        return None
    own = named_parameters(model)
    heads = set(map(plain_name, classifier_names(model)))
    remedy = "use the model that the adapter was trained on, its head in PEFT's modules_to_save"
    alien = sorted(n for n in rest if n not in heads)
    if alien:
        what = f"the file holds {', '.join(alien[:3])}, which is no part of the classifier"
        raise _refuse(what, folder / WEIGHTS_FILE, remedy)
    odd = [name for name in rest if rest[name].shape != own[name].shape]
    if any(rest[name].shape[1:] != own[name].shape[1:] for name in odd):
        raise _refuse("the classifier has another width", folder / WEIGHTS_FILE, remedy)
    return int(rest[odd[0]].shape[0]) if odd else None


def _targets(model: nn.Module, names: Sequence[str]) -> dict[str, Any]:
    """Return `targets` and `blocks` that find exactly these layers, in short names if possible."""
    leaves = {name.rsplit(".", 1)[-1] for name in names}
    short = tuple(alias for alias, own in ALIASES.items() if leaves & set(own))
    numbers = [re.match(r"blocks\.(\d+)\.", name) for name in names]
    if short and all(numbers):
        chosen = sorted({int(match[1]) for match in numbers if match})
        whole = chosen == list(range(len(model.blocks)))  # type: ignore[arg-type]
        blocks: Blocks = "all" if whole else tuple(chosen)
        try:
            found = find_targets(model, short, blocks)
        except WaraError:
            found = []  # blocks under other numbers; exact paths always work
        if [t.name for t in found] == list(names) and all(len(t.rows) == 1 for t in found):
            return {"targets": short, "blocks": blocks}
    exact = [glob.escape(name) for name in names]
    # A name without a dot is no pattern yet: `fc` is, as `[f]c`.
    return {"targets": tuple(n if is_pattern(n) else f"[{n[0]}]{n[1:]}" for n in exact)}


def _lora_scale(config: dict[str, Any], name: str) -> float:
    """Return PEFT's `α / r`, or `α / √r`, for a layer; patterns are regular expressions."""

    def value(patterns: dict[str, Any] | None, default: float) -> float:
        for pattern, own in (patterns or {}).items():
            if re.match(rf"(.*\.)?({pattern})$", name):
                return float(own)
        return default

    rank = value(config.get("rank_pattern"), config["r"])
    alpha = value(config.get("alpha_pattern"), config["lora_alpha"])
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _lora(config: dict[str, Any], layers: Layers, names: Sequence[str]) -> Read:
    rank = max(parts["lora_A.weight"].shape[0] for parts in layers.values())
    scale = _lora_scale(config, names[0])
    dropout = float(config.get("lora_dropout") or 0.0)
    return LoRA, {"rank": rank, "alpha": scale * rank, "dropout": dropout}


def _counts(sizes: Sequence[int]) -> int | tuple[int, ...]:
    return sizes[0] if len(set(sizes)) == 1 else tuple(sizes)


def _waveft(config: dict[str, Any], layers: Layers, names: Sequence[str]) -> Read:
    options: dict[str, Any] = {
        "k": _counts([layers[name]["waveft_spectrum"].numel() for name in names]),
        "scale": float(config["scaling"]),
        "seed": int(config["random_loc_seed"]),
    }
    if not config.get("use_idwt", True):
        return SHiRA, options  # PEFT's WaveFT without its transform
    return WaveFT, {"wavelet": config["wavelet_family"], **options}


def _shira(config: dict[str, Any], layers: Layers, names: Sequence[str]) -> Read:
    k = _counts([layers[name]["shira_weight"].numel() for name in names])
    return SHiRA, {"k": k, "seed": int(config.get("random_seed") or 0)}


_METHODS = {"LORA": _lora, "WAVEFT": _waveft, "SHIRA": _shira}


@torch.no_grad()
def _fill(model: nn.Module, config: dict[str, Any], layers: Layers) -> None:
    """Copy the tensors of a file into a freshly adapted model."""
    for name, layer in adapted_layers(model).items():
        adapter, parts = layer.adapter, layers[name]
        if isinstance(adapter, LoRALayer):
            rank = parts["lora_A.weight"].shape[0]
            share = _lora_scale(config, name) / adapter.scale
            up = parts["lora_B.weight"]
            adapter.down.zero_()[:rank] = parts["lora_A.weight"]
            adapter.up.zero_()[:, :rank] = up if share == 1 else up * share
        else:
            assert isinstance(adapter, SparseLayer)
            numbers = parts.get("waveft_spectrum", parts.get("shira_weight"))
            assert numbers is not None
            adapter.coefficients.copy_(numbers)
            if "shira_indices" in parts:
                adapter.places.copy_(parts["shira_indices"])
            adapter.refresh()


def export_peft(model: nn.Module, folder: str | Path) -> Path:
    """Write the adapter of a model, and its classifier, as PEFT's `save_pretrained` would.

    A LoRA on parts of a fused layer becomes one of larger rank with zero blocks, and a SHiRA's
    places are filled up with zeros to the multiple of `d + o` that PEFT wants; both compute the
    same.

    Args:
        model: adapted by `LoRA`, `WaveFT` or `SHiRA`.
        folder: made if absent; the two files in it are replaced.

    Returns:
        The folder, to be loaded by `PeftModel.from_pretrained(base_model, folder)`.

    Raises:
        WaraError: kind `config` when the model carries no adapter, `artefact` when PEFT's format
            cannot express it, `storage` when writing fails.
    """
    folder = Path(folder)
    adaptation = adaptation_of(model)
    layers = adapted_layers(model)
    kinds = {_kind(layer) for layer in layers.values()}
    if adaptation.base or len(kinds) != 1 or None in kinds:
        what = f"PEFT has no form for a '{adaptation.method.name}' adapter"
        raise _refuse(what, folder, "merge it and save the merged weights")
    (kind,) = kinds
    assert kind is not None
    own, state = _WRITERS[kind](adaptation.method, layers)
    heads = list(dict.fromkeys(name.rpartition(".")[0] for name in adaptation.head))
    config = {
        "peft_type": kind,
        "task_type": None,
        "auto_mapping": None,
        "base_model_name_or_path": None,
        "revision": None,
        "inference_mode": True,
        "fan_in_fan_out": False,
        "target_modules": list(layers),
        "modules_to_save": heads or None,
        **own,
    }
    own_parameters = named_parameters(unwrap(model))
    state.update({name: own_parameters[name] for name in adaptation.head})
    plain = {PREFIX + n: t.detach().cpu().clone().contiguous() for n, t in state.items()}
    with replacing_folder(folder) as fresh:
        (fresh / WEIGHTS_FILE).write_bytes(save(plain, metadata={"format": "pt"}))
        (fresh / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n")
    return folder


def _kind(layer: AdaptedLinear) -> str | None:
    adapter = layer.adapter
    if type(adapter) is LoRALayer:
        return "LORA"
    if type(adapter) is SparseLayer:
        return "SHIRA" if adapter.wavelet is None else "WAVEFT"
    return None


Written = tuple[dict[str, Any], dict[str, Tensor]]


def _write_lora(method: Method, layers: dict[str, AdaptedLinear]) -> Written:
    state: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    dropout = 0.0
    for name, layer in layers.items():
        adapter = layer.adapter
        assert isinstance(adapter, LoRALayer)
        ranks[name] = adapter.down.shape[0]
        alphas[name] = adapter.scale * ranks[name]
        dropout = adapter.dropout.p if adapter.dropout is not None else 0.0
        state[f"{name}.lora_A.weight"] = adapter.down
        state[f"{name}.lora_B.weight"] = adapter.block_up()
    rank = Counter(ranks.values()).most_common(1)[0][0]
    alpha = next(alphas[name] for name in layers if ranks[name] == rank)
    own = {
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": dropout,
        "bias": "none",
        "use_rslora": False,
        "rank_pattern": {n: r for n, r in ranks.items() if r != rank},
        "alpha_pattern": {n: a for n, a in alphas.items() if a != alpha},
    }
    return own, state


def _write_waveft(method: Method, layers: dict[str, AdaptedLinear]) -> Written:
    assert isinstance(method, WaveFT)
    family = "db1" if method.wavelet == "haar" else method.wavelet
    if not re.fullmatch(r"(db|sym|coif)\d+", family):
        what = f"PEFT's WaveFT does not know the wavelet {family}"
        raise _refuse(what, "adapter.wavelet", "train with a db, sym or coif wavelet")
    state: dict[str, Tensor] = {}
    counts: dict[str, int] = {}
    for name, layer in layers.items():
        adapter = layer.adapter
        assert isinstance(adapter, SparseLayer)
        shape = (layer.out_features, layer.in_features)
        if adapter.rows != ((0, layer.out_features),):
            what = "PEFT adapts a fused layer as one matrix, the adapter its parts"
            raise _refuse(what, name, "train with targets: [qkv, o]")
        counts[name] = adapter.coefficients.numel()
        drawn = draw_places(shape, counts[name], method.seed)
        if not torch.equal(adapter.places.cpu().long(), drawn):
            what = "PEFT draws the places from the seed, and these are others"
            raise _refuse(what, name, "merge the adapter and save the merged weights")
        state[f"{name}.waveft_spectrum"] = adapter.coefficients
    common = Counter(counts.values()).most_common(1)[0][0]
    own = {
        "n_frequency": common,
        "n_frequency_pattern": {n: k for n, k in counts.items() if k != common},
        "scaling": method.scale,
        "wavelet_family": family,
        "use_idwt": True,
        "random_loc_seed": method.seed,
        "proportional_parameters": False,
        "init_weights": True,
        "bias": "none",
    }
    return own, state


def _write_shira(method: Method, layers: dict[str, AdaptedLinear]) -> Written:
    entries: dict[str, tuple[Tensor, Tensor]] = {}
    for name, layer in layers.items():
        adapter = layer.adapter
        assert isinstance(adapter, SparseLayer)
        # Their sum per place, for PEFT's places are all different.
        flat = (adapter.left * layer.in_features + adapter.right).cpu()
        places, slot = torch.unique(flat, return_inverse=True)
        values = (adapter.coefficients.detach() * adapter.scale).cpu()
        entries[name] = places, torch.zeros(len(places)).to(values).index_add(0, slot, values)
    sums = {name: layer.in_features + layer.out_features for name, layer in layers.items()}
    rank = max(math.ceil(len(places) / sums[name]) for name, (places, _) in entries.items())
    state: dict[str, Tensor] = {}
    for name, (places, values) in entries.items():
        d, o, wanted = layers[name].in_features, layers[name].out_features, rank * sums[name]
        if wanted > d * o:
            what = f"PEFT's SHiRA needs {wanted:,} places of the {o}x{d} layer"
            raise _refuse(what, name, "merge the adapter and save the merged weights")
        free = torch.ones(d * o, dtype=torch.bool)
        free[places] = False
        more = free.nonzero().squeeze(1)[: wanted - len(places)]
        every = torch.cat([places, more])
        state[f"{name}.shira_weight"] = torch.cat([values, values.new_zeros(len(more))])
        state[f"{name}.shira_indices"] = torch.stack([every // d, every % d]).to(torch.int32)
    seed = method.seed if isinstance(method, SHiRA) else 0
    own = {"r": rank, "mask_type": "random", "random_seed": seed, "init_weights": True}
    return own, state


_WRITERS = {"LORA": _write_lora, "WAVEFT": _write_waveft, "SHIRA": _write_shira}
