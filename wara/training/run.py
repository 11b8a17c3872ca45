"""The story of one process of a run: check, plan, train, evaluate, write."""

from __future__ import annotations

import contextlib
import functools
import sys
import traceback
from pathlib import Path
from typing import Any

from wara.adapters import load_adapter_state
from wara.cards import public_name
from wara.config import RunConfig, dump_config
from wara.data.loader import eval_batches
from wara.errors import as_refusal
from wara.evaluation.predict import Predictions
from wara.runs.folder import RunFolder
from wara.runs.progress import Progress
from wara.runs.provenance import Provenance, collect, peak_memory_mb
from wara.runs.tables import label_names, write_curves, write_splits
from wara.storage import write_text
from wara.training.checkpoint import read_best, read_last, write_best
from wara.training.console import Console, silence_libraries
from wara.training.loggers import Sinks, public_config
from wara.training.plan import Plan, describe
from wara.training.resume import check_config, check_finished
from wara.training.setup import Prepared, kernels, prepare
from wara.training.signals import Stopped, StopSignals


def run_here(
    config: RunConfig,
    *,
    rank: int = 0,
    resume: bool = False,
    overwrite: bool = False,
    dry_run: bool = False,
    quiet: bool = False,
) -> Path:
    """Be one process of a run, from its config to its folder; see `wara.training.start.run`."""
    silence_libraries()
    folder, first = RunFolder(config.folder), rank == 0
    with (
        StopSignals() as stop,
        kernels(config.deterministic),
        Console(quiet=quiet, enabled=first) as console,
    ):
        if first:
            folder.check(resume=resume, overwrite=overwrite)
        again = resume and folder.is_run
        if first and not (again or dry_run):
            folder.check_writable()
        run = prepare(
            config,
            report_dir=None if dry_run else folder.path.parent,
            confirm=functools.partial(check_config, folder) if again else lambda _: None,
        )
        plan = describe(run)
        console.plan(plan.warnings(), plan.lines())
        if dry_run:
            console.say("dry run: all checks passed, nothing was trained or written")
        elif again and folder.status == "finished":
            check_finished(folder, run)
            console.final(f"already finished: {folder.path}")
        else:
            _Process(run, plan, folder, console, stop, first=first, resume=resume).go(overwrite)
    return folder.path


