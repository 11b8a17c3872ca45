"""How much memory and work an image file may ask for, told from its header and its length.

Decoders are C code that no watchdog in the same process can stop, and a limit in seconds would give
another verdict on another machine. So what a decoder would have to do is bounded before it starts:
bytes of pixels, passes over them, directories, chunks, and elements that are read one by one.
"""

from __future__ import annotations

import errno
import struct
from collections.abc import Iterator

from wara.errors import WaraError, out_of_memory

# A full-field mammogram has 24 million pixels; a file whose header claims more than this is a
# whole slide, a mistake or an attack. Pillow's own limit (89 million) only warns.
PIXEL_CAP = 80_000_000
PIXEL_BYTES = 256 << 20
BYTE_CAP = 320 << 20
# Beside its pixels a file holds colour profiles, previews and what a vendor adds.
BESIDE_PIXELS = 64 << 20
# What one file may take while it is decoded, with its own bytes, by the need of its codec.
MEMORY_CAP = 1_150_000_000
# Pixels times passes over them: 25 passes over the largest image. Progressive JPEG has about ten.
PIXEL_PASSES = 2_000_000_000
PASSES = 100
# Parts of a file that Python code walks through, at a few microseconds each.
PARTS = 200_000
NUMBERS = 1 << 18

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
SMALLER = "export the image at a smaller size"
AGAIN = "export it again as a plain PNG or TIFF"
_SIZES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4,
          16: 8, 17: 8, 18: 8}  # fmt: skip
_AS_BYTES = (1, 2, 6, 7)
_TILE_WIDTH, _TILE_LENGTH = 322, 323
_NEXT_DIRECTORIES = 1000
_MACHINE = (errno.EMFILE, errno.ENFILE, errno.EAGAIN)
_DISK = (errno.EIO, errno.ESTALE, errno.ETIMEDOUT)


def check_size(width: int, height: int, where: str) -> None:
    """Refuse a width and height, in pixels, of none or beyond `PIXEL_CAP`.

    Raises:
        WaraError: kind "data".
    """
    if width < 1 or height < 1:
        raise WaraError("data", f"image of {width} x {height} pixels", where, "remove it")
    if width * height > PIXEL_CAP:
        what = f"image of {width} x {height} pixels; the limit is {PIXEL_CAP:,} in all"
        raise WaraError("data", what, where, SMALLER)


def check_need(pixels: int, length: int, where: str, *, need: int = 0) -> None:
    """Refuse a file whose decoding would take more than a process may have for one image.

    Args:
        pixels: bytes that its pixels have once decoded, by its header.
        length: bytes of the file.
        where: its name, for refusals.
        need: bytes that its codec takes at its worst, the file itself left out.

    Raises:
        WaraError: kind "data".
    """
    if pixels > PIXEL_BYTES:
        what = f"{pixels >> 20} MiB of pixels; the limit is {PIXEL_BYTES >> 20}"
        raise WaraError("data", what, where, SMALLER)
    if length > 2 * pixels + BESIDE_PIXELS:
        what = f"file of {length >> 20} MiB for {pixels >> 10} KiB of pixels"
        raise WaraError("data", what, where, AGAIN)
    if length + need > MEMORY_CAP:
        what = f"decoding it takes {(length + need) >> 20} MiB; the limit is {MEMORY_CAP >> 20}"
        raise WaraError("data", what, where, SMALLER)


def of_the_machine(error: BaseException, where: str) -> WaraError | None:
    """Return the refusal for what the machine lacked while a file was read; None for other faults.

    A file is not damaged because there was no memory, no descriptor or no disk to read it with.
    """
    close = "close other programs, or lower workers and batch_size"
    number = error.errno if isinstance(error, OSError) else None
    if out_of_memory(error):
        return WaraError("resources", "out of memory while an image was read", where, close)
    if number in _MACHINE:
        reason = (error.strerror or "").lower() if isinstance(error, OSError) else ""
        return WaraError("resources", f"cannot read: {reason}", where, close)
    if number in _DISK:
        said = (error.strerror or "") if isinstance(error, OSError) else ""
        return WaraError("storage", f"cannot read: {said}", where, "check the disk")
    return None


# -- PNG -----------------------------------------------------------------------------------------


