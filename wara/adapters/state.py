"""What an adapted model holds beside its base: what trains and what is saved."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from wara.adapters.base import AdaptedModule, AdapterLayer, Method
from wara.errors import WaraError
from wara.vit import classifiers, plain_name, unwrap

ADAPTATION = "wara_adaptation"
"""Attribute of an adapted model that holds its `Adaptation`."""

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


def named_adapters(model: nn.Module) -> Iterator[tuple[str, AdapterLayer]]:
    """Yield the adapter layers of a model by plain path."""
    for path, module in model.named_modules():
        if isinstance(module, AdapterLayer):
            yield plain_name(path), module


def _adapter_parameters(model: nn.Module) -> dict[str, tuple[nn.Parameter, bool]]:
    """Return the adapter's parameters by name, each with whether it is a core; ties once."""
    found: dict[str, tuple[nn.Parameter, bool]] = {}
    seen: set[int] = set()
    for path, adapter in named_adapters(model):
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
        the adapter layers (sparse places, random and SVD bases) and of the head.

    Raises:
        WaraError: kind `config` when the model is not adapted.
    """
    state = {name: p.detach() for name, p in trainable_parameters(model).items()}
    return state | _buffers(unwrap(model))


def _buffers(model: nn.Module) -> dict[str, Tensor]:
    """Return persistent buffers of the adapter layers and of the head; what is shared once."""
    heads = {id(head) for head in classifiers(model)}
    found: dict[str, Tensor] = {}
    seen: set[int] = set()
    for path, module in model.named_modules():
        if not (isinstance(module, AdapterLayer) or id(module) in heads):
            continue
        for name, tensor in module.state_dict(keep_vars=True).items():
            if not isinstance(tensor, nn.Parameter) and id(tensor) not in seen:
                seen.add(id(tensor))
                found[plain_name(f"{path}.{name}")] = tensor
    return found


@torch.no_grad()
def load_adapter_state(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Put a state of `adapter_state_dict` into an adapted model.

    Args:
        model: adapted with the same method and options.
        state: exactly the same names and shapes. Types too, unless the whole state is of another
            precision than the model: then it is converted, as `model.to(dtype)` would.

    Raises:
        WaraError: kind `artefact`, naming keys, shapes or types that do not agree, or numbers that
            are not finite or not possible; nothing changes then.
    """
    model = unwrap(model)
    check_state(model, state)
    before = {n: t.clone() for n, t in adapter_state_dict(model).items() if not t.is_meta}
    _materialise(model)
    try:
        _fill(model, state)
    except BaseException:
        # What had no numbers before has none to go back to; `restoring` takes it off.
        if before.keys() == state.keys():
            _fill(model, before)
        else:
            _copy(adapter_state_dict(model), before)
        raise


def _fill(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    _copy(adapter_state_dict(model), state)
    for _, adapter in named_adapters(model):
        adapter.refresh()


def _copy(own: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> None:
    for name, tensor in state.items():
        own[name].copy_(tensor)


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
        "wrong type": _wrong_types([(name, own[name].dtype, state[name].dtype) for name in both]),
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
    check_finite(state)


def _wrong_types(types: list[tuple[str, torch.dtype, torch.dtype]]) -> list[str]:
    """Return the names whose type, given after the model's own, is another, and not by precision.

    A state of another precision has one type throughout wherever the model has one; a single tensor
    of another type is a fault.
    """
    odd = [name for name, own, given in types if own != given]
    floats = [(own, given) for _, own, given in types if own.is_floating_point]
    as_one = len({given for _, given in floats}) == len({own for own, _ in floats}) == 1
    if as_one and all(given.is_floating_point for _, given in floats):
        return [name for name, own, given in types if own != given and not own.is_floating_point]
    return odd


def check_finite(state: Mapping[str, Tensor], kind: str = "artefact") -> None:
    """Refuse a state with numbers that are not finite.

    Raises:
        WaraError: of that kind.
    """
    for name in sorted(state):
        if not bool(state[name].isfinite().all()):
            what = f"the adapter holds numbers that are not finite, in {name}"
            raise WaraError(kind, what, "", "train again, at a lower learning rate")


def like(module: nn.Module, model: nn.Module) -> Tensor:
    """Return a tensor of the precision, and on the device, that an adapter of the module takes."""
    return next(iter([*module.parameters(), *model.parameters()]), torch.empty(0))


def _materialise(model: nn.Module) -> None:
    """Give numbers, any, to what is there in shape alone; what is shared stays shared."""
    memo: dict[int, tuple[Tensor, Tensor]] = {}
    for module in model.modules():
        if isinstance(module, AdaptedModule):
            _give_numbers(module.adapter, like(module.base, model).device, memo)
    real = (p.device for p in model.parameters() if not p.is_meta)
    device = next(real, torch.device("cpu"))
    for head in classifiers(model):
        if any(p.is_meta for p in head.parameters()):
            _give_numbers(head, device, memo)


def _give_numbers(
    part: nn.Module, device: torch.device, memo: dict[int, tuple[Tensor, Tensor]]
) -> None:
    """Put a part on a device: with its numbers where it has any, such as those of a transform."""
    for module in part.modules():
        tables: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
        for table in tables:
            for name, tensor in table.items():
                if tensor is None or not tensor.is_meta and tensor.device == device:
                    continue
                if id(tensor) not in memo:
                    bare = tensor.is_meta
                    fresh = torch.empty_like(tensor, device=device) if bare else tensor.to(device)
                    if isinstance(tensor, nn.Parameter):
                        fresh = nn.Parameter(fresh, requires_grad=tensor.requires_grad)
                    # The old one is kept, for its identity must not be given to another.
                    memo[id(tensor)] = (fresh, tensor)
                table[name] = memo[id(tensor)][0]
