"""Structured Reports: what was said, in the study of its image, read back by other programs."""

from __future__ import annotations

import hashlib
import io
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from PIL import Image
from test_bundle import reseal
from test_images import dicom
from test_predict import predict, program

from wara.deploy.predictor import Predictor
from wara.deploy.sr import Reports
from wara.errors import WaraError

pytest.importorskip("highdicom")
CLASSES = [
    {"name": "benign", "meaning": "no sign of malignancy"},
    {"name": "in situ, or not to be told apart from it", "meaning": "ä" * 70},
    {"name": "浮\\腫 Ödem", "meaning": None},
]
RETIRED = "1.2.840.10008.5.1.4.1.1.6"  # ultrasound of 1993
NO_IMAGE = "the SOP class is no image storage of the standard"
IDENTITY: dict[str, Any] = {
    "StudyInstanceUID": "1.2.3.4", "SeriesInstanceUID": "1.2.3.4.5", "InstanceNumber": 3,
    "PatientName": "Müller^Erika", "PatientID": "4711", "PatientBirthDate": "19500101",
    "PatientSex": "F", "StudyDate": "20260101", "StudyTime": "101112", "StudyID": "7",
    "AccessionNumber": "A1", "ReferringPhysicianName": "Who^Doc", "Modality": "OT",
    "ConversionType": "WSD", "SpecificCharacterSet": "ISO_IR 100",
}  # fmt: skip


def image(path: Path, seed: int = 0, *without: str, **tags: Any) -> Path:
    """A grey DICOM image of a patient."""
    pixels = np.random.default_rng(seed).integers(0, 4096, (32, 32)).astype("u2")
    held = {key: value for key, value in (IDENTITY | tags).items() if key not in without}
    path.write_bytes(dicom(pixels, BitsStored=12, **held))
    return path


def reports(bundle: Path, *images: Path, **options: Any) -> tuple[Reports, list[Any]]:
    predictor = Predictor(bundle, **options)
    made = Reports(images[0].parent / "sr", predictor.bundle)
    rows = []
    for prediction in predictor.predict(images):
        made.add(prediction)
        rows.append(prediction.row)
    return made, rows


def written(folder: Path) -> list[pydicom.Dataset]:
    return [pydicom.dcmread(path) for path in sorted(folder.glob("*.dcm"))]


def items(report: pydicom.Dataset) -> list[tuple[str, Any]]:
    """Meaning of the name and value of each item of the measurement group."""
    (content,) = [
        item for item in report.ContentSequence
        if item.ConceptNameCodeSequence[0].CodeMeaning == "Imaging Measurements"
    ]  # fmt: skip
    found: list[tuple[str, Any]] = []
    for item in content.ContentSequence[0].ContentSequence:
        name = item.ConceptNameCodeSequence[0].CodeMeaning
        if item.ValueType == "NUM":
            value = item.MeasuredValueSequence[0]
            unit = value.MeasurementUnitsCodeSequence[0].CodeValue
            found.append((name, (float(value.NumericValue), unit)))
        elif item.ValueType == "CODE":
            found.append((name, item.ConceptCodeSequence[0]))
        elif item.ValueType == "IMAGE":
            found.append((name, item.ReferencedSOPSequence[0].ReferencedSOPInstanceUID))
        else:
            found.append((name, item.get("TextValue") or item.get("UID")))
    return found


def check(path: Path) -> str:
    """Read a report by programs of other people; return what dsrdump says."""
    if shutil.which("dciodvfy") is None or shutil.which("dsrdump") is None:
        pytest.skip("dcmtk and dicom3tools are not installed")
    said = subprocess.run(["dciodvfy", path], capture_output=True, text=True)
    assert said.returncode == 0 and "Error" not in said.stderr + said.stdout, said.stderr
    dump = subprocess.run(["dsrdump", path], capture_output=True, text=True)
    # Its checker of letters knows no UTF-8, and says so of every such file.
    complaints = [line for line in dump.stderr.splitlines() if "ISO_IR 192" not in line]
    assert dump.returncode == 0 and not complaints, dump.stderr
    return dump.stdout


