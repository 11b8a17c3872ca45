"""Dermoscopy phantoms: naevus, melanoma or seborrhoeic keratosis.

Signs follow the dermoscopic lists: an even pigment network and border speak for a naevus;
asymmetry, a jagged border, several colours, irregular dots and a blue-white veil for melanoma; a
sharp border, bright milia-like cysts and dark comedo-like openings for seborrhoeic keratosis. Each
sign is common in its class and rare in the others.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from wara.phantoms.canvas import (
    Array,
    Rng,
    blur,
    clouds,
    develop,
    dot,
    fill,
    grid,
    outline,
    stroke,
    tint,
    to_uint8,
)

CLASSES = (
    ("nevus", "Naevus: even border and regular pigment network"),
    ("melanoma", "Melanoma: irregular border, several colours, irregular dots, veil"),
    ("keratosis", "Seborrhoeic keratosis: sharp border, milia-like cysts, comedo-like openings"),
)
_NEVUS, _MELANOMA, _KERATOSIS = range(3)


def draw(traits: Rng, rng: Rng, label: int, size: int) -> NDArray[np.uint8]:
    """Draw one dermoscopic image; see `wara.phantoms.draw`."""
    side = round(size * 1.5)
    unit = side / 112
    x, y = grid(side)

    def shows(kind: int, often: float, rarely: float = 0.08) -> bool:
        """Tell whether this image has a sign of a class."""
        return bool(rng.random() < (often if label == kind else rarely))

    image = _skin(traits, rng, x, y)
    cx, cy = rng.normal(0, 0.1, 2)
    jagged, sharp = shows(_MELANOMA, 0.85), shows(_KERATOSIS, 0.85)
    rough = rng.uniform(0.16, 0.28) if jagged else rng.uniform(0.02, 0.09)
    radius = rng.uniform(0.38, 0.62)
    edge = outline(rng, cx, cy, radius, rough, harmonics=9 if jagged else 4, points=120)
    if jagged:
        edge[:, 0] = cx + (edge[:, 0] - cx) * rng.uniform(0.65, 0.9)
    mask = np.zeros((side, side), np.float32)
    fill(mask, edge)
    soft = blur(mask, (0.8 if sharp else rng.uniform(2.0, 4.5)) * unit)
    brown = np.array([0.42, 0.25, 0.15]) * np.exp(rng.normal(0, 0.15, 3))
    tint(image, soft * (1 + 0.12 * clouds(rng, side, 6, 2)), tuple(brown), rng.uniform(0.6, 0.85))
    if shows(_MELANOMA, 0.85):
        _colours(image, rng, soft, cx, cy, radius, unit)
    if shows(_NEVUS, 0.85, 0.15):
        _network(image, rng, x, y, soft, unit)
    if shows(_MELANOMA, 0.85, 0.12):
        _points(image, rng, soft, cx, cy, radius, unit, (0.10, 0.06, 0.05), (14, 34), (0.7, 2.0))
    if shows(_KERATOSIS, 0.9, 0.06):
        _points(image, rng, soft, cx, cy, radius, unit, (0.97, 0.92, 0.78), (8, 22), (0.8, 1.7))
    if shows(_KERATOSIS, 0.7, 0.06):
        _points(image, rng, soft, cx, cy, radius, unit, (0.14, 0.09, 0.06), (4, 10), (1.6, 3.0))
    if rng.random() < 0.5:
        _hairs(image, rng, unit)
    if rng.random() < 0.3:
        _bubbles(image, rng, unit)
    image *= (1 - rng.uniform(0.0, 0.35) * (x**2 + y**2))[..., None]
    image = blur(image, rng.uniform(0.0, 0.5) * unit)
    picture = develop(image, rng, None, mean=(0.5, 0.8), spread=(0.2, 0.34))
    return to_uint8(picture, rng, size, noise=rng.uniform(0.004, 0.02))


def _skin(traits: Rng, rng: Rng, x: Array, y: Array) -> Array:
    """Skin of the patient's tone with fine creases."""
    tone = np.array([0.86, 0.66, 0.55]) * np.exp(traits.normal(0, [0.08, 0.12, 0.14]))
    side = x.shape[0]
    creases = 0.02 * clouds(rng, side, 40) + 0.04 * clouds(rng, side, 5, octaves=2)
    return ((1 + creases)[..., None] * tone).astype(np.float32)


