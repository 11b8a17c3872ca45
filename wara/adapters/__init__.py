"""Fine-tuning methods and what can be done with an adapted model."""

from wara.adapters.analysis import singular_values, subband_energy
from wara.adapters.base import AdapterLayer, LinearAdapter, Method, options
from wara.adapters.exchange import export_peft, import_peft
from wara.adapters.files import AdapterFile, load_adapter, read_adapter, save_adapter
from wara.adapters.fingerprint import base_hash
from wara.adapters.inject import adapt, merge, unload
from wara.adapters.lora import LoRA
from wara.adapters.methods import (
    METHODS,
    find_method,
    method_from_options,
    read_method,
    section_of,
)
from wara.adapters.probes import Full, LinearProbe
from wara.adapters.sparse import SHiRA, WaveFT
from wara.adapters.state import (
    adaptation_of,
    adapter_state_dict,
    count_parameters,
    load_adapter_state,
    parameter_groups,
    trainable_parameters,
)
from wara.adapters.targets import SizedMethod, TargetedMethod
from wara.adapters.wara import TinyWaRA, WaRA

__all__ = [
    "METHODS",
    "AdapterFile",
    "AdapterLayer",
    "Full",
    "LinearAdapter",
    "LinearProbe",
    "LoRA",
    "Method",
    "SHiRA",
    "SizedMethod",
    "TargetedMethod",
    "TinyWaRA",
    "WaRA",
    "WaveFT",
    "adapt",
    "adaptation_of",
    "adapter_state_dict",
    "base_hash",
    "count_parameters",
    "export_peft",
    "find_method",
    "import_peft",
    "load_adapter",
    "load_adapter_state",
    "merge",
    "method_from_options",
    "options",
    "parameter_groups",
    "read_adapter",
    "read_method",
    "save_adapter",
    "section_of",
    "singular_values",
    "subband_energy",
    "trainable_parameters",
    "unload",
]
