"""What several test files share: made once for each process that runs tests."""

from __future__ import annotations

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
