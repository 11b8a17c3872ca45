"""A finished run whose files are gone or damaged: what can be made again is, to the byte."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from wara.adapters import load_adapter_state
from wara.config import load_config
from wara.errors import WaraError, WaraErrors
from wara.runs.folder import RunFolder
from wara.runs.pairs import write_pairs
from wara.runs.records import ProvenanceFile, read_record
from wara.runs.tables import write_curves, write_splits
from wara.storage import file_sha256, temp_name, write_bytes
from wara.training.checkpoint import check_identity, find_best, read_last, write_best
from wara.training.judge import evaluate
from wara.training.plan import describe
from wara.training.record import write_config, write_out
from wara.training.setup import Prepared

_REMEDY = "put the file back, or start again with --overwrite"


def refuse_lost(folder: RunFolder, lost: Sequence[str]) -> None:
    """Refuse a finished run that lacks what nothing can be made from again.

    Args:
        folder: of the run.
        lost: names of the files that are gone or damaged.

    Raises:
        WaraError: kind "artefact".
    """
    for path in (folder.provenance, folder.last):
        if path.relative_to(folder.path).as_posix() in lost:
            what = "the run is finished, but this file of it is gone or damaged"
            raise WaraError("artefact", what, str(path), _REMEDY)


def mend(
    run: Prepared,
    folder: RunFolder,
    lost: Sequence[str],
    wanted: Mapping[str, str],
    pause: Callable[[], None],
) -> None:
    """Make lost files of a finished run again, from its best epoch.

    They are made aside and put in place when all of them are what the run had written; else the
    folder stays as it is.

    Args:
        run: the run, prepared as for training.
        folder: of it, and it is held.
        lost: names of the files that are gone or damaged.
        wanted: name -> SHA-256 of what the run had written.
        pause: called before and after each batch; may raise, to stop.

    Raises:
        WaraError: kind "artefact", when the state of the best epoch is gone too, or what is made
            here has other bytes.
    """
    aside = RunFolder(temp_name(folder.path / "again"))
    try:
        aside.path.mkdir()
        if "config.yaml" in lost:
            write_config(aside.config, run)
            _put(aside, folder, ["config.yaml"], wanted)
        # What decides where and how fast a run goes stands in its report too.
        run = replace(run, config=load_config(folder.config).resolved(run.config.adapter))
        _make(run, folder, aside, pause)
        _put(aside, folder, [name for name in lost if name != "config.yaml"], wanted)
    finally:
        shutil.rmtree(aside.path, ignore_errors=True)


def _make(run: Prepared, folder: RunFolder, aside: RunFolder, pause: Callable[[], None]) -> None:
    """Write what follows from the checkpoints."""
    last = read_last(folder)
    assert last is not None  # `refuse_lost` saw it
    check_identity(last.content, run.identity, last.path)
    progress, synthetic = last.progress, run.images.synthetic
    state = find_best(folder, last, run.identity)
    write_best(aside, progress.best_epoch, run.identity, state)
    write_splits(aside.splits, run.rows, classes=run.classes, synthetic=synthetic)
    write_pairs(aside.path, run.images, run.rows)
    write_curves(aside.curves, progress.history, synthetic=synthetic)
    load_adapter_state(run.model, state)
    run.model.to(run.device.torch_name)
    peak = read_record(folder.provenance, ProvenanceFile)["peak_memory_mb"]
    splits = evaluate(run, pause=pause)
    write_out(aside, run, describe(run), splits, progress, peak)


def _put(
    aside: RunFolder, folder: RunFolder, names: Sequence[str], wanted: Mapping[str, str]
) -> None:
    """Put files in place that are, all of them, what the run had written."""
    made = [name for name in names if (aside.path / name).is_file()]
    other = [name for name in names if name not in made]
    other += [name for name in made if file_sha256(aside.path / name) != wanted[name]]
    if other:
        raise WaraErrors(
            [
                WaraError(
                    "artefact",
                    "gone or damaged, and what is made again here has other bytes",
                    str(folder.path / name),
                    _REMEDY,
                )
                for name in other
            ]
        )
    for name in names:
        write_bytes(folder.path / name, (aside.path / name).read_bytes())
