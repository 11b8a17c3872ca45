"""The same picture twice: a digest of exact pixels, a signature of a picture, and pairs of alike.

A signature is a small grey thumbnail. Pairs are looked for in two steps, as perceptual hashing
does (Zauner, Implementation and benchmarking of perceptual image hash functions, 2010). The
coarse step compares the low frequencies of all thumbnails, in blocks; the fine step compares the
detail of the few that are left, after a shift and a scale that a crop would have made. Coarse
likeness alone says nothing: chest X-rays of any two patients have it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image
from pydantic import Base64Bytes

SIDE = 32
"""Pixels of a thumbnail along each side."""
LEAST_CONTRAST = 3.0
"""Standard deviation of a thumbnail, in greys, below which it has nothing to compare."""
COARSE = 0.85
"""Least likeness of low frequencies: what a crop of 5 % leaves of it."""
FINE = 0.90
"""Least correlation of detail. Measured (docs/images.md): different patients reach 0.86."""
NEAREST = 6
"""Candidates of one picture; more say that the modality looks alike, not that pictures do."""
ALIGNED = 2
"""How many of them are shifted and scaled, which costs most of the time."""
ORIENTATIONS = ("", "left-right", "upside down", "half turn")

_BANDS = 8
_EDGE = 3  # pixels that a crop moves in or out
_CLOSE = 0.75  # a correlation of detail that is worth a second look
_BLOCK = 1024
_CELLS = 1 << 22  # comparisons in hand at a time; a handful of arrays of 16 MB
_CHUNK = 512


@dataclass(frozen=True, slots=True)
class Signature:
    """What is kept of a picture to know it again; plain values, about 1 kB.

    Args:
        pixels: see `pixel_digest`.
        thumbnail: greys of 32 x 32 pixels, row by row; empty where the picture is smaller than
            that, or has no contrast. Base64 where it is kept in a JSON file.
    """

    pixels: str
    thumbnail: Base64Bytes


@dataclass(frozen=True, slots=True)
class Pair:
    """Two records that show the same picture.

    Args:
        first: number of a record.
        second: number of a later one.
        kind: `bytes`, `pixels` or `near`.
        distance: bits of 63 in which the signs of their low frequencies differ.
        correlation: of their detail, once aligned.
        mirrored: one of `ORIENTATIONS`.
    """

    first: int
    second: int
    kind: str
    distance: int = 0
    correlation: float = 1.0
    mirrored: str = ""


def pixel_digest(array: np.ndarray, *, inverted: bool = False) -> str:
    """Return the SHA-256 of shape and pixels; a grey picture is the same as one in RGB.

    Args:
        array: `[H, W]` or `[H, W, 3]`, of any whole numbers.
        inverted: whether 0 is white, so that the same numbers are another picture.
    """
    if array.ndim == 2:
        array = np.repeat(array[:, :, None], 3, axis=2)
    digest = hashlib.sha256(f"{array.shape} {array.dtype.str} {inverted}".encode())
    digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


def sign(array: np.ndarray, *, inverted: bool = False) -> Signature:
    """Return the signature of a picture.

    Args:
        array: uint8 `[H, W]` or `[H, W, 3]`; or the numbers of a 16-bit file as they are stored,
            of which the thumbnail takes the span. Neither needs to know how many bits are shown,
            which is declared, or found over the whole set, after this.
        inverted: whether 0 is white in them.
    """
    digest = pixel_digest(array, inverted=inverted)
    if min(array.shape[:2]) < SIDE:
        return Signature(digest, b"")
    shown = array
    if shown.dtype != np.uint8:
        top = max(int(shown.max()), 1)
        shown = (shown.astype(np.float32) * (255 / top)).astype(np.uint8)
        shown = 255 - shown if inverted else shown
    # Reduced before it is turned grey: each pixel is looked at once. Not by boxes, which Pillow
    # fills from one side, so that a mirror image of few pixels would have another thumbnail.
    small = Image.fromarray(shown).resize(
        (SIDE, SIDE), Image.Resampling.BILINEAR, reducing_gap=2.0
    )
    thumbnail = np.asarray(small.convert("L"))
    return Signature(digest, thumbnail.tobytes() if thumbnail.std() >= LEAST_CONTRAST else b"")


def near_pairs(signatures: Sequence[Signature | None]) -> list[Pair]:
    """Return the pairs of records that show one picture, though their pixels differ.

    Found: other formats and sizes, mirror images and half turns, other brightness and contrast,
    burnt-in marks and text, crops of about 5 %. Records of the same pixels count once, as the
    first of them. Time grows with the square of the number, memory with the number.

    Args:
        signatures: of all records; None where a picture could not be read.

    Returns:
        Pairs of kind `near`, by record numbers; each record at most with its `NEAREST` candidates
        among the later ones.
    """
    first: dict[str, int] = {}
    for index, own in enumerate(signatures):
        if own is not None and own.thumbnail:
            first.setdefault(own.pixels, index)
    numbers = np.array(sorted(first.values()), np.int64)
    if len(numbers) < 2:
        return []
    stack = b"".join(own.thumbnail for i in numbers if (own := signatures[i]) is not None)
    thumbs = np.frombuffer(stack, np.uint8).reshape(len(numbers), SIDE, SIDE)
    waves = _low_frequencies(thumbs)
    found = [part for part in _candidates(waves) if len(part)]
    if not found:
        return []
    pairs = []
    candidates = np.concatenate(found)
    for at in range(0, len(candidates), _CHUNK):
        some = candidates[at : at + _CHUNK]
        ways, scores = _confirm(thumbs, some)
        for (a, b, *_), way, score in zip(some, ways, scores, strict=True):
            if score >= FINE:
                bits = int(((waves[a] > 0) != (waves[b] * _SIGNS[way] > 0)).sum())
                pairs.append(
                    Pair(int(numbers[a]), int(numbers[b]), "near", bits, round(float(score), 4),
                         ORIENTATIONS[way])
                )  # fmt: skip
    return sorted(pairs, key=lambda pair: (pair.first, pair.second))


# -- the coarse step -----------------------------------------------------------------------------


def _cosines() -> np.ndarray:
    """Return the rows of a DCT-II that stand for the lowest frequencies: `[_BANDS, SIDE]`."""
    wave, place = np.arange(_BANDS)[:, None], 2 * np.arange(SIDE) + 1
    return np.cos(np.pi * wave * place / (2 * SIDE)).astype(np.float32)


def _parities() -> tuple[np.ndarray, np.ndarray]:
    """Return signs of the frequencies in each orientation `[4, 63]`, and their order by parity.

    Turned left to right, a picture's odd horizontal waves change their signs, and no more.
    """
    y, x = (axis.reshape(-1)[1:] for axis in np.mgrid[:_BANDS, :_BANDS])
    across, down = (-1.0) ** x, (-1.0) ** y
    signs = np.stack([np.ones(len(x)), across, down, across * down]).astype(np.float32)
    return signs, 2 * (y % 2) + x % 2


_SIGNS, _PARITY = _parities()


def _low_frequencies(thumbs: np.ndarray) -> np.ndarray:
    """Return the low frequencies of thumbnails, unit length: float32 `[n, 63]`.

    Weighted by frequency, for natural images have power that falls with it: unweighted, the first
    waves would decide alone.
    """
    rows = _cosines()
    y, x = np.mgrid[:_BANDS, :_BANDS]
    found = np.empty((len(thumbs), _BANDS * _BANDS - 1), np.float32)
    for at in range(0, len(thumbs), _BLOCK):
        part = thumbs[at : at + _BLOCK].astype(np.float32)
        waves = (rows @ part @ rows.T) * np.hypot(y, x)
        found[at : at + _BLOCK] = waves.reshape(len(part), -1)[:, 1:]
    return found / np.maximum(np.linalg.norm(found, axis=1, keepdims=True), 1e-6)


def _candidates(waves: np.ndarray) -> Iterator[np.ndarray]:
    """Yield (first, second, orientation, rank) of pictures alike at first sight: int64 `[k, 4]`."""
    groups = [np.ascontiguousarray(waves[:, _PARITY == parity]) for parity in range(4)]
    # So many rows that what is in hand does not grow with the set.
    rows = max(1, min(_BLOCK, _CELLS // len(waves)))
    for at in range(0, len(waves), rows):
        to = min(at + rows, len(waves))
        # Even and odd waves apart, so that four orientations cost one product: as it is and by a
        # half turn differ in the sign of one sum, the two mirror images in that of another.
        even, x, y, both = (group[at:to] @ group[at:].T for group in groups)
        ways, best = _better(even + both, x + y, 0, 3)
        others, other = _better(even - both, y - x, 1, 2)
        ways, best = np.where(other > best, others, ways), np.maximum(best, other)
        for row in range(to - at):
            scores = best[row, row + 1 :]
            hits = np.flatnonzero(scores >= COARSE)
            if len(hits) > NEAREST:
                hits = hits[np.argpartition(-scores[hits], NEAREST)[:NEAREST]]
            if len(hits):
                hits = hits[np.argsort(-scores[hits], kind="stable")]
                columns = hits + row + 1
                own = np.full(len(hits), at + row)
                yield np.stack(
                    [own, at + columns, ways[row, columns], np.arange(len(hits))], axis=1
                )


def _better(
    common: np.ndarray, sign: np.ndarray, plus: int, minus: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return the better of two orientations and its likeness, `common` plus or minus `sign`."""
    ways = np.where(sign >= 0, np.int8(plus), np.int8(minus))
    return ways, common + np.abs(sign)


