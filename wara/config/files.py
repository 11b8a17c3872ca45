"""Run configs as files: finding, reading, overriding, checking and writing them."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails
from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode
from ruamel.yaml.representer import RoundTripRepresenter

from wara.config.schema import RunConfig
from wara.errors import WaraError, WaraErrors, suggest

Check = Callable[[dict[str, Any]], list[WaraError]]
KeyPath = tuple[str, ...]

ADAPTER_ALIASES = {"r": "rank", "lora_alpha": "alpha", "target_modules": "targets"}

# What people who come from other toolkits write, and the word for it here.
SYNONYMS = {
    "learning_rate": "lr",
    "max_epochs": "epochs",
    "num_epochs": "epochs",
    "bs": "batch_size",
    "precision": "amp",
    "gpus": "devices",
    "num_workers": "data.workers",
    "grad_accum": "accumulate",
    "model": "backbone.name",
    "pretrained": "backbone.weights",
    "checkpoint_path": "backbone.weights",
    "output_dir": "out",
    "early_stopping": "patience",
    "gradient_clip_val": "clip_grad",
}


def shipped(kind: Literal["configs", "datasets"]) -> Path:
    """Return the folder of shipped configs or cards, in a checkout or in the installed package.

    Raises:
        WaraError: kind "storage" when the installation lacks the folder.
    """
    package = Path(__file__).resolve().parents[1]
    for folder in (package / "_share" / kind, package.parent / kind):
        if folder.is_dir():
            return folder
    raise WaraError(
        "storage", f"the shipped {kind} are missing", str(package), "install wara again"
    )


def list_configs() -> dict[str, str]:
    """Return name -> first line of the header comment of every shipped config."""
    found = {}
    for path in sorted(shipped("configs").glob("*.yaml")):
        first = path.read_text(encoding="utf-8").split("\n", 1)[0]
        found[path.stem] = first.lstrip("# ").strip()
    return found


def find_config(name: str | Path) -> Path:
    """Return the file that a `--cfg` means: a path, else the name of a shipped config.

    `fundus_wara` and `fundus_wara.yaml` mean the same. A file in the current folder wins.

    Raises:
        WaraError: kind "config", naming the nearest shipped config.
    """
    given = Path(name).expanduser()
    candidates = [given] if given.suffix in (".yaml", ".yml") else [given, Path(f"{given}.yaml")]
    # A bare name is looked up here and among the shipped ones, `configs/x.yaml` too when the
    # package is installed and there is no such folder here.
    if given.parent in (Path("."), Path("configs")):
        candidates += [shipped("configs") / path.name for path in candidates]
    for path in candidates:
        if path.is_file():
            return path
    if given.is_dir():
        raise WaraError(
            "config", "--cfg is a folder", str(given), f"name a file: {given}/config.yaml"
        )
    names = [f"{stem}.yaml" for stem in list_configs()]
    wanted = given.name if given.suffix else f"{given.name}.yaml"
    raise WaraError("config", f"no config '{name}'", "--cfg", suggest(wanted, names))


def load_config(
    source: str | Path, overrides: Sequence[str] = (), *, checks: Sequence[Check] = ()
) -> RunConfig:
    """Read a config file, put `key=value` overrides on top, and check everything at once.

    Args:
        source: a path, or the name of a shipped config (see `find_config`).
        overrides: `a.b=c` strings; `c` is YAML 1.2, so `1e-3` is a number and `[1, 2]` a list.
        checks: further checks. Each gets the whole config as nested dicts, defaults filled in and
            faulty values replaced by defaults, and returns what it finds wrong. A fault whose
            `where` is a dotted key (`adapter.rank`) is reported with the place that set it.

    Raises:
        WaraErrors: kind "config", one line per fault, each with the file and line or the `--set`
            it came from, and with the nearest valid key.
    """
    path = find_config(source)
    tree, origin = _read_file(path)
    faults: list[WaraError] = []
    _rename_aliases(tree, origin, faults)
    for text in overrides:
        _apply_override(tree, origin, text, faults)

    config, invalid = None, []
    try:
        config = RunConfig.model_validate(tree)
    except ValidationError as error:
        invalid = _group(error)
        faults += [_fault(keys, details, origin) for keys, details in invalid]
    whole = RunConfig().model_dump(mode="json")
    _merge_valid(whole, tree, (), {keys for keys, _ in invalid})
    for check in checks:
        faults += [_located(fault, origin) for fault in check(whole)]
    if faults or config is None:
        raise WaraErrors(faults)
    return config


def dump_config(config: RunConfig) -> str:
    """Return the resolved config as YAML, each key with its meaning; it loads back."""
    yaml = YAML()
    yaml.Representer = _Representer
    yaml.width = 4096  # no folding: a folded scalar and its comment are hard to read
    stream = io.StringIO()
    yaml.dump(_commented(config), stream)
    return stream.getvalue()


class _Representer(RoundTripRepresenter):
    """Writes null as `null`; ruamel leaves the place empty, which reads like a slip."""

    def represent_none(self, data: None, dotted: str | None = None) -> ScalarNode:
        """Return the node of a null."""
        return self.represent_scalar("tag:yaml.org,2002:null", "null")


_Representer.add_representer(type(None), _Representer.represent_none)


def _commented(section: BaseModel) -> CommentedMap:
    out = CommentedMap()
    plain = section.model_dump(mode="json")
    for key, value in plain.items():
        child = getattr(section, key, None)
        out[key] = _commented(child) if isinstance(child, BaseModel) else value
        field = type(section).model_fields.get(key)
        if field is not None and field.description and not isinstance(child, BaseModel):
            out.yaml_add_eol_comment(field.description, key, column=36)
    return out


def _yaml(text: str) -> Any:
    # pure=True is the YAML 1.2 reader: `no` is a word, `1e-3` a number, a key twice an error.
    return YAML(typ="safe", pure=True).load(text)


def _reason(error: Exception) -> tuple[str, str]:
    """Return what a YAML reader complains of in one line, and the line number as text."""
    if isinstance(error, MarkedYAMLError):
        what = re.sub(r"\s+", " ", error.problem or error.context or "not YAML").strip()
        return what, f" line {error.problem_mark.line + 1}" if error.problem_mark else ""
    return re.sub(r"\s+", " ", str(error)).strip() or "not YAML", ""


def _read_file(path: Path) -> tuple[dict[str, Any], dict[KeyPath, str]]:
    """Return the mapping in a file, and for each key path where it stands."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise WaraError("config", f"cannot read the config: {reason}", str(path)) from error
    try:
        tree = _yaml(text)
        node = YAML(typ="safe", pure=True).compose(text)
    except (YAMLError, ValueError) as error:
        what, line = _reason(error)
        raise WaraError("config", f"not valid YAML: {what}", f"{path}{line}") from error
    if tree is None:
        tree = {}
    if not isinstance(tree, dict):
        raise WaraError(
            "config", "a config is a list of `key: value` lines", str(path), "see `wara configs`"
        )
    origin = {keys: f"{path} line {line}" for keys, line in _lines(node)}
    return _string_keys(tree), origin


