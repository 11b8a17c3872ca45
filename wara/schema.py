"""Strict models of YAML files, and what is wrong with a file in plain words, with its line.

Configs, data-set cards and the options of a method are all read this way, so a slip of the keyboard
gets the same sentence wherever it stands: the key, the place, the nearest valid word.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    ValidationError,
    ValidationInfo,
)
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails, PydanticCustomError
from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.nodes import MappingNode, Node, SequenceNode

from wara.errors import WaraError, suggest
from wara.storage import read_regular

KeyPath = tuple[str, ...]
Origin = Mapping[KeyPath, str]
"""Where each key was set: a file and its line, or a `--set`."""

# Strict: `epochs: "12"` and `compile: 1` are typing slips, and a slip that is silently converted
# is a run that is not the one in the file.
STRICT = ConfigDict(
    extra="forbid", strict=True, frozen=True, allow_inf_nan=False, protected_namespaces=()
)


from_list = BeforeValidator(lambda value: tuple(value) if isinstance(value, list) else value)
"""Of a field that is a tuple: lists stand for it in YAML and JSON."""


def _not_zero(value: float, info: ValidationInfo) -> float:
    if value == 0:
        raise fault(f"{info.field_name} is 0", "set another number")
    return value


NotZero = AfterValidator(_not_zero)
"""Of a number that must not be zero."""


class Section(BaseModel):
    """A mapping of a YAML file whose keys and types are known; nothing else is taken."""

    model_config = STRICT


def fault(what: str, remedy: str = "", key: str = "") -> PydanticCustomError:
    """Return what a validator raises: a sentence of its own, with a remedy.

    Args:
        what: what is wrong.
        remedy: what to do about it.
        key: the key below the validated one that it is about.
    """
    return PydanticCustomError("fault", "{what}", {"what": what, "remedy": remedy, "key": key})


# -- reading -------------------------------------------------------------------------------------


def parse_yaml(text: str) -> Any:
    """Read YAML 1.2: `no` is a word, `1e-3` a number, a key twice an error.

    Raises:
        WaraError: kind "config"; `where` is the line, as ` line 3`, or empty.
    """
    try:
        return YAML(typ="safe", pure=True).load(text)
    except (YAMLError, ValueError, RecursionError) as error:
        what, line = _reason(error)
        raise WaraError("config", f"not YAML: {what}", line) from error


def _reason(error: Exception) -> tuple[str, str]:
    if isinstance(error, RecursionError):
        return "nested too deep", ""
    if isinstance(error, MarkedYAMLError):
        what = re.sub(r"\s+", " ", error.problem or error.context or "not YAML").strip()
        return what, f" line {error.problem_mark.line + 1}" if error.problem_mark else ""
    if "int_max_str_digits" in str(error):  # Python's advice is to lift its limit
        return "a number of thousands of digits", ""
    return re.sub(r"\s+", " ", str(error)).strip() or "not YAML", ""


def read_yaml(path: Path, noun: str, remedy: str) -> tuple[dict[str, Any], dict[KeyPath, str]]:
    """Return the mapping in a file, and for each key path the place where it stands.

    Args:
        path: the file.
        noun: what it should be, such as `config`.
        remedy: what to do when it is no mapping.

    Raises:
        WaraError: kind "config" when it cannot be read, is no YAML or no mapping.
    """
    try:
        text = read_regular(path).decode()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise WaraError("config", f"cannot read the {noun}: {reason}", str(path)) from error
    try:
        tree = parse_yaml(text)
        node = YAML(typ="safe", pure=True).compose(text)
    except WaraError as error:
        raise WaraError("config", error.what, f"{path}{error.where}", "correct it") from error
    if tree is None:
        tree = {}
    if not isinstance(tree, dict):
        what = f"a {noun} is a list of `key: value` lines"
        raise WaraError("config", what, str(path), remedy)
    return string_keys(tree), {keys: f"{path} line {line}" for keys, line in _lines(node)}


def _lines(node: Node | None, keys: KeyPath = ()) -> Iterator[tuple[KeyPath, int]]:
    pairs: list[tuple[str, Node, Node]] = []
    if isinstance(node, MappingNode):
        pairs = [(str(key.value), key, value) for key, value in node.value]
    elif isinstance(node, SequenceNode):
        pairs = [(str(i), value, value) for i, value in enumerate(node.value)]
    for name, mark, value in pairs:
        yield (*keys, name), mark.start_mark.line + 1
        yield from _lines(value, (*keys, name))


def string_keys(tree: Any) -> Any:
    """Return a tree of mappings whose keys are all text; YAML allows numbers there."""
    if isinstance(tree, dict):
        return {str(key): string_keys(value) for key, value in tree.items()}
    return tree


# -- faults --------------------------------------------------------------------------------------


class Place(NamedTuple):
    """Where a fault of pydantic lies in a model: key path, its field, and the keys beside it."""

    keys: KeyPath
    field: FieldInfo | None
    beside: Mapping[str, FieldInfo]


Unknown = Callable[[Place], tuple[str, str]]


def fields_of(model: Any) -> Mapping[str, FieldInfo]:
    """Return the fields of a pydantic model or dataclass; empty for anything else."""
    kind = model if isinstance(model, type) else type(model)
    found = getattr(kind, "__pydantic_fields__", None)
    return found if isinstance(found, Mapping) else {}


def _is_model(kind: Any) -> bool:
    # A method may have no options, and is a model nevertheless.
    return isinstance(kind, type) and hasattr(kind, "__pydantic_validator__")


def faults_of(
    error: ValidationError,
    model: Any,
    *,
    origin: Origin | None = None,
    where: str = "",
    prefix: KeyPath = (),
    owners: Mapping[KeyPath, Any] | None = None,
    unknown: Unknown | None = None,
) -> dict[KeyPath, WaraError]:
    """Return one refusal per faulty key.

    Args:
        error: what pydantic raised.
        model: the model or dataclass that was validated.
        origin: places of the keys; a fault is reported with the nearest one.
        where: what to say where no place is known; the dotted key when empty.
        prefix: key path that the model itself stands at.
        owners: models of sections whose type is only known from their content.
        unknown: words and remedy for an unknown key, in place of the usual ones.
    """
    grouped: dict[KeyPath, list[ErrorDetails]] = {}
    places: dict[KeyPath, Place] = {}
    for detail in error.errors(include_url=False):
        place = _walk(model, detail["loc"], prefix, owners or {})
        if detail["type"] == "fault" and detail["ctx"]["key"]:
            place = place._replace(keys=(*place.keys, detail["ctx"]["key"]))
        grouped.setdefault(place.keys, []).append(detail)
        places.setdefault(place.keys, place)
    return {
        keys: _fault(places[keys], details, where or locate(keys, origin or {}), unknown)
        for keys, details in grouped.items()
    }


def locate(keys: KeyPath, origin: Origin) -> str:
    """Return the place that set a key, or the nearest key above or below it; else its name.

    The empty key path stands for the file as a whole, where there is one.
    """
    for length in range(len(keys), 0, -1):
        if keys[:length] in origin:
            return origin[keys[:length]]
    below = (place for known, place in origin.items() if keys and known[: len(keys)] == keys)
    return next(below, origin.get((), ".".join(keys)))


def _walk(
    model: Any, loc: tuple[int | str, ...], prefix: KeyPath, owners: Mapping[KeyPath, Any]
) -> Place:
    keys, field, beside, here = prefix, None, fields_of(model), model
    for part in loc:
        options = _alternatives(here)
        tagged = [option for option in options if _tag(option) == part]
        if tagged:  # pydantic names the member of a tagged union by its tag
            here = tagged[0]
            continue
        owner = next((option for option in options if _is_model(option)), None)
        if owner is not None:
            beside, keys = fields_of(owner), (*keys, str(part))
            field = beside.get(str(part))
            if field is None:
                break
            here = owners.get(keys, field.annotation)
        elif isinstance(part, int) and any(get_origin(option) is list for option in options):
            keys = (*keys, str(part))
            here = next(get_args(o)[0] for o in options if get_origin(o) is list)
        elif any(get_origin(option) is dict for option in options):
            keys = (*keys, str(part))
            here = next(get_args(o)[1] for o in options if get_origin(o) is dict)
        else:
            break
    return Place(keys, field, beside)


def _alternatives(kind: Any) -> list[Any]:
    """Return the types that a value may have, without `Annotated` and unions around them."""
    if get_origin(kind) is Annotated:
        return _alternatives(get_args(kind)[0])
    if get_origin(kind) is Union or type(kind).__name__ == "UnionType":
        return [inner for part in get_args(kind) for inner in _alternatives(part)]
    return [kind]


def _tag(option: Any) -> Any:
    """Return the literal that tells a member of a tagged union from the others."""
    for field in fields_of(option).values():
        if get_origin(field.annotation) is Literal and field.is_required():
            return get_args(field.annotation)[0]
    return None


def _fault(
    place: Place, details: list[ErrorDetails], where: str, unknown: Unknown | None
) -> WaraError:
    """Return the one line for all that pydantic says about one key."""
    dotted, leaf, first = ".".join(place.keys), place.keys[-1] if place.keys else "", details[0]
    if where == dotted:
        dotted = leaf  # not the same word twice in a line
    kind, value = first["type"], _short(first["input"])
    description = place.field.description if place.field else None
    remedy = f"{leaf}: {description}".rstrip(".") if description else ""
    if kind in ("extra_forbidden", "unexpected_keyword_argument"):
        if unknown is not None:
            what, remedy = unknown(place)
        else:
            what = f"unknown key '{dotted}'"
            remedy = suggest(leaf, place.beside) if place.beside else "remove it"
        return WaraError("config", what, where, remedy)
    context = first.get("ctx", {})
    if kind == "missing" and isinstance(first["loc"][-1], int):
        return WaraError("config", f"{dotted} has too few entries", where, remedy)
    if kind in ("missing", "missing_keyword_only_argument", "union_tag_not_found"):
        return WaraError("config", f"'{_dotted_tag(dotted, context)}' is missing", where, remedy)
    if kind == "fault":
        return WaraError("config", context["what"], where, context["remedy"] or remedy)
    if kind == "value_error":
        return WaraError("config", str(context["error"]), where, remedy or "correct it")
    choices = _choices(place, first)
    if choices:
        word = context["tag"] if kind == "union_tag_invalid" else first["input"]
        what = f"{_dotted_tag(dotted, context)} should be one of {', '.join(choices)}"
        remedy = suggest(word, choices) if isinstance(word, str) else remedy
        return WaraError("config", f"{what}, not {_short(word)}", where, remedy)
    wanted = dict.fromkeys(_wanted(detail) for detail in details)
    what = f"{dotted or 'it'} should be {' or '.join(wanted)}"
    if kind not in ("too_short", "too_long"):
        what += f", not {value}"
    if kind in ("model_type", "model_attributes_type", "dataclass_type"):
        inner = next((fields_of(o) for o in _alternatives(_annotation(place)) if fields_of(o)), {})
        remedy = f"as in {dotted}.{next(iter(inner))}" if inner else remedy
    return WaraError("config", what, where, remedy)


def _annotation(place: Place) -> Any:
    return place.field.annotation if place.field else None


def _dotted_tag(dotted: str, context: Mapping[str, Any]) -> str:
    """Return the key of a tagged union's tag where the fault is about it, else the key itself."""
    tag = str(context.get("discriminator", "")).strip("'")
    return f"{dotted}.{tag}" if tag else dotted


