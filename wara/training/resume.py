"""Is this the run that lies in the folder? Asked before it is gone on with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from wara import __version__
from wara.config import RunConfig, load_config
from wara.errors import WaraError, WaraErrors
from wara.runs import exact
from wara.runs.folder import RunFolder
from wara.runs.provenance import here
from wara.runs.records import ProvenanceFile, other_writer, read_record, writer_of
from wara.training.checkpoint import Last
from wara.training.setup import Device, Prepared

FREE = (
    "out", "offline", "data.workers", "data.cache", "data.cache_limit", "devices", "ddp_timeout",
    "accelerator", "bootstrap", "wandb", "tensorboard",
)  # fmt: skip
"""Keys of a config that decide where and how fast a run goes; what of that comes into the last bit
of the weights is among the facts of `wara.runs.exact`."""


def facts_here(device: Device, processes: int) -> exact.Facts:
    """Return the named facts of a run that goes on in this process."""
    return exact.facts_of(
        here(
            device=device.name, accelerator=device.accelerator, precision=device.precision,
            processes=processes,
        )
    )  # fmt: skip


def changes_since(last: Last, facts: exact.Facts, allow: Sequence[str]) -> exact.Changes:
    """Return what breaks exactness and was allowed to.

    Args:
        last: the checkpoint to go on from.
        facts: of now.
        allow: names of facts that may differ.

    Raises:
        WaraErrors: kind "config", a line for each fact that differs and was not allowed.
    """
    changes = exact.changed(last.content["facts"], facts)
    if refused := exact.refusals(changes, str(last.path), allow):
        raise WaraErrors(refused)
    return changes


def check_config(folder: RunFolder, config: RunConfig, allow: Sequence[str] = ()) -> None:
    """Refuse a config that would train something else than the run in the folder.

    Args:
        folder: holds the config of the run to go on with.
        config: of this call, resolved.
        allow: names of facts that may differ; `amp` is a key too.

    Raises:
        WaraErrors: kind "config", a line per key.
        WaraError: kind "artefact" when a version of wara that computes otherwise began the run.
    """
    _check_version(folder)
    earlier = load_config(folder.config).resolved().model_dump(mode="json")
    changed = differences(earlier, config.model_dump(mode="json"))
    free = {*FREE, *({"amp"} & set(allow))}
    keys = [key for key in changed if not {key, key.partition(".")[0]} & free]
    if keys:
        remedy = f"use the same config ({folder.config}), or another --out"
        raise WaraErrors(
            [WaraError("config", "differs from the run to resume", key, remedy) for key in keys]
        )


def _check_version(folder: RunFolder) -> None:
    """Refuse a run of another series, 0.1 against 0.2: its settings and files mean other things."""
    try:
        provenance = read_record(folder.provenance, ProvenanceFile)
    except WaraError:
        return  # nobody knows; what differs is found below
    written = writer_of(provenance)
    if written.split(".")[:2] != __version__.split(".")[:2]:
        what = f"{other_writer(provenance)}, which cannot go on with it"
        remedy = f"go on with wara {written}, or start again with --overwrite or another --out"
        raise WaraError("artefact", what, str(folder.path), remedy)


def check_finished(folder: RunFolder, run: Prepared) -> None:
    """Refuse to take a finished run for this one when its data or base were others.

    Raises:
        WaraError: kind "artefact".
    """
    remedy = "put back what the run was made with, or start again with --overwrite"
    found = read_record(folder.provenance, ProvenanceFile)
    pairs = {
        "the images, labels or splits are": (found["data"].get("sha256"), run.data_hash),
        "the backbone is": (found["backbone"].get("frozen_sha256"), run.base_hash),
    }
    for words, (old, new) in pairs.items():
        if old != new:
            what = f"the run is finished, but {words} not those of now"
            raise WaraError("artefact", what, str(folder.path), remedy)


def differences(old: Any, new: Any, prefix: str = "") -> dict[str, tuple[Any, Any]]:
    """Return what differs between two nested dicts, as dotted key -> (old, new)."""
    if isinstance(old, dict) and isinstance(new, dict):
        found: dict[str, tuple[Any, Any]] = {}
        for key in sorted(old.keys() | new.keys()):
            found |= differences(old.get(key), new.get(key), f"{prefix}.{key}" if prefix else key)
        return found
    return {} if old == new else {prefix: (old, new)}
