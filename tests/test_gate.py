"""Splits are stratified, grouped and repeatable; the gate lists every offender."""

from __future__ import annotations

import hashlib
import io
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from wara.cards import Card
from wara.data import ImageSet, Record, assign_splits, check
from wara.data.balance import class_counts, class_weights, imbalance_ratio, positive_weights
from wara.data.imageset import ArrayReader, FileReader
from wara.data.splits import connected_groups, stratify
from wara.data.twins import TwinRule
from wara.errors import WaraError, WaraErrors
from wara.images import ImageSpec, read_bytes, read_image, resize

ALONE = "no patient column: {}, and intervals take images as independent"
LEAK = ALONE.format("images are split one by one")
FRACTIONS = {"val_fraction": 0.15, "test_fraction": 0.2, "seed": 0}


def card(classes: int, task: str | None = None) -> Card:
    return Card.model_validate(
        {
            "name": "set",
            "title": "Set",
            "task": task or ("binary" if classes == 2 else "multiclass"),
            "classes": [{"name": f"c{i}", "meaning": ""} for i in range(classes)],
            "source": {"kind": "folder"},
        }
    )


def image_set(labels, *, patients=None, splits=None, task=None, classes=None, same=()) -> ImageSet:
    """Tiny images, each of its own; those in `same` are copies of the first of them."""
    n = len(labels)
    stack = np.zeros((n, 4, 4), np.uint8)
    stack[:, 0, 0], stack[:, 0, 1] = np.arange(n) % 256, np.arange(n) // 256
    for index in same:
        stack[index] = stack[same[0]]
    if classes is None:
        classes = len(labels[0]) if task == "multilabel" else max(labels) + 1
    records = [
        Record(
            f"{i}.png",
            label,
            patients[i] if patients else None,
            splits[i] if splits else None,
        )
        for i, label in enumerate(labels)
    ]
    return ImageSet(card(classes, task), records, ArrayReader([stack]), origin="here")


# --- splits -----------------------------------------------------------------------------------


def test_without_groups_each_class_is_split_to_the_image():
    labels = [0] * 200 + [1] * 60 + [2] * 20
    splits = assign_splits(image_set(labels), **FRACTIONS)
    for name, count in ((0, 200), (1, 60), (2, 20)):
        of_class = Counter(s for s, label in zip(splits, labels, strict=True) if label == name)
        assert of_class["val"] == pytest.approx(0.15 * count, abs=1)
        assert of_class["test"] == pytest.approx(0.2 * count, abs=1)


def test_same_seed_same_split_other_seed_other_split():
    images = image_set([0, 1] * 50)
    first = assign_splits(images, **FRACTIONS)
    assert first == assign_splits(images, **FRACTIONS)
    assert first != assign_splits(images, **(FRACTIONS | {"seed": 1}))


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_patients_and_copies_never_cross(data):
    n = data.draw(st.integers(12, 60))
    labels = data.draw(st.lists(st.integers(0, 2), min_size=n, max_size=n))
    labels[:3] = [0, 1, 2]
    patients = data.draw(st.lists(st.sampled_from([None, *"abcdefghij"]), min_size=n, max_size=n))
    same = sorted(data.draw(st.sets(st.integers(0, n - 1), max_size=3)))
    images = image_set(labels, patients=patients, same=same)
    splits = assign_splits(images, **FRACTIONS)
    for patient in set(patients) - {None}:
        assert len({s for s, p in zip(splits, patients, strict=True) if p == patient}) == 1
    assert len({splits[i] for i in same}) <= 1


def test_patients_are_grouped_and_sizes_stay_close():
    rng = np.random.default_rng(5)
    patients, labels = [], []
    for patient in range(150):
        label = int(rng.choice(4, p=[0.6, 0.2, 0.15, 0.05]))
        for _ in range(int(rng.integers(1, 6))):
            patients.append(f"p{patient}")
            # Some patients have images of several grades.
            labels.append(label if rng.random() < 0.8 else int(rng.integers(4)))
    splits = assign_splits(image_set(labels, patients=patients), **FRACTIONS)
    n = len(labels)
    sizes = Counter(splits)
    assert sizes["val"] == pytest.approx(0.15 * n, abs=0.02 * n)
    assert sizes["test"] == pytest.approx(0.2 * n, abs=0.02 * n)
    for label in range(4):
        total = labels.count(label)
        for split, share in (("val", 0.15), ("test", 0.2)):
            count = sum(s == split and y == label for s, y in zip(splits, labels, strict=True))
            assert count == pytest.approx(share * total, abs=max(2, 0.05 * total))


def test_rare_classes_reach_every_split_when_they_can():
    labels = [0] * 50 + [1] * 3
    splits = assign_splits(image_set(labels), **FRACTIONS)
    assert sorted(splits[50:]) == ["test", "train", "val"]


