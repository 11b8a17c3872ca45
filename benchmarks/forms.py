"""Forms of WaRA and Tiny-WaRA that were tried, as methods of one's own; see docs/evidence.md.

    PYTHONPATH=benchmarks wara compare --cfg CFG --methods lora,wara,forms:Scatter,… --out OUT

Each is held against LoRA at the same budget. Those that pay move into the package.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

import ptwt
import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from wara.adapters.base import (
    AdapterLayer,
    LinearAdapter,
    TokenDomainLayer,
    WeightDomainLayer,
    is_skeleton,
    options,
)
from wara.adapters.lora import LoRA
from wara.adapters.targets import Target, TargetedMethod, block_indices
from wara.adapters.wara import (
    SubbandLayer,
    SubbandMethod,
    TinyWaRA,
    TinyWaRALayer,
    Tokens,
    WaRA,
    WaRALayer,
    truncated_svd,
)
from wara.schema import from_list
from wara.vit import block_names

# -- what happens to the coefficients --------------------------------------------------------------


class BandLayer(WaRALayer):
    """WaRA whose coefficients go through `bands` in rank space, between DWT and IDWT."""

    def __init__(self, target: Target, tokens: Tokens, **low_rank: Any) -> None:
        super().__init__(target, tokens, core="diag", **low_rank)

    def bands(self, bands: list[Tensor], z: Tensor) -> list[Tensor]:
        """Return updated subbands, each `[b, m, g, r]`, for the patch tokens `z` `[b, n, g, r]`."""
        raise TypeError(f"{type(self).__name__} does not define bands")

    def prefixed(self, head: Tensor, bands: list[Tensor]) -> Tensor:
        """Return the update of the prefix tokens `[b, p, g, r]`, given the subbands."""
        return head

    def gained(self, bands: list[Tensor]) -> list[Tensor]:
        """Return subbands times the diagonal cores."""
        return [band * core for band, core in zip(bands, self.core.float().unbind(1), strict=True)]

    def mix(self, z: Tensor) -> Tensor:
        """Update `[b, n, g r]`."""
        prefix = self.split(z.shape[1])
        z = z.reshape(*z.shape[:2], self.groups, self.rank)
        with torch.autocast(z.device.type, enabled=False):
            head, rest = z[:, :prefix].float(), z[:, prefix:].float()
            b, n, g, r = rest.shape
            every = self.mixer.analysis @ rest.reshape(b, n, g * r)
            bands = list(every.reshape(b, -1, g, r).split(self.mixer.sizes, 1))
            head = self.prefixed(head, bands)
            updated = torch.cat(self.bands(bands, rest), 1).reshape(b, -1, g * r)
            rest = (self.mixer.synthesis @ updated).reshape(b, n, g, r)
        return torch.cat([head, rest], 1).flatten(2)


class SoftLayer(BandLayer):
    """Soft threshold, one per subband and rank, that trains."""

    core_names = frozenset({"core", "threshold"})

    def __init__(self, target: Target, tokens: Tokens, **low_rank: Any) -> None:
        super().__init__(target, tokens, **low_rank)
        self.threshold = nn.Parameter(torch.full_like(self.core, 0.05))

    def bands(self, bands: list[Tensor], z: Tensor) -> list[Tensor]:
        """Shrink each coefficient towards zero."""
        cut = self.threshold.float().relu().unbind(1)
        shrunk = [c.sign() * (c.abs() - t).relu() for c, t in zip(bands, cut, strict=True)]
        return self.gained(shrunk)


class GeluLayer(BandLayer):
    """GELU in the coefficients."""

    def bands(self, bands: list[Tensor], z: Tensor) -> list[Tensor]:
        """Apply it to every subband."""
        return self.gained([F.gelu(c) for c in bands])


class ScatterLayer(BandLayer):
    """The size of the details is added to LL: `LL ← K_LL c_LL + Σ_s E_s |c_s|`.

    What a scattering transform does: how much detail there is, whatever its sign and place within
    two patches. `E` starts at zero.
    """

    core_names = frozenset({"core", "energy"})

    def __init__(self, target: Target, tokens: Tokens, **low_rank: Any) -> None:
        super().__init__(target, tokens, **low_rank)
        self.energy = nn.Parameter(torch.zeros_like(self.core[:, 1:4]))

    def bands(self, bands: list[Tensor], z: Tensor) -> list[Tensor]:
        """Add the sizes of the coarsest details to LL."""
        low, *rest = self.gained(bands)
        for c, e in zip(bands[1:4], self.energy.float().unbind(1), strict=True):
            low = low + c.abs() * e
        return [low, *rest]


class PooledLayer(ScatterLayer):
    """The same, and the class token sees the mean size of each detail band of the whole image."""

    core_names = frozenset({"core", "energy", "pooled"})

    def __init__(self, target: Target, tokens: Tokens, **low_rank: Any) -> None:
        super().__init__(target, tokens, **low_rank)
        self.pooled = nn.Parameter(torch.zeros_like(self.energy))

    def prefixed(self, head: Tensor, bands: list[Tensor]) -> Tensor:
        """Add the mean sizes."""
        sizes = torch.stack([c.abs().mean(1) for c in bands[1:4]], 2)
        return head + (sizes * self.pooled.float()).sum(2)[:, None]


class GeluScatterLayer(ScatterLayer):
    """GELU in the coefficients and sizes into LL."""

    def bands(self, bands: list[Tensor], z: Tensor) -> list[Tensor]:
        """Both."""
        return super().bands([F.gelu(c) for c in bands], z)


class TokenGeluLayer(BandLayer):
    """A control: GELU of the tokens in rank space, no transform; gains of LL stand for all."""

    def mix(self, z: Tensor) -> Tensor:
        """Update `[b, n, g r]`."""
        gain = self.core[:, 0].flatten()
        return F.gelu(z.float()) * gain


class ImageLayer(BandLayer):
    """Cores that depend on the image: `g_s + W_s` times the mean of its patch tokens."""

    core_names = frozenset({"core", "drive"})

    def __init__(self, target: Target, tokens: Tokens, **low_rank: Any) -> None:
        super().__init__(target, tokens, **low_rank)
        g, s, r = self.core.shape
        self.drive = nn.Parameter(torch.zeros(g, s, r, r))

    def bands(self, bands: list[Tensor], z: Tensor) -> list[Tensor]:
        """Multiply each subband by a gain of the image."""
        gains = torch.einsum("bgj,gsij->bsgi", z.mean(1), self.drive.float())
        own = self.core.float().unbind(1)
        return [
            c * (k + gain[:, None]) for c, k, gain in zip(bands, own, gains.unbind(1), strict=True)
        ]


class PriorLayer(BandLayer):
    """Cores `1 + δ`, so that weight decay draws them to the identity and not to zero."""

    def __init__(self, target: Target, tokens: Tokens, **low_rank: Any) -> None:
        super().__init__(target, tokens, **low_rank)
        self.core = nn.Parameter(torch.zeros_like(self.core))

    def bands(self, bands: list[Tensor], z: Tensor) -> list[Tensor]:
        """Multiply each subband by its core."""
        return [c * (1 + d) for c, d in zip(bands, self.core.float().unbind(1), strict=True)]


@options
class _Banded(WaRA):
    layer: ClassVar[type[BandLayer]]

    def build(self, model: nn.Module, targets: Sequence[Target]) -> list[LinearAdapter]:
        tokens = self.tokens(model)
        return [self.layer(t, tokens, rank=self.rank, scale=self.scaling) for t in targets]


@options
class Soft(_Banded):
    """Soft threshold."""

    name: ClassVar[str] = "soft"
    layer = SoftLayer


@options
class Gelu(_Banded):
    """GELU."""

    name: ClassVar[str] = "gelu"
    layer = GeluLayer


@options
class Scatter(_Banded):
    """Sizes of details into LL."""

    name: ClassVar[str] = "scatter"
    layer = ScatterLayer


@options
class Pooled(_Banded):
    """Sizes of details into LL and the class token."""

    name: ClassVar[str] = "pooled"
    layer = PooledLayer


@options
class GeluScatter(_Banded):
    """Both nonlinear forms."""

    name: ClassVar[str] = "gelu_scatter"
    layer = GeluScatterLayer


@options
class TokenGelu(_Banded):
    """GELU without a transform."""

    name: ClassVar[str] = "token_gelu"
    layer = TokenGeluLayer


@options
class ImageCores(_Banded):
    """Cores that depend on the image."""

    name: ClassVar[str] = "image_cores"
    layer = ImageLayer


@options
class Prior(_Banded):
    """Cores drawn to the identity."""

    name: ClassVar[str] = "prior"
    layer = PriorLayer


@options
class Level2(WaRA):
    """Two levels."""

    name: ClassVar[str] = "level2"
    level: int = Field(2, ge=1, le=16, description="Levels.")


@options
class Full(WaRA):
    """Full cores."""

    name: ClassVar[str] = "full_cores"
    core: Literal["identity", "scalar", "diag", "full"] = Field("full", description="Form.")


# -- sparse in both domains ------------------------------------------------------------------------


class SparseBandLayer(TokenDomainLayer):
    """`ĉ_s = ΔW_s c_s`, `ΔW_s = IDWT2(C_s)` of `k` coefficients per subband and row group."""

    def __init__(
        self, target: Target, tokens: Tokens, *, count: int, scale: float, seed: int
    ) -> None:
        super().__init__(target.rows, target.linear.out_features)
        self.mixer, self.prefix_tokens, self.scale = tokens.mixer, tokens.prefix_tokens, scale
        bands = len(self.mixer.names)
        self.shapes = target.shapes
        each = max(1, count // bands)
        self.values = nn.Parameter(torch.zeros(len(self.shapes), bands, each))
        places = torch.empty(len(self.shapes), bands, each, dtype=torch.int64)
        if not is_skeleton():
            generator = torch.Generator().manual_seed(seed)
            for g, (o, d) in enumerate(self.shapes):
                for s in range(bands):
                    places[g, s] = torch.randperm(o * d, generator=generator)[:each]
        self.register_buffer("places", places)

    def weights(self) -> Tensor:
        """Return `λ ΔW_s`, `[s, o, d]`."""
        parts = []
        for g, (o, d) in enumerate(self.shapes):
            flat = self.values.new_zeros(self.values.shape[1], o * d)
            flat = flat.scatter(1, self.places[g], self.values[g]).reshape(-1, o, d)
            low, high = flat.chunk(2, 1)
            details = ptwt.constants.WaveletDetailTuple2d(
                high[:, :, : d // 2], low[:, :, d // 2 :], high[:, :, d // 2 :]
            )
            parts.append(ptwt.waverec2((low[:, :, : d // 2], details), "haar"))
        return self.scale * torch.cat(parts, 1)

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Return `[b, n, o]`."""
        y = F.linear(x, weight, bias)
        prefix = x.shape[1] - self.mixer.tokens
        deltas = self.weights().to(y.dtype)
        bands = (self.mixer.analysis.to(x.dtype) @ x[:, prefix:]).split(self.mixer.sizes, 1)
        updated = torch.cat([F.linear(c, w) for c, w in zip(bands, deltas, strict=True)], 1)
        patches = self.mixer.synthesis.to(y.dtype) @ updated.to(y.dtype)
        # A prefix token is a constant image, which lives in LL alone.
        return y + torch.cat([F.linear(x[:, :prefix], deltas[0]).to(y.dtype), patches], 1)


