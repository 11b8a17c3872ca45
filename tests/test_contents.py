"""A bundle that is whole, sealed anew by somebody, and says what cannot be: refused when opened."""

from __future__ import annotations

import io
import json
import math
import zipfile
from pathlib import Path
from typing import Any, get_args

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from test_bundle import refusal, reseal

from wara import cards
from wara.cli import main
from wara.deploy import bundle as bundles
from wara.deploy import infer
from wara.deploy.bundle import open_bundle
from wara.deploy.contents import BITS, TASKS, read_statistics
from wara.deploy.predictor import Predictor
from wara.errors import WaraError

GONE = object()
LONG = [{"name": f"c{k}", "meaning": None} for k in range(2)]


def put(content: dict[str, Any], at: str, value: Any) -> None:
    """Set, or take away, a value of nested objects; an empty name is the whole."""
    *above, last = at.split(".")
    for key in above:
        content = content[key]
    if value is GONE:
        del content[last]
    else:
        content[last] = value


def test_words_are_those_of_cards() -> None:
    assert get_args(cards.Task) == TASKS and get_args(cards.Bits) == BITS


MANIFEST = [
    ("task", ["regression"]),
    ("classes", ["calm", [LONG[0]] * 3, [{"name": "a|b", "meaning": None}, *LONG],
                 [{"name": 1, "meaning": None}, *LONG], [{}, {}, {}]]),
    ("input.size", [GONE, "32", [32], [-32, 32], [32.0, 32], [True, 32], [100_000, 100_000],
                    [64, 64], 32]),
    ("input.mean", [GONE, [0.5], [0.5, 0.5, None], "0.5"]),
    ("input.std", [[0.5], [0.5, 0, 0.5], [0.5, -1, 0.5]]),
    ("input.interpolation", ["best", None, GONE]),
    ("input.bits", [99_999_999, "8", 8.0, True]),
    ("input.greys", ["grey", ["window"], None]),
    ("model.precision", ["float64"]),
    ("temperature", [0, -1, 1e-300, 10**400, 2.5]),
    ("operating_point", [{}]),
    ("operating_point.positive", [[], ["other"], ["rough", "rough"], "rough", [None],
                                  ["calm", "mixed", "rough"]]),
    ("operating_point.threshold", [None, "0.5", 1.5, -0.1, True, GONE]),
    ("operating_point.asked", [{}, {"sensitivity": None, "specificity": None}, GONE]),
    ("operating_point.test", [{"sensitivity": {}}, 1]),
    ("metrics.test", [GONE, {"accuracy": 0.5}]),
    ("backbone.architecture", [GONE]),
    ("method.head_params", ["many"]),
]  # fmt: skip
RELIABILITY = [
    ("temperature", [GONE, 2.5]),
    ("conformal", [GONE, {}, None]),
    ("conformal.threshold", ["0.5", 1.5, math.nan, math.inf, None]),
    ("ood.threshold", [math.nan, -1, "far", None]),
    ("ood.validation_scores", [[], [math.nan], ["1"], [3, 2, 1], None]),
]


def cases(table: list[tuple[str, list[Any]]]) -> list[Any]:
    return [
        pytest.param(at, value, id=f"{at}-{'gone' if value is GONE else str(value)[:30]}")
        for at, values in table for value in values
    ]  # fmt: skip


@pytest.mark.parametrize(("at", "value"), cases(MANIFEST))
def test_a_manifest_that_says_what_cannot_be(at: str, value: Any, copy: Path) -> None:
    content = json.loads((copy / bundles.MANIFEST).read_text())
    put(content, at, value)
    reseal(copy, **{at.split(".")[0]: content[at.split(".")[0]]})
    # Of a size that could be, only the graph tells that it is not its own.
    own = "images of 64 x 64 pixels" if value == [64, 64] else at
    assert own in str(refusal(copy))


