"""What an adapted model holds beside its base: what trains, what is saved, and what the base is."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from wara.adapters.base import AdaptedModule, AdapterLayer, Method
from wara.errors import WaraError
from wara.storage import canonical_sha256
from wara.vit import classifier_names, classifiers, plain_name, unwrap

ADAPTATION = "wara_adaptation"
"""Attribute of an adapted model that holds its `Adaptation`."""

# What else of a module decides what the model computes, beside its class and its tensors.
_STRUCTURE = (
    "num_heads", "head_dim", "scale", "eps", "grid_size", "patch_size", "num_prefix_tokens",
    "num_reg_tokens", "no_embed_class", "global_pool", "pool_include_prefix", "normalized_shape",
    "kernel_size", "stride", "padding", "window_size", "approximate",
)  # fmt: skip

Attribute = tuple[str, str, Any, Any]


@dataclass(frozen=True)
class Adaptation:
    """What `adapt` did to a model, and so what undoes it.

    Args:
        method: the method; where a budget was set, the one fitted to it.
        head: names of the classifier's parameters.
        base: names of the base parameters that train (full fine-tuning and its kin).
        originals: values of these before training, for methods that change few.
        budget: where one was set: wanted and fitted number of adapter parameters.
        paths: of the modules that adapters sit on.
        attributes: what had to be changed besides: module path, attribute, value before and after.
    """

    method: Method
    head: tuple[str, ...]
    base: tuple[str, ...]
    originals: dict[str, Tensor] = field(default_factory=dict)
    budget: tuple[int, int] | None = None
    paths: tuple[str, ...] = ()
    attributes: tuple[Attribute, ...] = ()

    @property
    def removable(self) -> bool:
        """Whether the model as it was before can be had back."""
        return not self.base or bool(self.originals)


def adaptation_of(model: nn.Module) -> Adaptation:
    """Return what `adapt` did to the model.

    Raises:
        WaraError: kind `config` when the model is not adapted.
    """
    adaptation = getattr(unwrap(model), ADAPTATION, None)
    if not isinstance(adaptation, Adaptation):
        remedy = "call wara.adapt(model, method) or wara.load_adapter(model, folder) first"
        raise WaraError("config", "the model carries no adapter", remedy=remedy)
    return adaptation


def named_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return all parameters by plain name, see `plain_name`; shared ones under each."""
    every = model.named_parameters(remove_duplicate=False)
    return {plain_name(name): parameter for name, parameter in every}


def _adapters(model: nn.Module) -> Iterator[tuple[str, AdapterLayer]]:
    for path, module in model.named_modules():
        if isinstance(module, AdapterLayer):
            yield plain_name(path), module


def _adapter_parameters(model: nn.Module) -> dict[str, tuple[nn.Parameter, bool]]:
    """Return the adapter's parameters by name, each with whether it is a core; ties once."""
    found: dict[str, tuple[nn.Parameter, bool]] = {}
    seen: set[int] = set()
    for path, adapter in _adapters(model):
        for name, parameter in adapter.named_parameters():
            if id(parameter) not in seen:
                seen.add(id(parameter))
                found[f"{path}.{name}"] = (parameter, name in adapter.core_names)
    return found


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that train, by name: adapter, then base, then head.

    Args:
        model: an adapted model.

    Returns:
        Names as in `model.named_parameters()`, without what `torch.compile` adds to them; a
        parameter that several layers share appears once, under its first name.

    Raises:
        WaraError: kind `config` when the model is not adapted.
    """
    model, adaptation = unwrap(model), adaptation_of(model)
    found = {name: parameter for name, (parameter, _) in _adapter_parameters(model).items()}
    own = named_parameters(model)
    return found | {name: own[name] for name in (*adaptation.base, *adaptation.head)}


def parameter_groups(model: nn.Module) -> dict[str, list[nn.Parameter]]:
    """Return the parameters that train, grouped by the learning rate they take.

    Args:
        model: an adapted model.

    Returns:
        Lists under `adapter` (base parameters that train included), `core` and `head`.

    Raises:
        WaraError: kind `config` when the model is not adapted.
    """
    model, adaptation = unwrap(model), adaptation_of(model)
    groups: dict[str, list[nn.Parameter]] = {"adapter": [], "core": [], "head": []}
    for parameter, is_core in _adapter_parameters(model).values():
        groups["core" if is_core else "adapter"].append(parameter)
    own = named_parameters(model)
    groups["adapter"] += [own[name] for name in adaptation.base]
    groups["head"] += [own[name] for name in adaptation.head]
    return groups


def count_parameters(model: nn.Module) -> dict[str, int]:
    """Count parameters.

    Args:
        model: an adapted model.

    Returns:
        `adapter` (cores and trained base parameters included), `head`, `trainable` (both), and
        `base`: what stays frozen. Everything together is `trainable + base`.

    Raises:
        WaraError: kind `config` when the model is not adapted.
    """
    groups = {key: sum(p.numel() for p in group) for key, group in parameter_groups(model).items()}
    everything = sum(p.numel() for p in model.parameters())
    adapter = groups["adapter"] + groups["core"]
    return {
        "adapter": adapter,
        "head": groups["head"],
        "trainable": adapter + groups["head"],
        "base": everything - adapter - groups["head"],
    }


def adapter_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """Return all that training made or drew: adapter, trained base parameters and head.

    Args:
        model: an adapted model.

    Returns:
        Detached tensors by name: what `trainable_parameters` names, plus the persistent buffers of
        the adapter layers (sparse places, random and SVD bases).

    Raises:
        WaraError: kind `config` when the model is not adapted.
    """
    state = {name: p.detach() for name, p in trainable_parameters(model).items()}
    return state | _adapter_buffers(unwrap(model))


def _adapter_buffers(model: nn.Module) -> dict[str, Tensor]:
    """Return the persistent buffers of the adapter layers; those that layers share once."""
    found: dict[str, Tensor] = {}
    seen: set[int] = set()
    for path, adapter in _adapters(model):
        for name, tensor in adapter.state_dict(keep_vars=True).items():
            if not isinstance(tensor, nn.Parameter) and id(tensor) not in seen:
                seen.add(id(tensor))
                found[f"{path}.{name}"] = tensor
    return found


@torch.no_grad()
def load_adapter_state(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Put a state of `adapter_state_dict` into an adapted model.

    Args:
        model: adapted with the same method and options.
        state: exactly the same names, shapes and types.

    Raises:
        WaraError: kind `artefact`, naming keys, shapes or types that do not agree, or numbers that
            are not finite; nothing changes then.
    """
    model = unwrap(model)
    check_state(model, state)
    _materialise(model)
    for name, tensor in adapter_state_dict(model).items():
        tensor.copy_(state[name])
    for _, adapter in _adapters(model):
        adapter.refresh()


