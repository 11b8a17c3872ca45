"""Data-set cards: what a data set is, its classes in index order, and how to get it.

A card is a YAML file, shipped in `datasets/` or written by the user; `datasets/README.md` explains
each field. No image lies next to it.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, PrivateAttr, ValidationError, model_validator

from wara.errors import WaraError, WaraErrors, suggest
from wara.schema import Section, fault, faults_of, read_yaml
from wara.storage import shipped

Modality = Literal["fundus", "dermoscopy", "ultrasound", "mammography", "chest_xray"]
Task = Literal["binary", "multiclass", "multilabel", "ordinal"]
Bits = Literal[8, 10, 12, 14, 16]
Greys = Literal["window", "stored", "range"]
Augmentation = Literal[
    "off", "general", "fundus", "dermoscopy", "ultrasound", "mammography", "chest_xray"
]

MOST_PHANTOMS = 1_000_000
MOST_CLASSES = 100_000
LOCAL = "local"
"""What is told of a data set or a file that is the user's own."""


class ClassInfo(Section):
    """One class: its name in tables and metrics, and its meaning to a clinician."""

    name: str = Field(min_length=1, max_length=60, description="Name in metrics and predictions.")
    meaning: str = Field(description="What the class means, in a clinician's words.")
    aliases: list[str] = Field(
        default_factory=list, description="Other folder names or labels that mean this class."
    )


class MedMNISTSource(Section):
    """One `.npz` file of MedMNIST+, with its official splits."""

    kind: Literal["medmnist"]
    flag: str = Field(description="Name of the subset in the medmnist package.")
    size: Literal[28, 64, 128, 224] = Field(224, description="Side of the images in pixels.")
    file: str | None = Field(
        None, description="Path of the file; null: the cache, then ~/.medmnist."
    )
    verify: bool = Field(True, description="Compare the MD5 sum with the official one.")


class FolderSource(Section):
    """Class folders: `train|val|test/<class>/…`, or `<class>/…` to be split."""

    kind: Literal["folder"]
    path: str | None = Field(None, description="Folder; null: <cache>/<name of the card>.")
    patient_pattern: str | None = Field(
        None, description="Regular expression on the file's path; its first group is the patient."
    )

    @model_validator(mode="after")
    def _pattern_has_one_group(self) -> FolderSource:
        _check_pattern(self.patient_pattern)
        return self


def _check_pattern(pattern: str | None) -> None:
    if pattern is not None:
        try:
            groups = re.compile(pattern).groups
        except re.error as error:
            raise ValueError(f"patient_pattern is no regular expression: {error}") from error
        if groups != 1:
            raise ValueError(f"patient_pattern has {groups} groups, one is expected")


class CsvSource(Section):
    """A table `file,label[,patient][,split]`, or any other whose columns are named here."""

    kind: Literal["csv"]
    path: str | None = Field(None, description="Table; null: <cache>/<name>/labels.csv.")
    columns: list[str] | None = Field(
        None, min_length=2, description="Names of the columns where the table has no header line."
    )
    file_column: str | None = Field(
        None, description="Column that names the images; null: `file`, or the one that does."
    )
    folder: str | None = Field(
        None,
        min_length=1,
        description="Folder of the images, relative to the table; `*` stands for several.",
    )
    label_column: str | None = Field(
        None, description="Column of the label; null: `label`, or one column of 0 and 1 per class."
    )
    split_column: str | None = Field(
        None, description="Column of train, val or test; null: `split`, if there."
    )
    patient_pattern: str | None = Field(
        None, description="Regular expression on the file's path; its first group is the patient."
    )
    label_separator: str = Field(
        "|", min_length=1, description="What stands between several labels of one image."
    )
    none: list[str] = Field(
        default_factory=list, description="Labels of a multilabel task that mean none of them."
    )
    uncertain: Literal["zero", "one"] | None = Field(
        None, description="What -1 in a class column counts as; null: such rows are refused."
    )
    blank: Literal["zero"] | None = Field(
        None, description="What an empty class column counts as; null: such rows are refused."
    )

    @model_validator(mode="after")
    def _keys_fit_together(self) -> CsvSource:
        _check_pattern(self.patient_pattern)
        if self.columns is not None:
            if len(set(self.columns)) < len(self.columns):
                raise ValueError("columns names one column twice")
            for key in ("file_column", "label_column", "split_column"):
                name = getattr(self, key)
                if name is not None and name not in self.columns:
                    raise ValueError(f"{key} '{name}' is not among columns")
        if self.label_column is not None and (self.uncertain or self.blank):
            raise ValueError("uncertain and blank are for class columns, not for a label_column")
        return self


class PhantomSource(Section):
    """Images drawn by `wara.phantoms`, split by the card's own fractions."""

    kind: Literal["phantom"]
    images: int = Field(900, ge=20, le=MOST_PHANTOMS, description="Images drawn in total.")
    val_fraction: float = Field(0.15, gt=0, lt=0.5, description="Share of the validation split.")
    test_fraction: float = Field(0.25, gt=0, lt=0.5, description="Share of the test split.")


Source = Annotated[
    MedMNISTSource | FolderSource | CsvSource | PhantomSource, Field(discriminator="kind")
]


