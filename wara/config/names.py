"""Configs by name: the shipped ones, and what `--cfg` means."""

from __future__ import annotations

from pathlib import Path

from wara.errors import WaraError, suggest
from wara.storage import shipped


def list_configs() -> dict[str, str]:
    """Return name -> first line of the header comment of every shipped config."""
    found = {}
    for path in sorted(shipped("configs").glob("*.yaml")):
        first = path.read_text(encoding="utf-8").split("\n", 1)[0]
        found[path.stem] = first.lstrip("# ").strip()
    return found


def find_config(name: str | Path) -> Path:
    """Return the file that a `--cfg` means: a path, else the name of a shipped config.

    `fundus_wara` and `fundus_wara.yaml` mean the same. A file in the current folder wins.

    Raises:
        WaraError: kind "config", naming the nearest shipped config.
    """
    given = Path(name).expanduser()
    candidates = [given] if given.suffix in (".yaml", ".yml") else [given, Path(f"{given}.yaml")]
    # A bare name is looked up here and among the shipped ones, `configs/x.yaml` too when the
    # package is installed and there is no such folder here.
    if given.parent in (Path("."), Path("configs")):
        candidates += [shipped("configs") / path.name for path in candidates]
    for path in candidates:
        if path.is_file():
            return path
    if given.is_dir():
        raise WaraError(
            "config", "--cfg is a folder", str(given), f"name a file: {given}/config.yaml"
        )
    names = [f"{stem}.yaml" for stem in list_configs()]
    wanted = given.name if given.suffix else f"{given.name}.yaml"
    raise WaraError("config", f"no config '{name}'", "--cfg", suggest(wanted, names))
