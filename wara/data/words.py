"""Words that stand for "not known" in tables, and those that stand for 1 and 0."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

# What pandas, R, spreadsheets and statistics programs write where a value is missing, and people
# where they do not know it. As a class they would be learnt, as a patient they would glue strangers
# together.
_MISSING = frozenset(
    ("", "na", "n/a", "n.a.", "nan", "<na>", "#n/a", "nat", "none", "null", "nil", "-1", "-1.0",
     "?", "??", "-", "--", ".")
)  # fmt: skip
_NOBODY = _MISSING | frozenset(
    ("unknown", "unk", "not known", "not available", "missing", "anonymous", "anonymized",
     "anonymised", "anonym", "anon")
)  # fmt: skip

ONES = frozenset(("1", "true"))
ZEROS = frozenset(("0", "false"))
# What REDCap writes for a box and for a question, where a card says that a column is a class.
YES = ONES | {"checked", "yes"}
NO = ZEROS | {"unchecked", "no"}


def means_nothing(label: str) -> bool:
    """Whether a label stands for "no value"; such a word is no class unless a card says so."""
    return label.strip().casefold() in _MISSING


def known_patient(word: str) -> bool:
    """Whether a patient id names somebody."""
    return word.strip().casefold() not in _NOBODY


def nobody_note(words: Sequence[str], what: str, column: str = "patient") -> list[str]:
    """Return the note on patient ids that name nobody; none when there are none.

    Args:
        words: the ids, as written.
        what: what they were found in, such as `rows`.
        column: what the column is called.
    """
    if not words:
        return []
    counts = Counter(word or "empty" for word in words).most_common()
    listed = ", ".join(
        f"{count} {word if word == 'empty' else repr(word)}" for word, count in counts
    )
    return [f"{len(words)} {what} name no {column} ({listed}); each counts as one of its own"]


def whole(number: str) -> str:
    """Return a whole number without the decimals that pandas gave it, `2.0` as `2`.

    Decimal commas are those of spreadsheets. Any other text is returned as it is.
    """
    match = re.fullmatch(r"([+-]?\d+)[.,]0+", number)
    return match.group(1) if match else number