class _Process:
    """The part of the story that happens inside the run folder."""

    def __init__(
        self, run: Prepared, plan: Plan, folder: RunFolder, console: Console, stop: StopSignals,
        *, first: bool, resume: bool,
    ) -> None:  # fmt: skip
        self.run, self.plan, self.folder = run, plan, folder
        self.console, self.stop = console, stop
        self.first, self.resume = first, resume
        self.progress = Progress()
        self.provenance: Provenance | None = None
        self.sinks = Sinks(console.say)

    def go(self, overwrite: bool) -> None:
        """Train and evaluate; leave the folder in order, whatever happens."""
        if self.first:
            self.folder.open(overwrite=overwrite)
        try:
            self._train()
            self.stop.graceful = False
            self.stop.check()
            if self.first:
                self._judge()
        except BaseException as error:
            self._fail(error)
            refusal = as_refusal(error)
            if isinstance(error, Stopped) or refusal.kind == "bug" or refusal is error:
                raise
            raise refusal from error
        finally:
            self.sinks.close(1)
            self.console.close()
            self.folder.close()

    def _train(self) -> None:
        last = None
        if self.resume:
            found = read_last(self.folder.last, self.run.identity)
            if found is not None:
                self.progress, last = found
        if self.first:
            self._begin(last)
        # Here, and not above, for Lightning takes seconds to import and a plan needs none of it.
        from wara.training.fit import fit
        from wara.training.journal import Journal

        journal = Journal(
            folder=self.folder,
            console=self.console,
            stop=self.stop,
            progress=self.progress,
            identity=self.run.identity,
            synthetic=self.run.images.synthetic,
            sinks=[self.sinks.epoch],
        )
        fit(self.run, journal, last, scratch=self.folder.path)

    def _begin(self, last: dict[str, Any] | None) -> None:
        """Write what is known before the first step."""
        run, folder, synthetic = self.run, self.folder, self.run.images.synthetic
        self.provenance = Provenance(
            folder.provenance, _facts_of(run), synthetic=synthetic, resumed=self.resume
        )
        # Config and provenance make it a run folder; they come first, so that --overwrite and
        # --resume know it for one whatever happens next.
        stamp = f"# synthetic: {str(synthetic).lower()}\n"
        write_text(folder.config, stamp + dump_config(run.config))
        self.provenance.write()
        write_splits(folder.splits, run.rows, classes=run.classes, synthetic=synthetic)
        self.console.log_to(folder.log)
        if last is not None:
            progress = self.progress
            self.console.say(f"resuming after epoch {progress.epoch}")
            # A kill may have come between the two checkpoints, or before the curves.
            if progress.best_epoch == progress.epoch:
                write_best(folder.best, progress.best_epoch, run.identity, last["state"])
            write_curves(folder.curves, progress.history, synthetic=synthetic)
        elif self.resume:
            self.console.say("no checkpoint to resume from yet; starting from the first epoch")
        self._start_sinks()

    def _judge(self) -> None:
        """Evaluate the best epoch and write the results."""
        from wara.runs.report import result_table
        from wara.runs.results import Facts, Split, evaluate_split, shown_split, write_results

        run, folder, progress, config = self.run, self.folder, self.progress, self.run.config
        load_adapter_state(run.model, read_best(folder.best, progress.best_epoch, run.identity))
        model = run.model.to("cuda" if run.device.accelerator == "gpu" else "cpu")
        facts = Facts(
            dataset=run.images.card.name,
            public=public_name(config.dataset, run.images.card.name),
            synthetic=run.images.synthetic,
            task=run.task,
            classes=run.classes,
            backbone=run.backbone,
            bits=run.images.bits,
            greys=run.images.greys,
            method=config.adapter.name,
            seed=config.seed,
            counts=run.counts,
            banners=self.plan.banners,
            plan=self.plan.lines(),
        )
        batches = {
            name: eval_batches(
                run.images, run.indices(name), run.backbone.spec,
                batch_size=config.batch_size // config.devices, workers=config.data.workers,
            )
            for name in ("val", "test")
        }  # fmt: skip
        splits: dict[str, Split] = {}
        for name, loader in batches.items():
            splits[name] = evaluate_split(
                model, loader, run.images.records, facts,
                name=name, bootstrap=config.bootstrap, pause=self.stop.check,
            )  # fmt: skip
            self.stop.check()
        images = next(iter(batches[shown_split(splits)]))["image"]
        metrics = write_results(
            folder, facts, splits, model, images.to(next(model.parameters()).device), progress,
            epochs=config.epochs, warmup_epochs=config.warmup_epochs, bootstrap=config.bootstrap,
            peak_memory_mb=peak_memory_mb(run.device.accelerator == "gpu"),
        )  # fmt: skip
        self._close_sinks(metrics, splits["test"].found)
        assert self.provenance is not None
        self.provenance.end("finished")
        table = result_table(splits["val"].scores, splits["test"].scores)
        self.console.result(table, folder, synthetic=facts.synthetic)

    def _fail(self, error: BaseException) -> None:
        """Leave the folder in order."""
        refusal, progress, console = as_refusal(error), self.progress, self.console
        if not self.first:
            return
        if isinstance(error, Stopped):
            if self.provenance is not None:
                self.provenance.end("interrupted")
            console.final(
                f"stopped by {error.signal_name} after {progress.epoch} of "
                f"{self.run.config.epochs} epochs; go on with --resume"
            )
            return
        console.log_only("".join(traceback.format_exception(error)).rstrip())
        if not self.resume and progress.epoch == 0 and refusal.kind != "bug":
            console.close()
            with contextlib.suppress(OSError):
                self.folder.discard()
            return
        # The first error is the one to report, also where this note cannot be written.
        with contextlib.suppress(Exception):
            if self.provenance is not None:
                self.provenance.end("failed")
        if progress.epoch and refusal.kind != "bug":
            console.say(f"kept: the checkpoint after epoch {progress.epoch}")

    # -- loggers ----------------------------------------------------------------------------

    def _start_sinks(self) -> None:
        config, images = self.run.config, self.run.images
        self.sinks.start(
            self.folder.path,
            wandb=config.wandb,
            project=config.wandb_project,
            name=(
                f"{public_name(config.dataset, images.card.name)}_{config.adapter.name}"
                f"_s{config.seed}"
            ),
            config={
                **public_config(config.model_dump(mode="json")),
                "synthetic": images.synthetic,
            },
            tensorboard=config.tensorboard,
        )
        # A resumed run starts a new file; with the rows so far it holds the whole curve.
        for row in self.progress.history:
            self.sinks.epoch(int(row["epoch"] or 0), row)

    def _close_sinks(self, metrics: dict[str, Any], found: Predictions) -> None:
        config, images = self.run.config, []
        if config.wandb_images:
            shown = zip(found.index[:8], found.labels[:8], found.predicted[:8], strict=True)
            images = [
                (
                    self.run.images.read(int(i)),
                    f"label {label_names(label, self.run.classes) or 'none'}, "
                    f"predicted {label_names(guess, self.run.classes) or 'none'}",
                )
                for i, label, guess in shown
            ]
        self.sinks.results(
            metrics=metrics | {"dataset": public_name(config.dataset, metrics["dataset"])},
            labels=found.labels, probs=found.probs, predicted=found.predicted,
            classes=self.run.classes, adapter=self.folder.adapter, images=images,
        )  # fmt: skip
        self.sinks.close(0)


def _facts_of(run: Prepared) -> dict[str, Any]:
    """Return what provenance tells of a run."""
    config, images, backbone = run.config, run.images, run.backbone
    return collect(
        command=sys.argv,
        seed=config.seed,
        data={
            "name": images.card.name,
            "origin": images.origin,
            "substituted_for": images.substituted_for,
            "images": len(images.records),
            "bits": images.bits,
            "greys": images.greys,
            "sha256": run.data_hash,
        },
        backbone={
            "name": backbone.name,
            "requested": config.backbone.name,
            "architecture": backbone.architecture,
            "options": backbone.options,
            "pool": backbone.pool,
            "mean": backbone.mean,
            "std": backbone.std,
            "statistics": backbone.statistics,
            "interpolation": backbone.interpolation,
            "layout": backbone.layout,
            "part": backbone.part,
            "left_out": backbone.left_out,
            "weights": (
                str(Path(config.backbone.weights).expanduser().absolute())
                if config.backbone.weights
                else backbone.weights_source
            ),
            "weights_sha256": backbone.weights_sha256,
            "frozen_sha256": run.base_hash,
        },
        budget=run.budget and dict(zip(("asked", "wanted", "got"), run.budget, strict=True)),
        device=run.device.name,
        precision=run.device.precision,
        processes=config.devices,
    )
