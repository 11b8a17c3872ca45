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
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from wara.bounds import BYTE_CAP, of_the_machine
from wara.dicom import DicomPicture, is_dicom
from wara.errors import WaraError, suggest
from wara.pictures import Depth, Picture, decode
from wara.storage import NotRegular, open_regular

if TYPE_CHECKING:
    from torch import Tensor

EXTENSIONS = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".dcm", ".dicom")

INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "lanczos")
_RESAMPLING = {name: Image.Resampling[name.upper()] for name in INTERPOLATIONS}
_CONVERT = "convert it to PNG, JPEG, TIFF or DICOM"
_NO_IMAGES = (
    (b"version https://git-lfs", "a Git LFS pointer, not the image", "run `git lfs pull` there"),
    (b"<", "a web page or XML, not the image", "download it again from where it is shown"),
)
_COPY = "copy it again from its origin"
DECODING = ("bounds.py", "codestreams.py", "dicom_file.py", "dicom.py", "pictures.py")
"""Files of this package that decide pixels, beside this one."""


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
        WaraError: kind "data" when the file is missing, truncated, of another format, beyond
            the caps of `wara.bounds`, has several frames, or holds greys of unknown meaning; kind
            "resources" or "storage" when it is the machine that cannot read it.
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
            if data[:1024].lstrip().startswith(beginning):
                raise WaraError("data", what, self.where, remedy)
        self.picture: Picture | DicomPicture
        with _one_refusal(self.where, "DICOM" if is_dicom(data) else "image"):
            if is_dicom(data):
                self.picture = DicomPicture(data, self.where)
            else:
                self.picture = decode(data, self.where)

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
    except WaraError:
        raise
    except Image.UnidentifiedImageError as error:
        what = "not a readable PNG, JPEG, TIFF or DICOM"
        raise WaraError("data", what, where, _CONVERT) from error
    except Image.DecompressionBombError as error:
        raise WaraError("data", str(error), where, "export the image at a smaller size") from error
    # Pillow, pydicom and their decoders report damaged files by many exception types, and which one
    # is no contract; each is one unreadable image to the caller, and the cause stays attached.
    except Exception as error:
        if lacking := of_the_machine(error, where):
            raise lacking from error
        reason = " ".join(str(error).split())
        raise WaraError("data", f"damaged {kind}: {reason}", where, _COPY) from error


def read_bytes(path: str | Path) -> bytes:
    """Return the bytes of a file of at most `BYTE_CAP` bytes.

    Raises:
        WaraError: kind "data" when the file is missing, not readable or too large; "resources" or
            "storage" when it is the machine that cannot read it.
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
    except (OSError, MemoryError) as error:
        if lacking := of_the_machine(error, str(path)):
            raise lacking from error
        reason = getattr(error, "strerror", None) or str(error)
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
