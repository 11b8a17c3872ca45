"""Small files in MedMNIST+'s real format that pass for the official ones."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

SIDE = 224
BAR = {
    "medmnist_plus_retina": "retinamnist",
    "medmnist_plus_derma": "dermamnist",
    "medmnist_plus_breast": "breastmnist",
    "medmnist_plus_pneumonia": "pneumoniamnist",
}
"""The configs of the published bar, and the data set of each."""
SIZES = {"train": 28, "val": 14, "test": 21}


def write_medmnist(cache: Path, flag: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Write `<flag>_224.npz` as the project publishes it, but for its number of images.

    Six `uint8` arrays: images `[n, 224, 224, 3]`, or `[n, 224, 224]` where the set is grey, and
    labels `[n, 1]`. Every class is in every split; its brightness tells it.
    """
    import medmnist

    info = medmnist.INFO[flag]
    rng = np.random.default_rng(len(flag))
    classes = len(info["label"])
    arrays: dict[str, Any] = {}
    for split, count in SIZES.items():
        labels = (np.arange(count) % classes).astype(np.uint8)
        coarse = rng.integers(0, 120, (count, 14, 14, info["n_channels"])) + 20 * labels.reshape(
            -1, 1, 1, 1
        )
        images = coarse.astype(np.uint8).repeat(16, axis=1).repeat(16, axis=2)
        assert images.shape[1:3] == (SIDE, SIDE)
        arrays[f"{split}_images"] = images if info["n_channels"] == 3 else images[..., 0]
        arrays[f"{split}_labels"] = labels[:, None]
    path = cache / "medmnist" / f"{flag}_224.npz"
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(path, **arrays)
    monkeypatch.setitem(info, "MD5_224", hashlib.md5(path.read_bytes()).hexdigest())
    return path