def _lines(node: Node | None, keys: KeyPath = ()) -> Iterator[tuple[KeyPath, int]]:
    if isinstance(node, MappingNode):
        for key, value in node.value:
            here = (*keys, str(key.value))
            yield here, key.start_mark.line + 1
            yield from _lines(value, here)


def _string_keys(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {str(key): _string_keys(value) for key, value in tree.items()}
    return tree


def _rename_aliases(
    tree: dict[str, Any], origin: dict[KeyPath, str], faults: list[WaraError]
) -> None:
    """Replace PEFT's words for adapter options by ours, in place."""
    adapter = tree.get("adapter")
    if not isinstance(adapter, dict):
        return
    for alias, name in ADAPTER_ALIASES.items():
        if alias not in adapter:
            continue
        where = origin.get(("adapter", alias), "")
        value = adapter.pop(alias)
        if name in adapter:
            what = f"adapter.{alias} and adapter.{name} are the same option"
            faults.append(WaraError("config", what, where, f"keep adapter.{name}"))
            continue
        adapter[name] = value
        origin[("adapter", name)] = where


def _apply_override(
    tree: dict[str, Any], origin: dict[KeyPath, str], text: str, faults: list[WaraError]
) -> None:
    """Put one `a.b=c` on top of the tree, in place."""
    where = f"--set {text}"
    dotted, equals, raw = text.partition("=")
    keys = tuple(part.strip() for part in dotted.split("."))
    if not equals or not all(keys):
        faults.append(
            WaraError("config", "not of the form key=value", where, "as in --set lr=1e-3")
        )
        return
    try:
        value = _string_keys(_yaml(raw))
    except (YAMLError, ValueError) as error:
        remedy = f"put quotes around a text: --set '{dotted}=\"...\"'"
        faults.append(WaraError("config", f"not valid YAML: {_reason(error)[0]}", where, remedy))
        return
    if len(keys) == 2 and keys[0] == "adapter":
        keys = ("adapter", ADAPTER_ALIASES.get(keys[1], keys[1]))
    parent: Any = tree
    for depth, key in enumerate(keys[:-1], start=1):
        scalar = key in RunConfig.model_fields and key not in _sections()
        if parent.get(key) is None and not scalar:
            parent[key] = {}
        parent = parent.get(key)
        if not isinstance(parent, dict):
            place = ".".join(keys[:depth])
            faults.append(
                WaraError("config", f"{place} has no keys below it", where, "drop the rest")
            )
            return
    parent[keys[-1]] = value
    for known in [known for known in origin if known[: len(keys)] == keys]:
        del origin[known]
    origin[keys] = where
    if keys == ("adapter",):
        _rename_aliases(tree, origin, faults)


def _group(error: ValidationError) -> list[tuple[KeyPath, list[ErrorDetails]]]:
    """Gather pydantic's errors by the key they are about; a union gives one per alternative."""
    grouped: dict[KeyPath, list[ErrorDetails]] = {}
    for detail in error.errors(include_url=False):
        loc = tuple(str(part) for part in detail["loc"])
        depth = 2 if len(loc) > 1 and loc[0] in _sections() else 1
        grouped.setdefault(loc[:depth], []).append(detail)
    return list(grouped.items())


def _sections() -> dict[str, type[BaseModel]]:
    return {
        name: field.annotation
        for name, field in RunConfig.model_fields.items()
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)
    }


