"""What a method of the user's own declares, held against what the rest of the package relies on."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from wara.adapters.base import AdapterLayer, Method
from wara.errors import WaraError, suggest
from wara.schema import fields_of
from wara.vit import plain_name

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_PAGE = "see docs/add_a_method.md"
_GROUPS = ("adapter", "core", "head")


def check_declarations(cls: type[Method], path: str, taken: Mapping[str, type[Method]]) -> None:
    """Refuse a class of which no run could be made.

    Args:
        cls: of the method.
        path: `package.module:Class` or the name that led to it.
        taken: methods of the package by name; a record must tell another one from them.

    Raises:
        WaraError: kind `config`, for the first fault.
    """
    for what, remedy in (*_of_name(cls, taken), *_of_rates(cls), *_of_options(cls)):
        raise WaraError("config", f"{path}: {what}", "adapter.method", remedy)


def check_layers(model: nn.Module, method: Method, layers: Any) -> None:
    """Refuse what `layers` of a method returned when it cannot be put on the model.

    Raises:
        WaraError: kind `config`.
    """
    where = f"layers() of '{method.name}'"
    if not isinstance(layers, Mapping):
        remedy = "return a mapping from paths of modules to layers"
        raise WaraError("config", "it returns no mapping", where, remedy)
    known = {plain_name(name) for name, _ in model.named_modules(remove_duplicate=False)}
    for path, layer in layers.items():
        if path not in known or path == "":
            near = suggest(str(path), known)
            remedy = near if near.startswith("did") else "name one of model.named_modules()"
            raise WaraError("config", f"the model has no module '{path}'", where, remedy)
        if not isinstance(layer, AdapterLayer):
            what = f"what it returns for '{path}' is no adapter layer"
            remedy = "derive the layer from wara.adapters.AdapterLayer"
            raise WaraError("config", what, where, remedy)


def _of_name(cls: type[Method], taken: Mapping[str, type[Method]]) -> Iterator[tuple[str, str]]:
    name: Any = getattr(cls, "name", None)
    example = 'write name: ClassVar[str] = "scale_shift"'
    if not isinstance(name, str):
        yield "the class has no name", example
    elif not _NAME.fullmatch(name):
        # It becomes part of the name of the run folder, and a value in tables.
        yield f"the name '{name}' is not made of letters, digits, '.', '-' and '_'", example
    elif name in taken:
        yield f"the name '{name}' is that of a method of wara", "give the class another name"
    if not isinstance(getattr(cls, "summary", None), str):
        yield "the class has no summary", "say in a ClassVar[str] what trains"


def _of_rates(cls: type[Method]) -> Iterator[tuple[str, str]]:
    rates: Any = cls.rates
    if not isinstance(rates, Mapping):
        yield "rates is no mapping from what trains to its learning rate", _PAGE
        return
    for group, rate in rates.items():
        if group not in _GROUPS:
            near = suggest(str(group), _GROUPS)
            yield f"rates names '{group}', which is nothing that trains", near
        if isinstance(rate, bool) or not isinstance(rate, int | float) or not 0 <= rate < 1e9:
            yield f"the rate of '{group}' is not a number of at least 0", f"set rates['{group}']"
    if "head" not in rates:
        yield "rates lacks the head, which every method trains", 'add "head": 2e-3 to rates'


def _of_options(cls: type[Method]) -> Iterator[tuple[str, str]]:
    if "__pydantic_fields__" not in vars(cls):
        yield "the class is not decorated, so it has no options", "put @options above it"
        return
    for key in cls.knob:
        if key not in fields_of(cls):
            yield f"knob names '{key}', which is none of its options", _PAGE
