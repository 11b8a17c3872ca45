"""Writes a contact sheet: `python -m wara.phantoms --modality fundus --out sheet.png`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
from PIL import Image

from wara.errors import WaraError
from wara.flags import whole
from wara.phantoms import MODALITIES, classes, draw


def contact_sheet(modality: str, seed: int, columns: int, size: int) -> Image.Image:
    """Return a picture with one row of images per class.

    Args:
        modality: a key of `MODALITIES`.
        seed: of the collection.
        columns: images per class.
        size: side of each image in pixels.

    Returns:
        The sheet.
    """
    rows: list[list[np.ndarray]] = [[] for _ in classes(modality)]
    index = 0
    while any(len(row) < columns for row in rows):
        phantom = draw(modality, seed, index, size)
        rows[phantom.label].append(phantom.image)
        index += 1
    return Image.fromarray(np.concatenate([np.concatenate(row[:columns], 1) for row in rows]))


def main() -> None:
    """Read the arguments and write the sheet."""
    parser = argparse.ArgumentParser(prog="python -m wara.phantoms", description=__doc__)
    parser.add_argument("--modality", choices=list(MODALITIES), default="fundus")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=whole("--seed", 0, 2**32 - 1), default=0)
    parser.add_argument("--columns", type=whole("--columns", 1, 100), default=8)
    parser.add_argument("--size", type=whole("--size", 16, 1024), default=112)
    args = parser.parse_args()
    contact_sheet(args.modality, args.seed, args.columns, args.size).save(args.out)


if __name__ == "__main__":
    try:
        main()
    except WaraError as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)
