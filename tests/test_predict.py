"""From files to rows: three ways give the same, nothing is lost, what was said is recorded."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
import torch
from PIL import Image
from test_images import dicom

import wara
from wara.cli import main
from wara.deploy.inputs import expand
from wara.deploy.output import Output
from wara.deploy.places import open_locked
from wara.deploy.predictor import Predictor
from wara.deploy.trace import verify_trace
from wara.errors import WaraError
from wara.runs.load import load_run


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images of several kinds, one of them damaged."""
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for i in range(9):
        grey = rng.integers(0, 255, (30 + i, 40), dtype=np.uint8)
        Image.fromarray(grey).save(folder / f"{i}.png")
    (folder / "6.png").write_bytes((folder / "6.png").read_bytes()[:200])
    data = dicom(rng.integers(0, 4096, (32, 32)).astype("u2"), BitsStored=12)
    (folder / "study").mkdir()
    (folder / "study" / "object").write_bytes(data)
    (folder / "notes.txt").write_text("no image")
    return folder


def rows(path: Path, *without: str) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return [{k: v for k, v in row.items() if k not in without} for row in csv.DictReader(file)]


def program(bundle: Path, *words: str, **env: str) -> subprocess.CompletedProcess[str]:
    """Run the program of a bundle as a hospital does: no wara on the path but its own."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | env
    command = [sys.executable, "-I", str(bundle / "infer.py"), *words]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def test_the_three_ways_give_the_same_rows(bundle: Path, images: Path, tmp_path: Path) -> None:
    done = program(bundle, str(images), "--out", str(tmp_path / "a.csv"))
    assert done.returncode == 3 and "1 of 10 images could not be read" in done.stderr
    said = main(["predict", str(bundle), str(images), "--out", str(tmp_path / "b.csv"), "--quiet"])
    assert said == 3
    mine = [p.row for p in Predictor(bundle).predict(expand([str(images)]).paths)]
    assert rows(tmp_path / "a.csv", "milliseconds") == rows(tmp_path / "b.csv", "milliseconds")
    text = [
        {k: "" if v is None else str(v).lower() if isinstance(v, bool) else str(v)
         for k, v in row.items() if k != "milliseconds"}
        for row in mine
    ]  # fmt: skip
    assert text == rows(tmp_path / "a.csv", "milliseconds")
    assert not list(bundle.rglob("*.pyc"))


def test_the_program_uses_the_files_of_its_bundle(bundle: Path) -> None:
    code = (
        "import sys; sys.argv = ['infer.py']; sys.path.insert(0, sys.argv[0]);"
        f"import runpy; m = runpy.run_path({str(bundle / 'infer.py')!r});"
        "m['_own_package'](); import wara.images, wara.deploy.predictor;"
        "print(wara.images.__file__); print(wara.deploy.predictor.__file__)"
    )
    done = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True)
    found = done.stdout.split()
    assert found == [str(bundle / "images.py"), str(bundle / "wara/deploy/predictor.py")]
    own = Path(wara.__file__).parent / "images.py"
    assert own.read_bytes() == (bundle / "images.py").read_bytes()


def test_predictions_are_those_of_the_run(bundle: Path) -> None:
    """The rows say of the run's test images what its table says, but for the temperature."""
    run = load_run(bundle.parent / "run")
    table = run.predictions("test")
    folder = bundle.parent / "data"
    predictor = Predictor(bundle)
    found = list(predictor.predict([folder / file for file in table.files]))
    logits = np.stack([p.logits for p in found if p.logits is not None])
    np.testing.assert_allclose(logits, table.predictions.logits, atol=1e-4)
    scaled = torch.tensor(table.predictions.logits) / predictor.bundle.manifest["temperature"]
    probs = torch.softmax(scaled.double(), -1).numpy()
    for row, wanted in zip((p.row for p in found), probs, strict=True):
        said = [row[f"prob_{name}"] for name in predictor.classes]
        np.testing.assert_allclose(said, wanted, atol=1e-4)
        assert row["prediction"] == predictor.classes[int(wanted.argmax())]
        limit = predictor.bundle.manifest["operating_point"]["threshold"]
        assert row["decision"] == ("positive" if wanted[2] >= limit else "negative")


# -- what is named ------------------------------------------------------------------------------


