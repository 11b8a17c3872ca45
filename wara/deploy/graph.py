"""The graph of a bundle: logits and features of a batch of any size, in ONNX."""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from wara.adapters import adaptation_of, merge
from wara.adapters.base import AdaptedModule
from wara.adapters.wara import SubbandLayer
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


class FrozenSubbands(nn.Module):
    """What a WaRA or Tiny-WaRA layer computes, with all that no longer changes multiplied out.

    The prefix tokens are one more subband, transformed by the identity: so one product leads into
    the subbands, the cores act there, and one product leads back.

    Args:
        linear: the layer of the base.
        adapter: that is on it.
    """

    analysis: Tensor
    synthesis: Tensor
    core: Tensor
    down: Tensor
    up: Tensor
    shift: Tensor | None

    def __init__(self, linear: nn.Linear, adapter: SubbandLayer) -> None:
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias
        self.split, self.prefix = adapter.split, adapter.prefix_tokens
        same = torch.eye(self.prefix)
        # Units in, columns of the prefix's core out: `[g, r, r]`.
        unit = torch.eye(adapter.rank)[None, :, None].expand(1, -1, adapter.groups, -1)
        skip = adapter.prefix == "skip"
        of_prefix = unit * 0 if skip else adapter.mix_prefix(unit, adapter.cores())
        cores = torch.cat([of_prefix[0].permute(1, 2, 0)[:, None], adapter.full_cores()], 1)
        self.sizes = [self.prefix, *adapter.mixer.sizes]
        diagonal = torch.diagonal(cores, dim1=-2, dim2=-1)
        self.diagonal = bool((torch.diag_embed(diagonal) == cores).all())
        if self.diagonal:  # a gain for each coefficient and channel: `[m, g r]`
            gains = diagonal.transpose(0, 1).flatten(1)
            core = torch.cat([g.expand(n, -1) for g, n in zip(gains, self.sizes, strict=True)])
        else:  # a block per row group: `[s, g r, g r]`, to be multiplied from the right
            core = torch.stack([torch.block_diag(*each).T for each in cores.unbind(1)])
        self.register_buffer("shift", None)
        if adapter.shift is not None:  # as coefficients
            shift = adapter.shift.detach().expand(adapter.mixer.tokens, -1)
            prefix = shift[:1].expand(self.prefix, -1) * (not skip)
            self.shift = torch.cat([prefix, adapter.mixer.analysis @ shift.float()])
        constants = {
            "down": adapter.down.T,
            "up": adapter.scale * adapter.block_up().T,
            "analysis": torch.block_diag(same, adapter.mixer.analysis),
            "synthesis": torch.block_diag(same, adapter.mixer.synthesis),
            "core": core,
        }
        for name, value in constants.items():
            self.register_buffer(name, value.detach().float().contiguous())

    def forward(self, x: Tensor) -> Tensor:
        """Return the layer's output `[b, n, o]` of tokens `[b, n, d]`."""
        gone = self.prefix - self.split(x.shape[1])  # a block of patch tokens alone has no prefix
        sizes = [self.sizes[0] - gone, *self.sizes[1:]]
        z = self.analysis[gone:, gone:] @ (x @ self.down)
        if self.diagonal:
            z = z * self.core[gone:]
        else:
            parts = zip(z.split(sizes, 1), self.core, strict=True)
            z = torch.cat([part @ core for part, core in parts], 1)
        if self.shift is not None:
            z = z + self.shift[gone:]
        update = (self.synthesis[gone:, gone:] @ z) @ self.up
        return nn.functional.linear(x, self.weight, self.bias) + update


def frozen(model: nn.Module) -> nn.Module:
    """Return a copy of a model of `plain` in which adapters of tokens are multiplied out."""
    model = copy.deepcopy(model)
    for name, layer in list(model.named_modules()):
        if isinstance(layer, AdaptedModule) and isinstance(layer.adapter, SubbandLayer):
            model.set_submodule(name, FrozenSubbands(cast(nn.Linear, layer.base), layer.adapter))
    return model


def plain(model: nn.Module) -> tuple[nn.Module, bool]:
    """Return the model that is served, in float32 and evaluation mode, and whether it was merged.

    Where the update of a layer is one of its weights, it is folded into them; what depends on the
    place of a token (WaRA), or acts beside whole modules, stays part of the graph.
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
    served = Served(frozen(model)).eval()
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
    _forget_origin(path)


def _forget_origin(path: Path) -> None:
    """Take notes for debugging out of a graph, in place.

    torch notes for each node the lines of code that it comes from, with the folder that they lie in
    here, which often bears the name of a user.
    """
    import onnx

    model: Any = onnx.load(str(path))
    parts = [model, model.graph, *model.functions]
    for graph in (model.graph, *model.functions):
        parts += [*graph.node, *graph.value_info]
    for part in (*parts, *model.graph.input, *model.graph.output, *model.graph.initializer):
        part.ClearField("metadata_props")
        part.ClearField("doc_string")
    onnx.save(model, str(path))


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

    Static: ranges are those of the batches; weights are symmetric, per channel, and have 7 bits:
    processors without VNNI add pairs of products in 16 bits, which 8 x 8 bits saturate, so that the
    model would say something else there than where it was exported. Products of
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
        quant_format=QuantFormat.QDQ, per_channel=True, reduce_range=True,
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