def test_a_class_less_than_the_graph_has_logits(copy: Path) -> None:
    reseal(copy, classes=LONG, operating_point=None)
    assert "where the classes want 2 an image" in str(refusal(copy))
    reseal(copy, classes=LONG, operating_point=None, task="binary")
    assert "where the classes want 2 an image" in str(refusal(copy))
    reseal(copy, classes=[*LONG, {"name": "c", "meaning": None}], task="binary")
    assert "a binary task of 3 classes" in str(refusal(copy))


@pytest.mark.parametrize(("at", "value"), cases(RELIABILITY))
def test_a_reliability_that_says_what_cannot_be(at: str, value: Any, copy: Path) -> None:
    path = copy / "reliability.json"
    content = json.loads(path.read_text())
    put(content, at, value)
    path.write_text(json.dumps(content))
    reseal(copy)
    said = str(refusal(copy))
    assert str(path) in said
    # Null needs a reason, and NaN and Infinity are no JSON; else the value is named.
    assert any(word in said for word in (at, "neither a threshold nor a reason", "is no JSON"))


def test_reliability_that_is_no_json(copy: Path) -> None:
    for text in ("{}", "[]", "", '{"temperature": 1e999}'):
        (copy / "reliability.json").write_text(text)
        reseal(copy)
        refusal(copy)


# -- statistics of features ----------------------------------------------------------------------


def arrays(**named: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.savez(stream, **named)
    return stream.getvalue()


def packed() -> bytes:
    stream = io.BytesIO()
    square = np.zeros((64, 64), np.float32)
    np.savez_compressed(stream, means=square, whitening=square)
    return stream.getvalue()


def boastful() -> bytes:
    """A header of 4 TB before a few bytes."""
    stream, member = io.BytesIO(), io.BytesIO()
    header = {"descr": "<f4", "fortran_order": False, "shape": (1 << 20, 1 << 20)}
    np.lib.format.write_array_header_1_0(member, header)
    with zipfile.ZipFile(stream, "w") as archive:
        for name in ("means.npy", "whitening.npy"):
            archive.writestr(name, member.getvalue() + bytes(64))
    return stream.getvalue()


ONES = np.ones((2, 3), np.float32)
EYE = np.eye(3, dtype=np.float32)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "not a zip file"),
        (b"junk" * 100, "not a zip file"),
        (arrays(means=ONES), r"holds \['means.npy'\]"),
        (arrays(means=ONES, whitening=np.eye(4, dtype=np.float32)), "do not fit"),
        (arrays(means=ONES[0], whitening=EYE), "not a matrix"),
        (arrays(means=ONES.astype(object), whitening=EYE), "not a matrix of float32"),
        (arrays(means=np.full_like(ONES, np.nan), whitening=EYE), "not finite"),
        (arrays(means=ONES, whitening=np.full_like(EYE, np.inf)), "not finite"),
        (packed(), "is compressed"),
        (boastful(), r"\(1048576, 1048576\) in \d+ bytes"),
    ],
)
def test_statistics_that_are_none(data: bytes, said: str) -> None:
    with pytest.raises(WaraError, match=said) as caught:
        read_statistics(data, "x.npz")
    assert caught.value.exit_code == 4 and "\n" not in str(caught.value)


def test_statistics_are_read_as_they_were_written() -> None:
    by_columns = np.asfortranarray(np.arange(9, dtype=np.float32).reshape(3, 3))
    means, whitening = read_statistics(arrays(means=ONES, whitening=by_columns), "x.npz")
    assert (means == ONES).all() and (whitening == by_columns).all()


def test_statistics_of_features_of_another_width(copy: Path) -> None:
    (copy / "reliability.npz").write_bytes(arrays(means=ONES, whitening=EYE))
    reseal(copy)
    assert "features of the graph are" in str(refusal(copy))


