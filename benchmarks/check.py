"""How long does `wara check` take, and how much memory, as a data set grows?

Writes folders of two classes, half PNG and half JPEG, and checks each twice in a process of its
own: the first time every file is read, the second time none.

    python benchmarks/check.py --images 1000 10000 --out out.json
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

from wara.images import processors

PROGRAM = """
import resource, sys
from wara.cli import main
code = main(["check", sys.argv[1], "--set", "data.cache=" + sys.argv[2]])
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, file=sys.stderr)
sys.exit(code)
"""


def write_images(folder: Path, count: int, side: int) -> None:
    """Write grey textures that differ in every file; two classes, half PNG and half JPEG."""
    rng = np.random.default_rng(0)
    for index in range(count):
        place = folder / ("ab"[index % 2])
        place.mkdir(parents=True, exist_ok=True)
        coarse = rng.integers(0, 256, (side // 16, side // 16), dtype=np.uint8)
        picture = Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC)
        picture.save(place / f"{index:06d}.{'png' if index // 2 % 2 else 'jpg'}")


def measure(folder: Path, cache: Path) -> dict[str, float]:
    """Return seconds and peak memory (MB) of one check in a process of its own."""
    began = time.perf_counter()
    command = [sys.executable, "-c", PROGRAM, str(folder), str(cache)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    seconds, peak = time.perf_counter() - began, float(done.stderr.split()[-1])
    return {"seconds": round(seconds, 1), "peak_mb": round(peak)}


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, nargs="+", default=[1000, 10000])
    parser.add_argument("--side", type=int, default=256, help="pixels (default: %(default)s)")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    rows = []
    for count in arguments.images:
        with tempfile.TemporaryDirectory() as place:
            folder, cache = Path(place) / "images", Path(place) / "cache"
            write_images(folder, count, arguments.side)
            time.sleep(3)  # what changed a moment ago is not kept
            for name in ("first", "second"):
                row = {"images": count, "check": name, **measure(folder, cache)}
                row["load"] = round(os.getloadavg()[0], 1)
                print(row, flush=True)
                rows.append(row)
    found = {"side": arguments.side, "processors": processors(), "rows": rows}
    arguments.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
