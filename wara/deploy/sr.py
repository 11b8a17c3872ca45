"""DICOM Structured Reports of predictions."""

from __future__ import annotations

from pathlib import Path

from wara.deploy.bundle import Bundle
from wara.deploy.predictor import Prediction


class Reports:
    """placeholder"""

    def __init__(self, folder: Path, bundle: Bundle) -> None: ...

    def add(self, prediction: Prediction) -> None: ...
