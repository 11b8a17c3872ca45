"""Everything that can be known before the first run: sizes, splits, hashes, and what forbids it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray

from wara.adapters import trainable_parameters
from wara.compare.cells import Facts
from wara.compare.grid import MAJORITY, Cell, Request, Row, cells_of
from wara.compare.worker import Shelf
from wara.data.loader import eval_batches
from wara.data.splits import SPLITS
from wara.errors import WaraError, WaraErrors, suggest
from wara.evaluation.metrics import metric_names
from wara.training.losses import loss_per_image
from wara.training.plan import describe
from wara.training.setup import Prepared, kernels, prepare

Place = tuple[str, int | None, int]


@dataclass(frozen=True)
class Ground:
    """A data set with one of its splits.

    Args:
        name: of the card in use.
        title: of the data set, for people.
        synthetic: whether its images were drawn.
        banners: what a reader must not miss.
        data: hash of images, labels, patients and splits.
        task: of the data set.
        classes: names of the outputs.
        labels: of the test images, `[n]` or 0/1 `[n, c]`.
        files: of the test images.
        patients: of the test images; None where not known.
        shares: `[c]`, how often each class is among the training images.
        images: number of images in each split.
    """

    name: str
    title: str
    synthetic: bool
    banners: tuple[str, ...]
    data: str
    task: str
    classes: tuple[str, ...]
    labels: NDArray[np.int64]
    files: tuple[str, ...]
    patients: tuple[str | None, ...]
    shares: NDArray[np.float64]
    images: dict[str, int]

    @classmethod
    def of(cls, run: Prepared) -> Ground:
        """Return what a prepared run stands on."""
        test = [run.rows[i] for i in run.indices("test")]
        counts = np.asarray(run.table.counts["train"], np.float64)
        return cls(
            name=run.images.card.name,
            title=run.images.card.title,
            synthetic=run.images.synthetic,
            banners=describe(run).banners,
            data=run.data_hash,
            task=run.task,
            classes=tuple(run.classes),
            labels=np.array([row.label for row in test], np.int64),
            files=tuple(row.file for row in test),
            patients=tuple(row.patient for row in test),
            shares=counts / run.table.images["train"],
            images=dict(run.table.images),
        )

    @property
    def majority(self) -> NDArray[np.float64]:
        """Probabilities of who answers with the shares of the training images: `[n, c]`."""
        return np.tile(self.shares, (len(self.files), 1))


@dataclass(frozen=True)
class Sized:
    """A row whose model was built once.

    Args:
        row: with its config resolved.
        facts: of the first split.
        adapter_params: numbers that train beside the head.
        head_params: numbers of the head.
        seconds: expected for one run, from one measured step; None where not measured.
        wanted_params: numbers that a budget asks for; None without one.
    """

    row: Row
    facts: Facts
    adapter_params: int
    head_params: int
    seconds: float | None = None
    wanted_params: int | None = None


@dataclass(frozen=True)
class Checked:
    """A comparison that can begin.

    Args:
        rows: in the order of the table; without models for `majority`.
        grounds: by data set as configs name it, training size and seed of the split.
    """

    rows: tuple[Sized, ...]
    grounds: dict[Place, Ground]

    def ground(self, cell: Cell) -> Ground:
        """Return what a cell stands on."""
        return self.grounds[cell.row.dataset, cell.row.train, cell.split]

    def facts(self, sized: Sized, cell: Cell) -> Facts:
        """Return what a cell's config does not say of it."""
        return replace(sized.facts, data=self.ground(cell).data)


def check(rows: Iterable[Row], request: Request, shelf: Shelf, *, measure: bool = False) -> Checked:
    """Build every model and read every image once.

    Args:
        rows: of the comparison.
        request: it.
        shelf: keeps the images.
        measure: whether to time a step of each model.

    Raises:
        WaraErrors: all refusals of the rows: a method that cannot meet its budget or whose extra
            is not installed, data that cannot be used, no test images, splits that are all one.
    """
    sized: list[Sized] = []
    grounds: dict[Place, Ground] = {}
    faults: list[WaraError] = []
    for row in rows:
        if row.method == MAJORITY:
            sized.append(Sized(row, Facts("", "", None), 0, 0))
            continue
        for cell in cells_of(row, request.splits, request.seeds[:1]):
            place = (row.dataset, row.train, cell.split)
            first = cell.split == row.config.data.split_seed
            if not first and place in grounds:
                continue
            try:
                run = prepare(cell.config, report_dir=None, opened=shelf.open)
                grounds[place] = Ground.of(run)
                if first:
                    sized.append(_sized(row, run, measure))
            except WaraError as error:
                faults += error.errors if isinstance(error, WaraErrors) else [error]
                break
    faults += [*_faults(grounds, request.metric), *_twins(sized)]
    if faults:
        raise WaraErrors(list({str(fault): fault for fault in faults}.values()))
    return Checked(tuple(sized), grounds)


