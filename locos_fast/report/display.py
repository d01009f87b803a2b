"""Text of others, such as paths, names and tokens, as it may be shown in a terminal."""

from __future__ import annotations


def shown(text: object) -> str:
    r"""The text with every character that a terminal would obey, or cannot encode, as an escape: "\x1b", "\n"."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))
