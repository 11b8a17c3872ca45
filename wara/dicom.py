"""DICOM objects of one frame as uint8 pictures: what each attribute does is docs/images.md.

PS3.3 says what the numbers mean: C.7.6.3 (pixels), C.11.1 (modality transform), C.11.2 (VOI
transform), and the functional groups of enhanced objects, which hold the same for a single frame.
What cannot be shown to be right is refused in words that say what is wrong.
"""

from __future__ import annotations

import contextlib
import io
import math
from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from wara.errors import WaraError, suggest

if TYPE_CHECKING:
    from pydicom.dataset import Dataset

GREYS = ("window", "stored", "range")
"""How a monochrome object without colours becomes 0..255, decided once for a data set.

* `window`: the stored VOI LUT, else the first window, else the range that the stored bits can hold.
* `stored`: the range that the stored bits can hold, whatever windows the file has.
* `range`: the range present in each image. It makes every image as bright as the next.
"""

_MASK = 0xFFFF
_FUNCTIONS = ("LINEAR", "LINEAR_EXACT", "SIGMOID")
_FIRST_VRS = (b"UL", b"UI", b"CS", b"DA", b"TM", b"SH", b"LO", b"OB")
_EXPORT = "export it again from the archive"
_CONVERT = "convert it to PNG, JPEG, TIFF or DICOM"
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


def is_dicom(data: bytes) -> bool:
    """Whether the bytes, or the first 512 of them, are a DICOM file; the name does not matter."""
    if data[128:132] == b"DICM":
        return True
    # Old devices wrote files without the preamble: they begin with the first element itself.
    group, element = (int.from_bytes(data[at : at + 2], "little") for at in (0, 2))
    if len(data) < 132 or group not in (2, 8) or element > 0x20:
        return False
    length = int.from_bytes(data[4:8], "little")
    return data[4:6] in _FIRST_VRS or (group == 8 and length % 2 == 0 and 0 < length <= 64)


