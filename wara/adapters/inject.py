"""Adapting a model: freeze, inject, count, merge, take off again."""

from __future__ import annotations

import copy
import hashlib
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from wara.adapters.base import (
    AdapterLayer,
    Method,
    TokenDomainLayer,
    WeightDomainLayer,
    plain_linear,
)
from wara.adapters.budget import fit
from wara.adapters.targets import adapted_layers, remove
from wara.errors import WaraError

RECORD = "wara_record"
"""Attribute of an adapted model that holds its `Record`."""


@dataclass(frozen=True)
class Record:
    """What `adapt` did to a model.

    Args:
        method: the options; where a budget was set, those fitted to it.
        head: names of the classifier's parameters.
        base: names of the base parameters that train (full fine-tuning and its kin).
        originals: values of these before training, for methods that change few.
        budget: where one was set: wanted and fitted number of adapter parameters.
    """

    method: Method
    head: tuple[str, ...]
    base: tuple[str, ...]
    originals: dict[str, Tensor] = field(default_factory=dict)
    budget: tuple[int, int] | None = None

    @property
    def removable(self) -> bool:
        """Whether the model as it was before can be had back."""
        return not self.base or bool(self.originals)


def adapt(model: nn.Module, method: Method) -> nn.Module:
    """Prepare a model for fine-tuning, in place.

    Everything is frozen except what the method declares and the classifier
    (`model.get_classifier()`).

    Args:
        model: a timm ViT; for weight-domain methods with path patterns as targets, any module with
            linear layers.
        method: options, such as `WaRA(rank=4)`.

    Returns:
        The same model.

    Raises:
        WaraError: kind `config` when the model is adapted already, or a target, level or rank does
            not fit the model.
    """
    if hasattr(model, RECORD):
        remedy = "call wara.unload(model) first"
        raise WaraError("config", "the model carries an adapter already", remedy=remedy)
    wanted: str | float | None = getattr(method, "budget", None)
    budget = None
    if wanted is not None:
        method, *numbers = fit(method, model, wanted)
        budget = (numbers[0], numbers[1])
    head_ids = {id(p) for module in classifiers(model) for p in module.parameters()}
    head = tuple(name for name, p in model.named_parameters() if id(p) in head_ids)
    # Decided before the adapter's own parameters come in, for these are not the base's.
    base = tuple(
        name
        for name, _ in model.named_parameters()
        if name not in head and method.trains(name, owner_of(model, name))
    )
    if method.reversible and not base:
        what = f"{type(model).__name__} has no parameters of the kind that '{method.name}' trains"
        raise WaraError("config", what, "adapter.method", "choose another method")
    method.prepare(model)
    kept = base if method.reversible else ()
    originals = {name: model.get_parameter(name).detach().clone() for name in kept}
    setattr(model, RECORD, Record(method, head, base, originals, budget))
    model.requires_grad_(False)
    for parameter in trainable_parameters(model).values():
        parameter.requires_grad_(True)
    return model


def owner_of(model: nn.Module, name: str) -> nn.Module:
    """Return the module that holds the parameter of that dotted name."""
    return model.get_submodule(name.rpartition(".")[0])


def classifiers(model: nn.Module) -> list[nn.Module]:
    """Return the heads of a timm model; distilled ones have two, other modules none."""
    getter = getattr(model, "get_classifier", None)
    if getter is None:
        return []
    found = getter()
    return [m for m in (found if isinstance(found, tuple | list) else [found]) if m is not None]


def record_of(model: nn.Module) -> Record:
    """Return what `adapt` did to the model.

    Raises:
        WaraError: kind `config` when the model is not adapted.
    """
    record = getattr(model, RECORD, None)
    if not isinstance(record, Record):
        remedy = "call wara.adapt(model, method) or wara.load_adapter(model, folder) first"
        raise WaraError("config", "the model carries no adapter", remedy=remedy)
    return record