def _known_keys() -> list[str]:
    sections = _sections()
    keys = [name for name in RunConfig.model_fields if name not in sections]
    return keys + [f"{name}.{key}" for name, cls in sections.items() for key in cls.model_fields]


def _nearest_key(keys: KeyPath) -> str:
    """Return the remedy for an unknown key: the key that was meant, with its section."""
    leaf, known = keys[-1], _known_keys()
    if leaf in SYNONYMS:
        return f"did you mean '{SYNONYMS[leaf]}'?"
    # Right word, wrong section; `rank` belongs to the adapter, whose options are the method's.
    for name in known:
        if name.rsplit(".", 1)[-1] == leaf:
            return f"did you mean '{name}'?"
    if ADAPTER_ALIASES.get(leaf, leaf) in ADAPTER_ALIASES.values():
        return f"did you mean 'adapter.{ADAPTER_ALIASES.get(leaf, leaf)}'?"
    section = _sections().get(keys[0]) if len(keys) > 1 else None
    near = suggest(leaf, section.model_fields if section else RunConfig.model_fields)
    if near.startswith("did") and section:
        return near.replace("'", f"'{keys[0]}.", 1)
    if near.startswith("did") or section:
        return near
    near = suggest(leaf, [name.rsplit(".", 1)[-1] for name in known])
    if near.startswith("did"):
        word = near.split("'")[1]
        return f"did you mean '{next(name for name in known if name.endswith('.' + word))}'?"
    return "all keys: --print-config"


def _fault(keys: KeyPath, details: list[ErrorDetails], origin: Mapping[KeyPath, str]) -> WaraError:
    """Return the one line for all that pydantic says about one key."""
    dotted, where, first = ".".join(keys), _place(keys, origin), details[0]
    if first["type"] == "extra_forbidden":
        return WaraError("config", f"unknown key '{dotted}'", where, _nearest_key(keys))
    section = _sections()[keys[0]] if len(keys) > 1 else RunConfig
    field = section.model_fields[keys[-1]]
    remedy = f"{keys[-1]}: {field.description or ''}".rstrip(".")
    value = _short(first["input"])
    if first["type"] == "literal_error":
        choices = [str(choice) for choice in get_args(field.annotation)]
        if isinstance(first["input"], str):
            remedy = suggest(first["input"], choices)
        what = f"{dotted} should be one of {', '.join(choices)}, not {value}"
    elif first["type"].startswith("model_"):
        example = next(iter(_sections()[dotted].model_fields))
        what = f"{dotted} should be a section with keys of its own, not {value}"
        remedy = f"as in {dotted}.{example}"
    else:
        wanted = dict.fromkeys(_wanted(detail) for detail in details)
        what = f"{dotted} should be {' or '.join(wanted)}, not {value}"
    return WaraError("config", what, where, remedy)


def _wanted(detail: ErrorDetails) -> str:
    """Return what a value should have been, in plain words."""
    limits = detail.get("ctx", {})
    words = {
        "int_type": "a whole number",
        "float_type": "a number",
        "finite_number": "a finite number",
        "bool_type": "true or false",
        "string_type": "a text",
        "string_too_short": "a text that is not empty",
        "greater_than": f"above {limits.get('gt', 0):g}",
        "greater_than_equal": f"at least {limits.get('ge', 0):g}",
        "less_than": f"below {limits.get('lt', 0):g}",
        "less_than_equal": f"at most {limits.get('le', 0):g}",
    }
    return words.get(detail["type"], detail["msg"])


def _place(keys: KeyPath, origin: Mapping[KeyPath, str]) -> str:
    for length in range(len(keys), 0, -1):
        if keys[:length] in origin:
            return origin[keys[:length]]
    return next((place for known, place in origin.items() if known[: len(keys)] == keys), "")


def _located(fault: WaraError, origin: Mapping[KeyPath, str]) -> WaraError:
    """Add to a fault that names a key the place where the key was set."""
    place = _place(tuple(fault.where.split(".")), origin) if fault.where else ""
    if not place:
        return fault
    return WaraError(fault.kind, fault.what, f"{fault.where} in {place}", fault.remedy)


def _short(value: Any) -> str:
    # As YAML has it: null and true, not None and True.
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else text[:57] + "..."


def _merge_valid(
    into: dict[str, Any], tree: Mapping[str, Any], keys: KeyPath, invalid: set[KeyPath]
) -> None:
    """Put the valid values of the tree over the defaults, in place."""
    for key, value in tree.items():
        here = (*keys, key)
        if here in invalid:
            continue
        if not keys and isinstance(value, dict) and isinstance(into.get(key), dict):
            _merge_valid(into[key], value, here, invalid)
        else:
            into[key] = value
