"""The wavelet transform of weight matrices, axis by axis, held against PyWavelets and ptwt."""

import numpy as np
import ptwt
import pytest
import pywt
import torch

from wara.errors import WaraError
from wara.wavelets import (
    check_matrix,
    check_wavelet,
    padded_side,
    synthesis,
    synthesis_adjoint,
    synthesis_taps,
)

SHAPES = [(8, 8), (24, 24), (40, 14), (13, 32), (21, 17)]
FAMILIES = ["haar", "db2", "db5", "sym4", "coif1", "bior2.2", "rbio1.3", "bior4.4"]
EVERY = pywt.wavelist(kind="discrete")

shapes = pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"{s[0]}x{s[1]}")
families = pytest.mark.parametrize("wavelet", FAMILIES)


def swap_details(quadrants):
    """Exchange the quadrants off the diagonal, so that each axis has its filters to itself."""
    top, bottom = quadrants.chunk(2, 0)
    (ll, lh), (hl, hh) = top.chunk(2, 1), bottom.chunk(2, 1)
    return torch.cat([torch.cat([ll, hl], 1), torch.cat([lh, hh], 1)], 0)


def dwt2(matrix, wavelet):
    """`[[LL, LH], [HL, HH]]`: the transpose of a synthesis with its own filters, turned round."""
    low, high, _, _ = pywt.Wavelet(wavelet).filter_bank
    bank = tuple(low)[::-1], tuple(high)[::-1]
    return swap_details(synthesis_adjoint(synthesis_adjoint(matrix, bank, 0), bank, 1))


def idwt2(quadrants, wavelet, shape=(None, None)):
    """`IDWT2` of WaveFT, cropped."""
    bank = synthesis_taps(wavelet)
    return synthesis(synthesis(swap_details(quadrants), bank, 0), bank, 1)[: shape[0], : shape[1]]


def length_of(wavelet):
    return pywt.Wavelet(wavelet).dec_len


def matrix(shape, seed=0):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def quadrants(coefficients):
    ll, (lh, hl, hh) = coefficients
    return np.block([[np.asarray(ll), np.asarray(lh)], [np.asarray(hl), np.asarray(hh)]])


def fits(shape, wavelet):
    if length_of(wavelet) > min(shape):
        pytest.skip("the wavelet is longer than the matrix")


@shapes
@families
def test_dwt2_is_that_of_pywavelets_and_ptwt(shape, wavelet):
    fits(shape, wavelet)
    w = matrix(shape)
    got = dwt2(w, wavelet).numpy()
    np.testing.assert_allclose(got, quadrants(pywt.dwt2(w.numpy(), wavelet, "zero")), atol=1e-12)
    theirs = ptwt.wavedec2(w, wavelet, mode="zero", level=1)
    theirs = (theirs[0].squeeze(), tuple(band.squeeze() for band in theirs[1]))
    np.testing.assert_allclose(got, quadrants(theirs), atol=1e-12)


@shapes
@families
def test_idwt2_is_that_of_pywavelets_and_ptwt(shape, wavelet):
    sides = tuple(padded_side(side, length_of(wavelet)) for side in shape)
    c = matrix(sides, seed=1)  # any coefficients, not only those of some matrix
    h, w = sides[0] // 2, sides[1] // 2
    parts = [c[:h, :w], c[:h, w:], c[h:, :w], c[h:, w:]]
    got = idwt2(c, wavelet).numpy()
    details = tuple(part.numpy() for part in parts[1:])
    np.testing.assert_allclose(got, pywt.idwt2((parts[0].numpy(), details), wavelet), atol=1e-12)
    theirs = ptwt.waverec2((parts[0], ptwt.constants.WaveletDetailTuple2d(*parts[1:])), wavelet)
    np.testing.assert_allclose(got, theirs.squeeze().numpy(), atol=1e-12)


@pytest.mark.parametrize("wavelet", EVERY)
def test_perfect_reconstruction_with_every_wavelet(wavelet):
    length = length_of(wavelet)
    shape = (length + 7, length + 2)
    w = matrix(shape)
    c = dwt2(w, wavelet)
    assert c.shape == tuple(padded_side(side, length_of(wavelet)) for side in shape)
    # PyWavelets prints some filters (dmey) with fewer digits than others.
    reference = pywt.idwt2(pywt.dwt2(w.numpy(), wavelet, "zero"), wavelet)
    floor = np.abs(reference[: shape[0], : shape[1]] - w.numpy()).max()
    assert (idwt2(c, wavelet, shape) - w).abs().max() <= 2 * floor + 1e-9


def test_the_places_of_the_quadrants():
    # A step between two rows is detail across rows: LH, at the top right.
    w = torch.zeros(8, 8, dtype=torch.float64)
    w[0] = 1
    c = dwt2(w, "haar")
    assert c[:4, 4:].abs().sum() > 0
    assert c[4:].abs().max() < 1e-12


@families
@pytest.mark.parametrize("side", [12, 13])
def test_the_adjoint_is_the_transpose(wavelet, side):
    count = padded_side(side, length_of(wavelet))
    eye = torch.eye(count, dtype=torch.float64)
    forward = synthesis(eye, synthesis_taps(wavelet), 0)[:side]
    backward = synthesis_adjoint(torch.eye(side, dtype=torch.float64), synthesis_taps(wavelet), 0)
    torch.testing.assert_close(backward, forward.T, atol=1e-12, rtol=0)


@pytest.mark.parametrize("wavelet", ["haar", "db2", "bior2.2"])
def test_gradients(wavelet):
    shape = (9, 6)
    w = matrix(shape).requires_grad_()
    assert torch.autograd.gradcheck(lambda m: dwt2(m, wavelet), (w,))
    c = matrix(tuple(padded_side(side, length_of(wavelet)) for side in shape)).requires_grad_()
    assert torch.autograd.gradcheck(lambda m: idwt2(m, wavelet, shape), (c,))


def test_a_wavelet_longer_than_the_matrix_is_refused():
    check_matrix((4, 9), "db2")
    with pytest.raises(WaraError, match="db2 has 4 taps, the matrix is 3x9") as caught:
        check_matrix((3, 9), "db2")
    assert caught.value.exit_code == 2


def test_an_unknown_wavelet_is_refused_with_the_nearest_name():
    with pytest.raises(WaraError, match="did you mean 'haar'") as caught:
        check_wavelet("harr")
    assert caught.value.exit_code == 2
