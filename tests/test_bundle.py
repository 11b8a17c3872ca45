"""A bundle: whole to the last byte or refused, and nothing in it is run or followed."""

from __future__ import annotations

import json
import os
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from wara.deploy.bundle import MANIFEST, canonical, describe_files, open_bundle, seal
from wara.deploy.onnx_check import check_onnx
from wara.deploy.predictor import Predictor, session
from wara.deploy.verify import verify
from wara.errors import WaraError


def reseal(folder: Path, **changes: Any) -> None:
    """Write a manifest that is whole in itself, as somebody would who wants to deceive."""
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest |= {"files": describe_files(folder)} | changes
    (folder / MANIFEST).write_bytes(canonical(seal(manifest)))


def refusal(folder: Path) -> WaraError:
    with pytest.raises(WaraError) as caught:
        Predictor(folder)
    assert caught.value.exit_code == 4 and "\n" not in str(caught.value)
    return caught.value


def test_a_bundle_is_whole_and_agrees_with_its_reference(bundle: Path) -> None:
    lines = list(verify(bundle))
    assert "files are as they were exported" in lines[0] and "3 images" in lines[1]


@pytest.mark.parametrize("seed", range(30))
def test_any_changed_byte_is_refused(seed: int, copy: Path) -> None:
    draw = random.Random(seed)
    path = draw.choice(sorted(p for p in copy.rglob("*") if p.is_file()))
    data = bytearray(path.read_bytes())
    place = draw.randrange(len(data))
    data[place] ^= 1 << draw.randrange(8)
    path.write_bytes(data)
    refusal(copy)


@pytest.mark.slow
def test_two_hundred_changed_bytes_are_two_hundred_refusals(copy: Path) -> None:
    draw = random.Random(0)
    files = sorted(p for p in copy.rglob("*") if p.is_file())
    for number in range(200):
        path = files[number % len(files)] if number < len(files) else draw.choice(files)
        whole = path.read_bytes()
        place = draw.randrange(len(whole))
        changed = (
            whole[:place] + bytes([whole[place] ^ draw.randrange(1, 256)]) + whole[place + 1 :]
        )
        path.write_bytes(changed)
        refusal(copy)
        path.write_bytes(whole)
    open_bundle(copy)


def test_a_missing_and_an_additional_file_are_refused(copy: Path) -> None:
    (copy / "notes.txt").write_text("mine")
    assert "not of the bundle: notes.txt" in str(refusal(copy))
    (copy / "notes.txt").unlink()
    (copy / "MODEL_CARD.md").unlink()
    assert "lacks MODEL_CARD.md" in str(refusal(copy))


def test_links_are_refused(copy: Path, tmp_path: Path) -> None:
    shutil.move(copy / "Dockerfile", tmp_path / "Dockerfile")
    os.symlink(tmp_path / "Dockerfile", copy / "Dockerfile")
    assert "a link or device" in str(refusal(copy))


@pytest.mark.parametrize(
    "name", ["../x", "/etc/passwd", "a/../../x", "a\\b", "c:x", "", "./x", "a//b"]
)
def test_names_that_leave_the_folder_are_refused(name: str, copy: Path) -> None:
    manifest = json.loads((copy / MANIFEST).read_text())
    files = {**manifest["files"], name: {"sha256": "0" * 64, "bytes": 1}}
    reseal(copy, files=files)
    assert "leaves the folder" in str(refusal(copy))


def test_blanks_and_order_of_the_manifest_are_part_of_it(copy: Path) -> None:
    path = copy / MANIFEST
    path.write_text(json.dumps(json.loads(path.read_text())))
    assert "the manifest was changed" in str(refusal(copy))


@pytest.mark.parametrize("text", ["", "{", "[]", '{"format": "other"}', "[" * 100_000])
def test_a_manifest_that_is_none(text: str, copy: Path) -> None:
    (copy / MANIFEST).write_text(text)
    refusal(copy)


def test_a_manifest_that_is_too_large_is_not_read(copy: Path) -> None:
    with (copy / MANIFEST).open("r+b") as file:
        file.truncate(1 << 32)
    assert "a manifest of 4,294,967,296 bytes" in str(refusal(copy))


