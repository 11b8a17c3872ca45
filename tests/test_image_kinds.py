"""What each kind of image file gives: one list of inputs, which is tested and printed in the docs.

`python tests/test_image_kinds.py --write` writes the tables of docs/images.md anew.
"""

from __future__ import annotations

import io
import struct
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pages
import pydicom
import pytest
from PIL import Image
from pydicom.dataset import Dataset
from test_images import _tiff, dicom, encode

from wara.errors import WaraError
from wara.images import read_image

RAMP = np.tile(np.linspace(0, 4095, 64).round().astype("u2"), (8, 1))  # 12 bits, dark to bright
DARK = np.tile(np.linspace(20, 90, 64).round().astype("u1"), (8, 1))


class Kind(NamedTuple):
    """One input: what it is, its bytes, the rule it is read by, and what must come out.

    `gives` is a refusal when it starts with "refused: ", else one of the words of `words`.
    """

    name: str
    make: Callable[[], bytes]
    gives: str
    rule: dict[str, Any] = {}


def words(picture: np.ndarray) -> str:
    """Say in words what a picture of `RAMP` (or `DARK`) looks like."""
    grey, level = picture[0, :, 0].astype(int), RAMP[0].astype(float)
    known = {
        "the whole range, dark to bright": level / 4095 * 255,
        "the whole range, bright to dark": 255 - level / 4095 * 255,
        "the window": np.clip((level - 1000) / 2000, 0, 1) * 255,
        "the window, inverted": 255 - np.clip((level - 1000) / 2000, 0, 1) * 255,
        "the greys as stored, 20 to 90": DARK[0],
        "stretched to 0..255": (DARK[0] - 20.0) / 70 * 255,
        "a root curve": np.sqrt(level / 4095) * 255,
    }
    for text, wanted in known.items():
        if np.abs(grey - wanted).max() <= 1:
            colour = "" if (picture == picture[:, :, :1]).all() else ", in colour"
            return text + colour
    return f"greys {grey.min()} to {grey.max()}"


def outcome(kind: Kind) -> str:
    try:
        return words(read_image(kind.make(), **kind.rule))
    except WaraError as error:
        assert error.kind == "data" and error.remedy and "\n" not in str(error)
        return f"refused: {error.what}"


# -- PNG, JPEG, TIFF ---------------------------------------------------------------------------


def png16(pixels: np.ndarray, colour_type: int, sbit: int | None = None) -> bytes:
    """A 16-bit PNG by hand; Pillow writes none in colour."""
    height, width = pixels.shape[:2]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)

    def chunk(name: bytes, body: bytes) -> bytes:
        check = struct.pack(">I", zlib.crc32(name + body))
        return struct.pack(">I", len(body)) + name + body + check

    head = struct.pack(">IIBBBBB", width, height, 16, colour_type, 0, 0, 0)
    parts = [chunk(b"IHDR", head)]
    if sbit:
        parts.append(chunk(b"sBIT", bytes([sbit] * {0: 1, 2: 3, 4: 2, 6: 4}[colour_type])))
    parts += [chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def channels(*planes: np.ndarray) -> np.ndarray:
    return np.dstack([np.broadcast_to(plane, RAMP.shape) for plane in planes]).astype("u2")


def tiff_rgb16(order: str) -> bytes:
    """A 16-bit colour TIFF by hand, one strip; Pillow writes none."""
    pixels = channels(RAMP, RAMP, RAMP).astype(f"{order}u2").tobytes()
    entries = [(256, 4, 1, 64), (257, 4, 1, 8), (258, 3, 3, 8), (259, 3, 1, 1), (262, 3, 1, 2),
               (273, 4, 1, 14), (277, 3, 1, 3), (278, 4, 1, 8), (279, 4, 1, len(pixels))]  # fmt: skip
    bits = struct.pack(f"{order}HHH", 16, 16, 16)
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}I", 14 + len(pixels))
    directory = struct.pack(f"{order}H", len(entries))
    for tag, form, count, value in entries:
        short = form == 3 and count == 1
        packed = struct.pack(
            f"{order}HH" if short else f"{order}I", *([value, 0] if short else [value])
        )
        directory += struct.pack(f"{order}HHI", tag, form, count) + packed
    return head + bits + pixels + directory + bytes(4)


