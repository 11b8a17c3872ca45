"""WaRA (arXiv 2506.24092), Fig. 2: where the learned update lies, over several trained runs.

    python benchmarks/papers/wara_subbands.py runs/A runs/B --out DIR

Rebuilds each run's model from its folder, sends test images of the run through it, and writes the
energy of the update by layer and subband and its singular values: a JSON file and two figures per
run, and one figure that compares the runs. The files and images are those of the run: an adapter
that does not fit the backbone, or an image that has changed since, is refused.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
from paper_tools import figure, write_figure, write_result
from torch import Tensor

from wara.adapters import singular_values, subband_energy
from wara.errors import WaraError
from wara.evaluation import canvas, plots
from wara.images import to_tensor
from wara.runs import Run, load_run
from wara.training.setup import open_images


def run_images(run: Run, count: int) -> Tensor:
    """Return the first test images of a run, `[b, 3, H, W]`, as its evaluation reads them.

    Raises:
        WaraError: kind `data` when an image is gone or is not the one of the run.
    """
    config, spec = run.config, run.spec
    images = open_images(config)
    rows = [row for row in run.splits() if row.split == "test"][:count]
    places = {record.file: i for i, record in enumerate(images.records)}
    found = []
    for row in rows:
        place = places.get(row.file)
        if place is None or images.sha256(place) != row.sha256:
            what = f"the test image {row.file} is not the one of the run"
            raise WaraError("data", what, config.dataset, "give the data the run was made with")
        found.append(to_tensor(images.array(place, spec), spec))
    if not found:
        where = str(run.folder.path)
        raise WaraError("data", "the run has no test images", where, "give another run")
    return torch.stack(found)


def measure(path: Path, count: int) -> dict[str, Any]:
    """Return energies, their shares and singular values of a run."""
    run = load_run(path)
    model, method = run.model(), run.config.adapter.name
    images = run_images(run, count)
    energy = subband_energy(model, images)
    if not energy:
        what = f"the method '{method}' has no subbands"
        raise WaraError("usage", what, str(path), "give runs of wara or tiny_wara")
    spectra = {
        layer: {band: values.tolist() for band, values in bands.items()}
        for layer, bands in singular_values(model).items()
    }
    return {
        "run": path.name,
        "method": method,
        "dataset": run.provenance["data"]["name"],
        "synthetic": run.synthetic,
        "seed": run.config.seed,
        "backbone": run.backbone.name,
        "images": len(images),
        "energy": energy,
        "share": shares(energy),
        "singular_values": spectra,
    }


def shares(energy: dict[str, dict[str, float]]) -> dict[str, float]:
    """Return the share of each subband in the energy of a layer, averaged over layers with any."""
    parts = []
    for bands in energy.values():
        total = sum(bands.values())
        if total > 0:
            parts.append({band: value / total for band, value in bands.items()})
    return {band: float(np.mean([p[band] for p in parts])) for band in (parts[0] if parts else ())}


def compare(found: list[dict[str, Any]], path: Path) -> None:
    """Draw the shares of all runs side by side, and the spectra's mean decay."""
    bands = max((list(one["share"]) for one in found), key=len)
    fig = figure(4.5 + 0.6 * len(bands), 3.4)
    left, right = fig.subplots(1, 2, width_ratios=[2, 1])
    width = 0.8 / len(found)
    for i, one in enumerate(found):
        colour = canvas.PALETTE[i % len(canvas.PALETTE)]
        heights = [one["share"].get(band, np.nan) for band in bands]
        left.bar(np.arange(len(bands)) + (i + 0.5) * width - 0.4, heights, width, color=colour,
                 label=one["run"])  # fmt: skip
        spectra = [v for layer in one["singular_values"].values() for v in layer.values() if v[0]]
        if spectra:
            curve = np.mean([np.divide(values, values[0]) for values in spectra], 0)
            right.plot(np.arange(1, len(curve) + 1), curve, "o-", color=colour, markersize=3)
    left.set_xticks(range(len(bands)), bands)
    left.set(xlabel="subband, coarse to fine", ylabel="share of the update's energy")
    right.set(xlabel="index", ylabel="singular value / largest", ylim=(0, None))
    if any(one["synthetic"] for one in found):
        fig.suptitle(canvas.STAMP, fontsize=7, color=canvas.PALETTE[1])
    left.legend(fontsize=7)
    write_figure(fig, path)


def main(arguments: list[str] | None = None) -> dict[str, object]:
    """Measure, print, write and draw."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", type=Path, nargs="+", help="run folders of wara or tiny_wara")
    parser.add_argument("--images", type=int, default=32, help="test images to measure with")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args(arguments)
    paths = [run.resolve() for run in args.runs]
    if len({path.name for path in paths}) < len(paths):
        parser.error("two runs have the same folder name, and files are named by it")
    found = [measure(path, args.images) for path in paths]
    for one in found:
        print(one["run"], {band: round(share, 3) for band, share in one["share"].items()})
        stem, synthetic = args.out / one["run"], one["synthetic"]
        plots.subband_energy(one["energy"], f"{stem}_subband_energy.png", synthetic=synthetic)
        plots.singular_values(
            one["singular_values"], f"{stem}_singular_values.png", synthetic=synthetic
        )
    result: dict[str, object] = {"runs": found}
    setting = {"runs": [path.name for path in paths], "images": args.images}
    write_result(args.out / "wara_subbands.json", setting, result)
    compare(found, args.out / "wara_subbands.png")
    return result


if __name__ == "__main__":
    main()
