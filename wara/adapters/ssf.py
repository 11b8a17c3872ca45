"""SSF (arXiv 2210.08823): scale and shift the features behind every operation."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from wara.adapters.base import AdapterLayer, LinearAdapter, options, plain_linear
from wara.adapters.baselines import NORMS
from wara.adapters.bypass import chosen_blocks
from wara.adapters.targets import ALIASES, BlocksMethod
from wara.vit import block_names

LINEARS = frozenset(name for names in ALIASES.values() for name in names)


def scaled(y: Tensor, gamma: Tensor, beta: Tensor | None, dim: int = -1) -> Tensor:
    """Return `γ ⊙ y + β` along an axis of `y`, in its precision."""
    shape = [1] * y.ndim
    shape[dim] = -1
    y = y * gamma.to(y.dtype).reshape(shape)
    return y if beta is None else y + beta.to(y.dtype).reshape(shape)


def start(layer: Any, size: int, shifted: bool) -> None:
    """Give a layer its scale at 1 and, where it is shifted, its shift at 0."""
    layer.gamma = nn.Parameter(torch.ones(size))
    layer.register_parameter("beta", nn.Parameter(torch.zeros(size)) if shifted else None)


class ScaledLinear(LinearAdapter):
    """`y = γ ⊙ (x W0ᵀ + b0) + β`, which is `W = diag(γ) W0`, `b = γ ⊙ b0 + β`.

    There is a shift where the layer has a bias that can take it.

    Args:
        linear: the layer, `o` wide out.
    """

    gamma: Tensor
    beta: Tensor | None

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__([(0, linear.out_features)], linear.out_features)
        start(self, linear.out_features, linear.bias is not None)

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Return `[b, n, o]` for input `[b, n, d]`."""
        return scaled(F.linear(x, weight, bias), self.gamma, self.beta)

    @torch.no_grad()
    def merged(self, base: nn.Module) -> nn.Module:
        """Return a linear layer with scale and shift in its weight and bias."""
        linear: Any = base
        weight = scaled(linear.weight.detach(), self.gamma, None, 0)
        bias = linear.bias
        return plain_linear(weight, bias if bias is None else scaled(bias, self.gamma, self.beta))


class ScaledModule(AdapterLayer):
    """`y = γ ⊙ f(x) + β` for a normalisation (features last) or a convolution (features second).

    There is a shift where the module has a bias that can take it.

    Args:
        module: with a weight, and features along the first axis of it.
    """

    gamma: Tensor
    beta: Tensor | None

    def __init__(self, module: Any) -> None:
        super().__init__()
        self.dim = 1 if isinstance(module, nn.Conv2d) else -1
        start(self, module.weight.shape[0], getattr(module, "bias", None) is not None)

    def forward(self, base: nn.Module, x: Tensor) -> Tensor:
        """Return the module's output, scaled and shifted."""
        return scaled(base(x), self.gamma, self.beta, self.dim)

    @torch.no_grad()
    def merged(self, base: nn.Module) -> nn.Module:
        """Return a module with scale and shift in its weight and bias."""
        plain: Any = copy.deepcopy(base)
        plain.weight.copy_(scaled(plain.weight, self.gamma, None, 0))
        if self.beta is not None:
            plain.bias.copy_(scaled(plain.bias, self.gamma, self.beta))
        return plain


@options
class SSF(BlocksMethod):
    """SSF (arXiv 2210.08823): `y = γ ⊙ f(x) + β` behind every operation `f` of the base.

    These are the patch embedding, each normalisation and linear layer of a block, and the last
    normalisation. All start at `γ = 1`, `β = 0`, where the paper draws `N(1, 0.02)` and
    `N(0, 0.02)`: so the adapted model starts as the base. A module without a bias is scaled and not
    shifted, and one without a weight is left alone, so that what was trained can always be merged.
    With some of the blocks alone, the patch embedding stays as it is.
    """

    name: ClassVar[str] = "ssf"
    summary: ClassVar[str] = "scale and shift behind every normalisation and linear layer"
    rates: ClassVar[Mapping[str, float]] = {"adapter": 2e-2, "head": 2e-3}

    def layers(self, model: nn.Module) -> Mapping[str, AdapterLayer]:
        """Return one layer per operation."""
        found: dict[str, AdapterLayer] = {}
        for path in self._paths(model):
            module = model.get_submodule(path)
            if isinstance(module, nn.Linear):
                found[path] = ScaledLinear(module)
            else:
                found[path] = ScaledModule(module)
        return found

    def _paths(self, model: nn.Module) -> Iterator[str]:
        chosen = chosen_blocks(model, self.blocks)
        if len(chosen) == len(block_names(model)):
            yield from _weighted(model, "patch_embed", "proj", "norm")
            yield from _weighted(model, "", "norm_pre")
        for block in chosen:
            for path, module in model.get_submodule(block).named_modules():
                norm = isinstance(module, NORMS) and "." not in path and module.weight is not None
                if norm or isinstance(module, nn.Linear) and path.rpartition(".")[2] in LINEARS:
                    yield f"{block}.{path}"
        yield from _weighted(model, "", "norm", "fc_norm")


def _weighted(model: nn.Module, parent: str, *names: str) -> Iterator[str]:
    """Yield the paths of those children that are a norm, a linear layer or a convolution."""
    children = dict(model.get_submodule(parent).named_children())
    for name in names:
        module: Any = children.get(name)
        if isinstance(module, (*NORMS, nn.Linear, nn.Conv2d)) and module.weight is not None:
            yield f"{parent}.{name}" if parent else name
