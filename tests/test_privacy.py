"""What leaves the place of training names no patient, file, folder, machine or user."""

from __future__ import annotations

import json
import shutil
import socket
from pathlib import Path

import pytest
from training_helpers import CLASSES, make_images, make_weights, tiny_config

import wara
from wara.training.run import run_here

MARKS = ("Mueller", "PATIENT_", "SECRETHOST", "SECRETUSER", "STATION7")


def marked_folder(folder: Path) -> Path:
    """Textures in a folder, and in files, whose names say whose they are."""
    images = make_images(folder / "plain")
    data = folder / "PATIENT_Mueller_1957-03-02"
    for path in sorted((images / "images").iterdir()):
        label, number = path.stem.split("_")
        place = data / label
        place.mkdir(parents=True, exist_ok=True)
        shutil.move(path, place / f"PATIENT_Mueller_Hans_{label}{number}.png")
    assert {entry.name for entry in data.iterdir()} == set(CLASSES)
    return data


@pytest.fixture(scope="module")
def left(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The run folder and the bundle of a training at a marked place."""
    pytest.importorskip("onnxscript")
    from wara.deploy.export import export

    home = tmp_path_factory.mktemp("home") / "SECRETUSER" / "STATION7"
    home.mkdir(parents=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket, "gethostname", lambda: "SECRETHOST")
        for name in ("USER", "LOGNAME", "USERNAME"):
            patch.setenv(name, "SECRETUSER")
        patch.setattr("wara.runs.results._figures", lambda *_: None)
        patch.chdir(home)
        data = marked_folder(home)
        weights = make_weights(home / "weights_of_Mueller.safetensors")
        config = tiny_config(
            home, dataset=str(data), backbone__weights=str(weights), out=str(home / "run"),
            epochs=1, warmup_epochs=0.0, bootstrap=0,
            backbone__mean=(0.5, 0.5, 0.5), backbone__std=(0.5, 0.5, 0.5),
        )  # fmt: skip
        run_here(config)
        bundle = export(home / "run", home / "bundle", say=lambda _: None)
    return home / "run", bundle


def told(folder: Path) -> list[str]:
    """Return where in a folder a mark, or a path of this machine, stands."""
    words = [*MARKS, str(Path(wara.__file__).parents[1]), str(Path.home()), "/site-packages/"]
    found = []
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        data = path.read_bytes() if path.is_file() else b""
        found += [f"{name}: {word}" for word in words if len(word) > 4 and word in name]
        for word in words:
            forms = {word.encode(), word.encode("utf-16-le"), json.dumps(word)[1:-1].encode()}
            if len(word) > 4 and any(form in data for form in forms):
                found.append(f"{name}: {word}")
    return found


def test_the_run_folder_holds_names(left: tuple[Path, Path]) -> None:
    """As README says; so the marks are ones that would be found."""
    found = {mark.partition(": ")[2] for mark in told(left[0])}
    assert found >= {"Mueller", "PATIENT_", "SECRETHOST", "SECRETUSER"}


def test_the_adapter_holds_no_names(left: tuple[Path, Path]) -> None:
    assert any((left[0] / "adapter").iterdir())
    assert told(left[0] / "adapter") == []


def test_the_bundle_holds_no_names(left: tuple[Path, Path]) -> None:
    assert (left[1] / "model.onnx").is_file()
    assert told(left[1]) == []
    assert json.loads((left[1] / "manifest.json").read_text())["name"] == "local_wara"
