"""Adapting a model: freeze, inject, count, merge, take off again."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
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
    like,
    named_adapters,
    named_parameters,
    trainable_parameters,
)
from wara.errors import WaraError
from wara.vit import classifier_names, classifiers, owner_of, plain_name, unwrap


def adapt(model: nn.Module, method: Method, *, empty: bool = False) -> nn.Module:
    """Prepare a model for fine-tuning, in place.

    Everything is frozen except what the method declares and the classifier
    (`model.get_classifier()`). Running statistics of the base (batch normalisation) stay as they
    are whatever trains, and are what it normalises by, in training too.

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
    attributes: list[Attribute] = []
    with restoring(inner):
        for path, layer in layers.items():
            _place(inner, path, layer, attributes)
        for module in _with_statistics(inner):
            module.register_forward_pre_hook(_hold_still)
    adaptation = Adaptation(
        method,
        tuple(map(plain_name, head)),
        tuple(map(plain_name, base)),
        {plain_name(name): value for name, value in originals.items()},
        budget,
        tuple(map(plain_name, layers)),
        tuple(attributes),
    )
    setattr(inner, ADAPTATION, adaptation)
    inner.requires_grad_(False)
    for parameter in trainable_parameters(inner).values():
        parameter.requires_grad_(True)
    return model


def _with_statistics(model: nn.Module) -> list[nn.Module]:
    """Return the modules of the base that follow the mean and variance of their inputs."""
    heads = {id(m) for head in classifiers(model) for m in head.modules()}
    names = ("running_mean", "running_var")
    return [
        module
        for module in model.modules()
        if id(module) not in heads and any(module._buffers.get(name) is not None for name in names)
    ]


def _hold_still(module: nn.Module, inputs: Any) -> None:
    """Before each forward: normalise by the statistics of pretraining, and leave them alone.

    They belong to the base, which an adapter must find again, and a small batch knows no better.
    """
    if module.training:
        module.training = False


def _place(model: nn.Module, path: str, layer: AdapterLayer, attributes: list[Attribute]) -> None:
    """Put an adapter on a module, in place; note what else had to be changed."""
    module, parent = _submodule(model, path), _submodule(model, path.rpartition(".")[0])
    if isinstance(module, AdaptedModule) or "adapter" in module._modules:
        raise WaraError("config", "the module carries an adapter already", path, "name it once")
    pattern = like(module, model)
    # Shapes alone cannot move to a device; they get their numbers there.
    layer.to(device=None if _is_bare(layer) else pattern.device, dtype=pattern.dtype)
    if isinstance(layer, LinearAdapter):
        if not isinstance(module, nn.Linear):
            what = f"{type(layer).__name__} sits on linear layers, not on {type(module).__name__}"
            raise WaraError("config", what, path, "name a linear layer")
        adapted: AdaptedModule = AdaptedLinear(module, layer)
    else:
        adapted = AdaptedModule(module, layer)
    for below, name, value in layer.settings(module):
        holder = module.get_submodule(below)
        attributes.append((f"{path}.{below}", name, getattr(holder, name), value))
        setattr(holder, name, value)
    _put(model, path, adapted)
    # timm's EVA and BEiT read `qkv.weight` past the layer unless told to call it.
    if isinstance(layer, LinearAdapter) and getattr(parent, "qkv_bias_separate", None) is False:
        attributes.append((path.rpartition(".")[0], "qkv_bias_separate", False, True))
        setattr(parent, "qkv_bias_separate", True)  # noqa: B010  (the type is not known)


def _is_bare(module: nn.Module) -> bool:
    tensors = [*module.parameters(), *module.buffers()]
    return any(tensor.is_meta for tensor in tensors)


def has_unsaved(model: nn.Module) -> bool:
    """Whether adapter layers, adapted with `empty`, lack numbers that no adapter file brings.

    These are buffers that are not persistent, and tensors that are mere attributes.
    """
    for _, adapter in named_adapters(model):
        for module in adapter.modules():
            names = module._non_persistent_buffers_set
            held = [*vars(module).values(), *(module._buffers[name] for name in names)]
            if any(isinstance(each, Tensor) and each.is_meta for each in held):
                return True
    return False


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
        _reset(merged, adaptation)
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
    take_off(inner)
    return model


def take_off(model: nn.Module) -> nn.Module:
    """Take the adapter layers off an adapted model, in place, whatever else was trained."""
    inner, adaptation = unwrap(model), adaptation_of(model)
    for path, adapted in _adapted(inner, adaptation.paths):
        _put(inner, path, adapted.base)
    _reset(inner, adaptation)
    _forget(inner)
    return model


def _reset(model: nn.Module, adaptation: Adaptation) -> None:
    """Give attributes that were changed their former values."""
    for path, name, before, _ in adaptation.attributes:
        setattr(_submodule(model, path), name, before)


def _forget(model: nn.Module) -> nn.Module:
    """Drop the note of adaptation and unfreeze, in place."""
    if hasattr(model, ADAPTATION):
        delattr(model, ADAPTATION)
    for module in _with_statistics(model):
        hooks = module._forward_pre_hooks
        for key in [key for key, hook in hooks.items() if hook is _hold_still]:
            del hooks[key]
        module.training = model.training
    return model.requires_grad_(True)


@contextmanager
def restoring(model: nn.Module) -> Iterator[None]:
    """Put a model back as it was, the very same modules and tensors, when the block fails.

    Covered are its structure, the attributes of its modules, which parameters train, and the values
    of what trains and of the head.
    """
    inner = unwrap(model)
    shapes = [(m, dict(vars(m)), _tables(m)) for m in _modules(inner)]
    flags = {parameter: parameter.requires_grad for parameter in inner.parameters()}
    adaptation, own = getattr(inner, ADAPTATION, None), named_parameters(inner)
    trained = adaptation.originals if adaptation is not None else ()
    heads = [t for m in classifiers(inner) for t in (*m.parameters(), *m.buffers())]
    values = [(t, t.detach().clone()) for t in (*heads, *(own[name] for name in trained))]
    try:
        yield
    except BaseException:
        for module, attributes, tables in shapes:
            vars(module).clear()
            vars(module).update(attributes)
            for table, content in tables:
                table.clear()
                table.update(content)
        for parameter, trains in flags.items():
            parameter.requires_grad_(trains)
        with torch.no_grad():
            for tensor, value in values:
                tensor.copy_(value)
        raise


@contextmanager
def replacing_adapter(model: nn.Module) -> Iterator[nn.Module]:
    """Yield the model inside wrappers, plain; what goes wrong then leaves it as it was.

    Raises:
        WaraError: kind `config` when the base weights themselves were trained.
    """
    inner = unwrap(model)
    with restoring(inner):
        yield unload(inner) if hasattr(inner, ADAPTATION) else inner


def _modules(model: nn.Module) -> Iterator[nn.Module]:
    for module in model.modules():
        yield module
        if isinstance(module, AdaptedModule):
            yield module.base


def _tables(module: nn.Module) -> list[tuple[Any, Any]]:
    """Return the tables of a module (children, parameters, hooks, …), each with a copy."""
    held = vars(module).values()
    return [(table, table.copy()) for table in held if isinstance(table, dict | set)]
