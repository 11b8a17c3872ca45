"""Augmentation: counted, of the same size, and never more than the modality allows."""

from __future__ import annotations

import pickle
import random
import subprocess
import sys

import numpy as np
import pytest

from wara.errors import WaraError
from wara.training.augment import PRESETS, build_augment

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


def test_off_is_the_identity():
    image = scene()
    assert build_augment("off")(image, 3) is image


def test_unknown_preset_is_refused():
    with pytest.raises(WaraError, match="did you mean 'fundus'") as caught:
        build_augment("fundos")
    assert caught.value.exit_code == 2


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
