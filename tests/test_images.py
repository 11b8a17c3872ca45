"""The one image path, on files of the real formats, each value checked against arithmetic."""

from __future__ import annotations

import io
import pickle
import struct
import zlib
from pathlib import Path

import numpy as np
import pydicom
import pytest
import torch
from PIL import Image
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.uid import (
    ExplicitVRLittleEndian,
    JPEGBaseline8Bit,
    JPEGLSLossless,
    RLELossless,
    SecondaryCaptureImageStorage,
    generate_uid,
)

from wara import images
from wara.data.imageset import common_bits
from wara.errors import WaraError
from wara.images import (
    Depth,
    ImageSpec,
    load_tensor,
    processors,
    read_image,
    resize,
    to_tensor,
)


def encode(image: Image.Image, fmt: str, **options) -> bytes:
    stream = io.BytesIO()
    image.save(stream, fmt, **options)
    return stream.getvalue()


def ramp(bits: int = 8, dtype: str = "uint16") -> np.ndarray:
    return np.linspace(0, 2**bits - 1, 40 * 30).round().astype(dtype).reshape(30, 40)


def colours() -> np.ndarray:
    rng = np.random.default_rng(0)
    return rng.integers(0, 256, (30, 40, 3), dtype=np.uint8)


def refused(source, words: str) -> WaraError:
    with pytest.raises(WaraError) as caught:
        read_image(source)
    assert caught.value.kind == "data"
    assert words in str(caught.value)
    assert caught.value.remedy
    return caught.value


# --- PNG, JPEG, TIFF --------------------------------------------------------------------------


@pytest.mark.parametrize("fmt", ["PNG", "TIFF"])
def test_rgb_is_read_unchanged(fmt):
    np.testing.assert_array_equal(read_image(encode(Image.fromarray(colours()), fmt)), colours())


def test_path_and_bytes_agree(tmp_path):
    data = encode(Image.fromarray(colours()), "JPEG", quality=95)
    path = tmp_path / "no_extension"
    path.write_bytes(data)
    np.testing.assert_array_equal(read_image(path), read_image(data))
    np.testing.assert_array_equal(read_image(str(path)), read_image(data))


def test_grey_becomes_three_equal_channels():
    grey = ramp(8, "uint8")
    array = read_image(encode(Image.fromarray(grey), "PNG"))
    assert array.shape == (30, 40, 3) and array.dtype == np.uint8
    for channel in range(3):
        np.testing.assert_array_equal(array[..., channel], grey)


@pytest.mark.parametrize("fmt", ["PNG", "TIFF"])
@pytest.mark.parametrize("bits", [8, 10, 12, 14, 16])
def test_deep_grey_uses_the_real_bit_range(fmt, bits):
    grey = ramp(bits)
    expected = np.array([int(v * 255 / (2**bits - 1) + 0.5) for v in grey.ravel().tolist()])
    array = read_image(encode(Image.fromarray(grey), fmt), bits)
    np.testing.assert_array_equal(array[..., 0].ravel(), expected)
    # The trap: Pillow's own conversion clips everything above 255 to white.
    if bits > 8:
        assert 100 < array.mean() < 155


def test_deep_grey_follows_the_declared_bits():
    grey = ramp(10)  # nothing above 1023, but the file says that 12 bits count
    data = encode(Image.fromarray(grey), "PNG")
    body = b"sBIT" + bytes([12])
    chunk = struct.pack(">I", 1) + body + struct.pack(">I", zlib.crc32(body))
    data = data[:33] + chunk + data[33:]  # right behind the header chunk
    assert read_image(data).max() == round(1023 / 4095 * 255)
    assert read_image(data, 10).max() == 255  # what was decided for the whole set goes before


def test_the_brightest_pixel_of_one_file_changes_no_other_grey():
    plain = ramp(10)
    hot = plain.copy()
    hot[3, 5] = 1030
    for bits in (11, 12):
        one, two = (read_image(encode(Image.fromarray(g), "PNG"), bits) for g in (plain, hot))
        assert (one != two).any(-1).sum() <= 1
    refused_bits = encode(Image.fromarray(hot), "PNG")
    with pytest.raises(WaraError, match="a grey of 1030, where the data set has 10 bits"):
        read_image(refused_bits, 10)


