"""What a compressed picture says of itself: JPEG (T.81), JPEG-LS (T.87), JPEG 2000 (T.800), RLE.

Only headers are read here, so that a picture that is not what the file around it says, or that asks
for more work than its pixels explain, is refused before a decoder starts.
"""

from __future__ import annotations

import itertools
import re
import struct
from dataclasses import dataclass

from wara.bounds import PASSES, PIXEL_PASSES
from wara.errors import WaraError

_AGAIN = "export it again from its origin"
# After a scan has begun, its bytes go on to the next marker that is no restart and no stuffing.
_MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")
_FRAMES = frozenset({*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}) | {0xF7}
_START, _END, _SCAN, _APP1, _ALONE = 0xD8, 0xD9, 0xDA, 0xE1, 0x01
_SEGMENTS = 20_000
_FILL = 4096
# Pieces into which JPEG 2000 cuts a picture; a decoder has a record of some hundred bytes for each.
_TILES, _PIECES = 16_384, 1_000_000


@dataclass(frozen=True)
class Codestream:
    """The header of a compressed picture.

    Args:
        width: in pixels.
        height: in pixels.
        samples: per pixel.
        bits: per sample.
        scans: passes over the picture.
        exif: the EXIF directory of a JPEG.
    """

    width: int
    height: int
    samples: int
    bits: int
    scans: int = 1
    exif: bytes = b""


def _refuse(what: str, where: str) -> WaraError:
    return WaraError("data", what, where, _AGAIN)


def read_jpeg(data: bytes, where: str) -> Codestream:
    """Return the header of a JPEG or JPEG-LS picture.

    Raises:
        WaraError: kind "data" when it has none, or would be gone through too many times.
    """
    frame: tuple[int, int, int, int] | None = None
    place, scans = 2, 0
    exif: list[bytes] = []
    for _ in range(_SEGMENTS):
        found = _MARKER.search(data, place)
        if found is None:
            break
        if not scans and found.start() - place > _FILL:
            raise _refuse("damaged image: a JPEG header with gaps", where)
        code, place = data[found.start() + 1], found.end()
        if code == _END:
            break
        if code in (_START, _ALONE):
            continue
        if place + 2 > len(data):
            break
        (length,) = struct.unpack_from(">H", data, place)
        body = data[place + 2 : place + length]
        if code in _FRAMES:
            if frame is not None:
                raise _refuse("a JPEG with two frame headers", where)
            if len(body) < 6:
                raise _refuse("damaged image: a JPEG frame header cut short", where)
            bits, height, width, samples = struct.unpack_from(">BHHB", body)
            frame = (width, height, samples, bits)
        elif code == _APP1 and body.startswith(b"Exif\0\0"):
            exif.append(body if not exif else body[6:])
        elif code == _SCAN:
            scans += 1
            passes = frame[0] * frame[1] * scans if frame and scans > 1 else 0
            if scans > PASSES or passes > PIXEL_PASSES:
                raise _refuse(f"a JPEG of {scans} scans or more over its pixels", where)
        place += length
    else:
        raise _refuse(f"a JPEG of more than {_SEGMENTS:,} segments", where)
    if frame is None:
        raise _refuse("damaged image: a JPEG without a frame header", where)
    return Codestream(*frame, scans, b"".join(exif))


