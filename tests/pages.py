"""Pages of docs/ of which parts are made by tests, so that they show what the code does."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

DOCS = Path(__file__).resolve().parents[1] / "docs"


def filled(page: str, maker: str, parts: Mapping[str, str]) -> str:
    """Return a page with its made parts as they must be.

    Args:
        page: name in docs/.
        maker: file of the test that makes the parts.
        parts: text by the name that stands in the marks around it.
    """
    text = (DOCS / page).read_text(encoding="utf-8")
    for name, made in parts.items():
        begin, end = f"<!-- {name}: made by tests/{maker} -->", f"<!-- end of {name} -->"
        before, _, rest = text.partition(begin)
        assert rest.count(end) == 1, f"{page} lacks {begin} … {end}"
        text = f"{before}{begin}\n\n{made.strip()}\n\n{end}{rest.partition(end)[2]}"
    return text


def check(page: str, maker: str, parts: Mapping[str, str]) -> None:
    """Fail when a page is stale."""
    shown = (DOCS / page).read_text(encoding="utf-8")
    assert shown == filled(page, maker, parts), f"stale: python tests/{maker} --write"


def write(page: str, maker: str, parts: Mapping[str, str]) -> None:
    """Bring a page up to date."""
    (DOCS / page).write_text(filled(page, maker, parts), encoding="utf-8")
