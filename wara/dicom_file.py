"""The bytes of a DICOM file: header, deflated data sets, and where the pixels lie (PS3.5, PS3.10).

pydicom reads the elements; what it may read is bounded here, because an element can hold millions
of values, a sequence millions of items, and a deflated data set a thousand times its own length.
"""

from __future__ import annotations

import contextlib
import io
import math
import struct
import zlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from wara.bounds import PARTS, check_size, of_the_machine
from wara.errors import WaraError

if TYPE_CHECKING:
    from pydicom.dataset import Dataset

Refuse = Callable[..., WaraError]

# The elements that pixels depend on. Nothing else is parsed, so that neither a warning nor an error
# can carry a patient's name into a log.
_ELEMENTS = [
    "SOPInstanceUID", "SamplesPerPixel", "PhotometricInterpretation", "PlanarConfiguration",
    "NumberOfFrames", "Rows", "Columns", "BitsAllocated", "BitsStored", "HighBit",
    "PixelRepresentation", "PixelPaddingValue", "PixelPaddingRangeLimit", "RescaleIntercept",
    "RescaleSlope", "ModalityLUTSequence", "WindowCenter", "WindowWidth", "VOILUTFunction",
    "VOILUTSequence", "PresentationLUTShape",
    "SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence",
    *(
        f"{segmented}{colour}PaletteColorLookupTable{part}"
        for colour in ("Red", "Green", "Blue")
        for segmented, part in (("", "Descriptor"), ("", "Data"), ("Segmented", "Data"))
    ),
    "ExtendedOffsetTable", "ExtendedOffsetTableLengths", "FloatPixelData",
    "DoubleFloatPixelData", "PixelData",
]  # fmt: skip

# One element as it lies in the file; a lookup table has at most 65,536 numbers of two bytes.
_ELEMENT, _VALUES = 2 << 20, 1 << 16
# All that is read of a header, and what a deflated one may inflate to beside its pixels.
_HEADER = 32 << 20
_TRAILING = 1 << 20
_LONG = (b"OB", b"OW", b"OF", b"OD", b"OL", b"OV", b"UN", b"UC", b"UR", b"UT", b"SQ", b"SV", b"UV")
_UNDEFINED = 0xFFFFFFFF
_DEFLATED = b"1.2.840.10008.1.2.1.99"
_PLAIN_META = b"\2\0\x10\0UI\x14\x001.2.840.10008.1.2.1\0"
_ITEM, _END = b"\xfe\xff\x00\xe0", b"\xfe\xff\xdd\xe0"
_AGAIN = "copy it again from its origin"
_EXPORT = "export it again from the archive"
_CONVERT = "convert it to PNG, JPEG, TIFF or DICOM"
# Beyond this no attribute of an image has a number; sums of larger ones would lose the pixels.
_LARGEST = 1e15


class _Metered(io.BytesIO):
    """A file that refuses to be read for longer than a header of one image is."""

    def __init__(self, data: bytes, refuse: Refuse) -> None:
        super().__init__(data)
        self.refuse, self.reads, self.taken = refuse, 0, 0

    def read(self, size: int | None = -1, /) -> bytes:
        self.reads += 1
        if size is not None and size > _ELEMENT:
            raise self.refuse(f"a DICOM attribute of {size:,} bytes")
        found = super().read(_ELEMENT + 1 if size is None or size < 0 else size)
        self.taken += len(found)
        if self.reads > PARTS or self.taken > _HEADER or len(found) > _ELEMENT:
            raise self.refuse("a DICOM header of more than any image has")
        return found


