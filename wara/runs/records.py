"""`metrics.json` and `provenance.json` of a run, read back and held against their form."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from wara import __version__
from wara.errors import WaraError
from wara.runs.tables import AS_WRITTEN
from wara.schema import STRICT, faults_of
from wara.storage import read_json


class _Record(BaseModel):
    # What other versions add is no damage.
    model_config = STRICT | ConfigDict(extra="ignore")


class Metric(_Record):
    """One number with its interval, or why it lacks it."""

    value: float | None = Field(ge=-1e12, le=1e12, description="The number.")
    low: float | None = Field(ge=-1e12, le=1e12, description="Lower end of its 95 % interval.")
    high: float | None = Field(ge=-1e12, le=1e12, description="Upper end.")
    n: int = Field(ge=0, le=10**12, description="Images behind it.")
    reason: str | None = Field(description="Why value or interval is missing.")


class MetricsFile(_Record):
    """What `metrics.json` must hold."""

    synthetic: bool = Field(description="Whether the images were drawn.")
    dataset: str = Field(description="Name of the data set.")
    backbone: str = Field(description="What was adapted.")
    method: str = Field(description="Name of the method.")
    seed: int = Field(ge=0, lt=2**32, description="Seed of the run.")
    adapter_params: int = Field(
        ge=0, le=10**15, description="Numbers that trained beside the head."
    )
    head_params: int = Field(ge=0, le=10**15, description="Numbers of the head.")
    epochs: int = Field(ge=0, le=100_000, description="Epochs trained.")
    best_epoch: int = Field(ge=0, le=100_000, description="Epoch of the results.")
    monitor: str = Field(description="What picked it.")
    seconds: float = Field(ge=0, le=1e12, description="Time of training.")
    peak_memory_mb: float = Field(ge=0, le=1e12, description="Most memory used.")
    val: dict[str, Metric] = Field(description="Metrics of the validation images.")
    test: dict[str, Metric] = Field(description="Metrics of the test images.")


class ProvenanceFile(_Record):
    """What `provenance.json` must hold."""

    synthetic: bool = Field(description="Whether the images were drawn.")
    status: str = Field(description="How the run stands.")
    seed: int = Field(ge=0, lt=2**32, description="Seed of the run.")
    data: dict[str, Any] = Field(description="The images.")
    backbone: dict[str, Any] = Field(description="What was adapted.")
    versions: dict[str, str | None] = Field(description="Packages that wrote it.")


def read_record(path: Path, form: type[MetricsFile] | type[ProvenanceFile]) -> dict[str, Any]:
    """Read one of the two files.

    Args:
        path: of the file.
        form: what it must hold.

    Returns:
        All that stands in it.

    Raises:
        WaraError: kind "artefact" when it is missing or damaged.
    """
    try:
        content = read_json(path)
        # Checked as JSON, where a list is a list and not something that might become one.
        form.model_validate_json(json.dumps(content))
    except OSError as error:
        what = f"cannot read it: {error.strerror}"
        raise WaraError("artefact", what, str(path), AS_WRITTEN) from error
    except ValidationError as error:
        first = next(iter(faults_of(error, form, where=str(path)).values()))
        raise WaraError("artefact", first.what, str(path), AS_WRITTEN) from error
    except (ValueError, RecursionError) as error:
        what = f"not valid JSON: {' '.join(str(error).split())}"
        raise WaraError("artefact", what, str(path), AS_WRITTEN) from error
    return content


def writer_of(provenance: dict[str, Any]) -> str:
    """Return the version of wara that wrote a run, as far as it says so."""
    return str(provenance["versions"].get("wara"))


def other_writer(provenance: dict[str, Any]) -> str:
    """Return `written by wara 0.1.0, and this is 0.2.0`; empty where it is this version."""
    written = writer_of(provenance)
    return "" if written == __version__ else f"written by wara {written}, and this is {__version__}"
