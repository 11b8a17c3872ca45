"""The network of a bundle as a timm model again, without the backbone's file and without network.

The graph in ONNX gives logits and features. What looks inside a network, such as an explanation,
needs its modules and gradients: they are built as the manifest says, and filled with the tensors of
the bundle, every one of which must fit. Nothing that a manifest names is imported or fetched.
"""

from __future__ import annotations

import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor, nn

from wara.adapters import (
    METHODS,
    Method,
    adapt,
    adapter_state_dict,
    load_adapter_state,
    method_from_options,
)
from wara.backbones import skeleton
from wara.deploy.bundle import Bundle
from wara.errors import WaraError, suggest
from wara.schema import faults_of
from wara.vit import BackboneInfo

TENSORS = "model.safetensors"
_AGAIN = "export the bundle again with this version of wara"
_HEADER = 16 << 20  # bytes that names and shapes of tensors may take


def load_bundle_model(bundle: Bundle) -> nn.Module:
    """Return the network of a bundle, in float32, in evaluation mode, without gradients of its own.

    Updates of weights are part of the weights; other adapters sit where they were trained.

    Args:
        bundle: as `open_bundle` returns it.

    Returns:
        A timm model from images `[b, 3, h, w]`, normalised, to logits `[b, c]`, the same as the
        graph's to rounding.

    Raises:
        WaraError: kind "artefact" when manifest and tensors do not make one model.
    """
    with torch.device("meta"):
        wanted = _build(bundle).state_dict()
    tensors = _read(bundle, wanted)
    model = _build(bundle)
    if not _is_merged(bundle):
        # This also brings up to date what adapters derive from their tensors.
        load_adapter_state(model, {name: tensors[name] for name in adapter_state_dict(model)})
    model.load_state_dict(tensors)
    return model.eval().requires_grad_(False)


def _is_merged(bundle: Bundle) -> bool:
    return bundle.manifest["model"].get("merged") is True


def _build(bundle: Bundle) -> nn.Module:
    """Return the model with any numbers in it."""
    manifest = bundle.manifest
    try:
        info = BackboneInfo.model_validate(manifest.get("backbone"))
    except ValidationError as error:
        first = next(iter(faults_of(error, BackboneInfo, prefix=("backbone",)).values()))
        raise _refusal(bundle, first.what) from error
    if list(info.img_size) != manifest["input"].get("size"):
        raise _refusal(bundle, "input and backbone are of images of another size")
    try:
        model = skeleton(info, num_classes=len(manifest["classes"]))
        if not _is_merged(bundle):
            adapt(model, _method(bundle), empty=True)
    except WaraError as error:
        raise _refusal(bundle, error.what) from error
    return model


def _method(bundle: Bundle) -> Method:
    said = bundle.manifest.get("method")
    name, options = (said.get("name"), said.get("options")) if isinstance(said, dict) else (0, 0)
    if name not in METHODS or not isinstance(options, dict):
        what = f"the method {name!r} is none of wara's own; {suggest(str(name), METHODS)}"
        raise _refusal(bundle, what)
    return method_from_options(name, options)


def _read(bundle: Bundle, wanted: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of a bundle, which have exactly the names, shapes and types wanted."""
    most = sum(t.numel() * t.element_size() for t in wanted.values()) + _HEADER
    size = bundle.manifest["files"].get(TENSORS, {}).get("bytes", 0)
    if size > most:
        raise _refusal(bundle, f"{TENSORS} has {size:,} bytes, its model at most {most:,}")
    try:
        tensors = load(bundle.read(TENSORS))
    except (SafetensorError, ValueError, OverflowError) as error:
        raise _refusal(bundle, f"{TENSORS} holds no tensors: {error}") from error
    for name in sorted(wanted.keys() | tensors.keys()):
        if name not in tensors or name not in wanted:
            word = "lacks" if name in wanted else "has more than the model:"
            raise _refusal(bundle, f"{TENSORS} {word} {name}")
        found, own = tensors[name], wanted[name]
        if (found.shape, found.dtype) != (own.shape, own.dtype):
            raise _refusal(bundle, f"{name} in {TENSORS} is of another shape or type")
        if not bool(found.isfinite().all()):
            raise _refusal(bundle, f"{name} in {TENSORS} holds numbers that are not finite")
    return tensors


def _refusal(bundle: Bundle, what: str) -> WaraError:
    return WaraError("artefact", what, str(bundle.folder), _AGAIN)
