"""From a config to the facts of a run: images, splits, model, loss, device."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from wara.adapters import (
    adapt,
    adaptation_of,
    base_hash,
    count_parameters,
    parameter_groups,
)
from wara.backbones import NANO, build_backbone
from wara.config import RunConfig
from wara.data import appearance, gate, sources
from wara.data.balance import SplitTable
from wara.data.imageset import ImageSet
from wara.data.twins import TwinRule
from wara.errors import WaraError
from wara.images import ImageSpec
from wara.runs.provenance import data_sha256
from wara.runs.tables import SplitRow, hashed_cells
from wara.training import losses
from wara.training.cache import TrunkCache
from wara.training.recipe import Recipe
from wara.training.trunk import check_trunk, trunk_depth
from wara.vit import BackboneInfo


@dataclass(frozen=True)
class Loss:
    """The loss of a run.

    Args:
        name: see `losses.loss_per_image`.
        why: why it is that one.
        weights: class weights `[c]`, where it takes them.
        weighted: what the plan says about them.
    """

    name: str
    why: str
    weights: Tensor | None
    weighted: str


@dataclass(frozen=True)
class Device:
    """Where a run trains, and in which arithmetic.

    Args:
        accelerator: `cpu | gpu`.
        name: for people.
        precision: Lightning's name of it.
        arithmetic: for people.
    """

    accelerator: str
    name: str
    precision: str
    arithmetic: str

    @property
    def torch_name(self) -> str:
        """PyTorch's name of it."""
        return "cuda" if self.accelerator == "gpu" else "cpu"


@dataclass(frozen=True)
class Prepared:
    """All a run needs, checked.

    Args:
        config: with nothing left to look up; the method as it trains.
        images: the data set.
        splits: `train | val | test` per image.
        rows: rows of `splits.csv`.
        data_hash: hash of `rows`.
        table: images per split and class.
        notes: what the data gate remarks.
        model: adapted, on the CPU.
        backbone: what it was built from.
        base_hash: fingerprint of the frozen base.
        counts: trained and frozen parameters.
        budget: where one was set: as written, wanted and fitted number of adapter parameters.
        loss: of the run.
        device: of the run.
        trunk: the cache of what the frozen lower blocks give, where one was asked for and there
            are such blocks.
    """

    config: RunConfig
    images: ImageSet
    splits: list[str]
    rows: list[SplitRow]
    data_hash: str
    table: SplitTable
    notes: list[str]
    model: nn.Module
    backbone: BackboneInfo
    base_hash: str
    counts: dict[str, int]
    budget: tuple[str | float, int, int] | None
    loss: Loss
    device: Device
    trunk: TrunkCache | None

    @property
    def task(self) -> str:
        """Task of the data set."""
        return self.images.card.task

    @property
    def classes(self) -> list[str]:
        """Class names."""
        return self.images.card.class_names

    @property
    def identity(self) -> dict[str, object]:
        """What a resumed run must agree with its checkpoint on."""
        return {
            "base_sha256": self.base_hash,
            "data_sha256": self.data_hash,
            "classes": self.classes,
            "synthetic": self.images.synthetic,
        }

    def indices(self, split: str) -> list[int]:
        """Record numbers of a split."""
        return [i for i, name in enumerate(self.splits) if name == split]

    def recipe(self) -> Recipe:
        """Return all that decides training."""
        config = self.config
        return Recipe(
            rates=config.rates,
            loss=self.loss.name,
            class_weights=self.loss.weights,
            focal_gamma=config.focal_gamma,
            label_smoothing=config.label_smoothing,
            epochs=config.epochs,
            warmup_epochs=config.warmup_epochs,
            batch_size=config.batch_size // config.devices,
            accumulate=config.accumulate,
            weight_decay=config.weight_decay,
            clip_grad=config.clip_grad,
            monitor=config.monitor,
            patience=config.patience,
            seed=config.seed,
            augment=_preset(config, self.images),
            views=config.data.views,
            workers=config.data.workers,
            precision=self.device.precision,
            accelerator=self.device.accelerator,
            devices=config.devices,
            timeout=config.ddp_timeout,
            deterministic=config.deterministic,
            compiled=config.compile,
        )

    def fill_trunk(self, say: Callable[[str], None] = lambda text: None) -> None:
        """Compute what the trunk cache lacks, if there is one; see `TrunkCache.fill`."""
        if self.trunk is not None:
            config, accelerator = self.config, self.device.accelerator
            self.trunk.fill(
                self.model, accelerator=accelerator, batch_size=config.batch_size,
                workers=config.data.workers, say=say,
            )  # fmt: skip


