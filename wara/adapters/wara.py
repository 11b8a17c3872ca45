"""WaRA and Tiny-WaRA (arXiv 2506.24092 v2): low-rank updates of the subbands of the token grid."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from wara.adapters.base import LinearAdapter, TokenDomainLayer, is_skeleton, options, require
from wara.adapters.lora import (
    MOST_RANK,
    InputDropout,
    LoRALayer,
    LowRankLayer,
    LowRankMethod,
)
from wara.adapters.targets import Target
from wara.errors import WaraError
from wara.memory import check_memory
from wara.schema import from_list
from wara.vit import prefix_count, token_layout
from wara.wavelets import RANDOM, Boundary, GridTransformName, SubbandMixer

PrefixRule = Literal["adapt", "skip"]


@dataclass(frozen=True)
class Tokens:
    """How the tokens of a model lie, and what is done to them; one for all of its layers.

    Args:
        mixer: the transform of the patch grid.
        prefix_tokens: `p`, class and register tokens before the patches.
        prefix: `adapt` gives these the update without a transform, `skip` leaves them alone.
    """

    mixer: SubbandMixer
    prefix_tokens: int
    prefix: str


class SubbandLayer(LowRankLayer, TokenDomainLayer):
    """Shared forward of WaRA and Tiny-WaRA: mix the patch tokens, treat the prefix apart.

    Args:
        target: the linear layer and its row groups.
        tokens: see there.
        **low_rank: `rank`, `scale` and `dropout` of `LowRankLayer`.
    """

    shift: Tensor | None

    def __init__(self, target: Target, tokens: Tokens, **low_rank: Any) -> None:
        super().__init__(target, **low_rank)
        self.mixer = tokens.mixer
        self.prefix_tokens, self.prefix = tokens.prefix_tokens, tokens.prefix
        # A constant in rank space, `[g r]`, added to what is mixed; for forms that have one.
        self.register_parameter("shift", None)

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

        Raises:
            WaraError: kind `config` when the number of tokens does not fit the grid.
        """
        return prefix_count(tokens, self.mixer.grid, self.prefix_tokens)

    def mix(self, z: Tensor) -> Tensor:
        """Update `[b, n, g r]`: patch tokens per subband, prefix tokens by `mix_prefix`."""
        if z.ndim != 3:
            what = f"a layer got input of {z.ndim} dimensions where tokens [b, n, d] are expected"
            raise WaraError("config", what, "backbone.name", "choose a ViT without windows")
        prefix = self.split(z.shape[1])
        z = z.reshape(*z.shape[:2], self.groups, self.rank)
        core = self.cores()
        patches = self.shifted(self.mixer(z[:, prefix:], core).flatten(2))
        if prefix:
            head = z[:, :prefix]
            if self.prefix == "skip":
                head = (head * 0).flatten(2)
            else:
                head = self.shifted(self.mix_prefix(head, core).flatten(2))
            patches = torch.cat([head.to(patches.dtype), patches], dim=1)
        return patches

    def shifted(self, z: Tensor) -> Tensor:
        """Return `z` `[b, n, g r]` with the constant added."""
        return z if self.shift is None else z + self.shift.to(z.dtype)


class WaRALayer(SubbandLayer):
    """WaRA with cores that train: `Δ = (α/r) · IDWT(B K_s A DWT(x)_s)`, in rank space.

    `B` starts at zero and the cores at the identity, so the layer starts as the base layer and
    contains LoRA as the case `K_s = I`.
    """

    core_names = frozenset({"core"})

    def __init__(self, target: Target, tokens: Tokens, *, core: str, **low_rank: Any) -> None:
        super().__init__(target, tokens, **low_rank)
        self.fresh()
        subbands = len(self.mixer.names)
        self.core = nn.Parameter(identity_cores(self.groups, subbands, self.rank, core))

    def cores(self) -> Tensor:
        """Return the trained cores."""
        return self.core

    def merged_weight(self) -> Tensor | None:
        """Return `(α/r) B A` while every core is exactly the identity, else `None`."""
        full = self.full_cores()
        identity = torch.eye(self.rank, dtype=full.dtype, device=full.device)
        same = bool((full == identity).all())
        return self.product() if same and self.prefix == "adapt" else None


