"""One run: check, plan, train, evaluate, write. Everything else in this room serves `run`."""

from __future__ import annotations

import contextlib
import sys
import traceback
from dataclasses import fields
from pathlib import Path
from typing import Any, cast

import pytorch_lightning as pl
import torch
from pytorch_lightning.plugins.environments import LightningEnvironment
from pytorch_lightning.strategies import DDPStrategy

from wara.adapters import load_adapter_state
from wara.config import RunConfig, dump_config, load_config
from wara.errors import WaraError, WaraErrors
from wara.training import files
from wara.training.checkpoints import SafeCheckpointIO
from wara.training.console import Console, silence_libraries
from wara.training.folder import RunFolder, utc_now
from wara.training.guards import as_refusal, check_writable, differences, torch_settings
from wara.training.journal import Journal, Progress, check_identity, load_best
from wara.training.launch import launch, rank
from wara.training.loggers import Sinks, public_config, public_name
from wara.training.outcome import Outcome, finish
from wara.training.progress import ProgressBar
from wara.training.provenance import collect
from wara.training.resolve import resolve
from wara.training.setup import Prepared, prepare
from wara.training.signals import Stopped, StopSignals
from wara.training.task import FineTuning

# May differ between a run and its resumption: they change where and how fast, not what.
_FREE = (
    "out", "offline", "data.workers", "data.cache", "devices", "accelerator", "bootstrap",
    "wandb", "wandb_project", "wandb_images", "tensorboard",
)  # fmt: skip


def run(
    config: RunConfig,
    *,
    resume: bool = False,
    overwrite: bool = False,
    dry_run: bool = False,
    quiet: bool = False,
) -> Path:
    """Fine-tune a backbone as `config` says and evaluate it.

    Args:
        config: the run.
        resume: go on from the last checkpoint in the run folder; a run that was stopped before
            its first checkpoint starts again from the first epoch.
        overwrite: delete an earlier run in the run folder first.
        dry_run: make all checks, print the plan, write nothing.
        quiet: print only what stands in for data or backbone, and the result.

    Returns:
        The run folder.

    Raises:
        WaraError: every refusal; kind and exit code say which.
        Stopped: after SIGTERM or SIGINT, with exit code 143 or 130.
    """
    config = resolve(config)
    if config.devices > 1 and not dry_run and rank() is None:
        RunFolder(config.folder).check(resume=resume, overwrite=overwrite)
        launch(config, resume=resume, overwrite=overwrite, quiet=quiet)
        return config.folder
    silence_libraries()
    first = not rank()
    with (
        StopSignals() as stop,
        torch_settings(config.deterministic),
        Console(quiet=quiet, enabled=first) as console,
    ):
        return _Run(config, stop, console, first=first).go(
            resume=resume, overwrite=overwrite, dry_run=dry_run
        )


