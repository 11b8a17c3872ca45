"""What is seen while a comparison goes on: a live table on a terminal, else a line per cell."""

from __future__ import annotations

import sys
import time
from collections import Counter
from types import TracebackType
from typing import Any

from wara.compare.worker import Job, Outcome


class Board:
    """Counts cells and guesses the time left from those that are done.

    Args:
        title: of what is counted.
        places: label of each job's row -> number of its jobs, those that are done included.
        at_once: jobs that run at the same time.
    """

    def __init__(self, title: str, places: Counter[str], at_once: int) -> None:
        self.title, self.total, self.at_once = title, places, at_once
        self.done: Counter[str] = Counter()
        self.failed: Counter[str] = Counter()
        self.spent: dict[str, list[float]] = {}
        self.latest: dict[str, str] = {}
        self.began = time.monotonic()
        self._live: Any = None

    def __enter__(self) -> Board:
        if sys.stdout.isatty():
            from rich.console import Console
            from rich.live import Live

            # The file by name: a worker in this process turns `sys.stdout` elsewhere for a while.
            console = Console(file=sys.stdout)
            self._live = Live(get_renderable=self._table, console=console, refresh_per_second=1)
            self._live.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._live is not None:
            self._live.__exit__(kind, error, trace)
            self._live = None

    def say(self, text: str) -> None:
        """Print a line."""
        if self._live is not None:
            self._live.console.print(text, markup=False, highlight=False, soft_wrap=True)
        else:
            print(text, flush=True)

    def note(self, label: str, job: Job, outcome: Outcome, score: str) -> None:
        """Count a job that has ended."""
        self.done[label] += 1
        self.latest[label] = score
        if outcome["status"] == "failed":
            self.failed[label] += 1
            self.say(f"failed: {job.place}: {outcome['reason']}")
        else:
            self.spent.setdefault(label, []).append(outcome["wall"])
        if self._live is None:
            count = f"[{self.done.total()}/{self.total.total()}]"
            print(f"{count} {job.place}: {score}; {self.left()}", flush=True)

    def taken(self, label: str) -> None:
        """Count a job that was done by an earlier call."""
        self.done[label] += 1

    def left(self) -> str:
        """Return the time left, in words."""
        everything = [seconds for spent in self.spent.values() for seconds in spent]
        waiting = self.total - self.done
        if not waiting.total():
            return "all done"
        if not everything:
            return f"{waiting.total()} to go"
        mean = sum(everything) / len(everything)
        seconds = 0.0
        for label, count in waiting.items():
            own = self.spent.get(label)
            seconds += count * (sum(own) / len(own) if own else mean)
        return f"about {span(seconds / self.at_once)} left"

    def _table(self) -> Any:
        from rich.table import Table

        passed = span(time.monotonic() - self.began)
        table = Table(title=f"{self.title}: {passed}, {self.left()}")
        for head in ("row", "done", "failed", "seconds each", "last"):
            table.add_column(head)
        for label, total in self.total.items():
            spent = self.spent.get(label)
            each = f"{sum(spent) / len(spent):.0f}" if spent else ""
            failed = str(self.failed[label] or "")
            done = f"{self.done[label]}/{total}"
            table.add_row(label, done, failed, each, self.latest.get(label, ""))
        return table


def span(seconds: float) -> str:
    """Return a time in words."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02} min"
