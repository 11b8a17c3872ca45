"""Images whose class lies in one subband of the patch grid: where mixing per subband must help.

    python benchmarks/bands.py --out bands
    wara compare --cfg bands/bands.yaml --methods lora,wara --seeds 3 --budget lora_r1 --out OUT

Every image is a mosaic of two textures, one per patch of the backbone's grid. Which of the two a
patch shows is a pattern of signs, and only its arrangement tells the class: patches alternate
from row to row (`rows`), from column to column (`columns`), like a checkerboard (`checks`), or
not at all (`blobs`: the signs of a coarse random field). For Haar these are the bands LH, HL, HH
and LL of one level. A share of the patches shows the other texture, and each class has both in
equal shares, so that no patch by itself says anything. The textures are drawn anew for each image,
or are the same two in all of them (`--same`).
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path

import numpy as np
from PIL import Image

CLASSES = ("blobs", "rows", "columns", "checks")
CONFIG = """# Mosaics whose class lies in one subband of the patch grid.
dataset: {folder}
offline: error
epochs: {epochs}
backbone: {{name: wara_nano}}
adapter: {{method: wara}}
data: {{augment: "off"}}
wandb: {{mode: disabled}}
"""


def signs(rng: np.random.Generator, name: str, grid: int, flips: float) -> np.ndarray:
    """Return which texture each patch shows: 0 or 1, `[grid, grid]`."""
    row, column = np.indices((grid, grid)) + rng.integers(2, size=(2, 1, 1))
    if name == "blobs":
        coarse = rng.permuted(np.arange(16) % 2).reshape(4, 4)
        pattern = np.kron(coarse, np.ones((grid // 4 + 1,) * 2, int))[:grid, :grid]
    else:
        pattern = {"rows": row, "columns": column, "checks": row + column}[name] % 2
    return pattern ^ (rng.random((grid, grid)) < flips)


def texture(rng: np.random.Generator, side: int) -> np.ndarray:
    """Return a grating of a random direction and pitch: `[side, side]`, mean 0, deviation 1."""
    y, x = np.indices((side, side))
    angle, pitch = rng.uniform(0, np.pi), rng.uniform(2.5, 8)
    wave = np.sin((x * np.cos(angle) + y * np.sin(angle)) * 2 * np.pi / pitch + rng.uniform(0, 6))
    return (wave - wave.mean()) / wave.std()


def mosaic(
    rng: np.random.Generator,
    name: str,
    grid: int,
    patch: int,
    flips: float,
    two: np.random.Generator,
) -> np.ndarray:
    """Return an image, uint8 `[grid * patch, grid * patch]`; `two` draws its textures."""
    side = grid * patch
    pattern = np.kron(signs(rng, name, grid, flips), np.ones((patch, patch))).astype(bool)
    shown = np.where(pattern, texture(two, side), texture(two, side))
    pixels = 128 + rng.uniform(20, 35) * shown + rng.normal(0, 12, (side, side))
    return np.clip(pixels, 0, 255).astype(np.uint8)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--images", type=int, default=480)
    parser.add_argument("--grid", type=int, default=14, help="patches on a side")
    parser.add_argument("--patch", type=int, default=8, help="pixels of a patch")
    parser.add_argument("--flips", type=float, default=0.25, help="share of patches that disagree")
    parser.add_argument("--same", action="store_true", help="the same two textures in all images")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.out.mkdir(parents=True)
    rows = []
    for index in range(args.images):
        name = CLASSES[index % len(CLASSES)]
        rng = np.random.default_rng((args.seed, index))
        file = f"{index:04d}.png"
        two = np.random.default_rng(args.seed) if args.same else rng
        drawn = mosaic(rng, name, args.grid, args.patch, args.flips, two)
        Image.fromarray(drawn).save(args.out / file)
        rows.append((file, name))
    with (args.out / "labels.csv").open("w", newline="") as stream:
        csv.writer(stream).writerows([("file", "label"), *rows])
    config = CONFIG.format(folder=args.out.resolve(), epochs=args.epochs)
    (args.out / "bands.yaml").write_text(config)
    print(f"{args.images} images and a config: {args.out / 'bands.yaml'}")


if __name__ == "__main__":
    main()
