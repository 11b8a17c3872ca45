"""One image path: a DICOM file is told from its PNG twin by nothing, wherever it is read."""

from __future__ import annotations

import io
import itertools
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pydicom
import pytest
import torch
from PIL import Image
from pydicom.uid import ExplicitVRLittleEndian, JPEG2000Lossless, JPEGLSLossless, RLELossless
from test_image_kinds import lut
from test_images import dicom
from test_predict import predict, program, rows

from wara.data import eval_batches, open_source
from wara.deploy.predictor import Predictor

COMPRESSIONS = {
    "plain": ExplicitVRLittleEndian,
    "rle": RLELossless,
    "j2k": JPEG2000Lossless,
    "jls": JPEGLSLossless,
}


class Twin(NamedTuple):
    """A DICOM object, uncompressed, and the 8-bit greys that a viewer shows of it."""

    name: str
    data: bytes
    shown: np.ndarray


def twins() -> Iterator[Twin]:
    """Greys of each depth and polarity, shown by each transform, by the words of PS3.3 C.11.2."""
    rng = np.random.default_rng(5)
    for bits, polarity, shown_by in itertools.product(
        (8, 12, 16), ("MONOCHROME2", "MONOCHROME1"), ("stored", "window", "table")
    ):
        whole = (1 << bits) - 1
        values = rng.integers(0, whole + 1, (40, 37)).astype("u1" if bits == 8 else "u2")
        tags: dict[str, Any] = {"BitsStored": bits, "PhotometricInterpretation": polarity}
        x = values.astype(float)
        if shown_by == "window":
            centre, width = whole // 3, whole // 2
            tags |= {"WindowCenter": centre, "WindowWidth": width}
            y = (x - (centre - 0.5)) / (width - 1) + 0.5
        elif shown_by == "table":
            first, count = (20000, 4096) if bits == 16 else (0, whole + 1)
            table = np.sqrt(np.arange(count) / (count - 1) * 1023**2).astype(int)
            tags["VOILUTSequence"] = lut(count, first, 10, table.tolist())
            y = table[np.clip(values.astype(int) - first, 0, count - 1)] / 1023
        else:
            y = x / whole
        grey = np.floor(np.clip(y, 0, 1) * 255 + 0.5).astype(np.uint8)
        grey = 255 - grey if polarity == "MONOCHROME1" else grey
        yield Twin(f"{bits}-{polarity}-{shown_by}", dicom(values, **tags), grey)


def compressed(data: bytes, syntax: str) -> bytes:
    dataset = pydicom.dcmread(io.BytesIO(data))
    if syntax != ExplicitVRLittleEndian:
        dataset.compress(syntax, generate_instance_uid=False)
    stream = io.BytesIO()
    dataset.save_as(stream)
    return stream.getvalue()


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Folders of DICOM files, each in every compression, and of PNG files."""
    pytest.importorskip("jpeg_ls")
    pytest.importorskip("openjpeg")
    root = tmp_path_factory.mktemp("twins")
    (root / "dicom").mkdir()
    (root / "png").mkdir()
    for twin in twins():
        Image.fromarray(twin.shown).save(root / "png" / f"{twin.name}.png")
        for name, syntax in COMPRESSIONS.items():
            path = root / "dicom" / f"{twin.name}.{name}"
            path.write_bytes(compressed(twin.data, syntax))
    return root / "dicom", root / "png"


def by_name(table: Path) -> dict[str, dict[str, str]]:
    """What was said of each file, under its name, without what belongs to the file alone."""
    own = ("sop_instance_uid", "milliseconds")
    found = {Path(row.pop("file")).name: row for row in rows(table, *own)}
    assert all(row["error"] == "" for row in found.values())
    return found


def test_rows_of_dicom_files_are_those_of_their_png_twins(
    bundle: Path, places: tuple[Path, Path], tmp_path: Path
) -> None:
    for way in ("program", "verb"):
        tables = []
        for number, folder in enumerate(places):
            table = tmp_path / f"{way}{number}.csv"
            if way == "program":
                done = program(bundle, str(folder), "--out", str(table))
                assert done.returncode == 0, done.stderr
            else:
                assert predict(bundle, folder, "--out", table) == 0
            tables.append(by_name(table))
        dicoms, pngs = tables
        assert len(dicoms) == 72 and len(pngs) == 18
        for name, row in dicoms.items():
            assert row == pngs[f"{name.rpartition('.')[0]}.png"], name
        # Had pixels been lost on the way, twins would agree for being all the same.
        assert len({tuple(row.items()) for row in pngs.values()}) == 18


# -- the three tensors ---------------------------------------------------------------------------


def kinds(folder: Path) -> list[Path]:
    """One image of every kind that changes on its way to the network."""
    colour = np.random.default_rng(1).integers(0, 255, (40, 30, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(colour).save(folder / "colour.png")
    Image.fromarray(colour).save(folder / "photo.jpg", quality=90)
    Image.fromarray(colour).save(folder / "turned.jpg", exif=exif)
    Image.fromarray(colour[..., 0].astype("u2") << 4).save(folder / "deep.png")
    for twin in twins():
        (folder / f"{twin.name}.dcm").write_bytes(twin.data)
        if twin.name.startswith("12"):
            for name, syntax in COMPRESSIONS.items():
                (folder / f"{twin.name}.{name}.dcm").write_bytes(compressed(twin.data, syntax))
    return sorted(path for path in folder.iterdir() if path.suffix != ".csv")


HOSPITAL = """
import runpy, sys
from dataclasses import replace
runpy.run_path(sys.argv[1] + "/infer.py")["_own_package"]()
import wara.images
from pathlib import Path
from wara.deploy.predictor import Predictor
assert wara.images.__file__ == sys.argv[1] + "/images.py"
predictor = Predictor(sys.argv[1])
predictor.spec = replace(predictor.spec, bits=12)
for path in sys.argv[2:]:
    sys.stdout.buffer.write(predictor.read(Path(path)).pixels.tobytes())
"""


def test_training_prediction_and_hospital_see_the_same_tensor(bundle: Path, tmp_path: Path) -> None:
    paths = kinds(tmp_path)
    lines = [f"{path.name},{'ab'[i % 2]}" for i, path in enumerate(paths)]
    (tmp_path / "labels.csv").write_text("\n".join(["file,label", *lines]) + "\n")
    predictor = Predictor(bundle)
    predictor.spec = replace(predictor.spec, bits=12)  # what one of the files cannot say
    images = open_source(str(tmp_path), cache=None, offline="error", seed=0)
    images.declare(12, predictor.spec.greys)
    order = [[record.file for record in images.records].index(path.name) for path in paths]
    batches = eval_batches(images, order, images.spec(predictor.spec), batch_size=len(paths))
    trained = next(iter(batches))["image"]
    assert trained.shape == (46, 3, 32, 32) and trained.dtype == torch.float32
    for path, wanted in zip(paths, trained.numpy(), strict=True):
        pixels = predictor.read(path).pixels
        assert pixels is not None and np.array_equal(wanted, pixels), path.name
    command = [sys.executable, "-I", "-c", HOSPITAL, str(bundle), *map(str, paths)]
    done = subprocess.run(command, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == trained.numpy().tobytes()
