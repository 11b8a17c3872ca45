"""The registry of methods, and how options become one."""

from __future__ import annotations

import dataclasses
import typing
from typing import Any

from pydantic import TypeAdapter, ValidationError

from wara.adapters.base import Method
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
from wara.adapters.lora import LoRA
from wara.adapters.probes import Full, LinearProbe
from wara.adapters.sparse import SHiRA, WaveFT
from wara.adapters.wara import TinyWaRA, WaRA
from wara.errors import WaraError, WaraErrors, suggest

METHODS: dict[str, type[Method]] = {
    "wara": WaRA,
    "tiny_wara": TinyWaRA,
    "lora": LoRA,
    "waveft": WaveFT,
    "shira": SHiRA,
    "dora": DoRA,
    "adalora": AdaLoRA,
    "vera": VeRA,
    "loha": LoHa,
    "lokr": LoKr,
    "fourierft": FourierFT,
    "bitfit": BitFit,
    "ln_tuning": LNTuning,
    "linear_probe": LinearProbe,
    "full": Full,
}


def option_faults(adapter: dict[str, Any]) -> list[WaraError]:
    """Return everything that is wrong with an `adapter:` section.

    Args:
        adapter: `method` and its options.

    Returns:
        One error per fault, of kind `config`; empty when `method_from_options` would succeed.
    """
    name = adapter.get("method")
    if name not in METHODS:
        remedy = suggest(str(name), METHODS)
        return [WaraError("config", f"unknown method '{name}'", "adapter.method", remedy)]
    cls = METHODS[name]
    fields = {field.name for field in dataclasses.fields(cls)}
    hints = typing.get_type_hints(cls)
    options = {key: value for key, value in adapter.items() if key != "method"}
    faults = []
    for key, value in options.items():
        where = f"adapter.{key}"
        if key not in fields:
            remedy = suggest(key, fields) if fields else "remove it"
            faults.append(WaraError("config", f"'{name}' has no option '{key}'", where, remedy))
            continue
        try:
            # Strict, so that `rank: "4"` and `rank: true` are faults; lists may stand for tuples.
            strict = None if isinstance(value, list) else True
            TypeAdapter(hints[key]).validate_python(value, strict=strict)
        except ValidationError:
            kind = _readable(hints[key])
            faults.append(WaraError("config", f"{value!r} is not {kind}", where, f"set {kind}"))
    if not faults:
        try:
            cls(**options)
        except WaraErrors as errors:
            faults.extend(errors.errors)
        except WaraError as error:
            faults.append(error)
    return faults


def _readable(hint: Any) -> str:
    """Return a type hint in words a user knows."""
    words = {
        "int": "a whole number",
        "float": "a number",
        "str": "a name",
        "bool": "true or false",
        "NoneType": "null",
    }
    parts = typing.get_args(hint) if typing.get_origin(hint) is not tuple else ()
    if typing.get_origin(hint) in (tuple, list) or "Sequence" in str(typing.get_origin(hint)):
        return "a list"
    names = [getattr(part, "__name__", str(part)) for part in parts] or [hint.__name__]
    return " or ".join(dict.fromkeys(words.get(name, "a list") for name in names))


def method_from_options(method: str, options: dict[str, Any]) -> Method:
    """Return the method of that name with the given options.

    Args:
        method: a key of `METHODS`.
        options: fields of the method's class.

    Returns:
        The options object to give to `adapt`.

    Raises:
        WaraErrors: kind `config`, all faults at once.
    """
    faults = option_faults({"method": method, **options})
    if faults:
        raise WaraErrors(faults)
    return METHODS[method](**options)


def method_options(method: Method) -> dict[str, Any]:
    """Return the options of a method as plain values that JSON and YAML can hold."""
    plain = dataclasses.asdict(method)
    return {key: list(v) if isinstance(v, tuple) else v for key, v in plain.items()}