def _adapter_parameters(model: nn.Module) -> dict[str, tuple[nn.Parameter, bool]]:
    """Return the adapter's parameters by name, each with whether it is a core; ties once."""
    found: dict[str, tuple[nn.Parameter, bool]] = {}
    seen: set[int] = set()
    for path, module in model.named_modules():
        if isinstance(module, AdapterLayer):
            for name, parameter in module.named_parameters():
                if id(parameter) not in seen:
                    seen.add(id(parameter))
                    found[f"{path}.{name}"] = (parameter, name in module.core_names)
    return found


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that train, by name: adapter, then base, then head.

    Args:
        model: an adapted model.

    Returns:
        Names as in `model.named_parameters()`; a parameter that several layers share appears once,
        under its first name.

    Raises:
        WaraError: kind `config` when the model is not adapted.
    """
    record = record_of(model)
    found = {name: parameter for name, (parameter, _) in _adapter_parameters(model).items()}
    for name in (*record.base, *record.head):
        found[name] = model.get_parameter(name)
    return found


def parameter_groups(model: nn.Module) -> dict[str, list[nn.Parameter]]:
    """Return the parameters that train, grouped by the learning rate they take.

    Args:
        model: an adapted model.

    Returns:
        Lists under `adapter` (base parameters that train included), `core` and `head`.

    Raises:
        WaraError: kind `config` when the model is not adapted.
    """
    record = record_of(model)
    groups: dict[str, list[nn.Parameter]] = {"adapter": [], "core": [], "head": []}
    for parameter, is_core in _adapter_parameters(model).values():
        groups["core" if is_core else "adapter"].append(parameter)
    groups["adapter"] += [model.get_parameter(name) for name in record.base]
    groups["head"] += [model.get_parameter(name) for name in record.head]
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


def merge(model: nn.Module) -> nn.Module:
    """Return a plain model with the adapter folded into the weights.

    The given model is left as it is. A model without an adapter is copied.

    Args:
        model: an adapted model.

    Returns:
        A new model of the original class, without adapter layers, frozen as timm builds it (all
        parameters require gradients).

    Raises:
        WaraError: kind `config` when a layer's update depends on the place of a token, so that no
            weight can stand for it.
    """
    merged = copy.deepcopy(model)
    for name, layer in adapted_layers(merged).items():
        delta = merged_delta(layer.adapter, name)
        weight = nn.Parameter(layer.weight.detach() + delta.to(layer.weight.dtype))
        remove(merged, name, plain_linear(weight, layer.bias))
    return _forget(merged)


@torch.no_grad()
def merged_delta(adapter: AdapterLayer, name: str) -> Tensor:
    """Return the change of weight `[o, d]` that an adapter layer amounts to.

    Raises:
        WaraError: kind `config` when there is none; see `merge`.
    """
    if isinstance(adapter, WeightDomainLayer):
        return adapter.delta_weight()
    delta = adapter.merged_weight() if isinstance(adapter, TokenDomainLayer) else None
    if delta is None:
        what = "the update depends on where a token lies, so no weight can hold it"
        remedy = "keep the adapter beside the model, or train with core: identity or method: lora"
        raise WaraError("config", what, name, remedy)
    return delta


def unload(model: nn.Module) -> nn.Module:
    """Take the adapter off, in place; the base weights are untouched, the head stays.

    Args:
        model: an adapted model.

    Returns:
        The same model, plain, ready for `adapt` or `load_adapter`.

    Raises:
        WaraError: kind `config` when the model is not adapted, or its base weights were trained.
    """
    record = record_of(model)
    if not record.removable:
        what = f"{record.method.name} changes the base weights themselves"
        raise WaraError("config", what, remedy="build the model anew")
    with torch.no_grad():
        for name, value in record.originals.items():
            model.get_parameter(name).copy_(value)
    for name, layer in adapted_layers(model).items():
        remove(model, name, layer.plain())
    return _forget(model)


def _forget(model: nn.Module) -> nn.Module:
    """Drop the record of adaptation and unfreeze, in place."""
    if hasattr(model, RECORD):
        delattr(model, RECORD)
    return model.requires_grad_(True)


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
    state.update({name: buffer for name, buffer in _adapter_buffers(model).items()})
    return state


def _adapter_buffers(model: nn.Module) -> dict[str, Tensor]:
    """Return the persistent buffers of the adapter layers; those that layers share once."""
    found: dict[str, Tensor] = {}
    seen: set[int] = set()
    for path, module in model.named_modules():
        if isinstance(module, AdapterLayer):
            for name, tensor in module.state_dict(keep_vars=True).items():
                if not isinstance(tensor, nn.Parameter) and id(tensor) not in seen:
                    seen.add(id(tensor))
                    found[f"{path}.{name}"] = tensor
    return found


@torch.no_grad()
def load_adapter_state(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Put a state of `adapter_state_dict` into an adapted model.

    Args:
        model: adapted with the same method and options.
        state: exactly the same names and shapes.

    Raises:
        WaraError: kind `artefact`, naming keys or shapes that do not agree; nothing changes then.
    """
    own = adapter_state_dict(model)
    missing, extra = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    odd = [name for name in own.keys() & state.keys() if own[name].shape != state[name].shape]
    faults = [
        f"{word} {', '.join(names[:3])}{' …' if len(names) > 3 else ''}"
        for word, names in (("missing", missing), ("unknown", extra), ("wrong shape", odd))
        if names
    ]
    if faults:
        remedy = "use the backbone and options that the adapter was trained with"
        what = "the adapter does not fit the model"
        raise WaraError("artefact", what, "; ".join(faults), remedy)
    for name, tensor in own.items():
        tensor.copy_(state[name])
    for module in model.modules():
        if isinstance(module, AdapterLayer):
            module.refresh()


def base_hash(model: nn.Module) -> str:
    """Return a fingerprint of the frozen base weights.

    Args:
        model: adapted or not.

    Returns:
        SHA-256, in hex, over names, shapes, dtypes and values of all parameters but the adapter's,
        the head's and trained base parameters.
    """
    record = getattr(model, RECORD, None)
    skip = set(trainable_parameters(model)) if record else set()
    if not record:
        heads = {id(p) for module in classifiers(model) for p in module.parameters()}
        skip = {name for name, p in model.named_parameters() if id(p) in heads}
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        if name not in skip:
            data = parameter.detach().cpu().contiguous()
            digest.update(f"{name} {tuple(data.shape)} {data.dtype}\n".encode())
            digest.update(data.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
