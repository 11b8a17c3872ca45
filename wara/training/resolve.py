"""The config with nothing left to look up: the method's options and learning rate stand in it."""

from __future__ import annotations

from wara.adapters import method_from_options, method_options
from wara.config import RunConfig


def resolve(config: RunConfig) -> RunConfig:
    """Return the same run with the method's defaults written out.

    A `budget` stays as the user wrote it, beside the options it overrides: what it comes to depends
    on the backbone, and the adapter folder holds that.

    Raises:
        WaraErrors: kind "config", when the method or an option does not exist.
    """
    name = config.adapter.method
    method = method_from_options(name, config.adapter.options)
    adapter = {"method": name, **method_options(method)}
    lr = method.lr if config.lr is None else config.lr
    return RunConfig.model_validate({**dict(config), "adapter": adapter, "lr": lr})
