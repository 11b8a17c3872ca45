"""Where an adapter folder may lie: links, mounts, the folder one works in, shut folders."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import wara
from wara import storage
from wara.adapters import read_adapter
from wara.errors import WaraError

NAMES = ["adapter_config.json", "adapter_model.safetensors"]


def model(rank: int) -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 5), nn.GELU(), nn.Linear(5, 4))
    return wara.adapt(net, wara.LoRA(rank=rank, targets=("*",)))


def save(rank: int, folder: str | Path) -> None:
    wara.save_adapter(model(rank), folder)


def export(rank: int, folder: str | Path) -> None:
    wara.export_peft(model(rank), folder)


def rank_in(folder: Path) -> int:
    config = json.loads((folder / NAMES[0]).read_text())
    rank: int = config["r"] if "r" in config else config["options"]["rank"]
    return rank


both = pytest.mark.parametrize("write", [save, export])
Write = Callable[[int, str | Path], None]


def assert_holds(folder: Path, *names: str) -> None:
    assert sorted(entry.name for entry in folder.iterdir()) == sorted(names)


def assert_clean(folder: Path, *others: str) -> None:
    assert_holds(folder, *NAMES, *others)


@both
@pytest.mark.parametrize("name", [".", "..", "./x/../y"])
def test_the_folder_one_works_in(
    write: Write, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = tmp_path / "above" / "here"
    here.mkdir(parents=True)
    target = Path(os.path.normpath(here / name))
    monkeypatch.chdir(here)
    for rank in (1, 2):
        write(rank, name)
        assert rank_in(target) == rank
        assert Path.cwd() == here and os.path.samefile(".", here)
        assert_clean(target, *{"..": ["here"]}.get(name, []))
    Path("still").write_text("here")
    assert (here / "still").read_text() == "here"


@both
def test_a_link_to_a_folder_is_kept(write: Write, tmp_path: Path) -> None:
    real, link = tmp_path / "store" / "real", tmp_path / "link"
    real.mkdir(parents=True)
    (real / "note").write_text("kept")
    link.symlink_to(real, target_is_directory=True)
    for rank in (1, 2):
        write(rank, link)
        assert link.is_symlink() and link.resolve() == real.resolve()
        assert rank_in(real) == rank and (real / "note").read_text() == "kept"
    assert_clean(real, "note")
    assert_holds(tmp_path, "link", "store")
    ahead = tmp_path / "ahead"
    ahead.symlink_to(tmp_path / "store" / "later")
    write(3, ahead)
    assert ahead.is_symlink() and rank_in(tmp_path / "store" / "later") == 3


@both
@pytest.mark.parametrize("mode", [0o700, 0o750, 0o2775])
def test_the_mode_is_kept(write: Write, mode: int, tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    folder.mkdir()
    folder.chmod(mode)
    for rank in (1, 2):
        write(rank, folder)
        assert stat.S_IMODE(folder.stat().st_mode) == mode and rank_in(folder) == rank


@both
@pytest.mark.parametrize("fault", ["mount", "no exchange", "shut parent"])
def test_a_folder_that_cannot_move_gets_its_files_one_by_one(
    write: Write, fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "parent" / "adapter"
    folder.mkdir(parents=True)
    (folder / "note").write_text("kept")
    (folder / "sub").mkdir()
    before = folder.stat().st_ino
    ismount, access, replace = os.path.ismount, os.access, os.replace
    if fault == "mount":
        monkeypatch.setattr(os.path, "ismount", lambda path: path == folder or ismount(path))
    elif fault == "shut parent":
        monkeypatch.setattr(
            os, "access", lambda path, mode: path != folder.parent and access(path, mode)
        )
    else:
        monkeypatch.setattr(storage, "_exchanged", lambda fresh, old: False)
    order: list[str] = []

    def noted(source: Any, target: Any) -> None:
        order.append(Path(target).name)
        replace(source, target)

    monkeypatch.setattr(os, "replace", noted)
    for rank in (1, 2):
        order.clear()
        write(rank, folder)
        assert order == [NAMES[1], NAMES[0]]  # the checksums come last
        assert rank_in(folder) == rank and folder.stat().st_ino == before
    assert (folder / "note").read_text() == "kept"
    assert_clean(folder, "note", "sub")
    assert_holds(folder.parent, "adapter")


def test_a_kill_between_the_two_files_is_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    save(1, ".")
    replace = os.replace

    def killed(source: Any, target: Any) -> None:
        if Path(target).suffix == ".json":
            raise KeyboardInterrupt
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            save(2, ".")
    assert_clean(tmp_path)
    assert read_adapter(".").options["rank"] == 1
    with pytest.raises(WaraError, match="checksum does not agree"):
        wara.load_adapter(wara.unload(model(1)), ".")


def test_what_else_lies_there_is_not_copied(tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    (folder / "sub").mkdir(parents=True)
    (folder / "sub" / "large").write_bytes(b"x" * 1000)
    (folder / "link").symlink_to("sub")
    (folder / "dangling").symlink_to("nowhere")
    before = (folder / "sub" / "large").stat().st_ino
    save(1, folder)
    assert (folder / "sub" / "large").stat().st_ino == before
    assert os.readlink(folder / "link") == "sub" and os.readlink(folder / "dangling") == "nowhere"
    assert_clean(folder, "sub", "link", "dangling")


def test_a_file_in_the_place_is_refused(tmp_path: Path) -> None:
    (tmp_path / "adapter").write_text("a file")
    with pytest.raises(WaraError, match="cannot write") as caught:
        save(1, tmp_path / "adapter")
    assert caught.value.kind == "storage"
    assert (tmp_path / "adapter").read_text() == "a file"
    assert_holds(tmp_path, "adapter")
