"""Baselines: six methods through Hugging Face PEFT, and two that train parts of the base.

The six need the extra `baselines`; PEFT is imported when one of them meets a model. BitFit and
LN-tuning need nothing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from timm.layers import RmsNorm
from torch import Tensor, nn

from wara.adapters.base import AdapterLayer, Method, require
from wara.adapters.lora import check_low_rank
from wara.adapters.peft_layers import (
    ADAPTER,
    AdaLoRALayer,
    Allocation,
    BorrowedRows,
    DoRALayer,
    FourierFTLayer,
    PeftLayer,
    peft_library,
)
from wara.adapters.targets import Target, TargetedMethod, adapted_layers
from wara.errors import suggest

Groups = list[list[Any]]
NORMS = (nn.LayerNorm, nn.RMSNorm, RmsNorm)


@dataclass(frozen=True, kw_only=True)
class PeftMethod(TargetedMethod):
    """A method whose layers PEFT builds, one per adapted matrix.

    A fused query-key-value layer counts as three matrices when `q`, `k` and `v` are targets, as in
    our own methods, and as one when `qkv` is.
    """

    draws: ClassVar[bool] = False

    def config(self, peft: Any) -> Any:
        """Return PEFT's options, without targets."""
        raise TypeError(f"{type(self).__name__} does not define config")

    def build(self, model: nn.Module, targets: list[Target]) -> list[AdapterLayer]:
        """Return one layer per target, with what PEFT makes of its row groups.

        Raises:
            WaraError: kind `config` when PEFT is not installed or an option exceeds a matrix.
        """
        peft = peft_library()
        self.check_matrices(
            [(stop - start, t.linear.in_features) for t in targets for start, stop in t.rows]
        )
        config = self.config(peft)
        config.target_modules = r"\d+\.\d+"
        box = nn.ModuleList(
            nn.ModuleList(BorrowedRows(target.linear, rows) for rows in target.rows)
            for target in targets
        )
        # PEFT asks for the device of the first parameter of what it is given.
        box.register_parameter("anchor", nn.Parameter(targets[0].linear.weight.new_empty(0)))
        tuner = peft.get_peft_model(box, config, adapter_name=ADAPTER).base_model
        groups = [list(group) for group in box.children() if isinstance(group, nn.ModuleList)]
        return self.wrap(targets, groups, tuner)

    def check_matrices(self, shapes: list[tuple[int, int]]) -> None:
        """Refuse options that do not fit matrices of shapes `(o, d)`."""

    def wrap(
        self, targets: list[Target], groups: list[list[Any]], tuner: Any
    ) -> list[AdapterLayer]:
        """Return one layer per target from the PEFT layers of its row groups."""
        return [
            PeftLayer(target, group, draws=self.draws)
            for target, group in zip(targets, groups, strict=True)
        ]


@dataclass(frozen=True, kw_only=True)
class DoRA(PeftMethod):
    """DoRA (arXiv 2402.09353): LoRA for the direction of each row, a magnitude of its own.

    Args:
        rank: `r`.
        alpha: `α`; none means `α = r`, a scale of 1.
        dropout: probability of dropping an input entry on the adapter's path.
    """

    name: ClassVar[str] = "dora"
    summary: ClassVar[str] = "low-rank update of the direction of the weight, and its magnitude"
    lr: ClassVar[float] = 6e-3
    draws: ClassVar[bool] = True

    rank: int = 4
    alpha: float | None = None
    dropout: float = 0.0

    def __post_init__(self) -> None:
        """Check the options."""
        super().__post_init__()
        check_low_rank(self.rank, self.alpha, self.dropout)

    def config(self, peft: Any) -> Any:
        """Return PEFT's options, without targets."""
        return peft.LoraConfig(
            r=self.rank,
            lora_alpha=self.rank if self.alpha is None else self.alpha,
            lora_dropout=self.dropout,
            use_dora=True,
        )

    def wrap(
        self, targets: list[Target], groups: list[list[Any]], tuner: Any
    ) -> list[AdapterLayer]:
        """Return one layer per target from the PEFT layers of its row groups."""
        return [
            DoRALayer(target, group, draws=self.draws)
            for target, group in zip(targets, groups, strict=True)
        ]


