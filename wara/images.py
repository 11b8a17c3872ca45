"""The one image path: a file or its bytes -> uint8 `[H, W, 3]` -> resized -> normalised array.

Training, validation, test and prediction all read through here, so that a model is served the
pixels it was trained on. Whatever cannot be shown to be right is refused with a `WaraError` of
kind "data"; nothing is filled in, cut short or guessed at silently.

What a file cannot say of itself is decided once for a data set, never file by file, and travels in
`ImageSpec`: how many bits the greys of a 16-bit file really have (12-bit detectors write into
16-bit files), and how DICOM greys are shown. docs/images.md lists what each kind of file gives.
"""

from __future__ import annotations

import contextlib
import io
import os
import struct
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageOps

from wara.dicom import DicomPicture, is_dicom, scale
from wara.errors import WaraError, suggest
from wara.storage import NotRegular, open_regular

if TYPE_CHECKING:
    from torch import Tensor

# A full-field mammogram has 24 million pixels; a file whose header claims more than this is a
# whole slide, a mistake or an attack. Pillow's own limit (89 million) only warns.
PIXEL_CAP = 80_000_000
BYTE_CAP = 1 << 30

FORMATS = ("PNG", "JPEG", "TIFF")
EXTENSIONS = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".dcm", ".dicom")

INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "lanczos")
_RESAMPLING = {name: Image.Resampling[name.upper()] for name in INTERPOLATIONS}
_CONVERT = "convert it to PNG, JPEG, TIFF or DICOM"
_BITS = "declare bits in the card or data.bits (12 for most detectors), or convert it to 8 bits"
_NO_IMAGES = (
    (b"version https://git-lfs", "a Git LFS pointer, not the image", "run `git lfs pull` there"),
    (b"<", "a web page or XML, not the image", "download it again from where it is shown"),
)
_COPY = "copy it again from its origin"
_DEEP_MODES = ("I;16", "I;16B", "I;16L", "I;16N", "I")
_TIFF_PHOTOMETRIC = 262
_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
# Pillow takes the high byte of each 16-bit colour. Read with the other byte order it takes the low
# one, so that both together are the number that the file holds.
_OTHER_BYTE = {
    f"{mode};16{order}": f"{mode};16{other}"
    for mode in ("RGB", "RGBA", "RGBX")
    for order, other in (("B", "L"), ("L", "B"), ("N", "B" if sys.byteorder == "little" else "L"))
}


@dataclass(frozen=True)
class ImageSpec:
    """What a network expects of its images.

    Args:
        size: `(h, w)` in pixels.
        mean: mean per channel, for values in 0..1.
        std: standard deviation per channel, for values in 0..1.
        interpolation: nearest, bilinear, bicubic or lanczos.
        bits: what the greys and colours of 16-bit PNG and TIFF files have; none where that was
            never decided, and then only a file that states it itself can be read.
        greys: one of `wara.dicom.GREYS`.
    """

    size: tuple[int, int]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    interpolation: str = "bicubic"
    bits: int | None = None
    greys: str = "window"


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
        if self.depth.brightest >= 1 << bits:
            what = f"a grey of {self.depth.brightest}, where the data set has {bits} bits"
            raise WaraError("data", what, self.where, "declare more bits in the card (bits: 16)")
        shown = scale(self.pixels.astype(np.float64), 0, (1 << bits) - 1)
        if shown.ndim == 2:
            shown = np.repeat(shown[:, :, None], 3, axis=2)
        return 255 - shown if self.inverted else shown


def load_array(source: str | Path | bytes, spec: ImageSpec) -> np.ndarray:
    """Return one image as `spec` wants it, uint8 `[h, w, 3]`; raises as `read_image`."""
    return Opened(source).array(spec)


def load_tensor(source: str | Path | bytes, spec: ImageSpec) -> Tensor:
    """Read, resize and normalise one image as `spec` says.

    Returns:
        float32 `[3, h, w]`.

    Raises:
        WaraError: kind "data", see `read_image`.
    """
    return to_tensor(load_array(source, spec), spec)


