"""From `dataset:` to records: class folders, tables, MedMNIST files, phantoms, and their faults."""

from __future__ import annotations

import io
import socket
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from wara.cards import load_card
from wara.data import medmnist_files
from wara.data.sources import check_apart, default_cache, open_source
from wara.errors import WaraError
from wara.net import reachable


def open_(dataset, tmp_path: Path, **options):
    given = {"cache": tmp_path / "cache", "offline": "error", "seed": 0} | options
    return open_source(str(dataset), **given)


def picture(value: int, size: tuple[int, int] = (20, 16)) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", size, (value, value, value)).save(stream, "PNG")
    return stream.getvalue()


def put(path: Path, value: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(picture(value))
    return path


def table(folder: Path, text: str, encoding: str = "utf-8") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "labels.csv").write_text(text, encoding=encoding)
    return folder


@pytest.fixture(autouse=True)
def no_network(monkeypatch, tmp_path):
    monkeypatch.setenv("WARA_OFFLINE", "1")
    import medmnist.info

    monkeypatch.setattr(medmnist.info, "DEFAULT_ROOT", str(tmp_path / "home"))


# --- where outputs may lie --------------------------------------------------------------------


@pytest.mark.parametrize("named", ["t.csv", "tables/t.csv", "labels.csv"])
def test_outputs_lie_apart_from_images_and_may_lie_beside_a_table(tmp_path, monkeypatch, named):
    monkeypatch.chdir(tmp_path)
    files = [put(tmp_path / name, i) for i, name in enumerate(["a.png", "b.png", "in/c.png"])]
    Path(named).parent.mkdir(exist_ok=True)
    Path(named).write_text("file,label\n" + "".join(f"{f},{i % 2}\n" for i, f in enumerate(files)))
    images = open_(named, tmp_path, within=tmp_path)
    check_apart(Path("runs/one"), "out", images)
    for place in ("in", "in/runs/one"):
        with pytest.raises(WaraError, match="out lies among the images"):
            check_apart(Path(place), "out", images)


def test_outputs_lie_apart_from_class_folders(tmp_path):
    put(tmp_path / "set" / "a" / "0.png")
    put(tmp_path / "set" / "b" / "0.png")
    images = open_(tmp_path / "set", tmp_path)
    check_apart(tmp_path / "out", "out", images)
    for place in ("set", "set/out", "set/a/out"):
        with pytest.raises(WaraError, match="out lies among the images"):
            check_apart(tmp_path / place, "out", images)


# --- class folders ----------------------------------------------------------------------------


def test_one_tree(tmp_path):
    for index, name in enumerate(["b", "a", "a"]):
        put(tmp_path / "set" / name / "deep" / f"{index}.png", index)
    (tmp_path / "set" / "a" / "notes.txt").write_text("x")
    (tmp_path / "set" / "a" / ".hidden.png").write_text("x")
    found = open_(tmp_path / "set", tmp_path)
    assert found.card.class_names == ["a", "b"] and found.card.task == "binary"
    assert found.card.modality is None and found.card.augment == "general"
    assert [(r.file, r.label, r.split) for r in found.records] == [
        ("a/deep/1.png", 0, None),
        ("a/deep/2.png", 0, None),
        ("b/deep/0.png", 1, None),
    ]
    assert found.read(2).tolist() == np.zeros((16, 20, 3), int).tolist()
    assert any("1 .txt" in note for note in found.notes)
    assert any("no card" in note for note in found.notes)
    assert not found.synthetic and not found.faults


def test_numeric_classes_are_sorted_by_number(tmp_path):
    for name in ["10", "9", "0"]:
        put(tmp_path / "set" / name / "a.png")
    assert open_(tmp_path / "set", tmp_path).card.class_names == ["0", "9", "10"]


