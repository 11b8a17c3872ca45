"""What a run leaves in its folder, from the first line of its record to its results or its end."""

from __future__ import annotations

import contextlib
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wara.adapters import load_adapter_state
from wara.cards import public_name
from wara.config import dump_config
from wara.errors import as_refusal
from wara.evaluation.predict import Predictions
from wara.evaluation.split import Split
from wara.runs.exact import sentences
from wara.runs.folder import RunFolder
from wara.runs.pairs import write_pairs
from wara.runs.progress import Progress, Row
from wara.runs.provenance import Provenance, collect, peak_memory_mb, recorded_memory
from wara.runs.sealed import seal_run
from wara.runs.tables import label_names, write_curves, write_splits
from wara.signals import Stopped
from wara.storage import write_text
from wara.training.checkpoint import (
    Last,
    check_identity,
    drop_previous,
    put_back,
    read_best,
    read_last,
)
from wara.training.console import Console
from wara.training.judge import first_batch
from wara.training.loggers import Sinks, public_config
from wara.training.plan import Plan
from wara.training.resume import changes_since, facts_here
from wara.training.setup import Prepared
from wara.training.tracking import Tracking

if TYPE_CHECKING:
    from wara.runs.results import Update


class Record:
    """The folder and the loggers of a run in the making.

    Args:
        run: the run.
        folder: of the run.
        console: where to print, and the log.
        tracking: where W&B shows it.
        first: whether this is the first process; the others write nothing.
        resume: whether to go on from the last checkpoint.
        allow: names of facts that may differ from those of the checkpoint.
        micro: see `Progress.micro`; of an earlier run of the same config.
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
        allow: Sequence[str] = (),
        micro: Sequence[Sequence[int]] = (),
    ) -> None:
        self.run, self.folder, self.console, self.tracking = run, folder, console, tracking
        self.first, self.resume, self.allow = first, resume, allow
        self.progress = Progress()
        self.micro = [list(pair) for pair in micro]
        self.facts = facts_here(run.device, run.config.devices)
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
            WaraError: kind "artefact" when all checkpoints are damaged or of another run; kind
                "config" when something has changed that comes into the weights.
        """
        last = read_last(self.folder) if self.resume else None
        if last is not None:
            check_identity(last.content, self.run.identity, last.path)
            changes = changes_since(last, self.facts, self.allow)
            self.progress = last.progress
            self.progress.changes += [
                {"name": name, "was": was, "now": now, "after_epoch": self.progress.epoch}
                for name, (was, now) in changes.items()
            ]
        if self.resume:
            # What came after the checkpoint is in the provenance alone.
            self.micro = max(self.micro, recorded_memory(self.folder.provenance), key=len)
        self.progress.micro = max(self.progress.micro, self.micro, key=len)
        if self.first:
            self._write_facts()
            self._continue(last)
            self._start_sinks()
        return None if last is None else last.content

    def noted(self) -> None:
        """Write what is new in `progress` to the provenance."""
        if self.provenance is not None:
            self.provenance.write()

    def _write_facts(self) -> None:
        run, folder, synthetic = self.run, self.folder, self.run.images.synthetic
        self.provenance = Provenance(
            folder.provenance, _facts_of(run), synthetic=synthetic, resumed=self.resume,
            progress=self.progress,
        )  # fmt: skip
        # Config and provenance make it a run folder; they come first, so that --overwrite and
        # --resume know it for one whatever happens next.
        write_config(folder.config, run)
        self.provenance.write()
        write_splits(folder.splits, run.rows, classes=run.classes, synthetic=synthetic)
        write_pairs(folder.path, run.images, run.rows)
        self.console.log_to(folder.log)

    def _continue(self, last: Last | None) -> None:
        progress, folder = self.progress, self.folder
        if last is not None:
            if last.path != folder.last:
                self.console.final(
                    f"the newest checkpoint cannot be used ({last.damaged}: {folder.last}); going "
                    f"on from the one before it, after epoch {progress.epoch}"
                )
            self.console.say(f"resuming after epoch {progress.epoch}")
            for line in sentences(progress.changes):
                self.console.final(f"note: {line}")
            # A kill may have come between the two checkpoints, or before the curves.
            put_back(folder, last, self.run.identity)
            write_curves(folder.curves, progress.history, synthetic=self.run.images.synthetic)
        elif self.resume:
            self.console.final(
                f"no checkpoint to resume from yet; starting from the first epoch: {folder.path}"
            )

    def take_best(self) -> None:
        """Put the best epoch's adapter and head into the model."""
        run = self.run
        state = read_best(self.folder.best, self.progress.best_epoch, run.identity)
        load_adapter_state(run.model, state)

    def end(self, plan: Plan, splits: Mapping[str, Split]) -> None:
        """Write, log and print the results.

        Args:
            plan: of the run.
            splits: `val` and `test`, evaluated.
        """
        from wara.runs.report import result_table
        from wara.runs.results import shown_split

        run, config = self.run, self.run.config
        peak = peak_memory_mb(run.device.accelerator == "gpu")
        metrics, update = write_out(self.folder, run, plan, splits, self.progress, peak)
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
        drop_previous(self.folder)
        self.provenance.end("finished", peak)
        # Last: what has this list is whole.
        seal_run(self.folder)
        table = result_table(splits["val"].scores, splits["test"].scores)
        self.console.result(table, self.folder, synthetic=run.images.synthetic)

    def _fail(self, error: BaseException) -> None:
        """Leave the folder in order."""
        refusal, progress, console = as_refusal(error), self.progress, self.console
        if not self.first:
            return
        if isinstance(error, Stopped):
            if self.provenance is not None:
                if self.provenance.content["status"] == "finished":
                    return  # in its last moments, when there is nothing to go on with
                self.provenance.end("interrupted")
            # A terminal that was closed takes no more lines.
            with contextlib.suppress(OSError):
                console.final(
                    f"stopped by {error.signal_name} after {progress.epoch} of "
                    f"{self.run.config.epochs} epochs; go on with --resume"
                )
                error.told = True
            return
        console.log_only("".join(traceback.format_exception(error)).rstrip())
        # A run to resume may not have begun yet; then it is as a new one.
        if (
            (not self.resume or self.folder.created)
            and progress.epoch == 0
            and refusal.kind != "bug"
        ):
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


