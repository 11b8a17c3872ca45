"""A method of a user's own that needs more memory than there is, for the tests of that."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from wara.adapters import AdapterLayer, Method, options
from wara.vit import block_names


class Memory:
    """What there is. A pass needs as much as it has images."""

    images: ClassVar[float] = float("inf")
    in_backward: ClassVar[bool] = False
    only_training: ClassVar[bool] = True
    free_passes: ClassVar[int] = 0

    @classmethod
    def take(cls, images: int) -> None:
        cls.free_passes -= 1
        if cls.free_passes < 0 and images > cls.images:
            raise torch.OutOfMemoryError(f"CUDA out of memory. Tried to allocate {images} images")


class _Costly(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        Memory.take(len(grad))
        return grad


class GreedyLayer(AdapterLayer):
    """`y = γ ⊙ norm(x)`, where memory lasts."""

    def __init__(self, width: int, rate: float) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(width))
        self.drop = nn.Dropout(rate)

    def forward(self, base: nn.Module, x: Tensor) -> Tensor:
        if not Memory.in_backward and (torch.is_grad_enabled() or not Memory.only_training):
            Memory.take(len(x))
        y = self.drop(base(x) * self.gamma)
        # Going back, the head has its gradient by then.
        return _Costly.apply(y) if Memory.in_backward else y


@options
class Greedy(Method):
    """Scale what the first norm of the last block gives."""

    name: ClassVar[str] = "greedy"
    summary: ClassVar[str] = "a scale after the first norm of the last block"
    rates: ClassVar[Mapping[str, float]] = {"adapter": 2e-2, "head": 2e-3}

    dropout: float = Field(0.0, ge=0, lt=1, description="Share of the outputs that are dropped.")
    numbers: int = Field(1, ge=1, description="Numbers to make room for at the start.")

    def layers(self, model: nn.Module) -> Mapping[str, AdapterLayer]:
        torch.empty(self.numbers)
        return {f"{block_names(model)[-1]}.norm1": GreedyLayer(model.embed_dim, self.dropout)}
