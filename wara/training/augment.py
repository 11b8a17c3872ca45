"""Augmentation of training images: one factory, one preset per modality.

Each preset holds what a clinician would accept as another photograph of the same finding. The
pipeline is seeded for every call, so that its result depends on image and seed alone:
albumentations 2.0.8, left to itself, repeats itself across epochs with workers.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import numpy as np

from wara.errors import WaraError, suggest

# Told apart from what orders an epoch, so that the two share no random numbers.
_AUGMENT = 2
_VIEWS = 0  # seed of counted views


@dataclass(frozen=True)
class Preset:
    """What may happen to a training image.

    Args:
        why: what the modality allows, for people.
        horizontal_flip: mirror left and right, every second image.
        vertical_flip: mirror top and bottom, every second image.
        quarter_turns: turn square images by a multiple of 90 degrees.
        degrees: largest rotation either way.
        scale: largest relative change of size either way.
        shift: largest displacement, relative to the side.
        brightness: largest relative change, either way.
        contrast: largest relative change, either way.
        gamma: largest relative change of the exponent, either way.
        hue: largest change, in units of OpenCV (180 is the full circle).
        saturation: largest change, in units of OpenCV (255 is full).
        speckle: largest relative deviation of multiplicative noise per pixel.
    """

    why: str
    horizontal_flip: bool = False
    vertical_flip: bool = False
    quarter_turns: bool = False
    degrees: float = 0.0
    scale: float = 0.0
    shift: float = 0.0
    brightness: float = 0.0
    contrast: float = 0.0
    gamma: float = 0.0
    hue: int = 0
    saturation: int = 0
    speckle: float = 0.0


PRESETS: dict[str, Preset] = {
    "off": Preset("Images as they are."),
    "general": Preset(
        "Modality not known: nothing is mirrored or recoloured, since sides or colours may matter.",
        degrees=7,
        scale=0.05,
        shift=0.03,
        brightness=0.1,
        contrast=0.1,
    ),
    "fundus": Preset(
        "The retina is round and the other eye is its mirror image; flash and lens tint vary, but "
        "haemorrhages must stay red and exudates yellow.",
        horizontal_flip=True,
        vertical_flip=True,
        degrees=30,
        scale=0.1,
        brightness=0.15,
        contrast=0.15,
        hue=4,
        saturation=15,
    ),
    "dermoscopy": Preset(
        "The dermatoscope has no up or down; light and skin tone vary.",
        horizontal_flip=True,
        vertical_flip=True,
        quarter_turns=True,
        degrees=30,
        scale=0.15,
        shift=0.03,
        brightness=0.15,
        contrast=0.15,
        hue=5,
        saturation=20,
    ),
    "ultrasound": Preset(
        "Left and right depend on how the probe is held; depth runs downwards, so never upside "
        "down. Gain and speckle vary.",
        horizontal_flip=True,
        degrees=5,
        scale=0.1,
        shift=0.05,
        brightness=0.15,
        contrast=0.2,
        gamma=0.2,
        speckle=0.1,
    ),
    "mammography": Preset(
        "Views are hung by side, with the side burnt in: nothing is mirrored. Exposure varies.",
        degrees=10,
        scale=0.1,
        shift=0.03,
        brightness=0.1,
        contrast=0.15,
        gamma=0.15,
        speckle=0.03,
    ),
    "chest_xray": Preset(
        "The heart lies left and the film hangs upright: nothing is mirrored. The patient leans a "
        "little, exposure varies.",
        degrees=7,
        scale=0.05,
        shift=0.03,
        brightness=0.1,
        contrast=0.15,
        gamma=0.15,
    ),
}


class Augment:
    """A seeded augmentation; made by `build_augment`.

    Call it with a uint8 array `[h, w, 3]` and a seed; it returns a new array of the same size.
    """

    def __init__(self, preset: Preset) -> None:
        self.preset = preset
        self._pipelines: dict[bool, Any] = {}

    def __call__(self, array: np.ndarray, seed: int) -> np.ndarray:
        """Return the augmented image, uint8 `[h, w, 3]`; the same for the same seed."""
        square = array.shape[0] == array.shape[1]
        if square not in self._pipelines:
            self._pipelines[square] = _compose(self.preset, square)
        pipeline = self._pipelines[square]
        if not pipeline.transforms:
            return array
        pipeline.set_random_seed(int(seed) % 2**32)
        return pipeline(image=np.ascontiguousarray(array))["image"]


def build_augment(preset: str) -> Augment:
    """Return the augmentation of that name.

    Args:
        preset: a key of `PRESETS`.

    Raises:
        WaraError: kind "config" for an unknown name.
    """
    if preset not in PRESETS:
        raise WaraError(
            "config", f"no augmentation '{preset}'", "data.augment", suggest(preset, PRESETS)
        )
    return Augment(PRESETS[preset])


def augment_seed(seed: int, epoch: int, index: int) -> int:
    """Return the seed of one image's augmentation in one epoch, from (seed, epoch, index)."""
    sequence = np.random.SeedSequence([seed, epoch, index, _AUGMENT])
    return int(sequence.generate_state(1)[0])


