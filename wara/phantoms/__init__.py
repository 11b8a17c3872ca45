"""Synthetic images of four modalities, drawn by code, so that everything runs without data.

Every image is a pure function of (modality, seed, index, size). A patient has one to three images
in a row, which share traits such as pigment, vessels or build. The label follows from what is
drawn, at the scale of single pixels and of the whole picture, and exposure is drawn apart from it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from wara.errors import WaraError, suggest
from wara.phantoms import chest_xray, dermoscopy, fundus, ultrasound
from wara.phantoms.canvas import Rng

Draw = Callable[[Rng, Rng, int, int], NDArray[np.uint8]]


@dataclass(frozen=True)
class Modality:
    """How one modality is drawn.

    Args:
        classes: name and meaning of each class, in index order.
        task: `ordinal` or `multiclass`.
        draw: draws one image from the patient's and the image's generators, label and size.
        shares: how often a patient's main class is each class.
    """

    classes: tuple[tuple[str, str], ...]
    task: str
    draw: Draw
    shares: tuple[float, ...]


MODALITIES: dict[str, Modality] = {
    "fundus": Modality(fundus.CLASSES, "ordinal", fundus.draw, (0.26, 0.19, 0.21, 0.17, 0.17)),
    "dermoscopy": Modality(dermoscopy.CLASSES, "multiclass", dermoscopy.draw, (0.4, 0.3, 0.3)),
    "ultrasound": Modality(ultrasound.CLASSES, "multiclass", ultrasound.draw, (0.28, 0.4, 0.32)),
    "chest_xray": Modality(chest_xray.CLASSES, "multiclass", chest_xray.draw, (0.36, 0.34, 0.3)),
}

# Ways to deal six images in a row to patients of one to three images.
_DEALS = ((3, 2, 1), (1, 2, 3), (2, 2, 2), (3, 3), (2, 1, 2, 1), (1, 3, 2), (1, 1, 2, 2), (2, 3, 1))
_DEAL = 6
_SAME = 0.75  # how often an image shows its patient's main class


@dataclass(frozen=True)
class Phantom:
    """One synthetic image.

    Args:
        image: uint8 `[size, size, 3]`.
        label: class index.
        patient: name of the patient, shared by one to three consecutive images.
    """

    image: NDArray[np.uint8]
    label: int
    patient: str


def classes(modality: str) -> tuple[str, ...]:
    """Return the class names of a modality, in index order.

    Args:
        modality: a key of `MODALITIES`.

    Returns:
        The names.

    Raises:
        WaraError: kind `config` for an unknown modality.
    """
    return tuple(name for name, _ in _modality(modality).classes)


def draw(modality: str, seed: int, index: int, size: int = 112) -> Phantom:
    """Draw one image; the same for the same arguments, whatever was drawn before.

    Args:
        modality: a key of `MODALITIES`.
        seed: of the collection.
        index: number of the image, from 0.
        size: side in pixels, at least 32.

    Returns:
        Image, label and patient.

    Raises:
        WaraError: kind `config` for an unknown modality or a size below 32.
    """
    chosen = _modality(modality)
    if size < 32:
        raise WaraError("config", f"phantoms of {size} px", "size", "ask for 32 px or more")
    key = list(MODALITIES).index(modality)
    patient = _patient(seed, key, index)
    label = _label(chosen, seed, key, patient, index)
    traits = np.random.default_rng([seed, key, 1, patient])
    rng = np.random.default_rng([seed, key, 2, index])
    return Phantom(chosen.draw(traits, rng, label, size), label, f"p{patient:06d}")


def _modality(name: str) -> Modality:
    if name not in MODALITIES:
        remedy = suggest(name, MODALITIES)
        raise WaraError("config", f"no phantoms of modality '{name}'", "modality", remedy)
    return MODALITIES[name]


def _patient(seed: int, key: int, index: int) -> int:
    """Return the number of the patient of an image; `_DEAL` images are dealt at a time."""
    deal, place = divmod(index, _DEAL)
    rng = np.random.default_rng([seed, key, 3, deal])
    sizes = _DEALS[rng.integers(len(_DEALS))]
    return deal * _DEAL + int(np.searchsorted(np.cumsum(sizes), place, side="right"))


def _label(chosen: Modality, seed: int, key: int, patient: int, index: int) -> int:
    """Return the class of an image: its patient's main class, or a near one."""
    main = int(
        np.random.default_rng([seed, key, 4, patient]).choice(len(chosen.shares), p=chosen.shares)
    )
    rng = np.random.default_rng([seed, key, 5, index])
    if rng.random() < _SAME:
        return main
    if chosen.task == "ordinal":
        return int(np.clip(main + rng.choice([-1, 1]), 0, len(chosen.shares) - 1))
    return int(rng.choice(len(chosen.shares), p=chosen.shares))