def check_state(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Refuse a state that `load_adapter_state` could not put into the model, and change nothing.

    Raises:
        WaraError: kind `artefact`, see there.
    """
    own = adapter_state_dict(model)
    both = sorted(own.keys() & state.keys())
    problems = {
        "missing": sorted(own.keys() - state.keys()),
        "unknown": sorted(state.keys() - own.keys()),
        "wrong shape": [name for name in both if own[name].shape != state[name].shape],
        "wrong type": [name for name in both if own[name].dtype != state[name].dtype],
    }
    faults = [
        f"{word} {', '.join(names[:3])}{' …' if len(names) > 3 else ''}"
        for word, names in problems.items()
        if names
    ]
    if faults:
        remedy = "use the backbone and options that the adapter was trained with"
        what = "the adapter does not fit the model"
        raise WaraError("artefact", what, "; ".join(faults), remedy)
    odd = [name for name in both if not bool(state[name].isfinite().all())]
    if odd:
        what = f"the adapter holds numbers that are not finite, in {odd[0]}"
        raise WaraError("artefact", what, "", "train again, at a lower learning rate")


def _materialise(model: nn.Module) -> None:
    """Give numbers, any, to what is there in shape alone; what is shared stays shared."""
    device = next((p.device for p in model.parameters() if not p.is_meta), torch.device("cpu"))
    memo: dict[int, Any] = {}
    for module in model.modules():
        tables: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
        for table in tables:
            for name, tensor in table.items():
                if tensor is None or not tensor.is_meta:
                    continue
                if id(tensor) not in memo:
                    fresh = torch.empty_like(tensor, device=device)
                    if isinstance(tensor, nn.Parameter):
                        fresh = nn.Parameter(fresh, requires_grad=tensor.requires_grad)
                    # The old one is kept, for its identity must not be given to another.
                    memo[id(tensor)] = (fresh, tensor)
                table[name] = memo[id(tensor)][0]


def base_hash(model: nn.Module) -> str:
    """Return a fingerprint of the frozen base: what it computes with, and how.

    Args:
        model: adapted or not.

    Returns:
        SHA-256, in hex, over the structure (classes of the modules, heads, grid, pooling,
        epsilons), and over names, shapes, types and values of all parameters and saved buffers
        but the adapter's, the head's and trained base parameters.
    """
    model = unwrap(model)
    if hasattr(model, ADAPTATION):
        skip = set(trainable_parameters(model))
    else:
        skip = {plain_name(name) for name in classifier_names(model)}
    digest = hashlib.sha256(canonical_sha256(_structure(model)).encode())
    tensors = {plain_name(name): t for name, t in model.state_dict(keep_vars=True).items()}
    adapters = tuple(f"{path}." for path, _ in _adapters(model))
    for name in sorted(tensors):
        if name in skip or name.startswith(adapters):
            continue
        data = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tuple(data.shape)} {data.dtype}\n".encode())
        digest.update(data.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _structure(model: nn.Module) -> list[Any]:
    """Return, as plain values, what each module of the base is beside its tensors."""
    heads = {id(m) for head in classifiers(model) for m in head.modules()}
    own = {id(m) for _, adapter in _adapters(model) for m in adapter.modules()}
    found: list[Any] = []
    for path, module in model.named_modules():
        if id(module) in heads | own or type(module).__name__ == "OptimizedModule":
            continue
        base = module.base if isinstance(module, AdaptedModule) else module
        facts = {}
        for name in _STRUCTURE:
            value = base.__dict__.get(name)
            if isinstance(value, bool | int | float | str | tuple | list):
                facts[name] = list(value) if isinstance(value, tuple | list) else value
        found.append([plain_name(f"{path}."), type(base).__name__, facts])
    return found
