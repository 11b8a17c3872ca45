"""What several test files share: made once for each process that runs tests."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    """How many faults the tests of tests/faults try."""
    parser.addoption("--faults", choices=("sample", "full"), default="sample")


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


@pytest.fixture
def amount(request: pytest.FixtureRequest) -> Callable[[int, int], int]:
    """`amount(sample, full)`: how many faults of a kind to try in this run of the tests."""
    full = request.config.getoption("--faults") == "full"
    return lambda few, all_of_them: all_of_them if full else few


@pytest.fixture
def tally(request: pytest.FixtureRequest) -> Callable[..., None]:
    """`tally(kind, tried, lost)`: counted in the table at the end; fails when anything was lost.

    `lost` names each fault that was not survived, in a line.
    """

    def count(kind: str, tried: int, lost: list[str]) -> None:
        request.node.user_properties.append(("fault", [kind, tried, tried - len(lost)]))
        assert tried > 0, f"{kind}: nothing was tried"
        assert not lost, "\n".join([f"{kind}: {len(lost)} of {tried} lost", *lost[:20]])

    return count


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print tried and survived of every kind of fault."""
    table: dict[str, list[int]] = {}
    for reports in terminalreporter.stats.values():
        for report in reports:
            if getattr(report, "when", None) != "call":
                continue
            for name, value in report.user_properties:
                if name == "fault":
                    kind, tried, survived = value
                    row = table.setdefault(kind, [0, 0])
                    row[0] += tried
                    row[1] += survived
    if not table:
        return
    terminalreporter.section("faults: tried / survived")
    for kind, (tried, survived) in sorted(table.items()):
        terminalreporter.write_line(f"{kind:60} {tried:5} / {survived:5}")