def read_image(
    source: str | Path | bytes, bits: int | None = None, greys: str = "window"
) -> np.ndarray:
    """Decode a PNG, JPEG, TIFF or DICOM image; the content decides, not the name.

    EXIF orientation is applied once. Transparent pixels become black.

    Args:
        source: a path, or the bytes of a file.
        bits: see `ImageSpec`.
        greys: see `ImageSpec`.

    Returns:
        uint8 `[H, W, 3]`.

    Raises:
        WaraError: kind "data" when the file is missing, truncated, of another format, larger than
            `PIXEL_CAP`, has several frames, or holds greys of unknown meaning.
    """
    return Opened(source).rgb(bits, greys)


class Opened:
    """A file that has been decoded once, whatever is asked of it then.

    Args:
        source: a path, or the bytes of a file.
        where: its name for refusals, when `source` is bytes.

    Raises:
        WaraError: kind "data", see `read_image`.
    """

    def __init__(self, source: str | Path | bytes, where: str = "<bytes>") -> None:
        data, self.where = source, where
        if not isinstance(data, bytes):
            data, self.where = read_bytes(data), str(source)
        if not data:
            raise WaraError("data", "empty file", self.where, _COPY)
        for beginning, what, remedy in _NO_IMAGES:
            if data.lstrip().startswith(beginning):
                raise WaraError("data", what, self.where, remedy)
        self.picture: Picture | DicomPicture
        with _one_refusal(self.where, "DICOM" if is_dicom(data) else "image"):
            if is_dicom(data):
                self.picture = DicomPicture(data, self.where, _check_size)
            else:
                self.picture = _decode_pillow(data, self.where)

    @property
    def depth(self) -> Depth | None:
        """What a 16-bit PNG or TIFF file says of its depth; None for all others."""
        return None if isinstance(self.picture, DicomPicture) else self.picture.depth

    @property
    def windowed(self) -> bool | None:
        """Whether a grey DICOM object says how its greys are shown; None for all others."""
        dicom = isinstance(self.picture, DicomPicture) and self.picture.grey
        return self.picture.windowed if dicom else None  # type: ignore[union-attr]

    @property
    def uid(self) -> str | None:
        """The SOP Instance UID of a DICOM object; None for all others."""
        return self.picture.uid if isinstance(self.picture, DicomPicture) else None

    def rgb(self, bits: int | None = None, greys: str = "window") -> np.ndarray:
        """Return the picture, uint8 `[H, W, 3]`; see `read_image`."""
        if isinstance(self.picture, Picture):
            return self.picture.rgb(bits)
        with _one_refusal(self.where, "DICOM"):
            return self.picture.rgb(greys)

    def array(self, spec: ImageSpec) -> np.ndarray:
        """Return the picture as `spec` wants it, uint8 `[h, w, 3]`."""
        return resize(self.rgb(spec.bits, spec.greys), spec.size, spec.interpolation)


@contextlib.contextmanager
def _one_refusal(where: str, kind: str) -> Iterator[None]:
    try:
        yield
    except (WaraError, MemoryError):
        raise
    except Image.UnidentifiedImageError as error:
        what = "not a readable PNG, JPEG, TIFF or DICOM"
        raise WaraError("data", what, where, _CONVERT) from error
    except Image.DecompressionBombError as error:
        raise WaraError("data", str(error), where, "export the image at a smaller size") from error
    # Pillow, pydicom and their decoders report damaged files by many exception types, and which one
    # is no contract; each is one unreadable image to the caller, and the cause stays attached.
    except Exception as error:
        reason = " ".join(str(error).split())
        raise WaraError("data", f"damaged {kind}: {reason}", where, _COPY) from error


