"""DICOM Structured Reports of predictions: one per DICOM image, for a person to confirm.

A report follows TID 1500 (Measurement Report) and lies in the study of its image, in a series of
its own. It is COMPLETE (all that the model has to say), PRELIMINARY and UNVERIFIED. Classes have
codes of the private scheme 99WARA, whose version is the bundle's: no code of a terminology is
guessed from the name of a class.

Identifiers follow from what is said: the same model, image and words give the same SOP Instance
UID, so that a report that is sent twice is one report, and other words are another one.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import UUID, uuid5

from wara.deploy.bundle import Bundle
from wara.deploy.predictor import Prediction, Reading
from wara.dicom import is_dicom
from wara.errors import WaraError
from wara.storage import open_regular, write_bytes

if TYPE_CHECKING:
    from highdicom.sr import CodedConcept, MeasurementsAndQualitativeEvaluations
    from pydicom.dataset import Dataset

SCHEME = "99WARA"
SERIES_NUMBER = 9000  # after the series of any scanner, where viewers show what was derived
_NAMESPACE = UUID("7d1f6f0e-52c5-4f0c-9f5e-3c1a4be0a6b1")
_UIDS = ("StudyInstanceUID", "SeriesInstanceUID", "SOPClassUID", "SOPInstanceUID")
# What a report must hold, empty where it is not known.
_KNOWN_OR_EMPTY = (
    "PatientID", "PatientName", "PatientBirthDate", "PatientSex", "AccessionNumber", "StudyID",
    "StudyDate", "StudyTime", "ReferringPhysicianName",
)  # fmt: skip
_CHECK = "correct the header in the archive; dciodvfy names what is wrong in it"


class Reports:
    """Structured Reports of one call, written as predictions are made.

    Images that are no DICOM objects have none; neither have images that could not be read, whose
    rows say why. A DICOM image whose header does not allow a report is in `refused`.

    Args:
        folder: where the reports go, each under its SOP Instance UID.
        bundle: whose predictions they are of.

    Raises:
        WaraError: kind "usage" when highdicom is not installed.
    """

    def __init__(self, folder: Path, bundle: Bundle) -> None:
        try:
            import highdicom  # noqa: F401
        except ImportError:
            remedy = "pip install 'wara[dicom]', or pip install highdicom beside a bundle"
            raise WaraError("usage", "highdicom is not installed", "--dicom-sr", remedy) from None
        # It logs names of patients that it finds unusual.
        logging.getLogger("highdicom").setLevel(logging.CRITICAL)
        self.folder, self.bundle = folder, bundle
        self.names: set[str] = set()
        self.no_dicom = 0
        self.refused: list[WaraError] = []

    @property
    def written(self) -> int:
        """How many reports there are: the same words on the same image are one."""
        return len(self.names)

    def add(self, prediction: Prediction) -> dict[str, Any] | None:
        """Write the report of one prediction, or note why there is none.

        Returns:
            What became of it, for `recall`.

        Raises:
            WaraError: kind "storage" when it cannot be written.
        """
        outcome = None if prediction.logits is None else self._outcome(prediction)
        self.recall(outcome)
        return outcome

    def recall(self, outcome: dict[str, Any] | None) -> None:
        """Count what became of a report, here or in an earlier call that this one continues."""
        if outcome is None:
            return
        if outcome.get("refused"):
            self.refused.append(WaraError(*outcome["refused"]))
        elif outcome.get("written"):
            self.names.add(outcome["written"])
        else:
            self.no_dicom += 1

    def _outcome(self, prediction: Prediction) -> dict[str, Any]:
        try:
            data = _object(prediction.reading)
            if data is None:
                return {"no_dicom": True}
            report = self.report(data, prediction.row)
        except WaraError as error:
            return {"refused": [error.kind, error.what, error.where, error.remedy]}
        name = f"{report.SOPInstanceUID}.dcm"
        write_bytes(self.folder / name, _encoded(report))
        return {"written": name}

    def report(self, data: bytes, row: dict[str, Any]) -> Dataset:
        """Return the report of one image.

        Args:
            data: the DICOM file.
            row: what was said of it, see `Predictor.columns`.

        Raises:
            WaraError: kind "data" when its header does not say what a report must hold.
        """
        from highdicom.sr import EnhancedSR

        with _quiet(data):
            header = _header(data)
        manifest, model = self.bundle.manifest, self.bundle.model_hash
        said = {key: value for key, value in row.items() if key not in ("file", "milliseconds")}
        words = json.dumps(said, sort_keys=True)
        stamp = "SYNTHETIC " if manifest["synthetic"] else ""
        own = {
            "content": _Content(self.bundle, header, row).report()[0],
            "series_instance_uid": _uid("series", model, header.StudyInstanceUID),
            "series_number": SERIES_NUMBER,
            "series_description": _text(f"{stamp}{manifest['name']} (wara)", 64),
            "sop_instance_uid": _uid("report", model, header.SOPInstanceUID, words),
            "instance_number": _positive(header.get("InstanceNumber")),
            "manufacturer": "wara",
            "manufacturer_model_name": _text(manifest["name"], 64),
            "software_versions": _version(self.bundle),
            "coding_schemes": [_scheme()],
            # Names of classes may need more letters than the image's own set has.
            "specific_character_set": "ISO_IR 192",
        }
        with _quiet(data):
            return EnhancedSR(evidence=[header], is_complete=True, **own)

    def lines(self) -> Iterator[str]:
        """Yield what a person should know of the reports."""
        yield f"{self.written} structured reports in {self.folder}"
        if self.no_dicom:
            yield f"{self.no_dicom} images are no DICOM objects and have no report"


# -- the image -----------------------------------------------------------------------------------


def _object(reading: Reading) -> bytes | None:
    """Return the file that was read, None when it is no DICOM object."""
    try:
        with open_regular(reading.source) as stream:
            data = stream.read(512)
            if not is_dicom(data):
                return None
            data += stream.read()
    except OSError:
        data = b""
    if hashlib.sha256(data).hexdigest() != reading.sha256:
        what = "no report: the file is gone or was changed after it was read"
        raise WaraError("data", what, _name(reading.sha256), "predict it again")
    return data


def _name(sha256: str | None) -> str:
    # Neither a path nor a header element: both may name the patient.
    return f"the image of SHA-256 {sha256}"


@contextlib.contextmanager
def _quiet(data: bytes) -> Iterator[None]:
    """Let no value of a header out, in a warning or an error."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except WaraError as error:
        where = _name(hashlib.sha256(data).hexdigest())
        raise WaraError(error.kind, error.what, where, error.remedy) from None
    # pydicom and highdicom raise whatever a value that is not of its kind leads to.
    except Exception as error:
        what = f"no report: the header cannot be taken over ({type(error).__name__})"
        where = _name(hashlib.sha256(data).hexdigest())
        raise WaraError("data", what, where, _CHECK) from None


