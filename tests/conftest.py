"""What several test files share: made once for each process that runs tests."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of a small WaRA run; its run lies beside it. Copy it before changing it."""
    pytest.importorskip("onnxscript")
    from deploy_helpers import make_bundle

    from wara.deploy.export import Wish

    folder = tmp_path_factory.mktemp("bundle")
    return make_bundle(folder, Wish(positive=["rough"], sensitivity=0.8))


@pytest.fixture
def copy(bundle: Path, tmp_path: Path) -> Path:
    """A copy of the bundle that may be changed."""
    return Path(shutil.copytree(bundle, tmp_path / "copy"))