@dataclass(frozen=True, kw_only=True)
class AdaLoRA(PeftMethod):
    """AdaLoRA (arXiv 2303.10512): `ΔW = B diag(e) A`; ranks go where they matter most.

    Every matrix starts at `init_rank`. As training goes on, the least important ranks of the whole
    model are taken away until the mean is `rank`; PEFT's allocator decides, called in each step.

    Args:
        rank: mean rank at the end.
        init_rank: rank of every matrix at the start; none means 1.5 times `rank`.
        alpha: `α`; none means a scale of 1.
        dropout: probability of dropping an input entry on the adapter's path.
        tinit: share of the steps before ranks begin to fall.
        tfinal: share of the steps after the last rank has fallen.
        delta_t: steps between two allocations.
        beta1: decay of the running mean of importance.
        beta2: decay of the running mean of its uncertainty.
        orth_reg_weight: weight of `‖AAᵀ - I‖ + ‖BᵀB - I‖` in the loss.
    """

    name: ClassVar[str] = "adalora"
    summary: ClassVar[str] = "low-rank update whose ranks move to the layers that need them"
    lr: ClassVar[float] = 2e-2
    draws: ClassVar[bool] = True

    rank: int = 4
    init_rank: int | None = None
    alpha: float | None = None
    dropout: float = 0.0
    tinit: float = 0.1
    tfinal: float = 0.3
    delta_t: int = 10
    beta1: float = 0.85
    beta2: float = 0.85
    orth_reg_weight: float = 0.5

    def __post_init__(self) -> None:
        """Check the options."""
        super().__post_init__()
        check_low_rank(self.rank, self.alpha, self.dropout)
        more = f"set more than rank, {self.rank}, or null"
        require(self.start_rank > self.rank, f"init_rank is {self.init_rank}", "init_rank", more)
        for key in ("tinit", "tfinal"):
            share = getattr(self, key)
            require(0 <= share < 1, f"{key} is {share}", key, "set a share of the steps in [0, 1)")
        fits = self.tinit + self.tfinal < 1
        require(fits, "no step is left to take ranks away in", "tfinal", "lower tinit or tfinal")
        require(self.delta_t >= 1, f"delta_t is {self.delta_t}", "delta_t", "set 1 or more")
        for key in ("beta1", "beta2"):
            beta = getattr(self, key)
            require(0 < beta < 1, f"{key} is {beta}", key, "set a number between 0 and 1")
        weight = self.orth_reg_weight
        require(weight >= 0, f"orth_reg_weight is {weight}", "orth_reg_weight", "set 0 or more")

    @property
    def start_rank(self) -> int:
        """Rank of every matrix at the start."""
        return math.ceil(1.5 * self.rank) if self.init_rank is None else self.init_rank

    def config(self, peft: Any) -> Any:
        """Return PEFT's options, without targets; the length of training comes in `on_step`."""
        return peft.AdaLoraConfig(
            target_r=self.rank,
            init_r=self.start_rank,
            lora_alpha=self.start_rank if self.alpha is None else self.alpha,
            lora_dropout=self.dropout,
            deltaT=self.delta_t,
            beta1=self.beta1,
            beta2=self.beta2,
            orth_reg_weight=self.orth_reg_weight,
            total_step=2,
        )

    def wrap(
        self, targets: list[Target], groups: list[list[Any]], tuner: Any
    ) -> list[AdapterLayer]:
        """Return one layer per target, all with the same allocator."""
        allocation = Allocation(tuner)
        return [
            AdaLoRALayer(target, group, allocation=allocation, draws=self.draws)
            for target, group in zip(targets, groups, strict=True)
        ]

    def penalty(self, model: nn.Module) -> Tensor | None:
        """Return PEFT's orthogonality term: the mean of `‖AAᵀ - I‖` and `‖BᵀB - I‖`, weighted."""
        layers = _adalora_layers(model)
        if not self.orth_reg_weight or not layers:
            return None
        tuners: list[Any] = [tuner for layer in layers for tuner in layer.tuners]
        device = tuners[0].lora_A[ADAPTER].device
        with torch.autocast(device.type, enabled=False):
            downs = [tuner.lora_A[ADAPTER] for tuner in tuners]
            ups = [tuner.lora_B[ADAPTER].T for tuner in tuners]
            grams = torch.stack([rows @ rows.T for rows in (*downs, *ups)])
            identity = torch.eye(grams.shape[-1], dtype=grams.dtype, device=device)
            return self.orth_reg_weight * (grams - identity).norm(dim=(1, 2)).mean()

    def on_step(self, model: nn.Module, step: int, total_steps: int) -> None:
        """Let PEFT's allocator weigh the ranks and take away what the schedule says."""
        _adalora_layers(model)[0].allocation.step(
            step, total_steps, start=self.tinit, end=self.tfinal
        )

    def training_state(self, model: nn.Module) -> dict[str, Tensor]:
        """Return the allocator's running means and the ranks it has kept."""
        return _adalora_layers(model)[0].allocation.state()

    def load_training_state(self, model: nn.Module, state: dict[str, Tensor]) -> None:
        """Go on from what `training_state` returned."""
        _adalora_layers(model)[0].allocation.load(state)