class DicomPicture:
    """A decoded DICOM object, whose greys are shown when it is known how.

    Args:
        data: the file.
        where: its name, for refusals.
        check_size: raises for a width and height beyond the limit.

    Raises:
        WaraError: kind "data", in words that quote no text of the header.
    """

    def __init__(self, data: bytes, where: str, check_size: Any) -> None:
        self.where = where
        self.dataset: Dataset
        import pydicom  # a second of import that PNG users should not pay for

        # `force`: `is_dicom` has looked, and the preamble may be missing.
        read = partial(pydicom.dcmread, specific_tags=_ELEMENTS, force=True)
        with self._unquoted():
            self._check_header(read(io.BytesIO(data), stop_before_pixels=True), check_size)
            self.dataset = read(io.BytesIO(data))
            self._decode()

    @contextlib.contextmanager
    def _unquoted(self) -> Iterator[None]:
        """Make one refusal of whatever pydicom and its decoders raise, without their words.

        They quote values, and in a place for a code or a number there may stand a name.
        """
        try:
            yield
        except (WaraError, MemoryError):
            raise
        except Exception as error:
            what = f"damaged DICOM: {type(error).__name__}"
            raise self._refuse(what, "copy it again from its origin") from None

    def _refuse(self, what: str, remedy: str = _EXPORT) -> WaraError:
        return WaraError("data", what, self.where, remedy)

    # -- attributes ---------------------------------------------------------------------------

    def _check_header(self, header: Dataset, check_size: Any) -> None:
        self.dataset = header
        if "Rows" not in header or "Columns" not in header:
            raise self._refuse("DICOM object without an image", "leave it out of the data set")
        check_size(self._count("Columns"), self._count("Rows"), self.where)
        frames = self._count("NumberOfFrames", 1)
        if frames != 1:
            remedy = "export the frame that is read as a file of its own"
            raise self._refuse(f"DICOM with {frames} frames, one is expected", remedy)
        if "FloatPixelData" in header or "DoubleFloatPixelData" in header:
            raise self._refuse("floating-point pixels have no display range", _CONVERT)
        syntax = header.file_meta.get("TransferSyntaxUID") if header.file_meta else None
        if not syntax:
            raise self._refuse("the header names no transfer syntax, so pixels cannot be told")
        self.bits, allocated = self._count("BitsStored"), self._count("BitsAllocated")
        high = self._count("HighBit", self.bits - 1)
        if not 1 <= self.bits <= allocated:
            raise self._refuse(f"BitsStored is {self.bits}, BitsAllocated {allocated}")
        if high != self.bits - 1:
            raise self._refuse(f"HighBit is {high} where {self.bits} bits are stored")
        self.signed = self._count("PixelRepresentation", 0 if self.bits <= 8 else None) == 1

    def _values(self, name: str) -> list[float]:
        """Return the numbers of an attribute: none when absent or empty.

        An enhanced object of one frame has them in its functional groups.
        """
        found = _numbers(self.dataset.get(name))
        inner = _numbers(self._in_groups(name))
        if found is None or inner is None:
            raise self._refuse(f"{name} is no finite number")
        if found and inner and found != inner:
            raise self._refuse(f"{name} is told twice, as {found} and {inner}")
        return found or inner

    def _in_groups(self, name: str) -> Any:
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

    def _count(self, name: str, default: int | None = None) -> int:
        values = self._values(name)
        if len(values) > 1 or (not values and default is None):
            raise self._refuse(f"{name} has {len(values) or 'no'} value{'s' * (len(values) > 1)}")
        value = values[0] if values else default
        if value is None or value != int(value):
            raise self._refuse(f"{name} is {value}, not a whole number")
        return int(value)

    # -- pixels -------------------------------------------------------------------------------

    def _decode(self) -> None:
        from pydicom.pixels import apply_color_lut, get_decoder, pixel_array

        dataset = self.dataset
        if "PixelData" not in dataset:
            raise self._refuse("DICOM object without pixel data", "leave it out of the data set")
        syntax = dataset.file_meta.TransferSyntaxUID
        try:
            decoder = get_decoder(syntax)
        except NotImplementedError:
            name = syntax.name if syntax.is_valid else "its identifier is no UID"
            what = f"DICOM compression not supported: {name}"
            raise self._refuse(what, _CONVERT) from None
        if not decoder.is_available:
            what = f"no decoder for this DICOM compression ({syntax.name})"
            remedy = "pip install 'wara[dicom]', or pip install python-gdcm beside a bundle"
            raise self._refuse(what, f"install the decoders: {remedy}")
        self.photometric = str(dataset.get("PhotometricInterpretation") or "")
        # Bits above those stored are no pixels (old overlays lie there); pydicom takes them off.
        stored = pixel_array(dataset)  # YBR is converted to RGB here
        self.grey = self.photometric in ("MONOCHROME1", "MONOCHROME2")
        if self.photometric == "PALETTE COLOR":
            stored = apply_color_lut(stored, dataset)
            self.bits = int(dataset.RedPaletteColorLookupTableDescriptor[2]) or 16
        elif not (self.grey or self.photometric == "RGB" or self.photometric.startswith("YBR_")):
            known = self.photometric in ("HSV", "ARGB", "CMYK")
            name = f"'{self.photometric}'" if known else "of a name that is not of the standard"
            what = f"DICOM colours {name} not supported"
            raise self._refuse(what, _CONVERT)
        wanted = (2,) if self.grey else (3,)
        if stored.ndim not in wanted or (not self.grey and stored.shape[2] != 3):
            raise self._refuse(f"DICOM image of shape {stored.shape}", _CONVERT)
        shape = str(dataset.get("PresentationLUTShape") or "")
        if self.photometric == "MONOCHROME2" and shape == "INVERSE":
            raise self._refuse("MONOCHROME2 and PresentationLUTShape INVERSE contradict each other")
        self.stored: np.ndarray = stored

    @property
    def uid(self) -> str | None:
        """The SOP Instance UID, which names the object and no patient; None for any other text."""
        from pydicom.uid import UID

        with self._unquoted():
            found = UID(str(self.dataset.get("SOPInstanceUID") or ""))
            return str(found) if found.is_valid else None

    @property
    def windowed(self) -> bool:
        """Whether the file says itself how its greys are shown."""
        with self._unquoted():
            return self.grey and bool(self._luts("VOILUTSequence") or self._values("WindowCenter"))

    def rgb(self, greys: str) -> np.ndarray:
        """Return the picture, uint8 `[H, W, 3]`, its greys shown by one of `GREYS`.

        MONOCHROME1 is inverted last, so that bone is bright everywhere; what the detector did not
        see (pixel padding) is black, whatever the polarity.

        Raises:
            WaraError: kind "data", when an attribute makes no sense.
        """
        if greys not in GREYS:
            raise WaraError("config", f"greys: {greys}", "data.greys", suggest(greys, GREYS))
        with self._unquoted():
            return self._rgb(greys)

    def _rgb(self, greys: str) -> np.ndarray:
        if not self.grey:
            if self.bits == 8:
                return np.ascontiguousarray(self.stored, dtype=np.uint8)
            return scale(self.stored.astype(np.float64), 0, (1 << self.bits) - 1)
        padding = self._padding()
        values, low, high = self._modality()
        if greys == "range":
            seen = values[~padding]
            low, high = (seen.min(), seen.max()) if seen.size else (0.0, 0.0)
        shown = self._shown(values) if greys == "window" else None
        grey = scale(values, low, high) if shown is None else shown
        if self.photometric == "MONOCHROME1":
            grey = 255 - grey
        grey[padding] = 0
        return np.repeat(grey[:, :, None], 3, axis=2)

    def _modality(self) -> tuple[np.ndarray, float, float]:
        """Return modality values (C.11.1), and the range that the stored bits can give them."""
        low = -(1 << (self.bits - 1)) if self.signed else 0
        high = low + (1 << self.bits) - 1
        values = self.stored.astype(np.float64)
        tables = self._luts("ModalityLUTSequence")
        slope, intercept = self._values("RescaleSlope"), self._values("RescaleIntercept")
        if max(len(slope), len(intercept)) > 1:
            raise self._refuse("RescaleSlope or RescaleIntercept has several values")
        if tables:
            if slope not in ([], [1.0]) or intercept not in ([], [0.0]):
                raise self._refuse("a modality LUT and a rescale contradict each other")
            return self._lut(tables[0], values), *self._lut_range(tables[0])
        # Either may be absent or empty, which changes nothing.
        factor, shift = (slope or [1.0])[0], (intercept or [0.0])[0]
        if factor == 0:
            raise self._refuse("RescaleSlope is 0")
        ends = sorted((low * factor + shift, high * factor + shift))
        return values * factor + shift, ends[0], ends[1]

    def _shown(self, values: np.ndarray) -> np.ndarray | None:
        """Return 0..255 by the VOI transform of the file (C.11.2), None when it has none."""
        tables = self._luts("VOILUTSequence")
        if tables:
            return scale(self._lut(tables[0], values), *self._lut_range(tables[0]))
        centres, widths = self._values("WindowCenter"), self._values("WindowWidth")
        if bool(centres) != bool(widths):
            raise self._refuse("a window centre without a width, or a width without a centre")
        if not centres:
            return None
        function = self.dataset.get("VOILUTFunction") or self._in_groups("VOILUTFunction")
        # Of several windows the first is the one that a viewer opens with.
        centre, width = centres[0], widths[0]
        function = str(function or "LINEAR").upper()
        least = 1 if function == "LINEAR" else 0
        if function not in _FUNCTIONS:
            raise self._refuse(f"VOILUTFunction is none of {', '.join(_FUNCTIONS)}")
        if width < least or width <= 0:
            raise self._refuse(f"WindowWidth is {width:g}")
        return window(values, centre, width, function)

    def _luts(self, name: str) -> list[Dataset]:
        found = self.dataset.get(name) or self._in_groups(name) or []
        return list(found)

    def _lut_range(self, table: Dataset) -> tuple[float, float]:
        # The output range of a table is stated by its third number, in bits.
        return 0.0, float((1 << self._descriptor(table)[2]) - 1)

    def _descriptor(self, table: Dataset) -> tuple[int, int, int]:
        found = _numbers(table.get("LUTDescriptor"))
        if not found or len(found) != 3 or not 1 <= found[2] <= 16:
            raise self._refuse("a lookup table without a sound LUTDescriptor")
        count, first, bits = (int(value) for value in found)
        return count or 1 << 16, first, bits

    def _lut(self, table: Dataset, values: np.ndarray) -> np.ndarray:
        """Return values sent through a lookup table, values below and above it by its ends."""
        count, first, bits = self._descriptor(table)
        data: Any = table.get("LUTData")
        if isinstance(data, bytes):
            # As bytes (OW), one per entry or two; which, is told by how many there are.
            little = self.dataset.file_meta.TransferSyntaxUID.is_little_endian
            wide = np.dtype("<u2" if little else ">u2")
            entries = np.frombuffer(data, np.uint8 if len(data) < 2 * count else wide)
        else:
            entries = np.atleast_1d(np.asarray(data if data is not None else [], np.int64)) & _MASK
        entries = entries[:count] if len(entries) == count + 1 else entries  # padded to even
        if len(entries) != count:
            raise self._refuse(f"a lookup table of {len(entries)} entries where {count} are stated")
        if int(entries.max()) >= 1 << bits:
            raise self._refuse(f"a lookup table of {bits} bits with the entry {entries.max()}")
        if values.min() < 0 <= first and first > 0x7FFF:
            first -= 1 << 16  # a signed number in an unsigned place
        index = np.clip(np.rint(values).astype(np.int64) - first, 0, count - 1)
        return entries[index].astype(np.float64)

    def _padding(self) -> np.ndarray:
        """Pixels that the detector did not see (Pixel Padding Value and its range)."""
        value, limit = self._values("PixelPaddingValue"), self._values("PixelPaddingRangeLimit")
        if not value:
            return np.zeros(self.stored.shape, bool)
        low, high = sorted((value[0], (limit or value)[0]))
        return (self.stored >= low) & (self.stored <= high)