@options
class SparseBands(TargetedMethod):
    """WaveFT in the weight domain and DWT in the token domain, in one layer; adapts all rows."""

    name: ClassVar[str] = "sparse_bands"
    summary: ClassVar[str] = "sparse wavelet coefficients of a weight update for each token subband"
    rates: ClassVar[Mapping[str, float]] = {"adapter": 2e-3, "head": 2e-3}
    knob: ClassVar[tuple[str, ...]] = ("coefficients",)
    mergeable: ClassVar[bool] = False
    coefficients: int = Field(768, ge=1, le=10**7, description="k per row group.")
    scaling: float = Field(25.0, gt=0, le=1e4, description="λ.")
    seed: int = Field(0, ge=0, description="Draws the places.")

    def build(self, model: nn.Module, targets: Sequence[Target]) -> list[LinearAdapter]:
        """Return a layer for each target."""
        tokens = WaRA().tokens(model)
        return [
            SparseBandLayer(
                t, tokens, count=self.coefficients, scale=self.scaling, seed=self.seed + i
            )
            for i, t in enumerate(targets)
        ]


# -- Tiny-WaRA -------------------------------------------------------------------------------------


class FreeLayer(SubbandLayer):
    """Tiny-WaRA whose cores train themselves: full, diagonal, or one for all subbands."""

    core_names = frozenset({"free"})

    def __init__(
        self, target: Target, tokens: Tokens, *, form: str, spread: bool, **low_rank: Any
    ) -> None:
        super().__init__(target, tokens, **low_rank)
        down, up = truncated_svd(target.linear.weight, self.rows, self.rank)
        if not spread and not is_skeleton():  # orthonormal: Σ^½ taken out
            down = F.normalize(down.float(), dim=1).to(down.dtype)
            up = torch.cat([F.normalize(u.float(), dim=0) for u in up.split(self.sizes)]).to(
                up.dtype
            )
        self.register_buffer("down", down)
        self.register_buffer("up", up)
        bands, r = len(self.mixer.names), self.rank
        shapes = {"full": (bands, r, r), "diag": (bands, r), "shared": (1, r, r), "gains": (1, r)}
        shape = shapes[form]
        self.free = nn.Parameter(torch.zeros(self.groups, *shape))
        self.count = bands

    def cores(self) -> Tensor:
        """Return `K_s`."""
        core = torch.diag_embed(self.free) if self.free.ndim == 3 else self.free
        return core.expand(-1, self.count, -1, -1)

    def mix_prefix(self, z: Tensor, core: Tensor) -> Tensor:
        """Treat a prefix token as a constant image."""
        with torch.autocast(z.device.type, enabled=False):
            return torch.einsum("bpgj,gij->bpgi", z.to(core.dtype), core[:, 0])