class FrozenBasisLayer(SubbandLayer):
    """What forms of Tiny-WaRA share: `A = Σ^½ Vᵀ` and `B = U Σ^½` of the weight, both frozen."""

    def __init__(self, target: Target, tokens: Tokens, **low_rank: Any) -> None:
        super().__init__(target, tokens, **low_rank)
        down, up = truncated_svd(target.linear.weight, self.rows, self.rank)
        self.register_buffer("down", down)
        self.register_buffer("up", up)

    def mix_prefix(self, z: Tensor, core: Tensor) -> Tensor:
        """Treat a prefix token as a constant image, which lives in the LL band alone.

        `B A x` itself, as in WaRA, would not be zero at the start, for `A` and `B` are not.
        """
        with torch.autocast(z.device.type, enabled=False):
            z = z.to(core.dtype)
            if core.ndim == 3:
                return z * core[:, 0]
            return torch.einsum("bpgj,gij->bpgi", z, core[:, 0])

    def merged_weight(self) -> Tensor | None:
        """Return the change of weight while all cores of a group are equal, else `None`."""
        if self.shift is not None and bool((self.shift != 0).any()):
            return None  # a change of the bias as well
        core = self.full_cores()
        same = bool((core == core[:, :1]).all())
        zero = bool((core == 0).all())
        return self.product(core[:, 0]) if same and (zero or self.prefix == "adapt") else None


class TinyWaRALayer(FrozenBasisLayer):
    """Tiny-WaRA with diagonal cores and a constant: `ĉ_s = a_s diag(g) c_s`, and `b` beside it.

    `g` and `b` have a number for each direction of the basis and start at zero, `a` has one for
    each subband and starts at one.
    """

    core_names = frozenset({"gain", "band", "shift"})

    def __init__(self, target: Target, tokens: Tokens, **low_rank: Any) -> None:
        super().__init__(target, tokens, **low_rank)
        self.gain = nn.Parameter(torch.zeros(self.groups, self.rank))
        self.band = nn.Parameter(torch.ones(self.groups, len(self.mixer.names)))
        self.shift = nn.Parameter(torch.zeros(self.groups * self.rank))

    def cores(self) -> Tensor:
        """Return the diagonals of `K_s = a_s diag(g)`, `[g, s, r]`."""
        return self.band[:, :, None] * self.gain[:, None]


class DirectionsLayer(FrozenBasisLayer):
    """Tiny-WaRA with cores of fixed directions: `K_s = Σ_i v_{s,i} Q_i`, trained through `v`.

    Args:
        vector: `v`, shared with other layers when tied; `[g, s, u]` or `[u]`.
        bases: `Q`, `[g, u, r, r]`, or `[g, s, u, r, r]` when `v` is tied across subbands.
    """

    core_names = frozenset({"vector"})

    bases: Tensor

    def __init__(
        self,
        target: Target,
        tokens: Tokens,
        *,
        vector: nn.Parameter,
        bases: Tensor,
        **low_rank: Any,
    ) -> None:
        super().__init__(target, tokens, **low_rank)
        self.register_buffer("bases", bases)
        self.vector = vector

    def cores(self) -> Tensor:
        """Return `K_s = Σ_i v_{s,i} Q_i`, `[g, s, r, r]`."""
        if self.vector.ndim == 1:
            return torch.einsum("u,gsuij->gsij", self.vector, self.bases)
        return torch.einsum("gsu,guij->gsij", self.vector, self.bases)


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
        most = min(stop - start, weight.shape[1])
        require(rank <= most, f"rank {rank} exceeds {most}", "rank", f"set at most {most}")
        if weight.is_meta:
            downs.append(weight.new_empty(rank, weight.shape[1]))
            ups.append(weight.new_empty(stop - start, rank))
            continue
        block = weight.detach()[start:stop].to(torch.float64)
        u, sigma, vh = torch.linalg.svd(block, full_matrices=False)
        u, root, vh = u[:, :rank], sigma[:rank].sqrt(), vh[:rank]
        sign = u.gather(0, u.abs().argmax(0, keepdim=True)).sign()
        downs.append(root[:, None] * vh * sign.T)
        ups.append(u * sign * root)
    return torch.cat(downs).to(weight.dtype), torch.cat(ups).to(weight.dtype)


