"""The one image path: a file or its bytes -> uint8 `[H, W, 3]` -> resized -> normalised tensor.

Training, validation, test and prediction all read through here, so that a model is served the
pixels it was trained on. Whatever cannot be shown to be right is refused with a `WaraError` of
kind "data"; nothing is filled in, cut short or guessed at silently.

What the greys of a deep image mean:

* 16-bit PNG and TIFF: black is 0 and white is the top of the bit range that the file really uses.
  The range is the one declared (`sBIT` in PNG), else the smallest of 8, 10, 12, 14, 16 bits that
  holds the brightest pixel, because 12-bit detectors write into 16-bit files.
* DICOM: modality rescale, then the stored VOI LUT, else the first stored window, else the whole
  stored range up to 8 bits, else (deep and no window) the range present in the image, padding
  left out. MONOCHROME1 is inverted last, so that bone is bright everywhere.
"""

from __future__ import annotations

import io
import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, ImageOps

from wara.errors import WaraError, suggest

if TYPE_CHECKING:
    from pydicom.dataset import Dataset
    from torch import Tensor

# A full-field mammogram has 24 million pixels; a file whose header claims more than this is a
# whole slide, a mistake or an attack. Pillow's own limit (89 million) only warns.
PIXEL_CAP = 80_000_000
BYTE_CAP = 1 << 30

FORMATS = ("PNG", "JPEG", "TIFF")
EXTENSIONS = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".dcm", ".dicom")

_RESAMPLING = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}
_CONVERT = "convert it to PNG, JPEG, TIFF or DICOM"
_DEEP_MODES = ("I;16", "I;16B", "I;16L", "I;16N", "I")
_TIFF_PHOTOMETRIC = 262
# The DICOM elements that pixels depend on. Nothing else is parsed, so that neither a warning nor an
# error can carry a patient's name into a log.
_DICOM_ELEMENTS = [
    "SamplesPerPixel",
    "PhotometricInterpretation",
    "PlanarConfiguration",
    "NumberOfFrames",
    "Rows",
    "Columns",
    "BitsAllocated",
    "BitsStored",
    "HighBit",
    "PixelRepresentation",
    "PixelPaddingValue",
    "PixelPaddingRangeLimit",
    "RescaleIntercept",
    "RescaleSlope",
    "ModalityLUTSequence",
    "WindowCenter",
    "WindowWidth",
    "VOILUTFunction",
    "VOILUTSequence",
    *(
        f"{segmented}{colour}PaletteColorLookupTable{part}"
        for colour in ("Red", "Green", "Blue")
        for segmented, part in (("", "Descriptor"), ("", "Data"), ("Segmented", "Data"))
    ),
    "ExtendedOffsetTable",
    "ExtendedOffsetTableLengths",
    "PixelData",
]
_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"


@dataclass(frozen=True)
class ImageSpec:
    """What a network expects of its images.

    Args:
        size: `(h, w)` in pixels.
        mean: mean per channel, for values in 0..1.
        std: standard deviation per channel, for values in 0..1.
        interpolation: nearest, bilinear, bicubic or lanczos.
    """

    size: tuple[int, int]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    interpolation: str = "bicubic"


def load_array(source: str | Path | bytes, spec: ImageSpec) -> np.ndarray:
    """Return one image as `spec` sizes it, uint8 `[h, w, 3]`; raises as `read_image`."""
    return resize(read_image(source), spec.size, spec.interpolation)


def load_tensor(source: str | Path | bytes, spec: ImageSpec) -> Tensor:
    """Read, resize and normalise one image as `spec` says.

    Returns:
        float32 `[3, h, w]`.

    Raises:
        WaraError: kind "data", see `read_image`.
    """
    return to_tensor(load_array(source, spec), spec)


def read_image(source: str | Path | bytes) -> np.ndarray:
    """Decode a PNG, JPEG, TIFF or DICOM image; the content decides, not the name.

    EXIF orientation is applied once. Transparent pixels become black.

    Args:
        source: a path, or the bytes of a file.

    Returns:
        uint8 `[H, W, 3]`.

    Raises:
        WaraError: kind "data" when the file is missing, truncated, of another format, larger than
            `PIXEL_CAP`, has several frames, or holds greys of unknown meaning.
    """
    if isinstance(source, bytes):
        data, where = source, "<bytes>"
    else:
        data, where = read_bytes(source), str(source)
    if not data:
        raise WaraError("data", "empty file", where, "copy it again from its origin")
    if data[128:132] == b"DICM":
        return _read_dicom(data, where)
    return _read_pillow(data, where)