class ShiftLayer(FreeLayer):
    """Diagonal cores and a constant beside them, which lives in LL: `ĉ_LL = K_LL c_LL + b`."""

    core_names = frozenset({"free", "shift"})

    def __init__(self, target: Target, tokens: Tokens, **low_rank: Any) -> None:
        super().__init__(target, tokens, **low_rank)
        self.shift = nn.Parameter(torch.zeros(self.groups * self.rank))

    def mix(self, z: Tensor) -> Tensor:
        """Update `[b, n, g r]`."""
        return super().mix(z) + self.shift


class OnlyShiftLayer(ShiftLayer):
    """The constant alone: a bias in the basis of the weights."""

    core_names = frozenset({"shift"})

    def __init__(self, target: Target, tokens: Tokens, **low_rank: Any) -> None:
        super().__init__(target, tokens, **low_rank)
        del self.free
        self.register_buffer("free", torch.zeros(self.groups, self.count, self.rank))

    def mix(self, z: Tensor) -> Tensor:
        """Update `[b, n, g r]`."""
        return torch.zeros_like(z) + self.shift


@options
class _Free(SubbandMethod):
    form: ClassVar[str]
    layer: ClassVar[type[FreeLayer]] = FreeLayer
    spread: ClassVar[bool] = True
    summary: ClassVar[str] = "cores train in the SVD basis"
    rates: ClassVar[Mapping[str, float]] = {"core": 5e-2, "head": 2e-3}

    def build(self, model: nn.Module, targets: Sequence[Target]) -> list[LinearAdapter]:
        tokens = self.tokens(model)
        return [
            self.layer(t, tokens, form=self.form, spread=self.spread, rank=self.rank,
                      scale=self.scaling)
            for t in targets
        ]  # fmt: skip


