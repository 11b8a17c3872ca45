"""PNG, JPEG and TIFF files as pictures: Pillow decodes, in a memory that the header has told.

Pillow is trusted with no number of the file before `wara.bounds` has seen it. Whatever follows is
done block by block, so that an image takes little more than its pixels.
"""

from __future__ import annotations

import io
import sys
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from PIL import Image

from wara.bounds import (
    PNG_SIGNATURE,
    check_exif,
    check_need,
    check_png,
    check_size,
    check_tiff,
    png_chunks,
)
from wara.codestreams import read_jpeg
from wara.dicom import scale
from wara.errors import WaraError

FORMATS = ("PNG", "JPEG", "TIFF")

_BITS = "declare bits in the card or data.bits (12 for most detectors), or convert it to 8 bits"
_DEEP_MODES = ("I;16", "I;16B", "I;16L", "I;16N", "I")
_TIFF_PHOTOMETRIC = 262
_ORIENTATION = 274
_BLOCK = 1 << 20  # pixels
# Pillow takes the high byte of each 16-bit colour. Read with the other byte order it takes the low
# one, so that both together are the number that the file holds.
_OTHER_BYTE = {
    f"{mode};16{order}": f"{mode};16{other}"
    for mode in ("RGB", "RGBA", "RGBX")
    for order, other in (("B", "L"), ("L", "B"), ("N", "B" if sys.byteorder == "little" else "L"))
}
_BYTES = {"1": 1, "L": 1, "P": 1, "LA": 2, "PA": 2, "RGB": 3, "YCbCr": 3, "LAB": 3}


@dataclass(frozen=True)
class Depth:
    """What a 16-bit file says of its depth.

    Args:
        brightest: the largest number in it.
        declared: significant bits that it states itself (`sBIT` of PNG).
    """

    brightest: int
    declared: int | None


class Picture:
    """A decoded file, shown when it is known how.

    Args:
        pixels: uint8 `[H, W, 3]`, or numbers of more bits, `[H, W]` or `[H, W, 3]`.
        where: its name, for refusals.
        declared: significant bits that the file states.
        inverted: whether 0 is white.
    """

    def __init__(
        self,
        pixels: np.ndarray,
        where: str,
        declared: int | None = None,
        inverted: bool = False,
    ) -> None:
        self.pixels, self.where = pixels, where
        self.declared, self.inverted = declared, inverted

    @property
    def depth(self) -> Depth | None:
        """What it says of its depth; None for 8 bits."""
        if self.pixels.dtype == np.uint8:
            return None
        return Depth(int(self.pixels.max()), self.declared)

    def rgb(self, bits: int | None) -> np.ndarray:
        """Return the picture, uint8 `[H, W, 3]`, with `bits` from black to white."""
        if self.depth is None:
            return self.pixels
        bits = bits or self.declared
        if bits is None:
            what = "a 16-bit file, and nothing says how many of these bits its greys use"
            raise WaraError("data", what, self.where, _BITS)
        if not (isinstance(bits, int) and 1 <= bits <= 16):
            raise WaraError("config", f"bits: {str(bits)[:20]}", "bits", "give 1 to 16")
        if self.depth.brightest >= 1 << bits:
            what = f"a grey of {self.depth.brightest}, where the data set has {bits} bits"
            raise WaraError("data", what, self.where, "declare more bits in the card (bits: 16)")
        table = scale(np.arange(1 << bits, dtype=np.float64), 0, (1 << bits) - 1)
        table = 255 - table if self.inverted else table
        shown = np.empty(self.pixels.shape, np.uint8)
        source, target = self.pixels.reshape(-1), shown.reshape(-1)
        for start in range(0, source.size, _BLOCK):
            target[start : start + _BLOCK] = table[source[start : start + _BLOCK]]
        return shown if shown.ndim == 3 else np.repeat(shown[:, :, None], 3, axis=2)