def test_multilabel_is_stratified_per_label():
    rng = np.random.default_rng(2)
    table = (rng.random((600, 4)) < [0.3, 0.1, 0.05, 0.02]).astype(int)
    labels = [tuple(row) for row in table.tolist()]
    splits = np.array(assign_splits(image_set(labels, task="multilabel"), **FRACTIONS))
    for column in range(4):
        total = table[:, column].sum()
        assert table[splits == "test", column].sum() == pytest.approx(0.2 * total, abs=2)
        assert table[splits == "val", column].sum() == pytest.approx(0.15 * total, abs=2)
    assert (splits == "test").sum() == pytest.approx(120, abs=5)


def test_splits_of_the_source_are_kept():
    given_splits = ["train"] * 6 + ["val"] * 2 + ["test"] * 2
    images = image_set([0, 1] * 5, splits=given_splits)
    assert assign_splits(images, **FRACTIONS) == given_splits


def test_missing_validation_comes_out_of_training():
    given_splits = ["train"] * 80 + ["test"] * 20
    images = image_set([0, 1] * 50, splits=given_splits)
    splits = assign_splits(images, **FRACTIONS)
    assert splits[80:] == ["test"] * 20
    assert Counter(splits[:80]) == {"train": 68, "val": 12}
    assert ["names no val images" in note for note in images.notes] == [True]


@pytest.mark.parametrize("name", ["train", "val"])
def test_one_name_for_all_images_is_no_split(name: str):
    images = image_set([0, 1] * 50, splits=[name] * 100)
    splits = assign_splits(images, **FRACTIONS)
    assert splits == assign_splits(image_set([0, 1] * 50), **FRACTIONS)
    assert not any(record.split for record in images.records)  # what is checked later is told
    assert [note for note in images.notes if f"anything but {name}" in note]
    assert assign_splits(images, **FRACTIONS) == splits and len(images.notes) == 1


def test_a_hundred_thousand_images_are_split_in_seconds():
    labels = np.random.default_rng(0).integers(0, 14, 100_000)
    started = time.process_time()
    parts = stratify(labels, np.arange(100_000), (0.65, 0.15, 0.2), 0)
    assert time.process_time() - started < 20
    assert np.bincount(parts).tolist() == pytest.approx([65_000, 15_000, 20_000], abs=20)


def test_connected_groups_go_through_several_keys():
    groups = connected_groups(["p", "p", None, "q", None], [1, 2, 2, 3, 4])
    assert groups.tolist() == [0, 0, 0, 1, 2]


# --- the gate ---------------------------------------------------------------------------------


def fails(images: ImageSet, splits, tmp_path: Path) -> str:
    with pytest.raises(WaraErrors) as caught:
        check(images, splits, report_dir=tmp_path)
    assert caught.value.exit_code == 3
    assert all(error.remedy for error in caught.value.errors)
    return str(caught.value)


def good() -> tuple[ImageSet, list[str]]:
    splits = ["train"] * 6 + ["val"] * 2 + ["test"] * 2
    return image_set([0, 1] * 5), splits


def test_good_data_pass(tmp_path):
    assert check(*good(), report_dir=tmp_path) == [LEAK]
    assert list(tmp_path.iterdir()) == []


def test_unknown_patients_are_said_of_real_images_only(tmp_path):
    images, splits = good()
    own = image_set([0, 1] * 5, splits=splits)
    (note,) = check(own, splits, report_dir=None)
    assert note == ALONE.format("nobody can check that no patient is in two splits")
    known = image_set([0, 1] * 5, patients=[*"abcdefghij"])
    assert check(known, splits, report_dir=None) == []
    images.synthetic = True
    assert check(images, splits, report_dir=None) == []


def test_empty_class_and_class_without_training_images(tmp_path):
    labels = [0, 1] * 4 + [2, 2]
    splits = ["train"] * 4 + ["val"] * 2 + ["test"] * 2 + ["val", "test"]
    text = fails(image_set(labels, classes=4), splits, tmp_path)
    assert "class 'c3' has no image" in text and "class 'c2' has no training image" in text


def test_one_class_validation_split(tmp_path):
    splits = ["train"] * 6 + ["val", "test", "val", "test"]
    text = fails(image_set([0, 1] * 5), splits, tmp_path)
    assert "one class only" in text and "6.png, 8.png;" in text
    assert list(tmp_path.iterdir()) == []  # one fault needs no file
    labels = [0, 1] * 3 + [0] * 25
    text = fails(image_set(labels), ["train"] * 6 + ["val"] * 25, tmp_path)
    assert ", ".join(f"{i}.png" for i in range(6, 26)) + " and 5 more;" in text


