"""Fixed wavelet transforms of the token grid, ready to be applied in rank space, and of weights.

WaRA (arXiv 2506.24092 v2) transforms the patch tokens of a layer over their `h × w` grid. The
transform is linear and fixed, so there and back are two matrices. They act on tokens while the
low-rank factors act on channels; the two commute, so the transform can be applied to `r` numbers
per token in place of the layer's width. The way through one subband, `P_s = IDWT ∘ mask_s ∘ DWT`,
is `[n, n]`, and `Σ_s P_s = I`.

WaveFT (arXiv 2505.12532) transforms a weight matrix itself, by one level: see `synthesis`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Annotated, Literal, cast, get_args

import numpy as np
import ptwt
import pywt
import torch
from ptwt.constants import BoundaryMode
from pydantic import AfterValidator
from torch import Tensor, nn

from wara.errors import WaraError, suggest
from wara.schema import fault

Taps = tuple[float, ...]
Bank = tuple[Taps, Taps]

Boundary = Literal["symmetric", "reflect", "periodic", "zero", "constant"]
BOUNDARIES = get_args(Boundary)


def _known_wavelet(name: str) -> str:
    try:
        check_wavelet(name)
    except WaraError as error:
        raise fault(error.what, error.remedy) from error
    return name


WaveletName = Annotated[str, AfterValidator(_known_wavelet)]
"""Name of a discrete wavelet, as a field of options."""

RANDOM = "random"
"""In place of the name of a wavelet: a random orthogonal matrix, see `random_transform`."""


def _known_transform(name: str) -> str:
    return name if name == RANDOM else _known_wavelet(name)


GridTransformName = Annotated[str, AfterValidator(_known_transform)]
"""Name of a transform of the token grid, as a field of options."""


def check_wavelet(name: str) -> pywt.Wavelet:
    """Return the discrete wavelet of that name.

    Args:
        name: a name of `pywt.wavelist(kind="discrete")`, such as `haar` or `db2`.

    Returns:
        The PyWavelets object with its filters.

    Raises:
        WaraError: kind `config`, with the nearest names, when PyWavelets has no such wavelet.
    """
    known = pywt.wavelist(kind="discrete")
    if name not in known:
        remedy = suggest(name, known)
        if remedy.startswith("choose"):
            remedy = "choose a family of PyWavelets, such as haar, db2, sym4, coif1 or bior2.2"
        raise WaraError("config", f"unknown wavelet '{name}'", "adapter.wavelet", remedy)
    return pywt.Wavelet(name)


def subband_names(level: int) -> tuple[str, ...]:
    """Return the names of the `3 level + 1` subbands, coarse to fine.

    Args:
        level: number of decomposition levels, at least 1.

    Returns:
        `("LL_J", "LH_J", "HL_J", "HH_J", …, "HH_1")` with `J = level`. `LH` holds the detail across
        rows (`horizontal` in PyWavelets), `HL` across columns, `HH` both.
    """
    details = [f"{band}_{j}" for j in range(level, 0, -1) for band in ("LH", "HL", "HH")]
    return (f"LL_{level}", *details)


def check_level(grid: tuple[int, int], wavelet: str, level: int) -> None:
    """Refuse a decomposition that is deeper than the grid allows.

    Args:
        grid: `(h, w)` of the patch tokens.
        wavelet: name of a discrete wavelet.
        level: wanted number of levels.

    Raises:
        WaraError: kind `config`, naming the grid and the largest level.
    """
    largest = pywt.dwt_max_level(min(grid), check_wavelet(wavelet).dec_len)
    if 1 <= level <= largest:
        return
    where = f"grid {grid[0]}x{grid[1]}, wavelet {wavelet}"
    if largest < 1:
        remedy = "choose a shorter wavelet (haar) or a larger img_size"
        raise WaraError("config", "the wavelet is longer than the token grid", where, remedy)
    remedy = f"set adapter.level to 1..{largest}"
    raise WaraError("config", f"wavelet level {level} does not fit the token grid", where, remedy)


@dataclass(frozen=True)
class GridTransform:
    """A wavelet transform of the token grid as matrices; tokens in row-major order.

    Args:
        analysis: DWT, `[m, n]` for `n = h w` tokens and `m` coefficients, the subbands one after
            the other in the order of `subband_names`. Grids that a level does not halve evenly
            are extended, so `m >= n`.
        synthesis: IDWT, cropped to the grid, `[n, m]`.
        sizes: coefficients of each subband.
    """

    analysis: Tensor
    synthesis: Tensor
    sizes: tuple[int, ...]


@lru_cache(maxsize=4)
def grid_transform(
    grid: tuple[int, int], wavelet: str = "haar", level: int = 1, boundary: str = "symmetric"
) -> GridTransform:
    """Return the transform of a grid, found by sending unit images through `ptwt` and back.

    Args:
        grid: `(h, w)`, any sizes of at least the filter length.
        wavelet: name of a discrete wavelet.
        level: number of levels, see `check_level`.
        boundary: how the transform extends the grid, one of `BOUNDARIES`.

    The way through one subband, `P_s = IDWT ∘ mask_s ∘ DWT` (WaRA, steps 1 and 3), is the product
    of its columns of `synthesis` and its rows of `analysis`; `Σ_s P_s = I`.

    Returns:
        Matrices in float64, shared by all callers: do not write to them.

    Raises:
        WaraError: kind `config` for an unknown wavelet or boundary, or a level that does not fit.
    """
    check_level(grid, wavelet, level)
    if boundary not in BOUNDARIES:
        remedy = suggest(boundary, BOUNDARIES)
        raise WaraError("config", f"unknown boundary '{boundary}'", "adapter.boundary", remedy)
    h, w = grid
    mode = cast(BoundaryMode, boundary)
    # What is kept for all callers must not depend on the context of the first.
    with torch.inference_mode(False), torch.device("cpu"):
        units = torch.eye(h * w, dtype=torch.float64).reshape(-1, h, w)
        coefficients = ptwt.wavedec2(units, wavelet, mode=mode, level=level)
        bands = [coefficients[0], *(band for detail in coefficients[1:] for band in detail)]
        shapes = [band.shape[1:] for band in bands]
        sizes = tuple(math.prod(shape) for shape in shapes)
        # Column t is the answer to unit token t.
        analysis = torch.cat([band.flatten(1) for band in bands], 1).T.contiguous()
        ones = torch.eye(sum(sizes), dtype=torch.float64).split(sizes, 1)
        bands = [part.reshape(-1, *shape) for part, shape in zip(ones, shapes, strict=True)]
        details = [
            ptwt.constants.WaveletDetailTuple2d(*bands[i : i + 3]) for i in range(1, len(bands), 3)
        ]
        images = ptwt.waverec2((bands[0], *details), wavelet)[..., :h, :w]
        return GridTransform(analysis, images.flatten(1).T.contiguous(), sizes)


@lru_cache(maxsize=4)
def random_transform(grid: tuple[int, int], level: int = 1, seed: int = 0) -> GridTransform:
    """Return a random orthogonal transform with as many parts, and as large, as wavelet subbands.

    The control for a wavelet: with `Q` drawn uniformly from the orthogonal `[n, n]` matrices,
    `P_s = Qᵀ mask_s Q`, so tokens are mixed alike everywhere and nothing of the grid is known.

    Args:
        grid: `(h, w)`, `n = h w`.
        level: number of levels; sizes are those of Haar where it halves the sides evenly, and else
            the low half of a side is the larger, so that they add up to `n`.
        seed: draws `Q`. The stream is NumPy's Mersenne Twister, which is frozen, and the QR
            decomposition with positive diagonal is unique: the seed says all, to rounding.

    Returns:
        Matrices in float64, shared by all callers: do not write to them.

    Raises:
        WaraError: kind `config` for a level that does not fit the grid.
    """
    check_level(grid, "haar", level)
    n = grid[0] * grid[1]
    words = np.random.SeedSequence(seed).generate_state(4)
    draw = np.random.RandomState(words).standard_normal((n, n))
    with torch.inference_mode(False), torch.device("cpu"):
        q, r = torch.linalg.qr(torch.from_numpy(draw))
        analysis = (q * torch.diagonal(r).sign()).T.contiguous()
    sizes: list[int] = []
    h, w = grid
    for _ in range(level):
        low_h, low_w = (h + 1) // 2, (w + 1) // 2
        sizes = [(h - low_h) * low_w, low_h * (w - low_w), (h - low_h) * (w - low_w), *sizes]
        h, w = low_h, low_w
    return GridTransform(analysis, analysis.T.contiguous(), (h * w, *sizes))


class SubbandMixer(nn.Module):
    """Updates the subbands of rank-space tokens: `mix(z) = Σ_s P_s z K_sᵀ`.

    It transforms, updates each subband by its core, and transforms back: `2 n m` multiply-adds per
    channel, whatever the number of subbands, where the sum over `P_s` takes `s n²`.

    One instance serves all layers of a model, so that the matrices are held once.

    Args:
        grid: `(h, w)` of the patch tokens.
        wavelet: name of a discrete wavelet.
        level: number of levels.
        boundary: extension at the border of the grid.
        seed: draws the matrix where the wavelet is `RANDOM`.

    Raises:
        WaraError: kind `config`, see `grid_transform` and `random_transform`.
    """

    analysis: Tensor
    synthesis: Tensor

    def __init__(
        self,
        grid: tuple[int, int],
        wavelet: str = "haar",
        level: int = 1,
        boundary: str = "symmetric",
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.grid = (int(grid[0]), int(grid[1]))
        self.names = subband_names(level)
        self.wavelet, self.level, self.boundary, self.seed = wavelet, level, boundary, seed
        self.sizes = self.exact().sizes
        # Not persistent: they follow from the configuration, and the adapter file stays small.
        for name in ("analysis", "synthesis"):
            matrix = getattr(self.exact(), name).float()
            self.register_buffer(name, matrix, persistent=False)

    def exact(self) -> GridTransform:
        """Return the transform in float64."""
        if self.wavelet == RANDOM:
            return random_transform(self.grid, self.level, self.seed)
        return grid_transform(self.grid, self.wavelet, self.level, self.boundary)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SubbandMixer:
        # `model.to(bfloat16)` must not round the transform, and `model.double()` must sharpen it.
        before = self.analysis.dtype
        super()._apply(fn, recurse)
        for name in ("analysis", "synthesis"):
            held = getattr(self, name)
            if held.dtype != before and held.device.type != "meta":
                wanted = torch.promote_types(held.dtype, torch.float32)
                setattr(self, name, getattr(self.exact(), name).to(held.device, wanted))
        return self

    @property
    def tokens(self) -> int:
        """Number of patch tokens, `h w`."""
        return self.grid[0] * self.grid[1]

    def forward(self, z: Tensor, core: Tensor) -> Tensor:
        """Mix the subbands of each rank-space channel.

        Args:
            z: `[b, n, g, r]`, patch tokens of `g` adapted row groups in rank space.
            core: `[g, s]`, `[g, s, r]` or `[g, s, r, r]`, the cores `K_s` as scalars, diagonals
                or full matrices.

        Returns:
            `[b, n, g, r]` in the dtype of the transform, float32 or float64, also under autocast.
        """
        b, n, g, r = z.shape
        dtype = self.analysis.dtype
        with torch.autocast(z.device.type, enabled=False):
            core = core.to(dtype)
            # Tokens and channels of all groups as one matrix per image, transformed in one product.
            bands = (self.analysis @ z.to(dtype).reshape(b, n, g * r)).reshape(b, -1, g, r)
            updated = []
            for band, k in zip(bands.split(self.sizes, 1), core.unbind(1), strict=True):
                if core.ndim == 4:
                    updated.append(torch.einsum("bmgj,gij->bmgi", band, k))
                else:
                    updated.append(band * (k.unsqueeze(-1) if core.ndim == 2 else k))
            bands = torch.cat(updated, 1)
            return (self.synthesis @ bands.reshape(b, -1, g * r)).reshape(b, n, g, r)


# Weight matrices: one level, zero extension, the four quadrants in one matrix.


@lru_cache(maxsize=64)
def synthesis_taps(wavelet: str) -> Bank:
    """Return the filters of reconstruction, low-pass and high-pass, each of even length `L`."""
    _, _, low, high = check_wavelet(wavelet).filter_bank
    return tuple(low), tuple(high)


def check_matrix(shape: tuple[int, int], wavelet: str, where: str = "adapter.wavelet") -> None:
    """Refuse a wavelet that is longer than a side of the matrix.

    Args:
        shape: `(o, d)`.
        wavelet: name of a discrete wavelet.
        where: what to name in the refusal.

    Raises:
        WaraError: kind `config`.
    """
    length = len(synthesis_taps(wavelet)[0])
    if length > min(shape):
        what = f"wavelet {wavelet} has {length} taps, the matrix is {shape[0]}x{shape[1]}"
        remedy = "choose a wavelet no longer than the shorter side, such as haar"
        raise WaraError("config", what, where, remedy)


def padded_side(side: int, length: int) -> int:
    """Return how many coefficients, low and high together, stand for a side of `side` entries.

    Zero extension gives `⌊(side + L - 1) / 2⌋` of each kind, so `side` itself for Haar (`L = 2`)
    and an even side.
    """
    return 2 * ((side + length - 1) // 2)


def synthesis(bands: Tensor, bank: Bank, dim: int) -> Tensor:
    """Reconstruct along one axis: `x_t = Σ_a lo_a h_{t-2a+L-2} + hi_a g_{t-2a+L-2}`.

    Args:
        bands: low half, then high half, along `dim`; `2 c` in all.
        bank: `h` and `g`, see `synthesis_taps`.
        dim: the axis, counted from the front.

    Returns:
        `2 c - L + 2` values along `dim`.
    """
    low_taps, high_taps = bank
    half = len(low_taps) // 2
    low, high = bands.chunk(2, dim)
    size = low.shape[dim] - half + 1
    phases = []
    # Even and odd places of the result have taps of their own; no zero is ever multiplied.
    for phase in range(2):
        total: Tensor | None = None
        for band, taps in ((low, low_taps), (high, high_taps)):
            for p in range(half):
                part, tap = band.narrow(dim, half - 1 - p, size), taps[2 * p + phase]
                total = part * tap if total is None else torch.add(total, part, alpha=tap)
        assert total is not None
        phases.append(total)
    return torch.stack(phases, dim + 1).flatten(dim, dim + 1)


def synthesis_adjoint(x: Tensor, bank: Bank, dim: int) -> Tensor:
    """Apply the transpose of `synthesis`, `lo_a = Σ_t x_t h_{t-2a+L-2}` and likewise `hi_a`.

    A gradient goes through it on its way back. For orthogonal wavelets it is the transform itself,
    for biorthogonal ones it is not.

    Args:
        x: values along `dim`; a side that the transform crops is filled with zeros.
        bank: `h` and `g`, see `synthesis_taps`.
        dim: the axis, counted from the front.

    Returns:
        `padded_side` values along `dim`, low half first.
    """
    length, side = len(bank[0]), x.shape[dim]
    count = (side + length - 1) // 2
    front, back = length - 2, 2 * count - side
    if front or back:
        edges = [0, 0] * (x.ndim - 1 - dim) + [front, back]
        x = nn.functional.pad(x, edges)
    bands = []
    for taps in bank:
        total: Tensor | None = None
        for m, tap in enumerate(taps):
            part = x[(slice(None),) * dim + (slice(m, m + 2 * count - 1, 2),)]
            total = part * tap if total is None else torch.add(total, part, alpha=tap)
        assert total is not None
        bands.append(total)
    return torch.cat(bands, dim)
