"""Checkpoints: whole or refused, and the old one stays until the new one is whole."""

from __future__ import annotations

import errno
import os
import zipfile
from pathlib import Path

import pytest
import torch

from wara.errors import WaraError
from wara.training.checkpoint import digest, load_checkpoint, save_checkpoint


@pytest.fixture
def content() -> dict:
    generator = torch.Generator().manual_seed(3)
    return {
        "state": {"a": torch.randn(3, 4, generator=generator), "b": torch.arange(5)},
        "optimiser": {"state": {0: {"step": torch.tensor(7.0)}}, "betas": (0.9, 0.999)},
        "progress": {"epoch": 2, "best": None, "history": [{"loss": 0.1}], "done": False},
        "half": torch.ones(2, dtype=torch.bfloat16),
        "empty": torch.empty(0),
    }


def test_round_trip_is_exact(tmp_path: Path, content: dict) -> None:
    path = tmp_path / "checkpoints" / "last.ckpt"
    save_checkpoint(path, content)
    back = load_checkpoint(path)
    assert back.keys() == content.keys()
    assert torch.equal(back["state"]["a"], content["state"]["a"])
    assert back["half"].dtype == torch.bfloat16
    assert back["optimiser"]["betas"] == (0.9, 0.999)
    assert back["progress"] == content["progress"]
    assert os.listdir(path.parent) == ["last.ckpt"]


def test_the_file_is_an_ordinary_safe_torch_file(tmp_path: Path, content: dict) -> None:
    path = tmp_path / "last.ckpt"
    save_checkpoint(path, content)
    assert torch.equal(torch.load(path, weights_only=True)["state"]["a"], content["state"]["a"])


def test_objects_are_not_saved(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    with pytest.raises(TypeError, match="plain values"):
        save_checkpoint(path, {"path": path})
    assert not list(tmp_path.iterdir())


def test_every_flipped_byte_is_noticed_or_harmless(tmp_path: Path, content: dict) -> None:
    path = tmp_path / "last.ckpt"
    save_checkpoint(path, content)
    intact = path.read_bytes()
    wanted, refused = digest(content), 0
    for place in range(0, len(intact), 7):
        damaged = bytearray(intact)
        damaged[place] ^= 0x40
        path.write_bytes(damaged)
        try:
            back = load_checkpoint(path)
        except WaraError as error:
            assert error.exit_code == 4
            refused += 1
        else:
            assert digest(back) == wanted
    assert refused > 20


def test_a_changed_tensor_in_a_sound_zip_is_refused(tmp_path: Path, content: dict) -> None:
    path = tmp_path / "last.ckpt"
    save_checkpoint(path, content)
    raw = torch.load(path, weights_only=True)
    raw["state"]["a"][0, 0] += 1e-3
    torch.save(raw, path)
    assert zipfile.ZipFile(path).testzip() is None
    with pytest.raises(WaraError, match="checksum") as caught:
        load_checkpoint(path)
    assert "--overwrite" in caught.value.remedy


@pytest.mark.parametrize("keep", [0, 10, 200, -30])
def test_truncated_and_foreign_files_are_refused(tmp_path: Path, content: dict, keep: int) -> None:
    path = tmp_path / "last.ckpt"
    save_checkpoint(path, content)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(WaraError) as caught:
        load_checkpoint(path)
    assert caught.value.exit_code == 4
    torch.save({"state_dict": {}}, path)
    with pytest.raises(WaraError, match="not a wara.checkpoint"):
        load_checkpoint(path)


def test_code_in_a_checkpoint_does_not_run(tmp_path: Path) -> None:
    class Payload:
        def __reduce__(self):  # noqa: ANN204
            return os.mkdir, (str(tmp_path / "owned"),)

    torch.save({"format": "wara.checkpoint/1", "x": Payload()}, tmp_path / "last.ckpt")
    with pytest.raises(WaraError):
        load_checkpoint(tmp_path / "last.ckpt")
    assert not (tmp_path / "owned").exists()


def test_a_full_disk_keeps_the_old_checkpoint(
    tmp_path: Path, content: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "last.ckpt"
    save_checkpoint(path, content)

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(WaraError) as caught:
        save_checkpoint(path, {**content, "epoch": 3})
    assert caught.value.exit_code == 5 and "space" in caught.value.remedy
    monkeypatch.undo()
    assert "epoch" not in load_checkpoint(path)
    assert os.listdir(tmp_path) == ["last.ckpt"]


def test_a_disk_that_gives_back_other_bytes_is_refused(
    tmp_path: Path, content: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "last.ckpt"
    monkeypatch.setattr("wara.training.checkpoint.file_sha256", lambda path: "0" * 64)
    with pytest.raises(WaraError, match="other bytes"):
        save_checkpoint(path, content)
    assert not list(tmp_path.iterdir())


def test_digest_tells_types_shapes_and_order_apart() -> None:
    values = [
        {}, [], None, True, 1, 1.0, "1", {"a": 1}, {"a": "1"}, [1, 2], [2, 1], [[1], 2],
        torch.ones(2), torch.ones(1, 2), torch.ones(2, dtype=torch.float64), {1: "a"}, {"1": "a"},
    ]  # fmt: skip
    assert len({digest(value) for value in values}) == len(values)
    assert digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1})
    assert digest((1, 2)) == digest([1, 2])
