"""Files that would take a machine's memory: refused, or read, and never beyond 1.5 GB."""

from __future__ import annotations

import io
import json
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pydicom
import pytest
from PIL import Image
from pydicom.encaps import encapsulate
from pydicom.uid import (
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    JPEGLSLossless,
    RLELossless,
)

sys.path.insert(0, str(Path(__file__).parents[1]))
from test_images import dicom, encode  # noqa: E402

LIMIT = 1500  # MiB
READER = Path(__file__).with_name("image_reader.py")
SMALL = np.arange(1200, dtype="u1").reshape(30, 40)


def chunk(name: bytes, body: bytes) -> bytes:
    check = struct.pack(">I", zlib.crc32(name + body))
    return struct.pack(">I", len(body)) + name + body + check


def png(side: int, *more: bytes, rows: bytes | None = None) -> bytes:
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0))
    body = zlib.compress(bytes((side + 1) * side) if rows is None else rows, 1)
    signature = b"\x89PNG\r\n\x1a\n"
    return b"".join([signature, head, *more, chunk(b"IDAT", body), chunk(b"IEND", b"")])


def inflating(head: bytes, megabytes: int) -> bytes:
    """Deflated `head`, then zeros."""
    packer, parts = zlib.compressobj(9, zlib.DEFLATED, -15), []
    parts.append(packer.compress(head))
    parts += [packer.compress(bytes(1 << 20)) for _ in range(megabytes)]
    return b"".join([*parts, packer.flush()])


def deflated(megabytes: int, *, in_header: bool = False) -> bytes:
    """A deflated object of 30 x 40 pixels with far more behind them, or before them."""
    plain = dicom(SMALL)
    start = 144 + struct.unpack_from("<I", plain, 140)[0]
    body = plain[start:]
    if in_header:
        body = b"\x09\x00\x10\x10OB\0\0" + struct.pack("<I", megabytes << 20)
    meta = plain[:start].replace(b"1.2.840.10008.1.2.1\0", b"1.2.840.10008.1.2.1.99")
    meta = meta.replace(b"UI\x14\x001.2.840.10008.1.2.1.99", b"UI\x16\x001.2.840.10008.1.2.1.99")
    return meta + inflating(body, megabytes)


def frame(syntax: str, body: bytes, **tags: object) -> bytes:
    return dicom(SMALL, syntax=syntax, body=encapsulate([body]), **tags)


def jpeg_of(side: int) -> bytes:
    return encode(Image.new("L", (side, side)), "JPEG")


def scans(count: int) -> bytes:
    """A progressive JPEG whose last scan is told over and over."""
    data = encode(Image.new("L", (2000, 2000), 90), "JPEG", progressive=True)
    last = data.rindex(b"\xff\xda")
    return data[:last] + data[last:-2] * count + data[-2:]


def overlapping() -> bytes:
    """A TIFF directory whose entries all read the same megabyte."""
    body = encode(Image.fromarray(SMALL), "TIFF")
    place = len(body)
    many = [struct.pack("<HHII", 40000 + n, 7, 1 << 20, 8) for n in range(2000)]
    table = struct.pack("<H", len(many)) + b"".join(many) + bytes(4)
    return body[:4] + struct.pack("<I", place) + body[8:] + table + bytes(1 << 20)


def pages(count: int) -> bytes:
    """A TIFF whose directory is there many times, one after the other."""
    body = encode(Image.fromarray(SMALL), "TIFF")
    (place,) = struct.unpack_from("<I", body, 4)
    (entries,) = struct.unpack_from("<H", body, place)
    table = body[place : place + 2 + 12 * entries]
    step = len(table) + 4
    ends = [len(body) + n * step for n in range(count)]
    parts = [table + struct.pack("<I", after) for after in [*ends[1:], 0]]
    return b"".join([body[:4], struct.pack("<I", ends[0]), body[8:], *parts])


def j2k(width: int, height: int, tile: int) -> bytes:
    """A JPEG 2000 header of one colour, and no more."""
    size = struct.pack(">HHHIIIIIIIIHBBB", 0xFF51, 41, 0, width, height, 0, 0, tile, tile, 0, 0,
                       1, 7, 1, 1)  # fmt: skip
    style = b"\xff\x52\x00\x0c\x00\x00\x00\x01\x00\x05\x04\x04\x00\x01"
    return b"\xff\x4f" + size + style + b"\xff\xd9"


def jls(width: int, height: int) -> bytes:
    return (
        b"\xff\xd8\xff\xf7"
        + struct.pack(">HBHHB", 11, 8, height, width, 1)
        + b"\x01\x11\x00\xff\xda\x00\x08\x01\x01\x00\x00\x00\x00"
        + bytes(64)
        + b"\xff\xd9"
    )


def many_values() -> bytes:
    """An attribute of a million numbers."""
    plain = dicom(SMALL)
    element = b"\x28\x00\x50\x10UN\0\0" + struct.pack("<I", 2_000_000) + b"1\\" * 1_000_000
    place = plain.rindex(b"\xe0\x7f\x10\x00")
    return plain[:place] + element + plain[place:]


