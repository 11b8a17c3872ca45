"""Data-set cards: what a data set is, its classes in index order, and how to get it.

A card is a YAML file, shipped in `datasets/` or written by the user; `datasets/README.md` explains
each field. No image lies next to it.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, ValidationError, model_validator
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from wara.config import shipped
from wara.errors import WaraError, WaraErrors, suggest

Modality = Literal["fundus", "dermoscopy", "ultrasound", "mammography", "chest_xray"]
Task = Literal["binary", "multiclass", "multilabel", "ordinal"]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class ClassInfo(_Part):
    """One class: its name in tables and metrics, and its meaning to a clinician."""

    name: str = Field(min_length=1, max_length=60, description="Name in metrics and predictions.")
    meaning: str = Field(description="What the class means, in a clinician's words.")
    aliases: list[str] = Field(
        default_factory=list, description="Other folder names or labels that mean this class."
    )


class MedMNISTSource(_Part):
    """One `.npz` file of MedMNIST+, with its official splits."""

    kind: Literal["medmnist"]
    flag: str = Field(description="Name of the subset in the medmnist package.")
    size: Literal[28, 64, 128, 224] = Field(224, description="Side of the images in pixels.")
    file: str | None = Field(
        None, description="Path of the file; null: the cache, then ~/.medmnist."
    )
    verify: bool = Field(True, description="Compare the MD5 sum with the official one.")


class FolderSource(_Part):
    """Class folders: `train|val|test/<class>/…`, or `<class>/…` to be split."""

    kind: Literal["folder"]
    path: str | None = Field(None, description="Folder; null: <cache>/<name of the card>.")
    patient_pattern: str | None = Field(
        None, description="Regular expression on the file's path; its first group is the patient."
    )

    @model_validator(mode="after")
    def _pattern_has_one_group(self) -> FolderSource:
        if self.patient_pattern is not None:
            try:
                groups = re.compile(self.patient_pattern).groups
            except re.error as error:
                raise ValueError(f"patient_pattern is no regular expression: {error}") from error
            if groups != 1:
                raise ValueError(f"patient_pattern has {groups} groups, one is expected")
        return self


class CsvSource(_Part):
    """A table `file,label[,patient][,split]`, paths relative to the table."""

    kind: Literal["csv"]
    path: str | None = Field(None, description="CSV file; null: <cache>/<name>/labels.csv.")


class PhantomSource(_Part):
    """Images drawn by `wara.phantoms`, split by the card's own fractions."""

    kind: Literal["phantom"]
    images: int = Field(900, ge=20, description="Images drawn in total.")
    val_fraction: float = Field(0.15, gt=0, lt=0.5, description="Share of the validation split.")
    test_fraction: float = Field(0.25, gt=0, lt=0.5, description="Share of the test split.")


Source = Annotated[
    MedMNISTSource | FolderSource | CsvSource | PhantomSource, Field(discriminator="kind")
]


class Card(_Part):
    """A data set as `datasets/<name>.yaml` describes it."""

    name: str = Field(pattern=r"^[\w.-]+$", description="Name of the card; equals its file name.")
    title: str = Field(description="One line for plans and reports.")
    modality: Modality | None = Field(None, description="Kind of image; null when not known.")
    task: Task = Field(description="What is predicted.")
    classes: list[ClassInfo] = Field(min_length=2, description="Classes in index order.")
    source: Source = Field(description="Where the images lie and how they are read.")
    origin: str = Field("", description="Who made the data set, with an address.")
    how_to_get: str = Field("", description="Steps from nothing to files in place.")
    licence: str = Field("", description="Licence of the images.")
    citation: str = Field("", description="What to cite.")
    split: str = Field("", description="How training, validation and test images are told apart.")
    group_column: str | None = Field(
        None, description="Column of the table that names the patient; null: `patient`, if there."
    )
    known_leakage: str = Field("", description="Known overlap between splits and other traps.")
    phantom: str | None = Field(
        None, description="Phantom card that stands in when the images cannot be had."
    )
    augment: str = Field("general", description="Augmentation preset of the training images.")

    _base: Path | None = PrivateAttr(default=None)

    @model_validator(mode="after")
    def _classes_are_sound(self) -> Card:
        if self.task == "binary" and len(self.classes) != 2:
            raise ValueError(f"a binary task has 2 classes, not {len(self.classes)}")
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
    try:
        tree = YAML(typ="safe", pure=True).load(path.read_text(encoding="utf-8"))
    except (YAMLError, UnicodeDecodeError, OSError) as error:
        reason = " ".join(str(error).split())
        raise WaraError(
            "config", f"not a readable card: {reason}", str(path), "correct it"
        ) from error
    if not isinstance(tree, dict):
        raise WaraError(
            "config", "a card is a list of `key: value` lines", str(path), "see datasets/README.md"
        )
    try:
        card = Card.model_validate(tree)
    except ValidationError as error:
        raise WaraErrors([_fault(detail, path) for detail in error.errors()]) from error
    if card.name != path.stem:
        raise WaraError(
            "config", f"the card is named '{card.name}'", str(path), f"write name: {path.stem}"
        )
    card._base = base
    return card


