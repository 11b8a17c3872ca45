"""Training a model for as long as its recipe says; what comes of it is judged elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, cast

import pytorch_lightning as pl
import torch
from pytorch_lightning.plugins.environments import LightningEnvironment
from pytorch_lightning.strategies import DDPStrategy
from torch import nn

from wara.adapters import load_adapter_state
from wara.data.imageset import ImageSet
from wara.images import ImageSpec
from wara.runs.progress import Progress
from wara.training.bar import ProgressBar
from wara.training.batches import ImageDataModule
from wara.training.cache import TrunkCache
from wara.training.console import silence_libraries
from wara.training.journal import Journal, exhausted
from wara.training.recipe import Recipe
from wara.training.setup import kernels
from wara.training.task import FineTuning
from wara.training.trunk import Upper


def fit(
    model: nn.Module,
    recipe: Recipe,
    images: ImageSet,
    splits: Sequence[str],
    spec: ImageSpec,
    *,
    journal: Journal | None = None,
    last: dict[str, Any] | None = None,
    scratch: Path | None = None,
    trunk: TrunkCache | None = None,
) -> Progress:
    """Train a model until its recipe or its patience is done; it is left as the last epoch ends.

    Args:
        model: an adapted model that maps images `[b, 3, h, w]` to logits `[b, c]`.
        recipe: how to train it.
        images: the data set.
        splits: "train", "val" or "test" per record; validation images choose the best epoch, test
            images are not looked at.
        spec: what the network expects.
        journal: keeps what happens, and the state to go on from; by default nothing is written.
        last: a checkpoint to go on from, see `checkpoint.read_last`.
        scratch: a folder that Lightning may write to.
        trunk: filled with the tokens of these images; only what lies above the trunk runs then.

    Returns:
        How training went, epoch by epoch.

    Raises:
        WaraError: kind "nonfinite", when a loss, a gradient or an output is not finite.
    """
    silence_libraries()  # once more: Lightning sets its own level when it is imported
    journal = journal or Journal()
    progress = journal.progress
    module = FineTuning(
        model,
        recipe,
        task=images.card.task,
        classes=images.card.class_names,
        train_images=list(splits).count("train"),
        upper=None if trunk is None else Upper(model, trunk.depth, spec.size),
    )
    if last is not None:
        load_adapter_state(model, last["state"])
        module.method.load_training_state(model, last["method"])
        module.resume_optimiser = last["optimiser"]
        module.optimiser_step_count = progress.step
    if progress.epoch >= recipe.epochs or exhausted(progress, recipe.patience):
        return progress
    module.micro, module.shrunk = progress.micro, journal.shrunk
    stop = journal.stop
    module.stop_requested = lambda: stop.requested
    callbacks: list[pl.Callback] = [journal]
    if journal.console.interactive:
        callbacks.append(ProgressBar(journal.console, recipe.epochs))
    strategy: Any = "auto"
    if recipe.devices > 1:
        strategy = DDPStrategy(
            process_group_backend="nccl" if recipe.accelerator == "gpu" else "gloo",
            # Buffers are constants here (a ViT has no batch norm), and validation batches may
            # differ in number between processes.
            broadcast_buffers=False,
            timeout=timedelta(seconds=recipe.timeout),
        )
    with kernels(recipe.deterministic):  # the trainer would set them and leave them so
        trainer = pl.Trainer(
            accelerator=recipe.accelerator,
            devices=recipe.devices,
            strategy=strategy,
            plugins=[LightningEnvironment()],
            precision=cast(Any, recipe.precision),
            max_epochs=recipe.epochs,
            accumulate_grad_batches=recipe.accumulate,
            callbacks=callbacks,
            deterministic=recipe.deterministic,
            benchmark=False,
            default_root_dir=scratch,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            use_distributed_sampler=False,
        )
        # Lightning's SIGTERM handler ends the process with exit code 0, and talks to other
        # processes from inside of a signal handler.
        connector: Any = trainer._signal_connector
        connector.register_signal_handlers = lambda: None
        done: Any = trainer.fit_loop.epoch_progress.current
        done.ready = done.started = done.processed = done.completed = progress.epoch
        data = ImageDataModule(
            images,
            splits,
            spec=spec,
            batch_size=recipe.batch_size,
            workers=recipe.workers,
            augment=recipe.augment,
            views=recipe.views,
            trunk=trunk,
            seed=recipe.seed,
        )
        module.train()
        if recipe.accelerator == "gpu":
            torch.cuda.reset_peak_memory_stats()
        trainer.fit(module, datamodule=data)
        if torch.distributed.is_initialized():
            torch.distributed.barrier()
            torch.distributed.destroy_process_group()
    return progress
