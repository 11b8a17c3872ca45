"""The registry of methods, and how an `adapter:` section becomes one."""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import entry_points
from operator import attrgetter
from typing import Any

from pydantic import ValidationError

from wara.adapters.apla import APLA
from wara.adapters.base import Method, option_faults
from wara.adapters.baselines import (
    AdaLoRA,
    BitFit,
    DoRA,
    FourierFT,
    LNTuning,
    LoHa,
    LoKr,
    VeRA,
)
from wara.adapters.bypass import AdaptFormer, Convpass
from wara.adapters.declared import check_declarations
from wara.adapters.fact import FacT
from wara.adapters.lora import LoRA
from wara.adapters.probes import Full, LinearProbe
from wara.adapters.rank_conv import RankConv
from wara.adapters.sparse import SHiRA, WaveFT
from wara.adapters.ssf import SSF
from wara.adapters.vpt import VPT
from wara.adapters.wara import TinyWaRA, WaRA
from wara.errors import WaraError, WaraErrors, suggest
from wara.schema import Place, fault, fields_of

METHODS: dict[str, type[Method]] = {
    "wara": WaRA,
    "tiny_wara": TinyWaRA,
    "rank_conv": RankConv,
    "lora": LoRA,
    "waveft": WaveFT,
    "shira": SHiRA,
    "dora": DoRA,
    "adalora": AdaLoRA,
    "vera": VeRA,
    "loha": LoHa,
    "lokr": LoKr,
    "fourierft": FourierFT,
    "adaptformer": AdaptFormer,
    "convpass": Convpass,
    "vpt": VPT,
    "fact_tt": FacT,
    "apla": APLA,
    "ssf": SSF,
    "bitfit": BitFit,
    "ln_tuning": LNTuning,
    "linear_probe": LinearProbe,
    "full": Full,
}
ENTRY_POINTS = "wara.methods"
"""Group of entry points under which an installed package may offer methods by a short name."""


def find_method(name: str) -> type[Method]:
    """Return the class of a method, importing the module that is named.

    Args:
        name: a key of `METHODS`, the name of an entry point of the group `wara.methods`, or
            `package.module:Class`.

    Raises:
        WaraError: kind `config` when there is none, what is named is not a method, or it does not
            declare what a run needs.
    """
    if name in METHODS:
        return METHODS[name]
    offered = _offered()
    path = offered.get(name, name)
    module, colon, attribute = path.partition(":")
    if not colon:
        remedy = suggest(name, [*METHODS, *offered])
        raise WaraError("config", f"unknown method '{name}'", "adapter.method", remedy)
    found = _imported(path, module, attribute)
    if not (isinstance(found, type) and issubclass(found, Method)):
        remedy = "name a class derived from wara.adapters.Method; see docs/add_a_method.md"
        raise WaraError("config", f"{path} is not a method", "adapter.method", remedy)
    if found not in METHODS.values():
        check_declarations(found, path, METHODS)
    return found


def known_method(name: str, given: Sequence[type[Method]] = ()) -> type[Method]:
    """Return the class of a method that a file names; a file imports nothing.

    Args:
        name: see `find_method`.
        given: classes that it may be, beside those of wara, of the entry points of installed
            packages, and of modules that are imported already.

    Raises:
        WaraError: kind `artefact` when it is none of these.
    """
    for cls in given:
        if name == class_key(cls):
            return cls
    module = name.partition(":")[0]
    if name in METHODS or name in _offered() or module in sys.modules:
        try:
            return find_method(name)
        except WaraError as error:
            remedy = f"{error.remedy}; or give methods=[the class]"
            raise WaraError("artefact", error.what, error.where, remedy) from error
    remedy = f"import {module} first if you trust it, or give methods=[the class]"
    if ":" not in name:
        remedy = "install the package that offers it, or the version of wara that wrote it"
    raise WaraError("artefact", f"the method {name!r} is not known here", "method", remedy)


def _offered() -> dict[str, str]:
    return {entry.name: entry.value for entry in entry_points(group=ENTRY_POINTS)}


