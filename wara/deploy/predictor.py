"""Uses a bundle: pixels in, rows out. Training machine and hospital run this very file.

It needs NumPy, Pillow, pydicom and onnxruntime. A row says what the model makes of an image, how
sure it is, whether it should be listened to at all, and which model said it.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from wara.deploy.bundle import Bundle, open_bundle
from wara.deploy.contents import check_graph, check_reliability, read_statistics
from wara.deploy.onnx_check import check_onnx
from wara.errors import WaraError
from wara.images import ImageSpec, Opened, normalise, processors, read_bytes

ABSTAIN_ON = ("ood", "ambiguous")
_ONNXRUNTIME = "install onnxruntime: pip install 'wara[export]', or the bundle's requirements.txt"


@dataclass(frozen=True)
class Reading:
    """One image, read.

    Args:
        source: its path.
        pixels: as the network gets it, float32 `[3, h, w]`; None when it could not be read.
        shown: the same before normalising, uint8 `[h, w, 3]`.
        sha256: of the file.
        uid: SOP Instance UID of a DICOM object.
        seconds: that reading took.
        error: why it could not be read.
    """

    source: Path
    pixels: np.ndarray | None
    shown: np.ndarray | None
    sha256: str | None
    uid: str | None
    seconds: float
    error: WaraError | None = None


@dataclass(frozen=True)
class Prediction:
    """What a bundle says of one image.

    Args:
        reading: the image.
        row: what is written, by column.
        logits: `[c]`, None when the image could not be read.
        features: what the head reads, `[d]`.
    """

    reading: Reading
    row: dict[str, Any]
    logits: np.ndarray | None
    features: np.ndarray | None


class Predictor:
    """A bundle that is ready to predict.

    Args:
        folder: the bundle.
        abstain_on: when to abstain: `ood`, further from the training images than nearly all
            validation images are; `ambiguous`, a conformal set of more than one class.
        threads: of onnxruntime; none takes all processors.

    Raises:
        WaraError: kind "artefact" when a byte of the bundle was changed or its parts do not fit
            each other, "usage" when onnxruntime is not installed or `abstain_on` is not known or
            not to be had.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        abstain_on: Sequence[str] = ("ood",),
        threads: int | None = None,
    ) -> None:
        self.bundle: Bundle = open_bundle(folder)
        manifest = self.bundle.manifest
        said = manifest["input"]
        self.spec = ImageSpec(
            (int(said["size"][0]), int(said["size"][1])), tuple(said["mean"]), tuple(said["std"]),
            said["interpolation"], said["bits"], said["greys"],
        )  # fmt: skip
        self.classes = self.bundle.classes
        self.task = str(manifest["task"])
        self.reliability = self.bundle.read_json("reliability.json")
        place = self.bundle.folder
        trusted = str(place / "reliability.json")
        check_reliability(self.reliability, manifest["temperature"], trusted)
        self.abstain_on = tuple(abstain_on)
        for reason in self.abstain_on:
            self._check_reason(reason)
        statistics, graph = str(place / "reliability.npz"), str(place / "model.onnx")
        self.distance = Distance(self.bundle.read("reliability.npz"), statistics)
        self._session = session(self.bundle.read("model.onnx"), graph, threads)
        check_graph(self._session, manifest, self.distance.width, graph)

    def _check_reason(self, reason: str) -> None:
        if reason not in ABSTAIN_ON:
            remedy = f"choose one of: {', '.join(ABSTAIN_ON)}"
            raise WaraError("usage", f"no reason '{reason}' to abstain", "--abstain-on", remedy)
        part = {"ood": "ood", "ambiguous": "conformal"}[reason]
        if self.reliability[part]["threshold"] is None:
            what = f"the bundle cannot abstain on '{reason}': {self.reliability[part]['reason']}"
            raise WaraError("usage", what, "--abstain-on", "leave it out")

    # -- columns ------------------------------------------------------------------------------

    @property
    def columns(self) -> list[str]:
        """Names of what a row holds, in order."""
        return [
            "file", "sop_instance_uid", *(f"prob_{name}" for name in self.classes), "prediction",
            "decision", "conformal_set", "ood_score", "ood_percentile", "abstain",
            "abstain_reason", "model", "milliseconds", "error", "synthetic",
        ]  # fmt: skip

    # -- from files to rows -------------------------------------------------------------------

    def predict(
        self, sources: Iterable[str | Path], *, batch_size: int = 8, workers: int | None = None
    ) -> Iterator[Prediction]:
        """Predict images, in order; a file that cannot be read is a row with its error.

        Args:
            sources: paths of images.
            batch_size: images per run of the network.
            workers: threads that read images; none takes one per processor.
        """
        with ThreadPoolExecutor(workers or processors()) as pool:
            # A window that moves on, so that memory does not grow with the number of files.
            ahead: deque[Future[Reading]] = deque()
            waiting = iter(sources)
            batch: list[Reading] = []
            while True:
                while len(ahead) < 2 * batch_size and (source := next(waiting, None)) is not None:
                    ahead.append(pool.submit(self.read, Path(source)))
                if not ahead:
                    break
                batch.append(ahead.popleft().result())
                if len(batch) == batch_size or not ahead:
                    yield from self._judge(batch)
                    batch = []

    def read(self, source: Path) -> Reading:
        """Read one image as the network wants it; a refusal of it becomes part of the result.

        Raises:
            WaraError: kind "resources" or "storage" when the machine could not read it.
        """
        start = time.perf_counter()
        sha256 = uid = None
        try:
            data = read_bytes(source)
            sha256 = hashlib.sha256(data).hexdigest()
            opened = Opened(data, str(source))
            uid = opened.uid
            shown = opened.array(self.spec)
            pixels = normalise(shown, self.spec)
        except WaraError as error:
            if error.kind != "data":  # of the machine: the image may be sound
                raise
            spent = time.perf_counter() - start
            return Reading(source, None, None, sha256, uid, spent, error)
        return Reading(source, pixels, shown, sha256, uid, time.perf_counter() - start)

    def run(self, pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Run the network.

        Args:
            pixels: float32 `[b, 3, h, w]`, normalised.

        Returns:
            Logits `[b, c]` and features `[b, d]`, float32.

        Raises:
            WaraError: kind "nonfinite" when a logit or a feature is not finite, "artefact" when
                their shapes are not those that the graph declares.
        """
        logits, features = self._session.run(["logits", "features"], {"images": pixels})
        where, remedy = str(self.bundle.folder), "verify the bundle with `wara verify`"
        for name, found, width in (
            ("logit", logits, len(self.classes)), ("feature", features, self.distance.width),
        ):  # fmt: skip
            if found.shape != (len(pixels), width):
                what = f"{name}s of shape {found.shape} for {len(pixels)} images, not {width} each"
                raise WaraError("artefact", what, where, remedy)
            # A feature as well: a distance that is no number is beyond no limit.
            if not np.isfinite(found).all():
                raise WaraError("nonfinite", f"a {name} is not finite", where, remedy)
        return logits, features

    def _judge(self, batch: Sequence[Reading]) -> Iterator[Prediction]:
        sound = [reading.pixels for reading in batch if reading.pixels is not None]
        start = time.perf_counter()
        outputs = iter(zip(*self.run(np.stack(sound)), strict=True)) if sound else iter(())
        share = (time.perf_counter() - start) / max(len(sound), 1)
        for reading in batch:
            if reading.pixels is None:
                yield Prediction(reading, self._row(reading, {}, reading.seconds), None, None)
                continue
            logits, features = next(outputs)
            said = self.judge(logits, features)
            row = self._row(reading, said, reading.seconds + share)
            yield Prediction(reading, row, logits, features)

    def _row(self, reading: Reading, said: dict[str, Any], seconds: float) -> dict[str, Any]:
        error = reading.error
        row: dict[str, Any] = dict.fromkeys(self.columns)
        row |= {
            "file": str(reading.source),
            "sop_instance_uid": reading.uid,
            **said,
            "model": self.bundle.model_hash,
            "milliseconds": round(1000 * seconds, 1),
            "error": None if error is None else f"{error.what}; {error.remedy}",
            "synthetic": self.bundle.manifest["synthetic"],
        }
        return row

    # -- from logits to words -----------------------------------------------------------------

    def probabilities(self, logits: np.ndarray) -> np.ndarray:
        """Return calibrated probabilities, float64, of logits `[…, c]`."""
        scaled = logits.astype(np.float64) / float(self.bundle.manifest["temperature"])
        if self.task == "multilabel":
            return 1 / (1 + np.exp(-np.clip(scaled, -700, 700)))
        scaled = np.exp(scaled - scaled.max(-1, keepdims=True))
        return np.asarray(scaled / scaled.sum(-1, keepdims=True))

    def judge(self, logits: np.ndarray, features: np.ndarray) -> dict[str, Any]:
        """Return what is said of one image: the columns between its name and the model's.

        Args:
            logits: `[c]`.
            features: `[d]`.
        """
        probs = self.probabilities(logits)
        several = self.task == "multilabel"
        chosen = np.flatnonzero(probs >= 0.5) if several else [int(probs.argmax())]
        said: dict[str, Any] = {
            f"prob_{name}": round(float(p), 6) for name, p in zip(self.classes, probs, strict=True)
        }
        said["prediction"] = "|".join(self.classes[k] for k in chosen)
        said["decision"] = self.decide(probs)
        conformal = conformal_set(probs, self.reliability["conformal"]["threshold"])
        if conformal is not None:
            said["conformal_set"] = "|".join(self.classes[k] for k in conformal)
        score = self.distance(features)
        said["ood_score"] = round(score, 4)
        grid = self.reliability["ood"]["validation_scores"]
        place = 100.0 * float(np.searchsorted(grid, score))
        said["ood_percentile"] = round(place / len(grid), 1) if grid else None
        reasons = []
        # Not "greater than": whatever is not within the limit is beyond it.
        if "ood" in self.abstain_on and not score <= self.reliability["ood"]["threshold"]:
            reasons.append("unlike the training images")
        if "ambiguous" in self.abstain_on and conformal is not None and len(conformal) != 1:
            reasons.append("more than one class is possible" if conformal else "no class fits")
        return said | {"abstain": bool(reasons), "abstain_reason": "; ".join(reasons) or None}

    def decide(self, probs: np.ndarray) -> str | None:
        """Return `positive` or `negative` at the operating point, None without one."""
        point = self.bundle.manifest["operating_point"]
        if point is None:
            return None
        score = positive_score(probs, [self.classes.index(c) for c in point["positive"]], self.task)
        return "positive" if score >= point["threshold"] else "negative"


def positive_score(probs: np.ndarray, positive: Sequence[int], task: str) -> np.ndarray:
    """Return the score of "one of these classes": their sum, for labels apart their largest.

    Args:
        probs: `[…, c]`.
        positive: indices of the classes.
        task: `binary | multiclass | ordinal | multilabel`.

    Returns:
        `[…]`.
    """
    chosen = probs[..., list(positive)]
    return np.asarray(chosen.max(-1) if task == "multilabel" else chosen.sum(-1))


def conformal_set(probs: np.ndarray, threshold: float | None) -> list[int] | None:
    """Return the classes whose probability is at least `1 - threshold`, None without one.

    Split conformal prediction with the score `1 - p` of the true class (Sadinle et al. 2019).
    """
    if threshold is None:
        return None
    return [int(k) for k in np.flatnonzero(1 - probs <= threshold)]


class Distance:
    """Mahalanobis distance of features to the nearest class mean of the training images.

    Args:
        data: an `.npz` with `means` `[k, d]` and `whitening` `[d, d]`: the covariance is the
            inverse of `whiteningᵀ whitening`.
        where: its name, for refusals.

    Raises:
        WaraError: kind "artefact" when it is no such file.
    """

    def __init__(self, data: bytes, where: str = "reliability.npz") -> None:
        means, whitening = read_statistics(data, where)
        self.whitening = whitening.astype(np.float64)
        self.means = means.astype(np.float64) @ self.whitening.T
        self.width = means.shape[1]

    def __call__(self, features: np.ndarray) -> float:
        """Return the distance of features `[d]`."""
        white = self.whitening @ features.astype(np.float64)
        return math.sqrt(float(((self.means - white) ** 2).sum(-1).min()))


def session(model: bytes, where: str, threads: int | None = None) -> Any:
    """Return an onnxruntime session on the processor for a model that reads nothing else.

    Raises:
        WaraError: kind "artefact" for a model that cannot be used, "usage" without onnxruntime.
    """
    check_onnx(model, where)
    try:
        import onnxruntime
    except ImportError:
        raise WaraError("usage", "onnxruntime is not installed", "", _ONNXRUNTIME) from None
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads or processors()
    try:
        made = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    # onnxruntime's exceptions have no common class but this one.
    except Exception as error:
        what = f"onnxruntime cannot use the model: {str(error).splitlines()[0]}"
        remedy = "install the onnxruntime of the bundle's requirements.txt"
        raise WaraError("artefact", what, where, remedy) from error
    return made