def test_bits_of_a_set():
    assert common_bits([]) is None
    assert common_bits([Depth(200, None)]) == 8
    assert common_bits([Depth(200, None), Depth(1024, None)]) == 12
    assert common_bits([Depth(200, 12), Depth(1000, 12)]) == 12
    assert common_bits([Depth(200, 12), Depth(5000, 12)]) == 14  # stated wrongly
    assert common_bits([Depth(200, 12), Depth(900, None)]) == 12
    assert common_bits([Depth(65535, None)]) == 16


def test_big_endian_tiff_of_16_bits():
    grey = ramp(16).astype(">u2")
    data = _tiff(grey.tobytes(), width=40, height=30, bits=16, photometric=1, endian=">")
    expected = (grey.astype(int) * 255 / 65535 + 0.5).astype(int)
    np.testing.assert_array_equal(read_image(data, 16)[..., 0], expected)


@pytest.mark.parametrize("bits", [8, 16])
def test_tiff_whose_zero_is_white_is_inverted(bits):
    grey = ramp(bits, f"<u{bits // 8}")
    data = _tiff(grey.tobytes(), width=40, height=30, bits=bits, photometric=0, endian="<")
    array = read_image(data, 16)[..., 0]
    assert array[0, 0] == 255 and array[-1, -1] == 0


def _tiff(pixels: bytes, *, width: int, height: int, bits: int, photometric: int, endian: str):
    """A TIFF by hand: header, one directory, one strip."""
    entries = [
        (256, width), (257, height), (258, bits), (259, 1), (262, photometric),
        (273, 8), (277, 1), (278, height), (279, len(pixels)),
    ]  # fmt: skip
    head = (b"II*\0" if endian == "<" else b"MM\0*") + struct.pack(endian + "I", 8 + len(pixels))
    directory = struct.pack(endian + "H", len(entries))
    for tag, value in entries:
        directory += struct.pack(endian + "HHII", tag, 4, 1, value)
    return head + pixels + directory + bytes(4)


def test_signed_greys_without_range_are_refused():
    grey = Image.fromarray(ramp(12).astype("int32") - 1000)
    refused(encode(grey, "TIFF"), "without a display range")


def test_float_tiff():
    unit = (ramp(8) / 255).astype("float32")
    array = read_image(encode(Image.fromarray(unit), "TIFF"))
    np.testing.assert_array_equal(array[..., 0], ramp(8))
    refused(encode(Image.fromarray(unit * 3), "TIFF"), "outside 0..1")
    unit[0, 0] = np.nan
    refused(encode(Image.fromarray(unit), "TIFF"), "outside 0..1")


