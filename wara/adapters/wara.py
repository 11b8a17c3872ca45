"""WaRA and Tiny-WaRA (arXiv 2506.24092 v2): low-rank updates of the subbands of the token grid."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from wara.adapters.base import (
    AdapterLayer,
    LowRankLayer,
    TokenDomainLayer,
    identity_cores,
    require,
)
from wara.adapters.lora import LoRALayer, check_low_rank, low_rank_parameters, scaling
from wara.adapters.targets import Target, TargetedMethod, token_layout
from wara.errors import WaraError, suggest
from wara.wavelets import BOUNDARIES, SubbandMixer, check_wavelet

CORES = ("identity", "scalar", "diag", "full")
PREFIXES = ("adapt", "skip")
SHARES = ("subband", "layer", "model")


class SubbandLayer(LowRankLayer, TokenDomainLayer):
    """Shared forward of WaRA and Tiny-WaRA: mix the patch tokens, treat the prefix apart.

    Args:
        target: the linear layer and its row groups.
        mixer: the transform, shared by all layers of the model.
        prefix_tokens: `p`, class and register tokens before the patches.
        prefix: `adapt` or `skip`.
        rank: `r`.
        scale: `α / r`.
        dropout: probability of dropping an input entry on the adapter's path.
    """

    def __init__(
        self,
        target: Target,
        mixer: SubbandMixer,
        *,
        prefix_tokens: int,
        prefix: str,
        rank: int,
        scale: float,
        dropout: float = 0.0,
    ) -> None:
        linear = target.linear
        super().__init__(
            target.rows,
            linear.in_features,
            linear.out_features,
            rank=rank,
            scale=scale,
            dropout=dropout,
        )
        self.mixer = mixer
        self.prefix_tokens = prefix_tokens
        self.prefix = prefix

    def cores(self) -> Tensor:
        """Return `K_s` of every row group: `[g, s]`, `[g, s, r]` or `[g, s, r, r]`."""
        raise TypeError(f"{type(self).__name__} does not define cores")

    def full_cores(self) -> Tensor:
        """Return `K_s` as matrices `[g, s, r, r]`, whatever their form."""
        core = self.cores()
        if core.ndim == 4:
            return core
        gains = core.unsqueeze(-1).expand(-1, -1, self.rank) if core.ndim == 2 else core
        return torch.diag_embed(gains)

    def mix_prefix(self, z: Tensor, core: Tensor) -> Tensor:
        """Return the update of the prefix tokens `[b, p, g, r]` in rank space."""
        return z

    def split(self, tokens: int) -> int:
        """Return how many of `tokens` are prefix tokens.

        Some models (CaiT) run their blocks on patch tokens alone.

        Raises:
            WaraError: kind `config` when the number of tokens does not fit the grid.
        """
        prefix = tokens - self.mixer.tokens
        if prefix in (0, self.prefix_tokens):
            return prefix
        h, w = self.mixer.grid
        what = f"a layer got {tokens} tokens where the grid {h}x{w} has {h * w}"
        where = f"{self.prefix_tokens} prefix tokens"
        remedy = "build the model for this img_size, and without patch dropping or windows"
        raise WaraError("config", what, where, remedy)

    def mix(self, z: Tensor) -> Tensor:
        """Update `[b, n, g r]`: patch tokens per subband, prefix tokens by `mix_prefix`."""
        if z.ndim != 3:
            what = f"a layer got input of {z.ndim} dimensions where tokens [b, n, d] are expected"
            raise WaraError("config", what, "backbone.name", "choose a ViT without windows")
        prefix = self.split(z.shape[1])
        z = z.reshape(*z.shape[:2], self.groups, self.rank)
        core = self.cores()
        patches = self.mixer(z[:, prefix:], core)
        if prefix:
            head = z[:, :prefix]
            head = head * 0 if self.prefix == "skip" else self.mix_prefix(head, core)
            patches = torch.cat([head.to(patches.dtype), patches], dim=1)
        return patches.flatten(2)


class WaRALayer(SubbandLayer):
    """WaRA with cores that train: `Δ = (α/r) · IDWT(B K_s A DWT(x)_s)`, in rank space.

    `B` starts at zero and the cores at the identity, so the layer starts as the base layer and
    contains LoRA as the case `K_s = I`.
    """

    core_names = frozenset({"core"})

    def __init__(
        self,
        target: Target,
        mixer: SubbandMixer,
        *,
        core: str,
        prefix_tokens: int,
        prefix: str,
        rank: int,
        scale: float,
        dropout: float = 0.0,
    ) -> None:
        super().__init__(
            target,
            mixer,
            prefix_tokens=prefix_tokens,
            prefix=prefix,
            rank=rank,
            scale=scale,
            dropout=dropout,
        )
        self.down, self.up = low_rank_parameters(self.in_features, self.sizes, rank)
        subbands = len(mixer.names)
        self.core = nn.Parameter(identity_cores(self.groups, subbands, rank, core))

    def cores(self) -> Tensor:
        """Return the trained cores."""
        return self.core

    def merged_weight(self) -> Tensor | None:
        """Return `(α/r) B A` while every core is exactly the identity, else `None`."""
        full = self.full_cores()
        identity = torch.eye(self.rank, dtype=full.dtype, device=full.device)
        same = bool((full == identity).all())
        return self.product() if same and self.prefix == "adapt" else None


class TinyWaRALayer(SubbandLayer):
    """Tiny-WaRA: `A = Σ^½ Vᵀ` and `B = U Σ^½` frozen, `K_s = Σ_i v_{s,i} Q_i` trained through `v`.

    Args:
        vector: `v`, shared with other layers when tied; `[g, s, u]` or `[u]`.
        bases: `Q`, `[g, u, r, r]`, or `[g, s, u, r, r]` when `v` is tied across subbands.
    """

    core_names = frozenset({"vector"})

    def __init__(
        self,
        target: Target,
        mixer: SubbandMixer,
        *,
        vector: nn.Parameter,
        bases: Tensor,
        prefix_tokens: int,
        prefix: str,
        rank: int,
        scale: float,
    ) -> None:
        super().__init__(
            target, mixer, prefix_tokens=prefix_tokens, prefix=prefix, rank=rank, scale=scale
        )
        down, up = truncated_svd(target.linear.weight, self.rows, rank)
        self.register_buffer("down", down)
        self.register_buffer("up", up)
        self.register_buffer("bases", bases)
        self.vector = vector

    bases: Tensor

    def cores(self) -> Tensor:
        """Return `K_s = Σ_i v_{s,i} Q_i`, `[g, s, r, r]`."""
        if self.vector.ndim == 1:
            return torch.einsum("u,gsuij->gsij", self.vector, self.bases)
        return torch.einsum("gsu,guij->gsij", self.vector, self.bases)

    def mix_prefix(self, z: Tensor, core: Tensor) -> Tensor:
        """Treat a prefix token as a constant image, which lives in the LL band alone.

        `B A x` itself, as in WaRA, would not be zero at the start, for `A` and `B` are not.
        """
        with torch.autocast(z.device.type, enabled=False):
            return torch.einsum("bpgj,gij->bpgi", z.to(core.dtype), core[:, 0])

    def merged_weight(self) -> Tensor | None:
        """Return the change of weight while all cores of a group are equal, else `None`."""
        core = self.cores()
        same = bool((core == core[:, :1]).all())
        zero = bool((core == 0).all())
        return self.product(core[:, 0]) if same and (zero or self.prefix == "adapt") else None


def truncated_svd(
    weight: Tensor, rows: tuple[tuple[int, int], ...], rank: int
) -> tuple[Tensor, Tensor]:
    """Return the frozen factors of Tiny-WaRA for each row group of a weight.

    Args:
        weight: `W0`, `[o, d]`.
        rows: row groups, `g` of them.
        rank: `r`.

    Returns:
        `A = Σ^½ Vᵀ` `[g r, d]` and `B = U Σ^½` `[Σ sizes, r]`, found in float64. The sign of each
        pair is fixed (largest entry of `U` positive), which LAPACK leaves open.

    Raises:
        WaraError: kind `config` when the rank exceeds a side of a group.
    """
    downs, ups = [], []
    for start, stop in rows:
        block = weight.detach()[start:stop].to(torch.float64)
        most = min(block.shape)
        require(rank <= most, f"rank {rank} exceeds {most}", "rank", f"set at most {most}")
        u, sigma, vh = torch.linalg.svd(block, full_matrices=False)
        u, root, vh = u[:, :rank], sigma[:rank].sqrt(), vh[:rank]
        sign = u.gather(0, u.abs().argmax(0, keepdim=True)).sign()
        downs.append(root[:, None] * vh * sign.T)
        ups.append(u * sign * root)
    return torch.cat(downs).to(weight.dtype), torch.cat(ups).to(weight.dtype)


@dataclass(frozen=True, kw_only=True)
class SubbandMethod(TargetedMethod):
    """Options that WaRA and Tiny-WaRA share.

    Args:
        rank: `r`.
        alpha: `α`; none means `α = r`, a scale of 1.
        wavelet: a discrete wavelet of PyWavelets.
        level: levels of the transform; the grid bounds it.
        boundary: extension of the grid at its border.
        prefix: `adapt` gives class and register tokens the update without a transform; `skip`
            leaves them alone.
    """

    mergeable: ClassVar[bool] = False

    rank: int = 4
    alpha: float | None = None
    wavelet: str = "haar"
    level: int = 1
    boundary: str = "symmetric"
    prefix: str = "adapt"

    def __post_init__(self) -> None:
        """Check the options."""
        super().__post_init__()
        check_low_rank(self.rank, self.alpha, 0.0)
        check_wavelet(self.wavelet)
        whole = isinstance(self.level, int) and not isinstance(self.level, bool)
        require(whole and self.level >= 1, f"level is {self.level!r}", "level", "set 1 or more")
        for key, choices in (("prefix", PREFIXES), ("boundary", BOUNDARIES)):
            check_choice(getattr(self, key), key, choices)

    def mixer(self, model: nn.Module) -> tuple[SubbandMixer, int]:
        """Return the transform for the model's grid, and its number of prefix tokens."""
        grid, prefix_tokens = token_layout(model)
        return SubbandMixer(grid, self.wavelet, self.level, self.boundary), prefix_tokens


