"""Reference forms, written step by step from the papers, that the fast forms must agree with."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ptwt
import torch
from torch import Tensor, nn

from wara.adapters import method_from_options
from wara.errors import WaraError, WaraErrors


def wara_update(
    x: Tensor,
    down: Tensor,
    up: Tensor,
    cores: Tensor,
    grid: tuple[int, int],
    *,
    prefix_tokens: int = 0,
    prefix: str = "adapt",
    wavelet: str = "haar",
    level: int = 1,
    boundary: str = "symmetric",
    scale: float = 1.0,
) -> Tensor:
    """WaRA for one linear layer, in the full width and subband by subband.

    Lays the patch tokens `[b, n, d]` on the grid, transforms every channel, updates each subband by
    `B K_s A`, transforms back and crops. `down` `[r, d]`, `up` `[o, r]`, `cores` `[s, r, r]`.
    """
    h, w = grid
    patches = x[:, prefix_tokens:]
    image = patches.transpose(1, 2).reshape(x.shape[0], -1, h, w)
    coefficients = ptwt.wavedec2(image, wavelet, mode=boundary, level=level)

    def update(band: Tensor, s: int) -> Tensor:
        reduced = torch.einsum("rd,bdhw->brhw", down, band)
        mixed = torch.einsum("qr,brhw->bqhw", cores[s], reduced)
        return torch.einsum("oq,bqhw->bohw", up, mixed)

    updated = [update(coefficients[0], 0)]
    for j, detail in enumerate(coefficients[1:]):
        bands = [update(band, 1 + 3 * j + i) for i, band in enumerate(detail)]
        updated.append(ptwt.constants.WaveletDetailTuple2d(*bands))
    back = ptwt.waverec2(tuple(updated), wavelet)[..., :h, :w]
    delta = back.flatten(2).transpose(1, 2)
    first = x[:, :prefix_tokens] @ down.T @ up.T
    if prefix == "skip":
        first = torch.zeros_like(first)
    return scale * torch.cat([first, delta], dim=1)


class StepByStepWaRA(nn.Module):
    """A linear layer with WaRA in the step-by-step form, for timing and for gradients."""

    def __init__(
        self,
        base: nn.Linear | None,
        down: Tensor,
        up: Tensor,
        cores: Tensor,
        grid: tuple[int, int],
        prefix_tokens: int,
    ) -> None:
        super().__init__()
        self.base = base
        self.down, self.up, self.cores = (nn.Parameter(t.clone()) for t in (down, up, cores))
        self.grid, self.prefix_tokens = grid, prefix_tokens

    def update(self, x: Tensor) -> Tensor:
        return wara_update(
            x, self.down, self.up, self.cores, self.grid, prefix_tokens=self.prefix_tokens
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.update(x)


def option_faults(adapter: dict[str, Any]) -> list[WaraError]:
    """Return all that is wrong with an `adapter:` section."""
    try:
        method_from_options(adapter["method"], {k: v for k, v in adapter.items() if k != "method"})
    except WaraErrors as errors:
        return list(errors.errors)
    except WaraError as error:
        return [error]
    return []


def reseal(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change what `adapter_config.json` says, with checksums that agree again."""
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text())
    tensors = (folder / "adapter_model.safetensors").read_bytes()
    config["tensors_sha256"] = hashlib.sha256(tensors).hexdigest()
    change(config)
    del config["sha256"]
    text = json.dumps(config, sort_keys=True, separators=(",", ":"))
    config["sha256"] = hashlib.sha256(text.encode()).hexdigest()
    path.write_text(json.dumps(config))
