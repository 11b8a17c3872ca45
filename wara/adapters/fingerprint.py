"""The fingerprint of a base: what it computes with, and how."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor, nn

from wara.adapters.base import AdaptedModule, AdapterLayer
from wara.adapters.state import ADAPTATION, trainable_parameters
from wara.storage import canonical_sha256
from wara.vit import classifier_names, classifiers, plain_name, unwrap

FINGERPRINT = 2
"""Version of the fingerprint: 1 knew some settings by name and no buffer that is not saved."""

# What a forward pass in evaluation does not depend on, or a machine decides for itself; and the
# outputs of the head, which is not part of the base.
_ELSEWHERE = frozenset(
    "training num_classes p drop_prob drop_rate drop_path_rate inplace scale_by_keep "
    "fused_attn grad_checkpointing".split()
)
# What stands where nothing is dropped, for a class that is there only where something is.
_IN_EVALUATION = {"DropPath": "Identity"}


def base_hash(model: nn.Module, dtype: torch.dtype | None = None) -> str:
    """Return a fingerprint of the frozen base.

    Args:
        model: adapted or not, compiled or not.
        dtype: take it as `model.to(dtype)` would have it; none takes it as it is.

    Returns:
        SHA-256, in hex, over the structure (classes of the modules, and every plain number, text or
        list that they hold: heads, grid, pooling, epsilons, temperatures), over names, shapes,
        types and values of all parameters and saved buffers, and over the other buffers, which
        follow from options. The adapter's, the head's and trained base parameters are left out.
    """
    model = unwrap(model)
    if hasattr(model, ADAPTATION):
        skip = set(trainable_parameters(model))
    else:
        skip = {plain_name(name) for name in classifier_names(model)}
    digest = hashlib.sha256(canonical_sha256(_structure(model)).encode())
    for path, module in _modules(model):
        held = module if dtype is None else _converted(module, dtype)
        for name, tensor in _tensors(held):
            if f"{path}{name}" in skip:
                continue
            digest.update(f"{path}{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
            saved = name not in held._non_persistent_buffers_set
            digest.update(_bytes(tensor) if saved else _derived(tensor))
    return digest.hexdigest()


def _converted(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Return a stand-in whose own tensors are as `module.to(dtype)` has them; it may decide."""
    twin: nn.Module = object.__new__(type(module))
    held = {**vars(module), **module._modules, "_modules": {}}  # children can be asked, not changed
    for table in ("_parameters", "_buffers"):
        tensors = vars(module)[table].items()
        held[table] = {name: None if t is None else _twin_of(t) for name, t in tensors}
    held["_non_persistent_buffers_set"] = set(module._non_persistent_buffers_set)
    vars(twin).update(held)
    return twin.to(dtype)


def _twin_of(tensor: Tensor) -> Tensor:
    fresh = tensor.detach().clone()
    return nn.Parameter(fresh, requires_grad=False) if isinstance(tensor, nn.Parameter) else fresh


def _modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the modules of the base with their paths, which end in a dot, as before adapting."""
    outside = {id(m) for head in classifiers(model) for m in head.modules()}
    for path, module in model.named_modules():
        if isinstance(module, AdapterLayer):
            outside |= {id(m) for m in module.modules()}
        wrapper = type(module).__name__ == "OptimizedModule"
        if id(module) not in outside and not wrapper:
            base = module.base if isinstance(module, AdaptedModule) else module
            yield plain_name(f"{path}." if path else ""), base


def _tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for table in (module._parameters, module._buffers):
        for name in sorted(table):
            tensor = table[name]
            if tensor is not None:
                yield name, tensor.detach()


def _bytes(tensor: Tensor) -> Any:
    return tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def _derived(tensor: Tensor) -> Any:
    """Return what stands for a buffer that is computed anew wherever a model is built.

    The last bit of a sine depends on the processor and on the number of threads, so floats enter by
    sums of four digits: of sizes, and of positive entries, weighted by their place.
    """
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    if not tensor.is_floating_point():
        return _bytes(tensor)
    values = tensor.cpu().double().nan_to_num(posinf=1e30, neginf=-1e30).reshape(-1)
    places = 1 + torch.arange(values.numel(), dtype=torch.float64) % 97 / 97
    sums = (values.abs().sum(), values.abs() @ places, values.clamp(min=0) @ places)
    return " ".join(f"{float(each):.3e}" for each in sums).encode()


def _structure(model: nn.Module) -> list[Any]:
    """Return, as plain values, what each module of the base is beside its tensors."""
    adaptation = getattr(model, ADAPTATION, None)
    before: dict[str, dict[str, Any]] = {}
    for path, name, value, _ in adaptation.attributes if adaptation is not None else ():
        before.setdefault(f"{plain_name(path)}." if path else "", {})[name] = value
    return [
        [path, _IN_EVALUATION.get(name, name), _facts({**vars(module), **before.get(path, {})})]
        for path, module in _modules(model)
        for name in [type(module).__name__]
    ]


def _facts(attributes: Mapping[str, Any]) -> dict[str, str]:
    found = {}
    for name, value in attributes.items():
        text = None if name.startswith("_") or name in _ELSEWHERE else _written(value)
        if text is not None:
            found[name] = text
    return found


def _written(value: Any) -> str | None:
    """Return a plain value as text that is the same on every machine, `None` for other kinds."""
    if value is None or isinstance(value, bool):
        return str(value)
    if isinstance(value, str):
        return repr(str.__str__(value))
    if isinstance(value, Integral):
        return str(int(value))
    if isinstance(value, Real):
        return repr(float(value))
    if isinstance(value, tuple | list):
        parts = [_written(part) for part in value]
        return f"[{', '.join(map(str, parts))}]" if None not in parts else None
    return None
