"""Words of tables: those for "not known", for 1 and 0, and one word in two spellings."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Sequence

# What pandas, R, spreadsheets and statistics programs write where a value is missing, and people
# where they do not know it. As a class they would be learnt, as a patient they would glue strangers
# together.
_MISSING = frozenset(
    ("", "na", "n/a", "n.a.", "nan", "<na>", "#n/a", "nat", "none", "null", "nil", "-1", "-1.0",
     "?", "??", "-", "--", ".", "#value!", "#ref!", "#name?", "#div/0!", "#num!", "#null!")
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


def nfc(text: str) -> str:
    """Return a text in the composed form of Unicode; macOS writes names of files decomposed."""
    return text if text.isascii() else unicodedata.normalize("NFC", text)


def plain(text: str) -> str:
    """Return a text without what nobody sees: forms of letters, invisible marks, spare spaces.

    Full-width letters and spaces that do not break become plain ones, letters with accents one
    character each. What a spreadsheet guards as `="007"` is what stands in the quotes.
    """
    if not text.isascii():
        text = "".join(c for c in text if unicodedata.category(c) != "Cf")
        text = unicodedata.normalize("NFKC", text)
    guarded = re.fullmatch(r'="(.*)"', text)
    return " ".join((guarded.group(1) if guarded else text).split())


def spelling(word: str) -> str:
    """Return what the spellings of one patient id have in common: `7` for `007`, `7.0` and `7 `.

    Two ids that differ in a digit, a letter or a mark between them differ in it. Zeros in front
    count in ids with letters: spreadsheets take them from numbers only.
    """
    # Not casefold: it would make one of Weiß and Weiss.
    same = unicodedata.normalize("NFC", whole(plain(word)).lower())
    return (same.lstrip("0") or "0") if same.isdecimal() else same


def other_spellings(words: Sequence[str | None]) -> dict[int, int]:
    """Return the place of each word that stands before in another spelling, and where that is.

    Args:
        words: patient ids; None and what names nobody are passed over.
    """
    first: dict[str, int] = {}
    found = {}
    for place, word in enumerate(words):
        if word is not None and known_patient(word):
            before = first.setdefault(spelling(word), place)
            if words[before] != word:
                found[place] = before
    return found


def quoted(*words: str) -> list[str]:
    """Return words in quotes; with their codes where two of them would look alike."""
    alike = len({plain(word) for word in words}) < len(set(words))
    return [ascii(word) if alike and not word.isascii() else f"'{word}'" for word in words]


def means_nothing(label: str) -> bool:
    """Whether a label stands for "no value"; such a word is no class unless a card says so."""
    return plain(label).casefold() in _MISSING


def known_patient(word: str) -> bool:
    """Whether a patient id names somebody."""
    return plain(word).casefold() not in _NOBODY


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