def write_config(path: Path, run: Prepared) -> None:
    """Write the config of a run as it trains."""
    stamp = f"# synthetic: {str(run.images.synthetic).lower()}\n"
    write_text(path, stamp + dump_config(run.config))


def write_out(
    folder: RunFolder,
    run: Prepared,
    plan: Plan,
    splits: Mapping[str, Split],
    progress: Progress,
    peak: float,
) -> tuple[dict[str, Any], Update]:
    """Write the results of a run, see `write_results`.

    Args:
        folder: where to.
        run: its model in the state of the best epoch, on its device.
        plan: of the run.
        splits: `val` and `test`, evaluated.
        progress: how training went.
        peak: most memory that training took, MB.

    Returns:
        The content of `metrics.json`, and what the adapter learnt.
    """
    from wara.runs.results import Facts, measure_update, shown_split, write_results

    config = run.config
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
        banners=plan.banners,
        plan=plan.lines(),
    )
    images = first_batch(run, shown_split(splits)).to(run.device.torch_name)
    update = measure_update(run.model, images)
    metrics = write_results(
        folder, facts, splits, run.model, update, progress,
        epochs=config.epochs, warmup_epochs=config.warmup_epochs, bootstrap=config.bootstrap,
        batch_size=config.batch_size // config.devices, accumulate=config.accumulate,
        peak_memory_mb=peak,
    )  # fmt: skip
    return metrics, update


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
        trunk=None if run.trunk is None else {
            "key": run.trunk.folder.name, "blocks": run.trunk.depth, "views": len(run.trunk.seen),
            "outputs": run.trunk.rows,
        },  # fmt: skip
        device=run.device.name,
        accelerator=run.device.accelerator,
        precision=run.device.precision,
        processes=config.devices,
    )