# -- the fine step -------------------------------------------------------------------------------


def _smoothing(sigma: float) -> np.ndarray:
    """Return the matrix that smooths along one axis: float32 `[SIDE, SIDE]`."""
    place = np.arange(SIDE)
    weights = np.exp(-((place[:, None] - place) ** 2) / (2 * sigma**2))
    return (weights / weights.sum(1, keepdims=True)).astype(np.float32)


_SLIGHT, _WIDE = _smoothing(1.0), _smoothing(2.0)
_PLACES = np.arange(SIDE, dtype=np.float32)
_FROM_CENTRE = _PLACES - (SIDE - 1) / 2
_LEAST, _MOST = np.array([[0.88, -2.5, 0.88, -2.5], [1.13, 2.5, 1.13, 2.5]], np.float32)


def _turned(thumbs: np.ndarray, way: int) -> np.ndarray:
    if way & 1:
        thumbs = thumbs[:, :, ::-1]
    return thumbs[:, ::-1] if way & 2 else thumbs


def _unit(values: np.ndarray) -> np.ndarray:
    values = values - values.mean((1, 2), keepdims=True)
    return values / (np.sqrt((values**2).sum((1, 2), keepdims=True)) + 1e-6)


def _detail(thumbs: np.ndarray) -> np.ndarray:
    """Return what a thumbnail has beyond its smoothed self, without its edge, at unit length."""
    inside = slice(_EDGE, -_EDGE)
    return _unit((thumbs - _WIDE @ thumbs @ _WIDE.T)[:, inside, inside])