class DicomFile:
    """The header of a DICOM object, and its pixels as they are stored.

    Args:
        data: the file.
        elements: keywords of what is read.
        refuse: makes a refusal of a text and a remedy.

    Raises:
        WaraError: kind "data".
    """

    def __init__(self, data: bytes, elements: list[str], refuse: Refuse) -> None:
        import pydicom  # a second of import that PNG users should not pay for

        self.refuse = refuse
        self._inflate: Any = None
        self._rest = b""
        syntax, start = _meta(data)
        if syntax == _DEFLATED:
            data = self._inflated_header(data, start)
        self._data = data
        file = _Metered(data, refuse)
        # `force`: `is_dicom` has looked, and the preamble may be missing.
        self.header: Dataset = pydicom.dcmread(
            file, specific_tags=elements, force=True, stop_before_pixels=True
        )
        self._place = file.tell()
        self._check_lengths()

    def _inflated_header(self, data: bytes, start: int) -> bytes:
        self._inflate = zlib.decompressobj(-zlib.MAX_WBITS)
        first = self._inflate.decompress(data[start:], _HEADER)
        self._rest = self._inflate.unconsumed_tail
        return bytes(128) + b"DICM" + _PLAIN_META + first

    def _check_lengths(self) -> None:
        """Refuse attributes of many values before they are made numbers."""
        for tag in self.header.keys():
            element: Any = self.header.get_item(tag)
            value = getattr(element, "value", None)
            table = "LookupTable" in (keyword := _keyword(tag))
            if (
                isinstance(value, bytes)
                and len(value) > _VALUES
                and not (
                    table or keyword.endswith("Sequence") or keyword.startswith("ExtendedOffset")
                )
            ):
                raise self.refuse(f"{keyword or 'an attribute'} of {len(value):,} bytes")

    def pixels(self, length: int) -> tuple[bytes, str, bool]:
        """Return the pixel data, its VR, and whether it is in fragments.

        Args:
            length: bytes that the header states, for pixels that are not compressed.

        Raises:
            WaraError: kind "data" when there are none, fewer or more.
        """
        data = self._data
        if self._inflate is not None:
            more = self._inflate.decompress(self._rest, length + _TRAILING)
            if self._inflate.unconsumed_tail:
                raise self.refuse("a deflated object that yields more than its header states")
            if not self._inflate.eof:
                raise self.refuse("damaged DICOM: the deflated data end too soon", _AGAIN)
            data, self._data, self._rest = data + more, b"", b""
        little = bool(self.header.is_little_endian)
        order = "<" if little else ">"
        head = data[self._place : self._place + 12]
        if len(head) < 8 or struct.unpack_from(f"{order}HH", head) != (0x7FE0, 0x10):
            raise self.refuse("DICOM object without pixel data", "leave it out of the data set")
        if head[4:6] in _LONG and len(head) == 12:
            vr, at, stated = head[4:6].decode(), 12, struct.unpack_from(f"{order}I", head, 8)[0]
        else:
            vr, at, stated = "OW", 8, struct.unpack_from(f"{order}I", head, 4)[0]
        start = self._place + at
        if stated == _UNDEFINED:
            return data[start:], vr, True
        if start + stated > len(data):
            raise self.refuse("damaged DICOM: the pixel data end too soon", _AGAIN)
        return data[start : start + stated], vr, False

    def frame(self, fragments: bytes, closed: bool) -> bytes:
        """Return the one frame of encapsulated pixel data (PS3.5 A.4), its fragments joined.

        Args:
            fragments: the items, the first one the table of offsets.
            closed: whether a delimiter ends them; else they fill their element.

        Raises:
            WaraError: kind "data" when they are damaged.
        """
        place = 0
        parts: list[tuple[int, int]] = []
        while fragments[place : place + 4] == _ITEM and len(parts) <= PARTS:
            (length,) = (
                struct.unpack_from("<I", fragments.ljust(8), place + 4)
                if (place + 8 <= len(fragments))
                else (_UNDEFINED,)
            )
            place += 8
            if place + length > len(fragments):
                raise self.refuse("damaged DICOM: a fragment of the pixels is cut short", _AGAIN)
            parts.append((place, place + length))
            place += length
        ends = fragments[place : place + 4] == _END if closed else place == len(fragments)
        if not ends or len(parts) < 2:
            raise self.refuse("damaged DICOM: fragments of the pixels are missing", _AGAIN)
        if len(parts) > PARTS:
            raise self.refuse(f"DICOM pixels in more than {PARTS:,} fragments")
        table = parts[0][1] - parts[0][0]
        if table > 4:
            raise self.refuse("DICOM pixels of several frames, where the header states one")
        if len(parts) == 2:
            return fragments[parts[1][0] : parts[1][1]]
        return b"".join(fragments[first:last] for first, last in parts[1:])


