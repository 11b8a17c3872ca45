"""Fundus phantoms: a retina with diabetic retinopathy of grade 0 to 4.

Lesions follow the international scale: microaneurysms make grade 1, blot haemorrhages and hard
exudates grade 2, many of them in all quadrants and cotton-wool spots grade 3, new vessels or
preretinal bleeding grade 4. Drusen, reflexes and pigment, which every grade may have, keep a count
of bright or dark spots from giving the grade away.
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
    ("no_dr", "No diabetic retinopathy"),
    ("mild", "Microaneurysms only"),
    ("moderate", "Microaneurysms with some haemorrhages and hard exudates"),
    ("severe", "Many haemorrhages in all quadrants, exudates, cotton-wool spots"),
    ("proliferative", "New vessels or preretinal bleeding"),
)

# Per grade, how many: microaneurysms, haemorrhages, exudate clusters, cotton-wool spots.
_COUNTS = (
    ((0, 0), (0, 0), (0, 0), (0, 0)),
    ((7, 14), (0, 0), (0, 0), (0, 0)),
    ((8, 16), (2, 5), (1, 3), (0, 0)),
    ((12, 24), (10, 18), (1, 3), (1, 3)),
    ((6, 18), (2, 10), (0, 2), (0, 2)),
)
_DARK_RED = (0.36, 0.04, 0.03)
_YELLOW = (0.98, 0.88, 0.50)
_DRAWN = 1.5  # the picture is drawn this much larger and scaled down


def draw(traits: Rng, rng: Rng, label: int, size: int) -> NDArray[np.uint8]:
    """Draw one fundus photograph.

    Args:
        traits: the patient's generator: pigment and the course of the vessels.
        rng: the image's generator.
        label: grade, 0 to 4.
        size: side in pixels.

    Returns:
        uint8 `[size, size, 3]`.
    """
    side = round(size * _DRAWN)
    unit = side / 112  # pixels drawn per pixel of the reference size
    x, y = grid(side)
    eye = rng.choice([-1.0, 1.0])
    disc = (eye * rng.uniform(0.42, 0.55), rng.uniform(-0.08, 0.08))
    macula = (disc[0] - eye * rng.uniform(0.52, 0.62), disc[1] + rng.uniform(0.02, 0.1))
    image = _background(traits, rng, x, y, macula)
    _optic_disc(image, rng, x, y, disc)
    _vessels(image, traits, rng, disc, eye, unit, beaded=label == 3)
    _distractors(image, rng, macula, unit)
    _lesions(image, rng, label, disc, macula, unit)
    if label == 4:
        _proliferation(image, rng, disc, unit)
    radius = rng.uniform(0.9, 0.97)
    field = np.clip((radius - np.hypot(x, y)) * side / 4, 0, 1).astype(np.float32)
    image = blur(image, rng.uniform(0.0, 0.7) * unit)
    image = develop(image, rng, field, mean=(0.45, 0.75), spread=(0.16, 0.26))
    return to_uint8(image, rng, size, noise=rng.uniform(0.005, 0.025))


def _background(traits: Rng, rng: Rng, x: Array, y: Array, macula: tuple[float, float]) -> Array:
    """Pigment epithelium with choroidal mottling, uneven light and the dark macula."""
    base = np.array([0.82, 0.42, 0.20], np.float32) * np.exp(
        traits.normal(0, [0.05, 0.14, 0.25]).astype(np.float32)
    )
    side = x.shape[0]
    light = 1 - rng.uniform(0.1, 0.35) * (x**2 + y**2)
    light += rng.uniform(-0.15, 0.15) * x + rng.uniform(-0.15, 0.15) * y
    light += rng.uniform(0.01, 0.04) * clouds(rng, side, 8, octaves=3)
    away = (x - macula[0]) ** 2 + (y - macula[1]) ** 2
    light *= 1 - rng.uniform(0.2, 0.4) * np.exp(-away / 0.03)
    return (light[..., None] * base).astype(np.float32)


def _optic_disc(image: Array, rng: Rng, x: Array, y: Array, disc: tuple[float, float]) -> None:
    """Pale disc with a brighter cup."""
    radius = rng.uniform(0.13, 0.17)
    r = np.hypot((x - disc[0]) * rng.uniform(1.0, 1.15), y - disc[1]) / radius
    tint(image, np.clip((1.08 - r) * 6, 0, 1), (0.97, 0.78, 0.48), 0.75)
    tint(image, np.clip((rng.uniform(0.35, 0.6) - r) * 5, 0, 1), (1.0, 0.95, 0.75), 0.7)


def _vessels(
    image: Array,
    traits: Rng,
    rng: Rng,
    disc: tuple[float, float],
    eye: float,
    unit: float,
    beaded: bool,
) -> None:
    """Arcades of arteries and veins out of the disc, branching; veins beaded in severe disease."""
    mask = np.zeros(image.shape[:2], np.float32)
    for arc in (-1.0, 1.0):
        for temporal in (True, False):
            for vein in (True, False):
                heading = arc * (traits.uniform(0.9, 1.3) if temporal else traits.uniform(0.3, 0.8))
                direction = np.array([-eye if temporal else eye, 0.0])
                angle = np.arctan2(np.sin(heading), np.cos(heading) * direction[0])
                bend = -arc * np.sign(np.cos(angle)) * traits.uniform(0.25, 0.5)
                width = (2.3 if vein else 1.6) * traits.uniform(0.85, 1.15) * unit
                beads = beaded and vein and rng.random() < 0.8
                _branch(mask, traits, disc, angle, bend * temporal, width, 3, vein, beads)
    tint(image, blur(mask, 0.35 * unit), (0.42, 0.06, 0.05), 0.75)


def _branch(
    mask: Array,
    rng: Rng,
    start: tuple[float, float],
    angle: float,
    bend: float,
    width: float,
    depth: int,
    vein: bool,
    beaded: bool,
) -> None:
    """Draw one vessel and the branches it gives off."""
    steps = 14
    turns = bend * 0.22 + rng.normal(0, 0.09, steps)
    angles = angle + np.cumsum(turns)
    step = rng.uniform(0.05, 0.075) * (1.0 if depth == 3 else 0.65)
    points = np.array(start) + np.cumsum(
        step * np.stack([np.cos(angles), np.sin(angles)], axis=1), axis=0
    )
    points = np.concatenate([[start], points])
    # A vessel narrows in four pieces; a beaded one swells at every other step.
    piece = 1 if beaded else 4
    for i in range(0, steps, piece):
        thick = width * (1 - 0.5 * i / steps) * (1.6 if beaded and i % 2 else 1.0)
        stroke(mask, points[i : i + piece + 1], thick, 1.0 if vein else 0.7)
    if depth > 1:
        for i in rng.choice(np.arange(3, steps), size=2, replace=False):
            side = rng.choice([-1.0, 1.0]) * rng.uniform(0.5, 0.9)
            place = (float(points[i][0]), float(points[i][1]))
            _branch(
                mask, rng, place, angles[i] + side, -side * 0.3, width * 0.6, depth - 1, vein, False
            )


def _place(rng: Rng, disc: tuple[float, float] | None = None) -> tuple[float, float]:
    """Return a random place on the retina, off the disc if that is given."""
    while True:
        px, py = rng.uniform(-0.8, 0.8, 2)
        clear = disc is None or np.hypot(px - disc[0], py - disc[1]) > 0.24
        if np.hypot(px, py) < 0.8 and clear:
            return float(px), float(py)


def _distractors(image: Array, rng: Rng, macula: tuple[float, float], unit: float) -> None:
    """Drusen, light reflexes and pigment clumps, which any grade may show."""
    if rng.random() < 0.35:
        soft = np.zeros(image.shape[:2], np.float32)
        for _ in range(rng.integers(4, 16)):
            away = rng.normal(0, 0.16, 2)
            dot(soft, macula[0] + away[0], macula[1] + away[1], rng.uniform(0.9, 2.0) * unit)
        tint(image, blur(soft, 0.9 * unit), (0.93, 0.72, 0.42), 0.6)
    if rng.random() < 0.3:
        pigment = np.zeros(image.shape[:2], np.float32)
        for _ in range(rng.integers(1, 4)):
            fill(pigment, outline(rng, *_place(rng), rng.uniform(0.02, 0.06), 0.5))
        tint(image, blur(pigment, 0.8 * unit), (0.22, 0.13, 0.08), 0.6)
    if rng.random() < 0.3:
        reflex = np.zeros(image.shape[:2], np.float32)
        px, py = _place(rng)
        fill(reflex, outline(rng, px, py, rng.uniform(0.08, 0.2), 0.4))
        tint(image, blur(reflex, 5 * unit), (1.0, 0.9, 0.7), 0.35)


def _lesions(
    image: Array,
    rng: Rng,
    grade: int,
    disc: tuple[float, float],
    macula: tuple[float, float],
    unit: float,
) -> None:
    """Microaneurysms, blot haemorrhages, hard exudates and cotton-wool spots of a grade."""
    aneurysms, bleeds, clusters, wool = (
        int(rng.integers(low, high + 1)) for low, high in _COUNTS[grade]
    )
    red = np.zeros(image.shape[:2], np.float32)
    for _ in range(aneurysms):
        dot(red, *_place(rng, disc), rng.uniform(0.9, 1.6) * unit, rng.uniform(0.8, 1.0))
    for _ in range(bleeds):
        radius = rng.uniform(0.03, 0.065)
        fill(red, outline(rng, *_place(rng, disc), radius, 0.22), rng.uniform(0.75, 1.0))
    tint(image, blur(red, 0.3 * unit), _DARK_RED, 0.75)
    bright = np.zeros(image.shape[:2], np.float32)
    for _ in range(clusters):
        angle, away = rng.uniform(0, 2 * np.pi), rng.uniform(0.15, 0.5)
        cx, cy = macula[0] + away * np.cos(angle), macula[1] + away * np.sin(angle)
        for _ in range(rng.integers(6, 16)):
            px, py = rng.normal(0, 0.07, 2)
            dot(bright, cx + px, cy + py, rng.uniform(0.5, 1.5) * unit)
    tint(image, blur(bright, 0.25 * unit), _YELLOW, 0.9)
    pale = np.zeros(image.shape[:2], np.float32)
    for _ in range(wool):
        fill(pale, outline(rng, *_place(rng, disc), rng.uniform(0.04, 0.08), 0.35))
    tint(image, blur(pale, 1.6 * unit), (0.95, 0.88, 0.72), 0.75)


def _proliferation(image: Array, rng: Rng, disc: tuple[float, float], unit: float) -> None:
    """New vessels, fine and tangled, at the disc or elsewhere; sometimes preretinal bleeding."""
    tangle = np.zeros(image.shape[:2], np.float32)
    for _ in range(rng.integers(1, 4)):
        at_disc = rng.random() < 0.5
        cx, cy = disc if at_disc else _place(rng)
        reach = rng.uniform(0.12, 0.22)
        for _ in range(rng.integers(8, 15)):
            angle = rng.uniform(0, 2 * np.pi)
            turns = angle + np.cumsum(rng.normal(0, 0.75, 12))
            walk = np.cumsum(np.stack([np.cos(turns), np.sin(turns)], axis=1), axis=0)
            stroke(tangle, np.array([cx, cy]) + walk * reach / 5, 0.9 * unit, 1.0)
    tint(image, blur(tangle, 0.25 * unit), (0.50, 0.05, 0.05), 0.8)
    if rng.random() < 0.5:
        # Blood in front of the retina sinks: level on top, round below.
        cx, cy = _place(rng, disc)
        width = rng.uniform(0.14, 0.28)
        arc = np.linspace(0, np.pi, 30)
        boat = np.stack([cx + width * np.cos(arc), cy + 0.6 * width * np.sin(arc)], axis=1)
        pool = np.zeros(image.shape[:2], np.float32)
        fill(pool, boat)
        tint(image, blur(pool, 0.6 * unit), _DARK_RED, 0.8)