def check_choice(value: str, key: str, choices: tuple[str, ...]) -> None:
    """Refuse a value that is not among the choices of an option.

    Args:
        value: what is set.
        key: option of `adapter:`.
        choices: what is valid.

    Raises:
        WaraError: kind `config`, with the nearest choice.
    """
    if value not in choices:
        raise WaraError(
            "config", f"{key} is {value!r}", f"adapter.{key}", suggest(str(value), choices)
        )


@dataclass(frozen=True, kw_only=True)
class WaRA(SubbandMethod):
    """WaRA (arXiv 2506.24092 v2): one low-rank pair for all subbands, one core per subband.

    With `core="identity"` WaRA equals LoRA on the patch tokens, exactly: the transform acts on
    tokens, `A` and `B` on channels, and the two commute.

    Args:
        core: form of `K_s`: `identity`, `scalar`, `diag` or `full`.
        dropout: probability of dropping an input entry on the adapter's path.
    """

    name: ClassVar[str] = "wara"
    summary: ClassVar[str] = "low-rank update of the wavelet subbands of the token grid"
    lr: ClassVar[float] = 6e-3

    core: str = "diag"
    dropout: float = 0.0

    def __post_init__(self) -> None:
        """Check the options."""
        super().__post_init__()
        check_low_rank(self.rank, self.alpha, self.dropout)
        check_choice(self.core, "core", CORES)

    def build(self, model: nn.Module, targets: list[Target]) -> list[AdapterLayer]:
        """Return one layer per target, all with the same transform."""
        mixer, prefix_tokens = self.mixer(model)
        scale = scaling(self.alpha, self.rank)
        if self.core == "identity" and self.prefix == "adapt":
            # Σ_s P_s = I: without cores there is nothing to transform, and it can be merged.
            return [
                LoRALayer(target, rank=self.rank, scale=scale, dropout=self.dropout)
                for target in targets
            ]
        layers: list[AdapterLayer] = []
        for target in targets:
            layer = WaRALayer(
                target,
                mixer,
                core="scalar" if self.core == "identity" else self.core,
                prefix_tokens=prefix_tokens,
                prefix=self.prefix,
                rank=self.rank,
                scale=scale,
                dropout=self.dropout,
            )
            if self.core == "identity":
                # Only the prefix differs from LoRA; the cores stay the identity.
                cores = layer.core.detach()
                del layer.core
                layer.register_buffer("core", cores)
            layers.append(layer)
        return layers