def read_bytes(path: str | Path) -> bytes:
    """Return the bytes of a file of at most `BYTE_CAP` bytes.

    Raises:
        WaraError: kind "data" when the file is missing, not readable or too large.
    """
    try:
        with open_regular(path) as stream:
            size = os.fstat(stream.fileno()).st_size
            if size > BYTE_CAP:
                what = f"file of {size / 2**20:.0f} MiB; the limit is {BYTE_CAP / 2**20:.0f}"
                raise WaraError("data", what, str(path), "export the image at a smaller size")
            if len(data := stream.read(size + 1)) == size:
                return data
        raise WaraError("data", "it changed while it was read", str(path), "wait until it is whole")
    except (NotRegular, IsADirectoryError):
        raise WaraError("data", "not a regular file", str(path), "give the file itself") from None
    except FileNotFoundError:
        remedy = "correct the name or copy the file there"
        raise WaraError("data", "no such file", str(path), remedy) from None
    except OSError as error:
        reason = error.strerror or str(error)
        raise WaraError("data", f"cannot read: {reason}", str(path), "check the file") from error


def resize(array: np.ndarray, size: tuple[int, int], interpolation: str = "bicubic") -> np.ndarray:
    """Resample to `size` with anti-aliasing. The whole image is kept, so its aspect may change.

    Args:
        array: uint8 `[H, W, 3]`.
        size: `(h, w)` in pixels.
        interpolation: nearest, bilinear, bicubic or lanczos.

    Returns:
        uint8 `[h, w, 3]`.

    Raises:
        WaraError: kind "config" when the interpolation is not known.
    """
    if interpolation not in _RESAMPLING:
        raise WaraError(
            "config", f"no interpolation '{interpolation}'", "", suggest(interpolation, _RESAMPLING)
        )
    height, width = size
    if array.shape[:2] == (height, width):
        return array
    resized = Image.fromarray(array).resize((width, height), _RESAMPLING[interpolation])
    return np.array(resized)


def normalise(array: np.ndarray, spec: ImageSpec) -> np.ndarray:
    """Normalise by the backbone's own statistics: `(x / 255 - mean) / std`.

    Args:
        array: uint8 `[h, w, 3]`.
        spec: mean and std per channel, for values in 0..1.

    Returns:
        float32 `[3, h, w]`, contiguous.
    """
    mean, std = (np.asarray(values, np.float32)[:, None, None] for values in (spec.mean, spec.std))
    planes = np.ascontiguousarray(array.transpose(2, 0, 1)).astype(np.float32)
    planes /= std * np.float32(255)
    planes -= mean / std
    return planes


def to_tensor(array: np.ndarray, spec: ImageSpec) -> Tensor:
    """Return `normalise` as a tensor, float32 `[3, h, w]`."""
    import torch  # the rest of this file serves where torch is not installed

    return torch.from_numpy(normalise(array, spec))


def processors() -> int:
    """Number of processors this process may use, which may be fewer than the machine has."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


# --- PNG, JPEG, TIFF --------------------------------------------------------------------------


def _decode_pillow(data: bytes, where: str) -> Picture:
    image = Image.open(io.BytesIO(data), formats=FORMATS)
    _check_size(image.width, image.height, where)
    # JPEG files of cameras hold a preview as a second picture; the first one is the photograph.
    frames = 1 if image.format in ("JPEG", "MPO") else getattr(image, "n_frames", 1)
    if frames > 1:
        what = f"holds {frames} frames, one is expected"
        raise WaraError("data", what, where, "save one file per frame")
    tags = getattr(image, "tag_v2", {})
    if image.mode == "LAB":
        raise WaraError("data", "colours are stored as CIE L*a*b*", where, "convert it to RGB")
    if _deep_colour(image):
        return Picture(_decode_deep_colour(data, image), where, _declared_bits(data))
    # TIFF files whose zero means white: Pillow leaves the inversion of deep ones to the reader.
    deep = image.mode in _DEEP_MODES
    inverted = deep and image.format == "TIFF" and tags.get(_TIFF_PHOTOMETRIC) == 0
    image.load()
    upright: Image.Image = ImageOps.exif_transpose(image)
    if deep:
        whole = _whole_greys(np.asarray(upright), where)
        return Picture(whole, where, _declared_bits(data), inverted)
    if image.mode == "F":
        grey = _float_to_uint8(np.asarray(upright), where)
        return Picture(np.repeat(grey[:, :, None], 3, axis=2), where)
    if upright.has_transparency_data:
        layers = upright.convert("RGBA")
        ground = Image.new("RGBA", layers.size, (0, 0, 0, 255))
        upright = Image.alpha_composite(ground, layers)
    return Picture(np.array(upright.convert("RGB")), where)


def _check_size(width: int, height: int, where: str) -> None:
    if width < 1 or height < 1:
        raise WaraError("data", f"image of {width} x {height} pixels", where, "remove it")
    if width * height > PIXEL_CAP:
        what = f"image of {width} x {height} pixels; the limit is {PIXEL_CAP:,} in all"
        raise WaraError("data", what, where, "export the image at a smaller size")


def _raw_mode(image: Image.Image) -> str:
    """Return Pillow's name of how the pixels lie in the file."""
    tiles = getattr(image, "tile", [])
    arguments = tiles[0].args if tiles else ""
    return arguments if isinstance(arguments, str) else str(arguments[0])