def _adalora_layers(model: nn.Module) -> list[AdaLoRALayer]:
    adapters = (layer.adapter for layer in adapted_layers(model).values())
    return [adapter for adapter in adapters if isinstance(adapter, AdaLoRALayer)]


def allocated_ranks(model: nn.Module) -> dict[str, list[int]]:
    """Return the ranks that AdaLoRA has left in each layer.

    Args:
        model: a model adapted with `AdaLoRA`, after at least one step.

    Returns:
        By layer, one rank per row group; empty for other methods.
    """
    return {
        name: layer.adapter.ranks()
        for name, layer in adapted_layers(model).items()
        if isinstance(layer.adapter, AdaLoRALayer)
    }


@dataclass(frozen=True, kw_only=True)
class VeRA(PeftMethod):
    """VeRA (arXiv 2310.11454): `ΔW = diag(b) B diag(d) A` with `A`, `B` random, frozen and shared.

    One `A [r, max d]` and one `B [max o, r]` serve all layers, which take the part they need. Both
    are stored in the adapter file, once.

    Args:
        rank: `r`; larger than LoRA's, for a layer trains only `o + r` numbers.
        d_initial: value of `d` at the start; `b` starts at 0.
        dropout: probability of dropping an input entry on the adapter's path.
        seed: draws `A` and `B`.
    """

    name: ClassVar[str] = "vera"
    summary: ClassVar[str] = "two scaling vectors per layer around shared random matrices"
    lr: ClassVar[float] = 1.5e-2
    draws: ClassVar[bool] = True

    rank: int = 256
    d_initial: float = 0.1
    dropout: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the options."""
        super().__post_init__()
        check_low_rank(self.rank, None, self.dropout)
        require(self.d_initial != 0, "d_initial is 0", "d_initial", "set another number")

    def config(self, peft: Any) -> Any:
        """Return PEFT's options, without targets."""
        return peft.VeraConfig(
            r=self.rank,
            d_initial=self.d_initial,
            vera_dropout=self.dropout,
            projection_prng_key=self.seed,
            save_projection=True,
        )


@dataclass(frozen=True, kw_only=True)
class LoHa(PeftMethod):
    """LoHa (arXiv 2108.06098): `ΔW = (α/r) (B₁A₁) ⊙ (B₂A₂)`, of rank up to `r²`.

    Args:
        rank: `r` of each of the two products.
        alpha: `α`; none means `α = r`, a scale of 1.
    """

    name: ClassVar[str] = "loha"
    summary: ClassVar[str] = "entrywise product of two low-rank updates"
    lr: ClassVar[float] = 6e-3

    rank: int = 4
    alpha: float | None = None

    def __post_init__(self) -> None:
        """Check the options."""
        super().__post_init__()
        check_low_rank(self.rank, self.alpha, 0.0)

    def config(self, peft: Any) -> Any:
        """Return PEFT's options, without targets."""
        return peft.LoHaConfig(r=self.rank, alpha=self.rank if self.alpha is None else self.alpha)


