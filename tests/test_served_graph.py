"""The graph that is served: the adapters multiplied out say what the adapters say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from test_adapters import LAYOUTS, images, small_vit, stir

import wara
from wara.adapters.base import adapted_layers
from wara.deploy.graph import FrozenSubbands, Served, export_onnx, frozen, plain
from wara.deploy.predictor import session

METHODS: dict[str, dict[str, Any]] = {
    "wara scalar": {"method": "wara", "core": "scalar", "rank": 3},
    "wara diag": {"method": "wara", "core": "diag", "level": 2, "rank": 3},
    "wara full": {"method": "wara", "core": "full", "level": 2, "rank": 3},
    "wara skip": {"method": "wara", "core": "full", "prefix": "skip", "rank": 3},
    "tiny_wara": {"method": "tiny_wara", "rank": 3},
    "tiny_wara skip": {"method": "tiny_wara", "rank": 5, "prefix": "skip", "boundary": "zero"},
    "tiny_wara directions": {"method": "tiny_wara", "rank": 3, "coefficients": 4, "level": 2},
}


def adapted(options: dict[str, Any], **layout: Any) -> torch.nn.Module:
    model = small_vit(**layout)
    method = wara.adapters.method_from_options(
        options["method"], {k: v for k, v in options.items() if k != "method"}
    )
    wara.adapters.adapt(model, method)
    stir(model)
    return plain(model)[0]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("method", METHODS)
def test_adapters_multiplied_out_say_the_same(layout: str, method: str) -> None:
    model = adapted(METHODS[method], **LAYOUTS[layout])
    ready = frozen(model)
    assert not list(adapted_layers(ready))
    assert sum(isinstance(m, FrozenSubbands) for m in ready.modules()) == len(
        list(adapted_layers(model))
    )
    with torch.no_grad():
        x = images(model)
        wanted = model(x)
        torch.testing.assert_close(ready(x), wanted, rtol=1e-4, atol=1e-4)
        # Were the adapters left out, the difference would show.
        assert (wanted - wara.adapters.unload(model)(x)).abs().max() > 1e-2


def test_blocks_without_prefix_tokens() -> None:
    """CaiT adds its class token after the blocks that are adapted."""
    torch.manual_seed(0)
    model = timm.create_model("cait_xxs24_224", num_classes=2, img_size=32, depth=2).eval()
    wara.adapters.adapt(model, wara.adapters.method_from_options("wara", {"rank": 2}))
    stir(model)
    with torch.no_grad():
        x = torch.randn(2, 3, 32, 32)
        torch.testing.assert_close(frozen(model)(x), model(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", ["wara full", pytest.param("tiny_wara", marks=pytest.mark.slow)])
def test_onnx_of_any_batch_says_what_the_model_says(method: str, tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    model = adapted(METHODS[method], img_size=(40, 56), reg_tokens=2)
    path = tmp_path / "model.onnx"
    export_onnx(model, (40, 56), path)
    ready = session(path.read_bytes(), path.name)
    for batch in (1, 3):
        x = images(model, batch)
        with torch.no_grad():
            wanted = Served(model)(x)
        found = ready.run(["logits", "features"], {"images": x.numpy()})
        for one, other in zip(found, wanted, strict=True):
            np.testing.assert_allclose(one, other.numpy(), atol=1e-4)