class CountedAugment:
    """An augmentation whose result follows from (seed, epoch, record number).

    With counted views an epoch takes the next view of every image, round and round, and the views
    are the same for every seed, so that what was computed of them serves all runs.

    Args:
        preset: a key of `PRESETS`.
        seed: of the run.
        views: how many views there are of an image; None for a new one in every epoch.

    Raises:
        WaraError: kind "config" for an unknown preset.
    """

    def __init__(self, preset: str, seed: int = 0, views: int | None = None) -> None:
        self.augment, self.seed, self.views = build_augment(preset), seed, views

    def __call__(self, array: np.ndarray, epoch: int, index: int) -> np.ndarray:
        """Return the augmented image, uint8 `[h, w, 3]`."""
        seed = self.seed if self.views is None else _VIEWS
        view = epoch if self.views is None else epoch % self.views
        return self.augment(array, augment_seed(seed, view, index))


def _compose(preset: Preset, square: bool) -> Any:
    # It calls its maker's server when it is imported.
    os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"
    import albumentations as A
    import cv2

    steps: list[Any] = []
    if preset.quarter_turns and square:  # otherwise the sides would trade lengths
        steps.append(A.RandomRotate90(p=1.0))
    if preset.horizontal_flip:
        steps.append(A.HorizontalFlip(p=0.5))
    if preset.vertical_flip:
        steps.append(A.VerticalFlip(p=0.5))
    if preset.degrees or preset.scale or preset.shift:
        steps.append(
            A.Affine(
                rotate=(-preset.degrees, preset.degrees),
                scale=(1 - preset.scale, 1 + preset.scale),
                translate_percent=(-preset.shift, preset.shift),
                keep_ratio=True,
                interpolation=cv2.INTER_LINEAR,
                border_mode=cv2.BORDER_CONSTANT,
                fill=0,
                p=0.8,
            )
        )
    if preset.brightness or preset.contrast:
        steps.append(
            A.RandomBrightnessContrast(
                brightness_limit=(-preset.brightness, preset.brightness),
                contrast_limit=(-preset.contrast, preset.contrast),
                p=0.7,
            )
        )
    if preset.gamma:
        low, high = 100 * (1 - preset.gamma), 100 * (1 + preset.gamma)
        steps.append(A.RandomGamma(gamma_limit=(low, high), p=0.5))
    if preset.hue or preset.saturation:
        steps.append(
            A.HueSaturationValue(
                hue_shift_limit=(-preset.hue, preset.hue),
                sat_shift_limit=(-preset.saturation, preset.saturation),
                val_shift_limit=(0, 0),
                p=0.5,
            )
        )
    if preset.speckle:
        steps.append(
            A.MultiplicativeNoise(
                multiplier=(1 - preset.speckle, 1 + preset.speckle), elementwise=True, p=0.5
            )
        )
    return A.Compose(steps)