def read_bytes(path: str | Path) -> bytes:
    """Return the bytes of a file of at most `BYTE_CAP` bytes.

    Raises:
        WaraError: kind "data" when the file is missing, not readable or too large.
    """
    try:
        size = Path(path).stat().st_size
        if size > BYTE_CAP:
            raise WaraError(
                "data",
                f"file of {size / 2**20:.0f} MiB; the limit is {BYTE_CAP / 2**20:.0f}",
                str(path),
                "export the image at a smaller size",
            )
        return Path(path).read_bytes()
    except FileNotFoundError:
        raise WaraError(
            "data", "no such file", str(path), "correct the name or copy the file there"
        ) from None
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


# --- PNG, JPEG, TIFF --------------------------------------------------------------------------


def _read_pillow(data: bytes, where: str) -> np.ndarray:
    try:
        return _decode_pillow(data, where)
    except WaraError:
        raise
    except Image.UnidentifiedImageError as error:
        raise WaraError(
            "data", "not a readable PNG, JPEG, TIFF or DICOM", where, _CONVERT
        ) from error
    except Image.DecompressionBombError as error:
        raise WaraError("data", str(error), where, "export the image at a smaller size") from error
    # Pillow reports damaged files by many exception types, and which one is no contract; each of
    # those is one unreadable image to the caller, and the cause stays attached.
    except Exception as error:
        raise WaraError(
            "data", f"damaged image: {error}", where, "copy it again from its origin"
        ) from error


def _decode_pillow(data: bytes, where: str) -> np.ndarray:
    image = Image.open(io.BytesIO(data), formats=FORMATS)
    _check_size(image.width, image.height, where)
    # JPEG files of cameras hold a preview as a second picture; the first one is the photograph.
    frames = 1 if image.format in ("JPEG", "MPO") else getattr(image, "n_frames", 1)
    if frames > 1:
        raise WaraError(
            "data", f"holds {frames} frames, one is expected", where, "save one file per frame"
        )
    # TIFF files of 16 bits whose zero means white: Pillow leaves the inversion to the reader.
    white_is_zero = (
        image.format == "TIFF"
        and image.mode in _DEEP_MODES
        and getattr(image, "tag_v2", {}).get(_TIFF_PHOTOMETRIC) == 0
    )
    image.load()
    array = _to_rgb(ImageOps.exif_transpose(image), _declared_bits(data), where)
    return 255 - array if white_is_zero else array


def _check_size(width: int, height: int, where: str) -> None:
    if width < 1 or height < 1:
        raise WaraError("data", f"image of {width} x {height} pixels", where, "remove it")
    if width * height > PIXEL_CAP:
        raise WaraError(
            "data",
            f"image of {width} x {height} pixels; the limit is {PIXEL_CAP:,} in all",
            where,
            "export the image at a smaller size",
        )


def _to_rgb(image: Image.Image, declared_bits: int | None, where: str) -> np.ndarray:
    if image.mode in _DEEP_MODES:
        return _grey_to_rgb(_deep_to_uint8(np.asarray(image), declared_bits, where))
    if image.mode == "F":
        return _grey_to_rgb(_float_to_uint8(np.asarray(image), where))
    if image.mode == "LAB":
        raise WaraError("data", "colours are stored as CIE L*a*b*", where, "convert it to RGB")
    if image.has_transparency_data:
        layers = image.convert("RGBA")
        ground = Image.new("RGBA", layers.size, (0, 0, 0, 255))
        image = Image.alpha_composite(ground, layers)
    return np.array(image.convert("RGB"))


def _grey_to_rgb(grey: np.ndarray) -> np.ndarray:
    return np.repeat(grey[:, :, None], 3, axis=2)


