"""What a method, an adapter layer and an adapted module are.

A *method* is one validated, frozen object. It knows its options, its size and its learning rates,
and returns adapter layers by the path of the module each sits on; `wara.adapt` puts them there.
What trains is declared by type: every parameter of an `AdapterLayer`, plus the base parameters for
which `trains` answers yes. Freezing, counting, optimising and saving follow from that.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar, Self, TypeVar, dataclass_transform

import pydantic
import torch
from pydantic import Field, ValidationError
from pydantic_core import ArgsKwargs
from torch import Tensor, nn

from wara.errors import WaraError, WaraErrors
from wara.schema import STRICT, fault, faults_of
from wara.vit import plain_name, unwrap

Rows = tuple[int, int]


class AdapterLayer(nn.Module):
    """The trainable part that sits on one module of the base.

    Its `forward(base, *inputs)` returns what the adapted module gives, for a base module and its
    inputs. All its parameters train. All its persistent buffers are saved; those that are not
    persistent must follow from the options, or from the saved ones in `refresh`.
    """

    core_names: ClassVar[frozenset[str]] = frozenset()
    """Names of the parameters that take the learning rate of the cores."""

    def merged(self, base: nn.Module) -> nn.Module | None:
        """Return a plain module that computes the same, `None` when there is none.

        Args:
            base: the module it sits on; it must not be changed.
        """
        return None

    def settings(self, base: nn.Module) -> Iterable[tuple[str, str, Any]]:
        """Return attributes within the base module that have to be others while it is on.

        Args:
            base: the module it is put on; `adapt` sets them, and `unload` and `merge` set them
                back.

        Returns:
            Path below the module, name and value of each.
        """
        return ()

    def attach(self, module: nn.Module) -> None:
        """Take note of the adapted module it now belongs to; most adapters need not know it."""

    def refresh(self) -> None:
        """Recompute what follows from saved tensors, after these were loaded."""


class LinearAdapter(AdapterLayer):
    """An adapter on a linear layer, or on some of its output rows.

    Args:
        rows: ranges `[start, stop)` of the output rows it updates, one per target; a fused
            query-key-value layer with all three adapted has three.
        out_features: rows of the linear layer.
    """

    def __init__(self, rows: Sequence[Rows], out_features: int) -> None:
        super().__init__()
        self.rows = tuple((int(start), int(stop)) for start, stop in rows)
        self.out_features = out_features

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Return the output `[b, n, o]` of the layer with its update, for input `[b, n, d]`."""
        raise TypeError(f"{type(self).__name__} does not define forward")

    def merged_weight(self) -> Tensor | None:
        """Return the change of weight `[o, d]` that it amounts to, `None` when there is none."""
        return None

    @torch.no_grad()
    def merged(self, base: nn.Module) -> nn.Module | None:
        """Return a linear layer with the update in its weight, `None` when none can hold it."""
        delta = self.merged_weight()
        if delta is None:
            return None
        linear: Any = base
        weight = nn.Parameter(linear.weight.detach() + delta.to(linear.weight.dtype))
        return plain_linear(weight, linear.bias)


class WeightDomainLayer(LinearAdapter):
    """An adapter whose update is a change of the weight, so it can be merged."""

    def delta_weight(self) -> Tensor:
        """Return `λ ΔW`, shape `[o, d]`, zero in rows that are not adapted."""
        raise TypeError(f"{type(self).__name__} does not define delta_weight")

    def merged_weight(self) -> Tensor | None:
        """Return `λ ΔW`."""
        return self.delta_weight()


class TokenDomainLayer(LinearAdapter):
    """An adapter whose update depends on where a token lies, so it has no `delta_weight`."""


class AdaptedModule(nn.Module):
    """A module of the base with an adapter on it, in the place of the module.

    It holds the base module's own parameters, buffers and children under their own names, and the
    adapter as one more child. So no name in a state dict changes, and the base module is as it was
    once the adapter is taken off.

    Args:
        base: the module.
        adapter: what is called in its stead.
    """

    adapter: AdapterLayer

    def __init__(self, base: nn.Module, adapter: AdapterLayer) -> None:
        nn.Module.__init__(self)
        for table in ("_parameters", "_buffers", "_non_persistent_buffers_set"):
            self.__dict__[table] = base.__dict__[table]
        # In a tuple, so that it does not become a child of itself.
        self._base = (base,)
        self._modules.update(base._modules)
        self.training = base.training
        self.adapter = adapter.train(base.training)
        adapter.attach(self)

    @property
    def base(self) -> nn.Module:
        """The module without its adapter; they share everything else."""
        return self._base[0]

    def __setattr__(self, name: str, value: Any) -> None:
        own = "_base" not in self.__dict__ or name == "adapter" or name in self.__dict__
        if own or hasattr(nn.Module, name):
            super().__setattr__(name, value)
            return
        # Meant for the module: a switch that its own forward reads, an adapter on a child of it.
        if isinstance(value, nn.Module) or name in self._modules:
            super().__setattr__(name, value)
        setattr(self.base, name, value)

    def train(self, mode: bool = True) -> Self:
        """Set training or evaluation mode."""
        super().train(mode)
        self.base.training = mode
        return self

    def forward(self, *inputs: Any, **named: Any) -> Any:
        """Return what the adapter makes of the base module and the inputs."""
        return self.adapter(self.base, *inputs, **named)

    def __getattr__(self, name: str) -> Any:
        # timm asks modules for what they are, such as `patch_embed.grid_size`.
        for table in ("_parameters", "_buffers", "_modules"):
            if name in self.__dict__.get(table, ()):
                return self.__dict__[table][name]
        if "_base" not in self.__dict__:
            raise AttributeError(name)
        return getattr(self.__dict__["_base"][0], name)