def test_another_form_says_so(copy: Path) -> None:
    reseal(copy, version=2)
    assert "a bundle of form 2, this reads form 1" in str(refusal(copy))


@pytest.mark.parametrize("key", ["classes", "input", "temperature", "synthetic", "files"])
def test_a_manifest_without_what_is_needed(key: str, copy: Path) -> None:
    reseal(copy, **{key: None})
    assert f"lacks {key}" in str(refusal(copy))


def test_no_bundle_at_all(tmp_path: Path) -> None:
    assert "this is no bundle" in str(refusal(tmp_path))


# -- ONNX ---------------------------------------------------------------------------------------


def model(domain: str = "", external: bool = False, training: bool = False) -> bytes:
    weight = helper.make_tensor("w", TensorProto.FLOAT, [2], np.ones(2, "f4").tobytes(), raw=True)
    if external:
        weight.ClearField("raw_data")
        weight.data_location = TensorProto.EXTERNAL
        entry = weight.external_data.add()
        entry.key, entry.value = "location", "/etc/passwd"
    node = helper.make_node("Add", ["x", "w"], ["y"], domain=domain)
    graph = helper.make_graph(
        [node], "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [2])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [2])],
        [weight],
    )  # fmt: skip
    opsets = [helper.make_opsetid("", 20)]
    opsets += [helper.make_opsetid(domain, 1)] if domain else []
    made = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    if training:
        made.training_info.add().algorithm.CopyFrom(graph)
    return made.SerializeToString()


def test_steps_of_a_training_are_refused() -> None:
    with pytest.raises(WaraError, match="holds steps of a training"):
        session(model(training=True), "m")


def test_external_data_in_a_default_of_a_function_is_found() -> None:
    for external in (False, True):
        proto = onnx.load_from_string(model(external=external))
        function = helper.make_function("", "f", ["x"], ["y"], [], [helper.make_opsetid("", 20)])
        function.attribute_proto.append(helper.make_attribute("w", proto.graph.initializer[0]))
        made = onnx.load_from_string(model())
        made.functions.append(function)
        if not external:
            check_onnx(made.SerializeToString(), "m")
    with pytest.raises(WaraError, match="reads tensors from other files"):
        check_onnx(made.SerializeToString(), "m")


def test_a_plain_graph_is_accepted(bundle: Path) -> None:
    check_onnx(model(), "m")
    check_onnx((bundle / "model.onnx").read_bytes(), "m")


def test_external_data_is_refused_before_anything_is_loaded() -> None:
    with pytest.raises(WaraError, match="reads tensors from other files"):
        session(model(external=True), "m")


def test_operators_of_its_own_are_refused() -> None:
    with pytest.raises(WaraError, match="operators of its own: evil.ops"):
        session(model(domain="evil.ops"), "m")


def nested(data: bytes) -> bytes:
    """The same tensor, inside the branch of an If inside a function."""
    proto = onnx.load_from_string(data)
    branch = helper.make_graph([proto.graph.node[0]], "b", [], [proto.graph.output[0]],
                               list(proto.graph.initializer))  # fmt: skip
    node = helper.make_node("If", ["c"], ["y"], then_branch=branch, else_branch=branch)
    outer = helper.make_graph([node], "g", [], [proto.graph.output[0]])
    return helper.make_model(outer, ir_version=10).SerializeToString()


def test_external_data_in_a_branch_is_found() -> None:
    check_onnx(nested(model()), "m")
    with pytest.raises(WaraError, match="reads tensors from other files"):
        check_onnx(nested(model(external=True)), "m")


@pytest.mark.parametrize("data", [b"\xff" * 50, b"\x3a\xff\xff\xff\xff\x0f", b"\x3b\x01"])
def test_bytes_that_are_no_onnx(data: bytes) -> None:
    with pytest.raises(WaraError, match="not an ONNX file"):
        check_onnx(data, "m")


def test_a_model_that_onnxruntime_cannot_use_is_refused(copy: Path) -> None:
    (copy / "model.onnx").write_bytes(model()[:40])
    reseal(copy)
    refusal(copy)
