"""Refusals: one line each, with a remedy and a public exit code."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence

EXIT_CODES = {
    "bug": 1,
    "config": 2,
    "usage": 2,
    "data": 3,
    "artefact": 4,
    "storage": 5,
    "nonfinite": 6,
    "resources": 7,
    "busy": 8,
}


class WaraError(Exception):
    """A refusal that a user can act on.

    Args:
        kind: one of `EXIT_CODES`; decides the exit code of the command.
        what: what is wrong, in plain words.
        where: the file, key, layer or row it is wrong in; empty when `what` says it.
        remedy: what the user can do about it.
    """

    def __init__(self, kind: str, what: str, where: str = "", remedy: str = "") -> None:
        if kind not in EXIT_CODES:
            raise ValueError(f"unknown error kind {kind!r}; expected one of {sorted(EXIT_CODES)}")
        self.kind, self.what, self.where, self.remedy = kind, what, where, remedy
        super().__init__(kind, what, where, remedy)

    @property
    def exit_code(self) -> int:
        """Exit code of the process that stops with this error."""
        return EXIT_CODES[self.kind]

    def __str__(self) -> str:
        """Return the one line that is printed."""
        parts = [part for part in (self.what, self.where, self.remedy) if part]
        return f"error[{self.kind}]: " + "; ".join(parts)


class WaraErrors(WaraError):
    """Several refusals of one check, reported together, one line each.

    Args:
        errors: at least one error; the first one decides kind and exit code.
    """

    def __init__(self, errors: Sequence[WaraError]) -> None:
        first = errors[0]
        super().__init__(first.kind, first.what, first.where, first.remedy)
        self.errors = tuple(errors)

    def __reduce__(self) -> tuple[type[WaraErrors], tuple[tuple[WaraError, ...]]]:
        # Exceptions cross process borders (data workers, DDP) by their arguments.
        return WaraErrors, (self.errors,)

    def __str__(self) -> str:
        """Return one line per error."""
        return "\n".join(str(error) for error in self.errors)


def suggest(word: str, choices: Iterable[str]) -> str:
    """Return the remedy text that names the nearest valid choice.

    Args:
        word: what the user wrote.
        choices: what is valid there.

    Returns:
        `did you mean 'x'?` when one is near, else the list of choices.
    """
    names = sorted(choices)
    near = difflib.get_close_matches(word, names, n=1, cutoff=0.6)
    return f"did you mean '{near[0]}'?" if near else "choose one of: " + ", ".join(names)
