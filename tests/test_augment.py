"""Augmentation: counted, of the same size, and never more than the modality allows."""

from __future__ import annotations

import pickle
import random
import subprocess
import sys

import numpy as np
import pytest

from wara.errors import WaraError
from wara.training.augment import PRESETS, Augment, Preset, build_augment

ACTIVE = [name for name in PRESETS if name != "off"]


def scene(size: tuple[int, int] = (48, 48)) -> np.ndarray:
    """Smooth, coloured, without any symmetry."""
    y, x = np.mgrid[: size[0], : size[1]] / size[0]
    image = np.stack([140 + 80 * x, 90 + 60 * y, 60 + 50 * x * y], axis=2)
    image[4:14, 6:12] = (230, 60, 30)  # a bright mark, top left
    return image.astype(np.uint8)


@pytest.mark.parametrize("name", ACTIVE)
@pytest.mark.parametrize("size", [(48, 48), (40, 56)])
def test_size_and_type_stay(name, size):
    augment, image = build_augment(name), scene(size)
    before = image.copy()
    for seed in range(20):
        out = augment(image, seed)
        assert out.shape == image.shape and out.dtype == np.uint8
    np.testing.assert_array_equal(image, before)  # the input is shared: it must not change


@pytest.mark.parametrize("name", ACTIVE)
def test_result_depends_on_the_seed_alone(name):
    first, second = build_augment(name), build_augment(name)
    expected = [first(scene(), seed) for seed in range(12)]
    # Another order, other calls in between, other global states.
    np.random.seed(99)
    random.seed(99)
    for seed in (7, 3, 11, 0):
        second(scene(), 1000 + seed)
        np.random.random(5)
        np.testing.assert_array_equal(second(scene(), seed), expected[seed])
    assert len({out.tobytes() for out in expected}) > 8
    # A copy in a worker does the same.
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(first))(scene(), 5), expected[5])


def test_global_random_states_are_left_alone():
    np.random.seed(1)
    random.seed(1)
    wanted = (np.random.random(), random.random())
    np.random.seed(1)
    random.seed(1)
    for seed in range(5):
        build_augment("ultrasound")(scene(), seed)
    assert (np.random.random(), random.random()) == wanted


def mirrored(out: np.ndarray, axis: int) -> bool:
    """Whether the red mark lies on the other side of the middle."""
    redness = out[..., 0].astype(int) - out[..., 1]
    place = np.unravel_index(np.argmax(redness), redness.shape)
    return place[axis] > out.shape[axis] / 2


@pytest.mark.parametrize("name", ACTIVE)
def test_flips_are_those_the_modality_allows(name):
    augment = build_augment(name)
    outs = [augment(scene(), seed) for seed in range(60)]
    sideways = np.mean([mirrored(out, 1) for out in outs])
    upside_down = np.mean([mirrored(out, 0) for out in outs])
    free = name in ("fundus", "dermoscopy")
    assert (0.25 < sideways < 0.75) if free or name == "ultrasound" else sideways == 0
    assert (0.25 < upside_down < 0.75) if free else upside_down == 0


@pytest.mark.parametrize("name", ["chest_xray", "mammography", "ultrasound"])
def test_grey_images_stay_nearly_grey_and_readable(name):
    grey = np.repeat(scene()[..., :1], 3, axis=2)
    for seed in range(30):
        out = build_augment(name)(grey, seed).astype(int)
        assert np.ptp(out, axis=2).max() <= 2, seed  # speckle and gain have no colour
        assert 40 < out.mean() < 230


def test_chest_rotation_is_small():
    # A white vertical line in the middle leans by at most 7 degrees.
    image = np.zeros((101, 101, 3), np.uint8)
    image[:, 49:52] = 255
    for seed in range(60):
        out = build_augment("chest_xray")(image, seed)[..., 0].astype(float)
        rows = np.array([(out[row] * np.arange(101)).sum() / out[row].sum() for row in (20, 80)])
        angle = np.degrees(np.arctan2(abs(rows[1] - rows[0]), 60))
        assert angle <= 7.5


# -- one option at a time: it reaches its limit on both sides, and stays within it ----------------


def outcomes(image: np.ndarray, count: int = 300, **options: object) -> list[np.ndarray]:
    """What an augmentation with these options alone makes of an image, seed by seed."""
    augment = Augment(Preset("test", **options))  # type: ignore[arg-type]
    return [augment(image, seed).astype(float) for seed in range(count)]


def spans(values: list[float], limit: float, slack: float) -> bool:
    """Whether values fill -limit..limit: beyond four fifths of it on both sides, never past it."""
    low, high = min(values), max(values)
    return max(high, -low) <= limit + slack and min(high, -low) >= 0.8 * limit - slack


def affine(out: np.ndarray) -> tuple[float, float, float, np.ndarray]:
    """Angle in degrees, scale along both axes, and the middle `(y, x)`, by three coloured discs."""
    places = []
    for channel in range(3):
        weight = out[..., channel] - np.delete(out, channel, axis=2).max(axis=2)
        weight = weight.clip(0)
        grid = np.mgrid[: out.shape[0], : out.shape[1]]
        places.append((grid * weight).sum((1, 2)) / weight.sum())
    middle, right, below = places
    across, down = right - middle, below - middle
    angle = np.degrees(np.arctan2(-across[0], across[1]))
    return angle, np.hypot(*across) / 20, np.hypot(*down) / 20, middle


