"""One run as data: its fields, its YAML file, and `--set` on top of it.

Only the command line, `wara.runs` and `wara.training` see a `RunConfig`; all other code takes plain
arguments. Names are loaded on first use, so that listing configs does not wait for torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from wara.config.files import dump_config, load_config
    from wara.config.names import find_config, list_configs
    from wara.config.schema import BackboneConfig, DataConfig, RunConfig

_HOMES = {
    "BackboneConfig": "schema",
    "DataConfig": "schema",
    "RunConfig": "schema",
    "dump_config": "files",
    "find_config": "names",
    "list_configs": "names",
    "load_config": "files",
}

__all__ = [
    "BackboneConfig",
    "DataConfig",
    "RunConfig",
    "dump_config",
    "find_config",
    "list_configs",
    "load_config",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"wara.config.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