def test_files_folders_patterns_and_lists(images: Path, tmp_path: Path) -> None:
    listed = tmp_path / "list.txt"
    listed.write_text(f"{images / '3.png'}\n\n{images / '1.png'}\n")
    assert [p.name for p in expand([f"@{listed}"]).paths] == ["3.png", "1.png"]
    assert [p.name for p in expand([str(images / "[0-2].png")]).paths] == [
        "0.png",
        "1.png",
        "2.png",
    ]
    found = expand([str(images / "2.png"), str(images)])
    assert [p.name for p in found.paths][:3] == ["2.png", "0.png", "1.png"]
    assert len(found.paths) == 10 and found.paths[-1].name == "object"
    assert found.notes == [f"{images}: left out: 1 .txt"]


@pytest.mark.parametrize("words", [[], ["@nothing.txt"], ["empty"], ["*.nothing"]])
def test_nothing_to_predict_is_a_usage_fault(words: list[str], tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    os.chdir(tmp_path)
    with pytest.raises(WaraError) as caught:
        expand(words)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("empty", "no image in the folder"),
        ("notes", "no image in the folder (left out: 1 .txt)"),
        ("*.nothing", "nothing matches the pattern"),
        ("emp*", "no image in what the pattern matches"),
        ("@blank.txt", "no path in the list"),
        ("@listed.txt", "a list within a list"),
        ("@pattern.txt", "nothing matches the pattern"),
        ("@binary.txt", "the list is no text of paths"),
        ("", "an empty path"),
    ],
)  # fmt: skip
def test_each_word_names_an_image(
    word: str, said: str, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("empty", "notes"):
        Path(name).mkdir()
    Path("notes/a.txt").write_text("no image")
    Path("blank.txt").write_text("\n \n")
    Path("listed.txt").write_text(f"{images / '0.png'}\n @blank.txt\n")
    Path("pattern.txt").write_text(f"{images / '0.png'}\nno*where.png\n")
    Path("binary.txt").write_bytes(b"\x89PNG\0\0")
    with pytest.raises(WaraError) as caught:
        expand([str(images / "0.png"), word])
    assert caught.value.exit_code == 2 and caught.value.what == said
    named = "no*where.png" if word == "@pattern.txt" else word.removeprefix("@")
    assert named in caught.value.where


def test_a_file_named_two_ways_is_one_row(images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(images)
    found = expand(["0.png", "./0.png", "study/../0.png", str(images / "0.png"), "."])
    assert [str(path) for path in found.paths][:2] == ["0.png", "1.png"]
    assert len(found.paths) == 10


def test_a_file_that_is_not_there_is_a_row(bundle: Path, tmp_path: Path) -> None:
    (one,) = Predictor(bundle).predict([tmp_path / "gone.png"])
    assert one.row["error"].startswith("no such file") and one.row["prediction"] is None


def test_a_pipe_is_refused_and_not_waited_for(bundle: Path, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    (one,) = Predictor(bundle).predict([tmp_path / "pipe.png"])
    assert one.row["error"].startswith("not a regular file")


# -- rows on disk -------------------------------------------------------------------------------


def predict(bundle: Path, *words: Any) -> int:
    return main(["predict", str(bundle), *map(str, words), "--quiet"])


def test_the_forms_hold_the_same(bundle: Path, images: Path, tmp_path: Path) -> None:
    for form in ("csv", "jsonl", "json"):
        assert predict(bundle, images, "--out", tmp_path / f"x.{form}", "--allow-partial") == 0
    lines = [json.loads(line) for line in (tmp_path / "x.jsonl").read_text().splitlines()]
    whole = json.loads((tmp_path / "x.json").read_text())
    for row in (*lines, *whole):
        row.pop("milliseconds")
    assert lines == whole and len(whole) == 10
    first = rows(tmp_path / "x.csv")[0]
    assert float(first["prob_calm"]) == whole[0]["prob_calm"] and first["abstain"] in (
        "true",
        "false",
    )


def test_a_call_that_was_stopped_goes_on(
    bundle: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert predict(bundle, images, "--out", tmp_path / "whole.csv", "--allow-partial") == 0
    seen: list[int] = []
    real = Predictor.run

    def stops(self: Predictor, pixels: np.ndarray) -> Any:
        seen.append(len(pixels))
        if len(seen) == 3:
            raise KeyboardInterrupt
        return real(self, pixels)

    out = tmp_path / "rows.csv"
    words = [images, "--out", out, "--allow-partial", "--batch-size", 2]
    monkeypatch.setattr(Predictor, "run", stops)
    assert predict(bundle, *words) == 130
    assert not out.exists()
    monkeypatch.undo()
    part = tmp_path / ".rows.csv.part"
    whole = part.read_bytes()
    part.write_bytes(whole + b'{"row": "cut sho')

    def stops_again(self: Output, content: dict[str, Any]) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Output, "_line", stops_again)
    assert predict(bundle, *words, "--resume") == 130
    assert part.read_bytes() == whole  # no row is written again, so none can be lost
    monkeypatch.undo()
    assert predict(bundle, *words, "--resume") == 0
    assert rows(out, "milliseconds") == rows(tmp_path / "whole.csv", "milliseconds")
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


def test_what_cannot_be_resumed(bundle: Path, images: Path, tmp_path: Path) -> None:
    out = tmp_path / "rows.csv"
    assert predict(bundle, images, "--out", out, "--resume") == 2
    (tmp_path / ".rows.csv.part").write_text('{"model": "another"}\n')
    assert predict(bundle, images, "--out", out, "--resume") == 2


@pytest.mark.parametrize("line", ["{", '{"row": {}, "report": null}', "\udcff", "[]"])
def test_damaged_rows_are_not_continued(
    line: str, bundle: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    def stops(self: Predictor, pixels: np.ndarray) -> Any:
        raise KeyboardInterrupt

    words = [images, "--out", tmp_path / "rows.csv"]
    monkeypatch.setattr(Predictor, "run", stops)
    assert predict(bundle, *words) == 130
    part = tmp_path / ".rows.csv.part"
    part.write_bytes(part.read_bytes() + os.fsencode(line) + b"\n")
    assert predict(bundle, *words, "--resume") == 4
    assert "damaged in line 2" in capsys.readouterr().err
    assert part.read_bytes().endswith(os.fsencode(line) + b"\n")


# -- places that would destroy something ----------------------------------------------------------


@pytest.mark.parametrize("way", ["verb", "program"])
@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["in.png", "--out", "in.png"], "--out is also read"),
        (["in.png", "--out", "link.png"], "--out is also read"),
        (["@li.txt", "--out", "li.txt"], "--out is also read"),
        (["folder", "--out", "x", "--dicom-sr", "folder"], "--dicom-sr is also read"),
        (["in.png", "--out", "x.csv", "--trace", "in.png"], "--trace is also read"),
        (["in.png", "--out", "same", "--trace", "./same"], "--out and --trace are the same"),
        (["in.png", "--out", "x", "--trace", ".x.part"], "and --trace are the same place"),
        (["in.png", "--out", "folder"], "--out is a folder"),
        (["in.png", "--out", "x.csv", "--trace", "folder"], "--trace is a folder"),
        (["in.png", "--out", "x.csv", "--dicom-sr", "li.txt"], "--dicom-sr is no folder"),
        (["folder", "--out", "x.csv", "--dicom-sr", "folder/sr"], "--dicom-sr lies in a folder"),
    ],
)  # fmt: skip
def test_no_output_takes_the_place_of_something(
    words: list[str], said: str, way: str, bundle: Path, images: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    shutil.copy(images / "0.png", "in.png")
    os.symlink("in.png", "link.png")
    Path("li.txt").write_text("in.png\n")
    Path("folder").mkdir()
    shutil.copy(images / "0.png", "folder")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    if way == "verb":
        code, told = predict(bundle, *words), capsys.readouterr().err
    else:
        done = program(bundle, *words)
        code, told = done.returncode, done.stderr
    assert code == 2 and said in told
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}


def test_overlays_do_not_go_into_a_file(bundle: Path, images: Path, tmp_path: Path) -> None:
    pytest.importorskip("captum")
    (tmp_path / "file").write_text("mine")
    words = [images / "0.png", "--out", tmp_path / "x.csv", "--explain", tmp_path / "file"]
    assert predict(bundle, *words) == 2
    assert not (tmp_path / "x.csv").exists() and (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("verb", ["export", "calibrate", "evaluate", "predict"])
@pytest.mark.parametrize("place", ["bundle", "run"])
def test_nothing_is_written_into_a_bundle_or_a_run(
    verb: str, place: str, bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = bundle.parent / "run"
    model = run if verb == "export" else bundle
    out = bundle.parent / place / "deep" / "x"
    data = {"predict": [bundle.parent / "data"], "export": []}
    named = data.get(verb, ["--data", bundle.parent / "data"])
    assert main([verb, *map(str, (model, *named, "--out", out))]) == 2
    kind = {"bundle": "a bundle", "run": "a run folder"}[place]
    assert f"--out lies inside {kind}" in capsys.readouterr().err
    assert not out.parent.exists()


def test_two_calls_do_not_write_one_file(
    bundle: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trace, one = tmp_path / "trace.jsonl", images / "0.png"
    with open_locked(trace):
        assert predict(bundle, one, "--out", tmp_path / "x.csv", "--trace", trace) == 8
    with open_locked(tmp_path / ".x.csv.part"):
        assert predict(bundle, one, "--out", tmp_path / "x.csv") == 8
        assert program(bundle, str(one), "--out", str(tmp_path / "x.csv")).returncode == 8
    assert "another call writes this file" in capsys.readouterr().err
    assert predict(bundle, one, "--out", tmp_path / "x.csv", "--trace", trace) == 0
    assert verify_trace(trace)


@pytest.mark.parametrize("way", ["verb", "program"])
def test_names_that_are_no_text_and_names_that_are_formulas(
    way: str, bundle: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    odd = os.fsdecode(b"M\xfcller.png")
    for name in (odd, "=1+1.png", "plain.png"):
        shutil.copy(images / "0.png", name)
    Path("list.txt").write_bytes(b"M\xfcller.png\n=1+1.png\nplain.png\n")
    for form in ("csv", "json"):
        words = ["@list.txt", "--out", f"x.{form}", "--trace", "trace"]
        done = predict(bundle, *words) if way == "verb" else program(bundle, *words).returncode
        assert done == 0
    found = [row["file"] for row in json.loads(Path("x.json").read_text())]
    assert found == [odd, "=1+1.png", "plain.png"]
    assert [row["file"] for row in rows(Path("x.csv"))] == [
        "M\\udcfcller.png", "'=1+1.png", "plain.png"
    ]  # fmt: skip


@pytest.mark.parametrize("option", ["--out", "--trace", "--dicom-sr"])
def test_nothing_is_written_into_a_bundle(
    bundle: Path, images: Path, tmp_path: Path, option: str
) -> None:
    words = [images, option, bundle / "rows.csv"]
    words += [] if option == "--out" else ["--out", tmp_path / "rows.csv"]
    assert predict(bundle, *words) == 2


def test_no_place_for_the_rows(bundle: Path, images: Path, tmp_path: Path) -> None:
    assert predict(bundle, images) == 2
    assert predict(bundle, images, "--out", tmp_path / "no" / "rows.csv") == 5


# -- abstaining ---------------------------------------------------------------------------------


def test_what_is_unlike_the_training_images_is_abstained_on(bundle: Path, tmp_path: Path) -> None:
    Image.fromarray(np.zeros((32, 32), np.uint8)).save(tmp_path / "black.png")
    (one,) = Predictor(bundle).predict([tmp_path / "black.png"])
    assert one.row["ood_percentile"] == 100.0 and one.row["abstain"] is True
    assert one.row["abstain_reason"] == "unlike the training images"
    (one,) = Predictor(bundle, abstain_on=()).predict([tmp_path / "black.png"])
    assert one.row["abstain"] is False


def test_conformal_sets_and_ambiguity(bundle: Path) -> None:
    predictor = Predictor(bundle, abstain_on=("ambiguous",))
    limit = predictor.reliability["conformal"]["threshold"]
    features = np.zeros(64, np.float32)
    for logits in (np.array([9.0, 0, 0]), np.array([1.0, 1.0, 1.0]), np.array([3.0, 2.9, -9])):
        said = predictor.judge(logits, features)
        probs = predictor.probabilities(logits)
        wanted = [c for c, p in zip(predictor.classes, probs, strict=True) if p >= 1 - limit]
        assert said["conformal_set"] == "|".join(wanted)
        assert said["abstain"] is (len(wanted) != 1)


def test_an_unknown_reason_to_abstain(bundle: Path) -> None:
    with pytest.raises(WaraError, match="no reason 'x' to abstain") as caught:
        Predictor(bundle, abstain_on=("x",))
    assert caught.value.exit_code == 2


def test_none_and_a_reason_to_abstain_exclude_each_other(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image = next((bundle.parent / "data/images").glob("*.png"))
    words = ["predict", str(bundle), str(image), "--out", str(tmp_path / "rows.csv")]
    assert main([*words, "--abstain-on", "none", "--abstain-on", "ambiguous"]) == 2
    assert "none and ambiguous" in capsys.readouterr().err
    assert main([*words, "--abstain-on", "none"]) == 0


# -- traces -------------------------------------------------------------------------------------


def test_a_trace_records_what_was_said_without_names(bundle: Path, tmp_path: Path) -> None:
    private = tmp_path / "MUELLER_Erika_19500101"
    private.mkdir()
    # No digits alone: hashes and UIDs may hold any four.
    tags = {"PatientName": "MUELLER^Erika", "PatientID": "P-4711", "PatientBirthDate": "19500101"}
    pixels = np.random.default_rng(0).integers(0, 4096, (32, 32)).astype("u2")
    (private / "a.dcm").write_bytes(dicom(pixels, BitsStored=12, **tags))
    (private / "b.dcm").write_bytes(dicom(pixels, BitsStored=12, **tags)[:-900])
    trace = tmp_path / "trace.jsonl"
    words = [private, "--out", tmp_path / "rows.csv", "--trace", trace, "--allow-partial"]
    assert predict(bundle, *words) == 0
    assert predict(bundle, *words) == 0  # a second call goes on with the chain
    text = trace.read_text()
    for secret in ("MUELLER", "Erika", "P-4711", "19500101", "a.dcm", str(private)):
        assert secret not in text
    lines = [json.loads(line) for line in text.splitlines()]
    assert [line["kind"] for line in lines] == ["open", "prediction", "prediction", "close"] * 2
    uid = pydicom.dcmread(private / "a.dcm").SOPInstanceUID
    assert lines[1]["sop_instance_uid"] == uid and lines[1]["probabilities"]["calm"] is not None
    assert lines[2]["error"].startswith("data: ")
    assert main(["verify", str(trace)]) == 0


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda lines: [*lines[:2], lines[2].replace('"kind"', '"kinD"'), *lines[3:]], "line 3"),
        (lambda lines: [*lines[:2], *lines[3:]], "before line 3 a line was removed"),
        (lambda lines: [lines[0], lines[2], lines[1], *lines[3:]], "before line 2 a line"),
        (lambda lines: [*lines[:3], lines[2], *lines[3:]], "before line 4 a line"),
        (lambda lines: [lines[0].replace("false", "true", 1), *lines[1:]], "line 1 was changed"),
        (lambda lines: [*lines, "{}"], "line 6 is no line of a trace"),
    ],
)  # fmt: skip
def test_a_trace_that_is_not_whole_names_the_line(
    change: Any, said: str, bundle: Path, images: Path, tmp_path: Path
) -> None:
    trace = tmp_path / "trace.jsonl"
    words = [images / "0.png", images / "1.png", images / "2.png"]
    assert predict(bundle, *words, "--out", tmp_path / "x.csv", "--trace", trace) == 0
    trace.write_text("\n".join(change(trace.read_text().splitlines())) + "\n")
    with pytest.raises(WaraError, match=said):
        verify_trace(trace)
    assert main(["verify", str(trace)]) == 4
    assert predict(bundle, *words, "--out", tmp_path / "y.csv", "--trace", trace) == 4


SECRETS = ("DOE", "JANE", "MRN1")


@pytest.mark.parametrize("way", ["verb", "program"])
def test_no_value_of_a_header_leaves_it(
    way: str, bundle: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Text where a number, a code or a UID belongs, as in headers that were filled by hand."""
    folder = tmp_path / "in"
    folder.mkdir()
    pixels = np.random.default_rng(0).integers(0, 4096, (32, 32)).astype("u2")
    data = dicom(pixels, BitsStored=12, WindowCenter="2000", WindowWidth="400", RescaleSlope="1")
    for keyword, vr in (
        ("SOPInstanceUID", "UI"), ("PhotometricInterpretation", "CS"), ("VOILUTFunction", "CS"),
        ("RescaleSlope", "DS"), ("PresentationLUTShape", "CS"), ("NumberOfFrames", "IS"),
        ("WindowWidth", "DS"), ("PixelRepresentation", "LO"), ("PlanarConfiguration", "LO"),
    ):  # fmt: skip
        dataset = pydicom.dcmread(io.BytesIO(data))
        element = pydicom.DataElement(keyword, "LO", "DOE JANE MRN1")
        dataset[keyword] = element
        element.VR = vr if vr != "DS" and vr != "IS" else "LO"
        dataset.save_as(folder / f"{keyword}.dcm")
    out, trace = tmp_path / "x.csv", tmp_path / "trace"
    words = [str(folder), "--out", str(out), "--trace", str(trace), "--allow-partial"]
    if way == "verb":
        assert predict(bundle, *words) == 0
        told = "".join(capfd.readouterr())
    else:
        done = program(bundle, *words)
        told = done.stdout + done.stderr
        assert done.returncode == 0, told
    made = rows(out)
    assert len(made) == 9 and sum(bool(row["error"]) for row in made) >= 5
    for text in (told, trace.read_text(), out.read_text()):
        assert not [secret for secret in SECRETS if secret in text]
    lines = [json.loads(line) for line in trace.read_text().splitlines()][1:-1]
    told_by = {line["error"] for line in lines}
    assert told_by == {None, "data: the image could not be read"}


def test_a_torn_last_line_is_set_aside(bundle: Path, images: Path, tmp_path: Path) -> None:
    trace = tmp_path / "trace.jsonl"
    words = [images / "0.png", "--out", tmp_path / "x.csv", "--trace", trace]
    assert predict(bundle, *words) == 0
    whole = trace.read_bytes()
    for torn in (whole.splitlines()[1][:50], b"\0" * 7):
        trace.write_bytes(trace.read_bytes() + torn)
        assert main(["verify", str(trace)]) == 4
        assert predict(bundle, *words) == 0
        assert main(["verify", str(trace)]) == 0
        opened = json.loads(trace.read_bytes().splitlines()[-3])
        named = {"sha256": hashlib.sha256(torn).hexdigest(), "bytes": len(torn)}
        assert opened["kind"] == "open" and opened["torn"] == named
        assert (tmp_path / "trace.jsonl.torn").read_bytes().endswith(torn + b"\n")
    assert trace.read_bytes().startswith(whole)
    trace.write_bytes(trace.read_bytes()[:-1])  # the line is whole but for its end
    assert predict(bundle, *words) == 0 and main(["verify", str(trace)]) == 0


@pytest.mark.parametrize("text", ["my notes", "a line\nmy notes", '{"kind": "other'])
def test_a_file_that_is_no_trace_is_left_as_it_is(
    text: str, bundle: Path, images: Path, tmp_path: Path
) -> None:
    trace = tmp_path / "notes.txt"
    trace.write_text(text)
    assert predict(bundle, images / "0.png", "--out", tmp_path / "x.csv", "--trace", trace) == 4
    assert trace.read_text() == text and not (tmp_path / "notes.txt.torn").exists()


def test_a_bug_shows_its_traceback_on_demand(bundle: Path, images: Path, tmp_path: Path) -> None:
    words = [str(tmp_path / "gone" / "x.csv"), str(images / "0.png")]
    for debug in ([], ["--debug"]):
        done = program(bundle, "--out", *words, *debug)
        assert done.returncode == 5 and ("Traceback" in done.stderr) is bool(debug)


def test_memory_does_not_grow_with_the_number_of_files(bundle: Path, images: Path) -> None:
    """Readings ahead of the network are a window, not the whole list."""
    alive: list[int] = []

    class Counted(Predictor):
        def read(self, source: Path) -> Any:
            alive.append(1)
            return super().read(source)

    predictor = Counted(bundle)
    for done, _ in enumerate(predictor.predict([images / "0.png"] * 100, batch_size=4)):
        assert len(alive) <= done + 1 + 3 * 4


def test_a_synthetic_model_says_so(bundle: Path, images: Path, tmp_path: Path) -> None:
    from test_bundle import reseal

    copy = Path(shutil.copytree(bundle, tmp_path / "copy"))
    reseal(copy, synthetic=True)
    done = program(copy, str(images / "0.png"), "--out", str(tmp_path / "x.csv"))
    assert done.returncode == 0 and "SYNTHETIC" in done.stderr
    assert rows(tmp_path / "x.csv")[0]["synthetic"] == "true"
