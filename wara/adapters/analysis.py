"""Numbers for the two figures of the WaRA paper: subband energies and singular spectra."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from wara.adapters.base import AdaptedLinear, adapted_layers
from wara.adapters.lora import LowRankLayer
from wara.adapters.wara import SubbandLayer


def _group_names(name: str, layer: AdaptedLinear) -> list[str]:
    """Return a name per row group; the parts of a fused layer read `blocks.0.attn.qkv[q]`."""
    groups = layer.adapter.rows
    if len(groups) == 1 and groups[0] == (0, layer.out_features):
        return [name]
    third = layer.out_features // 3
    return [f"{name}[{'qkv'[start // third]}]" for start, _ in groups]


@torch.no_grad()
def subband_energy(model: nn.Module, images: Tensor) -> dict[str, dict[str, float]]:
    """Measure how much of the learned update lies in each subband (WaRA, Fig. 2).

    The energy of subband `s` in a layer is `‖(α/r) P_s (A x K_sᵀ + b) Bᵀ‖²`, `b` the constant where
    there is one, summed over patch tokens and output channels, averaged over images.

    Args:
        model: an adapted model.
        images: `[b, 3, H, W]`, normalised, on the model's device.

    Returns:
        Energies by layer and subband; empty when no layer has subbands.
    """
    layers = {
        name: layer
        for name, layer in adapted_layers(model).items()
        if isinstance(layer.adapter, SubbandLayer)
    }
    energies: dict[str, dict[str, float]] = {}
    handles = []

    def watch(name: str, layer: AdaptedLinear) -> Any:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            adapter = layer.adapter
            assert isinstance(adapter, SubbandLayer)
            x = inputs[0][:, adapter.split(inputs[0].shape[1]) :].float()
            per_group = _energies(adapter, x)
            for group, values in zip(_group_names(name, layer), per_group, strict=True):
                energies[group] = dict(zip(adapter.mixer.names, values.tolist(), strict=True))

        return hook

    try:
        for name, layer in layers.items():
            handles.append(layer.register_forward_pre_hook(watch(name, layer)))
        if layers:
            was_training = model.training
            model.eval()(images)
            model.train(was_training)
    finally:
        for handle in handles:
            handle.remove()
    return energies


def _energies(adapter: SubbandLayer, x: Tensor) -> Tensor:
    """Return `[g, s]` energies of a layer's update for patch tokens `[b, n, d]`."""
    b, n, _ = x.shape
    z = (x @ adapter.down.float().T).reshape(b, n, adapter.groups, adapter.rank)
    mixer = adapter.mixer
    there = torch.einsum("mn,bngj->bmgj", mixer.analysis.to(z), z).split(mixer.sizes, 1)
    back = mixer.synthesis.to(z).split(mixer.sizes, 1)
    pairs = zip(back, there, strict=True)
    bands = torch.stack([torch.einsum("nm,bmgj->bngj", *pair) for pair in pairs], 1)
    updated = torch.einsum("bsngj,gsij->bsngi", bands, adapter.full_cores().float())
    if adapter.shift is not None:
        ones = mixer.analysis.to(z).sum(1).split(mixer.sizes)
        parts = torch.stack([s @ a for s, a in zip(back, ones, strict=True)])  # P_s 1
        shift = adapter.shift.float().reshape(adapter.groups, adapter.rank)
        updated = updated + parts[:, :, None, None] * shift
    ups = adapter.up.float().split(adapter.sizes)
    # ‖u Bᵀ‖² = u BᵀB uᵀ, so the width never appears.
    gram = torch.stack([up.T @ up for up in ups])
    total = torch.einsum("bsngi,gij,bsngj->gs", updated, gram, updated)
    return adapter.scale**2 * total / b


@torch.no_grad()
def singular_values(model: nn.Module) -> dict[str, dict[str, Tensor]]:
    """Return the singular values of each layer's update (WaRA, Fig. 2).

    Args:
        model: an adapted model.

    Returns:
        By layer and subband, `r` descending singular values of `(α/r) B K_s A`; layers without
        subbands have the one entry `all`, for `(α/r) B A`. Empty for methods without low rank.
    """
    found: dict[str, dict[str, Tensor]] = {}
    for name, layer in adapted_layers(model).items():
        adapter = layer.adapter
        if not isinstance(adapter, LowRankLayer):
            continue
        downs = adapter.down.float().reshape(adapter.groups, adapter.rank, -1)
        ups = adapter.up.float().split(adapter.sizes)
        for g, group in enumerate(_group_names(name, layer)):
            # With B = Q R and Aᵀ = Q' R', the spectrum of B K A is that of R K R'ᵀ, r × r.
            left, right = torch.linalg.qr(ups[g])[1], torch.linalg.qr(downs[g].T)[1]
            if isinstance(adapter, SubbandLayer):
                cores = adapter.full_cores()[g].float()
                names = adapter.mixer.names
            else:
                cores, names = torch.eye(adapter.rank)[None].to(left), ("all",)
            values = torch.linalg.svdvals(left @ cores @ right.T) * adapter.scale
            found[group] = dict(zip(names, values.cpu(), strict=True))
    return found
