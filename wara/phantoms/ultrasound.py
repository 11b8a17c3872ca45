"""Breast ultrasound phantoms: normal tissue, a benign or a malignant mass.

Margin, shape and what lies behind the mass follow BI-RADS: oval, parallel to the skin, smooth and
bright behind is benign; taller than wide, spiculated or lobulated, and dark behind is malignant.
Each sign is there more often than not, none always; fat lobules and shadows occur everywhere.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from wara.phantoms.canvas import Array, Rng, blur, clouds, develop, fill, grid, stroke, to_uint8

CLASSES = (
    ("normal", "No mass"),
    ("benign", "Oval mass with a smooth margin, wider than tall"),
    ("malignant", "Irregular mass, taller than wide, with a shadow"),
)


def draw(traits: Rng, rng: Rng, label: int, size: int) -> NDArray[np.uint8]:
    """Draw one B-mode image; see `wara.phantoms.draw`."""
    side = round(size * 1.5)
    unit = side / 112
    x, y = grid(side)
    echo = _layers(traits, rng, x, y)
    if label:
        _mass(echo, rng, x, y, malignant=label == 2, unit=unit)
    else:
        _lobules(echo, rng, int(rng.integers(0, 3)))
    if rng.random() < 0.25:
        # A shadow from a rib or a ligament, with or without a mass.
        echo *= 1 - rng.uniform(0.3, 0.6) * np.exp(
            -(((x - rng.uniform(-0.8, 0.8)) / rng.uniform(0.05, 0.12)) ** 2)
        ) * (y > rng.uniform(-0.4, 0.3))
    echo *= np.exp(-rng.uniform(0.0, 0.6) * (y + 1)) * (1 + rng.uniform(-0.2, 0.2) * x)
    picture = _speckle(echo, rng, unit)
    picture = develop(picture, rng, None, mean=(0.22, 0.42), spread=(0.35, 0.6))
    if rng.random() < 0.2:
        _callipers(picture, rng)
    return to_uint8(picture, rng, size, noise=rng.uniform(0.0, 0.015))


def _layers(traits: Rng, rng: Rng, x: Array, y: Array) -> Array:
    """Skin, fat, glandular tissue and muscle, wavy and of varying depth."""
    side = x.shape[0]
    wave = 0.05 * clouds(rng, side, 3)
    fat = traits.uniform(-0.75, -0.35)
    gland = fat + traits.uniform(0.55, 0.95)
    depth = y + wave
    echo = np.full_like(x, 0.30)
    echo = np.where(depth > fat, traits.uniform(0.45, 0.6), echo)
    echo = np.where(depth > gland, 0.28 + 0.12 * np.sin(40 * depth + 6 * x), echo)
    echo = np.where(y < -0.9 + 0.3 * wave, 0.85, echo)
    echo = echo * (1 + 0.18 * clouds(rng, side, 7, octaves=2))
    lines = np.zeros_like(x)
    for _ in range(rng.integers(4, 10)):
        cx, cy = rng.uniform(-1, 1), rng.uniform(-0.8, 0.6)
        t = np.linspace(-1, 1, 12)
        points = np.stack([cx + 0.4 * t, cy + rng.uniform(-0.15, 0.15) * t**2], axis=1)
        stroke(lines, points, 1.5, rng.uniform(0.2, 0.6))
    return np.clip(echo + 0.5 * blur(lines, 1.0), 0.02, 1.2).astype(np.float32)


def _lobules(echo: Array, rng: Rng, number: int) -> None:
    """Fat lobules, hypoechoic and soft-edged, which imitate a mass."""
    for _ in range(number):
        mask = np.zeros_like(echo)
        angle = np.linspace(0, 2 * np.pi, 40)
        cx, cy = rng.uniform(-0.7, 0.7), rng.uniform(-0.6, 0.3)
        wide, tall = rng.uniform(0.15, 0.35), rng.uniform(0.08, 0.16)
        fill(mask, np.stack([cx + wide * np.cos(angle), cy + tall * np.sin(angle)], axis=1))
        echo *= 1 - rng.uniform(0.2, 0.45) * blur(mask, 3.0)


def _mass(echo: Array, rng: Rng, x: Array, y: Array, malignant: bool, unit: float) -> None:
    """A mass with its margin, its echoes, and what sound does behind it."""

    def sign(often: float) -> bool:
        """Tell whether this image shows the malignant form of a sign."""
        return bool(rng.random() < (often if malignant else 1 - often))

    cx, cy = rng.uniform(-0.45, 0.45), rng.uniform(-0.35, 0.25)
    reach = rng.uniform(0.18, 0.34)
    flat = rng.uniform(1.0, 1.35) if sign(0.8) else rng.uniform(0.5, 0.75)
    wide, tall = reach / np.sqrt(flat), reach * np.sqrt(flat)
    angle = np.linspace(0, 2 * np.pi, 120, endpoint=False)
    r = 1 + rng.uniform(0.02, 0.08) * np.cos(2 * angle + rng.uniform(0, 6))
    rough = sign(0.88)
    if rough:
        for k in (5, 8, 11, 15):
            r += rng.uniform(0.04, 0.11) * np.cos(k * angle + rng.uniform(0, 2 * np.pi))
    edge = np.stack([cx + wide * r * np.cos(angle), cy + tall * r * np.sin(angle)], axis=1)
    mask = np.zeros_like(echo)
    fill(mask, edge)
    soft = blur(mask, (1.6 if rough else 0.6) * unit)
    behind = np.exp(-(((x - cx) / (0.8 * wide)) ** 2)) * np.clip((y - cy - 0.5 * tall) * 4, 0, 1)
    if sign(0.8):
        echo *= 1 - rng.uniform(0.45, 0.75) * behind
    else:
        echo *= 1 + rng.uniform(0.3, 0.8) * behind
    if sign(0.7):
        halo = blur(mask, 5 * unit) - soft
        echo += rng.uniform(0.15, 0.4) * np.clip(halo, 0, 1)
    inner = rng.uniform(0.06, 0.2)
    echo += soft * (inner * (1 + 0.3 * clouds(rng, echo.shape[0], 10)) - echo)
    if rough and rng.random() < 0.8:
        rays = np.zeros_like(echo)
        for start in rng.uniform(0, 2 * np.pi, rng.integers(7, 14)):
            out = np.array([1.0, 1.25, rng.uniform(1.4, 1.8)])
            ray = np.stack(
                [cx + wide * out * np.cos(start), cy + tall * out * np.sin(start)], axis=1
            )
            stroke(rays, ray, 1.2 * unit, rng.uniform(0.5, 1.0))
        echo *= 1 - 0.7 * blur(rays, 0.4 * unit)
    if malignant and rng.random() < 0.5:
        # Microcalcifications: bright points of a pixel or so inside the mass.
        for _ in range(rng.integers(3, 9)):
            px, py = cx + rng.normal(0, 0.4 * wide), cy + rng.normal(0, 0.4 * tall)
            spot = np.exp(-((x - px) ** 2 + (y - py) ** 2) / (2 * (0.6 / 56) ** 2))
            echo += 0.9 * spot
    np.clip(echo, 0.01, 1.5, out=echo)


def _speckle(echo: Array, rng: Rng, unit: float) -> Array:
    """Interference speckle: Rayleigh amplitudes, wider than deep, then log compression."""
    real, imaginary = (
        blur(rng.standard_normal(echo.shape, np.float32), 0.55 * unit) for _ in range(2)
    )
    amplitude = np.hypot(real, imaginary)
    amplitude /= amplitude.mean()
    mixed = echo * (0.35 + 0.65 * amplitude)
    return np.log1p(12 * np.clip(mixed, 0, None)).astype(np.float32)


def _callipers(picture: Array, rng: Rng) -> None:
    """Measuring marks that a sonographer left in the picture."""
    for _ in range(2):
        cx, cy = rng.uniform(-0.7, 0.7, 2)
        for dx, dy in ((0.03, 0.0), (0.0, 0.03)):
            stroke(picture, np.array([[cx - dx, cy - dy], [cx + dx, cy + dy]]), 1.0, 1.0)