def identity_cores(groups: int, subbands: int, rank: int, core: str) -> Tensor:
    """Return cores `K_s = I` in the wanted form.

    Args:
        groups: adapted row groups, `g`.
        subbands: `s`.
        rank: `r`.
        core: `scalar`, `diag` or `full`.

    Returns:
        Ones `[g, s]` or `[g, s, r]`, or identities `[g, s, r, r]`.
    """
    if core == "scalar":
        return torch.ones(groups, subbands)
    if core == "diag":
        return torch.ones(groups, subbands, rank)
    return torch.eye(rank).repeat(groups, subbands, 1, 1)


@options
class GridMethod(LowRankMethod):
    """Options of methods that mix the patch tokens over their grid, between two factors."""

    mergeable: ClassVar[bool] = False

    prefix: PrefixRule = Field(
        "adapt", description="Class and register tokens: update without transform, or none."
    )


@options
class SubbandMethod(GridMethod):
    """Options that WaRA and Tiny-WaRA share."""

    wavelet: GridTransformName = Field(
        "haar", description="A discrete wavelet of PyWavelets, or random: a control."
    )
    level: int = Field(1, ge=1, le=16, description="Levels of the transform; the grid bounds it.")
    boundary: Boundary = Field("symmetric", description="How the grid goes on past its border.")

    seed: int = Field(
        0, ge=0, lt=2**63, description="Draws the matrix of wavelet: random from its own stream."
    )

    def tokens(self, model: nn.Module) -> Tokens:
        """Return how the tokens of a model lie, with the transform of its grid."""
        grid, prefix_tokens = token_layout(model)
        if self.wavelet == RANDOM:
            what = f"boundary '{self.boundary}' means nothing to a random transform"
            require(self.boundary == "symmetric", what, "boundary", "leave it out")
        mixer = SubbandMixer(grid, self.wavelet, self.level, self.boundary, self.seed)
        return Tokens(mixer, prefix_tokens, self.prefix)


@options
class WaRA(InputDropout, SubbandMethod):
    """WaRA (arXiv 2506.24092 v2): one low-rank pair for all subbands, one core per subband.

    The cores are this project's reading, for only the abstract could be read; see docs/wara.md.
    With `core="identity"` WaRA equals LoRA on the patch tokens, exactly: the transform acts on
    tokens, `A` and `B` on channels, and the two commute. With `wavelet="random"`, the control, the
    transform is a random orthogonal matrix, see `wara.wavelets.random_transform`.
    """

    name: ClassVar[str] = "wara"
    summary: ClassVar[str] = "low-rank update of the wavelet subbands of the token grid"
    rates: ClassVar[Mapping[str, float]] = {"adapter": 6e-3, "core": 5e-2, "head": 2e-3}

    core: Literal["identity", "scalar", "diag", "full"] = Field(
        "diag", description="Form of the core K_s of a subband; identity is LoRA."
    )

    def learning_rates(self) -> Mapping[str, float]:
        """Return `rates`, without that of the cores where these are fixed."""
        fixed = self.core == "identity"
        return {k: rate for k, rate in self.rates.items() if not (fixed and k == "core")}

    def build(self, model: nn.Module, targets: Sequence[Target]) -> list[LinearAdapter]:
        """Return one layer per target, all with the same transform."""
        tokens = self.tokens(model)
        low_rank: Any = {"rank": self.rank, "scale": self.scaling, "dropout": self.dropout}
        if self.core == "identity" and self.prefix == "adapt":
            # Σ_s P_s = I: without cores there is nothing to transform, and it can be merged.
            return [LoRALayer(target, **low_rank) for target in targets]
        layers: list[LinearAdapter] = []
        for target in targets:
            core = "scalar" if self.core == "identity" else self.core
            layer = WaRALayer(target, tokens, core=core, **low_rank)
            if self.core == "identity":
                # Only the prefix differs from LoRA; the cores stay the identity.
                cores = layer.core.detach()
                del layer.core
                layer.register_buffer("core", cores)
            layers.append(layer)
        return layers