class Header:
    """What a DICOM object says of its one image, each attribute refused when it makes no sense.

    Args:
        data: the file.
        where: its name, for refusals.

    Raises:
        WaraError: kind "data", in words that quote no text of the header.
    """

    def __init__(self, data: bytes, where: str) -> None:
        self.where = where
        with self.unquoted():
            self.file = DicomFile(data, _ELEMENTS, self.refuse)
            self.dataset = self.file.header
            self._check_header()

    @contextlib.contextmanager
    def unquoted(self) -> Iterator[None]:
        """Make one refusal of whatever pydicom and its decoders raise, without their words.

        They quote values, and in a place for a code or a number there may stand a name.
        """
        try:
            yield
        except WaraError:
            raise
        except Exception as error:
            if lacking := of_the_machine(error, self.where):
                raise lacking from None
            what = f"damaged DICOM: {type(error).__name__}"
            raise self.refuse(what, "copy it again from its origin") from None

    def refuse(self, what: str, remedy: str = _EXPORT) -> WaraError:
        """Return the refusal of this file, which quotes no text of its header."""
        return WaraError("data", what, self.where, remedy)

    # -- attributes ---------------------------------------------------------------------------

    def _check_header(self) -> None:
        header = self.dataset
        if "Rows" not in header or "Columns" not in header:
            raise self.refuse("DICOM object without an image", "leave it out of the data set")
        check_size(self.count("Columns"), self.count("Rows"), self.where)
        frames = self.count("NumberOfFrames", 1)
        if frames != 1:
            remedy = "export the frame that is read as a file of its own"
            raise self.refuse(f"DICOM with {frames} frames, one is expected", remedy)
        if "FloatPixelData" in header or "DoubleFloatPixelData" in header:
            raise self.refuse("floating-point pixels have no display range", _CONVERT)
        syntax = header.file_meta.get("TransferSyntaxUID") if header.file_meta else None
        if not syntax:
            raise self.refuse("the header names no transfer syntax, so pixels cannot be told")
        self.bits, allocated = self.count("BitsStored"), self.count("BitsAllocated")
        high = self.count("HighBit", self.bits - 1)
        if allocated not in (1, 8, 16, 24, 32, 40, 48, 56, 64):
            raise self.refuse(f"BitsAllocated is {allocated}")
        if not 1 <= self.bits <= allocated:
            raise self.refuse(f"BitsStored is {self.bits}, BitsAllocated {allocated}")
        if high != self.bits - 1:
            raise self.refuse(f"HighBit is {high} where {self.bits} bits are stored")
        self.signed = self.count("PixelRepresentation", 0 if self.bits <= 8 else None) == 1

    def values(self, name: str) -> list[float]:
        """Return the numbers of an attribute: none when absent or empty.

        An enhanced object of one frame has them in its functional groups.
        """
        found = numbers(self.dataset.get(name))
        inner = numbers(self.in_groups(name))
        if found is None or inner is None:
            raise self.refuse(f"{name} is no finite number")
        if any(abs(number) > _LARGEST for number in (*found, *inner)):
            raise self.refuse(f"{name} is beyond {_LARGEST:g}")
        if found and inner and found != inner:
            raise self.refuse(f"{name} is told twice, as {found[:4]} and {inner[:4]}")
        return found or inner

    def in_groups(self, name: str) -> Any:
        """Return an attribute as the functional groups of an enhanced object tell it, else None."""
        macros = {
            "RescaleIntercept": "PixelValueTransformationSequence",
            "RescaleSlope": "PixelValueTransformationSequence",
            "WindowCenter": "FrameVOILUTSequence",
            "WindowWidth": "FrameVOILUTSequence",
            "VOILUTFunction": "FrameVOILUTSequence",
            "VOILUTSequence": "FrameVOILUTSequence",
        }
        # What a frame says of itself goes before what is shared.
        for groups in ("PerFrameFunctionalGroupsSequence", "SharedFunctionalGroupsSequence"):
            for group in (self.dataset.get(groups) or [])[:1]:
                for item in (group.get(macros.get(name, "")) or [])[:1]:
                    if item.get(name) not in (None, ""):
                        return item.get(name)
        return None

    def count(self, name: str, default: int | None = None) -> int:
        """Return the one whole number of an attribute, or `default` where it is absent."""
        values = self.values(name)
        if len(values) > 1 or (not values and default is None):
            raise self.refuse(f"{name} has {len(values) or 'no'} value{'s' * (len(values) > 1)}")
        value = values[0] if values else default
        if value is None or value != int(value):
            raise self.refuse(f"{name} is {value}, not a whole number")
        return int(value)

    def luts(self, name: str) -> list[Dataset]:
        """Return the lookup tables of a sequence, at the top or in a group."""
        found = self.dataset.get(name) or self.in_groups(name) or []
        return list(found)