def test_a_report_says_what_the_row_says(bundle: Path, tmp_path: Path) -> None:
    made, (row,) = reports(bundle, image(tmp_path / "a.dcm"), abstain_on=("ood", "ambiguous"))
    assert made.written == 1 and made.refused == []
    (report,) = written(tmp_path / "sr")
    said = items(report)
    meanings = {"calm": "coarse", "mixed": "of both", "rough": "fine"}
    for name, meaning in meanings.items():
        assert (f"Probability of {meaning}", (row[f"prob_{name}"], "1")) in said
    named = dict(said)
    assert named["Predicted class"].CodeValue == row["prediction"]
    assert named["Predicted class"].CodeMeaning == meanings[row["prediction"]]
    assert named["Predicted class"].CodingSchemeDesignator == "99WARA"
    assert named["Predicted class"].CodingSchemeVersion == row["model"][:16]
    wanted = {"positive": "10828004", "negative": "260385009"}[row["decision"]]
    assert named["Decision at the operating point"].CodeValue == wanted
    possible = [v.CodeValue for k, v in said if k.startswith("Possible class")]
    assert possible == row["conformal_set"].split("|")
    rank = named["Percentile of this distance among validation images"]
    assert rank == (row["ood_percentile"], "%")
    assert named["Algorithm Version"].endswith(row["model"][:12])
    assert ("Algorithm Parameters", f"model SHA-256 {row['model']}") in said
    assert named["Source of Measurement"] == row["sop_instance_uid"]
    assert row["abstain"] is True
    abstains = "The model abstains: its words should not be used"
    assert named[abstains].CodeValue == "373066001"
    reasons = [v.CodeMeaning for k, v in said if k == "Why the model abstains"]
    assert reasons == row["abstain_reason"].split("; ") and len(reasons) == 2
    assert "SYNTHETIC" not in str(report)
    _, (row,) = reports(bundle, image(tmp_path / "b.dcm"), abstain_on=())
    (other,) = [r for r in written(tmp_path / "sr") if r != report]
    assert dict(items(other))[abstains].CodeValue == "373067005" and row["abstain"] is False


def test_a_report_lies_in_the_study_of_its_image(bundle: Path, tmp_path: Path) -> None:
    paths = [image(tmp_path / "a.dcm"), image(tmp_path / "b.dcm", 1, InstanceNumber=4)]
    reports(bundle, *paths)
    found = written(tmp_path / "sr")
    sources = {pydicom.dcmread(path).SOPInstanceUID: pydicom.dcmread(path) for path in paths}
    assert len(found) == 2 and {report.SeriesInstanceUID for report in found} == {
        found[0].SeriesInstanceUID
    }
    for report in found:
        evidence = report.CurrentRequestedProcedureEvidenceSequence[0]
        reference = evidence.ReferencedSeriesSequence[0].ReferencedSOPSequence[0]
        source = sources.pop(reference.ReferencedSOPInstanceUID)
        assert reference.ReferencedSOPClassUID == source.SOPClassUID
        for keyword in (
            "StudyInstanceUID", "PatientName", "PatientID", "PatientBirthDate", "PatientSex",
            "StudyDate", "StudyTime", "StudyID", "AccessionNumber", "ReferringPhysicianName",
            "InstanceNumber",
        ):  # fmt: skip
            assert report[keyword].value == source[keyword].value, keyword
        assert report.SeriesInstanceUID != source.SeriesInstanceUID
        assert report.Modality == "SR" and report.SOPClassUID.name == "Enhanced SR Storage"
        flags = (report.VerificationFlag, report.CompletionFlag, report.PreliminaryFlag)
        assert flags == ("UNVERIFIED", "COMPLETE", "PRELIMINARY")
    names = [path.stem for path in (tmp_path / "sr").iterdir()]
    assert sorted(names) == sorted(report.SOPInstanceUID for report in found)
    assert all(name.startswith("2.25.") and len(name) <= 64 for name in names)


def test_the_same_words_are_one_report_and_others_another(bundle: Path, tmp_path: Path) -> None:
    path = image(tmp_path / "a.dcm")
    for _ in range(2):
        reports(bundle, path)
    assert len(written(tmp_path / "sr")) == 1
    reports(bundle, path, abstain_on=())
    assert len(written(tmp_path / "sr")) == 2