# -- sizes -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["reliability.json", "reliability.npz", "model.onnx"])
def test_what_is_too_large_is_not_read(
    name: str, copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with (copy / name).open("r+b") as file:  # sparse: nothing of it is written
        file.truncate((2 << 30) + 1)
    said = json.loads((copy / bundles.MANIFEST).read_text())["files"]
    said[name] = {"sha256": "0" * 64, "bytes": (2 << 30) + 1}
    monkeypatch.setattr(bundles, "file_sha256", lambda path: pytest.fail(f"{path} was read"))
    manifest = json.loads((copy / bundles.MANIFEST).read_text()) | {"files": said}
    (copy / bundles.MANIFEST).write_bytes(bundles.canonical(bundles.seal(manifest)))
    assert "2,147,483,649 bytes, where" in str(refusal(copy))


def test_an_empty_hash_does_not_stand_for_a_file_of_another_size(copy: Path) -> None:
    manifest = json.loads((copy / bundles.MANIFEST).read_text())
    empty = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
    manifest["files"]["Dockerfile"] = {"sha256": empty, "bytes": 0}
    (copy / bundles.MANIFEST).write_bytes(bundles.canonical(bundles.seal(manifest)))
    with pytest.raises(WaraError, match="the file was changed"):
        open_bundle(copy)


# -- graphs ----------------------------------------------------------------------------------------


def rewrite(folder: Path, change: Any) -> None:
    path = folder / "model.onnx"
    proto = onnx.load(path)
    change(proto.graph)
    path.write_bytes(proto.SerializeToString())
    reseal(folder)


def test_a_graph_without_features(copy: Path) -> None:
    def drop(graph: Any) -> None:
        del graph.output[[output.name for output in graph.output].index("features")]

    rewrite(copy, drop)
    assert "gives ['logits'], not logits and features" in str(refusal(copy))


@pytest.mark.parametrize(("output", "value"), [("features", math.nan), ("logits", math.inf)])
def test_outputs_that_are_no_numbers_are_no_row(
    output: str, value: float, copy: Path, tmp_path: Path
) -> None:
    def spoil(graph: Any) -> None:
        for node in graph.node:
            node.output[:] = ["sound" if name == output else name for name in node.output]
            node.input[:] = ["sound" if name == output else name for name in node.input]
        graph.initializer.append(numpy_helper.from_array(np.float32([value]), "spoilt"))
        graph.node.append(onnx.helper.make_node("Add", ["sound", "spoilt"], [output]))

    rewrite(copy, spoil)
    pixels = np.zeros((1, 3, 32, 32), np.float32)
    with pytest.raises(WaraError, match=f"a {output[:-1]} is not finite") as caught:
        Predictor(copy).run(pixels)
    assert caught.value.exit_code == 6
    image = copy / "reference" / "0.png"
    assert main(["predict", str(copy), str(image), "--out", str(tmp_path / "x.csv")]) == 6
    assert not (tmp_path / "x.csv").exists()


def test_a_distance_that_is_no_number_is_beyond_the_limit(bundle: Path) -> None:
    predictor = Predictor(bundle)
    said = predictor.judge(np.zeros(3, np.float32), np.full(64, np.nan, np.float32))
    assert said["abstain"] is True


# -- files -----------------------------------------------------------------------------------------


def test_all_files_may_be_read_by_the_same_people(bundle: Path) -> None:
    assert len({p.stat().st_mode for p in bundle.rglob("*") if p.is_file()}) == 1


def test_a_file_that_may_not_be_read(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def closed(path: Path) -> str:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(bundles, "file_sha256", closed)
    with pytest.raises(WaraError, match="Permission denied.*chmod -R a[+]rX") as caught:
        open_bundle(bundle)
    assert caught.value.exit_code == 5


@pytest.mark.parametrize(
    "change",
    [{"images": []}, {"images": ["../manifest.json"] * 3}, {"logits": [[0.0]] * 3}, {"logits": 1},
     {"logits": [[math.nan] * 3] * 3}],
)  # fmt: skip
def test_a_reference_that_is_none(change: dict[str, Any], copy: Path) -> None:
    path = copy / "reference" / "reference.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    reseal(copy)
    assert main(["verify", str(copy)]) == 4


def test_an_old_python_is_told_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(infer.sys, "version_info", (3, 10, 4))
    assert infer.main([]) == 2
    said = "Python 3.10 is too old for this program; start it with Python 3.11 or newer"
    assert capsys.readouterr().err == f"error[usage]: {said}\n"