def read_jpeg2000(data: bytes, where: str) -> Codestream:
    """Return the header of a JPEG 2000 picture, with or without the boxes of a JP2 file around it.

    Raises:
        WaraError: kind "data" when it has none, or is cut into more pieces than a decoder can keep.
    """
    start = 0 if data.startswith(b"\xff\x4f") else data[: 1 << 16].find(b"\xff\x4f\xff\x51")
    if start < 0 or len(data) < start + 42:
        raise _refuse("no header of JPEG 2000", where)
    if b"pclr" in data[:start]:
        raise _refuse("JPEG 2000 with a palette of its own", where)
    (x, y, left, top, tile_width, tile_height, tile_left, tile_top, samples) = struct.unpack_from(
        ">8IH", data, start + 8
    )
    parts = [data[at : at + 3] for at in range(start + 42, start + 42 + 3 * samples, 3)]
    width, height = x - left, y - top
    if not parts or not parts[-1] or min(width, height, tile_width, tile_height) < 1:
        raise _refuse("no sound header of JPEG 2000", where)
    if any(part != parts[0] or part[1:] != b"\1\1" for part in parts):
        raise _refuse("JPEG 2000 whose colours differ in size or depth", where)
    tiles = -(-(x - tile_left) // tile_width) * -(-(y - tile_top) // tile_height)
    if not 1 <= tiles <= _TILES:
        raise _refuse(f"JPEG 2000 of {tiles} tiles; the limit is {_TILES:,}", where)
    sides = (min(width, tile_width), min(height, tile_height))
    layers = 1
    for code, body in _jpeg2000_segments(data, start + 2):
        if code == 0x52 and len(body) >= 10:
            (layers,) = struct.unpack_from(">H", body, 2)
            style, rest = body[0], body[5:]
        elif code == 0x53 and len(body) >= 7:
            wide = 2 if samples > 256 else 1
            style, rest = body[wide], body[wide + 1 :]
        else:
            continue
        pieces = _pieces(sides, layers, style, rest) * tiles * samples
        if pieces > _PIECES:
            what = f"JPEG 2000 cut into {pieces:,} pieces; the limit is {_PIECES:,}"
            raise _refuse(what, where)
    return Codestream(width, height, samples, (parts[0][0] & 0x7F) + 1)


def _jpeg2000_segments(data: bytes, place: int) -> list[tuple[int, bytes]]:
    """Return the segments of the main header and of the header of each part of a tile."""
    found: list[tuple[int, bytes]] = []
    tile = 0
    while place + 4 <= len(data) and data[place] == 0xFF and len(found) < _TILES * 8:
        code = data[place + 1]
        if code == 0x93:  # the data of a part of a tile, to its end
            part = struct.unpack_from(">I", data, tile + 6)[0]
            if part < 14:
                break
            place = tile + part
            continue
        if code == 0x90:
            tile = place
        (length,) = struct.unpack_from(">H", data, place + 2)
        found.append((code, data[place + 4 : place + 2 + length]))
        place += 2 + length
    return found


def _pieces(sides: tuple[int, int], layers: int, style: int, rest: bytes) -> int:
    """Return packets and code blocks of a tile of one colour (T.800 B.6, B.7)."""
    levels, block = min(rest[0], 32), ((rest[1] & 15) + 2, (rest[2] & 15) + 2)
    total = 0
    for resolution in range(levels + 1):
        size = [-(-side >> (levels - resolution)) for side in sides]
        precinct = (15, 15)
        if style & 1 and 5 + resolution < len(rest):
            precinct = (rest[5 + resolution] & 15, rest[5 + resolution] >> 4)
        many = [(side >> one) + 2 for side, one in zip(size, precinct, strict=True)]
        total += layers * many[0] * many[1]
        blocks = [min(one, two) for one, two in zip(block, precinct, strict=True)]
        many = [(side >> one) + 1 for side, one in zip(size, blocks, strict=True)]
        total += many[0] * many[1]
    return total


def check_rle(data: bytes, planes: int, pixels: int, where: str) -> None:
    """Refuse RLE (PS3.5 G) whose segments are not those of the header, or not of its length.

    Args:
        data: the frame.
        planes: bytes per pixel, each of which is a segment.
        pixels: bytes that a segment holds.
        where: its name, for refusals.

    Raises:
        WaraError: kind "data".
    """
    if len(data) < 64:
        raise _refuse("an RLE header cut short", where)
    count, *offsets = struct.unpack_from("<16I", data)
    starts = [*offsets[:planes], len(data)]
    if count != planes or starts[0] < 64 or sorted(set(starts)) != starts:
        raise _refuse(f"RLE of {count} segments, {planes} are stated by the header", where)
    for first, last in itertools.pairwise(starts):
        # A run of two bytes gives at most 128, a literal less than its own length.
        if (last - first + 1) // 2 * 128 < pixels:
            raise _refuse("an RLE segment too short for its pixels", where)
        if last - first > pixels + pixels // 64 + 1024:
            raise _refuse("an RLE segment that yields more than its pixels", where)