def test_split_tree(tmp_path):
    for split in ("train", "Validation", "test"):
        for name in ("x", "y"):
            put(tmp_path / "set" / split / name / "a.png")
    found = open_(tmp_path / "set", tmp_path)
    assert {(r.split, r.label) for r in found.records} == {
        (split, label) for split in ("train", "val", "test") for label in (0, 1)
    }


def test_split_tree_faults(tmp_path):
    put(tmp_path / "set/train/x/a.png")
    put(tmp_path / "set/val/x/a.png")
    put(tmp_path / "set/valid/x/a.png")
    with pytest.raises(WaraError, match="two folders for val"):
        open_(tmp_path / "set", tmp_path)
    put(tmp_path / "other/train/x/a.png")
    put(tmp_path / "other/extra/x/a.png")
    with pytest.raises(WaraError, match="beside the splits: extra"):
        open_(tmp_path / "other", tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(WaraError, match="neither labels.csv nor class folders") as caught:
        open_(tmp_path / "empty", tmp_path)
    assert caught.value.exit_code == 3
    put(tmp_path / "single/x/a.png")
    with pytest.raises(WaraError, match="only the class 'x'"):
        open_(tmp_path / "single", tmp_path)


@pytest.mark.parametrize("names", [("test", "val"), ("Test", "a", "b"), ("VALID",), ("testing",)])
def test_splits_without_training_images_are_no_classes(tmp_path, names):
    for name in names:
        for label in ("x", "y"):
            put(tmp_path / "set" / name / label / "a.png")
    with pytest.raises(WaraError, match="without a folder train") as caught:
        open_(tmp_path / "set", tmp_path)
    assert caught.value.exit_code == 3 and "train/<class>/" in caught.value.remedy


def test_a_class_of_the_card_may_be_called_like_a_split(tmp_path):
    card = user_card(tmp_path, "source: {kind: folder, path: set}\n")
    card.write_text(card.read_text().replace("name: benign", "name: test"))
    put(tmp_path / "set/test/a.png")
    put(tmp_path / "set/malignant/b.png")
    found = open_(card, tmp_path)
    assert sorted((r.label, r.split) for r in found.records) == [(0, None), (1, None)]


def test_shipped_folder_card_reads_the_cache(tmp_path):
    root = tmp_path / "cache" / "cmmd"
    for index in range(3):
        put(root / "benign" / f"D1-000{index}" / "1-1.png", index)
        put(root / "Malignant" / f"D2-000{index}" / "1-1.png", index)
    found = open_("cmmd", tmp_path)
    assert found.card.name == "cmmd"
    by_file = {r.file: r for r in found.records}
    assert by_file["benign/D1-0002/1-1.png"].patient == "D1-0002"
    assert by_file["Malignant/D2-0001/1-1.png"].label == 1
    put(root / "benigm" / "a.png")
    put(root / "benign" / "nameless.png")
    found = open_("cmmd", tmp_path)
    assert "did you mean 'benign'" in str(found.faults[0])
    assert any("1 of 7 file names show no patient" in note for note in found.notes)


# --- tables -----------------------------------------------------------------------------------


def test_table(tmp_path):
    folder = table(
        tmp_path / "set",
        "file,label,patient,split,age\n"
        "a.png,cat,p1,train,3\nsub/b.png,dog,,test,4\n\nc.png, dog ,p2,validation,5\n",
        encoding="utf-8-sig",
    )
    put(folder / "sub" / "b.png", 7)
    found = open_(folder, tmp_path)
    assert found.card.class_names == ["cat", "dog"]
    assert [(r.file, r.label, r.patient, r.split) for r in found.records] == [
        ("a.png", 0, "p1", "train"),
        ("sub/b.png", 1, None, "test"),
        ("c.png", 1, "p2", "val"),
    ]
    assert found.read(1).max() == 7
    assert any("1 rows name no patient" in note for note in found.notes)
    assert open_(folder / "labels.csv", tmp_path).card.class_names == ["cat", "dog"]


def test_own_columns_are_read_in_any_case(tmp_path):
    folder = table(tmp_path / "set", "File,LABEL,Patient,Split\na,x,p,train\nb,y,q,TEST\n")
    found = open_(folder, tmp_path)
    assert [(r.file, r.label, r.patient, r.split) for r in found.records] == [
        ("a", 0, "p", "train"),
        ("b", 1, "q", "test"),
    ]
    with pytest.raises(WaraError, match="named twice: patient"):
        open_(table(tmp_path / "two", "file,label,patient,Patient\na,x,p,p\n"), tmp_path)


GROUPS = ["patient_id", "PatientID", "Patient ID", "patients", "subject", "Subject-ID", "case",
          "case_id", "study_patient", "participant_id", "lesion_id", "PID"]  # fmt: skip


@pytest.mark.parametrize("name", GROUPS)
def test_patients_under_another_name_are_not_overlooked(tmp_path, name):
    rows = "\na.png,benign,p\nb.png,malignant,p\n"
    folder = table(tmp_path / "set", f"file,label,{name}{rows}")
    for card in ("", "source: {kind: csv, path: set/labels.csv}\n"):
        with pytest.raises(WaraError, match=f"column '{name}' seems to name patients") as caught:
            open_(user_card(tmp_path, card) if card else folder, tmp_path)
        assert caught.value.exit_code == 3
        assert "rename it to patient" in caught.value.remedy
        assert "group_column" in caught.value.remedy
    # A patient column, or the card's word for it, settles the matter.
    table(tmp_path / "both", f"file,label,{name},patient\na,x,1,p\nb,y,2,p\n")
    assert [r.patient for r in open_(tmp_path / "both", tmp_path).records] == ["p", "p"]
    body = f"source: {{kind: csv, path: set/labels.csv}}\ngroup_column: {name}\n"
    assert [r.patient for r in open_(user_card(tmp_path, body), tmp_path).records] == ["p", "p"]


def test_other_columns_are_still_ignored(tmp_path):
    columns = ["age", "patient_age", "case_control", "casement", "view", "examiner", "sex"]
    text = f"file,label,{','.join(columns)}\n"
    rows = "".join(f"{n}.png,{n},{','.join('1' * len(columns))}\n" for n in "ab")
    assert len(open_(table(tmp_path / "set", text + rows), tmp_path)) == 2


def test_the_cards_word_for_the_patient_keeps_its_case(tmp_path):
    card = user_card(tmp_path, "source: {kind: csv, path: set/labels.csv}\ngroup_column: Patient\n")
    table(tmp_path / "set", "file,label,Patient\na,M,w1\nb,benign,w2\n")
    assert [r.patient for r in open_(card, tmp_path).records] == ["w1", "w2"]


def test_multilabel_tables_agree(tmp_path):
    bars = table(tmp_path / "bars", "file,label\na.png,x|z\nb.png,\nc.png,y\n")
    columns = table(tmp_path / "columns", "file,x,y,z\na.png,1,0,1\nb.png,0,0,0\nc.png,0,1,0\n")
    for folder in (bars, columns):
        found = open_(folder, tmp_path)
        assert found.card.task == "multilabel" and found.card.class_names == ["x", "y", "z"]
        assert [r.label for r in found.records] == [(1, 0, 1), (0, 0, 0), (0, 1, 0)]
        assert found.labels.tolist() == [[1, 0, 1], [0, 0, 0], [0, 1, 0]]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("name,label\na.png,x\n", "no column 'file'"),
        ("file;label\na.png;x\n", "only the class 'x'"),
        ("file,label\n", "no rows"),
        ("", "no column 'file'"),
        ("file,file,label\na,b,c\n", "named twice"),
        ("file,label\na.png,x,3\n", "another number of columns"),
        ("file,grade\na.png,7\n", "no column 'label'"),
        ("file,label\na.png,x\nb.png,x\n", "only the class 'x'"),
        ("file,label\na.png,x\nb.png,macro\n", "error[data]: a class cannot be named 'macro'"),
        ('file,label\n"a.png,x\n', "not a readable table"),
    ],
)
def test_unusable_tables(tmp_path, text, words):
    with pytest.raises(WaraError) as caught:
        open_(table(tmp_path / "set", text), tmp_path)
    assert caught.value.exit_code == 3 and words in str(caught.value) and caught.value.remedy


