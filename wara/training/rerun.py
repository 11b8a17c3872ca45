"""A finished run made again from its folder, to see that its weights follow from what it says."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from wara.config import RunConfig, load_config
from wara.errors import WaraError, WaraErrors
from wara.runs import exact
from wara.runs.folder import RunFolder
from wara.runs.provenance import recorded_memory
from wara.runs.records import ProvenanceFile, read_record
from wara.runs.sealed import seal_of_results
from wara.storage import file_sha256
from wara.training.resume import facts_here
from wara.training.run import run_here
from wara.training.setup import Prepared
from wara.training.start import run as start

_WEIGHTS = "adapter_model.safetensors"


def rerun(
    folder: str | Path,
    out: str | Path | None = None,
    *,
    allow: Sequence[str] = (),
    resume: bool = False,
    overwrite: bool = False,
    quiet: bool = False,
) -> str:
    """Train a finished run again, from its folder alone, and compare the weights.

    The settings are those of its `config.yaml`, but for the loggers, which are off. Where memory
    ran out, batches are cut in the same places.

    Args:
        folder: of the finished run; only read.
        out: the new run folder; by default `<folder>-rerun`.
        allow: facts that may differ, by their names in `wara.runs.exact`.
        resume: go on with a rerun that was stopped.
        overwrite: replace an earlier rerun.
        quiet: print only what stands in for data or backbone, and the result.

    Returns:
        A line that says that the weights are the same, and their hash.

    Raises:
        WaraError: kind "artefact" when the folder is not that of a finished run, whole and
            unaltered, when images or weights are not those of the run, or when the new weights
            differ; kind "config" when a fact differs that comes into the weights. All but the
            last are told before anything is trained.
    """
    exact.check_names(allow)
    source = RunFolder(folder)
    if source.status != "finished":
        remedy = "give the folder of a finished run"
        raise WaraError("artefact", f"no finished run ({source.status})", str(source.path), remedy)
    files = seal_of_results(source)
    provenance = read_record(source.provenance, ProvenanceFile)
    config = _config(source, provenance, Path(out) if out is not None else None)

    def confirm(run: Prepared) -> None:
        faults = [*_other_inputs(provenance, run), *_other_facts(source, provenance, run, allow)]
        if faults:
            raise WaraErrors(faults)

    flags: dict[str, Any] = {
        "resume": resume, "overwrite": overwrite, "quiet": quiet,
        "allow": allow if resume else (),
    }  # fmt: skip
    if config.devices > 1:
        # Asked here, before there are several processes.
        run_here(config, **flags | {"dry_run": True, "quiet": True}, confirm=confirm)
        start(config, **flags)
    else:
        run_here(config, **flags, confirm=confirm, micro=recorded_memory(source.provenance))
    return _compared(source, RunFolder(config.folder), files)


def _config(source: RunFolder, provenance: Mapping[str, Any], out: Path | None) -> RunConfig:
    """Return the config of a run for a folder of its own, with paths that lead there from here."""
    config = load_config(source.config)
    path = source.path.absolute()
    began = Path(str(provenance.get("cwd", ".")))
    weights = config.backbone.weights
    return config.model_copy(
        update={
            "out": str(out if out is not None else path.with_name(f"{path.name}-rerun")),
            "dataset": _from(began, config.dataset),
            "backbone": config.backbone.model_copy(
                update={"weights": weights if weights is None else _from(began, weights)}
            ),
            "wandb": config.wandb.model_copy(update={"mode": "disabled"}),
            "tensorboard": False,
        }
    )


def _from(began: Path, name: str) -> str:
    """Return a path that counts from where the run was begun, where it leads nowhere from here."""
    path = Path(name).expanduser()
    return str(began / path) if not path.exists() and (began / path).exists() else name


def _other_inputs(provenance: Mapping[str, Any], run: Prepared) -> list[WaraError]:
    data, backbone = provenance["data"], provenance["backbone"]
    pairs = {
        "images, labels or splits": (data.get("sha256"), run.data_hash),
        "frozen base": (backbone.get("frozen_sha256"), run.base_hash),
        "file of weights": (backbone.get("weights_sha256"), run.backbone.weights_sha256),
    }
    return [
        WaraError(
            "artefact", f"not the {name} of the run: SHA-256 {new}, and it had {old}",
            run.config.dataset if name.startswith("images") else run.backbone.name,
            "put back what the run was made with",
        )
        for name, (old, new) in pairs.items()
        if old != new
    ]  # fmt: skip


def _other_facts(
    source: RunFolder, provenance: Mapping[str, Any], run: Prepared, allow: Sequence[str]
) -> list[WaraError]:
    """Return a line for each fact that differs from the run's, or that changed while it went on."""
    now = facts_here(run.device, run.config.devices)
    changes = exact.changed(exact.facts_of(provenance), now)
    found = exact.refusals(changes, str(source.provenance), allow)
    for change in provenance.get("changes", []):
        if change["name"] not in allow:
            what = f"{change['name']} changed while the run went on, so nothing gives its bits"
            remedy = f"accept another result with --allow-change {change['name']}"
            found.append(WaraError("config", what, str(source.provenance), remedy))
    return found


def _compared(source: RunFolder, made: RunFolder, files: Mapping[str, str]) -> str:
    digest = file_sha256(made.adapter / _WEIGHTS)
    if digest == files[f"adapter/{_WEIGHTS}"]:
        return f"identical: {_WEIGHTS} sha256 {digest}"
    old, new = (load_file(run.adapter / _WEIGHTS) for run in (source, made))
    where, remedy = str(made.path), "compare the two provenance.json and train.log"
    if {name: t.shape for name, t in old.items()} != {name: t.shape for name, t in new.items()}:
        raise WaraError("artefact", "other tensors than those of the run", where, remedy)
    other = [name for name in sorted(old) if not torch.equal(old[name], new[name])]
    if not other:
        what = f"every tensor is that of the run, but {_WEIGHTS} has other bytes"
        raise WaraError("artefact", what, where, remedy)
    largest = max(float((old[n].double() - new[n].double()).abs().max()) for n in other)
    what = (
        f"the weights differ from those of the run: {len(other)} of {len(old)} tensors, the first "
        f"is {other[0]}, the largest difference {largest:.3g}"
    )
    raise WaraError("artefact", what, where, remedy)
