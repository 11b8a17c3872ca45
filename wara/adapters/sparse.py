"""WaveFT (arXiv 2505.12532) and SHiRA: a few numbers at fixed random places of each weight."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor, nn

from wara.adapters.base import LinearAdapter, WeightDomainLayer, is_skeleton, options, require
from wara.adapters.sparse_linear import Form, Index, SparseLinear, changed_weight, index_places
from wara.adapters.targets import MOST_NUMBERS, Numbers, Target, TargetedMethod
from wara.errors import WaraError
from wara.schema import NotZero, fault
from wara.wavelets import WaveletName, check_matrix, synthesis_taps

GAUSSIAN = 0.01
"""Standard deviation of the gaussian start; the paper gives none."""

Shape = tuple[int, int]


class SparseLayer(WeightDomainLayer):
    """`ΔW = λ C` or `λ IDWT2(C)` for each row group, `C` zero but for `k` trained numbers.

    Args:
        target: the linear layer and its row groups.
        places: per row group `[2, k]`, row and column of the numbers in `C`. Where the transform
            has more coefficients than entries (odd sides, wavelets longer than Haar), places count
            from the middle of the coefficients, `L/2 - 1` from either edge.
        scale: `λ`.
        wavelet: name of a discrete wavelet, or none for `ΔW = λ C`.

    Raises:
        WaraError: kind `config` for a wavelet longer than a side.
    """

    index_names: ClassVar[tuple[str, ...]] = tuple(f.name for f in dataclasses.fields(Index))

    places: Tensor
    left: Tensor
    right: Tensor

    def __init__(
        self,
        target: Target,
        places: Sequence[Tensor],
        *,
        scale: float,
        wavelet: str | None = None,
    ) -> None:
        linear = target.linear
        super().__init__(target.rows, linear.out_features)
        self.in_features = linear.in_features
        self.scale = scale
        self.wavelet = wavelet
        if wavelet is not None:
            for start, stop in self.rows:
                check_matrix((stop - start, self.in_features), wavelet, target.name)
        bank = synthesis_taps(wavelet) if wavelet is not None else None
        counts = tuple(int(place.shape[1]) for place in places)
        self.form = Form(self.rows, counts, self.in_features, bank)
        self.coefficients = nn.Parameter(torch.zeros(sum(counts)))
        self.register_buffer("places", torch.cat(list(places), 1).to(torch.int32))
        for name in self.index_names:
            self.register_buffer(name, None, persistent=False)
        self.refresh()

    @property
    def _precision(self) -> torch.dtype:
        return torch.promote_types(self.coefficients.dtype, torch.float32)

    def refresh(self) -> None:
        """Follow the places, after they were loaded.

        Raises:
            WaraError: kind `artefact` when a place lies outside its matrix, or occurs twice.
        """
        if self.places.is_meta:
            return
        for (start, stop), place in zip(
            self.rows, self.places.split(list(self.form.counts), 1), strict=True
        ):
            limits = place.new_tensor([[stop - start], [self.in_features]])
            if bool(((place < 0) | (place >= limits)).any()):
                fault = "lies outside"
            elif place.unique(dim=1).shape[1] < place.shape[1]:
                fault = "occurs twice in"
            else:
                continue
            what = f"a place {fault} the {stop - start}x{self.in_features} matrix"
            remedy = "copy the adapter folder again; the file is damaged"
            raise WaraError("artefact", what, "adapter places", remedy)
        index = index_places(self.places, self.form, self._precision)
        for name in self.index_names:
            setattr(self, name, getattr(index, name).to(self.places.device))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SparseLayer:
        before = self.coefficients.dtype
        super()._apply(fn, recurse)
        # `model.to(bfloat16)` must not round the taps, and `model.double()` must sharpen them.
        if self.coefficients.dtype != before:
            self.refresh()
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self.refresh()

    def _index(self) -> tuple[Tensor, ...]:
        return tuple(getattr(self, name) for name in self.index_names)

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Return `x (W0 + ΔW)ᵀ + b`, `[…, o]`, for input `[…, d]`."""
        kind = x.device.type
        low = torch.is_autocast_enabled(kind) and x.dtype != torch.float64
        dtype = torch.get_autocast_dtype(kind) if low else x.dtype
        # Sum and transform in float32 also under autocast; only the product is in low precision.
        with torch.autocast(kind, enabled=False):
            flat = x.to(dtype).reshape(-1, self.in_features)
            values = self.coefficients.to(self._precision) * self.scale
            y = SparseLinear.apply(flat, weight, bias, values, self.form, *self._index())
        return y.reshape(*x.shape[:-1], self.out_features)

    def delta_weight(self) -> Tensor:
        """Return `λ ΔW`, `[o, d]`, zero in rows that are not adapted."""
        values = self.coefficients.to(self._precision) * self.scale
        zero = values.new_zeros(self.out_features, self.in_features)
        return changed_weight(zero, values, Index(*self._index()), self.form, values.dtype)


