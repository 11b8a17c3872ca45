"""The shipped backbone is the file that its card speaks of."""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from timm.models.vision_transformer import VisionTransformer

from wara.backbones.build import NANO_ARCHITECTURE

ROOT = Path(__file__).parents[1]
WEIGHTS = ROOT / "wara" / "weights"
FILE = WEIGHTS / "wara_nano.safetensors"
sys.path.insert(0, str(ROOT / "tools"))


def test_the_file_is_small_half_precision_and_hashed_in_its_card() -> None:
    scores = json.loads((WEIGHTS / "wara_nano.json").read_text())
    assert hashlib.sha256(FILE.read_bytes()).hexdigest() == scores["sha256"]
    assert FILE.stat().st_size < 6e6
    state = load_file(FILE)
    assert {tensor.dtype for tensor in state.values()} == {torch.float16}
    assert all(tensor.isfinite().all() for tensor in state.values())
    card = (WEIGHTS / "wara_nano.md").read_text()
    for key in ("held_out_top1", "digits_probe", "digits_probe_random_init"):
        assert f"| {scores[key]:.3f} |" in card


def test_it_loads_strictly_into_the_architecture_of_its_metadata() -> None:
    with safe_open(FILE, framework="pt") as file:
        architecture = json.loads(file.metadata()["architecture"])
    assert architecture == NANO_ARCHITECTURE
    model = VisionTransformer(**architecture, num_classes=0)
    model.load_state_dict({key: value.float() for key, value in load_file(FILE).items()})
    count = sum(parameter.numel() for parameter in model.parameters())
    assert 1e6 < count < 3e6


def test_formula_images_depend_on_their_arguments_alone() -> None:
    from formula_images import FAMILIES, draw

    for category in range(0, 16 * len(FAMILIES), 16):
        first = draw(0, category, 3, 16).image
        draw(0, category, 4, 16)
        assert np.array_equal(first, draw(0, category, 3, 16).image)
        assert not np.array_equal(first, draw(1, category, 3, 16).image)