@dataclass(frozen=True, kw_only=True)
class LoKr(PeftMethod):
    """LoKr (arXiv 2309.14859): `ΔW = (α/r) C ⊗ D`, the larger factor of low rank.

    Args:
        rank: `r` of `D`, and of `C` with `decompose_both`; a factor too small for it is full.
        alpha: `α`; none means `α = r`, a scale of 1.
        decompose_both: write `C` as a product too.
        decompose_factor: rows and columns of `C`, or the nearest below that divide the matrix; -1
            splits as evenly as possible.
    """

    name: ClassVar[str] = "lokr"
    summary: ClassVar[str] = "Kronecker product of a small and a low-rank matrix"
    lr: ClassVar[float] = 2e-2

    rank: int = 4
    alpha: float | None = None
    decompose_both: bool = False
    decompose_factor: int = -1

    def __post_init__(self) -> None:
        """Check the options."""
        super().__post_init__()
        check_low_rank(self.rank, self.alpha, 0.0)
        factor = self.decompose_factor
        valid = factor == -1 or factor >= 1
        remedy = "set 1 or more, or -1"
        require(valid, f"decompose_factor is {factor}", "decompose_factor", remedy)

    def config(self, peft: Any) -> Any:
        """Return PEFT's options, without targets."""
        return peft.LoKrConfig(
            r=self.rank,
            alpha=self.rank if self.alpha is None else self.alpha,
            decompose_both=self.decompose_both,
            decompose_factor=self.decompose_factor,
        )


@dataclass(frozen=True, kw_only=True)
class FourierFT(PeftMethod):
    """FourierFT (arXiv 2405.03003): `ΔW = scaling · Re IDFT2(C)`, `C` zero but for `n` entries.

    Args:
        n_frequency: trained entries of `C` per matrix, at random places.
        scaling: factor on the inverse transform, which divides by `d o`.
        init: `zero` starts as the base model; `gaussian` as in the paper, N(0, 1).
        seed: draws the places, the same for matrices of one shape; stored in the adapter file.
    """

    name: ClassVar[str] = "fourierft"
    summary: ClassVar[str] = "a few Fourier coefficients of the weight update"
    lr: ClassVar[float] = 5e-2

    n_frequency: int = 1000
    scaling: float = 150.0
    init: str = "zero"
    seed: int = 777

    def __post_init__(self) -> None:
        """Check the options."""
        super().__post_init__()
        n = self.n_frequency
        require(n >= 1, f"n_frequency is {n}", "n_frequency", "set 1 or more")
        require(self.scaling > 0, f"scaling is {self.scaling}", "scaling", "set a number above 0")
        known = self.init in ("zero", "gaussian")
        require(known, f"init is {self.init!r}", "init", suggest(self.init, ("zero", "gaussian")))

    def check_matrices(self, shapes: list[tuple[int, int]]) -> None:
        """Refuse more coefficients than a matrix has."""
        most = min(o * d for o, d in shapes)
        what = f"n_frequency is {self.n_frequency}, and a matrix has {most} entries"
        require(self.n_frequency <= most, what, "n_frequency", f"set at most {most}")

    def config(self, peft: Any) -> Any:
        """Return PEFT's options, without targets."""
        return peft.FourierFTConfig(
            n_frequency=self.n_frequency,
            scaling=self.scaling,
            init_weights=self.init == "zero",
            random_loc_seed=self.seed,
        )

    def wrap(
        self, targets: list[Target], groups: list[list[Any]], tuner: Any
    ) -> list[AdapterLayer]:
        """Return one layer per target from the PEFT layers of its row groups."""
        return [
            FourierFTLayer(target, group, draws=self.draws)
            for target, group in zip(targets, groups, strict=True)
        ]


@dataclass(frozen=True, kw_only=True)
class BitFit(Method):
    """BitFit (arXiv 2106.10199): train every bias of the base; the trained model is plain."""

    name: ClassVar[str] = "bitfit"
    summary: ClassVar[str] = "every bias of the base trains"
    lr: ClassVar[float] = 6e-3
    reversible: ClassVar[bool] = True

    def trains(self, name: str, owner: nn.Module) -> bool:
        """Return true for biases; timm's EVA and BEiT name those of a fused layer `q_bias`."""
        leaf = name.rpartition(".")[-1]
        return leaf == "bias" or leaf.endswith("_bias")


@dataclass(frozen=True, kw_only=True)
class LNTuning(Method):
    """LN-tuning (arXiv 2312.11420): train every layer normalisation; the trained model is plain."""

    name: ClassVar[str] = "ln_tuning"
    summary: ClassVar[str] = "scale and shift of every layer normalisation train"
    lr: ClassVar[float] = 2e-2
    reversible: ClassVar[bool] = True

    def trains(self, name: str, owner: nn.Module) -> bool:
        """Return true for the parameters of LayerNorm and RMSNorm."""
        return isinstance(owner, NORMS)
