"""Faulty and odd image files, each with its verdict: the pixels it must give, or the refusal."""

from __future__ import annotations

import errno
import io
import random
import struct
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pydicom.encaps import encapsulate
from pydicom.uid import JPEG2000Lossless, JPEGLSLossless, RLELossless

sys.path.insert(0, str(Path(__file__).parents[1]))
from test_image_bombs import chunk, deflated, read  # noqa: E402
from test_images import dicom, encode  # noqa: E402

from wara import images  # noqa: E402
from wara.errors import WaraError  # noqa: E402
from wara.images import read_image  # noqa: E402

RNG = np.random.default_rng(11)
GREY = RNG.integers(0, 256, (30, 40), dtype="u1")
RGB = RNG.integers(0, 256, (30, 40, 3), dtype="u1")
WIDE = RNG.integers(0, 256, (96, 128), dtype="u1")  # for JPEG 2000, of six resolutions
DEEP = RNG.integers(0, 1 << 16, (30, 40), dtype="u2")
THREE = np.stack([GREY] * 3, axis=2)
Verdict = np.ndarray | str
KINDS: dict[str, tuple[Callable[[], bytes], Verdict]] = {}


def kind(name: str, make: Callable[[], bytes], verdict: Verdict) -> None:
    assert name not in KINDS
    KINDS[name] = (make, verdict)


def grey3(values: np.ndarray) -> np.ndarray:
    return np.stack([np.floor(values + 0.5).astype("u1")] * 3, axis=2)


