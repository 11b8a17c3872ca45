"""The model of a run, as it is, on the images that judge it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor
from torch.utils.data import DataLoader

from wara.data.loader import eval_batches
from wara.evaluation.split import Split, evaluate_split
from wara.training.setup import Prepared


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


def first_batch(run: Prepared, name: str) -> Tensor:
    """Return the first images of a split, `[b, 3, h, w]`."""
    return next(iter(_batches(run, name)))["image"]


def _batches(run: Prepared, name: str) -> DataLoader[Any]:
    config = run.config
    return eval_batches(
        run.images, run.indices(name), run.backbone.spec,
        batch_size=config.batch_size // config.devices, workers=config.data.workers,
    )  # fmt: skip
