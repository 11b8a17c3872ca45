"""The story of one process of a run: prepare, plan, fit, evaluate, write."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from wara.config import RunConfig
from wara.data.imageset import ImageSet
from wara.errors import WaraError, as_refusal, out_of_memory
from wara.runs import exact
from wara.runs.folder import RunFolder
from wara.runs.sealed import altered, read_seal
from wara.signals import StopSignals
from wara.training.checkpoint import read_last
from wara.training.console import Console, silence_libraries
from wara.training.judge import evaluate
from wara.training.mend import mend, refuse_lost
from wara.training.plan import Plan, describe
from wara.training.record import Record
from wara.training.resume import changes_since, check_config, check_finished, facts_here
from wara.training.setup import Prepared, kernels, pick_device, prepare
from wara.training.tracking import settle


def run_here(
    config: RunConfig,
    *,
    rank: int = 0,
    resume: bool = False,
    overwrite: bool = False,
    dry_run: bool = False,
    quiet: bool = False,
    allow: Sequence[str] = (),
    opened: Callable[[RunConfig], ImageSet] | None = None,
    watch: Callable[[Prepared, int], None] | None = None,
    confirm: Callable[[Prepared], None] = lambda run: None,
    micro: Sequence[Sequence[int]] = (),
) -> Path:
    """Be one process of a run, from its config to its folder; see `wara.training.start.run`.

    Args:
        config: of the run.
        rank: number of this process.
        resume: see `run`, and so are the next four.
        overwrite: see `run`.
        dry_run: see `run`.
        quiet: see `run`.
        allow: see `run`.
        opened: see `prepare`.
        watch: called with the run and the number of the epoch after each epoch; it may look at the
            model, and must leave it as it is.
        confirm: called with the run before anything is trained or written; may raise.
        micro: how many images at a time an earlier run of this config computed, from which batch
            on, see `Progress.micro`.
    """
    silence_libraries()
    exact.check_names(allow)
    folder, first = RunFolder(config.folder), rank == 0
    with (
        StopSignals() as stop,
        kernels(config.deterministic),
        Console(quiet=quiet, enabled=first) as console,
        stop.outranking(),
    ):
        tracking = settle(config.wandb)
        if first:
            folder.check(resume=resume, overwrite=overwrite)
        again = resume and folder.is_run
        sealed = read_seal(folder) if resume else None
        lost = altered(folder, sealed or {})
        refuse_lost(folder, lost)
        if first and not (again or sealed or dry_run):
            folder.check_writable()

        def check(wanted: RunConfig) -> None:
            """Refuse what can be refused before all images are read."""
            if again and "config.yaml" not in lost:
                check_config(folder, wanted, allow)
            if resume and sealed is None and (last := read_last(folder)) is not None:
                changes_since(last, facts_here(pick_device(wanted), wanted.devices), allow)

        with _memory_refused():
            run = prepare(
                config,
                report_dir=None if dry_run else folder.path.parent,
                confirm=check,
                opened=opened,
                known=dry_run,
            )
        confirm(run)
        plan = describe(run)
        console.plan(plan.warnings(), plan.lines())
        if dry_run:
            console.say("dry run: all checks passed, nothing was trained or written")
        elif sealed is not None:
            check_finished(folder, run)
            if lost and first:
                record = Record(run, folder, console, tracking, first=first, resume=resume)
                with record.kept(overwrite=False):
                    stop.check()
                    mend(run, folder, lost, sealed, pause=stop.check)
                console.final(f"made again, to the byte: {', '.join(lost)}")
            console.final(f"already finished: {folder.path}")
        else:
            record = Record(
                run, folder, console, tracking, first=first, resume=resume, allow=allow, micro=micro
            )
            with record.kept(overwrite=overwrite), stop.outranking():
                _train(run, record, stop, watch)
                stop.graceful = False
                stop.check()
                if first:
                    _judge(run, plan, record, stop)
    return folder.path


def _train(
    run: Prepared,
    record: Record,
    stop: StopSignals,
    watch: Callable[[Prepared, int], None] | None,
) -> None:
    last = record.begin()
    run.fill_trunk(record.console.say)
    # Here, and not above, for Lightning takes seconds to import and a plan needs none of it.
    from wara.training.fit import fit
    from wara.training.journal import Journal

    journal = Journal(
        folder=record.folder,
        console=record.console,
        stop=stop,
        progress=record.progress,
        identity=run.identity,
        facts=record.facts,
        noted=record.noted,
        synthetic=run.images.synthetic,
        sinks=[record.epoch, *([lambda epoch, _: watch(run, epoch)] if watch else [])],
    )
    fit(
        run.model, run.recipe(), run.images, run.splits, run.backbone.spec,
        journal=journal, last=last, scratch=record.folder.path, trunk=run.trunk,
    )  # fmt: skip


def _judge(run: Prepared, plan: Plan, record: Record, stop: StopSignals) -> None:
    """Evaluate the best epoch and write the results."""
    record.take_best()
    run.model.to(run.device.torch_name)
    record.end(plan, evaluate(run, pause=stop.check))


@contextlib.contextmanager
def _memory_refused() -> Iterator[None]:
    """Say in one line, with the remedy, that memory ran out, also to who calls the library.

    Raises:
        WaraError: kind "resources".
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, WaraError) or not out_of_memory(error):
            raise
        raise as_refusal(error) from error