def test_faults_of_rows_are_collected(tmp_path):
    folder = table(
        tmp_path / "set",
        "file,label,split\na.png,x,train\nb.png,y,test\na.png,x,train\n,x,train\n"
        "c.png,,train\nd.png,x,somewhere\ne.png,x,\n",
    )
    found = open_(folder, tmp_path)
    assert len(found.records) == 2
    text = "\n".join(map(str, found.faults))
    for words in (":4: a.png", "row 2 already", "no file name", "no label", "'somewhere'",
                  "no split, while other rows have one"):  # fmt: skip
        assert words in text
    assert len(found.faults) == 5


def user_card(tmp_path: Path, body: str) -> Path:
    path = tmp_path / "mine.yaml"
    path.write_text(
        "name: mine\ntitle: Mine\nmodality: ultrasound\ntask: binary\nclasses:\n"
        "  - {name: benign, meaning: b}\n  - {name: malignant, meaning: m, aliases: [M]}\n" + body
    )
    return path


def test_users_card_with_a_table(tmp_path):
    card = user_card(tmp_path, "source: {kind: csv, path: set/labels.csv}\ngroup_column: woman\n")
    table(tmp_path / "set", "file,label,woman\na.png,M,w1\nb.png,0,w2\nc.png,maligant,w2\n")
    found = open_(card, tmp_path)
    assert [(r.label, r.patient) for r in found.records] == [(1, "w1"), (0, "w2")]
    assert "did you mean 'malignant'" in str(found.faults[0])
    table(tmp_path / "set", "file,label\na.png,M\n")
    with pytest.raises(WaraError, match="no column 'woman'"):
        open_(card, tmp_path)


