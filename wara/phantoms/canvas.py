"""Brushes that all modalities share. Images are float32 in [0, 1], `[S, S, 3]` or `[S, S]`."""

from __future__ import annotations

import cv2
import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]
Rng = np.random.Generator

_SHIFT = 4  # fractional bits of cv2's coordinates


def grid(size: int) -> tuple[Array, Array]:
    """Return `x` and `y` of every pixel in half images: -1 at one edge, 1 at the other.

    Args:
        size: side in pixels.

    Returns:
        Two float32 arrays `[size, size]`.
    """
    axis = (np.arange(size, dtype=np.float32) + 0.5) * (2 / size) - 1
    x, y = np.meshgrid(axis, axis)
    return x, y


def clouds(rng: Rng, size: int, cells: int, octaves: int = 1) -> Array:
    """Return a smooth random field with zero mean and about unit spread.

    Args:
        rng: source of randomness.
        size: side in pixels.
        cells: blobs along a side in the coarsest octave.
        octaves: layers, each twice as fine and half as strong as the one before.

    Returns:
        float32 `[size, size]`.
    """
    field = np.zeros((size, size), np.float32)
    for octave in range(octaves):
        side = cells * 2**octave + 2
        coarse = rng.standard_normal((side, side), np.float32)
        field += cv2.resize(coarse, (size, size), interpolation=cv2.INTER_CUBIC) / 2**octave
    return field - field.mean()


def stroke(
    mask: Array, points: NDArray[np.float64], width: float, value: float = 1.0, closed: bool = False
) -> None:
    """Draw a line on a mask, in place; thinner than a pixel means fainter.

    Args:
        mask: float32 `[S, S]`.
        points: `[m, 2]`, x and y in units of half the image.
        width: in pixels.
        value: what is drawn.
        closed: join the last point to the first.
    """
    pixels = (points + 1) * (mask.shape[0] / 2) - 0.5
    fixed = np.round(pixels * (1 << _SHIFT)).astype(np.int32).reshape(-1, 1, 2)
    faint = min(1.0, max(width, 0.25))
    cv2.polylines(mask, [fixed], closed, value * faint, max(1, round(width)), cv2.LINE_AA, _SHIFT)


def fill(mask: Array, points: NDArray[np.float64], value: float = 1.0) -> None:
    """Fill a closed outline on a mask, in place; see `stroke`."""
    pixels = (points + 1) * (mask.shape[0] / 2) - 0.5
    fixed = np.round(pixels * (1 << _SHIFT)).astype(np.int32).reshape(-1, 1, 2)
    cv2.fillPoly(mask, [fixed], value, cv2.LINE_AA, _SHIFT)


def dot(mask: Array, x: float, y: float, radius: float, value: float = 1.0) -> None:
    """Draw a filled disc on a mask, in place; `radius` in pixels, place in half images."""
    size = mask.shape[0]
    centre = [round(((c + 1) * size / 2 - 0.5) * (1 << _SHIFT)) for c in (x, y)]
    cv2.circle(
        mask, tuple(centre), max(1, round(radius * (1 << _SHIFT))), value, -1, cv2.LINE_AA, _SHIFT
    )


def outline(
    rng: Rng, x: float, y: float, radius: float, rough: float, harmonics: int = 6, points: int = 72
) -> NDArray[np.float64]:
    """Return a closed irregular outline around a centre.

    Args:
        rng: source of randomness.
        x: centre, in half images.
        y: centre.
        radius: mean radius, in half images.
        rough: relative size of the bumps.
        harmonics: how many bumps at the most.
        points: number of corners.

    Returns:
        `[points, 2]`.
    """
    angle = np.linspace(0, 2 * np.pi, points, endpoint=False)
    r = np.ones(points)
    for k in range(2, 2 + harmonics):
        r += rough / np.sqrt(k) * rng.normal() * np.cos(k * angle + rng.uniform(0, 2 * np.pi))
    r = radius * np.clip(r, 0.3, 2.0)
    return np.stack([x + r * np.cos(angle), y + r * np.sin(angle)], axis=1)


def blur(image: Array, sigma: float) -> Array:
    """Return the image blurred by a Gaussian of `sigma` pixels; none below a tenth."""
    return image if sigma < 0.1 else np.asarray(cv2.GaussianBlur(image, (0, 0), sigma), np.float32)


def tint(image: Array, mask: Array, colour: tuple[float, float, float], strength: float) -> None:
    """Mix a colour into an image where the mask is set, in place."""
    weight = (strength * np.clip(mask, 0, 1))[..., None]
    image += weight * (np.asarray(colour, np.float32) - image)


def develop(
    image: Array,
    rng: Rng,
    field: Array | None,
    mean: tuple[float, float],
    spread: tuple[float, float],
) -> Array:
    """Expose an image so that its mean and contrast say nothing about what is on it.

    Every channel is brought to a mean and spread drawn at random, as exposure, sensor and
    processing of a real camera vary from image to image.

    Args:
        image: `[S, S, 3]` or `[S, S]`.
        rng: source of randomness, which must not depend on the label.
        field: 1 inside the field of view; statistics are taken there and the rest is black.
        mean: range of the brightness.
        spread: range of the relative contrast.

    Returns:
        float32 of the same shape in [0, 1].
    """
    inside = image[field > 0.5] if field is not None else image.reshape(-1, *image.shape[2:])
    bright, contrast = rng.uniform(*mean), rng.uniform(*spread)
    centre = inside.mean(0)
    deviation = inside.std(0) + 1e-3
    # Relative channel levels are the modality's own; each varies a little by itself.
    level = bright * centre / max(float(np.max(centre)), 1e-3)
    level = level * np.exp(rng.normal(0, 0.06, np.shape(centre)))
    out = (image - centre) / deviation * contrast * level + level
    out = np.clip(out + rng.normal(0, 0.01), 0, 1) ** np.exp(rng.normal(0, 0.12))
    return (
        out if field is None else out * field.reshape(field.shape + (1,) * (out.ndim - 2))
    ).astype(np.float32)


def to_uint8(image: Array, rng: Rng, size: int, noise: float) -> NDArray[np.uint8]:
    """Return the finished picture: scaled down, with sensor noise, as 8-bit RGB.

    Args:
        image: `[S, S, 3]` or `[S, S]` in [0, 1], `S` a multiple of `size` or not.
        rng: source of randomness.
        size: side of the result in pixels.
        noise: standard deviation of the noise in [0, 1].

    Returns:
        uint8 `[size, size, 3]`.
    """
    small = cv2.resize(image, (size, size), interpolation=cv2.INTER_AREA)
    if small.ndim == 2:
        small = np.repeat(small[..., None], 3, axis=2)
        grain = rng.standard_normal((size, size, 1), np.float32)
    else:
        grain = rng.standard_normal((size, size, 3), np.float32)
    lit = small + noise * grain * (small > 0.02)
    return np.round(np.clip(lit, 0, 1) * 255).astype(np.uint8)
