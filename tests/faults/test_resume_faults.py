"""A run with a damaged checkpoint or a lost file goes on as it was, or refuses by name."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from training_helpers import adapter_bytes, tiny_config, with_twins

from wara.config import RunConfig
from wara.errors import WaraError
from wara.runs.folder import RunFolder
from wara.runs.sealed import read_seal, sealed_files
from wara.signals import Stopped
from wara.training.checkpoint import digest, find_best, load_checkpoint, put_back, read_last
from wara.training.run import run_here

EPOCHS = 3


@pytest.fixture(autouse=True)
def _no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("wara.runs.results._figures", lambda *_: None)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with `run`, which is finished, and `half`, as it was after the epoch before the last.

    Both are of one config, which says `run`; so `half` is copied there to be gone on with.
    """
    folder = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("wara.runs.results._figures", lambda *_: None)

        def stop(_: object, epoch: int) -> None:
            if epoch == EPOCHS - 1:
                raise Stopped(15)

        with_twins(folder)
        config = _config(folder)
        with pytest.raises(Stopped):
            run_here(config, quiet=True, watch=stop)
        shutil.copytree(folder / "run", folder / "half")
        run_here(config, quiet=True, resume=True)
    return folder


def _config(folder: Path) -> RunConfig:
    # Accuracy of the first epoch is beaten later, so that there is an older best one.
    return tiny_config(folder, epochs=EPOCHS, monitor="auc_macro")


def _damage(path: Path, dice: random.Random) -> str:
    """Flip bits, cut, overwrite or empty a file at a random place; returns what was done."""
    data = bytearray(path.read_bytes())
    place = dice.randrange(len(data))
    kind = dice.choice(["flip", "cut", "zero"])
    if kind == "flip":
        data[place] ^= 1 << dice.randrange(8)
    elif kind == "cut":
        del data[place:]
    else:
        data[place : place + 512] = bytes(len(data[place : place + 512]))
    path.unlink()  # its other name, if it has one, is not what is damaged
    path.write_bytes(data)
    return f"{path.name}: {kind} at {place}"


def test_no_damage_to_a_checkpoint_loads_another_state(
    home: Path, tmp_path: Path, amount: Callable[[int, int], int], tally: Callable[..., None]
) -> None:
    """`read_last` and `put_back` find the newest state, or the one before, or refuse."""
    half = RunFolder(home / "half")
    names = half.inside("checkpoints")
    there = [name for name in names if (half.last.parent / name).is_file()]
    assert {"last.ckpt", "previous.ckpt", "best.ckpt"} <= set(there)
    newest, older = (load_checkpoint(path) for path in (half.last, half.previous))
    identity = newest["identity"]
    wanted = {digest(newest): newest, digest(older): older}
    assert len(wanted) == 2 and newest["progress"]["epoch"] == older["progress"]["epoch"] + 1
    states = {c["progress"]["epoch"]: digest(c["state"]) for c in wanted.values()}
    dice = random.Random(6)
    for name in there:
        lost: list[str] = []
        tries = amount(4, 40)
        for number in range(tries):
            folder = RunFolder(tmp_path / f"{name}-{number}")
            shutil.copytree(half.path, folder.path)
            what = _damage(folder.path / "checkpoints" / name, dice)
            try:
                last = read_last(folder)
                assert last is not None
                put_back(folder, last, identity)
                if digest(last.content) not in wanted:
                    lost.append(f"{what}: another state")
                elif name != "last.ckpt" and digest(last.content) != digest(newest):
                    lost.append(f"{what}: an older state, with the newest whole")
                best = last.progress.best_epoch
                if digest(find_best(folder, last, identity)) != states.get(best):
                    lost.append(f"{what}: another best state")
                if load_checkpoint(folder.best)["epoch"] != best:
                    lost.append(f"{what}: best is of another epoch")
                if digest(load_checkpoint(folder.last)) != digest(last.content):
                    lost.append(f"{what}: the newest was not put back")
            except WaraError as error:
                if error.kind != "artefact" or not error.remedy:
                    lost.append(f"{what}: {error}")
            shutil.rmtree(folder.path)
        tally(f"damage to {name}", tries, lost)


