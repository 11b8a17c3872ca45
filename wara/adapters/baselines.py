"""Baselines: six methods through Hugging Face PEFT, and two that train parts of the base.

The six need the extra `baselines`; PEFT is imported when one of them meets a model. BitFit and
LN-tuning need nothing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from timm.layers import RmsNorm
from torch import Tensor, nn

from wara.adapters.base import LinearAdapter, Method, adapted_layers, options, require
from wara.adapters.lora import MOST_ALPHA, MOST_RANK, InputDropout, LowRankMethod, full_rank
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
from wara.adapters.targets import MOST_NUMBERS, Target, TargetedMethod
from wara.memory import check_memory
from wara.schema import NotZero, fault

NORMS = (nn.LayerNorm, nn.RMSNorm, RmsNorm)


@options
class PeftMethod(TargetedMethod):
    """A method whose layers PEFT builds, one per adapted matrix.

    A fused query-key-value layer counts as three matrices when `q`, `k` and `v` are targets, as in
    our own methods, and as one when `qkv` is.
    """

    draws: ClassVar[bool] = False
    layer: ClassVar[type[PeftLayer]] = PeftLayer

    def config(self, peft: Any) -> Any:
        """Return PEFT's options, without targets."""
        raise TypeError(f"{type(self).__name__} does not define config")

    def build(self, model: nn.Module, targets: Sequence[Target]) -> list[LinearAdapter]:
        """Return one layer per target, with what PEFT makes of its row groups.

        Raises:
            WaraError: kind `config` when PEFT is not installed or an option exceeds a matrix.
        """
        peft = peft_library()
        self.check_matrices([shape for target in targets for shape in target.shapes])
        config = self.config(peft)
        config.target_modules = r"\d+\.\d+"
        # PEFT draws with generators of its own on the CPU, and puts tensors where the layer is.
        with torch.device("cpu"):
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
        self, targets: Sequence[Target], groups: list[list[Any]], tuner: Any
    ) -> list[LinearAdapter]:
        """Return one layer per target from the PEFT layers of its row groups."""
        return [
            self.layer(target, group, draws=self.draws)
            for target, group in zip(targets, groups, strict=True)
        ]


@options
class DoRA(InputDropout, LowRankMethod, PeftMethod):
    """DoRA (arXiv 2402.09353): LoRA for the direction of each row, a magnitude of its own."""

    name: ClassVar[str] = "dora"
    summary: ClassVar[str] = "low-rank update of the direction of the weight, and its magnitude"
    rates: ClassVar[Mapping[str, float]] = {"adapter": 6e-3, "head": 2e-3}
    draws: ClassVar[bool] = True
    layer: ClassVar[type[PeftLayer]] = DoRALayer

    def config(self, peft: Any) -> Any:
        """Return PEFT's options, without targets."""
        return peft.LoraConfig(
            r=self.rank,
            lora_alpha=self.rank if self.alpha is None else self.alpha,
            lora_dropout=self.dropout,
            use_dora=True,
        )


