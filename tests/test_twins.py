"""Pictures that are there twice: found, kept in one split, shown; and pictures that change."""

from __future__ import annotations

import csv
import io
import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageEnhance
from pydicom.uid import SecondaryCaptureImageStorage
from test_gate import FRACTIONS, card, fails
from training_helpers import tiny_config, with_twins

from wara.config import RunConfig
from wara.data import ImageSet, Record, assign_splits, check, imageset
from wara.data.imageset import FileReader
from wara.data.likeness import SIDE, Pair, near_pairs, pixel_digest, sign
from wara.data.twins import TwinRule, all_pairs, contact_sheet
from wara.errors import WaraError
from wara.images import ImageSpec
from wara.training.run import run_here

Transpose = Image.Transpose


def picture(seed: int, width: int = 150, height: int = 120) -> Image.Image:
    """A grey field of random waves, with the spectrum of a photograph."""
    rng = np.random.default_rng(seed)
    waves = np.hypot(*np.meshgrid(np.fft.fftfreq(width) * width, np.fft.fftfreq(height) * height))
    noise = np.fft.fft2(rng.normal(size=(height, width)))
    field = np.fft.ifft2(noise / np.maximum(waves, 1)).real
    grey = np.clip(128 + 45 * (field - field.mean()) / field.std(), 0, 255).astype(np.uint8)
    return Image.fromarray(grey).convert("RGB")


def jpeg(image: Image.Image, quality: int) -> Image.Image:
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=quality)
    return Image.open(stream).convert("RGB")


def marked(image: Image.Image) -> Image.Image:
    copy = image.copy()
    draw = ImageDraw.Draw(copy)
    draw.line((40, 60, 90, 60), fill="white")
    draw.text((5, 100), "12.3 mm", fill="white")
    return copy