@pytest.mark.parametrize("names", [["last.ckpt"], ["last.ckpt", "best.ckpt"]])
def test_a_damaged_newest_checkpoint_costs_one_epoch(
    home: Path, tmp_path: Path, names: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    config = _config(home).model_copy(update={"out": str(tmp_path / "run")})
    shutil.copytree(home / "half", tmp_path / "run")
    for name in names:
        path = tmp_path / "run/checkpoints" / name
        path.write_bytes(path.read_bytes()[:1000])
    run_here(config, quiet=True, resume=True)
    out = capsys.readouterr().out
    assert f"going on from the one before it, after epoch {EPOCHS - 2}" in out
    assert adapter_bytes(tmp_path / "run") == adapter_bytes(home / "run")
    assert read_seal(RunFolder(tmp_path / "run")) is not None


def test_all_checkpoints_damaged_is_refused(home: Path, tmp_path: Path) -> None:
    config = _config(home).model_copy(update={"out": str(tmp_path / "run")})
    shutil.copytree(home / "half", tmp_path / "run")
    for name in ("last.ckpt", "previous.ckpt"):
        path = tmp_path / "run/checkpoints" / name
        path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(WaraError, match="and so is the one before it") as caught:
        run_here(config, quiet=True, resume=True)
    assert caught.value.exit_code == 4 and "--overwrite" in caught.value.remedy


def test_a_state_without_its_config_is_refused(home: Path, tmp_path: Path) -> None:
    """Else another learning rate would go on with it and nobody would know."""
    config = _config(home).model_copy(update={"out": str(tmp_path / "run")})
    shutil.copytree(home / "half", tmp_path / "run")
    (tmp_path / "run/config.yaml").unlink()
    with pytest.raises(WaraError, match="config is gone") as caught:
        run_here(config, quiet=True, resume=True)
    assert caught.value.exit_code == 4


def test_a_finished_run_is_made_whole_or_refused_by_name(
    home: Path, amount: Callable[[int, int], int], tally: Callable[..., None],
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """Each file in turn is removed, or damaged."""
    folder, config = RunFolder(home / "run"), _config(home)
    files = {path: path.read_bytes() for path in sealed_files(folder)}
    assert {folder.pairs, folder.pairs_sheet} < set(files)
    sealed = folder.sealed.read_bytes()
    cases = [(path, how) for path in files for how in ("removed", "damaged")]
    dice = random.Random(7)
    dice.shuffle(cases)
    cases = cases[: amount(4, len(cases))]
    never = {folder.provenance, folder.last}  # nothing has what they say
    lost: list[str] = []
    for path, how in cases:
        name = path.relative_to(folder.path).as_posix()
        if how == "removed":
            path.unlink()
        else:
            _damage(path, dice)
        left = {p: p.read_bytes() for p in files if p.is_file()}
        try:
            run_here(config, quiet=True, resume=True)
            if {p: p.read_bytes() for p in files if p.is_file()} != files:
                lost.append(f"{name} {how}: other bytes")
            if f"made again, to the byte: {name}" not in capsys.readouterr().out:
                lost.append(f"{name} {how}: not told")
            if path in never:
                lost.append(f"{name} {how}: made of nothing")
        except WaraError as error:
            if name not in str(error) or (path not in never and path != folder.best):
                lost.append(f"{name} {how}: {error}")
            if {p: p.read_bytes() for p in files if p.is_file()} != left:
                lost.append(f"{name} {how}: refused, and files changed")
        finally:
            path.write_bytes(files[path])
        if folder.sealed.read_bytes() != sealed or list(folder.path.rglob(".*")):
            lost.append(f"{name} {how}: the folder is not as it was")
    tally("a file of a finished run removed or damaged", len(cases), lost)


def test_a_lost_list_of_files_is_written_again(home: Path) -> None:
    folder = RunFolder(home / "run")
    before = {p: p.read_bytes() for p in sealed_files(folder) if p != folder.provenance}
    folder.sealed.write_bytes(folder.sealed.read_bytes()[:-1] + b"x")
    (folder.adapter / "adapter_model.safetensors").unlink()
    run_here(_config(home), quiet=True, resume=True)
    assert read_seal(folder) is not None
    after = {p: p.read_bytes() for p in before}
    # How much memory the process took is another number in another process.
    del before[folder.metrics], after[folder.metrics], before[folder.report], after[folder.report]
    assert after == before