def test_one_class_validation_split_of_a_multilabel_task(tmp_path):
    labels = [(1, 0), (0, 1), (1, 1), (0, 0), (1, 0), (1, 0)]
    splits = ["train"] * 4 + ["val"] * 2
    text = fails(image_set(labels, task="multilabel"), splits, tmp_path)
    assert "one class only" in text


def test_empty_splits(tmp_path):
    text = fails(image_set([0, 1] * 5), ["test"] * 10, tmp_path)
    assert "the train split is empty" in text and "the val split is empty" in text


def test_absent_test_classes_are_said(tmp_path):
    splits = ["train"] * 6 + ["val"] * 2 + ["test", "val"]
    notes = check(image_set([0, 1] * 5), splits, report_dir=tmp_path)
    assert notes == ["test holds no c1: metrics of that class are null there", LEAK]
    notes = check(image_set([0, 1] * 5), ["train"] * 6 + ["val"] * 4, report_dir=tmp_path)
    assert notes == ["no test images: test metrics will be null", LEAK]


def test_patient_in_two_splits(tmp_path):
    images, splits = good()
    images = image_set([0, 1] * 5, patients=["anna", *"bcdef", "anna", *"ghi"])
    text = fails(images, splits, tmp_path)
    assert "patient 'anna' is in train (1) and val (1)" in text


def test_identical_images_in_two_splits(tmp_path):
    images, splits = image_set([0, 1] * 5, same=(0, 6)), good()[1]
    assert "identical images in train (1) and val (1); 0.png, 6.png" in fails(
        images, splits, tmp_path
    )
    # So is a split that the user gave, unless it is declared to be right.
    own = image_set([0, 1] * 5, same=(0, 6, 7), splits=splits)
    text = fails(own, splits, tmp_path)
    assert "train (1) and val (2)" in text and "or set data.allow_duplicates=true" in text
    allowed = check(own, splits, report_dir=tmp_path, rule=TwinRule(allow=True))
    # A published split is kept, for its card tells of the leak.
    published = image_set([0, 1] * 5, same=(0, 6, 7), splits=splits)
    published.card = published.card.model_copy(update={"known_leakage": "Copies, as is known."})
    for notes in (allowed, check(published, splits, report_dir=tmp_path)):
        assert any("exact copies of other images: 2, 1 across splits" in n for n in notes)
        assert any("different labels: 1 times, first 0.png, 6.png, 7.png" in n for n in notes)


def files(tmp_path: Path, count: int) -> list[Path]:
    rng = np.random.default_rng(0)
    paths = []
    for index in range(count):
        stream = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (30, 20, 3), dtype=np.uint8)).save(stream, "JPEG")
        paths.append(tmp_path / f"{index}.jpg")
        paths[-1].write_bytes(stream.getvalue())
    return paths


def file_set(paths: list[Path]) -> ImageSet:
    records = [Record(path.name, index % 2) for index, path in enumerate(paths)]
    return ImageSet(card(2), records, FileReader(paths), origin="here")


def test_every_offender_is_listed(tmp_path):
    paths = files(tmp_path, 60)
    for path in paths[:15]:
        path.unlink()
    for path in paths[15:30]:
        path.write_bytes(path.read_bytes()[:-300])
    images = file_set(paths)
    images.faults = (WaraError("data", "label 'x' is not in the card", "labels.csv:7", "correct"),)
    splits = assign_splits(images, **FRACTIONS)
    report = tmp_path / "run"
    with pytest.raises(WaraErrors) as caught:
        check(images, splits, report_dir=report)
    lines = str(caught.value).splitlines()
    assert len(lines) == 21 and "11 more offenders" in lines[-1]
    assert str(report / "data_faults.txt") in lines[-1]
    listed = (report / "data_faults.txt").read_text().splitlines()
    assert len(listed) == 31
    assert sum("no such file" in line for line in listed) == 15
    assert sum("damaged" in line for line in listed) == 15
    for path in paths[:30]:
        assert any(str(path) in line for line in listed)


def many_faults() -> ImageSet:
    images, _ = good()
    images.faults = tuple(WaraError("data", f"fault {i}", "", "correct") for i in range(21))
    return images


def test_without_a_folder_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(WaraErrors) as caught:
        check(many_faults(), good()[1], report_dir=None)
    assert str(caught.value).endswith("1 more offenders; correct the first ones and run again")
    assert list(tmp_path.iterdir()) == []


