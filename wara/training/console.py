"""What the user sees, and `train.log`, which keeps all of it."""

from __future__ import annotations

import logging
import os
import sys
import time
import warnings
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from wara.errors import storage_error
from wara.runs.folder import RunFolder


def silence_libraries() -> None:
    """Keep the training libraries' advice off the terminal; real errors still come as exceptions.

    Lightning and wandb print advertisements, hints on worker counts and the list of accelerators.
    None of it is about the user's run, and it would bury the plan.
    """
    for name in ("pytorch_lightning", "lightning_fabric", "lightning", "torch.distributed"):
        logging.getLogger(name).setLevel(logging.ERROR)
    os.environ.setdefault("WANDB_SILENT", "true")
    for module in ("pytorch_lightning", "lightning_fabric", "torch"):
        warnings.filterwarnings("ignore", module=rf"{module}\..*", category=UserWarning)
        warnings.filterwarnings("ignore", module=rf"{module}\..*", category=FutureWarning)
    # Raised for the frame that called Lightning, so the module filter above does not see it.
    warnings.filterwarnings(
        "ignore", message=r".*(num_workers|litlogger|litmodels|GPU available).*"
    )


class Console:
    """Prints to stdout and keeps a log.

    Args:
        quiet: print only what `final` is given.
        enabled: False on all processes but the first.
    """

    def __init__(self, *, quiet: bool = False, enabled: bool = True) -> None:
        self.quiet, self.enabled = quiet, enabled
        self._waiting: list[str] = []
        self._log: IO[str] | None = None
        self.live: Any = None

    def __enter__(self) -> Console:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def interactive(self) -> bool:
        """Whether a progress bar makes sense."""
        return self.enabled and not self.quiet and sys.stdout.isatty()

    def say(self, text: str = "") -> None:
        """Print a line and log it."""
        self._put(text, show=not self.quiet)

    def final(self, text: str) -> None:
        """Print a line even when quiet, and log it."""
        self._put(text, show=True)

    def plan(self, warnings: list[str], lines: list[str]) -> None:
        """Print a plan; its first lines, the warnings, even when quiet."""
        for line in warnings:
            self.final(line)
        for line in lines[len(warnings) :]:
            self.say(line)

    def result(self, table: list[str], folder: RunFolder, *, synthetic: bool) -> None:
        """Print the table of results and where everything lies."""
        self.say()
        for line in ["on synthetic images:"] * synthetic + table:
            self.final(line)
        self.say()
        self.final(f"report   {folder.report}")
        self.say(f"metrics  {folder.metrics}")
        self.final(f"adapter  {folder.adapter}")
        self.say(f"plots    {folder.plots}")

    def _put(self, text: str, *, show: bool) -> None:
        if not self.enabled:
            return
        if show:
            if self.live is not None:
                self.live.console.print(text, markup=False, highlight=False, soft_wrap=True)
            else:
                print(text, flush=True)
        stamp = time.strftime("%Y-%m-%d %H:%M:%S")
        lines = [f"{stamp}  {line}".rstrip() for line in text.split("\n")]
        if self._log is None:
            self._waiting += lines
        else:
            self._log.write("\n".join(lines) + "\n")
            self._log.flush()

    def log_to(self, path: Path) -> None:
        """Write what was said so far to `path`, and follow on there."""
        if not self.enabled:
            return
        try:
            self._log = open(path, "a", encoding="utf-8")  # noqa: SIM115  (closed in `close`)
            self._log.writelines(f"{line}\n" for line in self._waiting)
            self._log.flush()
        except OSError as error:
            raise storage_error(error, path) from error
        self._waiting = []

    def log_only(self, text: str) -> None:
        """Log without printing."""
        self._put(text, show=False)

    def close(self) -> None:
        """Close the log."""
        if self._log is not None:
            self._log.close()
            self._log = None
