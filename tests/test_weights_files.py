"""A file of weights that is none, or not a sound one: an artefact refused, and nothing is run."""

from __future__ import annotations

import io
import json
import os
import pickle
import random
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save
from torch import Tensor

from wara.backbones import build_backbone
from wara.errors import WaraError, as_refusal

ADVICE = ("weights_only", "add_safe_globals", "safe_globals", "trust", "allow_pickle")
NAME = "blocks.0.attn.qkv.weight"


def state() -> dict[str, Any]:
    torch.manual_seed(0)
    return dict(timm.create_model("test_vit", img_size=32).state_dict())


def torch_bytes(content: Any, **options: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer, **options)
    return buffer.getvalue()


def header(content: Any, *, length: int | None = None, data: bytes = b"") -> bytes:
    """Return a safetensors file with any header."""
    text = content if isinstance(content, bytes) else json.dumps(content).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(start: int, end: int, shape: list[int], dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


def zipped(names: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in names.items():
            archive.writestr(name, data)
    return buffer.getvalue()


class Payload:
    """Leaves a file behind when it is unpickled."""

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return os.mkdir, ("weights_payload_was_run",)


def changed(name: str, make: Callable[[Tensor], Any]) -> Callable[[], bytes]:
    def content() -> bytes:
        whole = state()
        return torch_bytes(whole | {name: make(whole[name])})

    return content


def poisoned(value: float) -> Callable[[Tensor], Tensor]:
    def make(tensor: Tensor) -> Tensor:
        other = tensor.clone()
        other.view(-1)[-1] = value
        return other

    return make


def nested(depth: int) -> dict[str, Any]:
    inside: dict[str, Any] = {}
    for _ in range(depth):
        inside = {"model": inside}
    return inside


def circle() -> dict[str, Any]:
    ring: dict[str, Any] = {"patch_embed.proj.weight": torch.zeros(1)}
    ring["again"] = ring
    return ring


def without_storage() -> bytes:
    """Return a whole archive of torch whose tensors lie in files that are not there."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(torch_bytes(state()))) as there:
        with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
            for name in there.namelist():
                if "/data/" not in name:
                    archive.writestr(name, there.read(name))
    return buffer.getvalue()


def cut(data: Callable[[], bytes], share: float) -> Callable[[], bytes]:
    return lambda: data()[: int(len(data()) * share)]


def plain() -> bytes:
    return save(state())


def as_torch() -> bytes:
    return torch_bytes(state())


def legacy() -> bytes:
    return torch_bytes(state(), _use_new_zipfile_serialization=False)


KINDS: dict[str, Callable[[], bytes]] = {
    "empty": lambda: b"",
    "one byte": lambda: b"\x80",
    "text": lambda: b"the weights are on the other disk\n",
    "html": lambda: b"<!DOCTYPE html><html><body>Sign in</body></html>",
    "json": lambda: b'{"weights": []}',
    "git lfs": lambda: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
    "zeros": lambda: bytes(4096),
    "noise": lambda: random.Random(0).randbytes(4096),
    "gzip": lambda: b"\x1f\x8b\x08" + bytes(100),
    "hdf5": lambda: b"\x89HDF\r\n\x1a\n" + bytes(100),
    "zip of text": lambda: zipped({"readme.txt": b"hello"}),
    "zip of arrays": lambda: zipped({"a.npy": b"x"}),
    "zip of a pickle": lambda: zipped({"x/data.pkl": pickle.dumps({}), "x/version": b"3"}),
    "zip of code": lambda: zipped({"x/code/a.py": b"import os"}),
    "npz": lambda: b"PK\x05\x06" + bytes(18),
    "npy": lambda: b"\x93NUMPY\x01\x00v\x00" + bytes(200),
    "image": lambda: b"\x89PNG\r\n\x1a\n" + bytes(200),
    "pickle of a payload": lambda: pickle.dumps(Payload()),
    "torch file of a payload": lambda: torch_bytes({"model": Payload()}),
    "old torch file of a payload": lambda: torch_bytes(
        Payload(), _use_new_zipfile_serialization=False
    ),
    "payload beside weights": lambda: torch_bytes({"model": state(), "args": Payload()}),
    "payload for a tensor": changed(NAME, lambda tensor: Payload()),
    "pickle of text": lambda: pickle.dumps("weights"),
    "whole module": lambda: torch_bytes(torch.nn.Linear(2, 2)),
    "strings": lambda: torch_bytes({name: "weights" for name in state()}),
    "numbers": lambda: torch_bytes({name: 1.0 for name in state()}),
    "lists": lambda: torch_bytes([1, 2, 3]),
    "nothing": lambda: torch_bytes(None),
    "no tensors": lambda: torch_bytes({}),
    "int tensor": changed(NAME, lambda tensor: tensor.int()),
    "bool tensor": changed(NAME, lambda tensor: tensor > 0),
    "complex tensor": changed(NAME, lambda tensor: tensor.to(torch.complex64)),
    "float8 tensor": changed(NAME, lambda tensor: tensor.to(torch.float8_e4m3fn)),
    "sparse tensor": changed(NAME, lambda tensor: tensor.to_sparse()),
    "quantised tensor": changed(
        NAME, lambda tensor: torch.quantize_per_tensor(tensor, 0.1, 0, torch.qint8)
    ),
    "tensor without numbers": changed(NAME, lambda tensor: tensor.to("meta")),
    "string for a tensor": changed(NAME, lambda tensor: "weights"),
    "nan": changed(NAME, poisoned(float("nan"))),
    "infinity": changed(NAME, poisoned(float("inf"))),
    "nan in the position": changed("pos_embed", poisoned(float("nan"))),
    "transposed": changed(NAME, lambda tensor: tensor.T.contiguous()),
    "scalar": changed(NAME, lambda tensor: torch.tensor(1.0)),
    "scalar of the patches": changed("patch_embed.proj.weight", lambda t: torch.tensor(1.0)),
    "no entries": changed(NAME, lambda tensor: tensor[:0]),
    "no entries of the patches": changed("patch_embed.proj.weight", lambda t: t[:, :, :0]),
    "grey images": changed("patch_embed.proj.weight", lambda t: t[:, :1]),
    "position of one axis": changed("pos_embed", lambda t: t.reshape(-1)),
    "position of four axes": changed("pos_embed", lambda t: t[None]),
    "position of no token": changed("pos_embed", lambda t: t[:, :0]),
    "position of another width": changed("pos_embed", lambda t: t[..., :5]),
    "queries of another width": lambda: torch_bytes(
        {k: v for k, v in state().items() if k != NAME}
        | {
            NAME.replace("qkv", which): torch.zeros(64, 64 - place)
            for place, which in enumerate("qkv")
        }
    ),
    "queries of no axis": lambda: torch_bytes(
        {k: v for k, v in state().items() if k != NAME}
        | {NAME.replace("qkv", which): torch.tensor(0.0) for which in "qkv"}
    ),
    "a block less": lambda: save(
        {name: t for name, t in state().items() if not name.startswith("blocks.1.")}
    ),
    "a tensor less": lambda: save({k: v for k, v in state().items() if k != NAME}),
    "a tensor more": lambda: save(state() | {"blocks.0.extra": torch.zeros(1)}),
    "head alone": lambda: save({"head.weight": torch.zeros(3, 64)}),
    "blocks by words": lambda: torch_bytes(
        {name.replace("blocks.0", "blocks.first"): t for name, t in state().items()}
    ),
    "deep nesting": lambda: torch_bytes(nested(400)),
    "circle": lambda: torch_bytes(circle()),
    "no storage": without_storage,
    "truncated safetensors": cut(plain, 0.7),
    "truncated header": cut(plain, 0.01),
    "truncated torch file": cut(as_torch, 0.7),
    "truncated old torch file": cut(legacy, 0.7),
    "header of 8 exabytes": lambda: header({}, length=2**63 - 1),
    "header of 90 megabytes": lambda: header(b"{" + b" " * 90_000_000 + b"}"),
    "header past the end": lambda: header({}, length=1000),
    "header of deep nesting": lambda: header(b'{"a":' + b"[" * 200_000),
    "header without an end": lambda: header(b'{"a": {"dtype": "F32"'),
    "header of a list": lambda: header(b'{"a": [1, 2]}'),
    "offsets that overlap": lambda: header(
        {"a": entry(0, 8, [2]), "b": entry(4, 12, [2])}, data=bytes(12)
    ),
    "offsets past the end": lambda: header({"a": entry(0, 800, [200])}, data=bytes(8)),
    "offsets that go back": lambda: header({"a": entry(8, 0, [2])}, data=bytes(8)),
    "offsets below zero": lambda: header(json.dumps({"a": entry(-8, 0, [2])}).encode()),
    "shape that overflows": lambda: header({"a": entry(0, 8, [2**62, 2**62])}, data=bytes(8)),
    "another type": lambda: header({"a": entry(0, 8, [2], "F99")}, data=bytes(8)),
    "a key twice": lambda: header(
        b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},'
        b'"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}', data=bytes(4)
    ),
    "bytes after the end": lambda: plain() + bytes(64),
}  # fmt: skip


def refusal(path: Path) -> WaraError:
    """Return what a user is told who names the file; fails when it loads."""
    with pytest.raises(Exception) as caught:
        build_backbone("test_vit", num_classes=3, img_size=32, weights=path)
    return as_refusal(caught.value)


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_that_is_no_sound_weights_is_refused(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "given.pth"
    path.write_bytes(KINDS[kind]())
    said = refusal(path)
    assert said.exit_code == 4, said
    assert "\n" not in str(said) and said.remedy and str(path) in str(said)
    assert not any(word in str(said) for word in ADVICE), said
    assert [entry.name for entry in tmp_path.iterdir()] == ["given.pth"]


def test_there_are_more_than_forty_kinds() -> None:
    assert len(KINDS) > 40


def test_the_untouched_file_loads_in_each_form(tmp_path: Path) -> None:
    wanted = state()[NAME]
    for make in (plain, as_torch, legacy):
        path = tmp_path / "given.pth"
        path.write_bytes(make())
        model, _ = build_backbone("test_vit", num_classes=3, img_size=32, weights=path)
        assert torch.equal(model.state_dict()[NAME], wanted)


def test_what_is_of_no_use_to_the_model_may_be_anything(tmp_path: Path) -> None:
    path = tmp_path / "given.pth"
    torch.save({"model": state(), "queue": torch.zeros(3).to_sparse(), "epoch": 3}, path)
    build_backbone("test_vit", num_classes=3, img_size=32, weights=path)


@pytest.mark.parametrize("code", ["EACCES", "EIO", "ESTALE"])
@pytest.mark.parametrize("format", ["safetensors", "torch"])
def test_a_file_that_the_system_does_not_give_is_a_fault_of_storage(
    code: str, format: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import errno

    path = tmp_path / "given"
    path.write_bytes(plain() if format == "safetensors" else as_torch())
    error = OSError(getattr(errno, code), os.strerror(getattr(errno, code)), str(path))

    def fail(*_: Any, **__: Any) -> None:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr("wara.backbones.reading.open_regular", fail)
        said = refusal(path)
    assert said.exit_code == 5 and error.strerror in str(said) and str(path) in str(said)
    reader = "load_file" if format == "safetensors" else "torch.load"
    monkeypatch.setattr(f"wara.backbones.reading.{reader}", fail)
    said = refusal(path)
    assert said.exit_code == 5 and error.strerror in str(said)


def test_mutants_of_a_header_never_crash(tmp_path: Path) -> None:
    """Bits of the header and of the pickle are flipped; what loads nevertheless is finite."""
    draw, whole = random.Random(3), {"a": plain(), "b": as_torch()}
    for number in range(60):
        form = "ab"[number % 2]
        data = bytearray(whole[form])
        for _ in range(draw.randint(1, 4)):
            data[draw.randrange(min(len(data), 6000))] ^= 1 << draw.randrange(8)
        path = tmp_path / form
        path.write_bytes(data)
        try:
            model, _ = build_backbone("test_vit", num_classes=3, img_size=32, weights=path)
        except Exception as error:
            said = as_refusal(error)
            assert said.exit_code == 4 and "\n" not in str(said), (number, said)
            assert not any(word in str(said) for word in ADVICE), said
        else:
            assert all(torch.isfinite(t).all() for t in model.state_dict().values())