def test_other_programs_read_a_report(bundle: Path, tmp_path: Path) -> None:
    _, (row,) = reports(bundle, image(tmp_path / "a.dcm"))
    (path,) = (tmp_path / "sr").iterdir()
    said = check(path)
    for words in ("UNVERIFIED", "Müller^Erika", row["prediction"], '"no units"', row["model"][:12]):
        assert words in said


def test_classes_of_any_name_and_a_synthetic_model(bundle: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(bundle, tmp_path / "copy"))
    reseal(copy, classes=CLASSES, synthetic=True, operating_point=None)
    # The letters of a Japanese device, which has none for the names of these classes.
    reports(copy, image(tmp_path / "a.dcm", 0, "InstanceNumber", PatientName="Yamada=山田^太郎",
                        SpecificCharacterSet=["", "ISO 2022 IR 87"]))  # fmt: skip
    (report,) = written(tmp_path / "sr")
    said = items(report)
    labels = ["no sign of malignancy", "in situ, or not to be told apart from it", "浮/腫 Ödem"]
    assert [k for k, _ in said if k.startswith("Probability")] == [
        f"Probability of {label}" for label in labels
    ]
    assert dict(said)["What the model was trained on"].CodeValue == "synthetic"
    assert report.SeriesDescription.startswith("SYNTHETIC")
    assert "Decision at the operating point" not in dict(said)
    assert ("Algorithm Parameters", "operating point: none was chosen") in said
    assert report.PatientName == "Yamada=山田^太郎" and report.InstanceNumber == 1
    dump = check(next((tmp_path / "sr").iterdir()))
    assert "SYNTHETIC" in dump and "山田^太郎" in dump


def test_no_class_of_several_labels(bundle: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(bundle, tmp_path / "copy"))
    trusted = copy / "reliability.json"
    trusted.write_text(json.dumps(json.loads(trusted.read_text()) | {"temperature": 1e6}))
    reseal(copy, task="multilabel", temperature=1e6)  # every probability is a half, or less
    made = Reports(tmp_path / "sr", Predictor(copy).bundle)
    path = image(tmp_path / "a.dcm")
    (prediction,) = Predictor(copy).predict([path])
    for words, codes in (("", ["no_class"]), ("calm|rough", ["calm", "rough"])):
        report = made.report(path.read_bytes(), prediction.row | {"prediction": words})
        assert [v.CodeValue for k, v in items(report) if k == "Predicted class"] == codes


