"""A run as a folder: its layout and lock, its record, its tables, and how to have it back."""

from wara.runs.folder import RunFolder
from wara.runs.load import Run, load_run

__all__ = ["Run", "RunFolder", "load_run"]