class Card(Section):
    """A data set as `datasets/<name>.yaml` describes it."""

    name: str = Field(pattern=r"^[\w.-]+$", description="Name of the card; equals its file name.")
    title: str = Field(description="One line for plans and reports.")
    modality: Modality | None = Field(None, description="Kind of image; null when not known.")
    task: Task = Field(description="What is predicted.")
    classes: list[ClassInfo] = Field(
        min_length=2, max_length=MOST_CLASSES, description="Classes in index order."
    )
    source: Source = Field(description="Where the images lie and how they are read.")
    origin: str = Field("", description="Who made the data set, with an address.")
    how_to_get: str = Field("", description="Steps from nothing to files in place.")
    licence: str = Field("", description="Licence of the images.")
    citation: str = Field("", description="What to cite.")
    split: str = Field("", description="How training, validation and test images are told apart.")
    group_column: str | None = Field(
        None, description="Column of the table that names the patient; null: `patient`, if there."
    )
    positive: list[str] = Field(
        default_factory=list,
        description="Classes that are the finding, by name; empty: --positive says it.",
    )
    intended_use: str | None = Field(
        None, description="What a model of these images may be used for, and by whom."
    )
    limits: str | None = Field(
        None, description="Whom the images do not show, and what a model must not be used for."
    )
    known_leakage: str = Field("", description="Known overlap between splits and other traps.")
    phantom: str | None = Field(
        None, description="Phantom card that stands in when the images cannot be had."
    )
    bits: Bits | None = Field(
        None,
        description="Bits of the greys in 16-bit PNG and TIFF files; null: found over the set.",
    )
    greys: Greys = Field(
        "window", description="DICOM greys: window (else stored), stored, or range per image."
    )
    augment: Augmentation = Field("general", description="Augmentation of training images.")

    _base: Path | None = PrivateAttr(default=None)

    @model_validator(mode="after")
    def _classes_are_sound(self) -> Card:
        if self.task == "binary" and len(self.classes) != 2:
            raise ValueError(f"a binary task has 2 classes, not {len(self.classes)}")
        if isinstance(self.source, CsvSource):
            if self.source.none and self.task != "multilabel":
                raise ValueError("source.none is for multilabel tasks; name the word as a class")
            if self.source.patient_pattern is not None and self.group_column is not None:
                raise ValueError("patients come from group_column or patient_pattern, not both")
        seen: dict[str, str] = {}
        for info in self.classes:
            if re.search(r"[\x00-\x1f|]", info.name) or info.name != info.name.strip():
                raise ValueError(f"class name {info.name!r}: no '|', line break or outer space")
            if info.name == "macro":
                # `auc_macro` is the mean over classes, `auc_<class>` the value of one.
                raise ValueError("a class cannot be named 'macro', as the mean over classes is")
            for word in dict.fromkeys([info.name, *info.aliases]):
                if word in seen:
                    raise ValueError(f"'{word}' names two classes, {seen[word]} and {info.name}")
                seen[word] = info.name
        for name in self.positive:
            if name not in self.class_names:
                known = self.class_index.get(name)
                remedy = suggest(name, self.class_names)
                if known is not None:
                    remedy = f"write the name of the class, {self.class_names[known]}"
                raise fault(f"positive names '{name}', which is no class", remedy, "positive")
        if self.task != "multilabel" and set(self.positive) == set(self.class_names):
            raise fault("positive names every class", "leave one out", "positive")
        if isinstance(self.source, CsvSource):
            for word in self.source.none:
                if word in seen:
                    raise ValueError(f"'{word}' means none and names a class, {seen[word]}")
        return self

    @property
    def class_names(self) -> list[str]:
        """Names of the classes in index order."""
        return [info.name for info in self.classes]

    @property
    def class_index(self) -> dict[str, int]:
        """Index of each class by its name and by its aliases."""
        return {
            word: index
            for index, info in enumerate(self.classes)
            for word in (info.name, *info.aliases)
        }

    @property
    def base(self) -> Path | None:
        """Folder that a user's card lies in, which its relative paths start from.

        None for a shipped card, whose paths start from the cache.
        """
        return self._base


def list_cards() -> list[str]:
    """Return the names of the shipped cards, sorted."""
    return sorted(path.stem for path in shipped("datasets").glob("*.yaml"))


def public_name(dataset: str, card: str | None = None) -> str:
    """What may be told of a data set: the name of a shipped card, or `local`.

    Args:
        dataset: as in the config.
        card: name of the card in use, such as that of the phantoms; None is `dataset` itself.
    """
    names = list_cards()
    wanted = dataset if card is None else card
    return wanted if dataset in names and wanted in names else LOCAL


def told_of(card: Card) -> tuple[str, str]:
    """Return name and title of a card, as they may leave the place where the images are.

    A card that was made for a folder bears the name of the folder, which may name a patient.
    """
    if card.base is None and card.name not in list_cards():
        return LOCAL, "Images of the user's own"
    return card.name, card.title


def load_card(name_or_path: str | Path) -> Card:
    """Read a shipped card by name, or any card by the path of its file.

    Raises:
        WaraError: kind "config" when there is no such card or file.
        WaraErrors: kind "config", one line per fault in the file.
    """
    text = str(name_or_path)
    if text in list_cards():
        return _read_card(shipped("datasets") / f"{text}.yaml", base=None)
    path = Path(name_or_path).expanduser()
    if path.suffix not in (".yaml", ".yml"):
        raise WaraError("config", f"no data set card '{text}'", "", suggest(text, list_cards()))
    if not path.is_file():
        raise WaraError("config", "no such card file", text, "correct the path")
    return _read_card(path, base=path.resolve().parent)


def _read_card(path: Path, *, base: Path | None) -> Card:
    tree, origin = read_yaml(path, "card", "see datasets/README.md")
    try:
        card = Card.model_validate(tree)
    except ValidationError as error:
        faults = faults_of(error, Card, origin=origin | {(): str(path)})
        raise WaraErrors(list(faults.values())) from error
    if card.name != path.stem:
        raise WaraError(
            "config", f"the card is named '{card.name}'", str(path), f"write name: {path.stem}"
        )
    card._base = base
    return card
