"""Run configs as files: reading, overriding, checking and writing them."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap
from ruamel.yaml.nodes import ScalarNode
from ruamel.yaml.representer import RoundTripRepresenter

from wara.adapters import Method, WaRA, find_method
from wara.adapters.methods import unknown_option
from wara.config.names import find_config
from wara.config.schema import RunConfig
from wara.errors import WaraError, WaraErrors, suggest
from wara.schema import (
    KeyPath,
    Place,
    faults_of,
    fields_of,
    locate,
    parse_yaml,
    read_yaml,
    string_keys,
)

Check = Callable[[Any], None]

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
    "wandb_project": "wandb.project",
    "wandb_images": "wandb.images",
}


def load_config(
    source: str | Path | None,
    overrides: Sequence[str] = (),
    *,
    checks: Mapping[str, Check] | None = None,
) -> RunConfig:
    """Read a config file, put `key=value` overrides on top, and check everything at once.

    Args:
        source: a path, or the name of a shipped config (see `find_config`); None for the defaults.
        overrides: `a.b=c` strings; `c` is YAML 1.2, so `1e-3` is a number and `[1, 2]` a list.
        checks: by dotted key, what else to ask of its value: called where the value is valid, it
            raises a `WaraError` that is reported with the place that set the key.

    Raises:
        WaraErrors: kind "config", one line per fault, each with the file and line or the `--set`
            it came from, and with the nearest valid key.
    """
    tree: dict[str, Any] = {}
    origin: dict[KeyPath, str] = {}
    if source is not None:
        tree, origin = read_yaml(find_config(source), "config", "see `wara configs`")
    faults: list[WaraError] = []
    _rename_aliases(tree, origin, faults)
    for text in overrides:
        _apply_override(tree, origin, text, faults)

    config, invalid = None, {}
    try:
        config = RunConfig.model_validate(tree)
    except ValidationError as error:
        owner = _method_of(tree)
        invalid = faults_of(
            error,
            RunConfig,
            origin=origin,
            owners={("adapter",): owner},
            unknown=lambda place: _unknown(place, owner),
        )
        faults += invalid.values()
    for dotted, check in (checks or {}).items():
        keys = tuple(dotted.split("."))
        if any(keys[: len(known)] == known for known in invalid):
            continue
        value: Any = tree if config is None else config
        for key in keys:
            inside = isinstance(value, Mapping)
            value = value.get(key) if inside else getattr(value, key, None)
        if value is None:
            continue  # a default, of a config that is refused anyway
        try:
            check(value)
        except WaraError as error:
            where = locate(keys, origin)
            where = dotted if where == dotted else f"{dotted} in {where}"
            faults.append(WaraError(error.kind, error.what, where, error.remedy))
    if faults or config is None:
        raise WaraErrors(faults)
    return config


def dump_config(config: RunConfig) -> str:
    """Return a config as YAML, each key with its meaning; it loads back."""
    yaml = YAML()
    yaml.Representer = _Representer
    yaml.width = 4096  # no folding: a folded scalar and its comment are hard to read
    stream = io.StringIO()
    yaml.dump(_commented(config, config.model_dump(mode="json")), stream)
    return stream.getvalue()


class _Representer(RoundTripRepresenter):
    """Writes null as `null`; ruamel leaves the place empty, which reads like a slip."""

    def represent_none(self, data: None, dotted: str | None = None) -> ScalarNode:
        """Return the node of a null."""
        return self.represent_scalar("tag:yaml.org,2002:null", "null")


_Representer.add_representer(type(None), _Representer.represent_none)


def _commented(section: Any, plain: Mapping[str, Any]) -> CommentedMap:
    """Return the plain values of a section with the meaning of each key beside it."""
    fields, out = fields_of(section), CommentedMap()
    for key, value in plain.items():
        inner = getattr(section, key, None)
        if isinstance(inner, BaseModel | Method):
            out[key] = _commented(inner, value)
            continue
        out[key] = value
        meaning = fields[key].description if key in fields else "See `wara methods`."
        if meaning:  # a method of the user's own may leave an option without one
            out.yaml_add_eol_comment(meaning, key, column=36)
    return out


def _method_of(tree: Mapping[str, Any]) -> type[Method] | None:
    """Return the class that the options of a faulty `adapter:` section belong to, if any."""
    section = tree.get("adapter")
    if not isinstance(section, Mapping):
        return WaRA if section is None else None
    try:
        return find_method(str(section.get("method", "wara")))
    except WaraError:
        return None


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
        value = string_keys(parse_yaml(raw))
    except WaraError as error:
        remedy = f"put quotes around a text: --set '{dotted}=\"...\"'"
        faults.append(WaraError("config", error.what, where, remedy))
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


def _sections() -> dict[str, Any]:
    """Return the parts of a config that have keys of their own."""
    found = {
        name: field.annotation
        for name, field in RunConfig.model_fields.items()
        if fields_of(field.annotation)
    }
    return {**found, "adapter": WaRA}


def _known_keys() -> list[str]:
    sections = _sections()
    keys = [name for name in RunConfig.model_fields if name not in sections]
    return [*keys, "adapter.method"] + [
        f"{name}.{key}" for name, cls in sections.items() for key in fields_of(cls)
    ]


def _unknown(place: Place, method: type[Method] | None) -> tuple[str, str]:
    """Return the words for a key that does not exist: the one that was meant, with its section."""
    keys, leaf = place.keys, place.keys[-1]
    if keys[0] == "adapter" and len(keys) > 1 and method is not None:
        return unknown_option(method, place)
    return f"unknown key '{'.'.join(keys)}'", _nearest_key(keys, leaf)


def _nearest_key(keys: KeyPath, leaf: str) -> str:
    known = _known_keys()
    if leaf in SYNONYMS:
        return f"did you mean '{SYNONYMS[leaf]}'?"
    # Right word, wrong section; `rank` belongs to the adapter, whose options are the method's.
    leaf = ADAPTER_ALIASES.get(leaf, leaf)
    for name in known:
        if name.rsplit(".", 1)[-1] == leaf:
            return f"did you mean '{name}'?"
    section = _sections().get(keys[0]) if len(keys) > 1 else None
    near = suggest(leaf, fields_of(section or RunConfig))
    if near.startswith("did") and section:
        return near.replace("'", f"'{keys[0]}.", 1)
    if near.startswith("did") or section:
        return near
    near = suggest(leaf, [name.rsplit(".", 1)[-1] for name in known])
    if near.startswith("did"):
        word = near.split("'")[1]
        return f"did you mean '{next(name for name in known if name.endswith('.' + word))}'?"
    return "all keys: --print-config"