@options
class FreeFull(_Free):
    """`K_s` free, per subband."""

    name: ClassVar[str] = "free_full"
    form = "full"
    rank: int = Field(5, ge=1, le=4096, description="r.")


@options
class FreeShared(_Free):
    """One free core for all subbands: LoRA-XS."""

    name: ClassVar[str] = "lora_xs"
    form = "shared"
    rank: int = Field(11, ge=1, le=4096, description="r.")


@options
class FreeDiag(_Free):
    """Diagonal cores: singular values, per subband."""

    name: ClassVar[str] = "free_diag"
    form = "diag"
    rank: int = Field(31, ge=1, le=4096, description="r.")


@options
class SharedDiag(_Free):
    """Singular values alone, the same in all subbands."""

    name: ClassVar[str] = "shared_diag"
    form = "gains"
    rank: int = Field(80, ge=1, le=4096, description="r.")


@options
class FreeShift(FreeDiag):
    """Diagonal cores and a constant."""

    name: ClassVar[str] = "free_shift"
    layer = ShiftLayer
    rank: int = Field(16, ge=1, le=4096, description="r.")


@options
class OnlyShift(FreeDiag):
    """A constant."""

    name: ClassVar[str] = "only_shift"
    layer = OnlyShiftLayer
    rank: int = Field(83, ge=1, le=4096, description="r.")


