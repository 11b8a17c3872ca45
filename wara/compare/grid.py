"""What is compared: one row for each data set and method, one cell for each split and seed."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from wara.adapters import Method
from wara.adapters.methods import (
    class_key,
    find_method,
    method_from_options,
    same_option,
    section_of,
)
from wara.adapters.targets import ATTENTION
from wara.config import RunConfig
from wara.errors import WaraError, WaraErrors
from wara.schema import fields_of, parse_yaml

MAJORITY = "majority"
"""The row of who looks at no image: every class as often as among the training images."""
BESIDE = (MAJORITY, "linear_probe", "full")
"""Rows that stand beside a table unless others are named; no budget sets their size."""


@dataclass(frozen=True)
class Tuning:
    """Which rates every method tries on the validation images.

    Args:
        lr: how many rates, an odd number: the method's own, and powers of three times it.
        weight_decay: how many weight decays, odd too: that of the config, and powers of ten.
    """

    lr: int = 1
    weight_decay: int = 1

    @property
    def trials(self) -> int:
        """Trials of each method, on each split."""
        return self.lr * self.weight_decay

    def variants(self, config: RunConfig) -> list[RunConfig]:
        """Return the configs to try, from the lowest rate to the highest."""
        rate, own = next(iter(config.rates.values())), config.weight_decay
        return [
            config.model_copy(update={"lr": rate * a, "weight_decay": own * b})
            for a in _powers(3.0, self.lr)
            for b in _powers(10.0, self.weight_decay)
        ]


def _powers(base: float, count: int) -> list[float]:
    return [base**exponent for exponent in range(-(count // 2), count // 2 + 1)]


@dataclass(frozen=True)
class Request:
    """What `wara compare` is asked for.

    Args:
        configs: loaded, one for each data set.
        methods: in the order of the table; see `variant_of`.
        seeds: of the runs.
        splits: how many splits, whose seeds count up from that of the config.
        out: folder of the comparison.
        budgets: of the adapters, see `parse_budget`; None for each method's own size.
        train: numbers of training images; None for all.
        beside: rows that keep their size: `majority`, and methods whose size no budget can set.
        tuning: what to try first, if anything.
        reference: what the others are held against; None for no tests.
        rope: smallest difference that means something.
        metric: what is compared, on the test images.
        audit: look at the test images after each epoch too, to say what that would have gained.
    """

    configs: tuple[RunConfig, ...]
    methods: tuple[str, ...]
    seeds: tuple[int, ...]
    splits: int
    out: Path
    budgets: tuple[str | None, ...] = (None,)
    train: tuple[int | None, ...] = (None,)
    beside: tuple[str, ...] = BESIDE
    tuning: Tuning | None = None
    reference: str | None = "lora"
    rope: float = 0.01
    metric: str = "auc_macro"
    audit: bool = False


@dataclass(frozen=True)
class Row:
    """A line of the table.

    Args:
        config: of its runs, but for seed, split and folder.
        method: as it was asked for, or `majority`.
        budget: of its adapter, where one was asked for.
        train: number of training images, where not all.
    """

    config: RunConfig
    method: str
    budget: str | None = None
    train: int | None = None

    @property
    def dataset(self) -> str:
        """The data set, as the config names it."""
        return self.config.dataset

    @property
    def label(self) -> str:
        """What tells the row from others of its data set."""
        parts = [self.budget or "", f"{self.train} images" if self.train else ""]
        extra = ", ".join(filter(None, parts))
        return f"{self.method} ({extra})" if extra else self.method


@dataclass(frozen=True)
class Cell:
    """One run of a row.

    Args:
        row: it belongs to.
        split: seed of the split.
        seed: of the run.
        config: of the run, resolved; `out` names its folder.
        key: hash of all that decides it; see `wara.compare.cells`.
    """

    row: Row
    split: int
    seed: int
    config: RunConfig
    key: str = field(default="")

    @property
    def place(self) -> str:
        """The cell for people."""
        return f"{stem(self.row.dataset)} {self.row.label} split {self.split} seed {self.seed}"


def stem(dataset: str) -> str:
    """Return a data set's name without its place, as a file may be called."""
    name = re.sub(r"\.ya?ml$", "", Path(dataset).expanduser().name or dataset)
    return re.sub(r"[^A-Za-z0-9._-]+", "_", name)


