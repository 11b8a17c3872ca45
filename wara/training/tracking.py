"""Where Weights & Biases shows a run: the config first, then W&B's own variables, then defaults."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from wara.config.schema import WandbConfig
from wara.errors import WaraError, suggest
from wara.net import reachable

_MODES = {
    "online": "online",
    "offline": "offline",
    "disabled": "disabled",
    # Words of older releases of wandb, which it takes still.
    "run": "online",
    "dryrun": "offline",
}


@dataclass(frozen=True)
class Tracking:
    """What is settled of the section `wandb` of a config; None is left to W&B.

    Args:
        mode: `online | offline | disabled`.
        project: W&B project.
        entity: user or team that owns it.
        group: runs that belong together.
        tags: words to find the run by.
        notes: remark beside the run.
    """

    mode: str
    project: str
    entity: str | None
    group: str | None
    tags: tuple[str, ...]
    notes: str | None


def settle(section: WandbConfig, environ: Mapping[str, str] = os.environ) -> Tracking:
    """Return where a run is shown.

    Args:
        section: of the config. What it says holds.
        environ: W&B's variables in it hold where the section is silent; an empty one is none.

    Raises:
        WaraError: kind "config" when WANDB_MODE holds and is not a mode that runs here.
    """

    def first(said: str | None, variable: str) -> str | None:
        return said if said is not None else environ.get(variable) or None

    mode = first(section.mode, "WANDB_MODE") or "offline"
    if mode not in _MODES:
        what = f'WANDB_MODE should be one of online, offline, disabled, not "{mode}"'
        raise WaraError("config", what, "the environment", suggest(mode, _MODES))
    tags = section.tags
    if tags is None:
        tags = [tag.strip() for tag in environ.get("WANDB_TAGS", "").split(",") if tag.strip()]
    return Tracking(
        mode=_MODES[mode],
        project=first(section.project, "WANDB_PROJECT") or "wara",
        entity=first(section.entity, "WANDB_ENTITY"),
        group=first(section.group, "WANDB_RUN_GROUP"),
        tags=tuple(tags),
        notes=first(section.notes, "WANDB_NOTES"),
    )


def unreachable() -> str:
    """Return the address of W&B's server where it takes no connection; empty when it does.

    Decided within seconds, see `wara.net.reachable`.
    """
    import wandb

    address = os.environ.get("WANDB_BASE_URL") or wandb.Settings().base_url
    return "" if reachable(address) else str(address)


def unknown_sender() -> str:
    """Return why W&B does not know who sends; empty when it does.

    Asks the server, which takes long where none answers: ask `unreachable` first.
    """
    import wandb

    try:
        known = wandb.login(prompt=False)
    except wandb.Error as error:
        return f"W&B does not take the key: {' '.join(str(error).split())}"
    return "" if known else "wandb is not logged in"


def key_of(name: str) -> str:
    """Return a name as W&B takes it for a key: letters, digits and underscores."""
    return re.sub(r"\W+", "_", name).strip("_")


def files_of(folder: Path, run_id: str) -> list[Path]:
    """Return W&B's files of a run below `folder`, one per process that took its turn, in order."""
    found = folder.glob(f"wandb/*run-*-{run_id}/run-{run_id}.wandb")
    # The name of the folder holds the time of its start, behind `offline-run-` or `run-`.
    return sorted(found, key=lambda path: path.parent.name.rpartition("run-")[2])


def is_sent(path: Path) -> bool:
    """Whether a file of W&B is at the server, or was written while connected to it."""
    return not path.parent.name.startswith("offline-") or Path(f"{path}.synced").exists()


def epochs_in(path: Path) -> set[int]:
    """Return the epochs in a file of W&B, as its own reader has them.

    A process that is killed leaves a file that ends anywhere; the reader stops there.

    Raises:
        OSError: when the reader does not read it.
    """
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(path)]
    # Offline, it does not look for a server to report itself to.
    environ = {**os.environ, "WANDB_MODE": "offline", "WANDB_DIR": str(path.parent)}
    done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=120)  # noqa: S603  (the words are ours)
    if done.returncode:
        raise OSError(f"wandb does not read {path}: {' '.join(done.stderr.split())[-200:]}")
    records = map(json.loads, done.stdout.splitlines())
    items = [record["history"]["item"] for record in records if record["type"] == "history"]
    return {int(item["epoch"]) for item in items if "epoch" in item}
