"""What a run leaves in its folder, from the first line of its record to its results or its end."""

from __future__ import annotations

import contextlib
import sys
import traceback
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from wara.adapters import load_adapter_state
from wara.cards import public_name
from wara.config import dump_config
from wara.data.twins import all_pairs, contact_sheet
from wara.errors import as_refusal
from wara.evaluation.predict import Predictions
from wara.evaluation.split import Split
from wara.runs.folder import RunFolder
from wara.runs.progress import Progress, Row
from wara.runs.provenance import Provenance, collect, peak_memory_mb
from wara.runs.tables import label_names, write_curves, write_splits, write_twins
from wara.storage import replacing, write_text
from wara.training.checkpoint import read_best, read_last, write_best
from wara.training.console import Console
from wara.training.loggers import Sinks, public_config
from wara.training.plan import Plan
from wara.training.setup import Prepared
from wara.training.signals import Stopped
from wara.training.tracking import Tracking


class Record:
    """The folder and the loggers of a run in the making.

    Args:
        run: the run.
        folder: of the run.
        console: where to print, and the log.
        tracking: where W&B shows it.
        first: whether this is the first process; the others write nothing.
        resume: whether to go on from the last checkpoint.
    """

    def __init__(
        self,
        run: Prepared,
        folder: RunFolder,
        console: Console,
        tracking: Tracking,
        *,
        first: bool,
        resume: bool,
    ) -> None:
        self.run, self.folder, self.console, self.tracking = run, folder, console, tracking
        self.first, self.resume = first, resume
        self.progress = Progress()
        self.provenance: Provenance | None = None
        self.sinks = Sinks(console.say)
        self.public = public_name(run.config.dataset, run.images.card.name)

    @contextlib.contextmanager
    def kept(self, *, overwrite: bool) -> Iterator[None]:
        """Hold the folder, and leave it in order, whatever happens.

        Raises:
            WaraError: what happened, where it is no bug.
        """
        if self.first:
            self.folder.open(overwrite=overwrite)
        try:
            yield
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

    def begin(self) -> dict[str, Any] | None:
        """Write what is known before the first step; return the checkpoint to go on from, if any.

        Raises:
            WaraError: kind "artefact" when the checkpoint is damaged or of another run.
        """
        last = None
        if self.resume:
            found = read_last(self.folder.last, self.run.identity)
            if found is not None:
                self.progress, last = found
        if self.first:
            self._write_facts()
            self._continue(last)
            self._start_sinks()
        return last

    def _write_facts(self) -> None:
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
        self._write_twins()
        self.console.log_to(folder.log)

    def _write_twins(self) -> None:
        """Write which pictures are there twice, and show the first of them."""
        run, folder, pairs = self.run, self.folder, all_pairs(self.run.images)
        write_twins(
            folder.twins, pairs, run.rows, classes=run.classes, synthetic=run.images.synthetic
        )
        if pairs:
            with replacing(folder.twins_sheet) as partial:
                contact_sheet(run.images, pairs).save(partial, "PNG")

    def _continue(self, last: dict[str, Any] | None) -> None:
        progress, folder = self.progress, self.folder
        if last is not None:
            self.console.say(f"resuming after epoch {progress.epoch}")
            # A kill may have come between the two checkpoints, or before the curves.
            if progress.best_epoch == progress.epoch:
                write_best(folder.best, progress.best_epoch, self.run.identity, last["state"])
            write_curves(folder.curves, progress.history, synthetic=self.run.images.synthetic)
        elif self.resume:
            self.console.say("no checkpoint to resume from yet; starting from the first epoch")

    def take_best(self) -> None:
        """Put the best epoch's adapter and head into the model."""
        run = self.run
        state = read_best(self.folder.best, self.progress.best_epoch, run.identity)
        load_adapter_state(run.model, state)

    def end(self, plan: Plan, splits: Mapping[str, Split], images: Tensor) -> None:
        """Write, log and print the results.

        Args:
            plan: of the run.
            splits: `val` and `test`, evaluated.
            images: `[b, 3, h, w]`, of the split that figures show.
        """
        from wara.runs.report import result_table
        from wara.runs.results import Facts, measure_update, shown_split, write_results

        run, config = self.run, self.run.config
        facts = Facts(
            dataset=run.images.card.name,
            public=self.public,
            synthetic=run.images.synthetic,
            task=run.task,
            classes=run.classes,
            backbone=run.backbone,
            bits=run.images.bits,
            greys=run.images.greys,
            method=config.adapter.name,
            seed=config.seed,
            counts=run.counts,
            banners=plan.banners,
            plan=plan.lines(),
        )
        update = measure_update(run.model, images.to(next(run.model.parameters()).device))
        metrics = write_results(
            self.folder, facts, splits, run.model, update, self.progress,
            epochs=config.epochs, warmup_epochs=config.warmup_epochs, bootstrap=config.bootstrap,
            peak_memory_mb=peak_memory_mb(run.device.accelerator == "gpu"),
        )  # fmt: skip
        shown = shown_split(splits)
        self.sinks.results(
            metrics=metrics | {"dataset": self.public},
            images=self._pictures(splits[shown].found) if config.wandb.images else [],
            split=shown, energy=update.energy, spectra=update.spectra, plots=self.folder.plots,
            labels=splits[shown].found.labels, probs=splits[shown].found.probs,
            predicted=splits[shown].found.predicted, classes=run.classes,
            adapter=self.folder.adapter,
        )  # fmt: skip
        self.sinks.close(0)
        assert self.provenance is not None
        self.provenance.end("finished")
        table = result_table(splits["val"].scores, splits["test"].scores)
        self.console.result(table, self.folder, synthetic=facts.synthetic)

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

    def epoch(self, _: int, row: Row) -> None:
        """Log an epoch; called after `progress` has counted it in."""
        self.sinks.epoch(row, self.progress.best)

    def _start_sinks(self) -> None:
        config, tracking = self.run.config, self.tracking
        assert self.provenance is not None
        self.sinks.start(
            self.folder.path,
            tracking=tracking,
            run_id="" if tracking.mode == "disabled" else self.provenance.wandb_run(),
            name=f"{self.public}_{config.adapter.name}_s{config.seed}",
            config=public_config(config.model_dump(mode="json")) | self._groups(),
            tensorboard=config.tensorboard,
        )
        self.sinks.again(self.progress)

    def _groups(self) -> dict[str, Any]:
        """Return what people group runs by, each a key of its own at the top."""
        run = self.run
        return {
            "synthetic": run.images.synthetic,
            "dataset": self.public,
            "modality": run.images.card.modality,
            "method": run.config.adapter.name,
            "adapter_params": run.counts["adapter"],
            "head_params": run.counts["head"],
            "budget": run.budget[0] if run.budget else None,
            "split_seed": run.config.data.split_seed,
            "seed": run.config.seed,
        }

    def _pictures(self, found: Predictions) -> list[tuple[Any, str]]:
        shown = zip(found.index[:8], found.labels[:8], found.predicted[:8], strict=True)
        return [
            (
                self.run.images.read(int(i)),
                f"label {label_names(label, self.run.classes) or 'none'}, "
                f"predicted {label_names(guess, self.run.classes) or 'none'}",
            )
            for i, label, guess in shown
        ]


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
            "near_duplicates": config.data.near_duplicates,
            "near_pairs": None if images.synthetic else len(images.near_pairs()),
            "allow_duplicates": config.data.allow_duplicates,
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