def rows_of(request: Request) -> list[Row]:
    """Return the rows of a comparison.

    Raises:
        WaraErrors: kind "config", all faults at once: methods that do not exist, that no budget
            can be set for, or that stand twice; data sets that stand twice; no reference among the
            methods; too few seeds for a test.
    """
    faults = list(_faults(request))
    rows: list[Row] = []
    wanted = [*dict.fromkeys([*request.methods, *(b for b in request.beside if b != MAJORITY)])]
    for config in request.configs:
        for train in request.train:
            sized = _with_train(config, train)
            if MAJORITY in request.beside:
                rows.append(Row(sized, MAJORITY, None, train))
            for name in wanted:
                apart = name in {*BESIDE, *request.beside}
                for budget in (None,) if apart else request.budgets:
                    try:
                        made = with_method(sized, name, budget, apart=apart)
                    except WaraError as error:
                        faults += error.errors if isinstance(error, WaraErrors) else [error]
                    else:
                        rows.append(Row(made, name, budget, train))
    if faults:
        raise WaraErrors(list({str(fault): fault for fault in faults}.values()))
    return rows


def _faults(request: Request) -> Iterator[WaraError]:
    names = [stem(config.dataset) for config in request.configs]
    lists: dict[str, Sequence[Any]] = {
        "data set": names, "method": request.methods, "seed": request.seeds,
        "budget": request.budgets, "number of training images": request.train,
    }  # fmt: skip
    for word, found in lists.items():
        for item in sorted({str(x) for x in found if found.count(x) > 1}):
            yield WaraError("usage", f"the {word} '{item}' stands twice", "", "name it once")
    if not 0 <= request.rope < math.inf:
        what = f"a smallest difference of {request.rope} means nothing"
        yield WaraError("usage", what, "--rope", "take 0 or more")
    if request.reference is None:
        return
    if request.reference not in request.methods:
        what = f"the reference '{request.reference}' is not among the methods"
        remedy = "add it to --methods, or name another with --reference (none: no tests)"
        yield WaraError("usage", what, "--reference", remedy)
    if len(request.seeds) < 2:
        what = "differences are tested over seeds, of which there is one"
        yield WaraError("usage", what, "--seeds", "take two or more, or --reference none")


def _with_train(config: RunConfig, train: int | None) -> RunConfig:
    if train is None:
        return config
    data = config.data.model_copy(update={"train_images": train})
    return config.model_copy(update={"data": data})


def variant_of(method: str) -> tuple[str, dict[str, Any]]:
    """Return a method's name and the options that are set for its row alone.

    Args:
        method: `name`, or `name:option=value:…` with values as YAML has them, such as
            `wara:wavelet=db2:level=2`; a name may itself be `package.module:Class`.

    Raises:
        WaraError: kind "usage" when a part is not of that form, or an option stands twice.
    """
    parts = spelled(method).split(":")
    first = next((i for i, part in enumerate(parts) if "=" in part), len(parts))
    remedy = "write as in wara:wavelet=db2:level=2"
    options: dict[str, Any] = {}
    for place, part in enumerate(parts):
        key, equals, raw = part.partition("=")
        if not key or (place >= first and not (equals and raw)) or key in options:
            fault = "stands twice" if key in options else "sets nothing"
            raise WaraError("usage", f"'{part}' in '{method}' {fault}", "--methods", remedy)
        if equals:
            try:
                options[key] = parse_yaml(raw)
            except WaraError as error:
                raise WaraError("usage", error.what, f"--methods {method}", remedy) from error
    return ":".join(parts[:first]), options


def spelled(method: str) -> str:
    """Return a method with its options as rows are called by it: without spaces around words."""
    return re.sub(r"\s*([:=])\s*", r"\1", method.strip())


