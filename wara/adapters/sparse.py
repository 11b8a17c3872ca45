"""WaveFT (arXiv 2505.12532) and SHiRA: a few numbers at fixed random places of each weight."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from wara.adapters.base import AdapterLayer, WeightDomainLayer, require
from wara.adapters.sparse_linear import Form, Index, SparseLinear, changed_weight, index_places
from wara.adapters.targets import Target, TargetedMethod
from wara.errors import WaraError, suggest
from wara.wavelets import check_matrix, check_wavelet, synthesis_taps

ALLOCATIONS = ("fixed", "proportional", "area")
INITS = ("zero", "gaussian")
GAUSSIAN = 0.01
"""Standard deviation of the gaussian start, that of the published code."""

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
        if self.places.device.type == "meta":
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


@dataclass(frozen=True, kw_only=True)
class SparseMethod(TargetedMethod):
    """Options that WaveFT and SHiRA share.

    Args:
        k: trained numbers per matrix; with `allocation` other than `fixed`, on average; or a list
            with a number for each matrix, in the order of the model. None takes the budget of a
            rank-1 LoRA, `Σ (d + o)` over the matrices; `budget: lora_r4`, or a number such as 0.8,
            takes a multiple of that.
        allocation: `fixed` gives every matrix the same `k`, as in the paper; `proportional` goes
            by `d + o`, `area` by `d o`.
        init: `zero`, so that the adapted model starts as the base model, or `gaussian` with a
            standard deviation of 0.01.
        scale: `λ`, by which `ΔW` is multiplied.
        seed: draws the places; they are stored in the adapter file.
    """

    k: int | tuple[int, ...] | None = None
    allocation: str = "fixed"
    init: str = "zero"
    scale: float = 1.0
    seed: int = 0

    @property
    def transform(self) -> str | None:
        """Name of the wavelet, or none where the numbers are entries of the weight."""
        return None

    def __post_init__(self) -> None:
        """Check the options."""
        super().__post_init__()
        if isinstance(self.k, list):
            object.__setattr__(self, "k", tuple(self.k))
        each = self.k if isinstance(self.k, tuple) else (self.k,) if self.k is not None else (1,)
        whole = all(isinstance(k, int) and not isinstance(k, bool) and k >= 1 for k in each)
        require(whole and len(each) > 0, f"k is {self.k!r}", "k", "set 1 or more, or null")
        seed = self.seed
        both = self.k is not None and self.budget is not None
        require(not both, "k and budget are both set", "budget", "set one of the two")
        for key, choices in (("allocation", ALLOCATIONS), ("init", INITS)):
            value = getattr(self, key)
            require(value in choices, f"{key} is {value!r}", key, suggest(str(value), choices))
        usable = math.isfinite(self.scale) and self.scale != 0
        require(usable, f"scale is {self.scale}", "scale", "set a number other than 0")
        require(isinstance(seed, int) and seed >= 0, f"seed is {seed!r}", "seed", "set 0 or more")

    def counts(self, shapes: Sequence[Shape]) -> list[int]:
        """Return `k` of each matrix of the shapes `(o, d)`, not checked against them."""
        if isinstance(self.k, tuple):
            return list(self.k)
        mean = sum(o + d for o, d in shapes) / len(shapes) if self.k is None else self.k
        return allocate(shapes, mean, self.allocation)

    def build(self, model: nn.Module, targets: list[Target]) -> list[AdapterLayer]:
        """Return one layer per target.

        Raises:
            WaraError: kind `config` when a matrix gets no place, or more than it has.
        """
        owners = [
            (target, (stop - start, target.linear.in_features))
            for target in targets
            for start, stop in target.rows
        ]
        counts = self.counts([shape for _, shape in owners])
        what = f"k lists {len(counts)} numbers for {len(owners)} matrices"
        require(len(counts) == len(owners), what, "k", "list one per matrix, or set one number")
        drawn: dict[str, list[Tensor]] = {}
        for (target, shape), count in zip(owners, counts, strict=True):
            area = shape[0] * shape[1]
            where, size = f"adapter.k, {target.name}", f"{shape[0]}x{shape[1]}"
            if count < 1:
                what = f"the {size} matrix would get no place"
                raise WaraError("config", what, where, "set a larger k or allocation: fixed")
            if count > area:
                what = f"k is {count:,}, the {size} matrix has {area:,} places"
                raise WaraError("config", what, where, f"set k to {area} or less")
            drawn.setdefault(target.name, []).append(draw_places(shape, count, self.seed))
        layers: list[AdapterLayer] = []
        for target in targets:
            layer = SparseLayer(
                target, drawn[target.name], scale=self.scale, wavelet=self.transform
            )
            if self.init == "gaussian":
                nn.init.normal_(layer.coefficients, std=GAUSSIAN)
            layers.append(layer)
        return layers


@dataclass(frozen=True, kw_only=True)
class WaveFT(SparseMethod):
    """WaveFT (arXiv 2505.12532): `W = W0 + λ IDWT2(C)` with `k` trained coefficients in `C`.

    One level; `C` holds the quadrants `[[LL, LH], [HL, HH]]`. It agrees with PEFT's `WaveFTConfig`
    (`scale` is its `scaling`, `k` its `n_frequency`, `seed` its `random_loc_seed`).

    Args:
        wavelet: a discrete wavelet of PyWavelets.
        scale: `λ`; 25 in the paper.
    """

    name: ClassVar[str] = "waveft"
    summary: ClassVar[str] = "a few wavelet coefficients of each weight train"
    lr: ClassVar[float] = 2e-3

    wavelet: str = "haar"
    scale: float = 25.0

    @property
    def transform(self) -> str | None:
        """Name of the wavelet."""
        return self.wavelet

    def __post_init__(self) -> None:
        """Check the options."""
        super().__post_init__()
        check_wavelet(self.wavelet)


@dataclass(frozen=True, kw_only=True)
class SHiRA(SparseMethod):
    """SHiRA (arXiv 2406.13175), random places: `W = W0 + λ C` with `k` trained entries in `C`."""

    name: ClassVar[str] = "shira"
    summary: ClassVar[str] = "a few entries of each weight train"
    lr: ClassVar[float] = 5e-2
