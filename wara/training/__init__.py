"""Training: one run, from a config to a run folder, exact under resume."""

from wara.training.start import run

__all__ = ["run"]