def with_method(
    config: RunConfig, method: str, budget: str | None = None, *, apart: bool = False
) -> RunConfig:
    """Return a config with another method, and all else the same.

    Options that differ from the defaults of the config's own method go over to each method for
    which they mean the same: those that one class declares for both (`blocks`, `targets`, the rank
    of kin of LoRA). An option that merely has the same name stays behind. Rates that the config
    sets go over to all.

    Args:
        config: of some method.
        method: the wanted one, see `variant_of`.
        budget: size of its adapter; None leaves that to the method and to the config.
        apart: it stands beside those of one size, so that a budget of the config is not for it.

    Raises:
        WaraError: kind "config" when there is no such method, an option does not fit it, or it has
            no size that a budget could set, or none to compare where the config sets targets.
    """
    name, own = variant_of(method)
    try:
        cls = find_method(name)
        made = method_from_options(cls, _options(config.adapter, cls, budget, own, apart))
    except WaraError as error:
        if not own:
            raise
        flag = "--beside" if apart else "--methods"
        found = error.errors if isinstance(error, WaraErrors) else [error]
        raise WaraErrors(
            [WaraError(e.kind, e.what, f"{flag} {method}", e.remedy) for e in found]
        ) from error
    values = config.model_dump(mode="json")
    values["adapter"] = section_of(made)
    groups = list(made.learning_rates())
    for group in ("core", "head"):
        # `lr` and a rate by name cannot both be that of a probe's head.
        if group not in groups or (group == groups[0] and values["lr"] is not None):
            values[f"lr_{group}"] = None
    return RunConfig.model_validate_json(json.dumps(values))


def _options(
    given: Method, cls: type[Method], budget: str | None, own: Mapping[str, Any], apart: bool
) -> dict[str, Any]:
    """Return the options of a row: what goes over, and its own."""
    if apart and cls.knob:
        what = f"'{class_key(cls)}' has a size that a budget can set, so it is no reference row"
        raise WaraError("usage", what, "--beside", "name it with --methods")
    source = type(given)
    options = given.options()
    if source is not cls:
        plain = source().options()
        options = {key: value for key, value in options.items() if value != plain.get(key)}
    apart = apart or class_key(cls) in BESIDE
    wanted = None if apart else budget or options.get("budget")
    where = set(options.get("targets", ATTENTION))
    options = {key: value for key, value in options.items() if same_option(key, source, cls)}
    sizes = {"budget", *cls.knob}
    if own.keys() & sizes and not budget:
        options = {key: value for key, value in options.items() if key not in sizes}
        wanted = own.get("budget")
    elif wanted is not None and own.keys() & {*sizes, "targets", "blocks"}:
        what = "with a budget all rows have one size, at the same places"
        raise WaraError("usage", what, "", "leave out the budget, or what the row sets of these")
    options |= own
    if wanted is None:
        return options
    if not cls.knob:
        what = f"what '{class_key(cls)}' trains is fixed, so it cannot meet a budget"
        remedy = "name it with --beside, where rows keep their own size"
        raise WaraError("config", what, "--methods", remedy)
    field = fields_of(cls).get("targets")
    fixed = field is None or (source is not cls and where == set(field.default))
    if fixed and where != set(ATTENTION):
        # Its budget would be measured on others than those of the methods beside it.
        what = f"'{class_key(cls)}' has its budget measured on q, k, v and o, not on these targets"
        raise WaraError("config", what, "adapter.targets", "leave them out, or the method")
    kept = {k: v for k, v in options.items() if k not in cls.knob or k in own}
    return kept | {"budget": wanted}


def cells_of(row: Row, splits: int, seeds: Sequence[int]) -> list[Cell]:
    """Return the cells of a row, split by split; the majority row has one for each split.

    The seed of a run moves that of its method too, unless the row sets one.
    """
    first = row.config.data.split_seed
    cells = []
    for split in range(first, first + splits):
        for seed in seeds if row.method != MAJORITY else seeds[:1]:
            data = row.config.data.model_copy(update={"split_seed": split})
            update = {"data": data, "seed": seed, "adapter": _drawn_anew(row, seed)}
            cells.append(Cell(row, split, seed, row.config.model_copy(update=update)))
    return cells


def _drawn_anew(row: Row, seed: int) -> Method:
    """Return the row's method with a draw for each seed: of places, of rows, of fixed matrices.

    With one draw for all runs no interval would hold what another draw would have changed.
    """
    method, own = row.config.adapter, getattr(row.config.adapter, "seed", None)
    if not isinstance(own, int) or "seed" in variant_of(row.method)[1]:
        return method
    options = method.options() | {"seed": (own + seed) % 2**63}
    return method_from_options(type(method), options)


def with_rates(cell: Cell, chosen: RunConfig) -> Cell:
    """Return a cell with the rates of a tuned config."""
    update = {"lr": chosen.lr, "weight_decay": chosen.weight_decay}
    return replace(cell, config=cell.config.model_copy(update=update))