def _numbers(value: Any) -> list[float] | None:
    """Return an attribute as numbers, none when absent or empty; None when it is no number."""
    if value is None or value == "" or (hasattr(value, "__len__") and not len(value)):
        return []
    try:
        parts = [value] if isinstance(value, (int, float, str)) else list(value)
        found = [float(part) for part in parts]
    except (TypeError, ValueError):
        return None
    return found if all(math.isfinite(number) for number in found) else None


def scale(values: np.ndarray, low: float, high: float) -> np.ndarray:
    """Map `low..high` to 0..255, clip, round half up."""
    if high <= low:
        return np.zeros(values.shape, np.uint8)
    return np.floor(np.clip((values - low) / (high - low), 0, 1) * 255 + 0.5).astype(np.uint8)


def window(values: np.ndarray, centre: float, width: float, function: str) -> np.ndarray:
    """Apply a window, DICOM PS3.3 C.11.2.1.2 and C.11.2.1.3, with the output in 0..255.

    Args:
        values: modality values, float64.
        centre: window centre, in modality units.
        width: window width, in modality units.
        function: LINEAR, LINEAR_EXACT or SIGMOID.
    """
    if function == "SIGMOID":
        exponent = np.clip(-4 * (values - centre) / width, -700, 700)
        return scale(1 / (1 + np.exp(exponent)), 0, 1)
    if function == "LINEAR_EXACT":
        return scale(values, centre - width / 2, centre + width / 2)
    if width <= 1:  # LINEAR of width 1 is a threshold
        return np.where(values > centre - 0.5, 255, 0).astype(np.uint8)
    return scale(values, centre - 0.5 - (width - 1) / 2, centre - 0.5 + (width - 1) / 2)
