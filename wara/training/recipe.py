"""All that decides training, as one object."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Recipe:
    """How a model is trained. Two runs with one recipe, data and weights give one result.

    Args:
        rates: peak learning rate of each group of parameters that trains.
        loss: name of the loss, see `losses.loss_per_image`.
        class_weights: `[c]`, where the loss takes them.
        focal_gamma: focusing exponent of `focal`.
        label_smoothing: of `ce` and `weighted_ce`.
        epochs: length of the schedule.
        warmup_epochs: length of the linear warm-up.
        batch_size: images per process and batch.
        accumulate: batches per optimiser step.
        weight_decay: of AdamW, on matrices; cores, biases and other vectors have none.
        clip_grad: largest gradient norm; None leaves gradients alone.
        monitor: validation metric that picks the best epoch.
        patience: epochs without a better value before stopping; None never stops.
        seed: of order, augmentation and dropout.
        augment: name of the preset of the training images.
        views: augmented views per training image; None draws new ones in every epoch.
        workers: processes that load images; they change nothing.
        precision: Lightning's name of it.
        accelerator: `cpu | gpu`.
        devices: processes that train together.
        timeout: seconds that one of them waits for another.
        deterministic: only deterministic kernels.
        compiled: run the model through `torch.compile`.
    """

    rates: Mapping[str, float]
    loss: str
    epochs: int
    batch_size: int
    weight_decay: float
    class_weights: Tensor | None = None
    focal_gamma: float = 2.0
    label_smoothing: float = 0.0
    warmup_epochs: float = 0.0
    accumulate: int = 1
    clip_grad: float | None = None
    monitor: str = "auc_macro"
    patience: int | None = None
    seed: int = 0
    augment: str = "off"
    views: int | None = None
    workers: int = 0
    precision: str = "32-true"
    accelerator: str = "cpu"
    devices: int = 1
    timeout: float = 1800.0
    deterministic: bool = True
    compiled: bool = False

    @property
    def main_rate(self) -> float:
        """The rate of what the method trains, which `lr` sets."""
        return next(iter(self.rates.values()))