@dataclass(frozen=True, kw_only=True)
class TinyWaRA(SubbandMethod):
    """Tiny-WaRA (arXiv 2506.24092 v2): a few coefficients in a fixed SVD basis of each weight.

    Args:
        coefficients: `u`, trained numbers per core.
        share: what has a vector `v` of its own: each `subband` of each target, each `layer` (all
            targets of one linear layer), or the whole `model`, which then trains `u` numbers.
        seed: draws `Q`; stored in the adapter file.
    """

    name: ClassVar[str] = "tiny_wara"
    summary: ClassVar[str] = "WaRA with a fixed SVD basis; only a few coefficients train"
    lr: ClassVar[float] = 5e-2

    rank: int = 8
    coefficients: int = 8
    share: str = "subband"
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the options."""
        super().__post_init__()
        u = self.coefficients
        whole = isinstance(u, int) and not isinstance(u, bool)
        require(whole and u >= 1, f"coefficients is {u!r}", "coefficients", "set 1 or more")
        check_choice(self.share, "share", SHARES)

    def build(self, model: nn.Module, targets: list[Target]) -> list[AdapterLayer]:
        """Return one layer per target, all with the same transform."""
        mixer, prefix_tokens = self.mixer(model)
        generator = torch.Generator().manual_seed(self.seed)
        subbands, u, r = len(mixer.names), self.coefficients, self.rank
        shared = nn.Parameter(torch.zeros(u)) if self.share == "model" else None
        layers: list[AdapterLayer] = []
        for target in targets:
            groups = len(target.rows)
            # With `v` tied across subbands one Q would make all cores equal, and the transform
            # would drop out of the update; so each subband then gets its own.
            form = (groups, u) if self.share == "subband" else (groups, subbands, u)
            bases = torch.randn(*form, r, r, generator=generator) / r**0.5
            if self.share == "subband":
                vector = nn.Parameter(torch.zeros(groups, subbands, u))
            else:
                vector = nn.Parameter(torch.zeros(u)) if shared is None else shared
            layers.append(
                TinyWaRALayer(
                    target,
                    mixer,
                    vector=vector,
                    bases=bases,
                    prefix_tokens=prefix_tokens,
                    prefix=self.prefix,
                    rank=r,
                    scale=scaling(self.alpha, r),
                )
            )
        return layers
