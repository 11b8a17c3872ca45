"""A report as a list of parts, written as Markdown or as one HTML page that needs nothing else.

The page holds its pictures and its style, and a script only where one is given; what it links to
lies beside it.
"""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote

from wara.runs.report import table_cell


@dataclass(frozen=True)
class Heading:
    """The title of a section."""

    text: str


@dataclass(frozen=True)
class Text:
    """A paragraph; `small` is set back, for remarks on what stands above it."""

    text: str
    small: bool = False


@dataclass(frozen=True)
class Banner:
    """What a reader must not miss."""

    text: str


@dataclass(frozen=True)
class Tiles:
    """Figures at a glance: (what, value, detail)."""

    items: Sequence[tuple[str, str, str]]


class Link(NamedTuple):
    """Words in a cell of a table that lead to a file beside the report."""

    text: str
    target: str


@dataclass(frozen=True)
class Table:
    """A table; the first column names the rows."""

    header: Sequence[str]
    rows: Sequence[Sequence[str | Link]]


@dataclass(frozen=True)
class Picture:
    """A PNG, by its path relative to the report, with what it shows."""

    file: str
    caption: str


Part = Heading | Text | Banner | Tiles | Table | Picture


def as_markdown(title: str, parts: Sequence[Part]) -> str:
    """Return the report as Markdown; pictures lie beside it."""
    return "\n\n".join([f"# {title}", *(_markdown(part) for part in parts)])


def _markdown(part: Part) -> str:
    match part:
        case Heading(text):
            return f"## {text}"
        case Text(text):
            return text
        case Banner(text):
            return f"> **{text}**"
        case Tiles(items):
            return "\n".join(f"* {what}: **{value}** {detail}".rstrip()
                             for what, value, detail in items)  # fmt: skip
        case Picture(file, caption):
            return f"![{caption}]({file})\n\n{caption}"
        case Table():
            return as_markdown_table(part)


def as_markdown_table(table: Table) -> str:
    """Return a table as Markdown."""
    lines = [table.header, ["---"] * len(table.header), *table.rows]
    return "\n".join(f"| {' | '.join(map(_markdown_cell, line))} |" for line in lines)


def _markdown_cell(cell: str | Link) -> str:
    if isinstance(cell, Link):
        return f"[{table_cell(cell.text)}]({quote(cell.target)})"
    return table_cell(cell)


def as_html(title: str, parts: Sequence[Part], folder: Path, script: str = "") -> str:
    """Return the report as one page.

    Args:
        title: heading.
        parts: of the report.
        folder: that pictures are relative to.
        script: JavaScript to put at the end of the page; the page must be whole without it.
    """
    body = "\n".join(_html(part, folder) for part in parts)
    name = html.escape(title)
    ending = f"<script>{script}</script>\n" if script else ""
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{name}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<main>\n"
        f"<h1>{name}</h1>\n{body}\n</main>\n{ending}</body>\n</html>\n"
    )


def _html(part: Part, folder: Path) -> str:
    match part:
        case Heading(text):
            return f"<h2>{html.escape(text)}</h2>"
        case Text(text, small):
            kind = ' class="small"' if small else ""
            return f"<p{kind}>{html.escape(text)}</p>"
        case Banner(text):
            return f'<p class="banner">{html.escape(text)}</p>'
        case Tiles(items):
            tiles = "\n".join(
                f"<div><span>{html.escape(what)}</span><strong>{html.escape(value)}</strong>"
                f"<em>{html.escape(detail)}</em></div>"
                for what, value, detail in items
            )
            return f'<div class="tiles">\n{tiles}\n</div>'
        case Picture(file, caption):
            data = base64.b64encode((folder / file).read_bytes()).decode()
            words = html.escape(caption)
            return (
                f'<figure><img alt="{words}" src="data:image/png;base64,{data}">'
                f"<figcaption>{words}</figcaption></figure>"
            )
        case Table(header, rows):
            head = "".join(f"<th>{html.escape(cell)}</th>" for cell in header)
            lines = "\n".join(
                f"<tr><th>{_html_cell(first)}</th>"
                + "".join(f"<td>{_html_cell(cell)}</td>" for cell in rest)
                + "</tr>"
                for first, *rest in rows
            )
            top = f"<thead><tr>{head}</tr></thead>\n" if any(header) else ""
            kind = "" if any(header) else ' class="facts"'
            return (
                f'<div class="table"><table{kind}>\n{top}'
                f"<tbody>\n{lines}\n</tbody>\n</table></div>"
            )


def _html_cell(cell: str | Link) -> str:
    if isinstance(cell, Link):
        return f'<a href="{quote(cell.target)}">{html.escape(cell.text)}</a>'
    return html.escape(cell)


_STYLE = """
:root { color-scheme: light; }
body { margin: 0; background: #f3f5f7; color: #1c2733;
       font: 16px/1.5 system-ui, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
main { max-width: 76rem; margin: 0 auto; padding: 2rem 2.5rem 3rem; background: #fff; }
h1 { font-size: 1.7rem; line-height: 1.25; margin: 0 0 .6rem; }
h2 { font-size: 1.2rem; margin: 2.2rem 0 .6rem; padding-top: .9rem; border-top: 1px solid #dde3e9; }
p { margin: .5rem 0; max-width: 52rem; }
.small { color: #55636f; font-size: .88rem; }
.banner { background: #fdf1e7; border-left: 5px solid #d55e00; padding: .6rem .9rem;
          font-weight: 600; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(11rem, 1fr)); gap: .8rem;
         margin: 1.1rem 0; }
.tiles div { background: #eef4f9; border-radius: .5rem; padding: .7rem .9rem; }
.tiles span, .tiles em { display: block; font-size: .84rem; color: #47545f; font-style: normal; }
.tiles strong { display: block; font-size: 1.75rem; line-height: 1.3; color: #0a5a94; }
.table { overflow-x: auto; margin: .8rem 0; }
table { border-collapse: collapse; font-size: .86rem; font-variant-numeric: tabular-nums; }
th, td { padding: .32rem .5rem; text-align: left; border-bottom: 1px solid #e3e8ed;
         vertical-align: top; }
thead th { background: #eef1f4; white-space: nowrap; }
tbody th { font-weight: 500; }
td, tbody th { white-space: nowrap; }
.facts td, .facts th { white-space: normal; }
figure { margin: .8rem 0 1.4rem; }
img { max-width: min(100%, 46rem); height: auto; }
figcaption { color: #55636f; font-size: .86rem; max-width: 44rem; }
@media print { body { background: #fff; font-size: 12px; } main { padding: 0; max-width: none; }
               figure, table, .tiles { break-inside: avoid; } h2 { break-after: avoid; } }
"""