def test_one_bit_palette_cmyk_alpha():
    bit = Image.fromarray(ramp(8, "uint8") > 127)
    assert bit.mode == "1"
    assert sorted(np.unique(read_image(encode(bit, "PNG")))) == [0, 255]

    palette = Image.fromarray(colours() // 86 * 86).quantize(64)
    expected = np.array(palette.convert("RGB"))
    np.testing.assert_array_equal(read_image(encode(palette, "PNG")), expected)

    flat = np.full((16, 16, 3), (200, 60, 30), np.uint8)
    cmyk = encode(Image.fromarray(flat).convert("CMYK"), "JPEG", quality=100)
    assert np.abs(read_image(cmyk).astype(int) - flat).max() <= 4

    layers = np.dstack([np.full((8, 8, 3), 200, np.uint8), np.zeros((8, 8, 1), np.uint8)])
    layers[4:, :, 3] = 255
    layers[:4, 4:, 3] = 128
    array = read_image(encode(Image.fromarray(layers), "PNG"))
    assert array[0, 0].tolist() == [0, 0, 0]  # transparent: black
    assert abs(int(array[0, 7, 0]) - round(200 * 128 / 255)) <= 1
    assert array[7, 0].tolist() == [200, 200, 200]

    grey_alpha = Image.merge("LA", [Image.new("L", (4, 4), 90), Image.new("L", (4, 4), 255)])
    assert np.unique(read_image(encode(grey_alpha, "PNG"))).tolist() == [90]

    keyed = Image.new("P", (4, 4), 1)
    keyed.putpalette([0, 0, 0, 250, 250, 250])
    assert read_image(encode(keyed, "PNG", transparency=1)).max() == 0


@pytest.mark.parametrize("fmt", ["JPEG", "PNG", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied_once(fmt, orientation):
    upright = np.zeros((32, 48, 3), np.uint8)
    upright[:16, :24] = 255  # bright top left quarter
    # How a camera held in each of the eight ways stores that scene (inverse of the EXIF table).
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: np.rot90(upright, 1),
        7: upright[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(upright, -1),
    }
    image = Image.fromarray(np.ascontiguousarray(stored[orientation]))
    exif = Image.Exif()
    exif[0x0112] = orientation
    array = read_image(encode(image, fmt, exif=exif))
    assert array.shape == upright.shape
    assert np.abs(array.astype(int) - upright).max() <= 8


@pytest.mark.parametrize("fmt", ["JPEG", "PNG", "TIFF"])
@pytest.mark.parametrize("share", [0.02, 0.3, 0.6, 0.9])
def test_truncated_files_are_refused(fmt, share):
    data = encode(Image.fromarray(colours()), fmt)
    error = refused(data[: int(len(data) * share)], "")
    assert error.exit_code == 3


def test_refusals_name_file_and_remedy(tmp_path):
    missing = tmp_path / "gone.png"
    assert str(missing) in str(refused(missing, "no such file"))
    refused(tmp_path, "not a regular file")
    refused(b"", "empty file")
    refused(b"hello" * 100, "not a readable")
    refused(encode(Image.fromarray(colours()), "GIF"), "not a readable")
    frames = [Image.fromarray(colours()) for _ in range(3)]
    stack = encode(frames[0], "TIFF", save_all=True, append_images=frames[1:])
    refused(stack, "3 frames")
    error = refused(stack, "3 frames")
    assert str(pickle.loads(pickle.dumps(error))) == str(error)  # crosses worker borders


@pytest.mark.parametrize("side", [9000, 60000])  # above our cap; above Pillow's, which raises
def test_pixel_cap_is_decided_by_the_header(side):
    def chunk(kind: bytes, body: bytes) -> bytes:
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    # A PNG that claims its size and holds no pixel at all.
    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    refused(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b""), "pixels")


def test_oversized_file_is_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr(images, "BYTE_CAP", 10)
    path = tmp_path / "a.png"
    path.write_bytes(b"x" * 11)
    refused(path, "limit")


# --- resize, to_tensor ------------------------------------------------------------------------


def test_resize_averages_when_it_shrinks():
    board = np.indices((64, 64)).sum(0) % 2 * 255
    small = resize(np.repeat(board[:, :, None], 3, 2).astype(np.uint8), (8, 8), "bilinear")
    assert small.shape == (8, 8, 3) and small.dtype == np.uint8
    assert np.abs(small.astype(int) - 127).max() <= 3  # without anti-aliasing: 0 or 255


def test_resize_takes_height_then_width_and_keeps_the_whole_image():
    array = np.zeros((30, 40, 3), np.uint8)
    array[:, -1] = 255
    resized = resize(array, (60, 20), "bicubic")
    assert resized.shape == (60, 20, 3) and resized[:, -1].min() > 100
    assert resize(array, (30, 40)) is array
    with pytest.raises(WaraError, match="bicubic"):
        resize(array, (8, 8), "bicubik")


def test_to_tensor_matches_the_definition():
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    tensor = to_tensor(colours(), ImageSpec((30, 40), mean, std))
    assert tensor.dtype == torch.float32 and tensor.shape == (3, 30, 40) and tensor.is_contiguous()
    expected = ((colours() / 255 - np.array(mean)) / np.array(std)).transpose(2, 0, 1)
    np.testing.assert_allclose(tensor.numpy(), expected, atol=2e-6)


def test_load_tensor_is_the_three_steps(tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(encode(Image.fromarray(colours()), "PNG"))
    spec = ImageSpec((16, 24), (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), "bilinear")
    expected = to_tensor(resize(read_image(path), (16, 24), "bilinear"), spec)
    assert torch.equal(load_tensor(path, spec), expected)


# --- DICOM ------------------------------------------------------------------------------------


def dicom(pixels: np.ndarray, *, syntax=ExplicitVRLittleEndian, body: bytes | None = None, **tags):
    """A secondary-capture file as `pydicom` writes it; `tags` overwrite or add elements."""
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = SecondaryCaptureImageStorage
    meta.MediaStorageSOPInstanceUID = generate_uid()
    meta.TransferSyntaxUID = syntax
    dataset = Dataset()
    dataset.file_meta = meta
    dataset.SOPClassUID = meta.MediaStorageSOPClassUID
    dataset.SOPInstanceUID = meta.MediaStorageSOPInstanceUID
    dataset.Rows, dataset.Columns = pixels.shape[:2]
    dataset.SamplesPerPixel = 3 if pixels.ndim == 3 else 1
    dataset.PhotometricInterpretation = "RGB" if pixels.ndim == 3 else "MONOCHROME2"
    if pixels.ndim == 3:
        dataset.PlanarConfiguration = 0
    dataset.BitsAllocated = 8 * pixels.dtype.itemsize
    dataset.BitsStored = tags.pop("BitsStored", dataset.BitsAllocated)
    dataset.HighBit = dataset.BitsStored - 1
    dataset.PixelRepresentation = int(pixels.dtype.kind == "i")
    dataset.PixelData = pixels.tobytes() if body is None else body
    dataset["PixelData"].VR = "OW" if dataset.BitsAllocated == 16 else "OB"
    if syntax.is_compressed:
        dataset["PixelData"].is_undefined_length = True
    for name, value in tags.items():
        setattr(dataset, name, value)
    stream = io.BytesIO()
    pydicom.dcmwrite(stream, dataset, enforce_file_format=True)
    return stream.getvalue()


@pytest.mark.parametrize("tags", [{"Rows": 5}, {"Columns": 4}, {"Rows": 6, "Columns": 7}])
def test_pixels_that_the_header_does_not_state_are_refused(tags):
    """The picture would be cut short, or its lines would shift."""
    grey = np.full((7, 8), 90, np.uint8)
    data = dicom(grey, **tags)
    with pytest.raises(WaraError, match="more pixel data than the one frame"):
        read_image(data)
    padded = dicom(grey, body=grey.tobytes() + bytes(40))
    np.testing.assert_array_equal(read_image(padded)[..., 0], grey)


def test_dicom_of_8_bits_is_shown_as_stored():
    grey = ramp(7, "uint8")  # up to 127: nothing may be stretched
    np.testing.assert_array_equal(read_image(dicom(grey))[..., 0], grey)


def test_dicom_window_with_rescale():
    stored = ramp(12, "int16")
    data = dicom(
        stored, BitsStored=16, RescaleSlope="2", RescaleIntercept="-1024",
        WindowCenter=["400", "40"], WindowWidth=["1500", "80"],
    )  # fmt: skip
    # PS3.3 C.11.2.1.2, pixel by pixel.
    expected = []
    for x in (stored.astype(float) * 2 - 1024).ravel().tolist():
        if x <= 400 - 0.5 - 1499 / 2:
            expected.append(0)
        elif x > 400 - 0.5 + 1499 / 2:
            expected.append(255)
        else:
            expected.append(int(((x - 399.5) / 1499 + 0.5) * 255 + 0.5))
    array = read_image(data)
    np.testing.assert_array_equal(array[..., 0].ravel(), expected)
    assert len(np.unique(array)) > 100


def test_dicom_window_functions_agree_with_pydicom():
    from pydicom.pixels import apply_windowing

    stored = ramp(12)
    for function in ("LINEAR", "LINEAR_EXACT", "SIGMOID"):
        data = dicom(stored, BitsStored=12, WindowCenter="1800", WindowWidth="900",
                     VOILUTFunction=function)  # fmt: skip
        oracle = apply_windowing(stored, pydicom.dcmread(io.BytesIO(data))) / 4095 * 255
        assert np.abs(read_image(data)[..., 0] - oracle).max() <= 0.5 + 1e-6


def test_monochrome1_is_the_inverse_of_monochrome2():
    grey = ramp(12)
    tags = {"BitsStored": 12, "WindowCenter": "2000", "WindowWidth": "3000"}
    plain = read_image(dicom(grey, **tags))
    inverse = read_image(dicom(grey, PhotometricInterpretation="MONOCHROME1", **tags))
    np.testing.assert_array_equal(plain.astype(int) + inverse, 255)


def test_dicom_without_window_uses_the_range_of_the_stored_bits():
    grey = ramp(10) + 300
    array = read_image(dicom(grey, BitsStored=12))
    expected = (grey.astype(float) / 4095 * 255 + 0.5).astype(int)
    np.testing.assert_array_equal(array[..., 0], expected)
    # A rescale changes units, not greys; a window is not asked for.
    rescaled = dicom(grey, BitsStored=12, RescaleSlope="2", RescaleIntercept="-1024")
    np.testing.assert_array_equal(read_image(rescaled), array)
    windowed = dicom(grey, BitsStored=12, WindowCenter="500", WindowWidth="100")
    np.testing.assert_array_equal(read_image(windowed, greys="stored"), array)
    signed = (grey.astype("int16") - 2048).astype("int16")
    np.testing.assert_array_equal(read_image(dicom(signed, BitsStored=12)), array)


def test_dicom_range_stretches_each_image_but_its_padding():
    grey = ramp(10) + 300
    grey[:3] = 4095  # outside the detector
    array = read_image(dicom(grey, BitsStored=12, PixelPaddingValue=4095), greys="range")
    seen = grey[3:]
    expected = ((seen.astype(float) - seen.min()) / np.ptp(seen) * 255 + 0.5).astype(int)
    np.testing.assert_array_equal(array[3:, :, 0], expected)
    assert array[:3].max() == 0
    inverse = read_image(
        dicom(grey, BitsStored=12, PixelPaddingValue=4095, PhotometricInterpretation="MONOCHROME1"),
        greys="range",
    )
    assert inverse[:3].max() == 0  # padding stays black


def test_dicom_voi_lut_wins_over_the_window():
    grey = ramp(10)
    item = Dataset()
    item.LUTDescriptor = [1024, 0, 12]
    curve = (np.sqrt(np.arange(1024) / 1023) * 4095).astype(int)
    item.LUTData = curve.tolist()
    item["LUTData"].VR = "US"
    data = dicom(grey, BitsStored=10, VOILUTSequence=[item], WindowCenter="5", WindowWidth="4")
    expected = (curve[grey.ravel()] / 4095 * 255 + 0.5).astype(int)
    np.testing.assert_array_equal(read_image(data)[..., 0].ravel(), expected)


def test_dicom_modality_lut():
    grey = ramp(8, "uint8")
    item = Dataset()
    item.LUTDescriptor = [256, 0, 10]
    item.ModalityLUTType = "US"
    item.LUTData = [(255 - i) * 4 for i in range(256)]
    item["LUTData"].VR = "US"
    array = read_image(dicom(grey, ModalityLUTSequence=[item]))
    expected = ((255 - grey.astype(float)) * 4 / 1023 * 255 + 0.5).astype(int)
    np.testing.assert_array_equal(array[..., 0], expected)


def test_dicom_colours():
    rgb = colours()
    np.testing.assert_array_equal(read_image(dicom(rgb)), rgb)
    # Planes one after the other.
    planes = dicom(rgb, body=rgb.transpose(2, 0, 1).tobytes(), PlanarConfiguration=1)
    np.testing.assert_array_equal(read_image(planes), rgb)
    # BT.601 full range, by Pillow's own tables.
    ybr = np.array(Image.fromarray(rgb).convert("YCbCr"))
    array = read_image(dicom(ybr, PhotometricInterpretation="YBR_FULL"))
    assert np.abs(array.astype(int) - rgb).max() <= 3


def test_dicom_palette():
    index = ramp(8, "uint8") // 16
    table = np.random.default_rng(1).integers(0, 256, (3, 16), dtype=np.uint8)
    tags = {"PhotometricInterpretation": "PALETTE COLOR"}
    for row, name in zip(table, ("Red", "Green", "Blue"), strict=True):
        tags[f"{name}PaletteColorLookupTableDescriptor"] = [16, 0, 8]
        tags[f"{name}PaletteColorLookupTableData"] = row.tobytes()
    expected = table[:, index].transpose(1, 2, 0)
    np.testing.assert_array_equal(read_image(dicom(index, **tags)), expected)


def test_compressed_dicom():
    grey = ramp(8, "uint8")
    jpeg = encode(Image.fromarray(grey), "JPEG", quality=100)
    array = read_image(dicom(grey, syntax=JPEGBaseline8Bit, body=encapsulate([jpeg])))
    assert np.abs(array[..., 0].astype(int) - grey).max() <= 3

    lossless = pydicom.dcmread(io.BytesIO(dicom(ramp(12), BitsStored=12)))
    lossless.compress(RLELossless)
    stream = io.BytesIO()
    lossless.save_as(stream)
    np.testing.assert_array_equal(
        read_image(stream.getvalue()), read_image(dicom(ramp(12), BitsStored=12))
    )


def test_compression_without_decoder_names_the_install(monkeypatch):
    from pydicom.pixels import decoders

    monkeypatch.setattr(type(decoders.JPEGLSLosslessDecoder), "is_available", property(lambda s: 0))
    data = dicom(ramp(8, "uint8"), syntax=JPEGLSLossless, body=encapsulate([b"\xff\xd8\xff\xd9"]))
    assert "pip install 'wara[dicom]'" in str(refused(data, "no decoder"))


def test_dicom_refusals():
    grey = ramp(8, "uint8")
    movie = dicom(grey, NumberOfFrames=3, body=grey.tobytes() * 3)
    refused(movie, "3 frames")
    refused(dicom(grey)[:-500], "")  # cut inside the pixels
    refused(dicom(grey)[:300], "")  # cut inside the header
    refused(dicom(grey, Rows=60000, Columns=60000), "60000 x 60000")
    refused(dicom(grey, WindowCenter="10", WindowWidth="0"), "WindowWidth is 0")
    report = pydicom.dcmread(io.BytesIO(dicom(grey)))
    del report.PixelData, report.Rows
    stream = io.BytesIO()
    report.save_as(stream)
    refused(stream.getvalue(), "without an image")


def test_real_images_are_read():
    import os

    root = Path(os.environ.get("WARA_REAL_DATA", Path(__file__).parents[2] / "shared")) / "data"
    if not root.is_dir():
        pytest.skip("no real images here")
    for folder in sorted(root.iterdir()):
        files = sorted(folder.glob("images/*"))[:3]
        for path in files:
            array = read_image(path)
            assert array.ndim == 3 and array.std() > 5


def test_patients_are_never_named(recwarn):
    # An illegal birth date makes pydicom warn, value and all, when it is parsed.
    data = dicom(
        ramp(8, "uint8"), PatientName="Doe^Jane", PatientID="4711" * 15,
        PatientBirthDate="19700101", WindowCenter="10", WindowWidth="0",
    ).replace(b"19700101", b"1970xx01")  # fmt: skip
    error = refused(data, "WindowWidth")
    told = str(error) + repr(error.__cause__) + "".join(str(w.message) for w in recwarn)
    assert all(word not in told for word in ("Doe", "4711", "1970"))


@pytest.mark.filterwarnings("ignore")
def test_damaged_bytes_never_raise_anything_else():
    import random

    rng = random.Random(0)
    seeds = [encode(Image.fromarray(colours()), fmt) for fmt in ("PNG", "JPEG", "TIFF")]
    seeds += [encode(Image.fromarray(ramp(16)), "TIFF"), dicom(ramp(12), BitsStored=12)]
    outcomes = set()
    for _ in range(600):
        data = bytearray(rng.choice(seeds))
        for _ in range(rng.randint(1, 6)):
            data[rng.randrange(min(len(data), 700))] = rng.randrange(256)
        try:
            array = read_image(bytes(data))
            assert array.dtype == np.uint8 and array.ndim == 3 and array.shape[2] == 3
            outcomes.add("read")
        except WaraError as error:
            assert error.kind == "data"
            outcomes.add("refused")
    assert outcomes == {"read", "refused"}


def test_processors_are_those_that_this_process_may_use(monkeypatch):
    monkeypatch.setattr(images.os, "sched_getaffinity", lambda _: {0, 2, 5}, raising=False)
    monkeypatch.setattr(images.os, "cpu_count", lambda: 64)
    assert processors() == 3
    monkeypatch.delattr(images.os, "sched_getaffinity")
    assert processors() == 64
    monkeypatch.setattr(images.os, "cpu_count", lambda: None)
    assert processors() == 1
