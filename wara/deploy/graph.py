"""The graph of a bundle: logits and features of a batch of any size, in ONNX."""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from wara.adapters import adaptation_of, merge
from wara.errors import WaraError

OPSET = 20
_WIDE = 64  # features; the ranks of adapters lie below
_EXTRA = "pip install 'wara[export]'"


class Served(nn.Module):
    """A timm ViT with two outputs: logits, and the features that its head reads.

    Args:
        model: with or without an adapter.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return logits `[b, c]` and features `[b, d]` of images `[b, 3, h, w]`."""
        tokens = self.model.forward_features(images)
        return self.model.forward_head(tokens), self.model.forward_head(tokens, pre_logits=True)


def plain(model: nn.Module) -> tuple[nn.Module, bool]:
    """Return the model that is served, in float32 and evaluation mode, and whether it was merged.

    Where the update of a layer is one of its weights, it is folded into them; WaRA and Tiny-WaRA
    depend on the place of a token, and stay parts of the graph.
    """
    try:
        return merge(model).float().eval(), True
    except WaraError:
        adaptation_of(model)  # the reason is the method's, not that there is none
        return copy.deepcopy(model).float().eval(), False


def export_onnx(model: nn.Module, size: tuple[int, int], path: Path) -> None:
    """Write a model as ONNX: input `images` `[batch, 3, h, w]`, outputs `logits` and `features`.

    Args:
        model: as `plain` returns it.
        size: `(h, w)` in pixels.
        path: where to.

    Raises:
        WaraError: kind "usage" without the extra `export`.
    """
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError:
        raise WaraError("usage", "onnx and onnxscript are not installed", "", _EXTRA) from None
    served = Served(model).eval()
    # Two images: a batch of one would be taken for a constant.
    example = torch.zeros(2, 3, *size)
    logging.getLogger("onnxscript").setLevel(logging.ERROR)  # it tells of each optimisation
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            served,
            (example,),
            path,
            input_names=["images"],
            output_names=["logits", "features"],
            dynamic_shapes={"images": {0: torch.export.Dim("batch", min=1)}},
            opset_version=OPSET,
            external_data=False,
            dynamo=True,
            verbose=False,
        )


class _Calibration:
    """Hands images to onnxruntime's calibration, batch by batch."""

    def __init__(self, batches: Iterable[np.ndarray]) -> None:
        self.batches = iter(batches)

    def get_next(self) -> dict[str, np.ndarray] | None:
        """Return the next input, None at the end."""
        batch = next(self.batches, None)
        return None if batch is None else {"images": batch}


def quantise(path: Path, batches: Iterable[np.ndarray]) -> None:
    """Make products with constant weights int8, and what goes into them, in place.

    Static: ranges are those of the batches; weights are symmetric, per channel. Products of
    activations with each other (attention), low-rank updates and the head stay in float32: they are
    a small part of the work and most of the loss.

    Args:
        path: the ONNX file.
        batches: normalised training images, float32 `[b, 3, h, w]` each.
    """
    import onnx
    from onnxruntime.quantization import (
        CalibrationMethod,
        QuantFormat,
        QuantType,
        quantize_static,
    )
    from onnxruntime.quantization.shape_inference import quant_pre_process

    prepared, made = path.with_suffix(".pre"), path.with_suffix(".int8")
    # Its optimiser would bring in operators that are not of ONNX itself.
    quant_pre_process(str(path), str(prepared), skip_symbolic_shape=True, skip_optimization=True)
    chosen = list(_large_products(onnx.load(str(prepared)).graph))
    quantize_static(
        str(prepared), str(made), _Calibration(batches),
        quant_format=QuantFormat.QDQ, per_channel=True,
        activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8,
        calibrate_method=CalibrationMethod.MinMax, nodes_to_quantize=chosen,
    )  # fmt: skip
    prepared.unlink()
    made.replace(path)


def _large_products(graph: Any) -> Iterator[str]:
    """Yield the products with a constant weight of which both sides are wide, but not the head."""
    weights = {item.name: list(item.dims) for item in graph.initializer}
    for node in graph.node:
        shape = weights.get(node.input[1], []) if node.op_type in ("MatMul", "Gemm") else []
        if len(shape) == 2 and min(shape) >= _WIDE and "logits" not in node.output:
            yield node.name
