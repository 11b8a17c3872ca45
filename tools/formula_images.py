"""Formula-made grey images: each is a pure function of (seed, category, instance).

A *category* is a parameter vector drawn once from (seed, category). An *instance* jitters that
vector by a few per cent and draws everything else (place, phase, turn) anew. Nine families cover
what small tokens should tell apart: outlines, filled shapes with rough borders, fractals,
gratings, band-limited noise, cells, dot fields, branching trees and webs of lines. Nothing here
imitates a medical image and no photograph is involved.

Categories are laid out family by family: ``category = family * per_family + k``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from multiprocessing import get_context

import cv2
import numpy as np
from scipy.spatial import cKDTree

SIZE = 128
TARGETS = ("log2_scale", "log2_count", "log2_width", "normal_angle")
_SHIFT = 4  # fractional bits of cv2's fixed-point coordinates
_JITTER = 0.06

Params = dict[str, float]
Rng = np.random.Generator


@dataclass(frozen=True)
class FormulaImage:
    """One image and what is known of it.

    Attributes:
        image: uint8 [128, 128].
        targets: float32 [4] in the order of ``TARGETS``: log2 of the characteristic length in
            pixels, of the number of elements in the image, of the stroke width or edge blur in
            pixels, and the angle in radians of the normal of the dominant direction; NaN where
            the family has no such quantity.
    """

    image: np.ndarray
    targets: np.ndarray


def _log_uniform(rng: Rng, low: float, high: float) -> float:
    return float(math.exp(rng.uniform(math.log(low), math.log(high))))


def _grid() -> tuple[np.ndarray, np.ndarray]:
    axis = np.arange(SIZE, dtype=np.float32) - SIZE / 2
    x, y = np.meshgrid(axis, axis)
    return x, y


def _polyline(
    canvas: np.ndarray, points: np.ndarray, value: float, width: float, closed: bool
) -> None:
    fixed = np.round(points * (1 << _SHIFT)).astype(np.int32).reshape(-1, 1, 2)
    # Whole widths only in cv2: a fractional one is drawn on average by dithering the choice
    # with the first coordinate, which is as good as random and keeps the function pure.
    base = max(1, int(width))
    extra = (float(points[0, 0]) * 7.31) % 1.0 < width - base
    # A stroke thinner than a pixel is a fainter one.
    value = value * min(1.0, max(0.35, width))
    cv2.polylines(canvas, [fixed], closed, value, base + int(extra), cv2.LINE_AA, _SHIFT)


def _radial_curve(
    rng: Rng, radius: float, harmonics: float, rough: float, slope: float, aspect: float
) -> np.ndarray:
    t = np.linspace(0, 2 * math.pi, 180, endpoint=False)
    r = np.ones_like(t)
    for k in range(2, 2 + max(1, round(harmonics))):
        r += rough * k**-slope * rng.normal() * np.cos(k * t + rng.uniform(0, 2 * math.pi))
    r = radius * np.clip(r, 0.15, 3)
    turn = rng.uniform(0, 2 * math.pi)
    x, y = r * np.cos(t), r * np.sin(t) * aspect
    c, s = math.cos(turn), math.sin(turn)
    return np.stack([c * x - s * y, s * x + c * y], 1)


def _targets(
    scale: float = math.nan,
    count: float = math.nan,
    width: float = math.nan,
    angle: float = math.nan,
) -> np.ndarray:
    logs = [math.log2(max(v, 0.25)) if v == v else v for v in (scale, count, width)]
    return np.asarray([*logs, angle], np.float32)


def _normalise(field: np.ndarray) -> np.ndarray:
    low, high = np.percentile(field, (0.5, 99.5))
    return np.clip((field - low) / max(float(high - low), 1e-6), 0, 1)


# --- families: (draw the parameters of a category, draw an instance of them) ------------------


def _contour_params(rng: Rng) -> Params:
    return {
        "radius": rng.uniform(18, 52),
        "harmonic": float(rng.integers(2, 13)),
        "amplitude": rng.uniform(0.05, 0.45),
        "rings": float(rng.integers(1, 14)),
        "shrink": rng.uniform(0.72, 0.96),
        "twist": rng.uniform(0, 0.5),
        "width": _log_uniform(rng, 0.8, 3.2),
        "second": float(rng.integers(1, 20)),
        "second_amplitude": rng.uniform(0, 0.15),
        "aspect": rng.uniform(0.5, 1),
    }


def _contour(p: Params, rng: Rng) -> tuple[np.ndarray, np.ndarray]:
    canvas = np.zeros((SIZE, SIZE), np.float32)
    t = np.linspace(0, 2 * math.pi, 220, endpoint=False)
    centre = SIZE / 2 + rng.normal(0, 8, 2)
    turn, phase = rng.uniform(0, 2 * math.pi, 2)
    radius = p["radius"]
    for ring in range(max(1, round(p["rings"]))):
        r = radius * (
            1
            + p["amplitude"] * np.cos(round(p["harmonic"]) * t + ring * p["twist"] * 3)
            + p["second_amplitude"] * np.cos(round(p["second"]) * t + phase)
        )
        x, y = r * np.cos(t), r * np.sin(t) * p["aspect"]
        c, s = math.cos(turn), math.sin(turn)
        points = np.stack([c * x - s * y, s * x + c * y], 1) + centre
        _polyline(canvas, points, rng.uniform(0.6, 1), p["width"], True)
        radius *= p["shrink"]
        if radius < 2:
            break
    return canvas, _targets(scale=p["radius"], width=p["width"])


def _shape_params(rng: Rng) -> Params:
    return {
        "radius": _log_uniform(rng, 8, 44),
        "harmonics": float(rng.integers(2, 18)),
        "rough": rng.uniform(0.02, 0.5),
        "slope": rng.uniform(0.3, 1.3),
        "blur": _log_uniform(rng, 0.4, 7),
        "aspect": rng.uniform(0.4, 1),
        "inner": rng.uniform(0, 0.6),
        "inner_scale": _log_uniform(rng, 2, 12),
        "halo": rng.choice([0.0, rng.uniform(0.2, 0.6)]),
        "fill": rng.uniform(0.15, 0.6),
    }


def _shape(p: Params, rng: Rng) -> tuple[np.ndarray, np.ndarray]:
    area = math.pi * p["radius"] ** 2
    count = int(np.clip(round(p["fill"] * SIZE**2 / area), 1, 40))
    mask = np.zeros((SIZE, SIZE), np.float32)
    for _ in range(count):
        spread = 12 if count == 1 else SIZE
        centre = SIZE / 2 + (rng.random(2) - 0.5) * spread
        points = centre + _radial_curve(
            rng,
            p["radius"] * rng.uniform(0.8, 1.2),
            p["harmonics"],
            p["rough"],
            p["slope"],
            p["aspect"],
        )
        fixed = np.round(points * (1 << _SHIFT)).astype(np.int32).reshape(-1, 1, 2)
        cv2.fillPoly(mask, [fixed], rng.uniform(0.6, 1), cv2.LINE_AA, _SHIFT)
    soft = cv2.GaussianBlur(mask, (0, 0), p["blur"])
    texture = cv2.GaussianBlur(
        rng.normal(size=(SIZE, SIZE)).astype(np.float32), (0, 0), p["inner_scale"]
    )
    texture /= texture.std() + 1e-6
    field = soft * (1 + 0.5 * p["inner"] * texture)
    if p["halo"]:
        field = field + p["halo"] * cv2.GaussianBlur(mask, (0, 0), p["blur"] * 2 + 4)
    return field, _targets(scale=p["radius"], count=count, width=p["blur"])


def _fractal_points(
    maps: np.ndarray, weights: np.ndarray, rng: Rng, orbits: int, steps: int
) -> np.ndarray:
    choice = rng.choice(len(maps), size=(steps, orbits), p=weights)
    point = rng.uniform(-0.5, 0.5, (orbits, 2))
    kept = []
    for step in range(steps):
        m = maps[choice[step]]
        point = np.einsum("nij,nj->ni", m[:, :, :2], point) + m[:, :, 2]
        if step >= 12:
            kept.append(point)
    return np.concatenate(kept)


def _fractal_image(points: np.ndarray, fill: float) -> np.ndarray:
    low, high = np.percentile(points, 0.5, axis=0), np.percentile(points, 99.5, axis=0)
    span = max(float((high - low).max()), 1e-6)
    pixel = ((points - (low + high) / 2) / span * fill + 0.5) * SIZE
    index = np.floor(pixel).astype(np.int64)
    inside = ((index >= 0) & (index < SIZE)).all(1)
    flat = index[inside, 1] * SIZE + index[inside, 0]
    return np.bincount(flat, minlength=SIZE**2).reshape(SIZE, SIZE).astype(np.float32)


def _fractal_params(rng: Rng) -> Params:
    # Most random map systems collapse to specks: draw again until the attractor fills enough.
    for _ in range(100):
        number = int(rng.integers(2, 7))
        a = rng.uniform(-1, 1, (number, 2, 2))
        norm = np.linalg.norm(a, 2, axis=(1, 2), keepdims=True)
        a *= rng.uniform(0.35, 0.85, (number, 1, 1)) / norm
        b = rng.uniform(-1, 1, (number, 2, 1))
        maps = np.concatenate([a, b], 2)
        weights = np.abs(np.linalg.det(a)) + 0.02
        image = _fractal_image(_fractal_points(maps, weights / weights.sum(), rng, 200, 60), 0.8)
        if (image > 0).mean() > 0.06:
            break
    p = {f"m{i}": float(v) for i, v in enumerate(maps.ravel())}
    p["number"] = float(number)
    return p


def _fractal(p: Params, rng: Rng) -> tuple[np.ndarray, np.ndarray]:
    number = sum(key[0] == "m" for key in p) // 6
    maps = np.asarray([p[f"m{i}"] for i in range(number * 6)]).reshape(number, 2, 3)
    weights = np.abs(np.linalg.det(maps[:, :, :2])) + 0.02
    points = _fractal_points(maps, weights / weights.sum(), rng, 300, 90)
    turn = rng.uniform(0, 2 * math.pi)
    c, s = math.cos(turn), math.sin(turn)
    points = points @ np.asarray([[c, -s], [s, c]])
    density = _fractal_image(points, rng.uniform(0.75, 1.1))
    return np.log1p(density), _targets()


def _grating_params(rng: Rng) -> Params:
    return {
        "period": _log_uniform(rng, 4, 40),
        "waves": float(rng.integers(1, 4)),
        "spread": rng.uniform(0.3, 1.4),
        "ratio": rng.uniform(0.5, 1.8),
        "square": rng.uniform(0.2, 6),
        "warp": rng.uniform(0, 1.6),
        "warp_period": rng.uniform(30, 120),
        "radial": float(rng.random() < 0.2),
        "bias": rng.uniform(-0.7, 0.7),
    }


def _grating(p: Params, rng: Rng) -> tuple[np.ndarray, np.ndarray]:
    x, y = _grid()
    angle = rng.uniform(0, math.pi)
    wx, wy, w0 = rng.uniform(0, 2 * math.pi, 3)
    k = 2 * math.pi / p["warp_period"]
    warp = p["warp"] * (np.sin(k * x + wx) * np.cos(k * y + wy) + 0.5 * np.sin(k * (x + y) + w0))
    field = np.zeros((SIZE, SIZE), np.float32)
    waves = max(1, round(p["waves"]))
    radial = p["radial"] > 0.5
    cx, cy = rng.normal(0, 16, 2)
    for i in range(waves):
        a = angle + i * p["spread"]
        along = np.hypot(x - cx, y - cy) if radial and i == 0 else x * math.cos(a) + y * math.sin(a)
        period = p["period"] * p["ratio"] ** i
        field += np.cos(2 * math.pi / period * along + warp + rng.uniform(0, 2 * math.pi))
    field = np.tanh(p["square"] * (field / waves + 0.5 * p["bias"]))
    one = waves == 1 and not radial
    return field, _targets(scale=p["period"], angle=angle if one else math.nan)


def _noise_params(rng: Rng) -> Params:
    return {
        "period": _log_uniform(rng, 3.5, 40),
        "band": rng.uniform(0.12, 0.7),
        "stretch": rng.choice([1.0, rng.uniform(1.6, 4)]),
        "kind": float(rng.integers(0, 4)),
        "level": rng.uniform(-0.8, 1.2),
        "tail": rng.uniform(0, 0.5),
    }


@lru_cache(maxsize=1)
def _frequencies() -> tuple[np.ndarray, np.ndarray]:
    f = np.fft.fftfreq(SIZE)
    return np.meshgrid(f, np.fft.rfftfreq(SIZE), indexing="ij")


def _noise(p: Params, rng: Rng) -> tuple[np.ndarray, np.ndarray]:
    fy, fx = _frequencies()
    angle = rng.uniform(0, math.pi)
    c, s = math.cos(angle), math.sin(angle)
    # Stretched along the direction at right angles to `angle`, which is the normal.
    u, v = c * fx + s * fy, (-s * fx + c * fy) * p["stretch"]
    radius = np.hypot(u, v) + 1e-6
    gain = np.exp(-0.5 * (np.log2(radius * p["period"]) / p["band"]) ** 2)
    gain += p["tail"] * np.minimum(1, (0.02 / radius) ** 1.5)
    spectrum = np.fft.rfft2(rng.normal(size=(SIZE, SIZE))) * gain
    field = np.fft.irfft2(spectrum, s=(SIZE, SIZE))
    field /= field.std() + 1e-9
    kind = round(p["kind"] - 1e-9) % 4
    if kind == 1:
        field = np.tanh(6 * (field - p["level"]))
    elif kind == 2:
        field = -np.abs(field)
    elif kind == 3:
        field = np.exp(0.9 * np.clip(field, -3, 3))
    angle = angle if p["stretch"] > 1.4 else math.nan
    return field, _targets(scale=p["period"], angle=angle)


def _cell_params(rng: Rng) -> Params:
    return {
        "number": _log_uniform(rng, 8, 420),
        "disorder": rng.uniform(0.05, 1),
        "kind": float(rng.integers(0, 3)),
        "width": _log_uniform(rng, 0.8, 3.5),
        "aspect": rng.choice([1.0, rng.uniform(1.6, 3)]),
        "mix": rng.uniform(0, 0.5),
    }


def _cell(p: Params, rng: Rng) -> tuple[np.ndarray, np.ndarray]:
    x, y = _grid()
    angle = rng.uniform(0, math.pi)
    c, s = math.cos(angle), math.sin(angle)
    step = SIZE / math.sqrt(p["number"])
    reach = int(math.ceil(SIZE * 0.75 * p["aspect"] / step)) + 1
    gy, gx = np.mgrid[-reach : reach + 1, -reach : reach + 1]
    seeds = np.stack([(gx + 0.5 * (gy % 2)).ravel(), gy.ravel()], 1) * step
    seeds = seeds + rng.uniform(-1, 1, seeds.shape) * p["disorder"] * step * 0.7
    seeds += rng.uniform(-step, step, 2)
    stretched = np.stack([(c * x + s * y).ravel() * p["aspect"], (-s * x + c * y).ravel()], 1)
    half = SIZE * 0.72 + 2 * step
    near = (np.abs(seeds[:, 0]) < half * p["aspect"]) & (np.abs(seeds[:, 1]) < half)
    seeds = seeds[near]
    distance, owner = cKDTree(seeds).query(stretched, k=2)
    edge = 1 / (1 + np.exp((distance[:, 1] - distance[:, 0] - p["width"] * 2) / 0.7))
    kind = round(p["kind"] - 1e-9) % 3
    tone = rng.uniform(0, 1, len(seeds))[owner[:, 0]]
    if kind == 0:
        field = edge + p["mix"] * tone
    elif kind == 1:
        field = tone - p["mix"] * edge
    else:
        field = 1 - distance[:, 0] / step + p["mix"] * (edge + tone)
    angle = angle if p["aspect"] > 1.4 else math.nan
    count = p["number"] * p["aspect"]
    width = p["width"] if kind == 0 else math.nan
    return field.reshape(SIZE, SIZE), _targets(step, count, width, angle)


def _dot_params(rng: Rng) -> Params:
    return {
        "radius": _log_uniform(rng, 0.9, 9),
        "fill": _log_uniform(rng, 0.004, 0.25),
        "spread": rng.uniform(0.02, 0.7),
        "blur": _log_uniform(rng, 0.35, 2.5),
        "aspect": rng.choice([1.0, rng.uniform(0.25, 0.6)]),
        "ring": float(rng.random() < 0.25),
        "dark": rng.choice([0.0, rng.uniform(0.2, 0.5)]),
        "cluster": rng.choice([0.0, 1.0]),
        "ground": rng.uniform(0, 0.35),
        "ground_scale": _log_uniform(rng, 1, 14),
    }


def _dot(p: Params, rng: Rng) -> tuple[np.ndarray, np.ndarray]:
    area = math.pi * p["radius"] ** 2 * p["aspect"]
    count = int(np.clip(round(p["fill"] * SIZE**2 / area), 2, 500))
    angle = rng.uniform(0, math.pi)
    place = rng.uniform(0, SIZE, (count, 2))
    if p["cluster"] > 0.5:
        centres = rng.uniform(0, SIZE, (max(2, count // 12), 2))
        place = centres[rng.integers(0, len(centres), count)] + rng.normal(0, 11, (count, 2))
    canvas = np.zeros((SIZE, SIZE), np.float32)
    turn = math.degrees(angle) + 90  # long axis at right angles to the normal
    for x, y in place:
        r = p["radius"] * math.exp(p["spread"] * float(np.clip(rng.normal(), -2, 2)))
        value = rng.uniform(0.6, 1) * (-1.0 if rng.random() < p["dark"] else 1.0)
        centre = (round(x * 16), round(y * 16))
        axes = (max(8, round(r * 16)), max(8, round(r * p["aspect"] * 16)))
        thickness = 1 if p["ring"] > 0.5 else -1
        cv2.ellipse(canvas, centre, axes, turn, 0, 360, value, thickness, cv2.LINE_AA, _SHIFT)
    canvas = cv2.GaussianBlur(canvas, (0, 0), p["blur"])
    ground = cv2.GaussianBlur(
        rng.normal(size=(SIZE, SIZE)).astype(np.float32), (0, 0), p["ground_scale"]
    )
    canvas = canvas + p["ground"] * 0.5 * ground / (ground.std() + 1e-6)
    angle = angle if p["aspect"] < 0.7 else math.nan
    return canvas, _targets(2 * p["radius"], count, p["blur"], angle)


def _tree_params(rng: Rng) -> Params:
    return {
        "depth": float(rng.integers(4, 9)),
        "angle": rng.uniform(0.2, 0.9),
        "ratio": rng.uniform(0.66, 0.86),
        "width": _log_uniform(rng, 1, 5),
        "taper": rng.uniform(0.55, 0.85),
        "wander": rng.uniform(0.0, 0.35),
        "roots": float(rng.integers(1, 5)),
        "length": rng.uniform(18, 42),
        "fork": rng.uniform(0.75, 1.0),
        "uneven": rng.uniform(0, 0.5),
    }


def _tree(p: Params, rng: Rng) -> tuple[np.ndarray, np.ndarray]:
    canvas = np.zeros((SIZE, SIZE), np.float32)
    stack = []
    for _ in range(max(1, round(p["roots"]))):
        out = rng.uniform(0, 2 * math.pi)
        start = SIZE / 2 + rng.normal(0, 10, 2) - 42 * np.asarray([math.cos(out), math.sin(out)])
        stack.append((start, out, p["length"], p["width"], round(p["depth"])))
    drawn = 0
    while stack and drawn < 400:
        start, heading, length, width, depth = stack.pop(0)
        drawn += 1
        bends = heading + np.cumsum(rng.normal(0, p["wander"], 6))
        step = np.stack([np.cos(bends), np.sin(bends)], 1) * (length / 6)
        points = np.concatenate([start[None], start + np.cumsum(step, 0)])
        _polyline(canvas, points, 0.75 + 0.25 * rng.random(), width, False)
        if depth <= 1 or length < 3:
            continue
        for side in (-1.0, 1.0):
            if rng.random() < p["fork"]:
                turn = side * p["angle"] * (1 + p["uneven"] * rng.normal() * 0.6)
                longer = p["ratio"] * (1 + p["uneven"] * rng.uniform(-0.3, 0.3))
                stack.append(
                    (
                        points[-1],
                        float(bends[-1]) + turn,
                        length * longer,
                        width * p["taper"],
                        depth - 1,
                    )
                )
    return canvas, _targets(scale=p["length"], width=p["width"])


def _web_params(rng: Rng) -> Params:
    return {
        "number": _log_uniform(rng, 3, 70),
        "width": _log_uniform(rng, 0.5, 3.5),
        "wander": rng.choice([0.0, rng.uniform(0.02, 0.3)]),
        "aim": rng.uniform(0, 1),
        "length": _log_uniform(rng, 14, 160),
        "fade": rng.uniform(0, 0.7),
        "blur": rng.choice([0.0, rng.uniform(0.4, 1.4)]),
        "drift": rng.uniform(-0.06, 0.06),
        "ground": rng.uniform(0, 0.3),
    }


def _web(p: Params, rng: Rng) -> tuple[np.ndarray, np.ndarray]:
    canvas = np.zeros((SIZE, SIZE), np.float32)
    angle = rng.uniform(0, math.pi)
    count = max(2, round(p["number"]))
    aimed = p["aim"] > 0.5
    for _ in range(count):
        heading = angle + math.pi / 2 + rng.normal(0, 0.12) if aimed else rng.uniform(0, 7)
        bends = heading + np.cumsum(rng.normal(p["drift"], p["wander"] + 1e-3, 16))
        step = np.stack([np.cos(bends), np.sin(bends)], 1) * (p["length"] / 16)
        path = np.cumsum(step, 0)
        points = path - path.mean(0) + rng.uniform(-6, SIZE + 6, 2)
        _polyline(canvas, points, 1 - p["fade"] * rng.random(), p["width"], False)
    if p["blur"]:
        canvas = cv2.GaussianBlur(canvas, (0, 0), p["blur"])
    canvas = canvas + p["ground"] * 0.3 * rng.normal(size=canvas.shape).astype(np.float32)
    return canvas, _targets(p["length"], count, p["width"], angle if aimed else math.nan)


_Family = tuple[Callable[[Rng], Params], Callable[[Params, Rng], tuple[np.ndarray, np.ndarray]]]
FAMILIES: dict[str, _Family] = {
    "contour": (_contour_params, _contour),
    "shape": (_shape_params, _shape),
    "fractal": (_fractal_params, _fractal),
    "grating": (_grating_params, _grating),
    "noise": (_noise_params, _noise),
    "cell": (_cell_params, _cell),
    "dot": (_dot_params, _dot),
    "tree": (_tree_params, _tree),
    "web": (_web_params, _web),
}
# Parameters that count or choose: an instance must not change them.
_FIXED = frozenset(
    {
        "harmonic",
        "second",
        "rings",
        "harmonics",
        "number",
        "waves",
        "radial",
        "kind",
        "ring",
        "cluster",
        "depth",
        "roots",
        "aim",
    }
)


@lru_cache(maxsize=4096)
def category_params(seed: int, category: int, per_family: int) -> Params:
    """Returns the parameter vector of a category, a pure function of the arguments."""
    family = list(FAMILIES)[category // per_family]
    rng = np.random.default_rng([seed, 1, category])
    return FAMILIES[family][0](rng)


def draw(seed: int, category: int, instance: int, per_family: int = 64) -> FormulaImage:
    """Draws one formula image.

    Args:
        seed: seed of the whole collection.
        category: 0 .. 9 * per_family - 1, family by family.
        instance: any non-negative number.
        per_family: categories in each family.

    Returns:
        The image, uint8 [128, 128], with its targets; the same for the same arguments whatever
        was drawn before.

    Raises:
        ValueError: a category outside the collection.
    """
    if not 0 <= category < per_family * len(FAMILIES):
        raise ValueError(f"category {category} outside 0..{per_family * len(FAMILIES) - 1}")
    family = list(FAMILIES)[category // per_family]
    rng = np.random.default_rng([seed, 2, category, instance])
    params = {}
    for key, value in category_params(seed, category, per_family).items():
        jitter = 1 + _JITTER * float(np.clip(rng.normal(), -2, 2))
        # Affine maps of a fractal answer strongly to small changes: less jitter for them.
        jitter = 1 + (jitter - 1) * 0.4 if family == "fractal" else jitter
        exact = key in _FIXED and not (family == "cell" and key == "number")
        params[key] = value if exact else value * jitter
    field, targets = FAMILIES[family][1](params, rng)
    image = np.round(_normalise(field) * 255).astype(np.uint8)
    return FormulaImage(image, targets)


def _draw_category(job: tuple[int, int, int, int, int]) -> tuple[np.ndarray, np.ndarray]:
    seed, category, first, number, per_family = job
    cv2.setNumThreads(1)
    drawn = [draw(seed, category, i, per_family) for i in range(first, first + number)]
    return np.stack([d.image for d in drawn]), np.stack([d.targets for d in drawn])


def draw_pool(
    seed: int, first: int, number: int, per_family: int = 64, processes: int = 2
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Draws instances ``first .. first + number - 1`` of every category.

    Returns:
        images uint8 [m, 128, 128], targets float32 [m, 4], labels int64 [m], ordered by category
        and then instance, m = categories * number; independent of ``processes``.
    """
    categories = per_family * len(FAMILIES)
    jobs = [(seed, category, first, number, per_family) for category in range(categories)]
    with get_context("spawn").Pool(processes) as pool:
        parts = pool.map(_draw_category, jobs, chunksize=4)
    images = np.concatenate([part[0] for part in parts])
    targets = np.concatenate([part[1] for part in parts])
    return images, targets, np.repeat(np.arange(categories, dtype=np.int64), number)