def _meta(data: bytes) -> tuple[bytes, int]:
    """Return the transfer syntax of the meta header (PS3.10 7.1), and where that header ends."""
    place, syntax = 132 if data[128:132] == b"DICM" else 0, b""
    for _ in range(1000):
        if data[place : place + 2] != b"\2\0" or place + 12 > len(data):
            break
        wide = data[place + 4 : place + 6] in _LONG
        head = 12 if wide else 8
        (length,) = struct.unpack_from(
            "<I" if wide else "<H", data, place + head - (4 if wide else 2)
        )
        if data[place + 2 : place + 4] == b"\x10\0":
            syntax = data[place + 8 : place + 8 + min(length, 64)].rstrip(b"\0 ")
        place += head + length
    return syntax, place


def _keyword(tag: Any) -> str:
    from pydicom.datadict import keyword_for_tag

    return str(keyword_for_tag(tag))


def check_segmented(table: bytes, count: int, order: str, refuse: Refuse) -> None:
    """Refuse a segmented lookup table (PS3.3 C.7.9.2) that does not expand to what it states.

    Args:
        table: its numbers, of 16 bits.
        count: entries that its descriptor states.
        order: "<" or ">".
        refuse: makes a refusal of a text.

    Raises:
        WaraError: kind "data".
    """
    words = struct.unpack(f"{order}{len(table) // 2}H", table[: len(table) // 2 * 2])
    total = place = 0
    lengths: dict[int, tuple[int, int]] = {}
    while place + 1 < len(words) and total <= count:
        kind, many = words[place], words[place + 1]
        step = {0: 2 + many, 1: 3, 2: 4}.get(kind)
        if step is None or place + step > len(words):
            break
        if kind == 2:  # `many` segments from an earlier place on, once more
            at, start = 0, (words[place + 2] | words[place + 3] << 16) // 2
            for _ in range(many):
                size, step_there = lengths.get(start, (count + 1, 1))
                at, start = at + size, start + step_there
                if at > count:
                    break
            total += at
        else:
            lengths[place] = (many, step)
            total += many
        place += step
    if total != count:
        raise refuse(f"a segmented palette that does not give its {count} entries")


def numbers(value: Any) -> list[float] | None:
    """Return an attribute as numbers, none when absent or empty; None when it is no number."""
    if value is None or value == "" or (hasattr(value, "__len__") and not len(value)):
        return []
    try:
        parts = [value] if isinstance(value, (int, float, str)) else list(value)
        found = [float(part) for part in parts]
    except (TypeError, ValueError, OverflowError):
        return None
    return found if all(math.isfinite(number) for number in found) else None