# -- what has no report -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("without", "tags", "why"),
    [
        ("StudyInstanceUID", {}, "StudyInstanceUID is absent or no UID"),
        ("SeriesInstanceUID", {}, "SeriesInstanceUID is absent or no UID"),
        ("", {"StudyInstanceUID": "MUELLER"}, "StudyInstanceUID is absent or no UID"),
        ("", {"PatientBirthDate": "1950xx01"}, "PatientBirthDate is no DA value"),
        ("", {"StudyTime": "noon"}, "StudyTime is no TM value"),
        ("", {"PatientSex": "MUELLER"}, "PatientSex is not M, F or O"),
        ("", {"SOPClassUID": "1.2.3.4"}, NO_IMAGE),
        ("", {"SOPClassUID": "1.2.840.10008.5.1.4.1.1.481.2"}, NO_IMAGE),
        ("", {"SOPClassUID": RETIRED}, "the header cannot be taken over (KeyError)"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_a_header_that_allows_no_report_is_refused(
    without: str, tags: dict[str, str], why: str, bundle: Path, tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    path = image(tmp_path / "MUELLER.dcm", 0, without, **(tags | {"PatientName": "MUELLER"}))
    made, (row,) = reports(bundle, path)
    (error,) = made.refused
    assert error.what == f"no report: {why}" and error.kind == "data" and error.remedy
    assert row["prediction"] and row["error"] is None and not (tmp_path / "sr").exists()
    told = str(error) + repr(error.__cause__) + "".join(capfd.readouterr())
    told = told.replace(hashlib.sha256(path.read_bytes()).hexdigest(), "")  # has any digits
    assert not re.search("MUELLER|1950|4711", told) and "\n" not in str(error)


def test_a_header_without_a_name_has_a_report(bundle: Path, tmp_path: Path) -> None:
    bare = [key for key in IDENTITY if not key.endswith("UID")]
    made, _ = reports(bundle, image(tmp_path / "a.dcm", 0, *bare))
    (report,) = written(tmp_path / "sr")
    assert report.PatientName == "" and report.PatientID == "" and not made.refused


def test_a_file_that_changed_after_it_was_read(bundle: Path, tmp_path: Path) -> None:
    path = image(tmp_path / "a.dcm")
    predictor = Predictor(bundle)
    made = Reports(tmp_path / "sr", predictor.bundle)
    (prediction,) = predictor.predict([path])
    image(path, 1)
    made.add(prediction)
    path.unlink()
    made.add(prediction)
    assert [e.what for e in made.refused] == [
        "no report: the file is gone or was changed after it was read"
    ] * 2


def test_png_and_damaged_images_have_no_report(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    image(folder / "a.dcm")
    (folder / "b.dcm").write_bytes((folder / "a.dcm").read_bytes()[:-900])
    Image.fromarray(np.zeros((32, 32), np.uint8)).save(folder / "c.png")
    movie = pydicom.dcmread(folder / "a.dcm")
    movie.NumberOfFrames, movie.PixelData = 2, movie.PixelData * 2
    movie.save_as(folder / "d.dcm")
    sr = tmp_path / "sr"
    words = [folder, "--out", tmp_path / "rows.csv", "--dicom-sr", sr]
    assert predict(bundle, *words) == 3
    assert len(written(sr)) == 1
    done = program(bundle, *map(str, words), "--allow-partial")
    assert done.returncode == 0 and len(written(sr)) == 1
    assert f"1 structured reports in {sr}" in done.stderr
    assert "1 images are no DICOM objects and have no report" in done.stderr


def test_a_report_that_is_lacking_is_a_failure(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "in").mkdir()
    image(tmp_path / "in" / "a.dcm", 0, "StudyInstanceUID")
    words = [tmp_path / "in", "--out", tmp_path / "rows.csv", "--dicom-sr", tmp_path / "sr"]
    assert predict(bundle, *words) == 3
    assert (tmp_path / "rows.csv").exists()
    told = capsys.readouterr().err
    assert "StudyInstanceUID is absent" in told and "1 images have no report" in told
    assert predict(bundle, *words, "--allow-partial") == 0


def test_reports_are_not_begun_in_the_middle(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Rows of a call without reports are not continued by one with reports, or some would lack."""
    paths = [image(tmp_path / f"{number}.dcm", number) for number in range(3)]
    words = [*paths, "--out", tmp_path / "rows.csv", "--batch-size", 1]
    reports_too = ["--dicom-sr", tmp_path / "sr"]
    real = Predictor.run

    def stops(self: Predictor, pixels: np.ndarray) -> Any:
        if len((tmp_path / ".rows.csv.part").read_text().splitlines()) == 3:
            raise KeyboardInterrupt
        return real(self, pixels)

    for first, second in ((words, [*words, *reports_too]), ([*words, *reports_too], words)):
        monkeypatch.setattr(Predictor, "run", stops)
        assert predict(bundle, *first) == 130
        monkeypatch.undo()
        assert predict(bundle, *second, "--resume") == 2
        assert "other settings" in capsys.readouterr().err
    assert predict(bundle, *words, *reports_too, "--resume") == 0
    assert len(written(tmp_path / "sr")) == 3


def test_without_highdicom(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "highdicom", None)
    with pytest.raises(WaraError, match="highdicom is not installed") as caught:
        Reports(tmp_path, Predictor(bundle).bundle)
    assert caught.value.exit_code == 2 and "pip install 'wara[dicom]'" in caught.value.remedy
    words = [image(tmp_path / "a.dcm"), "--out", tmp_path / "rows.csv", "--dicom-sr", tmp_path]
    assert predict(bundle, *words) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["a.dcm"]


def test_a_report_is_what_was_encoded(bundle: Path, tmp_path: Path) -> None:
    """highdicom itself takes it for a TID 1500 report, and finds its group by the image."""
    from highdicom.sr import EnhancedSR, srread

    reports(bundle, image(tmp_path / "a.dcm"))
    (path,) = (tmp_path / "sr").iterdir()
    report = srread(io.BytesIO(path.read_bytes()))
    assert isinstance(report, EnhancedSR)
    (group,) = report.content.get_image_measurement_groups()
    assert len(group.get_measurements()) == 5
