"""The story of one process of a run: prepare, plan, fit, evaluate, write."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch.utils.data import DataLoader

from wara.config import RunConfig
from wara.data.imageset import ImageSet
from wara.data.loader import eval_batches
from wara.evaluation.split import Split, evaluate_split
from wara.runs.folder import RunFolder
from wara.training.console import Console, silence_libraries
from wara.training.plan import Plan, describe
from wara.training.record import Record
from wara.training.resume import check_config, check_finished
from wara.training.setup import Prepared, kernels, prepare
from wara.training.signals import StopSignals
from wara.training.tracking import settle


def run_here(
    config: RunConfig,
    *,
    rank: int = 0,
    resume: bool = False,
    overwrite: bool = False,
    dry_run: bool = False,
    quiet: bool = False,
    opened: Callable[[RunConfig], ImageSet] | None = None,
    watch: Callable[[Prepared, int], None] | None = None,
) -> Path:
    """Be one process of a run, from its config to its folder; see `wara.training.start.run`.

    Args:
        config: of the run.
        rank: number of this process.
        resume: see `run`, and so are the next three.
        overwrite: see `run`.
        dry_run: see `run`.
        quiet: see `run`.
        opened: see `prepare`.
        watch: called with the run and the number of the epoch after each epoch; it may look at the
            model, and must leave it as it is.
    """
    silence_libraries()
    folder, first = RunFolder(config.folder), rank == 0
    with (
        StopSignals() as stop,
        kernels(config.deterministic),
        Console(quiet=quiet, enabled=first) as console,
    ):
        tracking = settle(config.wandb)
        if first:
            folder.check(resume=resume, overwrite=overwrite)
        again = resume and folder.is_run
        if first and not (again or dry_run):
            folder.check_writable()
        run = prepare(
            config,
            report_dir=None if dry_run else folder.path.parent,
            confirm=functools.partial(check_config, folder) if again else lambda _: None,
            opened=opened,
            known=dry_run,
        )
        plan = describe(run)
        console.plan(plan.warnings(), plan.lines())
        if dry_run:
            console.say("dry run: all checks passed, nothing was trained or written")
        elif again and folder.status == "finished":
            check_finished(folder, run)
            console.final(f"already finished: {folder.path}")
        else:
            record = Record(run, folder, console, tracking, first=first, resume=resume)
            with record.kept(overwrite=overwrite):
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
        synthetic=run.images.synthetic,
        sinks=[record.epoch, *([lambda epoch, _: watch(run, epoch)] if watch else [])],
    )
    fit(
        run.model, run.recipe(), run.images, run.splits, run.backbone.spec,
        journal=journal, last=last, scratch=record.folder.path, trunk=run.trunk,
    )  # fmt: skip


def _judge(run: Prepared, plan: Plan, record: Record, stop: StopSignals) -> None:
    """Evaluate the best epoch and write the results."""
    from wara.runs.results import shown_split  # and matplotlib, which a plan does not need

    record.take_best()
    run.model.to("cuda" if run.device.accelerator == "gpu" else "cpu")
    splits = evaluate(run, pause=stop.check)
    record.end(plan, splits, next(iter(_batches(run, shown_split(splits))))["image"])


def evaluate(
    run: Prepared,
    names: Sequence[str] = ("val", "test"),
    *,
    pause: Callable[[], None] = lambda: None,
) -> dict[str, Split]:
    """Evaluate the model of a run as it is; images of other splits are not looked at.

    Args:
        run: the run.
        names: of the splits.
        pause: called before and after each batch; may raise, to stop.
    """
    found = {}
    for name in names:
        found[name] = evaluate_split(
            run.model, _batches(run, name), run.images.records,
            task=run.task, classes=run.classes, name=name,
            bootstrap=run.config.bootstrap, seed=run.config.seed, pause=pause,
        )  # fmt: skip
        pause()
    return found


def _batches(run: Prepared, name: str) -> DataLoader[Any]:
    config = run.config
    return eval_batches(
        run.images, run.indices(name), run.backbone.spec,
        batch_size=config.batch_size // config.devices, workers=config.data.workers,
    )  # fmt: skip
