"""Adapting a model: freeze, inject, count, merge, take off again."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from wara.adapters.base import (
    AdaptedLinear,
    AdaptedModule,
    AdapterLayer,
    LinearAdapter,
    Method,
)
from wara.adapters.budget import fit
from wara.adapters.declared import check_layers
from wara.adapters.state import (
    ADAPTATION,
    Adaptation,
    Attribute,
    adaptation_of,
    named_parameters,
    trainable_parameters,
)
from wara.errors import WaraError
from wara.vit import classifier_names, classifiers, owner_of, plain_name, unwrap


def adapt(model: nn.Module, method: Method, *, empty: bool = False) -> nn.Module:
    """Prepare a model for fine-tuning, in place.

    Everything is frozen except what the method declares and the classifier
    (`model.get_classifier()`).

    Args:
        model: a timm ViT; for weight-domain methods with path patterns as targets, any module with
            linear layers.
        method: such as `WaRA(rank=4)`.
        empty: give the adapter shapes but no numbers, which `load_adapter_state` then brings;
            nothing is drawn or decomposed.

    Returns:
        The same model.

    Raises:
        WaraError: kind `config` when the model is adapted already, or a target, level or rank does
            not fit the model, which is then left as it was.
    """
    inner = unwrap(model)
    if hasattr(inner, ADAPTATION):
        remedy = "call wara.unload(model) first"
        raise WaraError("config", "the model carries an adapter already", remedy=remedy)
    wanted: str | float | None = getattr(method, "budget", None)
    budget = None
    if wanted is not None:
        method, *numbers = fit(method, inner, wanted)
        budget = (numbers[0], numbers[1])
    heads = classifier_names(inner)
    head = tuple(name for name, _ in inner.named_parameters() if name in heads)
    # Decided before the adapter's own parameters come in, for these are not the base's.
    base = tuple(
        name
        for name, _ in inner.named_parameters()
        if name not in heads and method.trains(name, owner_of(inner, name))
    )
    if method.reversible and not base:
        what = f"{type(inner).__name__} has no parameters of the kind that '{method.name}' trains"
        raise WaraError("config", what, "adapter.method", "choose another method")
    if empty:
        with torch.device("meta"):
            layers = method.layers(inner)
    else:
        layers = method.layers(inner)
    check_layers(inner, method, layers)
    kept = base if method.reversible else ()
    originals = {name: inner.get_parameter(name).detach().clone() for name in kept}
    paths: list[str] = []
    attributes: list[Attribute] = []
    try:
        for path, layer in layers.items():
            _place(inner, path, layer, attributes)
            paths.append(path)
    except BaseException:
        _take_off(inner, paths, attributes)
        raise
    names = (plain_name(path) for path in paths)
    adaptation = Adaptation(
        method,
        tuple(map(plain_name, head)),
        tuple(map(plain_name, base)),
        {plain_name(name): value for name, value in originals.items()},
        budget,
        tuple(names),
        tuple(attributes),
    )
    setattr(inner, ADAPTATION, adaptation)
    inner.requires_grad_(False)
    for parameter in trainable_parameters(inner).values():
        parameter.requires_grad_(True)
    return model


def _place(model: nn.Module, path: str, layer: AdapterLayer, attributes: list[Attribute]) -> None:
    """Put an adapter on a module, in place; note what else had to be changed."""
    module, parent = model.get_submodule(path), owner_of(model, path)
    if isinstance(module, AdaptedModule) or "adapter" in module._modules:
        raise WaraError("config", "the module carries an adapter already", path, "name it once")
    like = next(iter([*module.parameters(), *model.parameters()]), torch.empty(0))
    # Shapes alone cannot move to a device; they get their numbers there.
    layer.to(device=None if _is_bare(layer) else like.device, dtype=like.dtype)
    if isinstance(layer, LinearAdapter):
        if not isinstance(module, nn.Linear):
            what = f"{type(layer).__name__} sits on linear layers, not on {type(module).__name__}"
            raise WaraError("config", what, path, "name a linear layer")
        adapted: AdaptedModule = AdaptedLinear(module, layer)
    else:
        adapted = AdaptedModule(module, layer)
    setattr(parent, path.rpartition(".")[2], adapted)
    # timm's EVA and BEiT read `qkv.weight` past the layer unless told to call it.
    if isinstance(layer, LinearAdapter) and getattr(parent, "qkv_bias_separate", None) is False:
        attributes.append((path.rpartition(".")[0], "qkv_bias_separate", False, True))
        setattr(parent, "qkv_bias_separate", True)  # noqa: B010  (the type is not known)


def _is_bare(module: nn.Module) -> bool:
    tensors = [*module.parameters(), *module.buffers()]
    return any(tensor.is_meta for tensor in tensors)


def _take_off(model: nn.Module, paths: Sequence[str], attributes: Sequence[Attribute]) -> None:
    """Put the modules back that adapters sit on, the innermost first, and former attributes."""
    for path, adapted in _adapted(model, paths):
        _put(model, path, adapted.base)
    for path, name, before, _ in attributes:
        setattr(_submodule(model, path), name, before)


def _adapted(model: nn.Module, paths: Sequence[str]) -> Iterator[tuple[str, AdaptedModule]]:
    for path in sorted(paths, key=lambda path: -path.count(".")):
        adapted = _submodule(model, path)
        assert isinstance(adapted, AdaptedModule)
        yield path, adapted


def _submodule(model: nn.Module, path: str) -> nn.Module:
    """Return the module of a path, also where a module on the way was compiled since."""
    for name in path.split(".") if path else []:
        model = getattr(unwrap(model), name)
    return unwrap(model)


def _put(model: nn.Module, path: str, module: nn.Module) -> None:
    setattr(_submodule(model, path.rpartition(".")[0]), path.rpartition(".")[2], module)


def merge(model: nn.Module) -> nn.Module:
    """Return a plain model with the adapter folded into the weights.

    The given model is left as it is. A model without an adapter is copied.

    Args:
        model: an adapted model.

    Returns:
        A new model of the original class, without adapter layers, frozen as timm builds it (all
        parameters require gradients).

    Raises:
        WaraError: kind `config` when no plain module computes what an adapted one does, as where
            an update depends on the place of a token.
    """
    merged = copy.deepcopy(unwrap(model))
    adaptation = getattr(merged, ADAPTATION, None)
    if adaptation is not None:
        for path, adapted in _adapted(merged, adaptation.paths):
            plain = adapted.adapter.merged(adapted.base)
            if plain is None:
                raise _not_mergeable(path, adapted.adapter)
            _put(merged, path, plain)
        _take_off(merged, (), adaptation.attributes)
    return _forget(merged)


def _not_mergeable(path: str, adapter: AdapterLayer) -> WaraError:
    what = f"what {type(adapter).__name__} does cannot be folded into the module it sits on"
    if isinstance(adapter, LinearAdapter):
        what = "the update depends on where a token lies, so no weight can hold it"
    remedy = "keep the adapter beside the model, or train with core: identity or method: lora"
    return WaraError("config", what, path, remedy)


def unload(model: nn.Module) -> nn.Module:
    """Take the adapter off, in place; the base weights are untouched, the head stays.

    Args:
        model: an adapted model.

    Returns:
        The same model, plain, ready for `adapt` or `load_adapter`.

    Raises:
        WaraError: kind `config` when the model is not adapted, or its base weights were trained.
    """
    inner, adaptation = unwrap(model), adaptation_of(model)
    if not adaptation.removable:
        what = f"{adaptation.method.name} changes the base weights themselves"
        raise WaraError("config", what, remedy="build the model anew")
    own = named_parameters(inner)
    with torch.no_grad():
        for name, value in adaptation.originals.items():
            own[name].copy_(value)
    _take_off(inner, adaptation.paths, adaptation.attributes)
    _forget(inner)
    return model


def _forget(model: nn.Module) -> nn.Module:
    """Drop the note of adaptation and unfreeze, in place."""
    if hasattr(model, ADAPTATION):
        delattr(model, ADAPTATION)
    return model.requires_grad_(True)


def suspend(model: nn.Module) -> Callable[[], None]:
    """Take the adapter off a model, if it carries one; return what puts all back as it was.

    Adapter layers, head and trained base parameters come back as the very same tensors.

    Raises:
        WaraError: kind `config` when the base weights themselves were trained.
    """
    inner: Any = unwrap(model)
    adaptation = getattr(inner, ADAPTATION, None)
    adapted: list[tuple[str, AdaptedModule]] = []
    values: dict[str, Tensor] = {}
    frozen = {id(p): p for p in inner.parameters() if not p.requires_grad}
    if adaptation is not None:
        adapted = list(_adapted(inner, adaptation.paths))
        own = named_parameters(inner)
        values = {name: own[name].detach().clone() for name in adaptation.originals}
        unload(inner)
    named = dict(inner.named_modules())
    own_heads = {id(head) for head in classifiers(inner)}
    heads = {name: module for name, module in named.items() if id(module) in own_heads}
    count = getattr(inner, "num_classes", None)

    def undo() -> None:
        now = getattr(inner, ADAPTATION, None)
        if now is not None:
            _take_off(inner, now.paths, now.attributes)
            _forget(inner)
        for name, module in heads.items():
            _put(inner, name, module)
        if count is not None:
            inner.num_classes = count
        for path, module in reversed(adapted):
            _put(inner, path, module)
        if adaptation is not None:
            for path, name, _, after in adaptation.attributes:
                setattr(_submodule(inner, path), name, after)
            setattr(inner, ADAPTATION, adaptation)
        own = named_parameters(inner)
        with torch.no_grad():
            for name, value in values.items():
                own[name].copy_(value)
        for parameter in inner.parameters():
            parameter.requires_grad_(id(parameter) not in frozen)

    return undo