REFUSED: dict[str, Callable[[], bytes]] = {
    "deflated, 400 MB behind the pixels": lambda: deflated(400),
    "deflated, 400 MB in the header": lambda: deflated(400, in_header=True),
    "JPEG larger than its header": lambda: frame(JPEGBaseline8Bit, jpeg_of(4000)),
    "JPEG-LS larger than its header": lambda: frame(JPEGLSLossless, jls(60000, 60000)),
    "JPEG 2000 larger than its header": lambda: frame(JPEG2000Lossless, j2k(60000, 60000, 60000)),
    "JPEG 2000 of tiles of one pixel": lambda: frame(
        JPEG2000Lossless, j2k(200, 200, 1), Rows=200, Columns=200),
    "RLE of many runs": lambda: frame(
        RLELossless, struct.pack("<16I", 1, 64, *[0] * 14) + b"\x81\0" * 2_000_000),
    "RLE with more segments than stated": lambda: frame(
        RLELossless, struct.pack("<16I", 15, *range(64, 94, 2)) + b"\x81\0" * 20),
    "fragments beyond counting": lambda: dicom(
        SMALL, syntax=RLELossless, body=b"\xfe\xff\x00\xe0\0\0\0\0" * 400_000),
    "more native pixels than stated": lambda: dicom(SMALL, body=bytes(40 << 20)),
    "an attribute of a million numbers": many_values,
    "BitsAllocated of 65,528": lambda: dicom(SMALL, BitsAllocated=65528),
    "Rows and Columns of 65,535": lambda: dicom(SMALL, Rows=65535, Columns=65535),
    "PNG, profile that inflates": lambda: png(
        8, chunk(b"iCCP", b"a\0\0" + zlib.compress(bytes(200 << 20)))),
    "PNG, text that inflates": lambda: png(
        8, chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(200 << 20)))),
    "PNG of a million chunks": lambda: png(8, *[chunk(b"prVt", b"")] * 1_000_000),
    "PNG beyond the limit": lambda: png(60000, rows=b""),
    "JPEG of 2,000 scans": lambda: scans(2000),
    "JPEG of 65,500 x 65,500": lambda: jpeg_of(64).replace(
        b"\x08\0\x40\0\x40", b"\x08\xff\xdc\xff\xdc"),
    "JPEG 2000 of 79 million greys, which OpenJPEG holds three times over": lambda: _compressed(
        JPEG2000Lossless),
    "TIFF whose entries overlap": overlapping,
    "TIFF of 3,000 pages": lambda: pages(3000),
}  # fmt: skip


def _large_dicom(bits: str) -> bytes:
    return dicom(np.zeros((8900, 8900), bits), WindowCenter="100", WindowWidth="200")


def _compressed(syntax: str) -> bytes:
    held = pydicom.dcmread(io.BytesIO(_large_dicom("u2")))
    held.compress(syntax)
    out = io.BytesIO()
    held.save_as(out)
    return out.getvalue()


TURNED = Image.Exif()
TURNED[0x0112] = 6

LARGE: dict[str, Callable[[], bytes]] = {
    "PNG of 79 million pixels": lambda: png(8900),
    "JPEG of 79 million pixels, progressive": lambda: encode(
        Image.new("RGB", (8900, 8900)), "JPEG", progressive=True),
    "TIFF of 79 million pixels, turned": lambda: encode(
        Image.new("RGB", (8900, 8900)), "TIFF", compression="tiff_lzw", exif=TURNED),
    "DICOM of 79 million greys of 16 bits": lambda: _large_dicom("u2"),
    "DICOM of 79 million greys of 8 bits": lambda: _large_dicom("u1"),
    "DICOM of 79 million greys of 16 bits, JPEG-LS": lambda: _compressed(JPEGLSLossless),
    "DICOM of 79 million greys of 16 bits, RLE": lambda: _compressed(RLELossless),
}  # fmt: skip


def read(*paths: Path) -> dict[str, dict]:
    done = subprocess.run(
        [sys.executable, str(READER), *map(str, paths)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


def test_bombs_are_refused_within_memory(tmp_path: Path, amount, tally) -> None:
    names = list(REFUSED)[:: amount(3, 1)]
    paths = {}
    for number, name in enumerate(names):
        paths[name] = tmp_path / f"{number}.bin"
        paths[name].write_bytes(REFUSED[name]())
    said, lost = read(*paths.values()), []
    for name, path in paths.items():
        found = said[str(path)]
        if found.get("kind") != "data" or "\n" in found["line"] or found["peak"] > LIMIT:
            lost.append(f"{name}: {found}")
    tally("image files that inflate or lie", len(names), lost)


@pytest.mark.slow
def test_the_largest_images_stay_within_memory(tmp_path: Path, tally) -> None:
    lost = []
    for number, (name, make) in enumerate(LARGE.items()):
        path = tmp_path / f"{number}.bin"
        path.write_bytes(make())
        found = read(path)[str(path)]
        print(f"{name}: {found['peak']} MiB, {found['seconds']:.1f} s")
        if found.get("shape") != [8900, 8900, 3] or found["peak"] > LIMIT:
            lost.append(f"{name}: {found}")
        path.unlink()
    tally("the largest images, within memory", len(LARGE), lost)