def _header(data: bytes) -> Dataset:
    """Return the header, with an empty element for what a report must hold and it lacks."""
    import pydicom
    from pydicom.uid import UID
    from pydicom.valuerep import DA, TM

    # `force`: the image was predicted, so it is DICOM; the preamble may be missing.
    header = pydicom.dcmread(io.BytesIO(data), stop_before_pixels=True, force=True)
    for keyword in _UIDS:
        if not UID(str(header.get(keyword) or "")).is_valid:
            raise _refused(f"{keyword} is absent or no UID")
    # A private class has no name, and a dose or a segmentation is not what an IMAGE item points to.
    if "Image Storage" not in header.SOPClassUID.name:
        raise _refused("the SOP class is no image storage of the standard")
    for keyword in _KNOWN_OR_EMPTY:
        if header.get(keyword) is None:
            setattr(header, keyword, "")
    for keyword, kind in (("PatientBirthDate", DA), ("StudyDate", DA), ("StudyTime", TM)):
        try:
            kind(header.get(keyword))
        except ValueError:
            raise _refused(f"{keyword} is no {kind.__name__} value") from None
    if header.PatientSex not in ("", "M", "F", "O"):
        raise _refused("PatientSex is not M, F or O")
    header.decode()
    return header


def _refused(why: str) -> WaraError:
    return WaraError("data", f"no report: {why}", "", _CHECK)


def _positive(value: Any) -> int:
    """Return an Instance Number; 1 where the image has none that a report may have."""
    text = str(value or "")
    return max(1, int(text)) if text.isdecimal() and len(text) < 10 else 1


def _encoded(report: Dataset) -> bytes:
    stream = io.BytesIO()
    report.save_as(stream, enforce_file_format=True)
    return stream.getvalue()


# -- identifiers and codes -----------------------------------------------------------------------


def _uid(*parts: str) -> str:
    """Return a UID that follows from what it names (PS3.5 B.2: a UUID under 2.25)."""
    return f"2.25.{uuid5(_NAMESPACE, '/'.join(parts)).int}"


def _version(bundle: Bundle) -> str:
    return f"{bundle.manifest['wara']}+{bundle.model_hash[:12]}"


def _text(text: str, most: int) -> str:
    """Return text as an element of at most `most` letters holds it: a backslash parts values.

    Letters are counted as bytes of UTF-8, for some readers count so.
    """
    return text.replace("\\", "/").encode()[:most].decode(errors="ignore")


def _code(value: str, *meanings: str | None, version: str | None = None) -> CodedConcept:
    """Return a code of our own, with the first meaning that fits in the 64 letters for it."""
    from highdicom.sr import CodedConcept

    fitting = [text for text in meanings if text and len(text.encode()) <= 64]
    meaning = _text(fitting[0] if fitting else value, 64)
    value = _text(value, 200)
    code = CodedConcept(value, SCHEME, meaning, version)
    if len(value) <= 16 < len(value.encode()):
        del code.CodeValue
        code.LongCodeValue = value
    return code


def _scheme() -> Dataset:
    from highdicom.coding_schemes import CodingSchemeIdentificationItem

    return CodingSchemeIdentificationItem(
        designator=SCHEME,
        name="Classes and measures of models exported by wara",
        uid=_uid("scheme"),
        responsible_organization="whoever trained the model that the report names",
    )


