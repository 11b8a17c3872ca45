"""Numbers of a command line, each within bounds; this file travels in every bundle."""

from __future__ import annotations

import math
from collections.abc import Callable

from wara.errors import WaraError

MOST_BATCH = 4096
MOST_WORKERS = 1024
_LONGEST = 30  # characters of a number; Python refuses to read one of thousands of digits


def whole(flag: str, low: int, high: int) -> Callable[[str], int]:
    """Return what reads a whole number from `low` to `high`, as argparse calls it.

    Raises:
        WaraError: kind "usage", naming the flag and its bounds, by what is returned.
    """

    def read(text: str) -> int:
        plain = text.removeprefix("-")
        if len(text) > _LONGEST or not plain.isdecimal() or not low <= int(text) <= high:
            raise _refusal(flag, text, f"give a whole number from {low} to {high}")
        return int(text)

    return read


def real(flag: str, low: float, high: float) -> Callable[[str], float]:
    """Return what reads a number from `low` to `high`, as argparse calls it.

    Raises:
        WaraError: kind "usage", naming the flag and its bounds, by what is returned.
    """

    def read(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not low <= value <= high:  # false for NaN
            raise _refusal(flag, text, f"give a number from {low:g} to {high:g}")
        return value

    return read


def _refusal(flag: str, text: str, remedy: str) -> WaraError:
    shown = text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."
    return WaraError("usage", f"{flag} is {shown}", "", remedy)