def test_a_path_of_the_users_own_is_never_replaced(tmp_path):
    card = user_card(tmp_path, "source: {kind: folder, path: gone}\nphantom: ultrasound_phantom\n")
    with pytest.raises(WaraError, match="gone is not there") as caught:
        open_(card, tmp_path, offline="phantom")
    assert caught.value.exit_code == 3
    with pytest.raises(WaraError) as caught:
        open_("retinaminst", tmp_path)
    assert caught.value.exit_code == 2 and "retinamnist" in caught.value.remedy
    with pytest.raises(WaraError) as caught:
        open_(tmp_path / "gone", tmp_path)
    assert caught.value.exit_code == 2


# --- MedMNIST ---------------------------------------------------------------------------------


def npz(path: Path, *, labels=None, grey: bool = False, **changes) -> Path:
    """A small file in the layout of MedMNIST+."""
    rng = np.random.default_rng(0)
    arrays = {}
    for count, split in zip((8, 4, 5), ("train", "val", "test"), strict=True):
        shape = (count, 24, 24) if grey else (count, 24, 24, 3)
        arrays[f"{split}_images"] = rng.integers(0, 256, shape, dtype=np.uint8)
        values = np.arange(count)[:, None] % 5 if labels is None else labels(rng, count)
        arrays[f"{split}_labels"] = values.astype(np.uint8)
    arrays.update(changes)
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(path, **{k: v for k, v in arrays.items() if v is not None})
    return path


@pytest.fixture
def official(monkeypatch):
    """Make the package believe that the small file is the official one."""
    import hashlib

    import medmnist

    def accept(flag: str, path: Path) -> None:
        md5 = hashlib.md5(path.read_bytes()).hexdigest()
        monkeypatch.setitem(medmnist.INFO[flag], "MD5_224", md5)

    return accept


