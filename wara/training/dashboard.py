"""A workspace of Weights & Biases over the runs of a project: its layout, and how it gets there."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from wara.errors import WaraError
from wara.storage import write_json
from wara.training.tracking import Tracking, is_sent, unknown_sender, unreachable

_SCORE = "summary:test_auc_macro"


def _chart(title: str, key: str, preset: str, **fields: str) -> dict[str, Any]:
    """Return a panel that draws a table of the runs with one of W&B's own charts."""
    return {
        "kind": "CustomChart",
        "query": {"summaryTable": {"tableKey": f"{key}_table"}},
        "chart_name": preset,
        "chart_fields": fields,
        "chart_strings": {"title": title},
    }


def _bars(title: str, metric: str) -> dict[str, Any]:
    return {"kind": "BarPlot", "title": title, "metrics": [metric], "groupby_rangefunc": "stddev"}


def _lines(title: str, *metrics: str) -> dict[str, Any]:
    return {"kind": "LinePlot", "title": title, "x": "epoch", "y": list(metrics),
            "title_x": "epoch"}  # fmt: skip


SECTIONS: dict[str, list[dict[str, Any]]] = {
    "Accuracy over parameters": [
        {"kind": "ScatterPlot", "title": "Test AUROC over adapter parameters",
         "x": "config:adapter_params", "y": _SCORE, "log_x": True},
        {"kind": "ScatterPlot", "title": "Test accuracy over adapter parameters",
         "x": "config:adapter_params", "y": "summary:test_accuracy", "log_x": True},
    ],
    "Methods by modality": [
        _bars("Test AUROC", "test_auc_macro"),
        _bars("Test balanced accuracy", "test_balanced_accuracy"),
        {"kind": "ParallelCoordinatesPlot", "title": "From modality to AUROC",
         "columns": ["config:modality", "config:method", "config:adapter_params", _SCORE]},
    ],
    "Curves": [
        _lines("Validation AUROC", "val_auc_macro"),
        _lines("Loss", "train_loss", "val_loss"),
        _lines("Learning rate", "lr"),
        _chart("ROC", "roc", "wandb/area-under-curve/v0", x="fpr", y="tpr", **{"class": "class"}),
        _chart("Precision and recall", "pr", "wandb/area-under-curve/v0", x="recall",
               y="precision", **{"class": "class"}),
        _chart("Confusion", "confusion", "wandb/confusion_matrix/v1", Actual="Actual",
               Predicted="Predicted", nPredictions="nPredictions"),
    ],
    "Calibration": [
        _chart("Reliability", "reliability", "wandb/lineseries/v0", step="step",
               lineKey="lineKey", lineVal="lineVal"),
        _bars("Expected calibration error", "test_ece"),
        {"kind": "ScatterPlot", "title": "Calibration error over AUROC", "x": _SCORE,
         "y": "summary:test_ece"},
    ],
    "What the adapter learnt": [
        {"kind": "MediaBrowser", "title": "Energy and singular values of the update",
         "media_keys": ["subband_energy", "singular_values"]},
    ],
}  # fmt: skip
"""Sections and their panels, by the names of wandb-workspaces; `config:` and `summary:` say where a
number is from."""
GROUPS = ("modality", "method")
"""Keys of the config that runs are grouped by; bars and curves are means over the rest."""
COLUMNS = (
    "config:modality", "config:method", "config:adapter_params", "config:budget",
    "config:split_seed", "config:seed", _SCORE, "summary:test_ece",
)  # fmt: skip


def specification(project: str, entity: str | None) -> dict[str, Any]:
    """Return the layout as plain values: what `workspace` builds, and what a file holds."""
    return {
        "name": "wara: methods by modality",
        "project": project,
        "entity": entity,
        "group_by": list(GROUPS),
        "columns": list(COLUMNS),
        "sections": [{"name": name, "panels": panels} for name, panels in SECTIONS.items()],
    }