def _colours(
    image: Array, rng: Rng, soft: Array, cx: float, cy: float, radius: float, unit: float
) -> None:
    """Patches of black, red and blue-white inside the lesion, off its centre."""
    palette = [(0.12, 0.08, 0.08), (0.62, 0.24, 0.20), (0.62, 0.66, 0.74), (0.75, 0.55, 0.42)]
    for i in rng.choice(4, size=rng.integers(2, 4), replace=False):
        px, py = cx + rng.normal(0, 0.45 * radius), cy + rng.normal(0, 0.45 * radius)
        patch = np.zeros(soft.shape, np.float32)
        fill(patch, outline(rng, px, py, radius * rng.uniform(0.25, 0.5), 0.3))
        tint(image, soft * blur(patch, 2.5 * unit), palette[i], rng.uniform(0.5, 0.8))


def _network(image: Array, rng: Rng, x: Array, y: Array, soft: Array, unit: float) -> None:
    """Pigment network: brown lines around pale holes, a few pixels wide."""
    turn, pitch = rng.uniform(0, np.pi), rng.uniform(0.085, 0.12)
    wobble = 0.02 * clouds(rng, x.shape[0], 8)
    lines = np.zeros_like(x)
    for k in range(3):
        angle = turn + k * np.pi / 3
        lines += np.cos(
            2 * np.pi * ((x + wobble) * np.cos(angle) + (y + wobble) * np.sin(angle)) / pitch
        )
    net = np.clip(-lines * 0.6 + 0.25, 0, 1)
    tint(image, soft * net, (0.22, 0.12, 0.07), rng.uniform(0.45, 0.7))


def _points(
    image: Array,
    rng: Rng,
    soft: Array,
    cx: float,
    cy: float,
    radius: float,
    unit: float,
    colour: tuple[float, float, float],
    number: tuple[int, int],
    width: tuple[float, float],
) -> None:
    """Dots, cysts or openings scattered over the lesion; radii in reference pixels."""
    mask = np.zeros(soft.shape, np.float32)
    for _ in range(rng.integers(*number)):
        px, py = cx + rng.normal(0, 0.5 * radius), cy + rng.normal(0, 0.5 * radius)
        dot(mask, px, py, rng.uniform(*width) * unit, rng.uniform(0.7, 1.0))
    tint(image, soft * blur(mask, 0.3 * unit), colour, 0.85)


def _hairs(image: Array, rng: Rng, unit: float) -> None:
    """Dark hairs across the field."""
    mask = np.zeros(image.shape[:2], np.float32)
    for _ in range(rng.integers(3, 14)):
        t = np.linspace(-1, 1, 10)
        angle, bend = rng.uniform(0, np.pi), rng.uniform(-0.3, 0.3)
        px, py = rng.uniform(-0.8, 0.8, 2)
        along = np.stack([t * np.cos(angle) - bend * t**2 * np.sin(angle),
                          t * np.sin(angle) + bend * t**2 * np.cos(angle)], axis=1)  # fmt: skip
        stroke(
            mask, np.array([px, py]) + rng.uniform(0.4, 1.0) * along, rng.uniform(0.6, 1.2) * unit
        )
    tint(image, blur(mask, 0.3 * unit), (0.12, 0.08, 0.07), 0.8)


def _bubbles(image: Array, rng: Rng, unit: float) -> None:
    """Reflexes of air bubbles in the contact gel."""
    mask = np.zeros(image.shape[:2], np.float32)
    for _ in range(rng.integers(2, 7)):
        px, py = rng.uniform(-0.9, 0.9, 2)
        dot(mask, px, py, rng.uniform(0.8, 2.2) * unit)
    tint(image, blur(mask, 0.5 * unit), (1.0, 1.0, 1.0), 0.8)
