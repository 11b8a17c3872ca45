"""`files.sha256`: the hash of every file of a finished run, written last.

It has the form of `sha256sum`, which checks it too (`sha256sum -c files.sha256`). Its first line, a
comment there, is the hash of the lines below it, so that a damaged list is not taken for damaged
files.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from wara.errors import WaraError
from wara.runs.folder import RunFolder
from wara.storage import file_sha256, write_text

_LINE = re.compile(r"([0-9a-f]{64})  (.+)")


def sealed_files(run: RunFolder) -> Iterator[Path]:
    """Yield the files of a finished run, apart from its log and those of the loggers."""
    yield from (run.config, run.provenance, run.splits, run.pairs, run.curves, run.metrics)
    yield run.report
    yield from (run.predictions("val"), run.predictions("test"))
    yield from (run.adapter / name for name in run.inside("adapter"))
    yield from (run.last, run.best)
    yield from (path for path in (run.pairs_sheet,) if path.is_file())
    yield from (path for name in run.inside("plots") if (path := run.plots / name).is_file())


def seal_run(run: RunFolder) -> None:
    """Write the list of a run that is finished."""
    lines = [
        f"{file_sha256(path)}  {path.relative_to(run.path).as_posix()}"
        for path in sorted(sealed_files(run))
    ]
    write_text(run.sealed, "\n".join([f"# {_sha256_of(lines)}", *lines]))


def read_seal(run: RunFolder) -> dict[str, str] | None:
    """Return name -> hash; None where there is no list, or where it is damaged itself."""
    try:
        first, *lines = run.sealed.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError):
        return None
    found = [_LINE.fullmatch(line) for line in lines]
    if first != f"# {_sha256_of(lines)}":
        return None
    return {match[2]: match[1] for match in found if match}


def altered(run: RunFolder, files: Mapping[str, str]) -> list[str]:
    """Return the names whose file is gone or has other bytes."""
    return [name for name, wanted in files.items() if _sha256(run.path / name) != wanted]


def seal_of_results(run: RunFolder) -> dict[str, str]:
    """Return name -> hash of what a finished run gave, without its checkpoints.

    Raises:
        WaraError: kind "artefact" when the run has no list, or is not as it says.
    """
    results = {name: wanted for name, wanted in _list_of(run).items() if "checkpoints/" not in name}
    _check(run, results)
    return results


def check_all(run: RunFolder) -> int:
    """Check every file of a finished run, and return how many there are.

    Checkpoints may have been removed, not changed.

    Raises:
        WaraError: kind "artefact" when the run has no list, or is not as it says.
    """
    files = _list_of(run)
    there = {n: h for n, h in files.items() if "checkpoints/" not in n or (run.path / n).exists()}
    _check(run, there)
    return len(there)


def check_sealed(run: RunFolder, paths: Iterable[Path]) -> None:
    """Refuse files of a finished run that are not those that it ended with.

    Raises:
        WaraError: kind "artefact" when the run has no list, or is not as it says.
    """
    files = _list_of(run)
    names = [path.relative_to(run.path).as_posix() for path in paths]
    _check(run, {name: files.get(name, "") for name in names})


def _list_of(run: RunFolder) -> dict[str, str]:
    files = read_seal(run)
    if files is None:
        what, remedy = "the list of the run's files is gone or damaged", "finish it with --resume"
        raise WaraError("artefact", what, str(run.sealed), remedy)
    return files


def _check(run: RunFolder, files: Mapping[str, str]) -> None:
    for name in altered(run, files):
        what, remedy = "gone, or changed since the run ended", "make it again with --resume"
        raise WaraError("artefact", what, str(run.path / name), remedy)


def _sha256(path: Path) -> str | None:
    try:
        return file_sha256(path)
    except OSError:
        return None


def _sha256_of(lines: list[str]) -> str:
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()
