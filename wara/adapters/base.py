"""What a method and an adapted layer are.

A *method* is a small frozen dataclass of options. It changes a model in place (`prepare`) and
declares by type what trains: every parameter of an `AdapterLayer`, plus the base parameters for
which `trains` answers yes. Freezing, counting, optimising and saving follow from that.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from wara.errors import WaraError

Rows = tuple[int, int]


class AdapterLayer(nn.Module):
    """The trainable part that sits on one linear layer.

    All its parameters train. All its persistent buffers are saved.

    Args:
        rows: ranges `[start, stop)` of the output rows it updates, one per target; a fused
            query-key-value layer with all three adapted has three.
        out_features: rows of the linear layer.
    """

    core_names: ClassVar[frozenset[str]] = frozenset()
    """Names of the parameters that take the learning rate of the cores."""

    def __init__(self, rows: Sequence[Rows], out_features: int) -> None:
        super().__init__()
        self.rows = tuple((int(start), int(stop)) for start, stop in rows)
        self.out_features = out_features

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Return the output `[b, n, o]` of the layer with its update, for input `[b, n, d]`."""
        raise TypeError(f"{type(self).__name__} does not define forward")

    def attach(self, linear: AdaptedLinear) -> None:
        """Take note of the layer it now sits on; most adapters need not know it."""

    def refresh(self) -> None:
        """Recompute what follows from saved tensors, after these were loaded."""


class WeightDomainLayer(AdapterLayer):
    """An adapter whose update is a change of the weight, so it can be merged."""

    def delta_weight(self) -> Tensor:
        """Return `λ ΔW`, shape `[o, d]`, zero in rows that are not adapted."""
        raise TypeError(f"{type(self).__name__} does not define delta_weight")


class TokenDomainLayer(AdapterLayer):
    """An adapter whose update depends on where a token lies, so it has no `delta_weight`."""

    def merged_weight(self) -> Tensor | None:
        """Return the equal change of weight `[o, d]` when there happens to be one, else `None`."""
        return None


