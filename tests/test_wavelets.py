"""The token-grid transform against ptwt and PyWavelets."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import pywt
import torch

from wara.errors import WaraError
from wara.wavelets import (
    SubbandMixer,
    check_level,
    check_wavelet,
    grid_transform,
    subband_names,
)


def subband_projections(
    grid: tuple[int, int], wavelet: str = "haar", level: int = 1
) -> torch.Tensor:
    """`P_s = IDWT ∘ mask_s ∘ DWT` for every subband, `[s, n, n]`."""
    transform = grid_transform(grid, wavelet, level)
    back = transform.synthesis.split(transform.sizes, 1)
    there = transform.analysis.split(transform.sizes)
    return torch.stack([one @ other for one, other in zip(back, there, strict=True)])


GRIDS = [(14, 14), (7, 7), (9, 14), (16, 5), (37, 13)]


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize(
    ("wavelet", "level"), [("haar", 1), ("haar", 2), ("db2", 1), ("bior2.2", 1)]
)
def test_projections_sum_to_the_identity(grid: tuple[int, int], wavelet: str, level: int) -> None:
    if level > pywt.dwt_max_level(min(grid), pywt.Wavelet(wavelet).dec_len):
        pytest.skip("grid too small for this level")
    matrices = subband_projections(grid, wavelet, level)
    n = grid[0] * grid[1]
    assert matrices.shape == (3 * level + 1, n, n)
    torch.testing.assert_close(matrices.sum(0), torch.eye(n, dtype=torch.float64))


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize(("wavelet", "level"), [("haar", 1), ("haar", 2), ("db2", 1)])
def test_each_projection_is_what_pywavelets_keeps_of_that_subband(
    grid: tuple[int, int], wavelet: str, level: int
) -> None:
    if level > pywt.dwt_max_level(min(grid), pywt.Wavelet(wavelet).dec_len):
        pytest.skip("grid too small for this level")
    image = np.random.default_rng(0).normal(size=grid)
    found = subband_projections(grid, wavelet, level).numpy() @ image.reshape(-1)
    for s, name in enumerate(subband_names(level)):
        coefficients = pywt.wavedec2(image, wavelet, mode="symmetric", level=level)
        band, _, j = name.partition("_")
        kept = [np.zeros_like(coefficients[0])]
        kept += [tuple(np.zeros_like(c) for c in detail) for detail in coefficients[1:]]
        if band == "LL":
            kept[0] = coefficients[0]
        else:
            # PyWavelets orders the levels coarse to fine: level J is entry 1.
            entry = level - int(j) + 1
            place = ("LH", "HL", "HH").index(band)
            kept[entry] = tuple(
                c if i == place else np.zeros_like(c) for i, c in enumerate(coefficients[entry])
            )
        expected = pywt.waverec2(kept, wavelet, mode="symmetric")[: grid[0], : grid[1]]
        np.testing.assert_allclose(found[s].reshape(grid), expected, atol=1e-10)


def test_subband_names_run_from_coarse_to_fine() -> None:
    assert subband_names(2) == ("LL_2", "LH_2", "HL_2", "HH_2", "LH_1", "HL_1", "HH_1")


def test_a_constant_image_lies_in_the_approximation_alone() -> None:
    matrices = subband_projections((9, 14), "db2", 1)
    ones = torch.ones(9 * 14, dtype=torch.float64)
    torch.testing.assert_close(matrices[0] @ ones, ones)
    assert (matrices[1:] @ ones).abs().max() < 1e-12


@pytest.mark.parametrize("form", ["scalar", "diag", "full"])
def test_mixer_equals_the_sum_over_subbands(form: str) -> None:
    torch.manual_seed(0)
    mixer = SubbandMixer((7, 10), "haar", 2).double()
    g, s, r = 3, len(mixer.names), 4
    shapes = {"scalar": (g, s), "diag": (g, s, r), "full": (g, s, r, r)}
    core = torch.randn(shapes[form], dtype=torch.float64)
    z = torch.randn(2, 70, g, r, dtype=torch.float64)
    eye = torch.eye(r, dtype=torch.float64)
    expected = torch.zeros_like(z)
    for i in range(g):
        for j in range(s):
            k = core[i, j] * eye if form == "scalar" else core[i, j]
            k = torch.diag(k) if form == "diag" else k
            expected[:, :, i] += subband_projections((7, 10), "haar", 2)[j] @ z[:, :, i] @ k.T
    torch.testing.assert_close(mixer(z, core), expected)


def test_gradients_of_the_mixer() -> None:
    mixer = SubbandMixer((3, 4)).double()
    z = torch.randn(1, 12, 2, 2, dtype=torch.float64, requires_grad=True)
    for shape in [(2, 4), (2, 4, 2), (2, 4, 2, 2)]:
        core = torch.randn(shape, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(mixer, (z, core))


def test_changing_the_dtype_never_rounds_the_transform() -> None:
    mixer = SubbandMixer((9, 14), "db2", 1)
    exact = grid_transform((9, 14), "db2", 1)
    for name in ("analysis", "synthesis"):
        matrix = getattr(exact, name)
        assert matrix.dtype == torch.float64
        assert torch.equal(getattr(mixer.float(), name), matrix.float())
        assert torch.equal(getattr(mixer.double(), name), matrix)
        assert torch.equal(getattr(mixer.to(torch.bfloat16), name), matrix.float())
        assert torch.equal(getattr(copy.deepcopy(mixer), name), matrix.float())
    assert not mixer.state_dict()


def test_what_is_kept_does_not_depend_on_who_asked_first() -> None:
    with torch.inference_mode():
        SubbandMixer((6, 9))
    mixer = SubbandMixer((6, 9)).double()
    z = torch.randn(1, 54, 1, 2, dtype=torch.float64, requires_grad=True)
    mixer(z, torch.ones(1, 4, 2, dtype=torch.float64)).sum().backward()
    torch.testing.assert_close(z.grad, torch.ones_like(z))
    with torch.device("meta"):
        SubbandMixer((9, 6))
    assert SubbandMixer((9, 6)).analysis.device.type == "cpu"


@pytest.mark.parametrize(
    ("grid", "wavelet", "level", "word"),
    [
        ((14, 14), "haar", 4, "set adapter.level to 1..3"),
        ((14, 7), "haar", 3, "1..2"),
        ((14, 14), "haar", 0, "1..3"),
        ((4, 4), "db4", 1, "shorter wavelet"),
    ],
)
def test_a_level_too_deep_names_grid_and_largest_level(
    grid: tuple[int, int], wavelet: str, level: int, word: str
) -> None:
    with pytest.raises(WaraError, match=f"grid {grid[0]}x{grid[1]}") as caught:
        check_level(grid, wavelet, level)
    assert caught.value.exit_code == 2 and word in str(caught.value)


def test_an_unknown_wavelet_gets_the_nearest_name() -> None:
    with pytest.raises(WaraError, match="did you mean 'haar'"):
        check_wavelet("harr")
    with pytest.raises(WaraError, match="unknown boundary"):
        grid_transform((7, 7), "haar", 1, "mirror")
