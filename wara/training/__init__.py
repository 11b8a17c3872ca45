"""Training: one run, from a config to a run folder, exact under resume."""

from wara.training.run import run

__all__ = ["run"]
