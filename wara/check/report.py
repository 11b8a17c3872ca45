"""The report of a check: lines for the terminal, and a folder with a page that opens anywhere."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from wara.check import sheets
from wara.check.content import COLUMNS, Content, rows_of, split_rows
from wara.check.inspection import Inspection
from wara.data.balance import SplitTable, table_lines
from wara.data.splits import SPLITS
from wara.deploy.document import Banner, Heading, Part, Picture, Table, Text, Tiles, as_html
from wara.deploy.places import check_places
from wara.errors import WaraError
from wara.runs.pairs import SHEET, TABLE, write_pairs
from wara.storage import replacing_folder, write_csv, write_json, write_text

PAGE = "report.html"
_OF_A_REPORT = (PAGE, "check.json", "images.csv", "brightness.png", TABLE, SHEET)
_SHEET = re.compile(r"class_\d+\.png")
_DRAWN = "SYNTHETIC: these images were drawn by code. Nothing here is about patients."
_MOST_COPIES = 200


def check_place(folder: Path, *, overwrite: bool) -> None:
    """Refuse a folder that cannot take a report.

    Args:
        folder: of the report.
        overwrite: whether an earlier report in it is replaced.

    Raises:
        WaraError: kind "usage".
    """
    check_places({}, {"--report": folder}, [])
    if folder.is_dir() and any(folder.iterdir()) and not overwrite:
        remedy = "choose another --report, or replace the report in it with --overwrite"
        raise WaraError("usage", "the folder is not empty", str(folder), remedy)


def write(folder: Path, found: Inspection, content: Content, *, per_class: int) -> None:
    """Write `report.html`, `check.json`, `images.csv` and the pictures, all of them or none.

    Of an earlier report nothing stays; other files of the folder are left alone.

    Args:
        folder: of the report.
        found: by the inspection.
        content: the same as plain values.
        per_class: images on a contact sheet.

    Raises:
        WaraError: kind "storage" when it cannot be written, kind "data" when an image changed.
    """
    with replacing_folder(folder) as new:
        drawn = _draw(new, found, per_class)
        write_json(new / "check.json", content)
        write_csv(new / "images.csv", COLUMNS, rows_of(found))
        if found.images is not None:
            write_pairs(new, found.images, split_rows(found, found.images))
            if (new / SHEET).is_file():
                drawn[SHEET] = "Pictures that are there twice, side by side; the first 40 pairs"
        title = f"Check of {content.get('title') or content['dataset']}"
        write_text(new / PAGE, as_html(title, list(_parts(content, drawn)), new))
        names = {path.name for path in new.iterdir()}
    for path in folder.iterdir():
        if path.name not in names and (path.name in _OF_A_REPORT or _SHEET.fullmatch(path.name)):
            path.unlink(missing_ok=True)


def _draw(folder: Path, found: Inspection, per_class: int) -> dict[str, str]:
    """Draw what can be drawn; return captions by the names of the files."""
    images, drawn = found.images, dict[str, str]()
    if images is None or not images.facts:
        return drawn
    sheets.brightness(folder / "brightness.png", images)
    drawn["brightness.png"] = "Brightness of the images of each class"
    for number, name in enumerate(images.card.class_names):
        indices = sheets.chosen(images, number, per_class)
        if indices:
            file = f"class_{number}.png"
            sheets.contact_sheet(folder / file, images, indices, found.splits)
            drawn[file] = f"{name}: {len(indices)} images, those whose SHA-256 come first"
    return drawn


def lines(content: Content) -> Iterator[str]:
    """Yield what is printed of a check, all but the faults themselves."""
    if content["synthetic"]:
        yield f"!!!!!!!! {_DRAWN}"
    if "images" not in content:
        yield _pair("data set", content["dataset"])
    else:
        about = f"{content['name']}: {content['title']} ({content['task']}, {content['origin']})"
        yield _pair("data set", about)
        for i, line in enumerate(table_lines(_table(content["splits"]))):
            yield _pair("" if i else "splits", line)
        yield _pair("files", _files(content["files"]))
        for name, row in content["looks"].items():
            yield _pair("greys", f"{name}: {_look(row)}")
        exact = sum(len(same) - 1 for same in content["copies"])
        yield _pair("copies", f"{exact} exact, {_near(content['near_duplicates'])}")
    for name in ("note", "warning"):
        for text in content[f"{name}s"]:
            yield _pair(name, text)
    kinds = _by_kind(content["faults"])
    for about, found in kinds.items():
        for kind, faults in found.items():
            yield _pair("refused", f"{len(faults)} x {about}: {kind}")
    yield _pair("result", "refused" if kinds else "accepted: training would start")


def _pair(name: str, text: str) -> str:
    return f"{name:<10} {text}".rstrip()


def _table(splits: Content) -> SplitTable:
    return SplitTable(
        classes=tuple(splits["train"]["classes"]),
        counts={name: tuple(splits[name]["classes"].values()) for name in SPLITS},
        images={name: splits[name]["images"] for name in SPLITS},
        patients={name: splits[name]["patients"] for name in SPLITS},
    )


def _by_kind(faults: Sequence[Content]) -> dict[str, dict[str, list[Content]]]:
    grouped: dict[str, dict[str, list[Content]]] = defaultdict(lambda: defaultdict(list))
    for fault in faults:
        grouped[fault["about"]][fault["kind"]].append(fault)
    return grouped


def _parts(content: Content, drawn: Mapping[str, str]) -> Iterator[Part]:
    yield Text(f"Made {content['created'][:10]} by wara {content['wara']}.", small=True)
    if content["synthetic"]:
        yield Banner(_DRAWN)
    faults = content["faults"]
    if faults:
        yield Banner(f"Refused: {len(faults)} faults, listed below. Training does not start.")
    if "images" in content:
        yield Tiles(list(_tiles(content)))
    yield from _refused(faults)
    yield from _said("Warnings", content["warnings"])
    yield from _said("Notes", content["notes"])
    if "images" not in content:
        return
    yield Heading("Images per split and class")
    yield Table(("Split", "Images", "Patients", *content["splits"]["train"]["classes"]),
                [_split(name, row) for name, row in content["splits"].items()])  # fmt: skip
    if content["unused"]:
        yield Text(f"{content['unused']} training images are left out (data.train_images).")
    yield from _files_table(content)
    yield from _looks_table(content, drawn)
    yield from _copies_table(content["copies"])
    yield from _near_table(content["near_duplicates"])
    if SHEET in drawn:
        yield Picture(SHEET, drawn[SHEET])
    pictures = {file: caption for file, caption in drawn.items() if _SHEET.fullmatch(file)}
    if pictures:
        yield Heading("Some images of each class")
        yield from (Picture(file, caption) for file, caption in pictures.items())


def _tiles(content: Content) -> Iterator[tuple[str, str, str]]:
    patients, unreadable = content["patients"], content["unreadable"]
    yield "Images", f"{content['images']:,}", f"{unreadable:,} cannot be read"
    known = patients is not None
    yield "Patients", f"{patients:,}" if known else "–", "" if known else "not known"
    yield "Classes", str(len(content["looks"])), content["task"]
    copied = sum(len(same) - 1 for same in content["copies"])
    yield "Exact copies", f"{copied:,}", "of other images"
    near = content["near_duplicates"]
    if near["compared"]:
        yield "Near-duplicates", f"{len(near['pairs']):,}", f"pairs, {near['images']:,} images"


def _refused(faults: Sequence[Content]) -> Iterator[Part]:
    for about, kinds in _by_kind(faults).items():
        count = sum(map(len, kinds.values()))
        yield Heading(f"Refused: {about} ({count})")
        for kind, found in kinds.items():
            yield Text(f"{kind}: {len(found)}")
            rows = [(fault["where"] or "–", fault["what"], fault["remedy"]) for fault in found]
            yield Table(("Where", "What", "What to do"), rows)


def _said(title: str, texts: Sequence[str]) -> Iterator[Part]:
    if texts:
        yield Heading(title)
        yield from map(Text, texts)


def _split(name: str, row: Content) -> list[str]:
    patients = "–" if row["patients"] is None else str(row["patients"])
    return [name, str(row["images"]), patients, *map(str, row["classes"].values())]


def _counted(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} ({n})" for name, n in counts.items()) or "–"


def _side(row: Any) -> str:
    if row is None:
        return "–"
    low, middle, high = (f"{row[name]:g}" for name in ("least", "median", "most"))
    return low if low == high else f"{low} to {high}, median {middle}"


def _files(row: Content) -> str:
    bits = ", ".join(f"{bits} bits ({n})" for bits, n in row["bits"].items())
    sides = f"width {_side(row['width'])}, height {_side(row['height'])}"
    return f"{_counted(row['container'])}; {_counted(row['mode'])}; {bits}; {sides} px"


def _files_table(content: Content) -> Iterator[Part]:
    yield Heading("Files")
    rows = [("all", content["files"]), *content["files_of_class"].items()]
    yield Table(
        ("Class", "Container", "Mode", "Bits", "Width, px", "Height, px", "Sizes"),
        [
            (name, _counted(row["container"]), _counted(row["mode"]), _counted(row["bits"]),
             _side(row["width"]), _side(row["height"]), str(row["sizes"]))
            for name, row in rows
        ],
    )  # fmt: skip
    yield Text(
        "Where the classes differ here, they may come from different machines, and a model may "
        "learn the machine.",
        small=True,
    )


def _look(row: Content) -> str:
    if row["brightness"] is None:
        return "no image"
    mean, spread = row["brightness"]
    value = row["auroc"]["brightness"]
    told = "" if value is None else f", brightness alone has AUROC {value:.3f}"
    return f"mean {mean:.1f} ± {spread:.1f}, std {row['contrast'][0]:.1f}{told}"


def _looks_table(content: Content, drawn: Mapping[str, str]) -> Iterator[Part]:
    yield Heading("Greys of each class")
    rows = []
    for name, row in content["looks"].items():
        pairs = [row["brightness"], row["contrast"]]
        cells = ["–" if pair is None else f"{pair[0]:.1f} ± {pair[1]:.1f}" for pair in pairs]
        values = ["–" if v is None else f"{v:.3f}" for v in row["auroc"].values()]
        rows.append([name, str(row["images"]), *cells, *values])
    heads = ("Class", "Images", "Brightness", "Contrast", "AUROC: brightness",
             "contrast", "size")  # fmt: skip
    yield Table(heads, rows)
    yield Text(
        "Brightness is the mean of the greys of an image (0 to 255), contrast their deviation; "
        "both as mean ± deviation over the images. An AUROC says how well that one number tells "
        "the class from the rest; 0.5 is chance, and above "
        f"{content['suspicious_above']:g} is a warning.",
        small=True,
    )
    if "brightness.png" in drawn:
        yield Picture("brightness.png", drawn["brightness.png"])


def _copies_table(same: Sequence[Sequence[Content]]) -> Iterator[Part]:
    if not same:
        return
    yield Heading("Identical images")
    shown = same[:_MOST_COPIES]
    rows = [
        (str(number), image["file"], image["label"], image["split"])
        for number, images in enumerate(shown, 1)
        for image in images
    ]
    yield Table(("Group", "File", "Label", "Split"), rows)
    if len(same) > len(shown):
        yield Text(f"{len(same) - len(shown)} more groups are in check.json.")


def _near(near: Content) -> str:
    if not near["compared"]:
        return "near-duplicates not looked for among drawn images"
    across, other = near["across_splits"], near["other_labels"]
    return (
        f"{len(near['pairs'])} near-duplicate pairs ({across} across splits, "
        f"{other} with different labels)"
    )


def _near_table(near: Content) -> Iterator[Part]:
    pairs = near["pairs"]
    if not pairs:
        return
    yield Heading("Near-duplicates")
    yield Text(
        f"{len(pairs)} pairs among {near['images']} images: {near['across_splits']} across splits, "
        f"{near['other_labels']} with different labels."
    )
    # Those that tell of a wrong label or a leak come first.
    shown = sorted(pairs, key=_harmless)[:_MOST_COPIES]
    yield Table(
        ("File", "Other file", "Labels", "Splits", "Correlation", "Turned"),
        [
            (a["file"], b["file"], _both(a["label"], b["label"]), _both(a["split"], b["split"]),
             f"{pair['correlation']:.3f}", pair["mirrored"] or "–")
            for pair in shown
            for a, b in (pair["files"],)
        ],
    )  # fmt: skip
    if len(pairs) > len(shown):
        yield Text(f"{len(pairs) - len(shown)} more pairs are in {TABLE}.")


def _harmless(pair: Content) -> tuple[bool, bool]:
    a, b = pair["files"]
    return a["label"] == b["label"], a["split"] == b["split"]


def _both(one: str, other: str) -> str:
    return one if one == other else f"{one}, {other}"
