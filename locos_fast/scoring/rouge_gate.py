"""Whether a generated reply says the answer: the gate of the public code of LOCOS and of Wu et al., ROUGE-1 recall."""

from __future__ import annotations

import functools
import unicodedata
from collections import Counter
from collections.abc import Iterator
from typing import Any

from locos_fast.prompts.compose import check_text

# first words of the Unicode names of letters in scripts that put no spaces between words
UNSPACED = ("CJK", "HIRAGANA", "KATAKANA", "KATAKANA-HIRAGANA", "THAI", "LAO", "KHMER", "MYANMAR", "TIBETAN")


def passes(answer: str, generated: str, threshold: float = 0.5) -> bool:
    """Whether the reply's `rouge_1_recall` is greater than the threshold, which it must exceed: half the words are not
    enough.

    Raises ValueError for a threshold outside 0 <= threshold < 1 and for an answer that is no text.
    """
    if not 0 <= threshold < 1:
        raise ValueError(f"threshold: expected a share, 0 <= threshold < 1, got {threshold}")
    return rouge_1_recall(answer, generated) > threshold


def rouge_1_recall(answer: str, generated: str) -> float:
    """The share of the answer's words that the reply has too, 0 to 1, each as often as the answer has it.

    In words as the package rouge-score cuts and stems them: runs of ASCII letters and digits, in lower case, longer
    ones without their English endings. All other characters are lost on it. So an answer without any ASCII letter or
    digit is compared in words that end at spaces and punctuation, without regard to case and unstemmed; in scripts that
    put no spaces between words (Chinese, Japanese, Thai, ...) each character is one, and so is each symbol, such as an
    emoji. Thinking is for the caller to take away.
    Raises ValueError for an answer that is no text.
    """
    check_text("answer", answer)
    english = any(character.isascii() and character.isalnum() for character in answer)
    words = _rouge_tokenizer().tokenize if english else _words
    wanted, found = Counter(words(answer)), Counter(words(generated))
    if not wanted:  # punctuation alone
        wanted, found = Counter("".join(answer.split())), Counter(generated)
    return (wanted & found).total() / wanted.total()


@functools.cache
def _rouge_tokenizer() -> Any:
    """Its tokenizer alone: its scorer takes absl's logging along, which may close the process's own streams when
    logging is configured anew. Imported here, because it takes NLTK along, which few who import us need."""
    from rouge_score.tokenizers import DefaultTokenizer

    return DefaultTokenizer(use_stemmer=True)


def _words(text: str) -> Iterator[str]:
    word = ""
    for character in unicodedata.normalize("NFKC", text).casefold():
        kind = unicodedata.category(character)[0]
        unspaced = kind in "LMN" and unicodedata.name(character, "").split(" ", 1)[0] in UNSPACED
        if not unspaced and (kind in "LN" or (kind == "M" and word)):  # a mark alone belongs to an emoji
            word += character
            continue
        if word:
            yield word
            word = ""
        if unspaced or kind == "S":
            yield character
    if word:
        yield word