def _twins(rows: Iterable[Sized]) -> Iterable[WaraError]:
    """Refuse rows that would be the same runs under two names."""
    known: dict[str, str] = {}
    for sized in rows:
        row = sized.row
        label = known.setdefault(f"{row.method == MAJORITY} {row.config!r}", row.label)
        if label != row.label:
            what = f"'{row.label}' would be the same runs as '{label}'"
            remedy = "leave one of them out; sizes are as coarse as the method"
            yield WaraError("config", what, row.dataset, remedy)


def _sized(row: Row, run: Prepared, measure: bool) -> Sized:
    config = run.config.model_copy(
        update={"seed": row.config.seed, "out": None, "data": row.config.data}
    )
    return Sized(
        replace(row, config=config), Facts.of(run), run.counts["adapter"], run.counts["head"],
        seconds_of(run) if measure else None, run.budget[1] if run.budget else None,
    )  # fmt: skip


def _faults(grounds: dict[Place, Ground], metric: str) -> Iterable[WaraError]:
    for (dataset, train, split), ground in grounds.items():
        if not ground.images["test"]:
            what, remedy = "no test images, so nothing can be compared", "raise data.test_fraction"
            yield WaraError("config", what, dataset, remedy)
        known = metric_names(ground.task, ground.classes)
        if metric not in known:
            what = f"there is no metric '{metric}' of a {ground.task} task"
            yield WaraError("usage", what, "--metric", suggest(metric, known))
        twins = [s for (d, t, s), g in grounds.items()
                 if (d, t, g.data) == (dataset, train, ground.data) and s < split]  # fmt: skip
        if twins:
            what = "the data set names its splits itself, so that all of them are the same"
            yield WaraError("config", what, dataset, "leave --splits out")
    names: dict[str, str] = {}
    for (dataset, _, _), ground in grounds.items():
        if names.setdefault(ground.name, dataset) != dataset:
            what = f"{names[ground.name]} and {dataset} are both '{ground.name}' here"
            yield WaraError("config", what, "--cfg", "leave one of them out")


def seconds_of(run: Prepared) -> float:
    """Return about how long a run takes, from one step and one evaluation of a batch.

    The start of a run, its figures and its intervals are not in it.
    """
    config, batch = run.config, run.config.batch_size
    device = "cuda" if run.device.accelerator == "gpu" else "cpu"
    model = run.model.to(device)
    loader = eval_batches(
        run.images, run.indices("train")[:batch], run.backbone.spec, batch_size=batch
    )
    first = next(iter(loader))
    images, labels = first["image"].to(device), first["label"].to(device)
    weights = None if run.loss.weights is None else run.loss.weights.to(device)
    parameters = list(trainable_parameters(model).values())
    mixed = torch.autocast(device, torch.bfloat16, enabled=run.device.precision == "bf16-mixed")

    def step() -> None:
        with mixed:
            logits = model(images)
        loss = loss_per_image(logits, labels, loss=run.loss.name, weights=weights).mean()
        torch.autograd.grad(loss, parameters, allow_unused=True)

    def look() -> None:
        with torch.no_grad():
            model(images)

    with kernels(config.deterministic):
        model.train()
        stepped = _timed(step, device)
        model.eval()
        looked = _timed(look, device)
    count = {split: -(-len(run.indices(split)) // batch) for split in SPLITS}
    each = count["train"] * stepped + count["val"] * looked
    return config.epochs * each + (count["val"] + count["test"]) * looked


def _timed(work: Callable[[], None], device: str) -> float:
    """Return the seconds of the second call; the first one warms up."""
    work()
    began = time.perf_counter()
    work()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began
