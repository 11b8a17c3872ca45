"""What an answer rests on: the share of each patch in the logit of the class that is said.

Integrated gradients (Sundararajan et al. 2017, by captum) along the straight way from an image of
its own mean colour to the image. They look at the input alone, so every ViT will do, whatever its
pooling, prefix tokens and adapter; and the shares sum to the difference that the picture makes to
the logit. Removing the patches they name lowers the score more than for Grad-CAM or gradient times
activation; see tests/test_explain.py for that test.

Needs torch and captum, so it belongs to `wara predict --explain` and not to a bundle's `infer.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.colors import LinearSegmentedColormap, Normalize, to_rgb
from torch import Tensor, nn

from wara.deploy.predictor import Prediction, Predictor
from wara.deploy.rebuild import load_bundle_model
from wara.errors import WaraError
from wara.evaluation.canvas import PALETTE, new_figure, save, text_of
from wara.vit import token_layout

STEPS = (16, 64)
"""Points on the way: the first, and the second where the shares then miss their sum."""
_MISSED = 0.05  # of the sum
_BATCH = 8
_PARITY = 1e-3  # logits; the certificate of the export allows 1e-4 on images
_AGAINST, _FOR = PALETTE[0], PALETTE[1]


@dataclass(frozen=True)
class Shares:
    """What each patch of an image adds to a logit.

    Args:
        heat: by patch, `[h, w]`; above 0 speaks for the class.
        target: index of the class.
        logit: of the class.
        without: the logit of an image of the mean colour, where nothing is to be seen.
    """

    heat: np.ndarray
    target: int
    logit: float
    without: float

    @property
    def missed(self) -> float:
        """What the shares lack to `logit - without`, from the finite number of steps."""
        return self.logit - self.without - float(self.heat.sum())


def shares(model: nn.Module, pixels: np.ndarray, target: int) -> Shares:
    """Return what each patch of an image adds to the logit of a class.

    Args:
        model: a timm ViT in evaluation mode, with or without an adapter.
        pixels: normalised, float32 `[3, H, W]`.
        target: index of the class.

    Raises:
        WaraError: kind "usage" without captum, "config" for a model without a grid of tokens.
    """
    method = _captum()(model)
    (h, w), _ = token_layout(model)
    image = torch.from_numpy(np.ascontiguousarray(pixels))[None]
    plain = image.mean((2, 3), keepdim=True).expand_as(image).contiguous()
    with torch.no_grad():
        logit, without = model(torch.cat([image, plain]))[:, target].tolist()
    found = None
    for steps in STEPS:
        gradients: Tensor = method.attribute(
            image, plain, target=target, n_steps=steps, internal_batch_size=_BATCH
        )
        by_pixel = gradients.detach().double().sum((0, 1))
        heat = by_pixel.unflatten(1, (w, -1)).unflatten(0, (h, -1)).sum((1, 3))
        found = Shares(heat.numpy(), target, logit, without)
        if abs(found.missed) <= _MISSED * abs(logit - without):
            break
    assert found is not None
    return found


def _captum() -> Any:
    try:
        from captum.attr import IntegratedGradients
    except ImportError:
        remedy = "install it: pip install 'wara[explain]'"
        raise WaraError("usage", "captum is not installed", "--explain", remedy) from None
    return IntegratedGradients


class Overlays:
    """Draws a picture per image that was predicted.

    Files are called by the number of the row, from 1, and the first digits of the SHA-256 of the
    image: its own name may tell who the patient is.

    Args:
        folder: where they go; made when the first is drawn.

    Raises:
        WaraError: kind "usage" without captum.
    """

    def __init__(self, folder: Path) -> None:
        _captum()
        self.folder = folder

    def of(self, predictor: Predictor, done: int) -> Iterable[Callable[[Prediction], None]]:
        """Return what is to be called with each prediction, in order.

        Args:
            predictor: that makes them.
            done: rows that an earlier call left.

        Raises:
            WaraError: kind "artefact" when the bundle's tensors do not make its model.
        """
        model, row = load_bundle_model(predictor.bundle), done

        def draw(prediction: Prediction) -> None:
            nonlocal row
            row += 1
            if prediction.logits is not None:
                name = f"{row:06d}_{str(prediction.reading.sha256)[:12]}.png"
                overlay(model, predictor, prediction, self.folder / name)

        return [draw]


def overlay(
    model: nn.Module, predictor: Predictor, prediction: Prediction, path: Path
) -> Shares:
    """Draw what an answer rests on over the image, as the network saw it.

    Args:
        model: of `load_bundle_model`.
        predictor: that made the prediction.
        prediction: of an image that could be read.
        path: the PNG.

    Returns:
        What was drawn.

    Raises:
        WaraError: kind "artefact" when the model says something else than the predictor, "storage"
            when the file cannot be written.
    """
    pixels, logits = prediction.reading.pixels, prediction.logits
    assert pixels is not None and logits is not None and prediction.reading.shown is not None
    found = shares(model, pixels, int(logits.argmax()))
    manifest = predictor.bundle.manifest
    rounded = manifest["model"]["precision"] != "float32"
    if not rounded and abs(found.logit - float(logits[found.target])) > _PARITY:
        what = "model.safetensors and model.onnx say different things of an image"
        raise WaraError("artefact", what, str(predictor.bundle.folder), "export the bundle again")
    lines = _caption(predictor, prediction, found)
    if rounded:
        lines.append("the shares are those of the float32 weights, the answer is that of int8")
    name = text_of(predictor.classes[found.target])
    _draw(prediction.reading.shown, found, name, lines, path, bool(manifest["synthetic"]))
    return found


def _caption(predictor: Predictor, prediction: Prediction, found: Shares) -> list[str]:
    """Return the lines above the pictures: what is said, and what the shares sum to."""
    row, name = prediction.row, predictor.classes[found.target]
    said = f"{text_of(name)}  {row[f'prob_{name}']:.3f}"
    if row["decision"] is not None:
        said += f"   decision {row['decision']}"
    if row["abstain"]:
        said += f"   ABSTAINS: {row['abstain_reason']}"
    sums = f"logit {found.logit:+.2f}, of an image of one colour {found.without:+.2f}"
    change = f"{found.heat.sum():+.2f} of {found.logit - found.without:+.2f}"
    return [said, f"{sums}; the shares sum to {change}"]


def _colours() -> LinearSegmentedColormap:
    """Blue against, vermilion for, and see-through where nothing is said."""
    stops = ((0, _AGAINST, 0.9), (0.5, _AGAINST, 0.0), (0.5, _FOR, 0.0), (1, _FOR, 0.9))
    colours = [(place, (*to_rgb(colour), seen)) for place, colour, seen in stops]
    return LinearSegmentedColormap.from_list("shares", colours)


def _draw(
    shown: np.ndarray, found: Shares, name: str, lines: list[str], path: Path, synthetic: bool
) -> None:
    height, width = shown.shape[:2]
    side = 3.0 * min(1.0, max(0.5, height / width))
    fig = new_figure(7.2, side + 0.6 + 0.2 * len(lines))
    plain, covered = fig.subplots(1, 2)
    # Paler below the shares, for colour is hard to tell on black.
    for ax, alpha in ((plain, 1.0), (covered, 0.55)):
        ax.imshow(shown, interpolation="nearest", alpha=alpha)
        ax.set_axis_off()
    most = float(np.abs(found.heat).max()) or 1.0
    heat = covered.imshow(
        found.heat, cmap=_colours(), norm=Normalize(-most, most), interpolation="bilinear",
        extent=(-0.5, width - 0.5, height - 0.5, -0.5),
    )  # fmt: skip
    plain.set_title("as the network saw it", fontsize=9)
    covered.set_title(f"what speaks for and against {name.strip()}", fontsize=9)
    bar = fig.colorbar(heat, ax=covered, shrink=0.9)
    bar.set_label("share of a patch in the logit: + for, − against", fontsize=8)
    bar.ax.tick_params(labelsize=8)
    fig.suptitle("\n".join(lines), fontsize=10)
    save(fig, path, synthetic)