def _deep_colour(image: Image.Image) -> bool:
    """Whether a file holds 16-bit numbers of which Pillow would keep the upper half."""
    return ";16" in _raw_mode(image) and image.mode not in _DEEP_MODES


def _decode_deep_colour(data: bytes, image: Image.Image) -> np.ndarray:
    """Return 16-bit colours `[H, W, 3]`, or greys `[H, W]`; transparent pixels become black."""
    raw = _raw_mode(image)
    if raw == "LA;16B":  # grey and alpha as one number of 32 bits
        image._mode = "I"  # what Pillow's own plugins set
        both = np.asarray(ImageOps.exif_transpose(_with_raw_mode(image, "I;32B")))
        share = (both & 0xFFFF) / 65535.0
        return np.rint(((both >> 16) & 0xFFFF) * share).astype(np.uint16)
    if raw not in _OTHER_BYTE:
        raise ValueError(f"16-bit pixels of the kind {raw} are not read")
    again = Image.open(io.BytesIO(data), formats=FORMATS)
    halves = [np.asarray(ImageOps.exif_transpose(part), np.uint16) for part in
              (image, _with_raw_mode(again, _OTHER_BYTE[raw]))]  # fmt: skip
    colours = halves[0] * np.uint16(256) + halves[1]
    if image.mode == "RGBA":
        return np.rint(colours[:, :, :3] * (colours[:, :, 3:] / 65535.0)).astype(np.uint16)
    return colours[:, :, :3]


def _with_raw_mode(image: Image.Image, raw: str) -> Image.Image:
    tiles = image.tile  # type: ignore[attr-defined]
    image.tile = [  # type: ignore[attr-defined]
        tile._replace(args=raw if isinstance(tile.args, str) else (raw, *tile.args[1:]))
        for tile in tiles
    ]
    return image


def _whole_greys(values: np.ndarray, where: str) -> np.ndarray:
    low, high = int(values.min()), int(values.max())
    if low < 0 or high >= 1 << 16:
        what = f"greys from {low} to {high} without a display range"
        remedy = "export it as 8 or 16 bits without sign, or as DICOM with a window"
        raise WaraError("data", what, where, remedy)
    return values.astype(np.uint16)


def _float_to_uint8(values: np.ndarray, where: str) -> np.ndarray:
    # NaN fails both comparisons.
    if not (values.min() >= 0 and values.max() <= 1):
        what = "floating-point greys outside 0..1, without a display range"
        remedy = "export it as 8 or 16 bits without sign, or as DICOM with a window"
        raise WaraError("data", what, where, remedy)
    return scale(values.astype(np.float64), 0, 1)


def _declared_bits(data: bytes) -> int | None:
    """Significant bits of a PNG by its sBIT chunk, which Pillow does not read."""
    for kind, body in _png_chunks(data):
        if kind == b"sBIT" and body and all(1 <= bits <= 16 for bits in body):
            return max(body[: 3 if len(body) > 2 else 1])  # without the alpha channel
        if kind in (b"PLTE", b"IDAT"):
            break
    return None


def _png_chunks(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    place = len(_PNG_SIGNATURE)
    while data.startswith(_PNG_SIGNATURE) and place + 8 <= len(data):
        (length,) = struct.unpack_from(">I", data, place)
        yield data[place + 4 : place + 8], data[place + 8 : place + 8 + length]
        place += 12 + length