def _fault(detail: ErrorDetails, path: Path) -> WaraError:
    keys = [str(part) for part in detail["loc"]]
    where = f"{path}: {'.'.join(keys)}" if keys else str(path)
    kind = detail["type"]
    if kind == "extra_forbidden":
        return WaraError("config", f"unknown key '{keys[-1]}'", where, _nearest(keys))
    if kind == "missing":
        return WaraError("config", f"'{keys[-1]}' is missing", where, "see datasets/README.md")
    if kind == "value_error":
        return WaraError("config", str(detail["ctx"]["error"]), where, "correct the card")
    if kind == "union_tag_not_found":
        return WaraError(
            "config", f"{keys[-1]} has no 'kind'", where, f"one of: {', '.join(_source_kinds())}"
        )
    choices: list[str] = []
    value = detail["input"]
    if kind == "union_tag_invalid":
        choices, value = list(_source_kinds()), detail["ctx"]["tag"]
        where += ".kind"
    elif kind == "literal_error":
        choices = re.findall(r"[^\s',]+", str(detail["ctx"]["expected"]).replace(" or ", " "))
    shown = f"'{value}'" if isinstance(value, str) else str(value)
    if isinstance(value, (dict, list)):
        shown = "a section" if isinstance(value, dict) else "a list"
    if len(shown) > 60:
        shown = shown[:57] + "..."
    if choices:
        key = "kind" if kind == "union_tag_invalid" else keys[-1]
        return WaraError("config", f"{key} cannot be {shown}", where, suggest(str(value), choices))
    what = f"{keys[-1] if keys else 'the card'} should be {_wanted(detail)}"
    if kind != "too_short":
        what += f", not {'empty' if value is None else shown}"
    return WaraError("config", what, where, "see datasets/README.md")


def _wanted(detail: ErrorDetails) -> str:
    """Return what a value should have been, in plain words."""
    limits = detail.get("ctx", {})
    words = {
        "string_type": "a text (put it in quotes)",
        "string_too_short": "a text that is not empty",
        "string_too_long": f"a text of at most {limits.get('max_length')} characters",
        "string_pattern_mismatch": "made of letters, digits, '.', '-' and '_'",
        "int_type": "a whole number",
        "float_type": "a number",
        "bool_type": "true or false",
        "list_type": "a list",
        "too_short": f"a list of at least {limits.get('min_length')}",
        "model_type": "a section with keys of its own",
        "model_attributes_type": "a section with keys of its own",
        "greater_than": f"above {limits.get('gt')}",
        "greater_than_equal": f"at least {limits.get('ge')}",
        "less_than": f"below {limits.get('lt')}",
    }
    return words.get(detail["type"], "something else")


def _source_kinds() -> dict[str, Any]:
    """Return the models of `source` by their kind."""
    return {
        get_args(part.model_fields["kind"].annotation)[0]: part
        for part in (MedMNISTSource, FolderSource, CsvSource, PhantomSource)
    }


def _nearest(keys: list[str]) -> str:
    fields: dict[str, FieldInfo] = dict(Card.model_fields)
    if keys[0] == "classes":
        fields = dict(ClassInfo.model_fields)
    elif keys[0] == "source" and len(keys) > 1:
        kinds = _source_kinds()
        fields = dict(kinds[keys[1]].model_fields) if keys[1] in kinds else {}
    return suggest(keys[-1], fields)
