"""Cards: the shipped ones are sound and agree with their origins, faulty ones are refused."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from wara.cards import (
    Card,
    CsvSource,
    FolderSource,
    MedMNISTSource,
    PhantomSource,
    list_cards,
    load_card,
)
from wara.errors import WaraError, WaraErrors
from wara.storage import shipped

MEDMNIST = ["retinamnist", "dermamnist", "breastmnist", "pneumoniamnist", "chestmnist"]
FPT = ["messidor2", "ddr", "isic2016", "isic2018", "mini_ddsm", "cmmd", "covid_cxr", "chncxr"]
PHANTOMS = ["fundus_phantom", "dermoscopy_phantom", "ultrasound_phantom", "chest_xray_phantom"]

GOOD = """\
name: mine
title: Mine
modality: ultrasound
task: binary
classes:
  - {name: no, meaning: Nothing}
  - {name: "yes", meaning: Something, aliases: ["1"]}
source: {kind: folder}
"""


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "mine.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_the_shipped_cards_are_the_promised_ones():
    assert list_cards() == sorted(MEDMNIST + FPT + PHANTOMS)


@pytest.mark.parametrize("name", MEDMNIST + FPT + PHANTOMS)
def test_every_shipped_card_says_what_one_must_know(name):
    card = load_card(name)
    for field in ("title", "origin", "how_to_get", "licence", "citation", "split", "known_leakage"):
        assert len(getattr(card, field)) > 5, field
    assert all(info.meaning for info in card.classes)
    from wara.training.augment import PRESETS

    assert card.augment in PRESETS
    assert card.base is None
    if card.phantom:
        stand_in = load_card(card.phantom)
        assert isinstance(stand_in.source, PhantomSource) and stand_in.modality == card.modality


@pytest.mark.parametrize("name", MEDMNIST)
def test_medmnist_cards_agree_with_the_package(name):
    import medmnist

    card, info = load_card(name), medmnist.INFO[name]
    assert isinstance(card.source, MedMNISTSource) and card.source.flag == name
    assert len(card.classes) == len(info["label"])
    for index, label in info["label"].items():
        assert card.class_index.get(label) == int(index), label
    tasks = {
        "ordinal-regression": "ordinal",
        "multi-class": "multiclass",
        "binary-class": "binary",
        "multi-label, binary-class": "multilabel",
    }
    assert card.task == tasks[info["task"]]
    assert card.licence.startswith(info["license"])
    sizes = [int(word.replace(",", "")) for word in re.findall(r"\d[\d,]*", card.split)]
    assert sizes[:3] == [info["n_samples"][split] for split in ("train", "val", "test")]


def test_leakage_of_dermamnist_is_stated():
    assert "2401.14497" in load_card("dermamnist").known_leakage


@pytest.mark.parametrize("name", PHANTOMS)
def test_phantom_cards_agree_with_the_code_that_draws(name):
    phantoms = pytest.importorskip("wara.phantoms")
    card = load_card(name)
    drawn = phantoms.MODALITIES[card.modality]
    assert [(info.name, info.meaning) for info in card.classes] == list(drawn.classes)
    assert card.task == drawn.task


def test_only_cards_and_their_readme_lie_in_the_folder():
    others = {path.name for path in shipped("datasets").iterdir() if path.suffix != ".yaml"}
    assert others == {"README.md"}


def test_the_readme_explains_every_field():
    text = (shipped("datasets") / "README.md").read_text(encoding="utf-8")
    sources = (MedMNISTSource, FolderSource, CsvSource, PhantomSource)
    for model in (Card, *sources):
        for field, info in model.model_fields.items():
            assert field == "kind" or f"`{field}`" in text, field
            assert field == "kind" or info.description, field


def test_a_card_of_the_users_own(tmp_path):
    card = load_card(write(tmp_path, GOOD))
    assert card.class_names == ["no", "yes"]  # YAML 1.2: `no` is a word
    assert card.class_index == {"no": 0, "yes": 1, "1": 1}
    assert card.base == tmp_path.resolve()
    assert card.phantom is None and card.augment == "general"


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("modality: ultrasound", "modalty: ultrasound", "did you mean 'modality'?"),
        ("task: binary", "task: binary\npositive: [gone]", "names 'gone', which is no class"),
        ("task: binary", "task: binary\npositive: [yess]", "did you mean 'yes'?"),
        ("task: binary", "task: binary\npositive: ['1']", "write the name of the class, yes"),
        ("task: binary", "task: binary\npositive: [no, yes]", "leave one out"),
        ("kind: folder", "kind: folder, pth: x", "did you mean 'path'?"),
        ("meaning: Nothing", "meening: Nothing", "did you mean 'meaning'?"),
        (
            "kind: folder",
            "kind: foldr",
            'source.kind should be one of csv, folder, medmnist, phantom, not "foldr"',
        ),
        ("kind: folder", "kind: foldr", "line 8; did you mean 'folder'?"),
        ("kind: folder", "kind: tree", "choose one of: csv, folder, medmnist, phantom"),
        ("kind: folder", "path: x", "'source.kind' is missing"),
        ("source: {kind: folder}", "source: folder", "source should be a section"),
        (
            "task: binary",
            "task: binray",
            'task should be one of binary, multiclass, multilabel, ordinal, not "binray"',
        ),
        ("task: binary", "task: binray", "did you mean 'binary'?"),
        ("modality: ultrasound", "modality: ultrasuond", "did you mean 'ultrasound'?"),
        ("modality: ultrasound", "modality: x", "chest_xray, dermoscopy, fundus, mammography"),
        ("title: Mine", "title: 3", "title should be a text (put it in quotes), not 3"),
        ("name: no", "name: macro", "a class cannot be named 'macro'"),
        ("task: binary\n", "", "'task' is missing"),
        ('["1"]', "[no]", "'no' names two classes"),
        ("name: no", "name: a|b", "no '|'"),
        ("name: mine", "name: yours", "write name: mine"),
        ("title: Mine", "title: Mine\ntitle: Twice", "duplicate key"),
        ("kind: folder", "kind: folder, patient_pattern: '(a'", "no regular expression"),
        ("kind: folder", "kind: folder, patient_pattern: 'a'", "0 groups"),
        (GOOD, "- a\n- b\n", "key: value"),
        (GOOD, "a: [", "not YAML"),
        ("  - {name: no, meaning: Nothing}\n", "", "classes should be a list of at least 2;"),
    ],
)
def test_faulty_cards_are_refused_by_name(tmp_path, old, new, words):
    assert old in GOOD
    with pytest.raises(WaraError) as caught:
        load_card(write(tmp_path, GOOD.replace(old, new, 1)))
    assert caught.value.kind == "config" and words in str(caught.value)
    assert "mine.yaml" in str(caught.value)
    for word in ("Input", "discriminator", "valid ", "Value error", "something else"):
        assert word not in str(caught.value)


def test_all_faults_of_a_card_at_once(tmp_path):
    text = GOOD.replace("task: binary", "task: bin").replace("title: Mine", "titel: Mine")
    with pytest.raises(WaraErrors) as caught:
        load_card(write(tmp_path, text))
    assert len(caught.value.errors) == 3  # wrong task, unknown titel, missing title


def test_unknown_names():
    with pytest.raises(WaraError, match="did you mean 'retinamnist'"):
        load_card("retinaminst")
    with pytest.raises(WaraError, match="no such card file"):
        load_card("nowhere/mine.yaml")