@options
class AdaLoRA(InputDropout, LowRankMethod, PeftMethod):
    """AdaLoRA (arXiv 2303.10512): `ΔW = B diag(e) A`; ranks go where they matter most.

    Every matrix starts at `init_rank`. As training goes on, the least important ranks of the whole
    model are taken away until the mean is `rank`; PEFT's allocator decides, called in each step.
    """

    name: ClassVar[str] = "adalora"
    summary: ClassVar[str] = "low-rank update whose ranks move to the layers that need them"
    rates: ClassVar[Mapping[str, float]] = {"adapter": 2e-2, "head": 2e-3}
    # The paper starts at 1.5 times the rank it ends with, and the start is what trains.
    knob: ClassVar[tuple[str, ...]] = ("init_rank", "rank")
    draws: ClassVar[bool] = True

    rank: int = Field(4, ge=1, le=MOST_RANK, description="Mean rank at the end.")
    init_rank: int | None = Field(
        None, ge=2, le=2 * MOST_RANK, description="Rank at the start; null: 1.5 times rank."
    )
    alpha: float | None = Field(
        None, gt=0, le=MOST_ALPHA,
        description="The update is scaled by alpha / rank at the start; null: by 1.",
    )
    tinit: float = Field(0.1, ge=0, lt=1, description="Share of the steps before ranks fall.")
    tfinal: float = Field(0.3, ge=0, lt=1, description="Share of the steps after the last fall.")
    delta_t: int = Field(10, ge=1, le=1_000_000, description="Steps between two allocations.")
    beta1: float = Field(0.85, gt=0, lt=1, description="Decay of the mean of importance.")
    beta2: float = Field(0.85, gt=0, lt=1, description="Decay of the mean of its uncertainty.")
    orth_reg_weight: float = Field(
        0.5, ge=0, le=1e6, description="Weight of the orthogonality of A and B in the loss."
    )

    @model_validator(mode="after")
    def _ranks_and_steps_fit(self) -> AdaLoRA:
        if self.start_rank <= self.rank:
            remedy = f"set more than rank, {self.rank}, or null"
            raise fault(f"init_rank is {self.init_rank}", remedy, "init_rank")
        if self.tinit + self.tfinal >= 1:
            remedy = "lower tinit or tfinal"
            raise fault("no step is left to take ranks away in", remedy, "tfinal")
        return self

    @property
    def start_rank(self) -> int:
        """Rank of every matrix at the start."""
        return math.ceil(1.5 * self.rank) if self.init_rank is None else self.init_rank

    def knob_range(self, targets: Sequence[Target]) -> tuple[int, int | None]:
        """Return 2, the least rank from which one can be taken away, and the shortest side."""
        return 2, full_rank(targets)

    def check_matrices(self, shapes: list[tuple[int, int]]) -> None:
        """Refuse a rank that no matrix can have."""
        most = min(side for shape in shapes for side in shape)
        what = f"the rank starts at {self.start_rank}, above {most}, the shorter side of a matrix"
        require(self.start_rank <= most, what, "init_rank", f"set init_rank to {most} or less")

    def turned(self, value: int) -> AdaLoRA:
        """Return the method that starts at a rank, and ends at two thirds of it."""
        end = max(1, min(value - 1, round(value / 1.5)))
        return replace(self, init_rank=value, rank=end)

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
        self, targets: Sequence[Target], groups: list[list[Any]], tuner: Any
    ) -> list[LinearAdapter]:
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


@options
class VeRA(InputDropout, PeftMethod):
    """VeRA (arXiv 2310.11454): `ΔW = diag(b) B diag(d) A` with `A`, `B` random, frozen and shared.

    One `A [r, max d]` and one `B [max o, r]` serve all layers, which take the part they need. Both
    are stored in the adapter file, once. The rank is larger than LoRA's, for a layer trains only
    `o + r` numbers.
    """

    name: ClassVar[str] = "vera"
    summary: ClassVar[str] = "two scaling vectors per layer around shared random matrices"
    rates: ClassVar[Mapping[str, float]] = {"adapter": 1.5e-2, "head": 2e-3}
    knob: ClassVar[tuple[str, ...]] = ("rank",)
    draws: ClassVar[bool] = True

    rank: int = Field(256, ge=1, le=1_000_000, description="Rank r of the random matrices.")
    d_initial: Annotated[float, NotZero] = Field(
        0.1, ge=-1e6, le=1e6, description="Value of d at the start; b starts at 0."
    )
    seed: int = Field(0, ge=0, lt=2**63, description="Draws the matrices, which are stored.")

    def check_matrices(self, shapes: list[tuple[int, int]]) -> None:
        """Refuse random matrices that do not fit into memory."""
        wide, high = max(d for _, d in shapes), max(o for o, _ in shapes)
        needed = 4 * self.rank * (wide + high)
        check_memory(needed, "the random matrices", "adapter.rank", "lower adapter.rank")

    def config(self, peft: Any) -> Any:
        """Return PEFT's options, without targets."""
        return peft.VeraConfig(
            r=self.rank,
            d_initial=self.d_initial,
            vera_dropout=self.dropout,
            projection_prng_key=self.seed,
            save_projection=True,
        )


@options
class LoHa(LowRankMethod, PeftMethod):
    """LoHa (arXiv 2108.06098): `ΔW = (α/r) (B₁A₁) ⊙ (B₂A₂)`, of rank up to `r²`."""

    name: ClassVar[str] = "loha"
    summary: ClassVar[str] = "entrywise product of two low-rank updates"
    rates: ClassVar[Mapping[str, float]] = {"adapter": 6e-3, "head": 2e-3}

    rank: int = Field(4, ge=1, le=MOST_RANK, description="Rank r of each of the two products.")

    def config(self, peft: Any) -> Any:
        """Return PEFT's options, without targets."""
        return peft.LoHaConfig(r=self.rank, alpha=self.rank if self.alpha is None else self.alpha)