class AdaptedLinear(AdaptedModule, nn.Linear):
    """A linear layer with an adapter on it."""

    adapter: LinearAdapter

    def __init__(self, base: nn.Linear, adapter: LinearAdapter) -> None:
        AdaptedModule.__init__(self, base, adapter)

    def forward(self, x: Tensor) -> Tensor:
        """Return the adapted output `[…, o]` for input `[…, d]`."""
        return self.adapter(x, self.weight, self.bias)


def adapted_layers(model: nn.Module) -> dict[str, AdaptedLinear]:
    """Return the adapted linear layers of a model by their dotted path.

    Args:
        model: any model, compiled or not.

    Returns:
        Plain paths and layers in the model's order; empty when nothing is adapted.
    """
    every = unwrap(model).named_modules()
    return {plain_name(name): m for name, m in every if isinstance(m, AdaptedLinear)}


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


def is_skeleton() -> bool:
    """Whether layers are being built for their shapes alone, under `torch.device("meta")`.

    So are those that are counted for a budget, and those whose tensors come from a file.
    """
    return torch.get_default_device().type == "meta"


class _Refusing(type):
    """Turns what pydantic says of wrong options into refusals, where a method is made in Python."""

    def __call__(cls, *args: Any, **options: Any) -> Any:
        try:
            return super().__call__(*args, **options)
        except ValidationError as error:
            raise WaraErrors(list(option_faults(error, cls).values())) from error


def option_faults(error: ValidationError, method: Any, **shown: Any) -> dict[Any, WaraError]:
    """Return what is wrong with the options of a method, as `faults_of` does."""
    return faults_of(error, method, prefix=("adapter",), **shown)


Class = TypeVar("Class", bound=type)
_OPTIONS: Any = {key: value for key, value in STRICT.items() if key != "frozen"}


@dataclass_transform(kw_only_default=True, frozen_default=True, field_specifiers=(Field,))
def options(cls: Class) -> Class:
    """Make a class of options: frozen, checked when made, each field with a sentence.

    A field is written `name: type = Field(default, ge=1, description="A sentence.")`.
    """
    return pydantic.dataclasses.dataclass(frozen=True, kw_only=True, config=_OPTIONS)(cls)  # type: ignore[return-value]


@options
class Method(metaclass=_Refusing):
    """A fine-tuning method with its options. One subclass per method, decorated with `options`.

    The fields are the keys that a config may set under `adapter:`.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    """What trains, in a few words."""
    rates: ClassVar[Mapping[str, float]] = {"adapter": 2e-3, "head": 2e-3}
    """Peak learning rate of AdamW for each of `adapter`, `core` and `head` that trains, see
    docs/methods.md. The first is the one that `lr` sets."""
    knob: ClassVar[tuple[str, ...]] = ()
    """Options that a budget turns, the one that counts first; none where the size is fixed."""
    mergeable: ClassVar[bool] = True
    """Whether a trained model can always be merged into a plain one."""
    reversible: ClassVar[bool] = False
    """Whether the base parameters that train are few enough to keep a copy of, for `unload`."""

    def learning_rates(self) -> Mapping[str, float]:
        """Return those of `rates` whose parameters train under these options."""
        return self.rates

    def layers(self, model: nn.Module) -> Mapping[str, AdapterLayer]:
        """Return the adapter layers by the dotted path of the module each sits on.

        Called under `torch.device("meta")` for shapes alone; see `is_skeleton`.

        Args:
            model: the base; it must not be changed.
        """
        return {}

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

    def options(self) -> dict[str, Any]:
        """Return the options as plain values that JSON and YAML can hold.

        What a budget turns is left out while one is set: it is not decided yet.
        """
        plain = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        if plain.get("budget") is not None:
            plain = {key: value for key, value in plain.items() if key not in self.knob}
        return {key: list(v) if isinstance(v, tuple) else v for key, v in plain.items()}


def one_size(knob: Sequence[str], given: Any) -> Any:
    """Refuse a size that stands beside a budget, which would decide it too.

    Args:
        knob: options that the budget turns; beside a budget null leaves one to it.
        given: what a validator before validation gets: a mapping or arguments.

    Returns:
        The same, without options that a budget decides.
    """
    named: Any = given.kwargs if isinstance(given, ArgsKwargs) else given
    if not isinstance(named, Mapping) or named.get("budget") is None:
        return given
    for key in knob:
        if named.get(key) is not None:
            raise fault(f"{key} and budget are both set", "set one of the two", "budget")
    kept = {key: value for key, value in named.items() if key not in knob}
    return ArgsKwargs(given.args, kept) if isinstance(given, ArgsKwargs) else kept


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