def decode(data: bytes, where: str) -> Picture:
    """Return the picture of a PNG, JPEG or TIFF file.

    Args:
        data: the file.
        where: its name, for refusals.

    Raises:
        WaraError: kind "data" when it is not what is read here, or would take too much.
        Exception: of whatever kind Pillow raises on a damaged file.
    """
    _check_file(data, where)
    image = Image.open(io.BytesIO(data), formats=FORMATS)
    check_size(image.width, image.height, where)
    # JPEG files of cameras hold a preview as a second picture; the first one is the photograph.
    frames = getattr(image, "n_frames", 1) if image.format == "PNG" else 1
    if frames > 1:
        what = f"holds {frames} frames, one is expected"
        raise WaraError("data", what, where, "save one file per frame")
    if image.mode == "LAB":
        raise WaraError("data", "colours are stored as CIE L*a*b*", where, "convert it to RGB")
    colours = _deep_colour(image)
    each = 2 if image.mode.startswith("I;16") else _BYTES.get(image.mode, 4)
    check_need(image.width * image.height * each * (1 + colours), len(data), where)
    if colours:
        return Picture(_decode_deep_colour(data, image, where), where, _declared_bits(data))
    # TIFF files whose zero means white: Pillow leaves the inversion of deep ones to the reader.
    tags = getattr(image, "tag_v2", {})
    deep = image.mode in _DEEP_MODES
    inverted = deep and image.format == "TIFF" and tags.get(_TIFF_PHOTOMETRIC) == 0
    image.load()
    turned = _orientation(image, where)
    if deep:
        whole = _upright(_whole_greys(image, where), turned)
        return Picture(whole, where, _declared_bits(data), inverted)
    if image.mode == "F":
        grey = _float_to_uint8(image, where)
        del image
        return Picture(_upright(np.repeat(grey[:, :, None], 3, axis=2), turned), where)
    shown = np.empty((image.height, image.width, 3), np.uint8)
    transparent = image.has_transparency_data
    for place, part in _blocks(image):
        if transparent:
            layers = part.convert("RGBA")
            ground = Image.new("RGBA", layers.size, (0, 0, 0, 255))
            part = Image.alpha_composite(ground, layers)
        shown[place] = np.asarray(part.convert("RGB"))
    del image
    return Picture(_upright(shown, turned), where)


def _check_file(data: bytes, where: str) -> None:
    """Refuse a file that would take too much, before Pillow sees it."""
    if data.startswith(PNG_SIGNATURE):
        check_png(data, where)
    elif data[:2] in (b"II", b"MM"):
        check_tiff(data, where)
    elif data[:2] == b"\xff\xd8":
        found = read_jpeg(data, where)
        check_size(found.width, found.height, where)
        check_exif(found.exif, where)
        pixels = found.width * found.height
        # Between several scans the coefficients of the whole image are kept.
        need = pixels * (4 + 2 * found.samples) if found.scans > 1 else 0
        check_need(pixels * found.samples, len(data), where, need=need)


