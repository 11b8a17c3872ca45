"""What decides a cell, and whether the run in its folder is that cell, whole and unaltered."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from wara.compare.grid import Cell, stem
from wara.config import RunConfig
from wara.errors import WaraError, WaraErrors
from wara.runs.exact import source_sha256
from wara.runs.folder import RunFolder
from wara.runs.provenance import versions
from wara.runs.sealed import altered, seal_of_results
from wara.storage import canonical_sha256, read_json, write_json
from wara.training.resume import FREE, differences
from wara.training.setup import Prepared
from wara.training.tracking import settle


@dataclass(frozen=True)
class Facts:
    """What a config does not say of its runs.

    Args:
        data: hash of images, labels, patients and splits.
        base: fingerprint of the frozen base.
        weights: hash of the file of weights.
    """

    data: str
    base: str
    weights: str | None

    @classmethod
    def of(cls, run: Prepared) -> Facts:
        """Return the facts of a prepared run."""
        return cls(run.data_hash, run.base_hash, run.backbone.weights_sha256)


@functools.cache
def code_version() -> str:
    """Return a hash of the code that decides a run: this package's, and the versions of others."""
    return canonical_sha256({"source": source_sha256(), "versions": versions()})


def deciding(config: RunConfig) -> dict[str, Any]:
    """Return the part of a config that decides what comes of a run."""
    plain = config.model_dump(mode="json")
    for dotted in FREE:
        *path, leaf = dotted.split(".")
        functools.reduce(dict.__getitem__, path, plain).pop(leaf, None)
    return plain


def key_of(config: RunConfig, facts: Facts) -> str:
    """Return the hash of all that decides a run: config with seeds, data, weights, code."""
    return canonical_sha256(
        {
            "config": deciding(config),
            "data": facts.data,
            "base": facts.base,
            "weights": facts.weights,
            "code": code_version(),
        }
    )


def placed(cell: Cell, facts: Facts, out: Path) -> Cell:
    """Return a cell with its key, and with the folder of its run below `out`."""
    key = key_of(cell.config, facts)
    label = re.sub(r"[^A-Za-z0-9.]+", "-", cell.row.label).strip("-")
    name = f"{stem(cell.row.dataset)}_{label}_p{cell.split}_s{cell.seed}_{key[:8]}"
    wandb = cell.config.wandb
    # One comparison is one group of W&B, unless config or environment name another.
    group = settle(wandb).group or out.resolve().name
    changes = {"out": str(out / "cells" / name), "wandb": wandb.model_copy(update={"group": group})}
    return replace(cell, key=key, config=cell.config.model_copy(update=changes))


# -- finished cells ------------------------------------------------------------------------------


def seal_path(folder: Path) -> Path:
    """Return where the seal of a cell lies: beside the folder of its run."""
    return folder.with_name(f"{folder.name}.json")


def seal(folder: Path, key: str, measured: dict[str, Any]) -> None:
    """Note that a cell is finished: its key, the hashes of its files, what was measured."""
    files = seal_of_results(RunFolder(folder))
    write_json(seal_path(folder), {"key": key, "files": files, **measured})


def read_seal(cell: Cell) -> dict[str, Any] | None:
    """Return the seal of a cell whose files are as the run left them; None where it must be run."""
    folder = cell.config.folder
    try:
        found = read_json(seal_path(folder))
        whole = found["key"] == cell.key and not altered(RunFolder(folder), found["files"])
    except (OSError, ValueError, KeyError, AttributeError):
        return None
    return found if whole else None


# -- the comparison in the folder ----------------------------------------------------------------


def check_grid(path: Path, cells: Iterable[Cell]) -> dict[str, Any]:
    """Refuse configs that differ from those of an earlier comparison in the same folder.

    A grid may grow: rows, seeds and splits that were not there before are welcome.

    Args:
        path: of the file that keeps the configs of a comparison.
        cells: of this one, before tuning.

    Returns:
        What that file should hold now.

    Raises:
        WaraErrors: kind "config", one for each key that differs.
    """
    # Of the row: what a method draws has another seed in each cell.
    wanted = {f"{stem(c.row.dataset)} {c.row.label}": _without_seeds(c.row.config) for c in cells}
    if not path.exists():
        return wanted
    try:
        earlier = read_json(path)
    except (OSError, ValueError) as error:
        what = "the record of the comparison is damaged"
        raise WaraError("artefact", what, str(path), "choose another --out") from error
    remedy = "use the same configs and --set, or another --out"
    faults = [
        WaraError("config", f"{place}: {key} was {old!r} and is {new!r}", str(path), remedy)
        for place, config in wanted.items()
        if place in earlier
        for key, (old, new) in differences(earlier[place], config).items()
    ]
    if faults:
        raise WaraErrors(faults)
    return {**earlier, **wanted}


def _without_seeds(config: RunConfig) -> dict[str, Any]:
    plain = deciding(config)
    del plain["seed"], plain["data"]["split_seed"]
    return plain