TWELVE = {"bits": 12}
WHOLE = "the whole range, dark to bright"
FILES = [
    Kind("8-bit grey PNG", lambda: encode(Image.fromarray(DARK), "PNG"), "the greys as stored, 20 to 90"),
    Kind("8-bit grey TIFF", lambda: encode(Image.fromarray(DARK), "TIFF"), "the greys as stored, 20 to 90"),
    Kind("8-bit grey PNG in a set of 12 bits", lambda: encode(Image.fromarray(DARK), "PNG"),
         "the greys as stored, 20 to 90", TWELVE),
    Kind("16-bit grey PNG, the set has 12 bits", lambda: png16(RAMP, 0), WHOLE, TWELVE),
    Kind("16-bit grey PNG, nothing known of the set", lambda: png16(RAMP, 0),
         "refused: a 16-bit file, and nothing says how many of these bits its greys use"),
    Kind("16-bit grey PNG that states 12 bits (sBIT)", lambda: png16(RAMP, 0, 12), WHOLE),
    Kind("16-bit grey PNG that states 16 bits, the set has 12", lambda: png16(RAMP, 0, 16), WHOLE, TWELVE),
    Kind("16-bit grey PNG brighter than the set's 10 bits", lambda: png16(RAMP, 0),
         "refused: a grey of 4095, where the data set has 10 bits", {"bits": 10}),
    Kind("16-bit grey + alpha PNG", lambda: png16(channels(RAMP, np.uint16(65535)), 4), WHOLE, TWELVE),
    Kind("16-bit RGB PNG", lambda: png16(channels(RAMP, RAMP, RAMP), 2), WHOLE, TWELVE),
    Kind("16-bit RGB PNG that states 12 bits (sBIT)", lambda: png16(channels(RAMP, RAMP, RAMP), 2, 12), WHOLE),
    Kind("16-bit RGBA PNG", lambda: png16(channels(RAMP, RAMP, RAMP, np.uint16(65535)), 6), WHOLE, TWELVE),
    Kind("16-bit RGBA PNG, wholly transparent",
         lambda: png16(channels(RAMP, RAMP, RAMP, np.uint16(0)), 6), "greys 0 to 0", TWELVE),
    Kind("16-bit RGB TIFF, little-endian", lambda: tiff_rgb16("<"), WHOLE, TWELVE),
    Kind("16-bit RGB TIFF, big-endian", lambda: tiff_rgb16(">"), WHOLE, TWELVE),
    Kind("16-bit grey TIFF, little-endian",
         lambda: _tiff(RAMP.astype("<u2").tobytes(), width=64, height=8, bits=16, photometric=1, endian="<"),
         WHOLE, TWELVE),
    Kind("16-bit grey TIFF, big-endian",
         lambda: _tiff(RAMP.astype(">u2").tobytes(), width=64, height=8, bits=16, photometric=1, endian=">"),
         WHOLE, TWELVE),
    Kind("16-bit grey TIFF whose 0 is white",
         lambda: _tiff(RAMP.astype("<u2").tobytes(), width=64, height=8, bits=16, photometric=0, endian="<"),
         "the whole range, bright to dark", TWELVE),
    Kind("32-bit integer TIFF, 0 to 4095",
         lambda: encode(Image.fromarray(RAMP.astype("i4")), "TIFF"), WHOLE, TWELVE),
    Kind("32-bit integer TIFF with negative numbers",
         lambda: encode(Image.fromarray(RAMP.astype("i4") - 1000), "TIFF"),
         "refused: greys from -1000 to 3095 without a display range"),
    Kind("floating-point TIFF, 0 to 1",
         lambda: encode(Image.fromarray((RAMP / 4095).astype("f4")), "TIFF"), WHOLE),
    Kind("floating-point TIFF outside 0..1",
         lambda: encode(Image.fromarray(RAMP.astype("f4")), "TIFF"),
         "refused: floating-point greys outside 0..1, without a display range"),
    Kind("TIFF in CIE L\\*a\\*b\\*",
         lambda: encode(Image.new("LAB", (64, 8)), "TIFF"), "refused: colours are stored as CIE L*a*b*"),
    Kind("TIFF or GIF-like file of several frames", lambda: two_frames(),
         "refused: holds 2 frames, one is expected"),
    Kind("GIF", lambda: encode(Image.fromarray(DARK), "GIF"),
         "refused: not a readable PNG, JPEG, TIFF or DICOM"),
    Kind("BMP", lambda: encode(Image.fromarray(DARK), "BMP"),
         "refused: not a readable PNG, JPEG, TIFF or DICOM"),
    Kind("empty file", lambda: b"", "refused: empty file"),
    Kind("Git LFS pointer", lambda: b"version https://git-lfs.github.com/spec/v1\noid sha256:0",
         "refused: a Git LFS pointer, not the image"),
    Kind("web page called .jpg", lambda: b"<!DOCTYPE html><html></html>",
         "refused: a web page or XML, not the image"),
    Kind("text", lambda: b"not an image", "refused: not a readable PNG, JPEG, TIFF or DICOM"),
]  # fmt: skip


