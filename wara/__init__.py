"""wara: wavelet adapters that fine-tune pretrained Vision Transformers for medical images."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.2.0.dev0"

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
    from wara.runs import load_run

__all__ = [
    "METHODS", "Full", "LinearProbe", "LoRA", "SHiRA", "TinyWaRA", "WaRA", "WaraError", "WaveFT",
    "adapt", "build_backbone", "export_peft", "import_peft", "load_adapter", "load_run", "merge",
    "save_adapter", "trainable_parameters", "unload",
]  # fmt: skip
_HOMES = {"WaraError": "errors", "build_backbone": "backbones", "load_run": "runs"}


def __getattr__(name: str) -> Any:
    # Looked up on first use, so that `wara --help` does not wait for torch.
    if name in __all__:
        return getattr(importlib.import_module(f"wara.{_HOMES.get(name, 'adapters')}"), name)
    raise AttributeError(f"module 'wara' has no attribute '{name}'")
