"""Layers of Hugging Face PEFT as adapter layers of this package.

PEFT builds its layers around `nn.Linear`. Here it is given, for each adapted matrix, a stand-in
that has no weights of its own and looks at rows of the frozen layer. What PEFT makes of it is held
by one `PeftLayer` per linear layer, so that freezing, counting, saving, merging and taking off are
the same as for every other method.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from wara.adapters.base import Rows, WeightDomainLayer
from wara.adapters.targets import Target
from wara.errors import WaraError

ADAPTER = "default"
"""The name under which PEFT files the one adapter of a layer."""


def peft_library() -> ModuleType:
    """Return the PEFT library, which takes seconds to import and is optional.

    Raises:
        WaraError: kind `config`, with the install line, when it is not there.
    """
    try:
        import peft
    except ImportError as error:
        what = f"this method needs Hugging Face PEFT, which does not import ({error})"
        raise WaraError(
            "config", what, "adapter.method", "pip install 'wara[baselines]'"
        ) from error
    return peft


class BorrowedRows(nn.Linear):
    """Rows of a frozen linear layer as a layer of its own, without a copy of them.

    Args:
        linear: the frozen layer.
        rows: `[start, stop)` of its output rows.
    """

    def __init__(self, linear: nn.Linear, rows: Rows) -> None:
        nn.Module.__init__(self)
        self.rows = rows
        self.in_features = linear.in_features
        self.out_features = rows[1] - rows[0]
        self.whole = self.out_features == linear.out_features
        self.lend(linear)

    def lend(self, linear: nn.Linear) -> None:
        """Look at another layer from now on."""
        # In a tuple, so that it does not become a child with parameters of its own.
        self.lender = (linear,)

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The rows of the weight, `[stop - start, d]`."""
        weight = self.lender[0].weight.detach()  # PEFT freezes what it is given; it is frozen.
        return weight if self.whole else weight[slice(*self.rows)]

    @property
    def bias(self) -> Tensor | None:  # type: ignore[override]
        """The rows of the bias, `[stop - start]`, if the layer has one."""
        bias = self.lender[0].bias
        if bias is None:
            return None
        return bias.detach() if self.whole else bias.detach()[slice(*self.rows)]


class PeftLayer(WeightDomainLayer):
    """One PEFT layer per adapted row group of a linear layer.

    Args:
        target: the linear layer and its row groups.
        tuners: what PEFT built on the `BorrowedRows` of each group.
        draws: whether they draw at random in training. LoHa and LoKr draw a number per step for a
            dropout that is off; kept in evaluation mode, they do the same and leave the run's
            random numbers alone.
    """

    def __init__(self, target: Target, tuners: list[nn.Module], *, draws: bool) -> None:
        super().__init__(target.rows, target.linear.out_features)
        self.tuners = nn.ModuleList(tuners)
        self.draws = draws
        # What each stretch of output rows comes from: a tuner, or the frozen layer alone.
        self.stretches: list[tuple[Rows, int | None]] = []
        done = 0
        for i, (start, stop) in enumerate(self.rows):
            if done < start:
                self.stretches.append(((done, start), None))
            self.stretches.append(((start, stop), i))
            done = stop
        if done < self.out_features:
            self.stretches.append(((done, self.out_features), None))
        self.train(self.training)

    def attach(self, module: nn.Module) -> None:
        """Let the tuners see the layer that now holds the weight."""
        assert isinstance(module, nn.Linear)
        for part in self.modules():
            if isinstance(part, BorrowedRows):
                part.lend(module)

    def train(self, mode: bool = True) -> PeftLayer:
        """Set training or evaluation mode; see `draws`."""
        super().train(mode)
        if not self.draws:
            self.tuners.train(False)
        return self

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Return `[b, n, o]` for input `[b, n, d]`, as PEFT computes it on each row group."""
        if len(self.stretches) == 1:
            return self.tuners[0](x)
        parts = []
        for (start, stop), tuner in self.stretches:
            if tuner is None:
                rest = None if bias is None else bias[start:stop]
                parts.append(F.linear(x, weight[start:stop], rest))
            else:
                parts.append(self.tuners[tuner](x))
        # PEFT returns the type of its input, which under autocast is wider than that of a layer.
        return torch.cat([part.to(parts[0].dtype) for part in parts], dim=-1)

    def delta_weight(self) -> Tensor:
        """Return the change of weight `[o, d]`, zero in rows that are not adapted."""
        deltas = [self.group_delta(tuner) for tuner in self.tuners]
        out = deltas[0].new_zeros(self.out_features, deltas[0].shape[1])
        for (start, stop), delta in zip(self.rows, deltas, strict=True):
            out[start:stop] = delta
        return out

    def group_delta(self, tuner: Any) -> Tensor:
        """Return the change of weight that one tuner makes to its rows."""
        return tuner.get_delta_weight(ADAPTER)


class DoRALayer(PeftLayer):
    """DoRA: a magnitude per row times the direction of `W0 + ΔW`."""

    def group_delta(self, tuner: Any) -> Tensor:
        """Return `m (W0 + ΔW) / ‖W0 + ΔW‖ - W0`, rows normed as in PEFT's forward."""
        weight, delta = tuner.get_base_layer().weight, tuner.get_delta_weight(ADAPTER)
        magnitude = tuner.lora_magnitude_vector[ADAPTER]
        norm = magnitude.get_weight_norm(weight, delta, scaling=1)
        return (magnitude.weight / norm)[:, None] * (weight + delta) - weight