def _deep_to_uint8(values: np.ndarray, declared_bits: int | None, where: str) -> np.ndarray:
    low, high = int(values.min()), int(values.max())
    if low < 0 or high >= 1 << 16:
        raise WaraError(
            "data",
            f"greys from {low} to {high} without a display range",
            where,
            "export it as 8 or 16 bits without sign, or as DICOM with a window",
        )
    bits = declared_bits or 0
    if high >= 1 << bits:  # not declared, or declared wrongly
        bits = next(b for b in (8, 10, 12, 14, 16) if high < 1 << b)
    return _scale(values.astype(np.float64), 0, (1 << bits) - 1)


def _float_to_uint8(values: np.ndarray, where: str) -> np.ndarray:
    # NaN fails both comparisons.
    if not (values.min() >= 0 and values.max() <= 1):
        raise WaraError(
            "data",
            "floating-point greys outside 0..1, without a display range",
            where,
            "export it as 8 or 16 bits without sign, or as DICOM with a window",
        )
    return _scale(values.astype(np.float64), 0, 1)


def _scale(values: np.ndarray, low: float, high: float) -> np.ndarray:
    """Map `low..high` to 0..255, clip, round half up."""
    if high <= low:
        return np.zeros(values.shape, np.uint8)
    return np.floor(np.clip((values - low) / (high - low), 0, 1) * 255 + 0.5).astype(np.uint8)


def _declared_bits(data: bytes) -> int | None:
    """Significant bits of a grey PNG by its sBIT chunk, which Pillow does not read."""
    for kind, body in _png_chunks(data):
        if kind == b"sBIT" and len(body) == 1 and 1 <= body[0] <= 16:
            return body[0]
        if kind in (b"PLTE", b"IDAT"):
            break
    return None


