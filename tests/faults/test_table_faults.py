"""Tables that are damaged, odd or hostile: the right records, or a line that says what is wrong."""

from __future__ import annotations

import codecs
import contextlib
import csv
import gzip
import io
import os
import random
import signal
import unicodedata
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from wara import storage
from wara.backbones.build import build_backbone
from wara.backbones.reading import read_checkpoint
from wara.config.files import load_config
from wara.data import assign_splits
from wara.data.sources import open_source
from wara.data.tables import open_table
from wara.data.words import other_spellings
from wara.deploy.bundle import open_bundle
from wara.deploy.places import check_outside
from wara.errors import WaraError
from wara.images import read_bytes

HEADER = ["file", "label", "patient", "split"]
FILES = [f"{name}.png" for name in ("a", "b", "größe", "d e", "semi;colon", "com,ma", 'q"u', "h")]
LABELS = ["gutartig", "bösartig"]
Rows = list[list[str]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an image of its own for each of `FILES`, and a folder beside it."""
    found = tmp_path_factory.mktemp("tables") / "set"
    found.mkdir()
    rng = np.random.default_rng(0)
    for file in FILES:
        pixels = rng.integers(0, 256, (6, 6), dtype=np.uint8)
        Image.fromarray(pixels).save(found / file)
    Image.fromarray(pixels).save(found.parent / "elsewhere.png")
    (found / "sub").mkdir()
    (found / "nothing.png").symlink_to("gone.png")
    return found


def rows_of(rng: random.Random) -> Rows:
    """A sound table: both classes in training and validation, no patient in two splits."""
    splits = ["train", "train", "train", "train", "val", "val", "test", "test"]
    rows = [
        [file, LABELS[place % 2], f"P{place // 2:02}", split]
        for place, (file, split) in enumerate(zip(FILES, splits, strict=True))
    ]
    rng.shuffle(rows)
    return rows


def written(rows: Rows, header: list[str] | None = None, **dialect: object) -> str:
    stream = io.StringIO()
    options = {"lineterminator": "\n"} | dialect
    csv.writer(stream, **options).writerows([header or HEADER, *rows])  # type: ignore[arg-type]
    return stream.getvalue()


@dataclass
class Mutant:
    """A table, and what must come of it.

    Args:
        data: its bytes.
        records: the rows that must be accepted, as they must come out; None for a refusal of the
            whole table.
        faults: rows that must be refused one by one.
        either: refusing the whole is as good, and what is accepted is told from the rows that
            Python's own `csv` finds.
        name: of its file.
        missing: rows that are accepted and name no file that is there.
    """

    data: bytes
    records: Rows | None = None
    faults: int = 0
    either: bool = False
    name: str = "labels.csv"
    missing: int = 0


Maker = Callable[[random.Random, Rows], Mutant]


def text(rows: Rows, keep: Rows | None = None, faults: int = 0, **dialect: object) -> Mutant:
    return Mutant(written(rows, **dialect).encode(), rows if keep is None else keep, faults)


def same(change: Callable[[str], bytes], name: str = "labels.csv") -> Maker:
    """The same rows, written otherwise."""
    return lambda rng, rows: Mutant(change(written(rows)), rows, name=name)


def refused(change: Callable[[str], bytes], name: str = "labels.csv") -> Maker:
    return lambda rng, rows: Mutant(change(written(rows)), name=name)


def one_cell(column: int, *cells: str, missing: bool = False) -> Maker:
    """One row with another cell, which is refused: at once, or when its file is looked for."""

    def make(rng: random.Random, rows: Rows) -> Mutant:
        place = rng.randrange(len(rows))
        changed = [list(row) for row in rows]
        changed[place][column] = rng.choice(cells)
        if missing:
            return Mutant(written(changed).encode(), changed, missing=1)
        kept = [row for index, row in enumerate(changed) if index != place]
        return text(changed, kept, 1)

    return make


def spelt_otherwise(rng: random.Random, rows: Rows) -> Mutant:
    changed = [list(row) for row in rows]
    place = rng.randrange(1, len(rows))
    name = changed[place][2]
    if name not in {row[2] for row in rows[:place]}:  # the later of its two rows
        place = max(index for index, row in enumerate(rows) if row[2] == name)
    odd = [name.lower(), f"{name}\u200b", f"\uff30{name[1:]}", f'="{name}"', f"\ufeff{name}"]
    changed[place][2] = rng.choice(odd)
    return text(changed, [row for index, row in enumerate(changed) if index != place], 1)


def merged_labels(rng: random.Random, rows: Rows) -> Mutant:
    changed = sorted(([*row] for row in rows), key=lambda row: row[1])
    for before, row in reversed(list(zip(changed, changed[1:], strict=False))):
        row[1] = "" if row[1] == before[1] else row[1]
    kept = [row for row in changed if row[1]]
    return text(changed, kept, len(rows) - len(kept))


def merged_patients(rng: random.Random, rows: Rows) -> Mutant:
    changed = sorted(([*row] for row in rows), key=lambda row: row[2])
    for row in changed[1::2]:
        row[2] = ""
    return text(changed)


def repeated(rng: random.Random, rows: Rows) -> Mutant:
    return text([*rows, rng.choice(rows)], rows, 1)


def repeated_in_another_form(rng: random.Random, rows: Rows) -> Mutant:
    row = next(row for row in rows if not row[0].isascii())
    return text([*rows, [unicodedata.normalize("NFD", row[0]), *row[1:]]], rows, 1)


def decomposed(rng: random.Random, rows: Rows) -> Mutant:
    return text([[unicodedata.normalize("NFD", row[0]), *row[1:]] for row in rows])


def ragged(rng: random.Random, rows: Rows) -> Mutant:
    changed = [list(row) for row in rows]
    place = rng.randrange(len(rows))
    changed[place] = changed[place][:-1] if rng.random() < 0.5 else [*changed[place], "more"]
    return Mutant(written(changed).encode())


def columns_in_another_order(rng: random.Random, rows: Rows) -> Mutant:
    order = rng.sample(range(4), 4)
    moved = [[row[column] for column in order] for row in rows]
    return Mutant(written(moved, [HEADER[column] for column in order]).encode(), rows)


def more_columns(rng: random.Random, rows: Rows) -> Mutant:
    wide = [[*row, str(rng.random()), "two\nlines", 'a "b"'] for row in rows]
    return Mutant(written(wide, [*HEADER, "age", "remark", "note"]).encode(), rows)


def named_twice(rng: random.Random, rows: Rows) -> Mutant:
    twice = rng.choice(["label", "Label ", "PATIENT", "\ufefffile", "spl\u200bit"])
    return Mutant(written([[*row, row[1]] for row in rows], [*HEADER, twice]).encode())


def any_byte(change: Callable[[bytearray, int, random.Random], None]) -> Maker:
    """A table with one byte changed: whatever it is then, no row is lost in silence."""

    def make(rng: random.Random, rows: Rows) -> Mutant:
        data = bytearray(written(rows).encode())
        change(data, rng.randrange(len(data)), rng)
        return Mutant(bytes(data), either=True)

    return make


def _flip(data: bytearray, place: int, rng: random.Random) -> None:
    data[place] ^= 1 << rng.randrange(8)


def _put(byte: int) -> Callable[[bytearray, int, random.Random], None]:
    return lambda data, place, rng: data.insert(place, byte)


def _cut(data: bytearray, place: int, rng: random.Random) -> None:
    del data[place:]


def _remove(data: bytearray, place: int, rng: random.Random) -> None:
    del data[place]


def workbook(text: str) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("xl/worksheets/sheet1.xml", text)
    return stream.getvalue()


def wide(text: str) -> bytes:
    """A million columns."""
    lines = text.splitlines()
    tail = [",".join(f"c{column}" for column in range(10**6)), *([",".join("1" * 10**6)] * 2)]
    return "\n".join(f"{a},{b}" for a, b in zip(lines, tail, strict=False)).encode()


def encoded(name: str) -> Callable[[str], bytes]:
    return lambda text: text.encode(name)


MAKERS: dict[str, Maker] = {
    "plain": same(str.encode),
    "mark of UTF-8": same(encoded("utf-8-sig")),
    "UTF-16": same(encoded("utf-16")),
    "UTF-16, high byte first": same(lambda t: codecs.BOM_UTF16_BE + t.encode("utf-16-be")),
    "UTF-16 without mark": refused(encoded("utf-16-le")),
    "UTF-32": refused(encoded("utf-32")),
    "letters of Windows": refused(encoded("cp1252")),
    "line ends of Windows": same(lambda t: t.replace("\n", "\r\n").encode()),
    "line ends of old Macs": same(lambda t: t.replace("\n", "\r").encode()),
    "no line end at the end": same(lambda t: t.rstrip("\n").encode()),
    "empty lines": same(lambda t: t.replace("\n", "\n\n").encode()),
    "emptied columns": same(lambda t: t.replace("\n", ",,\n").encode()),
    "semicolons": lambda rng, rows: text(rows, delimiter=";"),
    "tabs": lambda rng, rows: text(rows, delimiter="\t"),
    "quotes everywhere": lambda rng, rows: text(rows, quoting=csv.QUOTE_ALL),
    "a bar, said by sep=": lambda rng, rows: Mutant(
        ("sep=|\n" + written(rows, delimiter="|")).encode(), rows),
    "another ending": same(str.encode, "labels.txt"),
    "capitals in the header": same(lambda t: t.replace("file,label", "FILE,Label").encode()),
    "columns in another order": columns_in_another_order,
    "more columns": more_columns,
    "a column named twice": named_twice,
    "a million columns": refused(wide),
    "ragged rows": ragged,
    "a repeated row": repeated,
    "a row repeated in another form": repeated_in_another_form,
    "decomposed names": decomposed,
    "no label": one_cell(1, "", " ", "\u00a0"),
    "a label that means nothing": one_cell(1, "NA", "n/a", "-1", "?", "\uff2e\uff21", "#REF!"),
    "labels of merged cells": merged_labels,
    "patients of merged cells": merged_patients,
    "a patient in two spellings": spelt_otherwise,
    "another word for a split": one_cell(3, "holdout", "train/val", "0", "=A1", ""),
    "no file": one_cell(0, "", ".", "sub", "nothing.png"),
    "a file that is missing": one_cell(
        0, "gone.png", "x" * 5000, "a.png/b.png", "\u200b", "gr\u00f6\u00dfe/a.png", missing=True),
    "a file elsewhere": one_cell(0, "../elsewhere.png", "/etc/hostname", "/dev/zero", "..", "/"),
    "a name of two lines": one_cell(0, "a\nb.png", "\x1b[31ma.png", missing=True),
    "a formula": one_cell(2, '=HYPERLINK("http://x","P1")', "=B2", "=1+1"),
    "a label in two spellings": lambda rng, rows: Mutant(
        written([[r[0], rng.choice([r[1].upper(), f"\u00ad{r[1]}"]) if n == 3 else r[1], *r[2:]]
                 for n, r in enumerate(rows)]).encode()),
    "a huge cell": refused(lambda t: t.replace("gutartig", "x" * 200_000, 1).encode()),
    "nothing": refused(lambda t: b""),
    "a header only": refused(lambda t: t.encode().splitlines()[0]),
    "a workbook": refused(workbook, "labels.xlsx"),
    "a workbook called csv": refused(workbook),
    "an archive": refused(lambda t: gzip.compress(t.encode())),
    "a byte changed": any_byte(_flip),
    "a byte lost": any_byte(_remove),
    "a zero byte": any_byte(_put(0)),
    "a quote too many": any_byte(_put(ord('"'))),
    "a separator too many": any_byte(_put(ord(","))),
    "cut off": any_byte(_cut),
    "noise": lambda rng, rows: Mutant(rng.randbytes(400), either=True),
}  # fmt: skip


@contextlib.contextmanager
def watched() -> Iterator[None]:
    """Turn waiting for ever into an error."""

    def late(*_: object) -> None:
        raise TimeoutError("it hangs")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(120)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def rows_by_python(data: bytes) -> int | None:
    """How many rows a plain reader finds below the header; None where it finds no table."""
    try:
        found = list(csv.reader(io.StringIO(data.decode("utf-8-sig"), newline="")))
    except (UnicodeDecodeError, csv.Error):
        return None
    return sum(any(cell.strip() for cell in row) for row in found) - 1


def verdict(mutant: Mutant, folder: Path) -> str:
    """What is wrong with what comes of a table; empty when nothing is."""
    path = folder / mutant.name
    path.write_bytes(mutant.data)
    try:
        with watched():
            images = open_source(str(path), cache=None, offline="error", seed=0)
            unreadable = images.survey()
    except WaraError as error:
        lines = str(error).splitlines()
        if error.kind != "data" or any(not line.startswith("error[data]: ") for line in lines):
            return f"refused by {error}"
        return "" if mutant.records is None or mutant.either else f"refused: {error}"
    except BaseException as error:
        return f"{type(error).__name__}: {error}"
    finally:
        path.unlink()
    names = images.card.class_names
    bad = [fault for fault in (*images.faults, *unreadable) if len(str(fault).splitlines()) != 1]
    if bad:
        return f"a fault of several lines: {bad[0]!r}"
    if mutant.either:
        counted, rows = len(images) + len(images.faults), rows_by_python(mutant.data)
        return "" if rows is None or counted == rows else f"{counted} of {rows} rows"
    if mutant.records is None:
        return f"accepted: {images.records}"
    found = [
        [one.file, names[one.label], one.patient or "", one.split or ""]  # type: ignore[index]
        for one in images.records
    ]
    if found != mutant.records:
        return f"{found} instead of {mutant.records}"
    if (len(images.faults), len(unreadable)) != (mutant.faults, mutant.missing):
        return f"faults: {[str(fault) for fault in (*images.faults, *unreadable)]}"
    return ""


def test_tables_come_out_right_or_are_refused_in_a_line(folder: Path, amount, tally) -> None:
    lost, tried = [], 0
    for seed in range(amount(1, 4)):
        for kind, make in MAKERS.items():
            rng = random.Random(f"{kind} {seed}")
            wrong = verdict(make(rng, rows_of(rng)), folder)
            tried += 1
            lost += [f"{kind}, seed {seed}: {wrong[:2000]}"] if wrong else []
    tally("a damaged or odd table", tried, lost)


# --- properties -------------------------------------------------------------------------------

ODD = st.sampled_from(["x", "y z", "größe", "a;b", "c,d", 'say "no"', "0", "10", "é=1"])
PEOPLE = st.sampled_from(["P1", "P2", "p-1", "P 1", "1", "10", "01a", "1a", "Weiß", "Weiss"])
TABLE = st.lists(st.tuples(ODD, PEOPLE), min_size=len(FILES), max_size=len(FILES)).filter(
    lambda rows: len({label for label, _ in rows}) > 1
)
fair = settings(
    max_examples=30, deadline=None, derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)  # fmt: skip


def read(folder: Path, text: str) -> list[tuple[str, str, str | None]]:
    path = folder / "written.csv"
    path.write_text(text, encoding="utf-8", newline="")
    images = open_table(path)
    assert not images.faults
    names = images.card.class_names
    return [(one.file, names[int(one.label)], one.patient) for one in images.records]  # type: ignore[arg-type]


@fair
@given(TABLE, st.sampled_from(",;\t"), st.sampled_from(["\n", "\r\n"]), st.booleans())
def test_what_a_writer_writes_is_what_is_read(
    folder: Path, rows: list[tuple[str, str]], separator: str, end: str, quoted: bool
) -> None:
    table = [[file, *row] for file, row in zip(FILES, rows, strict=True)]
    quoting = csv.QUOTE_ALL if quoted else csv.QUOTE_MINIMAL
    text = written(table, HEADER[:3], delimiter=separator, lineterminator=end, quoting=quoting)
    assert read(folder, text) == [tuple(row) for row in table]


@fair
@given(TABLE, st.permutations(range(len(FILES))), st.permutations(range(3)))
def test_the_order_of_rows_and_columns_decides_nothing(
    folder: Path, rows: list[tuple[str, str]], order: list[int], columns: list[int]
) -> None:
    table = [[file, *row] for file, row in zip(FILES, rows, strict=True)]
    moved = [[table[index][column] for column in columns] for index in order]
    first = read(folder, written(table, HEADER[:3]))
    other = read(folder, written(moved, [HEADER[column] for column in columns]))
    assert [first[index] for index in order] == other


@fair
@given(st.lists(st.integers(0, 4), min_size=8, max_size=8), st.integers(0, 99))
def test_a_split_of_a_table_tears_no_patient(folder: Path, people: list[int], seed: int) -> None:
    table = [[file, LABELS[n % 2], f"P{people[n]}"] for n, file in enumerate(FILES)]
    path = folder / "people.csv"
    path.write_text(written(table, HEADER[:3]))
    images = open_table(path)
    splits = assign_splits(images, val_fraction=0.25, test_fraction=0.25, seed=seed)
    held = {(one.patient, split) for one, split in zip(images.records, splits, strict=True)}
    assert len(held) == len(set(people))


WORD = st.text("abAB01 -_.é", min_size=1, max_size=6).map(str.strip)


@fair
@given(WORD.filter(lambda word: any(c.isalnum() for c in word)), st.integers(0, 5))
def test_one_word_in_two_spellings_is_found(word: str, how: int) -> None:
    number = word.isdecimal()
    odd = [
        f"{word}\u200b", unicodedata.normalize("NFD", word), word.swapcase(), f"\u2060{word}",
        f"00{word}" if number else word, f"{word}.0" if number else word,
    ][how]  # fmt: skip
    assert other_spellings([word, "somebody else", odd]) == ({2: 0} if odd != word else {})


@fair
@given(st.lists(st.text("abc123", min_size=1, max_size=4), min_size=2, max_size=6, unique=True))
def test_two_patients_are_not_one(words: list[str]) -> None:
    assert other_spellings([f"1{word}" for word in words]) == {}


# --- where data lie ---------------------------------------------------------------------------


def put(path: Path, value: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", (6, 6), value).save(path, "PNG")
    return path


def opened(dataset: Path, within: Path | None = None):
    return open_source(str(dataset), cache=None, offline="error", seed=0, within=within)


def test_a_root_widens_on_purpose(tmp_path: Path) -> None:
    for value, name in enumerate(("store/a.png", "store/b.png", "set/b/b.png", "set/own.png")):
        put(tmp_path / name, value)
    (tmp_path / "set/a").symlink_to("../store")
    table = tmp_path / "set/t.csv"
    table.write_text("file,label\n../store/a.png,x\nown.png,y\na/b.png,y\n")
    assert [fault.what for fault in opened(table).faults] == [
        f"'{name}' leads out of {tmp_path}/set" for name in ("../store/a.png", "a/b.png")
    ]
    images = opened(table, tmp_path)
    assert not images.faults and not images.survey() and len(images) == 3
    said = f"2 names lead out of the data set, to places below {tmp_path} (data.root)"
    assert said in images.notes
    table.unlink()
    # Class folders likewise; a root that does not hold the place is no help.
    for within in (None, tmp_path / "set/b"):
        with pytest.raises(WaraError, match=r"(?s)only the class 'b'.*'a' leads out of"):
            opened(tmp_path / "set", within)
    images = opened(tmp_path / "set", tmp_path)
    assert [one.file for one in images.records] == ["a/a.png", "a/b.png", "b/b.png"]
    assert not images.faults and images.notes[-1].startswith("1 names lead out")
    with pytest.raises(WaraError, match="no such folder; data.root=") as caught:
        opened(tmp_path / "set", tmp_path / "gone")
    assert caught.value.kind == "config"


def test_the_root_of_a_config_reaches_the_data(tmp_path: Path) -> None:
    from wara.training.setup import open_images

    for value, name in enumerate(("a.png", "set/b.png")):
        put(tmp_path / name, value)
    table = tmp_path / "set/t.csv"
    table.write_text("file,label\n../a.png,x\nb.png,y\n")
    (tmp_path / "c.yaml").write_text(f"dataset: {table}\n")
    found = [
        len(open_images(load_config(tmp_path / "c.yaml", more)).faults)
        for more in ([], [f"data.root={tmp_path}"])
    ]
    assert found == [1, 0]


def test_a_folder_that_a_card_names_is_part_of_the_data(tmp_path: Path) -> None:
    for value, name in enumerate(("images/a.png", "images/b.png", "c.png")):
        put(tmp_path / name, value)
    (tmp_path / "set").mkdir()
    (tmp_path / "set/t.csv").write_text("id,label\na.png,x\nb.png,y\n../c.png,y\n")
    (tmp_path / "mine.yaml").write_text(
        "name: mine\ntitle: x\ntask: binary\n"
        "classes: [{name: x, meaning: x}, {name: y, meaning: y}]\n"
        "source: {kind: csv, path: set/t.csv, file_column: id, folder: ../images}\n"
    )
    images = opened(tmp_path / "mine.yaml")
    assert len(images) == 2 and not images.survey()
    assert [fault.what for fault in images.faults] == [
        f"'../c.png' leads out of {tmp_path}/images"
    ]


def test_a_class_folder_by_a_link_is_read_once(tmp_path: Path) -> None:
    for value, name in enumerate(("train/x/a.png", "train/y/b.png", "val/x/c.png", "val/y/d.png")):
        put(tmp_path / name, value)
    (tmp_path / "test").symlink_to("val")
    faults = opened(tmp_path).faults
    assert sorted(fault.what for fault in faults) == [
        f"a link to images of {tmp_path}/val/{name}, a class folder already" for name in "xy"
    ]
    (tmp_path / "test").unlink()
    (tmp_path / "train/z").symlink_to("../val")
    assert [Path(fault.where).name for fault in opened(tmp_path).faults] == ["z"]
    (tmp_path / "train/z").unlink()
    (tmp_path / "train/z").symlink_to("z")
    assert ["a link to nothing"] == [fault.what for fault in opened(tmp_path).faults]


def test_patients_of_file_names_in_two_spellings(tmp_path: Path) -> None:
    for value, name in enumerate(("x/P1_1.png", "x/p1_2.png", "y/P2_1.png")):
        put(tmp_path / name, value)
    (tmp_path / "mine.yaml").write_text(
        "name: mine\ntitle: x\ntask: binary\n"
        "classes: [{name: x, meaning: x}, {name: y, meaning: y}]\n"
        "source: {kind: folder, path: ., patient_pattern: '([A-Za-z0-9]+)_'}\n"
    )
    images = opened(tmp_path / "mine.yaml")
    (fault,) = images.faults
    assert fault.what == "patient 'p1' is 'P1' of x/P1_1.png in another spelling"
    assert fault.where.endswith("x/p1_2.png") and len(images) == 2


# --- what is no file --------------------------------------------------------------------------


def weights(path: Path) -> None:
    build_backbone("vit_tiny_patch16_224", num_classes=2, weights=str(path), offline="error")


def bundle(path: Path) -> None:
    path.rename(path.parent / "manifest.json")
    open_bundle(path.parent)


def beside_a_manifest(path: Path) -> None:
    path.rename(path.parent / "manifest.json")
    check_outside(path.parent, "--out")
    raise WaraError("artefact", "no bundle, so that it may be written to")


READERS: dict[str, tuple[Callable[[Path], object], set[str]]] = {
    "image": (read_bytes, {"data"}),
    "table": (open_table, {"data"}),
    "data set": (opened, {"config", "data"}),
    "config": (load_config, {"config"}),
    "weights": (weights, {"data", "artefact"}),
    "checkpoint": (read_checkpoint, {"artefact"}),
    "bundle": (bundle, {"artefact"}),
    "manifest": (beside_a_manifest, {"artefact"}),
    "table of a run": (storage.read_csv, {"artefact"}),
}


def no_files(tmp_path: Path) -> Iterator[Path]:
    for number in range(2):
        folder = tmp_path / str(number)
        folder.mkdir()
        path = folder / "x.csv"
        if number == 0:
            os.mkfifo(path)
        else:
            path.symlink_to("/dev/zero")
        yield path


@pytest.mark.parametrize("what", READERS)
@pytest.mark.parametrize("swapped", [False, True])
def test_pipes_and_devices_are_refused_and_not_waited_for(
    what: str, swapped: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tally
) -> None:
    reader, kinds = READERS[what]
    lost, tried = [], 0
    for path in no_files(tmp_path):
        with monkeypatch.context() as patch:
            if swapped:
                # A file when it was looked at, a pipe or a device when it is opened.
                patch.setattr(storage, "_check_regular", _once(storage._check_regular))
                patch.setattr(Path, "is_file", _file_at(path))
            tried += 1
            try:
                with watched():
                    reader(path)
                lost.append(f"{what}: {path} was read")
            except WaraError as error:
                if error.kind not in kinds:
                    lost.append(f"{what}: {error}")
            except BaseException as error:
                lost.append(f"{what}: {type(error).__name__}: {error}")
    tally("a pipe or a device in the place of a file", tried, lost)


def _file_at(path: Path) -> Callable[[Path], bool]:
    real, names = Path.is_file, {path.name, "manifest.json"}
    return lambda asked: asked.name in names or real(asked)


def _once(check: Callable[..., None]) -> Callable[..., None]:
    """The same check, which finds a file whatever it is asked about first."""
    asked: list[object] = []

    def found(status: os.stat_result, path: str | Path) -> None:
        asked.append(path)
        if len(asked) % 2 == 0:
            check(status, path)

    return found
