"""wara: wavelet adapters that fine-tune pretrained Vision Transformers for medical images."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from wara.adapters import (
        METHODS,
        Full,
        LinearProbe,
        LoRA,
        SHiRA,
        TinyWaRA,
        WaRA,
        WaveFT,
        adapt,
        export_peft,
        import_peft,
        load_adapter,
        merge,
        save_adapter,
        trainable_parameters,
        unload,
    )
    from wara.backbones import build_backbone
    from wara.errors import WaraError

_HOMES = {
    "METHODS": "adapters",
    "Full": "adapters",
    "LinearProbe": "adapters",
    "LoRA": "adapters",
    "SHiRA": "adapters",
    "TinyWaRA": "adapters",
    "WaRA": "adapters",
    "WaveFT": "adapters",
    "WaraError": "errors",
    "adapt": "adapters",
    "build_backbone": "backbones",
    "export_peft": "adapters",
    "import_peft": "adapters",
    "load_adapter": "adapters",
    "merge": "adapters",
    "save_adapter": "adapters",
    "trainable_parameters": "adapters",
    "unload": "adapters",
}

__all__ = [
    "METHODS",
    "Full",
    "LinearProbe",
    "LoRA",
    "SHiRA",
    "TinyWaRA",
    "WaRA",
    "WaveFT",
    "WaraError",
    "adapt",
    "build_backbone",
    "export_peft",
    "import_peft",
    "load_adapter",
    "merge",
    "save_adapter",
    "trainable_parameters",
    "unload",
]


def __getattr__(name: str) -> Any:
    # Looked up on first use, so that `wara --help` does not wait for torch.
    if name in _HOMES:
        return getattr(importlib.import_module(f"wara.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'wara' has no attribute '{name}'")