def workspace(spec: dict[str, Any]) -> Any:
    """Return the `Workspace` of wandb-workspaces that a specification describes."""
    import wandb_workspaces.reports.v2 as wr
    import wandb_workspaces.workspaces as ws
    from wandb_workspaces import expr

    def value(found: Any) -> Any:
        if isinstance(found, list):
            return [value(part) for part in found]
        where, _, name = found.partition(":") if isinstance(found, str) else ("", "", "")
        kinds = {"config": wr.Config, "summary": wr.SummaryMetric}
        return kinds[where](name) if name and where in kinds else found

    def panel(said: dict[str, Any]) -> Any:
        options = {key: value(found) for key, found in said.items() if key != "kind"}
        if said["kind"] == "ParallelCoordinatesPlot":
            options["columns"] = [
                wr.ParallelCoordinatesPlotColumn(column) for column in options["columns"]
            ]
        return getattr(wr, said["kind"])(**options)

    return ws.Workspace(
        entity=spec["entity"],
        project=spec["project"],
        name=spec["name"],
        sections=[
            ws.Section(
                name=section["name"],
                panels=[panel(said) for said in section["panels"]],
                is_open=True,
            )
            for section in spec["sections"]
        ],
        settings=ws.WorkspaceSettings(x_axis="epoch", max_runs=100),
        runset_settings=ws.RunsetSettings(
            groupby=[expr.Config(name) for name in spec["group_by"]],
            order=[expr.Ordering(expr.Summary("test_auc_macro"), ascending=False)],
            pinned_columns=list(spec["columns"]),
        ),
    )


def make(tracking: Tracking, out: Path, runs: Path, say: Callable[[str], None] = print) -> None:
    """Write the layout, and make the workspace where that can be done; else say what is to do.

    Args:
        tracking: mode, project and entity; the rest plays no part.
        out: file of the layout, JSON.
        runs: folder with run folders, at any depth.
        say: prints a line.

    Raises:
        WaraError: kind "config" when W&B does not take the workspace.
        OSError: when the file cannot be written.
    """
    spec = specification(tracking.project, tracking.entity)
    write_json(out, spec)
    say(f"layout     {out}")
    reason = _reason(tracking.mode)
    if reason:
        say(f"dashboard  not made: {reason}; then run this again")
        for line in _by_hand(tracking, runs):
            say(line)
    else:
        say(f"dashboard  {_saved(spec, out)}")


def _reason(mode: str) -> str:
    """Return why no workspace can be made from here, with a remedy; empty when it can."""
    if mode != "online":
        return f"WANDB_MODE is {mode}; unset it"
    if find_spec("wandb_workspaces") is None:
        return "wandb-workspaces is not installed; pip install 'wara[dashboard]'"
    away = unreachable()
    if away:
        return f"{away} is not reachable; look at the network, or WANDB_BASE_URL"
    stranger = unknown_sender()
    return f"{stranger}; run `wandb login`" if stranger else ""


def _saved(spec: dict[str, Any], out: Path) -> str:
    """Save the workspace at W&B and return its address."""
    import wandb

    try:
        entity = spec["entity"] or wandb.Api().default_entity
        return str(workspace(spec | {"entity": entity}).save().url)
    except Exception as error:  # of W&B's server or client, which have no common class
        words = " ".join(str(error).split())
        raise WaraError(
            "config", f"W&B did not take the dashboard ({type(error).__name__}: {words})",
            f"project {spec['project']}", f"check --project and --entity; its layout is in {out}",
        ) from error  # fmt: skip


def _by_hand(tracking: Tracking, runs: Path) -> list[str]:
    """Return how to send the runs, and how to look at them here."""
    files = sorted(runs.glob("**/wandb/offline-run-*/run-*.wandb"))
    unsent = [path for path in files if not is_sent(path)]
    command = ["wandb", "sync", "--project", tracking.project]
    command += ["--entity", tracking.entity] if tracking.entity else []
    stores = list(dict.fromkeys(str(path.parents[1]) for path in unsent))
    lines = [f"runs       {len(stores)} below {runs} are not sent yet"]
    if stores:
        lines.append(f"send       {shlex.join([*command, *stores])}")
    newest = max(files, key=lambda path: path.stat().st_mtime, default=None)
    if newest is not None:
        lines.append(f"look here  {shlex.join(['wandb', 'beta', 'leet', str(newest.parents[1])])}")
    return lines