def cropped(image: Image.Image) -> Image.Image:
    w, h = image.size
    return image.crop((w // 40, h // 40, w - w // 40, h - h // 40))


CHANGES = {
    "jpeg 100": lambda image: jpeg(image, 100),
    "jpeg 75": lambda image: jpeg(image, 75),
    "64 %": lambda image: image.resize((96, 77), Image.Resampling.BICUBIC),
    "brighter": lambda image: ImageEnhance.Brightness(image).enhance(1.1),
    "less contrast": lambda image: ImageEnhance.Contrast(image).enhance(0.9),
    "marks": marked,
    "left-right": lambda image: image.transpose(Transpose.FLIP_LEFT_RIGHT),
    "upside down": lambda image: image.transpose(Transpose.FLIP_TOP_BOTTOM),
    "half turn": lambda image: image.transpose(Transpose.ROTATE_180),
    "crop": cropped,
}


def signature(image: Image.Image):
    return sign(np.asarray(image))


@pytest.mark.parametrize("name", CHANGES)
def test_a_changed_picture_is_known_again(name):
    pictures = [picture(seed) for seed in range(12)]
    changed = [CHANGES[name](image) for image in pictures]
    pairs = near_pairs([signature(image) for image in pictures + changed])
    found, wanted = {(p.first, p.second) for p in pairs}, {(i, i + 12) for i in range(12)}
    assert found <= wanted and len(found) >= (9 if name == "crop" else 12)
    mirrored = name if name in ("left-right", "upside down", "half turn") else ""
    assert {p.mirrored for p in pairs} == {mirrored}
    assert all(p.kind == "near" and 0.9 <= p.correlation <= 1.0001 for p in pairs)
    # Counted anew, by another transform: in the orientation that was found, few signs differ.
    assert max(p.distance for p in pairs) <= 25


def test_other_pictures_are_not_paired():
    assert near_pairs([signature(picture(seed)) for seed in range(150)]) == []


def test_pictures_with_a_common_ground_are_not_paired():
    # As in X-rays: the coarse form is everybody's, only detail is one's own.
    ground = np.asarray(picture(0))
    own = [np.asarray(picture(seed), np.float32) - 128 for seed in range(1, 41)]
    smooth = np.asarray(Image.fromarray(ground).resize((6, 5)).resize((150, 120)))
    mixed = [(0.88 * smooth + 0.12 * (128 + part)).astype(np.uint8) for part in own]
    coarse = [np.corrcoef(mixed[0].ravel(), other.ravel())[0, 1] for other in mixed[1:]]
    assert np.median(coarse) > 0.85
    assert near_pairs([sign(array) for array in mixed]) == []


def test_blank_and_tiny_pictures_have_nothing_to_compare():
    blank = np.full((50, 60), 7, np.uint8)
    small = np.asarray(picture(1).resize((SIDE - 1, 90)))
    assert sign(blank).thumbnail == sign(small).thumbnail == b""
    assert near_pairs([sign(blank), sign(blank + 1), None, sign(small)]) == []
    assert len(signature(picture(1)).thumbnail) == 1024


def test_the_digest_is_of_pixels_and_shape():
    rng = np.random.default_rng(0)
    grey = rng.integers(0, 256, (40, 50), np.uint8)
    assert pixel_digest(grey) == pixel_digest(np.stack([grey] * 3, axis=2))
    assert pixel_digest(np.stack([grey] * 3, axis=2)[:, ::-1][:, ::-1]) == pixel_digest(grey)
    others = (grey.reshape(50, 40), grey.T, grey[::-1], grey.astype(np.uint16), grey ^ 1)
    assert len({pixel_digest(grey), *map(pixel_digest, others)}) == 6


def test_many_copies_count_once():
    # 300 copies would make 45,000 pairs; the near copy of one of them makes one.
    same, near = signature(picture(0)), signature(jpeg(picture(0), 60))
    assert near_pairs([same] * 300 + [near]) == [
        Pair(0, 300, "near", *_rest(near_pairs([same, near])[0]))
    ]


def _rest(pair: Pair) -> tuple[int, float, str]:
    return pair.distance, pair.correlation, pair.mirrored


# --- the gate ---------------------------------------------------------------------------------


def dicom(path: Path, grey: np.ndarray) -> None:
    import pydicom
    from pydicom.dataset import FileDataset, FileMetaDataset

    meta = FileMetaDataset()
    meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    meta.MediaStorageSOPClassUID = SecondaryCaptureImageStorage
    meta.MediaStorageSOPInstanceUID = pydicom.uid.generate_uid()
    ds = FileDataset(str(path), {}, file_meta=meta, preamble=b"\0" * 128)
    ds.SOPClassUID = SecondaryCaptureImageStorage
    ds.SOPInstanceUID = meta.MediaStorageSOPInstanceUID
    ds.Rows, ds.Columns = grey.shape
    ds.SamplesPerPixel, ds.PhotometricInterpretation = 1, "MONOCHROME2"
    ds.BitsAllocated = ds.BitsStored = 8
    ds.HighBit, ds.PixelRepresentation = 7, 0
    ds.PixelData = grey.tobytes()
    ds.save_as(path, enforce_file_format=True)


def twin_folder(folder: Path, kind: str, pairs: int = 20) -> list[Path]:
    """Write `pairs` pictures, each twice: as PNG and in another form."""
    paths = []
    folder.mkdir()
    for number in range(pairs):
        image = picture(number, 48, 40)
        one, other = folder / f"{number:02d}.png", folder / f"{number:02d}_other.{kind}"
        image.save(one)
        if kind == "dcm":
            dicom(other, np.asarray(image)[:, :, 0])
        elif kind == "tiff":
            image.save(other, compression="tiff_lzw")
        elif kind == "grey.png":
            image.convert("L").save(other, compress_level=1)
        elif kind == "jpg":
            image.save(other, quality=95)
        else:
            image.transpose(Transpose.FLIP_LEFT_RIGHT).save(other)
        paths += [one, other]
    return paths


def set_of(paths: list[Path], labels=None, splits=None) -> ImageSet:
    labels = labels or [i // 2 % 2 for i in range(len(paths))]
    splits = splits or [None] * len(paths)
    records = [
        Record(path.name, label, None, split)
        for path, label, split in zip(paths, labels, splits, strict=True)
    ]
    return ImageSet(card(2), records, FileReader(paths), origin="here")


def torn(splits: list[str]) -> int:
    return sum(a != b for a, b in zip(splits[::2], splits[1::2], strict=True))


@pytest.mark.parametrize("kind", ["tiff", "dcm", "grey.png"])
def test_the_same_pixels_stay_together_in_any_container(tmp_path, kind):
    images = set_of(twin_folder(tmp_path / "set", kind))
    assert {(p.kind, p.second - p.first) for p in all_pairs(images)} == {("pixels", 1)}
    for near in ("group", "ignore"):
        assert torn(assign_splits(images, **FRACTIONS, near=near)) == 0
    # A split that the user gave is refused, and kept if declared.
    splits = ["train", "val"] * 20
    given = set_of(images.reader.paths, splits=splits)
    assert "identical pixels in train (1) and val (1); 00.png, 00_other" in fails(
        given, splits, tmp_path
    )
    notes = check(given, splits, report_dir=None, rule=TwinRule(allow=True))
    assert any("exact copies of other images: 20, 20 across splits" in note for note in notes)


@pytest.mark.parametrize("kind", ["jpg", "mirrored.png"])
def test_near_duplicates_stay_together_unless_ignored(tmp_path, kind):
    images = set_of(twin_folder(tmp_path / "set", kind))
    splits = assign_splits(images, **FRACTIONS)
    assert torn(splits) == 0
    notes = check(images, splits, report_dir=None)
    text = "near-duplicates: 20 pairs among 40 images, none across splits"
    assert f"{text}; near_duplicates.csv of a run or a report lists them" in notes
    loose = assign_splits(images, **FRACTIONS, near="ignore")
    apart = torn(loose)
    assert apart > 5
    notes = check(images, loose, report_dir=None, rule=TwinRule("ignore"))
    assert any(f"{apart} across splits (data.near_duplicates: ignore)" in note for note in notes)
    # Across a split that the user gave: said, not refused.
    given = ["train"] * 2 + ["train", "val"] * 19
    notes = check(set_of(images.reader.paths, splits=given), given, report_dir=None)
    assert any("19 across splits (as the source has them)" in note for note in notes)


def test_near_duplicates_with_different_labels_are_said(tmp_path):
    paths = twin_folder(tmp_path / "set", "jpg")
    images = set_of(paths, labels=[0, 1] + [i // 2 % 2 for i in range(2, 40)])
    notes = check(images, assign_splits(images, **FRACTIONS), report_dir=None)
    wanted = "near-duplicates with different labels: 1 pairs, first 00.png, 00_other.jpg"
    assert wanted in notes


def test_a_chain_through_the_whole_set_is_refused(tmp_path):
    # 24 frames of one film, and 16 pictures of their own.
    paths = []
    for number in range(40):
        image = picture(0 if number < 24 else number, 48, 40)
        paths.append(tmp_path / f"{number:02d}.jpg")
        image.save(paths[-1], quality=70 + number)
    images = set_of(paths)
    splits = assign_splits(images, **FRACTIONS, near="ignore")
    text = fails(images, splits, tmp_path)
    assert "near-duplicates would tie 24 of 40 images into one group; 00.jpg" in text
    assert "data.near_duplicates=ignore" in text
    check(images, splits, report_dir=None, rule=TwinRule("ignore"))


def test_drawn_images_are_not_compared(tmp_path):
    images = set_of(twin_folder(tmp_path / "set", "jpg", 3))
    images.synthetic = True
    assert images.near_pairs() == [] and images.signature(0) is None


def deep_set(folder: Path, bits: int | None = None) -> ImageSet:
    """Pictures of 12 bits, each in 16 bits as PNG and two kinds of TIFF, and as PNG of 8 bits."""
    paths = []
    for number in range(6):
        shown = np.asarray(picture(number, 48, 40).convert("L"))
        grey = shown.astype(np.uint16) * 16
        kinds = {"png": {}, "lzw.tiff": {"compression": "tiff_lzw"}, "tiff": {"tiffinfo": {262: 0}}}
        for kind, options in kinds.items():
            paths.append(folder / f"{number}.{kind}")
            if not paths[-1].exists():
                Image.fromarray(grey).save(paths[-1], **options)
        paths.append(folder / f"{number}.8.png")
        Image.fromarray(shown).save(paths[-1])
    images = set_of(paths)
    images.declare(bits, None)
    return images


def test_16_bit_files_are_known_again_whatever_is_declared_later(tmp_path):
    images = deep_set(tmp_path)
    assert images.survey() == () and images.bits == 12
    late = [images.signature(index) for index in range(len(images))]
    # The same numbers with black and white exchanged are another picture.
    assert {(p.first, p.second, p.kind) for p in all_pairs(images)} == {
        (at, at + step, kind)
        for at in range(0, 24, 4)
        for step, kind in ((1, "pixels"), (3, "near"))
    }
    assert images.facts[2].inverted
    spec = ImageSpec((16, 16), (0.5,) * 3, (0.5,) * 3)
    for bits in (12, 16):
        declared = deep_set(tmp_path, bits)
        assert declared.survey(spec) == ()
        assert [declared.signature(index) for index in range(len(images))] == late


def test_what_was_found_is_found_again_without_reading_or_searching(tmp_path, monkeypatch):
    monkeypatch.setattr("wara.data.facts.SETTLED", 0.0)
    paths = twin_folder(tmp_path / "set", "jpg", 8)

    def surveyed(known: bool) -> ImageSet:
        images = set_of(paths)
        images.survey(cache=images.fact_cache(tmp_path / "facts"), known=known)
        return images

    first = surveyed(False)
    pairs, facts = first.near_pairs(), first.facts
    assert len(pairs) == 8
    searched = []
    search = imageset.near_pairs
    monkeypatch.setattr(imageset, "near_pairs", lambda own: searched.append(1) or search(own))
    assert surveyed(False).near_pairs() == pairs and not searched  # a run, which reads them all
    with monkeypatch.context() as patch:
        patch.setattr(FileReader, "load", None)
        again = surveyed(True)
        assert again.near_pairs() == pairs and again.facts == facts
    assert not searched
    picture(99, 48, 40).save(paths[1], quality=95)
    assert len(surveyed(True).near_pairs()) == 7 and searched


def test_the_sheet_shows_pairs_side_by_side(tmp_path):
    images = set_of(twin_folder(tmp_path / "set", "mirrored.png", 6))
    sheet = contact_sheet(images, all_pairs(images))
    assert sheet.size == (4 * 328, 2 * 206)
    shown = np.asarray(sheet)[:, :, 0]
    width, height = Image.fromarray(images.read(0)).size
    left, right = shown[:height, :width], shown[:height, 162 : 162 + width]
    np.testing.assert_array_equal(left, images.read(0)[:, :, 0])
    np.testing.assert_array_equal(left, right[:, ::-1])


# --- a run ------------------------------------------------------------------------------------


def test_a_run_lists_and_shows_what_is_there_twice(tmp_path):
    with_twins(tmp_path)
    config = tiny_config(tmp_path, epochs=2)

    def enough(prepared, epoch: int) -> None:
        raise WaraError("resources", "the first epoch is enough")

    with pytest.raises(WaraError, match="enough"):
        run_here(config, quiet=True, watch=enough)
    folder = Path(config.folder)
    rows = list(csv.DictReader((folder / "near_duplicates.csv").open()))
    assert list(rows[0])[:10] == [
        "file_a", "file_b", "kind", "distance", "correlation", "mirrored", "split_a", "split_b",
        "label_a", "label_b",
    ]  # fmt: skip
    found = {(row["file_b"], row["kind"]) for row in rows}
    assert found == {("images/darker.png", "near"), ("images/again.tiff", "pixels")}
    splits = {row["file"]: row["split"] for row in csv.DictReader((folder / "splits.csv").open())}
    assert all(row["split_a"] == splits[row["file_a"]] for row in rows)
    assert all(row["split_b"] == splits[row["file_b"]] for row in rows)
    assert Image.open(folder / "near_duplicates.png").size == (2 * 328, 206)
    data = json.loads((folder / "provenance.json").read_text())["data"]
    assert (data["near_duplicates"], data["near_pairs"]) == ("group", 1)
    assert data["allow_duplicates"] is False
    assert all(row["split_a"] == row["split_b"] for row in rows)


# --- pictures that change ---------------------------------------------------------------------


def change(path: Path) -> None:
    """Write other pixels of the same size in bytes and with the old time, as a copy tool may."""
    before = path.stat()
    data = path.read_bytes()
    image = Image.open(io.BytesIO(data))
    pixels = np.asarray(image).copy()
    pixels[:4] ^= 1
    Image.fromarray(pixels).save(path)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def test_an_image_that_changed_is_refused_when_it_is_read_again(tmp_path, monkeypatch):
    paths = twin_folder(tmp_path / "set", "grey.png", 3)
    spec = ImageSpec((16, 16), (0.5,) * 3, (0.5,) * 3)
    held = set_of(paths)
    held.survey(spec)
    kept = held.array(2, spec).copy()
    monkeypatch.setattr(imageset, "MEMORY_LIMIT", 10)
    images = set_of(paths)
    images.survey(spec)
    images.array(2, spec)
    change(paths[2])
    with pytest.raises(WaraError, match="not what it was when the data were checked") as caught:
        images.array(2, spec)
    assert caught.value.exit_code == 3 and caught.value.where == str(paths[2])
    # Held in memory, nothing is read again.
    np.testing.assert_array_equal(held.array(2, spec), kept)


def refused(config: RunConfig, victim: Path, **options) -> WaraError:
    """Run while a file changes after the first epoch."""

    def watch(prepared, epoch: int) -> None:
        if epoch == 1:
            change(victim)

    with pytest.raises(WaraError) as caught:
        run_here(config, quiet=True, watch=watch, **options)
    return caught.value


def test_a_run_whose_images_change_keeps_its_checkpoint(tmp_path, monkeypatch):
    monkeypatch.setattr(imageset, "MEMORY_LIMIT", 10)
    config = tiny_config(tmp_path, epochs=3)
    rows = list(csv.DictReader((tmp_path / "data" / "labels.csv").open()))
    victim = tmp_path / "data" / rows[5]["file"]
    error = refused(config, victim)
    assert error.kind == "data" and error.exit_code == 3 and error.where == str(victim)
    folder = Path(config.folder)
    assert (folder / "checkpoints" / "last.ckpt").stat().st_size > 0
    provenance = json.loads((folder / "provenance.json").read_text())
    assert provenance["status"] == "failed"
    # The data are others now, so the run cannot go on with them either.
    with pytest.raises(WaraError, match="images, labels or splits"):
        run_here(config, quiet=True, resume=True)


def test_an_image_that_changes_before_the_trunk_cache_is_filled(tmp_path, monkeypatch):
    monkeypatch.setattr(imageset, "MEMORY_LIMIT", 10)
    config = tiny_config(
        tmp_path, epochs=1, adapter={"method": "linear_probe"}, data__trunk="cache",
        data__cache=str(tmp_path / "cache"), backbone__drop_rate=0.0,
    )  # fmt: skip
    from wara.training.setup import prepare

    prepared = prepare(config, report_dir=None)
    victim = prepared.images.reader.paths[prepared.indices("train")[0]]
    change(victim)
    with pytest.raises(WaraError, match="not what it was") as caught:
        prepared.fill_trunk()
    assert caught.value.kind == "data" and caught.value.where == str(victim)