class _Run:
    """State of one call of `run`."""

    def __init__(
        self, config: RunConfig, stop: StopSignals, console: Console, *, first: bool
    ) -> None:
        self.config, self.stop, self.console, self.first = config, stop, console, first
        self.folder = RunFolder(config.folder)
        self.progress = Progress()
        self.record: dict[str, Any] = {}
        self.sinks = Sinks(console.say)

    def go(self, *, resume: bool, overwrite: bool, dry_run: bool) -> Path:
        """Check and plan; then train inside the run folder."""
        config, folder, console = self.config, self.folder, self.console
        if self.first:
            folder.check(resume=resume, overwrite=overwrite)
        if resume and folder.is_run:
            self._check_config()
            if folder.status == "finished":
                console.final(f"already finished: {folder.path}")
                return folder.path
        elif self.first and not dry_run:
            check_writable(folder.path)
        report_dir = None if dry_run else folder.path.parent
        prepared = prepare(config, out=folder.path, report_dir=report_dir)
        folder.synthetic = prepared.images.synthetic
        warnings = prepared.plan.warnings()
        for line in warnings:
            console.final(line)
        for line in prepared.plan.lines()[len(warnings) :]:
            console.say(line)
        if dry_run:
            console.say("dry run: all checks passed, nothing was trained or written")
            return folder.path
        if self.first:
            folder.open(overwrite=overwrite)
        try:
            self._inside(prepared, resume)
        except BaseException as error:
            refusal = self._fail(error, resume)
            if refusal is error:
                raise
            raise refusal from error
        finally:
            self.sinks.close(1)
            console.close()
            folder.close()
        return folder.path

    # -- inside the run folder --------------------------------------------------------------

    def _inside(self, prepared: Prepared, resume: bool) -> None:
        config, folder, console = self.config, self.folder, self.console
        identity = {
            "base_sha256": prepared.base_hash,
            "data_sha256": prepared.data_hash,
            "classes": prepared.classes,
            "synthetic": prepared.images.synthetic,
        }
        last = self._load_last(identity) if resume else None
        if self.first:
            self._write_start(prepared, resume)
            console.log_to(folder.log)
            if resume and last is None:
                console.say("no checkpoint to resume from yet; starting from the first epoch")
            elif last is not None:
                console.say(f"resuming after epoch {self.progress.epoch}")
            self._start_sinks(prepared)
        module = self._module(prepared)
        journal = Journal(
            folder=folder,
            console=console,
            stop=self.stop,
            progress=self.progress,
            identity=identity,
            patience=config.patience,
            epochs=config.epochs,
            sinks=[self.sinks.epoch],
        )
        if last is not None:
            load_adapter_state(module.model, last["state"])
            module.method.load_training_state(module.model, last["method"])
            module.resume_optimiser = last["optimiser"]
            module.optimiser_step_count = self.progress.step
            if self.first:
                if self.progress.best_epoch == self.progress.epoch:
                    journal.write_best(last["state"])
                folder.write_curves(self.progress.history)
        if self.progress.epoch < config.epochs and not journal.exhausted:
            self._fit(prepared, module, journal)
        self.stop.graceful = False
        self.stop.check()
        if not self.first:
            return
        load_best(module, folder, journal)
        device = "cuda" if prepared.accelerator == "gpu" else "cpu"
        data = prepared.data_module(config)
        data.setup("test")
        outcome = finish(
            prepared,
            module.model.to(device),
            {"val": data.val_dataloader(), "test": data.test_dataloader()},
            folder,
            self.progress,
            self.stop,
            dataset=prepared.images.card.name,
            method=config.adapter.method,
            seed=config.seed,
            epochs=config.epochs,
            bootstrap=config.bootstrap,
        )
        self._close_sinks(prepared, outcome)
        self._mark("finished")
        self._say_result(outcome)

    def _module(self, prepared: Prepared) -> FineTuning:
        config = self.config
        assert config.lr is not None, "the config is not resolved"
        return FineTuning(
            prepared.model,
            task=prepared.task,
            classes=prepared.classes,
            loss=prepared.loss,
            weights=prepared.weights,
            gamma=config.focal_gamma,
            smoothing=config.label_smoothing,
            lr=config.lr,
            lr_core=config.lr_core,
            lr_head=config.lr_head,
            weight_decay=config.weight_decay,
            epochs=config.epochs,
            warmup_epochs=config.warmup_epochs,
            clip_grad=config.clip_grad,
            monitor=config.monitor,
            seed=config.seed,
            train_images=prepared.plan.table.images["train"],
            batch_size=prepared.batch_size,
            compiled=config.compile,
        )

    def _fit(self, prepared: Prepared, module: FineTuning, journal: Journal) -> None:
        config = self.config
        module.stop_requested = lambda: self.stop.requested
        callbacks: list[pl.Callback] = [journal]
        if self.console.interactive:
            callbacks.append(ProgressBar(self.console, config.epochs))
        strategy: Any = "auto"
        if config.devices > 1:
            strategy = DDPStrategy(
                process_group_backend="nccl" if prepared.accelerator == "gpu" else "gloo",
                # Buffers are constants here (a ViT has no batch norm), and validation batches
                # may differ in number between processes.
                broadcast_buffers=False,
            )
        trainer = pl.Trainer(
            accelerator=prepared.accelerator,
            devices=config.devices,
            strategy=strategy,
            plugins=[LightningEnvironment(), SafeCheckpointIO()],
            precision=cast(Any, prepared.precision),
            max_epochs=config.epochs,
            accumulate_grad_batches=config.accumulate,
            callbacks=callbacks,
            deterministic=config.deterministic,
            benchmark=False,
            default_root_dir=str(self.folder.path),
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            use_distributed_sampler=False,
        )
        done: Any = trainer.fit_loop.epoch_progress.current
        done.ready = done.started = done.processed = done.completed = self.progress.epoch
        module.train()
        if prepared.accelerator == "gpu":
            torch.cuda.reset_peak_memory_stats()
        trainer.fit(module, datamodule=prepared.data_module(config))
        if torch.distributed.is_initialized():
            torch.distributed.barrier()
            torch.distributed.destroy_process_group()

    # -- resume -----------------------------------------------------------------------------

    def _check_config(self) -> None:
        earlier = resolve(load_config(self.folder.config)).model_dump(mode="json")
        differing = [
            key
            for key, (old, new) in differences(earlier, self.config.model_dump(mode="json")).items()
            if key not in _FREE
        ]
        if differing:
            raise WaraErrors(
                [
                    WaraError(
                        "config", "differs from the run to resume", key,
                        f"use the same config ({self.folder.config}), or another --out",
                    )
                    for key in differing
                ]
            )  # fmt: skip

    def _load_last(self, identity: dict[str, Any]) -> dict[str, Any] | None:
        path = self.folder.last
        if not path.is_file():
            return None
        content = SafeCheckpointIO().load_checkpoint(path)
        check_identity(content.get("identity", {}), identity, str(path))
        names = {field.name for field in fields(Progress)}
        parts = {"state", "optimiser", "method"}
        if set(content.get("progress", {})) != names or not parts <= set(content):
            raise WaraError(
                "artefact", "the checkpoint lacks entries of this version", str(path),
                "resume with the version of wara that wrote it, or start again with --overwrite",
            )  # fmt: skip
        self.progress = Progress(**content["progress"])
        return content

    # -- records ----------------------------------------------------------------------------

    def _write_start(self, prepared: Prepared, resume: bool) -> None:
        config, folder, info = self.config, self.folder, prepared.info
        started = [utc_now()]
        if resume:
            with contextlib.suppress(OSError, ValueError, KeyError):
                started = [*files.read_json(folder.provenance)["started"], *started]
        self.record = {
            "synthetic": prepared.images.synthetic,
            "status": "running",
            "started": started,
            "ended": None,
            **collect(
                command=sys.argv,
                seed=config.seed,
                data={
                    "name": prepared.images.card.name,
                    "origin": prepared.images.origin,
                    "substituted_for": prepared.images.substituted_for,
                    "images": len(prepared.images.records),
                    "sha256": prepared.data_hash,
                },
                backbone={
                    "name": info.name,
                    "requested": config.backbone.name,
                    "weights": info.weights_source,
                    "weights_sha256": info.weights_sha256,
                    "frozen_sha256": prepared.base_hash,
                },
                device=prepared.plan.device,
                precision=prepared.precision,
                processes=config.devices,
            ),
        }
        # Config and provenance make it a run folder; they come first, so that --overwrite and
        # --resume know it for one whatever happens next.
        stamp = f"# synthetic: {str(prepared.images.synthetic).lower()}\n"
        files.write_text(folder.config, stamp + dump_config(config))
        files.write_json(folder.provenance, self.record)
        folder.write_splits(prepared.rows)

    def _mark(self, status: str) -> None:
        if self.first and self.record:
            self.record |= {"status": status, "ended": utc_now()}
            files.write_json(self.folder.provenance, self.record)

    def _fail(self, error: BaseException, resume: bool) -> BaseException:
        """Leave the folder in order and return what to raise."""
        if isinstance(error, Stopped):
            if self.first:
                self._mark("interrupted")
                self.console.final(
                    f"stopped by {error.signal_name} after {self.progress.epoch} of "
                    f"{self.config.epochs} epochs; go on with --resume"
                )
            return error
        refusal = as_refusal(error)
        if not self.first:
            return refusal
        self.console.log_only("".join(traceback.format_exception(error)).rstrip())
        if not resume and self.progress.epoch == 0 and isinstance(refusal, WaraError):
            self.console.close()
            with contextlib.suppress(OSError):
                self.folder.discard()
            return refusal
        # The first error is the one to report, also where this note cannot be written.
        with contextlib.suppress(WaraError):
            self._mark("failed")
        if self.progress.epoch and isinstance(refusal, WaraError):
            self.console.say(f"kept: the checkpoint after epoch {self.progress.epoch}")
        return refusal

    # -- results ----------------------------------------------------------------------------

    def _start_sinks(self, prepared: Prepared) -> None:
        config = self.config
        self.sinks.start(
            self.folder.path,
            wandb=config.wandb,
            project=config.wandb_project,
            name=(
                f"{public_name(config.dataset, prepared.images.card.name)}_"
                f"{config.adapter.method}_s{config.seed}"
            ),
            config={
                **public_config(config.model_dump(mode="json")),
                "synthetic": prepared.images.synthetic,
            },
            tensorboard=config.tensorboard,
        )
        # A resumed run starts a new file; with the rows so far it holds the whole curve.
        for row in self.progress.history:
            self.sinks.epoch(int(row["epoch"] or 0), row)

    def _close_sinks(self, prepared: Prepared, outcome: Outcome) -> None:
        test, images = outcome.test, []
        if self.config.wandb_images:
            shown = zip(test.index[:8], test.labels[:8], test.predicted[:8], strict=True)
            images = [
                (prepared.images.read(int(i)), f"label {label}, predicted {guess}")
                for i, label, guess in shown
            ]
        self.sinks.results(
            metrics=outcome.metrics | {
                "dataset": public_name(self.config.dataset, outcome.metrics["dataset"])
            },
            labels=test.labels, probs=test.probs,
            predicted=test.predicted, classes=prepared.classes, adapter=self.folder.adapter,
            images=images,
        )  # fmt: skip
        self.sinks.close(0)

    def _say_result(self, outcome: Outcome) -> None:
        console, folder = self.console, self.folder
        console.say()
        for banner in self._result_banner():
            console.final(banner)
        for line in outcome.table:
            console.final(line)
        console.say()
        console.final(f"report   {folder.report}")
        console.say(f"metrics  {folder.metrics}")
        console.final(f"adapter  {folder.adapter}")
        console.say(f"plots    {folder.plots}")

    def _result_banner(self) -> list[str]:
        return ["on synthetic images:"] if self.folder.synthetic else []
