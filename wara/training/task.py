"""The Lightning module of a run: loss, optimiser, schedule, checks, and validation metrics."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from wara.adapters import adaptation_of, parameter_groups
from wara.errors import WaraError, out_of_memory
from wara.evaluation.calibration import to_probs
from wara.evaluation.metrics import point_metrics
from wara.evaluation.parts import ONE_IMAGE, Parts, free_memory
from wara.training.losses import loss_per_image
from wara.training.recipe import Recipe

Batch = dict[str, Tensor]
_GRAD_REMEDY = "lower lr, lr_core or lr_head, set clip_grad or amp=off, and start again"


def schedule(step: int, *, total: int, warmup: int) -> float:
    """Factor on the learning rates at optimiser step `step` (0-based) of `total`.

    Linear warm-up over `warmup` steps, then a half cosine to zero (as timm's
    `CosineLRScheduler` with `warmup_prefix=True` and `lr_min=0`, stepped per update). A pure
    function of the step, so resuming has no scheduler state to get wrong.
    """
    if step < warmup:
        return (step + 1) / (warmup + 1)
    progress = (step - warmup) / max(1, total - warmup)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def step_seed(seed: int, batch: int, rank: int) -> int:
    """Seed of everything random in training batch `batch` of the run on process `rank`."""
    return int(np.random.SeedSequence((seed, batch, rank)).generate_state(1, np.uint64)[0] >> 1)


class FineTuning(pl.LightningModule):
    """Trains the adapter and the head of `model`; everything random is counted, not carried.

    Args:
        model: an adapted timm model that maps images `[b, 3, h, w]` to logits `[b, c]`.
        recipe: how.
        task: `binary | multiclass | multilabel | ordinal`.
        classes: names of the `c` classes.
        train_images: size of the training split; only needed by several processes.
        upper: runs in the place of `model`, whose parameters it shares, on what batches hold
            instead of images; see `wara.training.trunk.Upper`.
    """

    def __init__(
        self,
        model: nn.Module,
        recipe: Recipe,
        *,
        task: str,
        classes: Sequence[str],
        train_images: int = 0,
        upper: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.recipe = recipe
        self.method = adaptation_of(model).method
        runs = upper or model
        # Held in a tuple: what runs shares the parameters of `model` and must not register them a
        # second time.
        self._run: tuple[Callable[[Tensor], Tensor]] = (
            (torch.compile(runs),) if recipe.compiled else (runs,)
        )
        self.task, self.classes = task, list(classes)
        self.train_images = train_images
        self.optimiser_step_count = 0
        self.resume_optimiser: dict[str, Any] | None = None
        self.stop_requested: Callable[[], int] = lambda: 0
        self.agreed_stop = 0
        self.last_lr = 0.0
        self.val_loss: float | None = None
        self.val_metrics: dict[str, float | None] = {}
        self.micro: list[list[int]] = []
        self.shrunk: Callable[[int, int], None] = lambda batch, images: self.micro.append(
            [batch, images]
        )
        self._work: tuple[Batch, int] | None = None
        self._judged = Parts(self)
        self._totals: Tensor | None = None
        self._pending: list[Tensor] = []
        self._seen: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []

    def forward(self, images: Tensor) -> Tensor:
        """Logits `[b, c]` of images `[b, 3, h, w]`."""
        return self._run[0](images)

    # -- optimiser --------------------------------------------------------------------------

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW with one group per learning rate and weight decay.

        Named parameters are sorted by the model's own order, which is the same in every process
        and after every restart, so optimiser state can be put back by position.
        """
        groups: list[dict[str, Any]] = []
        for name, parameters in parameter_groups(self.model).items():
            matrices = [p for p in parameters if p.ndim > 1 and name != "core"]
            vectors = [p for p in parameters if p.ndim <= 1 or name == "core"]
            for chosen, decay in ((matrices, self.recipe.weight_decay), (vectors, 0.0)):
                if chosen:
                    peak = self.recipe.rates[name]
                    groups.append(
                        {
                            "params": chosen,
                            "lr": peak,
                            "peak": peak,
                            "weight_decay": decay,
                            "name": name,
                        }
                    )
        optimiser = torch.optim.AdamW(groups)
        if self.resume_optimiser is not None:
            optimiser.load_state_dict(self.resume_optimiser)
            self.resume_optimiser = None
        return optimiser

    def steps_per_epoch(self) -> int:
        """Optimiser steps in one epoch."""
        accumulate = self.trainer.accumulate_grad_batches
        return math.ceil(int(self.trainer.num_training_batches) / accumulate)

    # -- training ---------------------------------------------------------------------------

    def on_train_epoch_start(self) -> None:
        """Start the mean of the training loss anew."""
        self._totals = torch.zeros(2, dtype=torch.float64, device=self.device)
        self._pending = []

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Seed dropout and stochastic depth from (seed, batch number, rank)."""
        self._seed(batch_idx)

    def _number(self, batch_idx: int) -> int:
        """Number of a batch, counted over the whole run."""
        return self.current_epoch * int(self.trainer.num_training_batches) + batch_idx

    def _seed(self, batch_idx: int) -> None:
        torch.manual_seed(step_seed(self.recipe.seed, self._number(batch_idx), self.global_rank))

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return what `backward` starts from.

        One process computes nothing here: its gradient is made in `backward`, where a pass that
        ran out of memory can be undone and made again in parts, for nobody else holds its graph
        there. It returns the weight of the batch. Several processes, which must make their steps
        together, return this process's share of the mean loss.
        """
        # Lightning divides by `accumulate`; the last window of an epoch may be shorter.
        window = self.trainer.accumulate_grad_batches
        start = batch_idx // window * window
        steps = min(window, int(self.trainer.num_training_batches) - start)
        if self.trainer.world_size > 1:
            return self._share(batch, batch_idx) * (window / steps)
        self._work = batch, batch_idx
        return torch.tensor(window / steps, device=self.device)

    def _share(self, batch: Batch, batch_idx: int) -> Tensor:
        """Mean loss over the images of all processes, as this process's share of it."""
        losses = self._losses(self(batch["image"]), batch["label"])
        world = self.trainer.world_size
        # The last batch is filled up so that all processes make the same steps; the repeated
        # images count nothing. DDP averages gradients over processes: weighting by the images
        # of each keeps the result equal to one process's, also in an uneven batch.
        place = torch.arange(len(losses), device=losses.device)
        place = place + batch_idx * self.recipe.batch_size
        real = (place * world + self.global_rank) < self.train_images
        local, count = (losses * real).sum(), real.sum().to(losses)
        total = count.clone()
        torch.distributed.all_reduce(total)
        mean = local * world / total
        penalty = self.method.penalty(self.model)
        if penalty is not None:
            mean = mean + penalty
        self._note(local, count, mean)
        return mean

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Add the gradient of a batch to what the parameters hold.

        When memory runs out, what the failed pass added is taken away, and the batch is done over
        in parts of half the size, as are all that follow. The loss stays the mean over the
        batch, so the gradient is the same up to rounding; dropout draws its numbers for each part,
        from the same seed, so its masks are other ones of the same distribution. A head that
        normalises over the batch does so over each part.

        Args:
            loss: what `training_step` returned, over the batches of a step.
            args: see `LightningModule.backward`, and so is the next.
            kwargs: see there.

        Raises:
            WaraError: kind "resources" when memory does not suffice for one image.
        """
        if self._work is None:
            super().backward(loss, *args, **kwargs)
            return
        (batch, batch_idx), self._work = self._work, None
        number, size = self._number(batch_idx), len(batch["label"])
        size = min([size, *(images for start, images in self.micro if start <= number)])
        parameters = [p for p in self.parameters() if p.requires_grad]
        first = batch_idx % self.trainer.accumulate_grad_batches == 0
        before = [None if first or p.grad is None else p.grad.clone() for p in parameters]
        counted = [
            (buffer, buffer.clone())
            for module in self.modules()
            if isinstance(module, nn.modules.batchnorm._NormBase) and module.training
            for buffer in module.buffers()
        ]
        while not self._add_gradient(batch, size, loss):
            free_memory()
            for buffer, value in counted:
                buffer.copy_(value)
            if size == 1:
                raise WaraError(
                    "resources", "out of memory with one image at a time", "", ONE_IMAGE
                )
            size = (size + 1) // 2
            for parameter, gradient in zip(parameters, before, strict=True):
                parameter.grad = None if gradient is None else gradient.clone()
            self._seed(batch_idx)
            self.shrunk(number, size)

    def _add_gradient(self, batch: Batch, size: int, weight: Tensor) -> bool:
        """Run forward and back, `size` images at a time; False when memory ran out."""
        count = len(batch["label"])
        local, mean = torch.zeros((), device=self.device), torch.zeros((), device=self.device)
        try:
            for start in range(0, count, size):
                part = slice(start, start + size)
                with self.trainer.precision_plugin.train_step_context():
                    losses = self._losses(self(batch["image"][part]), batch["label"][part])
                    loss = losses.mean() if size >= count else losses.sum() / count
                    penalty = self.method.penalty(self.model) if part.stop >= count else None
                    if penalty is not None:
                        loss = loss + penalty
                (loss * weight).backward()
                local, mean = local + losses.detach().sum(), mean + loss.detach()
        except Exception as error:
            if not out_of_memory(error):
                raise
            return False
        self._note(local, torch.tensor(float(count), device=self.device), mean)
        return True

    def _note(self, local: Tensor, count: Tensor, mean: Tensor) -> None:
        if self._totals is not None:
            self._totals += torch.stack([local.detach(), count])
        self._pending.append(mean.detach())

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Set the learning rates, refuse non-finite numbers, clip.

        Raises:
            WaraError: kind "nonfinite", before the update, on every process at once.
        """
        per_epoch = self.steps_per_epoch()
        factor = schedule(
            self.optimiser_step_count,
            total=self.recipe.epochs * per_epoch,
            warmup=round(self.recipe.warmup_epochs * per_epoch),
        )
        parameters = []
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * factor
            parameters += group["params"]
        self.last_lr = self.recipe.main_rate * factor
        gradients = [p.grad for p in parameters if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        loss = torch.stack(self._pending).sum()
        self._pending = []
        # One vector, one wait for the device: is the loss bad, is the gradient bad, was a stop
        # asked for. Processes must agree, or one would wait for the others for ever.
        flags = torch.stack(
            [
                (~loss.isfinite()).float(),
                (~norm.isfinite()).float(),
                torch.tensor(float(self.stop_requested()), device=loss.device),
            ]
        )
        if self.trainer.world_size > 1:
            torch.distributed.all_reduce(flags, op=torch.distributed.ReduceOp.MAX)
        bad_loss, bad_norm, stop = flags.tolist()
        self.agreed_stop = int(stop)
        if bad_loss or bad_norm:
            what = "the loss" if bad_loss else "the gradient"
            raise WaraError(
                "nonfinite",
                f"{what} is not finite; no update was made",
                f"epoch {self.current_epoch + 1}, step {self.optimiser_step_count + 1}",
                _GRAD_REMEDY,
            )
        if self.recipe.clip_grad is not None:
            torch.nn.utils.clip_grads_with_norm_(parameters, self.recipe.clip_grad, norm)
        self.optimiser_step_count += 1

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Step, then let the method act on the gradients of the step."""
        super().optimizer_step(*args, **kwargs)
        total = self.recipe.epochs * self.steps_per_epoch()
        self.method.on_step(self.model, self.optimiser_step_count, total)

    def mean_train_loss(self) -> float | None:
        """Mean training loss of the epoch over the images of all processes."""
        if self._totals is None:
            return None
        totals = self._totals.clone()
        if self.trainer.world_size > 1:
            torch.distributed.all_reduce(totals)
        total, count = totals.tolist()
        return total / count if count else None

    # -- validation -------------------------------------------------------------------------

    def on_validation_epoch_start(self) -> None:
        """Forget the previous epoch's predictions."""
        self._seen = []

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Keep logits, labels, losses and indices of the batch."""
        logits = self._judged(batch["image"]).float()
        losses = self._losses(logits, batch["label"])
        parts = (logits, batch["label"], losses, batch["index"])
        self._seen.append(tuple(part.detach().cpu() for part in parts))  # type: ignore[arg-type]

    def on_validation_epoch_end(self) -> None:
        """Compute `val_loss` and `val_metrics` over every validation image once.

        Raises:
            WaraError: kind "nonfinite", when a logit is not finite.
        """
        mine = [
            np.concatenate([part[i].numpy() for part in self._seen]) if self._seen else None
            for i in range(4)
        ]
        self._seen = []
        everyone: list[Any] = [mine]
        if self.trainer.world_size > 1:
            everyone = [None] * self.trainer.world_size
            torch.distributed.all_gather_object(everyone, mine)
        full = [parts for parts in everyone if parts[0] is not None]
        logits, labels, losses, index = (
            np.concatenate([parts[i] for parts in full]) for i in range(4)
        )
        # Order and multiplicity do not depend on how images were dealt to processes.
        _, once = np.unique(index, return_index=True)
        if not np.isfinite(logits).all():
            raise WaraError(
                "nonfinite",
                "the model gives outputs that are not finite",
                f"validation after epoch {self.current_epoch + 1}",
                _GRAD_REMEDY,
            )
        self.val_loss = float(losses[once].astype(np.float64).mean())
        self.val_metrics = point_metrics(
            labels[once],
            to_probs(logits[once], task=self.task),
            task=self.task,
            classes=self.classes,
        )

    def _losses(self, logits: Tensor, labels: Tensor) -> Tensor:
        recipe = self.recipe
        return loss_per_image(
            logits, labels, loss=recipe.loss, weights=recipe.class_weights,
            gamma=recipe.focal_gamma, smoothing=recipe.label_smoothing,
        )  # fmt: skip