def discs() -> np.ndarray:
    image = np.zeros((81, 81, 3), np.uint8)
    y, x = np.mgrid[:81, :81]
    for channel, (row, column) in enumerate([(40, 40), (40, 60), (60, 40)]):
        image[..., channel] = 255 * ((y - row) ** 2 + (x - column) ** 2 <= 36)
    return image


def test_geometry_stays_within_its_limits_and_uses_them() -> None:
    found = [affine(out) for out in outcomes(discs(), degrees=20)]
    assert spans([angle for angle, *_ in found], 20, 0.5)
    assert all(abs(one - 1) < 0.03 and abs(two - 1) < 0.03 for _, one, two, _ in found)
    found = [affine(out) for out in outcomes(discs(), scale=0.2)]
    assert spans([one - 1 for _, one, _, _ in found], 0.2, 0.02)
    assert all(abs(one - two) < 0.02 and abs(angle) < 1 for angle, one, two, _ in found)
    found = [affine(out) for out in outcomes(discs(), shift=0.1)]
    for axis in (0, 1):
        assert spans([middle[axis] - 40 for *_, middle in found], 8.1, 0.5)


def test_what_comes_in_from_outside_is_black() -> None:
    white = np.full((60, 60, 3), 255, np.uint8)
    outs = np.array(outcomes(white, 60, degrees=30))
    corners = outs[:, 0, 0]
    assert np.median(corners) == 0 and corners.max() == 255  # turned, and left as it was
    assert len(np.unique(outs)) > 50  # and the edge is smooth


def test_quarter_turns_are_of_all_four_kinds_and_need_a_square() -> None:
    image = scene()
    found = {out.astype(np.uint8).tobytes() for out in outcomes(image, 40, quarter_turns=True)}
    assert found == {np.rot90(image, k).tobytes() for k in range(4)}
    oblong = scene((40, 56))
    assert all((out == oblong).all() for out in outcomes(oblong, 10, quarter_turns=True))


def test_light_stays_within_its_limits_and_uses_them() -> None:
    steps = np.repeat(np.repeat(np.array([64, 128, 192], np.uint8), 4)[None, :, None], 3, axis=2)
    levels = [out[0, ::4, 0] for out in outcomes(steps, brightness=0.2)]
    assert spans([(low - 64) / 255 for low, _, _ in levels], 0.2, 0.01)
    assert all(abs(high - low - 128) <= 2 for low, _, high in levels)
    levels = [out[0, ::4, 0] for out in outcomes(steps, contrast=0.2)]
    assert spans([(high - low) / 128 - 1 for low, _, high in levels], 0.2, 0.02)
    levels = [out[0, ::4, 0] for out in outcomes(steps, gamma=0.3)]
    assert spans([np.log(low / 255) / np.log(64 / 255) - 1 for low, _, _ in levels], 0.3, 0.02)
    white = np.full((4, 4, 3), 255, np.uint8)
    assert all((out == 255).all() for out in outcomes(white, 20, gamma=0.3))


def test_colour_stays_within_its_limits_and_uses_them() -> None:
    import cv2

    image = np.full((4, 4, 3), (180, 90, 60), np.uint8)

    def changes(**options: int) -> np.ndarray:
        outs = [out.astype(np.uint8) for out in outcomes(image, **options)]
        start, *after = (cv2.cvtColor(one, cv2.COLOR_RGB2HSV)[0, 0] for one in [image, *outs])
        return np.array(after).astype(int) - start

    for option, place in (("hue", 0), ("saturation", 1)):
        found = changes(**{option: 8})
        assert spans(found[:, place].tolist(), 8, 1), option
        # What is not asked for stays, to the rounding of the way there and back.
        assert abs(np.delete(found, place, axis=1)).max() <= 1, option


def test_speckle_differs_from_pixel_to_pixel() -> None:
    grey = np.full((40, 40, 3), 120, np.uint8)
    noisy = [out / 120 - 1 for out in outcomes(grey, 40, speckle=0.2) if np.ptp(out)]
    assert 10 < len(noisy) < 30  # every second image or so
    assert all(spans(out.ravel().tolist(), 0.2, 0.02) for out in noisy)
    assert all(abs(out.mean()) < 0.02 for out in noisy)


def test_no_preset_goes_further_than_another_photograph_would() -> None:
    most = Preset(
        "", True, True, True, degrees=30, scale=0.15, shift=0.05, brightness=0.15, contrast=0.2,
        gamma=0.2, hue=5, saturation=20, speckle=0.1,
    )  # fmt: skip
    for name, preset in PRESETS.items():
        limits = {key: value for key, value in vars(preset).items() if key != "why"}
        assert all(value <= vars(most)[key] for key, value in limits.items()), name
        assert any(limits.values()) == (name != "off")


def test_off_is_the_identity():
    image = scene()
    assert build_augment("off")(image, 3) is image


def test_unknown_preset_is_refused():
    with pytest.raises(WaraError, match="did you mean 'fundus'") as caught:
        build_augment("fundos")
    assert caught.value.exit_code == 2


@pytest.mark.slow
def test_the_library_is_imported_late_and_does_not_call_out():
    code = (
        "import sys, socket\n"
        "def stop(*a, **k): raise SystemExit('network')\n"
        "import wara.training.augment as augment\n"
        "assert 'albumentations' not in sys.modules\n"
        "socket.getaddrinfo = socket.create_connection = stop\n"
        "import numpy as np\n"
        "augment.build_augment('fundus')(np.zeros((8, 8, 3), np.uint8), 0)\n"
        "assert 'albumentations' in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