# -- what is said --------------------------------------------------------------------------------


class _Content:
    """The content of one report."""

    def __init__(self, bundle: Bundle, header: Dataset, row: dict[str, Any]) -> None:
        self.bundle, self.header, self.row = bundle, header, row
        self.manifest, self.model = bundle.manifest, bundle.model_hash
        self.meanings = {item["name"]: item["meaning"] for item in self.manifest["classes"]}

    def report(self) -> Any:
        """TID 1500."""
        from highdicom.sr import (
            DeviceObserverIdentifyingAttributes,
            MeasurementReport,
            ObservationContext,
            ObserverContext,
        )
        from pydicom.sr.codedict import codes

        device = DeviceObserverIdentifyingAttributes(
            uid=_uid("device", self.model),
            name="wara",
            manufacturer_name="wara",
            model_name=self.manifest["name"],
        )
        return MeasurementReport(
            observation_context=ObservationContext(
                observer_device_context=ObserverContext(codes.DCM.Device, device)
            ),
            # Which procedure it was is for the archive to say; this code claims no more.
            procedure_reported=codes.SCT.ImagingProcedure,
            imaging_measurements=[self._group()],
        )

    def _group(self) -> MeasurementsAndQualitativeEvaluations:
        """TID 1501: numbers and codes of the whole image."""
        from highdicom import sr

        image = self.header
        return sr.MeasurementsAndQualitativeEvaluations(
            tracking_identifier=sr.TrackingIdentifier(
                uid=_uid("tracking", self.model, image.SOPInstanceUID),
                identifier=f"{self.manifest['name']}: whole image",
            ),
            algorithm_id=sr.AlgorithmIdentification(
                self.manifest["name"], _version(self.bundle), list(self._parameters()), None, "wara"
            ),
            measurements=[
                sr.Measurement(name, value, unit) for name, value, unit in self._numbers()
            ],
            qualitative_evaluations=[sr.QualitativeEvaluation(*pair) for pair in self._codes()],
            source_images=[
                sr.SourceImageForMeasurementGroup(image.SOPClassUID, image.SOPInstanceUID)
            ],
        )

    def _parameters(self) -> Iterator[str]:
        yield f"model SHA-256 {self.model}"
        if self.manifest["synthetic"]:
            yield "SYNTHETIC: trained on drawn images; not for any use on patients"
        point = self.manifest["operating_point"]
        if point is None:
            yield "operating point: none was chosen"
            return
        classes = " or ".join(point["positive"])
        yield f"operating point: {classes}, from a score of {point['threshold']:.6g} on"

    def _class(self, name: str) -> CodedConcept:
        # The same name in another bundle may mean something else: the version tells them apart.
        return _code(name, self.meanings[name], name, version=self.model[:16])

    def _numbers(self) -> Iterator[tuple[CodedConcept, float, Any]]:
        from pydicom.sr.codedict import codes

        for name, meaning in self.meanings.items():
            texts = [f"Probability of {text}" for text in (meaning, name) if text]
            code = _code(f"prob_{name}", *texts, f"P({name})", version=self.model[:16])
            yield code, self.row[f"prob_{name}"], codes.UCUM.NoUnits
        score = _code("ood_score", "Distance to the training images (Mahalanobis)")
        yield score, self.row["ood_score"], codes.UCUM.NoUnits
        # Of a calibrated bundle those are the local cases.
        among = json.loads(self.bundle.read("reliability.json"))["chosen_on"]
        words = f"Percentile of this distance among {among} images"
        rank = _code("ood_percentile", words, version=self.model[:16])
        yield rank, self.row["ood_percentile"], codes.UCUM.Percent

    def _codes(self) -> Iterator[tuple[CodedConcept, Any]]:
        from pydicom.sr.codedict import codes

        row = self.row
        if self.manifest["synthetic"]:
            yield (
                _code("training_data", "What the model was trained on"),
                _code("synthetic", "SYNTHETIC: drawn images, not patients"),
            )
        predicted = _code("prediction", "Predicted class")
        for name in _split(row["prediction"]):
            yield predicted, self._class(name)
        if not row["prediction"]:
            yield predicted, _code("no_class", "None of the classes")
        if row["decision"] is not None:
            decision = {"positive": codes.SCT.Positive, "negative": codes.SCT.Negative}
            yield (
                _code("decision", "Decision at the operating point"),
                decision[row["decision"]],
            )
        for name in _split(row["conformal_set"]):
            yield _code("conformal_set", "Possible class (conformal set)"), self._class(name)
        abstains = _code("abstain", "The model abstains: its words should not be used")
        yield abstains, codes.SCT.Yes if row["abstain"] else codes.SCT.No
        for reason in (row["abstain_reason"] or "").split("; "):
            if reason:
                yield (
                    _code("abstain_reason", "Why the model abstains"),
                    _code(reason.replace(" ", "_"), reason),
                )


def _split(names: str | None) -> list[str]:
    return names.split("|") if names else []
