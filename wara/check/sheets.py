"""Pictures of a data set: some images of each class, and how bright the classes are."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from wara.check.content import printable
from wara.data.imageset import ImageSet
from wara.evaluation.canvas import STAMP, line_of, new_figure, save, text_of
from wara.storage import write_bytes

SIDE, GAP, LINE = 128, 8, 15
COLUMNS = 6
_INK, _PAPER, _WARNING = (28, 39, 51), (255, 255, 255), (213, 94, 0)


def chosen(images: ImageSet, number: int, count: int) -> list[int]:
    """Return some images of a class: those whose SHA-256 come first.

    The choice depends on the images only, and on nothing that their names or order may hide.

    Args:
        images: that have been read.
        number: of the class.
        count: at most so many.
    """
    labels = images.labels
    own = labels[:, number] == 1 if labels.ndim == 2 else labels == number
    indices = [int(index) for index in np.flatnonzero(own) if int(index) in images.facts]
    return sorted(indices, key=lambda index: (images.facts[index].sha256, index))[:count]


def contact_sheet(
    path: Path, images: ImageSet, indices: Sequence[int], splits: Sequence[str]
) -> None:
    """Draw images side by side, each with its split and the end of its name.

    Args:
        path: of the PNG.
        images: the set.
        indices: of the images, at least one.
        splits: of all records.

    Raises:
        WaraError: kind "data" when an image cannot be read any more.
    """
    columns = min(COLUMNS, len(indices))
    rows = -(-len(indices) // columns)
    cell = SIDE + 2 * LINE + GAP
    stamp = 2 * LINE if images.synthetic else 0
    width = max(columns * (SIDE + GAP) + GAP, 420 if stamp else 0)
    sheet = Image.new("RGB", (width, rows * cell + GAP + stamp), _PAPER)
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(11)
    for place, index in enumerate(indices):
        left = GAP + place % columns * (SIDE + GAP)
        top = GAP + place // columns * cell
        picture = Image.fromarray(images.read(index))
        picture.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
        sheet.paste(picture, (left + (SIDE - picture.width) // 2, top + SIDE - picture.height))
        name = printable(images.records[index].file.rpartition("/")[2])
        draw.text((left, top + SIDE + 1), _end_of(name, 20), _INK, font)
        draw.text((left, top + SIDE + LINE - 1), splits[index], _INK, font)
    if stamp:
        draw.text((GAP, sheet.height - stamp + 6), STAMP, _WARNING, font)
    buffer = io.BytesIO()
    sheet.save(buffer, "PNG", optimize=True)
    write_bytes(path, buffer.getvalue())


def _end_of(name: str, longest: int) -> str:
    return name if len(name) <= longest else "…" + name[1 - longest :]


def brightness(path: Path, images: ImageSet) -> None:
    """Draw how the brightness of the images of each class is distributed.

    Args:
        path: of the PNG.
        images: that have been read.
    """
    fig = new_figure(7.4, 3.0)
    ax = fig.subplots()
    labels = images.labels
    greys = {index: facts.greys(images.bits) for index, facts in images.facts.items()}
    for number, name in enumerate(images.card.class_names[:12]):
        own = labels[:, number] == 1 if labels.ndim == 2 else labels == number
        values = [grey[0] for i, grey in greys.items() if grey is not None and own[i]]
        if values:
            values.sort()
            shares = np.arange(1, len(values) + 1) / len(values)
            # Every image counts in such a curve, and no width of bins is chosen.
            ax.step(values, shares, where="post", label=text_of(name), **line_of(number))
    ax.set(xlabel="brightness: mean of the greys of an image, 0 to 255",
           ylabel="share of images at most so bright", ylim=(0, 1.02))  # fmt: skip
    if ax.lines:
        ax.legend(fontsize=8, frameon=False)
    save(fig, path, images.synthetic)
