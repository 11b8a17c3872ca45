"""From a config to everything that the gate and the facts of its images say."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from wara.config import RunConfig
from wara.data import appearance, gate
from wara.data.appearance import Looks
from wara.data.balance import SplitTable, few
from wara.data.gate import Findings
from wara.data.imageset import ImageSet, left_out_line
from wara.data.sources import check_apart
from wara.errors import WaraError, WaraErrors
from wara.training import setup


@dataclass(frozen=True)
class Inspection:
    """What was found.

    Args:
        dataset: as the config names it.
        images: the set, each image read; None when it could not be opened.
        splits: of its records.
        findings: of the gate.
        table: images per split and class; None without images.
        looks: of each class.
        warnings: what a plan says besides the gate's notes.
    """

    dataset: str
    images: ImageSet | None
    splits: Sequence[str]
    findings: Findings
    table: SplitTable | None
    looks: Sequence[Looks]
    warnings: Sequence[str]

    def refuse(self, rest: str) -> None:
        """Raise what training would raise.

        Args:
            rest: where the faults are that are not shown.

        Raises:
            WaraErrors: kind "data".
        """
        if self.findings.faults:
            images = self.images
            left_out = left_out_line(images.left_out, images.origin) if images else None
            raise gate.refusal(self.findings.refused, rest, left_out)


def inspect(config: RunConfig, *, report: Path | None) -> Inspection:
    """Open, read, split and judge the images of a config, as a dry run does.

    Args:
        config: of a run.
        report: folder that must not lie among the images.

    Raises:
        WaraError: any but that the data are refused, which is in `findings`.
    """
    try:
        images = setup.open_images(config)
    except WaraError as error:
        if error.kind != "data":
            raise
        errors = error.errors if isinstance(error, WaraErrors) else (error,)
        findings = Findings({"the data set as a whole": list(errors)}, [])
        return Inspection(config.dataset, None, [], findings, None, [], [])
    if report is not None:
        check_apart(report, "--report", images)
    setup.survey(config, images, None, known=True)
    splits = setup.divide(config, images)
    findings = gate.examine(images, splits, setup.twin_rule(config))
    labels = [record.label for record in images.records]
    patients = [record.patient for record in images.records]
    table = SplitTable.of(labels, patients, splits, images.card.class_names)
    found = appearance.looks(images) if len(images) else []
    warnings = [*few(table), *appearance.warnings(images, found)] if len(images) else []
    return Inspection(config.dataset, images, splits, findings, table, found, warnings)
