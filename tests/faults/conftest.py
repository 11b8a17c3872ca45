"""What the tests of signals and kills share: a server of commands, and an undisturbed run."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from forked import Forks
from training_helpers import tiny_config

from wara.config import dump_config


@pytest.fixture(scope="session")
def forks() -> Iterator[Forks]:
    """A server that starts commands."""
    server = Forks()
    yield server
    server.close()


@pytest.fixture(scope="session")
def whole(forks: Forks, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with `tiny.yaml`, and `run`, which was trained without interruption."""
    folder = tmp_path_factory.mktemp("whole")
    # Dropout, augmentation, accumulation with a short last window: everything that counts or draws.
    config = tiny_config(
        folder, accumulate=2, backbone__drop_path_rate=0.1, out=None,
        backbone__mean=[0.5] * 3, backbone__std=[0.5] * 3,
        adapter={"method": "wara", "rank": 2, "level": 1, "dropout": 0.1},
    )  # fmt: skip
    (folder / "tiny.yaml").write_text(dump_config(config))
    words = "train", "--cfg", str(folder / "tiny.yaml"), "--out", str(folder / "run")
    command = forks.start(*words, log=folder / "log")
    assert command.wait() == 0, command.text
    return folder