def two_frames() -> bytes:
    stream = io.BytesIO()
    page = Image.fromarray(DARK)
    page.save(stream, "TIFF", save_all=True, append_images=[page])
    return stream.getvalue()


# -- DICOM -------------------------------------------------------------------------------------

WINDOW = {"WindowCenter": "2000.5", "WindowWidth": "2001"}
STORED = WHOLE
INVERTED = "the whole range, bright to dark"


def grey(**tags: Any) -> Callable[[], bytes]:
    """A 12-bit grey object."""
    return lambda: dicom(RAMP, **{"BitsStored": 12, **tags})


def signed(**tags: Any) -> Callable[[], bytes]:
    pixels = (RAMP.astype("i2") - 2048).astype("i2")
    return lambda: dicom(pixels, **{"BitsStored": 12, **tags})


def without(*names: str, **tags: Any) -> Callable[[], bytes]:
    """The same, with elements taken out of the written file."""

    def make() -> bytes:
        dataset = pydicom.dcmread(io.BytesIO(grey(**tags)()))
        for name in names:
            del dataset[name]
        stream = io.BytesIO()
        dataset.save_as(stream, enforce_file_format=True)
        return stream.getvalue()

    return make


def lut(count: int, first: int, bits: int, entries: Any, vr: str = "US") -> list[Dataset]:
    item = Dataset()
    item.LUTDescriptor = [count, first, bits]
    item.LUTData = entries
    item["LUTData"].VR = vr
    return [item]


def root_curve(bits: int) -> list[int]:
    return np.sqrt(np.arange(4096) / 4095 * (2**bits - 1) ** 2).astype(int).tolist()