def test_medmnist_file_in_the_cache(tmp_path, official):
    path = npz(tmp_path / "cache/medmnist/retinamnist_224.npz")
    official("retinamnist", path)
    found = open_("retinamnist", tmp_path)
    with np.load(path) as arrays:
        assert len(found) == 17
        assert [r.split for r in found.records] == ["train"] * 8 + ["val"] * 4 + ["test"] * 5
        np.testing.assert_array_equal(found.read(7), arrays["train_images"][7])
        np.testing.assert_array_equal(found.read(8), arrays["val_images"][0])
        np.testing.assert_array_equal(found.read(16), arrays["test_images"][4])
        assert found.labels[8:12].tolist() == arrays["val_labels"][:, 0].tolist()
    assert found.records[8].file == "retinamnist_224.npz/val/0"
    assert "MD5 verified" in found.origin and not found.synthetic
    assert len({found.sha256(i) for i in range(17)}) == 17


def test_huge_medmnist_arrays_are_mapped(tmp_path, official, monkeypatch):
    path = npz(tmp_path / "cache/medmnist/retinamnist_224.npz")
    official("retinamnist", path)
    plain = open_("retinamnist", tmp_path)
    monkeypatch.setattr(medmnist_files, "MAP_ABOVE", 8000)
    for _ in range(2):  # unpacked, then found
        mapped = open_("retinamnist", tmp_path)
        assert isinstance(mapped.reader.arrays[0], np.memmap)
        assert not isinstance(mapped.reader.arrays[1], np.memmap)
        for index in range(17):
            np.testing.assert_array_equal(mapped.read(index), plain.read(index))
            assert mapped.sha256(index) == plain.sha256(index)
    unpacked = [p for p in path.parent.iterdir() if p.is_dir()]
    assert len(unpacked) == 1 and {p.name for p in unpacked[0].iterdir()} == {
        "train_images.npy",
        "test_images.npy",
    }


def test_medmnist_file_in_the_packages_own_folder(tmp_path, official):
    official("retinamnist", npz(tmp_path / "home/retinamnist_224.npz"))
    assert len(open_("retinamnist", tmp_path)) == 17


def test_medmnist_multilabel_and_grey(tmp_path, official):
    path = npz(
        tmp_path / "cache/medmnist/chestmnist_224.npz",
        grey=True,
        labels=lambda rng, count: rng.integers(0, 2, (count, 14)),
    )
    official("chestmnist", path)
    found = open_("chestmnist", tmp_path)
    assert found.labels.shape == (17, 14) and len(found.records[0].label) == 14
    array = found.read(0)
    assert array.shape == (24, 24, 3) and (array[..., 0] == array[..., 2]).all()


def test_medmnist_file_that_is_not_the_official_one(tmp_path):
    npz(tmp_path / "cache/medmnist/retinamnist_224.npz")
    for offline in ("phantom", "error"):  # a wrong file is never replaced in silence
        with pytest.raises(WaraError, match="not the official file") as caught:
            open_("retinamnist", tmp_path, offline=offline)
        assert caught.value.exit_code == 3


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"val_labels": None}, "no array val_labels"),
        ({"val_labels": np.array([[0], [1], [2], [9]], np.uint8)}, None),
        ({"val_labels": np.zeros((3, 1), np.uint8)}, "val: images"),
        ({"test_images": np.zeros((5, 8, 8, 3), np.float32)}, "test: images float32"),
        ({"val_labels": np.zeros((4, 2), np.uint8)}, "2 labels per image"),
        ({"val_labels": np.array([{"a": 1}] * 4, dtype=object)}, "damaged"),  # needs pickle
    ],
)
def test_medmnist_files_that_are_wrong(tmp_path, changes, words):
    npz(tmp_path / "own.npz", **changes)
    text = load_card_text("retinamnist").replace("name: retinamnist", "name: own")
    text = text.replace("  size: 224", "  size: 224\n  file: own.npz\n  verify: false")
    (tmp_path / "own.yaml").write_text(text)
    if words is None:
        found = open_(tmp_path / "own.yaml", tmp_path)
        assert [fault.where for fault in found.faults] == ["retinamnist_224.npz/val/3"]
        return
    with pytest.raises(WaraError) as caught:
        open_(tmp_path / "own.yaml", tmp_path)
    assert caught.value.exit_code == 3 and words in str(caught.value)