def _blocks(image: Image.Image) -> Iterator[tuple[tuple[slice, slice], Image.Image]]:
    """Yield parts of an image, and where each lies in an array of it."""
    across = min(image.width, _BLOCK)
    down = max(1, _BLOCK // across)
    for top in range(0, image.height, down):
        for left in range(0, image.width, across):
            low, right = min(top + down, image.height), min(left + across, image.width)
            yield (slice(top, low), slice(left, right)), image.crop((left, top, right, low))


def _orientation(image: Image.Image, where: str) -> int:
    """Return how an image is turned, by its EXIF; 1 for one that is upright."""
    text = image.info.get("Raw profile type exif")
    if isinstance(text, str) and image.info.get("exif") is None:
        check_exif(bytes.fromhex("".join(text.split("\n")[3:])), where)
    turned = image.getexif().get(_ORIENTATION, 1)
    return turned if isinstance(turned, int) else 1


def _upright(pixels: np.ndarray, turned: int) -> np.ndarray:
    """Return pixels `[H, W, ...]` as their EXIF orientation, 1 to 8, means them."""
    if turned in (5, 6, 7, 8):
        pixels = pixels.swapaxes(0, 1)
    if turned in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if turned in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return np.ascontiguousarray(pixels)


def _raw_mode(image: Image.Image) -> str:
    """Return Pillow's name of how the pixels lie in the file."""
    tiles = getattr(image, "tile", [])
    arguments = tiles[0].args if tiles else ""
    return arguments if isinstance(arguments, str) else str(arguments[0])


def _deep_colour(image: Image.Image) -> bool:
    """Whether a file holds 16-bit numbers of which Pillow would keep the upper half."""
    return ";16" in _raw_mode(image) and image.mode not in _DEEP_MODES


def _decode_deep_colour(data: bytes, image: Image.Image, where: str) -> np.ndarray:
    """Return 16-bit colours `[H, W, 3]`, or greys `[H, W]`; transparent pixels become black."""
    raw = _raw_mode(image)
    if raw == "LA;16B":  # grey and alpha as one number of 32 bits
        image._mode = "I"  # what Pillow's own plugins set
        _with_raw_mode(image, "I;32B").load()
        greys = np.empty((image.height, image.width), np.uint16)
        for place, part in _blocks(image):
            both = np.asarray(part)
            share = (both & 0xFFFF) / 65535.0
            greys[place] = np.rint(((both >> 16) & 0xFFFF) * share)
        return _upright(greys, _orientation(image, where))
    if raw not in _OTHER_BYTE:
        raise ValueError(f"16-bit pixels of the kind {raw} are not read")
    other = _with_raw_mode(Image.open(io.BytesIO(data), formats=FORMATS), _OTHER_BYTE[raw])
    for half in (image, other):
        half.load()
    colours = np.empty((image.height, image.width, 3), np.uint16)
    for (place, high), (_, low) in zip(_blocks(image), _blocks(other), strict=True):
        both = np.asarray(high, np.uint16) * np.uint16(256) + np.asarray(low, np.uint16)
        if image.mode == "RGBA":
            colours[place] = np.rint(both[:, :, :3] * (both[:, :, 3:] / 65535.0))
        else:
            colours[place] = both[:, :, :3]
    turned = _orientation(image, where)
    del image, other, half
    return _upright(colours, turned)


def _with_raw_mode(image: Image.Image, raw: str) -> Image.Image:
    tiles = image.tile  # type: ignore[attr-defined]
    image.tile = [  # type: ignore[attr-defined]
        tile._replace(args=raw if isinstance(tile.args, str) else (raw, *tile.args[1:]))
        for tile in tiles
    ]
    return image


def _whole_greys(image: Image.Image, where: str) -> np.ndarray:
    ends, greys = [], np.empty((image.height, image.width), np.uint16)
    for place, part in _blocks(image):
        values = np.asarray(part)
        ends += [int(values.min()), int(values.max())]
        greys[place] = values.astype(np.uint16)
    low, high = min(ends), max(ends)
    if low < 0 or high >= 1 << 16:
        what = f"greys from {low} to {high} without a display range"
        remedy = "export it as 8 or 16 bits without sign, or as DICOM with a window"
        raise WaraError("data", what, where, remedy)
    return greys


def _float_to_uint8(image: Image.Image, where: str) -> np.ndarray:
    greys = np.empty((image.height, image.width), np.uint8)
    for place, part in _blocks(image):
        values = np.asarray(part)
        # NaN fails both comparisons.
        if not (values.min() >= 0 and values.max() <= 1):
            what = "floating-point greys outside 0..1, without a display range"
            remedy = "export it as 8 or 16 bits without sign, or as DICOM with a window"
            raise WaraError("data", what, where, remedy)
        greys[place] = scale(values.astype(np.float64), 0, 1)
    return greys


def _declared_bits(data: bytes) -> int | None:
    """Significant bits of a PNG by its sBIT chunk, which Pillow does not read."""
    for kind, start, length in png_chunks(data):
        body = data[start : start + min(length, 8)]
        if kind == b"sBIT" and body and all(1 <= bits <= 16 for bits in body):
            return max(body[: 3 if len(body) > 2 else 1])  # without the alpha channel
        if kind in (b"PLTE", b"IDAT"):
            break
    return None