def prepare(
    config: RunConfig,
    *,
    report_dir: Path | None,
    confirm: Callable[[RunConfig], None] = lambda config: None,
    opened: Callable[[RunConfig], ImageSet] | None = None,
    known: bool = False,
) -> Prepared:
    """Open the data, build the model, check every image.

    Args:
        config: of the run.
        report_dir: where a long list of data faults is written, the only thing that is; None to
            write nothing.
        confirm: called with the config as it will train, before all images are read; may raise.
        opened: returns the images of a config, which may have been read before; `open_images`
            where there is nothing to share.
        known: read no file again that has not changed since an earlier check; for a plan only.

    Raises:
        WaraError: any refusal that can be known before training.
    """
    if config.batch_size % config.devices:
        raise WaraError(
            "config", f"batch_size {config.batch_size} is no multiple of devices {config.devices}",
            "batch_size", "it counts the images of all devices together; choose a multiple",
        )  # fmt: skip
    device = pick_device(config)
    images = (opened or open_images)(config)
    sources.check_apart(config.folder, "out", images)
    losses.check_options(
        config.loss, images.card.task, smoothing=config.label_smoothing, monitor=config.monitor
    )
    # The model comes before the pass over all images: a wrong option is told in a second.
    model, backbone = _model(config, images)
    adaptation = adaptation_of(model)
    budget = None
    if adaptation.budget is not None:
        asked: Any = getattr(config.adapter, "budget", None)
        budget = (asked, *adaptation.budget)
    config = config.resolved(adaptation.method)
    confirm(config)
    depth, shape = _trunk_of(model, config, backbone.img_size)
    survey(config, images, backbone.spec, known=known)
    splits = divide(config, images)
    notes = gate.check(images, splits, report_dir=report_dir, rule=twin_rule(config))
    notes += appearance.warnings(images)
    labels = [record.label for record in images.records]
    patients = [record.patient for record in images.records]
    table = SplitTable.of(labels, patients, splits, images.card.class_names)
    rows = [
        SplitRow(record.file, record.label, record.patient, split, images.sha256(i) or "")
        for i, (record, split) in enumerate(zip(images.records, splits, strict=True))
    ]
    base = base_hash(model)
    trunk = None
    if depth:
        assert config.data.views is not None  # a cache has a number of them
        trunk = TrunkCache(
            parent=sources.cache_folder(config.data.cache) / "trunk",
            images=images,
            spec=backbone.spec,
            splits=splits,
            preset=_preset(config, images),
            views=config.data.views,
            epochs=config.epochs,
            depth=depth,
            shape=shape,
            base_hash=base,
            precision=device.precision,
        )
        trunk.check_limit(config.data.cache_limit)
    return Prepared(
        config=config,
        images=images,
        splits=splits,
        rows=rows,
        data_hash=data_sha256(hashed_cells(rows)),
        table=table,
        notes=notes,
        model=model,
        backbone=backbone,
        base_hash=base,
        counts=count_parameters(model),
        budget=budget,
        loss=_loss(config, images.card.task, table),
        device=device,
        trunk=trunk,
    )


def _preset(config: RunConfig, images: ImageSet) -> str:
    """Return the augmentation of the training images."""
    wanted = config.data.augment
    return images.card.augment if wanted == "auto" else wanted


def _trunk_of(
    model: nn.Module, config: RunConfig, size: tuple[int, int]
) -> tuple[int, tuple[int, ...]]:
    """Return depth of the trunk and shape of its tokens; no depth where nothing is to be cached."""
    depth = trunk_depth(model) if config.data.trunk == "cache" else 0
    return depth, check_trunk(model, depth, size) if depth else ()


def open_images(config: RunConfig) -> ImageSet:
    """Return the images of a config, none of them read yet.

    Raises:
        WaraError: kind "config" or "data", see `wara.data.sources.open_source`.
    """
    images = sources.open_source(
        config.dataset,
        cache=config.data.cache,
        offline=config.offline,
        seed=config.data.split_seed,
        images=config.data.images,
        modality=config.data.modality,
        within=config.data.root,
    )
    images.declare(config.data.bits, config.data.greys)
    return images


def survey(config: RunConfig, images: ImageSet, spec: ImageSpec | None, *, known: bool) -> None:
    """Read the images of a config, and keep what is found for the next check; see `ImageSet`."""
    cache = images.fact_cache(sources.cache_folder(config.data.cache) / "facts")
    images.survey(spec, cache=cache, known=known)


def divide(config: RunConfig, images: ImageSet) -> list[str]:
    """Return `train | val | test | unused` for each image of a config."""
    data = config.data
    splits = gate.assign_splits(
        images,
        val_fraction=data.val_fraction,
        test_fraction=data.test_fraction,
        seed=data.split_seed,
        near=data.near_duplicates,
    )
    if data.train_images is not None:
        seed, near = data.split_seed, data.near_duplicates
        splits = gate.thin(images, splits, data.train_images, seed, near)
    return splits


