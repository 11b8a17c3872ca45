"""Fine-tuning methods and what can be done with an adapted model."""

from wara.adapters.analysis import singular_values, subband_energy
from wara.adapters.base import Method
from wara.adapters.exchange import export_peft, import_peft
from wara.adapters.files import load_adapter, read_adapter_config, save_adapter
from wara.adapters.inject import (
    adapt,
    adapter_state_dict,
    base_hash,
    count_parameters,
    load_adapter_state,
    merge,
    parameter_groups,
    trainable_parameters,
    unload,
)
from wara.adapters.lora import LoRA
from wara.adapters.methods import METHODS, method_from_options, method_options, option_faults
from wara.adapters.probes import Full, LinearProbe
from wara.adapters.sparse import SHiRA, WaveFT
from wara.adapters.wara import TinyWaRA, WaRA

__all__ = [
    "METHODS",
    "Full",
    "LinearProbe",
    "LoRA",
    "Method",
    "SHiRA",
    "TinyWaRA",
    "WaRA",
    "WaveFT",
    "adapt",
    "adapter_state_dict",
    "base_hash",
    "count_parameters",
    "export_peft",
    "import_peft",
    "load_adapter",
    "load_adapter_state",
    "merge",
    "method_from_options",
    "method_options",
    "option_faults",
    "parameter_groups",
    "read_adapter_config",
    "save_adapter",
    "singular_values",
    "subband_energy",
    "trainable_parameters",
    "unload",
]