@lru_cache(maxsize=32)
def draw_places(shape: Shape, count: int, seed: int) -> Tensor:
    """Draw the places of a matrix.

    The draw is that of PEFT's WaveFT and SHiRA, from the shape and the seed alone, so equal
    matrices get equal places and adapters can be exchanged with PEFT, whose files hold no places.

    Args:
        shape: `(o, d)`.
        count: `k`, at most `o d`.
        seed: of the generator.

    Returns:
        int64 `[2, k]`, rows and columns, all different. Shared by all callers: do not write to it.
    """
    generator = torch.Generator().manual_seed(seed)
    # What is kept for all callers must not depend on the context of the first.
    with torch.inference_mode(False), torch.device("cpu"):
        flat = torch.randperm(shape[0] * shape[1], generator=generator)[:count]
        return torch.stack([flat // shape[1], flat % shape[1]])


def allocate(shapes: Sequence[Shape], mean: float, allocation: str) -> list[int]:
    """Spread a budget of `mean` numbers per matrix over matrices.

    Args:
        shapes: `(o, d)` of each.
        mean: numbers per matrix on average.
        allocation: `fixed` gives all the same; `proportional` goes by `d + o`, as LoRA's own size
            does; `area` by `d o`, as PEFT's `proportional_parameters` does.

    Returns:
        `k` of each matrix, rounded.
    """
    weights = {
        "fixed": [1 for _ in shapes],
        "proportional": [o + d for o, d in shapes],
        "area": [o * d for o, d in shapes],
    }[allocation]
    total = mean * len(shapes)
    return [round(total * weight / sum(weights)) for weight in weights]


@options
class SparseMethod(TargetedMethod):
    """Options that WaveFT and SHiRA share.

    Without `k` and without a budget a method takes that of a rank-1 LoRA, `Σ (d + o)` over the
    matrices; `budget: lora_r4`, or a number such as 0.8, takes a multiple of it.
    """

    knob: ClassVar[tuple[str, ...]] = ("k",)

    if TYPE_CHECKING:

        @property
        def scale(self) -> float:
            """The factor λ; each method declares it, as its own rate wants it."""

    k: int | Numbers | None = Field(
        None, description="Trained numbers per matrix, or a list; null: as a LoRA of rank 1."
    )
    allocation: Literal["fixed", "proportional", "area"] = Field(
        "fixed", description="The same k for every matrix, or by d + o, or by d o."
    )
    init: Literal["zero", "gaussian"] = Field(
        "zero", description="Start as the base model, or from N(0, 0.01²)."
    )
    seed: int = Field(0, ge=0, lt=2**63, description="Draws the places, which are stored.")

    @field_validator("k")
    @classmethod
    def _positive(cls, value: Any) -> Any:
        each = value if isinstance(value, tuple) else () if value is None else (value,)
        if value == () or any(not 1 <= k <= MOST_NUMBERS for k in each):
            remedy = f"set 1 to {MOST_NUMBERS}, or null"
            raise fault(f"k is {value if value in each else list(value)}", remedy)
        return value

    @property
    def transform(self) -> str | None:
        """Name of the wavelet, or none where the numbers are entries of the weight."""
        return None

    def knob_range(self, targets: Sequence[Target]) -> tuple[int, int | None]:
        """Return 1, and the entries of the smallest matrix."""
        return 1, min(o * d for target in targets for o, d in target.shapes)

    def counts(self, targets: Sequence[Target]) -> list[list[int]]:
        """Return `k` of each matrix of each target.

        Args:
            targets: all of the model's, over which a budget is spread.

        Raises:
            WaraError: kind `config` when a list of `k` has another length.
        """
        shapes = [shape for target in targets for shape in target.shapes]
        if isinstance(self.k, tuple):
            what = f"k lists {len(self.k)} numbers for {len(shapes)} matrices"
            fits = len(self.k) == len(shapes)
            require(fits, what, "k", "list one per matrix, or set one number")
            every = list(self.k)
        else:
            mean = sum(o + d for o, d in shapes) / len(shapes) if self.k is None else self.k
            every = allocate(shapes, mean, self.allocation)
        numbers = iter(every)
        return [[next(numbers) for _ in target.rows] for target in targets]

    def build(self, model: nn.Module, targets: Sequence[Target]) -> list[LinearAdapter]:
        """Return one layer per target.

        Raises:
            WaraError: kind `config` when a matrix gets no place, or more than it has.
        """
        every = self.find(model)
        counts = {t.name: n for t, n in zip(every, self.counts(every), strict=True)}
        layers: list[LinearAdapter] = []
        for target in targets:
            pairs = list(zip(target.shapes, counts[target.name], strict=True))
            for shape, count in pairs:
                _check_count(shape, count, target.name)
            drawn = [
                torch.empty(2, count, dtype=torch.int64)
                if is_skeleton()
                else draw_places(shape, count, self.seed)
                for shape, count in pairs
            ]
            layer = SparseLayer(target, drawn, scale=self.scale, wavelet=self.transform)
            if self.init == "gaussian":
                nn.init.normal_(layer.coefficients, std=GAUSSIAN)
            layers.append(layer)
        return layers


def _check_count(shape: Shape, count: int, name: str) -> None:
    area, size, where = shape[0] * shape[1], f"{shape[0]}x{shape[1]}", f"adapter.k, {name}"
    if count < 1:
        what = f"the {size} matrix would get no place"
        raise WaraError("config", what, where, "set a larger k or allocation: fixed")
    if count > area:
        what = f"k is {count:,}, the {size} matrix has {area:,} places"
        raise WaraError("config", what, where, f"set k to {area} or less")


@options
class WaveFT(SparseMethod):
    """WaveFT (arXiv 2505.12532): `W = W0 + λ IDWT2(C)` with `k` trained coefficients in `C`.

    One level; `C` holds the quadrants `[[LL, LH], [HL, HH]]`. It agrees with PEFT's `WaveFTConfig`
    (`scale` is its `scaling`, `k` its `n_frequency`, `seed` its `random_loc_seed`).
    """

    name: ClassVar[str] = "waveft"
    summary: ClassVar[str] = "a few wavelet coefficients of each weight train"
    rates: ClassVar[Mapping[str, float]] = {"adapter": 2e-3, "head": 2e-3}

    wavelet: WaveletName = Field("haar", description="A discrete wavelet of PyWavelets.")
    scale: Annotated[float, NotZero] = Field(
        25.0, ge=-1e6, le=1e6, description="Factor λ on the update; 25 in the paper."
    )

    @property
    def transform(self) -> str | None:
        """Name of the wavelet."""
        return self.wavelet


@options
class SHiRA(SparseMethod):
    """SHiRA (arXiv 2406.13175), random places: `W = W0 + λ C` with `k` trained entries in `C`."""

    name: ClassVar[str] = "shira"
    summary: ClassVar[str] = "a few entries of each weight train"
    rates: ClassVar[Mapping[str, float]] = {"adapter": 5e-2, "head": 2e-3}

    scale: Annotated[float, NotZero] = Field(
        1.0, ge=-1e6, le=1e6, description="Factor λ on the update."
    )
