"""After training: predictions of the best epoch, metrics, figures, report, adapter files."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from wara.adapters import save_adapter, singular_values, subband_energy
from wara.evaluation import plots
from wara.evaluation.metrics import decide, evaluate, metric_names
from wara.training import files, report
from wara.training.folder import RunFolder
from wara.training.journal import Progress
from wara.training.provenance import peak_memory_mb
from wara.training.setup import Prepared
from wara.training.signals import StopSignals
from wara.training.task import probabilities

_ENERGY_IMAGES = 32  # enough for a stable mean; the figure is about shares


@dataclass
class Predictions:
    """Outputs for the images of a split, in the order of the data set.

    Args:
        index: `[n]`, places in `ImageSet.records`.
        labels: `[n]`, or 0/1 `[n, c]`.
        logits: `[n, c]`, float32.
        probs: `[n, c]`, float64.
        predicted: like `labels`.
    """

    index: NDArray[np.int64]
    labels: NDArray[np.int64]
    logits: NDArray[np.float32]
    probs: NDArray[np.float64]
    predicted: NDArray[np.int64]


@torch.no_grad()
def predict(
    model: nn.Module,
    batches: Iterable[dict[str, Tensor]],
    task: str,
    classes: int,
    stop: StopSignals,
) -> Predictions:
    """Predict in float32, whatever training used: the arithmetic of who loads the adapter."""
    device = next(model.parameters()).device
    model.eval()
    logits, labels, index = [], [], []
    for batch in batches:
        stop.check()
        logits.append(model(batch["image"].to(device)).float().cpu())
        labels.append(batch["label"].long())
        index.append(batch["index"])
    if not index:
        none = np.zeros(0, np.int64)
        labels_none = np.zeros((0, classes), np.int64) if task == "multilabel" else none
        empty = np.zeros((0, classes), np.float32)
        return Predictions(none, labels_none, empty, empty.astype(np.float64), labels_none)
    order = torch.cat(index).argsort()
    values = torch.cat(logits)[order].numpy()
    probs = probabilities(values, task)
    return Predictions(
        index=torch.cat(index)[order].numpy(),
        labels=torch.cat(labels)[order].numpy(),
        logits=values,
        probs=probs,
        predicted=decide(probs, task=task),
    )


@dataclass
class Outcome:
    """What a finished run found.

    Args:
        metrics: content of `metrics.json`.
        test: predictions for the test images.
        table: lines of the result table.
    """

    metrics: dict[str, Any]
    test: Predictions
    table: list[str]


def finish(
    prepared: Prepared,
    model: nn.Module,
    loaders: dict[str, Iterable[dict[str, Tensor]]],
    folder: RunFolder,
    progress: Progress,
    stop: StopSignals,
    *,
    dataset: str,
    method: str,
    seed: int,
    epochs: int,
    bootstrap: int,
) -> Outcome:
    """Evaluate the model as it is, and write all results.

    Args:
        prepared: the run.
        model: in the state of the best epoch.
        loaders: batches of `val` and `test`.
        folder: where to write.
        progress: how training went.
        stop: the signals.
        dataset: name for `metrics.json`.
        method: name for `metrics.json`.
        seed: of the run and of the bootstrap.
        epochs: planned number of epochs.
        bootstrap: resamples behind the intervals.
    """
    records, task, classes = prepared.images.records, prepared.task, prepared.classes
    found: dict[str, Predictions] = {}
    scores: dict[str, dict[str, dict[str, Any]]] = {}
    for split in ("val", "test"):
        result = found[split] = predict(model, loaders[split], task, len(classes), stop)
        patients = [records[i].patient for i in result.index]
        folder.write_predictions(
            split,
            names=[records[i].file for i in result.index],
            patients=patients,
            labels=result.labels,
            predicted=result.predicted,
            probs=result.probs,
            logits=result.logits,
            classes=classes,
        )
        scores[split] = _scores(
            result.labels, result.probs, task=task, classes=classes,
            patients=None if set(patients) == {None} else patients,
            bootstrap=bootstrap, seed=seed, split=split,
        )  # fmt: skip
        stop.check()
    counts = prepared.plan.counts
    metrics = {
        "synthetic": prepared.images.synthetic,
        "dataset": dataset,
        "backbone": prepared.info.name,
        "method": method,
        "seed": seed,
        "adapter_params": counts["adapter"],
        "head_params": counts["head"],
        "epochs": progress.epoch,
        "best_epoch": progress.best_epoch,
        "monitor": progress.monitor,
        "seconds": round(progress.seconds, 3),
        "peak_memory_mb": peak_memory_mb(prepared.accelerator == "gpu"),
        **scores,
    }
    save_adapter(
        model,
        folder.adapter,
        {
            "synthetic": prepared.images.synthetic,
            "dataset": dataset,
            "task": task,
            "classes": classes,
            "backbone": prepared.info.name,
            "backbone_sha256": prepared.info.weights_sha256,
            "img_size": list(prepared.info.img_size),
            "mean": list(prepared.info.mean),
            "std": list(prepared.info.std),
            "interpolation": prepared.info.interpolation,
            "best_epoch": progress.best_epoch,
        },
    )
    shown = "test" if len(found["test"].index) else "val"
    _figures(prepared, model, loaders[shown], found[shown], folder, progress)
    clustered = any(record.patient is not None for record in records)
    resampled = (
        f"Values with 95 % intervals from {bootstrap} bootstrap resamples of "
        f"{'patients' if clustered else 'images'}."
        if bootstrap
        else "Values without intervals (bootstrap: 0)."
    )
    text = report.markdown(
        title=f"{dataset}, {method}, seed {seed}",
        banners=prepared.plan.banners,
        plan=prepared.plan.lines(),
        outcome=[
            f"{progress.epoch} of {epochs} epochs, {progress.step} steps, "
            f"{progress.seconds:.0f} s, peak memory {metrics['peak_memory_mb']:.0f} MB",
            f"best epoch {progress.best_epoch} by {progress.monitor} on the validation images "
            f"({progress.best_value:.4f}); everything below is that epoch's, in float32",
        ],
        val=scores["val"],
        test=scores["test"],
        plots=folder.plots,
        shown="test" if shown == "test" else "validation",
        resampled=resampled,
        usage=_usage(prepared),
    )
    files.write_text(folder.report, text)
    # Last: a folder with metrics.json holds everything else too.
    files.write_json(folder.metrics, metrics)
    return Outcome(metrics, found["test"], report.result_table(scores["val"], scores["test"]))


def _scores(
    labels: NDArray[np.int64],
    probs: NDArray[np.float64],
    *,
    task: str,
    classes: list[str],
    split: str,
    **options: Any,
) -> dict[str, dict[str, Any]]:
    if not len(labels):
        reason = f"there are no {split} images"
        return {
            name: {"value": None, "low": None, "high": None, "n": 0, "reason": reason}
            for name in metric_names(task, classes)
        }
    return evaluate(labels, probs, task=task, classes=classes, **options)


def _figures(
    prepared: Prepared,
    model: nn.Module,
    batches: Iterable[dict[str, Tensor]],
    test: Predictions,
    folder: RunFolder,
    progress: Progress,
) -> None:
    where, classes = folder.plots, prepared.classes
    synthetic = prepared.images.synthetic
    plots.learning_curves(progress.history, where / "learning_curves.png", synthetic=synthetic)
    plots.roc_curves(test.labels, test.probs, classes, where / "roc.png", synthetic=synthetic)
    plots.pr_curves(test.labels, test.probs, classes, where / "pr.png", synthetic=synthetic)
    plots.confusion(
        test.labels, test.predicted, classes, where / "confusion.png", synthetic=synthetic
    )
    plots.reliability(test.labels, test.probs, where / "reliability.png", synthetic=synthetic)
    device = next(model.parameters()).device
    images = next(iter(batches))["image"][:_ENERGY_IMAGES].to(device)
    energy = subband_energy(model, images)
    if energy:
        plots.subband_energy(energy, where / "subband_energy.png", synthetic=synthetic)
    spectra = singular_values(model)
    if spectra:
        numbers = {
            layer: {band: values.tolist() for band, values in bands.items()}
            for layer, bands in spectra.items()
        }
        plots.singular_values(numbers, where / "singular_values.png", synthetic=synthetic)


def _usage(prepared: Prepared) -> str:
    info, c = prepared.info, len(prepared.classes)
    weights = f", weights={info.weights_source.removeprefix('file ')!r}"
    given = weights if info.weights_source.startswith("file ") else ""
    return (
        "import wara\n\n"
        f"model, info = wara.build_backbone({info.name!r}, num_classes={c}, "
        f"img_size={info.img_size}{given})\n"
        'wara.load_adapter(model, "adapter")'
    )
