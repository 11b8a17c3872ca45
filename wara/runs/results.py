"""What a trained model is worth, and the files that say it: tables, metrics, figures, report."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from wara.adapters import save_adapter, singular_values, subband_energy
from wara.data.balance import class_counts
from wara.evaluation import plots
from wara.evaluation.predict import Predictions
from wara.evaluation.split import Split
from wara.runs import report, tables
from wara.runs.exact import sentences
from wara.runs.folder import RunFolder
from wara.runs.progress import Progress
from wara.storage import write_json, write_text
from wara.vit import BackboneInfo

_ENERGY_IMAGES = 32  # enough for a stable mean; the figure is about shares


@dataclass(frozen=True)
class Facts:
    """What a run is about, as its files tell it.

    Args:
        dataset: name of the card in use.
        public: what may be told of it to strangers.
        synthetic: whether its images were drawn.
        task: of the data set.
        classes: names of the outputs, in order.
        backbone: what was adapted.
        bits: how 16-bit files were read, see `wara.images.ImageSpec`.
        greys: how DICOM files were read.
        method: name of the method.
        seed: of the run.
        counts: trained and frozen parameters, see `count_parameters`.
        banners: what a reader must not miss.
        plan: lines of the plan.
    """

    dataset: str
    public: str
    synthetic: bool
    task: str
    classes: Sequence[str]
    backbone: BackboneInfo
    bits: int | None
    greys: str
    method: str
    seed: int
    counts: Mapping[str, int]
    banners: Sequence[str]
    plan: Sequence[str]


@dataclass(frozen=True)
class Update:
    """What an adapter learnt, in numbers; empty where a method has none.

    Args:
        energy: layer -> subband -> energy, see `subband_energy`.
        spectra: layer -> subband -> singular values, see `singular_values`.
    """

    energy: Mapping[str, Mapping[str, float]]
    spectra: Mapping[str, Mapping[str, Sequence[float]]]


def measure_update(model: nn.Module, images: Tensor) -> Update:
    """Measure the update of an adapted model.

    Args:
        model: on its device.
        images: `[b, 3, H, W]` on it too; the first ones decide the energies.
    """
    spectra = {
        layer: {band: values.tolist() for band, values in bands.items()}
        for layer, bands in singular_values(model).items()
    }
    return Update(subband_energy(model, images[:_ENERGY_IMAGES]), spectra)


def write_results(
    folder: RunFolder,
    facts: Facts,
    splits: Mapping[str, Split],
    model: nn.Module,
    update: Update,
    progress: Progress,
    *,
    epochs: int,
    warmup_epochs: float,
    bootstrap: int,
    batch_size: int,
    accumulate: int,
    peak_memory_mb: float,
) -> dict[str, Any]:
    """Write everything that a finished run leaves, `metrics.json` last.

    Args:
        folder: of the run.
        facts: what it is about.
        splits: `val` and `test`, evaluated.
        model: in the state of the best epoch.
        update: what it learnt.
        progress: how training went.
        epochs: planned number of epochs.
        warmup_epochs: length of the warm-up.
        bootstrap: resamples behind the intervals.
        batch_size: images per batch, as the config has it.
        accumulate: batches per step, likewise.
        peak_memory_mb: most memory that training took.

    Returns:
        The content of `metrics.json`.
    """
    for name, split in splits.items():
        tables.write_predictions(
            folder.predictions(name),
            split.found,
            files=split.files,
            patients=split.patients,
            classes=facts.classes,
            synthetic=facts.synthetic,
        )
    micro = progress.micro[-1][1] if progress.micro else batch_size
    metrics = {
        "synthetic": facts.synthetic,
        "dataset": facts.dataset,
        "backbone": facts.backbone.name,
        "method": facts.method,
        "seed": facts.seed,
        "adapter_params": facts.counts["adapter"],
        "head_params": facts.counts["head"],
        "epochs": progress.epoch,
        "best_epoch": progress.best_epoch,
        "monitor": progress.monitor,
        "micro_batch": micro,
        "accumulate": accumulate * math.ceil(batch_size / micro),
        "changes": [change["name"] for change in progress.changes],
        "seconds": round(progress.seconds, 3),
        "peak_memory_mb": peak_memory_mb,
        **{name: split.scores for name, split in splits.items()},
    }
    save_adapter(
        model,
        folder.adapter,
        backbone=facts.backbone,
        task=facts.task,
        classes=facts.classes,
        bits=facts.bits,
        greys=facts.greys,
        extra={
            "synthetic": facts.synthetic,
            "dataset": facts.public,
            "best_epoch": progress.best_epoch,
        },
    )
    shown = shown_split(splits)
    _figures(folder, facts, splits[shown].found, update, progress)
    classes = [_class_table(name, split.found, facts) for name, split in splits.items()]
    clustered = any(p is not None for split in splits.values() for p in split.patients)
    resampled = (
        f"Values with 95 % intervals from {bootstrap} bootstrap resamples of "
        f"{'patients' if clustered else 'images'}."
        if bootstrap
        else "Values without intervals (bootstrap: 0)."
    )
    text = report.markdown(
        title=f"{facts.dataset}, {facts.method}, seed {facts.seed}",
        banners=facts.banners,
        plan=facts.plan,
        outcome=[
            f"{progress.epoch} of {epochs} epochs, {progress.step} steps, "
            f"{progress.seconds:.0f} s, peak memory {peak_memory_mb:.0f} MB",
            f"best epoch {progress.best_epoch} by {progress.monitor} on the validation images "
            f"({progress.best_value:.4f}); everything below is that epoch's, in float32",
            *_remarks(progress, warmup_epochs),
            *_parts(progress, batch_size),
            *sentences(progress.changes),
            *filter(None, (table.never(facts.classes) for table in classes)),
        ],
        classes=facts.classes,
        tables=classes,
        val=splits["val"].scores,
        test=splits["test"].scores,
        plots=folder.plots,
        shown="test" if shown == "test" else "validation",
        resampled=resampled,
    )
    write_text(folder.report, text)
    # Last: a folder with metrics.json holds everything else too.
    write_json(folder.metrics, metrics)
    return metrics


def _remarks(progress: Progress, warmup_epochs: float) -> list[str]:
    """Return what a reader should doubt about the best epoch."""
    if not 0 < progress.best_epoch <= warmup_epochs:
        return []
    return [
        f"the best epoch lies inside the warm-up of {warmup_epochs:g} epochs, before the learning "
        "rate had its full size: lower lr, or look whether the validation images are enough to "
        "choose by"
    ]


def _parts(progress: Progress, batch_size: int) -> list[str]:
    """Return where memory ran out, and what was made of it."""
    return [
        f"out of memory in batch {batch + 1}: from there on batches of {batch_size} were computed "
        f"{images} images at a time, with the mean loss over the whole batch"
        for batch, images in progress.micro
    ]


def _class_table(name: str, found: Predictions, facts: Facts) -> report.ClassTable:
    count = len(facts.classes)
    images, predicted = (class_counts(part, count) for part in (found.labels, found.predicted))
    words = {"val": "validation"}.get(name, name)
    return report.ClassTable(words, images.tolist(), predicted.tolist())


def shown_split(splits: Mapping[str, Split]) -> str:
    """Return the split whose figures are drawn: the test images, where there are any."""
    return "test" if splits["test"].files else "val"


def _figures(
    folder: RunFolder,
    facts: Facts,
    found: Predictions,
    update: Update,
    progress: Progress,
) -> None:
    where, classes, synthetic = folder.plots, facts.classes, facts.synthetic
    labels, probs = found.labels, found.probs
    plots.learning_curves(
        progress.history,
        where / "learning_curves.png",
        monitor=progress.monitor,
        best_epoch=progress.best_epoch,
        synthetic=synthetic,
    )
    plots.roc_curves(labels, probs, classes, where / "roc.png", synthetic=synthetic)
    plots.pr_curves(labels, probs, classes, where / "pr.png", synthetic=synthetic)
    plots.confusion(labels, found.predicted, classes, where / "confusion.png", synthetic=synthetic)
    plots.reliability(labels, probs, where / "reliability.png", synthetic=synthetic)
    if update.energy:
        plots.subband_energy(update.energy, where / "subband_energy.png", synthetic=synthetic)
    if update.spectra:
        plots.singular_values(update.spectra, where / "singular_values.png", synthetic=synthetic)