@options
class TinyWaRA(SubbandMethod):
    """Tiny-WaRA (arXiv 2506.24092 v2): a few coefficients in a fixed SVD basis of each weight.

    How they act is this project's reading; see docs/wara.md. By default the singular values train,
    a gain for each subband, and a constant; with `coefficients`, cores are sums of that many
    random directions. Queries and outputs are adapted: a constant of keys drops out of attention,
    and one of values is one of outputs.
    """

    name: ClassVar[str] = "tiny_wara"
    summary: ClassVar[str] = "WaRA with a fixed SVD basis; only a few coefficients train"
    rates: ClassVar[Mapping[str, float]] = {"core": 5e-2, "head": 2e-3}
    knob: ClassVar[tuple[str, ...]] = ("rank", "coefficients")

    targets: Annotated[tuple[str, ...], from_list] = Field(
        ("q", "o"), description="What is adapted: q k v o qkv fc1 fc2, or patterns."
    )
    rank: int = Field(32, ge=1, le=MOST_RANK, description="Rank r of the fixed basis.")
    coefficients: int | None = Field(
        None,
        ge=1,
        le=1_000_000,
        description="Random directions u of a core; null: diagonal cores and a constant.",
    )
    share: Literal["subband", "layer", "model"] = Field(
        "subband", description="What has coefficients of its own; model trains u numbers in all."
    )
    seed: int = Field(
        0, ge=0, lt=2**63, description="Draws the directions, stored; and a random transform."
    )

    @property
    def directions(self) -> int | None:
        """Directions `u` of a core: eight where only what shares them is set; `None` for none."""
        tied = self.share != "subband"
        return 8 if tied and self.coefficients is None else self.coefficients

    def knob_range(self, targets: Sequence[Target]) -> tuple[int, int | None]:
        """Return 1, and the side of a matrix.

        Raises:
            WaraError: kind `config` for a form with directions, which a rank does not size.
        """
        what = f"'{self.name}' with share or coefficients has the size that these give it"
        require(self.directions is None, what, "budget", "leave out the budget, or these")
        return super().knob_range(targets)

    def check_size(self, targets: Sequence[Target], count: int) -> None:
        """Refuse more coefficients than a weight has entries, and directions that do not fit.

        Raises:
            WaraError: kind `config` or `resources`.
        """
        entries = min(o * d for target in targets for o, d in target.shapes)
        what = f"coefficients is {count}, and a matrix has {entries} entries"
        require(count <= entries, what, "coefficients", f"set at most {entries}")
        subbands = 1 if self.share == "subband" else 3 * self.level + 1
        groups = sum(len(target.rows) for target in targets)
        needed = 4 * groups * subbands * count * self.rank**2
        remedy = "lower adapter.coefficients or adapter.rank"
        check_memory(needed, "the fixed directions", "adapter.coefficients", remedy)

    def build(self, model: nn.Module, targets: Sequence[Target]) -> list[LinearAdapter]:
        """Return one layer per target, all with the same transform."""
        tokens, u = self.tokens(model), self.directions
        low_rank: Any = {"rank": self.rank, "scale": self.scaling}
        if u is None:
            return [TinyWaRALayer(target, tokens, **low_rank) for target in targets]
        self.check_size(targets, u)
        generator = torch.Generator().manual_seed(self.seed)
        subbands, r = len(tokens.mixer.names), self.rank
        shared = nn.Parameter(torch.zeros(u)) if self.share == "model" else None
        layers: list[LinearAdapter] = []
        for target in targets:
            groups = len(target.rows)
            # With `v` tied across subbands one Q would make all cores equal, and the transform
            # would drop out of the update; so each subband then gets its own.
            form = (groups, u) if self.share == "subband" else (groups, subbands, u)
            if is_skeleton():
                bases = torch.empty(*form, r, r)
            else:
                bases = torch.randn(*form, r, r, generator=generator) / r**0.5
            if self.share == "subband":
                vector = nn.Parameter(torch.zeros(groups, subbands, u))
            else:
                vector = nn.Parameter(torch.zeros(u)) if shared is None else shared
            layers.append(DirectionsLayer(target, tokens, vector=vector, bases=bases, **low_rank))
        return layers