def _choices(place: Place, detail: ErrorDetails) -> list[str]:
    if detail["type"] == "literal_error":
        options = _alternatives(_annotation(place))
        found = [str(c) for o in options if get_origin(o) is Literal for c in get_args(o)]
        return found or re.findall(r"'([^']*)'", str(detail["ctx"]["expected"]))
    if detail["type"] == "union_tag_invalid":
        return sorted(re.findall(r"'([^']*)'", str(detail["ctx"]["expected_tags"])))
    return []


def _wanted(detail: ErrorDetails) -> str:
    """Return what a value should have been, in plain words."""
    limits = detail.get("ctx", {})
    section = "a section with keys of its own"
    words = {
        "int_type": "a whole number",
        "int_from_float": "a whole number",
        "float_type": "a number",
        "finite_number": "a finite number",
        "bool_type": "true or false",
        "string_type": "a text (put it in quotes)",
        "string_too_short": "a text that is not empty",
        "string_too_long": f"a text of at most {limits.get('max_length')} characters",
        "string_pattern_mismatch": "made of letters, digits, '.', '-' and '_'",
        "list_type": "a list",
        "tuple_type": "a list",
        "dict_type": section,
        "too_short": f"a list of at least {limits.get('min_length')}",
        "too_long": f"a list of at most {limits.get('max_length')}",
        "model_type": section,
        "model_attributes_type": section,
        "dataclass_type": section,
        "greater_than": f"above {limits.get('gt', 0):.15g}",
        "greater_than_equal": f"at least {limits.get('ge', 0):.15g}",
        "less_than": f"below {limits.get('lt', 0):.15g}",
        "less_than_equal": f"at most {limits.get('le', 0):.15g}",
    }
    return words.get(detail["type"], detail["msg"])


def _short(value: Any) -> str:
    # As YAML has it: null and true, not None and True.
    if isinstance(value, (dict, list)) and not value:
        return "empty"
    if isinstance(value, float) and not math.isfinite(value):
        return f"{value:g}".replace("nan", ".nan").replace("inf", ".inf")
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else text[:57] + "..."