def twin_rule(config: RunConfig) -> TwinRule:
    """Return what a config says of pictures that are there twice."""
    return TwinRule(config.data.near_duplicates, config.data.allow_duplicates)


def _model(config: RunConfig, images: ImageSet) -> tuple[nn.Module, BackboneInfo]:
    wanted = config.backbone
    name, arguments = wanted.name, wanted.arguments()
    if images.substituted_for is not None and wanted.weights is None:
        # Phantoms stand in for data that could not be had; the small backbone goes with them, so
        # that the run is the same whether or not some weights happen to be cached.
        # What was said of the weights is not true of its own.
        name = NANO
        arguments = {key: arguments[key] for key in ("img_size", "drop_rate", "drop_path_rate")}
    torch.manual_seed(config.seed)
    model, info = build_backbone(
        name,
        num_classes=len(images.card.class_names),
        offline=config.offline,
        **arguments,
    )
    torch.manual_seed(config.seed)
    model = adapt(model, config.adapter)
    _check_groups(model, config)
    return model, info


def _check_groups(model: nn.Module, config: RunConfig) -> None:
    """Refuse a method whose rates are not those of what trains, as one of the user's own may be."""
    for group, parameters in parameter_groups(model).items():
        if bool(parameters) == (group in config.rates):
            continue
        name, where = config.adapter.name, f"rates of '{config.adapter.name}'"
        what, remedy = f"'{group}' trains but has no rate", f"add '{group}' to its rates"
        if not parameters:
            what = f"there is a rate for '{group}', of which '{name}' trains nothing here"
            remedy = "drop it, or declare what trains; see docs/add_a_method.md"
        raise WaraError("config", what, where, remedy)


def _loss(config: RunConfig, task: str, table: SplitTable) -> Loss:
    counts = table.counts["train"]
    name, why = losses.resolve_loss(config.loss, task, counts)
    asked = "auto" if config.loss == "auto" and name == "bce" else name
    weights, weighted = losses.loss_weights(
        asked,
        task,
        counts,
        table.images["train"],
        classes=table.classes,
        most=config.max_class_weight,
    )
    return Loss(name, why, weights, weighted)


def pick_device(config: RunConfig) -> Device:
    """Choose where to train, and in which arithmetic.

    On CPUs `amp: auto` takes bf16 only where the processor multiplies it natively (AVX-512 BF16 or
    AMX): measured on one core, a training step of ViT-Tiny at 224 px takes 0.6 times as long there
    as in float32; emulated it is slower than float32.

    Raises:
        WaraError: kind "resources", when there are fewer GPUs than asked for.
    """
    wanted, devices = config.accelerator, config.devices
    available = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if available < devices and (wanted == "gpu" or (wanted == "auto" and available)):
        raise WaraError(
            "resources", f"{devices} GPU(s) asked for, {available} available", "devices",
            "set accelerator=cpu, or lower devices",
        )  # fmt: skip
    on_gpu = wanted != "cpu" and available >= devices
    threads = torch.get_num_threads()
    name = f"CPU, {threads} thread{'s' if threads > 1 else ''}"
    if on_gpu:
        name = torch.cuda.get_device_name(0)
    if devices > 1:
        name += f", {devices} processes"
    return Device("gpu" if on_gpu else "cpu", name, *_precision(config.amp, on_gpu))


def _precision(amp: str, on_gpu: bool) -> tuple[str, str]:
    """Return Lightning's name of the precision, and what the plan says about it."""
    if amp == "off":
        return "32-true", "float32 (amp: off)"
    if amp == "bf16":
        return "bf16-mixed", "bfloat16 mixed (amp: bf16)"
    if on_gpu:
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return "bf16-mixed", "bfloat16 mixed (the GPU has it)"
        return "32-true", "float32 (the GPU has no bfloat16)"
    if torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported():
        return "bf16-mixed", "bfloat16 mixed (the CPU has it)"
    return "32-true", "float32 (the CPU has no native bfloat16)"


@contextlib.contextmanager
def kernels(deterministic: bool) -> Iterator[None]:
    """Deterministic kernels for the time of a run, and put back what was set before."""
    debug: Any = torch.utils.deterministic
    before = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    fill = debug.fill_uninitialized_memory
    if deterministic:
        # What cuBLAS needs to be told before its first product.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    try:
        torch.use_deterministic_algorithms(deterministic)
        # A debugging aid that costs a pass over every new tensor.
        debug.fill_uninitialized_memory = False
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warn_only)
        debug.fill_uninitialized_memory = fill
