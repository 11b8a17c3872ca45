"""One run as data: its fields, its YAML file, and `--set` on top of it.

Only the command line and `wara.training.run` see a `RunConfig`; all other code takes plain
arguments.
"""

from wara.config.files import Check, dump_config, find_config, list_configs, load_config, shipped
from wara.config.schema import AdapterConfig, BackboneConfig, DataConfig, RunConfig

__all__ = [
    "AdapterConfig",
    "BackboneConfig",
    "Check",
    "DataConfig",
    "RunConfig",
    "dump_config",
    "find_config",
    "list_configs",
    "load_config",
    "shipped",
]
