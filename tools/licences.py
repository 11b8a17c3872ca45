"""Writes docs/licences.md: the licence of every installed package of requirements.lock.

    python tools/licences.py            (make licences)

What a package says of itself: its SPDX expression where it has one, else its classifiers, else the
first line of its licence field.
"""

from __future__ import annotations

import re
import sys
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "licences.md"
HEAD = """\
# Licences of what wara needs

Written by `make licences` from the metadata of what is installed; do not edit. wara itself is under
Apache-2.0. Packages that another platform or Python needs in their stead are in `requirements.lock`
and not here.

| package | version | licence, as it says itself |
|---|---|---|
"""
# Packages that say nothing in a form a machine reads; from the licence file in them.
SAID = {"medmnist": "Apache-2.0"}
_LONGEST = 80


def pins() -> dict[str, str]:
    """Return the pinned version of every package of requirements.lock."""
    lines = (ROOT / "requirements.lock").read_text().splitlines()
    wanted = [Requirement(line.rstrip(" \\")) for line in lines if re.match(r"[A-Za-z0-9]", line)]
    return {each.name: str(each.specifier).removeprefix("==") for each in wanted}


def licence(name: str) -> str:
    """Return what an installed package says of its licence."""
    found = metadata.metadata(name)
    if found.get("License-Expression"):
        return str(found["License-Expression"])
    classes = [
        text.rsplit(" :: ", 1)[1]
        for text in found.get_all("Classifier") or ()
        if text.startswith("License :: ") and text.count(" :: ") > 1
    ]
    text = ", ".join(dict.fromkeys(classes)) or str(found.get("License") or "").strip()
    text = (text.splitlines() or [""])[0].strip().replace("|", "/")
    if not text or len(text) > _LONGEST or text.upper() == "UNKNOWN":
        return SAID.get(name.lower(), "not said")
    return text


def page() -> str:
    """Return the page for what is installed here."""
    rows = []
    for name, pinned in sorted(pins().items(), key=lambda pair: pair[0].lower()):
        try:
            metadata.version(name)
        except metadata.PackageNotFoundError:
            continue  # of another platform
        rows.append(f"| {name} | {pinned} | {licence(name)} |")
    return HEAD + "\n".join(rows) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    sys.stdout.write(f"{PAGE.relative_to(ROOT)}\n")
