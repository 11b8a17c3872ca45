"""What an answer rests on: the model of a bundle again, and maps that name what matters to it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from deploy_helpers import make_bundle
from PIL import Image
from safetensors.torch import load_file, save_file
from test_bundle import reseal
from torch import nn
from training_helpers import tiny_config

from wara.adapters import WaRA, adapt
from wara.cli import main
from wara.data.sources import open_source
from wara.deploy import explain
from wara.deploy.bundle import open_bundle
from wara.deploy.explain import shares
from wara.deploy.predictor import Predictor
from wara.deploy.rebuild import TENSORS, load_bundle_model
from wara.errors import WaraError
from wara.evaluation.canvas import STAMP
from wara.images import normalise
from wara.runs.load import load_run
from wara.training.run import run_here
from wara.vit import token_layout

pytest.importorskip("captum")

# -- the model again ----------------------------------------------------------------------------


def largest_difference(bundle: Path) -> float:
    predictor = Predictor(bundle)
    pixels = np.random.default_rng(0).normal(size=(5, 3, *predictor.spec.size)).astype(np.float32)
    with torch.no_grad():
        logits = load_bundle_model(predictor.bundle)(torch.from_numpy(pixels)).numpy()
    return float(np.abs(logits - predictor.run(pixels)[0]).max())


def test_the_model_of_a_bundle_says_what_its_graph_says(bundle: Path) -> None:
    assert largest_difference(bundle) < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize(
    "adapter",
    [
        {"method": "tiny_wara", "share": "model"},  # its layers share a tensor
        pytest.param({"method": "waveft"}, marks=pytest.mark.slow),
        pytest.param({"method": "lora"}, marks=pytest.mark.slow),
    ],
    ids=lambda adapter: adapter["method"],
)
def test_so_does_that_of_other_methods(adapter: dict[str, Any], tmp_path: Path) -> None:
    assert largest_difference(make_bundle(tmp_path, adapter=adapter, epochs=1)) < 1e-4


def refused(folder: Path) -> str:
    with pytest.raises(WaraError) as caught:
        load_bundle_model(open_bundle(folder))
    assert caught.value.exit_code == 4 and "\n" not in str(caught.value) and caught.value.remedy
    return caught.value.what


@pytest.mark.parametrize(
    "section, change, said",
    [
        ("backbone", {"architecture": "hf-hub:somebody/model"}, "timm knows no architecture"),
        ("backbone", {"options": {"checkpoint_path": "/tmp/x"}}, "no option 'checkpoint_path'"),
        ("backbone", {"options": {"depth": 4}}, "blocks.4"),
        ("backbone", {"img_size": [64, 64]}, "another size"),
        ("backbone", {"embed_dim": "wide"}, "embed_dim"),
        ("method", {"name": "os:system"}, "'os:system' is none of wara's own"),
        ("method", {"options": {"rank": 3}}, "another shape"),
        ("model", {"merged": True}, "has more than the model"),
    ],
)
def test_a_manifest_that_names_another_model(
    section: str, change: dict[str, Any], said: str, copy: Path
) -> None:
    content = json.loads((copy / "manifest.json").read_text())[section]
    reseal(copy, **{section: content | change})
    assert said in refused(copy)


def lacking(tensors: dict[str, torch.Tensor]) -> None:
    del tensors["head.bias"]


def endless(tensors: dict[str, torch.Tensor]) -> None:
    tensors["head.bias"][0] = torch.inf


def half(tensors: dict[str, torch.Tensor]) -> None:
    tensors["head.bias"] = tensors["head.bias"].half()


@pytest.mark.parametrize(
    "change, said",
    [(lacking, "lacks head.bias"), (endless, "not finite"), (half, "shape or type")],
)
def test_tensors_that_do_not_fit(
    change: Callable[[dict[str, torch.Tensor]], None], said: str, copy: Path
) -> None:
    tensors = load_file(copy / TENSORS)
    change(tensors)
    save_file(tensors, copy / TENSORS)
    reseal(copy)
    assert said in refused(copy)


def test_a_file_that_holds_no_tensors_or_far_too_many(
    copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (copy / TENSORS).write_bytes(b"\xff" * 100)
    reseal(copy)
    assert "holds no tensors" in refused(copy)
    monkeypatch.setattr("wara.deploy.rebuild._HEADER", -(10**9))
    assert "has 100 bytes, its model at most" in refused(copy)


# -- shares of patches ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, options",
    [
        ("test_vit", {"global_pool": "avg"}),
        ("test_vit", {"global_pool": "map", "class_token": False}),
        ("test_vit", {"reg_tokens": 3}),
        ("test_vit", {"reg_tokens": 4, "no_embed_class": True, "fc_norm": False}),
        ("deit_tiny_distilled_patch16_224", {"depth": 2}),
    ],
)
def test_shares_of_any_grid_prefix_and_pooling(name: str, options: dict[str, Any]) -> None:
    """They sum to what the picture changes, and lie where the picture is."""
    torch.manual_seed(0)
    model = timm.create_model(name, img_size=(32, 64), num_classes=3, **options).eval()
    adapt(model, WaRA(rank=2, level=1))
    for parameter in model.parameters():
        parameter.data += 0.02 * torch.randn_like(parameter)
    pixels = np.zeros((3, 32, 64), np.float32)
    pixels[:, 16:, 48:] = np.random.default_rng(0).normal(size=(3, 16, 16))
    pixels[:, 16:, 48:] -= pixels[:, 16:, 48:].mean((1, 2), keepdims=True)
    found = shares(model, pixels, 1)
    assert found.heat.shape == token_layout(model)[0] == (2, 4)
    assert found.logit != found.without
    assert abs(found.missed) <= 0.05 * abs(found.logit - found.without)
    alone = np.abs(found.heat).sum()
    assert np.abs(found.heat[1, 3]) == pytest.approx(alone)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, np.ndarray]:
    """A model that knows the masses of ultrasound phantoms, and images it has not seen."""
    return learnt(tmp_path_factory.mktemp("phantoms"), side=56, images=360, epochs=3, test=24)


def learnt(
    folder: Path, *, side: int, images: int, epochs: int, test: int
) -> tuple[nn.Module, np.ndarray]:
    config = tiny_config(
        folder, dataset="ultrasound_phantom", backbone={"name": "wara_nano", "img_size": side},
        data={"images": images, "cache": str(folder / "cache")}, epochs=epochs, batch_size=16,
    )  # fmt: skip
    run_here(config)
    run = load_run(str(config.out))
    found = open_source(
        config.dataset, cache=config.data.cache, offline="error", seed=config.data.split_seed,
        images=images,
    )  # fmt: skip
    chosen = [i for i, record in enumerate(found.records) if record.split == "test"][:test]
    pixels = np.stack([normalise(found.array(i, run.spec), run.spec) for i in chosen])
    return run.model(), pixels


def loss_of_score(
    model: nn.Module, pixels: np.ndarray, order: np.ndarray, part: float
) -> np.ndarray:
    """Return how far the predicted class's probability falls when patches become mean colour.

    Args:
        model: the model.
        pixels: `[b, 3, H, W]`.
        order: of the patches of each image, the first to go first, `[b, h w]`.
        part: of the patches that go.
    """
    (h, w), _ = token_layout(model)
    gone = np.zeros((len(pixels), h * w), bool)
    np.put_along_axis(gone, order[:, : round(part * h * w)], True, axis=1)
    step = pixels.shape[2] // h
    mask = gone.reshape(-1, 1, h, w).repeat(step, 2).repeat(step, 3)
    without = np.where(mask, pixels.mean((2, 3), keepdims=True), pixels)
    with torch.no_grad():
        before, after = (model(torch.from_numpy(x)).softmax(1) for x in (pixels, without))
    said = before.argmax(1, keepdim=True)
    return (before - after).gather(1, said)[:, 0].numpy()


def heats(model: nn.Module, pixels: np.ndarray) -> np.ndarray:
    """Return the shares of the patches for the class that is said, `[b, h w]`."""
    with torch.no_grad():
        said = model(torch.from_numpy(pixels)).argmax(1).tolist()
    return np.stack([shares(model, x, k).heat.ravel() for x, k in zip(pixels, said, strict=True)])


def margin(model: nn.Module, pixels: np.ndarray, heat: np.ndarray) -> float:
    """Return by how much the score falls more for the patches a map names than for any others."""
    rng = np.random.default_rng(0)
    falls = [
        np.mean([loss_of_score(model, pixels, order, part).mean() for part in (0.1, 0.2)])
        for order in [np.argsort(-heat, axis=1), *(
            np.argsort(rng.random(heat.shape), axis=1) for _ in range(5)
        )]
    ]  # fmt: skip
    return float(falls[0] - np.mean(falls[1:]))


@pytest.mark.slow
def test_removing_what_a_map_names_lowers_the_score_most(
    trained: tuple[nn.Module, np.ndarray],
) -> None:
    model, pixels = trained
    heat = heats(model, pixels)
    gained = margin(model, pixels, heat)
    shuffled = np.random.default_rng(1).permuted(heat, axis=1)
    # The same question with maps that name the wrong patches, which must fail it.
    assert gained > 0.07
    assert margin(model, pixels, shuffled) < 0.07
    assert margin(model, pixels, -heat) < 0


@pytest.mark.slow
def test_so_it_does_at_the_size_of_training(tmp_path: Path) -> None:
    model, pixels = learnt(tmp_path, side=112, images=900, epochs=6, test=32)
    heat = heats(model, pixels)
    assert margin(model, pixels, heat) > 0.15
    assert margin(model, pixels, np.random.default_rng(1).permuted(heat, axis=1)) < 0.05


# -- pictures -----------------------------------------------------------------------------------


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "Miller_Anna_1970"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i in range(3):
        grey = rng.integers(0, 255, (30 + i, 40), dtype=np.uint8)
        Image.fromarray(grey).save(folder / f"Miller_Anna_{i}.png")
    (folder / "Miller_Anna_1.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    return folder


def predicted(bundle: Path, images: Path, *words: str) -> int:
    out = str(images.parent / "rows.csv")
    return main(["predict", str(bundle), str(images), "--out", out, "--quiet", *words])


def test_a_picture_per_image_by_row_and_hash(bundle: Path, images: Path) -> None:
    import hashlib

    folder = images.parent / "a" / "b"
    assert predicted(bundle, images, "--explain", str(folder)) == 3
    hashes = [hashlib.sha256(p.read_bytes()).hexdigest()[:12] for p in sorted(images.iterdir())]
    names = sorted(path.name for path in folder.iterdir())
    # The second could not be read: a row, no picture, and the number of the third stays.
    assert names == [f"000001_{hashes[0]}.png", f"000003_{hashes[2]}.png"]
    for path in folder.iterdir():
        with Image.open(path) as picture:
            assert not any("Miller" in str(value) for value in picture.info.values())
            assert picture.width > 600 and len(picture.convert("RGB").getcolors(1 << 20)) > 500


def test_numbers_go_on_where_a_call_stopped(
    bundle: Path, images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, draw = images.parent / "pictures", explain.overlay

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    assert predicted(bundle, images, "--explain", str(folder), "--batch-size", "1") == 3
    whole = {path.name: path.read_bytes() for path in folder.iterdir()}
    shutil.rmtree(folder)
    calls: list[int] = []
    monkeypatch.setattr(
        explain, "overlay", lambda *a: stop() if calls else calls.append(1) or draw(*a)
    )
    words = ("--explain", str(folder), "--batch-size", "1")
    assert predicted(bundle, images, *words) == 130
    assert len(list(folder.iterdir())) == 1
    monkeypatch.setattr(explain, "overlay", draw)
    assert predicted(bundle, images, *words, "--resume") == 3
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == whole


def words_of(bundle: Path, images: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return what is written on the first picture."""
    kept: list[Any] = []
    save = explain.save
    monkeypatch.setattr(
        explain, "save", lambda fig, *rest: kept.append(fig) or save(fig, *rest)
    )
    assert predicted(bundle, images, "--explain", str(images.parent / "p"), "--allow-partial") == 0
    return [t.get_text() for t in kept[0].findobj(lambda artist: hasattr(artist, "get_text"))]