class LowRankLayer(AdapterLayer):
    """Shared arithmetic of the low-rank adapters: `y = x W0ᵀ + b0 + scale · mix(x Aᵀ) Bᵀ`.

    Row groups are handled together: `A` holds the factors of all groups `[g r, d]`, and `B` is
    applied as one block-diagonal matrix. With ranks this small the product is bound by reading
    the activations, which this way are read once.

    Args:
        rows: adapted row ranges, `g` of them.
        in_features: width in, `d`.
        out_features: width out, `o`.
        rank: `r` per group.
        scale: `α / r`.
        dropout: probability of dropping an input entry on the adapter's path.
    """

    down: Tensor
    up: Tensor

    def __init__(
        self,
        rows: Sequence[Rows],
        in_features: int,
        out_features: int,
        *,
        rank: int,
        scale: float,
        dropout: float = 0.0,
    ) -> None:
        super().__init__(rows, out_features)
        self.in_features = in_features
        self.rank = rank
        self.scale = scale
        self.dropout = nn.Dropout(dropout) if dropout else None
        self.sizes = [stop - start for start, stop in self.rows]

    @property
    def groups(self) -> int:
        """Number of adapted row groups."""
        return len(self.rows)

    def block_up(self) -> Tensor:
        """Return `B` of all groups as one matrix `[o, g r]`, zero outside its blocks."""
        blocks = self.up.split(self.sizes)
        if self.groups == 1 and self.sizes[0] == self.out_features:
            return self.up
        out = self.up.new_zeros(self.out_features, self.groups * self.rank)
        for i, ((start, stop), block) in enumerate(zip(self.rows, blocks, strict=True)):
            out[start:stop, i * self.rank : (i + 1) * self.rank] = block
        return out

    def mix(self, z: Tensor) -> Tensor:
        """Update `[…, g r]` in rank space; plain low rank leaves it alone."""
        return z

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Return `[b, n, o]` for input `[b, n, d]`; see the class."""
        # Flat rows, so that the output is a tensor of its own and not a view: the update can
        # then be added in place by the product itself, without a pass of its own over [b, n, o].
        flat = x.reshape(-1, x.shape[-1])
        y = F.linear(flat, weight, bias)
        path = flat if self.dropout is None else self.dropout(flat)
        z = F.linear(path, self.down)
        z = self.mix(z.reshape(*x.shape[:-1], -1)).reshape(flat.shape[0], -1)
        y = y.addmm_(z.to(y.dtype), self.block_up().T.to(y.dtype), alpha=self.scale)
        return y.reshape(*x.shape[:-1], self.out_features)

    def product(self, middle: Tensor | None = None) -> Tensor:
        """Return `scale · B M A`, `[o, d]`, with `M` `[g, r, r]` between, or nothing."""
        down = self.down.reshape(self.groups, self.rank, self.in_features)
        if middle is not None:
            down = middle.to(down.dtype) @ down
        out = self.down.new_zeros(self.out_features, self.in_features)
        for (start, stop), up, factor in zip(
            self.rows, self.up.split(self.sizes), down, strict=True
        ):
            out[start:stop] = up @ factor
        return self.scale * out


class AdaptedLinear(nn.Linear):
    """A linear layer with an adapter on it.

    It takes over the weight and bias of the layer it replaces, under the same names, so the base
    part of a state dict does not change.

    Args:
        base: the frozen linear layer.
        adapter: the update; it must answer to the rows of `base`.
    """

    adapter: AdapterLayer

    def __init__(self, base: nn.Linear, adapter: AdapterLayer) -> None:
        nn.Module.__init__(self)
        self.in_features = base.in_features
        self.out_features = base.out_features
        self.weight = base.weight
        self.bias = base.bias
        self.training = base.training
        self.adapter = adapter.train(base.training)
        adapter.attach(self)

    def forward(self, x: Tensor) -> Tensor:
        """Return the adapted output `[…, o]` for input `[…, d]`."""
        return self.adapter(x, self.weight, self.bias)

    def plain(self) -> nn.Linear:
        """Return a linear layer without the adapter that holds the same weight and bias."""
        return plain_linear(self.weight, self.bias)


def plain_linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """Return a linear layer that holds the given tensors.

    Args:
        weight: `[o, d]`; a parameter is taken as it is, not copied.
        bias: `[o]` or none.

    Returns:
        The layer.
    """
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    layer.weight = weight if isinstance(weight, nn.Parameter) else nn.Parameter(weight)
    if bias is not None:
        layer.bias = bias if isinstance(bias, nn.Parameter) else nn.Parameter(bias)
    return layer


@dataclass(frozen=True, kw_only=True)
class Method:
    """Options of a fine-tuning method. One subclass per method; the class is the registry entry.

    The fields are the keys that a config may set under `adapter:`.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    lr: ClassVar[float] = 2e-3
    """Peak learning rate of AdamW that suits it, see docs/methods.md."""
    mergeable: ClassVar[bool] = True
    """Whether a trained model can always be merged into a plain one."""
    reversible: ClassVar[bool] = False
    """Whether the base parameters that train are few enough to keep a copy of, for `unload`."""

    def prepare(self, model: nn.Module) -> None:
        """Put the adapter layers into `model`, in place."""

    def trains(self, name: str, owner: nn.Module) -> bool:
        """Tell whether the base parameter `name`, which `owner` holds, trains."""
        return False

    def penalty(self, model: nn.Module) -> Tensor | None:
        """Return a term to add to the loss of every training step, or none.

        Args:
            model: the adapted model.
        """
        return None

    def on_step(self, model: nn.Module, step: int, total_steps: int) -> None:
        """Act after an optimiser step, while the gradients of that step are still there.

        Args:
            model: the adapted model.
            step: optimiser steps done, from 1.
            total_steps: optimiser steps of the whole training.
        """

    def training_state(self, model: nn.Module) -> dict[str, Tensor]:
        """Return what `on_step` carries from step to step, for a checkpoint to resume from."""
        return {}

    def load_training_state(self, model: nn.Module, state: dict[str, Tensor]) -> None:
        """Go on from what `training_state` returned; an empty state starts afresh."""


def require(condition: bool, what: str, key: str, remedy: str) -> None:
    """Raise a config refusal unless `condition` holds.

    Args:
        condition: what must be true.
        what: what is wrong otherwise.
        key: option of `adapter:` it is about.
        remedy: what to set.

    Raises:
        WaraError: kind `config`.
    """
    if not condition:
        raise WaraError("config", what, f"adapter.{key}", remedy)


def check_rank(rank: int) -> None:
    """Refuse a rank that is not a positive integer.

    Args:
        rank: the wanted rank.

    Raises:
        WaraError: kind `config`.
    """
    whole = isinstance(rank, int) and not isinstance(rank, bool)
    require(whole and rank >= 1, f"rank is {rank!r}", "rank", "set an integer of at least 1")


def identity_cores(groups: int, subbands: int, rank: int, core: str) -> Tensor:
    """Return cores `K_s = I` in the wanted form.

    Args:
        groups: adapted row groups, `g`.
        subbands: `s`.
        rank: `r`.
        core: `scalar`, `diag` or `full`.

    Returns:
        Ones `[g, s]` or `[g, s, r]`, or identities `[g, s, r, r]`.
    """
    if core == "scalar":
        return torch.ones(groups, subbands)
    if core == "diag":
        return torch.ones(groups, subbands, rank)
    return torch.eye(rank).repeat(groups, subbands, 1, 1)