@options
class ShiftQO(OnlyShift):
    """A constant, where it does not drop out: one of keys does, one of values is one of outputs."""

    name: ClassVar[str] = "shift_qo"
    targets: Annotated[tuple[str, ...], from_list] = ("q", "o")
    rank: int = Field(166, ge=1, le=4096, description="r.")


@options
class DiagQO(FreeDiag):
    """Diagonal cores of queries and outputs."""

    name: ClassVar[str] = "diag_qo"
    targets: Annotated[tuple[str, ...], from_list] = ("q", "o")
    rank: int = Field(41, ge=1, le=4096, description="r.")


@options
class DiagShiftQO(FreeShift):
    """Diagonal cores and a constant, of queries and outputs."""

    name: ClassVar[str] = "diag_shift_qo"
    targets: Annotated[tuple[str, ...], from_list] = ("q", "o")
    rank: int = Field(33, ge=1, le=4096, description="r.")


@options
class GainShiftQO(FreeShift):
    """Singular values, the same in all subbands, and a constant, of queries and outputs."""

    name: ClassVar[str] = "gain_shift_qo"
    form = "gains"
    targets: Annotated[tuple[str, ...], from_list] = ("q", "o")
    rank: int = Field(83, ge=1, le=4096, description="r.")


@options
class FreeOrthonormal(_Free):
    """`K_s` free between orthonormal bases."""

    name: ClassVar[str] = "free_orthonormal"
    form, spread = "full", False
    rank: int = Field(5, ge=1, le=4096, description="r.")


class BandGainShiftLayer(ShiftLayer):
    """`K_s = a_s diag(g)`, `a` a number for each subband, and a constant."""

    core_names = frozenset({"free", "shift", "band"})

    def __init__(self, target: Target, tokens: Tokens, **low_rank: Any) -> None:
        super().__init__(target, tokens, **low_rank)
        self.band = nn.Parameter(torch.ones(self.groups, self.count))

    def cores(self) -> Tensor:
        """Return `K_s`."""
        return torch.diag_embed(self.free * self.band[:, :, None])


@options
class BandGainShiftQO(SubbandMethod):
    """Singular values, a number for each subband, and a constant, of queries and outputs."""

    name: ClassVar[str] = "band_gain_shift_qo"
    summary: ClassVar[str] = "cores train in the SVD basis"
    rates: ClassVar[Mapping[str, float]] = {"core": 5e-2, "head": 2e-3}
    targets: Annotated[tuple[str, ...], from_list] = ("q", "o")
    rank: int = Field(81, ge=1, le=4096, description="r.")

    def build(self, model: nn.Module, targets: Sequence[Target]) -> list[LinearAdapter]:
        """Return a layer for each target."""
        tokens = self.tokens(model)
        return [
            BandGainShiftLayer(t, tokens, form="gains", spread=True, rank=self.rank,
                               scale=self.scaling)
            for t in targets
        ]  # fmt: skip


