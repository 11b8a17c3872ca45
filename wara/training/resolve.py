"""The config with nothing left to look up: every option of the method stands in it."""

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
    method = config.adapter.method
    options = method_options(method_from_options(method, config.adapter.options))
    adapter = {"method": method, **options}
    return RunConfig.model_validate({**dict(config), "adapter": adapter})
