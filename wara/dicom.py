"""DICOM objects of one frame as uint8 pictures: what each attribute does is docs/images.md.

PS3.3 says what the numbers mean: C.7.6.3 (pixels), C.11.1 (modality transform), C.11.2 (VOI
transform), and the functional groups of enhanced objects, which hold the same for a single frame.
What cannot be shown to be right is refused in words that say what is wrong.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from wara.bounds import check_need
from wara.codestreams import check_rle, read_jpeg, read_jpeg2000
from wara.dicom_file import Header, check_segmented, numbers
from wara.errors import WaraError, suggest

if TYPE_CHECKING:
    from pydicom.dataset import Dataset
    from pydicom.pixels.decoders.base import Decoder

GREYS = ("window", "stored", "range")
"""How a monochrome object without colours becomes 0..255, decided once for a data set.

* `window`: the stored VOI LUT, else the first window, else the range that the stored bits can hold.
* `stored`: the range that the stored bits can hold, whatever windows the file has.
* `range`: the range present in each image. It makes every image as bright as the next.
"""

_MASK = 0xFFFF
# With a slope below this no attribute of an image has a meaning.
_SMALLEST = 1e-15
_BLOCK = 1 << 20
_FUNCTIONS = ("LINEAR", "LINEAR_EXACT", "SIGMOID")
_RLE = "1.2.840.10008.1.2.5"
_JPEG2000 = tuple(f"1.2.840.10008.1.2.4.{last}" for last in (90, 91, 201, 202, 203))
_JPEG = tuple(f"1.2.840.10008.1.2.4.{last}" for last in (50, 51, 57, 70, 80, 81))
_FIRST_VRS = (b"UL", b"UI", b"CS", b"DA", b"TM", b"SH", b"LO", b"OB")
_CONVERT = "convert it to PNG, JPEG, TIFF or DICOM"


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


Transform = Callable[[np.ndarray], np.ndarray]


class DicomPicture(Header):
    """A decoded DICOM object, whose greys are shown when it is known how.

    Args:
        data: the file.
        where: its name, for refusals.

    Raises:
        WaraError: kind "data", in words that quote no text of the header.
    """

    def __init__(self, data: bytes, where: str) -> None:
        super().__init__(data, where)
        with self.unquoted():
            decoder = self._decoder()
            self._take_pixels(len(data))
            self._decode(decoder)
            # Kept no longer than needed: they are as large as the file.
            del self.dataset.PixelData

    # -- pixels -------------------------------------------------------------------------------

    def _take_pixels(self, length: int) -> None:
        """Give the data set its pixels, once they are known to be those that the header states."""
        dataset = self.dataset
        rows, columns, samples = (
            self.count(name, default)
            for name, default in (("Rows", None), ("Columns", None), ("SamplesPerPixel", 1))
        )
        allocated = self.count("BitsAllocated")
        if samples not in (1, 3, 4):
            raise self.refuse(f"SamplesPerPixel is {samples}")
        size = -(-rows * columns * samples * allocated // 8)
        if str(dataset.get("PhotometricInterpretation") or "") == "YBR_FULL_422":
            expected = size * 2 // 3
        else:
            expected = size
        syntax = dataset.file_meta.TransferSyntaxUID
        packed = bool(syntax.is_valid and not syntax.is_private and syntax.is_compressed)
        packed = packed and not syntax.is_deflated
        # What the slowest decoder of a syntax keeps of each byte of its pixels, and pydicom of the
        # compressed ones: measured for RLE (3) and JPEG-LS (6); for JPEG 2000 reckoned, since it
        # keeps each sample as 32 bits.
        times = 3 if not packed else 3 if syntax == _RLE else 12 if syntax in _JPEG2000 else 6
        check_need(size, length, self.where, need=times * size + (3 * length if packed else 0))
        pixels, vr, fragments = self.file.pixels(expected)
        dataset.pop("ExtendedOffsetTable", None)
        dataset.pop("ExtendedOffsetTableLengths", None)
        if not packed:
            if fragments:
                raise self.refuse("fragments of pixels, where the header states no compression")
            # Behind the frame there may be some padding, and nothing that a picture could be of.
            behind = pixels[expected + 1 :]
            if behind and (len(pixels) >= 2 * expected or behind.strip(b"\0")):
                raise self.refuse("more pixel data than the one frame that the header states")
        else:
            from pydicom.encaps import encapsulate

            frame = self.file.frame(pixels, fragments)
            self._check_frame(frame, str(syntax), (columns, rows, samples), allocated)
            pixels = encapsulate([frame], has_bot=False)
        dataset.add_new("PixelData", vr, pixels)
        if packed:
            dataset["PixelData"].is_undefined_length = True

    def _check_frame(
        self, frame: bytes, syntax: str, shape: tuple[int, int, int], allocated: int
    ) -> None:
        """Refuse a compressed frame that is not what the header around it says."""
        width, height, samples = shape
        size = width * height * samples * allocated // 8
        if len(frame) > size + size // 4 + (1 << 16):
            raise self.refuse(f"{len(frame):,} compressed bytes for {size:,} of pixels")
        if syntax == _RLE:
            check_rle(frame, samples * allocated // 8, width * height, self.where)
            return
        if syntax in _JPEG2000:
            found = read_jpeg2000(frame, self.where)
        elif syntax in _JPEG:
            found = read_jpeg(frame, self.where)
        else:
            return  # no decoder is known for it, which is said below
        if (found.width, found.height, found.samples) != shape:
            what = f"compressed pixels of {found.width} x {found.height} x {found.samples}"
            raise self.refuse(f"{what}, where the header states {width} x {height} x {samples}")
        if found.bits > allocated:
            what = f"compressed pixels of {found.bits} bits"
            raise self.refuse(f"{what}, where the header allocates {allocated}")

    def _decoder(self) -> Decoder:
        from pydicom.pixels import get_decoder

        syntax = self.dataset.file_meta.TransferSyntaxUID
        try:
            decoder = get_decoder(syntax)
        except NotImplementedError:
            name = syntax.name if syntax.is_valid else "its identifier is no UID"
            what = f"DICOM compression not supported: {name}"
            raise self.refuse(what, _CONVERT) from None
        if not decoder.is_available:
            what = f"no decoder for this DICOM compression ({syntax.name})"
            remedy = "pip install 'wara[dicom]', or pip install python-gdcm beside a bundle"
            raise self.refuse(what, f"install the decoders: {remedy}")
        return decoder

    def _decode(self, decoder: Decoder) -> None:
        from pydicom.pixels import apply_color_lut, convert_color_space

        dataset = self.dataset
        # Bits above those stored are no pixels (old overlays lie there); pydicom takes them off.
        try:
            stored, told = decoder.as_array(
                dataset, index=0, raw=True, allow_excess_frames=False  # type: ignore[arg-type]
            )
        except RuntimeError as error:
            # pydicom tells what each plugin raised as text, and of a MemoryError nothing may stand.
            if re.search(r"\n  \w+: *(\n|$)", str(error)):
                raise MemoryError from error
            raise
        self.photometric = str(told["photometric_interpretation"])
        if self.photometric in ("YBR_FULL", "YBR_FULL_422"):
            stored = self._by_blocks(
                stored, np.uint8, lambda part: convert_color_space(part, "YBR_FULL", "RGB")
            )
        self.grey = self.photometric in ("MONOCHROME1", "MONOCHROME2")
        if self.photometric == "PALETTE COLOR":
            self._check_palette()
            stored = self._by_blocks(
                stored, np.uint16, lambda part: apply_color_lut(part, dataset), channels=3
            )
        elif not (self.grey or self.photometric == "RGB" or self.photometric.startswith("YBR_")):
            known = self.photometric in ("HSV", "ARGB", "CMYK")
            name = f"'{self.photometric}'" if known else "of a name that is not of the standard"
            what = f"DICOM colours {name} not supported"
            raise self.refuse(what, _CONVERT)
        wanted = (2,) if self.grey else (3,)
        if stored.ndim not in wanted or (not self.grey and stored.shape[2] != 3):
            raise self.refuse(f"DICOM image of shape {stored.shape}", _CONVERT)
        shape = str(dataset.get("PresentationLUTShape") or "")
        if self.photometric == "MONOCHROME2" and shape == "INVERSE":
            raise self.refuse("MONOCHROME2 and PresentationLUTShape INVERSE contradict each other")
        self.stored: np.ndarray = stored

    def _check_palette(self) -> None:
        # All three colours: each is expanded for itself.
        for colour in ("Red", "Green", "Blue"):
            stem = f"{colour}PaletteColorLookupTable"
            found = self.values(f"{stem}Descriptor")
            if len(found) != 3 or found[2] not in (8, 16):
                raise self.refuse(f"a palette without a sound {stem}Descriptor")
            table = self.dataset.get(f"Segmented{stem}Data")
            if table is not None:
                order = "<" if self.dataset.file_meta.TransferSyntaxUID.is_little_endian else ">"
                check_segmented(table, int(found[0]) or 1 << 16, order, self.refuse)
            self.bits = int(found[2])

    @staticmethod
    def _by_blocks(
        stored: np.ndarray,
        kind: Any,
        work: Callable[[np.ndarray], np.ndarray],
        channels: int | None = None,
    ) -> np.ndarray:
        """Return what `work` makes of `stored`, part by part: numbers of 64 bits would not fit."""
        deep = stored.shape[2:] if channels is None else (channels,)
        flat = stored.reshape(1, -1, *stored.shape[2:])
        made = np.empty((1, flat.shape[1], *deep), kind)
        for start in range(0, flat.shape[1], _BLOCK):
            part = work(flat[:, start : start + _BLOCK])
            made[:, start : start + _BLOCK] = part
        return made.reshape(*stored.shape[:2], *deep)

    @property
    def uid(self) -> str | None:
        """The SOP Instance UID, which names the object and no patient; None for any other text."""
        from pydicom.uid import UID

        with self.unquoted():
            found = UID(str(self.dataset.get("SOPInstanceUID") or ""))
            return str(found) if found.is_valid else None

    @property
    def windowed(self) -> bool:
        """Whether the file says itself how its greys are shown."""
        with self.unquoted():
            return self.grey and bool(self.luts("VOILUTSequence") or self.values("WindowCenter"))

    def rgb(self, greys: str) -> np.ndarray:
        """Return the picture, uint8 `[H, W, 3]`, its greys shown by one of `GREYS`.

        MONOCHROME1 is inverted last, so that bone is bright everywhere; what the detector did not
        see (pixel padding) is black, whatever the polarity.

        Raises:
            WaraError: kind "data", when an attribute makes no sense.
        """
        if greys not in GREYS:
            raise WaraError("config", f"greys: {greys}", "data.greys", suggest(greys, GREYS))
        with self.unquoted():
            return self._rgb(greys)

    def _rgb(self, greys: str) -> np.ndarray:
        if not self.grey:
            if self.bits == 8:
                return np.ascontiguousarray(self.stored, dtype=np.uint8)
            whole = (1 << self.bits) - 1
            return self._by_blocks(self.stored, np.uint8, lambda part: scale(part * 1.0, 0, whole))
        modality, low, high = self._modality()
        padding = self._padding()
        if greys == "range":
            ends = []
            for start in range(0, self.stored.size, _BLOCK):
                part = self.stored.reshape(-1)[start : start + _BLOCK]
                seen = part[~padding(part)]
                if seen.size:
                    values = modality(seen)
                    ends += [values.min(), values.max()]
            low, high = (min(ends), max(ends)) if ends else (0.0, 0.0)
        shown = self._shown(modality) if greys == "window" else None

        def show(part: np.ndarray) -> np.ndarray:
            values = modality(part)
            grey = scale(values, low, high) if shown is None else shown(values)
            if self.photometric == "MONOCHROME1":
                grey = 255 - grey
            grey[padding(part)] = 0
            return grey

        grey = self._by_blocks(self.stored, np.uint8, show)
        return np.repeat(grey[:, :, None], 3, axis=2)

    def _modality(self) -> tuple[Transform, float, float]:
        """Return what makes modality values (C.11.1), and the range that the bits can give them."""
        low = -(1 << (self.bits - 1)) if self.signed else 0
        high = low + (1 << self.bits) - 1
        tables = self.luts("ModalityLUTSequence")
        slope, intercept = self.values("RescaleSlope"), self.values("RescaleIntercept")
        if max(len(slope), len(intercept)) > 1:
            raise self.refuse("RescaleSlope or RescaleIntercept has several values")
        if tables:
            if slope not in ([], [1.0]) or intercept not in ([], [0.0]):
                raise self.refuse("a modality LUT and a rescale contradict each other")
            least = int(self.stored.min())
            return self._lut(tables[0], least), *self._lut_range(tables[0])
        # Either may be absent or empty, which changes nothing.
        factor, shift = (slope or [1.0])[0], (intercept or [0.0])[0]
        if factor == 0:
            raise self.refuse("RescaleSlope is 0")
        ends = sorted((low * factor + shift, high * factor + shift))
        if abs(factor) < _SMALLEST or (high > low and not ends[0] < ends[1]):
            raise self.refuse(f"RescaleSlope is {factor:g}, with which all greys are one")
        return (lambda part: part.astype(np.float64) * factor + shift), ends[0], ends[1]

    def _shown(self, modality: Transform) -> Transform | None:
        """Return what makes 0..255 by the VOI transform of the file (C.11.2), None without one."""
        tables = self.luts("VOILUTSequence")
        if tables:
            ends = np.array([self.stored.min(), self.stored.max()])
            table = self._lut(tables[0], float(modality(ends).min()))
            span = self._lut_range(tables[0])
            return lambda values: scale(table(values), *span)
        centres, widths = self.values("WindowCenter"), self.values("WindowWidth")
        if bool(centres) != bool(widths):
            raise self.refuse("a window centre without a width, or a width without a centre")
        if not centres:
            return None
        function = self.dataset.get("VOILUTFunction") or self.in_groups("VOILUTFunction")
        # Of several windows the first is the one that a viewer opens with.
        centre, width = centres[0], widths[0]
        function = str(function or "LINEAR").upper()
        least = 1 if function == "LINEAR" else 0
        if function not in _FUNCTIONS:
            raise self.refuse(f"VOILUTFunction is none of {', '.join(_FUNCTIONS)}")
        if width < least or width <= 0:
            raise self.refuse(f"WindowWidth is {width:g}")
        if not centre - width / 2 < centre + width / 2:
            raise self.refuse(f"WindowWidth is {width:g}, which is nothing beside its centre")
        return lambda values: window(values, centre, width, function)

    def _lut_range(self, table: Dataset) -> tuple[float, float]:
        # The output range of a table is stated by its third number, in bits.
        return 0.0, float((1 << self._descriptor(table)[2]) - 1)

    def _descriptor(self, table: Dataset) -> tuple[int, int, int]:
        found = numbers(table.get("LUTDescriptor"))
        if not found or len(found) != 3 or not 1 <= found[2] <= 16:
            raise self.refuse("a lookup table without a sound LUTDescriptor")
        count, first, bits = (int(value) for value in found)
        return count or 1 << 16, first, bits

    def _lut(self, table: Dataset, least: float) -> Transform:
        """Return what sends values through a lookup table, those beyond it by its ends.

        Args:
            table: an item of a LUT sequence.
            least: the smallest value that will be sent.
        """
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
            raise self.refuse(f"a lookup table of {len(entries)} entries where {count} are stated")
        if int(entries.max()) >= 1 << bits:
            raise self.refuse(f"a lookup table of {bits} bits with the entry {entries.max()}")
        if least < 0 <= first and first > 0x7FFF:
            first -= 1 << 16  # a signed number in an unsigned place

        def through(values: np.ndarray) -> np.ndarray:
            index = np.clip(np.rint(values) - first, 0, count - 1).astype(np.int64)
            return entries[index].astype(np.float64)

        return through

    def _padding(self) -> Callable[[np.ndarray], np.ndarray]:
        """Return what tells pixels that the detector did not see (Pixel Padding Value, range)."""
        value, limit = self.values("PixelPaddingValue"), self.values("PixelPaddingRangeLimit")
        if not value:
            return lambda part: np.zeros(part.shape, bool)
        low, high = sorted((value[0], (limit or value)[0]))
        return lambda part: (part >= low) & (part <= high)


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