def adam7(pixels: np.ndarray) -> bytes:
    """An interlaced grey PNG by the seven passes of its standard."""
    passes = [(0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2),
              (1, 0, 2, 1)]  # fmt: skip
    rows = b"".join(
        b"\0" + row.tobytes() for y, x, down, across in passes for row in pixels[y::down, x::across]
    )
    head = struct.pack(">IIBBBBB", *pixels.shape[::-1], 8, 0, 0, 0, 1)
    parts = [chunk(b"IHDR", head), chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def several(fmt: str) -> bytes:
    stream, sheet = io.BytesIO(), Image.fromarray(GREY)
    sheet.save(stream, fmt, save_all=True, append_images=[Image.fromarray(GREY[::-1])])
    return stream.getvalue()


def with_exif(fmt: str, orientation: Any) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encode(Image.fromarray(GREY), fmt, exif=exif)


def turned(orientation: int) -> np.ndarray:
    """Where the first row and column lie, as EXIF 2.32 words it, pixel by pixel."""
    height, width = GREY.shape
    out = np.zeros((width, height) if orientation > 4 else (height, width), "u1")
    for row in range(height):
        for column in range(width):
            down, right = height - 1 - row, width - 1 - column
            place = {1: (row, column), 2: (row, right), 3: (down, right), 4: (down, column),
                     5: (column, row), 6: (column, down), 7: (right, down),
                     8: (right, row)}[orientation]  # fmt: skip
            out[place] = GREY[row, column]
    return np.stack([out] * 3, axis=2)


def recompressed(data: bytes, syntax: str) -> bytes:
    dataset = pydicom.dcmread(io.BytesIO(data))
    # GDCM's encoder of RLE ends the process on some small images.
    plugin = "pydicom" if syntax == RLELossless else ""
    dataset.compress(syntax, encoding_plugin=plugin, generate_instance_uid=False)
    stream = io.BytesIO()
    dataset.save_as(stream)
    return stream.getvalue()


def cut_fragment(data: bytes) -> bytes:
    return data[:-40] + data[-8:]


# Lossless, by every way that it can lie in a file.
for fmt in ("PNG", "TIFF"):
    kind(f"grey {fmt}", lambda f=fmt: encode(Image.fromarray(GREY), f), THREE)
    kind(f"colour {fmt}", lambda f=fmt: encode(Image.fromarray(RGB), f), RGB)
    kind(f"16-bit {fmt}", lambda f=fmt: encode(Image.fromarray(DEEP), f),
         grey3(DEEP.astype(float) / 65535 * 255))  # fmt: skip
    kind(f"1-bit {fmt}", lambda f=fmt: encode(Image.fromarray(GREY > 99), f),
         np.stack([(GREY > 99) * np.uint8(255)] * 3, axis=2))  # fmt: skip
    kind(f"{fmt} with an ICC profile", lambda f=fmt: encode(
        Image.fromarray(RGB), f, icc_profile=b"no profile" * 10), RGB)  # fmt: skip
    for place in range(1, 9):
        kind(f"{fmt} turned by EXIF {place}", lambda f=fmt, p=place: with_exif(f, p), turned(place))
    for share in (0, 0.01, 0.05, 0.2, 0.5, 0.8, 0.99):
        kind(f"{fmt} cut at {share}", lambda f=fmt, s=share: (
            d := encode(Image.fromarray(RGB), f))[: int(len(d) * s)], "data")  # fmt: skip
for how in ("tiff_lzw", "tiff_adobe_deflate", "packbits"):
    kind(f"TIFF by {how}", lambda h=how: encode(Image.fromarray(RGB), "TIFF", compression=h), RGB)
kind("interlaced PNG", lambda: adam7(GREY), THREE)
kind("EXIF orientation of 77", lambda: with_exif("PNG", 77), THREE)
kind("palette", lambda: encode(Image.fromarray(GREY).convert("P"), "PNG"), THREE)
kind("palette, one colour transparent", lambda: encode(
    Image.fromarray(GREY).convert("P"), "PNG", transparency=7),
    np.where(THREE == 7, 0, THREE).astype("u1"))  # fmt: skip
kind("wholly transparent", lambda: encode(
    Image.fromarray(np.dstack([RGB, np.zeros((30, 40), "u1")])), "PNG"), RGB * 0)  # fmt: skip
kind("CMYK TIFF", lambda: encode(Image.fromarray(
    np.dstack([255 - RGB, np.zeros((30, 40), "u1")]), "CMYK"), "TIFF"), RGB)  # fmt: skip
kind("float TIFF", lambda: encode(Image.fromarray((GREY / 255).astype("f4")), "TIFF"), THREE)
for text, value in (("NaN", np.nan), ("infinity", np.inf), ("2", 2), ("-1", -1)):
    kind(f"float TIFF with {text}", lambda v=value: encode(
        Image.fromarray(np.full((9, 9), v, "f4")), "TIFF"), "data: floating-point")  # fmt: skip
kind(
    "progressive JPEG",
    lambda: encode(Image.new("L", (40, 30), 77), "JPEG", progressive=True),
    np.full((30, 40, 3), 77, "u1"),
)
kind("several pages", lambda: several("TIFF"), "data: holds 2 frames")
kind("animated PNG", lambda: several("PNG"), "data: holds 2 frames")
kind("animated GIF", lambda: several("GIF"), "data: not a readable")
for fmt in ("BMP", "WEBP", "PPM", "TGA", "ICO"):
    kind(f"{fmt} file", lambda f=fmt: encode(Image.fromarray(RGB), f), "data")
for text, raw in {"nothing": b"", "zeros": bytes(900), "spaces": b" " * 900, "text": b"abc" * 99,
                  "a page": b"  <html>", "only a signature": b"\x89PNG\r\n\x1a\n",
                  "only a JPEG start": b"\xff\xd8", "only a TIFF order": b"II*\0",
                  "only a DICOM preamble": bytes(128) + b"DICM"}.items():  # fmt: skip
    kind(f"a file of {text}", lambda r=raw: r, "data")
for place in (9, 12, 16, 24, 25, 26, 28, 29):
    kind(f"PNG with byte {place} flipped", lambda p=place: (
        d := encode(Image.fromarray(RGB), "PNG"))[:p] + bytes([d[p] ^ 0xFF]) + d[p + 1 :],
        "data")  # fmt: skip

# DICOM
kind("DICOM", lambda: dicom(GREY), THREE)
kind("MONOCHROME1", lambda: dicom(GREY, PhotometricInterpretation="MONOCHROME1"), 255 - THREE)
kind("signed", lambda: dicom((GREY.astype("i2") - 128) * 256),
     grey3((GREY * 256.0) / 65535 * 255))  # fmt: skip
for bits in (10, 12, 13, 15):
    kind(f"{bits} bits", lambda b=bits: dicom(DEEP >> (16 - b), BitsStored=b),
         grey3((DEEP >> (16 - bits)) / (2.0**bits - 1) * 255))  # fmt: skip
kind("rescale and window", lambda: dicom(
    GREY, RescaleSlope="2", RescaleIntercept="-10", WindowCenter="100", WindowWidth="101"),
    grey3(np.clip((GREY * 2.0 - 10 - 99.5) / 100 + 0.5, 0, 1) * 255))  # fmt: skip
kind(
    "colour by plane",
    lambda: dicom(RGB, PlanarConfiguration=1, PixelData=RGB.transpose(2, 0, 1).tobytes()),
    RGB,
)
Y, B, R = (RGB[..., k].astype(float) - (128 if k else 0) for k in range(3))
kind(
    "YBR_FULL",
    lambda: dicom(RGB, PhotometricInterpretation="YBR_FULL"),
    np.clip(
        np.stack([Y + 1.402 * R, Y - 0.344136 * B - 0.714136 * R, Y + 1.772 * B], 2).round(), 0, 255
    ),
)
for syntax in (RLELossless, JPEGLSLossless, JPEG2000Lossless):
    packed = recompressed(dicom(WIDE), syntax)
    rows = b"\x28\0\x10\0US\2\0"
    other = packed.replace(rows + b"\x60\0", rows + b"\xc0\0")
    bare = b"\xfe\xff\x00\xe0\0\0\0\0"
    kind(syntax.name, lambda d=packed: d, np.stack([WIDE] * 3, axis=2))
    kind(f"{syntax.name}, end missing", lambda d=packed: d[:-200], "data")
    kind(f"{syntax.name}, of another size", lambda d=other: d, "data")
    for text, body in {
        "no fragment": bare,
        "zeros": encapsulate([bytes(500)]),
        "no bytes": bare + bare,
        "two frames": encapsulate([bytes(500), bytes(500)]),
        "a fragment cut short": bare + b"\xfe\xff\x00\xe0\0\0\1\0" + bytes(9),
    }.items():
        made = dicom(WIDE, syntax=syntax, body=body)
        kind(f"{syntax.name}, {text}", lambda d=made: d, "data")
kind(
    "deflated", lambda: deflated(0), np.stack([np.arange(1200, dtype="u1").reshape(30, 40)] * 3, 2)
)
kind("deflated, cut short", lambda: deflated(0)[:-30], "data")
for share in (0.3, 0.5, 0.9, 0.99):
    kind(f"DICOM cut at {share}", lambda s=share: (d := dicom(RGB))[: int(len(d) * s)], "data")
kind("no pixel data", lambda: dicom(GREY)[:-1212], "data: DICOM object without pixel data")
kind("several frames", lambda: dicom(GREY, NumberOfFrames=3), "data: DICOM with 3 frames")
kind("too few pixels", lambda: dicom(GREY, body=bytes(800)), "data")
kind("too many pixels", lambda: dicom(GREY, body=bytes(8000)), "data: more pixel data")
kind("BitsStored above BitsAllocated", lambda: dicom(GREY, BitsStored=12), "data: BitsStored is 12")
kind("BitsAllocated 7", lambda: dicom(GREY, BitsAllocated=7), "data: BitsAllocated is 7")
kind("SamplesPerPixel 2", lambda: dicom(GREY, SamplesPerPixel=2), "data: SamplesPerPixel is 2")
kind(
    "palette without tables",
    lambda: dicom(GREY, PhotometricInterpretation="PALETTE COLOR"),
    "data: a palette without",
)
for name in ("RescaleSlope", "RescaleIntercept", "WindowCenter", "WindowWidth"):
    for text in ("NaN", "1e400", "-inf", "1e300", "9" * 400):
        # As the file holds it: pydicom would not write some of these.
        def absurd(name: str = name, text: str = text) -> bytes:
            fields = {"RescaleSlope": "1", "RescaleIntercept": "0", "WindowCenter": "9",
                      "WindowWidth": "9", name: "7777777777777777"}  # fmt: skip
            raw, text = dicom(GREY, **fields), text + " " * (len(text) % 2)
            old = struct.pack("<H", 16) + b"7777777777777777"
            return raw.replace(old, struct.pack("<H", len(text)) + text.encode())

        kind(f"{name} of {text[:8]}", absurd, f"data: {name} is")
kind("RescaleSlope of 1e-300", lambda: dicom(GREY, RescaleSlope="1e-300"), "data: RescaleSlope is")
kind(
    "WindowWidth of 1e-30",
    lambda: dicom(GREY, WindowCenter="9", WindowWidth="1e-30", VOILUTFunction="SIGMOID"),
    "data: WindowWidth is",
)


def fault(name: str, make: Callable[[], bytes], verdict: Verdict) -> str | None:
    try:
        found = read_image(make(), 16)
    except WaraError as error:
        wanted = verdict if isinstance(verdict, str) else "pixels"
        as_wanted = f"{error.kind}: {error.what}".startswith(wanted)
        return None if as_wanted and "\n" not in str(error) else f"{name}: {error}"
    except Exception as error:
        return f"{name}: {error!r}"
    if isinstance(verdict, str):
        return f"{name}: read"
    if found.shape != verdict.shape or found.dtype != np.uint8:
        return f"{name}: {found.shape}"
    off = np.abs(found.astype(int) - verdict).max()
    return f"{name}: off by {off}" if off > 1 else None


@pytest.mark.filterwarnings("ignore")
def test_every_kind_has_its_verdict(amount, tally) -> None:
    assert len(KINDS) >= 80
    chosen = list(KINDS)[:: amount(len(KINDS) // 22, 1)]
    lost = [said for name in chosen if (said := fault(name, *KINDS[name]))]
    tally("kinds of faulty and odd image files", len(chosen), lost)


def test_mutations_are_read_or_refused_within_memory(tmp_path: Path, amount, tally) -> None:
    rng, paths = random.Random(3), []
    seeds = [make() for make, verdict in KINDS.values() if not isinstance(verdict, str)]
    for number in range(amount(20, 200)):
        data = bytearray(rng.choice(seeds))
        for _ in range(rng.randint(1, 4)):
            at = rng.randrange(len(data))
            what = rng.randrange(3)
            if what == 0:
                data[at] ^= rng.randint(1, 255)
            elif what == 1:
                del data[at : at + rng.randint(1, 60)]
            else:
                data[at:at] = rng.randbytes(rng.randint(1, 60))
            data = data or bytearray(b"\0")
        paths.append(tmp_path / f"{number}.bin")
        paths[-1].write_bytes(data)
    lost = []
    for path, found in read(*paths).items():
        sound = found.get("kind") in ("data", "resources") or (
            len(found.get("shape", ())) == 3 and found["shape"][2] == 3
        )
        if not sound or found["peak"] > 1500:
            lost.append(f"{path}: {found}")
    tally("image files with random faults", len(paths), lost)


@settings(max_examples=60, deadline=None)
@given(
    height=st.integers(1, 40),
    width=st.integers(1, 40),
    mode=st.sampled_from(["L", "RGB", "1", "I;16"]),
    form=st.sampled_from(["PNG", "TIFF", "tiff_lzw", "tiff_adobe_deflate", "DICOM", "RLE"]),
    seed=st.integers(0, 1 << 30),
)
def test_what_was_written_lossless_is_read_the_same(
    height: int, width: int, mode: str, form: str, seed: int
) -> None:
    shape = (height, width, 3) if mode == "RGB" else (height, width)
    pixels = np.random.default_rng(seed).integers(0, 65536 if mode == "I;16" else 256, shape)
    pixels = pixels.astype("u2" if mode == "I;16" else "u1")
    if mode == "1":
        pixels = (pixels > 127) * np.uint8(255)
    if form in ("DICOM", "RLE"):
        data = dicom(pixels)
        data = recompressed(data, RLELossless) if form == "RLE" else data
    else:
        image = Image.fromarray(pixels)
        image = image.convert("1") if mode == "1" else image
        how = {"compression": form} if form.startswith("tiff") else {}
        data = encode(image, "TIFF" if how else form, **how)
    shown = np.floor(pixels / 257 + 0.5).astype("u1") if mode == "I;16" else pixels
    wanted = shown if mode == "RGB" else np.stack([shown] * 3, axis=2)
    np.testing.assert_array_equal(read_image(data, 16), wanted)


@pytest.mark.parametrize("data", [encode(Image.fromarray(GREY), "PNG"), dicom(GREY)])
def test_no_memory_is_not_a_damaged_image(data: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*_: Any, **__: Any) -> None:
        raise MemoryError

    monkeypatch.setattr("wara.images.decode", none)
    monkeypatch.setattr("wara.dicom_file.DicomFile.pixels", none)
    with pytest.raises(WaraError, match="out of memory") as caught:
        read_image(data)
    assert caught.value.kind == "resources" and caught.value.exit_code == 7


@pytest.mark.parametrize(
    ("number", "wanted"),
    [(errno.EMFILE, "resources"), (errno.ENFILE, "resources"), (errno.ENOMEM, "resources"),
     (errno.EIO, "storage"), (errno.EACCES, "data")],
)  # fmt: skip
def test_what_the_machine_lacks_is_not_a_damaged_image(
    number: int, wanted: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(encode(Image.fromarray(GREY), "PNG"))

    def fails(_: Path) -> None:
        raise OSError(number, "as the machine says")

    monkeypatch.setattr(images, "open_regular", fails)
    with pytest.raises(WaraError) as caught:
        read_image(path)
    assert caught.value.kind == wanted and "damaged" not in str(caught.value)


def test_the_check_of_a_set_stops_where_the_machine_lacks_something(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from wara.data.imageset import FileReader, ImageSet, Record

    def none(*_: Any) -> None:
        raise WaraError("resources", "out of memory", "a", "b")

    found = ImageSet(_card(), [Record("a", 0), Record("b", 1)], FileReader([tmp_path, tmp_path]))
    monkeypatch.setattr(FileReader, "load", none)
    with pytest.raises(WaraError) as caught:
        found.survey()
    assert caught.value.kind == "resources"


def _card() -> Any:
    from types import SimpleNamespace

    return SimpleNamespace(bits=None, greys="window", task="binary", classes={})