def load_card_text(name: str) -> str:
    from wara.storage import shipped

    return (shipped("datasets") / f"{name}.yaml").read_text(encoding="utf-8")


def test_damaged_medmnist_file(tmp_path, official):
    path = npz(tmp_path / "cache/medmnist/retinamnist_224.npz")
    path.write_bytes(path.read_bytes()[:-200])
    official("retinamnist", path)
    with pytest.raises(WaraError, match="damaged file"):
        open_("retinamnist", tmp_path)


def test_without_file_and_network_offline_error_names_the_path(tmp_path):
    started = time.monotonic()
    with pytest.raises(WaraError) as caught:
        open_("retinamnist", tmp_path)
    assert time.monotonic() - started < 5
    text = str(caught.value)
    assert caught.value.exit_code == 3
    assert str(tmp_path / "cache/medmnist/retinamnist_224.npz") in text and "zenodo" in text
    assert not (tmp_path / "cache").exists()  # nothing half-made is left behind
    with pytest.raises(WaraError, match="is not there"):
        open_("mini_ddsm", tmp_path, offline="phantom")  # no phantoms of that modality


def test_reading_the_list_leaves_the_package_importable(monkeypatch):
    """`import medmnist.info` afterwards finds the package, not our copy of one of its modules."""
    monkeypatch.delitem(sys.modules, "medmnist.info")
    medmnist_files._alone.cache_clear()
    assert "retinamnist" in medmnist_files._package().INFO
    assert "medmnist.info" not in sys.modules


def test_fetching_is_atomic(tmp_path, monkeypatch, official):
    """A fetch that breaks leaves no file; one that works leaves one good file and nothing else."""
    import torchvision.datasets.utils as downloads

    whole = npz(tmp_path / "server/retinamnist_224.npz")
    official("retinamnist", whole)
    monkeypatch.setattr(medmnist_files, "reachable", lambda url: True)

    def breaks(url, root, filename, md5):
        (Path(root) / filename).write_bytes(b"half")
        raise RuntimeError("File not found or corrupted.")

    monkeypatch.setattr(downloads, "download_url", breaks)
    with pytest.raises(WaraError, match="fetching https://zenodo.org/.* failed"):
        open_("retinamnist", tmp_path)
    assert list((tmp_path / "cache/medmnist").iterdir()) == []

    def works(url, root, filename, md5):
        (Path(root) / filename).write_bytes(whole.read_bytes())

    monkeypatch.setattr(downloads, "download_url", works)
    assert len(open_("retinamnist", tmp_path)) == 17
    assert [p.name for p in (tmp_path / "cache/medmnist").iterdir()] == ["retinamnist_224.npz"]


# --- the network decision ---------------------------------------------------------------------


def test_reachable_finds_a_server_and_its_absence(monkeypatch):
    monkeypatch.delenv("WARA_OFFLINE")
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert reachable(f"http://127.0.0.1:{port}/file")
        monkeypatch.setenv("WARA_OFFLINE", "1")
        assert not reachable(f"http://127.0.0.1:{port}/file")
        monkeypatch.delenv("WARA_OFFLINE")
        # A proxy decides in place of the server.
        monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{port}")
        assert reachable("http://name.invalid/file")
    assert not reachable("http://name.invalid/file")
    monkeypatch.delenv("http_proxy")
    assert not reachable(f"http://127.0.0.1:{port}/file")