def test_what_is_written_on_a_picture(
    bundle: Path, images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "\n".join(words_of(bundle, images, monkeypatch))
    row = next(Predictor(bundle).predict([images / "Miller_Anna_0.png"])).row
    name = row["prediction"]
    assert f"{name}  {row[f'prob_{name}']:.3f}   decision {row['decision']}" in text
    assert ("ABSTAINS: unlike the training images" in text) == row["abstain"]
    assert f"for and against {name}" in text and "the shares sum to" in text
    assert "Miller" not in text and STAMP not in text


def test_a_synthetic_model_says_so_on_its_pictures(
    copy: Path, images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reseal(copy, synthetic=True)
    assert STAMP in words_of(copy, images, monkeypatch)


def test_tensors_of_another_model_are_no_explanation(
    copy: Path, images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tensors = load_file(copy / TENSORS)
    tensors["head.bias"] += 1
    save_file(tensors, copy / TENSORS)
    reseal(copy)
    assert predicted(copy, images, "--explain", str(images.parent / "p")) == 4
    assert "say different things" in capsys.readouterr().err
    assert not (images.parent / "p").exists() and not (images.parent / "rows.csv").exists()


def test_without_captum_or_inside_the_bundle_nothing_begins(
    bundle: Path, images: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert predicted(bundle, images, "--explain", str(bundle / "p")) == 2
    assert "--explain lies inside a bundle" in capsys.readouterr().err
    monkeypatch.setitem(__import__("sys").modules, "captum.attr", None)
    assert predicted(bundle, images, "--explain", str(images.parent / "p")) == 2
    assert "pip install 'wara[explain]'" in capsys.readouterr().err
    assert sorted(path.name for path in images.parent.iterdir()) == [images.name]