def _imported(path: str, module: str, attribute: str) -> Any:
    """Return what `module:attribute` names; `path` is how the user wrote it."""
    if not all(part.isidentifier() for part in [*module.split("."), *attribute.split(".")]):
        reason = "it is not of the form package.module:Class"
    else:
        try:
            found = importlib.import_module(module)
        except Exception as error:  # whatever the user's own module does on import
            reason = " ".join(str(error).split()) or type(error).__name__
        else:
            try:
                return attrgetter(attribute)(found)
            except AttributeError:
                reason = f"there is no '{attribute}' in {module}"
    what = f"the method {path} does not import: {reason}"
    remedy = "correct it (modules are looked for where you are and on PYTHONPATH)"
    raise WaraError("config", what, "adapter.method", remedy)


def class_key(cls: type[Method]) -> str:
    """Return what names a method in a config: its short name, or `package.module:Class`."""
    if METHODS.get(cls.name) is cls:
        return cls.name
    path = f"{cls.__module__}:{cls.__qualname__}"
    return next((short for short, value in _offered().items() if value == path), path)


def same_option(key: str, one: type[Method], other: type[Method]) -> bool:
    """Tell whether an option means the same to two methods: one class declares it for both.

    A class between may give it another default, or say it in other words. A name alone says
    nothing: `scale` is a factor on wavelet coefficients here and on a bottleneck there.

    Args:
        key: name of the option.
        one: a method.
        other: another.
    """
    first = _declaring(key, one)
    return first is not None and first is _declaring(key, other)


def _declaring(key: str, cls: type[Method]) -> type | None:
    """Return the class that brings an option in, `None` where there is no such option."""
    if key not in fields_of(cls):
        return None
    return next((c for c in reversed(cls.__mro__) if key in inspect.get_annotations(c)), None)


def unknown_option(cls: type[Method], place: Place) -> tuple[str, str]:
    """Return the words for an option that a method does not have."""
    key = place.keys[-1]
    if key == "budget" and not cls.knob:
        what = f"what '{cls.name}' trains is fixed, so no budget can be set"
        return what, "remove it, or choose another method"
    remedy = suggest(key, fields_of(cls)) if fields_of(cls) else "remove it"
    return f"'{cls.name}' has no option '{key}'", remedy


def _made(cls: type[Method], options: Mapping[str, Any]) -> Any:
    # Past the class's own `__call__`, which would word what pydantic says before it can be placed.
    return type.__call__(cls, **options)


def method_from_options(method: str | type[Method], options: Mapping[str, Any]) -> Method:
    """Return the method of that name with the given options.

    Args:
        method: see `find_method`; or the class.
        options: fields of the method's class, as YAML and JSON hold them.

    Returns:
        The method to give to `adapt`.

    Raises:
        WaraErrors: kind `config`, all faults at once.
    """
    cls = find_method(method) if isinstance(method, str) else method
    try:
        return _made(cls, options)
    except ValidationError as error:
        faults = option_faults(error, cls, unknown=lambda place: unknown_option(cls, place))
        raise WaraErrors(list(faults.values())) from error


def read_method(section: Any) -> Any:
    """Return the method that an `adapter:` section names, for a field of a pydantic model.

    Args:
        section: `method` and its options, or a method.

    Raises:
        ValidationError: with the key of each fault; or a fault of the section as a whole.
    """
    if isinstance(section, Method):
        return section
    if not isinstance(section, Mapping):
        raise fault("adapter should be a section with keys of its own", "as in adapter.method")
    named = dict(section)
    name = named.pop("method", "wara")
    if not isinstance(name, str):
        raise fault("the method is not named by a text", suggest(str(name), METHODS), "method")
    try:
        cls = find_method(name)
    except WaraError as error:
        raise fault(error.what, error.remedy, "method") from error
    return _made(cls, named)


def section_of(method: Method) -> dict[str, Any]:
    """Return a method as an `adapter:` section, plain values that JSON and YAML can hold."""
    return {"method": class_key(type(method)), **method.options()}