def groups(
    shared: dict[str, Any] | None = None, own: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Functional groups of an enhanced object: window and rescale, shared or of the frame."""
    tags: dict[str, Any] = {"NumberOfFrames": 1}
    for name, values in (("SharedFunctionalGroupsSequence", shared),
                         ("PerFrameFunctionalGroupsSequence", own)):  # fmt: skip
        if values is None:
            continue
        group, transform, voi = Dataset(), Dataset(), Dataset()
        for key, value in values.items():
            setattr(transform if key.startswith("Rescale") else voi, key, value)
        if len(transform):
            transform.RescaleType = "US"
            group.PixelValueTransformationSequence = [transform]
        if len(voi):
            group.FrameVOILUTSequence = [voi]
        tags[name] = [group]
    return tags


def raw_tag(name: str, vr: str, text: bytes) -> Callable[[], bytes]:
    """A grey object with an element whose text is not what its kind allows."""

    def make() -> bytes:
        data = grey(**{name: "1"})()
        tag = pydicom.tag.Tag(name)
        head = struct.pack("<HH", tag.group, tag.element) + vr.encode()
        place = data.index(head)
        (length,) = struct.unpack_from("<H", data, place + 6)
        body = text + b" " * (len(text) % 2)
        return data[: place + 6] + struct.pack("<H", len(body)) + body + data[place + 8 + length :]

    return make


RULE_STORED, RULE_RANGE = {"greys": "stored"}, {"greys": "range"}
DICOM: dict[str, list[Kind]] = {
    "The rule of the data set": [
        Kind("no window, `greys: window`", grey(), STORED),
        Kind("a window, `greys: window`", grey(**WINDOW), "the window"),
        Kind("a window, `greys: stored`", grey(**WINDOW), STORED, RULE_STORED),
        Kind("8 bits, greys 20 to 90, no window", lambda: dicom(DARK), "the greys as stored, 20 to 90"),
        Kind("8 bits, greys 20 to 90, `greys: range`", lambda: dicom(DARK), "stretched to 0..255", RULE_RANGE),
        Kind("a window, `greys: range`", grey(**WINDOW), WHOLE, RULE_RANGE),
    ],
    "Pixels (C.7.6.3)": [
        Kind("MONOCHROME1", grey(PhotometricInterpretation="MONOCHROME1"), INVERTED),
        Kind("MONOCHROME1 with a window", grey(PhotometricInterpretation="MONOCHROME1", **WINDOW), "the window, inverted"),
        Kind("PhotometricInterpretation empty", grey(PhotometricInterpretation=""), "refused: damaged DICOM: *"),
        Kind("PhotometricInterpretation HSV", lambda: dicom(np.dstack([DARK] * 3), PhotometricInterpretation="HSV"),
             "refused: DICOM colours 'HSV' not supported"),
        Kind("signed pixels (PixelRepresentation 1)", signed(), STORED),
        Kind("PixelRepresentation absent, 12 bits", without("PixelRepresentation"), "refused: PixelRepresentation has no value"),
        Kind("BitsStored absent", without("BitsStored"), "refused: BitsStored has no value"),
        Kind("BitsStored above BitsAllocated", grey(BitsStored=20, HighBit=19), "refused: BitsStored is 20, BitsAllocated 16"),
        Kind("HighBit absent", without("HighBit"), STORED),
        Kind("HighBit above the stored bits", grey(HighBit=15), "refused: HighBit is 15 where 12 bits are stored"),
        Kind("bits above those stored in use (old overlays)",
             lambda: dicom((RAMP | 0x8000).astype("u2"), BitsStored=12), STORED),
        Kind("Rows absent", without("Rows"), "refused: DICOM object without an image"),
        Kind("NumberOfFrames empty", grey(NumberOfFrames=None), STORED),
        Kind("NumberOfFrames 3", grey(NumberOfFrames=3), "refused: DICOM with 3 frames, one is expected"),
        Kind("no preamble, but a meta header", lambda: grey()()[132:], STORED),
        Kind("no preamble and no meta header", lambda: bare(grey()()),
             "refused: the header names no transfer syntax, so pixels cannot be told"),
        Kind("no transfer syntax", lambda: without_syntax(), "refused: the header names no transfer syntax, so pixels cannot be told"),
        Kind("no pixel data", without("PixelData"), "refused: DICOM object without pixel data"),
        Kind("PresentationLUTShape INVERSE with MONOCHROME2", grey(PresentationLUTShape="INVERSE"),
             "refused: MONOCHROME2 and PresentationLUTShape INVERSE contradict each other"),
        Kind("PresentationLUTShape IDENTITY", grey(PresentationLUTShape="IDENTITY"), STORED),
        Kind("PixelPaddingValue that no pixel has", grey(PixelPaddingValue=65535), STORED),
        Kind("PixelPaddingValue and its limit over the upper half: black there",
             grey(PixelPaddingValue=65535, PixelPaddingRangeLimit=2048), "greys 0 to 125"),
        Kind("RGB, 8 bits", lambda: dicom(np.dstack([DARK] * 3)), "the greys as stored, 20 to 90"),
        Kind("RGB with a window (windows are for greys)", lambda: dicom(np.dstack([DARK] * 3), **WINDOW),
             "the greys as stored, 20 to 90"),
        Kind("RGB, 16 bits, 12 stored", lambda: dicom(channels(RAMP, RAMP, RAMP), BitsStored=12), STORED),
    ],
    "Modality transform (C.11.1)": [
        Kind("rescale by 1 and 0", grey(RescaleSlope="1", RescaleIntercept="0"), STORED),
        Kind("8 bits with a rescale by 1 and 0", lambda: dicom(DARK, RescaleSlope="1", RescaleIntercept="0"),
             "the greys as stored, 20 to 90"),
        Kind("rescale by 2 and -1024, no window", grey(RescaleSlope="2", RescaleIntercept="-1024"), STORED),
        Kind("rescale by 2 and -1024, the window in these units",
             grey(RescaleSlope="2", RescaleIntercept="-1024", WindowCenter="2976.5", WindowWidth="4001"), "the window"),
        Kind("RescaleSlope negative", grey(RescaleSlope="-1", RescaleIntercept="4095"), INVERTED),
        Kind("RescaleIntercept empty", grey(RescaleSlope="1", RescaleIntercept=None, **WINDOW), "the window"),
        Kind("RescaleSlope empty", grey(RescaleSlope=None, RescaleIntercept="0", **WINDOW), "the window"),
        Kind("RescaleSlope alone", grey(RescaleSlope="1", **WINDOW), "the window"),
        Kind("RescaleSlope 0", grey(RescaleSlope="0", RescaleIntercept="0"), "refused: RescaleSlope is 0"),
        Kind("RescaleSlope of two values", grey(RescaleSlope=["1", "2"]),
             "refused: RescaleSlope or RescaleIntercept has several values"),
        Kind("RescaleIntercept that is no number", raw_tag("RescaleIntercept", "DS", b"none"),
             "refused: *"),
        Kind("modality LUT of 12 bits", grey(ModalityLUTSequence=lut(4096, 0, 12, root_curve(12))), "a root curve"),
        Kind("modality LUT and an identity rescale",
             grey(ModalityLUTSequence=lut(4096, 0, 12, root_curve(12)), RescaleSlope="1", RescaleIntercept="0"),
             "a root curve"),
        Kind("modality LUT and another rescale",
             grey(ModalityLUTSequence=lut(4096, 0, 12, root_curve(12)), RescaleSlope="2", RescaleIntercept="0"),
             "refused: a modality LUT and a rescale contradict each other"),
    ],
    "VOI transform (C.11.2)": [
        Kind("several windows: the first", grey(WindowCenter=["2000.5", "40"], WindowWidth=["2001", "80"]), "the window"),
        Kind("WindowCenter and WindowWidth empty", grey(WindowCenter=None, WindowWidth=None), STORED),
        Kind("WindowCenter without WindowWidth", grey(WindowCenter="2000"),
             "refused: a window centre without a width, or a width without a centre"),
        Kind("WindowWidth 0", grey(WindowCenter="2000", WindowWidth="0"), "refused: WindowWidth is 0"),
        Kind("WindowWidth negative", grey(WindowCenter="2000", WindowWidth="-5"), "refused: WindowWidth is -5"),
        Kind("WindowWidth below 1, LINEAR", grey(WindowCenter="2000", WindowWidth="0.5"), "refused: WindowWidth is 0.5"),
        Kind("WindowWidth 1: a threshold", grey(WindowCenter="2000", WindowWidth="1"), "greys 0 to 255"),
        Kind("VOILUTFunction empty", grey(VOILUTFunction="", **WINDOW), "the window"),
        Kind("VOILUTFunction LINEAR_EXACT",
             grey(VOILUTFunction="LINEAR_EXACT", WindowCenter="2000", WindowWidth="2000"), "the window"),
        Kind("VOILUTFunction SIGMOID", grey(VOILUTFunction="SIGMOID", **WINDOW), "greys 5 to 251"),
        Kind("VOILUTFunction unknown", grey(VOILUTFunction="CUBIC", **WINDOW),
             "refused: VOILUTFunction is none of LINEAR, LINEAR_EXACT, SIGMOID"),
        Kind("VOI LUT of 16 bits, before the window", grey(VOILUTSequence=lut(4096, 0, 16, root_curve(16)), **WINDOW), "a root curve"),
        Kind("VOI LUT of 12 bits", grey(VOILUTSequence=lut(4096, 0, 12, root_curve(12))), "a root curve"),
        Kind("VOI LUT of 8 bits, as bytes",
             grey(VOILUTSequence=lut(4096, 0, 8, bytes(root_curve(8)), "OW")), "a root curve"),
        Kind("VOI LUT of signed input",
             signed(VOILUTSequence=lut(4096, -2048, 12, root_curve(12))), "a root curve"),
        Kind("VOI LUT, `greys: stored`", grey(VOILUTSequence=lut(4096, 0, 12, root_curve(12))), STORED, RULE_STORED),
        Kind("VOI LUT shorter than it states", grey(VOILUTSequence=lut(4096, 0, 12, [1, 2, 3])),
             "refused: a lookup table of 3 entries where 4096 are stated"),
        Kind("VOI LUT with entries beyond its bits", grey(VOILUTSequence=lut(4096, 0, 8, root_curve(12))),
             "refused: a lookup table of 8 bits with the entry 4095"),
        Kind("VOILUTSequence empty", grey(VOILUTSequence=[], **WINDOW), "the window"),
    ],
    "Enhanced objects of one frame": [
        Kind("window and rescale in the shared groups",
             grey(**groups({"RescaleSlope": "2", "RescaleIntercept": "-1024", "WindowCenter": "2976.5", "WindowWidth": "4001"})),
             "the window"),
        Kind("window in the groups of the frame", grey(**groups(None, WINDOW)), "the window"),
        Kind("both: the frame's own goes before", grey(**groups({"WindowCenter": "9", "WindowWidth": "9"}, WINDOW)), "the window"),
        Kind("groups without either", grey(**groups({})), STORED),
        Kind("told at the top and in a group, and the same", grey(**groups(WINDOW), **WINDOW), "the window"),
        Kind("told at the top and in a group, and not the same",
             grey(**groups({"WindowCenter": "9", "WindowWidth": "9"}), **WINDOW),
             "refused: WindowCenter is told twice, as [2000.5] and [9.0]"),
        Kind("VOI LUT in a group", grey(**groups({"VOILUTSequence": lut(4096, 0, 12, root_curve(12))})), "a root curve"),
    ],
}  # fmt: skip


def bare(data: bytes) -> bytes:
    """What stands after the preamble and the meta header."""
    (length,) = struct.unpack_from("<I", data, 140)
    return data[144 + length :]


def without_syntax() -> bytes:
    """A file whose meta header lacks the transfer syntax; pydicom would not write one."""
    data = grey()()
    syntax = b"\x02\x00\x10\x00UI"
    place = data.index(syntax)
    (length,) = struct.unpack_from("<H", data, place + 6)
    size = 8 + length
    group = data.index(b"\x02\x00\x00\x00UL")
    (total,) = struct.unpack_from("<I", data, group + 8)
    data = data[: group + 8] + struct.pack("<I", total - size) + data[group + 12 :]
    return data[:place] + data[place + size :]


ALL = [*FILES, *(kind for kinds in DICOM.values() for kind in kinds)]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ALL, ids=lambda kind: kind.name)
def test_kind(kind: Kind) -> None:
    found = outcome(kind)
    if kind.gives.endswith("*"):
        assert found.startswith(kind.gives[:-1])
    else:
        assert found == kind.gives


@pytest.mark.parametrize("first", [0, 1500, 3900])
def test_tables_agree_with_pydicom(first: int) -> None:
    """Lookup tables by pydicom's own functions, for 16 bits: with 8, their index wraps at 256."""
    from pydicom.pixels import apply_modality_lut, apply_voi_lut

    rng = np.random.default_rng(0)
    items = lut(300, first, 16, np.sort(rng.integers(0, 2**16, 300)).tolist())
    for name, apply in (
        ("VOILUTSequence", apply_voi_lut),
        ("ModalityLUTSequence", apply_modality_lut),
    ):
        data = grey(**{name: items})()
        wanted = apply(RAMP, pydicom.dcmread(io.BytesIO(data))) / 65535 * 255
        assert np.abs(read_image(data)[..., 0] - wanted).max() <= 0.5 + 1e-6


def test_every_deep_colour_is_exact() -> None:
    """All 16 bits arrive, in every channel apart."""
    rng = np.random.default_rng(1)
    pixels = rng.integers(0, 65536, (9, 7, 3)).astype("u2")
    wanted = np.floor(pixels / 65535 * 255 + 0.5)
    np.testing.assert_array_equal(read_image(png16(pixels, 2), 16), wanted)
    alpha = np.dstack([pixels, np.full(pixels.shape[:2], 65535)]).astype("u2")
    np.testing.assert_array_equal(read_image(png16(alpha, 6), 16), wanted)


# -- the page ----------------------------------------------------------------------------------


def rendered() -> str:
    def table(kinds: list[Kind]) -> list[str]:
        lines = ["| file | gives |", "|---|---|"]
        for kind in kinds:
            gives = kind.gives.removesuffix("*").rstrip(": ")
            lines.append(f"| {kind.name} | {gives} |")
        return lines

    lines = ["### PNG, JPEG, TIFF", "", *table(FILES)]
    for title, kinds in DICOM.items():
        lines += [
            "",
            f"### DICOM: {title[0].lower() + title[1:] if title[1].islower() else title}",
            "",
            *table(kinds),
        ]
    return "\n".join(lines)


MADE = ("images.md", Path(__file__).name, {"kinds": rendered()})


def test_the_page_shows_what_is_tested() -> None:
    pages.check(*MADE)


if __name__ == "__main__" and "--write" in sys.argv:
    pages.write(*MADE)
