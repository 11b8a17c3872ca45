"""From a config to the things a run is made of: images, splits, model, loss, plan."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from wara.adapters import adapt, base_hash, count_parameters, method_from_options
from wara.adapters.inject import record_of
from wara.backbones import NANO, BackboneInfo, build_backbone
from wara.config import RunConfig
from wara.data import gate, sources
from wara.data.datamodule import ImageDataModule
from wara.errors import WaraError
from wara.images import ImageSpec
from wara.training import losses
from wara.training.plan import PHANTOM_BANNER, Plan, SplitTable, pick_device, pick_precision
from wara.training.provenance import data_sha256

PHANTOM_SIDE = 112  # pixels; what the shipped backbone reads, drawn in milliseconds


@dataclass
class Prepared:
    """All a run needs, checked.

    Args:
        images: the data set.
        splits: `train | val | test` per image.
        rows: rows of `splits.csv`.
        data_hash: hash of `rows`.
        model: adapted model, on the CPU.
        info: the backbone.
        base_hash: hash of the frozen weights.
        loss: name of the loss.
        weights: class weights, where the loss takes them.
        accelerator: `cpu | gpu`.
        precision: Lightning's name of the precision.
        batch_size: images per step and process.
        plan: what is printed.
    """

    images: sources.ImageSet
    splits: list[str]
    rows: list[tuple[str, str, str | None, str, str]]
    data_hash: str
    model: nn.Module
    info: BackboneInfo
    base_hash: str
    loss: str
    weights: Tensor | None
    accelerator: str
    precision: str
    batch_size: int
    plan: Plan

    @property
    def task(self) -> str:
        """Task of the data set."""
        return self.images.card.task

    @property
    def classes(self) -> list[str]:
        """Class names."""
        return list(self.images.card.class_names)

    @property
    def spec(self) -> ImageSpec:
        """What the backbone wants its images to be."""
        return image_spec(self.info)

    def data_module(self, config: RunConfig) -> ImageDataModule:
        """A fresh data module over the splits."""
        return ImageDataModule(
            self.images,
            self.splits,
            spec=self.spec,
            batch_size=self.batch_size,
            workers=config.data.workers,
            augment=config.data.augment,
            seed=config.seed,
        )


def image_spec(info: BackboneInfo) -> ImageSpec:
    """What a backbone wants its images to be."""
    return ImageSpec(
        size=info.img_size, mean=info.mean, std=info.std, interpolation=info.interpolation
    )


def prepare(config: RunConfig, *, out: Path, report_dir: Path | None) -> Prepared:
    """Open the data, check it, build the model.

    Args:
        config: of the run, see `resolve`.
        out: the run's folder, for the plan.
        report_dir: where a long list of data faults is written, the only thing that is; None to
            write nothing.

    Raises:
        WaraError: any refusal that can be known before training.
    """
    assert config.lr is not None, "the config is not resolved"
    if config.batch_size % config.devices:
        raise WaraError(
            "config", f"batch_size {config.batch_size} is no multiple of devices {config.devices}",
            "batch_size", "it counts the images of all devices together; choose a multiple",
        )  # fmt: skip
    accelerator, device = pick_device(config.accelerator, config.devices)
    precision, precision_text = pick_precision(config.amp, accelerator)

    # Data come from the split's seed, so that runs with different seeds see the same images.
    images = sources.open_source(
        config.dataset,
        cache=config.data.cache,
        offline=config.offline,
        seed=config.data.split_seed,
        images=config.data.images,
        phantom_size=PHANTOM_SIDE,
    )
    losses.check_options(
        config.loss, images.card.task, smoothing=config.label_smoothing, monitor=config.monitor
    )
    # The model comes before the pass over all images: a wrong option is told in a second.
    model, info, method = _model(config, images)
    splits = gate.assign_splits(
        images,
        val_fraction=config.data.val_fraction,
        test_fraction=config.data.test_fraction,
        seed=config.data.split_seed,
    )
    notes = gate.check(images, splits, report_dir=report_dir, spec=image_spec(info))
    card, banners = images.card, _banners(config, images, info)
    labels = [record.label for record in images.records]
    patients = [record.patient for record in images.records]
    table = SplitTable.of(labels, patients, splits, card.class_names)
    loss, why = losses.resolve_loss(config.loss, card.task, table.counts["train"])
    weights, weighted = losses.loss_weights(
        "auto" if config.loss == "auto" and loss == "bce" else loss,
        card.task, table.counts["train"], table.images["train"],
    )  # fmt: skip
    rows = [
        (record.file, _label(record.label), record.patient, split, images.sha256(i))
        for i, (record, split) in enumerate(zip(images.records, splits, strict=True))
    ]
    plan = Plan(
        dataset=f"{card.name}: {card.title} ({card.task}, {images.origin})",
        banners=banners,
        notes=tuple(note for note in notes if note not in banners),
        table=table,
        backbone=(
            f"{info.name}, {info.img_size[0]} x {info.img_size[1]} px, grid {info.grid_size[0]} x "
            f"{info.grid_size[1]}, weights: {info.weights_source}"
        ),
        method=method,
        counts=count_parameters(model),
        device=device + (f", {config.devices} processes" if config.devices > 1 else ""),
        precision=precision_text,
        loss=f"{loss}{weighted} ({why})",
        schedule=(
            f"{config.epochs} epochs, batch {config.batch_size}"
            + (f" x {config.accumulate}" if config.accumulate > 1 else "")
            + f", lr {config.lr:g}, cores {config.lr_core:g}, head {config.lr_head:g}"
        ),
        out=str(out),
    )
    return Prepared(
        images=images,
        splits=splits,
        rows=rows,
        data_hash=data_sha256(rows),
        model=model,
        info=info,
        base_hash=base_hash(model),
        loss=loss,
        weights=weights,
        accelerator=accelerator,
        precision=precision,
        batch_size=config.batch_size // config.devices,
        plan=plan,
    )


def _model(config: RunConfig, images: sources.ImageSet) -> tuple[nn.Module, BackboneInfo, str]:
    wanted = config.backbone
    name = wanted.name
    if images.substituted_for is not None and wanted.weights is None:
        # Phantoms stand in for data that could not be had; the small backbone goes with them, so
        # that the run is the same whether or not some weights happen to be cached.
        name = NANO
    torch.manual_seed(config.seed)
    model, info = build_backbone(
        name,
        num_classes=len(images.card.class_names),
        img_size=wanted.img_size,
        weights=wanted.weights,
        drop_rate=wanted.drop_rate,
        drop_path_rate=wanted.drop_path_rate,
        offline=config.offline,
    )
    torch.manual_seed(config.seed)
    method = method_from_options(config.adapter.method, config.adapter.options)
    record = record_of(adapt(model, method))
    options = ", ".join(f"{key}={value}" for key, value in _shown(record.method).items())
    text = f"{config.adapter.method}" + (f" ({options})" if options else "")
    if record.budget is not None:
        wanted_size, size = record.budget
        budget = config.adapter.options["budget"]
        text += f"; budget {budget}: {wanted_size:,} parameters wanted, {size:,} got"
    return model, info, text


def _shown(method: Any) -> dict[str, Any]:
    return {key: value for key, value in vars(method).items() if value is not None}


def _banners(config: RunConfig, images: sources.ImageSet, info: BackboneInfo) -> tuple[str, ...]:
    banners = list(images.notes[:1]) if images.substituted_for is not None else []
    if images.synthetic:
        banners.append(PHANTOM_BANNER)
    if info.name != config.backbone.name:
        banners.append(
            f"backbone '{config.backbone.name}' is replaced by '{info.name}', which is shipped "
            "with the package (offline: phantom)."
        )
    return tuple(banners)


def _label(label: int | tuple[int, ...]) -> str:
    return str(label) if isinstance(label, int) else " ".join(map(str, label))
