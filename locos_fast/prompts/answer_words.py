"""Where an answer stands in a text: as a word of its own, or in another form of that word."""

from __future__ import annotations

import re

UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u2e80-\ua4cf\uac00-\ud7af\uf900-\ufaff\uff66-\uff9f"
"""Scripts in which words touch, or take their particles without a space: Thai to Khmer, Chinese, Japanese, Korean."""
LETTER = rf"[^\W{UNSPACED}]"  # or a digit: what may not stand beside a word

# how an answer ends -> what another form of it has instead
ENDINGS = {
    "": "s n an ian vian ese ish i er",  # Kenyan, Chilean, Egyptian, Peruvian, Japanese, Israeli, Londoner
    "a": "ese ian",  # Chinese, Canadian
    "ain": "anish",  # Spanish
    "al": "uese",  # Portuguese
    "any": "an",  # German
    "eece": "eek",  # Greek
    "en": "ish",  # Swedish
    "ens": "enian",  # Athenian
    "ey": "ish",  # Turkish
    "land": "nish",  # Finnish
    "o": "an",  # Moroccan
    "um": "an",  # Belgian
    "way": "wegian",  # Norwegian
    "y": "ian",  # Italian
}
SHORT = 4  # letters; an answer of no more loses none of them


def as_a_word(answer: str, text: str, *, any_case: bool = True) -> str | None:
    """The answer as it stands in a text as a word of its own, or several; None if it does not."""
    return _word(_spelled(answer), text, re.IGNORECASE if any_case else 0)


def in_another_form(answer: str, text: str) -> str | None:
    """A word of the text that is the answer with another ending, such as Italian for Italy; None if there is none.

    Only endings of a list count, those of peoples and of the plural in English: by how they begin alone, Greece is
    green and China a chin.
    """
    forms = [
        _spelled(answer[: len(answer) - len(end)] + other)
        for end, others in ENDINGS.items()
        if answer.casefold().endswith(end) and (not end or len(answer) > SHORT)
        for other in others.split()
    ]
    return _word(f"(?:{'|'.join(forms)})s?", text, re.IGNORECASE)


def _spelled(words: str) -> str:
    return r"\s+".join(map(re.escape, words.split()))


def _word(pattern: str, text: str, flags: int) -> str | None:
    found = re.search(rf"(?<!{LETTER}){pattern}(?!{LETTER})", text, flags)
    return found and found[0]