def _png_chunks(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    place = len(_PNG_SIGNATURE)
    while data.startswith(_PNG_SIGNATURE) and place + 8 <= len(data):
        (length,) = struct.unpack_from(">I", data, place)
        yield data[place + 4 : place + 8], data[place + 8 : place + 8 + length]
        place += 12 + length


# --- DICOM ------------------------------------------------------------------------------------


def _read_dicom(data: bytes, where: str) -> np.ndarray:
    import pydicom  # a second of import that PNG users should not pay for

    try:
        header = pydicom.dcmread(
            io.BytesIO(data), stop_before_pixels=True, specific_tags=_DICOM_ELEMENTS
        )
        _check_dicom_header(header, where)
        dataset = pydicom.dcmread(io.BytesIO(data), specific_tags=_DICOM_ELEMENTS)
        if "PixelData" not in dataset:
            raise WaraError(
                "data", "DICOM object without pixel data", where, "leave it out of the data set"
            )
        _check_decoder(dataset, where)
        return _dicom_to_rgb(dataset, where)
    except WaraError:
        raise
    # pydicom and its decoders raise whatever their parsers raise on a damaged file; each of those
    # is one unreadable image to the caller, and the cause stays attached.
    except Exception as error:
        raise WaraError(
            "data", f"damaged DICOM: {error}", where, "export it again from the archive"
        ) from error


def _check_dicom_header(header: Dataset, where: str) -> None:
    if "Rows" not in header or "Columns" not in header:
        raise WaraError("data", "DICOM object without an image", where, "leave it out")
    _check_size(int(header.Columns), int(header.Rows), where)
    frames = int(header.get("NumberOfFrames") or 1)
    if frames > 1:
        raise WaraError(
            "data",
            f"DICOM with {frames} frames, one is expected",
            where,
            "export the frame that is read as a file of its own",
        )


def _check_decoder(dataset: Dataset, where: str) -> None:
    from pydicom.pixels import get_decoder

    syntax = dataset.file_meta.TransferSyntaxUID
    try:
        decoder = get_decoder(syntax)
    except NotImplementedError:
        raise WaraError(
            "data", f"DICOM compression not supported: {syntax.name}", where, _CONVERT
        ) from None
    if not decoder.is_available:
        raise WaraError(
            "data",
            f"no decoder for this DICOM compression ({syntax.name})",
            where,
            "install the decoders: pip install 'wara[dicom]'",
        )


def _dicom_to_rgb(dataset: Dataset, where: str) -> np.ndarray:
    from pydicom.pixels import apply_color_lut, pixel_array

    photometric = str(dataset.PhotometricInterpretation)
    stored = pixel_array(dataset)  # YBR is converted to RGB here
    if photometric in ("MONOCHROME1", "MONOCHROME2"):
        return _grey_to_rgb(_dicom_grey(dataset, stored, photometric == "MONOCHROME1"))
    if photometric == "PALETTE COLOR":
        stored = apply_color_lut(stored, dataset)
        bits = 8 * stored.dtype.itemsize
    elif photometric == "RGB" or photometric.startswith("YBR_"):
        bits = int(dataset.BitsStored)
    else:
        raise WaraError("data", f"DICOM colours '{photometric}' not supported", where, _CONVERT)
    if stored.ndim != 3 or stored.shape[2] != 3:
        raise WaraError("data", f"DICOM colour image of shape {stored.shape}", where, _CONVERT)
    if bits == 8:
        return np.ascontiguousarray(stored, dtype=np.uint8)
    return _scale(stored.astype(np.float64), 0, (1 << bits) - 1)


def _dicom_grey(dataset: Dataset, stored: np.ndarray, inverted: bool) -> np.ndarray:
    from pydicom.pixels import apply_modality_lut, apply_voi_lut

    values = np.asarray(apply_modality_lut(stored, dataset))
    padding = _padding(dataset, stored)
    if dataset.get("VOILUTSequence"):
        table = dataset.VOILUTSequence[0].LUTDescriptor
        # The output range of a table is stated by its third number, in bits.
        shown = apply_voi_lut(values.astype(np.int64), dataset, prefer_lut=True)
        grey = _scale(np.asarray(shown, np.float64), 0, (1 << int(table[2])) - 1)
    elif dataset.get("WindowCenter") is not None and dataset.get("WindowWidth") is not None:
        grey = _window(
            values.astype(np.float64),
            _first(dataset.WindowCenter),
            _first(dataset.WindowWidth),
            str(dataset.get("VOILUTFunction") or "LINEAR").upper(),
        )
    else:
        low, high = _range_without_window(dataset, values, padding)
        grey = _scale(values.astype(np.float64), low, high)
    if inverted:
        grey = 255 - grey
    grey[padding] = 0  # "no data" is black, whatever the polarity
    return grey


def _first(value: Any) -> float:
    return float(value if isinstance(value, (int, float)) else value[0])


def _window(values: np.ndarray, centre: float, width: float, function: str) -> np.ndarray:
    """Apply a window, DICOM PS3.3 C.11.2.1.2 and C.11.2.1.3, with the output in 0..255.

    Args:
        values: modality values, float64.
        centre: window centre, in modality units.
        width: window width, in modality units.
        function: LINEAR, LINEAR_EXACT or SIGMOID.
    """
    if not (math.isfinite(centre) and math.isfinite(width) and width > 0):
        raise ValueError(f"window of centre {centre}, width {width}")
    if function == "SIGMOID":
        exponent = np.clip(-4 * (values - centre) / width, -700, 700)
        return _scale(1 / (1 + np.exp(exponent)), 0, 1)
    if function == "LINEAR_EXACT":
        return _scale(values, centre - width / 2, centre + width / 2)
    if width <= 1:  # LINEAR of width 1 is a threshold
        return np.where(values > centre - 0.5, 255, 0).astype(np.uint8)
    return _scale(values, centre - 0.5 - (width - 1) / 2, centre - 0.5 + (width - 1) / 2)


def _padding(dataset: Dataset, stored: np.ndarray) -> np.ndarray:
    """Pixels that the detector did not see (Pixel Padding Value and its range)."""
    value = dataset.get("PixelPaddingValue")
    if value is None:
        return np.zeros(stored.shape, bool)
    limit = dataset.get("PixelPaddingRangeLimit")
    limit = value if limit is None else limit
    return (stored >= min(value, limit)) & (stored <= max(value, limit))


def _range_without_window(
    dataset: Dataset, values: np.ndarray, padding: np.ndarray
) -> tuple[float, float]:
    bits = int(dataset.BitsStored)
    rescaled = "RescaleSlope" in dataset or "ModalityLUTSequence" in dataset
    if bits <= 8 and not rescaled and int(dataset.PixelRepresentation) == 0:
        return 0, (1 << bits) - 1  # an ultrasound screen: shown as stored
    seen = values[~padding]
    return (float(seen.min()), float(seen.max())) if seen.size else (0.0, 0.0)