def png_chunks(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """Yield name, start and length of each chunk of a PNG; nothing for another file."""
    place = len(PNG_SIGNATURE)
    while data.startswith(PNG_SIGNATURE) and place + 8 <= len(data):
        (length,) = struct.unpack_from(">I", data, place)
        yield data[place + 4 : place + 8], place + 8, length
        place += 12 + length


def check_png(data: bytes, where: str) -> None:
    """Refuse a PNG of too many chunks, or with a directory that is none.

    Raises:
        WaraError: kind "data".
    """
    for number, (name, start, length) in enumerate(png_chunks(data)):
        if number > PARTS:
            raise WaraError("data", f"PNG of more than {PARTS:,} chunks", where, AGAIN)
        if name == b"eXIf":
            check_exif(data[start : start + length], where)


# -- TIFF, and the directory of EXIF, which is one ----------------------------------------------


class _Directory:
    """Where the numbers of a TIFF lie: order of bytes, and sizes of classic and of big ones."""

    def __init__(self, data: bytes) -> None:
        self.order = {b"II": "<", b"MM": ">"}.get(data[:2], "")
        self.known = bool(self.order) and len(data) >= 16
        self.big = self.known and struct.unpack_from(f"{self.order}H", data, 2)[0] == 43
        self.count, self.step = ("Q", 20) if self.big else ("H", 12)
        self.word = "Q" if self.big else "I"
        self.first = 0
        if self.known:
            (self.first,) = struct.unpack_from(self.order + self.word, data, 8 if self.big else 4)

    def entries(self, data: bytes, place: int) -> tuple[list[tuple[int, int, int, int]], int]:
        """Return tag, type, count and start of the value of each entry, and the next directory.

        Raises:
            struct.error: when it does not lie in the file.
        """
        (count,) = struct.unpack_from(self.order + self.count, data, place)
        place += struct.calcsize(self.order + self.count)
        if place + count * self.step > len(data):
            raise struct.error
        form = f"{self.order}HH{self.word}"
        found = []
        for start in range(place, place + count * self.step, self.step):
            tag, kind, values = struct.unpack_from(form, data, start)
            found.append((tag, kind, values, start + struct.calcsize(form)))
        (following,) = struct.unpack_from(self.order + self.word, data, place + count * self.step)
        return found, following


def check_tiff(data: bytes, where: str) -> None:
    """Refuse a TIFF of several directories, or one that asks for more than lies in the file.

    Raises:
        WaraError: kind "data".
    """
    form, pages = _Directory(data), 0
    place, seen = form.first, set()
    # What does not add up is left to the decoder, which says why.
    while form.known and place and place not in seen and pages < _NEXT_DIRECTORIES:
        seen.add(place)
        try:
            entries, place = form.entries(data, place)
        except struct.error:
            break
        pages += 1
        if pages == 1:
            _check_entries(entries, data, where)
            _check_tiles(form, entries, data, where)
    if pages > 1:
        more = "more than " if pages == _NEXT_DIRECTORIES else ""
        what = f"holds {more}{pages} frames, one is expected"
        raise WaraError("data", what, where, "save one file per frame")


def check_exif(data: bytes, where: str) -> None:
    """Refuse EXIF whose entries ask for more than there is of it.

    Raises:
        WaraError: kind "data".
    """
    data = data.removeprefix(b"Exif\0\0")
    form = _Directory(data)
    if form.known:
        try:
            entries, _ = form.entries(data, form.first)
        except struct.error:
            return
        _check_entries(entries, data, where)


def _check_entries(entries: list[tuple[int, int, int, int]], data: bytes, where: str) -> None:
    # Entries may share their bytes, and each that does is read for itself.
    total = sum(values * _SIZES.get(kind, 0) for _, kind, values, _ in entries)
    numbers = sum(values for _, kind, values, _ in entries if kind not in _AS_BYTES)
    inside = [
        values * _SIZES.get(kind, 0)
        for _, kind, values, _ in entries
        if values * _SIZES.get(kind, 0) <= len(data)
    ]
    if sum(inside) > len(data) + 4096 or (total and numbers > 4 * NUMBERS):
        what = f"a directory of {len(entries)} entries that asks for {total:,} bytes"
        raise WaraError("data", what, where, AGAIN)


def _check_tiles(
    form: _Directory, entries: list[tuple[int, int, int, int]], data: bytes, where: str
) -> None:
    sides = []
    for tag, kind, _, start in entries:
        if tag in (_TILE_WIDTH, _TILE_LENGTH):
            letter = {3: "H", 4: "I", 16: "Q"}.get(kind, "H")
            sides.append(struct.unpack_from(form.order + letter, data, start)[0])
    if len(sides) == 2 and sides[0] * sides[1] > PIXEL_CAP:
        what = f"tiles of {sides[0]} x {sides[1]} pixels; the limit is {PIXEL_CAP:,} in all"
        raise WaraError("data", what, where, AGAIN)