def test_a_name_service_that_hangs_costs_seconds(monkeypatch):
    monkeypatch.delenv("WARA_OFFLINE")

    def hang(*args, **kwargs):
        time.sleep(4)
        raise OSError("no answer")

    monkeypatch.setattr(socket, "getaddrinfo", hang)
    for name in ("https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    started = time.monotonic()
    assert not reachable("https://zenodo.org/file", seconds=0.2)
    assert time.monotonic() - started < 3


def test_default_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("WARA_CACHE", str(tmp_path))
    assert default_cache() == tmp_path
    monkeypatch.delenv("WARA_CACHE")
    assert default_cache() == Path.home() / ".cache" / "wara"


# --- phantoms ---------------------------------------------------------------------------------


def test_phantoms_stand_in_and_say_so(tmp_path):
    pytest.importorskip("wara.phantoms")
    found = open_("retinamnist", tmp_path, offline="phantom", images=60, phantom_size=32)
    assert found.synthetic and found.substituted_for == "retinamnist"
    assert found.card.name == "fundus_phantom" and len(found) == 60
    assert "stand in" in found.notes[0] and "retinamnist" in found.notes[0]
    assert "synthetic" not in (open_("fundus_phantom", tmp_path, images=30).notes or ("",))[0]


def test_phantoms_are_the_same_again_and_split_by_patient(tmp_path):
    phantoms = pytest.importorskip("wara.phantoms")
    first = open_("fundus_phantom", tmp_path, images=80, phantom_size=48, seed=3)
    again = open_("fundus_phantom", tmp_path, images=80, phantom_size=48, seed=3)
    other = open_("fundus_phantom", tmp_path, images=80, phantom_size=48, seed=4)
    assert first.records == again.records and first.records != other.records
    drawn = phantoms.draw("fundus", 3, 17, 48)
    np.testing.assert_array_equal(first.read(17), drawn.image)
    assert first.records[17].label == drawn.label and first.records[17].patient == drawn.patient
    homes: dict[str, set[str]] = {}
    for record in first.records:
        homes.setdefault(record.patient, set()).add(record.split)
    assert all(len(splits) == 1 for splits in homes.values())
    source = load_card("fundus_phantom").source
    share = sum(r.split == "test" for r in first.records) / 80
    assert abs(share - source.test_fraction) < 0.06


def test_phantoms_are_drawn_once_and_kept(tmp_path, monkeypatch):
    phantoms = pytest.importorskip("wara.phantoms")
    from wara.data import phantom_sets

    def collect():
        found = open_("ultrasound_phantom", tmp_path, images=24, phantom_size=32)
        return found.records, np.stack([found.read(i) for i in range(24)])

    records, images = collect()
    drawn = []
    real = phantoms.draw
    monkeypatch.setattr(phantoms, "draw", lambda *a: drawn.append(a) or real(*a))
    again, same = collect()
    assert not drawn and again == records
    np.testing.assert_array_equal(same, images)
    (kept,) = (tmp_path / "cache/phantoms").iterdir()
    kept.write_bytes(kept.read_bytes()[:-50])  # damaged: drawn again
    np.testing.assert_array_equal(collect()[1], images)
    assert len(drawn) == 24
    monkeypatch.setattr(phantom_sets, "_fingerprint", lambda: "other code")  # changed: drawn again
    collect()
    assert len(drawn) == 48
    monkeypatch.setattr(phantom_sets, "_FEW", 5)  # several processes draw the same
    (tmp_path / "cache/phantoms" / kept.name).unlink()
    monkeypatch.setattr(phantom_sets, "_fingerprint", lambda: "once more")
    monkeypatch.setattr(phantoms, "draw", real)
    np.testing.assert_array_equal(collect()[1], images)


def test_a_cache_that_cannot_be_written_is_no_obstacle(tmp_path):
    pytest.importorskip("wara.phantoms")
    (tmp_path / "cache").write_text("a file where a folder should be")
    assert len(open_("fundus_phantom", tmp_path, images=12, phantom_size=32)) == 12