class TinyShiftLayer(TinyWaRALayer):
    """Tiny-WaRA and a constant beside it, in the basis of the weight at a rank of its own."""

    core_names = frozenset({"vector", "shift"})

    def __init__(self, target: Target, tokens: Tokens, *, wide: int, **rest: Any) -> None:
        super().__init__(target, tokens, **rest)
        _, up = truncated_svd(target.linear.weight, self.rows[:1], wide)
        self.register_buffer("basis", up)
        self.shift = nn.Parameter(torch.zeros(wide))

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Return `[b, n, o]`."""
        start, stop = self.rows[0]
        constant = F.pad(self.basis @ self.shift, (start, self.out_features - stop))
        return super().forward(x, weight, bias) + constant.to(x.dtype)


@options
class TinyShift(TinyWaRA):
    """Tiny-WaRA and a constant of queries and outputs."""

    name: ClassVar[str] = "tiny_shift"
    wide: int = Field(102, ge=1, le=4096, description="Rank of the constant.")

    def build(self, model: nn.Module, targets: Sequence[Target]) -> list[LinearAdapter]:
        """Return a layer for each target."""
        return [
            TinyShiftLayer(
                target, Tokens(layer.mixer, layer.prefix_tokens, layer.prefix), wide=self.wide,
                vector=layer.vector, bases=layer.bases, rank=self.rank, scale=self.scaling,
            )
            for target, layer in zip(targets, super().build(model, targets), strict=True)
        ]  # fmt: skip


class NormLayer(AdapterLayer):
    """Gains of the subbands of normalised patch tokens: `y = Σ_s γ_s ⊙ P_s LN(x) + β`."""

    core_names = frozenset({"gain", "shift"})

    def __init__(self, width: int, tokens: Tokens, bands: int) -> None:
        super().__init__()
        self.mixer, self.prefix_tokens, self.groups = tokens.mixer, tokens.prefix_tokens, bands
        self.gain = nn.Parameter(torch.zeros(bands, width))
        self.shift = nn.Parameter(torch.zeros(width))

    def forward(self, base: nn.Module, x: Tensor) -> Tensor:
        """Return the normalised tokens with their update."""
        y = base(x)
        prefix = y.shape[1] - self.mixer.tokens
        gain = 1 + self.gain.to(y.dtype)
        if self.groups == 1:
            return y * gain[0] + self.shift.to(y.dtype)
        coarse = self.mixer.sizes[0]
        with torch.autocast(y.device.type, enabled=False):
            patches = y[:, prefix:].float()
            low = self.mixer.synthesis[:, :coarse] @ (self.mixer.analysis[:coarse] @ patches)
        patches = gain[0] * low.to(y.dtype) + gain[1] * (patches - low).to(y.dtype)
        return torch.cat([y[:, :prefix] * gain[0], patches], 1) + self.shift.to(y.dtype)


@options
class Norms(SubbandMethod):
    """Gains of LL and of the details after `norm1` (and `norm2`) of the blocks; a shift beside."""

    name: ClassVar[str] = "band_norms"
    summary: ClassVar[str] = "gains of subbands of normalised tokens"
    rates: ClassVar[Mapping[str, float]] = {"core": 2e-2, "head": 2e-3}
    knob: ClassVar[tuple[str, ...]] = ()
    bands: ClassVar[int] = 2
    places: ClassVar[tuple[str, ...]] = ("norm1",)

    def layers(self, model: nn.Module) -> Mapping[str, AdapterLayer]:
        """Return a layer for each norm."""
        names, tokens = block_names(model), self.tokens(model)
        paths = [f"{names[i]}.{place}" for i in block_indices(self.blocks, len(names))
                 for place in self.places]  # fmt: skip
        widths = [model.get_submodule(path).normalized_shape[0] for path in paths]
        return {p: NormLayer(w, tokens, self.bands) for p, w in zip(paths, widths, strict=True)}


@options
class NormsBoth(Norms):
    """Plain gain and shift after both norms, without subbands."""

    name: ClassVar[str] = "plain_norms"
    bands = 1
    places = ("norm1", "norm2")


# -- the first version -----------------------------------------------------------------------------


class ChannelLayer(WeightDomainLayer):
    """`ΔW = H_oᵀ (I₂ ⊗ B A) H_d = B A ⊗ I₂`, `H` the Haar transform of channel pairs."""

    def __init__(self, target: Target, *, rank: int, scale: float) -> None:
        super().__init__(target.rows, target.linear.out_features)
        self.scale, self.width = scale, target.linear.in_features
        self.down = nn.ParameterList(torch.empty(rank, d // 2) for _, d in target.shapes)
        self.up = nn.ParameterList(torch.zeros(o // 2, rank) for o, _ in target.shapes)
        for down in self.down:
            nn.init.kaiming_uniform_(down, a=5**0.5)

    def delta_weight(self) -> Tensor:
        """Return `[o, d]`."""
        out = self.up[0].new_zeros(self.out_features, self.width)
        for (start, stop), up, down in zip(self.rows, self.up, self.down, strict=True):
            out[start:stop] = self.scale * torch.kron(up @ down, torch.eye(2, device=up.device))
        return out

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Return `[b, n, o]`."""
        return F.linear(x, weight + self.delta_weight().to(weight.dtype), bias)


@options
class V1(LoRA):
    """One low-rank pair for both halves of the channels."""

    name: ClassVar[str] = "wara_v1"

    def build(self, model: nn.Module, targets: Sequence[Target]) -> list[LinearAdapter]:
        """Return a layer for each target."""
        return [ChannelLayer(t, rank=self.rank, scale=self.scaling) for t in targets]