class FourierFTLayer(PeftLayer):
    """FourierFT, with the places of its coefficients stored and not redrawn."""

    def __init__(self, target: Target, tuners: list[nn.Module], *, draws: bool) -> None:
        super().__init__(target, tuners, draws=draws)
        for tuner in tuners:
            tuner.indices = Stored(**tuner.indices)  # type: ignore[arg-type]


class Stored(nn.Module):
    """Buffers that are looked up by name, as PEFT looks up what it keeps in dicts."""

    def __init__(self, **tensors: Tensor) -> None:
        super().__init__()
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor)

    def __getitem__(self, name: str) -> Tensor:
        return self.get_buffer(name)


class AdaLoRALayer(PeftLayer):
    """AdaLoRA: `ΔW = B diag(e) A`, with entries of `e` set to zero as ranks are taken away.

    Args:
        target: the linear layer and its row groups.
        tuners: what PEFT built on the `BorrowedRows` of each group.
        allocation: decides which ranks go; one for all layers of a model.
        draws: see `PeftLayer`.
    """

    def __init__(
        self, target: Target, tuners: list[Any], *, allocation: Allocation, draws: bool
    ) -> None:
        super().__init__(target, tuners, draws=draws)
        self.allocation = allocation
        for tuner in tuners:
            # The rank at the start: a constant of the scale that PEFT registers as a parameter.
            start = {ADAPTER: float(tuner.r[ADAPTER])}
            del tuner.ranknum
            tuner.ranknum = start


class Allocation:
    """PEFT's rank allocator for one model, told the length of training as it goes.

    Args:
        tuner: PEFT's `AdaLoraModel` around all layers of the model.
    """

    def __init__(self, tuner: Any) -> None:
        self.tuner = tuner
        self.config = tuner.peft_config[ADAPTER]
        self.allocator = tuner.rankallocator

    def step(self, step: int, total_steps: int, *, start: float, end: float) -> None:
        """Weigh every rank by its gradient, and take away the least important.

        Args:
            step: optimiser steps done, from 1.
            total_steps: of the whole training.
            start: share of the steps before ranks begin to fall.
            end: share of the steps after the last has fallen.
        """
        if total_steps < 2:
            return  # One step measures the importances, another takes ranks away.
        self.config.total_step = total_steps
        self.config.tfinal = min(int(total_steps * end), total_steps - 2)
        self.config.tinit = min(int(total_steps * start), total_steps - self.config.tfinal - 1)
        self._follow()
        # On a GPU torch refuses `kthvalue` where determinism is asked for, because which of several
        # equal numbers it names is not fixed; the allocator takes its value, which is.
        strict = torch.are_deterministic_algorithms_enabled()
        warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
        torch.use_deterministic_algorithms(False)
        try:
            self.tuner.update_and_allocate(step)
        finally:
            torch.use_deterministic_algorithms(strict, warn_only=warn_only)

    def state(self) -> dict[str, Tensor]:
        """Return running means of importances and the ranks kept, by a name of each."""
        state = {f"importance/{n}": t for n, t in self.allocator.exp_avg_ipt.items()}
        state |= {f"uncertainty/{n}": t for n, t in self.allocator.exp_avg_unc.items()}
        pattern = self.config.rank_pattern or {}
        return state | {f"kept/{n}": torch.tensor(kept) for n, kept in pattern.items()}

    def load(self, state: dict[str, Tensor]) -> None:
        """Go on from what `state` returned."""
        kinds: dict[str, dict[str, Tensor]] = {"importance": {}, "uncertainty": {}, "kept": {}}
        for key, tensor in state.items():
            kind, _, name = key.partition("/")
            kinds[kind][name] = tensor
        self.allocator.exp_avg_ipt = kinds["importance"]
        self.allocator.exp_avg_unc = kinds["uncertainty"]
        # Written anew in each step; its names tell PEFT that the means are there already.
        self.allocator.ipt = {n: torch.zeros_like(t) for n, t in kinds["importance"].items()}
        self.config.rank_pattern = {n: t.tolist() for n, t in kinds["kept"].items()} or None

    def _follow(self) -> None:
        """Move the running means to where the model has gone since they were loaded."""
        means = (self.allocator.ipt, self.allocator.exp_avg_ipt, self.allocator.exp_avg_unc)
        for name, parameter in self.tuner.model.named_parameters():
            for held in means:
                if name in held:
                    held[name] = held[name].to(parameter.device)
