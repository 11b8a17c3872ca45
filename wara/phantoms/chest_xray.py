"""Chest X-ray phantoms: clear lungs, a lobar consolidation or a diffuse interstitial pattern.

Bacterial pneumonia fills one region of one lung, with air-filled bronchi left dark in it; viral
pneumonia draws a fine net and small opacities over both lungs. Exposure, build and rotation vary
from patient to patient and say nothing about either.
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
    to_uint8,
)

CLASSES = (
    ("normal", "Clear lungs"),
    ("bacteria", "Focal consolidation of one lobe, as in bacterial pneumonia"),
    ("virus", "Diffuse interstitial pattern in both lungs, as in viral pneumonia"),
)


def draw(traits: Rng, rng: Rng, label: int, size: int) -> NDArray[np.uint8]:
    """Draw one frontal radiograph; see `wara.phantoms.draw`."""
    side = round(size * 1.5)
    unit = side / 112
    x, y = grid(side)
    top, base = traits.uniform(-0.78, -0.62), traits.uniform(0.42, 0.68)
    half = traits.uniform(0.60, 0.74)
    x = (x + rng.normal(0, 0.05) + rng.normal(0, 0.04) * y).astype(np.float32)
    y = (y + rng.normal(0, 0.04)).astype(np.float32)
    lungs = _lungs(rng, x, y, top, base, half)
    body = 0.55 + 0.25 * np.exp(-((x / 0.95) ** 6)) + 0.05 * clouds(rng, side, 4)
    body = body - 0.42 * blur(lungs, 2.0 * unit) * rng.uniform(0.8, 1.1)
    body += _mediastinum(rng, x, y, base, half)
    body += _bones(traits, rng, x, y, top, half, unit)
    body += _vessels(rng, lungs, unit)
    if label == 1:
        body += _consolidation(rng, lungs, x, y, top, base, unit)
    elif label == 2:
        body += _interstitial(rng, lungs, unit)
    if rng.random() < 0.3:
        body += 0.12 * lungs * blur(clouds(rng, side, 3), 3 * unit)
    body = blur(body.astype(np.float32), rng.uniform(0.0, 0.6) * unit)
    picture = develop(body, rng, None, mean=(0.38, 0.6), spread=(0.3, 0.48))
    if rng.random() < 0.4:
        # A side marker in a corner, and sometimes a lead across the chest.
        edge = rng.choice([-0.85, 0.85])
        stroke(
            picture, np.array([[edge - 0.03, -0.9], [edge - 0.03, -0.8], [edge + 0.03, -0.8]]), 2.0
        )
    if rng.random() < 0.2:
        t = np.linspace(-1, 1, 16)
        lead = np.stack(
            [t, rng.uniform(-0.5, 0.5) + 0.2 * np.sin(3 * t + rng.uniform(0, 6))], axis=1
        )
        stroke(picture, lead, 1.0 * unit, 0.9)
    return to_uint8(picture, rng, size, noise=rng.uniform(0.005, 0.025))


def _lungs(rng: Rng, x: Array, y: Array, top: float, base: float, half: float) -> Array:
    """Both lung fields: domed at the apex, cut by the diaphragm, narrowed by the heart."""
    field = np.zeros_like(x)
    for side in (-1.0, 1.0):
        inner = 0.10 + 0.10 * np.clip((y - 0.0) / 0.6, 0, 1) * (1.6 if side > 0 else 0.8)
        dome = base - 0.16 * np.cos(np.clip((side * x - 0.36) / 0.36, -1.6, 1.6))
        height = np.clip((y - top) / (base - top), 0, 1)
        outer = half * np.sqrt(np.clip(1 - (1 - height) ** 2.6, 0, 1)) + 0.02
        inside = np.minimum.reduce(
            [side * x - inner, outer - side * x, y - top, dome + 0.12 * height - y]
        )
        field = np.maximum(field, np.clip(inside * x.shape[0] / 6, 0, 1))
    return field.astype(np.float32)


def _mediastinum(rng: Rng, x: Array, y: Array, base: float, half: float) -> Array:
    """Spine, trachea, great vessels and heart, which lies more to the patient's left."""
    heart = rng.uniform(0.26, 0.36)
    shadow = np.clip(1.25 - np.hypot((x - 0.11) / heart, (y - base + 0.2) / 0.34), 0, 1)
    spine = np.exp(-((x / 0.10) ** 4)) * 0.16
    trachea = -0.12 * np.exp(-((x / 0.035) ** 2)) * (y < -0.25)
    return (0.30 * np.clip(2 * shadow, 0, 1) + spine + trachea).astype(np.float32)


