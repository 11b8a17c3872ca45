"""Fixed wavelet transforms of the token grid, ready to be applied in rank space.

WaRA (arXiv 2506.24092 v2) transforms the patch tokens of a layer over their `h × w` grid. The
transform is linear and fixed, so the way through one subband and back, `P_s = IDWT ∘ mask_s ∘ DWT`,
is one `[n, n]` matrix. It acts on tokens while the low-rank factors act on channels; the two
commute, so the matrices can be applied to `r` numbers per token in place of the layer's width.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import cast

import ptwt
import pywt
import torch
from ptwt.constants import BoundaryMode
from torch import Tensor, nn

from wara.errors import WaraError, suggest

BOUNDARIES = ("symmetric", "reflect", "periodic", "zero", "constant")


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


@lru_cache(maxsize=4)
def subband_projections(
    grid: tuple[int, int], wavelet: str = "haar", level: int = 1, boundary: str = "symmetric"
) -> Tensor:
    """Return the matrices `P_s` that keep one subband of an image on the grid.

    `P_s = IDWT ∘ mask_s ∘ DWT`, cropped to the grid (WaRA, steps 1 and 3), found by sending the
    `n = h w` unit images through `ptwt`. They sum to the identity.

    Args:
        grid: `(h, w)`, any sizes of at least the filter length.
        wavelet: name of a discrete wavelet.
        level: number of levels, see `check_level`.
        boundary: how the transform extends the grid, one of `BOUNDARIES`.

    Returns:
        float64 `[s, n, n]` with `s = 3 level + 1`, subbands in the order of `subband_names`,
        tokens in row-major order. The tensor is shared by all callers: do not write to it.

    Raises:
        WaraError: kind `config` for an unknown wavelet or boundary, or a level that does not fit.
    """
    check_level(grid, wavelet, level)
    if boundary not in BOUNDARIES:
        remedy = suggest(boundary, BOUNDARIES)
        raise WaraError("config", f"unknown boundary '{boundary}'", "adapter.boundary", remedy)
    h, w = grid
    n = h * w
    units = torch.eye(n, dtype=torch.float64).reshape(n, h, w)
    mode = cast(BoundaryMode, boundary)
    coefficients = ptwt.wavedec2(units, wavelet, mode=mode, level=level)
    bands = [coefficients[0], *(band for detail in coefficients[1:] for band in detail)]
    projections = []
    for kept in range(len(bands)):
        masked = [band if s == kept else torch.zeros_like(band) for s, band in enumerate(bands)]
        details = [
            ptwt.constants.WaveletDetailTuple2d(*masked[i : i + 3])
            for i in range(1, len(masked), 3)
        ]
        image = ptwt.waverec2((masked[0], *details), wavelet)[..., :h, :w]
        # Row t of `image` answers to unit token t, so the matrix that acts on tokens is its
        # transpose.
        projections.append(image.reshape(n, n).T)
    return torch.stack(projections)


class SubbandMixer(nn.Module):
    """Updates the subbands of rank-space tokens: `mix(z) = Σ_s P_s z K_sᵀ`.

    One instance serves all layers of a model, so that the matrices are held once.

    Args:
        grid: `(h, w)` of the patch tokens.
        wavelet: name of a discrete wavelet.
        level: number of levels.
        boundary: extension at the border of the grid.

    Raises:
        WaraError: kind `config`, see `subband_projections`.
    """

    projections: Tensor

    def __init__(
        self,
        grid: tuple[int, int],
        wavelet: str = "haar",
        level: int = 1,
        boundary: str = "symmetric",
    ) -> None:
        super().__init__()
        self.grid = (int(grid[0]), int(grid[1]))
        self.names = subband_names(level)
        self.wavelet, self.level, self.boundary = wavelet, level, boundary
        # Not persistent: it follows from the configuration, and the adapter file stays small.
        self.register_buffer("projections", self._matrices(torch.float32), persistent=False)

    def _matrices(self, dtype: torch.dtype) -> Tensor:
        return subband_projections(self.grid, self.wavelet, self.level, self.boundary).to(dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SubbandMixer:
        # `model.to(bfloat16)` must not round the transform, and `model.double()` must sharpen it.
        before = self.projections.dtype
        super()._apply(fn, recurse)
        held = self.projections
        wanted = torch.promote_types(held.dtype, torch.float32)
        if held.dtype != before and held.device.type != "meta":
            self.projections = self._matrices(wanted).to(held.device)
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
        s = len(self.names)
        with torch.autocast(z.device.type, enabled=False):
            z, core = z.to(self.projections.dtype), core.to(self.projections.dtype)
            if core.ndim == 4:
                updated = torch.einsum("bngj,gsij->bsngi", z, core)
            else:
                gains = core.unsqueeze(-1) if core.ndim == 2 else core
                updated = z.unsqueeze(1) * gains.transpose(0, 1).unsqueeze(1)
            # Σ_s P_s (·)_s as one product with [P_0 … P_S] laid side by side.
            side_by_side = self.projections.transpose(0, 1).reshape(n, s * n)
            return (side_by_side @ updated.reshape(b, s * n, g * r)).reshape(b, n, g, r)