def test_as_many_faults_as_are_shown_need_no_file(tmp_path):
    images = many_faults()
    images.faults = images.faults[:20]
    assert "more offenders" not in fails(images, good()[1], tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_list_that_cannot_be_written_is_a_storage_error(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(WaraError) as caught:
        check(many_faults(), good()[1], report_dir=tmp_path / "file")
    assert caught.value.exit_code == 5 and "fault 0" in caught.value.remedy
    # A move that fails leaves the old list as it was, and nothing beside it.
    (tmp_path / "data_faults.txt").write_text("old")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(WaraError, match="no space left") as caught:
        check(many_faults(), good()[1], report_dir=tmp_path)
    assert caught.value.exit_code == 5
    assert {p.name for p in tmp_path.iterdir()} == {"file", "data_faults.txt"}
    assert (tmp_path / "data_faults.txt").read_text() == "old"


def test_images_are_decoded_once(tmp_path, monkeypatch):
    from wara.data import imageset

    paths = files(tmp_path, 20)
    images = file_set(paths)
    calls: Counter[str] = Counter()
    monkeypatch.setattr(
        imageset, "read_bytes", lambda path: calls.update([str(path)]) or read_bytes(path)
    )
    spec = ImageSpec((16, 16), (0.5,) * 3, (0.5,) * 3, "bilinear")
    images.survey(spec)
    check(images, assign_splits(images, **FRACTIONS), report_dir=tmp_path)
    for index, path in enumerate(paths):
        expected = resize(read_image(path), (16, 16), "bilinear")
        np.testing.assert_array_equal(images.array(index, spec), expected)
        assert images.sha256(index) == hashlib.sha256(path.read_bytes()).hexdigest()
    # Check, split, hash and training: one reading of each file.
    assert set(calls.values()) == {1} and len(calls) == 20
    # Another size is read anew, and right.
    assert images.array(0, replace(spec, size=(8, 8))).shape == (8, 8, 3)


def test_large_sets_are_not_kept(tmp_path, monkeypatch):
    from wara.data import imageset

    monkeypatch.setattr(imageset, "MEMORY_LIMIT", 10)
    paths = files(tmp_path, 6)
    images = file_set(paths)
    spec = ImageSpec((16, 16), (0.5,) * 3, (0.5,) * 3, "bilinear")
    assert not images.keep(spec)
    images.fill(spec, range(len(images)))
    expected = resize(read_image(paths[3]), (16, 16), "bilinear")
    np.testing.assert_array_equal(images.array(3, spec), expected)


# --- balance ----------------------------------------------------------------------------------


def test_counts_and_weights():
    from sklearn.utils.class_weight import compute_class_weight

    labels = np.array([0] * 30 + [1] * 10 + [2] * 5)
    counts = class_counts(labels, 3)
    assert counts.tolist() == [30, 10, 5] and imbalance_ratio(counts) == 6
    oracle = compute_class_weight("balanced", classes=np.arange(3), y=labels)
    np.testing.assert_allclose(class_weights(counts), oracle, rtol=1e-6)
    assert class_counts(labels, 4).tolist() == [30, 10, 5, 0]
    assert imbalance_ratio(class_counts(labels, 4)) == float("inf")
    assert class_weights(class_counts(labels, 4))[3] == 0


def test_counts_and_weights_of_labels():
    table = np.array([[1, 0, 0], [1, 1, 0], [0, 0, 0], [1, 0, 0]])
    counts = class_counts(table, 3)
    assert counts.tolist() == [3, 1, 0]
    np.testing.assert_allclose(positive_weights(counts, 4), [1 / 3, 3, 1], rtol=1e-6)


def test_rare_findings_are_weighted_as_by_torch():
    import torch

    from wara.training.losses import loss_per_image, loss_weights

    names = {"classes": "abcd", "most": 100.0}
    weights, text = loss_weights("auto", "multilabel", (40, 10, 1, 0), 400, **names)
    assert weights.tolist() == [9, 39, 100, 1] and weights.dtype == torch.float32
    heavy = "few images weigh much: b 39, c 399 cut to 100 by max_class_weight"
    assert text == f", positives weighted 1 to 100, {heavy}"
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(6, 4, generator=generator)
    y = (torch.rand(6, 4, generator=generator) < 0.5).float()
    wanted = torch.nn.BCEWithLogitsLoss(pos_weight=weights)(x, y)
    torch.testing.assert_close(loss_per_image(x, y, loss="bce", weights=weights).mean(), wanted)
    assert loss_weights("bce", "multilabel", (1, 10), 400, **names) == (None, "")
    assert loss_weights("auto", "multilabel", (25, 50), 100, **names) == (None, "")  # 3 : 1


@pytest.mark.parametrize(("most", "heaviest"), [(None, 130.0), (100.0, 100.0), (5.0, 5.0)])
def test_class_weights_end_where_the_config_says(most, heaviest):
    from wara.training.losses import loss_weights

    weights, text = loss_weights(
        "weighted_ce", "binary", (259, 1), 260, classes=["no", "yes"], most=most
    )
    assert weights.max() == heaviest and f" to {heaviest:g}, few images weigh much: yes 130" in text
    assert ("by max_class_weight" in text) == (most is not None)
    light = loss_weights("weighted_ce", "binary", (30, 10), 40, classes=["no", "yes"], most=100)[1]
    assert light == ", class weights 0.67 to 2"