def _bones(
    traits: Rng, rng: Rng, x: Array, y: Array, top: float, half: float, unit: float
) -> Array:
    """Ribs, front and back, and the clavicles."""
    mask = np.zeros_like(x)
    slope = traits.uniform(0.25, 0.5)
    gap = traits.uniform(0.135, 0.17)
    t = np.linspace(0.06, 1, 20)
    for side in (-1.0, 1.0):
        for rib in range(9):
            start = top - 0.05 + rib * gap
            reach = half * min(1.0, 0.55 + 0.13 * rib) + 0.06
            bow = start + slope * (t**2) * 0.5 - 0.08 * np.sin(np.pi * t)
            stroke(mask, np.stack([side * reach * t, bow], axis=1), 3.2 * unit, 0.55)
        collar = np.stack(
            [side * (0.05 + 0.75 * t), top + 0.10 - 0.12 * t + 0.04 * np.sin(5 * t)], axis=1
        )
        stroke(mask, collar, 4.0 * unit, 0.9)
    return 0.14 * rng.uniform(0.7, 1.3) * blur(mask, 0.8 * unit)


def _vessels(rng: Rng, lungs: Array, unit: float) -> Array:
    """Hilar vessels, fading outwards; their strength varies and imitates a net."""
    mask = np.zeros_like(lungs)
    for side in (-1.0, 1.0):
        for _ in range(rng.integers(10, 16)):
            angle = rng.uniform(-1.3, 1.3)
            turns = angle + np.cumsum(rng.normal(0, 0.15, 7))
            walk = np.cumsum(np.stack([np.cos(turns) * side, np.sin(turns)], axis=1), axis=0)
            points = np.array([side * 0.14, 0.0]) + 0.07 * walk
            stroke(mask, points, rng.uniform(0.6, 1.8) * unit, rng.uniform(0.4, 0.9))
    return (rng.uniform(0.08, 0.16) * blur(mask, 0.6 * unit) * lungs).astype(np.float32)


def _consolidation(
    rng: Rng, lungs: Array, x: Array, y: Array, top: float, base: float, unit: float
) -> Array:
    """An opacity of one lobe with a soft border; bronchi stay dark in it."""
    side = rng.choice([-1.0, 1.0])
    cx, cy = side * rng.uniform(0.28, 0.5), rng.uniform(top + 0.25, base - 0.1)
    mask = np.zeros_like(lungs)
    fill(mask, outline(rng, cx, cy, rng.uniform(0.17, 0.30), 0.25))
    cloud = blur(mask, rng.uniform(2.0, 5.0) * unit)
    bronchi = np.zeros_like(lungs)
    for _ in range(rng.integers(3, 6)):
        angle = rng.uniform(-0.9, 0.9)
        t = np.linspace(0, 1, 6)[:, None]
        line = np.array([cx - side * 0.15, cy]) + t * 0.35 * np.array(
            [side * np.cos(angle), np.sin(angle)]
        )
        stroke(bronchi, line, 1.0 * unit, 0.8)
    strength = rng.uniform(0.16, 0.32) * (1 + 0.2 * clouds(rng, len(lungs), 12))
    return (lungs * cloud * (strength - 0.16 * blur(bronchi, 0.4 * unit))).astype(np.float32)


def _interstitial(rng: Rng, lungs: Array, unit: float) -> Array:
    """A fine net of lines and small nodules over both lungs, denser around the hila."""
    mask = np.zeros_like(lungs)
    for _ in range(rng.integers(55, 95)):
        px, py = rng.choice([-1.0, 1.0]) * rng.uniform(0.14, 0.62), rng.uniform(-0.55, 0.5)
        turns = rng.uniform(0, 2 * np.pi) + np.cumsum(rng.normal(0, 0.6, 4))
        walk = np.cumsum(np.stack([np.cos(turns), np.sin(turns)], axis=1), axis=0)
        stroke(mask, np.array([px, py]) + 0.035 * walk, 0.8 * unit, rng.uniform(0.5, 1.0))
    for _ in range(rng.integers(15, 45)):
        px, py = rng.choice([-1.0, 1.0]) * rng.uniform(0.14, 0.62), rng.uniform(-0.55, 0.5)
        dot(mask, px, py, rng.uniform(0.6, 1.4) * unit, rng.uniform(0.5, 1.0))
    patchy = np.clip(0.8 + 0.35 * clouds(rng, len(lungs), 4), 0.2, 1.6)
    return (rng.uniform(0.10, 0.2) * lungs * patchy * blur(mask, 0.4 * unit)).astype(np.float32)