@options
class LoKr(LowRankMethod, PeftMethod):
    """LoKr (arXiv 2309.14859): `ΔW = (α/r) C ⊗ D`, the larger factor of low rank."""

    name: ClassVar[str] = "lokr"
    summary: ClassVar[str] = "Kronecker product of a small and a low-rank matrix"
    rates: ClassVar[Mapping[str, float]] = {"adapter": 2e-2, "head": 2e-3}

    rank: int = Field(4, ge=1, le=MOST_RANK, description="Rank of D, and of C with decompose_both.")
    decompose_both: bool = Field(False, description="Write C as a product too.")
    decompose_factor: Annotated[int, NotZero] = Field(
        -1, ge=-1, le=MOST_RANK, description="Rows and columns of C; -1 splits evenly."
    )

    def forms(self) -> Sequence[TargetedMethod]:
        """Return the factors to choose from where none is set.

        Automatic factors split a matrix so evenly that no rank reaches a usual budget.
        """
        factors = (-1, 16, 8, 4, 2) if self.decompose_factor == -1 else (self.decompose_factor,)
        return [replace(self, decompose_factor=factor) for factor in factors]

    def knob_range(self, targets: Sequence[Target]) -> tuple[int, int | None]:
        """Return 1, and the rank from which the larger factor of a matrix is full."""
        sides = [side for target in targets for shape in target.shapes for side in shape]
        return 1, max(1, max(math.ceil(self._larger(side) / 2) for side in sides))

    def check_rank(self, targets: Sequence[Target]) -> None:
        """Take any: where a rank is above what a factor can have, PEFT trains the factor whole."""

    def _larger(self, side: int) -> int:
        """Return what remains of a side when the factor, or the nearest below, is taken out."""
        wanted = side if self.decompose_factor == -1 else self.decompose_factor
        if self.decompose_factor > 0 and side % self.decompose_factor == 0:
            return side // self.decompose_factor
        small = max(n for n in range(1, math.isqrt(side) + 1) if side % n == 0 and n <= wanted)
        return side // small

    def config(self, peft: Any) -> Any:
        """Return PEFT's options, without targets."""
        return peft.LoKrConfig(
            r=self.rank,
            alpha=self.rank if self.alpha is None else self.alpha,
            decompose_both=self.decompose_both,
            decompose_factor=self.decompose_factor,
        )


@options
class FourierFT(PeftMethod):
    """FourierFT (arXiv 2405.03003): `ΔW = scaling · Re IDFT2(C)`, `C` zero but for `n` entries.

    The inverse transform divides by `d o`. Matrices of one shape have the same places.
    """

    name: ClassVar[str] = "fourierft"
    summary: ClassVar[str] = "a few Fourier coefficients of the weight update"
    rates: ClassVar[Mapping[str, float]] = {"adapter": 5e-2, "head": 2e-3}
    knob: ClassVar[tuple[str, ...]] = ("n_frequency",)
    layer: ClassVar[type[PeftLayer]] = FourierFTLayer

    n_frequency: int = Field(
        1000, ge=1, le=MOST_NUMBERS, description="Trained entries of C per matrix."
    )
    scaling: float = Field(150.0, gt=0, le=1e9, description="Factor on the inverse transform.")
    init: Literal["zero", "gaussian"] = Field(
        "zero", description="Start as the base model, or from N(0, 1) as in the paper."
    )
    seed: int = Field(777, ge=0, lt=2**63, description="Draws the places, which are stored.")

    def knob_range(self, targets: Sequence[Target]) -> tuple[int, int | None]:
        """Return 1, and the entries of the smallest matrix."""
        return 1, min(o * d for target in targets for o, d in target.shapes)

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


@options
class BitFit(Method):
    """BitFit (arXiv 2106.10199): train every bias of the base; the trained model is plain."""

    name: ClassVar[str] = "bitfit"
    summary: ClassVar[str] = "every bias of the base trains"
    rates: ClassVar[Mapping[str, float]] = {"adapter": 6e-3, "head": 2e-3}
    reversible: ClassVar[bool] = True

    def trains(self, name: str, owner: nn.Module) -> bool:
        """Return true for biases; timm's EVA and BEiT name those of a fused layer `q_bias`."""
        leaf = name.rpartition(".")[-1]
        return leaf == "bias" or leaf.endswith("_bias")


@options
class LNTuning(Method):
    """LN-tuning (arXiv 2312.11420): train every layer normalisation; the trained model is plain."""

    name: ClassVar[str] = "ln_tuning"
    summary: ClassVar[str] = "scale and shift of every layer normalisation train"
    rates: ClassVar[Mapping[str, float]] = {"adapter": 2e-2, "head": 2e-3}
    reversible: ClassVar[bool] = True

    def trains(self, name: str, owner: nn.Module) -> bool:
        """Return true for the parameters of LayerNorm and RMSNorm."""
        return isinstance(owner, NORMS)