def _confirm(thumbs: np.ndarray, candidates: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the orientation and the correlation of detail of candidates: `[k]` each."""
    left = thumbs[candidates[:, 0]].astype(np.float32)
    right = thumbs[candidates[:, 1]].astype(np.float32)
    detail, others = _detail(left), _detail(right)
    # Low frequencies of a picture that is nearly symmetric cannot tell how it is turned.
    each = np.stack([(detail * _turned(others, way)).sum((1, 2)) for way in range(4)])
    ways, scores = each.argmax(0), each.max(0)
    rest = np.flatnonzero((scores < FINE) & (candidates[:, 3] < ALIGNED))
    if len(rest):
        ahead = left[rest]
        turned = np.stack([_turned(right[i : i + 1], int(candidates[i, 2]))[0] for i in rest])
        aligned = (detail[rest] * _detail(_aligned(ahead, turned))).sum((1, 2))
        # Which of the two is the crop is not known, and the other way round sees more of both.
        close = np.flatnonzero((aligned >= _CLOSE) & (aligned < FINE))
        if len(close):
            back = _detail(turned[close]) * _detail(_aligned(turned[close], ahead[close]))
            aligned[close] = np.maximum(aligned[close], back.sum((1, 2)))
        better = aligned > scores[rest]
        ways[rest[better]] = candidates[rest[better], 2]
        scores[rest[better]] = aligned[better]
    return ways, scores


def _aligned(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Return thumbnails moved onto others, by a shift and a scale along each axis: `[k, 32, 32]`.

    Gauss-Newton on the squared difference, with the gradients of what stays (Baker and Matthews,
    Lucas-Kanade 20 years on, 2004); first smoothed widely, for a crop moves the edge by two
    pixels, which is more than detail is wide.
    """
    # Scale and shift along x, then along y.
    change = np.tile(np.array([1, 0, 1, 0], np.float32), (len(left), 1))
    for smooth, steps in ((_WIDE, 5), (_SLIGHT, 4)):
        still, moving = _unit(smooth @ left @ smooth.T), smooth @ right @ smooth.T
        gy, gx = np.gradient(still, axis=(1, 2))
        slopes = np.stack([gx * _FROM_CENTRE, gx, gy * _FROM_CENTRE[:, None], gy], axis=1)
        # At the edge nothing is known of what a crop took away.
        slopes[:, :, [0, -1]] = slopes[:, :, :, [0, -1]] = 0
        slopes = slopes.reshape(len(left), 4, -1)
        squares = slopes @ slopes.transpose(0, 2, 1) + 1e-6 * np.eye(4, dtype=np.float32)
        inverse = np.linalg.inv(squares)
        for _ in range(steps):
            off = (still - _unit(_moved(moving, change))).reshape(len(left), -1, 1)
            change = np.clip(change + (inverse @ (slopes @ off))[:, :, 0], _LEAST, _MOST)
    return _moved(right, change)


def _moved(thumbs: np.ndarray, change: np.ndarray) -> np.ndarray:
    """Sample thumbnails bilinearly at scaled and shifted places."""
    across = _sampling(change[:, 0], change[:, 1])
    down = _sampling(change[:, 2], change[:, 3])
    return down @ thumbs @ across.transpose(0, 2, 1)


def _sampling(scale: np.ndarray, shift: np.ndarray) -> np.ndarray:
    """Return the weights of old places in new ones: float32 `[k, SIDE, SIDE]`."""
    places = scale[:, None] * _FROM_CENTRE + shift[:, None] + (SIDE - 1) / 2
    places = np.clip(places, 0, SIDE - 1)
    return np.maximum(0, 1 - np.abs(places[:, :, None] - _PLACES))
